"""Floating-point operations as XLA counts them: of a function, and of what reads each leaf."""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import jax

from .program import Program, Step, all_steps, bind, trace

LOOPS = {"scan", "while", "cond"}  # XLA counts a loop's body once and all branches


def count_flops(fn: Callable[..., Any], *arguments: Any) -> float | None:
    """Counts the floating-point operations of a function by XLA's cost analysis.

    Args:
      fn: a function that ``jax.jit`` takes.
      *arguments: arrays or shapes (``jax.ShapeDtypeStruct``); only those of the shapes count.

    Returns:
      The count of the program compiled for the CPU, which counts all operations (a GPU's compiler
      leaves out those of its libraries): a multiplication and an addition are two, the body of a
      loop counts once. None where the compiler does not tell.

    Example:
      >>> import jax.numpy as jnp
      >>> count_flops(jnp.dot, jnp.ones((4, 5)), jnp.ones((5, 6)))  # 2 x 4 x 5 x 6
      240.0
    """
    with _counting():
        lowered = jax.jit(fn).lower(*jax.tree.map(_struct, arguments))
        found = _flops(lowered.compile().cost_analysis())
        return _flops(lowered.cost_analysis()) if found is None else found


def count_flops_by_leaf(fn: Callable[..., Any], params: Any, *inputs: Any) -> list[float | None]:
    """Counts the operations that read each leaf of the parameters.

    Each operation is counted by XLA alone, before it is fused with others. An operation belongs to
    a leaf if it reads that leaf or what was computed from parameters only; one that reads several
    leaves (a normalization's scale and variance) belongs to each of them, and one that reads none
    (an activation, a softmax) to none. So the counts do not sum up to that of the whole function.

    Args:
      fn: ``fn(params, *inputs)``, traceable.
      params: a tree of arrays or shapes.
      *inputs: arrays or shapes.

    Returns:
      A count for each leaf, in the order of ``jax.tree.leaves(params)``; None for a leaf that a
      loop or a branch reads, where an operation is not what is run.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"bias": jnp.ones(6), "kernel": jnp.ones((5, 6))}
      >>> def fn(params, x):
      ...     return jax.nn.relu(x @ params["kernel"] + params["bias"][None])
      >>> count_flops_by_leaf(fn, params, jnp.ones((4, 5)))
      [24.0, 240.0]
    """
    structs = jax.tree.map(_struct, (params, *inputs))
    program, _ = trace(fn, structs, (False,) + (True,) * len(inputs))
    leaves = len(jax.tree.leaves(params))
    readers: dict[int, set[int]] = {
        slot: {leaf} for leaf, slot in enumerate(program.block.inputs[:leaves])
    }
    counts: list[float | None] = [0.0] * leaves
    for step in all_steps(program.block):
        owners = set().union(*(readers.get(slot, set()) for slot in step.inputs))
        if not owners:
            continue
        if step.call is None:  # a call's body has been counted
            flops = None if step.name in LOOPS else _step_flops(program, step)
            for leaf in owners:
                known = counts[leaf]
                counts[leaf] = None if known is None or flops is None else known + flops
        readers |= {slot: owners for slot in step.outputs if not program.reached[slot]}
    return counts


def _step_flops(program: Program, step: Step) -> float | None:
    operands = [_struct(program.avals[slot]) for slot in step.inputs]
    with _counting():
        lowered = jax.jit(lambda *operands: bind(step, *operands)).lower(*operands)
        found = _flops(lowered.cost_analysis())
        return _flops(lowered.compile().cost_analysis()) if found is None else found


def _counting() -> contextlib.AbstractContextManager[Any]:
    """The CPU as the default device, where JAX has one."""
    try:
        return jax.default_device(jax.devices("cpu")[0])
    except RuntimeError:
        return contextlib.nullcontext()


def _flops(analysis: Any) -> float | None:
    """The count in an analysis: XLA leaves out a 0; a negative one is not known."""
    if not isinstance(analysis, dict) or not analysis:
        return None
    flops = float(analysis.get("flops", 0.0))
    return flops if math.isfinite(flops) and flops >= 0 else None


def _struct(leaf: Any) -> jax.ShapeDtypeStruct:
    aval = leaf if hasattr(leaf, "shape") and hasattr(leaf, "dtype") else jax.typeof(leaf)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)
