"""Pictures of what the loop did."""

import itertools
import re
from typing import Any

import jax
import matplotlib
import numpy as np
from matplotlib.figure import Figure

import sparsereg_jax as sj

Records = dict[str, list[dict[str, Any]]]  # by method, a record a seed

MAIN = ("default", "ready-made", "paper", "l2", "none")  # these stand out
MARKERS = "s^vDP*X<>hpd8"


def report(
    title: str,
    history: list[sj.Check],
    bound: float,
    dense: Any,
    sparse: Any,
    mask: Any,
    example: np.ndarray,
) -> Figure:
    """The trade-off curve, the magnitudes before and after, and the first layer's kept weights."""
    figure = Figure(figsize=(13, 4), layout="constrained", dpi=110)
    figure.suptitle(title)
    curve, histogram, weights = figure.subplots(1, 3, width_ratios=(1.15, 1, 1))
    _curve(curve, history, bound)
    _histogram(histogram, dense, sparse)
    _kept_inputs(weights, mask, example)
    return figure


def _curve(axes, history, bound):
    compression = np.array([1 / (1 - check.sparsity) for check in history])
    accuracy = 100 * np.array([check.metric for check in history])
    met = np.array([check.met_bound for check in history])
    axes.axhline(100 * bound, color="0.6", linewidth=1, label="bound")
    axes.plot(compression[met], accuracy[met], ".", color="C0", markersize=4, label="met the bound")
    axes.plot(compression[~met], accuracy[~met], "x", color="C3", markersize=4, label="missed it")
    axes.set_xlim(0.9 * compression.min(), 1.1 * compression.max())
    _logarithmic(axes, "x")
    axes.set_xlabel("compression: all parameters / kept parameters")
    axes.set_ylabel("validation accuracy at each check, %")
    # A first check after a large pruning may lie far below; the neighbourhood of the bound matters.
    lowest, highest = np.quantile(accuracy, 0.02), accuracy.max()
    axes.set_ylim(lowest - 0.1, highest + 0.1)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)


def _histogram(axes, dense, sparse):
    for params, label, color in ((dense, "dense", "0.7"), (sparse, "sparse, kept", "C0")):
        magnitude = np.concatenate([np.abs(leaf).ravel() for leaf in jax.tree.leaves(params)])
        magnitude = magnitude[magnitude > 0]
        bins = np.geomspace(1e-5, 10, 61)
        axes.hist(np.clip(magnitude, bins[0], bins[-1]), bins, color=color, label=label, alpha=0.9)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("|w|")
    axes.set_ylabel("parameters")
    axes.legend(frameon=False)


def _kept_inputs(axes, mask, example):
    """The first layer: its kept weights at each pixel, or at each place of a convolution."""
    size = np.prod(example.shape)
    kernels = [np.asarray(leaf) for leaf in jax.tree.leaves(mask) if leaf.ndim in (2, 4)]
    flat = [leaf for leaf in kernels if leaf.shape[0] == size]
    if flat:
        kept, where = flat[0].sum(axis=1).reshape(example.shape).sum(axis=-1), "each pixel"
    else:
        first = next(
            leaf for leaf in kernels if leaf.ndim == 4 and leaf.shape[2] == example.shape[-1]
        )
        kept, where = first.sum(axis=(2, 3)), "each place of the kernel"
    image = axes.imshow(kept, cmap="Blues", vmin=0)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel(f"first layer: weights kept\nat {where}")
    axes.figure.colorbar(image, ax=axes, shrink=0.85)


def comparison(records: Records, masks: dict[str, Any]) -> Figure:
    """What an experiment's methods gave, side by side.

    Args:
      records: by method, the record of each seed (see :mod:`examples.command`).
      masks: by method, the kept weights of one network; may be empty.

    Returns:
      Compression against test error, where bands (of the main methods) reach from the lowest
      to the highest seed, points are the runs' ends and diamonds networks tuned at levels of
      sparsity; the share kept in each layer; maps of the first layer's weights.
    """
    first = next(iter(records.values()))[0]
    rows = 2 if masks else 1
    figure = Figure(figsize=(13, 2 + 3.4 * rows), layout="constrained", dpi=110)
    figure.suptitle(f"{first['settings']['network']}, {first['data']}")
    places = figure.add_gridspec(rows, 1, height_ratios=(1.6, 1)[:rows])
    above = places[0].subgridspec(1, 2, width_ratios=(1.5, 1))
    colors = _colors(list(records))
    _tradeoff(figure.add_subplot(above[0]), records, colors)
    _layers(figure.add_subplot(above[1]), records, colors)
    if masks:
        below = places[1].subgridspec(1, len(masks))
        shape = np.empty(first["image_shape"])
        for i, (method, mask) in enumerate(masks.items()):
            axes = figure.add_subplot(below[i])
            _kept_inputs(axes, mask, shape)
            axes.set_title(method, fontsize=9)
            axes.xaxis.label.set_fontsize(7)
    return figure


def _colors(methods):
    """Strong ones for the main methods, pale ones for the others."""
    others = [method for method in methods if method not in MAIN]
    pale = [*range(9, 20, 2), 16, 12, 18, 10, 14]  # of tab20
    chosen = {
        method: matplotlib.colormaps["tab20"](k) for method, k in zip(others, itertools.cycle(pale))
    }
    return chosen | {method: f"C{i}" for i, method in enumerate(MAIN)}


def _tradeoff(axes, records, colors):
    all_runs = [run for runs in records.values() for run in runs]
    dense = np.mean([run["dense_test_error"] for run in all_runs])
    axes.axhline(dense, color="0.6", linewidth=1, label="dense")
    ends, lowest, markers = [], dense, itertools.cycle(MARKERS)
    for method, runs in records.items():
        main = method in MAIN
        color, marker = colors[method], "o" if main else next(markers)
        found = [_curve_of(run) for run in runs]
        curves = [curve for curve in found if curve is not None]
        if curves:
            least = max(curve[0][0] for curve in curves)
            grid = np.geomspace(least, min(curve[0][-1] for curve in curves), 200)
            errors = np.array([np.interp(np.log(grid), np.log(x), y) for x, y in curves])
            axes.plot(grid, errors.mean(0), color=color, linewidth=1.6 if main else 0.9)
            lowest = min(lowest, errors.mean(0).min())
            if main:
                axes.fill_between(grid, errors.min(0), errors.max(0), color=color, alpha=0.15)
        points = [(1 / (1 - run["sparsity"]), run["test_error"]) for run in runs]
        axes.plot(*zip(*points, strict=True), marker, color=color, markersize=5, label=method)
        ends += points
        tuned = [run["tuned"] for run in runs if "tuned" in run]
        shared = sorted(set.intersection(*map(set, tuned)), key=float) if tuned else []
        if shared:
            means = np.mean([[run[level] for level in shared] for run in tuned], axis=0)
            diamonds = list(zip(1 / (1 - means[:, 0]), means[:, 2], strict=True))
            axes.plot(*zip(*diamonds, strict=True), "D:", color=color, markersize=4)
            ends += diamonds
    _logarithmic(axes, "x")
    if min(x for x, _ in ends) > 10:  # what all methods do well is left out
        axes.set_xlim(left=9)
    axes.set_xlabel("compression: all parameters / kept parameters")
    tuning = ", diamonds: tuned there" if any(run.get("tuned") for run in all_runs) else ""
    axes.set_ylabel(f"test error, % (curves: before tuning{tuning})")
    wrong = [y for _, y in ends]
    lowest = min(lowest, *wrong)
    axes.set_ylim(0.95 * lowest, max(1.1 * dense, min(1.1 * max(wrong), 3 * dense)))
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")


def _curve_of(run):
    """Compressions, rising, and test errors of a run; None of one that has no curve."""
    points = sorted(
        {1 / (1 - point[0]): point[2] for point in run["curve"] if point[0] < 1}.items()
    )
    return tuple(np.array(points).T) if len(points) > 1 else None


def _layers(axes, records, colors):
    shown = [method for method in MAIN if method in records]
    shown = shown or list(records)[:4]

    def kept(run):
        return {
            layer["path"].removeprefix("params/").removesuffix("/kernel"): layer["sparsity"]
            for layer in run["layers"]
            if layer["path"].endswith("kernel")
        }

    names = sorted(kept(records[shown[0]][0]), key=_natural)
    height = 0.8 / len(shown)
    for i, method in enumerate(shown):
        shares = [[100 * (1 - kept(run)[name]) for name in names] for run in records[method]]
        places = np.arange(len(names)) + height * (i - (len(shown) - 1) / 2)
        axes.barh(places, np.mean(shares, axis=0), height, color=colors[method], label=method)
    axes.set_yticks(np.arange(len(names)), names, fontsize=8 if len(names) < 12 else 5)
    axes.invert_yaxis()
    _logarithmic(axes, " %")
    axes.set_xlabel("weights kept in each layer")
    axes.legend(frameon=False, fontsize=8)


def _natural(name):
    """For sorting: numbers within a name by their value, so that layer 2 is before layer 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _logarithmic(axes, unit):
    axes.set_xscale("log")
    lowest, highest = axes.get_xlim()
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}{unit}")
    if highest < 10 * lowest:  # there would be one label or none
        axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}{unit}")
