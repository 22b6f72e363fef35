"""One table, one suite: what every public transformation promises, whatever stands around it.

Numbers are compared to a float64 NumPy program of the equations or to plain optax. The whole
product of cases is marked slow; each test names the cases that represent it in a quick run.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.core import FrozenDict
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import sparsereg_jax as sj

STRENGTH, ALPHA, RATE, DECAY = 0.2, 0.5, 0.01, 0.9
STEPS = 3


class Case(NamedTuple):
    make: Callable[..., optax.GradientTransformationExtraArgs]  # of strength and alpha
    plain: optax.GradientTransformation  # what is left of it at a strength of 0
    held: bool = False


def _shrink(optimizer, strength, **more):
    return sj.shrink_selectively(optimizer, rate=strength, **more)


CASES = {
    "add": Case(sj.add_selective_shrinkage, optax.identity()),
    "add, rms": Case(
        lambda **k: sj.add_selective_shrinkage(rms_decay=DECAY, **k), optax.identity()
    ),
    "decouple": Case(
        lambda **k: sj.decouple_selective_shrinkage(optax.scale_by_adam(), **k),
        optax.scale_by_adam(),
    ),
    "decouple, rms": Case(
        lambda **k: sj.decouple_selective_shrinkage(optax.scale_by_adam(), rms_decay=DECAY, **k),
        optax.scale_by_adam(),
    ),
    "shrink": Case(lambda **k: _shrink(optax.lion(RATE), **k), optax.lion(RATE)),
    "sgd": Case(lambda **k: sj.selective_sgd(RATE, 0.9, **k), optax.sgd(RATE, 0.9)),
    "sgdw": Case(lambda **k: sj.selective_sgdw(RATE, 0.9, **k), optax.sgd(RATE, 0.9)),
    "adam": Case(lambda **k: sj.selective_adam(RATE, **k), optax.adam(RATE)),
    "adamw": Case(lambda **k: sj.selective_adamw(RATE, **k), optax.adam(RATE)),
    "hold, plain": Case(
        lambda strength, alpha: sj.hold_zeros(optax.adam(RATE)), optax.adam(RATE), held=True
    ),
    "hold, selective": Case(
        lambda **k: sj.hold_zeros(sj.selective_adam(RATE, **k)), optax.adam(RATE), held=True
    ),
}
SELECTIVE = [name for name in CASES if name != "hold, plain"]


def cases(*quick: str, among=tuple(CASES)):
    """All cases; those not named are slow. No names: none is slow."""
    return pytest.mark.parametrize(
        "name",
        [
            pytest.param(name, marks=[] if not quick or name in quick else pytest.mark.slow)
            for name in among
        ],
    )


def build(name: str, strength: Any = STRENGTH, alpha: Any = ALPHA):
    return CASES[name].make(strength=strength, alpha=alpha)


def tree(seed: int, dtype: Any = jnp.float32) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "bias": jnp.asarray(rng.normal(size=4), dtype),
        "kernel": jnp.asarray(rng.normal(size=(2, 4)), dtype),
        "scalar": jnp.asarray(rng.normal(), dtype),
    }


def keep(params: Any) -> Any:
    """A pruning mask that drops every entry whose third decimal is even; some, at any shape."""
    return jax.tree.map(
        lambda w: jnp.asarray(np.abs(np.asarray(w, np.float64)) * 1000 // 1 % 2 == 1), params
    )


def start(name: str, params: Any, tx: Any = None):
    """Params and state at the start; pruned where the case holds zeros."""
    tx = build(name) if tx is None else tx
    state = tx.init(params)
    if CASES[name].held:
        return tx, *sj.prune(tx, params, state, keep(params))
    return tx, params, state


def run(tx, params, state, gradients):
    for gradient in gradients:
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def numpy_run(name: str, weight: Any, gradients: list[Any], strength: float = STRENGTH) -> Any:
    """The equations on one leaf, in float64: the weight after some steps ``w += update``."""
    weight = np.asarray(weight, np.float64)
    held = CASES[name].held
    kept = np.asarray(keep(weight)) if held else np.ones(weight.shape, bool)
    weight = np.where(kept, weight, 0.0)
    momentum = second = rms = np.float64(0)
    for step, gradient in enumerate(gradients, 1):
        gradient = np.where(kept, np.asarray(gradient, np.float64), 0.0)
        now = np.sqrt(np.mean(gradient**2))
        rms = now if step == 1 else DECAY * rms + (1 - DECAY) * now
        scale = ALPHA * rms if "rms" in name else ALPHA
        term = strength * weight * np.exp(-np.abs(gradient) / scale)
        coupled = (
            gradient + term
            if name in ("add", "add, rms", "sgd", "adam", "hold, selective")
            else gradient
        )
        if name.startswith("add"):
            update = coupled
        elif name == "shrink":
            direction = np.sign(0.9 * momentum + 0.1 * gradient)
            momentum = 0.99 * momentum + 0.01 * gradient
            update = -RATE * (direction + 1e-3 * weight) - term
        elif name.startswith("sgd"):
            momentum = coupled + 0.9 * momentum
            update = -RATE * (momentum + (term if name == "sgdw" else 0))
        else:
            momentum = 0.9 * momentum + 0.1 * coupled
            second = 0.999 * second + 0.001 * coupled**2
            corrected = np.sqrt(second / (1 - 0.999**step)) + 1e-8
            update = momentum / (1 - 0.9**step) / corrected
            if name.startswith("decouple"):
                update = update + term
            else:
                update = -RATE * (update + (term if name == "adamw" else 0))
        weight = np.where(kept, weight + update, 0.0)
    return weight


def expected(name, params, gradients, **more):
    return jax.tree.map(lambda w, *g: numpy_run(name, w, g, **more), params, *gradients)


def assert_close(got, want, rtol=1e-5, atol=2e-5):  # f32: Adam reads 1 - 0.999 to 1.3e-5
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        np.testing.assert_allclose(
            np.asarray(a, np.float64),
            np.asarray(b, np.float64),
            rtol=rtol,
            atol=atol,
            err_msg=jax.tree_util.keystr(path),
        )


def assert_same(got, want):
    assert_close(got, want, rtol=0, atol=0)


def types(tree_: Any) -> Any:
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree_)


# The numbers, alone and under JAX's transformations.


@cases()
def test_eager_steps_follow_the_equations(name):
    params, gradients = tree(0), [tree(1 + i) for i in range(STEPS)]
    got, _ = run(*start(name, params), gradients)
    assert_close(got, expected(name, params, gradients))


def _scanned(tx):
    """Steps of training: a scan whose body skips, by cond, where there is nothing to do."""

    def body(carry, gradient_and_go):
        def step(carry):
            params, state = carry
            updates, state = tx.update(gradient, state, params)
            return optax.apply_updates(params, updates), state

        gradient, go = gradient_and_go
        return jax.lax.cond(go, step, lambda carry: carry, carry), None

    def steps(params, state, gradients, go):
        return jax.lax.scan(body, (params, state), (gradients, go))[0]

    return steps


def _stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@cases("add, rms", "shrink", "sgdw", "hold, selective")
def test_jit_of_vmap_of_scan_of_cond_follows_the_equations(name):
    gradients = [[tree(10 * j + 1 + i) for i in range(STEPS)] for j in range(2)]
    started = [start(name, tree(j)) for j in (0, 20)]
    tx = started[0][0]
    params, state = _stack([s[1] for s in started]), _stack([s[2] for s in started])
    go = jnp.array([[True, False, True], [True, True, True]])
    got, _ = jax.jit(jax.vmap(_scanned(tx)))(params, state, _stack(map(_stack, gradients)), go)
    for j, seed in enumerate((0, 20)):
        done = [g for g, gone in zip(gradients[j], go[j], strict=True) if gone]
        assert_close(jax.tree.map(lambda leaf, j=j: leaf[j], got), expected(name, tree(seed), done))


@pytest.mark.slow
@pytest.mark.parametrize("transform", ["jit", "vmap", "scan", "cond"])
@cases()
def test_each_transform_alone(name, transform):
    params, gradient = tree(0), tree(1)
    tx, params, state = start(name, params)

    def step(gradient, state, params):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    if transform == "jit":
        got, _ = jax.jit(step)(gradient, state, params)
    elif transform == "vmap":
        got, _ = jax.vmap(step)(*(_stack([t]) for t in (gradient, state, params)))
        got = jax.tree.map(lambda leaf: leaf[0], got)
    elif transform == "scan":
        (got, _), _ = jax.lax.scan(
            lambda carry, g: (step(g, carry[1], carry[0]), None),
            (params, state),
            _stack([gradient]),
        )
    else:
        got, _ = jax.lax.cond(
            params["scalar"] == params["scalar"],
            step,
            lambda g, s, p: (p, s),
            gradient,
            state,
            params,
        )
    assert_close(got, expected(name, tree(0), [gradient]))


@cases("add, rms", "decouple", "shrink", "hold, selective")
def test_jit_equals_eager_and_compiles_once(name):
    tx, params, state = start(name, tree(0))
    traces = []

    @jax.jit
    def step(gradient, state, params):
        traces.append(None)
        return tx.update(gradient, state, params)

    jitted = eager = state
    for seed in (1, 2):
        got, jitted = step(tree(seed), jitted, params)
        want, eager = tx.update(tree(seed), eager, params)
        assert_close(got, want)
        assert_close(jitted, eager)
    assert len(traces) == 1


@cases()
def test_unknown_extra_arguments_are_ignored(name):
    tx, params, state = start(name, tree(0))
    assert_same(
        tx.update(tree(1), state, params, value=1.0, foo="bar"), tx.update(tree(1), state, params)
    )


# Hyper-parameters and dtypes.

HYPER = {
    "float": lambda value: value,
    "array": lambda value: jnp.asarray(value, jnp.float32),
    "schedule": lambda value: optax.linear_schedule(value, value / 2, 10),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("hyper", HYPER)
@cases()
def test_dtypes_are_kept(name, hyper, dtype, request):
    if dtype == "float64":
        request.getfixturevalue("x64")
    tx = build(name, HYPER[hyper](STRENGTH), HYPER[hyper](ALPHA))
    params = jax.eval_shape(lambda: tree(0, dtype))
    state = jax.eval_shape(tx.init, params)
    updates, new_state = jax.eval_shape(tx.update, params, state, params)
    assert types(updates) == types(params)
    assert types(new_state) == types(state)  # or no scan could carry it
    applied = jax.eval_shape(optax.apply_updates, params, updates)
    assert types(applied) == types(params)


@cases("add, rms", among=[n for n in SELECTIVE if "hold" not in n])
def test_half_precision_numbers(name):
    # One rounding to bf16, at the end: within half a unit in the last place, 2**-8, of the update.
    params, gradient = tree(0, jnp.bfloat16), tree(1, jnp.bfloat16)
    tx, _, state = start(name, params)
    got, _ = tx.update(gradient, state, params)
    # The optimizer's own arithmetic is in bf16; so the term alone is compared.
    plain, _ = CASES[name].plain.update(gradient, CASES[name].plain.init(params), params)
    want = jax.tree.map(
        lambda w, g: numpy_run(name, w, [g]) - np.asarray(w, np.float64), params, gradient
    )
    assert types(got) == types(plain)
    assert_close(
        got,
        want,
        rtol=2**-6,
        atol=2**-6 * (RATE if name not in ("add", "add, rms", "decouple", "decouple, rms") else 1),
    )


@cases("add, rms", "shrink", "sgdw", among=SELECTIVE)
def test_a_constant_schedule_is_a_scalar(name):
    constant = build(name, lambda count: STRENGTH, optax.constant_schedule(ALPHA))
    tx, params, state = start(name, tree(0))
    gradients = [tree(1), tree(2)]
    _, params_too, state_too = start(name, tree(0), constant)
    got, want = run(constant, params_too, state_too, gradients), run(tx, params, state, gradients)
    assert_same(got, want)


def test_alpha_is_read_like_the_strength():
    """At the steps since the last pruning, from 0 on."""
    tx = sj.add_selective_shrinkage(1.0, sj.linear_irrelevance, lambda count: 2.0 * (1 + count))
    one, seen = jnp.ones(1), []
    state = tx.init(one)
    for t in range(4):
        state = sj.restart_shrinkage(state) if t == 3 else state
        updates, state = tx.update(one, state, one)
        seen.append(float(updates[0]) - 1)
    np.testing.assert_allclose(seen, [1 / 2, 3 / 4, 5 / 6, 1 / 2], rtol=1e-5)


@cases()
def test_at_zero_strength_it_is_what_it_wraps(name):
    tx, plain = build(name, 0.0), CASES[name].plain
    params, gradients = tree(0), [tree(1), tree(2)]
    if name == "shrink":  # lion's own decay is in the reference too
        assert_same(tx.init(params).inner_state, plain.init(params))
    got, _ = run(tx, params, tx.init(params), gradients)
    want, _ = run(plain, params, plain.init(params), gradients)
    assert_close(got, want, rtol=1e-6, atol=1e-7)


def _injected(name, strength):
    static = ("irrelevance", "mask", "core", "optimizer", "strength", "rate")
    if not callable(strength):
        static = static[:-2]

    def inject(factory, *args, **kwargs):
        return optax.inject_hyperparams(
            factory,
            static_args=[
                argument for argument in static if argument in inspect.signature(factory).parameters
            ],
        )(*args, **kwargs)

    more = {"alpha": ALPHA, "irrelevance": sj.exponential_irrelevance}
    return {
        "add": lambda: inject(sj.add_selective_shrinkage, strength, **more),
        "add, rms": lambda: inject(sj.add_selective_shrinkage, strength, rms_decay=DECAY, **more),
        "decouple": lambda: inject(
            sj.decouple_selective_shrinkage, optax.scale_by_adam(), strength, **more
        ),
        "decouple, rms": lambda: inject(
            sj.decouple_selective_shrinkage,
            optax.scale_by_adam(),
            strength,
            rms_decay=DECAY,
            **more,
        ),
        "shrink": lambda: inject(sj.shrink_selectively, optax.lion(RATE), strength, **more),
        "sgd": lambda: inject(sj.selective_sgd, RATE, 0.9, strength=strength, **more),
        "sgdw": lambda: inject(sj.selective_sgdw, RATE, 0.9, strength=strength, **more),
        "adam": lambda: inject(sj.selective_adam, RATE, strength=strength, **more),
        "adamw": lambda: inject(sj.selective_adamw, RATE, strength=strength, **more),
        "hold, plain": lambda: sj.hold_zeros(optax.inject_hyperparams(optax.adam)(RATE)),
        "hold, selective": lambda: sj.hold_zeros(
            inject(sj.selective_adam, RATE, strength=strength, **more)
        ),
    }[name]()


@pytest.mark.parametrize("kind", ["float", "schedule"])
@cases("add, rms", "shrink", "sgdw", "hold, selective")
def test_under_inject_hyperparams(name, kind):
    strength = HYPER[kind](STRENGTH)
    gradients = [tree(1), tree(2), tree(3)]
    tx, params, state = start(name, tree(0), build(name, strength))
    want, _ = run(tx, params, state, gradients)
    tx, params, state = start(name, tree(0), _injected(name, strength))
    got, _ = run(tx, params, state, gradients)
    assert_close(got, want)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_ours_run_under_strict_dtype_promotion(dtype, strict_dtypes):
    # optax's own Adam does not, so what is wrapped here is plain.
    params = tree(0, dtype)
    for strength in (STRENGTH, optax.constant_schedule(STRENGTH), sj.paper_strength(0.1, 10)):
        for tx in (
            sj.add_selective_shrinkage(strength, rms_decay=DECAY),
            sj.decouple_selective_shrinkage(optax.identity(), strength),
            sj.shrink_selectively(optax.sgd(RATE), strength, sj.linear_irrelevance),
            sj.selective_sgd(RATE, strength=strength),
            sj.hold_zeros(sj.selective_sgdw(RATE, strength=strength)),
        ):
            state = tx.init(params)
            updates, new_state = jax.eval_shape(tx.update, params, state, params)
            assert types((updates, new_state)) == types((params, state))
    pruned, _ = jax.eval_shape(lambda p, s, m: sj.prune(tx, p, s, m), params, state, keep(params))
    assert types(pruned) == types(params)


# What stands around it.

WRAPPED = ("add, rms", "shrink", "hold, selective")


@cases(*WRAPPED)
def test_inside_chain(name):
    gradients = [tree(1), tree(2)]
    tx, params, state = start(name, tree(0), optax.chain(optax.scale(2.0), build(name)))
    doubled = [jax.tree.map(lambda g: 2 * g, g) for g in gradients]
    got, _ = run(tx, params, state, gradients)
    assert_close(got, expected(name, tree(0), doubled))


@pytest.mark.parametrize("prefix", [False, True])
@cases(*WRAPPED)
def test_inside_masked(name, prefix):
    mask = (
        {"a": True, "b": False}
        if prefix
        else (
            lambda params: (
                {"a": jax.tree.map(lambda _: True, params["a"]), "b": False}
                if isinstance(params, dict)
                else jax.tree.map(lambda _: True, params)
            )
        )
    )
    params = {"a": tree(0), "b": jnp.ones(3)}
    tx = optax.masked(build(name), mask)
    state = tx.init(params)
    if CASES[name].held:
        params, state = sj.prune(tx, params, state, {"a": keep(tree(0)), "b": jnp.ones(3, bool)})
    updates, _ = tx.update({"a": tree(1), "b": jnp.full(3, 7.0)}, state, params)
    np.testing.assert_array_equal(updates["b"], np.full(3, 7.0))
    assert_close(optax.apply_updates(params["a"], updates["a"]), expected(name, tree(0), [tree(1)]))


@cases(*WRAPPED)
def test_inside_partition(name):
    labels = {"a": "ours", "b": "sgd"}
    params = {"a": tree(0), "b": jnp.ones(3)}
    tx = optax.partition({"ours": build(name), "sgd": optax.sgd(0.5)}, labels)
    state = tx.init(params)
    if CASES[name].held:
        params, state = sj.prune(tx, params, state, {"a": keep(tree(0)), "b": jnp.ones(3, bool)})
    got, _ = run(tx, params, state, [{"a": tree(i), "b": jnp.ones(3)} for i in (1, 2)])
    assert_close(got["a"], expected(name, tree(0), [tree(1), tree(2)]))
    np.testing.assert_array_equal(got["b"], np.zeros(3))


@cases("add, rms", "hold, selective")
def test_inside_multi_steps(name):
    tx = optax.MultiSteps(build(name), 2).gradient_transformation()
    tx, params, state = start(name, tree(0), tx)
    got, _ = run(tx, params, state, [tree(i) for i in (1, 2, 3, 4)])
    mean = [jax.tree.map(lambda a, b: (a + b) / 2, tree(i), tree(i + 1)) for i in (1, 3)]
    assert_close(got, expected(name, tree(0), mean))


@cases("add, rms", "hold, selective")
def test_inside_apply_if_finite(name):
    tx, params, state = start(name, tree(0), optax.apply_if_finite(build(name), 5))
    bad = tree(2) | {"bias": jnp.array([1.0, jnp.nan, jnp.inf, 0.0])}
    updates, skipped = tx.update(bad, state, params)
    assert_same(updates, jax.tree.map(jnp.zeros_like, params))
    assert_same(skipped.inner_state, state.inner_state)
    got, _ = run(tx, params, skipped, [tree(1)])
    assert_close(got, expected(name, tree(0), [tree(1)]))


class _Model(nnx.Module):
    def __init__(self, params):
        self.bias, self.kernel = nnx.Param(params["bias"]), nnx.Param(params["kernel"])
        self.scalar = nnx.Param(params["scalar"])


@cases(*WRAPPED)
def test_inside_nnx_optimizer(name):
    model = _Model(tree(0))
    optimizer = nnx.Optimizer(model, build(name), wrt=nnx.Param)
    if CASES[name].held:
        params = nnx.state(model, nnx.Param)
        params, state = sj.prune(
            optimizer.tx, params, optimizer.opt_state, jax.tree.map(keep, params)
        )
        nnx.update(model, params)
        optimizer.opt_state = state
    for seed in (1, 2):
        optimizer.update(model, nnx.state(_Model(tree(seed)), nnx.Param))
    got = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert_close(got, expected(name, tree(0), [tree(1), tree(2)]))


@cases(*WRAPPED)
def test_inside_train_state(name):
    state = TrainState.create(apply_fn=None, params=tree(0), tx=build(name))
    if CASES[name].held:
        params, opt_state = sj.prune(state.tx, state.params, state.opt_state, keep(tree(0)))
        state = state.replace(params=params, opt_state=opt_state)
    for seed in (1, 2):
        state = state.apply_gradients(grads=tree(seed))
    assert_close(state.params, expected(name, tree(0), [tree(1), tree(2)]))


@cases()
def test_map_params_knows_its_state(name):
    tx, params, state = start(name, tree(0))
    names = {key: key for key in params}
    marked = optax.tree.map_params(
        tx, lambda _, key: f"of {key}", state, names, transform_non_params=lambda _: "else"
    )
    assert jax.tree.structure(marked) == jax.tree.structure(state)
    for path, mark in jax.tree_util.tree_leaves_with_path(marked):
        last = jax.tree_util.keystr(path[-1:], simple=True)
        assert mark == (f"of {last}" if last in names else "else")


# Any tree.


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class _Record:
    bias: Any
    kernel: Any
    scalar: Any


CONTAINERS = {
    "dict": dict,
    "FrozenDict": FrozenDict,
    "tuple": lambda t: (t["bias"], (t["kernel"], t["scalar"])),
    "list": lambda t: [t["bias"], [t["kernel"]], t["scalar"]],
    "dataclass": lambda t: _Record(**t),
    "nnx.State": lambda t: nnx.state(_Model(t), nnx.Param),
}


@pytest.mark.parametrize("container", CONTAINERS)
@cases(*WRAPPED)
def test_containers(name, container):
    wrap = CONTAINERS[container]
    gradients = [tree(1), tree(2)]
    tx, params, state = start(name, wrap(tree(0)))
    got, new_state = run(tx, params, state, map(wrap, gradients))
    assert jax.tree.structure(got) == jax.tree.structure(params)
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    want = jax.tree.leaves(expected(name, tree(0), gradients))
    assert_close(jax.tree.leaves(got), want)


@cases(*WRAPPED)
def test_none_leaves(name):
    # A None in the params, and a None gradient where the params hold an array (a frozen leaf).
    params = {"a": tree(0)["kernel"], "none": None}
    tx, params, state = start(name, params)
    got, _ = run(tx, params, state, [{"a": tree(1)["kernel"], "none": None}])
    assert got["none"] is None
    assert_close(got["a"], numpy_run(name, tree(0)["kernel"], [tree(1)["kernel"]]))


@cases(among=["add", "add, rms", "sgd", "sgdw"])  # optax's own scale_by_adam and lion raise
def test_a_none_update_passes_through(name):
    params = {"a": tree(0)["kernel"], "frozen": jnp.ones(2)}
    tx, params, state = start(name, params)
    updates, new_state = tx.update({"a": tree(1)["kernel"], "frozen": None}, state, params)
    assert updates["frozen"] is None
    want = numpy_run(name, params["a"], [tree(1)["kernel"]])
    assert_close(params["a"] + updates["a"], want)
    terms = [
        s
        for s in jax.tree.leaves(
            new_state, is_leaf=lambda n: isinstance(n, sj.SelectiveShrinkageState)
        )
        if isinstance(s, sj.SelectiveShrinkageState)
    ]
    assert [int(term.count) for term in terms] == [1]


@pytest.mark.parametrize("inner", [optax.sgd(0.5), sj.selective_sgdw(0.5)])
def test_a_none_update_passes_through_a_held_optimizer(inner):
    params = {"a": jnp.ones(2), "frozen": jnp.ones(2)}
    tx = sj.hold_zeros(inner)
    params, state = sj.prune(
        tx, params, tx.init(params), {"a": jnp.array([True, False]), "frozen": jnp.ones(2, bool)}
    )
    updates, _ = tx.update({"a": jnp.full(2, 5.0), "frozen": None}, state, params)
    assert updates["frozen"] is None
    np.testing.assert_allclose(updates["a"], [-2.5, 0.0])


@pytest.mark.parametrize("empty", [{}, (), [], {"a": {}}])
@cases(*WRAPPED)
def test_empty_trees(name, empty):
    tx, params, state = start(name, empty)
    updates, new_state = tx.update(empty, state, params)
    assert updates == empty
    assert jax.tree.structure(new_state) == jax.tree.structure(state)


@cases(*WRAPPED)
def test_zero_size_and_scalar_leaves(name):
    params = {"none at all": jnp.zeros((0, 3)), "scalar": jnp.asarray(0.7)}
    gradient = {"none at all": jnp.zeros((0, 3)), "scalar": jnp.asarray(0.3)}
    tx, params, state = start(name, params)
    got, new_state = run(tx, params, state, [gradient, gradient])
    assert got["none at all"].shape == (0, 3)
    assert_close(got["scalar"], numpy_run(name, jnp.asarray(0.7), [jnp.asarray(0.3)] * 2))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(new_state))


@cases(*WRAPPED)
def test_a_lone_array_is_a_tree(name):
    tx, params, state = start(name, tree(0)["kernel"])
    got, _ = run(tx, params, state, [tree(1)["kernel"]])
    assert_close(got, numpy_run(name, tree(0)["kernel"], [tree(1)["kernel"]]))


# Where the arrays live.


@cases("decouple, rms", "hold, selective")
def test_orbax_round_trip(name, tmp_path):
    tx, params, state = start(name, tree(0))
    _, state = run(tx, params, state, [tree(1)])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        template = jax.eval_shape(tx.init, params)
        restored = checkpointer.restore(tmp_path / "state", template)
    assert_same(restored, state)
    assert_same(run(tx, params, restored, [tree(2)]), run(tx, params, state, [tree(2)]))


@cases("decouple, rms", "hold, selective")
def test_a_sharded_input_stays_sharded(name):
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "model"))

    def sharded(seed):
        rng = np.random.default_rng(seed)
        specs = {"kernel": P("data", "model"), "bias": P("model"), "all": P()}
        shapes = {"kernel": (8, 4), "bias": (4,), "all": (3,)}
        return {
            k: jax.device_put(
                jnp.asarray(rng.normal(size=shapes[k]), jnp.float32), NamedSharding(mesh, specs[k])
            )
            for k in specs
        }

    tx = build(name)
    params, gradient = sharded(0), sharded(1)
    state = tx.init(params)
    if CASES[name].held:
        mask = jax.tree.map(lambda m, w: jax.device_put(m, w.sharding), keep(params), params)
        params, state = sj.prune(tx, params, state, mask)
    updates, new_state = jax.jit(tx.update)(gradient, state, params)
    for key, weight in params.items():
        assert updates[key].sharding.is_equivalent_to(weight.sharding, weight.ndim)
    moments = [
        (path[-1].key, leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(new_state)
        if isinstance(path[-1], jax.tree_util.DictKey) and leaf.ndim
    ]
    trees = {"add": 0, "add, rms": 0, "shrink": 1, "sgd": 1, "sgdw": 1}.get(name, 2)
    assert len(moments) == 3 * (trees + CASES[name].held)  # moments, and the pruning mask
    for key, moment in moments:
        assert moment.sharding.is_equivalent_to(params[key].sharding, moment.ndim), key
    want = expected(name, jax.device_get(sharded(0)), [jax.device_get(gradient)])
    assert_close(optax.apply_updates(params, updates), want)
