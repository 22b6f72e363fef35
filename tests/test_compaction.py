"""Compacted networks: widths worked out by hand, the same function, and what is refused."""

import functools
import subprocess
import sys
from pathlib import Path

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import export, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import sparsereg_jax as sj
from examples import models

from . import random_graphs
from .programs import equations

RESULTS = Path(__file__).parent.parent / "results"


@pytest.fixture(autouse=True)
def as_users_write():
    """Users' functions add a bias of one axis to a batch of two; so do the ones of these tests.

    Every program here runs once or twice, so XLA is not to optimize it.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.numpy_rank_promotion("allow"):
        yield
    jax.config.update("jax_disable_most_optimizations", False)


def shapes(plan):
    return {leaf.path: leaf.new_shape for leaf in plan.leaves}


def randomized(tree, seed=0):
    """A host copy whose vectors (biases, scales, statistics) are random, variances positive."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        value = np.array(leaf)
        if value.ndim == 1:
            value = rng.normal(size=value.shape).astype(value.dtype)
            value = np.abs(value) + 0.5 if "var" in jax.tree_util.keystr(path) else value
        return value

    return jax.tree_util.tree_map_with_path(draw, tree)


def agree(fn, params, small, *inputs, rtol=1e-5):
    old = jax.tree.leaves(jax.jit(fn)(params, *inputs))
    new = jax.tree.leaves(jax.jit(small.fn)(small.params, *inputs))
    for a, b in zip(old, new, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(b, a, rtol=0, atol=rtol * np.abs(a).max())


def half(tree):
    def cast(leaf):
        leaf = jnp.asarray(leaf)
        return leaf.astype(jnp.bfloat16) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(cast, tree)


# --- planted masks, widths by hand -----------------------------------------------------------


def lenet300():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 28, 28, 1)), jnp.float32)
    model = models.LeNet300()
    params = randomized(model.init(jax.random.key(0), x))
    p = params["params"]
    p["Dense_0"]["kernel"][:, 40:300] = 0  # units 40.. of the first layer are constant,
    p["Dense_1"]["kernel"][5:20] = 0  # and nobody reads 5..19: 25 stay
    p["Dense_1"]["kernel"][:, 0:30] = 0  # units 0..29 of the second are constant,
    p["Dense_2"]["kernel"][90:] = 0  # nobody reads 90..: 60 stay
    pixels = p["Dense_0"]["kernel"].reshape(28, 28, 300)
    pixels[:3], pixels[:, 25:] = 0, 0  # 25 x 25 pixels stay,
    pixels[5, 7] = 0  # less one
    wanted = {
        "params/Dense_0/kernel": (624, 25),
        "params/Dense_0/bias": (25,),
        "params/Dense_1/kernel": (25, 60),
        "params/Dense_1/bias": (60,),
        "params/Dense_2/kernel": (60, 10),
        "params/Dense_2/bias": (10,),
    }
    return model.apply, params, x, wanted


def lenet5():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 28, 28, 1)), jnp.float32)
    model = models.LeNet5()
    params = randomized(model.init(jax.random.key(0), x))
    p = params["params"]
    p["Conv_0"]["kernel"][..., :7] = 0  # 7 constant channels, no padding: 13 stay
    p["Conv_1"]["kernel"][..., 10:30] = 0  # 20 constant channels,
    p["Dense_0"]["kernel"].reshape(4, 4, 50, 500)[:, :, :4] = 0  # nobody reads 4 more: 26 stay
    p["Dense_1"]["kernel"][100:] = 0  # nobody reads 400: 100 stay
    wanted = {
        "params/Conv_0/kernel": (5, 5, 1, 13),
        "params/Conv_0/bias": (13,),
        "params/Conv_1/kernel": (5, 5, 13, 26),
        "params/Conv_1/bias": (26,),
        "params/Dense_0/kernel": (4 * 4 * 26, 100),
        "params/Dense_0/bias": (100,),
        "params/Dense_1/kernel": (100, 10),
        "params/Dense_1/bias": (10,),
    }
    return model.apply, params, x, wanted


def resnet(blocks):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 3)), jnp.float32)
    model = models.ResNet32(blocks=blocks)
    params = randomized(model.init(jax.random.key(0), x))
    p = params["params"]
    last = 6 * blocks
    inner = [16] * blocks + [32] * blocks + [64] * blocks
    p["Conv_1"]["kernel"][..., :4] = 0  # inside block 0: 4 constant channels before a padded
    p["BatchNorm_1"]["bias"][:4] = [-1, 1, 2, -1]  # convolution; one keeps what the two above 0
    p["Conv_2"]["kernel"][:, :, 10:] = 0  # give, 6 are read by nobody: 16 - 3 - 6
    inner[0] = 7
    p[f"Conv_{last}"]["kernel"][:, :, 20:] = 0  # inside the last block: 20 stay
    inner[-1] = 20
    # Channel 5 of stage 1 is zero throughout; it is channel 13 of stage 2, 29 of stage 3.
    channels = [5] * (blocks + 1) + [13] * blocks + [29] * blocks
    for conv, channel in zip([0, *range(2, last + 1, 2)], channels, strict=True):
        p[f"Conv_{conv}"]["kernel"][..., channel] = 0
        for name in ("scale", "bias"):
            p[f"BatchNorm_{conv}"][name][channel] = 0
    stream = [15] * blocks + [31] * blocks + [63] * blocks
    wanted = {"params/Dense_0/kernel": (63, 10), "params/Dense_0/bias": (10,)}
    outputs = [15] + [n for pair in zip(inner, stream, strict=True) for n in pair]
    inputs = [3] + [n for pair in zip([15, *stream], inner, strict=False) for n in pair]
    for i, (n, m) in enumerate(zip(inputs, outputs, strict=True)):
        wanted[f"params/Conv_{i}/kernel"] = (3, 3, n, m)
        for name in ("params/BatchNorm_{}/scale", "params/BatchNorm_{}/bias"):
            wanted[name.format(i)] = (m,)
        for name in ("batch_stats/BatchNorm_{}/mean", "batch_stats/BatchNorm_{}/var"):
            wanted[name.format(i)] = (m,)
    return model.apply, params, x, wanted


def resnet8():
    return resnet(blocks=1)


def resnet32():
    return resnet(blocks=5)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, mask):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(4, name="attention")(y, mask=mask)
        y = nn.gelu(nn.Dense(24, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[-1], name="down")(y)


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(30, 16)
        positions = self.param("positions", nn.initializers.normal(1.0), (9, 16))
        x = embed(ids) + positions[: ids.shape[1]]
        for i in range(2):
            x = Block(name=f"block{i}")(x, nn.make_causal_mask(ids))
        return embed.attend(nn.LayerNorm(name="norm")(x))


def transformer():
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 30, size=(2, 6)))
    model = Transformer()
    params = randomized(model.init(jax.random.key(0), ids))
    p = params["params"]
    p["block0"]["down"]["kernel"][:5] = 0  # nobody reads 5 of 24
    p["block1"]["up"]["kernel"][:, 20:] = 0  # 4 of 24 are constant
    p["block0"]["attention"]["out"]["kernel"][1] = 0  # a head without a reader
    attention = p["block1"]["attention"]
    for name, lost in (("query", 0), ("key", 3)):  # dimensions 0 and 3 of all heads' products
        attention[name]["kernel"][..., lost] = 0
        attention[name]["bias"][:, lost] = 0
    attention["value"]["kernel"][..., 2] = 0  # a dimension of the values,
    attention["value"]["bias"][:, 2] = 0
    attention["out"]["kernel"][:, 1] = 0  # and one that is not read
    for leaf, axis in (("Embed_0/embedding", 1), ("positions", 1)):  # channel 7 of the stream
        np.moveaxis(functools.reduce(lambda t, k: t[k], leaf.split("/"), p), axis, 0)[7] = 0
    norms = [p["norm"]] + [p[b][n] for b in ("block0", "block1") for n in p[b] if "Norm" in n]
    for norm in norms:
        norm["scale"][7] = norm["bias"][7] = 0
    for block in ("block0", "block1"):
        for layer in (p[block]["down"], p[block]["attention"]["out"]):
            layer["kernel"][..., 7] = layer["bias"][7] = 0
    wanted = {"params/Embed_0/embedding": (30, 15), "params/positions": (9, 15)}
    wanted |= {"params/norm/scale": (15,), "params/norm/bias": (15,)}
    for block, up, heads, queries in (("block0", 19, 3, 4), ("block1", 20, 4, 2)):
        path = f"params/{block}"
        for norm in ("LayerNorm_0", "LayerNorm_1"):
            wanted |= {f"{path}/{norm}/scale": (15,), f"{path}/{norm}/bias": (15,)}
        wanted |= {f"{path}/up/kernel": (15, up), f"{path}/up/bias": (up,)}
        wanted |= {f"{path}/down/kernel": (up, 15), f"{path}/down/bias": (15,)}
        for name in ("query", "key", "value"):
            wanted[f"{path}/attention/{name}/kernel"] = (15, heads, queries)
            wanted[f"{path}/attention/{name}/bias"] = (heads, queries)
        wanted[f"{path}/attention/out/kernel"] = (heads, queries, 15)
        wanted[f"{path}/attention/out/bias"] = (15,)
    return model.apply, params, ids, wanted


class Mlp(nnx.Module):
    def __init__(self, inputs, width, rngs):
        self.first = nnx.Linear(inputs, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, use_running_average=True, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs, deterministic=True)
        self.second = nnx.Linear(width, 4, rngs=rngs)

    def __call__(self, x):
        return self.second(self.dropout(nnx.tanh(self.norm(self.first(x)))))


def nnx_mlp():
    graph, state = nnx.split(Mlp(8, 20, nnx.Rngs(0)))

    def plant(path, leaf):
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        if path.startswith("first/kernel"):
            return leaf.at[:, 3:9].set(0)  # 6 of 20 units are constant,
        return leaf.at[15:].set(0) if path.startswith("second/kernel") else leaf  # 5 not read

    state = jax.tree_util.tree_map_with_path(plant, state)
    wanted = {"first/kernel": (8, 9), "first/bias": (9,), "second/kernel": (9, 4)}
    wanted |= {f"norm/{name}": (9,) for name in ("scale", "bias", "mean", "var")}
    wanted |= {"second/bias": (4,), "dropout/rngs/key": (), "dropout/rngs/count": ()}
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 8)), jnp.float32)
    return lambda state, x: nnx.merge(graph, state)(x), state, x, wanted


def by_hand():
    """Two branches of one input, concatenated, gated, and a scan that is not looked into."""
    rng = np.random.default_rng(0)
    params = {
        "left": rng.normal(size=(5, 6)),
        "right": rng.normal(size=(7, 5)),  # transposed
        "gate": rng.normal(size=(13,)),
        "mixed": rng.normal(size=(13, 4)),
        "recurrent": rng.normal(size=(4, 4)),
    }
    params = {name: value.astype(np.float32) for name, value in params.items()}
    params["left"][:, 2] = 0  # tanh(0) = 0: left unit 2 is zero
    params["mixed"][4] = 0  # nobody reads left unit 4
    params["gate"][6:8] = 0  # right units 0 and 1 are gated off
    params["recurrent"][1] = 0

    def fn(params, x):
        left = jnp.tanh(x @ params["left"])
        right = jnp.einsum("bi,oi->bo", x, params["right"])
        mixed = (jnp.concatenate([left, right], axis=1) * params["gate"]) @ params["mixed"]

        def step(carry, _):
            return jnp.tanh(carry @ params["recurrent"]), None

        return lax.scan(step, mixed, length=3)[0]

    x = jnp.asarray(rng.normal(size=(3, 5)), jnp.float32)
    wanted = {"left": (5, 4), "right": (5, 5), "gate": (9,), "mixed": (9, 4), "recurrent": (4, 4)}
    return fn, params, x, wanted


@pytest.mark.parametrize(
    "network",
    [
        lenet300,
        pytest.param(lenet5, marks=pytest.mark.slow),
        pytest.param(resnet8, marks=pytest.mark.slow),
        pytest.param(resnet32, marks=pytest.mark.slow),
        pytest.param(transformer, marks=pytest.mark.slow),
        nnx_mlp,
        by_hand,
    ],
)
def test_planted_masks_give_the_widths_worked_out_by_hand(network):
    fn, params, x, wanted = network()
    small = sj.compact(fn, params, x)
    assert shapes(small.plan) == wanted
    for leaf, planned in zip(jax.tree.leaves(small.params), small.plan.leaves, strict=True):
        assert leaf.shape == planned.new_shape
    assert jax.tree.structure(small.params) == jax.tree.structure(params)
    agree(fn, params, small, x)


@pytest.mark.parametrize(
    "network",
    [lenet300, nnx_mlp]
    + [pytest.param(f, marks=pytest.mark.slow) for f in (lenet5, resnet8, transformer, by_hand)],
)
def test_planted_masks_in_bfloat16(network):
    fn, params, x, wanted = network()
    params, x = half(params), half(x)
    small = sj.compact(fn, params, x)
    assert shapes(small.plan) == wanted
    agree(fn, params, small, x, rtol=0.05)


@pytest.mark.slow
def test_unstructured_masks():
    """Every parameter pruned at once, by magnitude: what a pruned network looks like."""
    for network in (lenet300, lenet5, transformer):
        fn, params, x, _ = network()
        mask = sj.mask_by_sparsity(params, 0.97, mask=sj.every_parameter)
        params = sj.apply_mask(params, mask)
        small = sj.compact(fn, params, x)
        agree(fn, params, small, x)
        assert sum(np.prod(shape) for shape in shapes(small.plan).values()) < 0.7 * sum(
            leaf.size for leaf in jax.tree.leaves(params)
        )


@pytest.mark.parametrize("method", ["selective", "l2", "none"])
def test_the_networks_that_the_example_reached(method):
    """LeNet-300-100 pruned on MNIST: its living units, followed forwards and backwards by hand."""
    params, _ = sj.load_sparse(RESULTS / f"lenet300-mnist-{method}-seed0.safetensors")
    kernels = [params["params"][f"Dense_{i}"]["kernel"] != 0 for i in range(3)]
    first, second = kernels[0].any(0), kernels[2].any(1)  # with an input, with a reader
    second &= kernels[1][first].any(0)
    first &= kernels[1][:, second].any(1)
    pixels = kernels[0][:, first].any(1)
    pixels |= pixels.mean() > 7 / 8
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 28, 28, 1)), jnp.float32)
    small = sj.compact(models.LeNet300().apply, params, x)
    assert shapes(small.plan) == {
        "params/Dense_0/kernel": (pixels.sum(), first.sum()),
        "params/Dense_0/bias": (first.sum(),),
        "params/Dense_1/kernel": (first.sum(), second.sum()),
        "params/Dense_1/bias": (second.sum(),),
        "params/Dense_2/kernel": (second.sum(), 10),
        "params/Dense_2/bias": (10,),
    }
    agree(models.LeNet300().apply, params, small, x)


def test_a_random_network():
    (before, after), alive = random_graphs.check(25)  # with convolutions
    assert before > after
    assert alive


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 48, 4))
def test_more_random_networks(first):
    alive = [random_graphs.check(seed)[1] for seed in range(first, first + 4)]
    assert sum(alive) >= 2


# --- constants -------------------------------------------------------------------------------


def mlp(params, x):
    hidden = jax.nn.relu(x @ params["w1"] + params["b1"])
    out = hidden @ params["w2"]
    return out + params["b2"] if "b2" in params else out


def mlp_params(**changed):
    rng = np.random.default_rng(0)
    params = {"w1": rng.normal(size=(4, 5)), "b1": rng.normal(size=5)}
    params |= {"w2": rng.normal(size=(5, 3)), "b2": rng.normal(size=3)}
    return {name: np.float32(value) for name, value in (params | changed).items()}


def test_constants_go_into_the_bias():
    params = mlp_params(b1=np.array([0.5, 1.0, -2.0, 3.0, 0.25]))
    params["w1"][:, [1, 2, 3]] = 0  # relu: 1, 0 and 3
    small = sj.compact(mlp, params, jnp.ones((1, 4)))
    assert shapes(small.plan) == {"w1": (4, 2), "b1": (2,), "w2": (2, 3), "b2": (3,)}
    added = params["w2"][1] + 3 * params["w2"][3]
    np.testing.assert_allclose(small.params["b2"], params["b2"] + added, rtol=1e-6)
    np.testing.assert_array_equal(small.params["w2"], params["w2"][[0, 4]])
    (fold,) = small.plan.folded
    assert (fold.units, fold.path) == (2, "b2")
    np.testing.assert_allclose(fold.added, added, rtol=1e-6)
    hidden, out = (leaf for leaf in small.plan.leaves if leaf.path in ("b1", "b2"))
    np.testing.assert_array_equal(hidden.kept[0], [0, 4])
    assert out.kept == (None,)


def test_without_a_bias_one_constant_unit_stays():
    params = mlp_params(b1=np.array([0.5, 1.0, -2.0, 3.0, 0.25]))
    del params["b2"]
    params["w1"][:, [1, 2, 3]] = 0
    small = sj.compact(mlp, params, jnp.ones((1, 4)))
    assert shapes(small.plan) == {"w1": (4, 3), "b1": (3,), "w2": (3, 3)}
    # The unit of the largest constant, 3, takes over that of 1.
    np.testing.assert_allclose(small.params["w2"][1], params["w2"][3] + params["w2"][1] / 3, 1e-6)
    (fold,) = small.plan.folded
    assert (fold.units, fold.path, fold.added) == (1, "w2", None)
    shown = sj.compaction_table(small.plan).splitlines()
    assert "1 constant unit joined with another in w2" in shown
    agree(
        mlp, params, small, jnp.asarray(np.random.default_rng(1).normal(size=(6, 4)), jnp.float32)
    )


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_constant_channels_under_padding(padding):
    """The border of a padded convolution sees fewer copies of a constant: no bias can say that."""
    rng = np.random.default_rng(0)
    kernels = [rng.normal(size=(3, 3, 2, 4)), rng.normal(size=(3, 3, 4, 3))]
    params = {"k1": kernels[0], "b1": np.array([0.3, 1.0, 2.0, -1.0]), "k2": kernels[1]}
    params = {k: np.float32(v) for k, v in (params | {"b2": rng.normal(size=3)}).items()}
    params["k1"][..., 1:] = 0  # constants 1, 2 and 0

    def fn(params, x):
        conv = functools.partial(
            lax.conv_general_dilated,
            window_strides=(1, 1),
            padding=padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        hidden = jax.nn.relu(conv(x, params["k1"]) + params["b1"])
        return conv(hidden, params["k2"]) + params["b2"]

    x = jnp.asarray(rng.normal(size=(2, 7, 6, 2)), jnp.float32)
    small = sj.compact(fn, params, x)
    agree(fn, params, small, x)
    (fold,) = small.plan.folded
    if padding == "VALID":
        assert shapes(small.plan)["k2"] == (3, 3, 1, 3)
        assert (fold.units, fold.path) == (2, "b2")
        added = params["k2"][:, :, 1].sum((0, 1)) + 2 * params["k2"][:, :, 2].sum((0, 1))
        np.testing.assert_allclose(fold.added, added, rtol=1e-5)
    else:
        assert shapes(small.plan)["k2"] == (3, 3, 2, 3)
        assert (fold.units, fold.path) == (1, "k2")


def test_constants_that_differ_from_place_to_place_stay():
    """A positional embedding is known, but not one constant: no bias can take it."""

    def fn(params, x):
        hidden = x @ params["w1"] + params["positions"]
        return jnp.tanh(hidden) @ params["w2"] + params["b2"]

    rng = np.random.default_rng(0)
    params = {"w1": rng.normal(size=(3, 4)), "positions": rng.normal(size=(5, 4))}
    params |= {"w2": rng.normal(size=(4, 2)), "b2": rng.normal(size=2)}
    params = {name: np.float32(value) for name, value in params.items()}
    params["w1"][:, :2] = 0
    params["positions"][:, 0] = 0.7
    x = jnp.asarray(rng.normal(size=(2, 5, 3)), jnp.float32)
    small = sj.compact(fn, params, x)
    assert shapes(small.plan)["positions"] == (5, 3)  # 0.7 everywhere goes, the other stays
    agree(fn, params, small, x)


def test_shared_weights_are_not_rewritten():
    """One leaf read twice cannot lose rows for the sake of one of its uses."""

    def fn(params, x):
        hidden = jax.nn.relu(x @ params["w"] + params["b"])
        return hidden @ params["w"] + params["c"]

    params = {"w": np.random.default_rng(0).normal(size=(4, 4)), "b": np.ones(4), "c": np.ones(4)}
    params = {name: np.float32(value) for name, value in params.items()}
    params["w"][:, 2] = 0
    x = jnp.ones((2, 4))
    small = sj.compact(fn, params, x)
    agree(fn, params, small, x)
    assert shapes(small.plan) == {"w": (4, 4), "b": (4,), "c": (4,)}
    assert not small.plan.folded


def test_zeros_that_cancel():
    """What makes a zero that is read must stay, be the zero itself not needed."""
    ones, rng = np.ones((4, 2), np.float32), np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 4)), jnp.float32)

    def standardized(params, x):
        return x @ (params["w"] - params["w"].mean(0)) + x @ params["v"]

    params = {"w": ones, "v": np.float32(rng.normal(size=(4, 2)))}
    params["v"][1] = 0  # only w - mean, which is 0, reads feature 1: without it the mean is another
    agree(standardized, params, sj.compact(standardized, params, x), x)

    def low_rank(params, x):
        return x @ params["w"] + x @ (params["u"] @ params["v"])

    params = {"w": ones, "u": ones, "v": np.float32([[1, 2], [-1, -2]])}
    agree(low_rank, params, sj.compact(low_rank, params, x), x)


def test_dead_branches_stay_finite():
    """The norm of a dead branch is not taken of its one zero unit."""

    def fn(params, x):
        hidden = x @ params["w1"]
        hidden = hidden / jnp.linalg.norm(hidden, axis=1, keepdims=True)
        return x @ params["w"] + hidden @ params["dead"]

    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(3, 2)), "w1": np.abs(rng.normal(size=(3, 4)))}
    params = {k: np.float32(v) for k, v in (params | {"dead": np.zeros((4, 2))}).items()}
    params["w1"][:, 0] = 0
    x = jnp.asarray(np.abs(rng.normal(size=(2, 3))), jnp.float32)
    agree(fn, params, sj.compact(fn, params, x), x)


def test_a_known_zero_divided():
    def fn(params, x):
        hidden = x @ params["w"]
        normed = hidden / jnp.sqrt((hidden * hidden).mean(1, keepdims=True) + 1e-3)
        signs = jnp.where(normed >= 0, 1.0, 2.0)
        return signs @ params["v"] + normed @ params["u"] + params["b"]

    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(3, 4)), "v": rng.normal(size=(4, 2)), "b": np.ones(2)}
    params["u"] = rng.normal(size=(4, 2))
    params = {name: np.float32(value) for name, value in params.items()}
    params["w"][:, 1] = 0
    x = jnp.asarray(rng.normal(size=(2, 3)), jnp.float32)
    small = sj.compact(fn, params, x)
    agree(fn, params, small, x)
    assert shapes(small.plan)["w"] == (3, 3)


@pytest.mark.parametrize("fill", [0.0, 1.0])
def test_indices_out_of_range(fill):
    def fn(params, ids):
        rows = jnp.asarray(params["table"]).at[ids].get(mode="fill", fill_value=fill)
        return rows @ params["w"] + params["b"]

    rng = np.random.default_rng(0)
    params = {"table": rng.normal(size=(5, 4)), "w": rng.normal(size=(4, 2)), "b": np.ones(2)}
    params = {name: np.float32(value) for name, value in params.items()}
    params["table"][:, 1], params["table"][:, 2] = 3, 0
    ids = jnp.array([0, 7, 2])
    agree(fn, params, sj.compact(fn, params, ids), ids)


@pytest.mark.parametrize("where", ["sum", "weights", "bias"])
def test_casts_to_integers_are_not_looked_through(where):
    def cast(name, value):
        return value.astype(jnp.int32).astype(jnp.float32) if name == where else value

    def fn(params, x):
        hidden = jax.nn.relu(x @ params["w1"] + params["b1"])
        out = cast("sum", hidden @ cast("weights", params["w2"]))
        return out + cast("bias", params["b2"])

    params = mlp_params(b1=np.array([0.5, 1.0, 1.7, 3.0, 0.25]))
    params["w1"][:, 2] = 0
    params["w2"] *= 3
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 4)), jnp.float32)
    agree(fn, params, sj.compact(fn, params, x), x)


def test_complex_constants_stay():
    def fn(params, x):
        return jnp.exp(1j * (x @ params["w1"] + params["b1"])) @ params["w2"] + params["b2"]

    params = mlp_params()
    params["w1"][:, 2] = 0
    small = sj.compact(fn, params, jnp.ones((1, 4)))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 4)), jnp.float32)
    np.testing.assert_allclose(small.fn(small.params, x), fn(params, x), rtol=1e-4, atol=1e-5)


def test_a_bias_too_narrow_for_a_constant():
    """60000 and 60000 are no float16: one constant unit is kept instead."""

    def fn(params, x):
        hidden = jax.nn.relu(x @ params["w1"] + params["b1"])
        return hidden @ params["w2"] + params["b2"].astype(jnp.float32)

    params = mlp_params(b1=np.array([0.5, 300.0, 0.25, 300.0, 0.25]))
    params["w1"][:, [1, 3]] = 0
    params["w2"][[1, 3]] = 200
    params["b2"] = np.float16(params["b2"])
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 4)), jnp.float32)
    small = sj.compact(fn, params, x)
    assert np.isfinite(small.params["b2"]).all()
    assert shapes(small.plan)["w1"] == (4, 4)
    agree(fn, params, small, x, rtol=1e-4)  # half precision of the bias


def test_fused_queries_keys_and_values():
    """One matrix for all three, split and cut into heads: a whole head goes from each."""

    def fn(params, x):
        batch, positions, _ = x.shape
        parts = jnp.split(x @ params["qkv"], 3, axis=-1)
        q, k, v = (part.reshape(batch, positions, 2, 4) for part in parts)
        scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
        out = jnp.einsum("bhqk,bkhd->bqhd", scores, v).reshape(batch, positions, 8)
        return out @ params["out"]

    rng = np.random.default_rng(0)
    params = {"qkv": rng.normal(size=(6, 24)), "out": rng.normal(size=(8, 6))}
    params = {name: np.float32(value) for name, value in params.items()}
    params["out"][:4] = 0
    x = jnp.asarray(rng.normal(size=(2, 5, 6)), jnp.float32)
    small = sj.compact(fn, params, x)
    assert shapes(small.plan) == {"qkv": (6, 12), "out": (4, 6)}
    agree(fn, params, small, x)


def test_stacked_unstacked_and_tiled():
    def fn(params, x):
        a, b = x @ params["a"], x @ params["b"]
        first, second = jnp.unstack(jnp.stack([jnp.tanh(a), jax.nn.relu(b)], axis=1), axis=1)
        return jnp.tile(first * second, (1, 2)) @ params["w"]

    rng = np.random.default_rng(0)
    sizes = {"a": (3, 4), "b": (3, 4), "w": (8, 2)}
    params = {name: np.float32(rng.normal(size=size)) for name, size in sizes.items()}
    params["a"][:, 1] = 0
    params["w"][[2, 6]] = 0
    x = jnp.asarray(rng.normal(size=(3, 3)), jnp.float32)
    small = sj.compact(fn, params, x)
    assert shapes(small.plan) == {"a": (3, 2), "b": (3, 2), "w": (4, 2)}
    agree(fn, params, small, x)


# --- the smaller function --------------------------------------------------------------------


def test_any_batch_size():
    fn, params, x, _ = lenet5()
    small = sj.compact(fn, params, jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32))
    for batch in (1, 2, 5):
        agree(fn, params, small, jnp.resize(x, (batch, 28, 28, 1)))
    with pytest.raises(ValueError, match=r"shape \(2, 30, 28, 1\).*\(1, 28, 28, 1\).*axis 1"):
        small.fn(small.params, jnp.ones((2, 30, 28, 1)))
    with pytest.raises(ValueError, match=r"shape \(28, 28\)"):
        small.fn(small.params, jnp.ones((28, 28)))


def test_a_batch_that_the_function_looks_into_may_not_vary():
    def fn(params, x):
        return x @ params["w"] * params["of_this_batch"][:, None]

    params = {"w": jnp.ones((3, 2)), "of_this_batch": jnp.array([1.0, 0.0, 2.0])}
    small = sj.compact(fn, params, jnp.ones((3, 3)))
    agree(fn, params, small, jnp.ones((3, 3)))
    with pytest.raises(ValueError, match="axis 0"):
        small.fn(small.params, jnp.ones((1, 3)))


def test_any_number_of_positions():
    """Positions that only attention and element-wise operations see may vary, too."""
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=(4, 6)).astype(np.float32) for name in ("q", "k", "v")}
    params["v"][:, 2] = 0

    def fn(params, x):
        q, k, v = (x @ params[name] for name in ("q", "k", "v"))
        return jax.nn.softmax(q @ jnp.swapaxes(k, 1, 2)) @ v

    small = sj.compact(fn, params, jnp.ones((1, 2, 4)))
    assert small.plan.variable == ((True, True, False),)
    agree(fn, params, small, jnp.asarray(rng.normal(size=(3, 5, 4)), jnp.float32))


@pytest.mark.parametrize("pool", [jnp.sum, jax.nn.logsumexp, jnp.linalg.norm])
def test_sums_of_constants_depend_on_the_number_of_positions(pool):
    """A constant unit pooled over 4 positions is another constant than over 7."""

    def fn(params, x):
        return (
            pool(jax.nn.relu(x @ params["w1"] + params["b1"]), axis=1) @ params["w2"] + params["b2"]
        )

    params = mlp_params(b1=np.array([0.5, 1.0, 2.0, 3.0, 0.25]))
    params["w1"][:, 2] = 0
    rng = np.random.default_rng(0)
    for positions in (1, 4):
        small = sj.compact(fn, params, jnp.ones((1, positions, 4)))
        assert small.plan.variable == ((True, False, False),)
        assert shapes(small.plan)["w1"] == (4, 4)
        agree(fn, params, small, jnp.asarray(rng.normal(size=(3, positions, 4)), jnp.float32))
        with pytest.raises(ValueError, match=r"axis 1 it looks at single indices, sums constants"):
            small.fn(small.params, jnp.ones((3, 7, 4)))


def test_sizes_that_the_function_calculates_with():
    def fn(params, x):
        return x @ params["w"] + (x.shape[0] - 1) * jnp.tanh(x @ params["v"])

    rng = np.random.default_rng(0)
    params = {name: np.float32(rng.normal(size=(3, 2))) for name in ("w", "v")}
    params["w"][:, 0] = 0
    small = sj.compact(fn, params, jnp.ones((1, 3)))
    agree(fn, params, small, jnp.asarray(rng.normal(size=(4, 3)), jnp.float32))


def test_a_reshape_that_mixes_the_batch_with_units():
    def fn(params, x):
        return jnp.tanh(x @ params["w"]).reshape(3, -1).sum(1)

    params = {"w": np.float32(np.random.default_rng(0).normal(size=(4, 6)))}
    params["w"][:, 3] = 0
    small = sj.compact(fn, params, jnp.ones((3, 4)))
    agree(fn, params, small, jnp.ones((3, 4)))
    with pytest.raises(ValueError, match="axes of w in another way"):
        small.fn(small.params, jnp.ones((4, 4)))


def test_exported_with_a_symbolic_batch_and_run_without_this_library(tmp_path):
    fn, params, x, _ = lenet300()
    small = sj.compact(fn, params, x)
    (batch,) = export.symbolic_shape("batch")
    exported = export.export(jax.jit(small.fn))(
        small.params, jax.ShapeDtypeStruct((batch, 28, 28, 1), jnp.float32)
    )
    (tmp_path / "network").write_bytes(exported.serialize())
    paths = [leaf.path for leaf in small.plan.leaves]
    leaves = dict(zip(paths, jax.tree.leaves(small.params), strict=True))
    np.savez(tmp_path / "params.npz", **leaves)
    np.savez(tmp_path / "calls.npz", x=x, y=fn(params, x), y1=fn(params, x[:1]))
    script = """
import sys
sys.modules["sparsereg_jax"] = None  # an import of it would raise
import numpy as np
from jax import export
params = {}
for path, leaf in np.load("params.npz").items():
    *parents, name = path.split("/")
    node = params
    for parent in parents:
        node = node.setdefault(parent, {})
    node[name] = leaf
calls = np.load("calls.npz")
network = export.deserialize(bytearray(open("network", "rb").read()))
np.testing.assert_allclose(network.call(params, calls["x"]), calls["y"], rtol=0, atol=1e-5)
np.testing.assert_allclose(network.call(params, calls["x"][:1]), calls["y1"], rtol=0, atol=1e-5)
print("the same")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout == "the same\n", done.stderr


def test_rebuilt_with_the_new_widths():
    def widths(plan, *modules):
        found = sj.new_widths(plan)
        return [found[f"params/{module}"] for module in modules]

    fn, params, x, _ = lenet300()
    small = sj.compact(fn, params, x)
    model = models.LeNet300(widths=widths(small.plan, "Dense_0", "Dense_1"))
    (pixels,) = (leaf.kept[0] for leaf in small.plan.leaves if leaf.path == "params/Dense_0/kernel")
    got = model.apply(small.params, x.reshape(3, 784)[:, pixels])
    np.testing.assert_allclose(got, fn(params, x), rtol=0, atol=1e-5)

    fn, params, x, _ = lenet5()
    small = sj.compact(fn, params, x)
    model = models.LeNet5(widths=widths(small.plan, "Conv_0", "Conv_1", "Dense_0"))
    np.testing.assert_allclose(model.apply(small.params, x), fn(params, x), rtol=0, atol=1e-5)

    fn, state, x, _ = nnx_mlp()
    small = sj.compact(fn, state, x)
    model = Mlp(8, sj.new_widths(small.plan)["first"], nnx.Rngs(1))
    nnx.update(model, small.params)
    np.testing.assert_allclose(model(x), fn(state, x), rtol=0, atol=1e-5)


def test_gradients_of_kept_entries():
    params = mlp_params()
    params["w1"][:, 1] = 0
    params["b1"][1] = 1.5
    params["w2"][3] = 0
    x = jnp.asarray(np.random.default_rng(1).normal(size=(6, 4)), jnp.float32)
    small = sj.compact(mlp, params, x)
    assert small.plan.folded
    old = jax.grad(lambda p: jnp.sum(jnp.sin(mlp(p, x))))(params)
    new = jax.grad(lambda p: jnp.sum(jnp.sin(small.fn(p, x))))(small.params)
    kept = np.array([0, 2, 4])
    np.testing.assert_allclose(new["w1"], old["w1"][:, kept], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(new["b1"], old["b1"][kept], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(new["w2"], old["w2"][kept], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(new["b2"], old["b2"], rtol=1e-5, atol=1e-6)


def test_custom_rules_are_kept_on_fewer_channels():
    params = mlp_params(b1=np.zeros(5))
    params["w1"][:, 3] = 0
    small = sj.compact(mlp, params, jnp.ones((1, 4)))
    jaxpr = jax.make_jaxpr(small.fn)(small.params, jnp.ones((2, 4))).jaxpr
    calls = [eqn for eqn in equations(jaxpr) if eqn.primitive.name == "custom_jvp_call"]
    assert [eqn.outvars[0].aval.shape for eqn in calls] == [(2, 4)]
    # relu'(0) = 0 is jax.nn's rule; that of the maximum would be 1/2.
    slope = jax.grad(lambda b: jnp.sum(small.fn(small.params | {"b1": b}, jnp.zeros((1, 4)))))
    np.testing.assert_array_equal(slope(jnp.zeros(4)), 0)

    @jax.custom_vjp
    def doubled(x):
        return x * 1.0

    doubled.defvjp(lambda x: (x * 1.0, x), lambda x, g: (2 * g * jnp.ones_like(x),))

    def fn(params, x):
        return doubled(x @ params["w1"]) @ params["w2"]

    small = sj.compact(fn, params, jnp.ones((1, 4)))
    assert shapes(small.plan)["w1"] == (4, 4)
    old = jax.grad(lambda p: jnp.sum(fn(p, jnp.ones((2, 4)))))(params)
    new = jax.grad(lambda p: jnp.sum(small.fn(p, jnp.ones((2, 4)))))(small.params)
    np.testing.assert_allclose(new["w1"], old["w1"][:, [0, 1, 2, 4]], rtol=1e-5)


def test_a_checkpoint_stays_one():
    params = mlp_params()
    params["w1"][:, 3] = 0
    fn = jax.checkpoint(mlp, policy=jax.checkpoint_policies.dots_saveable)
    small = sj.compact(fn, params, jnp.ones((1, 4)))
    assert shapes(small.plan)["w1"] == (4, 4)
    jaxpr = jax.make_jaxpr(small.fn)(small.params, jnp.ones((2, 4))).jaxpr
    (remat,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name in ("remat2", "checkpoint")]
    assert remat.params["policy"] is jax.checkpoint_policies.dots_saveable
    agree(fn, params, small, jnp.ones((2, 4)))


def test_under_transformations():
    params = mlp_params()
    params["w1"][:, 3] = 0
    small = sj.compact(mlp, params, jnp.ones((1, 4)))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(6, 2, 4)), jnp.float32)
    wanted = mlp(params, x.reshape(12, 4)).reshape(6, 2, 3)
    mapped = jax.vmap(small.fn, in_axes=(None, 0))(small.params, x)
    np.testing.assert_allclose(mapped, wanted, rtol=1e-5, atol=1e-6)
    scanned = lax.scan(lambda c, x: (c, small.fn(small.params, x)), None, x)[1]
    np.testing.assert_allclose(scanned, wanted, rtol=1e-5, atol=1e-6)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), small.params)
    assert jax.vmap(small.fn, in_axes=(0, None))(stacked, x[0]).shape == (2, 2, 3)


def test_sharded():
    mesh = Mesh(np.array(jax.devices()), ("data",))
    params = mlp_params()
    params["w1"][:, 3] = 0
    small = sj.compact(
        mlp, jax.device_put(params, NamedSharding(mesh, PartitionSpec())), jnp.ones((1, 4))
    )
    x = jnp.asarray(np.random.default_rng(1).normal(size=(16, 4)), jnp.float32)
    y = jax.jit(small.fn)(
        small.params, jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    )
    np.testing.assert_allclose(y, mlp(params, x), rtol=1e-5, atol=1e-6)
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec("data")), 2)


def test_does_not_compile_again():
    params = mlp_params()
    params["w1"][:, 3] = 0
    small = sj.compact(mlp, params, jnp.ones((1, 4)))
    fn = jax.jit(small.fn)
    fn(small.params, jnp.ones((2, 4)))
    fn(small.params, jnp.zeros((2, 4)))
    assert fn._cache_size() == 1


# --- trees and dtypes ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_dtypes(dtype, x64):
    params = {name: jnp.asarray(value, dtype) for name, value in mlp_params().items()}
    params["w1"] = params["w1"].at[:, 3].set(0)
    x = jnp.ones((2, 4), dtype)
    small = sj.compact(mlp, params, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(small.params)} == {jnp.dtype(dtype)}
    rtol = {"float16": 5e-3, "bfloat16": 5e-2, "float32": 1e-6, "float64": 1e-14}[dtype]
    agree(mlp, params, small, x, rtol=rtol)


def test_trees():
    params = mlp_params()
    params["w1"][:, 3] = 0
    trees = {
        "FrozenDict": (flax.core.freeze(params), lambda p: flax.core.unfreeze(p)),
        "tuple": ((params["w1"], [params["b1"], None], {"w2": params["w2"]}), None),
    }
    frozen, thaw = trees["FrozenDict"]
    small = sj.compact(lambda p, x: mlp(thaw(p), x), frozen, jnp.ones((1, 4)))
    assert isinstance(small.params, flax.core.FrozenDict)
    assert small.params["w1"].shape == (4, 4)

    def fn(p, x):
        return jax.nn.relu(x @ p[0] + p[1][0]) @ p[2]["w2"]

    tree, _ = trees["tuple"]
    small = sj.compact(fn, tree, jnp.ones((1, 4)))
    assert [leaf.path for leaf in small.plan.leaves] == ["0", "1/0", "2/w2"]
    assert small.params[1][1] is None
    agree(fn, tree, small, jnp.ones((2, 4)))


def test_several_inputs_and_outputs():
    def fn(params, inputs, scale):
        hidden = jax.nn.relu(inputs["a"] @ params["a"] + inputs["b"] @ params["b"])
        return {"y": hidden @ params["w"] * scale, "size": jnp.sum(hidden, axis=1)}

    rng = np.random.default_rng(0)
    params = {
        "a": rng.normal(size=(3, 5)),
        "b": rng.normal(size=(2, 5)),
        "w": rng.normal(size=(5, 2)),
    }
    params = {name: np.float32(value) for name, value in params.items()}
    params["a"][:, 1] = params["b"][:, 1] = 0
    params["b"][0] = 0
    params["w"][2] = 0  # still in the sum
    inputs = {"a": jnp.ones((4, 3)), "b": jnp.ones((4, 2))}
    small = sj.compact(fn, params, inputs, 2.0)
    assert shapes(small.plan) == {"a": (3, 4), "b": (1, 4), "w": (4, 2)}
    agree(fn, params, small, inputs, 3.0)
    assert [leaf.new_shape for leaf in small.plan.inputs] == [(4, 3), (4, 1), ()]
    shown = [" ".join(line.split()) for line in sj.compaction_table(small.plan).splitlines()]
    assert "inputs/0/b (4, 2) (4, 1)" in shown


@pytest.mark.parametrize("cases", [3, 40])
def test_a_choice_whose_index_is_known_in_part(cases):
    def fn(params, x):
        hidden = jnp.maximum(x @ params["w"], 0)
        # Known to be the last case for the last two units, 1 or 2 for the others.
        first = jnp.where(hidden[:, :-2] > 0, 2, 3)
        last = jnp.full((len(x), 2), cases)
        index = jnp.concatenate([first, last], axis=1) - 1
        others = [hidden + float(i) for i in range(cases - 1)]
        chosen = lax.select_n(index, *others, jnp.full_like(hidden, 7.0))
        return chosen @ params["out"]

    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(3, 6)), "out": rng.normal(size=(6, 2))}
    params = {name: np.float32(value) for name, value in params.items()}
    params["w"][:, 1] = 0  # chosen between two constants: it varies all the same
    x = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)
    small = sj.compact(fn, params, x)
    agree(fn, params, small, x + 1)


@pytest.mark.parametrize("index", [-1, 5])
def test_a_choice_beyond_its_cases(index):
    def fn(params, x):
        hidden = x @ params["w"]
        index_of_each = jnp.full(hidden.shape, index)
        chosen = lax.select_n(index_of_each, hidden, jnp.ones_like(hidden), 2 * hidden)
        return chosen @ params["out"] + params["bias"][None]

    rng = np.random.default_rng(0)
    params = {"w": (3, 4), "out": (4, 2), "bias": (2,)}
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in params.items()}
    x = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)
    agree(fn, params, sj.compact(fn, params, x), x + 1)


def test_inputs_without_entries_and_widths_of_two_layers():
    with pytest.raises(ValueError, match=r"inputs/0 has no entries, its shape is \(0, 4\)"):
        sj.compact(mlp, mlp_params(), jnp.ones((0, 4)))
    two = {"m": {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 5))}}
    plan = sj.compact(lambda p, x: x @ p["m"]["a"] @ p["m"]["b"], two, jnp.ones((1, 2))).plan
    assert sj.new_widths(plan) == {}  # a module whose leaves do not share one


def test_grouped_convolutions():
    rng = np.random.default_rng(0)
    params = {"depthwise": rng.normal(size=(3, 3, 1, 12)), "groups": rng.normal(size=(1, 1, 3, 8))}
    params |= {"last": rng.normal(size=(8, 2))}
    params = {name: np.float32(value) for name, value in params.items()}
    params["depthwise"][..., 4:6] = 0  # both outputs of input channel 2
    params["last"][[1, 3, 5, 7]] = 0  # the second output of each of the four groups
    params["groups"][:, :, 1] = 0  # the second input of each group

    def fn(params, x):
        conv = functools.partial(
            lax.conv_general_dilated,
            window_strides=(1, 1),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        x = conv(x, params["depthwise"], feature_group_count=6)
        x = conv(x, params["groups"], feature_group_count=4)
        return x.mean((1, 2)) @ params["last"]

    x = jnp.asarray(rng.normal(size=(2, 5, 5, 6)), jnp.float32)
    small = sj.compact(fn, params, x)
    # 12 channels are (4 groups, 3 inputs) to the second and (6 inputs, 2 outputs) to the first: no
    # common factors but (2, ...), so only what is dead for a whole factor goes.
    agree(fn, params, small, x)
    assert shapes(small.plan)["last"] == (4, 2)
    assert shapes(small.plan)["groups"][3] == 4


def test_depthwise_channels_go():
    rng = np.random.default_rng(0)
    params = {"k": rng.normal(size=(3, 3, 1, 12)).astype(np.float32)}
    params |= {"w": rng.normal(size=(12, 2)).astype(np.float32)}
    params["k"][..., 4:6] = 0  # both outputs of input channel 2

    def fn(params, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        x = lax.conv_general_dilated(
            x, params["k"], (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=6
        )
        return jnp.tanh(x).mean((1, 2)) @ params["w"]

    x = jnp.asarray(rng.normal(size=(2, 5, 5, 6)), jnp.float32)
    small = sj.compact(fn, params, x)
    assert shapes(small.plan) == {"k": (3, 3, 1, 10), "w": (10, 2)}
    assert small.plan.inputs[0].new_shape == (2, 5, 5, 5)
    agree(fn, params, small, x)


# --- what is said ----------------------------------------------------------------------------


def test_cast_params():
    """The smaller function takes its params in another dtype, as the original does."""
    params = mlp_params()
    params["w1"][:, 3] = 0
    small = sj.compact(mlp, params, jnp.ones((1, 4)))
    got = small.fn(half(small.params), jnp.ones((2, 4), jnp.bfloat16))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.float32(got), mlp(params, np.ones((2, 4), np.float32)), rtol=0, atol=0.1
    )


def test_inside_jit():
    params = mlp_params()
    params["w1"][:, 3] = 0

    @jax.jit
    def fn(x):
        small = sj.compact(mlp, params, jax.ShapeDtypeStruct((1, 4), jnp.float32))
        return small.fn(small.params, x)

    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 4)), jnp.float32)
    np.testing.assert_allclose(fn(x), mlp(params, x), rtol=1e-5, atol=1e-6)


def test_names_what_stood_in_the_way():
    params = mlp_params()
    params["w1"][:, 3] = 0

    def fn(params, x):
        return jnp.sort(x @ params["w1"], axis=1) @ params["w2"]

    small = sj.compact(fn, params, jnp.ones((1, 4)))
    assert shapes(small.plan)["w1"] == (4, 5)
    (stop,) = small.plan.stops
    assert stop.primitive == "sort"
    assert "test_compaction.py:" in stop.where
    assert stop.axes == (("w1", 1), ("w2", 0))
    assert f"kept whole by sort at {stop.where}: w1 axis 1, w2 axis 0" in sj.compaction_table(
        small.plan
    )


def test_names_a_reshape_that_does_not_factor():
    def fn(params, x):
        return jnp.tanh(x @ params["w"]).reshape(x.shape[0], 4, 3) @ params["v"]

    params = {"w": np.ones((3, 12), np.float32), "v": np.ones((3, 2), np.float32)}
    params["w"][:, :2] = 0  # not a third of every index modulo 3

    def other(params, x):
        hidden = jnp.tanh(x @ params["w"]).reshape(x.shape[0], 4, 3)
        return hidden.reshape(x.shape[0], 6, 2).sum(1) @ params["v"][:2]

    small = sj.compact(fn, params, jnp.ones((2, 3)))
    assert not small.plan.stops
    small = sj.compact(other, params, jnp.ones((2, 3)))
    assert {stop.primitive for stop in small.plan.stops} >= {"reshape"}
    agree(other, params, small, jnp.ones((5, 3)))


def test_without_zeros_it_says_so():
    params = mlp_params()
    small = sj.compact(mlp, params, jnp.ones((1, 4)))
    assert small.params["w1"] is params["w1"]
    assert "Nothing to remove: the parameters have no zeros." in sj.compaction_table(small.plan)
    agree(mlp, params, small, jnp.ones((2, 4)))
    params["w1"][0, 0] = 0
    table = sj.compaction_table(sj.compact(mlp, params, jnp.ones((1, 4))).plan)
    assert "no unit is without incoming or outgoing weights" in table


def test_compacting_again_finds_nothing():
    fn, params, x, wanted = lenet5()
    small = sj.compact(fn, params, x)
    again = sj.compact(small.fn, small.params, x)
    assert shapes(again.plan) == wanted
    assert not again.plan.folded


def test_errors():
    params = mlp_params()
    params["w1"][:, 3] = 0
    x = jnp.ones((2, 4))
    small = sj.compact(mlp, params, x)
    with pytest.raises(ValueError, match=r"'b1' has shape \(5,\) \(as before compaction\).*\(4,\)"):
        small.fn(params, x)
    with pytest.raises(
        ValueError, match=r"'b1' has shape \(7,\); the compacted network needs \(4,\)"
    ):
        small.fn(small.params | {"b1": jnp.ones(7)}, x)
    with pytest.raises(ValueError, match="params: the tree is not the one that was compacted"):
        small.fn({"w1": small.params["w1"]}, x)
    with pytest.raises(ValueError, match="inputs: 2 arrays were given"):
        small.fn(small.params, (x, x))
    with pytest.raises(TypeError, match=r"fn cannot be traced.*functools\.partial"):
        sj.compact(lambda p, x: mlp(p, x) if x.sum() > 0 else x, params, x)
    with pytest.raises(TypeError, match="params: the leaf 'name' is a str, not an array"):
        sj.compact(mlp, params | {"name": "mlp"}, x)
    with pytest.raises(TypeError, match="inputs: the leaf '1' is a str"):
        sj.compact(mlp, params, x, "train")
    with pytest.raises(TypeError, match="params: the leaf 'b1' has no values"):
        sj.compact(mlp, jax.eval_shape(lambda: params), x)
    with pytest.raises(TypeError, match="params: the leaf 'b1' has no values"):
        jax.jit(lambda params: sj.compact(mlp, params, x).params)(params)
    (batch,) = export.symbolic_shape("batch")
    with pytest.raises(ValueError, match=r"inputs/0 has the symbolic shape \(batch, 4\)"):
        sj.compact(mlp, params, jax.ShapeDtypeStruct((batch, 4), jnp.float32))


# --- sizes, derivative rules, what is seen from outside ------------------------------------------


def one_constant_unit():
    """Of two units the second is the constant 1."""
    params = {"w1": [[1.0, 0.0]], "b1": [0.0, 1.0], "w2": [[1.0], [1.0]], "b2": [0.0]}
    return {name: jnp.asarray(value) for name, value in params.items()}


def hidden(params, x):
    return jax.nn.relu(x @ params["w1"] + params["b1"])


@pytest.mark.parametrize(
    "fn",
    [
        lambda p, x: hidden(p, x).sum(0) @ p["w2"] + p["b2"],
        lambda p, x: (hidden(p, x) * x.shape[0]) @ p["w2"] + p["b2"],
        lambda p, x: jnp.arange(1.0, x.shape[0] + 1) @ hidden(p, x) @ p["w2"] + p["b2"],
        lambda p, x: (hidden(p, x) / jnp.ones(x.shape[0]).sum()) @ p["w2"] + p["b2"],
    ],
    ids=["summed", "by its size", "weighed", "by a sum of ones"],
)
@pytest.mark.parametrize("batch", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_first_axis_that_is_no_batch(fn, batch):
    """At the example's own shape it is the same function; at others too, or it says so."""
    params = one_constant_unit()
    small = sj.compact(fn, params, jnp.ones((batch, 1)))
    for number in (batch, batch + 1, 5):
        x = jnp.arange(2.0, 2.0 + number)[:, None]
        try:
            found = small.fn(small.params, x)
        except ValueError:
            assert number != batch
            continue
        np.testing.assert_allclose(found, fn(params, x), rtol=1e-6)


def test_an_input_of_one_entry_without_a_batch():
    params = {"w": jnp.array([0.0, 3.0])}
    small = sj.compact(lambda p, t: jnp.sum(t * p["w"]), params, jnp.ones(1))
    assert small.fn(small.params, jnp.full(1, 2.0)) == 6


@pytest.mark.slow
def test_constants_that_count_another_axis():
    """A mean over ones of its shape, and a scan over a dead branch: constant, but not of length."""
    params = one_constant_unit()

    def counted(p, x):
        return (hidden(p, x) / jnp.ones_like(x).sum(1, keepdims=True)) @ p["w2"] + p["b2"]

    def scanned(p, x):
        dead = jnp.moveaxis(jax.nn.relu(x @ p["w0"] + p["b0"]), 1, 0)
        c = jax.lax.scan(lambda c, v: (0.5 * c + v, None), jnp.zeros(dead.shape[1:]), dead)[0]
        return jax.nn.relu(c @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"] + x.sum((1, 2))[:, None]

    more = params | {"w0": jnp.zeros((1, 1)), "b0": jnp.ones(1), "w1": jnp.ones((1, 2))}
    for fn, given in ((counted, params), (scanned, more)):
        small = sj.compact(fn, given, jnp.ones((1, 4, 1)))
        for shape in ((1, 4, 1), (3, 4, 1), (1, 2, 1), (2, 8, 1)):
            x = jnp.linspace(1.0, 2.0, int(np.prod(shape))).reshape(shape)
            try:
                found = small.fn(small.params, x)
            except ValueError:
                assert shape[1] != 4
                continue
            np.testing.assert_allclose(found, fn(given, x), rtol=1e-6)


def test_a_batch_of_one_beside_an_input_without():
    params = one_constant_unit()

    def fn(p, x, t):
        return jax.nn.relu(x @ p["w1"] + p["b1"] + t[:2]) @ p["w2"] + p["b2"]

    small = sj.compact(fn, params, jnp.ones((1, 1)), jnp.ones(5))
    x, t = jnp.arange(3.0)[:, None], jnp.linspace(-1.0, 1.0, 5)
    np.testing.assert_allclose(small.fn(small.params, x, t), fn(params, x, t), rtol=1e-6)


@pytest.mark.parametrize("by_vmap", [False, True])
def test_gathers_along_a_batch(by_vmap):
    """The last token of each row, by its length."""
    params = one_constant_unit()

    def last(p, x, lengths):
        units = hidden(p, x)
        if by_vmap:
            return jax.vmap(lambda h, n: h[n])(units, lengths) @ p["w2"] + p["b2"]
        return jnp.take_along_axis(units, lengths[:, None, None], axis=1)[:, 0] @ p["w2"] + p["b2"]

    small = sj.compact(last, params, jnp.ones((2, 4, 1)), jnp.zeros(2, int))
    if not by_vmap or jax.__version_info__ >= (0, 10):  # older ones batch it in another way
        assert small.params["w1"].shape == (1, 1)
    x, lengths = jnp.arange(12.0).reshape(3, 4, 1), jnp.array([0, 1, 3])
    np.testing.assert_allclose(
        small.fn(small.params, x, lengths), last(params, x, lengths), rtol=1e-6
    )


@jax.custom_vjp
def scaled_by_the_largest(h):
    return h * 1.0


scaled_by_the_largest.defvjp(lambda h: (h * 1.0, jnp.abs(h).max()), lambda m, g: (g * m,))


def test_derivative_rules_that_read_dead_units():
    """Their gradient is the whole network's: a unit that only a rule reads stays."""
    params = {"w1": jnp.array([[1.0, 5.0]]), "w2": jnp.array([[1.0], [0.0]])}

    def fn(p, x):
        return scaled_by_the_largest(x @ p["w1"]) @ p["w2"]

    x = jnp.array([[2.0]])
    small = sj.compact(fn, params, x)
    ours = jax.grad(lambda x: small.fn(small.params, x).sum())(x)
    np.testing.assert_allclose(ours, jax.grad(lambda x: fn(params, x).sum())(x))
    assert ours == 10


def test_a_symbolic_batch_that_heads_are_folded_into():
    params = {"w1": jnp.ones((3, 4)), "w2": jnp.array([[1.0], [2.0], [0.0], [0.0]])}

    def fn(p, x):
        groups = (x @ p["w1"]).reshape(x.shape[0] * 2, 2)
        return jax.nn.softmax(groups).reshape(x.shape[0], 4) @ p["w2"]

    small = sj.compact(fn, params, jnp.ones((1, 3)))
    (batch,) = jax.export.symbolic_shape("batch")
    exported = jax.export.export(jax.jit(small.fn))(
        small.params, jax.ShapeDtypeStruct((batch, 3), jnp.float32)
    )
    x = jnp.arange(12.0).reshape(4, 3)
    np.testing.assert_allclose(exported.call(small.params, x), fn(params, x), rtol=1e-6)


def test_callbacks_see_what_they_saw():
    seen = []

    def fn(p, x):
        h = x @ p["w1"]
        jax.debug.callback(lambda value: seen.append(float(value)), (h @ p["aux"]).sum())
        return h @ p["w2"]

    params = {"w1": [[1.0, 5.0]], "aux": [[1.0], [1.0]], "w2": [[1.0], [0.0]]}
    params = {name: jnp.asarray(value) for name, value in params.items()}
    small = sj.compact(fn, params, jnp.ones((1, 1)))
    for run, given in ((fn, params), (small.fn, small.params)):
        jax.block_until_ready(run(given, jnp.array([[2.0]])))
    jax.effects_barrier()
    assert seen == [12, 12]
