"""Zeros held under every optimizer of optax and in every place, and the schedules that restart."""

import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from optax._src import alias

import sparsereg_jax as sj

# Every optimizer that optax exports.

SPECIAL = {  # arguments other than a learning rate of 0.01
    "adadelta": {"learning_rate": 0.1},
    "adafactor": {"learning_rate": 0.01, "min_dim_size_to_factor": 4},
    "lars": {"learning_rate": 5.0},  # times a trust ratio of 1e-3
    "lbfgs": {},
    "noisy_sgd": {"learning_rate": 0.01, "key": 0},
    "polyak_sgd": {"max_learning_rate": 0.01},
}
SHAPES = {"matrix": (6, 5), "vector": (7,)}  # told apart by shape in any state
CURVATURE = {
    name: np.linspace(0.5, 2, np.prod(shape)).reshape(shape).astype(np.float32)
    for name, shape in SHAPES.items()
}


def _aliases() -> list[str]:
    def optimizer(name, value):
        made_here = inspect.isfunction(value) and value.__module__ == alias.__name__
        return (made_here or isinstance(value, functools.partial)) and getattr(
            optax, name, None
        ) is value

    return [name for name, value in vars(alias).items() if optimizer(name, value)]


def _documented_exceptions() -> set[str]:
    table = re.split(r"=+  =+\n", inspect.getdoc(sj.hold_zeros))[1]
    return {name for row in table.splitlines() for name in re.findall(r"\w+", row[:17])}


def _params(dtypes):
    rng = np.random.default_rng(0)
    return {
        name: jnp.asarray(rng.normal(size=shape), dtypes[name]) for name, shape in SHAPES.items()
    }


def _mask():
    rng = np.random.default_rng(1)
    return {name: jnp.asarray(rng.random(shape) > 0.4) for name, shape in SHAPES.items()}


def _loss(params):
    return sum(
        jnp.sum(CURVATURE[name] * jnp.square(w.astype(jnp.float32) - 0.5))
        for name, w in params.items()
    )


def _descent(tx, steps):
    """A jitted run that returns, besides where it ended, every params and state on its way."""

    def step(carry, _):
        params, state = carry
        value, gradient = jax.value_and_grad(_loss)(params)
        updates, state = tx.update(
            gradient, state, params, value=value, grad=gradient, value_fn=_loss
        )
        params = optax.apply_updates(params, updates)
        return (params, state), (params, state.inner_state)

    return jax.jit(lambda *carry: jax.lax.scan(step, carry, None, length=steps))


def _check_optimizer(name, dtypes):
    tx = sj.hold_zeros(getattr(optax, name)(**SPECIAL.get(name, {"learning_rate": 0.01})))
    params, mask = _params(dtypes), _mask()
    descent = _descent(tx, 50)
    (params, state), _ = descent(params, tx.init(params))
    # lbfgs is at the minimum by now; away from it again, for every optimizer has to have work.
    params = jax.tree.map(lambda w: w - jnp.ones((), w.dtype), params)
    params, state = sj.prune(tx, params, state, mask)
    before = _loss(params)
    (last, _), (weights, states) = descent(params, state)

    pruned = {name: ~np.asarray(keep) for name, keep in mask.items()}
    for leaf, weight in weights.items():
        weight = np.asarray(weight.astype(jnp.float32))
        assert np.isfinite(weight).all()
        assert (weight[:, pruned[leaf]] == 0).all()
        assert not np.signbit(weight[:, pruned[leaf]]).any()
    assert _loss(last) < before  # the rest learns on

    restless = set()
    for moments in (state.inner_state, states):
        for path, moment in jax.tree_util.tree_leaves_with_path(moments):
            if not jnp.issubdtype(moment.dtype, jnp.floating):
                continue  # counts and keys
            moment = np.asarray(moment.astype(jnp.float32))
            for leaf, shape in SHAPES.items():
                if moment.shape[-len(shape) :] == shape and (moment[..., pruned[leaf]] != 0).any():
                    restless.add(jax.tree_util.keystr(path))
    assert bool(restless) == (name in _documented_exceptions()), restless


@pytest.mark.filterwarnings("ignore:`optimistic_adam` is deprecated")
@pytest.mark.parametrize("name", _aliases())
def test_every_optimizer_of_optax_holds_zeros(name):
    _check_optimizer(name, {"matrix": jnp.float32, "vector": jnp.bfloat16})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`optimistic_adam` is deprecated")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", _aliases())
def test_every_optimizer_of_optax_in_one_dtype(name, dtype):
    _check_optimizer(name, {"matrix": dtype, "vector": dtype})


def test_the_table_of_exceptions_names_optimizers():
    assert _documented_exceptions() <= set(_aliases())
    assert len(_aliases()) >= 30


# One pruning, piece by piece.

TREE = {"a": jnp.array([[1.0, -2.0, 3.0]]), "b": {"c": jnp.array([-4.0, 5.0]), "d": jnp.array(6.0)}}
MASK = {
    "a": jnp.array([[True, False, True]]),
    "b": {"c": jnp.array([False, True]), "d": jnp.array(False)},
}
PRUNED = {"a": [[1.0, 0.0, 3.0]], "b": {"c": [0.0, 5.0], "d": 0.0}}
GRADIENT = jax.tree.map(jnp.ones_like, TREE)


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def _steps(tx, params, state, gradients):
    for gradient in gradients:
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def _momentum(weight, gradients):
    """SGD with rate 0.1 and momentum 0.9 from a trace of 0, in NumPy."""
    weight, trace = np.asarray(weight, np.float64), 0.0
    for gradient in gradients:
        trace = gradient + 0.9 * trace
        weight = weight - 0.1 * trace
    return weight


def test_prune_zeroes_weights_and_moments_and_goes_on_counting():
    tx = sj.hold_zeros(optax.adam(0.1))
    params, state = _steps(tx, TREE, tx.init(TREE), [GRADIENT] * 3)
    pruned, new = sj.prune(tx, params, state, MASK)
    assert_same(new.pruning_mask, MASK)
    old_adam, adam = state.inner_state[0], new.inner_state[0]
    assert adam.count == 3
    for got, want in [(pruned, params), (adam.mu, old_adam.mu), (adam.nu, old_adam.nu)]:
        assert all(np.all(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(want))
        assert_same(got, jax.tree.map(lambda w, m: np.where(m, w, 0), want, MASK))
    assert not any(
        np.signbit(leaf[~np.asarray(keep)]).any()
        for leaf, keep in zip(
            map(np.asarray, jax.tree.leaves(pruned)), jax.tree.leaves(MASK), strict=True
        )
    )


def test_prune_under_jit_equals_eager():
    tx = sj.hold_zeros(sj.selective_adam(0.1, rms_decay=0.9))
    params, state = _steps(tx, TREE, tx.init(TREE), [GRADIENT])
    want = sj.prune(tx, params, state, MASK)
    got = jax.jit(functools.partial(sj.prune, tx))(params, state, MASK)
    assert_same(got, want)
    types = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), (params, state))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), got) == types


def test_a_second_pruning_refines_the_first():
    tx = sj.hold_zeros(optax.sgd(0.1, momentum=0.9))
    params, state = sj.prune(tx, TREE, tx.init(TREE), MASK)
    params, state = _steps(tx, params, state, [GRADIENT])
    fewer = sj.intersection(
        MASK,
        {
            "a": jnp.array([[False, True, True]]),
            "b": {"c": jnp.ones(2, bool), "d": jnp.array(True)},
        },
    )
    params, state = sj.prune(tx, params, state, fewer)
    params, _ = _steps(tx, params, state, [GRADIENT])
    # The survivors' momentum goes on through the pruning.
    np.testing.assert_allclose(params["a"], [[0.0, 0.0, _momentum(3.0, [1, 1])]], rtol=1e-6)
    np.testing.assert_allclose(params["b"]["c"], [0.0, _momentum(5.0, [1, 1])], rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_pruned_entry_s_bad_gradient_does_no_harm(bad):
    tx = sj.hold_zeros(
        optax.chain(optax.clip_by_global_norm(1.0), sj.selective_adam(0.1, rms_decay=0.9))
    )
    params, state = sj.prune(tx, TREE, tx.init(TREE), MASK)
    poisoned = jax.tree.map(lambda g, m: jnp.where(m, g, bad), GRADIENT, MASK)
    assert_same(
        _steps(tx, params, state, [poisoned] * 2), _steps(tx, params, state, [GRADIENT] * 2)
    )


def test_all_that_is_not_pruned_is_untouched_by_the_wrapper():
    plain, tx = optax.adamw(0.1), sj.hold_zeros(optax.adamw(0.1))
    want, _ = _steps(plain, TREE, plain.init(TREE), [GRADIENT] * 3)
    got, _ = _steps(tx, TREE, tx.init(TREE), [GRADIENT] * 3)
    assert_same(got, want)
    got, _ = _steps(tx, *sj.prune(tx, TREE, tx.init(TREE), MASK), [GRADIENT] * 3)
    assert_same(got, jax.tree.map(lambda w, m: np.where(m, w, 0), want, MASK))


def test_a_weight_changed_behind_the_wrapper_comes_back_to_zero():
    tx = sj.hold_zeros(optax.adam(0.1))
    _, state = sj.prune(tx, TREE, tx.init(TREE), MASK)
    params, _ = _steps(tx, TREE, state, [GRADIENT])  # the weights from before the pruning
    for weight, keep in zip(*map(jax.tree.leaves, (params, MASK)), strict=True):
        gone = np.asarray(weight)[~np.asarray(keep)]
        assert (gone == 0).all()
        assert not np.signbit(gone).any()


def test_leaves_without_floats_pass():
    params = {
        "w": jnp.array([1.0, 2.0]),
        "steps": jnp.array([3, 4]),
        "key": jax.random.key(0),
        "none": None,
    }
    floats = {"w": True, "steps": False, "key": False, "none": None}
    tx = sj.hold_zeros(optax.masked(optax.sgd(0.5), floats))
    mask = sj.full_mask(params) | {"w": jnp.array([False, True])}
    pruned, state = sj.prune(tx, params, tx.init(params), mask)
    updates, _ = tx.update(params, state, pruned)
    np.testing.assert_array_equal(updates["w"], [0.0, -1.0])
    for key in ("steps", "key"):
        assert pruned[key] is params[key]
        assert updates[key] is params[key]


def test_extra_arguments_reach_the_optimizer():
    inner = optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(),
        lambda updates, state, params=None, *, value, **more: (
            jax.tree.map(lambda g: value * g, updates),
            state,
        ),
    )
    tx = sj.hold_zeros(inner)
    updates, _ = tx.update(GRADIENT, tx.init(TREE), TREE, value=-3.0)
    assert_same(updates, jax.tree.map(lambda g: -3.0 * np.asarray(g), GRADIENT))


def test_a_lone_scalar_spares_the_hyper_parameters():
    tx = sj.hold_zeros(optax.inject_hyperparams(optax.sgd)(0.5))
    w, state = sj.prune(tx, jnp.array(2.0), tx.init(jnp.array(2.0)), jnp.array(False))
    assert w == 0
    assert state.inner_state.hyperparams["learning_rate"] == 0.5


# Where it may stand. Each entry: the transformation, and which leaves of TREE it holds.

SGD = optax.sgd(0.1, momentum=0.9)
PLACES = {
    "alone": sj.hold_zeros(SGD),
    "around a chain": sj.hold_zeros(optax.chain(optax.clip(10.0), SGD)),
    "in a chain": optax.chain(optax.identity(), sj.hold_zeros(SGD)),
    "masked": optax.masked(sj.hold_zeros(SGD), {"a": True, "b": True}),
    "partition": optax.partition(
        {"x": sj.hold_zeros(SGD), "y": sj.hold_zeros(SGD)}, {"a": "x", "b": "y"}
    ),
    "around partition": sj.hold_zeros(
        optax.partition({"x": SGD, "y": SGD}, {"a": "x", "b": {"c": "x", "d": "y"}})
    ),
    "around masked": sj.hold_zeros(optax.chain(optax.masked(SGD, {"a": True, "b": True}))),
    "inject_hyperparams": sj.hold_zeros(optax.inject_hyperparams(optax.sgd)(0.1, momentum=0.9)),
    "in inject_hyperparams": optax.inject_hyperparams(
        lambda rate: sj.hold_zeros(optax.sgd(rate, momentum=0.9))
    )(0.1),
    "apply_if_finite": optax.apply_if_finite(sj.hold_zeros(SGD), 3),
    "MultiSteps": optax.MultiSteps(sj.hold_zeros(SGD), 1).gradient_transformation(),
}


def _moments(state):
    return [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if "trace" in jax.tree_util.keystr(path)
    ]


@pytest.mark.parametrize("place", PLACES)
def test_every_place(place):
    tx = PLACES[place]
    params, state = _steps(tx, TREE, tx.init(TREE), [GRADIENT])
    assert all(np.all(np.asarray(leaf) == 1) for leaf in _moments(state))
    params, state = sj.prune(tx, params, state, MASK)
    assert_same(sj.held_mask(params, state), MASK)
    assert_same(_moments(state), [keep.astype(jnp.float32) for keep in jax.tree.leaves(MASK)])
    params, state = _steps(tx, params, state, [GRADIENT] * 2)
    want = jax.tree.map(lambda w, m: np.where(m, _momentum(w, [1, 1, 1]), 0), TREE, MASK)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), params, want)
    assert all(
        np.all(np.asarray(leaf)[~np.asarray(keep)] == 0)
        for leaf, keep in zip(_moments(state), jax.tree.leaves(MASK), strict=True)
    )


def test_multi_steps_that_hold_zeros_in_the_midst_of_an_accumulation():
    tx = optax.MultiSteps(sj.hold_zeros(SGD), 2).gradient_transformation()
    params, state = _steps(tx, TREE, tx.init(TREE), [GRADIENT])  # half a step
    params, state = sj.prune(tx, params, state, MASK)
    params, _ = _steps(tx, params, state, [GRADIENT])
    want = jax.tree.map(lambda w, m: np.where(m, _momentum(w, [1]), 0), TREE, MASK)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), params, want)


def test_a_part_of_the_leaves_is_held():
    # Holes where optax.partition gives leaves to another transformation.
    tx = optax.partition(
        {"held": sj.hold_zeros(SGD), "free": SGD}, {"a": "held", "b": {"c": "held", "d": "free"}}
    )
    state = tx.init(TREE)
    assert_same(sj.held_mask(TREE, state), sj.full_mask(TREE))
    mask = MASK | {"b": {"c": MASK["b"]["c"], "d": jnp.array(True)}}
    params, state = sj.prune(tx, TREE, state, mask)
    assert_same(sj.held_mask(params, state), mask)
    params, _ = _steps(tx, params, state, [GRADIENT] * 2)
    want = jax.tree.map(lambda w, m: np.where(m, _momentum(w, [1, 1]), 0), TREE, mask)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), params, want)


class _Model(nnx.Module):
    def __init__(self):
        self.a, self.c = nnx.Param(TREE["a"]), nnx.Param(TREE["b"]["c"])
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

    def __call__(self):
        return jnp.sum(self.a[...]) + jnp.sum(self.c[...])


def test_in_an_nnx_optimizer():
    model = _Model()
    optimizer = nnx.Optimizer(
        model, sj.hold_zeros(sj.selective_sgd(0.1, momentum=0.9)), wrt=nnx.Param
    )

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda model: model())(model))

    step(model, optimizer)
    # What a user writes:
    params = nnx.state(model, nnx.Param)
    pruning_mask = sj.mask_by_threshold(params, 2.5, mask=sj.every_parameter)
    params, opt_state = sj.prune(optimizer.tx, params, optimizer.opt_state, pruning_mask)
    nnx.update(model, params)
    optimizer.opt_state = opt_state

    for _ in range(2):
        step(model, optimizer)
    held = sj.held_mask(nnx.state(model, nnx.Param), optimizer.opt_state)
    assert jax.tree.map(lambda keep: keep.tolist(), nnx.to_pure_dict(held)) == {
        "a": [[False, False, True]],
        "c": [True, True],
    }
    # Gradients of 1 leave nothing to shrink, and the survivors' momentum went on.
    np.testing.assert_allclose(model.a[...], [[0.0, 0.0, _momentum(3, [1] * 3)]], rtol=1e-6)
    np.testing.assert_allclose(model.c[...], [_momentum(w, [1] * 3) for w in (-4, 5)], rtol=1e-6)
    assert optimizer.step[...] == 3


def test_in_a_train_state():
    state = TrainState.create(apply_fn=None, params=TREE, tx=sj.hold_zeros(SGD))
    params, opt_state = sj.prune(state.tx, state.params, state.opt_state, MASK)
    state = state.replace(params=params, opt_state=opt_state)
    for _ in range(2):
        state = state.apply_gradients(grads=GRADIENT)
    want = jax.tree.map(lambda w, m: np.where(m, _momentum(w, [1, 1]), 0), TREE, MASK)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), state.params, want)


# Mistakes.


def test_without_hold_zeros_prune_raises():
    tx = sj.selective_adam(0.1)
    with pytest.raises(ValueError, match=r"hold_zeros\(tx\)"):
        sj.prune(tx, TREE, tx.init(TREE), MASK)
    with pytest.raises(ValueError, match=r"hold_zeros\(tx\)"):
        sj.held_mask(TREE, tx.init(TREE))


@pytest.mark.parametrize(
    ("mask", "path"),
    [
        (MASK | {"b": {"c": MASK["b"]["c"]}}, "b/d"),
        (MASK | {"b": MASK["b"] | {"c": jnp.ones(3, bool)}}, "b/c"),
        (MASK | {"a": jnp.ones((1, 3))}, "'a'"),
        (MASK | {"a": True}, "'a'"),
    ],
)
def test_a_mask_that_does_not_fit_is_named(mask, path):
    tx = sj.hold_zeros(SGD)
    with pytest.raises(ValueError, match=f"pruning_mask.*{path}"):
        sj.prune(tx, TREE, tx.init(TREE), mask)


def test_a_state_of_another_transformation_raises():
    tx = sj.hold_zeros(optax.adam(0.1))
    with pytest.raises(
        ValueError, match=r"opt_state has leaves of shapes .* where .* gives .* made with"
    ):
        sj.prune(tx, TREE, sj.hold_zeros(SGD).init(TREE), MASK)


def test_update_without_params_raises():
    tx = sj.hold_zeros(SGD)
    with pytest.raises(ValueError, match=r"hold_zeros.*update\(gradients, state, params\)"):
        tx.update(GRADIENT, tx.init(TREE))


# The schedules, which restart with each pruning.

W = {"a": jnp.ones(2), "b": jnp.ones(3)}
NOTHING = jax.tree.map(jnp.zeros_like, W)


def _one_two_three(count):
    return 1.0 + count


def _counting(strength=_one_two_three):
    """Updates that show what the schedule gave: 1, 2, 3, ... of weights that are 1."""
    return sj.add_selective_shrinkage(strength, sj.constant_irrelevance)


def _read(tx, state, steps, leaf="a"):
    """What the schedule gave in some steps, and the state after them."""
    values = []
    for _ in range(steps):
        updates, state = tx.update(NOTHING, state, W)
        assert len(set(np.asarray(updates[leaf]).tolist())) == 1
        values.append(float(updates[leaf][0]))
    return values, state


AROUND = {
    "alone": _counting(),
    "chain": optax.chain(optax.identity(), _counting()),
    "masked": optax.masked(_counting(), {"a": True, "b": False}),
    "partition": optax.partition({"x": _counting(), "y": optax.adam(0.1)}, {"a": "x", "b": "y"}),
    "hold_zeros": sj.hold_zeros(_counting()),
    "apply_if_finite": optax.apply_if_finite(_counting(), 3),
    "MultiSteps": optax.MultiSteps(_counting(), 1).gradient_transformation(),
    "inject_hyperparams": optax.inject_hyperparams(
        sj.add_selective_shrinkage, static_args=("strength", "irrelevance")
    )(_one_two_three, sj.constant_irrelevance),
    "decoupled": sj.decouple_selective_shrinkage(
        optax.set_to_zero(), _one_two_three, sj.constant_irrelevance
    ),
}


@pytest.mark.parametrize("around", AROUND)
def test_the_schedule_is_read_at_0_first_and_again_after_a_restart(around):
    tx = AROUND[around]
    values, state = _read(tx, tx.init(W), 3)
    assert values == [1.0, 2.0, 3.0]
    values, _ = _read(tx, jax.jit(sj.restart_shrinkage)(state), 2)
    assert values == [1.0, 2.0]


@pytest.mark.parametrize("around", AROUND)
def test_restart_touches_no_other_count(around):
    tx = optax.chain(optax.scale_by_adam(), AROUND[around])
    state = tx.init(W)
    for _ in range(3):
        _, state = tx.update(W, state, W)
    changed = {}
    for (path, old), new in zip(
        jax.tree_util.tree_leaves_with_path(state),
        jax.tree.leaves(sj.restart_shrinkage(state)),
        strict=True,
    ):
        if not np.array_equal(old, new):
            changed[jax.tree_util.keystr(path)] = (int(old), int(new))
    assert list(changed.values()) == [(3, 0)]
    assert state[0].count == 3  # Adam's, and it was among those compared
    found = [
        node
        for node in jax.tree.leaves(
            sj.restart_shrinkage(state), is_leaf=lambda n: isinstance(n, sj.SelectiveShrinkageState)
        )
        if isinstance(node, sj.SelectiveShrinkageState)
    ]
    assert [int(node.count) for node in found] == [0]


def test_restart_finds_every_shrinkage():
    tx = optax.chain(
        _counting(),
        optax.partition(
            {"x": _counting(), "y": sj.selective_adamw(0.1, strength=_one_two_three)},
            {"a": "x", "b": "y"},
        ),
    )
    state = tx.init(W)
    _, state = tx.update(W, state, W)

    def counts(state):
        return [
            int(node.count)
            for node in jax.tree.leaves(
                state, is_leaf=lambda n: isinstance(n, sj.SelectiveShrinkageState)
            )
            if isinstance(node, sj.SelectiveShrinkageState)
        ]

    assert counts(state) == [1, 1, 1]
    assert counts(sj.restart_shrinkage(state)) == [0, 0, 0]


@pytest.mark.parametrize("tx", [optax.adam(0.1), optax.sgd(0.1), sj.hold_zeros(optax.adam(0.1))])
def test_restart_raises_where_there_is_nothing_to_restart(tx):
    with pytest.raises(ValueError, match="no shrinkage state"):
        sj.restart_shrinkage(tx.init(W))


def test_prune_restarts_the_schedule_and_nothing_else():
    tx = sj.hold_zeros(optax.chain(_counting(), optax.scale_by_adam(), _counting()))
    state = tx.init(W)
    for _ in range(3):
        _, state = tx.update(W, state, W)
    _, state = sj.prune(tx, W, state, sj.full_mask(W))
    first, adam, last = state.inner_state
    assert (first.count, adam.count, last.count) == (0, 3, 0)


def test_multi_steps_count_optimizer_steps():
    tx = optax.MultiSteps(sj.hold_zeros(_counting()), 2).gradient_transformation()
    values, state = _read(tx, tx.init(W), 6)
    assert values == [0.0, 1.0, 0.0, 2.0, 0.0, 3.0]
    _, state = sj.prune(tx, W, state, sj.full_mask(W))
    values, _ = _read(tx, state, 4)
    assert values == [0.0, 1.0, 0.0, 2.0]


def test_an_injected_schedule_does_not_restart_hence_static_args():
    # Read from inject_hyperparams' own count: what the docstring warns of.
    tx = optax.inject_hyperparams(sj.add_selective_shrinkage, static_args=("irrelevance",))(
        _one_two_three, sj.constant_irrelevance
    )
    values, state = _read(tx, tx.init(W), 2)
    values, _ = _read(tx, sj.restart_shrinkage(state), 1)
    assert values == [3.0]


def test_the_schedule_restarts_in_an_nnx_optimizer():
    model = _Model()
    optimizer = nnx.Optimizer(
        model, sj.hold_zeros(sj.selective_adam(0.1, strength=_one_two_three)), wrt=nnx.Param
    )
    for _ in range(2):
        optimizer.update(model, nnx.state(model, nnx.Param))

    def counts():
        return [
            int(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(optimizer.opt_state)
            if "count" in jax.tree_util.keystr(path)
        ]

    assert counts() == [2, 2]
    optimizer.opt_state = sj.restart_shrinkage(optimizer.opt_state)
    assert counts() == [0, 2]
    optimizer.update(model, nnx.state(model, nnx.Param))
    assert counts() == [1, 3]


def test_prune_refuses_what_nothing_holds():
    params = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([1.0, 2.0])}
    tx = optax.partition(
        {"held": sj.hold_zeros(optax.sgd(0.1)), "free": optax.sgd(0.1)}, {"a": "held", "b": "free"}
    )
    state = tx.init(params)
    half = jnp.array([False, True])
    with pytest.raises(ValueError, match="no hold_zeros holds 'b'"):
        sj.prune(tx, params, state, {"a": half, "b": half})
    # A traced mask cannot be looked into: the leaf stays as it is.
    for pruned in (
        jax.jit(lambda p, s, m: sj.prune(tx, p, s, m))(params, state, {"a": half, "b": half}),
        sj.prune(tx, params, state, {"a": half, "b": jnp.array([True, True])}),
    ):
        np.testing.assert_array_equal(pruned[0]["a"], [0, 2])
        np.testing.assert_array_equal(pruned[0]["b"], [1, 2])


def test_the_callers_mask_survives_a_donated_state():
    tx = sj.hold_zeros(optax.adam(0.1))
    params = {"w": jnp.array([1.0, 2.0])}
    mask = {"w": jnp.array([False, True])}
    pruned, state = sj.prune(tx, params, tx.init(params), mask)
    step = jax.jit(lambda g, s, p: tx.update(g, s, p), donate_argnums=1)
    step(params, state, pruned)
    np.testing.assert_array_equal(mask["w"], [False, True])


def test_state_of_another_optimizer():
    params = {"w": jnp.ones((2, 2))}
    tx, other = sj.hold_zeros(optax.sgd(0.1, 0.9)), sj.hold_zeros(optax.adam(0.1))
    with pytest.raises(ValueError, match="it was made with"):
        sj.prune(tx, params, other.init(params), {"w": jnp.ones((2, 2), bool)})


def test_names_that_look_alike():
    params = {"a/b": jnp.array([1.0, 2.0]), "a": {"b": jnp.array([3.0, 4.0])}}
    tx = sj.hold_zeros(optax.sgd(0.1))
    mask = {"a/b": jnp.array([True, False]), "a": {"b": jnp.array([False, True])}}
    pruned, state = sj.prune(tx, params, tx.init(params), mask)
    np.testing.assert_array_equal(pruned["a/b"], [1, 0])
    np.testing.assert_array_equal(state.pruning_mask["a"]["b"], [False, True])
    np.testing.assert_array_equal(sj.held_mask(params, state)["a/b"], [True, False])


def test_hyper_parameters_named_like_params():
    params = {"learning_rate": {"w": jnp.ones(3)}}
    tx = sj.hold_zeros(optax.inject_hyperparams(optax.sgd)(0.1, momentum=0.9))
    mask = {"learning_rate": {"w": jnp.array([True, False, True])}}
    pruned, state = sj.prune(tx, params, tx.init(params), mask)
    np.testing.assert_array_equal(pruned["learning_rate"]["w"], [1, 0, 1])
    np.testing.assert_allclose(state.inner_state.hyperparams["learning_rate"], 0.1, rtol=1e-6)
