"""What is jitted lowers for cpu, cuda and tpu; a sharded training step is the unsharded one."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import sparsereg_jax as sj

PLATFORMS = ("cpu", "cuda", "tpu")
SIZES = (4, 8, 8)


def lower(function, *args):
    """Lowers for all platforms in one program; on a machine that has none but the first."""
    shapes = jax.eval_shape(lambda: args)
    exported = export.export(jax.jit(function), platforms=PLATFORMS)(*shapes)
    assert exported.platforms == PLATFORMS
    assert jax.tree.map(lambda a: (a.shape, a.dtype), list(exported.out_avals)) == jax.tree.map(
        lambda a: (a.shape, a.dtype), jax.tree.leaves(jax.eval_shape(function, *shapes))
    )


def mlp(seed=0):
    rng = np.random.default_rng(seed)
    return {
        f"layer_{i}": {
            "kernel": jnp.asarray(rng.normal(size=size), jnp.float32) / 3,
            "bias": jnp.asarray(rng.normal(size=size[1]), jnp.float32),
        }
        for i, size in enumerate(itertools.pairwise(SIZES))
    }


def batch(seed=1):
    rng = np.random.default_rng(seed)
    return (
        jnp.asarray(rng.normal(size=(8, SIZES[0])), jnp.float32),
        jnp.asarray(rng.normal(size=(8, SIZES[-1])), jnp.float32),
    )


def loss(params, inputs, targets):
    x = inputs
    for i in range(len(params)):
        x = x @ params[f"layer_{i}"]["kernel"] + params[f"layer_{i}"]["bias"][None]
        x = jnp.tanh(x)
    return jnp.mean(jnp.square(x - targets))


def training_step(tx):
    def step(params, state, inputs, targets):
        value, gradient = jax.value_and_grad(loss)(params, inputs, targets)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


TRANSFORMATIONS = {
    "add": sj.add_selective_shrinkage(optax.linear_schedule(0.1, 0.0, 9), rms_decay=0.9),
    "decouple": sj.decouple_selective_shrinkage(optax.scale_by_adam(), 0.1, sj.linear_irrelevance),
    "shrink": sj.shrink_selectively(optax.lion(0.1), 0.1, sj.constant_irrelevance),
    "sgd": sj.selective_sgd(0.1, momentum=0.9),
    "sgdw": sj.selective_sgdw(0.1, momentum=0.9),
    "adam": sj.selective_adam(0.1, strength=sj.paper_strength(0.1, 9)),
    "adamw": sj.selective_adamw(0.1),
    "hold": sj.hold_zeros(sj.selective_adam(0.1, rms_decay=0.9)),
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_updates_lower(name):
    tx, params = TRANSFORMATIONS[name], mlp()
    lower(tx.init, params)
    lower(tx.update, params, tx.init(params), params)


HELD = TRANSFORMATIONS["hold"]


def _rules(params, pruning_mask):
    return sj.mask_by_rules(
        params,
        {
            "layer_0/kernel": functools.partial(sj.mask_n_of_m, n=2, m=4),
            "layer_1/kernel": functools.partial(sj.mask_by_sparsity, sparsity=0.5),
            ".*": None,
        },
        pruning_mask=pruning_mask,
    )


MASKS = {
    "full_mask": lambda p, m, amount: sj.full_mask(p),
    "mask_by_threshold": lambda p, m, amount: sj.mask_by_threshold(p, amount, pruning_mask=m),
    "mask_by_sparsity": lambda p, m, amount: sj.mask_by_sparsity(
        p, amount, scope="tensor", pruning_mask=m
    ),
    "mask_by_sparsity, global": lambda p, m, amount: sj.mask_by_sparsity(
        p, amount, scope="global", pruning_mask=m, exact_ties=True
    ),
    "mask_by_fraction": lambda p, m, amount: sj.mask_by_fraction(p, amount, pruning_mask=m),
    "mask_n_of_m": lambda p, m, amount: sj.mask_n_of_m(p, n=2, m=4, pruning_mask=m),
    "mask_blocks": lambda p, m, amount: sj.mask_blocks(p, amount, (2, 2), pruning_mask=m),
    "mask_units": lambda p, m, amount: sj.mask_units(p, amount, pruning_mask=m),
    "mask_by_rules": lambda p, m, amount: _rules(p, m),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_lower(name):
    params = mlp()
    lower(MASKS[name], params, sj.full_mask(params), jnp.float32(0.5))


@pytest.mark.parametrize(
    "function",
    [
        sj.apply_mask,
        lambda params, mask: sj.sparsity(mask),
        lambda params, mask: sj.union(mask, mask),
        lambda params, mask: sj.intersection(mask, mask),
        lambda params, mask: sj.overlap(mask, mask),
        lambda params, mask: sj.pack_mask(mask),
        lambda params, mask: sj.unpack_mask(sj.pack_mask(mask), params),
        lambda params, mask: sj.selective_penalty(params, params, relative=True),
        lambda params, mask: jax.grad(sj.selective_penalty)(params, params),
        lambda params, mask: sj.prune(HELD, params, HELD.init(params), mask),
        lambda params, mask: sj.restart_shrinkage(HELD.init(params)),
        lambda params, mask: sj.held_mask(params, HELD.init(params)),
    ],
    ids=[
        "apply_mask",
        "sparsity",
        "union",
        "intersection",
        "overlap",
        "pack_mask",
        "unpack_mask",
        "selective_penalty",
        "its gradient",
        "prune",
        "restart_shrinkage",
        "held_mask",
    ],
)
def test_functions_of_params_and_mask_lower(function):
    params = mlp()
    lower(function, params, sj.full_mask(params))


def test_a_whole_interval_lowers():
    # Training steps in a scan, then a pruning: the program of the iterative loop.
    step = training_step(HELD)

    def interval(params, state, inputs, targets, fraction):
        def body(carry, xy):
            params, state, value = step(*carry, *xy)
            return (params, state), value

        (params, state), values = jax.lax.scan(body, (params, state), (inputs, targets))
        mask = sj.mask_by_fraction(params, fraction, pruning_mask=sj.held_mask(params, state))
        return *sj.prune(HELD, params, state, mask), values

    params = mlp()
    inputs, targets = (jnp.stack([a, a]) for a in batch())
    lower(interval, params, HELD.init(params), inputs, targets, jnp.float32(0.2))


@pytest.mark.parametrize(
    "tx",
    [HELD, pytest.param(sj.hold_zeros(sj.selective_adamw(0.1)), marks=pytest.mark.slow)],
    ids=["coupled", "decoupled"],
)
def test_a_sharded_training_step_is_the_unsharded_one(tx):
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "model"))

    def place(path, leaf):
        spec = P("data", "model") if leaf.ndim == 2 else P("model") if leaf.ndim else P()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    def sharding_kept(new, old):
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(new), jax.tree.leaves(old), strict=True
        ):
            assert a.sharding.is_equivalent_to(b.sharding, b.ndim), jax.tree_util.keystr(path)

    params = mlp()
    pruning_mask = jax.tree.map(lambda w: jnp.asarray(np.abs(np.asarray(w)) > 0.1), params)
    step, prune = jax.jit(training_step(tx)), jax.jit(functools.partial(sj.prune, tx))
    want, want_state = sj.prune(tx, params, tx.init(params), pruning_mask)
    for seed in (1, 2):
        want, want_state, want_loss = step(want, want_state, *batch(seed))

    sharded = jax.tree_util.tree_map_with_path(place, params)
    state = jax.tree_util.tree_map_with_path(place, tx.init(params))
    got, got_state = prune(sharded, state, jax.tree_util.tree_map_with_path(place, pruning_mask))
    sharding_kept((got, got_state), (sharded, state))
    for seed in (1, 2):
        inputs, targets = (jax.device_put(a, NamedSharding(mesh, P("data"))) for a in batch(seed))
        got, got_state, got_loss = step(got, got_state, inputs, targets)
    sharding_kept((got, got_state), (sharded, state))

    np.testing.assert_allclose(got_loss, want_loss, rtol=1e-5)
    for a, b, keep in zip(*map(jax.tree.leaves, (got, want, pruning_mask)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        assert (np.asarray(a)[~np.asarray(keep)] == 0).all()


def test_a_sharded_mask_is_the_unsharded_one():
    mesh = Mesh(np.array(jax.devices()[:8]), ("x",))
    params = mlp()
    sharded = {
        name: {
            "kernel": jax.device_put(layer["kernel"], NamedSharding(mesh, P(None, "x"))),
            "bias": layer["bias"],
        }
        for name, layer in params.items()
    }
    rule = jax.jit(sj.mask_by_fraction)
    got, want = rule(sharded, 0.3), rule(params, 0.3)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    for name, layer in got.items():
        kernel = sharded[name]["kernel"]
        assert layer["kernel"].sharding.is_equivalent_to(kernel.sharding, kernel.ndim)
