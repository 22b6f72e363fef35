"""Params with zeros to a small file and back: a safetensors container near the entropy bound.

A leaf is stored in one of two ways, whichever is smaller:

- dense: a tensor under the leaf's path, ``encoder/layers_0/kernel``;
- sparse: ``<path>.values``, the kept entries in C order, and ``<path>.pattern``, bytes that say
  where they are (:mod:`sparsereg_jax.gap_coding`).

An entry is kept if any of its bits is set, so what is read is bit for bit what was written, -0.0
and NaN payloads included. The rest is one member of the container's metadata, ``sparsereg_jax``, a
JSON object:

- ``version``: 1, the version of this format;
- ``written_by``: versions of the packages that wrote the file;
- ``sparsity``: the share of all entries that are not kept;
- ``metadata``: the user's own;
- ``tree``: the containers (:mod:`sparsereg_jax.tree_json`);
- ``leaves``: an object a leaf, in the order of the tree: ``kept``, the number of its entries that
  are; ``crc32``, of ``"<dtype> <shape>"`` (``"float32 [2, 3]"``), of the values' bytes and of the
  pattern's; and, of a sparse one, ``shape``;
- ``crc32``: of this object without this member, as ``json.dumps`` writes it without spaces.

Where a name is taken, by a leaf or by one of the two names that a sparse one would have, ``#`` and
the leaf's number are appended to the path. The path of a tree that is one array is ``params``.
"""

import json
import math
import os
import secrets
import stat
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from safetensors.numpy import save_file

from . import gap_coding, tree_json
from .gap_coding import Array
from .selection import PyTree

VERSION = 1
KEY = "sparsereg_jax"
LARGEST_HEADER = 2**24  # bytes of names and description
ALWAYS_ALLOWED = 2**30  # bytes of arrays that any file may ask for
ALLOWED_RATIO = 1000  # bytes of arrays that each byte of a file may ask for
ENTRY = 128  # bytes that a second tensor adds to the header, about

DTYPES = {
    "BOOL": np.dtype(bool),
    "U8": np.dtype(np.uint8),
    "U16": np.dtype(np.uint16),
    "U32": np.dtype(np.uint32),
    "U64": np.dtype(np.uint64),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
DTYPES_BY_NAME = {dtype.name: dtype for dtype in DTYPES.values()}


class SparseFileError(ValueError):
    """A file that is not what :func:`save_sparse` writes; says which, and what is wrong with it."""


class SparseLeaf(NamedTuple):
    """One leaf of a file."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    size: int  # entries
    kept: int  # entries of which any bit is set
    values_bytes: int  # of the kept entries; of all, if stored dense
    pattern_bytes: int | None  # None: stored dense


class SparseFile(NamedTuple):
    """What is in a file."""

    bytes: int
    leaves: list[SparseLeaf]
    metadata: dict[str, Any]  # the user's
    written_by: dict[str, str]  # package to version


def save_sparse(
    path: str | os.PathLike[str], params: PyTree, *, metadata: Mapping[str, Any] | None = None
) -> None:
    """Writes a tree of arrays to a file that takes little more than the entropy of its content.

    Kept values are stored as they are and their positions in at most 1.05 times N·H(density) bits,
    for a million entries and more and densities from 0.005 to 0.9. The file appears whole or not
    at all: it is written beside its place, forced to the disk and moved. ``safetensors`` opens it
    too. While writing, the file's content and one leaf are held in host memory, and some 20 MB.

    Args:
      path: where to; an existing file is replaced, by convention ``*.safetensors``.
      params: any tree of arrays (bools, integers, float16, bfloat16, float32, float64), jax's,
        sharded or not, NumPy's or Python numbers.
      metadata: what to keep beside them, anything that JSON has; it comes back as JSON gives it.

    Raises:
      TypeError: a leaf is no such array, a dictionary's key is neither string nor integer, or the
        metadata is not made of what JSON has.
      ValueError: the metadata holds a NaN or an infinity, or names, tree and metadata take more
        than 16 MiB.
      OSError: the file cannot be written.

    Example:
      >>> import os, tempfile
      >>> import jax.numpy as jnp
      >>> path = os.path.join(tempfile.mkdtemp(), "sparse.safetensors")
      >>> save_sparse(path, {"w": jnp.zeros((300, 784)).at[3, 5].set(2.5)}, metadata={"epoch": 7})
      >>> os.path.getsize(path) < 600
      True
    """
    root, found = tree_json.to_json(params)
    tensors: dict[str, Array] = {}
    leaves: list[dict[str, Any]] = []
    taken = {"__metadata__"}
    kept = size = 0
    for i, (leaf_path, leaf) in enumerate(found):
        name = _name(leaf_path, i, taken)
        array = _to_numpy(leaf, "/".join(leaf_path))
        values, pattern, smaller = _encode(array.reshape(-1))
        kept, size = kept + values.size, size + array.size
        leaves.append({"kept": values.size})
        if smaller:
            stored = {f"{name}.values": values, f"{name}.pattern": pattern}
            leaves[-1]["shape"] = array.shape
        else:
            stored = {name: array}
        leaves[-1]["crc32"] = _checksum(array.dtype, array.shape, stored.values())
        tensors |= stored
    description = {
        "version": VERSION,
        "written_by": _versions(),
        "sparsity": 1 - kept / size if size else 0.0,
        "metadata": dict(metadata or {}),
        "tree": root,
        "leaves": leaves,
    }
    try:
        description = json.loads(_dumps(description))  # as it will be read
    except (TypeError, ValueError) as error:
        raise type(error)(f"metadata: JSON does not have it: {error}") from error
    text = _dumps({**description, "crc32": zlib.crc32(_dumps(description).encode())})
    if 2 * len(text) + sum(ENTRY + 6 * len(name) for name in tensors) > LARGEST_HEADER:
        raise ValueError(
            f"params, metadata: names, tree and metadata come near {LARGEST_HEADER >> 20} MiB, the"
            " most a header takes. Keep large things in leaves."
        )
    with _replacing(path) as beside:
        save_file(tensors, beside, {KEY: text})


def load_sparse(
    path: str | os.PathLike[str], *, like: PyTree = None, max_bytes: int | None = None
) -> tuple[PyTree, dict[str, Any]]:
    """Reads what :func:`save_sparse` wrote, bit for bit, from any source.

    Nothing in a file is executed, lengths are checked before memory is taken for them, and flipped
    bits are found by checksums. Besides the arrays themselves, the stored form of one leaf and some
    20 MB are held, and of the header up to some 30 times its bytes, which are 16 MiB at most.

    Args:
      path: the file.
      like: a tree of arrays (or of ``jax.eval_shape``) of the same paths, shapes and dtypes, into
        whose containers the leaves are put: the way to get FrozenDict, ``nnx.State``, NamedTuple
        or dataclasses back, which are dictionaries otherwise. None: dictionaries, lists, tuples
        and None as they were.
      max_bytes: the most that the arrays may take. A few bytes may rightly stand for a large array
        of zeros, so this is what protects from a file that asks for too much. None: 1 GiB, or 1000
        times the file's size where that is more.

    Returns:
      The tree, of NumPy arrays (``jax.device_put`` moves them; float64 stays float64 here whatever
      jax is set to), and the metadata.

    Raises:
      SparseFileError: the file is malformed, of a later version of the format, or asks for more
        than ``max_bytes``. It is a ValueError.
      ValueError: ``like`` does not fit what is in the file.
      OSError: the file cannot be read.

    Example:
      >>> import os, tempfile
      >>> import jax.numpy as jnp
      >>> path = os.path.join(tempfile.mkdtemp(), "sparse.safetensors")
      >>> save_sparse(path, {"w": jnp.array([0.0, 2.5, 0.0])}, metadata={"epoch": 7})
      >>> load_sparse(path)
      ({'w': array([0. , 2.5, 0. ], dtype=float32)}, {'epoch': 7})
    """
    with _opened(path) as file:
        total = sum(leaf.size * DTYPES_BY_NAME[leaf.dtype].itemsize for leaf in file.content.leaves)
        allowed = max(ALWAYS_ALLOWED, ALLOWED_RATIO * file.content.bytes)
        if total > (allowed if max_bytes is None else max_bytes):
            raise ValueError(
                f"its arrays take {total} bytes, more than the"
                f" {allowed if max_bytes is None else max_bytes} allowed. Pass max_bytes={total}"
                " if you trust it"
            )
        arrays = [_read_leaf(file, i) for i in range(len(file.content.leaves))]
        params = tree_json.from_json(file.root, arrays)
    if like is not None:
        params = _into(like, dict(zip(file.paths, arrays, strict=True)), path)
    return params, file.content.metadata


def inspect_sparse(path: str | os.PathLike[str]) -> SparseFile:
    """Says what is in a file from its header alone, whatever its size.

    Args:
      path: the file.

    Returns:
      Its leaves, metadata and versions. The data is not read, and its checksums are not checked.

    Raises:
      SparseFileError: the file's header is malformed.
      OSError: the file cannot be read.

    Example:
      >>> import os, tempfile
      >>> import jax.numpy as jnp
      >>> path = os.path.join(tempfile.mkdtemp(), "sparse.safetensors")
      >>> save_sparse(path, {"w": jnp.zeros((300, 784)).at[3, 5].set(2.5)})
      >>> [leaf] = inspect_sparse(path).leaves
      >>> leaf.shape, leaf.kept, leaf.values_bytes, leaf.pattern_bytes
      ((300, 784), 1, 4, 44)
    """
    with _opened(path) as file:
        return file.content


class _Opened(NamedTuple):
    """A file whose header has been checked."""

    container: Any  # of safetensors
    content: SparseFile
    root: Any
    paths: list[tree_json.Path]
    names: list[str]  # of the leaves, without .values and .pattern
    checksums: list[int]


def _name(path: tree_json.Path, number: int, taken: set[str]) -> str:
    """The name of a leaf's tensor, and what it may be followed by, made taken."""
    name = "/".join(path) or "params"
    while not taken.isdisjoint(names := {name, f"{name}.values", f"{name}.pattern"}):
        name += f"#{number}"
    taken |= names
    return name


def _to_numpy(leaf: Any, path: str) -> Array:
    """A leaf in host memory, contiguous."""
    if jax.dtypes.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key):
        raise TypeError(
            f"params: the leaf at {path!r} is a PRNG key. Write jax.random.key_data of it, and"
            " jax.random.wrap_key_data makes it a key again."
        )
    array = np.asarray(leaf, order="C")
    if array.dtype not in DTYPES_BY_NAME.values():
        raise TypeError(
            f"params: the leaf at {path!r} is a {type(leaf).__name__} of dtype {array.dtype},"
            f" which the file does not have. It has {', '.join(DTYPES_BY_NAME)}, in this machine's"
            " byte order."
        )
    return array


def stored_bytes(array: Array) -> int | None:
    """The bytes that a file has of an array, its header apart; None for a dtype it does not have.

    Args:
      array: of any shape and dtype.

    Returns:
      Those of the kept values and their pattern, or of the whole array where that is less.
    """
    try:
        array = _to_numpy(array, "")
    except TypeError:
        return None
    values, pattern, smaller = _encode(array.reshape(-1))
    return values.nbytes + pattern.nbytes if smaller else array.nbytes


def _encode(flat: Array) -> tuple[Array, Array, bool]:
    """The kept values, the pattern, and whether both take less room than the array itself."""
    values, pattern = [flat[:0]], [b""]
    for span in gap_coding.spans(flat.size):
        keep = flat[span].view(f"u{flat.itemsize}") != 0
        values.append(flat[span].take(np.flatnonzero(keep)))  # faster than by a mask
        pattern.append(gap_coding.encode(keep))
    kept, coded = np.concatenate(values), np.frombuffer(b"".join(pattern), np.uint8)
    return kept, coded, kept.nbytes + coded.nbytes + ENTRY < flat.nbytes


def _decode(values: Array, pattern: Array, shape: tuple[int, ...]) -> Array:
    """The inverse of ``_encode``, whatever the bytes are."""
    size = math.prod(shape)
    if pattern.size < gap_coding.HEADER * gap_coding.block_count(size):
        raise ValueError(f"the pattern has {pattern.size} bytes, too few for {size} entries")
    array = np.zeros(shape, values.dtype)
    flat = array.reshape(-1)
    used = at = 0
    for span in gap_coding.spans(size):
        kept, at = gap_coding.decode(pattern, at, span.stop - span.start)
        if used + kept.size > values.size:
            raise ValueError(f"the pattern keeps more entries than the {values.size} values")
        flat[span][kept] = values[used : used + kept.size]
        used += kept.size
    if used < values.size or at < pattern.size:
        raise ValueError(
            f"the pattern keeps {used} entries in {at} bytes, but there are {values.size} values"
            f" and {pattern.size} bytes"
        )
    return array


def _checksum(dtype: np.dtype, shape: tuple[int, ...], stored: Any) -> int:
    checksum = zlib.crc32(f"{dtype.name} {list(shape)}".encode())
    for array in stored:
        checksum = zlib.crc32(array.reshape(-1).view(np.uint8), checksum)
    return checksum


def _dumps(description: dict[str, Any]) -> str:
    return json.dumps(description, allow_nan=False, separators=(",", ":"))


def _versions() -> dict[str, str]:
    from . import __version__

    return {"sparsereg_jax": __version__, "jax": jax.__version__, "numpy": np.__version__}


@contextmanager
def _replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path beside the given one, to write to; what is there in the end takes its place."""
    place = Path(os.path.realpath(path))
    beside = place.with_name(f".{KEY}-{secrets.token_hex(8)}.tmp")
    try:
        with beside.open("xb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        yield beside
        os.chmod(beside, mode)  # whoever wrote it may have made another file, for its owner alone
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, place)
    finally:
        beside.unlink(missing_ok=True)
    if os.name == "posix":  # so that the new name is on the disk as well, where a folder can be
        with suppress(OSError):
            directory = os.open(place.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[_Opened]:
    """Opens a file and checks its header; what is wrong, then and later, names the file."""
    try:
        size = _check_header_length(path)
        with safetensors.safe_open(path, framework="numpy") as container:
            yield _describe(container, size)
    except (safetensors.SafetensorError, ValueError, RecursionError) as error:
        raise SparseFileError(f"{os.fspath(path)}: {error}.") from error


def _check_header_length(path: str | os.PathLike[str]) -> int:
    """The file's size; a header that is longer than that, or than may be, is refused."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
    if length > min(size - 8, LARGEST_HEADER):
        raise ValueError(
            f"not a safetensors file: of {size} bytes, its header would take {length} (and may"
            f" take {LARGEST_HEADER})"
        )
    return size


def _describe(container: Any, size: int) -> _Opened:
    """Reads the header and checks that tree, description and tensors agree."""
    text = (container.metadata() or {}).get(KEY)
    if text is None:
        raise ValueError("a safetensors file, but not one of save_sparse; safetensors reads it")
    description = json.loads(text)
    _check_type(description, dict, "description")
    if description.get("version") != VERSION:
        raise ValueError(
            f"version {description.get('version')!r:.20} of the format; this release of"
            f" sparsereg_jax reads version {VERSION}"
        )
    checksum = description.pop("crc32", None)
    if checksum != zlib.crc32(_dumps(description).encode()):
        raise ValueError("the description does not match its checksum")
    for key, kind in (("leaves", list), ("metadata", dict), ("written_by", dict)):
        _check_type(description.get(key), kind, key)

    for version in description["written_by"].values():
        _check_type(version, str, "version of a package")
    tensors = set(container.keys())
    if len(description["leaves"]) > len(tensors):
        raise ValueError(f"{len(description['leaves'])} leaves, but {len(tensors)} tensors")
    described, paths, names = [], [], []
    taken = {"__metadata__"}
    # One leaf after the other: a name that is not there ends it, however many may follow.
    for number, leaf_path in enumerate(tree_json.paths(description.get("tree"))):
        if number == len(description["leaves"]):
            raise ValueError(f"the tree has more leaves than the {number} described")
        paths.append(leaf_path)
        names.append(_name(leaf_path, number, taken))
        described.append(
            _describe_leaf(container, tensors, names[-1], description["leaves"][number])
        )
    if len(paths) < len(description["leaves"]) or tensors:
        raise ValueError("leaves or tensors that the tree does not have")
    content = SparseFile(size, described, description["metadata"], description["written_by"])
    checksums = [leaf["crc32"] for leaf in description["leaves"]]
    return _Opened(container, content, description.get("tree"), paths, names, checksums)


def _describe_leaf(container: Any, tensors: set[str], name: str, leaf: Any) -> SparseLeaf:
    """Checks a leaf's description against its tensors, and takes those off the set."""
    _check_type(leaf, dict, f"description of {name!r}")
    _check_type(leaf.get("crc32"), int, f"checksum of {name!r}")
    _check_type(leaf.get("kept"), int, f"number of entries kept of {name!r}")
    sparse = "shape" in leaf
    wanted = {f"{name}.values", f"{name}.pattern"} if sparse else {name}
    if not wanted <= tensors:
        raise ValueError(f"no tensor {sorted(wanted - tensors)[0]!r}")
    tensors -= wanted
    stored = container.get_slice(f"{name}.values" if sparse else name)
    dtype = DTYPES.get(stored.get_dtype())
    if dtype is None:
        raise ValueError(f"the tensor of {name!r} has the dtype {stored.get_dtype()}")
    stored_shape = _check_shape(stored.get_shape(), dtype, name)
    count = math.prod(stored_shape)
    width = dtype.itemsize
    if not sparse:
        if not 0 <= leaf["kept"] <= count:
            raise ValueError(f"{name!r} cannot keep {str(leaf['kept'])[:20]} of {count} entries")
        return SparseLeaf(name, stored_shape, dtype.name, count, leaf["kept"], count * width, None)
    pattern = container.get_slice(f"{name}.pattern")
    if pattern.get_dtype() != "U8" or len(pattern.get_shape()) != 1 or len(stored_shape) != 1:
        raise ValueError(f"the tensors of {name!r} are no values and pattern")
    if leaf["kept"] != count:
        raise ValueError(f"{name!r} has {count} values, not the {leaf['kept']} described")
    shape = _check_shape(leaf["shape"], dtype, name)
    size = math.prod(shape)
    if count > size:
        raise ValueError(f"{name!r} cannot keep {count} of {size} entries")
    [coded] = pattern.get_shape()
    return SparseLeaf(name, shape, dtype.name, size, count, count * width, coded)


def _check_shape(shape: Any, dtype: np.dtype, name: str) -> tuple[int, ...]:
    """A shape, as NumPy can have it: 64 axes, fewer than 2**63 bytes even without empty axes."""
    _check_type(shape, list, f"shape of {name!r}")
    if (
        len(shape) > 64
        or not all(type(length) is int and 0 <= length < 2**63 for length in shape)
        or math.prod(length or 1 for length in shape) * dtype.itemsize >= 2**63
    ):
        raise ValueError(f"the shape of {name!r} is not one that an array can have")
    return tuple(shape)


def _check_type(thing: Any, kind: type, what: str) -> None:
    if type(thing) is not kind:
        raise ValueError(f"the {what} is not of the type {kind.__name__}")


def _read_leaf(file: _Opened, number: int) -> Array:
    """Reads a leaf's tensors, checks them and decodes them."""
    leaf, name = file.content.leaves[number], file.names[number]
    suffixes = ("",) if leaf.pattern_bytes is None else (".values", ".pattern")
    stored = [file.container.get_tensor(name + suffix) for suffix in suffixes]
    if _checksum(stored[0].dtype, leaf.shape, stored) != file.checksums[number]:
        raise ValueError(f"the leaf {name!r} does not match its checksum")
    if leaf.pattern_bytes is None:
        return stored[0]
    try:
        return _decode(stored[0], stored[1], leaf.shape)
    except ValueError as error:
        raise ValueError(f"the leaf {name!r}: {error}") from error


def _into(
    like: PyTree, arrays: dict[tree_json.Path, Array], path: str | os.PathLike[str]
) -> PyTree:
    """The arrays in the containers of ``like``."""
    leaves, structure = jax.tree.flatten(like)
    wanted = dict(zip(tree_json.like_paths(like), leaves, strict=True))
    for one, other, where in ((wanted, arrays, "the file"), (arrays, wanted, "like")):
        missing = [leaf_path for leaf_path in one if leaf_path not in other]
        if missing:
            raise ValueError(
                f"like: {where} has no leaf at {'/'.join(missing[0])!r}"
                f" ({len(missing)} such in all), reading {os.fspath(path)}."
            )
    for leaf_path, leaf in wanted.items():
        found, expected = (_shape_and_dtype(array) for array in (arrays[leaf_path], leaf))
        if found != expected:
            raise ValueError(
                f"like: the leaf at {'/'.join(leaf_path)!r} is {expected[1]}{expected[0]}, and"
                f" {found[1]}{found[0]} in {os.fspath(path)}."
            )
    return jax.tree.unflatten(structure, [arrays[leaf_path] for leaf_path in wanted])


def _shape_and_dtype(leaf: Any) -> tuple[list[int], str]:
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return list(leaf.shape), np.dtype(leaf.dtype).name
