"""The command line that the language experiments share: runs, their records, what is shown."""

import argparse
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

import sparsereg_jax as sj

from .. import checkpoints
from ..command import add_flags, check_strength, given, record_with
from ..hardware import hardware
from ..methods import fingerprint
from . import experiment, sparsify
from .corpora import Corpus
from .experiment import Experiment, Scores, Settings
from .methods import METHODS, STRENGTHS
from .sparsify import Run

# What --quick changes.
QUICK = {
    "vocabulary": 500,
    "width": 64,
    "hidden": 128,
    "heads": 2,
    "dropout": 0.1,
    "batch": 4,
    "dense_epochs": 25,
    "loop_epochs": 20,
    "tune_epochs": 1,
    "interval": 125,
    "share": 0.9,
    "fraction": 0.2,
    "validation_pairs": 100,
    "learning_rate": 2e-3,
}

SHOWN = 0.75  # the sparsity whose outputs are kept, for the bootstrap and the sample page


def stem(bench: Experiment, method: str, seed: int) -> str:
    """What the files of a run are called."""
    return f"{experiment.name(bench)}-{method}-seed{seed}"


def recorded(
    out: Path, bench: Experiment, method: str, strength: float, seed: int
) -> dict[str, Any] | None:
    """The record of just this run, with these settings; None where there is none."""
    return record_with(
        out / f"{stem(bench, method, seed)}.json",
        settings=bench.settings._asdict(),
        fingerprint=fingerprint(METHODS[method]),
        strength=strength,
        digest=bench.digest,
    )


def run(
    bench: Experiment,
    method: str,
    strength: float,
    seed: int,
    out: Path,
    *,
    resume: bool = False,
    deadline: float | None = None,
    progress_bar: bool = True,
) -> dict[str, Any]:
    """One run and its record, ``OUT/CORPUS-METHOD-seedN.json``; see :mod:`.sparsify`.

    Beside it, in ``OUT/networks``, are the sparse networks, their tokens (for
    :mod:`examples.language.write`) and a line of JSON a check; in
    ``OUT/outputs`` a line of JSON for each test pair: source, reference, what the dense network
    made of it, and the sparse one at :data:`SHOWN`.

    Raises:
      OutOfTime: the ``time.monotonic()`` of ``deadline`` has passed.
      PruningError: the dense network misses the bound, or what the loop finds wrong.
    """
    settings, row = bench.settings, METHODS[method]
    identity = hashlib.sha256(repr((settings, fingerprint(row))).encode()).hexdigest()[:8]
    folder = experiment.folder(out, bench) / f"{method}-{strength:g}-seed{seed}-{identity}"
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    done = sparsify.sparsify(
        bench, row, strength, seed, folder, deadline=deadline, progress_bar=progress_bar
    )
    name = stem(bench, method, seed)
    networks = out / "networks"
    networks.mkdir(parents=True, exist_ok=True)
    record = {
        "data": bench.corpus.title,
        "digest": bench.digest,
        "split": bench.corpus.note,
        "pairs": [len(bench.train_pairs.source), len(bench.test.references)],
        "known_targets": bench.known,
        "padding": list(bench.train.padding()),
        "tokens": bench.tokenizer.vocab_size(),
        "parameters": done.parameters,
        "method": method,
        "fingerprint": fingerprint(row),
        "strength": strength,
        "seed": seed,
        "settings": settings._asdict(),
        "signatures": experiment.signatures(),
        "bound": done.bound,
        "dense_metric": done.dense_metric,
        "dense": _numbers(done.dense),
        "points": [
            {
                "level": point.level,
                "sparsity": point.sparsity,
                "kinds": point.kinds,
                "metric": point.metric,
                "file_bytes": point.file.stat().st_size,
                "tune_seconds": point.seconds,
                **_numbers(point.scores),
            }
            for point in done.points
        ],
        "curve": [
            [round(check.sparsity, 5), round(check.metric, 4), check.met_bound]
            for check in done.history
        ],
        "seconds": done.seconds,
        "dense_seconds": done.dense_seconds,
        **hardware(),
    }
    for point in done.points:
        shutil.move(point.file, networks / f"{name}-{point.level:g}.safetensors")
    (networks / f"{name}.model").write_bytes(bench.tokenizer.serialized_model_proto())
    lines = [sj.check_to_json(check) + "\n" for check in done.history]
    (networks / f"{name}.jsonl").write_text("".join(lines))
    _write_outputs(out / "outputs" / f"{name}.jsonl", bench, done)
    (out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    return record


def show(console: Console, record: dict[str, Any]) -> None:
    """Prints one run: the dense network, and each sparse one."""
    title = f"{record['data']}: {METHODS[record['method']].title}, seed {record['seed']}"
    table = Table(title=title)
    kinds = list(record["points"][0]["kinds"]) if record["points"] else []
    for column in ("sparsity, %", *kinds, "BLEU", "chrF", "loss", "validation loss"):
        table.add_column(column, justify="right")
    rows = [{"sparsity": 0.0, "kinds": dict.fromkeys(kinds, 0.0), **record["dense"]}]
    for row in rows + record["points"]:
        table.add_row(
            f"{100 * row['sparsity']:.1f}",
            *(f"{100 * row['kinds'][kind]:.1f}" for kind in kinds),
            f"{row['bleu']:.2f}",
            f"{row['chrf']:.2f}",
            f"{row['loss']:.3f}",
            f"{row['validation_loss']:.3f}",
        )
    console.print(table)
    console.print(
        f"{record['parameters']:,} parameters. In the loop: {record['settings']['metric']} of the"
        f" dense network {record['dense_metric']:.4g}, bound {record['bound']:.4g}."
    )
    if record["settings"]["metric"] == "bleu" and record["dense_metric"] < 1:
        console.print("The dense network cannot do its task: such a bound says nothing.")


def main(
    document: str,
    settings: Settings,
    variants: dict[str, dict[str, Any]],
    corpus: Callable[[argparse.Namespace], Corpus],
    flags: Callable[[argparse.ArgumentParser], None],
    arguments: list[str] | None = None,
) -> list[dict[str, Any]]:
    """The command line of one experiment.

    Args:
      document: that of its module.
      settings: the usual ones; each is a flag.
      variants: flags, and what each changes.
      corpus: from the options to the text.
      flags: adds those that say which text.
      arguments: instead of the process's own.

    Returns:
      The records.

    Raises:
      SystemExit: at the end where a run failed, with status 1; at once for a wrong option.
    """
    parser = argparse.ArgumentParser(
        description=document.splitlines()[0],
        epilog="\n".join(document.splitlines()[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flags(parser)
    parser.add_argument("--method", nargs="+", default=["paper"], choices=METHODS)
    parser.add_argument("--strength", type=float, help="gamma of the one --method")
    parser.add_argument(
        "--seed",
        nargs="+",
        type=int,
        default=[0],
        help="one process a seed at a time: its methods share a dense network",
    )
    for name, changed in variants.items():
        said = ", ".join(f"{field} {value}" for field, value in changed.items())
        parser.add_argument(f"--{name}", action="store_true", help=said)
    parser.add_argument("--dense-only", action="store_true", help="the dense networks alone")
    where = ", ".join(["results", *(f"results/{name} with --{name}" for name in variants)])
    parser.add_argument("--out", type=Path, help=f"for records (default: {where})")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="take up what was cut off, and leave what has a record (dense networks, and what"
        " tuning makes of them, always stay)",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        help="after so many, stop with a checkpoint at the next epoch, check or decoding",
    )
    add_flags(parser, settings)
    options = parser.parse_args(arguments)
    if options.strength is not None:
        check_strength(parser, METHODS, options.method, options.strength)
    chosen = [name for name in variants if getattr(options, name)]
    out = options.out or Path("results", *chosen[:1])  # those of a variant are kept apart
    for changed in (*(variants[name] for name in chosen), given(options, settings)):
        settings = settings._replace(**changed)
    deadline = None if options.minutes is None else time.monotonic() + 60 * options.minutes

    console = Console()
    try:
        bench = experiment.load(settings, corpus(options))
    except (ValueError, ImportError, OSError) as wrong:
        parser.error(str(wrong))
    source, target = bench.train.padding()
    console.print(
        f"{bench.corpus.title}: {bench.corpus.note}. {len(bench.train_pairs.source)} training"
        f" pairs in {len(bench.train.source)} rows, padding {source:.1%} and {target:.1%};"
        f" {bench.known:.1%} of the test targets are also among those of training."
    )
    records: list[dict[str, Any]] = []
    failed = False
    try:
        for seed in options.seed:
            if options.dense_only:
                _dense_only(console, bench, seed, out, deadline)
                continue
            for method in options.method:
                strength = STRENGTHS[method] if options.strength is None else options.strength
                record = recorded(out, bench, method, strength, seed) if options.resume else None
                try:
                    record = record or run(
                        bench,
                        method,
                        strength,
                        seed,
                        out,
                        resume=options.resume,
                        deadline=deadline,
                    )
                except sj.PruningError as wrong:  # a dense network below the bound, say
                    console.print(f"{method}, seed {seed}: {wrong}", style="red")
                    failed = True
                    continue
                records.append(record)
                show(console, record)
    except checkpoints.OutOfTime:
        console.print("The time is up: the same command with --resume goes on.")
    if failed:
        sys.exit(1)
    return records


def _dense_only(console, bench, seed, out, deadline):
    """Trains the dense network of a seed, for the choice of a size, and records what it reaches."""
    overdue = (lambda: False) if deadline is None else lambda: time.monotonic() > deadline
    folder = experiment.folder(out, bench) / f"dense-seed{seed}"
    dense, seconds = experiment.dense(bench, seed, folder, overdue, progress_bar=True)
    scores = experiment.scores(bench, dense.params)
    size = sum(leaf.size for leaf in jax.tree.leaves(dense.params))
    record = {
        "data": bench.corpus.title,
        "digest": bench.digest,
        "seed": seed,
        "settings": bench.settings._asdict(),
        "parameters": size,
        **_numbers(scores),
        "signatures": experiment.signatures(),
        "dense_seconds": seconds,
        **hardware(),
    }
    path = out / f"{experiment.name(bench)}-dense-width{bench.settings.width}-seed{seed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    console.print(
        f"width {bench.settings.width}, {size:,} parameters: BLEU {scores.bleu:.2f}, chrF"
        f" {scores.chrf:.2f}, loss {scores.loss:.3f}; on validation pairs, greedy, BLEU"
        f" {scores.validation_bleu:.2f}, loss {scores.validation_loss:.3f}"
    )


def _numbers(scores: Scores) -> dict[str, float]:
    return {name: number for name, number in scores._asdict().items() if name != "outputs"}


def _write_outputs(path: Path, bench: Experiment, done: Run) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    outputs = {"dense": done.dense.outputs}
    for point in done.points:
        if point.level == SHOWN:
            outputs["sparse"] = point.scores.outputs
    columns = {"source": bench.test_pairs.source, "reference": bench.test.references, **outputs}
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in zip(*columns.values(), strict=True):
            print(json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False), file=file)
