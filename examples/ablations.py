r"""What makes the difference? The library's default with one thing changed, on validation images.

    python -m examples.ablations --data-dir DIR

LeNet-300-100 on MNIST at the full budget. A line a run goes to results/ablations.jsonl; what is
there is not run again. The test images are never looked at.
"""

import argparse
from pathlib import Path

import jax.numpy as jnp
import optax

import sparsereg_jax as sj

from . import experiment
from .experiment import EXPERIMENTS
from .methods import METHODS, absolute_value, fraction, penalty
from .search import explore

DEFAULT = METHODS["default"]
GAMMA = 1e-3


def scaled(irrelevance, alpha, rms_decay=None, constant=False):
    """Adam with a coupled term whose gate has another scale."""

    def optimizer(learning_rate, gamma, steps_per_epoch):
        return sj.selective_adam(
            learning_rate,
            strength=2 * gamma if constant else sj.paper_strength(gamma, steps_per_epoch),
            irrelevance=irrelevance,
            alpha=alpha,
            rms_decay=rms_decay,
        )

    return optimizer


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
VARIANTS = {
    "default (I = 1)": DEFAULT,
    "gate, alpha 1": DEFAULT._replace(optimizer=penalty(gate)),
    "gate, alpha 0.003": DEFAULT._replace(optimizer=penalty(gate, 3e-3)),
    "gate, alpha 0.0003": DEFAULT._replace(optimizer=penalty(gate, 3e-4)),
    "gate, alpha 1 x running rms of g": DEFAULT._replace(optimizer=scaled(gate, 1.0, 0.99)),
    "gate, alpha 0.1 x running rms of g": DEFAULT._replace(optimizer=scaled(gate, 0.1, 0.99)),
    "gate on |g w|, alpha 1e-4": DEFAULT._replace(optimizer=scaled(taylor, 1e-4)),
    "gate on |g w|, alpha 1e-5": DEFAULT._replace(optimizer=scaled(taylor, 1e-5)),
    "L1 in place of L2": DEFAULT._replace(optimizer=penalty(absolute_value)),
    "I grows, power 0.5": DEFAULT._replace(optimizer=penalty(growing(0.5))),
    "I grows, power 1": DEFAULT._replace(optimizer=penalty(growing(1.0))),
    "I = 1, constant strength": DEFAULT._replace(optimizer=scaled(flat, 1.0, constant=True)),
    "I = 1, no label smoothing": DEFAULT._replace(smoothing=0.0),
    "I = 1, smoothing 0.1": DEFAULT._replace(smoothing=0.1),
    "I = 1, smoothing 0.3": DEFAULT._replace(smoothing=0.3),
    "I = 1, never goes back": DEFAULT._replace(recovery=None),
    "I = 1, goes back sooner": DEFAULT._replace(recovery=0.03),
    "I = 1, fraction 0.04": DEFAULT._replace(propose=fraction(0.04, floor=1)),
    "I = 1, fraction 0.1": DEFAULT._replace(propose=fraction(0.1, floor=1)),
    "I = 1, tuned 0.2 of the budget": DEFAULT._replace(tune=0.2),
    "I = 1, tuned without L2": DEFAULT._replace(tuner=optax.adam),
}


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="where tensorflow-datasets keeps its data")
    parser.add_argument("--variant", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--seed", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--gamma", type=float, default=GAMMA)
    parser.add_argument("--out", type=Path, default=Path("results"))
    options = parser.parse_args(arguments)
    explore(
        experiment.load(EXPERIMENTS["lenet300-mnist"], options.data_dir),
        VARIANTS,
        [(name, options.gamma, seed) for seed in options.seed for name in options.variant],
        options.out / "ablations.jsonl",
    )


if __name__ == "__main__":
    main()
