"""Figures from rows: time against N, ratio over (N, head_dim), roofline, whole models.

Colours are Okabe and Ito's, told apart by the colour-blind; every series also has its own marker, line or hatching, and
the heat map's brightness rises with its value, so that all of them can be read in grey. An SVG carries the hash of its
rows, and a mark where the kernels have changed since.
"""

from __future__ import annotations

import hashlib
import re
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import Row

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", ":", "-.")
STALE = "stale: the kernels have changed since this was measured"
Sizes = dict[str, int]


def rows_hash(path: Path) -> str:
    """Return the hash that a figure carries of the file that it shows."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def sizes(row: Row) -> Sizes:
    """Return the numbers of a case: "B8 H12 N197 D64" gives B, H, N and D."""
    return {name: int(number) for name, number in re.findall(r"\b([BHNDP])(\d+)\b", row.case)}


def main_group(rows: list[Row], suite: str) -> list[Row]:
    """Return the rows of a suite in one dtype (the one with most rows), most threads, and the packed layout."""
    rows = [row for row in rows if row.suite == suite and row.layout in ("", "packed") and not row.is_floor]
    if not rows:
        return []
    threads = max(row.threads for row in rows)
    counts: dict[str, int] = {}
    for row in rows:
        counts[row.dtype] = counts.get(row.dtype, 0) + 1
    dtype = max(counts, key=lambda name: counts[name])
    return [row for row in rows if (row.threads, row.dtype) == (threads, dtype)]


def time_against_seqlen(rows: list[Row]) -> Any | None:
    """Draw the time of one head of one image against N, head_dim 64: ours, and each peer."""
    rows = [row for row in main_group(rows, "attention forward") if sizes(row).get("D") == 64]
    series: dict[str, dict[int, float]] = {}
    widest: dict[tuple[str, int], int] = {}
    for row in rows:
        size = sizes(row)
        length, pieces = size["N"], size["B"] * size["H"]
        for name, value in ((f"fastvit {row.backend}", row.ours_p50), (row.peer, row.peer_p50)):
            # Where a length was measured in several batches the largest says most about the kernel.
            if name != harness.NO_PEER and value > 0 and pieces >= widest.get((name, length), 0):
                widest[name, length] = pieces
                series.setdefault(name, {})[length] = value * 1e3 / pieces
    if not series or max(map(len, series.values())) < 2:
        return None
    figure, axes = _new(rows, "Attention forward, head_dim 64: time per head and image")
    # Ours first: a series keeps its colour whichever peers there are.
    for index, (name, points) in enumerate(sorted(series.items(), key=lambda item: not item[0].startswith("fastvit"))):
        lengths = sorted(points)
        axes.plot(lengths, [points[n] for n in lengths], label=name, **_style(index))
    axes.set(xscale="log", yscale="log", xlabel="sequence length N", ylabel="µs per head and image")
    lengths = sorted({n for points in series.values() for n in points})
    axes.set_xticks(_spread(lengths), [str(n) for n in _spread(lengths)])
    times = [value for points in series.values() for value in points.values()]
    steps = [step for step in _steps() if min(times) <= step <= max(times)]
    axes.set_yticks(steps, [f"{step:g}" for step in steps])
    axes.minorticks_off()
    axes.legend(frameon=False)
    return figure


def _spread(lengths: list[int]) -> list[int]:
    """Return the lengths that can be written side by side on a logarithmic axis."""
    kept: list[int] = []
    for length in lengths:
        if not kept or length >= 1.18 * kept[-1]:
            kept.append(length)
    return kept


def _steps() -> Iterator[float]:
    """Yield 1, 2 and 5 of every decade that a time in microseconds may lie in."""
    for decade in range(-3, 7):
        for digit in (1, 2, 5):
            yield digit * 10.0**decade


def heat_map(rows: list[Row], suite: str = "attention forward") -> Any | None:
    """Draw our best backend's speed-up over the best peer, over N and head_dim."""
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm

    cells: dict[tuple[int, int], tuple[int, float, float]] = {}
    chosen = harness.best(main_group(rows, suite))
    for row in chosen:
        size = sizes(row)
        key, pieces = (size["D"], size["N"]), size["B"] * size["H"]
        # The largest batch; among backends, ours that is fastest.
        if key not in cells or (pieces, -row.ours_p50) > (cells[key][0], -cells[key][1]):
            cells[key] = (pieces, row.ours_p50, row.ratio)
    dims, lengths = sorted({key[0] for key in cells}), sorted({key[1] for key in cells})
    if len(cells) < 2:
        return None
    figure, axes = _new(
        chosen, f"{suite[0].upper()}{suite[1:]}: speed-up over the best peer", 0.62 * len(lengths) + 2.2
    )
    ratios = [cell[2] for cell in cells.values()]
    low, high = min(0.5, *ratios), max(2.0, *ratios)
    norm = LogNorm(low, high)
    grid = [[cells[dim, n][2] if (dim, n) in cells else float("nan") for n in lengths] for dim in dims]
    image = axes.imshow(grid, cmap=plt.get_cmap("cividis"), norm=norm, aspect="auto", origin="lower")
    for y, dim in enumerate(dims):
        for x, length in enumerate(lengths):
            if (dim, length) in cells:
                ratio = cells[dim, length][2]
                dark = norm(ratio) < 0.55
                axes.text(x, y, f"{ratio:.2f}", ha="center", va="center", color="white" if dark else "black", size=9)
    axes.set_xticks(range(len(lengths)), [str(n) for n in lengths])
    axes.set_yticks(range(len(dims)), [str(dim) for dim in dims])
    axes.set(xlabel="sequence length N", ylabel="head_dim")
    axes.grid(visible=False)
    bar = figure.colorbar(image, ax=axes, format="%.2g", label="ratio of medians")
    ticks = [tick for tick in (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6) if low <= tick <= high]
    bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    bar.minorticks_off()
    return figure


def fastest(rows: list[Row]) -> list[Row]:
    """Return, for each work, the row of our fastest backend."""
    found: dict[tuple[object, ...], Row] = {}
    for row in rows:
        if row.work not in found or row.ours_p50 < found[row.work].ours_p50:
            found[row.work] = row
    return list(found.values())


def roofline(rows: list[Row]) -> Any | None:
    """Draw useful TFLOP/s of each op against FLOP per byte, under the roofs that the machine itself reached."""
    # Of a model only a floor of its traffic is known: it has no place on this axis.
    kernels = [row for row in rows if row.bound and row.ours_gflops > 0 and not row.suite.startswith("model")]
    if not kernels:
        return None
    dtype = (main_group(kernels, "attention forward") or kernels)[0].dtype
    threads = max(row.threads for row in kernels)
    chosen = fastest([row for row in kernels if (row.threads, row.dtype) == (threads, dtype)])
    if not chosen:
        return None
    figure, axes = _new(chosen, "Useful work under the roofs measured in the same run", 8.6)
    groups: dict[str, list[tuple[float, float]]] = {}
    for row in chosen:
        point = (row.ours_gflops / row.ours_gbs, row.ours_gflops / 1e3)
        groups.setdefault(row.suite.split(",")[0], []).append(point)
    for index, (name, points) in enumerate(groups.items()):
        x, y = zip(*points, strict=True)
        style = _style(index) | {"linestyle": "", "markerfacecolor": "none"}
        axes.plot(x, y, label=name, **style)
    # The roofs of the run differ a little from run to run: the middle one is drawn.
    peak = statistics.median(row.peak_gflops for row in chosen) / 1e3
    bandwidth = statistics.median(row.peak_gbs for row in chosen) / 1e3
    intensities = [x for points in groups.values() for x, _ in points]
    low, high, corner = 0.5 * min(intensities), 2 * max(*intensities, 2 * peak / bandwidth), peak / bandwidth
    low = min(low, corner / 2)
    axes.plot([low, corner, high], [low * bandwidth, peak, peak], color="black", linewidth=1.5)
    axes.annotate(
        f"matrix product {peak:.3g} TFLOP/s", (high, peak), xytext=(-4, 5), textcoords="offset points", ha="right"
    )
    axes.annotate(
        f"copy {bandwidth * 1e3:.0f} GB/s",
        (low, low * bandwidth),
        xytext=(10, -2),
        textcoords="offset points",
        va="top",
    )
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte of least traffic", ylabel="TFLOP/s", xlim=(low, high))
    figure.legend(loc="outside right center", frameon=False)
    return figure


MODES = ("compiled", "graphed", "eager")


def models(rows: list[Row]) -> Any | None:
    """Draw images per second of whole models, as they are and swapped: batch 1 and the largest, in the fastest mode."""
    chosen = fastest([row for row in harness.best(rows) if row.suite.startswith("model inference")])
    if not chosen:
        return None
    threads = max(row.threads for row in chosen)
    cases: dict[tuple[str, int], Row] = {}
    for mode in reversed(MODES):
        for row in chosen:
            if row.threads == threads and row.suite.endswith(mode):
                cases[row.case.split()[0], sizes(row).get("B", 1)] = row
    largest = {name: max(batch for other, batch in cases if other == name) for name, _ in cases}
    shown = [row for (name, batch), row in sorted(cases.items(), key=_model_order) if batch in (1, largest[name])]
    figure, axes = _new(shown, "Whole models, inference: swapped against timm's own", 8.6, 0.42 * len(shown) + 1.5)
    fastest_images = [sizes(row).get("B", 1) / row.ours_p50 for row in shown]
    # A bar has a length only on an axis that begins at 0; over decades there are points instead.
    decades = max(fastest_images) > 30 * min(fastest_images)
    sides = ((-0.2, COLOURS[7], "///", "o", "timm"), (0.2, COLOURS[0], "", "s", "swapped"))
    for index, row in enumerate(shown):
        speeds = [sizes(row).get("B", 1) / value * 1e3 for value in (row.peer_p50, row.ours_p50)]
        if decades:
            axes.plot(speeds, [index, index], color=COLOURS[7], linewidth=1, zorder=1)
        for (offset, colour, hatch, marker, name), speed in zip(sides, speeds, strict=True):
            label = name if index == 0 else None
            if decades:
                axes.plot(speed, index, marker, color=colour, label=label)
            else:
                axes.barh(index + offset, speed, 0.38, color=colour, hatch=hatch, edgecolor="white", label=label)
        axes.text(max(speeds), index, f"   {row.ratio:.2f} ×", va="center")
    axes.set_yticks(range(len(shown)), [_model_label(row) for row in shown])
    axes.invert_yaxis()
    if decades:
        axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.set_xlabel("images per second")
    axes.grid(visible=False, axis="y")
    figure.legend(loc="outside right center", frameon=False)
    return figure


def _model_order(item: tuple[tuple[str, int], Row]) -> tuple[int, str, int]:
    (name, batch), _ = item
    widths = ("tiny", "small", "base", "large", "huge")
    return next((index for index, width in enumerate(widths) if width in name), len(widths)), name, batch


def _model_label(row: Row) -> str:
    name, batch = row.case.split()
    found = re.fullmatch(r"vit_(\w)\w*_patch(\d+)_(\d+)", name)
    width = {"t": "Ti"}.get(found[1], found[1].upper()) if found else ""
    short = f"ViT-{width}/{found[2]}, {found[3]}²" if found else name
    return f"{short}, batch {batch[1:]}, {row.suite.removeprefix('model inference, ')}"


FIGURES: dict[str, Callable[[list[Row]], Any | None]] = {
    "time": time_against_seqlen,
    "ratio": heat_map,
    "ratio-backward": lambda rows: heat_map(rows, "attention backward"),
    "roofline": roofline,
    "models": models,
}


def _style(index: int) -> dict[str, Any]:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": LINES[index % len(LINES)],
        "markersize": 5,
    }


def _new(rows: list[Row], title: str, width: float = 7.0, height: float = 4.2) -> tuple[Any, Any]:
    """Return a figure whose title says what was measured on what, and whether it is stale."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    first = rows[0]
    dtypes, threads = ", ".join(sorted({row.dtype for row in rows})), f", {first.threads} threads" * bool(first.threads)
    axes.set_title(
        f"{title}\n{first.device}, {first.capability}{threads}, {dtypes}, torch {first.torch}", size=10, loc="left"
    )
    if harness.is_stale(rows):
        figure.suptitle(STALE.upper(), size=9, color="#D55E00", weight="bold")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw(path: Path, folder: Path) -> dict[str, Path]:
    """Draw every figure that the rows of ``path`` allow; return the files by kind."""
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    rows, drawn = harness.read(path), {}
    folder.mkdir(parents=True, exist_ok=True)
    # The same rows give the same file: no date, no random names inside.
    with mpl.rc_context({"svg.hashsalt": "fastvit", "font.size": 9}):
        for kind, function in FIGURES.items():
            figure = function(rows)
            if figure is not None:
                drawn[kind] = folder / f"{path.stem}-{kind}.svg"
                figure.savefig(drawn[kind], metadata={"Date": None, "Description": f"rows {rows_hash(path)}"})
                plt.close(figure)
    return drawn
