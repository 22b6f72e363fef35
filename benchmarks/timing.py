"""Ratios of running times that a busy machine does not bend.

What is compared runs in turn, round after round, every second round in reverse order; a ratio is
the median of the rounds' own ratios, so that a neighbour who slows a whole round down slows both
sides of it.
"""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

LEAST = 0.02  # seconds a timing lasts at least: a shorter step is run several times in a row
MOST = 45.0  # seconds all rounds of one comparison last, about: slow ones get fewer, but three


class Candidate(NamedTuple):
    """One thing to time: a step, and what its first call goes on from."""

    step: Callable[[Any], Any]  # from a carry to the next; may give its argument's memory away
    carry: Any
    temporaries: int | None = None  # bytes, of the compiled program


class Row(NamedTuple):
    """One comparison."""

    benchmark: str
    ours: str
    against: str
    speedup: bool  # whether the ratio is theirs over ours, to be large, or ours over theirs
    ratio: float  # median over the rounds
    quartiles: tuple[float, float]
    must: float | None
    goal: float | None
    milliseconds: float  # medians, of ours ...
    against_milliseconds: float  # ... and of theirs
    temporaries: int | None  # bytes
    against_temporaries: int | None
    rounds: int


def compiled(step: Callable[..., Any], carry: Any, *inputs: Any) -> Candidate:
    """Compiles ``step(carry, *inputs)``, a step that goes on from its own result.

    Args:
      step: a jit-able function that returns the next carry.
      carry: what the first call starts from, a copy of it. Its memory is given away in each call,
        as users give that of params and state.
      *inputs: arrays that every call reads; nothing is compiled in as a constant.

    Returns:
      A candidate, its temporaries read from the compiled program.
    """
    program = jax.jit(step, donate_argnums=0).lower(carry, *inputs).compile()
    own = jax.tree.map(lambda leaf: leaf.copy(), carry)
    return Candidate(lambda carry: program(carry, *inputs), own, _temporaries(program))


def repeated(function: Callable[..., Any], *inputs: Any) -> Candidate:
    """Compiles ``function(*inputs)``, the same in every call; the last carry is its result."""
    program = jax.jit(function).lower(*inputs).compile()
    return Candidate(lambda _: program(*inputs), None, _temporaries(program))


def interleave(
    candidates: Mapping[str, Candidate], rounds: int
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Times the candidates in turn, each going on from its own carry.

    Args:
      candidates: what to compare, by name.
      rounds: how often; fewer where that would last longer than ``MOST``.

    Returns:
      By name, the seconds of a step in each round, shape=[rounds], and the last carry.
    """
    carries = {name: candidate.carry for name, candidate in candidates.items()}

    def timed(name: str, steps: int = 1) -> float:
        step, carry = candidates[name].step, carries.pop(name)
        began = time.perf_counter()
        for _ in range(steps):
            carry = step(carry)
        jax.block_until_ready(carry)
        elapsed = time.perf_counter() - began
        carries[name] = carry
        return elapsed / steps

    def warmed_up(name: str) -> float:
        timed(name)  # where a candidate is not compiled yet, it is now
        return timed(name)

    once = [warmed_up(name) for name in candidates]
    steps = max(1, min(10_000, math.ceil(LEAST / min(once))))
    rounds = min(rounds, max(3, int(MOST / (steps * sum(once)))))
    seconds = {name: np.zeros(rounds) for name in candidates}
    for i in range(rounds):
        for name in list(candidates)[:: 1 if i % 2 == 0 else -1]:
            seconds[name][i] = timed(name, steps)
    return seconds, carries


def compare(
    benchmark: str,
    candidates: Mapping[str, Candidate],
    seconds: Mapping[str, np.ndarray],
    ours: str,
    against: str,
    *,
    speedup: bool = False,
    must: float | None = None,
    goal: float | None = None,
) -> Row:
    """Makes the row of two candidates from what :func:`interleave` measured.

    Args:
      benchmark: the name of the group of rows.
      candidates: the candidates.
      seconds: their times.
      ours: name of the one.
      against: name of the other.
      speedup: whether the ratio is to be theirs over ours.
      must: what the ratio must not exceed (of a speed-up: must reach); None for no such thing.
      goal: the same, wished for.

    Returns:
      The row.
    """
    above, below = (against, ours) if speedup else (ours, against)
    low, median, high = np.quantile(seconds[above] / seconds[below], (0.25, 0.5, 0.75))
    return Row(
        benchmark,
        ours,
        against,
        speedup,
        float(median),
        (float(low), float(high)),
        must,
        goal,
        1e3 * float(np.median(seconds[ours])),
        1e3 * float(np.median(seconds[against])),
        candidates[ours].temporaries,
        candidates[against].temporaries,
        len(seconds[ours]),
    )


def _temporaries(program: Any) -> int | None:
    memory = program.memory_analysis()
    return None if memory is None else int(memory.temp_size_in_bytes)
