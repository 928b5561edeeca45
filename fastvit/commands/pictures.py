"""The photograph that ``fastvit demo`` looks at, and the two pictures that it leaves behind."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastvit.commands import BadInputError
from fastvit.commands.timing import Race, ratio_text

if TYPE_CHECKING:
    from PIL.Image import Image

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")

# Okabe and Ito's blue against a light grey: they differ in hue for every kind of colour vision, and in lightness.
PYTORCH_COLOUR, FASTVIT_COLOUR = "#B4B4B4", "#0072B2"
INK = "#222222"
FONT_SIZE = 12
HEADS_SHOWN = 6
# What two decimals write as 1.00 is called neither slower nor faster.
EVEN = 0.995


def load_photograph(name: str) -> Image:
    """Return a photograph of scikit-image by name, or an image file, in RGB. Raises BadInputError."""
    from PIL import Image, UnidentifiedImageError

    accepted = f"accepted are {', '.join(PHOTOGRAPHS)}, and the path of an image file"
    if name in PHOTOGRAPHS and not Path(name).is_file():
        import skimage.data

        return Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
    if not Path(name).is_file():
        raise BadInputError(f"--image: got {name!r}, which is no file; {accepted}")
    try:
        with Image.open(name) as image:
            return image.convert("RGB")
    except UnidentifiedImageError:
        raise BadInputError(f"--image: got {name!r}, which is no image that Pillow reads; {accepted}") from None
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise BadInputError(f"--image: got {name!r}, which cannot be read ({error}); {accepted}") from None


def crop(image: Image, height: int, width: int) -> Image:
    """Return the largest centred piece with the proportions height : width, resized to that many pixels."""
    from PIL import Image as Images
    from PIL import ImageOps

    return ImageOps.fit(image, (width, height), method=Images.Resampling.BICUBIC)


def draw_attention(path: Path, photograph: Image, weights: np.ndarray, title: str, subtitle: str) -> None:
    """Draw the photograph, the same with the mean attention of one query over it, and a few single heads.

    Args:
        path: the .png to write.
        photograph: RGB, as the model saw it.
        weights: [H, rows, columns], each head's attention in multiples of the uniform weight 1/N.
        title, subtitle: the two lines above the pictures.
    """
    plt = _pyplot()
    heads = weights[:HEADS_SHOWN]
    figure = plt.figure(figsize=(10.4, 8.0), layout="constrained")
    figure.suptitle(title, fontsize=FONT_SIZE + 4, fontweight="bold", color=INK)
    above, below = figure.subfigures(2, 1, height_ratios=(2.75, 1))
    above.suptitle(subtitle, fontsize=FONT_SIZE, color=INK)
    photo_axes, mean_axes = above.subplots(1, 2)
    photo_axes.imshow(photograph)
    photo_axes.set_title("the photograph, as the model sees it", fontsize=FONT_SIZE)
    mean = weights.mean(axis=0)
    shown = _overlay(mean_axes, photograph, mean)
    mean_axes.set_title(f"attention, mean of {len(weights)} heads", fontsize=FONT_SIZE)
    bar = above.colorbar(shown, ax=[photo_axes, mean_axes], shrink=0.9, pad=0.02)
    bar.set_label("attention weight × number of tokens (1 = uniform)", fontsize=FONT_SIZE)
    bar.formatter.set_useOffset(False)
    bar.ax.tick_params(labelsize=FONT_SIZE - 1)
    head_axes = np.atleast_1d(below.subplots(1, len(heads)))
    for index, (axes, head) in enumerate(zip(head_axes, heads, strict=True)):
        _overlay(axes, photograph, head)
        axes.set_title(f"head {index}", fontsize=FONT_SIZE)
    below.suptitle("single heads, each coloured from its own lowest to its own highest weight", fontsize=FONT_SIZE)
    for axes in (photo_axes, mean_axes, *head_axes):
        axes.set_axis_off()
    _save(figure, path)


def _overlay(axes: Any, photograph: Image, weights: np.ndarray) -> Any:
    extent = (0, photograph.width, photograph.height, 0)
    axes.imshow(photograph.convert("L"), cmap="gray", extent=extent, vmin=0, vmax=255)
    # From the lowest to the highest weight of this panel: one scale for all would leave the flat heads a single colour.
    return axes.imshow(weights, cmap="viridis", alpha=0.65, extent=extent, interpolation="bilinear")


def draw_times(path: Path, races: list[Race], title: str, subtitle: str) -> None:
    """Draw p50 with p20 to p80 of PyTorch and fastvit, a panel with its own axis from 0 for each race."""
    plt = _pyplot()
    figure, panels = plt.subplots(len(races), 1, figsize=(10.4, 1.2 + 1.75 * len(races)), layout="constrained")
    figure.get_layout_engine().set(hspace=0.08)
    figure.suptitle(f"{title}\n", fontsize=FONT_SIZE + 4, fontweight="bold", color=INK)
    for axes, one in zip(np.atleast_1d(panels), races, strict=True):
        _draw_race(axes, one)
    np.atleast_1d(panels)[-1].set_xlabel(
        f"milliseconds, less is better: p50, whiskers p20 to p80; each panel has its own axis\n{subtitle}",
        fontsize=FONT_SIZE, color=INK,
    )  # fmt: skip
    _save(figure, path)


def _draw_race(axes: Any, one: Race) -> None:
    for place, (label, timing, colour) in enumerate(
        (("PyTorch", one.pytorch, PYTORCH_COLOUR), ("fastvit", one.fastvit, FASTVIT_COLOUR))
    ):
        whisker = [[timing.p50 - timing.p20], [timing.p80 - timing.p50]]
        axes.barh(place, timing.p50, height=0.72, color=colour, label=label)
        axes.errorbar(timing.p50, place, xerr=whisker, color=INK, capsize=5, linewidth=1.6)
        axes.annotate(
            _digits(timing.p50), (timing.p80, place), xytext=(8, 0), textcoords="offset points", va="center",
            fontsize=FONT_SIZE, color=INK,
        )  # fmt: skip
    axes.set_yticks((0, 1), ("PyTorch", "fastvit"), fontsize=FONT_SIZE, color=INK)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.18 * max(one.pytorch.p80, one.fastvit.p80))
    axes.set_title(one.name, loc="left", fontsize=FONT_SIZE + 1, color=INK)
    verdict = f"{ratio_text(one.ratio)}× the speed of PyTorch" + (": slower" if one.ratio < EVEN else "")
    axes.set_title(verdict, loc="right", fontsize=FONT_SIZE + 1, fontweight="bold", color=INK)
    axes.tick_params(axis="x", labelsize=FONT_SIZE - 1)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _digits(milliseconds: float) -> str:
    return f"{milliseconds:#.3g}".rstrip(".") + " ms" if milliseconds < 1000 else f"{milliseconds:.0f} ms"


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot

    figure.savefig(path, dpi=130, facecolor="white", bbox_inches="tight", pad_inches=0.15)
    matplotlib.pyplot.close(figure)
