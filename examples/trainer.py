"""A trainer: an interval of training is one jitted program over data in memory."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from .data import Images

# (params, model_state, images) -> (logits, model_state), as in training
Forward = Callable[[Any, Any, jax.Array], tuple[jax.Array, Any]]
# (params, model_state, batch, key) -> (loss, model_state)
Loss = Callable[[Any, Any, Any, jax.Array], tuple[jax.Array, Any]]


class Record(NamedTuple):
    """All that training goes on from; ``iterative_pruning`` asks for the first two fields."""

    params: Any
    opt_state: optax.OptState
    model_state: Any  # what training changes beside the params: batch norm's running statistics
    key: jax.Array  # a PRNG key's data: shuffles the next epoch
    order: jax.Array  # shape=[n], int32: this epoch's order of the examples
    step: jax.Array  # shape=(), int32: optimizer steps so far


def start(
    params: Any,
    tx: optax.GradientTransformation,
    examples: int,
    seed: int,
    model_state: Any = None,
) -> Record:
    """A record before the first step, its first epoch about to be shuffled."""
    return Record(
        params,
        tx.init(params),
        {} if model_state is None else model_state,
        jax.random.key_data(jax.random.key(seed)),
        jnp.arange(examples, dtype=jnp.int32),
        jnp.zeros((), jnp.int32),
    )


def variables(record: Record) -> Any:
    """What a Linen model's ``apply`` takes: the params, and the running statistics beside them."""
    return {**record.params, **record.model_state} if record.model_state else record.params


def stateless(apply: Callable[..., Any]) -> Forward:
    """The forward pass of a model that is a function of params and images alone."""
    return lambda params, model_state, images: (apply(params, images), model_state)


def with_batch_stats(apply: Callable[..., Any]) -> Forward:
    """The forward pass of a Linen model with batch norm, which takes ``train=True``."""

    def forward(params, model_state, images):
        return apply({**params, **model_state}, images, train=True, mutable=list(model_state))

    return forward


def in_bfloat16(forward: Forward) -> Forward:
    """Computes in bfloat16; params, statistics, gradients and logits stay in float32."""

    def computed(params, model_state, images):
        logits, new_state = forward(lowered(params), model_state, lowered(images))
        return logits.astype(jnp.float32), new_state

    return computed


def lowered(tree: Any) -> Any:
    """Each leaf in bfloat16."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree)


def interval(
    loss: Loss,
    tx: optax.GradientTransformation,
    data: Any,
    batch: int,
    steps: int,
    sharding: NamedSharding | None = None,
    scan: bool = True,
) -> Callable[[Record], Record]:
    """Makes ``train``: a function from a record to the record ``steps`` steps later.

    Args:
      loss: of a batch, given a random key of its own.
      tx: the optimizer.
      data: a tree of arrays, their first axes the examples.
      batch: examples a step.
      steps: in an interval.
      sharding: each batch is divided over the devices of its mesh, on all of which the record is to
        be whole.
      scan: whether the interval is one program; else it is a Python loop over one jitted step, as
        XLA's CPU backend runs convolutions ten times slower within a scan.
    """
    data = jax.tree.map(jnp.asarray, data)
    if sharding is not None:
        data = jax.device_put(data, NamedSharding(sharding.mesh, PartitionSpec()))
    one_step = functools.partial(_step, loss, tx, batch, sharding)

    # The data are arguments: as constants of the program they would be compiled into it.
    @functools.partial(jax.jit, donate_argnums=0)
    def program(record, data):
        if not scan:
            return one_step(data, record)
        record, _ = jax.lax.scan(
            lambda record, _: (one_step(data, record), None), record, length=steps
        )
        return record

    def train(record: Record) -> Record:
        for _ in range(1 if scan else steps):
            record = program(record, data)
        return record

    return train


def trainer(
    forward: Forward,
    tx: optax.GradientTransformation,
    data: Images,
    batch: int,
    steps: int,
    smoothing: float = 0.0,
    augment: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    sharding: NamedSharding | None = None,
    scan: bool = True,
) -> Callable[[Record], Record]:
    """Makes ``train`` for a classifier; see :func:`interval`.

    The loss is the cross-entropy with the labels smoothed: 1 - ``smoothing`` for the right class,
    the rest shared by all. ``augment`` changes a batch, given a random key.
    """

    def loss(params, model_state, data, key):
        images, labels = data
        if augment is not None:
            images = augment(key, images)
        logits, model_state = forward(params, model_state, images)
        wanted = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
        return optax.softmax_cross_entropy(logits, wanted).mean(), model_state

    return interval(loss, tx, data, batch, steps, sharding, scan)


def accuracy(
    apply: Callable[..., Any], data: Images, batch: int | None = None
) -> Callable[[Any], jax.Array]:
    """Makes ``evaluate``: from params (or variables) to the share of images classified right.

    With ``batch``, which divides the number of images, so many at a time.
    """
    batch = batch or len(data.images)
    number = len(data.images)
    if number % batch:
        raise ValueError(f"accuracy: batch={batch} does not divide the {number} images.")
    parts = [
        (jnp.asarray(data.images[i : i + batch]), jnp.asarray(data.labels[i : i + batch]))
        for i in range(0, number, batch)
    ]

    @jax.jit
    def right(params, images, labels):
        return jnp.sum(jnp.argmax(apply(params, images), axis=-1) == labels)

    def share(params):
        return sum(right(params, *part) for part in parts) / number

    return share


def _step(loss, tx, batch, sharding, data, record):
    steps_per_epoch = record.order.size // batch

    def shuffle(key, order):
        key, now = jax.random.split(jax.random.wrap_key_data(key))
        return jax.random.key_data(key), jax.random.permutation(now, order)

    position = record.step % steps_per_epoch
    key, order = jax.lax.cond(
        position == 0, shuffle, lambda key, order: (key, order), record.key, record.order
    )
    rows = jax.lax.dynamic_slice(order, (position * batch,), (batch,))
    some = jax.tree.map(lambda leaf: leaf[rows], data)
    if sharding is not None:
        some = jax.lax.with_sharding_constraint(some, sharding)
    own_key = jax.random.fold_in(jax.random.wrap_key_data(key), position + 1)
    gradients, model_state = jax.grad(loss, has_aux=True)(
        record.params, record.model_state, some, own_key
    )
    updates, opt_state = tx.update(gradients, record.opt_state, record.params)
    params = optax.apply_updates(record.params, updates)
    return Record(params, opt_state, model_state, key, order, record.step + 1)
