"""The pattern's code: against a bit by bit reading of its description, and against the entropy."""

import functools
import itertools
import math

import numpy as np
import pytest

from sparsereg_jax import gap_coding
from sparsereg_jax.gap_coding import BLOCK, decode, encode, entropy_bits, spans

LIMIT = 1.044  # times N·H(density); what is promised is 1.05


def block(*parts, planes=""):
    """The bytes of a block, from numbers and a string of bits."""
    planes += "0" * (-len(planes) % 8)
    return b"".join(parts) + bytes(int(planes[i : i + 8], 2) for i in range(0, len(planes), 8))


def marks(count, inverted=False):
    return (2 * count + inverted).to_bytes(4, "little")


def read(data, size):
    """Decodes one block that takes all the bytes."""
    kept, end = decode(np.frombuffer(data, np.uint8), 0, size)
    assert end == len(data)
    return kept.tolist()


def by_the_book(data, size):
    """Decodes a block as the module's docstring says, bit by bit."""
    count, inverted = divmod(int.from_bytes(data[:4], "little"), 2)
    found = set()
    if count:
        lengths = data[5 : 5 + data[4]]
        bits = iter("".join(f"{byte:08b}" for byte in data[5 + data[4] :]))
        words, code, last = {}, 0, 0
        for length, bucket in sorted((n, bucket) for bucket, n in enumerate(lengths) if n):
            code = code << (length - last)
            words[f"{code:0{length}b}"] = bucket
            code, last = code + 1, length
        codes = [""] * count
        while any(word not in words for word in codes):
            codes = [word if word in words else word + next(bits) for word in codes]
        buckets = [words[word] for word in codes]
        rest = [""] * count
        while any(len(r) < b // 4 for r, b in zip(rest, buckets, strict=True)):
            rest = [
                r + next(bits) if len(r) < b // 4 else r for r, b in zip(rest, buckets, strict=True)
            ]
        at = -1
        for bucket, offset in zip(buckets, rest, strict=True):
            at += 1 + int(f"1{bucket % 4:02b}{offset}", 2) - 4
            found.add(at)
        assert set(bits) <= {"0"}
    return [i for i in range(size) if (i in found) != bool(inverted)]


def patterns():
    rng = np.random.default_rng(0)
    for size in (1, 2, 3, 7, 8, 9, 64, 1000, 5000):
        for density in (0, 0.001, 0.01, 0.1, 0.382, 0.5, 0.7, 0.99, 1):
            yield rng.random(size) < density
    for size in (1, 2, 100, 3000):  # a single mark in each kind of place
        for i in {0, 1, size // 2, size - 1} - {size}:
            yield np.arange(size) == i
            yield np.arange(size) != i
    for step in (1, 2, 3, 5, 64):  # all gaps the same
        yield np.arange(1000) % step == 0
    yield np.repeat(rng.random(100) < 0.3, 37)


def test_by_the_book():
    for keep in patterns():
        data = encode(keep)
        wanted = np.flatnonzero(keep).tolist()
        assert by_the_book(data, keep.size) == wanted
        assert read(data, keep.size) == wanted


def test_a_block_by_hand():
    # Gaps 0, 5, 0: buckets 0 (h = 4 = 0b100), 4 (h = 9 = 0b1001, offset 1) and 0, with the codes
    # 0 and 1. Planes: 010 of the codes, 1 of the offsets.
    data = block(marks(3), bytes([5, 1, 0, 0, 0, 1]), planes="0101")
    assert encode(np.isin(np.arange(9), [0, 6, 7])) == data
    assert read(data, 9) == [0, 6, 7]
    # More than half kept: the zeros are the marks.
    inverted = block(marks(3, inverted=True), data[4:])
    assert encode(~np.isin(np.arange(9), [0, 6, 7])) == inverted
    assert read(inverted, 9) == [1, 2, 3, 4, 5, 8]


@pytest.mark.parametrize("density", [0.0, 3e-6, 0.3, 0.97, 1.0])
def test_a_full_block(density):
    keep = np.random.default_rng(1).random(BLOCK) < density
    keep[-1] = not keep[-1]  # at density 0 and 1: the largest gap there is
    kept, _ = decode(np.frombuffer(encode(keep), np.uint8), 0, BLOCK)
    np.testing.assert_array_equal(kept, np.flatnonzero(keep))


def test_spans():
    for size in (0, 1, BLOCK, BLOCK + 1, 5 * BLOCK - 3):
        found = list(spans(size))
        assert len(found) == math.ceil(size / BLOCK)
        assert [0, *(span.stop for span in found)] == [*(span.start for span in found), size]
        lengths = {span.stop - span.start for span in found}
        assert not lengths or (max(lengths) <= BLOCK and max(lengths) - min(lengths) <= 1)


def test_entropy():
    assert entropy_bits(0, 0) == entropy_bits(9, 0) == entropy_bits(9, 9) == 0
    assert entropy_bits(8, 4) == 8
    assert entropy_bits(100, 25) == pytest.approx(100 * (0.25 * 2 + 0.75 * math.log2(4 / 3)))


def ratio(keep):
    """Coded bits over the bound, everything counted."""
    coded = sum(len(encode(keep[span])) for span in spans(keep.size))
    return 8 * coded / entropy_bits(keep.size, np.count_nonzero(keep))


@functools.cache
def uniform(size):
    return np.random.default_rng(2).random(size, np.float32)


# 0.382 and its complement are the worst: there 1 and 2 bits for the smallest gap are equally good.
@pytest.mark.parametrize(
    "density", [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.36, 0.382, 0.41, 0.5, 0.618, 0.75, 0.9]
)
@pytest.mark.parametrize("size", [10**6, BLOCK + 1])
def test_near_the_entropy(density, size):
    assert 0.99 < ratio(uniform(size) < density) < LIMIT


def structured():
    """Patterns that no independent positions make, each of a million entries and more."""
    rng = np.random.default_rng(3)
    for n, m in ((1, 2), (2, 4), (1, 4), (4, 8), (1, 16)):
        yield f"{n}:{m}", rng.random((2**20 // m, m)).argsort(1).argsort(1) < n
    for share, density in ((0.5, 0.1), (0.9, 0.1), (0.1, 0.5), (0.5, 0.9)):
        out = rng.random(3500) < share
        keep = rng.random((3500, 300)) < density
        yield f"rows {share} {density}", keep & ~out[:, None]
        yield f"columns {share} {density}", keep.T & ~out
    for edge, density in ((2, 0.05), (4, 0.4), (16, 0.2)):
        yield f"runs {edge} {density}", np.repeat(rng.random(2**20 // edge) < density, edge)
        yield (
            f"multiples of {edge} {density}",
            (np.arange(2**20) % edge == 0) & (rng.random(2**20) < density),
        )
    yield "every 37th", np.arange(2**20) % 37 == 0
    yield "one block in the middle", (np.arange(2**20) // 2**16) == 7


def test_structure_costs_nothing():
    found = {name: ratio(np.ascontiguousarray(keep).ravel()) for name, keep in structured()}
    assert len(found) == 21
    assert max(found.values()) < LIMIT, found
    assert found["runs 16 0.2"] < 0.5  # and it may gain


def test_the_code_is_optimal():
    """Against all code lengths that a prefix code of so many words may have."""
    rng = np.random.default_rng(4)
    for size in (2, 3, 4, 5):
        allowed = [
            lengths
            for lengths in itertools.product(range(1, size), repeat=size)
            if sum(2.0**-length for length in lengths) <= 1
        ]
        for _ in range(20):
            counts = rng.integers(1, 60, size) ** rng.integers(1, 3)
            best = min(np.dot(counts, lengths) for lengths in allowed)
            assert np.dot(counts, gap_coding._code_lengths(counts)) == best


TABLE = bytes([2, 1, 1])  # the buckets of the gaps 0 and 1, one bit each
MALFORMED = [
    ("the pattern ends within a block's header", marks(1)[:3], 8),
    ("the pattern marks 5 of 8 entries", marks(5), 8),
    ("the pattern marks 2147483647 of 8 entries", b"\xff" * 4, 8),
    ("no table of code lengths", marks(1), 8),
    ("no table of code lengths", block(marks(1), bytes([3, 1, 1])), 8),
    ("no table of code lengths", block(marks(1), bytes([0])), 8),
    ("no table of code lengths", block(marks(1), bytes([3, 0, 0, 0])), 8),
    ("no table of code lengths", block(marks(1), bytes([2, 1, 31])), 8),
    ("not those of a complete code", block(marks(1), bytes([2, 1, 2])), 8),
    ("not those of a complete code", block(marks(1), bytes([3, 1, 1, 1])), 8),
    ("not those of a complete code", block(marks(1), bytes([1, 1])), 8),
    ("77 buckets of gaps", block(marks(1), bytes([77, *(75 * [0]), 1, 1])), 8),
    ("the pattern ends within a block", block(marks(1), TABLE), 8),
    ("the pattern ends within a block", block(marks(9), TABLE, planes="0" * 8), 20),
    ("bits after a block's end", block(marks(2), TABLE, planes="001"), 8),
    ("the pattern marks entry 3 of 3", block(marks(1), bytes([4, 0, 0, 1, 1]), planes="1"), 3),
    (
        "the pattern marks entry 1835004 of 8",
        block(marks(1), bytes([76, 1, *(74 * [0]), 1]), planes="1" + 18 * "0"),
        8,
    ),
]


@pytest.mark.parametrize(("message", "data", "size"), MALFORMED)
def test_malformed(message, data, size):
    with pytest.raises(ValueError, match=message):
        decode(np.frombuffer(data, np.uint8), 0, size)


def test_whatever_the_bytes():
    rng = np.random.default_rng(5)
    accepted = 0
    sound = encode(rng.random(300) < 0.2)
    for _ in range(3000):
        data = np.frombuffer(sound, np.uint8).copy()
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(data.size)] = rng.integers(256)
        try:
            kept, end = decode(data, 0, 300)
        except ValueError:
            continue
        accepted += 1
        assert end <= data.size
        assert kept.size == 0 or (kept[0] >= 0 and kept[-1] < 300 and (np.diff(kept) > 0).all())
    assert 100 < accepted < 2900
