"""An encoder-decoder Transformer in Flax Linen, in the form of BART, with ReLU.

Normalization after each residual sum and after the embeddings, learned positions, biases in all
but the output; one embedding for encoder, decoder and output (Vaswani et al. 2017; Lewis et al.
2020).

A row of tokens may hold several sentences one after another (packing): each ends with ``EOS``, and
``PAD`` fills the rest. Sentences see only themselves, and the n-th target the n-th source.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from .products import linear, multiplication

PAD, EOS = 0, 1


class Cache(NamedTuple):
    """What decoding keeps between two tokens."""

    keys: Any  # a layer: shape=[batch, length, heads, size]
    values: Any


class Memory(NamedTuple):
    """The encoded source, as the decoder's layers read it."""

    keys: Any  # a layer: shape=[batch, source, heads, size]
    values: Any
    present: jax.Array  # shape=[batch, source], bool: what is not padding


def segments(tokens: jax.Array) -> jax.Array:
    """The sentence that each token belongs to: 1, 2, ... in a row; 0 for padding."""
    ends = tokens == EOS
    number = 1 + jnp.cumsum(ends, axis=-1) - ends
    return jnp.where(tokens == PAD, 0, number)


def positions(tokens: jax.Array) -> jax.Array:
    """The place of each token in its sentence, from 0; 0 for padding."""
    index = jnp.broadcast_to(jnp.arange(tokens.shape[-1]), tokens.shape)
    first = jnp.where(jnp.roll(tokens == EOS, 1, axis=-1), index, 0)
    within = index - jax.lax.cummax(first, axis=tokens.ndim - 1)
    return jnp.where(tokens == PAD, 0, within)


class Attention(nn.Module):
    """Multi-head attention in two halves, so that keys and values can be kept."""

    width: int
    heads: int
    bfloat16: bool

    def setup(self) -> None:
        """Four projections."""
        self.query, self.key, self.value, self.output = (
            linear(self.width, self.bfloat16) for _ in range(4)
        )

    def keys_values(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values of ``x``, shape=[batch, length, width]: [batch, length, heads, size]."""
        return self._split(self.key(x)), self._split(self.value(x))

    def __call__(
        self, x: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array
    ) -> jax.Array:
        """``mask``, shape=[batch, queries, keys], is True where a query sees a key."""
        queries = self._split(self.query(x))
        fit = jnp.einsum("bqhs,bkhs->bhqk", queries, keys) / math.sqrt(queries.shape[-1])
        fit = jnp.where(mask[:, None], fit.astype(jnp.float32), -1e9)
        seen = jnp.einsum("bhqk,bkhs->bqhs", jax.nn.softmax(fit).astype(x.dtype), values)
        return self.output(seen.reshape(x.shape))

    def _split(self, x):
        return x.reshape(*x.shape[:-1], self.heads, self.width // self.heads)


class Layer(nn.Module):
    """A layer of the encoder, or with ``cross`` of the decoder."""

    width: int
    hidden: int
    heads: int
    dropout: float
    bfloat16: bool
    cross: bool

    def setup(self) -> None:
        """Attention to its own side, to the source where it is the decoder's, and two products."""
        sizes = (self.width, self.heads, self.bfloat16)
        self.attention, self.attention_norm = Attention(*sizes), nn.LayerNorm()
        if self.cross:
            self.source_attention = Attention(*sizes)
            self.source_norm = nn.LayerNorm()
        self.up = linear(self.hidden, self.bfloat16)
        self.down = linear(self.width, self.bfloat16)
        self.norm = nn.LayerNorm()
        self.drop = nn.Dropout(self.dropout)

    def __call__(
        self,
        x: jax.Array,
        keys: jax.Array,
        values: jax.Array,
        mask: jax.Array,
        source: tuple[jax.Array, jax.Array, jax.Array] | None,
        train: bool,
    ) -> jax.Array:
        """``keys`` and ``values`` are of its own side, ``source`` has those of the other one."""

        def add(norm, y):
            return norm(x + self.drop(y, deterministic=not train))

        x = add(self.attention_norm, self.attention(x, keys, values, mask))
        if source is not None:
            x = add(self.source_norm, self.source_attention(x, *source))
        return add(self.norm, self.down(nn.relu(self.up(x))))


class Transformer(nn.Module):
    """From source and target tokens to the logits of each target token."""

    vocabulary: int
    width: int
    hidden: int
    heads: int
    layers: int  # of the encoder, and as many of the decoder
    source_length: int  # of the longest source: so many positions are learned
    target_length: int
    dropout: float = 0.1
    bfloat16: bool = False  # whether products with weights are of operands rounded so

    def setup(self) -> None:
        """One embedding for all, positions and layers for each side."""
        # As large as the other weights, so that none are pruned for their scale alone.
        small = nn.initializers.normal(self.width**-0.5)
        self.embedding = nn.Embed(self.vocabulary, self.width, embedding_init=small)
        self.source_positions = nn.Embed(self.source_length, self.width, embedding_init=small)
        self.target_positions = nn.Embed(self.target_length, self.width, embedding_init=small)
        self.source_norm, self.target_norm = nn.LayerNorm(), nn.LayerNorm()
        sizes = (self.width, self.hidden, self.heads, self.dropout, self.bfloat16)
        self.encoder = [Layer(*sizes, cross=False) for _ in range(self.layers)]
        self.decoder = [Layer(*sizes, cross=True) for _ in range(self.layers)]
        self.drop = nn.Dropout(self.dropout)

    def __call__(self, source: jax.Array, target: jax.Array, train: bool = False) -> jax.Array:
        """Logits of each target token, from the source and the target's tokens before it.

        Args:
          source: shape=[batch, source], tokens, packed or not.
          target: shape=[batch, target], likewise, as many sentences in a row.
          train: whether to drop; it needs ``rngs={"dropout": key}``.

        Returns:
          shape=[batch, target, vocabulary], of the dtype of the params.
        """
        encoded, segment = self._encoded(source, train), segments(source)
        own = segments(target)
        length = target.shape[-1]
        causal = jnp.tril(jnp.ones((1, length, length), bool))
        mask = (own[:, :, None] == own[:, None]) & causal
        across = own[:, :, None] == segment[:, None]
        # Each sentence ends with EOS, which so stands before the first token of the next one.
        before = jnp.roll(target, 1, axis=-1).at[:, 0].set(EOS)
        x = self._target(before, positions(target), train)
        for layer in self.decoder:
            kept = layer.source_attention.keys_values(encoded)
            keys_values = layer.attention.keys_values(x)
            x = layer(x, *keys_values, mask, (*kept, across), train)
        return self._logits(x)

    def encode(self, source: jax.Array) -> Memory:
        """A sentence a row, shape=[batch, source], for :meth:`next_token`."""
        encoded = self._encoded(source, train=False)
        kept = [layer.source_attention.keys_values(encoded) for layer in self.decoder]
        keys, values = zip(*kept, strict=True)
        return Memory(keys, values, source != PAD)

    def next_token(
        self, token: jax.Array, position: jax.Array, memory: Memory, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """Logits of the token after ``token``, shape=[batch], and the cache with it.

        Args:
          token: shape=[batch]; ``EOS`` before the first one.
          position: shape=(), of the token that is asked for.
          memory: of :meth:`encode`.
          cache: of :meth:`empty_cache`, or of the call before.
        """
        x = self._target(token[:, None], position[None, None], train=False)
        batch, length = x.shape[0], cache.keys[0].shape[1]
        mask = jnp.broadcast_to(jnp.arange(length) <= position, (batch, 1, length))
        all_keys, all_values = [], []
        for i, layer in enumerate(self.decoder):
            key, value = layer.attention.keys_values(x)
            place = (0, position, 0, 0)
            keys = jax.lax.dynamic_update_slice(cache.keys[i], key, place)
            values = jax.lax.dynamic_update_slice(cache.values[i], value, place)
            source = (memory.keys[i], memory.values[i], memory.present[:, None])
            x = layer(x, keys, values, mask, source, False)
            all_keys.append(keys)
            all_values.append(values)
        logits = self._logits(x[:, 0])
        return logits, Cache(tuple(all_keys), tuple(all_values))

    def empty_cache(self, batch: int, length: int, dtype: Any = jnp.float32) -> Cache:
        """For ``batch`` sentences of up to ``length`` tokens."""
        shape = (batch, length, self.heads, self.width // self.heads)
        zeros = tuple(jnp.zeros(shape, dtype) for _ in range(self.layers))
        return Cache(zeros, zeros)

    def _encoded(self, source, train):
        segment = segments(source)
        mask = segment[:, :, None] == segment[:, None]
        x = self.embedding(source) + self.source_positions(positions(source))
        x = self.drop(self.source_norm(x), deterministic=not train)
        for layer in self.encoder:
            x = layer(x, *layer.attention.keys_values(x), mask, None, train)
        return x

    def _target(self, tokens, places, train):
        x = self.embedding(tokens) + self.target_positions(places)
        return self.drop(self.target_norm(x), deterministic=not train)

    def _logits(self, x):
        return multiplication(self.bfloat16)(x, self.embedding.embedding, 1)
