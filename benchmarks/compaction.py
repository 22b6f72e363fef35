"""Is a pruned network faster? Dense, with zeros, compacted, and as a sparse matrix format.

    python -m benchmarks.compaction
    python -m benchmarks.compaction --network results/lenet300-mnist-l2-seed0.safetensors

LeNet-300-100 as the example pruned it, at batches of 1, 64 and 512: the ratio of throughputs, of
calls one after another, to the dense network, medians of interleaved rounds. And how long the
compaction of a Transformer of 65 million parameters takes. About three minutes on two cores.
"""

import argparse
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.experimental import sparse
from rich.console import Console

import sparsereg_jax as sj
from examples.models import LeNet300

from .run import hardware, markdown, on_cpu, show
from .timing import Row, compare, interleave, repeated

NETWORK = Path("results/lenet300-mnist-selective-seed0.safetensors")


def lenet(params: Any, shape: tuple[int, ...], rounds: int) -> list[Row]:
    """Four forms of one pruned LeNet-300-100 in turn, at three batch sizes.

    Args:
      params: its parameters, with zeros.
      shape: of an image.
      rounds: how often each is timed.
    """
    random = np.random.default_rng(0)
    model = LeNet300()
    dense = model.init(jax.random.key(0), jnp.zeros((1, *shape)))
    small = sj.compact(model.apply, params, jax.ShapeDtypeStruct((1, *shape), jnp.float32))
    matrices = _bcsr(params)
    rows = []
    for batch in (1, 64, 512):
        x = jnp.asarray(random.standard_normal((batch, *shape)), jnp.float32)
        wanted = np.asarray(model.apply(params, x))
        for fn, tree in ((small.fn, small.params), (_bcsr_lenet, matrices)):
            np.testing.assert_allclose(jax.jit(fn)(tree, x), wanted, rtol=1e-3, atol=1e-4)
        candidates = {
            "dense": repeated(model.apply, dense, x),
            "dense with zeros": repeated(model.apply, params, x),
            "compacted": repeated(small.fn, small.params, x),
            "BCSR": repeated(_bcsr_lenet, matrices, x),
        }
        seconds, _ = interleave(candidates, rounds)
        for name in list(candidates)[1:]:
            limits = {"must": 1.0, "goal": 3.0 if batch == 512 else None}
            rows.append(
                compare(
                    f"LeNet-300-100, batch {batch}",
                    candidates,
                    seconds,
                    name,
                    "dense",
                    speedup=True,
                    **(limits if name == "compacted" else {}),
                )
            )
    return rows


def _bcsr(params: Any) -> list[tuple[Any, jax.Array]]:
    layers = params["params"]
    return [
        (sparse.BCSR.fromdense(jnp.asarray(layers[name]["kernel"]).T), layers[name]["bias"])
        for name in ("Dense_0", "Dense_1", "Dense_2")
    ]


def _bcsr_lenet(layers: list[tuple[Any, jax.Array]], x: jax.Array) -> jax.Array:
    hidden = x.reshape(x.shape[0], -1).T
    for i, (kernel, bias) in enumerate(layers):
        hidden = kernel @ hidden + bias[:, None]
        hidden = nn.relu(hidden) if i < 2 else hidden
    return hidden.T


class Layer(nn.Module):
    """One layer of a Transformer, pre-norm; a decoder's with causal mask and cross-attention."""

    decoder: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, memory: jax.Array | None = None) -> jax.Array:
        """From and to shape=[batch, positions, 512]."""
        mask = nn.make_causal_mask(x[..., 0]) if self.decoder else None
        x = x + nn.MultiHeadDotProductAttention(8)(nn.LayerNorm()(x), mask=mask)
        if memory is not None:
            x = x + nn.MultiHeadDotProductAttention(8)(nn.LayerNorm()(x), memory)
        hidden = nn.relu(nn.Dense(2048, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(512, name="down")(hidden)


class TransformerBase(nn.Module):
    """Vaswani et al. 2017, base: 6 + 6 layers, tied embeddings."""

    @nn.compact
    def __call__(self, source: jax.Array, target: jax.Array) -> jax.Array:
        """From token ids to logits."""
        embed = nn.Embed(40_800, 512)
        x, y = embed(source), embed(target)
        for _ in range(6):
            x = Layer()(x)
        for _ in range(6):
            y = Layer(decoder=True)(y, x)
        return embed.attend(nn.LayerNorm()(y))


def transformer() -> dict[str, Any]:
    """Compacts a Transformer-base: 80 % of its weights are zero, half of its inner units dead."""
    random = np.random.default_rng(0)
    model = TransformerBase()
    ids = jnp.ones((1, 16), jnp.int32)
    params = jax.tree.map(np.array, jax.jit(model.init)(jax.random.key(0), ids, ids))
    for leaf in jax.tree.leaves(params):
        if leaf.ndim == 1:
            leaf[:] = random.standard_normal(leaf.shape)
        else:
            leaf[random.random(leaf.shape, dtype=np.float32) < 0.8] = 0
    for name, layer in params["params"].items():
        if name.startswith("Layer_"):
            layer["up"]["kernel"][:, 1024:] = 0  # constants, to be folded into the next bias
    began = time.perf_counter()
    small = sj.compact(model.apply, params, ids, ids)
    seconds = time.perf_counter() - began
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (params, small.params)]
    logits = jax.jit(model.apply)(params, ids, ids)
    gap = jnp.abs(jax.jit(small.fn)(small.params, ids, ids) - logits).max() / jnp.abs(logits).max()
    return {"parameters": sizes, "seconds": seconds, "relative_difference": float(gap)}


def main(arguments: list[str] | None = None) -> list[Row]:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", type=Path, default=NETWORK, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=25, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, help="(default: results/compaction-DEVICE.json)")
    options = parser.parse_args(arguments)

    record = hardware()
    slug = re.sub(r"[^a-z0-9]+", "-", record["device"].lower()).strip("-")
    out = options.out or Path("results") / f"compaction-{slug}.json"
    params = jax.device_put(sj.load_sparse(options.network)[0])
    inputs = params["params"]["Dense_0"]["kernel"].shape[0]
    side = int(inputs**0.5)
    rows = lenet(params, (side, side, 1), options.rounds)
    large = transformer()
    record |= {"network": options.network.name, "rounds": options.rounds}
    record |= {"rows": [row._asdict() for row in rows], "transformer": large}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")

    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    title = f"{record['device']}, {record['cores']} cores, {versions}, {options.rounds} rounds"
    console = Console(width=None if sys.stdout.isatty() else 160)
    show(console, rows, title, milliseconds=not on_cpu())
    print(markdown(rows, milliseconds=not on_cpu()))
    before, after = large["parameters"]
    limit = "kept" if large["seconds"] < 60 else "missed"
    print(
        f"\nA Transformer of {before / 1e6:.1f} million parameters was compacted to"
        f" {after / 1e6:.1f} million in {large['seconds']:.0f} s (limit of 60 s: {limit});"
        f" its logits differ by {large['relative_difference']:.0e} of the largest."
    )
    console.print(f"The record is in {out}.")
    return rows


if __name__ == "__main__":
    main()
