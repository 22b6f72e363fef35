r"""A data set of images in one compact file, for a machine without network or tensorflow-datasets.

    python -m examples.pack cifar10 --data-dir DIR cifar10.npz
    python -m examples.resnet32 --data-dir cifar10.npz     # there; it needs Pillow

The image files go over as they are (PNG or JPEG), one after the other: 51 MB for CIFAR-10 as JPEG.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from .data import table_name


def pack(name: str, data_dir: str | Path | None, path: Path) -> None:
    """Writes the file.

    Args:
      name: a tensorflow-datasets name with ``image`` and ``label``, prepared as ArrayRecord.
      data_dir: where tensorflow-datasets keeps its data; None for its own default.
      path: ends in ``.npz``.
    """
    import tensorflow_datasets as tfds

    builder = tfds.builder(name, data_dir=data_dir)
    arrays: dict[str, Any] = {"title": np.array(table_name(builder))}
    for split in ("train", "test"):
        source = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
        rows = source.__getitems__(range(len(source)))
        files = [np.frombuffer(row["image"], np.uint8) for row in rows]
        arrays[f"{split}_files"] = np.concatenate(files)
        arrays[f"{split}_ends"] = np.cumsum([len(file) for file in files])
        arrays[f"{split}_labels"] = np.array([row["label"] for row in rows], np.uint8)
    np.savez(path, **arrays)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("path", type=Path)
    parser.add_argument("--data-dir", help="where tensorflow-datasets keeps its data")
    options = parser.parse_args(arguments)
    pack(options.name, options.data_dir, options.path)
    print(f"{options.path}: {options.path.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
