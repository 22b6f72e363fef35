r"""Puts the tables that the records in results/ give between the README's markers.

python -m examples.readme    # needs the extra [language]
"""

import argparse
import re
from pathlib import Path

from . import ablations, search, tables
from .language import tables as language


def made(folder: Path) -> dict[str, str]:
    """Each table by the name of its markers."""
    found = {}
    for experiment in ("lenet300-mnist", "lenet5-mnist", "lenet5-fashion_mnist"):
        records = tables.read(folder, experiment)
        found[f"{experiment} table"] = tables.table(records)
        found[f"{experiment} on the way"] = tables.on_the_way(
            records, tables.ACCURACIES[experiment]
        )
        found[f"{experiment} paired"] = tables.comparison(records, tables.LEVELS)
        lines = search.read(folder / f"ablations-{experiment}.jsonl")
        found[f"{experiment} ablations"] = ablations.table(
            ablations.VARIANTS[experiment], lines, records["default"]
        )
    for corpus, by_method in language.read(folder).items():
        found[f"{corpus} by level"] = language.by_level(by_method)
        found[f"{corpus} in full"] = language.in_full(by_method)
        seeds = sorted({run["seed"] for runs in by_method.values() for run in runs})
        found[f"{corpus} bootstrap"] = language.bootstrap(folder, corpus, seeds)
    return found


def filled(text: str, found: dict[str, str]) -> str:
    """The text with each table between ``<!-- NAME -->`` and ``<!-- end of NAME -->``.

    Tables that were not made stay as they are, and those without markers are left out.

    Raises:
      ValueError: a marker has no end.
    """
    for name, table in found.items():
        start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if start in text and end not in text:
            raise ValueError(f"the marker {start} has no {end} after it.")
        between = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
        text = between.sub(lambda _: f"{start}\n{table}\n{end}", text)  # noqa: B023
    return text


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args(arguments)
    text = options.readme.read_text(encoding="utf-8")
    text = filled(text, made(options.results))
    options.readme.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
