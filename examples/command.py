"""The command line that the image experiments share: runs, their records, and what is shown."""

import argparse
import hashlib
import json
import re
import shutil
import sys
import time
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import sparsereg_jax as sj

from . import checkpoints, experiment, figures, sparsify, trainer
from .experiment import Experiment, Settings
from .hardware import hardware
from .methods import METHODS, Method, fingerprint, strength_of, with_own_bound


def stem(settings: Settings, method: str, seed: int) -> str:
    """What the files of a run are called."""
    dataset = re.sub(r"[/:]+", "-", settings.dataset)  # "emnist/letters"
    return f"{settings.network}-{dataset}-{method}-seed{seed}"


def recorded(
    out: Path,
    settings: Settings,
    method: str,
    strength: float,
    seed: int,
    title: str | None = None,
) -> dict[str, Any] | None:
    """The record of just this run, with these settings; None where there is none.

    ``title`` is that of the data, of which there may be copies: None where they are not loaded.
    """
    wanted: dict[str, Any] = {} if title is None else {"data": title}
    wanted |= {
        "settings": settings._asdict(),
        "fingerprint": fingerprint(METHODS[method]),
        "strength": strength,
    }
    if levels := experiment.levels(settings):
        wanted["levels"] = list(levels)
    return record_with(out / f"{stem(settings, method, seed)}.json", **wanted)


def record_with(path: Path, **wanted: Any) -> dict[str, Any] | None:
    """The record in a file, if there is one and it has these entries."""
    if not path.exists():
        return None
    record = json.loads(path.read_text())
    same = all(record.get(name) == value for name, value in wanted.items())
    return record if same else None


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
    report: bool = False,
) -> dict[str, Any]:
    """One run and its record, ``OUT/NETWORK-DATASET-METHOD-seedN.json``; see :mod:`.sparsify`.

    Beside it, in ``OUT/networks``, are the params, a picture, a line of JSON a check, and the
    params of networks that were tuned at levels.
    """
    settings, row = bench.settings, METHODS[method]
    levels = experiment.levels(settings) if row.bounded else ()
    identity = (settings, fingerprint(row), *([levels] if levels else []))
    digest = hashlib.sha256(repr(identity).encode()).hexdigest()[:8]
    folder = experiment.folder(out, bench) / f"{method}-{strength:g}-seed{seed}-{digest}"
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    done = sparsify.sparsify(
        bench,
        row,
        strength,
        seed,
        levels=levels,
        folder=folder,
        deadline=deadline,
        progress_bar=progress_bar,
    )
    params, model_state = done.sparse.params, done.sparse.model_state
    layers = sj.summary(params, done.mask)
    size, kept = sum(layer.size for layer in layers), sum(layer.kept for layer in layers)
    example = bench.splits.test.images[:1]

    def apply(params: Any, images: Any) -> Any:
        return bench.network.model.apply({**params, **model_state}, images)

    small = sj.compact(apply, params, example)
    name = stem(settings, method, seed)
    beside = out / "networks" / name
    beside.parent.mkdir(parents=True, exist_ok=True)
    network = beside.with_suffix(".safetensors")
    sj.save_sparse(network, trainer.variables(done.sparse))
    for level, found in done.tuned.items():
        sj.save_sparse(beside.with_name(f"{name}-{level:g}.safetensors"), found.network)
    lines = [sj.check_to_json(check) + "\n" for check in done.history]
    beside.with_suffix(".jsonl").write_text("".join(lines))
    record = {
        "experiment": f"{settings.network}-{settings.dataset}",
        "data": bench.splits.title,
        "method": method,
        "fingerprint": fingerprint(row),
        "strength": strength,
        "seed": seed,
        "settings": settings._asdict(),
        "bound": done.bound,
        "image_shape": list(example.shape[1:]),
        "sparsity": 1 - kept / size,
        "parameters": size,
        "kept": kept,
        "compression": size / max(1, kept),
        "validation_accuracy": done.after.validation,
        "dense_validation_accuracy": done.before.validation,
        "test_error": error(done.after),
        "dense_test_error": error(done.before),
        "compacted": {
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(small.params)),
            "widths": list(sj.new_widths(small.plan).values()),
        },
        "file_bytes": network.stat().st_size,
        "curve": [
            [round(point.sparsity, 6), point.validation, round(error(point), 3)]
            for point in done.curve
        ],
        "levels": list(experiment.levels(settings)),
        "tuned": {
            f"{level:g}": [point.sparsity, point.validation, round(error(point), 3)]
            for level, (point, _) in done.tuned.items()
        },
        "layers": [layer._asdict() for layer in layers],
        "checks": len(done.history),
        "seconds": done.seconds,
        "tuned_seconds": done.tuned_seconds,
        "dense_seconds": done.dense_seconds,
        **hardware(),
    }
    title = (
        f"{settings.network}, {bench.splits.title}, {row.title}, seed {seed}:"
        f" {record['sparsity']:.2%} sparse,"
        f" test error {record['test_error']:.2f} % ({record['dense_test_error']:.2f} % dense)"
    )
    figures.report(
        title, done.history, done.bound, done.dense.params, params, done.mask, example[0]
    ).savefig(beside.with_suffix(".png"))
    if report:
        sj.write_report(
            out / f"report-{name}",
            params,
            done.mask,
            title=title,
            dense=done.dense.params,
            fn=apply,
            inputs=(example,),
            history=done.history,
            bound=done.bound,
            compacted=small,
        )
    (out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    return record


def error(point: sparsify.Point) -> float:
    """Test error in per cent."""
    return 100 * (1 - (point.test or 0.0))


def show(console: Console, record: dict[str, Any]) -> None:
    """Prints one run: layer by layer, then the whole."""
    table = Table(title=f"{record['experiment']}, {record['method']}, seed {record['seed']}")
    for column in ("layer", "shape", "kept", "sparsity"):
        table.add_column(column, justify="left" if column in ("layer", "shape") else "right")
    for layer in record["layers"]:
        shape = str(tuple(layer["shape"]))
        table.add_row(layer["path"], shape, f"{layer['kept']:,}", f"{layer['sparsity']:.2%}")
    table.add_section()
    table.add_row(
        "all", f"{record['parameters']:,}", f"{record['kept']:,}", f"{record['sparsity']:.2%}"
    )
    console.print(table)
    console.print(
        f"test error: dense {record['dense_test_error']:.2f} %, sparse {record['test_error']:.2f} %"
        f"   compression: {record['compression']:.0f}x   time: {record['seconds']:.0f} s"
    )
    small = record["compacted"]
    console.print(
        f"compacted: {small['parameters']:,} of {record['parameters']:,} parameters"
        f" (widths {' - '.join(map(str, small['widths']))})\n"
        f"file: {record['file_bytes'] / 1e3:.1f} kB,"
        f" dense {4 * record['parameters'] / 1e3:.0f} kB\n"
    )


def summarize(console: Console, records: list[dict[str, Any]]) -> None:
    """Prints the mean over seeds of each method."""
    table = Table(title=f"{records[0]['experiment']}, mean over seeds")
    columns = ("method", "seeds", "sparsity", "test error", "dense test error", "seconds")
    for column in columns:
        table.add_column(column, justify="left" if column == "method" else "right")
    for method in dict.fromkeys(record["method"] for record in records):
        runs = [record for record in records if record["method"] == method]
        sparsity, test_error, dense_error, seconds = (
            float(np.mean([run[key] for run in runs]))
            for key in ("sparsity", "test_error", "dense_test_error", "seconds")
        )
        table.add_row(
            method,
            str(len(runs)),
            f"{sparsity:.2%}",
            f"{test_error:.2f} %",
            f"{dense_error:.2f} %",
            f"{seconds:.0f}",
        )
    console.print(table)


def main(
    network: str, dataset: str, description: str, arguments: list[str] | None = None
) -> list[dict[str, Any]]:
    """The command line of one network.

    Args:
      network: as in :class:`examples.experiment.Settings`.
      dataset: the one that is taken without a flag.
      description: the script's docstring.
      arguments: instead of the process's.

    Returns:
      The records.

    Raises:
      SystemExit: at the end where a run failed, with status 1; at once for a wrong option.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # The defaults of the other flags are those of the data set.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--dataset", default=dataset)
    settings = experiment.settings(network, first.parse_known_args(arguments)[0].dataset)
    parser.add_argument(
        "--dataset",
        default=dataset,
        help="digits, or a tensorflow-datasets name of images with labels (default: %(default)s)",
    )
    parser.add_argument(
        "--data-dir", help="where tensorflow-datasets keeps its data, or a file of examples.pack"
    )
    parser.add_argument("--method", nargs="+", default=["default"], choices=METHODS)
    parser.add_argument("--strength", type=float, help="the method's own number")
    parser.add_argument("--seed", nargs="+", type=int, default=[0])
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument(
        "--resume",
        action="store_true",
        help="take up what was cut off, and leave what has a record (dense networks always stay)",
    )
    parser.add_argument("--minutes", type=float, help="stop with a checkpoint after so many")
    parser.add_argument(
        "--report", action="store_true", help="write a page on each network into OUT/report-*"
    )
    add_flags(parser, settings, ("network", "dataset"))
    options = parser.parse_args(arguments)
    settings = experiment.settings(network, options.dataset)
    settings = settings._replace(**given(options, settings))
    if options.strength is not None:
        check_strength(parser, METHODS, options.method, options.strength)
    try:
        strengths = {
            method: strength_of(method, network, options.dataset)
            if options.strength is None
            else options.strength
            for method in options.method
        }
    except ValueError as wrong:
        parser.error(str(wrong))
    deadline = None if options.minutes is None else time.monotonic() + 60 * options.minutes

    console = Console()
    own = {
        method: settings if "bound" in options else with_own_bound(settings, method)
        for method in options.method
    }
    try:
        bench = experiment.load(settings, options.data_dir)
        for method in options.method:
            sparsify.check(bench, METHODS[method], strengths[method])
    except (ValueError, ImportError, OSError) as wrong:
        parser.error(str(wrong))
    records, failed = [], False
    try:
        for method in options.method:
            bench = bench._replace(settings=own[method])
            for seed in options.seed:
                title = bench.splits.title
                known = recorded(options.out, own[method], method, strengths[method], seed, title)
                if options.resume and known is not None:
                    records.append(known)
                    continue
                try:
                    record = run(
                        bench,
                        method,
                        strengths[method],
                        seed,
                        options.out,
                        resume=options.resume,
                        deadline=deadline,
                        report=options.report,
                    )
                except sj.PruningError as wrong:  # a dense network below the bound, say
                    console.print(f"{method}, seed {seed}: {wrong}", style="red")
                    failed = True
                    continue
                records.append(record)
                show(console, record)
    except checkpoints.OutOfTime:
        console.print("The time is up: the same command with --resume goes on.")
    if len(records) > 1:
        summarize(console, records)
    console.print(
        f"Records are in {options.out}/, networks and pictures in {options.out}/networks/."
    )
    if failed:
        sys.exit(1)
    return records


def add_flags(parser: argparse.ArgumentParser, settings: Any, without: Sequence[str] = ()) -> None:
    """A flag for each of the settings, a NamedTuple; see :func:`given`.

    What a flag is for is the text of the field's ``Annotated``.
    """
    for name, hint in typing.get_type_hints(type(settings), include_extras=True).items():
        if name in without:
            continue
        said = ""
        if typing.get_origin(hint) is typing.Annotated:
            hint, said = typing.get_args(hint)
            said = said.replace("%", "%%") + " "
        kinds = typing.get_args(hint) or (hint,)
        kind = next(kind for kind in kinds if kind is not type(None))
        flag, text = f"--{name.replace('_', '-')}", f"{said}(default: {getattr(settings, name)})"
        how: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text}
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **how)
        else:
            read = _or_none(kind) if type(None) in kinds else kind
            parser.add_argument(flag, type=read, metavar=name.upper(), **how)


def _or_none(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    read.__name__ = kind.__name__  # argparse names it: "invalid int value"
    return read


def given(options: argparse.Namespace, settings: Any) -> dict[str, Any]:
    """Those of the settings that flags were given for."""
    return {name: getattr(options, name) for name in settings._fields if name in options}


def check_strength(
    parser: argparse.ArgumentParser,
    methods: Mapping[str, Method],
    chosen: Sequence[str],
    strength: float,
) -> None:
    """Ends the program where a strength that was given is no method's own."""
    if len(chosen) > 1:
        parser.error("--strength is one method's own number; give one --method with it.")
    (name,) = chosen
    method = methods[name]
    if len(method.strengths) == 1 and strength not in method.strengths:
        parser.error(f"--strength: {name} has {method.strengths[0]:g} and no other.")
    if strength < 0 or (not method.bounded and not 0 < strength < 1):
        allowed = "at least 0" if method.bounded else "a sparsity, in (0, 1)"
        parser.error(f"--strength {strength:g}: of {name} it is {allowed}.")
