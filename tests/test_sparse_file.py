"""Sparse files: what is read is what was written; nothing else is read; a crash leaves the old."""

import collections
import dataclasses
import doctest
import json
import os
import signal
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors
import safetensors.numpy
from flax import nnx
from flax.core import FrozenDict
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import sparsereg_jax as sj
from benchmarks import fuzz_sparse_file
from sparsereg_jax import __main__ as command_line
from sparsereg_jax import gap_coding, sparse_file, tree_json

DATA = Path(__file__).parent / "data"
DTYPES = list(sparse_file.DTYPES.values())


@pytest.fixture
def path(tmp_path):
    return tmp_path / "params.safetensors"


def assert_same(found, wanted):
    """Containers, shapes, dtypes and bits."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        other = np.asarray(other)
        assert isinstance(one, np.ndarray)
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert one.tobytes() == other.tobytes()


def round_trip(path, params):
    sj.save_sparse(path, params)
    found, metadata = sj.load_sparse(path)
    assert metadata == {}
    assert_same(found, params)
    return sj.inspect_sparse(path)


def random_bits(rng, shape, density, dtype):
    """Any bits there are, NaNs of all kinds included; where the dtype has them."""
    size = int(np.prod(shape))
    bits = rng.integers(0, 256, (size, dtype.itemsize), np.uint8)
    if dtype.kind == "b":
        bits &= 1
    bits[rng.random(size) >= density] = 0
    return bits.reshape(-1).view(dtype).reshape(shape)


# What is written comes back


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_arrays(path, dtype):
    rng = np.random.default_rng(DTYPES.index(dtype))
    shapes = [(), (1,), (0,), (3, 0, 2), (7, 5), (300, 20), (4, 3, 2, 50), (1000,)]
    densities = (0.0, 0.01, 0.3, 0.5, 0.9, 1.0)
    params = [[random_bits(rng, shape, d, dtype) for shape in shapes] for d in densities]
    leaves = round_trip(path, params).leaves
    stored_sparse = {leaf.pattern_bytes is not None for leaf in leaves}
    assert stored_sparse == {True, False}
    for leaf, array in zip(leaves, jax.tree.leaves(params), strict=True):
        assert (leaf.shape, leaf.dtype, leaf.size) == (array.shape, dtype.name, array.size)
        kept = np.count_nonzero(array.reshape(-1).view(f"u{dtype.itemsize}"))
        assert leaf.kept == kept
        stored = leaf.values_bytes + (leaf.pattern_bytes or 0)
        assert stored <= array.nbytes


def test_many_blocks(path):
    """More entries than a block has, the last of them kept, in every density."""
    size = 2 * gap_coding.BLOCK + 3
    uniform = np.random.default_rng(0).random(size, np.float32)
    for density in (0.0, 1e-5, 0.05, 0.6, 0.999):
        array = np.where(uniform < density, uniform + 1, 0)
        array[-1] = np.nan
        [leaf] = round_trip(path, {"w": array}).leaves
        assert leaf.pattern_bytes is not None


def test_bits_decide_what_is_kept(path):
    payload = np.array([0x7FC12345, 0x80000000, 0, 1, 0xFF800000], np.uint32).view(np.float32)
    [leaf] = round_trip(path, {"w": np.tile(payload, (100, 1)) * 1}).leaves
    assert leaf.kept == 400  # -0.0, a subnormal and NaN with it


def test_any_layout(path):
    base = np.where(np.arange(24_000) % 7 == 0, np.arange(24_000), 0).astype(np.float32)
    cube = base.reshape(20, 30, 40)
    params = {
        "transposed": cube.T,
        "strided": cube[::2, 1::3, ::-1],
        "column": np.asfortranarray(cube[0]),
        "broadcast": np.broadcast_to(cube[0, 0], (5, 40)),
    }
    sj.save_sparse(path, params)
    found, _ = sj.load_sparse(path)
    for name, array in params.items():
        np.testing.assert_array_equal(found[name], array)
        found[name][:] = 1  # may be written to


def test_jax_arrays(path):
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
    w = jnp.where(jax.random.uniform(jax.random.key(0), (64, 96)) < 0.1, 1.5, 0.0)
    params = {
        "sharded": jax.device_put(w, NamedSharding(mesh, P("a", "b"))),
        "replicated": jax.device_put(w, NamedSharding(mesh, P())),
        "bfloat16": w.astype(jnp.bfloat16),
        "scalar": jnp.int32(3),
        "python": 2.5,
        "masked": sj.apply_mask({"w": w}, sj.mask_by_sparsity({"w": w}, 0.95)),
    }
    file = round_trip(path, params)
    assert [leaf.path for leaf in file.leaves if leaf.pattern_bytes is not None] == [
        "sharded",
        "replicated",
        "bfloat16",
        "masked/w",
    ]


def test_float64_under_x64(path, x64):
    round_trip(path, {"w": jnp.zeros(500).at[3].set(1 / 3)})


# Trees


class Pair(NamedTuple):
    first: Any
    second: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    kernel: Any
    bias: Any


W = np.where(np.arange(1200) % 9 == 0, 1.0, 0).astype(np.float32).reshape(30, 40)
B = np.arange(3, dtype=np.float32)


@pytest.mark.parametrize(
    "tree",
    [
        W,
        None,
        {},
        [],
        (),
        {"b": W, "a": None, "c": {}},
        [W, (B, [None, B], ()), {"x": []}],
        {0: W, 7: {"k": B}, -1: B},
        {"": W, "/": {"": B}, "é\n\x1b": B, "__metadata__": B, "params": B},
    ],
    ids=lambda tree: str(jax.tree.structure(tree))[:60],
)
def test_containers(path, tree):
    round_trip(path, tree)


def test_order_of_a_dictionary(path):
    sj.save_sparse(path, {"b": B, "a": B})
    assert list(sj.load_sparse(path)[0]) == ["b", "a"]


def test_names_that_meet(path):
    """Different leaves whose paths, or names made of them, read the same."""
    tree = {"a/b": W, "a": {"b": 2 * W, "b.values": B}, "a/b.pattern": W, "a/b#1": B}
    tree |= {"__metadata__": W, "__metadata__.values": B}
    file = round_trip(path, tree)
    assert len({leaf.path for leaf in file.leaves}) == len(file.leaves) == 7
    for leaf in file.leaves:
        assert leaf.path.startswith(("a/b", "__metadata__"))


OTHERS = {
    "FrozenDict": (FrozenDict({"a": {"kernel": W}}), {"a": {"kernel": W}}),
    "NamedTuple": (Pair(W, (B, None)), {"first": W, "second": (B, None)}),
    "dataclass": ([Layer(W, B)], [{"kernel": W, "bias": B}]),
    "OrderedDict": (collections.OrderedDict(a=W, b=B), {"a": W, "b": B}),
    "optax": (
        optax.adam(1.0).init({"w": jnp.asarray(W)}),
        ({"count": np.int32(0), "mu": {"w": 0 * W}, "nu": {"w": 0 * W}}, {}),
    ),
    "nnx.State": (
        nnx.state(nnx.Linear(4, 3, rngs=nnx.Rngs(0))),
        {
            "bias": np.zeros(3, np.float32),
            "kernel": np.asarray(nnx.Linear(4, 3, rngs=nnx.Rngs(0)).kernel[...]),
        },
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_containers(path, name):
    tree, plain = OTHERS[name]
    sj.save_sparse(path, tree)
    assert_same(sj.load_sparse(path)[0], plain)
    shapes = jax.eval_shape(lambda: tree)
    for like in (tree, jax.tree.map(lambda leaf: np.ones_like(leaf), tree), shapes):
        assert_same(sj.load_sparse(path, like=like)[0], tree)


def test_like_takes_leaves_by_path(path):
    sj.save_sparse(path, {"z": W, "a": B})  # in the file in this order, in JAX's the other
    assert_same(sj.load_sparse(path, like=Pair({"z": W, "a": B}, None).first)[0], {"z": W, "a": B})


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"a": {"k": W}}, r"like: like has no leaf at 'b' \(1 such in all\), reading .*params"),
        ({"a": {"k": W}, "b": B, "c": B}, "like: the file has no leaf at 'c'"),
        ({"a": W, "b": B}, "like: the file has no leaf at 'a' "),
        ({"a": {"k": W.T}, "b": B}, r"at 'a/k' is float32\[40, 30\], and float32\[30, 40\] in"),
        ({"a": {"k": W.astype(int)}, "b": B}, r"at 'a/k' is int64\[30, 40\], and float32"),
    ],
)
def test_like_that_does_not_fit(path, like, message):
    sj.save_sparse(path, {"a": {"k": W}, "b": B})
    with pytest.raises(ValueError, match=message) as caught:
        sj.load_sparse(path, like=like)
    assert not isinstance(caught.value, sj.SparseFileError)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": [B, B.astype(">f4")]}, "leaf at 'a/1' is a ndarray of dtype >f4"),
        ({"a": "text"}, "leaf at 'a' is a str of dtype <U4"),
        ({"a": object()}, "leaf at 'a' is a object of dtype object"),
        ({"a": B + 1j}, "complex64"),
        ({"a": jnp.zeros(3, jnp.float8_e4m3fn)}, "float8_e4m3fn"),
        ({"a": {"b": jax.random.key(0)}}, "leaf at 'a/b' is a PRNG key. Write jax.random.key_data"),
        ({"a": {1.5: B}}, "'a' has the key 1.5, a float"),
        ({"a": {1: B, "1": B}}, "'a' has two keys that read the same"),
        ({True: B}, "'the tree' has the key True, a bool"),
    ],
)
def test_what_is_not_written(path, tree, message):
    with pytest.raises(TypeError, match=f"^params: .*{message}"):
        sj.save_sparse(path, tree)
    assert list(path.parent.iterdir()) == []


def test_metadata(path):
    metadata = {"epoch": 7, "name": "é", "history": [1.5, None, {"a": True}], "": {}}
    sj.save_sparse(path, {"w": W}, metadata=metadata)
    assert sj.load_sparse(path)[1] == metadata
    file = sj.inspect_sparse(path)
    assert file.metadata == metadata
    assert file.written_by["sparsereg_jax"] == sj.__version__
    assert file.bytes == path.stat().st_size
    sj.save_sparse(path, {"w": W}, metadata={1: (2, 3)})
    assert sj.load_sparse(path)[1] == {"1": [2, 3]}  # as JSON has it
    sj.save_sparse(path, {"w": W}, metadata={1: 2, "1": 3})
    assert sj.load_sparse(path)[1] == {"1": 3}
    for value, error in ((np.float32(1), TypeError), (float("nan"), ValueError)):
        with pytest.raises(error, match=r"^metadata: JSON does not have it"):
            sj.save_sparse(path, {}, metadata={"x": value})
    with pytest.raises(ValueError, match=r"^params, metadata: .* come near 16 MiB"):
        sj.save_sparse(path, {}, metadata={"x": "x" * 2**24})


def test_safetensors_opens_it(path):
    sj.save_sparse(path, {"a": {"kernel": W.astype(jnp.bfloat16), "bias": B}})
    tensors = safetensors.numpy.load_file(path)
    assert tensors.keys() == {"a/kernel.values", "a/kernel.pattern", "a/bias"}
    np.testing.assert_array_equal(tensors["a/bias"], B)
    assert tensors["a/kernel.values"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(tensors["a/kernel.values"], np.ones(134, jnp.bfloat16))
    with safetensors.safe_open(path, framework="numpy") as container:
        description = json.loads(container.metadata()["sparsereg_jax"])
    assert description["sparsity"] == 1 - (134 + 2) / (1200 + 3)  # B holds a zero


def test_the_same_bytes_again(path):
    sj.save_sparse(path, {"a": W, "b": B})
    first = path.read_bytes()
    sj.save_sparse(path, {"a": jnp.asarray(W), "b": B})
    assert path.read_bytes() == first


# Size


def test_names_and_header(path):
    """At most 512 bytes a leaf, of long paths too."""
    layer = {
        name: {"kernel": np.tile(W, (4, 1)).reshape(40, 120), "bias": B}
        for name in ("query", "key", "value", "out_projection")
    }
    attention = {"multi_head_self_attention": layer}
    for tree in (
        {"w": W},
        {"params": {"Dense_0": {"kernel": W, "bias": B}}},
        {"params": {"encoder_decoder": {f"encoder_layers_{i}": attention for i in range(12)}}},
    ):
        file = round_trip(path, tree)
        stored = sum(leaf.values_bytes + (leaf.pattern_bytes or 0) for leaf in file.leaves)
        assert 0 < file.bytes - stored <= 512 * len(file.leaves)


@pytest.mark.parametrize("density", [0.005, 0.05, 0.382, 0.9])
def test_the_whole_file_near_the_entropy(path, density):
    uniform = np.random.default_rng(1).random((1000, 1000), np.float32)
    w = np.where(uniform < density, 1 + uniform, 0)
    sj.save_sparse(path, {"w": w})
    kept = np.count_nonzero(w)
    bound = gap_coding.entropy_bits(w.size, kept) / 8
    assert path.stat().st_size <= 4 * kept + 1.05 * bound + 512


# Writing


def test_mode_and_links(tmp_path, path):
    old = os.umask(0o027)
    try:
        sj.save_sparse(path, {"w": W})
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o640
    link = tmp_path / "link"
    link.symlink_to(path)
    sj.save_sparse(str(link), {"w": 2 * W})
    assert link.is_symlink()
    assert_same(sj.load_sparse(path)[0], {"w": 2 * W})


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("step", ["save_file", "os.fsync", "os.replace"])
@pytest.mark.parametrize("error", [OSError, Interrupted])
def test_a_failure_leaves_the_old_file(path, monkeypatch, step, error):
    sj.save_sparse(path, {"w": W})
    before = path.read_bytes()

    def fail(*arguments):
        if step == "save_file":
            arguments[1].write_bytes(b"the first half")
        raise error("no space left")

    monkeypatch.setattr(f"sparsereg_jax.sparse_file.{step}", fail)
    with pytest.raises(error, match="no space left"):
        sj.save_sparse(path, {"w": 2 * W})
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


KILLED = """
import os, signal, sys
import numpy as np
import sparsereg_jax as sj
from sparsereg_jax import sparse_file

kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
def half(tensors, path, metadata):
    path.write_bytes(b"the first half")
    kill()
if sys.argv[2] == "writing":
    sparse_file.save_file = half
else:
    os.replace = kill
sj.save_sparse(sys.argv[1], {"w": np.zeros((30, 40))})
"""


@pytest.mark.parametrize("when", ["writing", "before it is moved"])
def test_a_kill_leaves_the_old_file(path, when):
    sj.save_sparse(path, {"w": W})
    before = path.read_bytes()
    run = subprocess.run([sys.executable, "-c", KILLED, str(path), when], check=False)
    assert run.returncode == -signal.SIGKILL
    assert path.read_bytes() == before
    [litter] = set(path.parent.iterdir()) - {path}
    assert litter.name.startswith(".sparsereg_jax-")
    sj.save_sparse(path, {"w": 2 * W})
    assert_same(sj.load_sparse(path)[0], {"w": 2 * W})


def test_no_such_folder(path):
    with pytest.raises(FileNotFoundError):
        sj.save_sparse(path.parent / "none" / "file", {"w": W})
    with pytest.raises(FileNotFoundError):
        sj.load_sparse(path)
    with pytest.raises(IsADirectoryError):
        sj.load_sparse(path.parent)


# Memory


def peak_of(function):
    tracemalloc.start()
    try:
        result = function()
        return result, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("density", [0.02, 0.5, 0.99])
def test_memory(path, density):
    """Besides the arrays and what is stored of them, 20 MB, at whatever size."""
    uniform = np.random.default_rng(2).random(8 * gap_coding.BLOCK, np.float32)
    w = (256 * uniform).astype(np.uint8) * (uniform < density)
    _, peak = peak_of(lambda: sj.save_sparse(path, {"w": w}))
    stored = path.stat().st_size
    assert peak < 2 * stored + 20e6
    (found, _), peak = peak_of(lambda: sj.load_sparse(path))
    assert peak < w.nbytes + 2 * stored + 20e6
    assert_same(found, {"w": w})


def test_what_a_file_may_ask_for(path):
    """Zeros take a few bytes; how many they may become is limited."""
    sj.save_sparse(path, {"w": np.zeros(10**7, np.uint8)})
    assert path.stat().st_size < 600
    assert_same(sj.load_sparse(path)[0], {"w": np.zeros(10**7, np.uint8)})
    assert_same(sj.load_sparse(path, max_bytes=10**7)[0], {"w": np.zeros(10**7, np.uint8)})
    with pytest.raises(sj.SparseFileError, match="take 10000000 bytes, more than the 9999999 allo"):
        sj.load_sparse(path, max_bytes=10**7 - 1)
    sj.save_sparse(path, [np.zeros(600 << 20, np.uint8), np.zeros(600 << 20, np.uint8)])
    assert sum(leaf.size for leaf in sj.inspect_sparse(path).leaves) == 1200 << 20

    def refused():
        with pytest.raises(sj.SparseFileError, match=r"1258291200 bytes.*Pass max_bytes=125829120"):
            sj.load_sparse(path)

    assert peak_of(refused)[1] < 1e6


# Files that others wrote


def rewritten(path, change, tensors=None):
    """Writes a file whose description a function has changed, with the right checksum."""
    with safetensors.safe_open(path, framework="numpy") as container:
        description = json.loads(container.metadata()["sparsereg_jax"])
        found = {name: container.get_tensor(name) for name in container.keys()}  # noqa: SIM118
    tensors = found if tensors is None else {**found, **tensors}
    tensors = {name: array for name, array in tensors.items() if array is not None}
    del description["crc32"]
    change(description)
    leaves = description.get("leaves")
    for name, leaf in zip(("w", "b"), leaves if isinstance(leaves, list) else [], strict=False):
        if isinstance(leaf, dict) and leaf.get("crc32") is not None and "wrong" not in leaf:
            stored = [f"{name}.values", f"{name}.pattern"] if "shape" in leaf else [name]
            if set(stored) <= tensors.keys():
                first = tensors[stored[0]]
                shape = leaf.get("shape", list(first.shape))
                checksum = zlib.crc32(f"{first.dtype.name} {shape}".encode())
                for key in stored:
                    checksum = zlib.crc32(tensors[key].tobytes(), checksum)
                leaf["crc32"] = checksum
    text = json.dumps(description, separators=(",", ":"))
    text = json.dumps({**json.loads(text), "crc32": zlib.crc32(text.encode())})
    safetensors.numpy.save_file(tensors, path, {"sparsereg_jax": text})


def setting(*keys):
    """A change of one place in a description."""
    *above, last, value = keys

    def change(description):
        for key in above:
            description = description[key]
        description[last] = value

    return change


def nothing(description):
    pass


ONE = np.ones(1, np.uint8)
MALFORMED = [
    (setting("version", 2), {}, "version 2 of the format; this release"),
    (setting("version", None), {}, "version None of"),
    (setting("tree", 5), {}, "the tree has leaf 5 where leaf 0 belongs"),
    (setting("tree", True), {}, "node that is no leaf"),
    (setting("tree", {"dict": [["w", 0], ["b", 1], ["c", 2]]}), {}, "more leaves than the 2"),
    (setting("tree", {"dict": [["w", 0], ["w", 1]]}), {}, "wrong or repeated keys"),
    (setting("tree", {"dict": [["w", 0], [None, 1]]}), {}, "wrong or repeated keys"),
    (setting("tree", {"dict": [["w", 0], ["b"]]}), {}, "items are no pairs"),
    (setting("tree", {"set": [0, 1]}), {}, "node of the kind 'set'"),
    (setting("tree", {"list": [0, 1], "dict": []}), {}, "node that is no leaf"),
    (setting("tree", {"dict": [["w", 0], ["x", 1]]}), {}, "no tensor 'x'"),
    (setting("tree", {"dict": [["w", 0]]}), {}, "leaves or tensors that the tree does not have"),
    (setting("leaves", []), {}, "more leaves than the 0"),
    (setting("leaves", [3, 4]), {}, "description of 'w' is not of the type dict"),
    (setting("leaves", [{}, {}]), {}, "checksum of 'w' is not of the type int"),
    (setting("leaves", 9 * [{}]), {}, "9 leaves, but 3 tensors"),
    (setting("leaves", None), {}, "leaves is not of the type list"),
    (setting("metadata", []), {}, "metadata is not of the type dict"),
    (setting("written_by", []), {}, "written_by is not of the type dict"),
    (setting("leaves", 0, "crc32", None), {}, "checksum of 'w' is not of the type int"),
    (setting("leaves", 0, "kept", "many"), {}, "kept of 'w' is not of the type int"),
    (setting("leaves", 0, "kept", 5), {}, "'w' has 134 values, not the 5"),
    (setting("leaves", 0, {"crc32": 1, "kept": 0, "wrong": 1}), {}, "no tensor 'w'"),
    (setting("leaves", 0, "shape", "30"), {}, "shape of 'w' is not of the type list"),
    (setting("leaves", 0, "shape", [30.0, 40]), {}, "not one that an array can have"),
    (setting("leaves", 0, "shape", [-30, -40]), {}, "not one that an array can have"),
    (setting("leaves", 0, "shape", [True, 1200]), {}, "not one that an array can have"),
    (setting("leaves", 0, "shape", [2**62]), {}, "not one that an array can have"),
    (setting("leaves", 0, "shape", [0, 2**63]), {}, "not one that an array can have"),
    (setting("leaves", 0, "shape", 65 * [1]), {}, "not one that an array can have"),
    (setting("leaves", 0, "shape", [10**12]), {}, "its arrays take 4000000000012 bytes, more"),
    (setting("leaves", 0, "shape", [2**21]), {}, "the leaf 'w': the pattern ends within"),
    (setting("leaves", 0, "shape", [267]), {}, "the leaf 'w': the pattern marks 134 of 267"),
    (
        setting("leaves", 0, "shape", [1000]),
        {},
        "the leaf 'w': the pattern marks entry 1197 of 1000",
    ),
    (setting("leaves", 0, "shape", [40]), {}, "'w' cannot keep 134 of 40 entries"),
    (setting("leaves", 0, "shape", [0]), {}, "'w' cannot keep 134 of 0 entries"),
    (setting("leaves", 1, "kept", 4), {}, "'b' cannot keep 4 of 3 entries"),
    (setting("leaves", 1, "kept", -(10**99)), {}, "'b' cannot keep -1000000000"),
    (setting("written_by", "jax", [[]]), {}, "version of a package is not of the type str"),
    (nothing, {"w.pattern": np.zeros(3, np.uint8)}, "the pattern has 3 bytes, too few for 1200"),
    (
        nothing,
        {"w.pattern": np.zeros(4, np.uint8)},
        "keeps 0 entries in 4 bytes, but there are 134",
    ),
    (nothing, {"w.pattern": np.array([1, 0, 0, 0], np.uint8)}, "more entries than the 134 values"),
    (nothing, {"w.pattern": np.zeros((2, 2), np.uint8)}, "are no values and pattern"),
    (nothing, {"w.pattern": np.zeros(4, np.int8)}, "are no values and pattern"),
    (nothing, {"w.values": np.ones((2, 67), np.float32)}, "are no values and pattern"),
    (nothing, {"w.values": np.ones(133, np.float32)}, "has 133 values, not the 134"),
    (nothing, {"w.pattern": None}, "no tensor 'w.pattern'"),
    (nothing, {"b": None}, "no tensor 'b'"),
    (nothing, {"more": ONE}, "leaves or tensors that the tree does not have"),
    (
        setting("leaves", 1, {"crc32": 7, "kept": 3, "wrong": 1}),
        {},
        "'b' does not match its checks",
    ),
]


@pytest.mark.parametrize(
    ("change", "tensors", "message"), MALFORMED, ids=[message[:50] for *_, message in MALFORMED]
)
def test_malformed(path, change, tensors, message):
    sj.save_sparse(path, {"w": W, "b": B})
    rewritten(path, nothing)
    assert_same(sj.load_sparse(path)[0], {"w": W, "b": B})  # as it was, so far
    rewritten(path, change, tensors)

    def refused():
        with pytest.raises(sj.SparseFileError, match=message) as caught:
            sj.load_sparse(path)
        assert str(caught.value).startswith(f"{path}: ")

    assert peak_of(refused)[1] < 9e6  # 2**21 entries are allowed, and no more than that is taken


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a safetensors file: of 0 bytes"),
        (b"\0" * 7, "not a safetensors file: of 7 bytes"),
        (b"\0" * 8, "header"),
        (b"\xff" * 8, "its header would take 18446744073709551615"),
        ((10**12).to_bytes(8, "little") + b"{}", "its header would take 1000000000000"),
        ((3).to_bytes(8, "little") + b"{}", "its header would take 3"),
        ((2).to_bytes(8, "little") + b"{}", "not one of save_sparse"),
        ((2).to_bytes(8, "little") + b"[]", "header"),
        ((5).to_bytes(8, "little") + b"hello", "header"),
    ],
)
def test_no_safetensors_file(path, data, message):
    path.write_bytes(data)
    for function in (sj.load_sparse, sj.inspect_sparse):
        with pytest.raises(sj.SparseFileError, match=message):
            function(path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "1", '"a"', "[" * 10**5, '{"version":1e999}', "NaN"]
)
def test_no_description(path, text):
    safetensors.numpy.save_file({}, path, {"sparsereg_jax": text})
    with pytest.raises(sj.SparseFileError, match=r"^.*params\.safetensors: "):
        sj.load_sparse(path)


def test_a_deep_tree(path):
    """As deep as Python goes it is written and read; deeper is refused, not a crash."""
    tree = B
    for _ in range(100):
        tree = [tree]
    round_trip(path, tree)
    deep = '{"list":[' * 5000 + "0" + "]}" * 5000
    description = '{"version":1,"written_by":{},"metadata":{},"leaves":[],"tree":' + deep
    text = description + f',"crc32":{zlib.crc32((description + "}").encode())}' + "}"
    safetensors.numpy.save_file({}, path, {"sparsereg_jax": text})
    with pytest.raises(sj.SparseFileError, match="recursion"):
        sj.load_sparse(path)


def test_every_flipped_byte(path):
    """None is read as anything but what was written: the header too is under a checksum."""
    params = {"w": W[:10], "b": [B.astype(np.float16), None]}
    sj.save_sparse(path, params, metadata={"epoch": 7})
    sound = path.read_bytes()
    rng = np.random.default_rng(0)
    read = 0
    for i in range(len(sound)):
        for mask in (1, 1 << rng.integers(1, 8), rng.integers(1, 256)):
            data = bytearray(sound)
            data[i] ^= int(mask)
            path.unlink()
            path.write_bytes(data)
            try:
                found, metadata = sj.load_sparse(path)
            except sj.SparseFileError:
                continue
            read += 1
            assert_same(found, params)
            assert metadata == {"epoch": 7}
    assert read < 100  # blanks become other blanks


def test_every_length(path):
    sj.save_sparse(path, {"w": W[:10], "b": B})
    sound = path.read_bytes()
    for data in (*(sound[:i] for i in range(len(sound))), sound + b"\0"):
        path.unlink()
        path.write_bytes(data)
        with pytest.raises(sj.SparseFileError):
            sj.load_sparse(path)


@pytest.mark.slow
def test_random_faults(tmp_path):
    result = fuzz_sparse_file.run(2000, 10**9, tmp_path)
    assert result.failures == []
    assert result.peak < fuzz_sparse_file.MAX_BYTES + 10e6
    assert set(result.refused) == set(fuzz_sparse_file.KINDS)
    assert sum(result.refused.values()) + sum(result.read.values()) == 2000
    assert set(result.read) >= set(fuzz_sparse_file.REPAIRED)


def test_the_fuzzer_finds_what_is_wrong(tmp_path, monkeypatch):
    """With its checks off the reader fails in ways that the fuzzer reports."""
    monkeypatch.setattr(sparse_file, "_check_type", lambda *_: None)
    monkeypatch.setattr(sparse_file, "_checksum", lambda *_: 0)
    failures = fuzz_sparse_file.run(300, 0, tmp_path).failures
    assert any("description" in failure for failure in failures)


# Files of today, read tomorrow


def version_1():
    """The content of tests/data/sparse-v1.safetensors, which version 1 of the format wrote.

    It was written by save_sparse from just this, and is not to be written again.
    """

    def leaf(shape, density, dtype=np.float32):
        i = np.arange(int(np.prod(shape)), dtype=np.int64)
        kept = i * 2654435761 % 2**32 < density * 2**32
        return np.where(kept, i % 100 + 1, 0).astype(dtype).reshape(shape)

    arrays = {str(dtype): leaf((20, 30), 0.1, dtype) for dtype in DTYPES}
    params = {
        "encoder": [
            {"kernel": leaf((64, 48), 0.02), "bias": leaf(48, 1)},
            {"kernel": leaf((48, 70), 0.45), "bias": None},
        ],
        "dtypes": arrays,
        "pair": (leaf((), 1, np.int32), leaf((0, 3), 1)),
        "by number": {7: leaf((60, 40), 0.9, np.int16), -1: leaf((90, 90), 0)},
        "two blocks": leaf(2**20 + 1, 3e-5, np.uint8),
    }
    return params, {"note": "version 1", "numbers": [1, 2.5, None, True]}


def test_version_1():
    params, metadata = version_1()
    found, found_metadata = sj.load_sparse(DATA / "sparse-v1.safetensors")
    assert_same(found, params)
    assert found_metadata == metadata
    assert (DATA / "sparse-v1.safetensors").stat().st_size < 100_000
    stored = sj.inspect_sparse(DATA / "sparse-v1.safetensors").leaves
    assert {leaf.pattern_bytes is None for leaf in stored} == {True, False}


# The command line


def test_inspect(path, capsys):
    assert doctest.testmod(command_line).failed == 0
    sj.save_sparse(path, {"a\x1b[2J": W, "b": B}, metadata={"epoch": 7, "x": "\x1b"})
    assert command_line.main(["inspect", str(path)]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert err == ""
    assert "\x1b" not in out
    assert lines[1].split()[:6] == ["a\\u001b[2J", "(30,", "40)", "float32", "134", "1200"]
    assert lines[2].split() == ["b", "(3,)", "float32", "2", "3", "33.33", "%", "12", "-", "-"]
    assert lines[3].split()[:3] == ["total", "136", "1203"]
    assert lines[-1] == 'metadata {"epoch": 7, "x": "\\u001b"}'
    path.write_bytes(b"no")
    for name in (path, path.parent / "none"):
        assert command_line.main(["inspect", str(name)]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert str(name) in err
    sj.save_sparse(path, {})
    assert command_line.main(["inspect", str(path)]) == 0


def test_the_command_itself():
    data = str(DATA / "sparse-v1.safetensors")
    run = subprocess.run(
        [sys.executable, "-m", "sparsereg_jax", "inspect", data], capture_output=True, check=True
    )
    assert b"encoder/0/kernel" in run.stdout
    run = subprocess.run([sys.executable, "-m", "sparsereg_jax", "-h"], capture_output=True)
    assert run.returncode == 0
    assert b"inspect" in run.stdout


def test_tree_json_is_checked_as_it_is_walked():
    """What is wrong at the end does not keep the beginning from being used."""
    walked = tree_json.paths({"list": [0, {"dict": [["a", 2]]}]})
    assert next(walked) == ("0",)
    with pytest.raises(ValueError, match="leaf 2 where leaf 1 belongs"):
        next(walked)


class Attention(NamedTuple):
    query: Any
    value: Any
    other: Any = None


class Value(NamedTuple):
    value: Any


def test_a_field_named_value_is_no_box(path):
    """nnx and Linen box a leaf in an attribute of that name, which no path shows."""
    w = np.arange(4.0)
    for params in (
        {"attention": Attention(w, w + 1)},
        {"attention": Attention(None, w), "b": Value(w), "c": [Value(None), None]},
        Attention(Value(w), {"value": w}),
    ):
        sj.save_sparse(path, params)
        restored, _ = sj.load_sparse(path, like=params)
        assert jax.tree.structure(restored) == jax.tree.structure(params)
        for one, other in zip(*map(jax.tree.leaves, (params, restored)), strict=True):
            np.testing.assert_array_equal(one, other)
        assert tree_json.like_paths(params) == [where for where, _ in tree_json.to_json(params)[1]]
