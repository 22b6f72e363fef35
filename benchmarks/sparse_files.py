"""Files of sparse networks in six forms: their sizes, and how fast they are written and read.

    python -m benchmarks.sparse_files

Five minutes on one core; the record goes to results/sparse-files.json. Each form writes the same
tree of float32 NumPy arrays and forces it to the disk, and reads it back to the same bits; what is
timed runs in turn (``timing.py``). The values are normal and the positions independent, so that
nothing but zeros can be saved. The bound is the kept values as they are, and the entropy of the
positions, leaf by leaf.

- dense: safetensors;
- compressed: ``numpy.savez_compressed``, that is zlib;
- bit mask: a bit an entry and the kept values, in safetensors;
- CSR: a matrix's kept values, their columns in 16 bits where they fit and 32 where not, and 32 bits
  a row, in safetensors; the first axis of a kernel numbers the rows, and vectors are dense;
- ours: ``save_sparse``.
"""

import argparse
import json
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors.numpy

from sparsereg_jax.gap_coding import entropy_bits
from sparsereg_jax.sparse_file import load_sparse, save_sparse

from .run import hardware
from .timing import Candidate, interleave

Arrays = dict[str, np.ndarray]
Array = np.ndarray


class Form(NamedTuple):
    """A way to write a flat tree, and to read it."""

    write: Callable[[Path, Arrays], None]
    read: Callable[[Path], Arrays]


class Size(NamedTuple):
    """A row of the table."""

    network: str
    form: str
    bytes: float
    parameters: int
    of_dense: float  # its bytes over those of dense safetensors
    of_bound: float  # its bytes over the bound
    written: float | None  # millions of parameters a second, a median
    read: float | None
    rounds: int


def network(kernels: dict[str, tuple[tuple[int, ...], int]], biases: int) -> Arrays:
    """Makes random params.

    Args:
      kernels: by name, the shape and the number of entries kept, anywhere.
      biases: how many entries of each bias are kept, at most.

    Returns:
      The kernels, and a bias for each.
    """
    rng = np.random.default_rng(0)
    arrays = {}
    for name, (shape, kept) in kernels.items():
        for part, lengths, count in (("kernel", shape, kept), ("bias", shape[-1:], biases)):
            flat = np.zeros(math.prod(lengths), np.float32)
            count = min(count, flat.size)
            places = rng.permutation(flat.size)[:count]
            flat[places] = rng.standard_normal(count, np.float32)
            arrays[f"{name}/{part}"] = flat.reshape(lengths)
    return arrays


def networks() -> dict[str, Arrays]:
    """The networks of the table."""

    def transformer(density: float) -> Arrays:
        shapes = {"query": (512, 512), "key": (512, 512), "value": (512, 512), "out": (512, 512)}
        shapes |= {"up": (512, 2048), "down": (2048, 512)}
        return network(
            {
                f"layer_{i}/{name}": (shape, round(density * math.prod(shape)))
                for i in range(8)
                for name, shape in shapes.items()
            },
            biases=2048,
        )

    return {
        # The layers of results/lenet300-mnist-selective-seed2.json.
        "LeNet-300-100, 98.86 %": network(
            {"0": ((784, 300), 1790), "1": ((300, 100), 978), "2": ((100, 10), 267)}, biases=3
        ),
        "LeNet-5, 98.8 %": network(
            {
                "0": ((5, 5, 1, 20), 200),
                "1": ((5, 5, 20, 50), 1500),
                "2": ((800, 500), 3200),
                "3": ((500, 10), 250),
            },
            biases=5,
        ),
        "Transformer, 75 %": transformer(0.25),
        "Transformer, 95 %": transformer(0.05),
    }


def to_bit_mask(arrays: Arrays) -> Arrays:
    """What the bit mask form stores."""
    stored: Arrays = {}
    for name, array in arrays.items():
        keep = array.reshape(-1).view(np.uint32) != 0
        stored |= {
            f"{name}.values": array.reshape(-1)[keep],
            f"{name}.mask": np.packbits(keep),
            f"{name}.shape": np.array(array.shape, np.int32),
        }
    return stored


def from_bit_mask(stored: Arrays) -> Arrays:
    """The inverse of ``to_bit_mask``."""
    arrays = {}
    for name in (key.removesuffix(".mask") for key in stored if key.endswith(".mask")):
        array = np.zeros(stored[f"{name}.shape"], np.float32)
        keep = np.unpackbits(stored[f"{name}.mask"], count=array.size).view(bool)
        array.reshape(-1)[keep] = stored[f"{name}.values"]
        arrays[name] = array
    return arrays


def to_csr(arrays: Arrays) -> Arrays:
    """What the CSR form stores."""
    stored: Arrays = {}
    for name, array in arrays.items():
        if array.ndim < 2:
            stored[name] = array
            continue
        matrix = array.reshape(len(array), -1)
        places = np.flatnonzero(matrix.reshape(-1).view(np.uint32) != 0)
        rows, columns = np.divmod(places, matrix.shape[1])
        ends = np.cumsum(np.bincount(rows, minlength=len(matrix)))
        stored |= {
            f"{name}.values": matrix.reshape(-1)[places],
            f"{name}.columns": columns.astype(np.min_scalar_type(matrix.shape[1] - 1 | 256)),
            f"{name}.ends": ends.astype(np.int32),
            f"{name}.shape": np.array(array.shape, np.int32),
        }
    return stored


def from_csr(stored: Arrays) -> Arrays:
    """The inverse of ``to_csr``."""
    arrays = {key: array for key, array in stored.items() if "." not in key}
    for name in (key.removesuffix(".ends") for key in stored if key.endswith(".ends")):
        array = np.zeros(stored[f"{name}.shape"], np.float32)
        matrix = array.reshape(len(array), -1)
        rows = np.repeat(np.arange(len(matrix)), np.diff(stored[f"{name}.ends"], prepend=0))
        matrix[rows, stored[f"{name}.columns"]] = stored[f"{name}.values"]
        arrays[name] = array
    return arrays


def _read_npz(path: Path) -> Arrays:
    with np.load(path) as file:
        return dict(file)


def _write_npz(path: Path, arrays: Arrays) -> None:
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # names are any words here


FORMS = {
    "dense safetensors": Form(
        lambda path, arrays: safetensors.numpy.save_file(arrays, path), safetensors.numpy.load_file
    ),
    "compressed npz": Form(_write_npz, _read_npz),
    "bit mask and values": Form(
        lambda path, arrays: safetensors.numpy.save_file(to_bit_mask(arrays), path),
        lambda path: from_bit_mask(safetensors.numpy.load_file(path)),
    ),
    "CSR": Form(
        lambda path, arrays: safetensors.numpy.save_file(to_csr(arrays), path),
        lambda path: from_csr(safetensors.numpy.load_file(path)),
    ),
    "ours": Form(save_sparse, lambda path: load_sparse(path)[0]),
}


def measure(name: str, arrays: Arrays, rounds: int, folder: Path) -> list[Size]:
    """Writes and reads one network in all forms.

    Args:
      name: of the network.
      arrays: the network.
      rounds: how often.
      folder: where.

    Returns:
      A row a form, and one for the bound.
    """
    paths = {form: folder / form for form in FORMS}

    def writing(form: str) -> Candidate:
        def step(_: Any) -> None:
            FORMS[form].write(paths[form], arrays)
            descriptor = os.open(paths[form], os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)

        return Candidate(step, None)

    def reading(form: str) -> Candidate:
        def step(_: Any) -> None:
            FORMS[form].read(paths[form])

        return Candidate(step, None)

    written, _ = interleave({form: writing(form) for form in FORMS}, rounds)
    read, _ = interleave({form: reading(form) for form in FORMS}, rounds)
    for form in FORMS:
        found = FORMS[form].read(paths[form])
        if not all(found[key].tobytes() == array.tobytes() for key, array in arrays.items()):
            raise AssertionError(f"{form}: read as something else")
    parameters = sum(array.size for array in arrays.values())
    bound = sum(
        4 * kept + entropy_bits(size, kept) / 8
        for size, kept in ((a.size, int(np.count_nonzero(a))) for a in arrays.values())
    )
    dense = paths["dense safetensors"].stat().st_size

    def row(form: str) -> Size:
        size = paths[form].stat().st_size
        write, load = (parameters / 1e6 / float(np.median(t[form])) for t in (written, read))
        used = min(len(written[form]), len(read[form]))
        return Size(name, form, size, parameters, size / dense, size / bound, write, load, used)

    least = Size(name, "bound", bound, parameters, bound / dense, 1.0, None, None, 0)
    return [*map(row, FORMS), least]


def markdown(rows: list[Size]) -> str:
    """The table for a README: bytes, how many times the bound, and the last network's speeds."""
    networks = list(dict.fromkeys(row.network for row in rows))
    lines = [
        ["", *networks, "written, read: M entries/s"],
        ["---", *["---:"] * (len(networks) + 1)],
    ]
    for form in (*FORMS, "bound"):
        found = [row for row in rows if row.form == form]
        cells = [f"{row.bytes:,.0f} ({row.of_bound:.2f})" for row in found]
        last = found[-1]
        lines.append([form, *cells, f"{last.written:.0f}, {last.read:.0f}" if last.read else "-"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(arguments: list[str] | None = None) -> list[Size]:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("results/sparse-files.json"))
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, arrays in networks().items():
            rows += measure(name, arrays, options.rounds, Path(folder))
    record = hardware() | {"rounds": options.rounds, "rows": [row._asdict() for row in rows]}
    record["versions"]["safetensors"] = safetensors.__version__
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(markdown(rows))
    print(f"\nThe record is in {options.out}.")
    return rows


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()
