"""Which entries stay: pruning masks as pure functions of the parameters.

A pruning mask is a tree of boolean arrays with the structure of the parameters, True where an entry
is kept. Every rule takes the mask of what remains now and returns a refinement of it: an entry that
is out never comes back, whatever its weight. Leaves that a rule does not select keep the mask they
have; leaves that hold no floats have the scalar True.

The exact rules find their threshold by counting (see :mod:`sparsereg_jax.thresholds`) and order
entries by magnitude with +0 = -0, NaN above Inf and subnormals told apart. With ``floor`` no tensor
is left with fewer entries than that, or than it had. Ties with the threshold are all dropped, at
least the number asked for; with ``exact_ties`` that number is met exactly, and equal entries go by
leaf and flat index, lowest first. Where a floor cuts a tensor's share, ties there are always met
exactly.

Amounts (threshold, sparsity, fraction) may be traced, and changing them does not recompile. Under
``jit`` a rule is part of one program. Called outside, it is a few small programs, which leaves of
one shape share, and waits for the device; what floors and ties need is compiled when it is needed.
On a mesh with explicit axes put ``jax.vmap`` of a rule under ``jit``, with the mapped axis whole.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import thresholds
from .selection import Mask, PyTree, by_path, is_float, leaf_path, resolve_mask, weights
from .thresholds import Count, Plan

Array = jax.Array
Scope = str | Callable[[str], str] | PyTree
Keeps = list[Array | None]  # masks of the selected leaves; None where everything remains
Planned = tuple[Plan, Sequence[int], Any]  # with the numbers of its leaves, and its dtype


def full_mask(params: PyTree) -> PyTree:
    """Keeps everything.

    Args:
      params: any tree of arrays.

    Returns:
      A pruning mask, all True, each leaf sharded like the parameter.

    Example:
      >>> import jax.numpy as jnp
      >>> full_mask({"w": jnp.zeros(2), "step": jnp.zeros(3, int)})
      {'step': Array(True, dtype=bool), 'w': Array([ True,  True], dtype=bool)}
    """
    return jax.tree.map(_full, params)


def mask_by_threshold(
    params: PyTree,
    threshold: float | Array,
    *,
    pruning_mask: PyTree = None,
    mask: Mask = weights,
    floor: int = 1,
) -> PyTree:
    """Keeps the entries with ``|w| > threshold``, and NaN.

    Args:
      params: the parameters.
      threshold: a float scalar, read as float32 (float64 beside float64 leaves). Nothing goes at
        a negative one, nor at a traced one that is NaN.
      pruning_mask: what remains now; None is everything.
      mask: which leaves are pruned.
      floor: the least number of entries kept in each tensor, the largest.

    Returns:
      The refined pruning mask.

    Raises:
      ValueError: nothing is selected, the pruning mask does not fit the params, ``threshold`` is
        NaN or ``floor`` negative.

    Example:
      >>> import jax.numpy as jnp
      >>> mask_by_threshold({"w": jnp.array([[0.1, -0.5], [0.0, 2.0]])}, 0.3)["w"].tolist()
      [[False, True], [False, True]]
    """
    if math.isnan(_number("threshold", threshold, 0.0)):
        raise ValueError("threshold: NaN. Give a number.")
    _check_floor(floor)

    def rule(paths: list[str], leaves: list[Array], keeps: Keeps) -> Keeps:
        bounds = [_bound(threshold, leaf) for leaf in leaves]
        floors = thresholds.counts_of([floor])
        plans = [
            (_plan_below(leaf, keep, floors, bound), [i], bound.dtype)
            for i, (leaf, keep, bound) in enumerate(zip(leaves, keeps, bounds, strict=True))
        ]
        return _cut(leaves, keeps, plans)

    return _refine(params, pruning_mask, mask, rule)


def mask_by_sparsity(
    params: PyTree,
    sparsity: float | Array,
    *,
    scope: Scope = "global",
    pruning_mask: PyTree = None,
    mask: Mask = weights,
    floor: int = 1,
    exact_ties: bool = False,
) -> PyTree:
    """Drops the smallest entries until ``round(sparsity * n)`` of n are out.

    n counts all entries of the selected leaves, those already out included. A Python number is
    multiplied and rounded as Python does; a traced one exactly, and rounded half to even.

    Args:
      params: the parameters.
      sparsity: the share of the selected entries to be out, in [0, 1]; a Python number, or a float
        scalar array.
      scope: over what the sparsity is reached: ``"global"``, all selected leaves together;
        ``"tensor"``, each alone; or each group of leaves with the same label, the labels (strings)
        being a prefix tree of the params or a function of a leaf's path.
      pruning_mask: what remains now; None is everything.
      mask: which leaves are pruned.
      floor: the least number of entries kept in each tensor; the rest is taken from the others of
        its group. 0 lets a tensor be emptied.
      exact_ties: meet the number exactly under ties.

    Returns:
      The refined pruning mask.

    Raises:
      ValueError: nothing is selected, the pruning mask or the scope does not fit the params,
        ``sparsity`` is outside [0, 1] (a traced one is clipped) or ``floor`` negative.
      TypeError: ``sparsity`` is no number, or a label no string.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"a": jnp.array([[1.0, 2.0, 3.0]]), "b": jnp.array([[4.0, 5.0, 6.0]])}
      >>> mask_by_sparsity(params, 0.5)["a"].tolist()
      [[False, False, True]]
      >>> mask_by_sparsity(params, 0.5, floor=0)["a"].tolist()
      [[False, False, False]]
      >>> mask_by_sparsity(params, 2 / 3, scope="tensor")["b"].tolist()
      [[False, False, True]]
    """
    _check_share("sparsity", sparsity)
    _check_floor(floor)

    def rule(paths: list[str], leaves: list[Array], keeps: Keeps) -> Keeps:
        labels = _labels(scope, params, paths)
        return _to_sparsity(leaves, keeps, labels, sparsity, [floor] * len(leaves), exact_ties)

    return _refine(params, pruning_mask, mask, rule)


def mask_by_fraction(
    params: PyTree,
    fraction: float | Array,
    *,
    pruning_mask: PyTree = None,
    mask: Mask = weights,
    floor: int = 1,
    exact_ties: bool = False,
) -> PyTree:
    """Drops ``round(fraction * remaining)`` of the remaining entries, the smallest of all leaves.

    Entries already out, and leaves not selected, do not count. A Python number is multiplied and
    rounded as Python does; a traced one, or one under ``jit``, exactly, and rounded half to even.

    Args:
      params: the parameters.
      fraction: the share of what remains that goes, in [0, 1]; a Python number, or a float scalar
        array.
      pruning_mask: what remains now; None is everything.
      mask: which leaves are pruned.
      floor: the least number of entries kept in each tensor. 0 lets a tensor be emptied.
      exact_ties: meet the number exactly under ties.

    Returns:
      The refined pruning mask.

    Raises:
      ValueError: nothing is selected, the pruning mask does not fit the params, ``fraction`` is
        outside [0, 1] (a traced one is clipped) or ``floor`` negative.
      TypeError: ``fraction`` is no number.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"w": jnp.array([[1.0, 2.0, 3.0, 4.0]])}
      >>> once = mask_by_fraction(params, 0.5)
      >>> mask_by_fraction(params, 0.5, pruning_mask=once)["w"].tolist()
      [[False, False, False, True]]
    """
    _check_share("fraction", fraction)
    _check_floor(floor)

    def rule(paths: list[str], leaves: list[Array], keeps: Keeps) -> Keeps:
        remaining = thresholds.numbers_left(leaves, keeps)
        drop = _share(fraction, remaining)
        plan = _plan(leaves, keeps, remaining, [floor] * len(leaves), drop, exact_ties)
        return _cut(leaves, keeps, [(plan, range(len(leaves)), thresholds.common_dtype(leaves))])

    return _refine(params, pruning_mask, mask, rule)


def mask_n_of_m(
    params: PyTree,
    n: int,
    m: int,
    *,
    axis: int = -1,
    pruning_mask: PyTree = None,
    mask: Mask = weights,
) -> PyTree:
    """Keeps the n largest of every m consecutive entries along an axis.

    A short last group of r entries keeps ``ceil(r * n / m)``. Of equal entries the first goes.

    Args:
      params: the parameters.
      n: how many of each group stay, ``1 <= n <= m``.
      m: the size of a group.
      axis: the axis along which entries are consecutive.
      pruning_mask: what remains now; None is everything.
      mask: which leaves are pruned.

    Returns:
      The refined pruning mask.

    Raises:
      ValueError: nothing is selected, the pruning mask does not fit the params, n or m is out of
        range, or a selected leaf has no such axis.

    Example:
      >>> import jax.numpy as jnp
      >>> mask_n_of_m({"w": jnp.array([[1.0, -3.0, 2.0, 0.0, 5.0]])}, 2, 4)["w"].tolist()
      [[False, True, True, False, True]]
    """
    if not 1 <= n <= m:
        raise ValueError(f"n, m: {n} of {m}, but 1 <= n <= m is needed.")

    def rule(paths: list[str], leaves: list[Array], keeps: Keeps) -> Keeps:
        axes = [_axis(path, leaf, axis) for path, leaf in zip(paths, leaves, strict=True)]
        return [
            _n_of_m(leaf, keep, n, m, a) for leaf, keep, a in zip(leaves, keeps, axes, strict=True)
        ]

    return _refine(params, pruning_mask, mask, rule)


def mask_blocks(
    params: PyTree,
    sparsity: float | Array,
    block: Sequence[int],
    *,
    scope: Scope = "global",
    pruning_mask: PyTree = None,
    mask: Mask = weights,
    floor: int = 1,
    exact_ties: bool = False,
) -> PyTree:
    """Drops whole blocks, those of least L2 norm, until ``round(sparsity * blocks)`` are out.

    Norms are of the entries that remain, computed in float32 (float64 for float64 leaves) without
    overflow. A block with no entry left counts as out. At ragged edges blocks are cut off.

    Args:
      params: the parameters.
      sparsity: the share of the blocks to be out, in [0, 1].
      block: the block's lengths along the trailing axes, ``(16, 16)`` say.
      scope: as in :func:`mask_by_sparsity`.
      pruning_mask: what remains now; None is everything.
      mask: which leaves are pruned.
      floor: the least number of entries kept in each tensor, in whole blocks (of the size of the
        smallest).
      exact_ties: meet the number of blocks exactly under ties.

    Returns:
      The refined pruning mask.

    Raises:
      ValueError: as :func:`mask_by_sparsity`; or a length is not positive, or a selected leaf has
        fewer axes than the block.

    Example:
      >>> import jax.numpy as jnp
      >>> w = jnp.array([[1.0, 1.0, 3.0], [1.0, 1.0, 0.0]])
      >>> mask_blocks({"w": w}, 0.5, (2, 2))["w"].tolist()
      [[False, False, True], [False, False, True]]
    """
    block = tuple(block)
    if not block or min(block) < 1:
        raise ValueError(f"block: {block} is not one or more positive lengths.")

    def whole(path: str, leaf: Array) -> tuple[int, ...]:
        if leaf.ndim < len(block):
            raise ValueError(
                f"block: the leaf at {path!r} has shape {leaf.shape}, fewer axes than"
                f" {block}. Leave it out by mask, or give a block of fewer axes."
            )
        return (1,) * (leaf.ndim - len(block)) + block

    return _mask_tiles(
        params, sparsity, whole, scope, pruning_mask, mask, floor, exact_ties, mean=False
    )


def mask_units(
    params: PyTree,
    sparsity: float | Array,
    *,
    axis: int = -1,
    scope: Scope = "global",
    pruning_mask: PyTree = None,
    mask: Mask = weights,
    floor: int = 1,
    exact_ties: bool = False,
) -> PyTree:
    """Drops whole units, those of least rms weight, until ``round(sparsity * units)`` are out.

    A unit is a slice along an axis: an output neuron of a ``[in, out]`` kernel, an output channel
    of a convolution's. The root mean square (pruned entries count as 0) lets tensors of different
    fan-in be compared.

    Args:
      params: the parameters.
      sparsity: the share of the units to be out, in [0, 1].
      axis: the axis that numbers the units.
      scope: as in :func:`mask_by_sparsity`.
      pruning_mask: what remains now; None is everything.
      mask: which leaves are pruned.
      floor: the least number of entries kept in each tensor, in whole units.
      exact_ties: meet the number of units exactly under ties.

    Returns:
      The refined pruning mask.

    Raises:
      ValueError: as :func:`mask_by_sparsity`; or a selected leaf has no such axis.

    Example:
      >>> import jax.numpy as jnp
      >>> mask_units({"w": jnp.array([[1.0, 3.0], [1.0, 0.0]])}, 0.5)["w"].tolist()
      [[False, True], [False, True]]
    """

    def whole(path: str, leaf: Array) -> tuple[int, ...]:
        unit = _axis(path, leaf, axis)
        return tuple(1 if a == unit else max(length, 1) for a, length in enumerate(leaf.shape))

    return _mask_tiles(
        params, sparsity, whole, scope, pruning_mask, mask, floor, exact_ties, mean=True
    )


def mask_by_rules(
    params: PyTree,
    rules: Mapping[str, Callable[..., PyTree] | None],
    *,
    pruning_mask: PyTree = None,
) -> PyTree:
    """Prunes different leaves by different rules, chosen by regular expressions over their paths.

    Args:
      params: the parameters.
      rules: from a pattern (``re.fullmatch`` of the whole path, the first that matches decides) to
        a function ``(params, *, pruning_mask, mask) -> pruning_mask``, or to None, which leaves the
        leaves alone. The functions of this module are such once their amounts are bound; a scope
        spans the leaves of one pattern.
      pruning_mask: what remains now; None is everything.

    Returns:
      The refined pruning mask.

    Raises:
      ValueError: a pattern is no regular expression or decides no leaf, a float leaf is matched by
        none, or a rule raises.

    Example:
      >>> import functools
      >>> import jax.numpy as jnp
      >>> params = {"a": jnp.array([[1.0, 2.0]]), "b": jnp.array([[1.0, 2.0]])}
      >>> half = functools.partial(mask_by_sparsity, sparsity=0.5)
      >>> {k: v.tolist() for k, v in mask_by_rules(params, {"a": half, ".*": None}).items()}
      {'a': [[False, True]], 'b': [[True, True]]}
    """
    if pruning_mask is None:
        pruning_mask = full_mask(params)
    # All the selections first: they check the rules, empty ones and None included.
    selections = {
        pattern: by_path(params, {other: other == pattern for other in rules})
        for pattern in rules or {"": None}
    }
    for pattern, rule in rules.items():
        if rule is not None:
            pruning_mask = rule(params, pruning_mask=pruning_mask, mask=selections[pattern])
    return pruning_mask


def apply_mask(params: PyTree, pruning_mask: PyTree) -> PyTree:
    """Sets the entries that are out to exactly +0.

    Args:
      params: the parameters; an entry that is out may be NaN.
      pruning_mask: what remains.

    Returns:
      The parameters with zeros, of the same dtypes; leaves that hold no floats unchanged.

    Raises:
      ValueError: the pruning mask does not fit the params.

    Example:
      >>> import jax.numpy as jnp
      >>> pruning_mask = {"w": jnp.array([False, True])}
      >>> apply_mask({"w": jnp.array([jnp.nan, 2.0])}, pruning_mask)["w"].tolist()
      [0.0, 2.0]
    """
    check_pruning_mask(params, pruning_mask)

    def zero(leaf: Any, keep: Array) -> Any:
        if not is_float(leaf):
            return leaf
        leaf = jnp.asarray(leaf)
        return jnp.where(keep, leaf, jnp.zeros((), leaf.dtype))

    return jax.tree.map(zero, params, pruning_mask)


def check_pruning_mask(params: PyTree, pruning_mask: PyTree) -> None:
    """Raises unless a pruning mask has the structure and shapes of the params.

    Args:
      params: the parameters.
      pruning_mask: the mask to check; its values may be traced.

    Raises:
      ValueError: it does not fit, at the path named.

    Example:
      >>> import jax.numpy as jnp
      >>> check_pruning_mask({"w": jnp.ones(2)}, {"w": jnp.array([True, False])})
    """
    _check_fits("pruning_mask", pruning_mask, params, "the params")


def _check_fits(name: str, pruning_mask: PyTree, like: PyTree, whose: str) -> None:
    """Raises unless a pruning mask fits the params, or another mask."""
    _check_structure(name, pruning_mask, like, whose)
    for (kp, leaf), keep in zip(
        jax.tree_util.tree_leaves_with_path(like), jax.tree.leaves(pruning_mask), strict=True
    ):
        dtype = getattr(keep, "dtype", type(keep).__name__)
        if dtype != np.bool_ or jnp.shape(keep) != _mask_shape(leaf):
            raise ValueError(
                f"{name}: the leaf at {leaf_path(kp)!r} is {dtype} of shape"
                f" {jnp.shape(keep)}, not bool of shape {_mask_shape(leaf)}."
            )


def count_kept(pruning_mask: PyTree) -> int:
    """Counts the entries kept, on the host.

    Args:
      pruning_mask: a concrete pruning mask.

    Returns:
      The exact number of True.

    Raises:
      ValueError: a leaf is not of bools.

    Example:
      >>> import jax.numpy as jnp
      >>> count_kept({"w": jnp.array([True, False, True])})
      2
    """
    _check_is_mask("pruning_mask", pruning_mask)
    return thresholds.to_int(_kept(jax.tree.leaves(pruning_mask)))


def sparsity(pruning_mask: PyTree) -> Array:
    """Computes the share of the entries that are out.

    The scalar stand-ins of leaves that hold no floats count as entries, kept.

    Args:
      pruning_mask: a pruning mask.

    Returns:
      A float32 scalar: exact counts, then one division; 0 of no entries.

    Raises:
      ValueError: a leaf is not of bools.

    Example:
      >>> import jax.numpy as jnp
      >>> float(sparsity({"w": jnp.array([True, False, False, False])}))
      0.75
    """
    _check_is_mask("pruning_mask", pruning_mask)
    masks = jax.tree.leaves(pruning_mask)
    size = thresholds.count_of(sum(jnp.size(keep) for keep in masks))
    return _ratio(thresholds.subtract(size, _kept(masks)), size, 0.0)


class SummaryRow(NamedTuple):
    """What remains of one leaf."""

    path: str
    shape: tuple[int, ...]
    size: int
    kept: int
    sparsity: float


def summary(params: PyTree, pruning_mask: PyTree) -> list[SummaryRow]:
    """Counts what remains of each float leaf, on the host.

    Args:
      params: the parameters.
      pruning_mask: what remains, concrete.

    Returns:
      One row a float leaf, in leaf order.

    Raises:
      ValueError: the pruning mask does not fit the params.

    Example:
      >>> import jax.numpy as jnp
      >>> summary({"w": jnp.ones((2, 2))}, {"w": jnp.array([[True, False], [False, False]])})
      [SummaryRow(path='w', shape=(2, 2), size=4, kept=1, sparsity=0.75)]
    """
    check_pruning_mask(params, pruning_mask)
    leaves = [
        (leaf_path(kp), jnp.shape(leaf), keep)
        for (kp, leaf), keep in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(pruning_mask), strict=True
        )
        if is_float(leaf)
    ]
    counts = jax.device_get([_kept([keep]) for _, _, keep in leaves])
    rows = []
    for (path, shape, _), count in zip(leaves, counts, strict=True):
        size, kept = math.prod(shape), thresholds.to_int(count)
        rows.append(SummaryRow(path, shape, size, kept, (size - kept) / size if size else 0.0))
    return rows


def union(a: PyTree, b: PyTree) -> PyTree:
    """Keeps what either pruning mask keeps.

    Args:
      a: a pruning mask.
      b: a pruning mask of the same tree.

    Returns:
      The pruning mask ``a | b``.

    Raises:
      ValueError: the masks differ in structure or shapes, or are not of bools.

    Example:
      >>> import jax.numpy as jnp
      >>> union(jnp.array([True, False]), jnp.array([False, False])).tolist()
      [True, False]
    """
    _check_both(a, b)
    return jax.tree.map(jnp.logical_or, a, b)


def intersection(a: PyTree, b: PyTree) -> PyTree:
    """Keeps what both pruning masks keep.

    Args:
      a: a pruning mask.
      b: a pruning mask of the same tree.

    Returns:
      The pruning mask ``a & b``.

    Raises:
      ValueError: the masks differ in structure or shapes, or are not of bools.

    Example:
      >>> import jax.numpy as jnp
      >>> intersection(jnp.array([True, False]), jnp.array([True, True])).tolist()
      [True, False]
    """
    _check_both(a, b)
    return jax.tree.map(jnp.logical_and, a, b)


def overlap(a: PyTree, b: PyTree) -> Array:
    """Computes the Jaccard index of what two pruning masks keep, ``|a & b| / |a | b|``.

    Args:
      a: a pruning mask.
      b: a pruning mask of the same tree.

    Returns:
      A float32 scalar in [0, 1]; 1 if both keep nothing.

    Raises:
      ValueError: the masks differ in structure or shapes, or are not of bools.

    Example:
      >>> import jax.numpy as jnp
      >>> float(overlap(jnp.array([True, True, False]), jnp.array([True, False, False])))
      0.5
    """
    both, either = intersection(a, b), union(a, b)
    return _ratio(_kept(jax.tree.leaves(both)), _kept(jax.tree.leaves(either)), 1.0)


def pack_mask(pruning_mask: PyTree) -> PyTree:
    """Packs a pruning mask to one bit an entry.

    Args:
      pruning_mask: a pruning mask.

    Returns:
      A tree of uint8 arrays, the last axis ``ceil(length / 8)`` long (``[1]`` for a scalar), the
      first entry in the highest bit.

    Raises:
      ValueError: a leaf is not of bools.

    Example:
      >>> import jax.numpy as jnp
      >>> pack_mask(jnp.array([[True, False, False, False, False, False, False, True, True]]))
      Array([[129, 128]], dtype=uint8)
    """
    _check_is_mask("pruning_mask", pruning_mask)
    return jax.tree.map(lambda keep: jnp.packbits(jnp.atleast_1d(keep), axis=-1), pruning_mask)


def unpack_mask(packed: PyTree, like: PyTree) -> PyTree:
    """Unpacks what :func:`pack_mask` packed.

    Args:
      packed: a packed pruning mask.
      like: the parameters, or anything of their structure and shapes.

    Returns:
      The pruning mask.

    Raises:
      ValueError: ``packed`` does not fit ``like``.

    Example:
      >>> import jax.numpy as jnp
      >>> pruning_mask = {"w": jnp.array([True, False, True])}
      >>> unpack_mask(pack_mask(pruning_mask), pruning_mask)["w"].tolist()
      [True, False, True]
    """
    _check_structure("packed", packed, like, "the params")

    def unpack(path: Any, leaf: Any, bits: Array) -> Array:
        shape = _mask_shape(leaf)
        expected = (*shape[:-1], -(-shape[-1] // 8)) if shape else (1,)
        if jnp.shape(bits) != expected:
            raise ValueError(
                f"packed: the leaf at {leaf_path(path)!r} has shape {jnp.shape(bits)}, not"
                f" {expected}. Pack a mask of these parameters."
            )
        if not math.prod(shape):
            return jnp.zeros(shape, bool)
        keep = jnp.unpackbits(bits, axis=-1, count=shape[-1] if shape else 1)
        return keep.reshape(shape).astype(bool)

    return jax.tree_util.tree_map_with_path(unpack, like, packed)


# What the rules share.


def _refine(
    params: PyTree,
    pruning_mask: PyTree,
    mask: Mask,
    rule: Callable[[list[str], list[Array], Keeps], Keeps],
) -> PyTree:
    """Puts the masks a rule makes of the selected leaves among those of the others."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(params)
    keeps: Keeps = [None] * len(flat)
    if pruning_mask is not None:
        check_pruning_mask(params, pruning_mask)
        keeps = jax.tree.leaves(pruning_mask)
    taken = [i for i, take in enumerate(jax.tree.leaves(resolve_mask(mask, params))) if take]
    if not taken:
        raise ValueError(
            f"mask: selects no leaf of params, whose float leaves are"
            f" {[leaf_path(kp) for kp, leaf in flat if is_float(leaf)]}. The default selects float"
            " leaves of two axes or more; mask=every_parameter selects all of them."
        )
    refined = rule(
        [leaf_path(flat[i][0]) for i in taken],
        [jnp.asarray(flat[i][1]) for i in taken],
        [keeps[i] for i in taken],
    )
    for i, keep in zip(taken, refined, strict=True):
        keeps[i] = keep
    return jax.tree.unflatten(
        treedef,
        [
            _full(leaf) if keep is None else keep
            for (_, leaf), keep in zip(flat, keeps, strict=True)
        ],
    )


def _to_sparsity(
    leaves: list[Array],
    keeps: Keeps,
    labels: list[str],
    sparsity: float | Array,
    floors: list[int],
    exact_ties: bool,
) -> Keeps:
    """Drops the smallest entries of each group of leaves down to a share."""
    groups: dict[str, list[int]] = {}
    for i, label in enumerate(labels):
        groups.setdefault(label, []).append(i)
    plans: list[Planned] = []
    for members in groups.values():
        some, kept = [leaves[i] for i in members], [keeps[i] for i in members]
        size = sum(leaf.size for leaf in some)
        if isinstance(sparsity, int | float):
            zeros = thresholds.count_of(round(sparsity * size))
        else:
            zeros = thresholds.share_of(jnp.asarray(sparsity), thresholds.count_of(size))
        remaining = thresholds.numbers_left(some, kept)
        drop = _to_be_out(zeros, remaining, thresholds.count_of(size))
        plan = _plan(some, kept, remaining, [floors[i] for i in members], drop, exact_ties)
        plans.append((plan, members, thresholds.common_dtype(some)))
    return _cut(leaves, keeps, plans)


@jax.jit
def _to_be_out(zeros: Count, remaining: Count, size: Count) -> Count:
    """How many of those that remain go for ``zeros`` in all to be out."""
    return thresholds.subtract(thresholds.add(zeros, thresholds.total(remaining)), size)


def _plan(
    leaves: list[Array],
    keeps: Keeps,
    remaining: Count,
    floors: list[int],
    drop: Count,
    exact_ties: bool,
) -> Plan:
    """The plan for one group."""
    make = _plan_alone if len(leaves) == 1 else thresholds.plan
    return make(leaves, keeps, remaining, thresholds.counts_of(floors), drop, exact_ties)


_plan_alone = jax.jit(thresholds.plan, static_argnums=5)


def _cut(leaves: list[Array], keeps: Keeps, plans: Sequence[Planned]) -> Keeps:
    """Carries out plans, a program a leaf, so that leaves of one shape share one.

    Where a floor or ties cut a leaf's share it is searched alone, by a program that takes many
    times as long to compile as a comparison: the host asks first who needs it, where it can.
    """
    refined: Keeps = list(keeps)
    asked = [(thresholds.takes_all(plan), plan.drop) for plan, *_ in plans]
    traced = thresholds.is_traced(asked)
    known = asked if traced else jax.device_get(asked)
    for (plan, members, dtype), (whole, drop) in zip(plans, known, strict=True):
        for place, i in enumerate(members):
            row = leaves[i], keeps[i]
            if traced:
                refined[i] = _cut_leaf(*row, plan, place, dtype)
            elif whole[place]:
                refined[i] = _cut_leaf_below(*row, plan.threshold, dtype)
            else:
                refined[i] = _cut_leaf_lowest(*row, Count(*(limb[place] for limb in drop)))
    return refined


_cut_leaf = jax.jit(thresholds.cut, static_argnums=4)
_cut_leaf_below = jax.jit(thresholds.cut_below, static_argnums=3)
_cut_leaf_lowest = jax.jit(thresholds.cut_lowest)
_plan_below = jax.jit(thresholds.plan_below)


@partial(jax.jit, static_argnames=("n", "m", "axis"))
def _n_of_m(leaf: Array, keep: Array | None, n: int, m: int, axis: int) -> Array:
    """Keeps the largest of each group."""
    rank = _partitioned(partial(_largest_of_each, n=n, m=m, axis=axis), leaf, True)
    return rank(leaf) if keep is None else rank(leaf, keep)


def _largest_of_each(leaf: Array, keep: Array | None = None, *, n: int, m: int, axis: int) -> Array:
    """Ranks the entries of each group by comparing them with one another."""
    key = thresholds.magnitude(leaf) + 1  # 0 is left for entries out, and for the padding
    if keep is not None:
        key = jnp.where(keep, key, jnp.zeros((), key.dtype))
    length = leaf.shape[axis]
    groups, ragged = -(-length // m), length % m
    key = jnp.pad(key, [(0, groups * m - length if a == axis else 0) for a in range(key.ndim)])
    key = key.reshape(*leaf.shape[:axis], groups, m, *leaf.shape[axis + 1 :])
    place = jax.lax.broadcasted_iota(jnp.int32, key.shape, axis + 1)

    def compare(j: Array | int, larger: Array) -> Array:
        other = jax.lax.dynamic_slice_in_dim(key, j, 1, axis + 1)
        return larger + ((other > key) | ((other == key) & (place < j))).astype(jnp.int32)

    # Zeros like the keys, sharded like them.
    none = jnp.zeros_like(key, dtype=jnp.int32)
    larger = jax.lax.fori_loop(0, m, compare, none, unroll=min(m, 16))
    last = jax.lax.broadcasted_iota(jnp.int32, key.shape, axis) == groups - 1
    stays = (larger < jnp.where(last, -(-(ragged or m) * n // m), n)) & (key > 0)
    stays = stays.reshape(*leaf.shape[:axis], groups * m, *leaf.shape[axis + 1 :])
    return jax.lax.slice_in_dim(stays, 0, length, axis=axis)


def _mask_tiles(
    params: PyTree,
    sparsity: float | Array,
    tile_of: Callable[[str, Array], tuple[int, ...]],
    scope: Scope,
    pruning_mask: PyTree,
    mask: Mask,
    floor: int,
    exact_ties: bool,
    mean: bool,
) -> PyTree:
    """Prunes tiles (blocks, units) like entries, by a score each."""
    _check_share("sparsity", sparsity)
    _check_floor(floor)

    def rule(paths: list[str], leaves: list[Array], keeps: Keeps) -> Keeps:
        labels = _labels(scope, params, paths)
        tiles = [tile_of(path, leaf) for path, leaf in zip(paths, leaves, strict=True)]
        scores = [
            _tile_scores(leaf, keep, tile, mean)
            for leaf, keep, tile in zip(leaves, keeps, tiles, strict=True)
        ]
        floors = [
            -(
                -floor
                // math.prod(
                    length % edge or edge for length, edge in zip(leaf.shape, tile, strict=True)
                )
            )
            for leaf, tile in zip(leaves, tiles, strict=True)
        ]
        refined = _to_sparsity(
            [score for score, _ in scores],
            [alive for _, alive in scores],
            labels,
            sparsity,
            floors,
            exact_ties,
        )
        # And with what remains, the mask is sharded like the leaf even where nothing was out yet.
        return [
            _spread(alive, _full(leaf) if keep is None else keep, leaf, tile=tile)
            for alive, keep, leaf, tile in zip(refined, keeps, leaves, tiles, strict=True)
        ]

    return _refine(params, pruning_mask, mask, rule)


@partial(jax.jit, static_argnames=("tile", "mean"))
def _tile_scores(
    leaf: Array, keep: Array | None, tile: tuple[int, ...], mean: bool
) -> tuple[Array, Array | None]:
    """Norm or rms of each tile's remaining entries, and whether it has any."""
    score = _partitioned(partial(_norms, tile=tile, mean=mean), leaf)
    if keep is None:
        return score(leaf), None
    any_left = _partitioned(lambda keep: jnp.any(*_tiled(keep, tile)), leaf)
    return score(leaf, keep), any_left(keep)


def _norms(leaf: Array, keep: Array | None = None, *, tile: tuple[int, ...], mean: bool) -> Array:
    size = jnp.abs(leaf).astype(jnp.promote_types(leaf.dtype, jnp.float32))
    if keep is not None:
        size = jnp.where(keep, size, jnp.zeros((), size.dtype))
    size, axes = _tiled(size, tile)
    # Scaled by the largest, squares neither overflow nor vanish; within bounds, nor does 1 / scale.
    limit = 2.0 ** (jnp.finfo(size.dtype).maxexp * 3 // 4)
    scale = jnp.clip(jnp.max(size, axis=axes, keepdims=True, initial=0), 1 / limit, limit)
    square = jnp.sum(jnp.square(size / scale), axis=axes)
    if mean:
        square /= max(math.prod(size.shape[axis] for axis in axes), 1)
    return jnp.sqrt(square) * scale.reshape(square.shape)


def _partitioned(
    function: Callable[..., Array], leaf: Array, like_leaf: bool = False
) -> Callable[..., Array]:
    """A function that reshapes and pads ``leaf``, its sharding left to XLA.

    On a mesh with explicit axes, that of newer versions' ``jax.make_mesh``, JAX cannot type a
    reshape or a padding of a sharded axis. The result is sharded like the leaf, or whole on each
    device.
    """
    sharding = jax.typeof(leaf).sharding
    if jax.sharding.AxisType.Explicit not in sharding.mesh.axis_types:
        return function
    spec = sharding.spec if like_leaf else jax.sharding.PartitionSpec()
    out = jax.sharding.NamedSharding(sharding.mesh, spec)
    return jax.sharding.auto_axes(function, out_sharding=out)


def _tiled(x: Array, tile: tuple[int, ...]) -> tuple[Array, tuple[int, ...]]:
    """Splits each axis in tiles and places, padded with zeros; and the axes of the places."""
    counts = [-(-length // edge) for length, edge in zip(x.shape, tile, strict=True)]
    x = jnp.pad(
        x,
        [
            (0, count * edge - length)
            for count, edge, length in zip(counts, tile, x.shape, strict=True)
        ],
    )
    pairs = zip(counts, tile, strict=True)
    return x.reshape([n for pair in pairs for n in pair]), tuple(range(1, 2 * len(tile), 2))


@partial(jax.jit, static_argnames="tile")
def _spread(alive: Array, keep: Array, leaf: Array, tile: tuple[int, ...]) -> Array:
    """From one flag a tile to one an entry, for those that remain; sharded like the leaf."""
    return _partitioned(partial(_spread_out, tile=tile), leaf, True)(alive, keep)


def _spread_out(alive: Array, keep: Array, *, tile: tuple[int, ...]) -> Array:
    pairs = list(zip(alive.shape, tile, strict=True))
    stays = jnp.expand_dims(alive, tuple(range(1, 2 * len(tile), 2)))
    stays = jnp.broadcast_to(stays, [n for pair in pairs for n in pair])
    stays = stays.reshape([count * edge for count, edge in pairs])
    return keep & stays[tuple(slice(length) for length in keep.shape)]


def _full(leaf: Any) -> Array:
    """The mask of a leaf of which everything remains."""
    return jnp.ones_like(leaf, dtype=bool) if is_float(leaf) else jnp.ones((), bool)


def _mask_shape(leaf: Any) -> tuple[int, ...]:
    """The shape of a leaf's mask; the leaf may itself be a mask."""
    is_mask = getattr(leaf, "dtype", None) == np.bool_
    return jnp.shape(leaf) if is_mask or is_float(leaf) else ()


def _kept(masks: Sequence[Array]) -> Count:
    """Counts the true entries of several masks."""
    return thresholds.total(thresholds.numbers_left(masks, masks))


def _ratio(part: Count, whole: Count, of_nothing: float) -> Array:
    """Divides two counts in float32."""
    divisor = thresholds.to_float(whole)
    ratio = thresholds.to_float(part) / jnp.maximum(divisor, jnp.ones_like(divisor))
    return jnp.where(divisor > 0, ratio, jnp.full_like(ratio, of_nothing))


def _bound(threshold: float | Array, leaf: Array) -> Array:
    """The threshold in the dtype it is compared in."""
    dtype = jnp.float64 if leaf.dtype == jnp.float64 else jnp.float32
    if isinstance(threshold, int | float):
        return jnp.asarray(threshold, dtype)
    return jnp.asarray(threshold).astype(dtype)


def _share(fraction: float | Array, remaining: Count) -> Count:
    """A fraction of what remains, rounded: as Python does where the host knows both."""
    left = thresholds.total(remaining)
    if not isinstance(fraction, int | float):
        return thresholds.share_of(jnp.asarray(fraction), left)
    if thresholds.is_traced(left):
        return thresholds.share_of(thresholds.fixed_point(fraction), left)
    return thresholds.count_of(round(fraction * thresholds.to_int(left)))


def _labels(scope: Scope, params: PyTree, paths: list[str]) -> list[str]:
    """The label of each selected leaf's group."""
    if isinstance(scope, str):
        if scope not in ("global", "tensor"):
            raise ValueError(
                f"scope: {scope!r} is neither 'global' nor 'tensor'. For groups give a prefix"
                " tree of labels, or a function from a path to a label."
            )
        # By number: two leaves may have the same path, {"a/b": ...} and {"a": {"b": ...}}.
        return [str(i) if scope == "tensor" else "" for i in range(len(paths))]
    if callable(scope):
        labels = [scope(path) for path in paths]
    else:
        try:
            tree = jax.tree.map(
                lambda label, below: jax.tree.map(lambda _: label, below), scope, params
            )
        except ValueError as error:
            raise ValueError(
                f"scope: its structure is not a prefix of the params': {error}"
            ) from error
        by = {leaf_path(kp): label for kp, label in jax.tree_util.tree_leaves_with_path(tree)}
        labels = [by[path] for path in paths]
    for path, label in zip(paths, labels, strict=True):
        if not isinstance(label, str):
            raise TypeError(f"scope: the label at {path!r} is {label!r}, not a string.")
    return labels


def _axis(path: str, leaf: Array, axis: int) -> int:
    """The axis counted from the front."""
    if not -leaf.ndim <= axis < leaf.ndim:
        raise ValueError(
            f"axis: the leaf at {path!r} has shape {leaf.shape}, no axis {axis}. Leave it out by"
            " mask, or choose another axis."
        )
    return axis % leaf.ndim


def _check_share(name: str, share: Any) -> None:
    # A float32 that should be 1 may be a little more; it counts as 1.
    most = 1.0 if isinstance(share, int | float) else 1.0 + float(np.finfo(np.float32).eps)
    if not 0 <= _number(name, share, 0.0) <= most:
        raise ValueError(f"{name}: {share} is not in [0, 1].")


def _number(name: str, amount: Any, traced: float) -> float:
    """An amount, to be checked; ``traced`` where it is not known yet."""
    if isinstance(amount, jax.core.Tracer):
        return traced
    try:
        return float(amount)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name}: one number belongs there, not {type(amount).__name__}"
            + (f" of shape {amount.shape}." if hasattr(amount, "shape") else ".")
            + f" The order is (params, {name})."
        ) from error


def _check_both(a: PyTree, b: PyTree) -> None:
    _check_is_mask("a", a)
    _check_fits("b", b, a, "a")


def _check_is_mask(name: str, tree: PyTree) -> None:
    for kp, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.result_type(leaf) != jnp.bool_:
            raise ValueError(
                f"{name}: the leaf at {leaf_path(kp)!r} is {jnp.result_type(leaf)}, not bool. Give"
                " a pruning mask: full_mask or a rule such as mask_by_sparsity makes one,"
                " held_mask reads one, unpack_mask one that was packed."
            )


def _check_floor(floor: int) -> None:
    if floor < 0:
        raise ValueError(f"floor: {floor} is negative. 0 switches it off.")


def _check_structure(name: str, tree: PyTree, like: PyTree, whose: str) -> None:
    """Raises at the first path at which a tree's structure is not that of ``like``."""
    structure: Any = jax.tree.structure(tree)
    if structure == jax.tree.structure(like):
        return
    found, wanted = (
        [leaf_path(kp) for kp, _ in jax.tree_util.tree_leaves_with_path(t)] for t in (tree, like)
    )
    for ours, theirs in itertools.zip_longest(found, wanted):
        if ours != theirs:
            raise ValueError(
                f"{name}: its structure is not that of {whose}: it has {_named(ours)} instead of"
                f" {_named(theirs)}. Make it from these params (full_mask, mask_by_fraction, ...)."
            )
    raise ValueError(
        f"{name}: it has the leaves of {whose} in other containers, {jax.tree.structure(tree)} for"
        f" {jax.tree.structure(like)}. Make it from these params (full_mask, ...)."
    )


def _named(path: str | None) -> str:
    return "no leaf" if path is None else f"a leaf at {path!r}"
