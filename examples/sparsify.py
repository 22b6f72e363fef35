"""One run: a method makes the network of a seed sparse, within the budget of its experiment."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax

import sparsereg_jax as sj

from . import checkpoints, experiment, trainer
from .experiment import Experiment
from .methods import Method

ROUNDS = 8  # of a method that rewinds
CHECKPOINT = 60  # seconds between two
SMALLER = 0.9  # a point of the curve has so much of the parameters of the point before, or less


class Point(NamedTuple):
    """A network on the way: a point of the trade-off curve."""

    sparsity: float  # share of all parameters that are zero
    validation: float  # accuracy
    test: float | None  # accuracy; None where it was not measured


class Run(NamedTuple):
    """What came out."""

    params: Any
    mask: Any
    variables: Any  # what the model's apply takes
    dense_params: Any
    history: list[sj.Check]
    curve: list[Point]  # of networks that met the bound, sparser and sparser
    dense: Point
    sparse: Point  # the end
    seconds: float  # of the loop and the tuning


class OutOfTime(Exception):
    """The time was up; the same call with the same folder goes on from the last checkpoint."""


def sparsify(
    bench: Experiment,
    method: Method,
    strength: float,
    seed: int,
    *,
    test: bool = True,
    folder: Path | None = None,
    deadline: float | None = None,
    progress_bar: bool = False,
) -> Run:
    """Trains the dense network of a seed, prunes it and tunes it.

    Args:
      bench: the experiment.
      method: a row of the table of methods.
      strength: its own number.
      seed: of the initial weights and of the order of the images.
      test: whether the test images are looked at, for the record.
      folder: for the checkpoints of this run; the dense network's are beside it. A run that was cut
        off is taken up there.
      deadline: the ``time.monotonic()`` at which to save a checkpoint and stop.
      progress_bar: shows one.

    Returns:
      The run.

    Raises:
      OutOfTime: the deadline has passed.
    """
    settings = bench.settings

    def on_epoch(epoch):
        if deadline is not None and time.monotonic() > deadline:
            raise OutOfTime

    dense_folder = folder and folder.parent / f"dense-seed{seed}"
    before = experiment.dense(bench, seed, dense_folder, on_epoch)
    began = before.initial if method.at_start else before.trained
    loop_epochs = settings.epochs * (1 - method.tune)
    loop_epochs -= 0 if method.at_start else settings.dense_epochs
    steps = int(loop_epochs * bench.epoch)
    interval = max(1, steps // ROUNDS if method.rewind else settings.interval)
    checks = max(1, steps // interval)

    rate: optax.ScalarOrSchedule = settings.learning_rate
    if method.cosine:
        length = interval if method.rewind else checks * interval
        rate = optax.cosine_decay_schedule(settings.learning_rate, length)
    tx = sj.hold_zeros(method.optimizer(rate, strength, bench.epoch))
    train = bench.trainer(tx, interval, method.smoothing)
    if method.rewind:
        # The first round is the dense training, which is done.
        train, checks = _rewinding(train, tx, before), checks + 1
    pruning = sj.iterative_pruning(
        tx,
        train,
        bench.validation,
        method.propose(strength, settings.fraction, checks),
        settings.bound if method.bounded else 0.0,
        max_checks=checks,
        steps_per_check=interval,
        mask=sj.every_parameter,
        recovery=method.recovery,
        view=trainer.variables,
    )
    record = began._replace(opt_state=tx.init(began.params))
    if method.at_start:
        mask = method.at_start(_gradients(bench, began), began.params, strength)
        params, opt_state = sj.prune(tx, record.params, record.opt_state, mask)
        record = record._replace(params=params, opt_state=opt_state)
    state, history, curve = pruning.init(record), [], []
    if folder is not None and (found := checkpoints.restore(folder, state)):
        _, state, log = found
        history = [sj.check_from_json(line) for line in log["history"]]
        curve = [Point(*point) for point in log["curve"]]

    def point(record: trainer.Record, validation: Any = None) -> Point:
        variables = trainer.variables(record)
        kept = sum(row.kept for row in sj.summary(record.params, mask_of(record)))
        size = sum(leaf.size for leaf in jax.tree.leaves(record.params))
        if validation is None:
            validation = bench.validation(variables)
        accuracy = float(bench.test(variables)) if test else None
        return Point(1 - kept / size, float(validation), accuracy)

    saved = time.monotonic()

    def on_check(state: sj.PruningState, check: sj.Check) -> None:
        nonlocal saved
        history.append(check)
        smaller = not curve or 1 - check.sparsity <= SMALLER * (1 - curve[-1].sparsity)
        if method.bounded and check.met_bound and smaller:
            curve.append(point(state.good, check.metric))
        now = time.monotonic()
        over = deadline is not None and now > deadline
        if folder is not None and (over or check.stopped or now > saved + CHECKPOINT):
            lines = [sj.check_to_json(each) for each in history]
            checkpoints.save(folder, check.check, state, {"history": lines, "curve": curve})
            saved = now
        if over:
            raise OutOfTime

    state, _ = sj.run_pruning(pruning, state, on_check=on_check, progress_bar=progress_bar)

    clock = time.perf_counter()
    record = state.good if method.bounded else state.current
    if method.bounded:
        curve.append(point(record, state.progress.good_metric))
    tune_epochs = round(settings.epochs * method.tune)
    if tune_epochs:
        falling = optax.cosine_decay_schedule(settings.learning_rate, tune_epochs * bench.epoch)
        tune_tx = sj.hold_zeros(method.tuner(falling))
        record, _ = sj.fine_tune(
            record,
            tune_tx,
            bench.trainer(tune_tx, bench.epoch),
            bench.validation,
            intervals=tune_epochs,
            view=trainer.variables,
        )
    return Run(
        record.params,
        mask_of(record),
        trainer.variables(record),
        before.trained.params,
        history,
        curve,
        point(before.trained),
        point(record),
        sum(check.seconds for check in history) + time.perf_counter() - clock,
    )


def mask_of(record: trainer.Record) -> Any:
    """The pruning mask that a record holds; all True for one without optimizer state."""
    if record.opt_state == ():
        return sj.full_mask(record.params)
    return sj.held_mask(record.params, record.opt_state)


def _rewinding(
    train: Callable[[trainer.Record], trainer.Record],
    tx: optax.GradientTransformation,
    before: experiment.Dense,
) -> Callable[[trainer.Record], trainer.Record]:
    """Each round starts from the early weights, those of the pruned entries zero."""

    def round_(record):
        mask = mask_of(record)
        if not float(sj.sparsity(mask)):
            return record
        early = before.early
        params, opt_state = sj.prune(tx, early.params, tx.init(early.params), mask)
        return train(
            record._replace(params=params, opt_state=opt_state, model_state=early.model_state)
        )

    return round_


def _gradients(bench: Experiment, record: trainer.Record) -> Any:
    """The gradients of the loss on 2,000 training images."""
    images, labels = (part[:2000] for part in bench.splits.train)

    @jax.jit
    def of_loss(params, images, labels):
        def loss(params):
            logits, _ = bench.network.forward(params, record.model_state, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        return jax.grad(loss)(params)

    return of_loss(record.params, images, labels)
