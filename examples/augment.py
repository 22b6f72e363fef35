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
    batch, height, width, channels = images.shape
    crops, flips = jax.random.split(key)
    corners = jax.random.randint(crops, (batch, 2), 0, 2 * margin + 1)
    padded = jnp.pad(images, [(0, 0), (margin, margin), (margin, margin), (0, 0)])

    def crop(image, corner):
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), (height, width, channels))

    cropped = jax.vmap(crop)(padded, corners)
    flip = jax.random.bernoulli(flips, shape=(batch, 1, 1, 1))
    return jnp.where(flip, cropped[:, :, ::-1], cropped)
