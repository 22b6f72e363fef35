"""One run: a method makes the Transformer of a seed sparse; networks on the way are tuned."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparsereg_jax as sj

from .. import checkpoints, trainer
from ..checkpoints import OutOfTime
from ..methods import Method
from ..sparsify import newly_reached
from . import experiment
from .experiment import Experiment, Scores
from .methods import plain_adam

# Sparsities that are reported; at 0 it is the dense network: what the tuning itself does.
LEVELS = (0.0, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9)
KINDS = {
    "attention": r".*attention/.*",
    "feed-forward": r".*/(up|down)/.*",
    "embeddings": r".*(embedding|positions)/.*",
    "normalization": r".*norm/.*",
}


class Point(NamedTuple):
    """A network on the way: the first that met the bound with so many zeros, tuned."""

    level: float
    sparsity: float  # share of all parameters that are zero
    kinds: dict[str, float]  # sparsity of each kind of layer
    metric: float  # in the loop
    file: Path  # its params, sparse
    scores: Scores
    seconds: float  # of tuning


class Run(NamedTuple):
    """What came out."""

    history: list[sj.Check]
    bound: float
    dense_metric: float
    dense: Scores
    points: list[Point]
    parameters: int
    seconds: float  # of the loop
    dense_seconds: float  # of training the dense network


def sparsify(
    bench: Experiment,
    method: Method,
    strength: float,
    seed: int,
    folder: Path,
    *,
    deadline: float | None = None,
    progress_bar: bool = False,
) -> Run:
    """Trains the dense network of a seed, prunes it, and tunes the networks that are reported.

    The paper's algorithm: from the dense network a loop of checks, Adam (0.85, 0.997), its learning
    rate that of :func:`loop_schedule`; then a few epochs for each network without the regularizer,
    its zeros kept.

    Args:
      bench: the experiment.
      method: a row of the table of methods.
      strength: its gamma.
      seed: of the dense network, of the order of the rows and of what is dropped.
      folder: for the checkpoints of this run and its networks; those of the dense network and of
        its tuning are beside it. A run that was cut off is taken up there.
      deadline: the ``time.monotonic()`` at which to save a checkpoint and stop.
      progress_bar: shows one.

    Returns:
      The run; the test pairs are looked at for the networks that are reported alone.

    Raises:
      OutOfTime: the deadline has passed.
      PruningError: (a ValueError) the dense network misses the bound.
    """

    def overdue() -> bool:
        return deadline is not None and time.monotonic() > deadline

    settings = bench.settings
    dense, dense_seconds = experiment.dense(
        bench, seed, folder.parent / f"dense-seed{seed}", overdue, progress_bar
    )
    interval = settings.accumulate * -(-settings.interval // settings.accumulate)
    checks = max(1, settings.loop_epochs * bench.steps // interval)
    rate = loop_schedule(settings, checks * interval // settings.accumulate)
    steps_per_epoch = max(1, bench.steps // settings.accumulate)
    tx = experiment.accumulated(
        settings, sj.hold_zeros(method.optimizer(rate, strength, steps_per_epoch))
    )
    pruning = sj.iterative_pruning(
        tx,
        experiment.make_trainer(bench, tx, interval),
        lambda params: experiment.metric(bench, params),
        method.propose(strength, settings.fraction, checks),
        _bound(settings),
        mode="max" if settings.metric == "bleu" else "min",
        max_checks=checks,
        steps_per_check=interval // settings.accumulate,
        mask=sj.every_parameter,
        recovery=None if method.recovery is None else max(1, round(method.recovery * checks)),
        stop_when_worsening=settings.patience,
    )
    start = dense._replace(opt_state=tx.init(dense.params))  # its order and random key go on
    state, history = pruning.init(start), []
    metrics = {0.0: float(state.progress.dense_metric)}
    loop_folder = folder / "loop"
    if found := checkpoints.restore(loop_folder, state):
        _, state, log = found
        history = [sj.check_from_json(line) for line in log["history"]]
        metrics = {float(level): metric for level, metric in log["metrics"].items()}
    else:
        folder.mkdir(parents=True, exist_ok=True)
    saved = time.monotonic()

    def on_check(state: sj.PruningState, check: sj.Check) -> None:
        nonlocal saved
        history.append(check)
        for level in reached(state.good, metrics) if check.met_bound else ():
            metrics[level] = float(state.progress.good_metric)
            sj.save_sparse(_file(folder, "good", level), state.good.params)
        late = overdue()
        if late or pruning.done(state) or time.monotonic() > saved + checkpoints.SECONDS:
            lines = [sj.check_to_json(each) for each in history]
            checkpoints.save(
                loop_folder, check.check, state, {"history": lines, "metrics": metrics}
            )
            saved = time.monotonic()
        if late:
            raise OutOfTime

    state, _ = sj.run_pruning(pruning, state, on_check=on_check, progress_bar=progress_bar)
    tuning = _tuning(bench)
    # The dense network is trained on like the others, once for all methods.
    how = f"{settings.tune_epochs}-{_decoding(settings)}"
    of_dense = folder.parent / f"tuned-dense-seed{seed}-{how}"
    of_dense.mkdir(exist_ok=True)
    if not _file(of_dense, "good", 0.0).exists():  # a run may be taken up again and again
        sj.save_sparse(_file(of_dense, "good", 0.0), dense.params)
    what = {"settings": settings._asdict(), "dialogue": bool(bench.corpus.symbols)}
    points = []
    for level in sorted(metrics):
        place = folder if level else of_dense
        params, seconds = _tuned(bench, dense, tuning, place, level, seed, overdue, progress_bar)
        file = _file(folder, "tuned", level)
        sj.save_sparse(file, params, metadata=what)
        scored = _scored(bench, params, place / f"scores-{level:g}.json", overdue)
        size, kept = (
            sum(int(count(leaf)) for leaf in jax.tree.leaves(params))
            for count in (np.size, np.count_nonzero)
        )
        points.append(
            Point(level, 1 - kept / size, by_kind(params), metrics[level], file, scored, seconds)
        )
    return Run(
        history,
        float(state.progress.bound),
        float(state.progress.dense_metric),
        _scored(bench, dense.params, _dense_scores(bench, folder.parent, seed), overdue),
        points,
        sum(leaf.size for leaf in jax.tree.leaves(dense.params)),
        sum(check.seconds for check in history),
        dense_seconds,
    )


def loop_schedule(settings: experiment.Settings, updates: int) -> optax.Schedule:
    """The rate r / 2 (1 + cos(pi c t / T)) at update t of T; r and c are settings.

    Where the loop goes back, so does the count of updates: it then ends above the lowest rate.
    """
    if settings.cosine == 0:
        return optax.constant_schedule(settings.learning_rate)
    return optax.cosine_decay_schedule(settings.learning_rate, round(updates / settings.cosine))


def _bound(settings: experiment.Settings) -> Any:
    if settings.bound is not None:
        return settings.bound
    if settings.metric == "bleu":
        return lambda dense_metric: settings.share * dense_metric
    return lambda dense_metric: dense_metric / settings.share if settings.share else float("inf")


def _dense_scores(bench: Experiment, shared: Path, seed: int) -> Path:
    """The dense network is decoded once for all methods, as long as the decoding is the same."""
    return shared / f"scores-dense-seed{seed}-{_decoding(bench.settings)}.json"


def _decoding(settings: experiment.Settings) -> str:
    how = (settings.beams, settings.penalty, settings.validation_pairs, settings.test_pairs)
    return "-".join(map(str, how))


def _scored(bench: Experiment, params: Any, path: Path, overdue: Callable[[], bool]) -> Scores:
    """Scores are kept in a file: the test pairs are decoded once, however often a run is cut."""
    if path.exists():
        return Scores(**json.loads(path.read_text()))
    if overdue():
        raise OutOfTime
    scored = experiment.scores(bench, params)
    path.write_text(json.dumps(scored._asdict()))
    return scored


def reached(record: trainer.Record, known: dict[float, float]) -> list[float]:
    """The levels of sparsity that a network is the first to reach, by 0.2 points at most below."""
    sparsity = float(sj.sparsity(sj.held_mask(record.params, record.opt_state)))
    return newly_reached(LEVELS, sparsity, known)


def by_kind(params: Any) -> dict[str, float]:
    """The share of zeros in each kind of layer."""
    shares = {}
    rows = sj.summary(params, jax.tree.map(lambda leaf: leaf != 0, params))
    for kind, pattern in KINDS.items():
        size, kept = np.sum(
            [(row.size, row.kept) for row in rows if re.fullmatch(pattern, row.path)], axis=0
        )
        shares[kind] = float(1 - kept / size)
    return shares


def _file(folder: Path, stage: str, level: float) -> Path:
    return folder / f"{stage}-{level:g}.safetensors"


def _tuning(bench):
    """Optimizer and trainer of an epoch without the regularizer, the same for all networks."""
    settings = bench.settings
    updates = max(1, settings.tune_epochs * bench.steps // settings.accumulate)
    rate = optax.cosine_decay_schedule(settings.learning_rate, updates)
    tx = experiment.accumulated(settings, sj.hold_zeros(plain_adam(rate)))
    return tx, experiment.make_trainer(bench, tx, bench.steps // experiment.parts(bench))


def _tuned(bench, dense, tuning, folder, level, seed, overdue, progress_bar):
    """A network trained on, its zeros kept; by epochs, as the dense one."""
    tx, train = tuning
    params, _ = sj.load_sparse(_file(folder, "good", level), like=dense.params)
    mask = jax.tree.map(lambda leaf: leaf != 0, params) if level else sj.full_mask(params)
    params, opt_state = sj.prune(tx, params, tx.init(params), mask)
    record = trainer.start(params, tx, len(bench.train.source), 10_000 + seed)
    record, seconds = checkpoints.epochs(
        lambda record, epoch: train(jax.tree.map(jnp.copy, record)),
        record._replace(opt_state=opt_state),
        bench.settings.tune_epochs * experiment.parts(bench),
        folder / f"tuning-{level:g}",
        overdue,
        f"tuning at {level:g}" if progress_bar else None,
    )
    return record.params, seconds
