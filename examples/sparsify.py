"""One run: a method makes the network of a seed sparse, within the budget of its experiment."""

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import sparsereg_jax as sj

from . import checkpoints, experiment, trainer
from .checkpoints import OutOfTime
from .experiment import Dense, Experiment
from .methods import Augment, Method

ROUNDS = 8  # of a method that rewinds
SMALLER = 0.9  # a point of the curve has so much of the parameters of the point before, or less
TUNED = 0.06  # share of the budget for which a network at a level is tuned


class Point(NamedTuple):
    """A network on the way: a point of the trade-off curve."""

    sparsity: float  # share of all parameters that are zero
    validation: float  # accuracy
    test: float | None  # accuracy; None where it was not measured


class Tuned(NamedTuple):
    """A network on the way, tuned for itself."""

    point: Point
    network: Any  # its params, and running statistics beside them


class Run(NamedTuple):
    """What came out."""

    sparse: trainer.Record
    dense: trainer.Record
    mask: Any
    history: list[sj.Check]
    curve: list[Point]  # of networks that met the bound, sparser and sparser
    tuned: dict[float, Tuned]  # by level
    before: Point  # the dense network
    after: Point  # the end
    bound: float
    seconds: float  # of the loop and the tuning of its end
    tuned_seconds: float  # of the tuning at levels
    dense_seconds: float


def sparsify(
    bench: Experiment,
    method: Method,
    strength: float,
    seed: int,
    *,
    test: bool = True,
    levels: Sequence[float] = (),
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
      levels: sparsities, of a method with a bound: the first network that met it with so many zeros
        is tuned by Adam, its zeros kept; at 0 the dense one, once for all methods.
      folder: for the checkpoints of this run; the dense network's are beside it. A run that was cut
        off is taken up there. Levels need it.
      deadline: the ``time.monotonic()`` at which to save a checkpoint and stop.
      progress_bar: shows one.

    Returns:
      The run.

    Raises:
      OutOfTime: the deadline has passed.
      ValueError: the budget leaves no time for the loop, or levels have no folder.
      PruningError: (a ValueError) the dense network misses the bound.
    """

    def overdue() -> bool:
        return deadline is not None and time.monotonic() > deadline

    def point(record: trainer.Record, validation: Any = None) -> Point:
        variables = trainer.variables(record)
        if validation is None:
            validation = bench.validation(variables)
        accuracy = float(bench.test(variables)) if test else None
        return Point(float(sj.sparsity(mask_of(record))), float(validation), accuracy)

    interval, checks = _budget(bench, method)
    dense_folder = folder and folder.parent / f"dense-seed{seed}"
    at_levels = _tuning(bench, optax.adam, TUNED if levels else 0.0)
    places = _places(folder, levels, seed, at_levels.epochs)
    dense = experiment.dense(bench, seed, dense_folder, overdue)
    tuned, tuned_seconds = {}, 0.0

    def tune(level: float, network: Any) -> None:
        nonlocal tuned_seconds
        params = {"params": network["params"]}
        statistics = {name: tree for name, tree in network.items() if name != "params"}
        mask = jax.tree.map(lambda leaf: leaf != 0, params) if level else sj.full_mask(params)
        record = dense.trained._replace(params=params, model_state=statistics)
        record, seconds = _tuned(at_levels, record, mask, places[level], overdue)
        tuned[level] = Tuned(point(record), trainer.variables(record))
        tuned_seconds += seconds

    if 0 in levels:
        tune(0, trainer.variables(dense.trained))
    pruning, start = _loop(bench, method, strength, dense, interval, checks)
    state, history, curve = pruning.init(start), [], []
    reached: list[float] = []
    loop_folder = folder and folder / "loop"
    if loop_folder is not None and (found := checkpoints.restore(loop_folder, state)):
        _, state, log = found
        history = [sj.check_from_json(line) for line in log["history"]]
        curve, reached = [Point(*each) for each in log["curve"]], log.get("reached", [])
    saved = time.monotonic()

    def on_check(state: sj.PruningState, check: sj.Check) -> None:
        nonlocal saved
        history.append(check)
        smaller = not curve or 1 - check.sparsity <= SMALLER * (1 - curve[-1].sparsity)
        if method.bounded and check.met_bound:
            if smaller:
                curve.append(point(state.good, state.progress.good_metric))
            for level in newly_reached(levels, check.sparsity, (0, *reached)):
                sj.save_sparse(_good(places[level]), trainer.variables(state.good))
                reached.append(level)
        late = overdue()
        due = late or pruning.done(state) or time.monotonic() > saved + checkpoints.SECONDS
        if loop_folder is not None and due:
            lines = [sj.check_to_json(each) for each in history]
            log = {"history": lines, "curve": curve, "reached": reached}
            checkpoints.save(loop_folder, check.check, state, log)
            saved = time.monotonic()
        if late:
            raise OutOfTime

    state, _ = sj.run_pruning(pruning, state, on_check=on_check, progress_bar=progress_bar)
    record = state.current
    if method.bounded:
        record = state.good
        curve.append(point(record, state.progress.good_metric))
    record, tuning = _tuned(
        _tuning(bench, method.tuner, method.tune, method.augment),
        record,
        sj.held_mask(record.params, record.opt_state),
        folder and folder / "tuning",
        overdue,
    )
    for level in reached:
        like = trainer.variables(dense.trained)
        tune(level, sj.load_sparse(_good(places[level]), like=like)[0])
    return Run(
        record,
        dense.trained,
        mask_of(record),
        history,
        curve,
        tuned,
        point(dense.trained),
        point(record),
        float(state.progress.bound),
        sum(check.seconds for check in history) + tuning,
        tuned_seconds,
        dense.seconds,
    )


def check(bench: Experiment, method: Method, strength: float) -> None:
    """Finds what is wrong with the settings of a run before anything is trained.

    Raises:
      ValueError: the budget leaves no time for the loop, or a share is not between 0 and 1.
    """
    _, checks = _budget(bench, method)
    method.propose(strength, bench.settings.fraction, checks + method.rewind)


def newly_reached(
    levels: Iterable[float], sparsity: float, known: Collection[float]
) -> list[float]:
    """The levels that a sparsity comes to, by 0.2 points at most below, and that were not known."""
    return [level for level in levels if level not in known and sparsity >= level - 0.002]


def mask_of(record: trainer.Record) -> Any:
    """What a record keeps; everything for one without optimizer state.

    A proximal step makes zeros that no pruning has sealed: they count as zeros too.
    """
    if record.opt_state == ():
        return sj.full_mask(record.params)
    held = sj.held_mask(record.params, record.opt_state)
    return jax.tree.map(lambda keep, leaf: keep & (leaf != 0), held, record.params)


def _budget(bench: Experiment, method: Method) -> tuple[int, int]:
    """The steps between two checks of a method's loop, and how many checks there are."""
    settings = bench.settings
    epochs = settings.epochs - round(settings.epochs * method.tune)
    if method.at_start is None:
        epochs -= settings.dense_epochs
    steps = epochs * bench.epoch
    interval = steps // ROUNDS if method.rewind else settings.interval
    if not 0 < interval <= steps:
        raise ValueError(
            f"epochs: of {settings.epochs}, {settings.dense_epochs} are for the dense network and"
            f" {round(settings.epochs * method.tune)} for tuning, which leaves {steps} steps for"
            f" the loop: less than one interval of {interval}. Raise epochs or lower interval."
        )
    return interval, steps // interval


def _loop(
    bench: Experiment,
    method: Method,
    strength: float,
    dense: Dense,
    interval: int,
    checks: int,
) -> tuple[sj.IterativePruning, trainer.Record]:
    """A method's loop, and the record that it starts from."""
    settings = bench.settings
    rate: optax.ScalarOrSchedule = settings.learning_rate
    if method.cosine:
        length = interval if method.rewind else checks * interval
        rate = optax.cosine_decay_schedule(settings.learning_rate, length)
    tx = sj.hold_zeros(method.optimizer(rate, strength, bench.epoch))
    train = bench.trainer(tx, interval, method.smoothing)
    if method.rewind:
        # The first round is the dense training, which is done.
        train, checks = rewinding(train, tx, dense.early), checks + 1
    pruning = sj.iterative_pruning(
        tx,
        train,
        bench.validation,
        method.propose(strength, settings.fraction, checks),
        _bound(settings.bound) if method.bounded else 0.0,
        max_checks=checks,
        steps_per_check=interval,
        mask=sj.every_parameter,
        recovery=None if method.recovery is None else max(1, round(method.recovery * checks)),
        view=trainer.variables,
    )
    start = dense.trained if method.at_start is None else dense.initial
    params, opt_state = start.params, tx.init(start.params)
    if method.at_start is not None:
        mask = method.at_start(_gradients(bench, start), params, strength)
        params, opt_state = sj.prune(tx, params, opt_state, mask)
    start = start._replace(params=params, opt_state=opt_state)
    return pruning, start


def _bound(bound: float | None) -> Any:
    return sj.relative_bound(0.005) if bound is None else bound


def rewinding(
    train: Callable[[trainer.Record], trainer.Record],
    tx: optax.GradientTransformation,
    early: trainer.Record,
) -> Callable[[trainer.Record], trainer.Record]:
    """Each round starts from the early weights, those of the pruned entries zero."""

    def one_round(record: trainer.Record) -> trainer.Record:
        mask = sj.held_mask(record.params, record.opt_state)
        if not float(sj.sparsity(mask)):
            return record
        params, opt_state = sj.prune(tx, early.params, tx.init(early.params), mask)
        # A copy: train gives its argument's memory away, and the next round needs it again.
        model_state = jax.tree.map(jnp.copy, early.model_state)
        return train(record._replace(params=params, opt_state=opt_state, model_state=model_state))

    return one_round


def _places(
    folder: Path | None, levels: Sequence[float], seed: int, epochs: int
) -> dict[float, Path]:
    """A folder for the tuning at each level; the dense network's is beside those of all runs."""
    if not levels:
        return {}
    if folder is None:
        raise ValueError("folder: the networks at levels need one.")
    folder.mkdir(parents=True, exist_ok=True)
    places = {level: folder / f"tuning-{level:g}" for level in levels}
    return places | {0: folder.parent / f"tuned-dense-seed{seed}-{epochs}"}


def _good(place: Path) -> Path:
    """The file of the network that is tuned there."""
    return place.with_suffix(place.suffix + ".safetensors")


class _Tuning(NamedTuple):
    """Training on with the zeros kept, the learning rate falling to 0."""

    tx: optax.GradientTransformation
    train: Callable[[trainer.Record], trainer.Record]  # an epoch
    epochs: int


def _tuning(
    bench: Experiment,
    tuner: Callable[[optax.ScalarOrSchedule], optax.GradientTransformation],
    share: float,
    augment: Augment | None = None,
) -> _Tuning:
    if augment is not None:
        bench = bench._replace(network=bench.network._replace(augment=augment))
    epochs = round(bench.settings.epochs * share)
    rate = optax.cosine_decay_schedule(bench.settings.learning_rate, max(1, epochs * bench.epoch))
    tx = sj.hold_zeros(tuner(rate))
    # A trainer takes the images to the device, even if it is never called.
    train = bench.trainer(tx, bench.epoch) if epochs else lambda record: record
    return _Tuning(tx, train, epochs)


def _tuned(
    tuning: _Tuning,
    record: trainer.Record,
    mask: Any,
    folder: Path | None,
    overdue: Callable[[], bool],
) -> tuple[trainer.Record, float]:
    """The network trained on, and the seconds that it took."""
    params, opt_state = sj.prune(tuning.tx, record.params, tuning.tx.init(record.params), mask)
    record = record._replace(params=params, opt_state=opt_state)
    if not tuning.epochs:
        return record, 0.0
    return checkpoints.epochs(
        lambda record, epoch: tuning.train(jax.tree.map(jnp.copy, record)),
        record,
        tuning.epochs,
        folder,
        overdue,
    )


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
