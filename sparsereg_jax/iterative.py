"""The iterative prune and retrain loop, as an explicit and resumable state machine.

Train an interval, measure, decide: prune some more, go on recovering, or go back and try a smaller
step. What to prune is a function handed in (:func:`fraction_step`, :func:`bisection_step`), how to
train and to measure are the user's. All that happens between two checks is in
:class:`PruningState`, a tree of arrays; nothing else is remembered anywhere.
"""

import contextlib
import dataclasses
import functools
import json
import math
import operator
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .holding import held_mask, prune, unheld
from .pruning import (
    apply_mask,
    check_pruning_mask,
    count_kept,
    intersection,
    mask_by_fraction,
    summary,
)
from .selection import Mask, is_float, leaf_path, resolve_mask, weights

PyTree = Any
TrainState = Any
Metric = Callable[[PyTree], Any]
Mode = Literal["max", "min"]


class Record(NamedTuple):
    """What is trained, for those who have no record of their own."""

    params: PyTree
    opt_state: PyTree


class Progress(NamedTuple):
    """The loop's own numbers, each of shape () but for the last."""

    check: Any  # int32: checks made
    waited: Any  # int32: checks since best_metric improved
    missed: Any  # int32: checks below the bound in a row
    worsening: Any  # int32: checks in a row, each worse than the one before
    retreats: Any  # int32: how often it went back
    stopped: Any  # bool
    bound: Any  # float64
    dense_metric: Any  # float64: before the first interval
    good_metric: Any  # float64: of the good record
    last_metric: Any  # float64: at the last check
    best_metric: Any  # float64: since the last pruning
    rests: Any  # float32, shape=(5, 2): what float32 leaves out of the five metrics above


class PruningState(NamedTuple):
    """All that the loop knows between two checks: trees of arrays of a fixed structure.

    Save and restore it with any checkpointer of pytrees; a run that goes on from a restored state
    gives the same masks and weights as one that was never interrupted, even where the checkpointer
    makes float32 of float64.
    """

    current: TrainState  # the user's record: what the next interval trains
    good: TrainState  # the user's record at the sparsest check that met the bound
    progress: Progress


class Check(NamedTuple):
    """The record of one check."""

    check: int  # 1, 2, …
    step: int  # optimizer steps since the start of the loop
    metric: float  # of the weights as they were when checked
    sparsity: float  # share of pruned entries among all float parameters, when checked
    kept: int  # entries not pruned, when checked
    met_bound: bool
    pruned: bool  # whether the check ended in a pruning
    stopped: bool  # whether it was the last
    action: str  # "pruned", "went back" (and pruned less, if pruned) or "trains on"
    evaluations: int  # calls of the evaluation
    seconds: float  # wall time of the interval and the check
    sparsity_by_path: dict[str, float]


class Situation(NamedTuple):
    """What a proposal may look at: a network that meets the bound."""

    params: PyTree
    pruning_mask: PyTree  # what remains now
    prunable: PyTree  # Python bools: the leaves that may be pruned
    metric: float  # of params
    waited: int  # checks since the metric last improved; very large for a state gone back to
    scale: float  # in (0, 1]: how much smaller than at first the step should be
    evaluate: Metric
    mode: Mode


class Proposal(NamedTuple):
    """What to prune now."""

    pruning_mask: PyTree | None  # None: nothing at this check
    evaluations: int = 0  # calls of evaluate it took
    exhausted: bool = False  # nothing at later checks either: the loop stops


Propose = Callable[[Situation], Proposal]


class IterativePruning(NamedTuple):
    """Two functions in the manner of an optax transformation, and a test for the end."""

    init: Callable[[TrainState], PruningState]
    step: Callable[[PruningState], tuple[PruningState, Check]]
    done: Callable[[PruningState], bool]
    max_checks: int


class PruningError(ValueError):
    """The loop cannot go on.

    Attributes:
      state: the last sound :class:`PruningState`, before the failed interval; None in ``init``.
    """

    state: PruningState | None = None


def iterative_pruning(
    tx: optax.GradientTransformation,
    train: Callable[[TrainState], TrainState],
    evaluate: Metric,
    propose: Propose,
    bound: float | Callable[[float], float],
    *,
    mode: Mode = "max",
    max_checks: int,
    steps_per_check: int = 1,
    mask: Mask = weights,
    recovery: int | None = 10,
    back_off: float = 0.5,
    smallest_scale: float = 1 / 16,
    stop_when_worsening: int | None = None,
    view: Callable[[TrainState], PyTree] | None = None,
) -> IterativePruning:
    """Prunes a trained network step by step while a validation metric stays within a bound.

    Each step trains an interval and checks it. If the metric meets the bound, the state is kept and
    ``propose`` says what to prune next. If not, training goes on; after ``recovery`` such checks in
    a row the loop goes back to the last state that met the bound (the whole record, its random keys
    and place in the data included) and prunes less, the proposal's size multiplied by ``back_off``;
    it stops when that would be smaller than ``smallest_scale``.

    The authors' algorithm is ``propose=fraction_step(0.04, floor=0)``, ``mask=every_parameter``,
    ``recovery=None`` (never going back) and their own rule to stop, ``stop_when_worsening``.

    Args:
      tx: the optimizer, with :func:`sparsereg_jax.hold_zeros` in it.
      train: trains one interval, from a record to a record. The record is :class:`Record`, or a
        NamedTuple or dataclass (``flax.training.train_state.TrainState``) of one's own with at
        least its fields; random keys and the position in the data belong in it too. ``train`` may
        donate its argument.
      evaluate: from params (or from what ``view`` gives) to a finite scalar, on data held out from
        training. Called with the same shapes always, so a jitted one compiles once.
      propose: what to prune next, :func:`fraction_step` or :func:`bisection_step`, or a function of
        one's own from :class:`Situation` to :class:`Proposal`.
      bound: the metric that must be met (equalled, to single precision), or a function of the
        first network's metric, such as :func:`relative_bound`.
      mode: ``"max"`` for a metric to maximise (accuracy, BLEU), ``"min"`` for a loss.
      max_checks: stop after so many checks.
      steps_per_check: optimizer steps in an interval, for the records.
      mask: which leaves may be pruned.
      recovery: checks below the bound in a row before the loop goes back; None never does.
      back_off: factor on the size of the step at each going back, in (0, 1); it stays so small.
      smallest_scale: stop when the factor falls below it, in (0, 1].
      stop_when_worsening: stop when the metric got worse so many checks in a row; None never does.
      view: what ``evaluate`` measures, from the record; by default its params. A network with batch
        norm needs its running statistics too: ``lambda record: {"params": record.params,
        "batch_stats": record.batch_stats}``.

    Returns:
      An :class:`IterativePruning`. ``init(record)`` measures the network and gives the first
      :class:`PruningState`; ``step(state)`` gives the next one and a :class:`Check`;
      ``done(state)`` says when to stop. ``state.good`` is the record of the sparsest network that
      met the bound.

    Raises:
      ValueError: an argument is out of range.
      TypeError: ``train``, ``evaluate`` or ``propose`` is no function, or in ``step`` ``propose``
        returned no :class:`Proposal`.
      PruningError: (a ValueError, with the last sound state) in ``init`` or ``step``: no mask in
        the optimizer state, nothing to prune, a metric that is no finite scalar, a bound that the
        first network misses, parameters that change structure, pruned entries that came back.

    Example:
      >>> import jax, jax.numpy as jnp, optax, sparsereg_jax as sj
      >>> target = jnp.array([[3.0, 0.0, -2.0, 0.0]])
      >>> tx = sj.hold_zeros(sj.selective_sgd(0.1, alpha=0.1))
      >>> def train(record):
      ...     gradients = {"w": record.params["w"] - target}
      ...     updates, opt_state = tx.update(gradients, record.opt_state, record.params)
      ...     return sj.Record(optax.apply_updates(record.params, updates), opt_state)
      >>> params = {"w": target + 0.1}
      >>> pruning = sj.iterative_pruning(
      ...     tx, train, lambda params: jnp.sum((params["w"] - target) ** 2),
      ...     sj.fraction_step(0.25), bound=0.5, mode="min", max_checks=8, recovery=2)
      >>> state = pruning.init(sj.Record(params, tx.init(params)))
      >>> while not pruning.done(state):
      ...     state, check = pruning.step(state)
      >>> print(state.good.params["w"] != 0)
      [[ True False  True False]]
    """
    better = _comparison("iterative_pruning", mode)
    for name, function in (("train", train), ("evaluate", evaluate), ("propose", propose)):
        if not callable(function):
            raise TypeError(
                f"iterative_pruning: {name} is a {type(function).__name__}, not a function."
                " (propose: fraction_step(0.1), say.)"
            )
    if max_checks < 1 or steps_per_check < 1:
        raise ValueError(
            "iterative_pruning: max_checks and steps_per_check are at least 1, not"
            f" {max_checks} and {steps_per_check}."
        )
    if not 0 < back_off < 1:
        raise ValueError(f"iterative_pruning: back_off={back_off} is outside (0, 1).")
    if not 0 < smallest_scale <= 1:
        raise ValueError(f"iterative_pruning: smallest_scale={smallest_scale} is outside (0, 1].")
    for name, count in (("recovery", recovery), ("stop_when_worsening", stop_when_worsening)):
        if count is not None and count < 1:
            raise ValueError(f"iterative_pruning: {name}={count} is below 1; None switches it off.")

    worst = -math.inf if mode == "max" else math.inf
    measure = functools.partial(_measure, "iterative_pruning", evaluate, view)
    prune_jitted = jax.jit(functools.partial(prune, tx))

    def propose_from(record, metric, waited, retreats) -> Proposal:
        proposal = propose(
            Situation(
                params=record.params,
                pruning_mask=held_mask(record.params, record.opt_state),
                prunable=resolve_mask(mask, record.params),
                metric=metric,
                waited=waited,
                scale=back_off**retreats,
                evaluate=_on_params(evaluate, view, record),
                mode=mode,
            )
        )
        if not isinstance(proposal, Proposal):
            raise TypeError(
                f"iterative_pruning: propose returned a {type(proposal).__name__}. Return"
                " Proposal(pruning_mask), or Proposal(None) to prune nothing."
            )
        return proposal

    def meets(metric: float, lowest: float) -> bool:
        return not better(lowest, metric) or abs(lowest - metric) <= _F32_EPS * abs(lowest)

    def init(record: TrainState) -> PruningState:
        _check_record("iterative_pruning", record)
        try:
            held_mask(record.params, record.opt_state)
        except ValueError as error:
            raise PruningError(f"iterative_pruning: {error}") from error
        prunable = resolve_mask(mask, record.params)
        if not any(jax.tree.leaves(prunable)):
            raise PruningError(
                "iterative_pruning: mask selects no leaf of params, so nothing can be pruned."
                " Without a mask, leaves of rank 2 or more are selected; see"
                " selection_table(params, mask)."
            )
        if paths := unheld(record.params, prunable, record.opt_state):
            raise PruningError(
                f"iterative_pruning: mask selects {paths}, where no hold_zeros would hold the"
                " zeros. Put hold_zeros around the whole optimizer, or leave them out by mask."
            )
        dense = measure(record)
        lowest = float(bound(dense) if callable(bound) else bound)
        if math.isnan(lowest) or not meets(dense, lowest):
            raise PruningError(
                f"iterative_pruning: the network's metric is {dense:g} before any pruning and"
                f" misses the bound {lowest:g} (mode={mode!r}). Train it further or choose another"
                " bound."
            )
        progress = Progress(
            check=0,
            waited=0,
            missed=0,
            worsening=0,
            retreats=0,
            stopped=False,
            bound=lowest,
            dense_metric=dense,
            good_metric=dense,
            last_metric=dense,
            best_metric=worst,
            rests=(),
        )
        record = _rebuilt(record)
        return PruningState(record, record, _to_arrays(progress))

    def step(state: PruningState) -> tuple[PruningState, Check]:
        start = time.perf_counter()
        was = _from_arrays(state.progress)
        # A copy, so that a train that donates its argument leaves this state usable.
        record = _rebuilt(train(_copy(state.current)))
        try:
            _check_record("iterative_pruning", record)
            _check_held("iterative_pruning", state.current, record)
            metric = measure(record)
        except PruningError as error:
            error.state = state
            raise
        rows = _rows(record)
        kept = sum(row.kept for row in rows)

        met_bound = meets(metric, was.bound)
        improved = better(metric, was.best_metric)
        now = was._replace(
            check=was.check + 1,
            waited=0 if improved else was.waited + 1,
            missed=0 if met_bound else was.missed + 1,
            worsening=was.worsening + 1 if better(was.last_metric, metric) else 0,
            last_metric=metric,
            best_metric=metric if improved else was.best_metric,
        )
        good = state.good
        good_kept = _kept(good)
        sparser = kept < good_kept or (kept == good_kept and better(metric, was.good_metric))
        if met_bound and sparser:
            good, now = record, now._replace(good_metric=metric)

        action, proposal = "trains on", Proposal(None)
        if met_bound:
            proposal = propose_from(record, metric, now.waited, now.retreats)
        elif recovery is not None and now.missed >= recovery:
            action, record, retreats = "went back", good, now.retreats + 1
            now = now._replace(
                retreats=retreats,
                stopped=back_off**retreats < smallest_scale,
                waited=0,
                missed=0,
                worsening=0,
                last_metric=now.good_metric,
                best_metric=now.good_metric,
            )
            if not now.stopped:
                proposal = propose_from(record, now.good_metric, _SETTLED, retreats)

        pruned = False
        if proposal.pruning_mask is not None:
            check_pruning_mask(record.params, proposal.pruning_mask)
            before = _kept(record)
            refined = intersection(
                proposal.pruning_mask, held_mask(record.params, record.opt_state)
            )
            params, opt_state = prune_jitted(record.params, record.opt_state, refined)
            record = _replace(record, params, opt_state)
            pruned = _kept(record) < before
            now = now._replace(best_metric=worst, waited=0, missed=0)
            action = "pruned" if pruned and action == "trains on" else action
        # A step that has become smaller than one weight is the last.
        exhausted = proposal.exhausted or (proposal.pruning_mask is not None and not pruned)
        if exhausted or now.worsening >= (stop_when_worsening or math.inf):
            now = now._replace(stopped=True)

        check = Check(
            check=now.check,
            step=now.check * steps_per_check,
            metric=metric,
            sparsity=1 - kept / max(1, sum(row.size for row in rows)),
            kept=kept,
            met_bound=met_bound,
            pruned=pruned,
            stopped=now.stopped,
            action=action,
            evaluations=1 + proposal.evaluations,
            seconds=time.perf_counter() - start,
            sparsity_by_path={row.path: row.sparsity for row in rows},
        )
        return PruningState(record, good, _to_arrays(now)), check

    def done(state: PruningState) -> bool:
        return bool(state.progress.stopped) or int(state.progress.check) >= max_checks

    return IterativePruning(init, step, done, max_checks)


def run_pruning(
    pruning: IterativePruning,
    state: PruningState,
    *,
    on_check: Callable[[PruningState, Check], None] | None = None,
    progress_bar: bool = False,
) -> tuple[PruningState, list[Check]]:
    """Steps until the loop is done.

    Args:
      pruning: what :func:`iterative_pruning` returned.
      state: ``pruning.init(record)``, or a state saved earlier.
      on_check: called after each check, to save the state and write the record
        (:func:`check_to_json`) for instance.
      progress_bar: shows one, by tqdm.

    Returns:
      The last state, and the checks made by this call.

    Raises:
      PruningError: see :func:`iterative_pruning`. Whatever is raised, errors of the user's code
        and an interrupt from the keyboard included, its attribute ``state`` is the last sound
        state, ``history`` the checks of this call.
      TypeError: ``state`` is a record, say.
      ImportError: ``progress_bar`` without tqdm.

    Example:
      See :func:`iterative_pruning`; ``state, history = run_pruning(pruning, state)`` stands for the
      loop at its end.
    """
    if not isinstance(state, PruningState):
        raise TypeError(
            f"run_pruning: state is a {type(state).__name__}. Give pruning.init(record), or a state"
            " that was saved, restored in its structure: a checkpointer takes pruning.init(record)"
            " as what to restore into."
        )
    bar = _tqdm(pruning.max_checks, int(state.progress.check)) if progress_bar else None
    history: list[Check] = []
    try:
        while not pruning.done(state):
            state, check = pruning.step(state)
            history.append(check)
            if on_check is not None:
                on_check(state, check)
            if bar is not None:
                bar.set_postfix_str(
                    f"sparsity {check.sparsity:.2%}, metric {check.metric:.4g}, {check.action}"
                )
                bar.update()
    except BaseException as error:
        with contextlib.suppress(AttributeError):  # a read-only attribute of the user's error
            error.state, error.history = state, history  # type: ignore[attr-defined]
        raise
    finally:
        if bar is not None:
            bar.close()
    return state, history


def fine_tune(
    record: TrainState,
    tx: optax.GradientTransformation,
    train: Callable[[TrainState], TrainState],
    evaluate: Metric,
    *,
    intervals: int,
    opt_state: optax.OptState | None = None,
    view: Callable[[TrainState], PyTree] | None = None,
) -> tuple[TrainState, list[float]]:
    """Trains a pruned network on with another optimizer, its zeros kept.

    The last step of the paper's algorithm: no regularizer, a few epochs. The optimizer starts
    afresh. The last network is returned, not the one of the best metric: a network that the loop
    chose among many because its metric was high has had luck that a fair comparison would not see.

    Args:
      record: the user's record with the network to tune, ``state.good`` for instance.
      tx: the optimizer to tune with, with :func:`sparsereg_jax.hold_zeros` in it.
      train: trains one interval with ``tx``, from a record to a record.
      evaluate: as in :func:`iterative_pruning`.
      intervals: how many intervals to train, measuring after each.
      opt_state: a fresh state of ``tx`` in the form that ``train`` expects, such as the
        ``opt_state`` of a new ``nnx.Optimizer``; None for ``tx.init(params)``. A ``TrainState``
        also carries its transformation: pass ``record.replace(tx=tx)``.
      view: as in :func:`iterative_pruning`.

    Returns:
      The record after the last interval, and the metric before and after each.

    Raises:
      PruningError: a record without the fields, a metric that is no finite scalar, or pruned
        entries that came back.
      ValueError: ``record`` or ``tx`` hold no mask, or an argument is out of range.

    Example:
      >>> import jax.numpy as jnp, optax, sparsereg_jax as sj
      >>> tx = sj.hold_zeros(optax.sgd(0.5))
      >>> w, opt_state = sj.prune(tx, jnp.ones(2), tx.init(jnp.ones(2)), jnp.array([True, False]))
      >>> def train(record):
      ...     updates, opt_state = tx.update(record.params - 3, record.opt_state, record.params)
      ...     return sj.Record(record.params + updates, opt_state)
      >>> record, loss = sj.fine_tune(sj.Record(w, opt_state), tx, train,
      ...                             lambda w: jnp.abs(w[0] - 3), intervals=3)
      >>> print(record.params, loss)
      [2.75 0.  ] [2.0, 1.0, 0.5, 0.25]
    """
    if intervals < 0:
        raise ValueError(f"fine_tune: intervals={intervals} is negative.")
    _check_record("fine_tune", record)
    mask = held_mask(record.params, record.opt_state)
    fresh = tx.init(record.params) if opt_state is None else opt_state
    record = _replace(record, *prune(tx, record.params, fresh, mask))
    metrics = [_measure("fine_tune", evaluate, view, record)]
    for _ in range(intervals):
        before, record = record, _rebuilt(train(_copy(record)))
        _check_held("fine_tune", before, record)
        metrics.append(_measure("fine_tune", evaluate, view, record))
    return record, metrics


def fraction_step(fraction: float, *, floor: int = 1, exact_ties: bool = False) -> Propose:
    """The paper's step: prunes a fraction of what remains at every check that meets the bound.

    Drops round(fraction * remaining) weights, smallest magnitudes first over all prunable leaves at
    once (:func:`sparsereg_jax.mask_by_fraction`).

    Args:
      fraction: the share of the remaining prunable entries, in (0, 1]; 0.04 in the paper's image
        experiments.
      floor: entries kept in each tensor at the least; 0 (the paper's) may empty a layer.
      exact_ties: drop that number exactly; otherwise all weights of the last magnitude that goes,
        many where magnitudes are equal (bf16, freshly initialised biases).

    Returns:
      A ``propose`` for :func:`iterative_pruning`.

    Raises:
      ValueError: ``fraction`` is outside (0, 1].

    Example:
      See :func:`iterative_pruning`.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction_step: fraction={fraction} is outside (0, 1].")

    def propose(situation: Situation) -> Proposal:
        return Proposal(
            mask_by_fraction(
                situation.params,
                fraction * situation.scale,
                pruning_mask=situation.pruning_mask,
                mask=situation.prunable,
                floor=floor,
                exact_ties=exact_ties,
            )
        )

    return propose


def bisection_step(
    tolerance: float, *, patience: int = 3, evaluations: int = 8, floor: int = 1
) -> Propose:
    """At a plateau, prunes the largest share of what remains that costs at most ``tolerance``.

    LOBSTER's rule. When the metric has not improved for ``patience`` checks, bisects on the
    quantile of the remaining magnitudes: each trial prunes a share, measures, and halves the
    interval. The share returned is one that was itself measured and met the tolerance. A metric
    that is not monotone in the share, or NaN (which counts as a miss), costs optimality only.

    Args:
      tolerance: relative change allowed: the pruned network's metric must be at least
        metric - tolerance * |metric| (``mode="max"``), at most metric + tolerance * |metric|
        (``"min"``), before it is trained again. In (0, 1); multiplied by the loop's ``scale``.
      patience: checks without improvement that make a plateau.
      evaluations: trials, each one evaluation; the share is found to within 2**-evaluations.
      floor: entries kept in each tensor at the least.

    Returns:
      A ``propose`` for :func:`iterative_pruning`.

    Raises:
      ValueError: an argument is out of range.

    Example:
      >>> import jax.numpy as jnp, sparsereg_jax as sj
      >>> w = {"w": jnp.arange(1.0, 9.0).reshape(2, 4)}
      >>> situation = sj.Situation(
      ...     params=w, pruning_mask=sj.full_mask(w), prunable={"w": True}, metric=36.0, waited=3,
      ...     scale=1.0, evaluate=lambda params: jnp.sum(params["w"]), mode="max")
      >>> proposal = sj.bisection_step(0.2)(situation)  # 36 - 1 - 2 - 3 is the last within 20 %
      >>> print(proposal.pruning_mask["w"].astype(int), proposal.evaluations)
      [[0 0 0 1]
       [1 1 1 1]] 8
    """
    if not 0 < tolerance < 1:
        raise ValueError(f"bisection_step: tolerance={tolerance} is outside (0, 1).")
    if patience < 0 or evaluations < 1:
        raise ValueError(
            "bisection_step: patience is at least 0 and evaluations at least 1, not"
            f" {patience} and {evaluations}."
        )

    def propose(situation: Situation) -> Proposal:
        if situation.waited < patience:
            return Proposal(None)
        allowed = tolerance * situation.scale * abs(situation.metric)
        passed, failed, found = 0.0, 1.0, None
        for _ in range(evaluations):
            share = (passed + failed) / 2
            trial = mask_by_fraction(
                situation.params,
                share,
                pruning_mask=situation.pruning_mask,
                mask=situation.prunable,
                floor=floor,
            )
            metric = float(situation.evaluate(_apply_jitted(situation.params, trial)))
            change = metric - situation.metric
            worse_by = -change if situation.mode == "max" else change
            if worse_by <= allowed:  # False for NaN
                passed, found = share, trial
            else:
                failed = share
        if found is not None and count_kept(found) == count_kept(situation.pruning_mask):
            found = None  # a share of less than one weight
        return Proposal(found, evaluations, exhausted=found is None)

    return propose


def relative_bound(tolerance: float, mode: Mode = "max") -> Callable[[float], float]:
    """A bound relative to the first network's metric.

    Args:
      tolerance: the relative loss allowed, in [0, 1).
      mode: ``"max"``: dense - tolerance * |dense|; ``"min"``: dense + tolerance * |dense|.

    Returns:
      A ``bound`` for :func:`iterative_pruning`.

    Raises:
      ValueError: an argument is out of range.

    Example:
      >>> relative_bound(0.25)(0.8), relative_bound(0.25, mode="min")(0.8)
      (0.6000000000000001, 1.0)
    """
    if not 0 <= tolerance < 1:
        raise ValueError(f"relative_bound: tolerance={tolerance} is outside [0, 1).")
    _comparison("relative_bound", mode)
    sign = -1 if mode == "max" else 1
    return lambda dense: dense + sign * tolerance * abs(dense)


def check_to_json(check: Check) -> str:
    """One line of JSON for a check; :func:`check_from_json` reads it.

    Args:
      check: a record.

    Returns:
      A line without its end.

    Example:
      >>> check = Check(1, 250, 0.98, 0.5, 9, True, True, False, "pruned", 1, 2.5, {"w": 0.5})
      >>> check_from_json(check_to_json(check)) == check
      True
    """
    return json.dumps(check._asdict())


def check_from_json(line: str) -> Check:
    """Reads a line that :func:`check_to_json` wrote.

    Args:
      line: the line.

    Returns:
      The record.

    Raises:
      ValueError: the line is not such a record.

    Example:
      See :func:`check_to_json`.
    """
    try:
        return Check(**json.loads(line))
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"check_from_json: not the record of a check: {line!r}: {error}") from None


_SETTLED = int(np.iinfo(np.int32).max)
_F32_EPS = float(np.finfo(np.float32).eps)
_apply_jitted = jax.jit(apply_mask)


_METRICS = ("bound", "dense_metric", "good_metric", "last_metric", "best_metric")


def _to_arrays(progress: Progress) -> Progress:
    dtypes = {bool: np.bool_, int: np.int32, float: np.float64}
    rests = [_parts(getattr(progress, name))[1:] for name in _METRICS]
    numbers = progress._replace(rests=0)
    arrays = Progress(*(np.asarray(value, dtypes[type(value)]) for value in numbers))
    return arrays._replace(rests=np.array(rests, np.float32))


def _from_arrays(progress: Progress) -> Progress:
    """Python numbers, the same ones whether the metrics came back as float64 or as float32."""
    rests = np.asarray(progress.rests, np.float64).sum(1).tolist()
    numbers = Progress(*(np.asarray(value).item() for value in progress._replace(rests=0)))
    metrics = {
        name: _parts(getattr(numbers, name))[0] + rest
        for name, rest in zip(_METRICS, rests, strict=True)
    }
    return numbers._replace(**metrics)


def _parts(metric: float) -> tuple[float, float, float]:
    """A float64 as the sum of three float32; itself where it is beyond their range."""
    with np.errstate(over="ignore"):
        high = float(np.float32(metric))
    if not math.isfinite(high):
        return metric, 0.0, 0.0
    middle = float(np.float32(metric - high))
    return high, middle, metric - high - middle


def _copy(tree: PyTree) -> PyTree:
    def copy(leaf):
        return leaf.copy() if isinstance(leaf, jax.Array | np.ndarray) else leaf

    return jax.tree.map(copy, tree)


def _rebuilt(tree: PyTree) -> PyTree:
    """New containers for the same arrays: an ``nnx.State`` goes on changing with its module."""
    return jax.tree.map(lambda leaf: leaf, tree)


def _comparison(name: str, mode: str) -> Callable[[float, float], bool]:
    """Whether one metric is better than another."""
    if mode not in ("max", "min"):
        raise ValueError(f"{name}: mode={mode!r} is neither 'max' nor 'min'.")
    return operator.gt if mode == "max" else operator.lt


def _check_record(name: str, record: TrainState) -> None:
    replaceable = hasattr(record, "_replace") or dataclasses.is_dataclass(record)
    if not (replaceable and hasattr(record, "params") and hasattr(record, "opt_state")):
        raise PruningError(
            f"{name}: the record is a {type(record).__name__}; it must be a NamedTuple or a"
            " dataclass with the fields params and opt_state. Give one, and return one from train."
        )


def _replace(record: TrainState, params: PyTree, opt_state: PyTree) -> TrainState:
    if hasattr(record, "_replace"):
        return record._replace(params=params, opt_state=opt_state)
    return dataclasses.replace(record, params=params, opt_state=opt_state)


def _on_params(
    evaluate: Metric, view: Callable[[TrainState], PyTree] | None, record: TrainState
) -> Metric:
    """``evaluate`` of the record with other params in it."""
    if view is None:
        return evaluate
    return lambda params: evaluate(view(_replace(record, params, record.opt_state)))


def _measure(
    name: str, evaluate: Metric, view: Callable[[TrainState], PyTree] | None, record: TrainState
) -> float:
    value = np.asarray(_on_params(evaluate, view, record)(record.params))
    real = any(jnp.issubdtype(value.dtype, kind) for kind in (jnp.floating, jnp.integer))
    if value.shape != () or not real:
        raise PruningError(
            f"{name}: evaluate returned shape {value.shape}, dtype {value.dtype}; it must return"
            " one real number."
        )
    metric = float(value)
    if not math.isfinite(metric):
        raise PruningError(
            f"{name}: the metric is {metric}: training diverged, or evaluate is undefined here."
        )
    return metric


def _rows(record: TrainState) -> list[Any]:
    return summary(record.params, held_mask(record.params, record.opt_state))


def _kept(record: TrainState) -> int:
    return sum(row.kept for row in _rows(record))


@jax.jit
def _violations(params: PyTree, mask: PyTree, mask_before: PyTree) -> PyTree:
    """Per leaf: nonzero pruned entries, and entries whose mask changed."""

    def count(leaf, keep, before):
        revived = jnp.zeros((), int) if not is_float(leaf) else jnp.sum(~keep & (leaf != 0))
        return revived, jnp.sum(keep != before)

    return jax.tree.map(count, params, mask, mask_before)


def _check_held(name: str, before: TrainState, after: TrainState) -> None:
    structure: Any = jax.tree.structure(before.params)
    returned: Any = jax.tree.structure(after.params)
    if structure != returned:
        raise PruningError(
            f"{name}: train returned params of another structure: {returned} instead of"
            f" {structure}."
        )
    for (kp, old), new in zip(
        jax.tree_util.tree_leaves_with_path(before.params),
        jax.tree.leaves(after.params),
        strict=True,
    ):
        was, now = ((jnp.shape(leaf), leaf.dtype) for leaf in (old, new))
        if was != now:
            raise PruningError(
                f"{name}: train returned {leaf_path(kp)!r} with shape {now[0]} and dtype {now[1]},"
                f" it was {was[0]} and {was[1]}. Keep both; cast inside the loss."
            )
    mask_before = held_mask(before.params, before.opt_state)
    try:
        mask = held_mask(after.params, after.opt_state)
    except ValueError as error:
        raise PruningError(f"{name}: after an interval of train, {error}") from error
    for (kp, _), (revived, changed) in zip(
        jax.tree_util.tree_leaves_with_path(after.params),
        _pairs(_violations(after.params, mask, mask_before)),
        strict=True,
    ):
        if revived or changed:
            raise PruningError(
                f"{name}: after an interval of train, {int(revived)} pruned entries of"
                f" {leaf_path(kp)!r} are not 0 and its mask in the optimizer state has changed at"
                f" {int(changed)}. Wrap the whole optimizer, tx = hold_zeros(tx), give {name} and"
                " train the same tx, and keep its state: train must not initialise the optimizer"
                " anew nor change the weights behind it."
            )


def _pairs(tree: PyTree) -> list[tuple[Any, Any]]:
    leaves = jax.device_get(jax.tree.leaves(tree))
    return list(zip(leaves[::2], leaves[1::2], strict=True))


def _tqdm(total: int, initial: int) -> Any:
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("run_pruning: progress_bar=True needs tqdm: pip install tqdm.") from error
    return tqdm(total=total, initial=initial, unit="check", dynamic_ncols=True)
