"""A trainer for classifiers: an interval of training is one jitted program over data in memory."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from .data import Images


class Record(NamedTuple):
    """All that training goes on from; ``iterative_pruning`` asks for the first two fields."""

    params: Any
    opt_state: optax.OptState
    key: jax.Array  # a PRNG key's data: shuffles the next epoch
    order: jax.Array  # shape=[n], int32: this epoch's order of the images
    step: jax.Array  # shape=(), int32: optimizer steps so far


def start(params: Any, tx: optax.GradientTransformation, images: int, seed: int) -> Record:
    """A record before the first step, its first epoch about to be shuffled."""
    return Record(
        params,
        tx.init(params),
        jax.random.key_data(jax.random.key(seed)),
        jnp.arange(images, dtype=jnp.int32),
        jnp.zeros((), jnp.int32),
    )


def trainer(
    apply: Callable[..., Any],
    tx: optax.GradientTransformation,
    data: Images,
    batch: int,
    steps: int,
    smoothing: float = 0.0,
    sharding: NamedSharding | None = None,
) -> Callable[[Record], Record]:
    """Makes ``train``: a function from a record to the record ``steps`` steps later.

    The loss is the cross-entropy with the labels smoothed: 1 - ``smoothing`` for the right class,
    the rest shared by all. With ``sharding`` each batch is divided over the devices of its mesh,
    on all of which the record is to be whole.
    """
    images, labels = jnp.asarray(data.images), jnp.asarray(data.labels)
    if sharding is not None:
        everywhere = NamedSharding(sharding.mesh, PartitionSpec())
        images, labels = jax.device_put((images, labels), everywhere)
    interval = jax.jit(
        functools.partial(_interval, apply, tx, batch, steps, smoothing, sharding),
        donate_argnums=0,
    )
    # The data are arguments: as constants of the program they would be compiled into it.
    return lambda record: interval(record, images, labels)


def accuracy(apply: Callable[..., Any], data: Images) -> Callable[[Any], jax.Array]:
    """Makes ``evaluate``: from params to the share of images classified right."""
    images, labels = jnp.asarray(data.images), jnp.asarray(data.labels)

    @jax.jit
    def share(params, images, labels):
        return jnp.mean(jnp.argmax(apply(params, images), axis=-1) == labels)

    return lambda params: share(params, images, labels)


def _interval(apply, tx, batch, steps, smoothing, sharding, record, images, labels):
    steps_per_epoch = images.shape[0] // batch

    def loss(params, images, labels):
        logits = apply(params, images)
        wanted = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
        return optax.softmax_cross_entropy(logits, wanted).mean()

    def shuffle(key, order):
        key, now = jax.random.split(jax.random.wrap_key_data(key))
        return jax.random.key_data(key), jax.random.permutation(now, order)

    def one_step(record, _):
        position = record.step % steps_per_epoch
        key, order = jax.lax.cond(
            position == 0, shuffle, lambda key, order: (key, order), record.key, record.order
        )
        rows = jax.lax.dynamic_slice(order, (position * batch,), (batch,))
        some = images[rows], labels[rows]
        if sharding is not None:
            some = jax.lax.with_sharding_constraint(some, sharding)
        gradients = jax.grad(loss)(record.params, *some)
        updates, opt_state = tx.update(gradients, record.opt_state, record.params)
        params = optax.apply_updates(record.params, updates)
        return Record(params, opt_state, key, order, record.step + 1), None

    return jax.lax.scan(one_step, record, length=steps)[0]
