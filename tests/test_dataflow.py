"""What varies and what is needed, against changing every entry; axes that factor."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from sparsereg_jax import axes, axis_rules, dataflow, program


def convolutional(params, x):
    """Padded and strided convolutions, pooling, and a dense layer, with dead channels."""
    numbers = ("NHWC", "HWIO", "NHWC")
    y = lax.conv_general_dilated(x, params["k"], (1, 1), "SAME", dimension_numbers=numbers)
    y = jnp.tanh(y + params["b"].reshape(1, 1, 1, -1))
    y = lax.conv_general_dilated(y, params["k2"], (2, 2), "SAME", dimension_numbers=numbers)
    y = lax.reduce_window(y, -jnp.inf, lax.max, (1, 2, 1, 1), (1, 1, 1, 1), "VALID")
    return y.reshape(y.shape[0], -1) @ params["w"]


def convolutional_params(rng):
    params = {"k": rng.normal(size=(3, 3, 2, 4)), "b": rng.normal(size=4)}
    params |= {"k2": rng.normal(size=(2, 2, 4, 3)), "w": rng.normal(size=(18, 2))}
    params["k"][..., 1] = 0
    params["k"][:, :, 1, 2] = 0
    params["k2"][:, :, 3] = 0
    params["w"][[0, 1, 2, 5, 8]] = 0
    return params, rng.normal(size=(1, 6, 5, 2))


def attention(params, x):
    heads = [jnp.einsum("btd,dhk->bthk", x, params[name]) for name in ("q", "k", "v")]
    scores = jnp.einsum("bqhk,bthk->bhqt", heads[0], heads[1])
    scores = jnp.where(jnp.tril(jnp.ones((4, 4), bool))[None, None], scores, -1e9)
    out = jnp.einsum("bhqt,bthk->bqhk", jax.nn.softmax(scores), heads[2])
    return jnp.concatenate([out[:, -1].reshape(1, -1), x[:, 0] * params["gate"][None]], axis=1)


def attention_params(rng):
    params = {name: rng.normal(size=(3, 2, 2)) for name in ("q", "k", "v")}
    params["gate"] = np.array([1.0, 0.0, 2.0])
    params["q"][:, 1, 0] = params["k"][:, 0, 1] = params["v"][1] = 0
    return params, rng.normal(size=(1, 4, 3))


@pytest.mark.parametrize(
    ("fn", "make"),
    [(convolutional, convolutional_params), (attention, attention_params)],
    ids=["convolutional", "attention"],
)
def test_against_changing_each_entry(fn, make, x64):
    params, x = make(np.random.default_rng(0))
    traced, _ = program.trace(fn, (params, x), (False, True))
    *leaves, last = traced.block.inputs
    values = [dataflow.constant(leaf) for leaf in jax.tree.leaves(params)]
    known = dataflow.forwards(traced, [*values, dataflow.unknown(x.shape)])
    needed = dataflow.backwards(traced, known)
    run = jax.jit(fn)

    # An entry of the input is needed exactly if changing it changes the result. The causal mask
    # leaves the last position all keys.
    changes = np.zeros(x.shape, bool)
    for index in np.ndindex(*x.shape):
        other = x.copy()
        other[index] += 0.7
        changes[index] = (run(params, other) != run(params, x)).any()
    np.testing.assert_array_equal(needed[last], changes)

    # Those of a leaf that are neither zero nor needed may have any value.
    rng = np.random.default_rng(1)
    free = {
        name: ~needed.get(slot, np.zeros(params[name].shape, bool)) & (params[name] != 0)
        for name, slot in zip(sorted(params), leaves, strict=True)
    }
    changed = {name: params[name] + which * rng.normal() for name, which in free.items()}
    assert any(which.any() for which in free.values())
    np.testing.assert_allclose(run(changed, x), run(params, x), rtol=1e-12)

    # An entry that does not vary has its value for every input, at every step.
    (result,) = traced.block.outputs
    # Of the result none; of that of attention one, by the gate of zero.
    assert (~known[result].varies).sum() == (0 if fn is convolutional else 1)
    checked = 0
    for _ in range(3):
        inputs = [*jax.tree.leaves(params), rng.normal(size=x.shape)]
        found = dict(zip(traced.block.inputs, inputs, strict=True)) | traced.constants
        for step in program.all_steps(traced.block):
            if step.call is not None:
                made = [found[slot] for slot in step.call.body.outputs]
            else:
                made = program.bind(step, *(jnp.asarray(found[slot]) for slot in step.inputs))
            for slot, value in zip(step.outputs, made, strict=True):
                found[slot], fixed = value, ~known[slot].varies
                if fixed.any():
                    checked += fixed.sum()
                    expected = known[slot].value[fixed]
                    np.testing.assert_allclose(np.asarray(value)[fixed], expected, rtol=1e-12)
    assert checked > 200


def test_axes_factor():
    dimensions = axes.Dimensions()
    image, flat = [dimensions.new(n) for n in (7, 7, 50)], dimensions.new(2450)
    dimensions.unify(sum(image, ()), flat)
    assert dimensions.expand(flat) == sum(image, ())
    # And a flat axis that meets another factoring of itself: 50 = 10 * 5 from then on.
    channels, groups = dimensions.new(50), [dimensions.new(10), dimensions.new(5)]
    dimensions.unify(channels, image[2])
    dimensions.unify(channels, sum(groups, ()))
    assert [dimensions.size(d) for d in dimensions.expand(flat)] == [7, 7, 10, 5]
    assert not any(dimensions.is_frozen(d) for d in dimensions.expand(flat))


def test_axes_that_do_not_factor_are_frozen():
    dimensions = axes.Dimensions()
    a, b = [dimensions.new(6), dimensions.new(4)], [dimensions.new(8), dimensions.new(3)]
    dimensions.unify(sum(a, ()), sum(b, ()))
    assert all(dimensions.is_frozen(d) for axis in (*a, *b) for d in axis)


def test_links_of_an_axis_that_is_split_later_freeze_it():
    dimensions = axes.Dimensions()
    whole, part = dimensions.new(6), dimensions.new(4)
    dimensions.link(whole, np.arange(4), part, np.arange(4), "a slice")
    dimensions.unify(whole, dimensions.new(2) + dimensions.new(3))
    ((_, maker),) = dimensions.settle()
    assert maker == "a slice"
    assert not dimensions.links
    assert all(dimensions.is_frozen(d) for d in dimensions.expand(whole + part))


@pytest.mark.parametrize(
    ("before", "after", "blocks"),
    [
        ((2, 28, 28, 1), (2, 784), [([0], [0]), ([1, 2], [1]), ([3], [])]),
        ((6, 8), (6, 2, 4), [([0], [0]), ([1], [1, 2])]),
        ((4, 6), (8, 3), [([0, 1], [0, 1])]),
        ((5,), (1, 5), [([0], [0, 1])]),
        ((), (1, 1), [([], [0, 1])]),
    ],
)
def test_blocks_of_a_reshape(before, after, blocks):
    assert axis_rules._blocks(before, after) == blocks


def test_equal_parts_of_an_axis_are_products_with_it():
    """Queries, keys and values in one matrix of 24 columns, each cut into 2 heads of 4."""
    dimensions = axes.Dimensions()
    whole, parts = dimensions.new(24), [dimensions.new(8) for _ in range(3)]
    for i, part in enumerate(parts):
        dimensions.link(whole, np.arange(8 * i, 8 * i + 8), part, np.arange(8), "split")
    heads = dimensions.new(2) + dimensions.new(4)
    dimensions.unify(parts[0], heads)
    assert dimensions.settle() == []
    assert [dimensions.size(d) for d in dimensions.expand(whole)] == [3, 2, 4]
    assert all(dimensions.expand(whole)[1:] == dimensions.expand(part) for part in parts)
    assert [dimensions.is_frozen(d) for d in dimensions.expand(whole)] == [True, False, False]
