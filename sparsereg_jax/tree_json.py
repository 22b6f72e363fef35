"""The containers of a tree as JSON and back, its leaves numbered in order.

A node is a leaf's number; null for None; or an object of one member:
``{"dict": [[key, node], ...]}`` with strings and integers as keys, ``{"list": [node, ...]}`` or
``{"tuple": [node, ...]}``. Other containers that JAX knows (FrozenDict, NamedTuple, nnx.State,
dataclasses) are written as the dictionary of their children.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax

from .selection import PyTree, leaf_keys

Path = tuple[str, ...]


def to_json(tree: PyTree) -> tuple[Any, list[tuple[Path, Any]]]:
    """Takes a tree apart.

    Args:
      tree: any tree.

    Returns:
      The root node, made of what ``json`` writes, and the leaves with their paths, in order.

    Raises:
      TypeError: a key of a dictionary is neither a string nor an integer, or reads like another.

    Example:
      >>> to_json({"a": (1.5, None), 7: 2.5})
      ({'dict': [['a', {'tuple': [0, None]}], [7, 1]]}, [(('a', '0'), 1.5), (('7',), 2.5)])
    """
    leaves: list[tuple[Path, Any]] = []

    def node(tree: PyTree, path: Path) -> Any:
        if tree is None:
            return None
        if type(tree) in (list, tuple):
            below = [node(child, (*path, str(i))) for i, child in enumerate(tree)]
            return {type(tree).__name__: below}
        # The insertion order of a plain dictionary is kept, and its keys need not be sortable.
        items = list(tree.items()) if type(tree) is dict else _children(tree)
        if items is None:
            leaves.append((path, tree))
            return len(leaves) - 1
        for key, _ in items:
            if type(key) not in (str, int):
                raise TypeError(
                    f"params: {'/'.join(path) or 'the tree'!r} has the key {key!r}, a"
                    f" {type(key).__name__}. A file keeps strings and integers as keys."
                )
        if _repeated([key for key, _ in items]):
            raise TypeError(
                f"params: {'/'.join(path) or 'the tree'!r} has two keys that read the same, of"
                f" {[key for key, _ in items]!r}. Rename one."
            )
        if len(items) == 1 and _boxed(tree, items[0][1]):
            return node(items[0][1], path)
        return {"dict": [[key, node(child, (*path, str(key)))] for key, child in items]}

    return node(tree, ()), leaves


def paths(root: Any) -> Iterator[Path]:
    """Walks over JSON from any source and checks it.

    Args:
      root: the root node.

    Yields:
      The paths of the leaves, in order.

    Raises:
      ValueError: it does not describe a tree whose leaves are numbered in order.

    Example:
      >>> list(paths({"dict": [["a", {"tuple": [0, None]}], [7, 1]]}))
      [('a', '0'), ('7',)]
    """
    count = 0

    def walk(node: Any, path: Path) -> Iterator[Path]:
        nonlocal count
        if node is None:
            return
        if type(node) is int:
            if node != count:
                raise ValueError(f"the tree has leaf {node} where leaf {count} belongs")
            count += 1
            yield path
            return
        kind, below = _container(node)
        items = below if kind == "dict" else list(enumerate(below))
        for key, child in items:
            yield from walk(child, (*path, str(key)))

    return walk(root, ())


def from_json(root: Any, leaves: Sequence[Any]) -> PyTree:
    """Puts a tree together.

    Args:
      root: the root node, one that :func:`paths` takes.
      leaves: the leaves, in order.

    Returns:
      The tree, of dictionaries, lists, tuples and None.

    Example:
      >>> from_json({"dict": [["a", {"tuple": [0, None]}], [7, 1]]}, [1.5, 2.5])
      {'a': (1.5, None), 7: 2.5}
    """
    if root is None:
        return None
    if type(root) is int:
        return leaves[root]
    kind, below = _container(root)
    if kind == "dict":
        return {key: from_json(child, leaves) for key, child in below}
    children = [from_json(child, leaves) for child in below]
    return tuple(children) if kind == "tuple" else children


def like_paths(like: PyTree) -> list[Path]:
    """The paths of a tree's leaves in JAX's order, as :func:`to_json` names them.

    Example:
      >>> like_paths({"b": 1, "a": [2, 3]})
      [('a', '0'), ('a', '1'), ('b',)]
    """

    def walk(tree: PyTree, path: Path) -> Iterator[Path]:
        items = [] if tree is None else _children(tree)
        if items is None or (len(items) == 1 and _boxed(tree, items[0][1])):
            yield path
        else:
            for key, child in items:
                yield from walk(child, (*path, str(key)))

    return list(walk(like, ()))


def _children(tree: PyTree) -> list[tuple[str | int, PyTree]] | None:
    """The children of any container that JAX knows, by key; None of a leaf."""
    if jax.tree_util.all_leaves([tree]):
        return None
    below = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: node is not tree)
    return [(getattr(kp[0], "key", _name(kp[0])), child) for kp, child in below]


def _boxed(tree: PyTree, child: PyTree) -> bool:
    """Whether a node is the box of an nnx variable or of Linen metadata around one leaf."""
    if isinstance(tree, dict) or not jax.tree_util.all_leaves([child]):
        return False
    [(key_path, _)] = jax.tree_util.tree_leaves_with_path(tree)
    return not leaf_keys(key_path)


def _name(key: Any) -> str:
    return jax.tree_util.keystr((key,), simple=True)


def _repeated(keys: list[Any]) -> bool:
    """Whether two keys are the same in a path, like 1 and "1"."""
    return len({str(key) for key in keys}) < len(keys)


def _container(node: Any) -> tuple[str, list[Any]]:
    """The kind and the children of a node from any source, dictionaries' keys checked."""
    if type(node) is not dict or len(node) != 1:
        raise ValueError("the tree has a node that is no leaf, None or container")
    [(kind, below)] = node.items()
    if kind not in ("dict", "list", "tuple") or type(below) is not list:
        raise ValueError(f"the tree has a node of the kind {kind[:40]!r}")
    if kind == "dict":
        if not all(type(item) is list and len(item) == 2 for item in below):
            raise ValueError("the tree has a dictionary whose items are no pairs")
        keys = [item[0] for item in below]
        if not all(type(key) in (str, int) for key in keys) or _repeated(keys):
            raise ValueError("the tree has a dictionary with wrong or repeated keys")
    return kind, below
