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
    image_shape: tuple[int, ...],
) -> Figure:
    """The trade-off curve, the magnitudes before and after, and the first layer's kept weights."""
    figure = Figure(figsize=(13, 4), layout="constrained", dpi=110)
    figure.suptitle(title)
    curve, histogram, weights = figure.subplots(1, 3, width_ratios=(1.15, 1, 1))
    _curve(curve, history, bound)
    _histogram(histogram, dense, sparse)
    _kept_inputs(weights, mask, image_shape)
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


def _kept_inputs(axes, mask, image_shape):
    kernels = [leaf for leaf in jax.tree.leaves(mask) if leaf.shape[0] == np.prod(image_shape)]
    kept = np.asarray(kernels[0]).sum(axis=1).reshape(image_shape).sum(axis=-1)
    image = axes.imshow(kept, cmap="Blues")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel("first layer: weights kept at each pixel")
    axes.figure.colorbar(image, ax=axes, shrink=0.85)
