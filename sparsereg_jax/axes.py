"""Which axes of a program's values must be cut alike.

An axis is a product of *dimensions*, in row-major order: an axis of 2450 that is the flattening of
(7, 7, 50) is the product of three. Two axes that some operation joins (the two contracted axes of
a matrix product, say) are *unified*: their dimensions become the same, split into factors where
that is what it takes. A dimension's indices are kept or removed for all values that have it.
Axes of size one are the empty product: there is nothing to remove from them.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

Axis = tuple[int, ...]


class Link(NamedTuple):
    """Indices of one dimension that are the same as indices of another (slices, concatenations)."""

    first: int
    first_indices: np.ndarray
    second: int
    second_indices: np.ndarray

    def reversed(self) -> "Link":
        """The same link, seen from the other side."""
        return Link(self.second, self.second_indices, self.first, self.first_indices)


class Dimensions:
    """Union-find over dimensions, with factorization.

    ``frozen`` dimensions keep all indices; ``pinned`` ones may not have another size in a later
    trace, because some operation (a slice, a constant, a leaf) looks at single indices of them.
    """

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._size: list[Any] = []
        self._parts: dict[int, Axis] = {}
        self._frozen: list[bool] = []
        self._pinned: list[bool] = []
        self.links: list[Link] = []

    def new(self, size: Any) -> Axis:
        """A new axis of this size."""
        if isinstance(size, int) and size == 1:
            return ()
        self._parent.append(len(self._parent))
        self._size.append(size)
        self._frozen.append(False)
        self._pinned.append(False)
        return (len(self._parent) - 1,)

    def expand(self, axis: Iterable[int]) -> Axis:
        """The axis as the product of dimensions that stand for themselves."""
        found: list[int] = []
        for dimension in axis:
            root = self._root(dimension)
            found.extend(self.expand(self._parts[root]) if root in self._parts else (root,))
        return tuple(found)

    def size(self, dimension: int) -> Any:
        """The number of indices."""
        return self._size[self._root(dimension)]

    def is_frozen(self, dimension: int) -> bool:
        """Whether all indices stay."""
        return self._frozen[self._root(dimension)]

    def is_pinned(self, dimension: int) -> bool:
        """Whether the size is part of the program."""
        return self._pinned[self._root(dimension)]

    def freeze(self, axis: Iterable[int]) -> None:
        """Keeps all indices."""
        for dimension in self.expand(axis):
            self._frozen[dimension] = True

    def pin(self, axis: Iterable[int]) -> None:
        """Ties the program to this size."""
        for dimension in self.expand(axis):
            self._pinned[dimension] = True

    def unify(self, first: Iterable[int], second: Iterable[int]) -> None:
        """Makes two axes of the same size the same product; freezes what does not factor."""
        left, right = list(self.expand(first))[::-1], list(self.expand(second))[::-1]
        while left and right:
            a, b = self._root(left.pop()), self._root(right.pop())
            if a in self._parts:
                left.extend(self.expand((a,))[::-1])
                right.append(b)
            elif b in self._parts:
                right.extend(self.expand((b,))[::-1])
                left.append(a)
            elif a == b:
                continue
            elif _equal(self._size[a], self._size[b]):
                self._union(a, b)
            elif (rest := _quotient(self._size[a], self._size[b])) is not None:
                left.append(self._split(a, b, rest))
            elif (rest := _quotient(self._size[b], self._size[a])) is not None:
                right.append(self._split(b, a, rest))
            else:
                self.freeze((a, b))
                break
        self.freeze((*left, *right))

    def link(
        self, first: Axis, first_indices: np.ndarray, second: Axis, second_indices: np.ndarray
    ) -> None:
        """Says that some indices of one axis are indices of another; both are pinned."""
        self.pin((*first, *second))
        a, b = self.expand(first), self.expand(second)
        if len(a) == len(b) == 1:
            self.links.append(Link(a[0], first_indices, b[0], second_indices))
        else:
            self.freeze((*a, *b))

    def settle(self) -> None:
        """Freezes links whose dimensions were split after they were linked; call it at the end."""
        settled = []
        for link in self.links:
            a, b = self.expand((link.first,)), self.expand((link.second,))
            if len(a) == len(b) == 1:
                settled.append(link._replace(first=a[0], second=b[0]))
            else:
                self.freeze((*a, *b))
        self.links = settled

    def _root(self, dimension: int) -> int:
        while self._parent[dimension] != dimension:
            self._parent[dimension] = self._parent[self._parent[dimension]]
            dimension = self._parent[dimension]
        return dimension

    def _union(self, a: int, b: int) -> None:
        self._parent[b] = a
        self._frozen[a] |= self._frozen[b]
        self._pinned[a] |= self._pinned[b]

    def _split(self, whole: int, factor: int, rest: Any) -> int:
        (other,) = self.new(rest)
        self._parts[whole] = (factor, other)
        for part in (factor, other):
            self._frozen[part] |= self._frozen[whole]
            self._pinned[part] |= self._pinned[whole]
        return other


def _equal(a: Any, b: Any) -> bool:
    return bool(a == b)


def _quotient(whole: Any, factor: Any) -> Any:
    """The quotient if it is a whole number greater than one, else None."""
    try:
        quotient, remainder = divmod(whole, factor)
        return quotient if remainder == 0 and quotient not in (0, 1) else None
    except Exception:  # symbolic sizes whose quotient is not known
        return None
