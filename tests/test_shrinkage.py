"""Selective shrinkage against float64 NumPy programs of its equations."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparsereg_jax as sj

SCORES = {
    "exponential": (sj.exponential_irrelevance, lambda g, a: np.exp(-np.abs(g) / a)),
    "linear": (sj.linear_irrelevance, lambda g, a: np.maximum(0, 1 - np.abs(g) / a)),
    "constant": (sj.constant_irrelevance, lambda g, a: np.ones_like(g)),
}


def relative_rms(gradient):
    return np.sqrt(np.mean(np.square(gradient)))


# Irrelevance.


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_score_is_its_equation(name, dtype, x64, strict_dtypes):
    score, reference = SCORES[name]
    gradient = jnp.concatenate(
        [
            jnp.asarray(np.random.default_rng(0).normal(size=999), dtype),
            jnp.asarray(np.geomspace(1e-4, 200, 1000), dtype),
        ]
    )
    value = jax.jit(score)(gradient, gradient, jnp.asarray(0.5, dtype))
    exact = reference(np.asarray(gradient, np.float64), 0.5)
    assert value.dtype == gradient.dtype
    assert value.shape == gradient.shape
    tolerance = {"float64": 1e-15, "float32": 3e-7, "float16": 2e-3, "bfloat16": 1.2e-2}[dtype]
    np.testing.assert_allclose(np.asarray(value, np.float64), exact, atol=tolerance)
    assert bool(jnp.all((value >= 0) & (value <= 1)))


@pytest.mark.parametrize("name", ["exponential", "linear"])
@pytest.mark.parametrize("scale", [0.0, 1e-45, 1.0, 1e38, np.inf])
def test_score_is_defined_everywhere(name, scale):
    score, _ = SCORES[name]
    odd = jnp.array([0.0, -0.0, jnp.inf, -jnp.inf, jnp.nan], jnp.float32)
    value = score(odd, odd, jnp.float32(scale))
    np.testing.assert_array_equal(value, [1, 1, 0, 0, 0])
    assert score(jnp.float32(2.0), None, jnp.float32(0.0)) == 0


# The kernel's forms.


def tree(seed, dtype=np.float64):
    random = np.random.default_rng(seed)
    return {
        "a": random.normal(size=(3, 4)).astype(dtype),
        "b": [random.normal(size=5).astype(dtype), random.normal(size=()).astype(dtype)],
    }


def numpy_optimizer(core, decoupled, strength, score, alpha, lr=0.05):
    """One leaf's optimizer, written out: Adam or momentum, coupled or decoupled."""
    memory = {"m": 0.0, "v": 0.0, "t": 0}

    def step(weight, gradient):
        memory["t"] += 1
        t = memory["t"]
        now = strength(t - 1) if callable(strength) else strength
        term = now * weight * score(gradient, alpha)
        total = gradient if decoupled else gradient + term
        if core == "adam":
            memory["m"] = 0.9 * memory["m"] + 0.1 * total
            memory["v"] = 0.999 * memory["v"] + 0.001 * total**2
            update = (memory["m"] / (1 - 0.9**t)) / (np.sqrt(memory["v"] / (1 - 0.999**t)) + 1e-8)
        elif core == "momentum":
            memory["m"] = 0.9 * memory["m"] + total
            update = memory["m"]
        else:
            update = total
        return weight - lr * (update + term if decoupled else update)

    return step


ALIASES = {
    ("sgd", False): sj.selective_sgd,
    ("sgd", True): sj.selective_sgdw,
    ("momentum", False): lambda lr, **k: sj.selective_sgd(lr, 0.9, **k),
    ("momentum", True): lambda lr, **k: sj.selective_sgdw(lr, 0.9, **k),
    ("adam", False): sj.selective_adam,
    ("adam", True): sj.selective_adamw,
}


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("core", ["sgd", "momentum", "adam"])
def test_hundred_steps_equal_numpy(core, decoupled, name, x64):
    score, reference = SCORES[name]

    def strength(count):
        return 0.02 / (1 + count)

    tx = ALIASES[core, decoupled](0.05, strength=strength, irrelevance=score, alpha=0.7)
    params = jax.tree.map(jnp.asarray, tree(0))
    state, update = tx.init(params), jax.jit(tx.update)
    expected = jax.tree.leaves(tree(0))
    optimizers = [numpy_optimizer(core, decoupled, strength, reference, 0.7) for _ in expected]
    for t in range(100):
        gradients = tree(t + 1)
        updates, state = update(jax.tree.map(jnp.asarray, gradients), state, params)
        params = optax.apply_updates(params, updates)
        expected = [
            optimizer(weight, gradient)
            for optimizer, weight, gradient in zip(
                optimizers, expected, jax.tree.leaves(gradients), strict=True
            )
        ]
        for got, wanted in zip(jax.tree.leaves(params), expected, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-12, err_msg=f"step {t}")


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_coupled_constant_is_weight_decay_bit_for_bit(jitted, dtype, x64):
    ours = sj.add_selective_shrinkage(3e-3, sj.constant_irrelevance)
    theirs = optax.add_decayed_weights(3e-3)
    wrap = jax.jit if jitted else lambda f: f
    params, gradients = tree(0, dtype), tree(1, dtype)
    params, gradients = jax.tree.map(jnp.asarray, (params, gradients))
    got, _ = wrap(ours.update)(gradients, ours.init(params), params)
    wanted, _ = wrap(theirs.update)(gradients, theirs.init(params), params)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(one, other)


def test_decoupled_constant_is_adamw():
    options = {"b1": 0.8, "b2": 0.95, "eps": 1e-6, "nesterov": True}
    ours = sj.selective_adamw(1e-2, **options, strength=0.3, irrelevance=sj.constant_irrelevance)
    theirs = optax.adamw(1e-2, **options, weight_decay=0.3)
    results = []
    for tx in (ours, theirs):
        params = jax.tree.map(jnp.asarray, tree(0, np.float32))
        state = tx.init(params)
        for t in range(20):
            gradients = jax.tree.map(jnp.asarray, tree(t, np.float32))
            updates, state = tx.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
        results.append(params)
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_array_equal(one, other)


def test_finished_optimizer_shrinks_at_its_own_rate():
    params, gradients = jax.tree.map(jnp.asarray, (tree(0, np.float32), tree(1, np.float32)))
    lion = optax.lion(1e-3)
    tx = sj.shrink_selectively(lion, rate=0.25, alpha=0.5)
    updates, _ = tx.update(gradients, tx.init(params), params)
    alone, _ = lion.update(gradients, lion.init(params), params)
    for u, a, w, g in zip(*map(jax.tree.leaves, (updates, alone, params, gradients)), strict=True):
        wanted = np.float64(a) - 0.25 * np.float64(w) * np.exp(-np.abs(np.float64(g)) / 0.5)
        np.testing.assert_allclose(u, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("name", SCORES)
def test_penalty_and_its_gradient(name, relative, x64):
    score, reference = SCORES[name]
    params, gradients = jax.tree.map(jnp.asarray, (tree(0), tree(1)))
    mask = {"a": True, "b": [True, False]}

    def penalty(params):
        return sj.selective_penalty(params, gradients, 0.3, score, 0.7, relative, mask)

    taken = [
        (w, g) for w, g, m in zip(*map(jax.tree.leaves, (tree(0), tree(1), mask)), strict=True) if m
    ]
    alphas = [0.7 * (relative_rms(g) if relative else 1) for _, g in taken]
    wanted = sum(
        0.15 * np.sum(w**2 * reference(g, alpha))
        for (w, g), alpha in zip(taken, alphas, strict=True)
    )
    np.testing.assert_allclose(penalty(params), wanted, rtol=1e-12)

    tx = sj.add_selective_shrinkage(0.3, score, 0.7, 0.0 if relative else None, mask)
    updates, _ = tx.update(gradients, tx.init(params), params)
    for added, g, u in zip(
        *map(jax.tree.leaves, (jax.grad(penalty)(params), gradients, updates)), strict=True
    ):
        np.testing.assert_allclose(added, u - g, rtol=1e-9, atol=1e-12)


# The authors' program, from the equations: measure g, add R to the loss, differentiate it with I
# constant, feed Adam, prune a fraction of what is left, restart gamma.


def numpy_program(params, data, *, gamma, epoch, steps, prune_at, fraction, lr=1e-2):
    images, targets = data
    weights = {name: value.copy() for name, value in params.items()}
    keep = {name: np.ones(value.shape, bool) for name, value in params.items()}
    m = {name: np.zeros_like(value) for name, value in params.items()}
    v = {name: np.zeros_like(value) for name, value in params.items()}
    since = 0
    for t in range(1, steps + 1):
        since += 1
        hidden = images @ weights["w1"] + weights["b1"]
        active = np.maximum(hidden, 0)
        error = active @ weights["w2"] + weights["b2"] - targets
        back = 2 * error / error.size
        through = (back @ weights["w2"].T) * (hidden > 0)
        g = {
            "w1": images.T @ through,
            "b1": through.sum(0),
            "w2": active.T @ back,
            "b2": back.sum(0),
        }
        now = gamma * max(0, 1 - since / epoch)
        for name in weights:
            measured = g[name] * keep[name]
            total = measured + 2 * now * weights[name] * np.exp(-np.abs(measured))
            m[name] = 0.9 * m[name] + 0.1 * total
            v[name] = 0.999 * v[name] + 0.001 * total**2
            step = (m[name] / (1 - 0.9**t)) / (np.sqrt(v[name] / (1 - 0.999**t)) + 1e-8)
            weights[name] = (weights[name] - lr * step) * keep[name]
        if t in prune_at:
            left = np.concatenate([np.abs(weights[n][keep[n]]) for n in sorted(weights)])
            threshold = np.sort(left)[round(fraction * left.size) - 1]
            for name in weights:
                keep[name] &= np.abs(weights[name]) > threshold
                weights[name] *= keep[name]
                m[name] *= keep[name]
                v[name] *= keep[name]
            since = 0
    return weights, keep


def test_mlp_equals_the_authors_program(x64):
    random = np.random.default_rng(3)
    params = {
        "w1": random.normal(size=(5, 7)),
        "b1": random.normal(size=7) / 2,
        "w2": random.normal(size=(7, 2)),
        "b2": random.normal(size=2) / 2,
    }
    data = random.normal(size=(16, 5)), random.normal(size=(16, 2))
    settings = {"gamma": 0.05, "epoch": 12, "prune_at": (15, 30), "fraction": 0.25}
    wanted, kept = numpy_program(params, data, steps=45, **settings)

    def loss(params):
        hidden = jax.nn.relu(data[0] @ params["w1"] + params["b1"][None])
        return jnp.mean((hidden @ params["w2"] + params["b2"][None] - data[1]) ** 2)

    tx = sj.hold_zeros(
        sj.selective_adam(1e-2, strength=sj.paper_strength(settings["gamma"], settings["epoch"]))
    )
    weights = jax.tree.map(jnp.asarray, params)
    state = tx.init(weights)

    @jax.jit
    def step(weights, state):
        updates, state = tx.update(jax.grad(loss)(weights), state, weights)
        return optax.apply_updates(weights, updates), state

    for t in range(1, 46):
        weights, state = step(weights, state)
        if t in settings["prune_at"]:
            mask = sj.mask_by_fraction(
                weights,
                settings["fraction"],
                floor=0,
                pruning_mask=state.pruning_mask,
                mask=sj.every_parameter,
            )
            weights, state = sj.prune(tx, weights, state, mask)
    for name in params:
        np.testing.assert_array_equal(state.pruning_mask[name], kept[name])
        np.testing.assert_allclose(weights[name], wanted[name], rtol=0, atol=1e-10)
    assert sj.count_kept(state.pruning_mask) < 0.6 * sum(map(np.size, params.values()))


# Scales.


def test_relative_alpha_follows_the_running_rms(x64):
    tx = sj.add_selective_shrinkage(1.0, alpha=0.5, rms_decay=0.9)
    weight = jnp.ones((2, 3))
    state, running = tx.init(weight), 0.0
    for t in range(30):
        gradient = np.random.default_rng(t).normal(size=(2, 3)) * 10.0 ** (t % 5)
        updates, state = tx.update(jnp.asarray(gradient), state, weight)
        running = 0.9 * running + 0.1 * relative_rms(gradient) if t else relative_rms(gradient)
        np.testing.assert_allclose(state.gradient_rms, running, rtol=1e-12)
        np.testing.assert_allclose(
            updates - gradient, np.exp(-np.abs(gradient) / (0.5 * running)), atol=1e-9
        )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_running_rms_is_not_poisoned(bad):
    tx = sj.add_selective_shrinkage(1.0, rms_decay=0.5)
    weight = jnp.ones(3)
    state = tx.init(weight)
    updates, state = tx.update(jnp.array([3.0, bad, 0.0]), state, weight)
    np.testing.assert_allclose(state.gradient_rms, np.sqrt(4.5), rtol=1e-6)  # of 3 and 0
    np.testing.assert_allclose(updates[0], 3 + np.exp(-3 / np.sqrt(4.5)), rtol=1e-6)
    _, after = tx.update(jnp.full(3, bad), state, weight)
    assert after.gradient_rms == state.gradient_rms
    _, after = tx.update(jnp.full(3, 2.0), after, weight)
    np.testing.assert_allclose(after.gradient_rms, (np.sqrt(4.5) + 2) / 2, rtol=1e-6)


def test_rms_does_not_count_what_is_pruned():
    """A hundredth is left: with zeros counted the scale would be a tenth, the score exp(-10)."""
    tx = sj.hold_zeros(sj.add_selective_shrinkage(1.0, rms_decay=0.0))
    weight = jnp.ones((10, 10))
    keep = jnp.zeros((10, 10), bool).at[3, 4].set(True)
    weight, state = sj.prune(tx, weight, tx.init(weight), keep)
    updates, _ = tx.update(jnp.full((10, 10), 7.0), state, weight)
    np.testing.assert_allclose(updates[3, 4], 7 + np.exp(-1), rtol=1e-6)
    assert np.count_nonzero(updates) == 1
    penalty = sj.selective_penalty(weight, 7.0 * keep, 2.0, relative=True)
    np.testing.assert_allclose(penalty, np.exp(-1), rtol=1e-6)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_rms_neither_overflows_nor_vanishes(size):
    tx = sj.add_selective_shrinkage(1.0, rms_decay=0.0)
    _, state = tx.update(jnp.full((4,), size), tx.init(jnp.ones(4)), jnp.ones(4))
    np.testing.assert_allclose(state.gradient_rms, size, rtol=1e-6)


def test_gradient_of_zeros_has_a_scale_of_zero():
    tx = sj.add_selective_shrinkage(0.5, rms_decay=0.9)
    weight = jnp.array([2.0, -4.0])
    updates, state = tx.update(jnp.zeros(2), tx.init(weight), weight)
    np.testing.assert_array_equal(updates, [1.0, -2.0])
    assert state.gradient_rms == 0
    _, state = tx.update(jnp.full(2, 3.0), state, weight)
    assert state.gradient_rms == 3


# Numbers that are not finite, and half precision.


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_gradient_harms_no_more_than_without_shrinkage(bad, name, decoupled):
    score = SCORES[name][0]
    params, gradients = jnp.ones(4), jnp.array([1.0, bad, 0.0, -1.0])
    core = optax.chain(optax.zero_nans(), optax.clip(1.0))
    if decoupled:
        tx = sj.decouple_selective_shrinkage(core, 0.5, score)
    else:
        tx = optax.chain(sj.add_selective_shrinkage(0.5, score), core)
    updates, _ = tx.update(gradients, tx.init(params), params)
    alone, _ = core.update(gradients, core.init(params), params)
    assert np.all(np.isfinite(updates) == np.isfinite(alone))
    assert updates[1] == alone[1] + (0.5 if decoupled and name == "constant" else 0)


def test_apply_if_finite_drops_the_step():
    tx = optax.apply_if_finite(sj.selective_adam(1e-2, rms_decay=0.9), 5)
    params = jnp.ones(3)
    _, state = tx.update(jnp.ones(3), tx.init(params), params)
    updates, after = tx.update(jnp.array([1.0, jnp.nan, 1.0]), state, params)
    np.testing.assert_array_equal(updates, 0)
    for old, new in zip(*map(jax.tree.leaves, (state.inner_state, after.inner_state)), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_term_is_computed_in_f32_and_cast_once(dtype):
    random = np.random.default_rng(0)
    weight = jnp.asarray(random.normal(size=200) * 100, dtype)
    gradient = jnp.zeros(200, dtype)
    tx = sj.add_selective_shrinkage(1e-5)  # subnormal in f16
    updates, _ = tx.update(gradient, tx.init(weight), weight)
    wanted = (np.float32(1e-5) * np.asarray(weight, np.float32)).astype(updates.dtype)
    np.testing.assert_array_equal(updates, wanted)
    assert updates.dtype == weight.dtype


# Schedules and their restart.


def test_paper_strength_starts_one_step_in():
    schedule = sj.paper_strength(1e-3, 10)
    wanted = [2e-3 * max(0, 1 - t / 10) for t in range(1, 15)]
    np.testing.assert_allclose([schedule(t) for t in range(14)], wanted, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    "make",
    [
        lambda strength: sj.add_selective_shrinkage(strength, sj.constant_irrelevance),
        lambda strength: sj.decouple_selective_shrinkage(
            optax.identity(), strength, sj.constant_irrelevance
        ),
    ],
)
def test_schedule_is_read_from_zero_and_again_after_restart(make):
    tx = make(lambda count: (1.0 + count) / 8)
    weight = jnp.ones(2)
    state, seen = tx.init(weight), []
    for t in range(5):
        if t == 3:
            state = sj.restart_shrinkage(state)
        updates, state = tx.update(jnp.zeros(2), state, weight)
        seen.append(float(updates[0]) * 8)
    assert seen == [1, 2, 3, 1, 2]


# Errors.


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"strength": -1.0}, "strength=-1.0"),
        ({"strength": 1.0, "alpha": 0.0}, "alpha=0.0"),
        ({"strength": 1.0, "rms_decay": 1.0}, "rms_decay=1.0"),
    ],
)
def test_numbers_out_of_range(arguments, named):
    with pytest.raises(ValueError, match=named):
        sj.add_selective_shrinkage(**arguments)


def test_rate_out_of_range():
    with pytest.raises(ValueError, match="shrink_selectively: rate=-2"):
        sj.shrink_selectively(optax.sgd(0.1), -2)


@pytest.mark.parametrize(
    "tx",
    [
        sj.add_selective_shrinkage(1.0),
        sj.decouple_selective_shrinkage(optax.identity(), 1.0),
        sj.shrink_selectively(optax.sgd(0.1), 1.0),
    ],
)
def test_params_are_needed(tx):
    with pytest.raises(ValueError, match=r"update\(gradients, state, params\)"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))


def test_score_of_another_shape():
    tx = sj.add_selective_shrinkage(1.0, lambda g, w, s: jnp.sum(g))
    params = {"layer": {"kernel": jnp.ones((2, 2))}}
    with pytest.raises(ValueError, match="'layer/kernel'"):
        tx.update(params, tx.init(params), params)


def test_users_own_score():
    def saliency(gradient, weight, scale):
        return jnp.exp(-jnp.abs(gradient * weight) / scale)

    tx = sj.add_selective_shrinkage(0.5, saliency, alpha=2.0)
    weight, gradient = jnp.array([1.0, 3.0]), jnp.array([2.0, -1.0])
    updates, _ = tx.update(gradient, tx.init(weight), weight)
    wanted = [2 + 0.5 * np.exp(-1), -1 + 1.5 * np.exp(-1.5)]
    np.testing.assert_allclose(updates, wanted, rtol=1e-6)


def test_restart_without_shrinkage():
    with pytest.raises(ValueError, match="no shrinkage state"):
        sj.restart_shrinkage(optax.adam(1e-3).init(jnp.ones(2)))


def numpy_pair():
    random = np.random.default_rng(0)
    return (
        {"w": 2 * random.normal(size=9)},
        {"w": random.normal(size=9) * np.geomspace(1e-3, 9, 9)},
    )


@pytest.mark.parametrize(
    "tx",
    [
        sj.selective_sgd(0.1),
        sj.selective_adamw(0.1),
        sj.add_selective_shrinkage(0.3, alpha=3e-3, rms_decay=0.5),
        sj.shrink_selectively(optax.sgd(0.1), 0.1, sj.linear_irrelevance),
        sj.hold_zeros(sj.selective_adam(0.1, alpha=3e-3)),
    ],
)
def test_numpy_gradients_of_float64_are_those_of_jax(tx):
    """Without 64 bits JAX makes float32 of them, eagerly too."""
    params, gradients = numpy_pair()
    ours = jax.tree.map(jnp.asarray, (params, gradients))
    found, _ = tx.update(gradients, tx.init(params), params)
    wanted, _ = tx.update(ours[1], tx.init(ours[0]), ours[0])
    np.testing.assert_allclose(found["w"], wanted["w"], rtol=1e-5)


def test_scores_of_numpy_gradients_and_their_penalty():
    params, gradients = numpy_pair()
    for score, reference in SCORES.values():
        np.testing.assert_allclose(
            score(gradients["w"], params["w"], 3e-3), reference(gradients["w"], 3e-3), atol=3e-7
        )
        penalty = np.sum(params["w"] ** 2 * reference(gradients["w"], 3e-3)) / 2
        found = sj.selective_penalty(params, gradients, irrelevance=score, alpha=3e-3)
        assert float(found) == pytest.approx(penalty, rel=1e-5)


@pytest.mark.parametrize(
    "make", [sj.selective_adam, sj.selective_adamw, sj.selective_sgd, sj.selective_sgdw]
)
def test_ready_made_ones_under_inject_hyperparams(make):
    """Without static_args: a function as a default would be taken for a schedule."""
    params, gradients = jax.tree.map(jnp.asarray, numpy_pair())
    injected = optax.inject_hyperparams(make)(learning_rate=0.1)
    state = injected.init(params)
    assert {"learning_rate", "strength", "alpha"} <= set(state.hyperparams)
    plain = make(0.1)
    wanted, _ = plain.update(gradients, plain.init(params), params)
    found, _ = injected.update(gradients, state, params)
    np.testing.assert_allclose(found["w"], wanted["w"], rtol=1e-4)  # its numbers are float32


def test_gradients_of_other_params():
    params, gradients = jax.tree.map(jnp.asarray, numpy_pair())
    for wrong, message in (
        ({"w": None}, r"gradients: at 'w' they have no leaf, params shape \(9,\)"),
        ({"w": gradients["w"][None]}, r"gradients: at 'w' they have shape \(1, 9\), params shape"),
        ({"w": gradients["w"], "unasked": gradients["w"]}, "unasked"),
    ):
        with pytest.raises(ValueError, match=message):
            sj.selective_penalty(params, wrong)
    # Where nothing is selected no gradient is needed.
    more, frozen = {**params, "v": params["w"]}, {"w": True, "v": False}
    found = sj.selective_penalty(more, {**gradients, "v": None}, mask=frozen)
    assert float(found) == float(sj.selective_penalty(params, gradients))
    tx = sj.add_selective_shrinkage(0.1)
    with pytest.raises(ValueError, match=r"at 'w' the gradient has shape \(1, 9\) and .* \(9,"):
        tx.update({"w": gradients["w"][None]}, tx.init(params), params)


def test_the_penalty_holds_the_irrelevance_constant():
    """Also where it depends on the weight, through which nothing is differentiated."""

    def saliency(gradient, weight, scale):
        return jnp.exp(-jnp.abs(gradient * weight) / scale)

    weight, gradient = jnp.array([1.0, 3.0]), jnp.array([2.0, -1.0])
    found = jax.grad(sj.selective_penalty)(weight, gradient, 0.5, saliency, 2.0)
    np.testing.assert_allclose(found, [0.5 * np.exp(-1), 1.5 * np.exp(-1.5)], rtol=1e-6)


WITH_MASKS = {
    "decouple": lambda **k: sj.decouple_selective_shrinkage(optax.scale_by_adam(), **k),
    "shrink": lambda strength, **k: sj.shrink_selectively(optax.sgd(0.1), strength, **k),
    "sgd": lambda **k: sj.selective_sgd(0.1, **k),
    "sgdw": lambda **k: sj.selective_sgdw(0.1, **k),
    "adam": lambda **k: sj.selective_adam(0.1, eps=1.0, **k),
    "adamw": lambda **k: sj.selective_adamw(0.1, **k),
}


@pytest.mark.parametrize("name", WITH_MASKS)
def test_leaves_outside_the_mask_are_the_optimizers_alone(name):
    params = {key: jnp.array([1.0, -2.0]) for key in ("in", "out")}
    gradients = {key: jnp.array([0.3, 0.1]) for key in params}

    def first(**more):
        tx = WITH_MASKS[name](irrelevance=sj.constant_irrelevance, **more)
        return tx.update(gradients, tx.init(params), params)[0]

    none, every = first(strength=0.0), first(strength=0.5)
    some = first(strength=0.5, mask={"in": True, "out": False})
    np.testing.assert_array_equal(some["out"], none["out"])
    np.testing.assert_array_equal(some["in"], every["in"])
    assert (np.abs(every["in"] - none["in"]) > 1e-3).all()


MOMENTUM = {"nesterov": True, "accumulator_dtype": jnp.bfloat16}
ADAM = {"b1": 0.8, "b2": 0.95, "eps": 1e-2, "eps_root": 1e-3, "mu_dtype": jnp.bfloat16}
ADAM["nesterov"] = True
FLAT = {"strength": 0.3, "irrelevance": sj.constant_irrelevance}
L2 = optax.add_decayed_weights(0.3)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (
            sj.selective_sgd(0.1, 0.9, **MOMENTUM, **FLAT),
            optax.chain(L2, optax.sgd(0.1, 0.9, **MOMENTUM)),
        ),
        (
            sj.selective_sgdw(0.1, 0.9, **MOMENTUM, **FLAT),
            optax.chain(optax.trace(0.9, **MOMENTUM), L2, optax.scale_by_learning_rate(0.1)),
        ),
        (sj.selective_adam(0.1, **ADAM, **FLAT), optax.chain(L2, optax.adam(0.1, **ADAM))),
        (sj.selective_adamw(0.1, **ADAM, **FLAT), optax.adamw(0.1, weight_decay=0.3, **ADAM)),
    ],
    ids=["sgd", "sgdw", "adam", "adamw"],
)
def test_options_reach_the_optimizer(ours, theirs):
    results = []
    for tx in (ours, theirs):
        params = jax.tree.map(jnp.asarray, tree(0, np.float32))
        state = tx.init(params)
        for t in range(3):
            gradients = jax.tree.map(jnp.asarray, tree(t + 1, np.float32))
            updates, state = tx.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
        results.append(params)
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize("wrap", [sj.decouple_selective_shrinkage, sj.shrink_selectively])
def test_extra_arguments_reach_the_wrapped(wrap):
    def update(updates, state, params=None, *, value):
        return jax.tree.map(lambda g: value * g, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx, weight = wrap(inner, 0.5), jnp.zeros(2)
    updates, _ = tx.update(jnp.ones(2), tx.init(weight), weight, value=-3.0)
    np.testing.assert_array_equal(updates, [-3.0, -3.0])


@pytest.mark.parametrize("rms_decay", [None, 0.9])
def test_leaves_without_floats_are_not_shrunk(rms_decay):
    tx = sj.add_selective_shrinkage(0.5, sj.constant_irrelevance, rms_decay=rms_decay)
    params = {"w": jnp.ones(2), "step": jnp.array([3, 4])}
    updates, _ = tx.update({"w": jnp.zeros(2), "step": jnp.array([7, 8])}, tx.init(params), params)
    np.testing.assert_array_equal(updates["w"], 0.5)
    np.testing.assert_array_equal(updates["step"], [7, 8])


def test_paper_strength_out_of_range():
    for arguments, named in (((-1.0, 10), "gamma=-1.0"), ((1.0, 0), "steps_per_epoch=0")):
        with pytest.raises(ValueError, match=f"paper_strength: {named} is outside"):
            sj.paper_strength(*arguments)
