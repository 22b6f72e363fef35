r"""What makes the difference? Our recipe with one thing changed, on validation images.

    python -m examples.ablations --data-dir DIR

LeNet-300-100 on MNIST at the full budget, two to three minutes a run on one of two busy cores. A
line a run goes to results/ablations.jsonl; what is there is not run again. The test images are
never looked at.
"""

import argparse
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

import sparsereg_jax as sj

from . import experiment
from .experiment import EXPERIMENTS
from .methods import METHODS, absolute_value, fraction, penalty
from .search import explore, read

DEFAULT = METHODS["default"]
GAMMA = 1e-3


def taylor(gradient, weight, scale):
    """exp(-|g w| / alpha): what removing the weight would change, to first order."""
    return sj.exponential_irrelevance(gradient * weight, weight, scale)


def growing(power):
    """I = (entries / entries left) ^ power in each tensor: stronger the sparser it is."""

    def irrelevance(gradient, weight, scale):
        del scale
        left = jnp.maximum(1, jnp.count_nonzero(weight)).astype(gradient.dtype)
        return jnp.full_like(gradient, (weight.size / left) ** power)

    return irrelevance


gate, flat = sj.exponential_irrelevance, sj.constant_irrelevance


def term(*options, gammas=(GAMMA,), **keywords):
    """The default with another coupled term, and the gammas to try."""
    return DEFAULT._replace(optimizer=penalty(*options, **keywords)), gammas


def changed(**fields):
    """The default with something else changed."""
    return DEFAULT._replace(**fields), (GAMMA,)


# By name, the method and its gammas. What weakens the term is also tried with a larger gamma.
VARIANTS = {
    "default": (DEFAULT, (GAMMA, 3e-4)),
    "no regularizer": (DEFAULT, (0.0,)),
    "gate, alpha 1": term(gate),
    "gate, alpha 3e-3": term(gate, 3e-3, gammas=(GAMMA, 3e-3)),
    "gate, alpha 3e-4": term(gate, 3e-4, gammas=(GAMMA, 1e-2)),
    "gate, alpha = running rms of g": term(gate, 1.0, rms_decay=0.99),
    "gate, alpha = 0.1 x running rms of g": term(gate, 0.1, rms_decay=0.99, gammas=(GAMMA, 3e-3)),
    "gate on |g w|, alpha 1e-4": term(taylor, 1e-4),
    "gate on |g w|, alpha 1e-5": term(taylor, 1e-5),
    "L1": term(absolute_value, gammas=(1e-5, 3e-5)),
    "I grows, power 0.5": term(growing(0.5), gammas=(1e-4, 3e-4)),
    "constant strength": term(flat, decaying=False, gammas=(2e-4,)),
    "decoupled": (
        DEFAULT._replace(optimizer=lambda lr, rate, n: optax.adamw(lr, weight_decay=rate)),
        (0.03, 0.1),
    ),
    "no label smoothing": changed(smoothing=0.0),
    "label smoothing 0.1": changed(smoothing=0.1),
    "never goes back": changed(recovery=None),
    "goes back sooner": changed(recovery=0.03),
    "fraction 0.04": changed(propose=fraction(0.04, floor=1)),
    "fraction 0.1": changed(propose=fraction(0.1, floor=1)),
    "cosine learning rate": changed(cosine=True),
    "not tuned": changed(tune=0.0),
    "tuned 0.2 of the budget": changed(tune=0.2),
    "tuned without L2": changed(tuner=optax.adam),
}


def table(lines: list[dict[str, Any]]) -> str:
    """A row a variant and gamma, in Markdown: means over its seeds, in per cent."""
    rows = [
        "| changed | gamma | seeds | sparsity | validation accuracy |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in VARIANTS:
        for gamma in VARIANTS[name][1]:
            runs = [x for x in lines if (x["method"], x["strength"]) == (name, gamma)]
            if runs:
                sparsity = 100 * np.mean([run["sparsity"] for run in runs])
                accuracy = 100 * np.mean([run["validation"] for run in runs])
                number = f"| {name} | {gamma:g} | {len(runs)}"
                rows.append(f"{number} | {sparsity:.2f} | {accuracy:.2f} |")
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="where tensorflow-datasets keeps its data")
    parser.add_argument("--variant", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--seed", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("results"))
    options = parser.parse_args(arguments)
    explore(
        experiment.load(EXPERIMENTS["lenet300-mnist"], options.data_dir),
        {name: method for name, (method, _) in VARIANTS.items()},
        [
            (name, gamma, seed)
            for seed in options.seed
            for name in options.variant
            for gamma in VARIANTS[name][1]
        ],
        path := options.out / "ablations.jsonl",
    )
    print(table(read(path)))


if __name__ == "__main__":
    main()
