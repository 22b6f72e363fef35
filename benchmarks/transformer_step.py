"""A training step of a Transformer with selective shrinkage, against plain Adam.

    python -m benchmarks.transformer_step                # the size of the translation example
    python -m benchmarks.transformer_step --size wmt14   # base size: for a GPU or TPU

Rows of random tokens, packed without padding, sentences of 15 tokens. Adam alone, with selective
shrinkage, and with that and three weights of four held at zero; and Adam with products of bfloat16
against products of float32. Ratios as in ``timing.py``; tokens of both sides a second, and memory:
of the params, of the optimizer's state, and temporaries of the compiled step. On a CPU the times
are ratios only.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from rich.console import Console

import sparsereg_jax as sj
from examples import translation, wmt14
from examples.hardware import hardware
from examples.language.experiment import Settings, network, train_loss
from examples.language.methods import METHODS, plain_adam
from examples.language.transformer import EOS

from .run import on_cpu, show
from .timing import Row, compare, compiled, interleave

SIZES = {"translation": translation.USUAL, "wmt14": wmt14.USUAL}
SENTENCE = 15


def measure(settings: Settings, rounds: int) -> tuple[list[Row], dict[str, dict[str, int]]]:
    """Times the steps in turn; of each also the bytes of params and optimizer state."""
    model = network(settings, settings.vocabulary)
    random = np.random.default_rng(0)
    shape = (settings.batch, settings.row)
    source, target = random.integers(2, model.vocabulary, (2, *shape), dtype=np.int32)
    source[:, SENTENCE - 1 :: SENTENCE] = target[:, SENTENCE - 1 :: SENTENCE] = EOS
    other = "adam, products of " + ("float32" if settings.bfloat16 else "bfloat16")
    loss = train_loss(model, settings)
    other_loss = train_loss(model, settings._replace(bfloat16=not settings.bfloat16))
    params = jax.jit(model.init)(jax.random.key(0), source[:1], target[:1])
    selective = METHODS["paper"].optimizer(settings.learning_rate, 1e-5, 1)
    held = sj.hold_zeros(selective)
    transformations = {
        "adam": plain_adam(settings.learning_rate),
        "selective_adam": selective,
        "selective_adam, zeros held": held,
        other: plain_adam(settings.learning_rate),
    }
    candidates, memory = {}, {}
    for name, tx in transformations.items():
        state = tx.init(params)
        own = params
        if tx is held:
            mask = sj.mask_by_sparsity(params, 0.75, mask=sj.every_parameter)
            own, state = sj.prune(tx, params, state, mask)
        carry = (own, state, jax.random.key_data(jax.random.key(1)))
        step = _step(other_loss if name == other else loss, tx)
        candidates[name] = compiled(step, carry, source, target)
        memory[name] = {"params": _bytes(own), "optimizer": _bytes(state)}
    seconds, _ = interleave(candidates, rounds)
    rows = [
        compare("training step", candidates, seconds, name, "adam", must=1.03)
        for name in ("selective_adam", "selective_adam, zeros held")
    ]
    rounded, exact = ("adam", other) if settings.bfloat16 else (other, "adam")
    faster = compare("training step", candidates, seconds, rounded, exact, speedup=True)
    return [*rows, faster], memory


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _step(loss: Any, tx: optax.GradientTransformation) -> Any:
    def step(carry: Any, source: jax.Array, target: jax.Array) -> Any:
        params, state, key = carry
        key, own = jax.random.split(jax.random.wrap_key_data(key))
        gradients = jax.grad(lambda params: loss(params, {}, (source, target), own)[0])(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, jax.random.key_data(key)

    return step


def main(arguments: list[str] | None = None) -> list[Row]:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="translation", choices=SIZES)
    parser.add_argument("--batch", type=int, help="rows (default: the example's)")
    parser.add_argument("--rounds", type=int, default=25, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, help="(default: results/transformer-SIZE-DEVICE.json)")
    options = parser.parse_args(arguments)
    settings = SIZES[options.size]
    if options.batch is not None:
        settings = settings._replace(batch=options.batch)
    (rows, memory), record = measure(settings, options.rounds), hardware()
    tokens = 2 * settings.batch * settings.row
    slug = re.sub(r"[^a-z0-9]+", "-", record["device"].lower()).strip("-")
    out = options.out or Path("results") / f"transformer-{options.size}-{slug}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    record |= {"size": options.size, "tokens": tokens, "bytes": memory}
    record["rows"] = [row._asdict() for row in rows]
    out.write_text(json.dumps(record, indent=1) + "\n")
    console = Console(width=160)
    show(console, rows, f"{record['device']}, {options.size}", milliseconds=not on_cpu())
    for name, bytes_of in memory.items():
        parts = (f"{part} {number / 2**20:.1f}" for part, number in bytes_of.items())
        console.print(f"{name}: {', '.join(parts)} MiB")
    if not on_cpu():
        times = {row.against: row.against_milliseconds for row in rows}
        times |= {row.ours: row.milliseconds for row in rows}
        for name, milliseconds in times.items():
            console.print(f"{name}: {1e3 * tokens / milliseconds:,.0f} tokens/s")
    return rows


if __name__ == "__main__":
    main()
