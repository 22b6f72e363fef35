"""Which indices of which dimensions go: those at which no value has a needed entry."""

from collections.abc import Sequence

import numpy as np

from .axis_rules import Cut, Relations
from .dataflow import Known, backwards


def choose(relations: Relations, known: dict[int, Known], entries: Sequence[int]) -> Cut:
    """Removes what no result needs, such that all that stays has the value that it had.

    Args:
        relations: the program's axes.
        known: what ``dataflow.forwards`` says of its values.
        entries: the slots of the leaves and inputs.
    """
    cut = Cut(relations, _kept(relations, backwards(relations.program, known), entries))
    while True:
        needed = backwards(relations.program, known, cut.entries)
        more = Cut(relations, _kept(relations, needed, entries))
        if all(
            root in more.keep and np.array_equal(mask, more.keep[root])
            for root, mask in cut.keep.items()
        ):
            return cut
        cut = more


def _kept(
    relations: Relations, needed: dict[int, np.ndarray], entries: Sequence[int]
) -> dict[int, np.ndarray]:
    """The indices that stay: those with a needed entry in any value, and what they ask for."""
    dimensions = relations.dimensions
    keep: dict[int, np.ndarray] = {}
    for slot, axes in enumerate(relations.axes):
        which = needed.get(slot)
        for d, axis in enumerate(axes):
            roots = dimensions.expand(axis)
            sizes = [dimensions.size(root) for root in roots]
            along = None
            for place, root in enumerate(roots):
                mask = keep.setdefault(root, np.full(sizes[place], dimensions.is_frozen(root)))
                if which is None or mask.all():
                    continue
                if along is None:
                    others = tuple(e for e in range(which.ndim) if e != d)
                    along = which.any(axis=others).reshape(sizes)
                mask |= along.any(axis=tuple(e for e in range(len(sizes)) if e != place))
    for axis, indices in relations.kept:
        roots = dimensions.expand(axis)
        for root in roots:
            keep[root][indices if len(roots) == 1 else slice(None)] = True
    for slot, d in relations.gathered:
        for root in dimensions.expand(relations.axes[slot][d]):
            if keep[root].mean() > 7 / 8:
                keep[root][:] = True  # taking nearly all of it costs more than it saves
    for mask in keep.values():
        if mask.size and not mask.any():
            mask[0] = True  # an empty axis is more than some operations take
    while True:
        _share(relations, keep)
        owned = _owned(relations, entries)
        follows = complete(relations, {root: keep[root] for root in owned})
        if all((keep[root] == follows.get(root, True)).all() for root in keep):
            return {root: mask for root, mask in keep.items() if not mask.all()}
        for root in keep:
            keep[root] |= follows.get(root, True)


def _share(relations: Relations, keep: dict[int, np.ndarray]) -> None:
    """Linked indices stay together."""
    before = -1
    while before != (before := sum(int(mask.sum()) for mask in keep.values())):
        for link in relations.dimensions.links:
            both = keep[link.first][link.first_indices] | keep[link.second][link.second_indices]
            keep[link.first][link.first_indices] = both
            keep[link.second][link.second_indices] = both


def _owned(relations: Relations, entries: Sequence[int]) -> set[int]:
    """The dimensions of leaves and inputs: a plan has these, all others follow from them."""
    expand = relations.dimensions.expand
    return {root for slot in entries for axis in relations.axes[slot] for root in expand(axis)}


def complete(relations: Relations, owned: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
    """The dimensions that lose indices: owned ones, and those that are linked to them."""
    dimensions = relations.dimensions
    keep = {root: mask.copy() for root, mask in owned.items() if not mask.all()}
    changed = True
    while changed:
        changed = False
        for link in dimensions.links:
            for one in (link, link.reversed()):
                if one.first in keep and one.second not in owned:
                    mask = keep.get(one.second, np.ones((dimensions.size(one.second),), bool))
                    lost = mask[one.second_indices] & ~keep[one.first][one.first_indices]
                    if lost.any():
                        mask[one.second_indices[lost]] = False
                        keep[one.second] = mask
                        changed = True
    return keep
