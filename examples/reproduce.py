r"""All image experiments: every run, then the tables. Resumable; what is there is not run again.

    python -m examples.reproduce --data-dir DIR                  # twelve hours of a busy core
    python -m examples.reproduce --data-dir DIR --part 0 2 &     # or two at once, even
    python -m examples.reproduce --data-dir DIR --part 1 2       # and odd seeds
    python -m examples.reproduce --data-dir DIR --five-seeds     # all of them, for a GPU

The tables of results/images.md are what to expect. Runs are taken in an order in which they fill
evenly. The strengths are those written in examples/methods.py; this command does not choose anew.
--five-seeds runs every method that has one.
"""

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console

import sparsereg_jax as sj

from . import checkpoints, command, experiment, tables
from .experiment import EXPERIMENTS
from .methods import METHODS, STRENGTHS, with_own_bound

FEW = ("default", "longer", "ready-made", "paper", "l2", "none")
SMALL = STRENGTHS["lenet300-mnist"]
FIVE = ("default", "ready-made", "paper", "preset-l2", "gate", "l2", "none")  # with five seeds
# Experiment, methods, seeds: on two cores.
PLAN = [
    ("lenet300-mnist", FIVE, 5),
    ("lenet300-mnist", tuple(name for name in SMALL if name not in FIVE), 2),
    ("lenet5-mnist", (*FEW, "larger-first"), 3),
    ("lenet5-mnist", ("shifted",), 5),
    ("lenet5-fashion_mnist", (*FEW, "preset-l2"), 3),
    ("lenet5-fashion_mnist", ("higher-rate", "straight"), 5),
]


def runs(five_seeds: bool) -> list[tuple[str, str, int]]:
    """Experiment, method and seed of every run, first seeds first."""
    if five_seeds:
        plan = [(name, tuple(STRENGTHS[name]), 5) for name in EXPERIMENTS if "digits" not in name]
    else:
        plan = PLAN
    found = [
        (name, method, seed)
        for name, methods, seeds in plan
        for seed in range(seeds)
        for method in methods
    ]
    return sorted(found, key=lambda run: run[2])


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="where tensorflow-datasets keeps its data")
    parser.add_argument("--experiment", nargs="+", default=list(EXPERIMENTS), choices=EXPERIMENTS)
    parser.add_argument("--method", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--five-seeds", action="store_true", help="every method with five seeds")
    parser.add_argument("--part", nargs=2, type=int, default=(0, 1), metavar=("I", "N"))
    parser.add_argument("--minutes", type=float, help="stop with a checkpoint after so many")
    parser.add_argument("--out", type=Path, default=Path("results"))
    options = parser.parse_args(arguments)
    deadline = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    console = Console()
    part, parts = options.part
    if not 0 <= part < parts:
        parser.error(f"--part {part} {parts}: I is from 0 to N - 1.")
    planned = [
        (name, method, seed)
        for name, method, seed in runs(options.five_seeds)
        if name in options.experiment and method in options.method
    ]
    if not planned:
        parser.error(
            "there is nothing to run: what is not in the plan for two cores, ResNet-32 for one,"
            " needs --five-seeds; for the digits: python -m examples.lenet300."
        )
    loaded: dict[str, experiment.Experiment] = {}
    failed = False
    try:
        for name, method, seed in planned:
            # By seed: the runs of a seed share a dense network, which only one process may write.
            if seed % parts != part:
                continue
            settings = with_own_bound(EXPERIMENTS[name], method)
            strength = STRENGTHS[name][method]
            if command.recorded(options.out, settings, method, strength, seed) is not None:
                continue
            if name not in loaded:
                loaded = {name: experiment.load(settings, options.data_dir)}
            bench = loaded[name]._replace(settings=settings)
            console.print(f"{name}, {METHODS[method].title}, seed {seed}")
            try:
                record = command.run(
                    bench, method, strength, seed, options.out, resume=True, deadline=deadline
                )
            except sj.PruningError as wrong:
                console.print(str(wrong), style="red")
                failed = True
                continue
            command.show(console, record)
    except checkpoints.OutOfTime:
        console.print("The time is up: the same command goes on.")
    if part == 0:
        tables.main(["--results", str(options.out)])
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
