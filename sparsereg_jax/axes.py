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
        self._asked: list[tuple[Axis, np.ndarray, Axis, np.ndarray, Any]] = []

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

    def unify(self, first: Iterable[int], second: Iterable[int]) -> bool:
        """Makes two axes of the same size the same product.

        Returns:
            Whether they factor alike; what does not is frozen.
        """
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
                self.freeze((a, b, *left, *right))
                return False
        self.freeze((*left, *right))
        return not left and not right

    def link(
        self,
        first: Axis,
        first_indices: np.ndarray,
        second: Axis,
        second_indices: np.ndarray,
        maker: Any = None,
    ) -> None:
        """Says that some indices of one axis are indices of another; both are pinned."""
        self.pin((*first, *second))
        self._asked.append((first, first_indices, second, second_indices, maker))

    def settle(self) -> list[tuple[Axis, Any]]:
        """Makes the links, when all axes are known.

        An axis that is a product by now can be linked if it is one of the equal parts that the
        other is cut into: that is then a product as well, of the parts' number and the part
        (queries, keys and values in one matrix, each cut into heads).

        Returns:
            The axes that had to be frozen, as they are products of another kind, and their makers.
        """
        failed: list[tuple[Axis, Any]] = []
        changed = True
        while changed:
            changed = False
            for whole, indices, part, others, _ in self._asked:
                a, b = self.expand(whole), self.expand(part)
                count = self._parts_of(a, b, indices, others)
                if count and (len(a) > 1 or len(b) > 1):
                    (number,) = self.new(count)
                    self.freeze((number,))
                    before = (a, b)
                    self.unify(a, (number, *b))
                    changed |= before != (self.expand(whole), self.expand(part))
        for whole, indices, part, others, maker in self._asked:
            a, b = self.expand(whole), self.expand(part)
            if len(a) == len(b) == 1:
                self.links.append(Link(a[0], indices, b[0], others))
            elif not self._parts_of(a, b, indices, others) or a[-len(b) :] != b:
                self.freeze((*a, *b))
                failed.append(((*a, *b), maker))
        return failed

    def _parts_of(self, a: Axis, b: Axis, indices: np.ndarray, others: np.ndarray) -> int:
        """How many parts like b a is cut into, if these indices are one of them; else 0."""
        whole, part = (int(np.prod([self.size(d) for d in axis])) for axis in (a, b))
        aligned = len(others) == part and others[0] == 0 and indices[0] % part == 0
        return whole // part if aligned and whole % part == 0 else 0

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
