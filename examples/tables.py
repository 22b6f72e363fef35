r"""The records of the image experiments as tables and figures.

    python -m examples.tables    # tables to the screen; figures to results/

Means over seeds with 95 % intervals (Student's t); the comparison of the gate with I = 1 is paired
by seed. Reads results/NETWORK-DATASET-METHOD-seedN.json.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from scipy import stats

import sparsereg_jax as sj

from . import figures
from .experiment import EXPERIMENTS
from .figures import Records
from .methods import METHODS

# Of the second table: on validation images, at which methods are compared.
ACCURACIES = {
    "lenet300-mnist": (0.982, 0.98),
    "lenet5-mnist": (0.99, 0.988, 0.985, 0.98),
    "lenet5-fashion_mnist": (0.91, 0.905),
}

SPARSITIES = (0.9, 0.95, 0.97, 0.98, 0.99)  # of the table of errors at equal sparsity
LEVELS = (0.95, 0.97, 0.98, 0.99, 0.995)  # sparsities at which the gate is compared with I = 1
# Pairs that differ by the gate alone.
PAIRS = (("paper", "preset-l2"), ("gate", "l2"), ("paper", "l2"))


def read(folder: Path, experiment: str) -> Records:
    """The records of an experiment, methods in the order of their table, seeds in order.

    Raises:
      ValueError: the seeds of a method were run with different settings.
    """
    found: Records = {}
    for method in METHODS:
        paths = sorted(folder.glob(f"{experiment}-{method}-seed*.json"))
        if paths:
            records = [json.loads(path.read_text()) for path in paths]
            made_by = {
                (repr(r["settings"]), r["data"], r.get("fingerprint"), r["strength"])
                for r in records
            }
            if len(made_by) > 1:
                raise ValueError(
                    f"{folder}: the records of {experiment}-{method} were not made with the same"
                    f" data, settings and strength: {sorted(made_by)}. Keep others in a folder of"
                    " their own (--out)."
                )
            found[method] = sorted(records, key=lambda record: record["seed"])
    return found


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval; NaN for one value."""
    mean, number = float(np.mean(values)), len(values)
    if number < 2:
        return mean, float("nan")
    quantile = stats.t.ppf(0.975, number - 1)
    return mean, float(quantile * np.std(values, ddof=1) / np.sqrt(number))


def at_sparsity(record: dict[str, Any], sparsity: float) -> float:
    """Test error on a run's curve, linear between points in log(share kept); NaN outside it."""
    curve = sorted({point[0]: point[2] for point in record["curve"] if point[0] < 1}.items())
    shares = [share for share, _ in curve]
    if not shares or not shares[0] <= sparsity <= shares[-1]:
        return float("nan")
    kept = [-np.log(1 - share) for share in shares]
    return float(np.interp(-np.log(1 - sparsity), kept, [wrong for _, wrong in curve]))


def paired(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Mean difference ours - theirs, half its 95 % interval, and the p value of a paired t test."""
    differences = np.subtract(ours, theirs)
    mean, half = interval(list(differences))
    same = bool(np.all(differences == differences[0]))
    p = float("nan") if len(differences) < 2 or same else stats.ttest_rel(ours, theirs).pvalue
    return mean, half, float(p)


def table(records: Records) -> str:
    """A row a method, in Markdown."""
    lines = [
        "| method | number | seeds | sparsity, % | test error, % | dense, % | compacted |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for method, runs in records.items():
        sparsity = _pm([100 * run["sparsity"] for run in runs])
        wrong = _pm([run["test_error"] for run in runs])
        dense = np.mean([run["dense_test_error"] for run in runs])
        small = np.mean([run["compacted"]["parameters"] for run in runs])
        lines.append(
            f"| {METHODS[method].title} | {runs[0]['strength']:g} | {len(runs)} | {sparsity} |"
            f" {wrong} | {dense:.2f} | {small:,.0f} |"
        )
    return "\n".join(lines)


def on_the_way(records: Records, accuracies: Sequence[float]) -> str:
    """A row a method: of the curve, the sparsest network at least so accurate on validation images.

    Where the methods have different bounds this compares them at equal accuracy, before tuning.
    """
    heads = [f"validation ≥ {100 * accuracy:g} %" for accuracy in accuracies]
    lines = [
        "| sparsity, % @ test error, % | " + " | ".join(heads) + " |",
        "|---" * (1 + len(heads)) + "|",
    ]
    for method, runs in records.items():
        cells = []
        for accuracy in accuracies:
            # Accuracies are of float32: 0.905 is on record as 0.90499997. An image is 2e-4.
            least = accuracy - 1e-6
            met = [[point for point in run["curve"] if point[1] >= least] for run in runs]
            found = [max(points)[::2] for points in met if points]
            if not found:
                cells.append("-")
                continue
            sparsity, wrong = np.mean(found, axis=0)
            few = f" ({len(found)} runs)" if len(found) < len(runs) else ""
            cells.append(f"{100 * sparsity:.2f} @ {wrong:.2f}{few}")
        if any(cell != "-" for cell in cells):
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def at_equal_sparsity(records: Records, levels: Sequence[float]) -> str:
    """Test errors on the curves, before tuning: a row a method that has one, in Markdown."""
    lines = [
        "| test error, % | seeds | dense | " + " | ".join(f"{100 * s:g} %" for s in levels) + " |",
        "|---|---:" + "|---:" * (1 + len(levels)) + "|",
    ]
    for method, runs in records.items():
        cells = []
        for level in levels:
            found = [error for run in runs if np.isfinite(error := at_sparsity(run, level))]
            few = f" ({len(found)} runs)" if len(found) < len(runs) else ""
            cells.append(_pm(found) + few if found else "-")
        dense = f"{np.mean([run['dense_test_error'] for run in runs]):.2f}"
        if any(cell != "-" for cell in cells):
            lines.append(f"| {method} | {len(runs)} | {dense} | {' | '.join(cells)} |")
    return "\n".join(lines)


def at_levels(records: Records) -> str:
    """Networks tuned at levels of sparsity: a row a method, in Markdown; "" if there are none."""
    tuned = {
        method: [run["tuned"] for run in runs if run.get("tuned")]
        for method, runs in records.items()
    }
    levels = sorted({float(level) for runs in tuned.values() for run in runs for level in run})
    if not levels:
        return ""
    heads = [f"{100 * level:g} %" if level else "dense, tuned" for level in levels]
    lines = [
        "| sparsity, % @ test error, % | seeds | " + " | ".join(heads) + " |",
        "|---" * (2 + len(heads)) + "|",
    ]
    for method, runs in tuned.items():
        cells = []
        for level in levels:
            points = [run[f"{level:g}"] for run in runs if f"{level:g}" in run]
            if not points:
                cells.append("-")
                continue
            few = f" ({len(points)} runs)" if len(points) < len(runs) else ""
            sparsity = 100 * np.mean([point[0] for point in points])
            cells.append(f"{sparsity:.2f} @ {_pm([point[2] for point in points])}{few}")
        if runs:
            lines.append(f"| {method} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def comparisons(records: Records, levels: Sequence[float]) -> str:
    """The gate against I = 1 in the paper's loop, at each gamma that both were run with."""
    return "\n\n".join(
        comparison(records, levels, *pair)
        for pair in PAIRS
        if set(pair) <= records.keys()
        and records[pair[0]][0]["strength"] == records[pair[1]][0]["strength"]
    )


def comparison(records: Records, levels: Sequence[float], ours: str, theirs: str) -> str:
    """The gate against I = 1, paired by seed."""
    seeds = sorted(
        {run["seed"] for run in records[ours]} & {run["seed"] for run in records[theirs]}
    )
    if len(seeds) < 2:
        return f"{ours} and {theirs} have fewer than two seeds in common."
    gate, flat = (
        [run for run in records[method] if run["seed"] in seeds] for method in (ours, theirs)
    )
    lines = [
        f"`{ours}` minus `{theirs}`, gamma {gate[0]['strength']:g}, paired over {len(seeds)} seeds:"
        " mean ± 95 %, p of a row alone",
        "",
        "| | difference | p |",
        "|---|---:|---:|",
    ]

    def row(name, ours, theirs):
        mean, half, p = paired(ours, theirs)
        lines.append(f"| {name} | {mean:+.2f} ± {half:.2f} | {p:.2f} |")

    row(
        "at the same bound on validation accuracy: sparsity, points",
        [100 * run["sparsity"] for run in gate],
        [100 * run["sparsity"] for run in flat],
    )
    row(
        "at the same bound: kept weights, per cent (difference of logarithms)",
        [100 * float(np.log(run["kept"])) for run in gate],
        [100 * float(np.log(run["kept"])) for run in flat],
    )
    for level in levels:
        pairs = [
            (at_sparsity(a, level), at_sparsity(b, level)) for a, b in zip(gate, flat, strict=True)
        ]
        pairs = [pair for pair in pairs if np.isfinite(pair).all()]
        if len(pairs) > 1:
            both = f"{len(pairs)} of {len(seeds)} pairs reach it"
            name = f"at {100 * level:g} % sparsity ({both}): test error, points"
            row(name, *zip(*pairs, strict=True))
    return "\n".join(lines)


def _pm(values: Sequence[float]) -> str:
    mean, half = interval(values)
    return f"{mean:.2f}" + (f" ± {half:.2f}" if np.isfinite(half) else "")


def _masks(folder: Path, experiment: str, methods: Sequence[str]) -> dict[str, Any]:
    """The kept weights of those first networks whose files are there."""
    paths = {
        method: folder / "networks" / f"{experiment}-{method}-seed0.safetensors"
        for method in methods
        if method in figures.MAIN
    }
    return {
        method: jax.tree.map(lambda leaf: leaf != 0, sj.load_sparse(path)[0])
        for method, path in paths.items()
        if path.exists()
    }


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args(arguments)
    if not options.results.is_dir():
        parser.error(f"--results: there is no folder {options.results}.")
    for experiment in EXPERIMENTS:
        records = read(options.results, experiment)
        if not records:
            continue
        first = next(iter(records.values()))[0]
        print(f"\n## {first['settings']['network']}, {first['data']}\n")
        print(table(records), end="\n\n")
        if accuracies := ACCURACIES.get(experiment):
            print(on_the_way(records, accuracies), end="\n\n")
        print(at_equal_sparsity(records, SPARSITIES), end="\n\n")
        if tuned := at_levels(records):
            print(tuned, end="\n\n")
        print(comparisons(records, LEVELS))
        figure = figures.comparison(records, _masks(options.results, experiment, list(records)))
        figure.savefig(options.results / f"{experiment}.png")


if __name__ == "__main__":
    main()
