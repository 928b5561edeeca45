"""Figures from rows: time against N, ratio over (N, head_dim), roofline, whole models.

Colours are Okabe and Ito's, told apart by the colour-blind; every series also has its own marker, line or hatching, and
the heat map's brightness rises with its value, so that all of them can be read in grey. An SVG carries the hash of its
rows, and a mark where the kernels have changed since.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import Row

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", ":", "-.")
HATCHES = ("", "///", "...", "xx")
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
    for index, (name, points) in enumerate(series.items()):
        lengths = sorted(points)
        axes.plot(lengths, [points[n] for n in lengths], label=name, **_style(index))
    axes.set(xscale="log", yscale="log", xlabel="sequence length N", ylabel="µs per head and image")
    lengths = sorted({n for points in series.values() for n in points})
    axes.set_xticks(_spread(lengths), [str(n) for n in _spread(lengths)])
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
    figure, axes = _new(chosen, f"{suite[0].upper()}{suite[1:]}: speed-up over the best peer", 0.62 * len(lengths) + 2.2)
    ratios = [cell[2] for cell in cells.values()]
    norm = LogNorm(min(0.5, *ratios), max(2.0, *ratios))
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
    ticks = [tick for tick in (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6) if norm.vmin <= tick <= norm.vmax]
    bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    bar.minorticks_off()
    return figure


def roofline(rows: list[Row]) -> Any | None:
    """Draw useful GFLOP/s against FLOP per byte, under the roofs that the machine itself reached."""
    chosen = [row for row in rows if row.bound and row.ours_gbs > 0 and row.ours_gflops > 0]
    if not chosen:
        return None
    threads = max(row.threads for row in chosen)
    dtype = main_group(chosen, "attention forward")[0].dtype if main_group(chosen, "attention forward") else chosen[0].dtype
    chosen = [row for row in chosen if (row.threads, row.dtype) == (threads, dtype)]
    figure, axes = _new(chosen, "Useful work under the roofs measured in the same run")
    groups: dict[str, dict[tuple[object, ...], tuple[float, float]]] = {}
    for row in chosen:
        point = (row.ours_gflops / row.ours_gbs, row.ours_gflops)
        groups.setdefault(f"{row.suite.split(',')[0]} ({row.backend})", {})[row.work] = point
    for index, (name, points) in enumerate(groups.items()):
        x, y = zip(*points.values(), strict=True)
        style = _style(index)
        axes.plot(x, y, label=name, color=style["color"], marker=style["marker"], linestyle="", markerfacecolor="none")
    peak, bandwidth = max(row.peak_gflops for row in chosen), max(row.peak_gbs for row in chosen)
    low, high = axes.get_xlim()
    low, high = min(low if low > 0 else 1.0, 1.0), max(high, 4 * peak / bandwidth)
    corner = peak / bandwidth
    axes.plot([low, corner, high], [low * bandwidth, peak, peak], color="black", linewidth=1.5)
    axes.annotate(f"copy {bandwidth:.0f} GB/s", (low * 1.2, low * 1.2 * bandwidth), xytext=(4, -12), textcoords="offset points", size=9)
    axes.annotate(f"matrix product {peak:.0f} GFLOP/s", (high, peak), xytext=(-4, 5), textcoords="offset points", ha="right", size=9)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte of least traffic", ylabel="GFLOP/s", xlim=(low, high))
    axes.legend(frameon=False, fontsize=8)
    return figure


def models(rows: list[Row]) -> Any | None:
    """Draw images per second of whole models, as they are and swapped."""
    chosen = [row for row in harness.best(rows) if row.suite.startswith("model inference")]
    if not chosen:
        return None
    threads = max(row.threads for row in chosen)
    chosen = sorted((row for row in chosen if row.threads == threads), key=lambda row: (row.case, row.suite))[:24]
    figure, axes = _new(chosen, "Whole models, inference: swapped against timm's own", 7.5, 0.42 * len(chosen) + 1.6)
    labels = []
    for index, row in enumerate(chosen):
        mode = row.suite.removeprefix("model inference, ")
        labels.append(f"{row.case.replace('_patch', '/').replace('vit_', 'ViT ')}, {mode}" + f", {row.backend}" * (row.threads == 0))
        speeds = [sizes(row).get("B", 1) / value * 1e3 for value in (row.peer_p50, row.ours_p50)]
        for offset, speed, colour, hatch, name in zip((-0.2, 0.2), speeds, COLOURS[7::-7], ("///", ""), ("timm", "swapped"), strict=True):
            axes.barh(index + offset, speed, 0.38, color=colour, hatch=hatch, edgecolor="white", label=name if index == 0 else None)
        axes.text(max(speeds), index, f"  {row.ratio:.2f} ×", va="center", size=9)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    spread = [sizes(row).get("B", 1) / row.ours_p50 for row in chosen]
    if max(spread) > 30 * min(spread):
        axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.set_xlabel("images per second")
    axes.grid(visible=False, axis="y")
    axes.legend(frameon=False, loc="lower right")
    return figure


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
    axes.set_title(f"{title}\n{first.device}, {first.capability}{threads}, {dtypes}, torch {first.torch}", size=10, loc="left")
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
