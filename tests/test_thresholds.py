"""Counting and order statistics, against Python integers and a NumPy sort."""

from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from sparsereg_jax import thresholds
from sparsereg_jax.thresholds import Count, count_of, to_int

EDGES = [0, 1, 2**16, 2**24 + 1, 2**31, 2**32 - 1, 2**32, 2**33 + 3, 2**40 + 2**32 - 1, 2**62]


def x64():
    """A context of 64-bit mode in old and new versions of jax."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    from jax.experimental import enable_x64

    return enable_x64()


def special(dtype, size, seed):
    """Random values with ties, both zeros, subnormals, infinities and NaN among them."""
    rng = np.random.default_rng(seed)
    info = jnp.finfo(dtype)
    least = float(info.smallest_subnormal)
    odd = np.array(
        [
            0.0,
            -0.0,
            least,
            -least,
            3 * least,
            float(info.tiny),
            float(info.max),
            -float(info.max),
            np.inf,
            -np.inf,
            np.nan,
            1.0,
            -1.0,
            1.0,
        ]
    )
    values = np.where(rng.random(size) < 0.5, rng.choice(odd, size), rng.normal(size=size))
    return values.astype(dtype)


def order(values):
    """float64 magnitudes with NaN as the largest."""
    magnitudes = np.abs(np.asarray(values).astype(np.float64))
    return np.where(np.isnan(magnitudes), np.inf, magnitudes), np.isnan(magnitudes)


@jax.jit
def arithmetic(a, b):
    return (
        thresholds.add(a, b),
        thresholds.subtract(a, b),
        thresholds.minimum(a, b),
        thresholds.less(a, b),
        thresholds.equal(a, b),
    )


@pytest.mark.parametrize("a", EDGES)
def test_counts_are_64_bit_integers(a):
    for b in EDGES:
        total, difference, smaller, less, equal = arithmetic(count_of(a), count_of(b))
        assert to_int(total) == a + b
        assert to_int(difference) == max(a - b, 0)
        assert to_int(smaller) == min(a, b)
        assert (bool(less), bool(equal)) == (a < b, a == b)
    assert float(thresholds.to_float(count_of(a))) == pytest.approx(a, rel=2e-7)


def test_counts_of_arrays():
    assert to_int(count_of(jnp.int32(7))) == 7
    assert to_int(count_of(jnp.uint32(2**32 - 1))) == 2**32 - 1
    with x64():
        assert to_int(count_of(jnp.int64(2**40 + 5))) == 2**40 + 5


def test_share_rounds_half_to_even_exactly():
    rng = np.random.default_rng(0)
    shares = [0.0, 1.0, 0.5, 0.25, 0.9, 1 / 3, 1e-30, *rng.random(20)]
    for share in shares:
        for n in (0, 1, 2, 3, 5, 6, 2**24 + 1, 25_178_113, 2**33 + 3, 2**38 - 1):
            whole = thresholds.share_of(thresholds.fixed_point(float(share)), count_of(n))
            assert to_int(whole) == round(Fraction(float(share)) * n)
            single = np.float32(share)
            traced = thresholds.share_of(jnp.asarray(single), count_of(n))
            assert to_int(traced) == round(Fraction(float(single)) * n)


def test_share_of_traced_values_out_of_range():
    count = count_of(10)
    got = [to_int(thresholds.share_of(jnp.float32(share), count)) for share in (-1.0, 2.0, np.nan)]
    assert got == [0, 10, 0]
    assert to_int(thresholds.share_of(jnp.bfloat16(0.5), count)) == 5


@pytest.mark.parametrize("shape", [(), (5,), (0, 3), (3, 0), (70, 130), (200, 3), (2, 3, 40, 5)])
def test_count_true(shape):
    flags = np.random.default_rng(1).random((3, *shape)) < 0.4
    counts = jax.jit(lambda *f: thresholds.count_true(f))(*flags)
    assert counts.high.tolist() == [0, 0, 0]
    assert counts.low.tolist() == flags.reshape(3, -1).sum(1).tolist()
    plain = thresholds._plain_sums(list(jnp.asarray(flags)), tuple(range(len(shape))))
    assert plain.tolist() == counts.low.tolist()  # the form that other platforms take


@pytest.mark.slow
def test_count_true_beyond_32_bits():
    """An array of 2**32 + 2**17 entries that is never stored."""
    shape = (2**15 + 1, 2**17)

    @jax.jit
    def count(odd):
        column = lax.broadcasted_iota(jnp.uint32, shape, 1)
        return thresholds.count_true([column >= odd, (column & jnp.uint32(1)) == odd])

    counts = count(jnp.uint32(1))
    high, low = (np.asarray(limb).astype(object) for limb in counts)
    assert (high * 2**32 + low).tolist() == [(2**15 + 1) * (2**17 - 1), (2**15 + 1) * 2**16]


def test_a_leaf_too_large_to_count_is_an_error():
    flag = jax.ShapeDtypeStruct((2**33,), jnp.bool_)
    with pytest.raises(ValueError, match="too large to be counted"):
        jax.eval_shape(lambda f: thresholds.count_true([f]), flag)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64])
def test_magnitudes_order_like_a_sort(dtype):
    with x64():
        values = special(dtype, 400, 2)
        key = np.asarray(thresholds.magnitude(jnp.asarray(values)))
        magnitudes, nan = order(values)
        assert key.dtype.itemsize == values.dtype.itemsize
        np.testing.assert_array_equal(
            key.argsort(kind="stable"), np.lexsort((np.arange(400), nan, magnitudes))
        )
        same = (magnitudes[:, None] == magnitudes) & (nan[:, None] == nan)
        np.testing.assert_array_equal(key[:, None] == key, same)


@pytest.mark.parametrize(
    ("narrow", "wide"),
    [
        (jnp.bfloat16, jnp.float32),
        (jnp.float16, jnp.float32),
        (jnp.float32, jnp.float64),
        (jnp.bfloat16, jnp.float64),
        (jnp.float16, jnp.float64),
    ],
)
def test_widened_magnitudes_are_exact(narrow, wide):
    """All bit patterns of the half precisions, special ones of float32."""
    with x64():
        values = (
            special(narrow, 400, 3)
            if narrow == jnp.float32
            else np.arange(2**16, dtype=np.uint16).view(narrow)
        )
        got = np.asarray(jax.jit(partial(thresholds.magnitude, dtype=wide))(jnp.asarray(values)))
        infinity = np.array(np.inf, wide).view(got.dtype)
        own_infinity = np.array(np.inf, narrow).view(f"u{values.itemsize}")
        nan = np.asarray(thresholds.magnitude(jnp.asarray(values))) > own_infinity
        assert nan.any()
        np.testing.assert_array_equal(got > infinity, nan)
        np.testing.assert_array_equal(got[~nan], np.abs(values[~nan].astype(wide)).view(got.dtype))


@jax.jit
def found_by(keys, count, rooms=None):
    bits, dtype = jnp.iinfo(keys[0].dtype).bits - 1, keys[0].dtype

    def passed(i, floor):
        return [thresholds.count_below(key, i, floor, bits) for key in keys]

    numbers = thresholds.numbers_left(keys, [key <= jnp.iinfo(dtype).max >> 1 for key in keys])
    return thresholds.search(passed, numbers, count, bits, dtype, rooms)


def threshold_of(key, count):
    return found_by([key], count).threshold


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_search_is_a_sort(dtype):
    rng = np.random.default_rng(4)
    top = 2 ** (8 * np.dtype(dtype).itemsize - 1) - 1
    key = np.concatenate([rng.integers(0, top, 90), [0, 0, 5, 5, 5, top, top]]).astype(dtype)
    ordered = np.sort(key)
    for count in range(len(key) + 1):
        expected = int(ordered[count - 1]) + 1 if count else 0
        assert int(threshold_of(key, count_of(count))) == expected
    # All ones are no keys.
    alone = np.array([2 * top + 1, top, 2 * top + 1], dtype)
    assert int(threshold_of(alone, count_of(1))) == top + 1


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_search_counts_each_tensor(dtype):
    rng = np.random.default_rng(6)
    top = 2 ** (8 * np.dtype(dtype).itemsize - 1) - 1
    keys = [rng.integers(0, 30, 40).astype(dtype), np.array([3, 3, top, top], dtype)]
    keys.append(np.array([7, 2 * top + 1], dtype))  # all ones are no keys
    rooms = (25, 4, 0)

    def below(bound, rooms):
        numbers = [int(np.sum(key < bound)) for key in keys]
        return numbers if rooms is None else np.minimum(numbers, rooms).tolist()

    for allowed in (None, rooms):
        limit = None if allowed is None else thresholds.counts_of(allowed)
        for count in range(sum(below(top + 1, allowed)) + 1):
            found = found_by(keys, count_of(count), limit)
            bounds = [0, *(int(key) + 1 for key in np.unique(np.concatenate(keys)))]
            bound = next(b for b in bounds if sum(below(b, allowed)) >= count)
            assert int(found.threshold) == bound
            assert found.below.low.tolist() == below(bound, None)
            assert found.certain.low.tolist() == below(max(bound, 1) - 1, None)
            assert not np.any([found.below.high, found.certain.high])


def test_search_of_64_bit_keys():
    with x64():
        key = np.array([2**63 - 1, 2**40, 2**40 + 1, 0], np.uint64)
        found = [int(threshold_of(key, count_of(count))) for count in range(5)]
        assert found == [0, 1, 2**40 + 1, 2**40 + 2, 2**63]


def test_search_compiles_once_and_maps_over_a_batch():
    keys = np.random.default_rng(5).integers(0, 2**31, (4, 60)).astype(np.uint32)
    counts = Count(jnp.zeros(4, jnp.uint32), jnp.arange(4, dtype=jnp.uint32) * 15)
    together = jax.vmap(threshold_of)(keys, counts)
    before = found_by._cache_size()
    alone = [int(threshold_of(key, count_of(15 * i))) for i, key in enumerate(keys)]
    assert together.tolist() == alone
    assert found_by._cache_size() <= before + 1


def walk(leaves, keeps, count, floor, exact_ties):
    """The entries in order of magnitude, leaf and index, dropped one by one while there is room."""
    keeps = [np.array(keep) for keep in keeps]
    entries = sorted(
        (not_a_number, magnitude, leaf, index)
        for leaf, values in enumerate(leaves)
        for index, (magnitude, not_a_number) in enumerate(
            zip(*map(np.ravel, order(values)), strict=True)
        )
        if keeps[leaf].flat[index]
    )
    room = [max(int(keep.sum()) - floor, 0) for keep in keeps]
    count, last = min(count, sum(room)), None
    for *magnitude, leaf, index in entries:
        if count <= 0 and (exact_ties or magnitude != last):
            break
        if room[leaf]:
            keeps[leaf].flat[index] = False
            room[leaf] -= 1
            count -= 1
            last = magnitude
    return keeps


@partial(jax.jit, static_argnames="exact_ties")
def pruned(leaves, keeps, count, floor, exact_ties):
    remaining = thresholds.numbers_left(leaves, keeps)
    floors = thresholds.Count(*(jnp.full(len(leaves), limb) for limb in floor))
    plan = thresholds.plan(leaves, keeps, remaining, floors, count, exact_ties)
    dtype = thresholds.common_dtype(leaves)
    return [
        thresholds.cut(leaf, keep, plan, i, dtype)
        for i, (leaf, keep) in enumerate(zip(leaves, keeps, strict=True))
    ]


DTYPES = {
    "f32": (np.float32,) * 4,
    "bf16": (jnp.bfloat16,) * 4,
    "f16": (np.float16,) * 4,
    "halves": (jnp.bfloat16, np.float16, np.float16, jnp.bfloat16),
    "all": (np.float32, np.float64, jnp.bfloat16, np.float16),
}


@pytest.mark.slow
@pytest.mark.parametrize("exact_ties", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_plans_are_a_walk_in_order(dtypes, exact_ties):
    rng = np.random.default_rng(6)
    with x64():
        leaves = [
            special(dtype, size, seed).reshape(shape)
            for seed, (dtype, shape, size) in enumerate(
                zip(DTYPES[dtypes], [(5, 4, 3), (17,), (), (0, 2)], [60, 17, 1, 0], strict=True)
            )
        ]
        full = [np.ones(leaf.shape, bool) for leaf in leaves]
        some = [np.asarray(rng.random(leaf.shape) < 0.7) for leaf in leaves]
        for keeps, count, floor in [
            (full, 0, 1),
            (full, 1, 1),
            (full, 20, 0),
            (full, 33, 4),
            (full, 70, 9),
            (full, 78, 0),
            (full, 10**12, 3),
            (some, 21, 1),
            (some, 30, 8),
            (some, 3, 30),
        ]:
            got = pruned(
                [jnp.asarray(leaf) for leaf in leaves],
                keeps,
                count_of(count),
                count_of(floor),
                exact_ties,
            )
            expected = walk(leaves, keeps, count, floor, exact_ties)
            for a, b in zip(got, expected, strict=True):
                np.testing.assert_array_equal(a, b, err_msg=f"{count=} {floor=}")
    assert pruned._cache_size() <= 2 * len(DTYPES)


def test_sharded_counts_are_reduced_not_gathered():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("a", "b"))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a", "b"))
    x = jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=spec)

    def plain(x):
        return thresholds._plain_sums([x > 0, x > 1, x > 2], (0, 1))

    program = jax.jit(plain).lower(x).compile().as_text()
    assert "all-reduce(" in program
    assert "all-gather" not in program
