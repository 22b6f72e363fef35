"""The image networks of the paper, in Flax Linen, with their widths as hyper-parameters."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn


class LeNet300(nn.Module):
    """LeNet-300-100 (LeCun et al. 1998): fully connected, here with ReLU; 266,610 parameters."""

    classes: int = 10
    widths: Sequence[int] = (300, 100)

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """From images of any shape to logits."""
        hidden = images.reshape(images.shape[0], -1)
        for width in self.widths:
            hidden = nn.relu(nn.Dense(width)(hidden))
        return nn.Dense(self.classes)(hidden)


class LeNet5(nn.Module):
    """LeNet-5 with Caffe's widths and ReLU; 431,080 parameters for images of 28 x 28."""

    classes: int = 10
    widths: Sequence[int] = (20, 50, 500)

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """From images, shape=[batch, height, width, channels], to logits."""
        x = images
        for width in self.widths[:2]:
            x = max_pool(nn.relu(nn.Conv(width, (5, 5), padding="VALID")(x)))
        x = nn.relu(nn.Dense(self.widths[2])(x.reshape(x.shape[0], -1)))
        return nn.Dense(self.classes)(x)


class ResNet32(nn.Module):
    """ResNet-32 for CIFAR (He et al. 2015, section 4.2), with option-A shortcuts; 464,154 weights.

    Five blocks of two convolutions in each of three stages. Batch norm has its running statistics
    in the collection ``batch_stats``.
    """

    classes: int = 10
    blocks: int = 5
    widths: Sequence[int] = (16, 32, 64)

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """From images, shape=[batch, height, width, channels], to logits."""

        def normalize(x):
            return nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)

        x = nn.relu(normalize(nn.Conv(self.widths[0], (3, 3), use_bias=False)(images)))
        for width in self.widths:
            for _ in range(self.blocks):
                stride = 1 if width == x.shape[-1] else 2
                # Not "SAME": at a stride of 2 that centres the kernel on other pixels than the
                # shortcut takes.
                y = nn.Conv(width, (3, 3), stride, padding=1, use_bias=False)(x)
                y = nn.relu(normalize(y))
                y = normalize(nn.Conv(width, (3, 3), use_bias=False)(y))
                more = width - x.shape[-1]
                shortcut = jnp.pad(
                    x[:, ::stride, ::stride], [(0, 0)] * 3 + [(more // 2, more - more // 2)]
                )
                x = nn.relu(y + shortcut)
        return nn.Dense(self.classes)(x.mean((1, 2)))


def max_pool(x: jax.Array) -> jax.Array:
    """The maximum of each 2 x 2 window, as a reduction: its gradient is faster on CPUs."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).max((2, 4))
