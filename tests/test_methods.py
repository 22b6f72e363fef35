"""The rows of the table: each regularizer against NumPy, each schedule against its formula."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparsereg_jax as sj
from examples import methods, search
from examples.experiment import EXPERIMENTS
from examples.methods import METHODS

RESULTS = Path(__file__).parent.parent / "results"

G = np.array([[0.3, -0.002, 0.0, 1.5]])
W = np.array([[0.5, -1.5, 0.0, 1e-3]])


def adam(gradient, rate=0.1):
    """Adam's first update of a gradient."""
    return -rate * gradient / (np.abs(gradient) + 1e-8)


def first_step(method, strength, rate=0.1, steps_per_epoch=4):
    """What a method's optimizer returns for the gradient G at the weights W."""
    tx = METHODS[method].optimizer(rate, strength, steps_per_epoch)
    params = {"w": jnp.asarray(W, jnp.float32)}
    return tx.update({"w": jnp.asarray(G, jnp.float32)}, tx.init(params), params)


def first_update(method, strength, rate=0.1, steps_per_epoch=4):
    updates, _ = first_step(method, strength, rate, steps_per_epoch)
    return np.asarray(updates["w"])


def first_moment(method, strength):
    """Adam's first moment after a step, over 1 - b1: the gradient with its term."""
    _, state = first_step(method, strength)
    return np.asarray(optax.tree.get(state, "mu")["w"]) / 0.1


STRENGTH = 0.2 * 3 / 4  # 2 gamma, after the first of four steps of an epoch


@pytest.mark.parametrize(
    ("method", "strength", "wanted"),
    [
        ("paper", 0.1, adam(G + STRENGTH * W * np.exp(-np.abs(G)))),
        ("gate", 0.1, adam(G + STRENGTH * W * np.exp(-np.abs(G)))),
        ("l2", 0.1, adam(G + STRENGTH * W)),
        ("default", 0.1, adam(G + STRENGTH * W)),
        ("l1", 0.1, adam(G + STRENGTH * np.sign(W))),
        ("none", 0.1, adam(G)),
        ("weight-decay", 0.5, adam(G) - 0.1 * 0.5 * W),
        ("lobster", 0.05, adam(G) - 0.05 * W * np.maximum(0, 1 - np.abs(G))),
    ],
)
def test_first_updates(method, strength, wanted):
    # Adam's first update is a sign: gradients of 0 must stay 0, the others are told by theirs.
    np.testing.assert_allclose(first_update(method, strength), wanted, rtol=1e-5, atol=1e-6)


def test_coupled_terms_differ_in_the_second_moment():
    """A sign alone says little: the first moments hold the sums themselves."""
    gated, flat = STRENGTH * W * np.exp(-np.abs(G)), STRENGTH * W
    terms = {"paper": gated, "gate": gated, "l2": flat, "default": flat, "none": 0 * W}
    terms["ready-made"] = 0.2 * W * np.exp(-np.abs(G))  # 2 gamma, which does not decay
    for name, term in (terms | {"l1": STRENGTH * np.sign(W)}).items():
        np.testing.assert_allclose(
            first_moment(name, 0.1), G + term, rtol=1e-5, atol=1e-7, err_msg=name
        )


def test_proximal_step_against_brute_force():
    strength, rate = 0.4, 0.1
    moved = W + adam(G, rate)
    grid = np.linspace(-2, 2, 400_001)
    cost = 0.5 * (grid[:, None] - moved.ravel()) ** 2 + rate * strength * np.abs(grid)[:, None]
    nearest = grid[cost.argmin(0)]
    found = W.ravel() + first_update("l1-proximal", strength, rate).ravel()
    np.testing.assert_allclose(found, nearest, atol=1e-5)


def situation(params, mask):
    return sj.Situation(
        params=params,
        pruning_mask=mask,
        prunable=sj.every_parameter(params),
        metric=0.0,
        waited=0,
        scale=1.0,
        evaluate=lambda params: 0.0,
        mode="max",
    )


def sparsities(method, sparsity, checks, size=1000):
    """What a method's proposals lead to, from check to check."""
    params = {"w": jnp.linspace(-1, 1, size)}
    propose, mask = METHODS[method].propose(sparsity, 0.04, checks), sj.full_mask(params)
    reached = []
    for _ in range(checks):
        proposal = propose(situation(params, mask))
        if proposal.pruning_mask is not None:
            mask = sj.intersection(mask, proposal.pruning_mask)
        reached.append(float(sj.sparsity(mask)))
    return reached


def test_schedules():
    steps = 14  # 7/10 of 20 checks
    cubic = [0.9 * (1 - (1 - min(1, t / steps)) ** 3) for t in range(1, 21)]
    np.testing.assert_allclose(sparsities("gradual", 0.9, 20), cubic, atol=2.1e-3)
    np.testing.assert_allclose(sparsities("one-shot", 0.9, 5), [0.9] * 5, atol=2.1e-3)
    rounds = [1 - 0.1 ** (t / 4) for t in range(1, 5)] + [0.9]
    np.testing.assert_allclose(sparsities("lottery", 0.9, 5), rounds, atol=2.1e-3)
    np.testing.assert_allclose(sparsities("snip", 0.9, 3), [0, 0, 0])
    larger = [1 - 0.75**t for t in range(1, 12)] + [1 - 0.75**11 * 0.95**t for t in (1, 2)]
    np.testing.assert_allclose(sparsities("larger-first", 1e-3, 13), larger, atol=2.1e-3)
    straight = [1 - 0.75**t for t in range(1, 12)] + [1 - 0.75**11 * 0.9**t for t in range(1, 19)]
    wanted = np.minimum(straight, 0.9905)
    np.testing.assert_allclose(sparsities("straight", 0.9905, 29, 100_000), wanted, atol=2e-4)
    np.testing.assert_allclose(
        sparsities("none", 0.1, 3), [1 - 0.9**t for t in (1, 2, 3)], atol=1e-3
    )


def test_higher_rate_and_shifted_differ_from_larger_first_as_their_titles_say():
    shifted, other = METHODS["shifted"], METHODS["larger-first"]
    higher = METHODS["higher-rate"]
    assert higher._replace(title=shifted.title, augment=shifted.augment) == shifted
    assert higher.augment is None
    fashion = EXPERIMENTS["lenet5-fashion_mnist"]
    assert methods.with_own_bound(fashion, "higher-rate").bound < fashion.bound
    assert (shifted.propose, shifted.smoothing) == (other.propose, other.smoothing)
    assert shifted.tune == 2 * other.tune
    settings = methods.with_own_bound(EXPERIMENTS["lenet5-mnist"], "shifted")
    assert settings.bound == pytest.approx(0.987)
    image = jnp.arange(1.0, 17).reshape(1, 4, 4, 1)
    found = {np.asarray(shifted.augment(jax.random.key(i), image)).tobytes() for i in range(99)}
    padded = np.pad(image[0], [(1, 1), (1, 1), (0, 0)], mode="edge")
    assert found == {padded[i : i + 4, j : j + 4].tobytes() for i in range(3) for j in range(3)}
    params, gradient = jnp.asarray([0.5, -2.0]), jnp.asarray([0.1, 0.3])

    def first_update(tx):
        return np.asarray(tx.update(gradient, tx.init(params), params)[0])

    loops = [first_update(row.optimizer(1e-3, 1e-3, 550)) for row in (shifted, other)]
    np.testing.assert_allclose(loops[0], 2 * loops[1], rtol=1e-6)
    tuners = [first_update(row.tuner(lambda step: 1e-3 / (step + 1))) for row in (shifted, other)]
    np.testing.assert_allclose(tuners[0], 3 * tuners[1], rtol=1e-6)


def test_straight_has_the_regularizer_of_our_recipe_and_no_bound():
    straight, higher = METHODS["straight"], METHODS["higher-rate"]
    own = ("title", "strengths", "optimizer", "propose", "bounded", "recovery", "tune")
    for name, ours, theirs in zip(straight._fields, straight, higher, strict=True):
        assert (ours == theirs) == (name not in own), name
    assert (straight.bounded, straight.recovery, straight.tune) == (False, None, 0.4)
    # Its number is the sparsity; gamma stays that of our recipe.
    moment = first_moment("straight", 0.9905)
    np.testing.assert_allclose(moment, G + 2e-3 * 3 / 4 * W, rtol=1e-5, atol=1e-7)
    update = first_update("straight", 0.9905)
    np.testing.assert_allclose(update, 2 * first_update("default", 1e-3), rtol=1e-6)


def test_snip_keeps_the_largest_products_and_every_bias():
    random = np.random.default_rng(0)
    g, w = (random.standard_normal((4, 5)).astype(np.float32) for _ in range(2))
    gradients = {"w": jnp.asarray(g), "b": jnp.ones(4)}
    mask = methods.snip(gradients, {"w": jnp.asarray(w), "b": jnp.zeros(4)}, 0.5)
    largest = np.sort(np.abs(g * w).ravel())[-8]  # 12 of all 24 go
    np.testing.assert_array_equal(mask["w"], np.abs(g * w) >= largest)
    assert mask["b"].all()


def test_strengths_are_those_that_were_chosen():
    for name, method in METHODS.items():
        presets = ("paper", "preset-l2", "ready-made", "straight")
        assert len(set(method.strengths)) >= (1 if name in presets else 6), name
        of_lenet5 = ("longer", "larger-first", "higher-rate", "shifted", "straight")
        if name not in of_lenet5:
            assert methods.STRENGTHS["lenet300-mnist"][name] in method.strengths, name
    with pytest.raises(ValueError, match=r"none was chosen for 'l1' on lenet5.*'paper'"):
        methods.strength_of("l1", "lenet5", "mnist")
    assert (
        methods.strength_of("none", "lenet5", "kmnist") == methods.STRENGTHS["lenet5-mnist"]["none"]
    )


@pytest.mark.parametrize(
    ("name", "searched", "epochs"),
    [
        ("lenet300-mnist", search.SEARCHED, 86),
        ("lenet5-mnist", ["l2", "none"], 50),
        ("lenet5-fashion_mnist", ["l2", "none"], 50),
    ],
)
def test_searched_strengths_are_what_the_records_of_the_search_lead_to(name, searched, epochs):
    by_method = {}
    for line in search.read(RESULTS / f"search-{name}.jsonl"):
        assert line["version"] == METHODS[line["method"]].version
        assert (line["epochs"], line["seed"]) == (epochs, 0)
        by_method.setdefault(line["method"], []).append(line)
    assert set(by_method) == set(searched)
    for method, lines in by_method.items():
        assert len({line["strength"] for line in lines}) == len(lines) >= 6
        bound = methods.with_own_bound(EXPERIMENTS[name], method).bound
        wanted = search.chosen(lines, bound, validation=5000)
        assert methods.STRENGTHS[name][method] == wanted, method
