r"""Ten test sentences with their references and what the dense and the sparse network wrote.

python -m examples.language.samples results/outputs/RUN.jsonl > results/samples.md
"""

import argparse
import json
from pathlib import Path
from typing import Any


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's outputs: source, reference and what the networks made of it."""
    # Not splitlines(), which also cuts at separators that JSON leaves within a text.
    with path.open(encoding="utf-8", newline="\n") as file:
        return [json.loads(line) for line in file]


def page(path: Path, number: int = 10) -> str:
    """Markdown: sentences at even distances in the file.

    Raises:
      ValueError: the file has fewer sentences, or no outputs of a sparse network.
    """
    lines = read(path)
    if len(lines) < number or "sparse" not in lines[0]:
        raise ValueError(
            f"{path}: has {len(lines)} sentences; {number} are needed, with the output of a sparse"
            " network (a run that did not come to 75 % has none)."
        )
    chosen = [lines[(2 * i + 1) * len(lines) // (2 * number)] for i in range(number)]
    parts = [f"# {path.stem}: {number} of {len(lines)} test sentences, evenly spaced"]
    for i, line in enumerate(chosen, 1):
        rows = [f"| {key} | {_cell(text)} |" for key, text in line.items()]
        parts.append("\n".join([f"## {i}", "", "| | |", "|---|---|", *rows]))
    return "\n\n".join(parts)


def _cell(text: str) -> str:
    for character in "\\`*_<>[]|$":
        text = text.replace(character, f"\\{character}")
    return text.replace("\n", " ")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("outputs", type=Path, help="OUT/outputs/RUN.jsonl")
    print(page(parser.parse_args(arguments).outputs))


if __name__ == "__main__":
    main()
