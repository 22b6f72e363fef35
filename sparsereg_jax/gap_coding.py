"""Which entries of an array are kept, in few bits: their gaps in a Huffman code, plane by plane.

The entries are taken in C order. N of them are cut into B = ceil(N / 2^20) blocks, block i being
those from floor(i N / B) to floor((i + 1) N / B). A block that keeps more than half of its entries
is described by those it drops. The distances between neighbours, gaps, go
into buckets, four to each power of two; the buckets have a Huffman code made for the block. What
makes it fast without a compiler is the order of the bits: the first bit of every bucket's code,
then the second bit of every code that has one, and so on, then the offsets within the buckets in
the same way, so that each plane is read and written in one go by NumPy.

Independent positions take at most 1.044 times their entropy (:func:`entropy_bits`) at any density
from 0.005 to 0.9, the worst being 0.38 and 0.62, where no code of single gaps is better than 1.042.

A block, in bytes:

- 4, little endian: twice the number of marks, plus 1 where the marks are the entries dropped;
  without marks nothing follows;
- 1: the number of buckets; then 1 a bucket: the length of its code in bits, 0 where it is not used;
- the planes, first bit highest, without breaks between them; zeros fill up the last byte.

Codes are canonical: shorter ones first, those of equal length in the order of the buckets, counting
up. With h = gap + 4 and e = floor(log2(h)), the bucket is 4 (e - 2) and the two bits of h after its
first; the offset is the e - 2 bits after those.
"""

import heapq
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

BLOCK = 2**20  # entries at most; below 2**23, where float32 holds every gap exactly
BUCKETS = 4 * 19  # at most: the largest gap of a block is in the last four
HEADER = 4  # bytes, at the least, that a block takes
LONGEST = 30  # bits of a code; half a block of gaps cannot make one of more than 27


def entropy_bits(size: int, kept: int) -> float:
    """The entropy of independent positions of this density: N·H(K/N), the bound.

    Args:
      size: N, the number of entries.
      kept: K, the number of those kept.

    Returns:
      Bits.

    Example:
      >>> entropy_bits(1000, 500)
      1000.0
      >>> round(entropy_bits(1000, 10), 1)
      80.8
    """
    shares = (kept / size, 1 - kept / size) if size else (1.0,)
    return -size * sum(share * math.log2(share) for share in shares if share) + 0.0


def spans(size: int) -> Iterator[slice]:
    """Cuts ``size`` entries into the fewest blocks, equally long but for one entry.

    Args:
      size: the number of entries.

    Yields:
      The blocks, in order.

    Example:
      >>> list(spans(3))
      [slice(0, 3, None)]
    """
    count = block_count(size)
    for i in range(count):
        yield slice(i * size // count, (i + 1) * size // count)


def block_count(size: int) -> int:
    """The number of blocks of ``size`` entries."""
    return -(-size // BLOCK)


def encode(keep: Array) -> bytes:
    """Codes one block.

    Args:
      keep: bool[entries], at most ``BLOCK`` of them.

    Returns:
      The bytes of the block.

    Example:
      >>> encode(np.zeros(1000, bool)).hex()
      '00000000'
      >>> len(encode(np.arange(1000) % 100 == 0))
      30
    """
    inverted = bool(2 * np.count_nonzero(keep) > keep.size)
    marks = np.flatnonzero(~keep if inverted else keep)
    header = (2 * marks.size + inverted).to_bytes(HEADER, "little")
    if not marks.size:
        return header
    gaps = (np.diff(marks, prepend=-1) - 1).astype(np.int32)
    # The exponent of a float32 and the two bits after it are the bucket.
    buckets = ((gaps + 4).astype(np.float32).view(np.int32) >> 21) - ((127 + 2) << 2)
    lengths = _code_lengths(np.bincount(buckets))
    codes = _canonical(lengths)
    planes = [
        *_planes(codes.take(buckets), lengths.astype(np.int32).take(buckets)),
        *_planes(gaps + 4, buckets >> 2),
    ]
    table = bytes([lengths.size]) + lengths.tobytes()
    return header + table + np.packbits(np.concatenate(planes)).tobytes()


def decode(data: Array, start: int, size: int) -> tuple[Array, int]:
    """Reads one block, whatever the bytes are.

    Args:
      data: uint8[bytes], from any source.
      start: where the block begins.
      size: the number of its entries, at most ``BLOCK``.

    Returns:
      The positions of the entries kept, int64[kept], rising, and where the block ends. It takes
      memory for some copies of the block's entries at most.

    Raises:
      ValueError: the bytes are no block of this size.

    Example:
      >>> block = np.frombuffer(encode(np.array([True, False, False, True])), np.uint8)
      >>> decode(block, 0, 4)
      (array([0, 3]), 9)
    """
    if data.size < start + HEADER:
        raise ValueError("the pattern ends within a block's header")
    count, inverted = divmod(int.from_bytes(data[start : start + HEADER].tobytes(), "little"), 2)
    start += HEADER
    if 2 * count > size:
        raise ValueError(f"the pattern marks {count} of {size} entries, more than half")
    if not count:
        return np.arange(size if inverted else 0), start
    lengths = _read_table(data, start)
    bits = _Bits(data, start + 1 + lengths.size)
    buckets = _read_codes(bits, count, lengths)
    widths = buckets >> 2
    offsets = _read_offsets(bits, widths)
    gaps = (((4 + (buckets & 3)) << widths) | offsets) - 4
    marks = np.cumsum(gaps + 1, dtype=np.int64) - 1
    if marks[-1] >= size:
        raise ValueError(f"the pattern marks entry {marks[-1]} of {size}")
    end = bits.end()
    if inverted:
        keep = np.ones(size, bool)
        keep[marks] = False
        marks = np.flatnonzero(keep)
    return marks, end


def _code_lengths(counts: Array) -> Array:
    """Code lengths of Huffman's algorithm, uint8[buckets], at least two of them not 0."""
    lengths = np.zeros(max(counts.size, 2), np.uint8)
    used = np.flatnonzero(counts)
    if used.size == 1:  # a code has two words: let another bucket have the second
        lengths[[used[0], 0 if used[0] else 1]] = 1
        return lengths
    heap = [(int(count), i, [i]) for i, count in enumerate(counts) if count]
    heapq.heapify(heap)
    while len(heap) > 1:
        (least, _, some), (next_to_least, tie, others) = heapq.heappop(heap), heapq.heappop(heap)
        lengths[some + others] += 1
        heapq.heappush(heap, (least + next_to_least, tie, some + others))
    return lengths


def _by_length(lengths: Array) -> Iterator[tuple[int, int, Array]]:
    """Of each length from 1: the first code, in bits of that length, and the buckets in order."""
    first = 0
    for length in range(1, int(lengths.max()) + 1):
        buckets = np.flatnonzero(lengths == length)
        yield length, first, buckets
        first = 2 * (first + buckets.size)


def _canonical(lengths: Array) -> Array:
    """The codes of the buckets, int32."""
    codes = np.zeros(lengths.size, np.int32)
    for _, first, buckets in _by_length(lengths):
        codes[buckets] = first + np.arange(buckets.size)
    return codes


def _planes(numbers: Array, lengths: Array) -> Iterator[Array]:
    """The last ``length`` bits of each number: the first bit of all, the second of all that go on.

    Args:
      numbers: int32[entries].
      lengths: int32[entries].

    Yields:
      uint8[those with so many bits], one array a plane.
    """
    longest = int(lengths.max())
    for depth in range(longest):
        longer = np.flatnonzero(lengths > depth)
        numbers, lengths = numbers.take(longer), lengths.take(longer)
        yield ((numbers >> (lengths - (depth + 1))) & 1).astype(np.uint8)


class _Bits:
    """Reads bits one after the other, and never past the end."""

    def __init__(self, data: Array, start: int):
        self._data = data
        self._next = 8 * start

    def take(self, count: int) -> Array:
        """The next bits, uint8[count], each 0 or 1."""
        start, self._next = self._next, self._next + count
        if self._next > 8 * self._data.size:
            raise ValueError("the pattern ends within a block")
        whole = self._data[start // 8 : -(-self._next // 8)]
        return np.unpackbits(whole)[start % 8 : start % 8 + count]

    def end(self) -> int:
        """Where the next byte begins, the bits before it being 0."""
        if self.take(-self._next % 8).any():
            raise ValueError("the pattern has bits after a block's end")
        return self._next // 8


def _read_table(data: Array, start: int) -> Array:
    """The code lengths, checked to be those of a complete code: any bits mean something."""
    count = int(data[start]) if start < data.size else 0
    lengths = data[start + 1 : start + 1 + count].astype(np.int64)
    used = lengths[lengths > 0]
    if lengths.size < count or not used.size or used.max() > LONGEST:
        raise ValueError("the pattern has no table of code lengths")
    if np.sum(1 << (LONGEST - used)) != 1 << LONGEST:
        raise ValueError("the pattern's code lengths are not those of a complete code")
    if count > BUCKETS:
        raise ValueError(f"the pattern has {count} buckets of gaps, more than a block can fill")
    return lengths


def _read_codes(bits: _Bits, count: int, lengths: Array) -> Array:
    """The inverse of ``_planes(codes[buckets], lengths[buckets])``: int32[count]."""
    buckets = np.zeros(count, np.int32)
    open_ = np.arange(count)  # those whose code is not complete, and its bits so far
    read = np.zeros(count, np.int32)
    for _, first, complete in _by_length(lengths):
        read = 2 * read + bits.take(open_.size)
        # Codes of this length are the smallest numbers; longer ones go on from the others.
        if complete.size:
            short = read < first + complete.size
            done, longer = np.flatnonzero(short), np.flatnonzero(~short)  # masks are slower
            buckets[open_.take(done)] = complete.take(read.take(done) - first)
            open_, read = open_.take(longer), read.take(longer)
    return buckets


def _read_offsets(bits: _Bits, widths: Array) -> Array:
    """The inverse of ``_planes(offsets, widths)``: int32[count]."""
    offsets = np.zeros(widths.size, np.int32)
    for depth in range(int(widths.max())):
        longer = np.flatnonzero(widths > depth)
        offsets[longer] = 2 * offsets[longer] + bits.take(longer.size)
    return offsets
