r"""The records of the language experiments as tables and figures.

    python -m examples.language.tables    # tables to the screen; figures to results/

Means over seeds; where there are several, in the first table the lowest and the highest in
brackets. At 75 % sparsity each network is compared with its dense one, and with that of no
regularizer, by sacrebleu's paired bootstrap. Reads results/CORPUS-METHOD-seedN.json and
results/outputs.
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sacrebleu
from matplotlib.figure import Figure
from sacrebleu.significance import PairedTest
from tabulate import tabulate

from . import samples
from .methods import METHODS
from .sparsify import KINDS, LEVELS

Records = dict[str, list[dict[str, Any]]]  # by method, a record a seed
# What a dense network's BLEU depends on besides its width, with hidden and heads, and the precision
# of products.
DENSE = (
    *("vocabulary", "layers", "dropout", "source_length", "target_length", "row", "batch"),
    *("dense_epochs", "train_pairs", "learning_rate", "warmup", "accumulate", "smoothing"),
    *("test_pairs", "beams", "penalty"),
)


def read(folder: Path) -> dict[str, Records]:
    """The records of each corpus, methods in the order of their table, seeds in order.

    Raises:
      ValueError: the records of a corpus were made with different settings.
    """
    found: dict[str, Records] = {}
    paths = [
        (method, path)
        for method in METHODS
        for path in sorted(folder.glob(f"*-{method}-seed*.json"))
    ]
    for method, path in paths:
        record = json.loads(path.read_text())
        if "points" in record:
            name = path.name.split(f"-{method}-seed")[0]
            found.setdefault(name, {}).setdefault(method, []).append(record)
    for methods in found.values():
        for runs in methods.values():
            runs.sort(key=lambda record: record["seed"])
    for corpus, methods in found.items():
        shared = {
            repr((record["settings"], record["digest"], record["fingerprint"].split(", ")[-1]))
            for runs in methods.values()
            for record in runs
        }
        own = {
            (method, record["fingerprint"], record["strength"])
            for method, runs in methods.items()
            for record in runs
        }
        if len(shared) > 1 or len(own) > len(methods):
            raise ValueError(
                f"{folder}: the records of {corpus} were not made with the same text, settings,"
                f" version and strengths: {sorted(own)}. Keep others in another folder (--out)."
            )
    return found


def by_level(records: Records) -> str:
    """Test BLEU at its sparsity: a row a method, a column a level that was reached, in Markdown.

    Where methods have different seeds, each set of seeds has rows of all methods that have them, so
    that like is compared with like.
    """
    levels = [level for level in LEVELS if any(_points(runs, level) for runs in records.values())]
    rows = []
    sets = {tuple(run["seed"] for run in runs) for runs in records.values()}
    for seeds in sorted(sets, key=lambda seeds: (-len(seeds), seeds)):
        for method, all_runs in records.items():
            runs = [run for run in all_runs if run["seed"] in seeds]
            if len(runs) < len(seeds):
                continue
            cells = [_spread([run["dense"]["bleu"] for run in runs])]
            for level in levels:
                points = _points(runs, level)
                few = "" if len(points) in (0, len(runs)) else f" ({len(points)} runs)"
                cells.append(_spread([point["bleu"] for point in points]) + few)
            title = f"{method}: {METHODS[method].title}"
            rows.append([title, ", ".join(map(str, seeds)), *cells])
    headers = ["BLEU", "seeds", "dense", *(f"{level:.0%}" for level in levels)]
    return tabulate(rows, headers, "github", disable_numparse=True)


def in_full(records: Records) -> str:
    """A row a method and level: metrics, and the sparsity of each kind of layer, in Markdown."""
    groups = [("dense", _dense(records))]
    groups += [(name, _points(runs, level)) for name, runs in records.items() for level in LEVELS]
    rows = []
    for name, points in groups:
        if points:
            shares = [100 * np.mean([p["sparsity"] for p in points])]
            shares += [100 * np.mean([p["kinds"][kind] for p in points]) for kind in KINDS]
            metrics = {key: np.mean([p[key] for p in points]) for key in ("bleu", "chrf", "loss")}
            rows.append(
                [
                    name,
                    len(points),
                    f"{shares[0]:.1f}",
                    f"{metrics['bleu']:.2f}",
                    f"{metrics['chrf']:.2f}",
                    f"{metrics['loss']:.3f}",
                    f"{np.exp(np.mean([p['validation_loss'] for p in points])):.2f}",
                    *(f"{share:.1f}" for share in shares[1:]),
                ]
            )
    headers = ["method", "runs", "sparsity, %", "BLEU", "chrF", "loss", "validation perplexity"]
    return tabulate(rows, [*headers, *KINDS], "github", disable_numparse=True)


def dense_alone(folder: Path) -> list[dict[str, Any]]:
    """The records of dense networks that were trained to choose a size (--dense-only)."""
    paths = sorted(folder.glob("*-dense-width*-seed*.json"))
    return [json.loads(path.read_text()) for path in paths]


def widths(folder: Path) -> str:
    """Those dense networks, a row each, in Markdown."""
    rows = []
    for record in dense_alone(folder):
        metrics = (f"{record[key]:.2f}" for key in ("validation_bleu", "bleu", "chrf"))
        width, size = record["settings"]["width"], record["parameters"]
        rows.append([width, f"{size:,}", record["data"], record["seed"], *metrics])
    headers = ["width", "parameters", "data", "seed", "validation BLEU, greedy", "BLEU", "chrF"]
    return tabulate(sorted(rows), headers, "github", disable_numparse=True) if rows else ""


def bootstrap(folder: Path, corpus: str, records: Records) -> str:
    """At the level whose outputs are kept: each method against its dense network and "none".

    Where a seed's dense network was trained anew, on another machine for instance, methods are
    compared with those that began from the same one.
    """
    rows = []
    for seed in sorted({run["seed"] for runs in records.values() for run in runs}):
        starts: dict[tuple[str, ...], dict[str, list[str]]] = {}
        for method, runs in records.items():
            path = folder / "outputs" / f"{corpus}-{method}-seed{seed}.jsonl"
            if any(run["seed"] == seed for run in runs) and path.exists():
                lines = samples.read(path)
                if "sparse" in lines[0]:
                    dense = tuple(line["dense"] for line in lines)
                    sparse = [line["sparse"] for line in lines]
                    starts.setdefault(dense, {})[method] = sparse
                    references = [line["reference"] for line in lines]
        for dense, outputs in starts.items():
            for base in ("dense", "none"):
                others = [name for name in outputs if name != base]
                if others and base in ("dense", *outputs):
                    known = outputs | {"dense": list(dense)}
                    rows += [
                        [name, base, seed, *row]
                        for name, row in _compared(known, base, others, references)
                    ]
    headers = ["method", "against", "seed", "BLEU", "difference", "p"]
    return tabulate(rows, headers, "github", disable_numparse=True)


def figure(records: Records, smaller: Sequence[dict[str, Any]] = ()) -> Figure:
    """Test BLEU and test loss against sparsity, less those of the dense network of the same seed.

    A line a method, a band from the lowest to the highest seed; the subtraction takes out what the
    dense networks of methods with different seeds differ by. Smaller dense networks of the same
    text, trained and decoded alike but for their width and the precision, stand where a sparse one
    has as many weights left, as far as the sparsest one goes; they are compared with the mean of
    the dense networks.
    """
    first = next(iter(records.values()))[0]
    picture = Figure(figsize=(11, 5), layout="constrained", dpi=110)
    furthest = max(
        (p["sparsity"] for runs in records.values() for run in runs for p in run["points"]),
        default=0.0,
    )
    shown = [
        (100 * sparsity, each)
        for each in smaller
        if each["digest"] == first["digest"]
        and all(each["settings"].get(name) == first["settings"].get(name) for name in DENSE)
        and 0 < (sparsity := 1 - each["parameters"] / first["parameters"]) <= furthest
    ]
    seeds = {tuple(run["seed"] for run in runs) for runs in records.values()}
    panels = {"bleu": "test BLEU", "loss": "test loss, nats a token"}
    for axes, (metric, title) in zip(picture.subplots(1, len(panels)), panels.items(), strict=True):
        axes.axhline(0, color="0.6", linewidth=1, label="dense")
        dense = np.mean([each[metric] for each in _dense(records)])
        for (sparsity, each), marker in zip(shown, itertools.cycle("x+1")):
            label = f"dense, width {each['settings']['width']}"
            if each["settings"]["bfloat16"] != first["settings"]["bfloat16"]:
                label += ", bfloat16" if each["settings"]["bfloat16"] else ", float32"
            axes.plot(sparsity, each[metric] - dense, "k" + marker, label=label)
        for i, (method, runs) in enumerate(records.items()):
            if curve := _curve(runs, metric):
                sparsity, mean, lowest, highest = np.array(curve).T
                of = ", ".join(str(run["seed"]) for run in runs)
                label = f"{method} (seed {of})" if len(seeds) > 1 else method
                axes.plot(sparsity, mean, "o-", color=f"C{i}", markersize=4, label=label)
                axes.fill_between(sparsity, lowest, highest, color=f"C{i}", alpha=0.12)
        axes.set_xlabel("sparsity: parameters that are zero, %")
        axes.set_ylabel(f"{title}, less the dense network's")
    picture.axes[0].legend(frameon=False)
    picture.suptitle(f"{first['data']}: beam search, after tuning")
    return picture


def _curve(runs, metric):
    """By level: sparsity, and mean, least and largest difference from the dense networks."""
    found = []
    for level in LEVELS:
        if points := _points(runs, level):
            dense = [run["dense"][metric] for run in runs for _ in _points([run], level)]
            values = np.subtract([point[metric] for point in points], dense)
            sparsity = np.mean([point["sparsity"] for point in points])
            found.append((100 * sparsity, np.mean(values), min(values), max(values)))
    return found


def _compared(outputs, base, others, references):
    names = [base, *others]
    scores: Any
    _, scores = PairedTest(
        [(name, outputs[name]) for name in names],
        {"BLEU": sacrebleu.metrics.BLEU(tokenize="intl")},
        [references],
        test_type="bs",
        n_samples=1000,
    )()
    first, *rest = scores["BLEU"]
    for name, result in zip(others, rest, strict=True):
        yield (
            name,
            (f"{result.score:.2f}", f"{result.score - first.score:+.2f}", f"{result.p_value:.3f}"),
        )


def _dense(records):
    """Each network that methods began from, once."""
    found = {
        (run["seed"], run["dense"]["bleu"]): run["dense"]
        for runs in records.values()
        for run in runs
    }
    none = {"sparsity": 0.0, "kinds": dict.fromkeys(KINDS, 0.0)}
    return [none | dense for dense in found.values()]


def _points(runs, level):
    return [point for run in runs for point in run["points"] if point["level"] == level]


def _spread(values):
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{np.mean(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args(arguments)
    print(widths(options.results))
    for corpus, records in read(options.results).items():
        first = next(iter(records.values()))[0]
        print(f"\n## {first['data']}\n\n{by_level(records)}\n\n{in_full(records)}\n")
        print(bootstrap(options.results, corpus, records))
        figure(records, dense_alone(options.results)).savefig(options.results / f"{corpus}.png")


if __name__ == "__main__":
    main()
