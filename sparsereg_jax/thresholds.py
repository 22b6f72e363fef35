"""Exact order statistics of |w| without sorting: a radix search that only counts.

The bits of a float with the sign cleared, read as an unsigned integer, order the magnitudes: -0
equals +0, subnormals differ from zero even where the hardware flushes them, Inf lies above every
finite value and NaN above Inf. The threshold is found three bits a pass, from the highest: seven
pivots are compared with every key, the seven counts added up over the tensors, and the counts say
which of the eight intervals to enter. A pass reads the weights once and writes nothing, tensors
are never joined, and devices exchange seven counts (outside jit, of each tensor).

Counts are pairs of 32-bit limbs, exact beyond 2**32 entries without 64-bit mode.
"""

import math
import operator
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array
_DIGIT = 3  # bits a pass; 2**3 - 1 pivots still cost little more than the reading of the weights


class Count(NamedTuple):
    """A non-negative integer ``high * 2**32 + low``, or an array of them."""

    high: Array  # uint32
    low: Array  # uint32


def count_of(number: int | Array) -> Count:
    """Makes a count of a Python int below ``2**64`` or of a non-negative integer array.

    Args:
      number: the integer, or an array of any integer dtype.

    Returns:
      The count, of the shape of ``number``.

    Example:
      >>> [int(limb) for limb in count_of(5 * 2**32 + 7)]
      [5, 7]
    """
    if isinstance(number, int | np.integer):
        number = int(number)
        return Count(jnp.uint32(number >> 32), jnp.uint32(number & 0xFFFFFFFF))
    high = number >> 32 if number.dtype.itemsize == 8 else jnp.zeros_like(number)
    return Count(high.astype(jnp.uint32), number.astype(jnp.uint32))


def counts_of(numbers: Sequence[int]) -> Count:
    """Makes an array of counts of Python ints below ``2**64``."""
    whole = [operator.index(number) for number in numbers]
    limbs = ([n >> 32 for n in whole], [n & 0xFFFFFFFF for n in whole])
    return Count(*(jnp.asarray(np.array(limb, np.uint32)) for limb in limbs))


def to_int(count: Count) -> int:
    """Reads a concrete scalar count on the host.

    Args:
      count: a scalar count.

    Returns:
      Its value.

    Example:
      >>> to_int(count_of(2**40 + 1)) - 2**40
      1
    """
    return (int(count.high) << 32) + int(count.low)


def to_float(count: Count) -> Array:
    """Rounds a count to float32.

    Args:
      count: a count.

    Returns:
      A float32 array of its shape.
    """
    high, low = (jnp.asarray(limb).astype(jnp.float32) for limb in count)
    return high * jnp.float32(2.0**32) + low


def add(a: Count, b: Count) -> Count:
    """Adds two counts, modulo ``2**64``.

    Args:
      a: a count.
      b: a count of the same shape.

    Returns:
      ``a + b``.
    """
    low = a.low + b.low
    return Count(a.high + b.high + (low < a.low).astype(jnp.uint32), low)


def subtract(a: Count, b: Count) -> Count:
    """Subtracts two counts, stopping at zero.

    Args:
      a: a count.
      b: a count of the same shape.

    Returns:
      ``max(a - b, 0)``.
    """
    b = minimum(a, b)
    return Count(a.high - b.high - (a.low < b.low).astype(jnp.uint32), a.low - b.low)


def less(a: Count, b: Count) -> Array:
    """Compares two counts.

    Args:
      a: a count.
      b: a count of the same shape, or a scalar one.

    Returns:
      ``a < b``, boolean.
    """
    return (a.high < b.high) | ((a.high == b.high) & (a.low < b.low))


def equal(a: Count, b: Count) -> Array:
    """Compares two counts.

    Args:
      a: a count.
      b: a count of the same shape, or a scalar one.

    Returns:
      ``a == b``, boolean.
    """
    return (a.high == b.high) & (a.low == b.low)


def minimum(a: Count, b: Count) -> Count:
    """Takes the smaller of two counts.

    Args:
      a: a count.
      b: a count of the same shape, or a scalar one.

    Returns:
      ``min(a, b)``.
    """
    smaller = less(a, b)
    return Count(jnp.where(smaller, a.high, b.high), jnp.where(smaller, a.low, b.low))


@jax.jit
def total(counts: Count) -> Count:
    """Adds up an array of fewer than 2**16 counts over its first axis."""
    low, middle, high = (
        jnp.sum(limb, axis=0, dtype=jnp.uint32)
        for limb in (counts.low & jnp.uint32(0xFFFF), counts.low >> jnp.uint32(16), counts.high)
    )
    return add(Count(high, low), Count(middle >> jnp.uint32(16), middle << jnp.uint32(16)))


def fixed_point(share: float | Array) -> Count:
    """Writes a share of [0, 1] as the integer ``share * 2**63``, rounded down.

    Args:
      share: a Python number, or a float array (clipped to [0, 1]; NaN reads as 0).

    Returns:
      The scaled share. Nothing of a float32, and nothing of a Python float above ``2**-10``, is
      lost that could change the rounding of a count below ``2**39``.
    """
    if isinstance(share, int | float):
        return count_of(int(Fraction(share) * 2**63))
    share = share.astype(jnp.promote_types(share.dtype, jnp.float32))
    scaled = jnp.where(share > 0, jnp.minimum(share, jnp.ones_like(share)), 0) * 2.0**31
    whole = jnp.floor(scaled)
    return Count(whole.astype(jnp.uint32), ((scaled - whole) * 2.0**32).astype(jnp.uint32))


@jax.jit
def share_of(share: float | Array | Count, count: Count) -> Count:
    """Takes ``round(share * count)`` in integers, half to even.

    Args:
      share: the share, as an array or already in fixed point.
      count: a count below ``2**63``.

    Returns:
      The rounded product; no float32 product is exact above ``2**24``.

    Example:
      >>> to_int(share_of(fixed_point(0.75), count_of(2**33 + 2))) - 6 * 2**30
      2
    """
    factor = share if isinstance(share, Count) else fixed_point(share)
    columns = [jnp.uint32(0)] * 9  # the product's 16-bit digits, lowest first
    for i, a in enumerate(_halves(factor)):
        for j, b in enumerate(_halves(count)):
            product = a * b
            columns[i + j] += product & jnp.uint32(0xFFFF)
            columns[i + j + 1] += product >> jnp.uint32(16)
    for i in range(8):
        columns[i + 1] += columns[i] >> jnp.uint32(16)
        columns[i] &= jnp.uint32(0xFFFF)
    limbs = [columns[i] | (columns[i + 1] << jnp.uint32(16)) for i in (0, 2, 4, 6)]
    one, top = jnp.uint32(1), jnp.uint32(31)
    whole = Count((limbs[3] << one) | (limbs[2] >> top), (limbs[2] << one) | (limbs[1] >> top))
    rest = Count(limbs[1] & jnp.uint32(2**31 - 1), limbs[0])
    half = count_of(2**62)
    up = less(half, rest) | (equal(half, rest) & ((whole.low & one) == one))
    return add(whole, Count(jnp.zeros_like(whole.high), up.astype(jnp.uint32)))


def _halves(count: Count) -> list[Array]:
    """Splits a count into four 16-bit digits, lowest first."""
    low, high = jnp.uint32(0xFFFF), jnp.uint32(16)
    return [count.low & low, count.low >> high, count.high & low, count.high >> high]


def count_true(flags: Sequence[Array]) -> Count:
    """Counts the true entries of several boolean arrays of one shape, together in one pass.

    Args:
      flags: boolean arrays, equal in shape. Their computation fuses into the pass.

    Returns:
      A count of shape ``[len(flags)]``, exact at any size.

    Raises:
      ValueError: the arrays have ``2**32`` entries or more and no axis to split them by.
    """
    shape = flags[0].shape
    # One axis is kept in a first sum, for threads to share and for sums that fit 32 bits. It is
    # short enough for 16-bit halves of those sums to be added, and leaves 64 entries to each.
    size = math.prod(shape)
    kept = next(
        (
            axis
            for axis, length in enumerate(shape)
            if length <= 2**16 and 64 * length <= size < 2**32 * length
        ),
        None,
    )
    if kept is None and size >= 2**32:
        raise ValueError(
            f"a leaf of shape {shape} is too large to be counted: at 2**32 entries or more, one of"
            " its axes must be between size / 2**32 and 2**16 long. Reshape or split it."
        )
    axes = tuple(axis for axis in range(len(shape)) if axis != kept)
    # XLA's CPU backend writes out the operand of a plain sum but fuses that of a sum of several
    # arrays; elsewhere plain sums fuse, and are one all-reduce when the arrays are sharded.
    sums = lax.platform_dependent(
        *flags, cpu=lambda *f: _joint_sums(f, axes), default=lambda *f: _plain_sums(f, axes)
    )
    rows = sums.reshape(len(flags), -1)
    low = jnp.sum(rows & jnp.uint32(0xFFFF), axis=1, dtype=jnp.uint32)
    middle = jnp.sum(rows >> jnp.uint32(16), axis=1, dtype=jnp.uint32)
    return add(
        Count(jnp.zeros_like(low), low), Count(middle >> jnp.uint32(16), middle << jnp.uint32(16))
    )


def numbers_left(leaves: Sequence[Array], keeps: Sequence[Array | None]) -> Count:
    """Counts the entries of each tensor that remain: all of them where ``keep`` is None."""
    if all(keep is None for keep in keeps):
        return counts_of([leaf.size for leaf in leaves])
    return _stacked(
        [
            count_of(leaf.size) if keep is None else number_true(keep)
            for leaf, keep in zip(leaves, keeps, strict=True)
        ]
    )


@jax.jit
def number_true(flag: Array) -> Count:
    """Counts the true entries of one boolean array."""
    return _at(count_true([flag]), 0)


def _joint_sums(flags: Sequence[Array], axes: tuple[int, ...]) -> Array:
    """Sums each array over ``axes`` by one reduction of all."""
    alone = len(flags) == 1
    sums = lax.reduce(
        tuple(flag.astype(jnp.uint32) for flag in ((*flags, ~flags[0]) if alone else flags)),
        (jnp.uint32(0),) * (len(flags) + alone),
        lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True)),
        axes,
    )
    # A lone array is summed beside its complement, which XLA must not find unused.
    return jnp.stack(lax.optimization_barrier(sums)[:1] if alone else sums)


def _plain_sums(flags: Sequence[Array], axes: tuple[int, ...]) -> Array:
    """Sums each array over ``axes`` by a reduction of its own."""
    return jnp.stack([jnp.sum(flag, axis=axes, dtype=jnp.uint32) for flag in flags])


def common_dtype(leaves: Sequence[Array]) -> np.dtype:
    """Chooses the float dtype in which all the leaves' magnitudes can be compared exactly.

    Args:
      leaves: float arrays.

    Returns:
      Their dtype if it is one, else float64 or float32.
    """
    dtypes = {np.dtype(leaf.dtype) for leaf in leaves}
    if len(dtypes) == 1:
        return dtypes.pop()
    return np.dtype(jnp.float64 if np.dtype(jnp.float64) in dtypes else jnp.float32)


def magnitude(leaf: Array, dtype: Any = None) -> Array:
    """Maps each entry to an unsigned integer that orders like its magnitude, NaN above Inf.

    Args:
      leaf: a float array.
      dtype: a float dtype that holds all values of the leaf's; its own by default.

    Returns:
      The bits of ``abs(leaf)`` in ``dtype``: an unsigned integer array of the leaf's shape, below
      the highest bit.

    Example:
      >>> import jax.numpy as jnp
      >>> bool(magnitude(jnp.float32(-1e-45)) > magnitude(jnp.float32(-0.0)))
      True
    """
    own, wide = jnp.finfo(leaf.dtype), jnp.finfo(leaf.dtype if dtype is None else dtype)
    if own.bits < 16 and wide.bits > own.bits:  # of the many forms of 8 bits some have no Inf
        return magnitude(leaf.astype(jnp.float32), wide.dtype)
    unsigned = jnp.dtype(f"uint{own.bits}")
    bits = lax.bitcast_convert_type(leaf, unsigned) & unsigned.type(2 ** (own.bits - 1) - 1)
    if own.dtype == wide.dtype:
        return bits
    # Widened as integers, since a conversion of floats may flush subnormals.
    goal = jnp.dtype(f"uint{wide.bits}")
    rebias = goal.type((own.minexp - wide.minexp) << wide.nmant)
    key = (bits.astype(goal) << goal.type(wide.nmant - own.nmant)) + rebias
    if own.minexp == wide.minexp:
        return key  # bfloat16 in float32: only the fraction grows
    infinite = bits >= unsigned.type(((1 << own.nexp) - 1) << own.nmant)
    tiny = bits < unsigned.type(1 << own.nmant)  # zero and subnormals: a multiple of the least one
    multiple = bits.astype(wide.dtype) * wide.dtype.type(2.0 ** (own.minexp - own.nmant))
    key = jnp.where(infinite, key + rebias, key)
    return jnp.where(tiny, lax.bitcast_convert_type(multiple, goal), key)


def _key(leaf: Array, keep: Array | None, dtype: Any) -> Array:
    """Magnitudes of what remains."""
    key = magnitude(leaf, dtype)
    return key if keep is None else _only(key, keep)


def _only(key: Array, flag: Array) -> Array:
    """Keys where a flag is true, all ones elsewhere; a select would not be vectorized so well."""
    return key | (flag.astype(key.dtype) - jnp.ones((), key.dtype))


class Found(NamedTuple):
    """Where a search ended; counts are arrays of one a tensor."""

    threshold: Array  # scalar of the keys' dtype
    below: Count  # how many keys lie below the threshold
    certain: Count  # how many lie below the integer before it: the other ones are ties


def search(
    passed: Callable[[Any, Array], Sequence[Count]],
    numbers: Count,
    count: Count,
    bits: int,
    dtype: Any,
    rooms: Count | None = None,
    loop: Callable[..., Any] = lax.fori_loop,
) -> Found:
    """Finds the least integer below which at least ``count`` keys lie.

    Args:
      passed: from the number of a pass and the floor that it begins with to the number of each
        tensor's keys below the pivots, by :func:`count_below`. All ones stand for "no key".
      numbers: an array of one count a tensor, how many keys it has: of use for ``below`` alone.
      count: a scalar count, at most the number of keys (of those that have room).
      bits: keys are below ``2**bits``, less than the width of their dtype.
      dtype: that of the keys, unsigned.
      rooms: an array of one count a tensor, the most of its keys that may count; without limit by
        default.
      loop: ``fori_loop``, or what does the same by calling each pass from the host.

    Returns:
      The threshold, 0 if ``count`` is 0, and each tensor's number of keys below it.

    Example:
      >>> import jax.numpy as jnp
      >>> key = jnp.uint32([7, 3, 3, 9])
      >>> passed = lambda i, floor: [count_below(key, i, floor, bits=4)]
      >>> found = search(passed, counts_of([4]), count_of(2), bits=4, dtype=key.dtype)
      >>> int(found.threshold), int(found.below.low[0]), int(found.certain.low[0])
      (4, 2, 0)
    """

    def enter(i: Array, found: Found) -> Found:
        return _enter(i, found, passed(i, found.threshold), count, rooms, bits)

    return _closed(loop(0, -(-bits // _DIGIT), enter, _start(numbers, dtype)), count)


def count_below(key: Array, i: Any, floor: Array, bits: int) -> Count:
    """Counts a tensor's keys below the pivots of a pass of :func:`search`.

    Args:
      key: unsigned integers.
      i: the number of the pass.
      floor: the floor that it begins with.
      bits: those of the search.

    Returns:
      A count of shape ``[7]``.
    """
    steps = jnp.arange(1, 2**_DIGIT, dtype=key.dtype)
    return count_true([key < pivot for pivot in floor + (steps << _shift(i, bits, key.dtype))])


@partial(jax.jit, static_argnames="dtype")
def _start(numbers: Count, dtype: Any) -> Found:
    """Before the first pass all lies between 0 and the end."""
    return Found(jnp.zeros((), dtype), numbers, Count(*map(jnp.zeros_like, numbers)))


def _shift(i: Any, bits: int, dtype: Any) -> Array:
    return jnp.maximum(bits - _DIGIT * (i + 1), 0).astype(dtype)


@partial(jax.jit, static_argnames="bits")
def _enter(
    i: Any, found: Found, below: Sequence[Count], count: Count, rooms: Count | None, bits: int
) -> Found:
    """Goes into the interval between two pivots that the count lies in."""
    counts = _stacked(below)
    counted = counts if rooms is None else minimum(counts, Count(*(x[:, None] for x in rooms)))
    digit = jnp.sum(less(total(counted), count), dtype=jnp.uint32)
    # Counts at the floor, at the pivots and at the end; two of them bound the new interval.
    ends = [
        jnp.concatenate([low[:, None], middle, high[:, None]], axis=1)
        for low, middle, high in zip(found.certain, counts, found.below, strict=True)
    ]
    certain, above = (
        Count(*(lax.dynamic_index_in_dim(end, at, 1, keepdims=False) for end in ends))
        for at in (digit, digit + 1)
    )
    dtype = found.threshold.dtype
    return Found(found.threshold + (digit.astype(dtype) << _shift(i, bits, dtype)), above, certain)


@jax.jit
def _closed(found: Found, count: Count) -> Found:
    """The threshold is the first integer above the floor, and nothing lies below one of 0."""
    floor, nothing = found.threshold, equal(count, count_of(0))
    return Found(
        jnp.where(nothing, jnp.zeros_like(floor), floor + floor.dtype.type(1)),
        Count(*(jnp.where(nothing, jnp.zeros_like(limb), limb) for limb in found.below)),
        found.certain,
    )


class Plan(NamedTuple):
    """What is to go from several tensors; counts are arrays of one a tensor."""

    threshold: Array  # scalar key: entries below it go, unless that is more than `drop`
    below: Count  # how many remaining entries are below it
    drop: Count  # how many go, at most `below`


def plan(
    leaves: Sequence[Array],
    keeps: Sequence[Array | None],
    remaining: Count,
    floors: Count,
    drop: Count,
    exact_ties: bool,
) -> Plan:
    """Decides how many of the smallest magnitudes go from each of several tensors.

    With C(t) the sum over the tensors of ``min(entries below t, remaining - floor)``, the common
    threshold is the least t with C(t) >= the number to drop, so that a tensor at its floor leaves
    the rest to the others.

    A pass over one tensor compiles for a fifth of a second and more. On concrete arrays each is
    called from the host, so that tensors of one shape share a program; traced, all are one. Several
    tensors on the host, a single one traced is what is fast.

    Args:
      leaves: float arrays, of any dtypes.
      keeps: for each the boolean array of what remains, or None for everything.
      remaining: for each the number of entries that remain, by :func:`numbers_left`.
      floors: for each the least number of entries that stay.
      drop: the number to drop; cut to what the floors allow.
      exact_ties: drop no more than that number of entries tied at the threshold, the first
        tensors' first; otherwise all of them.

    Returns:
      The plan, for :func:`cut`.
    """
    dtype = common_dtype(leaves)
    bits = jnp.finfo(dtype).bits
    remaining, rooms, goal = _rooms(leaves, remaining, floors, drop)

    def passed(i: Any, floor: Array) -> list[Count]:
        return [
            _count_leaf(leaf, keep, i, floor, dtype)
            for leaf, keep in zip(leaves, keeps, strict=True)
        ]

    loop = lax.fori_loop if is_traced((leaves, keeps, goal)) else _loop_on_the_host
    found = search(passed, remaining, goal, bits - 1, f"uint{bits}", rooms, loop)
    return _planned(found, rooms, goal, exact_ties)


def is_traced(tree: Any) -> bool:
    """Whether any of the arrays is abstract: within ``jit``, ``vmap`` and the like."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def _loop_on_the_host(lower: int, upper: int, body: Callable[[Any, Any], Any], state: Any) -> Any:
    for i in range(lower, upper):
        state = body(i, state)
    return state


@partial(jax.jit, keep_unused=True)
def _rooms(
    leaves: Sequence[Array], remaining: Count, floors: Count, drop: Count
) -> tuple[Count, Count, Count]:
    """How many entries remain in each tensor, how many may go, and how many are to go in all.

    The leaves are there for the counts to lie on their devices: else each pass compiles twice.
    """
    del leaves
    rooms = subtract(remaining, floors)
    return remaining, rooms, minimum(drop, total(rooms))


@partial(jax.jit, static_argnames="dtype")
def _count_leaf(leaf: Array, keep: Array | None, i: Any, floor: Array, dtype: Any) -> Count:
    # The barrier keeps XLA from lifting the keys out of the loop, which would store them.
    leaf, keep, floor = lax.optimization_barrier((leaf, keep, floor))
    return count_below(_key(leaf, keep, dtype), i, floor, jnp.finfo(dtype).bits - 1)


@partial(jax.jit, static_argnames="exact_ties")
def _planned(found: Found, rooms: Count, goal: Count, exact_ties: bool) -> Plan:
    drop = minimum(found.below, rooms)
    if exact_ties:
        certain = minimum(found.certain, rooms)

        def share(ties: Count, tied: Count) -> tuple[Count, Count]:
            taken = minimum(tied, ties)
            return subtract(ties, taken), taken

        _, taken = lax.scan(share, subtract(goal, total(certain)), subtract(drop, certain))
        drop = add(certain, taken)
    return Plan(found.threshold, found.below, drop)


def plan_below(leaf: Array, keep: Array | None, floor: Count, threshold: Array) -> Plan:
    """Decides how many entries of magnitude at most ``threshold`` go from one tensor.

    Args:
      leaf: a float array.
      keep: the boolean array of what remains, or None for everything.
      floor: the least number of entries that stay, of shape ``[1]``.
      threshold: a float scalar of a dtype at least as wide as the leaf's. Nothing goes if it is
        negative or NaN.

    Returns:
      The plan, for :func:`cut`.
    """
    key = _key(leaf, keep, threshold.dtype)
    bound = magnitude(threshold)
    positive = lax.bitcast_convert_type(threshold, bound.dtype) == bound
    infinity = magnitude(jnp.array(jnp.inf, threshold.dtype))
    takes = (positive | (bound == 0)) & (bound <= infinity)
    bound = jnp.where(takes, bound + jnp.ones_like(bound), jnp.zeros_like(bound))
    below = count_true([key < bound])
    return Plan(bound, below, minimum(below, subtract(numbers_left([leaf], [keep]), floor)))


def cut(leaf: Array, keep: Array | None, made: Plan, i: Any, dtype: Any) -> Array:
    """Carries out a plan for one tensor, by :func:`cut_below` or :func:`cut_lowest` as it needs.

    Args:
      leaf: the float array.
      keep: the boolean array of what remains, or None for everything.
      made: the plan.
      i: the tensor's number in it.
      dtype: the float dtype that the plan was made in.

    Returns:
      The boolean array of what remains then: exactly ``made.drop[i]`` entries fewer.
    """
    return lax.cond(
        takes_all(made)[i],
        lambda: cut_below(leaf, keep, made.threshold, dtype),
        lambda: cut_lowest(leaf, keep, _at(made.drop, i)),
    )


@jax.jit
def takes_all(made: Plan) -> Array:
    """Whether all entries below the threshold go from a tensor, not fewer (a floor, or ties)."""
    return equal(made.drop, made.below)


def cut_below(leaf: Array, keep: Array | None, threshold: Array, dtype: Any) -> Array:
    """Carries out a plan that takes all below its threshold: one comparison."""
    return _stays(keep, _key(leaf, keep, dtype) < threshold)


def cut_lowest(leaf: Array, keep: Array | None, drop: Count) -> Array:
    """Carries out any plan: the tensor is searched alone, equal magnitudes go by flat index."""
    return _stays(keep, _lowest(leaf, keep, drop))


def _stays(keep: Array | None, gone: Array) -> Array:
    return ~gone if keep is None else keep & ~gone


def _lowest(leaf: Array, keep: Array | None, count: Count) -> Array:
    """Marks the ``count`` remaining entries of least magnitude, by flat index among equals."""
    arrays = (leaf, keep)

    def key_of(a: Any) -> Array:
        leaf, keep = a
        return _key(leaf, keep, dtype=None)

    def found(key_of: Callable[[Any], Array], count: Count, bits: int) -> Found:
        def passed(i: Any, floor: Array) -> list[Count]:
            held, floor = lax.optimization_barrier((arrays, floor))
            return [count_below(key_of(held), i, floor, bits)]

        dtype = jax.eval_shape(key_of, arrays).dtype
        return search(passed, counts_of([leaf.size]), count, bits, dtype)

    last = found(key_of, count, jnp.finfo(leaf.dtype).bits - 1)
    tie, left = _predecessor(last.threshold), subtract(count, _at(last.certain, 0))
    ends: list[Array] = []  # the last tie to go: its coordinates, in place of a longer flat index

    def tied(a: Any, ends: Sequence[Array]) -> Array:
        flag = key_of(a) == tie
        for axis, end in enumerate(ends):
            flag &= lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) == end
        return flag

    def index_of(a: Any, axis: int, ends: Sequence[Array]) -> Array:
        return _only(lax.broadcasted_iota(jnp.uint32, leaf.shape, axis), tied(a, ends))

    for axis, length in enumerate(leaf.shape):
        index = partial(index_of, axis=axis, ends=tuple(ends))
        last = found(index, left, length.bit_length())
        left = subtract(left, _at(last.certain, 0))
        ends.append(_predecessor(last.threshold))
    marked = key_of(arrays) < tie
    for axis, end in enumerate(ends):
        marked |= index_of(arrays, axis, ends[:axis]) < end
    return marked | (tied(arrays, ends) & less(count_of(0), left))


def _predecessor(key: Array) -> Array:
    """The key below, 0 for 0."""
    return key - (key > 0).astype(key.dtype)


def _at(counts: Count, i: Any) -> Count:
    """One of an array of counts."""
    return Count(counts.high[i], counts.low[i])


@jax.jit
def _stacked(counts: Sequence[Count]) -> Count:
    """Counts of one shape as one array, the first axis numbering them."""
    return Count(jnp.stack([c.high for c in counts]), jnp.stack([c.low for c in counts]))
