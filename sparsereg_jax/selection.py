"""Which leaves of a parameter tree take part: rules over path, rank and dtype.

A selection is what optax calls a ``mask``: a function from a tree to a tree of
Python bools, one a leaf. It is read by path, never by position, so that the
same selection comes out of every form in which a framework hands over the same
parameters. (``flax.nnx.Optimizer`` calls ``init`` with ``layer/kernel/value``
and ``update`` with ``layer/kernel``; both are ``layer/kernel`` here.)
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any
Predicate = Callable[[str, Any], bool]
Mask = PyTree | Callable[[PyTree], PyTree] | None


def leaf_keys(key_path: tuple[Any, ...]) -> tuple[Any, ...]:
    """The key path of a leaf without the box that nnx variables and Linen metadata put around it.

    Args:
      key_path: a key path of ``jax.tree_util.tree_flatten_with_path``.

    Returns:
      The key path, hashable, without a last attribute ``value``.
    """
    boxed = bool(key_path) and getattr(key_path[-1], "name", None) == "value"
    return key_path[:-1] if boxed else key_path


def leaf_path(key_path: tuple[Any, ...]) -> str:
    """Names a leaf, ``"encoder/layers_0/kernel"``.

    Args:
      key_path: a key path of ``jax.tree_util.tree_flatten_with_path``.

    Returns:
      The keys joined by ``/``. A last attribute named ``value``, that of an nnx variable or of a
      Linen metadata box, is dropped; a dictionary key ``"value"`` stays.

    Example:
      >>> import jax
      >>> [(key_path, _)] = jax.tree_util.tree_leaves_with_path({"dense": {"kernel": 1.0}})
      >>> leaf_path(key_path)
      'dense/kernel'
    """
    return jax.tree_util.keystr(leaf_keys(key_path), simple=True, separator="/")


def is_float(leaf: Any) -> bool:
    """Whether a leaf (array, tracer, ``ShapeDtypeStruct`` or Python number) holds real floats."""
    dtype = getattr(leaf, "dtype", None)
    if dtype is None:
        return isinstance(leaf, float)
    return jnp.issubdtype(dtype, jnp.floating)


def every_parameter(params: PyTree) -> PyTree:
    """Selects every float leaf, biases and normalization scales included: the paper's choice.

    Args:
      params: any tree of arrays; PRNG keys and integer counts in it are never selected.

    Returns:
      A tree of Python bools with the structure of ``params``.

    Example:
      >>> import jax.numpy as jnp
      >>> every_parameter({"bias": jnp.zeros(3), "step": jnp.zeros((), int)})
      {'bias': True, 'step': False}
    """
    return jax.tree.map(is_float, params)


def weights(params: PyTree) -> PyTree:
    """Selects the float leaves of rank 2 or more that are no normalization scale: the default.

    A layer norm under ``nn.scan`` has a ``scale`` of shape ``[layers, features]``, a matrix by its
    rank alone, so leaves of that name are left out at any rank. Biases of scanned layers and of
    attention heads are matrices too and are selected; :func:`by_path` leaves them out.

    Args:
      params: any tree of arrays.

    Returns:
      A tree of Python bools with the structure of ``params``.

    Example:
      >>> import jax.numpy as jnp
      >>> weights({"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3), "scale": jnp.ones((4, 3))})
      {'bias': False, 'kernel': True, 'scale': False}
    """
    select = by_predicate(lambda path, leaf: jnp.ndim(leaf) >= 2 and path.split("/")[-1] != "scale")
    return select(params)


def by_predicate(predicate: Predicate) -> Callable[[PyTree], PyTree]:
    """Selects the float leaves for which ``predicate(path, leaf)`` is true.

    Args:
      predicate: a function of a leaf's path (a string) and the leaf (read its ``ndim``, ``shape``
        or ``dtype``; its values may be traced).

    Returns:
      A selection: a function from a tree to a tree of Python bools.

    Example:
      >>> import jax.numpy as jnp
      >>> large = by_predicate(lambda path, leaf: leaf.size > 4)
      >>> large({"a": jnp.ones((2, 3)), "b": jnp.ones((2, 2))})
      {'a': True, 'b': False}
    """

    def select(params: PyTree) -> PyTree:
        return jax.tree_util.tree_map_with_path(
            lambda kp, leaf: is_float(leaf) and bool(predicate(leaf_path(kp), leaf)), params
        )

    return select


def by_path(params: PyTree, rules: Mapping[str, bool | Predicate]) -> Callable[[PyTree], PyTree]:
    """Selects leaves by regular expressions over their paths; the first that matches decides.

    The rules are checked here, on the user's own parameters, since inside ``init`` optax may pass
    placeholder trees on which every rule would seem to match nothing.

    Args:
      params: the parameters the rules are meant for.
      rules: from a pattern, matched against the whole path (``re.fullmatch``), to ``True``,
        ``False``, or a predicate ``(path, leaf) -> bool``, in order.

    Returns:
      A selection: a function from a tree to a tree of Python bools. Non-float leaves are ``False``
      without a rule.

    Raises:
      ValueError: a pattern is no regular expression or decides no leaf, or a float leaf is matched
        by none.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"embed": jnp.ones((8, 2)), "out": {"kernel": jnp.ones((2, 8))}}
      >>> by_path(params, {"embed": False, ".*": True})(params)
      {'embed': False, 'out': {'kernel': True}}
    """
    compiled = []
    for pattern, value in rules.items():
        try:
            compiled.append((re.compile(pattern), value))
        except re.error as error:
            raise ValueError(f"rules: {pattern!r} is not a regular expression: {error}.") from error

    def first_match(path: str) -> re.Pattern[str] | None:
        return next((pattern for pattern, _ in compiled if pattern.fullmatch(path)), None)

    paths = [
        leaf_path(kp) for kp, leaf in jax.tree_util.tree_leaves_with_path(params) if is_float(leaf)
    ]
    decided = {path: first_match(path) for path in paths}
    unused = [pattern.pattern for pattern, _ in compiled if pattern not in decided.values()]
    if unused:
        raise ValueError(
            f"rules: the patterns {unused} decide no leaf of params (matched whole, first match"
            f" wins). The float leaves are {paths}. Mend or remove them."
        )
    uncovered = [path for path, pattern in decided.items() if pattern is None]
    if uncovered:
        raise ValueError(
            f"rules: no pattern matches the leaves {uncovered}. Add rules for them, for example a"
            " last '.*': False."
        )

    def decide(path: str, leaf: Any) -> bool:
        for pattern, value in compiled:
            if pattern.fullmatch(path):
                return bool(value(path, leaf)) if callable(value) else value
        return False

    return by_predicate(decide)


def resolve_mask(mask: Mask, params: PyTree) -> PyTree:
    """Turns what a user may give as ``mask`` into a whole tree of Python bools.

    Args:
      mask: ``None`` (every float leaf), a function of the params, or a tree of Python bools that
        is a prefix of ``params`` (one bool stands for everything below it).
      params: the tree to select from.

    Returns:
      A tree of Python bools with the structure of ``params``, ``False`` at non-float leaves.

    Raises:
      TypeError: a leaf of the mask is not a Python bool.
      ValueError: the mask is not a prefix of ``params``.

    Example:
      >>> import jax.numpy as jnp
      >>> resolve_mask({"a": True, "b": False}, {"a": (jnp.ones(2), 3), "b": jnp.ones(1)})
      {'a': (True, False), 'b': False}
    """
    if mask is None:
        return every_parameter(params)
    if callable(mask):
        mask = mask(params)
    for kp, leaf in jax.tree_util.tree_leaves_with_path(mask):
        if not isinstance(leaf, bool):
            raise TypeError(
                f"mask: the leaf at {leaf_path(kp)!r} is a {type(leaf).__name__}, not a Python"
                " bool. A mask chooses whole leaves; which entries are shrunk is decided by their"
                " irrelevance, and which are pruned by a pruning mask (see hold_zeros)."
            )
    try:
        return jax.tree.map(
            lambda value, below: jax.tree.map(lambda leaf: value and is_float(leaf), below),
            mask,
            params,
        )
    except ValueError as error:
        raise ValueError(f"mask: its structure is not a prefix of the params': {error}") from error


def selection_table(params: PyTree, mask: Mask = weights) -> str:
    """Shows which leaves a selection takes, one a line: path, shape, dtype, selected or not.

    Args:
      params: the tree to select from.
      mask: a selection, or a prefix tree of Python bools.

    Returns:
      The table as text, the last line being the totals.

    Raises:
      TypeError: a leaf of the mask is not a Python bool.
      ValueError: the mask is not a prefix of ``params``.

    Example:
      >>> import jax.numpy as jnp
      >>> print(selection_table({"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}))
      path    shape   dtype    selected
      bias    (3,)    float32  no
      kernel  (2, 3)  float32  yes
      total   9                6
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    selected = jax.tree.leaves(resolve_mask(mask, params))
    rows = [("path", "shape", "dtype", "selected")]
    for (kp, leaf), taken in zip(leaves, selected, strict=True):
        rows.append(
            (
                leaf_path(kp),
                str(jnp.shape(leaf)),
                str(jnp.result_type(leaf)) if not hasattr(leaf, "dtype") else str(leaf.dtype),
                "yes" if taken else "no",
            )
        )
    sizes = [jnp.size(leaf) for _, leaf in leaves]
    taken_sizes = [size for size, taken in zip(sizes, selected, strict=True) if taken]
    rows.append(("total", str(sum(sizes)), "", str(sum(taken_sizes))))
    return "\n".join(aligned(rows))


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table of cells, its columns as wide as they must be."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
