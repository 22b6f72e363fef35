r"""The same loop with Flax NNX: LeNet-300-100 on scikit-learn's digits.

    python -m examples.nnx_digits      # 20 seconds on two cores; ends at about 97 %, test error 5 %

The other examples are in Linen, whose params are a plain dict that every tool reads. NNX needs one
line more: ``nnx.split`` makes of a module a tree of params, an ``nnx.State``, and a definition, and
the tree goes through everything as it is.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import sparsereg_jax as sj

from . import data, trainer


class LeNet300(nnx.Module):
    """LeNet-300-100 in NNX."""

    def __init__(self, pixels: int, classes: int, rngs: nnx.Rngs):
        self.first = nnx.Linear(pixels, 300, rngs=rngs)
        self.second = nnx.Linear(300, 100, rngs=rngs)
        self.out = nnx.Linear(100, classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """From images of any shape to logits."""
        x = nnx.relu(self.first(images.reshape(images.shape[0], -1)))
        return self.out(nnx.relu(self.second(x)))


def main(dense_epochs: int = 40, checks: int = 120, bound: float = 0.97) -> tuple[float, float]:
    """Trains, prunes, and returns the sparsity and the test accuracy."""
    splits = data.load("digits")
    graphdef, params = nnx.split(LeNet300(splits.train.images[0].size, 10, nnx.Rngs(0)))

    def apply(params, images):
        return nnx.merge(graphdef, params)(images)

    forward, images, batch = trainer.stateless(apply), len(splits.train.images), 100
    epoch = images // batch
    evaluate = trainer.accuracy(apply, splits.validation)

    tx = optax.adam(optax.cosine_decay_schedule(1e-3, dense_epochs * epoch))
    train = trainer.trainer(forward, tx, splits.train, batch, dense_epochs * epoch)
    record = train(trainer.start(params, tx, images, seed=0))

    tx = sj.hold_zeros(sj.selective_adam(1e-3, strength=sj.paper_strength(3e-4, epoch)))
    train = trainer.trainer(forward, tx, splits.train, batch, steps=40)
    pruning = sj.iterative_pruning(
        tx, train, evaluate, sj.fraction_step(0.1), bound, max_checks=checks
    )
    record = record._replace(opt_state=tx.init(record.params))
    state, _ = sj.run_pruning(pruning, pruning.init(record), progress_bar=True)

    sparse = state.good.params
    sparsity = float(sj.sparsity(sj.held_mask(sparse, state.good.opt_state)))
    test = float(trainer.accuracy(apply, splits.test)(sparse))
    print(f"{sparsity:.2%} of the weights are zero, test error {1 - test:.2%}")
    small = sj.compact(apply, sparse, jnp.asarray(splits.test.images[:1]))
    print(sj.compaction_table(small.plan))
    return sparsity, test


if __name__ == "__main__":
    main()
