"""Exact masks at 80 % sparsity, by counting and by sorting: six 2048 x 2048 layers, 25.2 M weights.

The sorted form is what one writes with ``jnp.sort``; both give the same masks.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsereg_jax import pruning

from .timing import Candidate, Row, compare, interleave, repeated

PyTree = Any
SPARSITY = 0.8


def model(width: int = 2048, depth: int = 6) -> PyTree:
    """Makes the parameters of an MLP, normal weights and biases."""
    rng = np.random.default_rng(0)
    scale = width**-0.5
    return {
        f"layer_{i}": {
            "kernel": jnp.asarray(scale * rng.standard_normal((width, width), np.float32)),
            "bias": jnp.asarray(scale * rng.standard_normal(width, np.float32)),
        }
        for i in range(depth)
    }


def sort_tensor(params: PyTree) -> PyTree:
    """Masks per tensor from a sort of each tensor's magnitudes."""

    def mask(leaf: jax.Array) -> jax.Array:
        magnitude = jnp.abs(leaf)
        last = jnp.sort(magnitude.ravel())[round(SPARSITY * leaf.size) - 1]
        return magnitude > last

    return jax.tree.map(mask, params)


def sort_global(params: PyTree) -> PyTree:
    """Global masks from one sort of all magnitudes."""
    magnitudes = jax.tree.map(jnp.abs, params)
    joined = jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(magnitudes)])
    last = jnp.sort(joined)[round(SPARSITY * joined.size) - 1]
    return jax.tree.map(lambda magnitude: magnitude > last, magnitudes)


def count_tensor(params: PyTree) -> PyTree:
    """Masks per tensor from this library."""
    return pruning.mask_by_sparsity(params, SPARSITY, scope="tensor", mask=None)


def count_global(params: PyTree) -> PyTree:
    """Global masks from this library."""
    return pruning.mask_by_sparsity(params, SPARSITY, mask=None)


def _outside(rule: Callable[[PyTree], PyTree], params: PyTree, last: PyTree) -> PyTree:
    del last
    return rule(params)


def measure(rounds: int, width: int = 2048, depth: int = 6) -> list[Row]:
    """Times both forms of both masks, and checks that they agree.

    Args:
      rounds: how often.
      width: of the layers.
      depth: their number.

    Returns:
      Rows for the masks per tensor and for the global masks, within jit and outside it.
    """
    params = model(width, depth)
    pairs = {"per tensor": (count_tensor, sort_tensor), "global": (count_global, sort_global)}
    rows = []
    for name, pair in pairs.items():
        ours, against = f"mask_by_sparsity, {name}", "jnp.sort"
        outside = f"{ours}, outside jit"
        runs = {
            ours: repeated(pair[0], params),
            outside: Candidate(partial(_outside, pair[0], params), None),
            against: repeated(pair[1], params),
        }
        seconds, masks = interleave(runs, rounds)
        for one in (ours, outside):
            same = jax.tree.map(
                lambda a, b: bool(jnp.array_equal(a, b)), masks[one], masks[against]
            )
            if not all(jax.tree.leaves(same)):
                raise AssertionError(f"{name}: counting and sorting disagree")
            rows.append(
                compare(
                    *("exact masks at 80 %", runs, seconds, one, against),
                    speedup=True,
                    must=10,
                    goal=20,
                )
            )
    return rows
