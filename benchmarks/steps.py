"""Training steps and optimizer steps with selective shrinkage, against optax's own optimizers.

Six layers of 2,048 units, 25 million parameters, batches of 128, all in f32. The coupled form is
compared with ``optax.add_decayed_weights`` before ``optax.adam``, the decoupled one with
``optax.adamw``; each once more with zeros held, nine weights of ten pruned, while the baseline
stays as it is. Params and state are donated.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import sparsereg_jax as sj

from .timing import Candidate, Row, compare, compiled, interleave

STRENGTH = 2e-3
HELD = ", zeros held"


def optimizers(
    irrelevance: sj.Irrelevance = sj.exponential_irrelevance,
) -> dict[str, dict[str, optax.GradientTransformation]]:
    """The two comparisons; in each the baseline comes first."""
    return {
        "coupled": {
            "add_decayed_weights + adam": optax.chain(
                optax.add_decayed_weights(STRENGTH), optax.adam(1e-3)
            ),
            "selective_adam": sj.selective_adam(1e-3, strength=STRENGTH, irrelevance=irrelevance),
        },
        "decoupled": {
            "adamw": optax.adamw(1e-3, weight_decay=STRENGTH),
            "selective_adamw": sj.selective_adamw(
                1e-3, strength=STRENGTH, irrelevance=irrelevance, alpha=1.0
            ),
        },
    }


def network(width: int, layers: int) -> dict[str, dict[str, jax.Array]]:
    """The params of an MLP."""
    keys = jax.random.split(jax.random.key(0), layers)
    return {
        f"layer{i}": {
            "kernel": jax.random.normal(key, (width, width)) * (2 / width) ** 0.5,
            "bias": jnp.zeros(width),
        }
        for i, key in enumerate(keys)
    }


def loss(params: Any, inputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean squared error of the MLP with ReLU."""
    hidden = inputs
    for i in range(len(params)):
        layer = params[f"layer{i}"]
        hidden = hidden @ layer["kernel"] + layer["bias"][None]
        hidden = jax.nn.relu(hidden) if i + 1 < len(params) else hidden
    return jnp.mean(jnp.square(hidden - targets))


def training_step(rounds: int, width: int = 2048, layers: int = 6, batch: int = 128) -> list[Row]:
    """Times whole steps: loss, gradient, optimizer."""
    keys = jax.random.split(jax.random.key(1))
    inputs, targets = (jax.random.normal(key, (batch, width)) for key in keys)

    def make(tx):
        def step(carry, inputs, targets):
            return _apply(tx, carry, jax.grad(loss)(carry[0], inputs, targets))

        return step

    limits = {"coupled": (1.20, 1.05), "decoupled": (1.20, 1.05)}
    return _rows("training step", make, (inputs, targets), rounds, network(width, layers), limits)


def optimizer_step(rounds: int, width: int = 2048, layers: int = 6) -> list[Row]:
    """Times the optimizer alone: gradients go in, new params and state come out."""
    params = network(width, layers)
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    gradients = jax.tree.unflatten(
        structure,
        [1e-2 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)],
    )

    def make(tx):
        return lambda carry, gradients: _apply(tx, carry, gradients)

    limits = {"coupled": (None, None), "decoupled": (1.20, 1.05)}
    return _rows("optimizer step", make, (gradients,), rounds, params, limits)


def candidates(
    make: Callable[[optax.GradientTransformation], Callable[..., Any]],
    pair: dict[str, optax.GradientTransformation],
    inputs: tuple[Any, ...],
    params: Any,
) -> dict[str, Candidate]:
    """Compiles a baseline, ours, and ours with nine weights of ten pruned."""
    ours = list(pair)[1]
    runs = {
        name: compiled(make(tx), (params, tx.init(params)), *inputs) for name, tx in pair.items()
    }
    held = sj.hold_zeros(pair[ours])
    pruned = sj.prune(held, params, held.init(params), sj.mask_by_sparsity(params, 0.9))
    runs[ours + HELD] = compiled(make(held), pruned, *inputs)
    return runs


def _apply(tx, carry, gradients):
    params, state = carry
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state


def _rows(benchmark, make, inputs, rounds, params, limits):
    rows = []
    for form, pair in optimizers().items():
        baseline, ours = pair
        runs = candidates(make, pair, inputs, params)
        seconds, carries = interleave(runs, rounds)
        for name, (last, _) in carries.items():
            if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(last)):
                raise FloatingPointError(f"{benchmark}: {name} diverged; its time says nothing.")
        must, goal = limits[form]
        rows += [
            compare(benchmark, runs, seconds, name, baseline, must=must, goal=goal)
            for name in (ours, ours + HELD)
        ]
    return rows
