"""What moves entries, and matrix products of indicators, in NumPy and so without compiling.

A moving primitive gives each result one operand's entry (or the fill). An indicator is a boolean
array; the product of two has the results that any pair of them reaches.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .program import Step, bind

MOVES = frozenset(
    [
        "reshape",
        "broadcast_in_dim",
        "transpose",
        "squeeze",
        "slice",
        "pad",
        "concatenate",
        "split",
        "rev",
    ]
)

Shapes = Sequence[tuple[int, ...]]


def move(step: Step, operands: Sequence[np.ndarray], shapes: Shapes) -> list[np.ndarray]:
    """The results of a moving step, of any dtype, from all its operands and the results' shapes."""
    params, (operand, *_) = step.params, operands
    match step.name:
        case "reshape" if params.get("dimensions") is None:
            return [operand.reshape(shapes[0])]
        case "squeeze":
            return [operand.reshape(shapes[0])]
        case "transpose":
            return [np.transpose(operand, params["permutation"])]
        case "broadcast_in_dim":
            places = dict(zip(params["broadcast_dimensions"], operand.shape, strict=True))
            full = [places.get(d, 1) for d in range(len(shapes[0]))]
            return [np.broadcast_to(operand.reshape(full), shapes[0])]
        case "slice":
            return [operand[_slices(params)]]
        case "rev":
            return [np.flip(operand, params["dimensions"])]
        case "concatenate":
            return [np.concatenate(operands, params["dimension"])]
        case "split":
            return np.split(operand, np.cumsum(params["sizes"])[:-1], params["axis"])
    return [np.asarray(out) for out in bind(step, *map(jnp.asarray, operands))]


def move_back(step: Step, shapes: Shapes, wanted: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Which entries of a moving step's operands are in the wanted ones of its results.

    Args:
      step: the step.
      shapes: of its operands.
      wanted: indicators of its results' shapes.
    """
    params, (want, *_) = step.params, wanted
    match step.name:
        case "reshape" if params.get("dimensions") is None:
            return [want.reshape(shapes[0])]
        case "squeeze":
            return [want.reshape(shapes[0])]
        case "transpose":
            return [np.transpose(want, np.argsort(params["permutation"]))]
        case "broadcast_in_dim":
            sizes = dict(zip(params["broadcast_dimensions"], shapes[0], strict=True))
            stretched = tuple(d for d, n in enumerate(want.shape) if sizes.get(d) != n)
            return [want.any(axis=stretched, keepdims=True).reshape(shapes[0])]
        case "slice":
            out = np.zeros(shapes[0], bool)
            out[_slices(params)] = want
            return [out]
        case "rev":
            return [np.flip(want, params["dimensions"])]
        case "concatenate":
            axis = params["dimension"]
            return np.split(want, np.cumsum([shape[axis] for shape in shapes])[:-1], axis)
        case "split":
            return [np.concatenate(wanted, params["axis"])]
    return transpose(lambda *operands: bind(step, *operands), shapes, *wanted)


def _slices(params: dict[str, Any]) -> tuple[slice, ...]:
    strides = params["strides"] or [1] * len(params["start_indices"])
    bounds = params["start_indices"], params["limit_indices"], strides
    return tuple(slice(*bound) for bound in zip(*bounds, strict=True))


def transpose(fn: Any, shapes: Shapes, *wanted: np.ndarray) -> list[np.ndarray]:
    """Which entries of a linear function's operands reach the wanted ones of its results."""
    pull = jax.linear_transpose(fn, *(jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes))
    found = pull([jnp.asarray(which.astype(np.float32)) for which in wanted])
    return [np.asarray(out) != 0 for out in found]


def product(step: Step, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The results of a matrix product or convolution that a pair of indicated entries reaches."""
    if step.name == "dot_general":
        (left, sizes_a), (right, sizes_b) = _matrices(step, a, b)
        batch, free, _ = sizes_a
        return (left @ np.matrix_transpose(right)).reshape(*batch, *free, *sizes_b[1]) != 0
    return np.asarray(full_product(step, a, b)) != 0


def product_back(
    step: Step, a: np.ndarray, b: np.ndarray, want: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Which entries of each factor reach the wanted results with an indicated one of the other."""
    if step.name == "dot_general":
        (left, sizes_a), (right, sizes_b) = _matrices(step, a, b)
        asked = want.reshape(left.shape[0], left.shape[1], right.shape[1]).astype(np.float32)
        order_a, order_b = _orders(step, a.ndim, b.ndim)
        first = (asked @ right).reshape(*itertools.chain(*sizes_a))
        second = (np.matrix_transpose(asked) @ left).reshape(*itertools.chain(*sizes_b))
        return (
            np.transpose(first, np.argsort(order_a)) != 0,
            np.transpose(second, np.argsort(order_b)) != 0,
        )
    (first,) = transpose(lambda x: [full_product(step, x, b)], [a.shape], want)
    (second,) = transpose(lambda x: [full_product(step, a, x)], [b.shape], want)
    return first, second


def full_product(step: Step, a: Any, b: Any, dtype: Any = np.float32) -> Any:
    """A matrix product or convolution of operands of another dtype, at full precision."""
    (out,) = bind(
        step,
        jnp.asarray(a, dtype),
        jnp.asarray(b, dtype),
        preferred_element_type=np.dtype(dtype),
        precision=jax.lax.Precision.HIGHEST,
    )
    return out


def _orders(step: Step, *ndims: int) -> list[list[int]]:
    """The axes of a dot_general's factors: batches, what stays, what is summed over."""
    over, batch = step.params["dimension_numbers"]
    return [
        [*first, *(d for d in range(ndim) if d not in (*first, *last)), *last]
        for ndim, first, last in zip(ndims, batch, over, strict=True)
    ]


def _matrices(step: Step, *factors: np.ndarray) -> list[tuple[np.ndarray, list[tuple[int, ...]]]]:
    """The factors as shape=[batch, free, summed], and the sizes of the axes in each of these."""
    (over, _), (batch, _) = step.params["dimension_numbers"]
    matrices = []
    for factor, order in zip(factors, _orders(step, *(f.ndim for f in factors)), strict=True):
        ordered = np.transpose(factor, order)
        ends = len(batch), factor.ndim - len(over)
        parts = slice(ends[0]), slice(*ends), slice(ends[1], None)
        sizes = [ordered.shape[part] for part in parts]
        matrix = ordered.reshape([math.prod(part) for part in sizes]).astype(np.float32)
        matrices.append((matrix, sizes))
    return matrices
