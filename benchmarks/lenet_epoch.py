"""An epoch of LeNet-300-100 with the example's own trainer, against plain Adam.

55,000 images of MNIST's shape, of noise, in batches of 100; the epoch is one jitted program.
"""

import jax
import numpy as np
import optax

import sparsereg_jax as sj
from examples import data, models, trainer

from .timing import Candidate, Row, compare, interleave


def measure(rounds: int, images: int = 55_000, batch: int = 100) -> list[Row]:
    """Times epochs: no regularizer, selective shrinkage, and that with pruned weights held."""
    random = np.random.default_rng(0)
    noise = data.Images(
        random.standard_normal((images, 28, 28, 1), dtype=np.float32),
        random.integers(0, 10, images, dtype=np.int32),
    )
    model, steps = models.LeNet300(), images // batch
    forward = trainer.stateless(model.apply)
    params = model.init(jax.random.key(0), noise.images[:1])
    selective = sj.selective_adam(1e-3, strength=sj.paper_strength(1e-3, steps))
    held = sj.hold_zeros(selective)
    transformations = {
        "adam": optax.adam(1e-3),
        "selective_adam": selective,
        "selective_adam, zeros held": held,
    }
    runs = {}
    for name, tx in transformations.items():
        record = trainer.start(jax.tree.map(lambda leaf: leaf.copy(), params), tx, images, seed=0)
        if tx is held:
            mask = sj.mask_by_sparsity(params, 0.9, mask=sj.every_parameter)
            pruned, state = sj.prune(tx, record.params, record.opt_state, mask)
            record = record._replace(params=pruned, opt_state=state)
        runs[name] = Candidate(trainer.trainer(forward, tx, noise, batch, steps), record)
    seconds, _ = interleave(runs, rounds)
    return [
        compare("LeNet-300-100 epoch", runs, seconds, name, "adam", must=1.10)
        for name in list(runs)[1:]
    ]
