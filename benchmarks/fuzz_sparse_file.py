"""Reads sparse files with random faults in them, and counts what comes of it.

    python -m benchmarks.fuzz_sparse_file --count 100000

Four minutes on one core. Every file must be refused with SparseFileError or read; one whose
checksums were left alone must be refused or read as what was written. Anything else, a MemoryError
under the limit on the process's memory included, is printed with the number that makes the file
again, and the exit status is 1. The record goes to results/fuzz-sparse-file.json.
"""

import argparse
import collections
import copy
import json
import random
import resource
import sys
import tempfile
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from sparsereg_jax import gap_coding, sparse_file
from sparsereg_jax.__main__ import table
from sparsereg_jax.sparse_file import KEY, SparseFileError, inspect_sparse, load_sparse, save_sparse

from .run import hardware

PyTree = Any
MAX_BYTES = 2**24  # that the arrays of a file may take here ...
ROOM = 2**28  # ... and by which the process may grow, the memory of safetensors included
NUMBERS = (0, 1, -1, 2, 7, 255, 256, 2**16, 2**20, 2**31, 2**32, 2**53, 2**63, 2**64, 10**30, 0.5)
WORDS = (
    "dict",
    "list",
    "tuple",
    "shape",
    "crc32",
    "kept",
    "leaves",
    "w",
    "",
    "F64",
    "U8",
    "\ud800",
)
# Containers in containers, which Python's json would not write.
DEEP = {
    "lists": ("[", "]", 100_000),
    "nodes": ('{"list":[', "]}", 300),
    "more nodes": ('{"tuple":[', "]}", 5000),
}


class Original(NamedTuple):
    """A sound file."""

    data: bytes
    params: dict[str, np.ndarray]  # by path


class Result(NamedTuple):
    """What came of some files, by the kind of their faults."""

    refused: dict[str, int]
    read: dict[str, int]
    failures: list[str]
    peak: int  # bytes that Python and NumPy held at most, while one file was read


def originals(folder: Path) -> list[Original]:
    """Sound files: all dtypes and containers; several blocks; a mask alone."""
    rng = np.random.default_rng(0)

    def sparse(shape: Any, density: float, dtype: Any = np.float32) -> np.ndarray:
        return np.where(rng.random(shape) < density, 1 + rng.random(shape), 0).astype(dtype)

    trees: list[PyTree] = [
        {
            "a": {"kernel": sparse((40, 30), 0.1), "bias": sparse(3, 1.0)},
            "b": [None, (sparse(9, 1),)],
        },
        {str(dtype): sparse(400, 0.2, dtype) for dtype in sparse_file.DTYPES.values()}
        | {"list": [sparse((0, 3), 1), sparse((), 1)], "half": sparse(2000, 0.5, jnp.bfloat16)},
        {"blocks": sparse(gap_coding.BLOCK + 5, 1e-4, np.int8), "ones": np.ones((300, 3), bool)},
        sparse((64, 64), 0.3),
    ]
    found = []
    for tree in trees:
        save_sparse(folder / "original", tree, metadata={"note": "fuzz", "list": [1, 2.5, None]})
        data = (folder / "original").read_bytes()
        found.append(Original(data, _by_path(load_sparse(folder / "original")[0])))
    return found


def mutate(data: bytes, kind: str, rng: random.Random) -> bytes:
    """Puts faults of one kind into a file.

    Args:
      data: a sound file.
      kind: of ``KINDS``.
      rng: what decides.

    Returns:
      The faulty file.
    """
    return KINDS[kind](data, rng)


def run(count: int, seed: int, folder: Path) -> Result:
    """Reads ``count`` faulty files.

    Args:
      count: how many.
      seed: of the first; the others have the numbers after it.
      folder: where they are written, one after the other.

    Returns:
      What came of them.
    """
    sound = originals(folder)
    refused: collections.Counter[str] = collections.Counter()
    read: collections.Counter[str] = collections.Counter()
    failures: list[str] = []
    peak = 0
    path = folder / "faulty"
    tracemalloc.start()
    for number in range(seed, seed + count):
        rng = random.Random(number)
        original = rng.choice(sound)
        kind = rng.choice(list(KINDS))
        path.unlink(missing_ok=True)  # to overwrite it takes some file systems ten times as long
        path.write_bytes(mutate(original.data, kind, rng))
        tracemalloc.reset_peak()
        held, _ = tracemalloc.get_traced_memory()
        try:
            params, _ = load_sparse(path, max_bytes=MAX_BYTES)
            table(inspect_sparse(path))
        except SparseFileError:
            refused[kind] += 1
        except BaseException as error:  # panics of safetensors are no Exception
            if isinstance(error, KeyboardInterrupt):
                raise
            failures.append(f"number {number}, {kind}: {type(error).__name__}: {error}")
        else:
            read[kind] += 1
            if kind not in REPAIRED and not _same(_by_path(params), original.params):
                failures.append(f"number {number}, {kind}: read as something else")
        peak = max(peak, tracemalloc.get_traced_memory()[1] - held)
    tracemalloc.stop()
    return Result(dict(refused), dict(read), failures, peak)


def largest_header(folder: Path) -> int:
    """The bytes that the process grows by while it refuses the header that takes most to read."""
    lists = "{},"
    text = '{"version":1,"tree":['
    text += lists * ((sparse_file.LARGEST_HEADER - 200) // len(lists)) + "{}]}"
    path = folder / "faulty"
    path.write_bytes(_join({"__metadata__": {KEY: text}}, b""))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        load_sparse(path)
    except SparseFileError:
        return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    raise AssertionError("the largest header was not refused")


def _flips(data: bytes, rng: random.Random) -> bytes:
    mutable = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        at = rng.randrange(len(mutable))
        mutable[at] = (
            rng.randrange(256) if rng.random() < 0.5 else mutable[at] ^ 1 << rng.randrange(8)
        )
    return bytes(mutable)


def _cuts(data: bytes, rng: random.Random) -> bytes:
    start, end = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    return rng.choice(
        (
            data[:start],
            data[:start] + data[end:],
            data[:end] + data[start:],
            data + rng.randbytes(rng.randrange(1, 100)),
            data[:start] + bytes(end - start) + data[end:],
        )
    )


def _lengths(data: bytes, rng: random.Random) -> bytes:
    old = int.from_bytes(data[:8], "little")
    length = rng.choice((*NUMBERS[:-2], len(data), len(data) - 8, old + rng.randrange(-20, 20)))
    return (int(length) % 2**64).to_bytes(8, "little") + data[8:]


def _tensors(data: bytes, rng: random.Random) -> bytes:
    """Offsets, shapes, dtypes and names of the container."""
    header, body = _split(data)
    name = rng.choice([name for name in header if name != "__metadata__"])
    fault = rng.randrange(6)
    if fault == 0:
        header[name]["data_offsets"][rng.randrange(2)] = _number(rng, body)
    elif fault == 1:
        header[name]["shape"] = [_number(rng, body) for _ in range(rng.randrange(4))]
    elif fault == 2:
        header[name]["dtype"] = rng.choice((*sparse_file.DTYPES, "F8_E5M2", "C64", "F4", "f32"))
    elif fault == 3:
        header[rng.choice(WORDS[:-1])] = header.pop(name)
    elif fault == 4:
        other = rng.choice(list(header))
        header[name], header[other] = header[other], header[name]
    else:
        _change(header, rng)
    return _join(header, body)


def _description(data: bytes, rng: random.Random) -> bytes:
    """Any part of the description, its checksum made right."""
    header, body = _split(data)
    description = json.loads(header["__metadata__"][KEY])
    for _ in range(rng.choice((1, 1, 2, 5))):
        _change(description, rng)
    return _seal(header, body, description)


def _contents(data: bytes, rng: random.Random) -> bytes:
    """The bytes of one leaf's pattern or values, all checksums made right."""
    header, body = _split(data)
    description = json.loads(header["__metadata__"][KEY])
    names = [name for name in header if name.endswith(".pattern")]
    start, end = header[rng.choice(names)]["data_offsets"]
    pattern = bytearray(body[start:end])
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at = (
            rng.randrange(len(pattern))
            if rng.random() < 0.5
            else rng.randrange(min(60, len(pattern)))
        )
        pattern[at] = rng.choice(
            (0, 1, 255, rng.randrange(256), pattern[at] ^ 1 << rng.randrange(8))
        )
    return _seal(header, body[:start] + bytes(pattern) + body[end:], description, leaves=True)


def _shapes(data: bytes, rng: random.Random) -> bytes:
    """The shape of a sparse leaf, all checksums made right."""
    header, body = _split(data)
    description = json.loads(header["__metadata__"][KEY])
    leaf = rng.choice([leaf for leaf in description["leaves"] if "shape" in leaf])
    shape = leaf["shape"]
    if rng.random() < 0.5:
        shape[rng.randrange(len(shape))] += rng.choice((-1, 1, 10, 2**20, 10**6, 10**12))
    else:
        leaf["shape"] = [abs(int(_number(rng, body))) for _ in range(rng.randrange(1, 70))]
    return _seal(header, body, description, leaves=True)


KINDS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "bytes flipped": _flips,
    "cut, repeated, filled": _cuts,
    "header length": _lengths,
    "tensors in the header": _tensors,
    "description": _description,
    "pattern": _contents,
    "shape": _shapes,
}
REPAIRED = ("description", "pattern", "shape")  # their checksums are right


def _split(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _dumps(tree: Any) -> str:
    text = json.dumps(tree, separators=(",", ":"))
    for word, (opening, closing, depth) in DEEP.items():
        text = text.replace(f'"{word}"', opening * depth + "0" + closing * depth)
    return text


def _join(header: dict[str, Any], body: bytes) -> bytes:
    text = _dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def _seal(header: dict[str, Any], body: bytes, description: Any, leaves: bool = False) -> bytes:
    """Joins a file, the description's checksum made right, or those of the leaves as well."""
    if leaves:
        names = [name.removesuffix(".values") for name in _names(header, description)]
        for name, leaf in zip(names, description["leaves"], strict=True):
            stored = [f"{name}.values", f"{name}.pattern"] if "shape" in leaf else [name]
            entry = header[stored[0]]
            dtype = sparse_file.DTYPES[entry["dtype"]].name
            checksum = zlib.crc32(f"{dtype} {leaf.get('shape', entry['shape'])}".encode())
            for tensor in stored:
                start, end = header[tensor]["data_offsets"]
                checksum = zlib.crc32(body[start:end], checksum)
            leaf["crc32"] = checksum
    if isinstance(description, dict):
        description.pop("crc32", None)
        description["crc32"] = zlib.crc32(_dumps(description).encode())
    header["__metadata__"][KEY] = _dumps(description)
    return _join(header, body)


def _names(header: dict[str, Any], description: dict[str, Any]) -> Iterator[str]:
    for path in sparse_file.tree_json.paths(description["tree"]):
        yield "/".join(path) or "params"


def _number(rng: random.Random, body: bytes) -> Any:
    return rng.choice((*NUMBERS, len(body), len(body) - 1, rng.randrange(5000)))


def _change(tree: Any, rng: random.Random) -> None:
    """Changes a random place somewhere below a JSON container."""
    places = [(node, key) for node in _nodes(tree) for key in _keys(node)]
    if not places:
        return
    node, key = rng.choice(places)
    fault = rng.randrange(6)
    if fault == 0:
        del node[key]
    elif fault == 1:
        node[key] = rng.choice(NUMBERS)
    elif fault == 2:
        node[key] = rng.choice(WORDS)
    elif fault == 3:
        node[key] = copy.deepcopy(rng.choice(places)[0])
    elif fault == 4:
        node[key] = rng.choice((None, [], {}, True, [node[key]], {"dict": [["a", node[key]]]}))
    else:
        node[key] = rng.choice(list(DEEP))


def _nodes(tree: Any) -> Iterator[Any]:
    pending = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, dict | list):
            yield node
            pending += node.values() if isinstance(node, dict) else node


def _keys(node: Any) -> list[Any]:
    return list(node) if isinstance(node, dict) else list(range(len(node)))


def _by_path(params: PyTree) -> dict[str, np.ndarray]:
    return {"/".join(path): leaf for path, leaf in sparse_file.tree_json.to_json(params)[1]}


def _same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> bool:
    return found.keys() == wanted.keys() and all(
        (array.shape, array.dtype, array.tobytes())
        == (wanted[path].shape, wanted[path].dtype, wanted[path].tobytes())
        for path, array in found.items()
    )


def _limit_memory() -> None:
    """Lets the process grow by ``ROOM``, so that whoever asks for more gets a MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM,) * 2)


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("results/fuzz-sparse-file.json"))
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        header = largest_header(Path(name))
        _limit_memory()
        began = time.perf_counter()
        result = run(options.count, options.seed, Path(name))
    record = hardware() | result._asdict()
    record |= {"count": options.count, "seed": options.seed, "largest_header": header}
    record |= {"seconds": round(time.perf_counter() - began, 1), "max_bytes": MAX_BYTES}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    for kind in KINDS:
        refused, read = result.refused.get(kind, 0), result.read.get(kind, 0)
        print(f"{kind:24} {refused:7} refused {read:7} read")
    print(
        f"{options.count} files, {len(result.failures)} failures; at most {result.peak / 2**20:.1f}"
        f" MiB held (arrays of {MAX_BYTES >> 20} MiB allowed), {header >> 20} MiB for the largest"
        f" header; {record['seconds']:.0f} s"
    )
    for failure in result.failures[:20]:
        print(failure, file=sys.stderr)
    return bool(result.failures)


if __name__ == "__main__":
    sys.exit(main())
