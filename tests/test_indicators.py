"""Moves and products of indicators, against JAX's own primitives and their transpositions."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from sparsereg_jax import indicators, program

MOVES = {
    "reshape": (lambda x: x.reshape(6, 4), (2, 3, 4)),
    "reshape of nothing": (lambda x: x.reshape(0, 5), (3, 0)),
    "reshape of other order": (lambda x: lax.reshape(x, (4, 6), dimensions=(2, 0, 1)), (2, 3, 4)),
    "squeeze": (lambda x: jnp.squeeze(x, (0, 2)), (1, 3, 1)),
    "transpose": (lambda x: jnp.transpose(x, (2, 0, 1)), (2, 3, 4)),
    "broadcast": (lambda x: lax.broadcast_in_dim(x, (2, 3, 4, 5), (1, 3)), (3, 1)),
    "broadcast a scalar": (lambda x: lax.broadcast_in_dim(x, (2, 3), ()), ()),
    "slice": (lambda x: lax.slice(x, (1, 0), (5, 3)), (6, 4)),
    "slice with strides": (lambda x: lax.slice(x, (1, 0), (6, 4), (2, 3)), (6, 4)),
    "pad": (lambda x: lax.pad(x, 0.0, ((1, -1, 2), (-1, 2, 0))), (3, 4)),
    "concatenate": (lambda *xs: lax.concatenate(xs, 1), (2, 3), (2, 1), (2, 0)),
    "split": (lambda x: lax.split(x, (1, 0, 3), axis=1), (2, 4)),
    "rev": (lambda x: lax.rev(x, (0, 2)), (2, 3, 4)),
}
DOTS = {
    "matrices": ((((1,), (0,)), ((), ())), (2, 3), (3, 4)),
    "batches first and last": ((((2,), (1,)), ((0, 3), (2, 0))), (2, 3, 4, 5), (5, 4, 2)),
    "two contracted, in another order": (
        (((3, 1), (0, 3)), ((), ())),
        *((2, 3, 4, 5), (5, 2, 1, 3)),
    ),
    "an outer product": ((((), ()), ((), ())), (2, 3), (4,)),
}


def traced(fn, shapes):
    """The last step of a function, and the shapes of its operands and results."""
    structs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    found, _ = program.trace(fn, structs, (True,) * len(shapes))
    (*_, step) = program.all_steps(found.block)
    return step, *([found.avals[s].shape for s in slots] for slots in (step.inputs, step.outputs))


def matrix(fn, shapes):
    """A linear function of all its operands at once as a matrix, from its derivatives."""
    zeros = [jnp.zeros(shape) for shape in shapes]
    rows = jax.jacobian(lambda *xs: jax.tree.leaves(fn(*xs)), tuple(range(len(shapes))))(*zeros)
    blocks = [
        [
            np.asarray(part).reshape(math.prod(part.shape[: part.ndim - x.ndim]), x.size)
            for part, x in zip(row, zeros, strict=True)
        ]
        for row in rows
    ]
    return np.block(blocks)


def parts(flat, shapes):
    sizes = np.cumsum([math.prod(shape) for shape in shapes])[:-1]
    pieces = np.split(flat, sizes)
    return [piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True)]


@pytest.mark.parametrize("name", MOVES)
def test_moves(name):
    fn, *shapes = MOVES[name]
    step, ins, outs = traced(fn, shapes)
    assert step.name in indicators.MOVES
    rng = np.random.default_rng(0)
    values = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    if name == "pad":
        ins, values = [*shapes, ()], [*values, np.float32(0)]
    moved = indicators.move(step, values, outs)
    for ours, jaxs in zip(moved, jax.tree.leaves(fn(*values[: len(shapes)])), strict=True):
        np.testing.assert_array_equal(ours, jaxs)
    linear = matrix(fn, shapes)
    for _ in range(5):
        wanted = [rng.random(shape) < 0.3 for shape in outs]
        flat = np.concatenate([which.reshape(-1) for which in wanted])
        reached = parts((linear != 0).T @ flat, shapes)
        found = indicators.move_back(step, ins, wanted)
        for ours, brute in zip(found[: len(shapes)], reached, strict=True):
            assert ours.dtype == bool
            np.testing.assert_array_equal(ours, brute)


@pytest.mark.parametrize("name", DOTS)
def test_matrix_products(name):
    numbers, *shapes = DOTS[name]
    check_products(functools.partial(lax.dot_general, dimension_numbers=numbers), shapes)


def test_convolutions():
    def fn(x, kernel):
        return lax.conv_general_dilated(x, kernel, (2,), ((1, 0),), rhs_dilation=(2,))

    check_products(fn, [(2, 3, 7), (4, 3, 2)])


def check_products(fn, shapes):
    step, _, (out,) = traced(fn, shapes)
    rng = np.random.default_rng(0)
    for share in (0.1, 0.4, 1.0):
        a, b = ((rng.random(shape) < share) for shape in shapes)
        want = rng.random(out) < 0.3
        ones = [np.float32(a), np.float32(b)]
        np.testing.assert_array_equal(indicators.product(step, a, b), np.asarray(fn(*ones)) != 0)
        found = indicators.product_back(step, a, b, want)
        by_first = matrix(functools.partial(_swapped, fn, ones[1]), shapes[:1])
        by_second = matrix(functools.partial(fn, ones[0]), shapes[1:])
        for ours, linear in zip(found, (by_first, by_second), strict=True):
            np.testing.assert_array_equal(ours.reshape(-1), (linear != 0).T @ want.reshape(-1))


def _swapped(fn, second, first):
    return fn(first, second)


def test_a_product_over_nothing():
    step, _, (out,) = traced(lambda a, b: a @ b, [(2, 0), (0, 3)])
    a, b = np.ones((2, 0), bool), np.ones((0, 3), bool)
    assert not indicators.product(step, a, b).any()
    found = indicators.product_back(step, a, b, np.ones(out, bool))
    assert [which.shape for which in found] == [a.shape, b.shape]
