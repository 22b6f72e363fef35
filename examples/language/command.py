"""The command line that the language experiments share: runs, their records, what is shown."""

import argparse
import hashlib
import json
import shutil
import time
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from .. import checkpoints
from ..hardware import hardware
from ..methods import fingerprint
from . import experiment, sparsify
from .corpora import Corpus
from .experiment import BLEU, CHRF, Experiment, Scores, Settings
from .methods import METHODS, STRENGTHS
from .sparsify import Run

SHOWN = 0.75  # the sparsity whose outputs are kept, for the bootstrap and the sample page


def stem(bench: Experiment, method: str, seed: int) -> str:
    """What the files of a run are called."""
    return f"{experiment.name(bench)}-{method}-seed{seed}"


def recorded(
    out: Path, bench: Experiment, method: str, strength: float, seed: int
) -> dict[str, Any] | None:
    """The record of just this run, with these settings; None where there is none."""
    path = out / f"{stem(bench, method, seed)}.json"
    if not path.exists():
        return None
    record = json.loads(path.read_text())
    wanted = (bench.settings._asdict(), fingerprint(METHODS[method]), strength, bench.corpus.title)
    keys = ("settings", "fingerprint", "strength", "data")
    return record if tuple(record.get(key) for key in keys) == wanted else None


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

    Beside it, in ``OUT/outputs``, a line of JSON for each test pair: source, reference, what the
    dense network made of it, and the sparse one at :data:`SHOWN`.
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
    record = {
        "data": bench.corpus.title,
        "split": bench.corpus.note,
        "pairs": [len(bench.train_pairs.source), len(bench.test.references)],
        "padding": bench.train.padding(),
        "tokens": bench.tokenizer.vocab_size(),
        "parameters": done.parameters,
        "method": method,
        "fingerprint": fingerprint(row),
        "strength": strength,
        "seed": seed,
        "settings": settings._asdict(),
        "signatures": [str(BLEU.get_signature()), str(CHRF.get_signature())],
        "bound": done.bound,
        "dense_metric": done.dense_metric,
        "dense": _numbers(*done.dense),
        "points": [
            {
                "level": point.level,
                "sparsity": point.sparsity,
                "kinds": point.kinds,
                "metric": point.metric,
                "file_bytes": point.bytes,
                **_numbers(point.validation, point.test),
            }
            for point in done.points
        ],
        "curve": [
            [round(check.sparsity, 5), round(check.metric, 4), check.met_bound]
            for check in done.history
        ],
        "seconds": done.seconds,
        **hardware(),
    }
    _write_outputs(out / "outputs" / f"{name}.jsonl", bench, done)
    (out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    return record


def show(console: Console, record: dict[str, Any]) -> None:
    """Prints one run: the dense network, and each sparse one."""
    title = f"{record['data']}: {METHODS[record['method']].title}, seed {record['seed']}"
    table = Table(title=title)
    kinds = list(record["points"][0]["kinds"]) if record["points"] else []
    for column in ("sparsity, %", *kinds, "BLEU", "chrF", "loss", "validation BLEU"):
        table.add_column(column, justify="right")
    rows = [{"sparsity": 0.0, "kinds": dict.fromkeys(kinds, 0.0), **record["dense"]}]
    for row in rows + record["points"]:
        test = row["test"]
        table.add_row(
            f"{100 * row['sparsity']:.1f}",
            *(f"{100 * row['kinds'][kind]:.1f}" for kind in kinds),
            f"{test['bleu']:.2f}",
            f"{test['chrf']:.2f}",
            f"{test['loss']:.3f}",
            f"{row['validation']['bleu']:.2f}",
        )
    console.print(table)
    console.print(f"{record['parameters']:,} parameters; bound {record['bound']:.4g}")


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
    """
    parser = argparse.ArgumentParser(
        description=document.splitlines()[0],
        epilog="\n".join(document.splitlines()[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flags(parser)
    parser.add_argument("--method", nargs="+", default=["paper"], choices=METHODS)
    parser.add_argument("--strength", type=float, help="gamma of the one --method")
    parser.add_argument("--seed", nargs="+", type=int, default=[0])
    for name, changed in variants.items():
        said = ", ".join(f"{field} {value}" for field, value in changed.items())
        parser.add_argument(f"--{name}", action="store_true", help=said)
    parser.add_argument("--dense-only", action="store_true", help="the dense networks alone")
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument(
        "--resume",
        action="store_true",
        help="take up what was cut off, and leave what has a record (dense networks always stay)",
    )
    parser.add_argument("--minutes", type=float, help="stop with a checkpoint after so many")
    for name, hint in typing.get_type_hints(Settings).items():
        kind = next(kind for kind in (*typing.get_args(hint), hint) if kind is not type(None))
        flag, text = f"--{name.replace('_', '-')}", f"(default: {getattr(settings, name)})"
        if kind is bool:
            parser.add_argument(flag, action="store_true", default=None, help=text)
        else:
            parser.add_argument(flag, type=kind, help=text)
    options = parser.parse_args(arguments)
    if options.strength is not None and len(options.method) > 1:
        parser.error("--strength is one method's own number; give one --method with it.")
    given = {name: getattr(options, name) for name in settings._fields}
    changes = {name: value for name, value in given.items() if value is not None}
    chosen = [changed for name, changed in variants.items() if getattr(options, name)]
    for changed in (*chosen, changes):
        settings = settings._replace(**changed)
    deadline = None if options.minutes is None else time.monotonic() + 60 * options.minutes

    console = Console()
    try:
        bench = experiment.load(settings, corpus(options))
    except (ValueError, ImportError) as wrong:
        parser.error(str(wrong))
    source, target = bench.train.padding()
    console.print(
        f"{bench.corpus.title}: {bench.corpus.note}. {len(bench.train_pairs.source)} training"
        f" pairs in {len(bench.train.source)} rows, padding {source:.1%} and {target:.1%}."
    )
    records: list[dict[str, Any]] = []
    try:
        for seed in options.seed:
            if options.dense_only:
                _dense_only(console, bench, seed, options.out, deadline)
                continue
            for method in options.method:
                strength = options.strength if options.strength is not None else STRENGTHS[method]
                known = recorded(options.out, bench, method, strength, seed)
                if not (options.resume and known is not None):
                    known = run(
                        bench,
                        method,
                        strength,
                        seed,
                        options.out,
                        resume=options.resume,
                        deadline=deadline,
                    )
                records.append(known)
                show(console, known)
    except checkpoints.OutOfTime:
        console.print("The time is up: the same command with --resume goes on.")
    return records


def _dense_only(console, bench, seed, out, deadline):
    """Trains the dense network of a seed, for the choice of a size, and records what it reaches."""
    overdue = (lambda: False) if deadline is None else lambda: time.monotonic() > deadline
    folder = experiment.folder(out, bench) / f"dense-seed{seed}"
    dense = experiment.dense(bench, seed, folder, overdue, progress_bar=True)
    validation, test = sparsify.both(bench, dense.params)
    size = sum(leaf.size for leaf in jax.tree.leaves(dense.params))
    record = {
        "data": bench.corpus.title,
        "seed": seed,
        "settings": bench.settings._asdict(),
        "parameters": size,
        **_numbers(validation, test),
        **hardware(),
    }
    path = out / f"{experiment.name(bench)}-dense-width{bench.settings.width}-seed{seed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    console.print(
        f"width {bench.settings.width}, {size:,} parameters: test BLEU {test.bleu:.2f}, chrF"
        f" {test.chrf:.2f}, loss {test.loss:.3f}; validation BLEU {validation.bleu:.2f}"
    )


def _numbers(validation: Scores, test: Scores) -> dict[str, dict[str, float]]:
    def numbers(scores):
        return {
            "bleu": scores.bleu,
            "chrf": scores.chrf,
            "loss": scores.loss,
            "perplexity": scores.perplexity,
        }

    return {"validation": numbers(validation), "test": numbers(test)}


def _write_outputs(path: Path, bench: Experiment, done: Run) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    outputs = {"dense": done.dense[1].outputs}
    for point in done.points:
        if point.level == SHOWN:
            outputs["sparse"] = point.test.outputs
    columns = {"source": bench.test_pairs.source, "reference": bench.test.references, **outputs}
    with path.open("w") as file:
        for row in zip(*columns.values(), strict=True):
            print(json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False), file=file)
