"""LeNet-5 for CPUs: the same function of the same params, its arrays with the batch last.

XLA's CPU backend runs a convolution inside ``lax.scan`` ten times slower than outside it, and
outside it allocates every temporary anew at each step. Here a convolution is one matrix product
over shifted copies of its input, which a scan does not slow down; with the batch in the last axis
every copy, maximum and sum runs over contiguous memory, however few the channels are.
"""

from typing import Any

import jax
import jax.numpy as jnp


def lenet5(params: Any, images: jax.Array) -> jax.Array:
    """``LeNet5().apply(params, images)``: the same logits and gradients.

    Args:
      params: the params of :class:`examples.models.LeNet5`.
      images: shape=[batch, height, width, channels].

    Returns:
      Logits, shape=[batch, classes].
    """
    layers = params["params"]
    # In two halves, on which two cores work at once: a kernel's gradient, a product with few
    # outputs, keeps one core busy.
    halves = jnp.array_split(images, min(2, len(images)))
    x = jnp.concatenate([_convolutions(layers, half) for half in halves])
    x = jax.nn.relu(x @ layers["Dense_0"]["kernel"] + layers["Dense_0"]["bias"][None])
    return x @ layers["Dense_1"]["kernel"] + layers["Dense_1"]["bias"][None]


def _convolutions(layers: Any, images: jax.Array) -> jax.Array:
    """From images to what the dense layers take, shape=[batch, features]."""
    x = jnp.moveaxis(images, 0, -1).transpose(2, 0, 1, 3)
    for name in ("Conv_0", "Conv_1"):
        # The maximum first: bias and ReLU are monotone, and a quarter of the entries is left.
        x = _max_pool(_convolve(x, layers[name]["kernel"]))
        x = jax.nn.relu(x + layers[name]["bias"][:, None, None, None])
    return x.transpose(3, 1, 2, 0).reshape(len(images), -1)


def _convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """From [channels, height, width, batch], without padding; the kernel as in Flax, HWIO."""
    rows, columns, _, features = kernel.shape
    _, height, width, batch = x.shape
    height, width = height - rows + 1, width - columns + 1
    # One axis after the other: the copies along the second are long, and the gradient sums ten
    # arrays, not 25.
    wide = jnp.stack([x[:, :, j : j + width] for j in range(columns)])
    patches = jnp.stack([wide[:, :, i : i + height] for i in range(rows)])
    patches = patches.reshape(-1, height * width * batch)
    return (kernel.reshape(-1, features).T @ patches).reshape(features, height, width, batch)


@jax.custom_vjp
def _max_pool(x: jax.Array) -> jax.Array:
    """The maximum of each 2 x 2 window; entries that equal it share the gradient, as JAX's do.

    The rule is written out because XLA's own takes three times as long on CPUs.
    """
    return _windows(x).max((2, 4))


def _windows(x: jax.Array) -> jax.Array:
    channels, height, width, batch = x.shape
    return x.reshape(channels, height // 2, 2, width // 2, 2, batch)


def _max_pool_forward(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    largest = _max_pool(x)
    return largest, (x, largest)


def _max_pool_backward(saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array]:
    x, largest = saved
    taken = _windows(x) == largest[:, :, None, :, None]
    share = gradient / taken.sum((2, 4), dtype=gradient.dtype)
    return (jnp.where(taken, share[:, :, None, :, None], 0).reshape(x.shape),)


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)
