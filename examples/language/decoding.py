"""From a source to a target: greedy and beam search, each one jitted program with a cache."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .transformer import EOS, PAD, Cache, Transformer

LOWEST = -1e30


def greedy(model: Transformer, length: int) -> Callable[[Any, jax.Array], jax.Array]:
    """Makes ``decode``: from params and sources to the likeliest token, one after another.

    Args:
      model: the network.
      length: of the longest target, its ``EOS`` included.

    Returns:
      A function from params and a sentence a row, shape=[batch, source], to tokens,
      shape=[batch, length]: up to the first ``EOS``, then ``PAD``.
    """

    @jax.jit
    def decode(params, source):
        batch = source.shape[0]
        memory: Any = model.apply(params, source, method=model.encode)

        def going_on(state):
            position, _, done, _, _ = state
            return (position < length) & ~done.all()

        def step(state):
            position, token, done, tokens, cache = state
            logits, cache = model.apply(
                params, token, position, memory, cache, method=model.next_token
            )
            token = jnp.where(done, PAD, jnp.argmax(_words(logits), axis=-1)).astype(tokens.dtype)
            tokens = tokens.at[:, position].set(token)
            return position + 1, token, done | (token == EOS), tokens, cache

        first = jnp.full(batch, EOS, jnp.int32)
        none = jnp.full((batch, length), PAD, jnp.int32)
        # A row of padding alone, which fills a batch, is done before it begins.
        start = (0, first, ~memory.present.any(-1), none, _cache(model, params, batch, length))
        return jax.lax.while_loop(going_on, step, start)[3]

    return decode


class _Beams(NamedTuple):
    position: jax.Array  # shape=()
    alive: jax.Array  # shape=[batch, beams, length]: tokens of hypotheses without EOS
    log_probability: jax.Array  # shape=[batch, beams]: theirs
    ended: jax.Array  # shape=[batch, beams, length]: tokens of hypotheses with EOS
    score: jax.Array  # shape=[batch, beams]: theirs
    cache: Cache


def beam_search(
    model: Transformer, length: int, beams: int, penalty: float
) -> Callable[[Any, jax.Array], tuple[jax.Array, jax.Array]]:
    """Makes ``decode``: from params and sources to the hypotheses with the highest scores.

    The score of a hypothesis is its log probability / (tokens, EOS included) ^ ``penalty``.

    Args:
      model: the network.
      length: of the longest target, its ``EOS`` included.
      beams: hypotheses followed at a time.
      penalty: of length, at least 0, which is none; larger ones favour long hypotheses.

    Returns:
      A function from params and a sentence a row, shape=[batch, source], to tokens,
      shape=[batch, length], as in :func:`greedy`, and their scores, shape=[batch]. Where no
      hypothesis has ended it is the likeliest of the others.
    """

    def score(log_probability, tokens):
        return log_probability / jnp.asarray(tokens, jnp.float32) ** penalty

    @jax.jit
    def decode(params, source):
        batch = source.shape[0]
        memory: Any = model.apply(params, source, method=model.encode)
        memory = jax.tree.map(lambda leaf: jnp.repeat(leaf, beams, axis=0), memory)

        def going_on(state):
            # The best that those alive can come to: no further loss, and the longest.
            best = score(state.log_probability.max(-1), length)
            return (state.position < length) & (best > state.score.max(-1)).any()

        def step(state):
            position = state.position
            before = state.alive[:, :, jnp.maximum(position - 1, 0)]
            token = jnp.where(position == 0, EOS, before).reshape(-1)
            logits, cache = model.apply(
                params, token, position, memory, state.cache, method=model.next_token
            )
            step_log = jax.nn.log_softmax(_words(logits)).reshape(batch, beams, -1)
            vocabulary = step_log.shape[-1]
            total = (state.log_probability[..., None] + step_log).reshape(batch, -1)
            # Of so many at most half end, so that enough are left to go on with.
            log_probability, choice = jax.lax.top_k(total, 2 * beams)
            parent, token = choice // vocabulary, choice % vocabulary
            tokens = _take(state.alive, parent).at[:, :, position].set(token)
            ends = token == EOS

            real = ends & (log_probability > LOWEST / 2)
            scores = jnp.where(real, score(log_probability, position + 1), LOWEST)
            scores = jnp.concatenate([state.score, scores], axis=1)
            best, which = jax.lax.top_k(scores, beams)
            ended = _take(jnp.concatenate([state.ended, tokens], axis=1), which)

            left, which = jax.lax.top_k(jnp.where(ends, LOWEST, log_probability), beams)
            rows = (_take(parent, which) + beams * jnp.arange(batch)[:, None]).reshape(-1)
            cache = jax.tree.map(lambda leaf: leaf[rows], cache)
            return _Beams(position + 1, _take(tokens, which), left, ended, best, cache)

        none = jnp.full((batch, beams, length), PAD, jnp.int32)
        lowest = jnp.full((batch, beams), LOWEST)
        # At first all beams are the same one. A row of padding alone is done before it begins.
        present = memory.present.any(-1).reshape(batch, beams)
        start = _Beams(
            jnp.zeros((), jnp.int32),
            none,
            lowest.at[:, 0].set(0.0),
            none,
            jnp.where(present, LOWEST, 1.0),
            _cache(model, params, batch * beams, length),
        )
        end = jax.lax.while_loop(going_on, step, start)
        any_ended = end.score[:, 0] > LOWEST / 2
        tokens = jnp.where(any_ended[:, None], end.ended[:, 0], end.alive[:, 0])
        return tokens, jnp.where(
            any_ended, end.score[:, 0], score(end.log_probability[:, 0], end.position)
        )

    return decode


def _words(logits):
    """In float32, and never ``PAD``, which is no word."""
    return logits.astype(jnp.float32).at[:, PAD].set(LOWEST)


def _take(array, which):
    """Entries of the second axis, for each of the first."""
    return jax.vmap(lambda row, i: row[i])(array, which)


def _cache(model: Transformer, params: Any, batch: int, length: int) -> Cache:
    dtype = jax.tree.leaves(params)[0].dtype
    return model.empty_cache(batch, length, dtype)
