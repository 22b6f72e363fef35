"""One run: a method makes the Transformer of a seed sparse; networks on the way are tuned."""

import re
import time
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
from . import experiment
from .experiment import Experiment, Scores
from .methods import plain_adam

LEVELS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9)  # sparsities that are reported
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
    bytes: int  # of its sparse file
    validation: Scores
    test: Scores


class Run(NamedTuple):
    """What came out."""

    history: list[sj.Check]
    bound: float
    dense_metric: float
    dense: tuple[Scores, Scores]  # on validation and test pairs
    points: list[Point]
    parameters: int
    seconds: float  # of loop and tuning


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

    The paper's algorithm: from the dense network a loop of checks, Adam (0.85, 0.997) with a cosine
    over it; then a few epochs for each network without the regularizer, its zeros kept.

    Args:
      bench: the experiment.
      method: a row of the table of methods.
      strength: its gamma.
      seed: of the dense network, of the order of the rows and of what is dropped.
      folder: for the checkpoints of this run and its networks; the dense network's is beside it. A
        run that was cut off is taken up there.
      deadline: the ``time.monotonic()`` at which to save a checkpoint and stop.
      progress_bar: shows one.

    Returns:
      The run; the test pairs are looked at for the networks that are reported alone.

    Raises:
      OutOfTime: the deadline has passed.
    """

    def overdue() -> bool:
        return deadline is not None and time.monotonic() > deadline

    settings = bench.settings
    dense = experiment.dense(
        bench, seed, folder.parent / f"dense-seed{seed}", overdue, progress_bar
    )
    interval = max(1, settings.loop_epochs * bench.steps // settings.checks)
    updates = settings.checks * interval // settings.accumulate
    rate = optax.cosine_decay_schedule(settings.learning_rate, max(1, updates))
    steps_per_epoch = max(1, bench.steps // settings.accumulate)
    tx = experiment.accumulated(
        settings, sj.hold_zeros(method.optimizer(rate, strength, steps_per_epoch))
    )
    recovery = None
    if method.recovery is not None:
        recovery = max(1, round(method.recovery * settings.checks))
    pruning = sj.iterative_pruning(
        tx,
        experiment.make_trainer(bench, tx, interval),
        bench.metric,
        method.propose(strength, settings.fraction, settings.checks),
        settings.bound or (lambda dense_metric: settings.share * dense_metric),
        mode="max" if settings.metric == "bleu" else "min",
        max_checks=settings.checks,
        steps_per_check=interval,
        mask=sj.every_parameter,
        recovery=recovery,
    )
    start = trainer.start(dense.params, tx, len(bench.train.source), seed)
    state, history, metrics = pruning.init(start), [], {}
    loop_folder = folder / "loop"
    if found := checkpoints.restore(loop_folder, state):
        _, state, log = found
        history = [sj.check_from_json(line) for line in log["history"]]
        metrics = {float(level): metric for level, metric in log["metrics"].items()}
    saved = time.monotonic()

    def on_check(state: sj.PruningState, check: sj.Check) -> None:
        nonlocal saved
        history.append(check)
        for level in reached(state.good, metrics) if check.met_bound else ():
            metrics[level] = float(state.progress.good_metric)
            sj.save_sparse(_file(folder, "good", level), state.good.params)
        if overdue() or pruning.done(state) or time.monotonic() > saved + 60:
            lines = [sj.check_to_json(each) for each in history]
            checkpoints.save(
                loop_folder, check.check, state, {"history": lines, "metrics": metrics}
            )
            saved = time.monotonic()
        if overdue():
            raise OutOfTime

    folder.mkdir(parents=True, exist_ok=True)
    state, _ = sj.run_pruning(pruning, state, on_check=on_check, progress_bar=progress_bar)
    seconds = sum(check.seconds for check in history)
    points, tuning = [], _tuning(bench)
    for level in sorted(metrics):
        began = time.perf_counter()
        params = _tuned(bench, dense, tuning, folder, level, seed, overdue, progress_bar)
        seconds += time.perf_counter() - began
        points.append(_point(bench, params, _file(folder, "tuned", level), level, metrics[level]))
        if overdue():
            raise OutOfTime
    return Run(
        history,
        float(state.progress.bound),
        float(state.progress.dense_metric),
        both(bench, dense.params),
        points,
        sum(leaf.size for leaf in jax.tree.leaves(dense.params)),
        seconds,
    )


def reached(record: trainer.Record, known: dict[float, float]) -> list[float]:
    """The levels of sparsity that a network is the first to reach, by 0.2 points at most below."""
    sparsity = float(sj.sparsity(sj.held_mask(record.params, record.opt_state)))
    return [level for level in LEVELS if level not in known and sparsity >= level - 0.002]


def both(bench: Experiment, params: Any) -> tuple[Scores, Scores]:
    """On validation and test pairs."""
    return (
        experiment.scores(bench, params, bench.validation),
        experiment.scores(bench, params, bench.test),
    )


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
    done = _file(folder, "tuned", level)
    if done.exists():
        return sj.load_sparse(done, like=dense.params)[0]
    tx, train = tuning
    params, _ = sj.load_sparse(_file(folder, "good", level), like=dense.params)
    mask = jax.tree.map(lambda leaf: leaf != 0, params)
    params, opt_state = sj.prune(tx, params, tx.init(params), mask)
    record = trainer.start(params, tx, len(bench.train.source), seed + 1)
    record = checkpoints.epochs(
        lambda record, epoch: train(jax.tree.map(jnp.copy, record)),
        record._replace(opt_state=opt_state),
        bench.settings.tune_epochs * experiment.parts(bench),
        folder / f"tuning-{level:g}",
        overdue,
        f"tuning at {level:g}" if progress_bar else None,
    )
    sj.save_sparse(done, record.params)
    return record.params


def _point(bench, params, path, level, metric):
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    kept = sum(int(np.count_nonzero(leaf)) for leaf in jax.tree.leaves(params))
    return Point(
        level, 1 - kept / size, by_kind(params), metric, path.stat().st_size, *both(bench, params)
    )
