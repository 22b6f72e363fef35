"""Labelled images in memory, split into training, validation and test.

``digits`` comes with scikit-learn; every other name is a tensorflow-datasets one.
"""

import importlib.util
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

HELD_OUT = 5000  # training images for validation; of the digits 600


class Images(NamedTuple):
    """One split."""

    images: np.ndarray  # shape=[n, height, width, channels], dtype=float32, normalized
    labels: np.ndarray  # shape=[n], dtype=int32


class Splits(NamedTuple):
    """Training and validation come from the training set; the test set is for one last look."""

    train: Images
    validation: Images
    test: Images
    classes: int
    title: str  # as a table should name it


def load(name: str, data_dir: str | Path | None = None, validation: int | None = None) -> Splits:
    """Loads a data set; the split is a fixed shuffle, the same for every seed of training.

    Args:
      name: ``"digits"``, or a tensorflow-datasets name with ``image`` and ``label``.
      data_dir: where tensorflow-datasets keeps its data, None for its own default; or a file that
        ``examples.pack`` wrote, or the folder of several, each called as its set: ``mnist.npz``.
      validation: images of the training set held out; by default 5,000, of the digits 600.

    Returns:
      The splits, normalized by mean and deviation of the training images.

    Raises:
      ImportError: the data set is not prepared, or not as ArrayRecord, and TensorFlow is missing.
      ValueError: ``validation`` leaves no training images, or a file holds another data set.
    """
    if name == "digits":
        images, labels, test_images, test_labels = _digits()
        title = name
        validation = 600 if validation is None else validation
    elif (file := _file_of(name, data_dir)) is not None:
        images, labels, test_images, test_labels, title = _packed(file, name)
        validation = HELD_OUT if validation is None else validation
    else:
        images, labels, title = _tfds(name, "train", data_dir)
        test_images, test_labels, _ = _tfds(name, "test", data_dir)
        validation = HELD_OUT if validation is None else validation
    if not 0 < validation < len(images):
        raise ValueError(f"validation={validation} is not between 1 and {len(images) - 1}.")
    order = np.random.default_rng(0).permutation(len(images))
    kept_back, rest = order[:validation], order[validation:]
    mean, deviation = images[rest].mean(), images[rest].std()

    def split(images, labels):
        normalized = ((images - mean) / deviation).astype(np.float32)
        return Images(normalized, labels.astype(np.int32))

    return Splits(
        train=split(images[rest], labels[rest]),
        validation=split(images[kept_back], labels[kept_back]),
        test=split(test_images, test_labels),
        classes=int(labels.max()) + 1,
        title=title,
    )


def _digits() -> tuple[np.ndarray, ...]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = digits.images[..., None].astype(np.float32)
    test = np.arange(len(images)) % 6 == 5
    return images[~test], digits.target[~test], images[test], digits.target[test]


def _tfds(name: str, split: str, data_dir: str | Path | None) -> tuple[np.ndarray, np.ndarray, str]:
    builder = prepared(name, data_dir)
    if _array_record(builder):
        encoded, labels = files(builder, split)
        images, title = decoded(encoded), table_name(name, encoded[0])
    else:
        found = list(rows(builder, split))
        images = np.stack([row["image"] for row in found])
        labels, title = [row["label"] for row in found], name
    return images.astype(np.float32), np.array(labels), title


def prepared(name: str, data_dir: str | Path | None) -> Any:
    """The builder of a tensorflow-datasets set, which is prepared if it is not yet.

    Raises:
      ImportError: it is not prepared, or not as ArrayRecord, and TensorFlow is missing.
    """
    import tensorflow_datasets as tfds

    builder = tfds.builder(name, data_dir=data_dir)
    is_prepared = builder.is_prepared()
    readable = is_prepared and _array_record(builder)
    if not readable and importlib.util.find_spec("tensorflow") is None:
        what = "prepared as ArrayRecord" if is_prepared else "prepared"
        raise ImportError(
            f"{name!r} is not {what} in {builder.data_dir}; to prepare it, or to read another"
            " format, tensorflow-datasets needs TensorFlow once: pip install tensorflow-cpu. Or"
            " point --data-dir at a copy prepared with file_format='array_record'."
        )
    if not is_prepared:
        # ArrayRecord, which later needs no TensorFlow, is for Linux alone.
        here = importlib.util.find_spec("array_record") is not None
        builder.download_and_prepare(file_format="array_record" if here else None)
    return builder


def rows(builder: Any, split: str) -> Iterator[dict[str, Any]]:
    """The examples of a split of a prepared set, one after another."""
    import tensorflow_datasets as tfds

    if not _array_record(builder):
        yield from tfds.as_numpy(builder.as_dataset(split=split))
        return
    source = builder.as_data_source(split=split)
    for first in range(0, len(source), 10_000):  # row by row it would take twice as long
        yield from source.__getitems__(range(first, min(first + 10_000, len(source))))


def _array_record(builder: Any) -> bool:
    return builder.info.file_format.value == "array_record"


def files(builder: Any, split: str) -> tuple[list[bytes], list[int]]:
    """The image files of a set prepared as ArrayRecord, as they are, and their labels.

    Raises:
      ValueError: it is prepared in another format.
    """
    from tensorflow_datasets import decode

    if not _array_record(builder):
        raise ValueError(
            f"{builder.name!r} in {builder.data_dir} is not ArrayRecord; prepare it anew in another"
            " folder."
        )
    source = builder.as_data_source(split=split, decoders={"image": decode.SkipDecoding()})
    rows = source.__getitems__(range(len(source)))
    return [row["image"] for row in rows], [row["label"] for row in rows]


def decoded(encoded: Sequence[bytes]) -> np.ndarray:
    """Images from their files, PNG or JPEG: shape=[n, height, width, channels], dtype=uint8."""
    from PIL import Image

    images = np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in encoded])
    return images[..., None] if images.ndim == 3 else images


def table_name(name: str, file: bytes) -> str:
    """CIFAR is kept in PNG; of a copy in JPEG a table should say so."""
    copy = name.startswith("cifar") and file.startswith(b"\xff\xd8")
    return name + (", JPEG copy" if copy else "")


def _file_of(name: str, data_dir: str | Path | None) -> Path | None:
    """The packed file of a set, where there is one."""
    if data_dir is None:
        return None
    path = Path(data_dir)
    if path.suffix == ".npz":
        return path
    within = path / f"{name.replace('/', '-')}.npz"
    return within if within.exists() else None


def _packed(path: Path, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, str]:
    """What :mod:`examples.pack` wrote."""

    def part(split: str) -> tuple[np.ndarray, np.ndarray]:
        pieces = np.split(file[f"{split}_files"], file[f"{split}_ends"][:-1])
        images = decoded([piece.tobytes() for piece in pieces])
        return images.astype(np.float32), file[f"{split}_labels"]

    with np.load(path) as file:
        if "name" not in file or str(file["name"]) != name:
            held = repr(str(file["name"])) if "name" in file else "no data set"
            raise ValueError(
                f"data_dir: {path} holds {held}, not {name!r}. Write the file with"
                f" python -m examples.pack {name} FILE.npz."
            )
        return *part("train"), *part("test"), str(file["title"])
