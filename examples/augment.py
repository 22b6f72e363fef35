"""Augmentation of small images, inside jit."""

import jax
import jax.numpy as jnp


def crop_and_flip(key: jax.Array, images: jax.Array, margin: int = 4) -> jax.Array:
    """Shifts each image by up to ``margin`` pixels and mirrors every second one, at random.

    He et al. 2015, section 4.2: padded by 4 pixels on each side, cropped, flipped horizontally.

    Args:
      key: a PRNG key.
      images: shape=[batch, height, width, channels]; what is shifted in is 0.
      margin: pixels.

    Returns:
      Images of the same shape.
    """
    crops, flips = jax.random.split(key)
    cropped = crop(crops, images, margin)
    flip = jax.random.bernoulli(flips, shape=(len(images), 1, 1, 1))
    return jnp.where(flip, cropped[:, :, ::-1], cropped)


def crop(key: jax.Array, images: jax.Array, margin: int, mode: str = "constant") -> jax.Array:
    """Shifts each image by up to ``margin`` pixels at random.

    What is shifted in is as in ``jnp.pad``: 0 by default; with ``mode="edge"`` the outermost pixel
    repeated, for images whose background is not 0.
    """
    batch, height, width, channels = images.shape
    corners = jax.random.randint(key, (batch, 2), 0, 2 * margin + 1)
    padded = jnp.pad(images, [(0, 0), (margin, margin), (margin, margin), (0, 0)], mode)

    def one(image, corner):
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), (height, width, channels))

    return jax.vmap(one)(padded, corners)
