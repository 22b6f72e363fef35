"""What selective shrinkage, held zeros and exact masks cost, as ratios.

    python -m benchmarks.run
    python -m benchmarks.run --rounds 50 --out results/benchmarks.json

On whatever device JAX finds: about four minutes on two cores, shared ones. Needs 4 GB of memory.

- training step: a six-layer MLP of 25 million parameters, loss, gradient and optimizer;
- optimizer step: the optimizer alone, gradients given;
- exact masks: the smallest 80 % of the weights found by counting, against sorting them;
- LeNet-300-100 epoch: the example's own trainer on noise of MNIST's shape.

Each ratio is the median of the ratios of interleaved rounds, with their quartiles (``timing.py``).
Milliseconds are shown for accelerators alone: on a shared CPU only ratios say something.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

from examples.hardware import hardware

from . import lenet_epoch, masks, steps
from .timing import Row

COLUMNS = (
    "benchmark",
    "ours",
    "against",
    "ratio",
    "quartiles",
    "must",
    "goal",
    "ms",
    "temporaries, MiB",
)


def measure(rounds: int) -> list[Row]:
    """Runs everything, the params of one benchmark gone before the next."""
    return [
        *steps.training_step(rounds),
        *steps.optimizer_step(rounds),
        *masks.measure(rounds),
        *lenet_epoch.measure(rounds),
    ]


def on_cpu() -> bool:
    """Whether absolute times are not worth showing."""
    return jax.default_backend() == "cpu"


def cells(row: Row, milliseconds: bool) -> list[str]:
    """A row as text, in the order of ``COLUMNS``."""
    sign = "≥" if row.speedup else "≤"

    def limit(number: float | None) -> str:
        return "-" if number is None else f"{sign} {number:.{0 if row.speedup else 2}f}"

    def pair(ours: float | None, theirs: float | None, digits: int) -> str:
        if ours is None or theirs is None:
            return "-"
        return f"{ours:.{digits}f} / {theirs:.{digits}f}"

    mebibytes, against = (
        None if size is None else size / 2**20
        for size in (row.temporaries, row.against_temporaries)
    )
    # Three digits where two would hide that a limit is missed.
    digits = 1 if row.speedup else 2
    if not row.speedup and any(
        limit is not None and round(row.ratio, 2) <= limit < row.ratio
        for limit in (row.must, row.goal)
    ):
        digits = 3
    low, high = row.quartiles
    return [
        row.benchmark,
        row.ours,
        row.against,
        f"{row.ratio:.{digits}f}" + (" times faster" if row.speedup else ""),
        f"{low:.{digits}f} to {high:.{digits}f}",
        limit(row.must),
        limit(row.goal),
        pair(row.milliseconds, row.against_milliseconds, 2) if milliseconds else "",
        pair(mebibytes, against, 1),
    ]


def meets(row: Row, limit: float | None) -> bool:
    """Whether the ratio keeps a limit."""
    if limit is None:
        return True
    return row.ratio >= limit if row.speedup else row.ratio <= limit


def show(console: Console, rows: list[Row], title: str, milliseconds: bool) -> None:
    """Prints the table: green where the goal is met, red where what must be is not."""
    table = Table(title=title)
    shown = [i for i, column in enumerate(COLUMNS) if milliseconds or column != "ms"]
    for i in shown:
        table.add_column(COLUMNS[i], justify="left" if i < 3 else "right")
    previous = None
    for row in rows:
        if previous not in (None, row.benchmark):
            table.add_section()
        previous = row.benchmark
        text = cells(row, milliseconds)
        if not meets(row, row.must):
            text[3] = f"[red]{text[3]}[/red]"
        elif meets(row, row.goal):
            text[3] = f"[green]{text[3]}[/green]"
        table.add_row(*(text[i] for i in shown))
    console.print(table)


def markdown(rows: list[Row], milliseconds: bool) -> str:
    """The same table for a README."""
    lines = [COLUMNS, ["---"] * 3 + ["---:"] * (len(COLUMNS) - 3)]
    lines += [cells(row, milliseconds) for row in rows]
    shown = [i for i, column in enumerate(COLUMNS) if milliseconds or column != "ms"]
    return "\n".join("| " + " | ".join(line[i] for i in shown) + " |" for line in lines)


def main(arguments: list[str] | None = None) -> list[Row]:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, help="(default: results/benchmarks-DEVICE.json)")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")

    record = hardware()
    slug = re.sub(r"[^a-z0-9]+", "-", record["device"].lower()).strip("-")
    out = options.out or Path("results") / f"benchmarks-{slug}.json"
    rows = measure(options.rounds)
    out.parent.mkdir(parents=True, exist_ok=True)
    record |= {"rounds": options.rounds, "rows": [row._asdict() for row in rows]}
    out.write_text(json.dumps(record, indent=1) + "\n")

    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    title = f"{record['device']}, {record['cores']} cores, {versions}, {options.rounds} rounds"
    console = Console(width=None if sys.stdout.isatty() else 160)
    show(console, rows, title, milliseconds=not on_cpu())
    console.print("Green: the goal is met. Red: what must be is not.\n")
    print(markdown(rows, milliseconds=not on_cpu()))
    console.print(f"\nThe record is in {out}.")
    return rows


if __name__ == "__main__":
    main()
