r"""Puts the tables that the records give between the markers of README.md and results/*.md.

python -m examples.readme    # needs the extra [language]
"""

import argparse
import re
from pathlib import Path

import numpy as np
from tabulate import tabulate

from . import ablations, data, search, tables
from .experiment import EXPERIMENTS
from .figures import Records
from .language import tables as language

# What was to be reached: sparsity at a test error, in per cent.
GOALS = {
    "lenet300-mnist": ("LeNet-300-100, MNIST", 99.0, 1.85),
    "lenet5-mnist": ("LeNet-5, MNIST", 99.7, 0.80),
    "lenet5-fashion_mnist": ("LeNet-5, Fashion-MNIST", 99.7, 9.3),
}
SHOWN = {"default": "our recipe", "paper": "the paper's preset", "none": "no regularizer"}


def glance(experiments: dict[str, Records]) -> str:
    """A row an experiment with images: sparsity @ error, means over seeds, and the goal."""
    rows = []
    for name, records in experiments.items():
        title, *goal = GOALS[name]
        runs = records["default"]
        dense = np.mean([run["dense_test_error"] for run in runs])
        cells = [f"{dense:.2f}"]
        for method in SHOWN:
            sparsity, wrong = np.mean(
                [(100 * run["sparsity"], run["test_error"]) for run in records[method]], axis=0
            )
            cells.append(f"{sparsity:.2f} @ {wrong:.2f}")
        rows.append([title, *cells, f"{goal[0]:.2f} @ {goal[1]:.2f}"])
    headers = ["", "dense: error", *SHOWN.values(), "goal"]
    return tabulate(rows, headers, "github", disable_numparse=True)


def made(folder: Path) -> dict[str, str]:
    """Each table by the name of its markers.

    Raises:
      ValueError: records of an experiment are missing, or were made with different settings.
    """
    images = {experiment: tables.read(folder, experiment) for experiment in GOALS}
    for experiment, records in images.items():
        if missing := set(SHOWN) - set(records):
            raise ValueError(f"{folder} has no records of {sorted(missing)} for {experiment}.")
    found = {"images": glance(images)}
    for experiment, records in images.items():
        found[f"{experiment} table"] = tables.table(records)
        found[f"{experiment} on the way"] = tables.on_the_way(
            records, tables.ACCURACIES[experiment]
        )
        found[f"{experiment} at equal sparsity"] = tables.at_equal_sparsity(
            records, tables.SPARSITIES
        )
        found[f"{experiment} paired"] = tables.comparisons(records, tables.LEVELS)
        if searched := search.read(folder / f"search-{experiment}.jsonl"):
            found[f"{experiment} search"] = search.table(
                searched, EXPERIMENTS[experiment], data.HELD_OUT
            )
        lines = search.read(folder / f"ablations-{experiment}.jsonl")
        variants = ablations.VARIANTS[experiment]
        found[f"{experiment} ablations"] = ablations.table(variants, lines, records["default"])
        if experiment == "lenet300-mnist":
            few = {name: variants[name] for name in ablations.IN_SHORT}
            found[f"{experiment} ablations in short"] = ablations.table(
                few, lines, records["default"]
            )
    for corpus, by_method in language.read(folder).items():
        found[f"{corpus} by level"] = language.by_level(by_method)
        found[f"{corpus} in full"] = language.in_full(by_method)
        found[f"{corpus} bootstrap"] = language.bootstrap(folder, corpus, by_method)
    return found


def filled(text: str, found: dict[str, str]) -> str:
    """The text with each table between ``<!-- NAME -->`` and ``<!-- end of NAME -->``.

    Tables without markers are left out.

    Raises:
      ValueError: markers of a table that was not made, or not one of each, in this order.
    """
    for name in re.findall(r"<!-- (?:end of )?(.*?) -->", text):
        if name not in found:
            raise ValueError(f"<!-- {name} -->: there is no such table; there are {list(found)}.")
        before, start, rest = text.partition(f"<!-- {name} -->")
        within, end, after = rest.partition(f"<!-- end of {name} -->")
        if not end or f"{name} -->" in before + within + after:
            raise ValueError(f"<!-- {name} --> and <!-- end of {name} --> must be there once each.")
        text = f"{before}{start}\n{found[name]}\n{end}{after}"
    return text


def pages(root: Path) -> list[Path]:
    """The pages that have tables."""
    return [root / "README.md", root / "results" / "images.md", root / "results" / "language.md"]


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path(), help="folder of the README")
    options = parser.parse_args(arguments)
    found = made(options.root / "results")
    # All are filled before one is written: a marker that is wrong changes nothing.
    texts = {page: filled(page.read_text(encoding="utf-8"), found) for page in pages(options.root)}
    for page, text in texts.items():
        page.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
