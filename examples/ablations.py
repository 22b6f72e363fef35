r"""What makes the difference? Our recipe or another row, changed; on validation images.

    python -m examples.ablations lenet300-mnist --data-dir DIR
    python -m examples.ablations lenet5-mnist --data-dir DIR --seed 0

At the full budget: two to eight minutes a run of LeNet-300-100, six to thirty of LeNet-5, on
one of two busy cores, fast or slow. A line a run goes to results/ablations-EXPERIMENT.jsonl; what
is there is not run again. The test images are never looked at.
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparsereg_jax as sj

from . import augment, experiment, tables
from .experiment import EXPERIMENTS, Experiment
from .methods import (
    METHODS,
    OWN_BOUNDS,
    Method,
    absolute_value,
    at_rate,
    fraction,
    little_l2,
    never,
    penalty,
)
from .search import explore, read

DEFAULT = METHODS["default"]
GAMMA = 1e-3


class Variant(NamedTuple):
    """A row, the default unless said, changed."""

    method: Method = DEFAULT
    strengths: tuple[float, ...] = (GAMMA,)  # gammas, or what stands for them
    settings: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    augment: Callable[..., Any] | None = None  # of the images, in the loop and while tuning


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


def gated_by(measured, alpha):
    """Adam with the coupled term, its gate reading something else than this step's gradient.

    Args:
      measured: from the running mean of the squares of each entry's gradient, Adam's second moment
        with a decay of 0.99, and this step's gradients to what the gate reads.
      alpha: the gate's.
    """

    def optimizer(learning_rate, gamma, steps_per_epoch):
        term = sj.add_selective_shrinkage(sj.paper_strength(gamma, steps_per_epoch), gate, alpha)

        def init(params):
            return jax.tree.map(jnp.zeros_like, params), jnp.zeros((), jnp.int32), term.init(params)

        def update(gradients, state, params):
            second, step, inner = state
            step += 1
            second = jax.tree.map(lambda v, g: 0.99 * v + 0.01 * g**2, second, gradients)
            read = measured(jax.tree.map(lambda v: v / (1 - 0.99**step), second), gradients)
            added, inner = term.update(read, inner, params)
            # What the term added to that, added to the gradients.
            updates = jax.tree.map(lambda g, a, r: g + (a - r), gradients, added, read)
            return updates, (second, step, inner)

        return optax.chain(
            optax.GradientTransformation(init, update),
            optax.scale_by_adam(),
            optax.scale_by_learning_rate(learning_rate),
        )

    return Variant(DEFAULT._replace(optimizer=optimizer))


def smoothed(second, gradients):
    """Each entry's running rms."""
    del gradients
    return jax.tree.map(jnp.sqrt, second)


def in_units_of_the_network(second, gradients):
    """The gradients over the running rms of all that are not pruned."""
    leaves = jax.tree.leaves(second)
    number = jnp.maximum(1, sum(jnp.count_nonzero(leaf) for leaf in leaves))
    rms = jnp.sqrt(sum(jnp.sum(leaf) for leaf in leaves) / number)
    return jax.tree.map(lambda g: g / jnp.maximum(rms, jnp.finfo(g.dtype).tiny), gradients)


def term(*options, gammas=(GAMMA,), **keywords):
    """The default with another coupled term, and the gammas to try."""
    return Variant(DEFAULT._replace(optimizer=penalty(*options, **keywords)), gammas)


def changed(**fields):
    """The default with something else changed."""
    return Variant(DEFAULT._replace(**fields))


def momentum(irrelevance, alpha, gammas):
    """The default with SGD in the loop, at a rate that trains as fast as Adam; gamma constant."""

    def optimizer(learning_rate, gamma, steps_per_epoch):
        del steps_per_epoch
        return sj.selective_sgd(
            20 * learning_rate, 0.9, strength=2 * gamma, irrelevance=irrelevance, alpha=alpha
        )

    return Variant(DEFAULT._replace(optimizer=optimizer), gammas)


def falling(make, steps):
    """An optimizer whose rate falls from twice the learning rate toward 0, anew every ``steps``.

    A cosine with warm restarts (Loshchilov and Hutter 2017), its mean the learning rate, a number.
    """

    def optimizer(learning_rate, *rest):
        fall = optax.cosine_decay_schedule(2 * learning_rate, steps)
        return make(lambda step: fall(step % steps), *rest)

    return optimizer


# What weakens the term is also tried with a larger gamma. The recipe as it is has its records.
LENET300 = {
    "gamma": Variant(strengths=(3e-4,)),
    "no regularizer": Variant(strengths=(0.0,)),
    "gate, alpha 1": term(gate),
    "gate, alpha 3e-3": term(gate, 3e-3, gammas=(GAMMA, 3e-3)),
    "gate, alpha 3e-4": term(gate, 3e-4, gammas=(GAMMA, 1e-2)),
    "gate, alpha = running rms of g": term(gate, 1.0, rms_decay=0.99),
    "gate, alpha = 0.1 x running rms of g": term(gate, 0.1, rms_decay=0.99, gammas=(GAMMA, 3e-3)),
    "gate, alpha = running rms of g over the network": gated_by(in_units_of_the_network, 1.0),
    "gate on each weight's running rms of g, alpha 3e-3": gated_by(smoothed, 3e-3),
    "gate on |g w|, alpha 1e-4": term(taylor, 1e-4),
    "gate on |g w|, alpha 1e-5": term(taylor, 1e-5),
    "L1": term(absolute_value, gammas=(1e-5, 3e-5)),
    "I grows, power 0.5": term(growing(0.5), gammas=(1e-4, 3e-4)),
    "selective_adam as it comes": term(gate, decaying=False, gammas=(2e-4,)),
    "constant strength": term(flat, decaying=False, gammas=(2e-4, GAMMA)),
    "decoupled": Variant(
        DEFAULT._replace(optimizer=lambda lr, rate, n: optax.adamw(lr, weight_decay=rate)),
        (0.03, 0.1),
    ),
    "selective_adamw as it comes": Variant(
        DEFAULT._replace(optimizer=lambda lr, rate, n: sj.selective_adamw(lr, strength=rate)),
        (0.1,),
    ),
    "selective_sgdw as it comes, momentum 0.9": Variant(
        DEFAULT._replace(
            optimizer=lambda lr, rate, n: sj.selective_sgdw(20 * lr, 0.9, strength=rate)
        ),
        (3e-3,),
    ),
    "SGD, momentum 0.9": momentum(flat, 1.0, (2.5e-4, 5e-4, 1e-3)),
    "SGD, momentum 0.9, gate, alpha 3e-3": momentum(gate, 3e-3, (5e-4, 1.5e-3, 5e-3)),
    "checks twice as often": Variant(settings={"interval": 125}),
    "checks half as often": Variant(settings={"interval": 500}),
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
LONGER, READY_MADE = DEFAULT._replace(tune=0.2), METHODS["ready-made"]
SHIFTED, SHIFTED_BOUND = METHODS["shifted"], {"bound": OWN_BOUNDS["lenet5-mnist"]["shifted"]}
LENET5 = {
    "gamma": Variant(strengths=(3e-4, 3e-3)),
    "bound 98.8 %, tuned 0.2 of the budget": Variant(
        LONGER, strengths=(3e-4, GAMMA, 3e-3), settings={"bound": 0.988}
    ),
    "bound 98.8 %, tuned 0.2, no label smoothing": Variant(
        LONGER._replace(smoothing=0.0), settings={"bound": 0.988}
    ),
    "bound 98.8 %, tuned 0.2, gate, alpha 1": Variant(
        LONGER._replace(optimizer=penalty(gate)), settings={"bound": 0.988}
    ),
    "bound 98.8 %, tuned 0.2, twice the learning rate": Variant(
        LONGER, settings={"bound": 0.988, "learning_rate": 2e-3}
    ),
    "bound 98.8 %, tuned 0.2, selective_adam as it comes": Variant(
        READY_MADE._replace(tune=0.2), strengths=(2e-4,), settings={"bound": 0.988}
    ),
    "bound 98.5 %, tuned 0.2 of the budget": Variant(LONGER, settings={"bound": 0.985}),
    "bound 98.5 %, tuned 0.2 at twice the learning rate": Variant(
        LONGER._replace(tuner=at_rate(2.0, little_l2)), settings={"bound": 0.985}
    ),
    "the paper's loop, bound 99 %, 60 epochs": Variant(METHODS["paper"], settings={"epochs": 60}),
    "twice the budget": Variant(settings={"epochs": 100}),
    "row `shifted`, images as they are": Variant(METHODS["higher-rate"], settings=SHIFTED_BOUND),
    "row `shifted`, nothing pruned": Variant(
        SHIFTED._replace(propose=never), settings=SHIFTED_BOUND
    ),
    "images shifted by up to 2 pixels": Variant(augment=functools.partial(augment.crop, margin=2)),
}


def falling_in(row, **keywords):
    """A row whose rate falls within each interval of LeNet-5 on Fashion-MNIST."""
    steps = EXPERIMENTS["lenet5-fashion_mnist"].interval
    return Variant(row._replace(optimizer=falling(row.optimizer, steps)), **keywords)


STRAIGHT = METHODS["straight"]
FASHION = {
    "gamma": Variant(strengths=(3e-4, 3e-3)),
    "no label smoothing": changed(smoothing=0.0),
    "never goes back": changed(recovery=None),
    "bound 91 %": Variant(settings={"bound": 0.91}),
    "row `straight`": Variant(STRAIGHT, (0.97, 0.98, 0.9905, 0.997)),
    "row `straight`, the rate falling within each interval": falling_in(
        STRAIGHT, strengths=(0.9905, 0.997)
    ),
    "row `higher-rate`, the rate falling within each interval": falling_in(
        METHODS["higher-rate"],
        settings={"bound": OWN_BOUNDS["lenet5-fashion_mnist"]["higher-rate"]},
    ),
    "row `straight`, tuned on images shifted by up to one pixel": Variant(
        STRAIGHT._replace(augment=SHIFTED.augment), (0.9905,)
    ),
}
# What the README shows of LeNet-300-100.
IN_SHORT = (
    *("no regularizer", "gate, alpha 1", "L1", "selective_adam as it comes", "constant strength"),
    *("decoupled", "no label smoothing", "never goes back", "cosine learning rate", "not tuned"),
)
VARIANTS = {"lenet300-mnist": LENET300, "lenet5-mnist": LENET5, "lenet5-fashion_mnist": FASHION}


def with_variant(bench: Experiment, variant: Variant) -> Experiment:
    """The experiment with the settings and the augmentation of a variant."""
    network = bench.network._replace(augment=variant.augment)
    return bench._replace(settings=bench.settings._replace(**variant.settings), network=network)


def table(
    variants: dict[str, Variant],
    lines: list[dict[str, Any]],
    records: Sequence[dict[str, Any]],
) -> str:
    """A row a variant and strength, in Markdown: means over its seeds (deviations), in per cent.

    Args:
      variants: by name.
      lines: their runs; of several of a seed the last counts.
      records: those of the default as it is; it has a row for all seeds, and one for each set of
        seeds that variants were run with, so that like is compared with like.
    """
    rows = [
        "| changed | number | seeds | sparsity | validation accuracy |",
        "|---|---:|---|---:|---:|",
    ]

    def row(title, strength, seeds, sparsity, accuracy):
        numbers = (_mean([100 * value for value in values]) for values in (sparsity, accuracy))
        shown = ", ".join(map(str, seeds))
        rows.append(f"| {title} | {strength:g} | {shown} | {' | '.join(numbers)} |")

    known = {record["seed"]: record for record in records}
    runs = {
        (name, strength): {
            x["seed"]: x for x in lines if (x["method"], x["strength"]) == (name, strength)
        }
        for name, variant in variants.items()
        for strength in variant.strengths
    }
    sets = {tuple(sorted(known)), *(tuple(sorted(found)) for found in runs.values())}
    for seeds in sorted(sets, key=lambda seeds: (-len(seeds), seeds)):
        if seeds and set(seeds) <= set(known):
            chosen = [known[seed] for seed in seeds]
            values = [[x[key] for x in chosen] for key in ("sparsity", "validation_accuracy")]
            row("nothing", chosen[0]["strength"], seeds, *values)
    for (name, strength), found in runs.items():
        if found:
            values = [[x[key] for x in found.values()] for key in ("sparsity", "validation")]
            row(name.replace("|", "\\|"), strength, sorted(found), *values)
    return "\n".join(rows)


def _mean(values: list[float]) -> str:
    spread = f" ({np.std(values, ddof=1):.2f})" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{spread}"


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", choices=VARIANTS)
    parser.add_argument("--data-dir", help="where tensorflow-datasets keeps its data")
    parser.add_argument("--variant", nargs="+", help="by default all, as the table names them")
    parser.add_argument("--seed", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("results"))
    options = parser.parse_args(arguments)
    variants = VARIANTS[options.experiment]
    names = options.variant or list(variants)
    if unknown := set(names) - set(variants):
        parser.error(f"--variant: {sorted(unknown)} are none of {list(variants)}.")
    bench = experiment.load(EXPERIMENTS[options.experiment], options.data_dir)
    path = options.out / f"ablations-{options.experiment}.jsonl"
    for seed in options.seed:
        for name in names:
            variant = variants[name]
            runs = [(name, strength, seed) for strength in variant.strengths]
            explore(with_variant(bench, variant), {name: variant.method}, runs, path, bench)
    records = tables.read(options.out, options.experiment).get("default", [])
    print(table(variants, read(path), records))


if __name__ == "__main__":
    main()
