"""The loop, on a problem whose every check can be worked out by hand.

The "network" is a vector of weights, its metric the share of the sum of |w| that is left, and
"training" does what a test says. So which weights go, when a bound is missed and what is gone back
to are known numbers.
"""

import functools
import json
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training import train_state

import sparsereg_jax as sj
from sparsereg_jax import iterative


class Record(NamedTuple):
    params: Any
    opt_state: Any
    step: Any = np.int32(0)


MAGNITUDES = np.arange(1.0, 21.0, dtype=np.float32)  # sum 210


def start(tx, magnitudes=MAGNITUDES):
    params = {"w": jnp.asarray(magnitudes).reshape(4, -1)}
    return Record(params, tx.init(params))


def share_left(params):
    return jnp.sum(jnp.abs(params["w"])) / MAGNITUDES.sum()


def idle(record):
    """Trains nothing."""
    return record._replace(step=record.step + 1)


def held():
    return sj.hold_zeros(optax.adam(0.1))


def loop(tx, train=idle, evaluate=share_left, propose=None, bound=0.5, **options):
    options = {"max_checks": 50} | options
    return sj.iterative_pruning(
        tx, train, evaluate, propose or sj.fraction_step(0.1), bound, **options
    )


def run(pruning, record):
    return sj.run_pruning(pruning, pruning.init(record))


def kept_weights(record):
    weights = np.asarray(record.params["w"]).ravel()
    return weights[weights != 0]


def test_prunes_by_the_fraction_until_the_bound():
    tx = held()
    state, history = run(loop(tx, recovery=None, max_checks=20), start(tx))
    # By hand: 20 weights, round(10 %) of what is left each time, smallest first, while the share of
    # the sum that is left is at least one half.
    left, wanted = list(MAGNITUDES), []
    while True:
        metric = sum(left) / 210
        wanted.append((metric, 1 - len(left) / 20))
        if metric < 0.5:
            break
        good = list(left)
        left = left[round(0.1 * len(left)) :]
    got = [(check.metric, check.sparsity) for check in history]
    np.testing.assert_allclose(got[: len(wanted)], wanted, rtol=1e-6)
    np.testing.assert_array_equal(kept_weights(state.good), good)
    assert [check.pruned for check in history] == [True] * (len(wanted) - 1) + [False] * (
        20 - len(wanted) + 1
    )
    assert state.progress.good_metric == pytest.approx(sum(good) / 210)
    assert len(history) == 20
    assert not state.progress.stopped


def test_goes_back_and_tries_a_smaller_step():
    tx = held()
    state, history = run(
        loop(tx, propose=sj.fraction_step(0.4), recovery=2, back_off=0.5, smallest_scale=0.2),
        start(tx),
    )
    actions = [check.action for check in history]
    # 20 -> 12 weights (9..20, 174/210) -> 7 (14..20, 119/210) -> 4, too few, two checks, back to 7;
    # scale 1/2: round(0.2 * 7) = 1 -> 6 (105/210 = the bound) -> 5, too few, two checks, back to 6;
    # scale 1/4: round(0.1 * 6) = 1 -> 5 again, two checks, back to 6, and 1/8 is too small.
    assert actions == [
        "pruned",
        "pruned",
        "pruned",
        "trains on",
        "went back",
        "pruned",
        "trains on",
        "went back",
        "trains on",
        "went back",
    ]
    assert [check.stopped for check in history] == [False] * 9 + [True]
    assert [check.kept for check in history] == [20, 12, 7, 4, 4, 6, 5, 5, 5, 5]
    np.testing.assert_array_equal(kept_weights(state.good), MAGNITUDES[14:])
    np.testing.assert_array_equal(kept_weights(state.current), MAGNITUDES[14:])
    assert (state.current.step, state.good.step) == (4, 4)  # not 10: the whole record goes back
    assert state.progress.stopped
    assert int(state.progress.retreats) == 3


def test_recovery_counts_checks_and_starts_anew_after_each_pruning():
    tx = held()
    # The metric as a function of the step alone: misses 2, meets, misses 2, meets ... never 3 in a
    # row, so with recovery=3 it never goes back.
    series = iter([1.0] + [1.0, 0.0, 0.0] * 5)
    state, history = run(
        loop(tx, evaluate=lambda params: next(series), recovery=3, max_checks=15), start(tx)
    )
    assert [check.action for check in history] == ["pruned", "trains on", "trains on"] * 5
    assert int(state.progress.retreats) == 0


def test_a_metric_to_minimise():
    tx = held()

    def lost(params):
        return 1 - share_left(params)

    state, _ = run(loop(tx, evaluate=lost, mode="min", recovery=None), start(tx))
    other, _ = run(loop(tx, recovery=None), start(tx))
    np.testing.assert_array_equal(kept_weights(state.good), kept_weights(other.good))


@pytest.mark.parametrize(
    ("mode", "dense", "bound"),
    [("max", 0.8, 0.72), ("min", 2.0, 2.2), ("max", -2.0, -2.2), ("min", -2.0, -1.8)],
)
def test_relative_bound(mode, dense, bound):
    tx = held()
    pruning = loop(tx, evaluate=lambda params: dense, mode=mode, bound=sj.relative_bound(0.1, mode))
    state = pruning.init(start(tx))
    assert state.progress.bound == pytest.approx(bound)
    assert state.progress.dense_metric == dense


@pytest.mark.parametrize(("mode", "sign"), [("max", 1), ("min", -1)])
def test_stops_when_the_metric_only_worsens(mode, sign):
    tx = held()
    series = iter([sign * metric for metric in (9.0, 9.0, 8.0, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0)])
    pruning = loop(
        tx, evaluate=lambda _: next(series), bound=sign * 1.0, mode=mode, stop_when_worsening=3
    )
    _, history = run(pruning, start(tx))
    assert [sign * check.metric for check in history] == [9, 8, 9, 8, 7, 6]
    assert history[-1].stopped


def test_stops_when_a_step_is_smaller_than_a_weight():
    tx = held()
    state, history = run(loop(tx, bound=0.0), start(tx))
    # round(0.1 n) is 0 from n = 5 on (half to even).
    assert history[-1].kept == 5
    assert state.progress.stopped


def test_floor_keeps_the_last_weight():
    tx = held()
    state, _ = run(loop(tx, propose=sj.fraction_step(1.0), bound=0.0), start(tx))
    np.testing.assert_array_equal(kept_weights(state.good), [20])
    state, _ = run(loop(tx, propose=sj.fraction_step(1.0, floor=0), bound=0.0), start(tx))
    assert kept_weights(state.good).size == 0


def test_mask_selects_what_is_pruned():
    tx = held()
    params = {"bias": jnp.array([1e-3, 1e-3]), "w": jnp.asarray(MAGNITUDES).reshape(4, 5)}
    for mask, kept in ((sj.weights, 2), (sj.every_parameter, 0)):
        pruning = loop(tx, mask=mask, max_checks=1, propose=sj.fraction_step(0.1, floor=0))
        state, _ = run(pruning, Record(params, tx.init(params)))
        assert np.count_nonzero(state.current.params["bias"]) == kept


def test_shrinkage_restarts_at_each_pruning_and_adam_goes_on():
    tx = sj.hold_zeros(sj.selective_adam(1e-3, strength=sj.paper_strength(1e-3, 10)))

    def train(record):
        for _ in range(3):
            gradients = jax.tree.map(jnp.zeros_like, record.params)
            updates, opt_state = tx.update(gradients, record.opt_state, record.params)
            record = record._replace(
                params=optax.apply_updates(record.params, updates), opt_state=opt_state
            )
        return record

    pruning = loop(tx, train)
    state = pruning.init(start(tx))
    for check in range(1, 4):
        state, _ = pruning.step(state)
        shrinkage, adam = state.current.opt_state.inner_state
        assert shrinkage.count == 0
        assert adam[0].count == 3 * check


# Bisection.


def bisect(weights, tolerance, metric_of, evaluations=8, mode="max", floor=1):
    """Proposes once for a network at a plateau; gives the mask and the shares tried."""
    tried = []

    def evaluate(params):
        tried.append(int(jnp.sum(params["w"] != 0)))
        return metric_of(params["w"])

    params = {"w": jnp.asarray(weights)[None]}
    situation = sj.Situation(
        params,
        sj.full_mask(params),
        {"w": True},
        float(metric_of(params["w"])),
        3,
        1.0,
        evaluate,
        mode,
    )
    proposal = sj.bisection_step(tolerance, evaluations=evaluations, floor=floor)(situation)
    return proposal, tried


@pytest.mark.parametrize("tolerance", [0.01, 0.05, 0.3, 0.6])
@pytest.mark.parametrize("mode", ["max", "min"])
def test_bisection_finds_the_largest_share_within_the_tolerance(tolerance, mode):
    weights = np.abs(np.random.default_rng(1).normal(size=200)).astype(np.float32)
    total = weights.sum()
    order = np.sort(weights)
    lost = np.concatenate([[0], np.cumsum(order)]) / total

    def metric(w):
        left = float(jnp.sum(jnp.abs(w))) / float(total)
        return left if mode == "max" else 2 - left

    proposal, tried = bisect(weights, tolerance, metric, evaluations=10, mode=mode)
    best = max(k for k in range(200) if lost[k] <= tolerance)  # floor: one weight stays
    dropped = 200 - int(proposal.pruning_mask["w"].sum())
    assert best - 1 <= dropped <= best  # within 200 / 2^10 of a weight, and rounding
    assert 200 - dropped in tried  # what is returned was measured
    assert len(tried) == proposal.evaluations == 10


def test_bisection_takes_nan_and_a_rough_metric_as_misses():
    weights = np.arange(1.0, 101.0, dtype=np.float32)
    proposal, tried = bisect(weights, 0.1, lambda w: 1.0 if int(jnp.sum(w != 0)) > 70 else math.nan)
    assert int(proposal.pruning_mask["w"].sum()) in tried
    assert int(proposal.pruning_mask["w"].sum()) == 71
    proposal, tried = bisect(weights, 0.1, lambda w: float(int(jnp.sum(w != 0)) == 100))
    assert proposal.pruning_mask is None
    assert len(tried) == 8


def test_bisection_waits_for_a_plateau_and_compiles_the_evaluation_once():
    tx, traces = held(), []

    @jax.jit
    def evaluate(params):
        traces.append(None)
        return share_left(params)

    pruning = loop(
        tx,
        evaluate=evaluate,
        bound=0.3,
        max_checks=20,
        propose=sj.bisection_step(0.2, patience=3, evaluations=6),
    )
    _, history = run(pruning, start(tx))
    assert len(traces) == 1
    pruned = [check.check for check in history if check.pruned]
    # The first check improves on nothing measured before, then three without improvement.
    assert pruned[:3] == [4, 8, 12]
    assert all(check.evaluations == 7 for check in history if check.check in pruned)
    metrics = [check.metric for check in history]
    for check in pruned[:-1]:
        assert metrics[check] >= 0.8 * metrics[check - 1] - 1e-6


def test_a_view_of_the_record_is_what_is_measured():
    """The metric: the share left, less something that the params do not hold."""

    def view(record):
        return record.params, record.step

    def evaluate(seen):
        params, step = seen
        return share_left(params) - jnp.asarray(step) / 100

    tx = held()
    state, history = run(
        loop(tx, evaluate=evaluate, propose=sj.fraction_step(0.5), view=view, max_checks=2),
        start(tx),
    )
    half = MAGNITUDES[10:].sum() / 210
    np.testing.assert_allclose([c.metric for c in history], [1 - 0.01, half - 0.02], rtol=1e-6)

    # A trial of the bisection has other params and the same step: 1/4 of 0.99 may go, down to
    # 0.7425 = share - 0.01, so the share left is at least 0.7525: the first 9 weights (45) may go,
    # the 10th (55 of 210, 0.738 left) may not.
    propose = sj.bisection_step(0.25, patience=0, evaluations=12)
    pruning = loop(tx, evaluate=evaluate, propose=propose, view=view, max_checks=1)
    state, _ = run(pruning, start(tx))
    np.testing.assert_array_equal(kept_weights(state.current), MAGNITUDES[9:])

    record, metrics = sj.fine_tune(state.current, tx, idle, evaluate, intervals=1, view=view)
    left = MAGNITUDES[9:].sum() / 210
    np.testing.assert_allclose(metrics, [left - 0.01, left - 0.02], rtol=1e-6)
    assert record.step == 2


def test_bisection_goes_back_with_a_smaller_tolerance():
    tx = held()

    # Training ruins what a pruning of more than 6 weights leaves.
    def train(record):
        kept = int(jnp.sum(record.params["w"] != 0))
        return record._replace(step=jnp.int32(kept < 14))

    def evaluate(params):
        return (
            share_left(params)
            if int(jnp.sum(params["w"] != 0)) >= 14
            else share_left(params) - 0.001
        )

    pruning = loop(tx, train, evaluate, sj.bisection_step(0.3, patience=1), bound=0.85, recovery=1)
    state, history = run(pruning, start(tx))
    # 0.3: 1 to 10 go (55 of at most 63), back; 0.15: 1 to 7 (28 of 31.5), which meets the bound;
    # from there 8, 9, 10, back; 0.075: 8 alone, back; 0.0375: nothing.
    assert [(check.action, check.kept) for check in history] == [
        ("trains on", 20),
        ("pruned", 20),
        ("went back", 10),
        ("trains on", 13),
        ("pruned", 13),
        ("went back", 10),
        ("went back", 12),
    ]
    np.testing.assert_array_equal(kept_weights(state.good), MAGNITUDES[7:])
    assert state.progress.stopped


def test_exact_ties_of_a_step():
    tx = held()
    propose = sj.fraction_step(0.1, exact_ties=True)
    pruning = loop(tx, evaluate=lambda params: 1.0, propose=propose, max_checks=3)
    _, history = run(pruning, start(tx, np.ones(20, np.float32)))
    assert [check.kept for check in history] == [20, 18, 16]


def test_fine_tune_notices_what_comes_back():
    tx = held()
    state, _ = run(loop(tx, max_checks=1), start(tx))  # two weights are pruned

    def noisy(record):
        return record._replace(params=jax.tree.map(lambda w: w + 1.0, record.params))

    said = "fine_tune: after an interval of train, 2 pruned entries of 'w'"
    with pytest.raises(sj.PruningError, match=said):
        sj.fine_tune(state.current, tx, noisy, share_left, intervals=1)
    with pytest.raises(ValueError, match=r"held_mask: .* holds no pruning mask"):
        sj.fine_tune(start(optax.adam(0.1)), tx, idle, share_left, intervals=1)
    with pytest.raises(ValueError, match=r"prune: .* holds no pruning mask"):
        sj.fine_tune(state.current, optax.sgd(0.1), idle, share_left, intervals=1)


# Resuming.


def mlp_task():
    random = np.random.default_rng(0)
    inputs = random.normal(size=(64, 8)).astype(np.float32)
    targets = (inputs[:, :1] * inputs[:, 1:2] + inputs[:, 2:3]).astype(np.float32)
    tx = sj.hold_zeros(sj.selective_adam(1e-2, strength=sj.paper_strength(1e-3, 20)))
    params = {
        "w1": jnp.asarray(random.normal(size=(8, 16)) / 3, jnp.float32),
        "w2": jnp.asarray(random.normal(size=(16, 1)) / 4, jnp.float32),
    }

    @jax.jit
    def loss(params):
        return jnp.mean((jnp.tanh(inputs @ params["w1"]) @ params["w2"] - targets) ** 2)

    @functools.partial(jax.jit, donate_argnums=0)  # as users do
    def train(record):
        def step(record, _):
            key, now = jax.random.split(record.step)
            noisy = jax.tree.map(
                lambda w: w + 1e-3 * jax.random.normal(now, w.shape), record.params
            )
            updates, opt_state = tx.update(jax.grad(loss)(noisy), record.opt_state, record.params)
            return Record(optax.apply_updates(record.params, updates), opt_state, key), None

        return jax.lax.scan(step, record, length=10)[0]

    pruning = sj.iterative_pruning(
        tx,
        train,
        loss,
        sj.fraction_step(0.15),
        sj.relative_bound(0.3, "min"),
        mode="min",
        max_checks=25,
        steps_per_check=10,
        recovery=3,
    )
    record = Record(params, tx.init(params), jax.random.PRNGKey(7))
    for _ in range(20):
        record = train(record)
    return pruning, record


def test_resumed_run_is_bit_identical(tmp_path):
    pruning, record = mlp_task()
    first = pruning.init(record)
    straight, history = sj.run_pruning(pruning, first)
    assert {check.action for check in history} >= {"pruned", "went back"}

    lines = []

    class Killed(Exception):
        pass

    state = first
    checkpointer = ocp.StandardCheckpointer()
    stops = iter([1, 2, 7, 11, 17])

    def save(state, check):
        lines.append(sj.check_to_json(check))
        path = tmp_path / str(check.check)
        checkpointer.save(path, state)
        checkpointer.wait_until_finished()
        if check.check == stop:
            raise Killed

    while True:
        stop = next(stops, None)
        try:
            state, _ = sj.run_pruning(pruning, state, on_check=save)
            break
        except Killed:
            if stop in (1, 17):  # a new process would make everything anew, which takes seconds
                pruning, record = mlp_task()
            template = pruning.init(record)
            state = checkpointer.restore(tmp_path / str(stop), template)

    old, new = jax.tree.flatten(straight), jax.tree.flatten(state)
    assert old[1] == new[1]
    for one, other in zip(old[0], new[0], strict=True):
        np.testing.assert_array_equal(one, other)
    assert [sj.check_from_json(line)._replace(seconds=0) for line in lines] == [
        check._replace(seconds=0) for check in history
    ]


def test_flax_train_state_is_a_record():
    tx = held()
    params = {"w": jnp.asarray(MAGNITUDES).reshape(4, 5)}
    record = train_state.TrainState.create(apply_fn=None, params=params, tx=tx)
    pruning = loop(tx, lambda state: state.replace(step=state.step + 1), recovery=None)
    state, history = run(pruning, record)
    assert isinstance(state.good, train_state.TrainState)
    assert history[3].pruned


# Records, the progress bar, fine-tuning.


def test_records():
    tx = held()
    seen = []
    pruning = loop(tx, max_checks=3, steps_per_check=250)
    params = {"dead": None, "w": jnp.asarray(MAGNITUDES).reshape(4, 5), "bias": jnp.ones(5)}
    _, history = sj.run_pruning(
        pruning,
        pruning.init(Record(params, tx.init(params))),
        on_check=lambda state, check: seen.append((state, check)),
    )
    assert [check for _, check in seen] == history
    check = history[1]
    assert (check.check, check.step, check.kept, check.evaluations) == (2, 500, 23, 1)
    assert check.sparsity == pytest.approx(2 / 25)
    assert check.sparsity_by_path == {"bias": 0.0, "w": pytest.approx(0.1)}
    assert check.seconds > 0
    assert json.loads(sj.check_to_json(check))["met_bound"] is True
    with pytest.raises(ValueError, match="not the record"):
        sj.check_from_json('{"check": 1}')


def test_progress_bar(capfd):
    tx = held()
    pruning = loop(tx, max_checks=3)
    sj.run_pruning(pruning, pruning.init(start(tx)), progress_bar=True)
    shown = capfd.readouterr().err
    assert "3/3" in shown
    assert "sparsity 20.00%" in shown


def test_fine_tune_keeps_zeros():
    tx = held()
    state, _ = run(loop(tx, recovery=None, max_checks=9), start(tx))
    good = np.asarray(state.good.params["w"])
    tune_tx = sj.hold_zeros(optax.sgd(1.0))
    moves = iter([1.0, 5.0, -2.0])

    def tune(record):
        move = next(moves)
        gradients = jax.tree.map(lambda w: jnp.full_like(w, -move), record.params)
        updates, opt_state = tune_tx.update(gradients, record.opt_state, record.params)
        return record._replace(
            params=optax.apply_updates(record.params, updates), opt_state=opt_state
        )

    record, metrics = sj.fine_tune(state.good, tune_tx, tune, share_left, intervals=3)
    after = [np.where(good == 0, 0, good + moved) for moved in (0, 1, 6, 4)]
    np.testing.assert_array_equal(record.params["w"], after[-1])
    np.testing.assert_allclose(metrics, [weights.sum() / 210 for weights in after], rtol=1e-6)


# Errors: each names the argument, the leaf and the fix, and loses nothing.


def test_forgotten_hold_zeros():
    tx = optax.adam(0.1)
    with pytest.raises(sj.PruningError, match=r"tx = hold_zeros\(tx\)"):
        loop(tx).init(start(tx))


def noisy(record):
    return record._replace(params=jax.tree.map(lambda w: w + 1e-9, record.params))


def forgetful(record):
    return record._replace(opt_state=held().init(record.params))


def other_optimizer(record):
    return record._replace(opt_state=optax.adam(0.1).init(record.params))


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (noisy, "2 pruned entries of 'w' are not 0"),
        (forgetful, "mask in the optimizer state has changed at 2"),
        (other_optimizer, "holds no pruning mask"),
        (lambda record: record._replace(params={"v": record.params["w"]}), "another structure"),
        (lambda record: record._asdict(), "NamedTuple or a dataclass"),
    ],
)
def test_train_that_breaks_the_rules(train, message):
    tx = held()
    calls = []

    def first_well(record):
        calls.append(None)
        return idle(record) if len(calls) == 1 else train(record)

    pruning = loop(tx, first_well)
    with pytest.raises(sj.PruningError, match=message) as raised:
        run(pruning, start(tx))
    assert int(raised.value.state.progress.check) == 1
    assert len(raised.value.history) == 1
    np.testing.assert_array_equal(kept_weights(raised.value.state.current), MAGNITUDES[2:])


def test_an_interrupt_loses_nothing():
    tx = held()
    calls = []

    def interrupted(record):
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return idle(record)

    pruning = loop(tx, interrupted)
    with pytest.raises(KeyboardInterrupt) as raised:
        run(pruning, start(tx))
    assert [check.check for check in raised.value.history] == [1, 2]
    state, history = sj.run_pruning(pruning, raised.value.state)
    assert history[0].check == 3
    straight, _ = run(loop(tx), start(tx))
    np.testing.assert_array_equal(kept_weights(state.good), kept_weights(straight.good))


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (math.nan, "metric is nan"),
        (math.inf, "metric is inf"),
        (np.ones(2), r"shape \(2,\)"),
        ("good", "must return one real number"),
    ],
)
def test_metric_that_is_none(metric, message):
    tx = held()
    with pytest.raises(sj.PruningError, match=message):
        loop(tx, evaluate=lambda params: metric).init(start(tx))
    series = iter([1.0, 1.0, metric])
    pruning = loop(tx, evaluate=lambda params: next(series))
    with pytest.raises(sj.PruningError, match=message) as raised:
        run(pruning, start(tx))
    assert int(raised.value.state.progress.check) == 1


def test_bound_that_the_dense_network_misses():
    tx = held()
    with pytest.raises(sj.PruningError, match=r"metric is 1 .* misses the bound 1\.5"):
        loop(tx, bound=1.5).init(start(tx))


def test_nothing_to_prune():
    tx = held()
    params = {"bias": jnp.ones(3)}
    with pytest.raises(sj.PruningError, match="selects no leaf"):
        loop(tx).init(Record(params, tx.init(params)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sj.fraction_step(0.0), "fraction=0.0"),
        (lambda: sj.fraction_step(1.5), "fraction=1.5"),
        (lambda: sj.bisection_step(0.0), "tolerance=0.0"),
        (lambda: sj.bisection_step(0.1, evaluations=0), "evaluations"),
        (lambda: sj.relative_bound(1.0), "tolerance=1.0"),
        (lambda: sj.relative_bound(0.1, "up"), "mode='up'"),
        (lambda: loop(held(), mode="up"), "mode='up'"),
        (lambda: loop(held(), max_checks=0), "max_checks"),
        (lambda: loop(held(), recovery=0), "recovery=0"),
        (lambda: loop(held(), back_off=1.0), "back_off=1.0"),
        (lambda: loop(held(), smallest_scale=0.0), "smallest_scale=0.0"),
        (lambda: loop(held(), stop_when_worsening=0), "stop_when_worsening=0"),
    ],
)
def test_arguments_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_arguments_of_other_types():
    for name, wrong in (("train", None), ("evaluate", 0.9), ("propose", 0.1)):
        with pytest.raises(TypeError, match=f"{name} is a {type(wrong).__name__}, not a function"):
            loop(held(), **{"train": idle, "evaluate": share_left, "propose": idle, name: wrong})
    tx = held()
    record = start(tx)
    with pytest.raises(TypeError, match=r"state is a Record. Give pruning.init\(record\)"):
        sj.run_pruning(loop(tx), record)
    pruning = loop(tx, propose=lambda situation: situation.pruning_mask)
    with pytest.raises(TypeError, match=r"propose returned a dict. Return Proposal\(") as caught:
        run(pruning, record)
    assert int(caught.value.state.progress.check) == 0


@pytest.mark.parametrize("mode", ["max", "min"])
def test_a_state_restored_in_float32_goes_on_alike(mode):
    """As arrays of JAX, without 64 bits, the metrics that the state keeps are float32."""
    tx, sign = held(), 1 if mode == "max" else -1
    # 0.9812 is no float32, nor is the bound; at every second check the metric is worse.
    metrics = [sign * (0.9812 - 0.01 * (i % 2)) for i in range(40)]

    def evaluate(params):
        return metrics[len(seen)]

    def train(record):
        seen.append(None)
        return idle(record)

    def propose(situation):
        asked.append((situation.metric, situation.waited))
        some = situation.waited < 3
        return sj.fraction_step(0.1)(situation) if some else sj.Proposal(None)

    def decisions(restored):
        seen.clear()
        asked.clear()
        pruning = loop(
            tx, train, evaluate, propose, sign * 0.9812, mode=mode, recovery=1, max_checks=12
        )
        state, checks = pruning.init(start(tx)), []
        while not pruning.done(state):
            state, check = pruning.step(restored(state))
            checks.append(check._replace(seconds=0))
        return checks, list(asked)

    seen, asked = [], []
    whole = decisions(lambda state: state)
    assert {check.action for check in whole[0]} >= {"pruned", "went back"}
    assert decisions(jax.device_put) == whole


def test_small_improvements_of_a_large_metric_count():
    """A hundredth of 1e6 is below the resolution of float32."""
    tx, checks = held(), []

    def at(change):
        metrics = iter(-1e6 + change * i for i in range(9))
        pruning = loop(
            tx, evaluate=lambda params: next(metrics), bound=-2e6, stop_when_worsening=3,
            propose=lambda situation: checks.append(situation.waited) or sj.Proposal(None),
            max_checks=8,
        )  # fmt: skip
        return run(pruning, start(tx))[1]

    assert len(at(-0.01)) == 3
    checks.clear()
    assert len(at(0.01)) == 8
    assert checks == [0] * 8


@pytest.mark.parametrize("metric", [0.9812, -1e6 - 0.01, 1e-20 / 3, math.pi * 1e30, 1e300, 0.0])
def test_metrics_survive_a_checkpoint_in_float32(metric):
    metrics = (metric, -metric, metric, math.inf, -math.inf)
    progress = iterative._to_arrays(iterative.Progress(3, 0, 0, 0, 0, False, *metrics, ()))
    numbers = iterative._from_arrays(progress)
    assert numbers == (3, 0, 0, 0, 0, False, *metrics, 0)
    if abs(metric) < 1e38:
        restored = jax.device_put(progress)
        assert restored.bound.dtype == jnp.float32
        assert iterative._from_arrays(restored) == numbers


def test_what_a_proposal_must_fit():
    tx = held()
    pruning = loop(tx, propose=lambda situation: sj.Proposal({"v": jnp.ones(20, bool)}))
    with pytest.raises(ValueError, match="pruning_mask: its structure is not that of the params"):
        run(pruning, start(tx))


def test_leaves_that_nothing_holds():
    params = {"bias": jnp.ones(3), "w": jnp.asarray(MAGNITUDES).reshape(4, 5)}
    kernels = {"bias": False, "w": True}
    tx = optax.masked(sj.hold_zeros(optax.sgd(0.1)), kernels)
    with pytest.raises(sj.PruningError, match=r"\['bias'\], where no hold_zeros"):
        loop(tx, mask=sj.every_parameter).init(Record(params, tx.init(params)))
    state, _ = run(loop(tx, mask=kernels), Record(params, tx.init(params)))
    np.testing.assert_array_equal(state.good.params["bias"], 1)
    assert kept_weights(state.good).size < 20


def test_a_proposal_brings_no_entry_back():
    tx = held()
    turns = iter([0, 10] * 20)

    def forgetful(situation):  # forgets what is pruned already, and takes now this end, now that
        weights = situation.params["w"].ravel()
        out = jnp.arange(20) - next(turns)
        keep = ~((out >= 0) & (out < 5)).reshape(weights.shape)
        return sj.Proposal({"w": keep.reshape(situation.params["w"].shape)})

    state, history = run(loop(tx, propose=forgetful, bound=0.1), start(tx))
    assert [check.kept for check in history] == [20, 15, 10]
    assert state.progress.stopped  # nothing more went


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64", "int32"])
def test_a_metric_on_the_bound_meets_it(dtype, x64):
    tx = held()
    bound = {"bfloat16": 0.5, "int32": 3}.get(dtype, 0.979)
    pruning = loop(tx, evaluate=lambda params: jnp.asarray(bound, dtype), bound=bound, max_checks=1)
    _, history = run(pruning, start(tx))
    assert history[0].met_bound
    just_below = loop(tx, evaluate=lambda params: bound * (1 - 1e-6), bound=bound)
    with pytest.raises(sj.PruningError, match="misses the bound"):
        just_below.init(start(tx))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.astype(jnp.bfloat16), r"'w' with shape \(4, 5\) and dtype bfloat16, it was"),
        (lambda w: w[:2], r"'w' with shape \(2, 5\) and dtype float32"),
    ],
)
def test_train_that_changes_a_leaf(change, message):
    tx = held()

    def train(record):
        return record._replace(params=jax.tree.map(change, record.params))

    with pytest.raises(sj.PruningError, match=message):
        run(loop(tx, train), start(tx))


def test_fine_tune_of_other_trainers():
    params = {"w": jnp.asarray(MAGNITUDES).reshape(4, 5)}
    tx, tune_tx = held(), sj.hold_zeros(optax.sgd(1.0, momentum=0.5))
    record = train_state.TrainState.create(apply_fn=None, params=params, tx=tx)
    mask = sj.mask_by_fraction(params, 0.5)
    record = record.replace(
        **dict(
            zip(("params", "opt_state"), sj.prune(tx, params, record.opt_state, mask), strict=True)
        )
    )

    def tune(state):
        return state.apply_gradients(grads=jax.tree.map(lambda w: -jnp.ones_like(w), state.params))

    tuned, _ = sj.fine_tune(record.replace(tx=tune_tx), tune_tx, tune, share_left, intervals=2)
    wanted = np.where(MAGNITUDES > 10, MAGNITUDES + 1 + 1.5, 0)
    np.testing.assert_array_equal(tuned.params["w"].ravel(), wanted)

    model = nnx.Linear(4, 5, use_bias=False, rngs=nnx.Rngs(0))
    model.kernel[...] = params["w"]
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    state = nnx.state(model, nnx.Param)
    pruned = sj.prune(tx, state, optimizer.opt_state, sj.mask_by_fraction(state, 0.5))
    tuner = nnx.Optimizer(model, tune_tx, wrt=nnx.Param)

    def tune_nnx(record):
        nnx.update(model, record.params)
        tuner.opt_state = record.opt_state
        gradients = jax.tree.map(lambda w: -jnp.ones_like(w), nnx.state(model, nnx.Param))
        tuner.update(model, gradients)
        return sj.Record(nnx.state(model, nnx.Param), tuner.opt_state)

    tuned, _ = sj.fine_tune(
        sj.Record(*pruned),
        tune_tx,
        tune_nnx,
        lambda params: jnp.sum(params["kernel"][...]),
        intervals=2,
        opt_state=tuner.opt_state,
    )
    np.testing.assert_array_equal(tuned.params["kernel"][...].ravel(), wanted)


def test_fine_tune_errors():
    tx = held()
    record = start(tx)
    with pytest.raises(ValueError, match="fine_tune: intervals=-1"):
        sj.fine_tune(record, tx, idle, share_left, intervals=-1)


def test_the_papers_preset():
    """Every parameter, floors 0, 4 % a check, no going back, gamma's restart, their own stop."""
    tx = sj.hold_zeros(sj.selective_adam(1e-3, strength=sj.paper_strength(1e-3, 550)))
    params = {"bias": jnp.full(5, 0.5), "w": jnp.asarray(MAGNITUDES).reshape(4, 5)}
    series = iter([1.0, 1.0, 1.0, 0.9, 0.8, 0.7])
    pruning = sj.iterative_pruning(
        tx,
        idle,
        lambda params: next(series),
        sj.fraction_step(0.04, floor=0),
        bound=0.85,
        mask=sj.every_parameter,
        max_checks=100,
        recovery=None,
        stop_when_worsening=3,
    )
    state, history = run(pruning, Record(params, tx.init(params)))
    # 25 weights; round(4 %) is 1 of 25 and takes its ties, the whole bias; then 1 of 20, of 19.
    assert [check.kept for check in history] == [25, 20, 19, 18, 18]
    assert [check.pruned for check in history] == [True, True, True, False, False]
    assert state.progress.stopped
    np.testing.assert_array_equal(kept_weights(state.good), MAGNITUDES[1:])
