"""The pictures of a report: the trade-off curve, magnitudes before and after, kept weights.

Each is small enough to be read on a phone; names that come from users are written in ASCII, since
a font may lack what else they hold, and are never read as formulas.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from .iterative import Check

CELLS = 160  # of a map, along each axis at most
BINS = 50
# A cell with one kept weight of many is to be seen beside an empty one.
SHADES = LinearSegmentedColormap.from_list("shades", ["#6baed6", "#08306b"])


def curve(history: Sequence[Check], bound: float | None) -> Figure:
    """The metric over the compression at each check of the loop that left something."""
    checks = [check for check in history if check.sparsity < 1]
    compression = np.array([1 / (1 - check.sparsity) for check in checks])
    metric = np.array([check.metric for check in checks])
    met = np.array([check.met_bound for check in checks], bool)
    figure = Figure(figsize=(5.6, 3.9), layout="constrained", dpi=130)
    axes = figure.subplots()
    if bound is not None:
        axes.axhline(bound, color="0.55", linewidth=1.2, label=f"bound {bound:g}")
    style: dict[str, Any] = {"linestyle": "", "markersize": 5}
    axes.plot(compression[met], metric[met], marker="o", color="C0", label="met the bound", **style)
    axes.plot(
        compression[~met], metric[~met], marker="x", color="C3", label="missed the bound", **style
    )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("compression: all parameters / kept parameters")
    axes.set_ylabel("metric at each check")
    axes.grid(color="0.92")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    return figure


def magnitudes(dense: Sequence[np.ndarray] | None, kept: Sequence[np.ndarray]) -> Figure:
    """|w| of all layers together, before and after; zeros have no place on the axis."""
    figure = Figure(figsize=(5.6, 3.9), layout="constrained", dpi=130)
    _histogram(figure.subplots(), dense, kept)
    return figure


def layer(
    name: str,
    keep: np.ndarray,
    dense: np.ndarray | None,
    kept: np.ndarray,
) -> Figure:
    """One layer: which of its weights are kept, and |w| before and after."""
    figure = Figure(figsize=(4.4, 5.6), layout="constrained", dpi=130)
    figure.suptitle(_ascii(name), fontsize=10, parse_math=False)
    upper, lower = figure.subplots(2, 1, height_ratios=(1.2, 1))
    _map(upper, keep)
    _histogram(lower, None if dense is None else [dense], [kept])
    return figure


def _histogram(axes: Axes, dense: Sequence[np.ndarray] | None, kept: Sequence[np.ndarray]) -> None:
    groups = [("after", "C0", kept)]
    if dense is not None:
        groups.insert(0, ("before", "0.72", dense))
    # Layer by layer, twice: in float64, all at once, they would take several times the network.
    ranges = [
        (magnitude.min(), magnitude.max())
        for _, _, arrays in groups
        for array in arrays
        if (magnitude := _magnitudes(array)).size
    ]
    if not ranges:
        axes.text(0.5, 0.5, "no weight differs from zero", ha="center", transform=axes.transAxes)
        axes.set_xticks([])
        axes.set_yticks([])
        return
    smallest, largest = min(low for low, _ in ranges), max(high for _, high in ranges)
    lowest = max(smallest, 1e-6 * largest)  # what is smaller falls in the first bin
    # A power of two more at each end, so that a single magnitude has a bin around it.
    bins = np.geomspace(lowest / 2, largest * 2, BINS + 1)
    highest = 10
    for label, color, arrays in groups:
        counts = np.zeros(BINS, np.int64)
        for array in arrays:
            counts += np.histogram(np.maximum(_magnitudes(array), lowest), bins)[0]
        highest = max(highest, counts.max())
        number = counts.sum()
        axes.stairs(counts, bins, fill=True, color=color, label=f"{label}: {number:,} not zero")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(0.5, 2 * highest)
    axes.set_xlabel("|w|")
    axes.set_ylabel("weights")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False, fontsize=8)


def _magnitudes(array: np.ndarray) -> np.ndarray:
    """The finite magnitudes that are not zero, in float64: no dtype loses the smallest."""
    magnitude = np.abs(array.astype(np.float64).ravel())
    return magnitude[(magnitude > 0) & np.isfinite(magnitude)]


def _map(axes: Axes, keep: np.ndarray) -> None:
    """The share kept in each cell of the leaf as a matrix, its last axis to the right."""
    columns = keep.shape[-1] if keep.ndim else 1
    matrix = keep.reshape(-1, columns)
    share = _share(_share(matrix.astype(np.float32), 0), 1)
    highest = share.max(initial=0.0)
    axes.imshow(
        np.ma.masked_equal(share, 0),  # white
        cmap=SHADES,
        vmin=0,
        vmax=highest or 1,
        aspect="auto",
        interpolation="nearest",
        extent=(0, matrix.shape[1], matrix.shape[0], 0),
    )
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    if matrix.shape[0] == 1:
        axes.set_yticks([])
    axes.tick_params(labelsize=8)
    cells = "one weight a cell" if share.shape == matrix.shape else f"darkest: {highest:.1%} kept"
    axes.set_title(f"kept: {int(matrix.sum()):,} of {matrix.size:,}; {cells}", fontsize=8)


def _share(matrix: np.ndarray, axis: int) -> np.ndarray:
    """Means over runs of an axis, so that it has CELLS places at most."""
    length = matrix.shape[axis]
    if length <= CELLS:
        return matrix
    starts = np.linspace(0, length, CELLS, endpoint=False).astype(int)
    runs = np.diff([*starts, length])
    return np.add.reduceat(matrix, starts, axis) / (runs if axis else runs[:, None])


def _ascii(name: str) -> str:
    text = name.encode("ascii", "backslashreplace").decode()
    return text if len(text) <= 48 else f"...{text[-45:]}"
