r"""Each method's own strength, chosen on validation images, by default at a third of the budget.

    python -m examples.search lenet300-mnist --data-dir DIR --epochs 86
    python -m examples.search lenet300-mnist --data-dir DIR --epochs 86 --method l1
    python -m examples.search lenet5-mnist --data-dir DIR --epochs 50 --method l2 --strength 3e-4

Seed 0, six strengths a method or more. A line a run goes to results/search-EXPERIMENT.jsonl; what
is there is not run again. The test images are never looked at. LeNet-300-100 takes 30 to 90 seconds
a run on one of two busy cores. What is printed at the end goes into STRENGTHS in
examples/methods.py. The paper's preset has one strength; our recipe's was tried at the full budget
(examples.ablations). On LeNet-5 a third of the budget has 30 checks, which at 8 % a time come to
92 % at most: search there at the full one (--epochs 50), eleven minutes a run.
"""

import argparse
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from . import experiment
from .command import check_strength
from .experiment import EXPERIMENTS, Experiment, Settings
from .methods import METHODS, Method, with_own_bound
from .sparsify import sparsify

# Neither the presets and `straight`, which have one strength, nor our other recipes, which go back.
SEARCHED = [
    name
    for name, method in METHODS.items()
    if method.recovery is None and len(method.strengths) > 1
]


def chosen(lines: list[dict[str, Any]], bound: float, validation: int) -> float:
    """The strength to go on with: the sparsest that meets the bound, or the most accurate.

    Of two that are equally sparse it is the stronger.

    Args:
      lines: the runs of one method.
      bound: the experiment's, which the network at the end must meet within one standard error.
      validation: images that the accuracy was measured on.

    Returns:
      Its strength.
    """
    lowest = bound - math.sqrt(bound * (1 - bound) / validation)
    met = [line for line in lines if line["validation"] >= lowest]
    if met:
        return max(met, key=lambda line: (line["sparsity"], line["strength"]))["strength"]
    return max(lines, key=lambda line: line["validation"])["strength"]


def read(path: Path) -> list[dict[str, Any]]:
    """The lines written so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(lines: list[dict[str, Any]], settings: Settings, validation: int) -> str:
    """A row a method, in Markdown: what each number came to, from the smallest, the chosen bold.

    Args:
      lines: the runs.
      settings: the experiment's, of which a method may have its own bound.
      validation: images that the accuracy was measured on.

    Returns:
      The table, sparsity and accuracy in per cent.

    Raises:
      ValueError: the runs of a method differ in budget, version or seed.
    """
    by_method: dict[str, list[dict[str, Any]]] = {}
    for line in sorted(lines, key=lambda line: line["strength"]):
        by_method.setdefault(line["method"], []).append(line)
    columns = max(map(len, by_method.values()), default=1)
    heads = ["method", "number: sparsity @ validation accuracy, %", *[""] * (columns - 1)]
    rows = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name in sorted(by_method, key=list(METHODS).index):
        if len({(run["epochs"], run["version"], run["seed"]) for run in by_method[name]}) > 1:
            raise ValueError(f"lines: those of {name!r} differ in epochs, version or seed.")
        bound = with_own_bound(settings, name).bound
        best = None if bound is None else chosen(by_method[name], bound, validation)
        cells = []
        for line in by_method[name]:
            number, reached = line["strength"], (line["sparsity"], line["validation"])
            cell = f"{number:g}: " + " @ ".join(f"{100 * part:.2f}" for part in reached)
            cells.append(f"**{cell}**" if number == best else cell)
        cells += [""] * (columns - len(cells))
        rows.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def explore(
    bench: Experiment,
    methods: Mapping[str, Method],
    runs: list[tuple[str, float, int]],
    path: Path,
    plain: Experiment | None = None,
) -> None:
    """Runs what is not in the file yet, never with a look at the test images.

    Args:
      bench: the experiment.
      methods: by name.
      runs: (method, strength, seed).
      path: a line of JSON a run is added to it; the dense networks are kept beside it.
      plain: the experiment whose dense networks the runs start from; None: ``bench`` itself.
    """
    epochs = bench.settings.epochs
    done = {
        (line["method"], line["strength"], line["seed"], line["epochs"], line["version"])
        for line in read(path)
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, strength, seed in (bar := tqdm(runs, unit="run")):
        method = methods[name]
        if (name, strength, seed, epochs, method.version) in done:
            continue
        bar.set_postfix_str(f"{name} {strength:g} seed {seed}")
        kept = experiment.folder(path.parent, bench)
        folder = kept / f"{path.stem}-{epochs}-{name}-{strength:g}-seed{seed}"
        shutil.rmtree(folder, ignore_errors=True)
        experiment.dense(plain or bench, seed, kept / f"dense-seed{seed}")
        out = sparsify(bench, method, strength, seed, test=False, folder=folder)
        shutil.rmtree(folder, ignore_errors=True)
        line = {
            "method": name,
            "strength": strength,
            "seed": seed,
            "epochs": epochs,
            "version": method.version,
            "sparsity": out.after.sparsity,
            "validation": out.after.validation,
            "dense_validation": out.before.validation,
            "curve": [[round(p.sparsity, 5), round(p.validation, 4)] for p in out.curve],
            "checks": len(out.history),
            "seconds": round(out.seconds, 1),
        }
        with path.open("a") as file:
            print(json.dumps(line), file=file)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--data-dir", help="where tensorflow-datasets keeps its data")
    parser.add_argument("--method", nargs="+", default=SEARCHED, choices=SEARCHED)
    parser.add_argument("--strength", nargs="+", type=float, help="for one --method: others")
    parser.add_argument("--epochs", type=int, help="in all (default: a third of the loop's)")
    parser.add_argument("--out", type=Path, default=Path("results"))
    options = parser.parse_args(arguments)
    for number in options.strength or ():
        check_strength(parser, METHODS, options.method, number)
    settings = EXPERIMENTS[options.experiment]
    loop = settings.epochs - settings.dense_epochs
    epochs = settings.dense_epochs + loop // 3 if options.epochs is None else options.epochs
    settings = settings._replace(epochs=epochs)
    path = options.out / f"search-{options.experiment}.jsonl"
    bench = experiment.load(settings, options.data_dir)
    for name in options.method:
        own = with_own_bound(settings, name)
        runs = [(name, number, 0) for number in options.strength or METHODS[name].strengths]
        explore(bench._replace(settings=own), METHODS, runs, path)
        run = (name, epochs, METHODS[name].version)
        lines = [
            line for line in read(path) if (line["method"], line["epochs"], line["version"]) == run
        ]
        if own.bound is not None:
            number = chosen(lines, own.bound, len(bench.splits.validation.labels))
            print(f"{name}: {number:g}")


if __name__ == "__main__":
    main()
