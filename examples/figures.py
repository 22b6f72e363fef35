"""Pictures of what the loop did."""

from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

import sparsereg_jax as sj


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
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
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
    axes.set_xlabel(f"first layer: weights kept at {where}")
    axes.figure.colorbar(image, ax=axes, shrink=0.85)


def comparison(
    experiment: str, first: dict[str, Any], records: dict[str, list[dict[str, Any]]]
) -> Figure:
    """Sparsity against test error with a curve a method, and the sparsity of each layer.

    Args:
      experiment: its name.
      first: a record, for what they share.
      records: by method, a record a seed.

    Returns:
      The figure. Bands reach from the lowest to the highest seed; methods with a target sparsity
      are points.
    """
    figure = Figure(figsize=(13, 5.2), layout="constrained", dpi=110)
    figure.suptitle(f"{first['settings']['network']}, {first['data']}")
    tradeoff, layers = figure.subplots(1, 2, width_ratios=(1.35, 1))
    dense = np.mean([run["dense_test_error"] for runs in records.values() for run in runs])
    tradeoff.axhline(dense, color="0.6", linewidth=1)
    tradeoff.text(1, dense, " dense", va="bottom", color="0.4", fontsize=8, transform=None)
    tradeoff.texts[-1].set_transform(tradeoff.get_yaxis_transform())
    tradeoff.texts[-1].set_ha("right")
    highest = [dense]
    for i, (method, runs) in enumerate(records.items()):
        color = f"C{i % 10}"
        style = "-" if i < 10 else "--"
        ends = [(1 / (1 - run["sparsity"]), run["test_error"]) for run in runs]
        highest += [wrong for _, wrong in ends]
        curves = [_interpolated(run) for run in runs]
        if all(curve is not None for curve in curves):
            grid = np.geomspace(
                max(curve[0][0] for curve in curves), min(curve[0][-1] for curve in curves), 200
            )
            errors = np.array([np.interp(np.log(grid), np.log(x), y) for x, y in curves])
            tradeoff.plot(grid, errors.mean(0), style, color=color, linewidth=1.4)
            if len(runs) > 1:
                tradeoff.fill_between(grid, errors.min(0), errors.max(0), color=color, alpha=0.15)
        tradeoff.plot(*zip(*ends, strict=True), "o", color=color, markersize=5, label=method)
    tradeoff.set_xscale("log")
    tradeoff.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    tradeoff.set_xlabel("compression: all parameters / kept parameters")
    tradeoff.set_ylabel("test error, %")
    tradeoff.set_ylim(dense * 0.85, min(max(highest) * 1.05, 3 * dense))
    tradeoff.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")
    shown = [method for method in ("default", "paper", "l2", "none") if method in records]
    names = [layer["path"].removeprefix("params/") for layer in first["layers"]]
    names = [name for name in names if name.endswith("kernel")]
    for i, method in enumerate(shown):
        kept = [
            np.mean(
                [
                    100 * (1 - layer["sparsity"])
                    for run in records[method]
                    for layer in run["layers"]
                    if layer["path"].removeprefix("params/") == name
                ]
            )
            for name in names
        ]
        places = np.arange(len(names)) + 0.8 * (i - (len(shown) - 1) / 2) / len(shown)
        color = f"C{list(records).index(method) % 10}"
        layers.barh(places, kept, 0.8 / len(shown), color=color, label=method)
    layers.set_yticks(np.arange(len(names)), [name.removesuffix("/kernel") for name in names])
    layers.invert_yaxis()
    layers.set_xscale("log")
    layers.xaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    layers.set_xlabel("weights kept in each layer")
    layers.legend(frameon=False, fontsize=8)
    return figure


def _interpolated(run):
    """Compressions, rising, and test errors of a run's curve; None without one."""
    points = sorted((1 / (1 - point[0]), point[2]) for point in run["curve"] if point[0] < 1)
    return tuple(np.array(points).T) if len(points) > 1 else None
