r"""A data set of images in one compact file, for a machine without network or tensorflow-datasets.

    python -m examples.pack cifar10 --data-dir DIR cifar10.npz
    python -m examples.resnet32 --data-dir cifar10.npz     # there; it needs Pillow
    python -m examples.reproduce --data-dir FOLDER --five-seeds    # of cifar10.npz, mnist.npz, ...

The image files go over as they are (PNG or JPEG), one after the other, and deflated, since all JPEG
files begin alike: 18 MiB instead of 53 for CIFAR-10 as JPEG.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from .data import files, prepared, table_name


def pack(name: str, data_dir: str | Path | None, path: Path) -> None:
    """Writes the file.

    Args:
      name: a tensorflow-datasets name with ``image`` and ``label``, prepared as ArrayRecord.
      data_dir: where tensorflow-datasets keeps its data; None for its own default.
      path: ends in ``.npz``.
    """
    builder = prepared(name, data_dir)
    arrays: dict[str, Any] = {"name": np.array(name)}
    for split in ("train", "test"):
        encoded, labels = files(builder, split)
        arrays["title"] = np.array(table_name(name, encoded[0]))
        arrays[f"{split}_files"] = np.frombuffer(b"".join(encoded), np.uint8)
        arrays[f"{split}_ends"] = np.cumsum([len(file) for file in encoded])
        arrays[f"{split}_labels"] = np.array(labels, np.int32)
    np.savez_compressed(path, **arrays)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("path", type=Path)
    parser.add_argument("--data-dir", help="where tensorflow-datasets keeps its data")
    options = parser.parse_args(arguments)
    if options.path.suffix != ".npz":
        parser.error(f"{options.path}: the file's name must end in .npz.")
    try:
        pack(options.name, options.data_dir, options.path)
    except (ValueError, ImportError) as wrong:
        parser.error(str(wrong))
    print(f"{options.path}: {options.path.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
