r"""The records of the language experiments as tables and figures.

    python -m examples.language.tables    # tables to the screen; figures to results/

Means over seeds; where there are several, the lowest and the highest in brackets. At 75 % sparsity
each network is compared with its dense one, and with that of no regularizer, by sacrebleu's paired
bootstrap. Reads results/CORPUS-METHOD-seedN.json and results/outputs.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sacrebleu
from matplotlib.figure import Figure
from sacrebleu.significance import PairedTest
from tabulate import tabulate

from .methods import METHODS
from .sparsify import KINDS, LEVELS

Records = dict[str, list[dict[str, Any]]]  # by method, a record a seed


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
    for corpus, methods in found.items():
        made_by = {repr(record["settings"]) for runs in methods.values() for record in runs}
        if len(made_by) > 1:
            raise ValueError(
                f"{folder}: the records of {corpus} were not made with the same settings. Keep"
                " other settings' records in a folder of their own (--out)."
            )
    return found


def by_level(records: Records) -> str:
    """Test BLEU: a row a method, a column a level of sparsity, in Markdown."""
    rows = [["dense", _runs(records), _spread(_dense(records, "bleu")), *[""] * (len(LEVELS) - 1)]]
    for method, runs in records.items():
        cells = [_spread([_at(run, level, "bleu") for run in runs]) for level in LEVELS]
        rows.append([METHODS[method].title, len(runs), *cells])
    headers = ["BLEU", "seeds", *(f"{level:.0%}" for level in LEVELS)]
    return tabulate(rows, headers, "github", disable_numparse=True)


def in_full(records: Records) -> str:
    """A row a method and level: metrics, and the sparsity of each kind of layer, in Markdown."""
    rows = []
    for method, runs in records.items():
        for level in LEVELS:
            points = [point for run in runs for point in run["points"] if point["level"] == level]
            if points:
                rows.append(
                    [
                        method,
                        f"{100 * np.mean([point['sparsity'] for point in points]):.1f}",
                        *(
                            f"{np.mean([point['test'][name] for point in points]):.{digits}f}"
                            for name, digits in (("bleu", 2), ("chrf", 2), ("loss", 3))
                        ),
                        f"{np.mean([point['validation']['perplexity'] for point in points]):.2f}",
                        *(
                            f"{100 * np.mean([point['kinds'][kind] for point in points]):.1f}"
                            for kind in KINDS
                        ),
                    ]
                )
    headers = ["method", "sparsity, %", "BLEU", "chrF", "loss", "validation perplexity", *KINDS]
    return tabulate(rows, headers, "github", disable_numparse=True)


def bootstrap(folder: Path, corpus: str, seeds: Sequence[int]) -> str:
    """At the level whose outputs are kept: each method against its dense network and "none"."""
    rows = []
    for seed in seeds:
        outputs = {}
        for method in METHODS:
            path = folder / "outputs" / f"{corpus}-{method}-seed{seed}.jsonl"
            if path.exists():
                lines = [json.loads(line) for line in path.read_text().splitlines()]
                if "sparse" in lines[0]:
                    outputs[method] = [line["sparse"] for line in lines]
                    outputs["dense"] = [line["dense"] for line in lines]
                    references = [line["reference"] for line in lines]
        for base in ("dense", "none"):
            others = [name for name in outputs if name not in ("dense", base)]
            if base in outputs and others:
                rows += [
                    [name, base, seed, *row]
                    for name, row in _compared(outputs, base, others, references)
                ]
    headers = ["method", "against", "seed", "BLEU", "difference", "p"]
    return tabulate(rows, headers, "github", disable_numparse=True)


def figure(records: Records) -> Figure:
    """Test BLEU against sparsity: a line a method, a band from the lowest to the highest seed."""
    picture = Figure(figsize=(8, 5), layout="constrained", dpi=110)
    axes = picture.subplots()
    axes.axhline(np.mean(_dense(records, "bleu")), color="0.6", linewidth=1, label="dense")
    for i, (method, runs) in enumerate(records.items()):
        found = []
        for level in LEVELS:
            points = [point for run in runs for point in run["points"] if point["level"] == level]
            if points:
                values = [point["test"]["bleu"] for point in points]
                sparsity = np.mean([point["sparsity"] for point in points])
                found.append((100 * sparsity, np.mean(values), min(values), max(values)))
        if found:
            sparsity, mean, lowest, highest = np.array(found).T
            axes.plot(sparsity, mean, "o-", color=f"C{i}", markersize=4, label=method)
            axes.fill_between(sparsity, lowest, highest, color=f"C{i}", alpha=0.15)
    axes.set_xlabel("sparsity: parameters that are zero, %")
    axes.set_ylabel("test BLEU (intl), beam search, after tuning")
    axes.set_title(next(iter(records.values()))[0]["data"])
    axes.legend(frameon=False)
    return picture


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


def _dense(records, metric):
    """Of each seed once: the methods of a seed start from the same network."""
    return list(
        {
            run["seed"]: run["dense"]["test"][metric] for runs in records.values() for run in runs
        }.values()
    )


def _runs(records):
    return len({run["seed"] for runs in records.values() for run in runs})


def _at(record, level, metric):
    found = [point["test"][metric] for point in record["points"] if point["level"] == level]
    return found[0] if found else float("nan")


def _spread(values):
    values = [value for value in values if np.isfinite(value)]
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
    for corpus, records in read(options.results).items():
        first = next(iter(records.values()))[0]
        print(f"\n## {first['data']}\n\n{by_level(records)}\n\n{in_full(records)}\n")
        seeds = sorted({run["seed"] for runs in records.values() for run in runs})
        print(bootstrap(options.results, corpus, seeds))
        figure(records).savefig(options.results / f"{corpus}.png")


if __name__ == "__main__":
    main()
