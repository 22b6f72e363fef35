"""The example end to end in a few steps, and its data through tensorflow-datasets' real files."""

import importlib.util
import io
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import sparsereg_jax as sj
from examples import data, figures, lenet300, models

FEW = ["--dense-epochs", "1", "--interval", "5", "--checks", "3", "--tune-epochs", "1"]


def run(tmp_path, *arguments):
    return lenet300.main([*FEW, "--bound", "0.02", "--out", str(tmp_path), *arguments])


def test_lenet_on_digits(tmp_path, capsys):
    (result,) = run(tmp_path)
    # 64-300-100-10, and twice round(10 %) of what is left before the third check.
    assert result["parameters"] == 64 * 300 + 300 + 300 * 100 + 100 + 100 * 10 + 10
    left = result["parameters"]
    for _ in range(2):
        left -= round(0.1 * left)
    assert result["kept"] == left == sum(layer["kept"] for layer in result["layers"])
    assert result["sparsity"] == 1 - left / result["parameters"]
    assert result["settings"]["bound"] == 0.02

    small = result["compacted"]
    assert small["test_error"] == pytest.approx(result["test_error"], abs=0.7)  # 2 of 299 images
    pixels, first, second = small["pixels"], *small["widths"][:2]
    assert small["parameters"] == (pixels + 1) * first + (first + 1) * second + (second + 1) * 10

    stem = tmp_path / "lenet300-digits-selective-seed0"
    sparse, _ = sj.load_sparse(stem.with_suffix(".safetensors"))
    assert sum(np.count_nonzero(leaf) for leaf in jax.tree.leaves(sparse)) == left
    assert result["file_bytes"] == stem.with_suffix(".safetensors").stat().st_size
    assert json.loads(stem.with_suffix(".json").read_text()) == json.loads(json.dumps(result))
    lines = stem.with_suffix(".jsonl").read_text().splitlines()
    assert [sj.check_from_json(line).check for line in lines] == [1, 2, 3]
    picture = np.asarray(Image.open(stem.with_suffix(".png")).convert("L"))
    assert picture.shape[1] > 1000
    assert picture.std() > 10
    shown = capsys.readouterr().out
    assert "params/Dense_0/kernel" in shown
    assert f"{left:,}" in shown
    assert re.search(r"test error: dense [\d.]+ %, sparse [\d.]+ %", shown)


@pytest.mark.slow
def test_same_seed_same_numbers_and_every_method(tmp_path, capsys):
    results = run(tmp_path, "--method", "selective", "l2", "none", "--seed", "1")
    again = run(tmp_path, "--seed", "1", "--report")
    page = (tmp_path / "report-lenet300-digits-selective-seed1" / "report.html").read_text()
    assert f"{again[0]['kept']:,} are kept" in page
    assert "3 checks" in page
    for key in ("kept", "test_error", "validation_accuracy", "dense_test_error"):
        assert again[0][key] == results[0][key]
    assert {result["kept"] for result in results} == {results[0]["kept"]}
    assert len({result["dense_test_error"] for result in results}) == 1
    assert "mean over seeds" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "shape", "parameters"),
    [
        (models.LeNet300(), (28, 28, 1), 266_610),
        (models.LeNet5(), (28, 28, 1), 431_080),
        (models.ResNet32(), (32, 32, 3), 464_154),
    ],
    ids=["LeNet-300-100", "LeNet-5", "ResNet-32"],
)
def test_paper_sizes(model, shape, parameters):
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *shape)))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == parameters


def write_tiny(name, version, shape, folder):
    """A data set in tensorflow-datasets' own files; each image is filled with its label."""
    import tensorflow_datasets as tfds

    def examples(number):
        for i in range(number):
            label = i % 10
            image = Image.fromarray(np.full(shape, 20 * label, np.uint8).squeeze())
            file = io.BytesIO()
            image.save(file, "PNG")
            file.seek(0)
            yield i, {"image": file, "label": label}

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(version)
        pkg_dir_path = folder

        def _info(self):
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict(
                    {
                        "image": tfds.features.Image(shape=shape, encoding_format="png"),
                        "label": tfds.features.ClassLabel(num_classes=10),
                    }
                )
            )

        def _split_generators(self, dl_manager):
            return {"train": examples(40), "test": examples(20)}

        def _generate_examples(self):
            raise NotImplementedError

    Tiny.name = name
    builder = Tiny(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()


@pytest.mark.filterwarnings("ignore")  # tensorflow-datasets' own
@pytest.mark.parametrize(
    ("name", "version", "shape"),
    [
        ("mnist", "3.0.1", (28, 28, 1)),
        ("fashion_mnist", "3.0.1", (28, 28, 1)),
        ("cifar10", "3.0.2", (32, 32, 3)),
    ],
)
def test_reads_prepared_data_by_name(name, version, shape, tmp_path):
    write_tiny(name, version, shape, tmp_path)
    splits = data.load(name, tmp_path, validation=10)
    assert splits.classes == 10
    for split, number in zip(splits, (30, 10, 20), strict=False):
        assert split.images.shape == (number, *shape)
        assert split.images.dtype == np.float32
        assert split.labels.dtype == np.int32
        # Each image is constant, in proportion to its label, after normalization too.
        flat = split.images.reshape(number, -1)
        assert np.ptp(flat, axis=1).max() == 0
        np.testing.assert_allclose(np.corrcoef(flat[:, 0], split.labels)[0, 1], 1, rtol=1e-5)
    np.testing.assert_allclose(splits.train.images.mean(), 0, atol=1e-5)
    np.testing.assert_allclose(splits.train.images.std(), 1, rtol=1e-5)
    together = np.sort(np.concatenate([splits.train.labels, splits.validation.labels]))
    np.testing.assert_array_equal(together, np.repeat(np.arange(10), 4))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is not None,
    reason="what is said where TensorFlow is missing",
)
def test_says_that_tensorflow_is_needed(tmp_path):
    with pytest.raises(ImportError, match=r"'mnist' is not prepared in .*pip install tensorflow"):
        data.load("mnist", tmp_path)
    write_tiny("mnist", "3.0.1", (28, 28, 1), tmp_path)
    info = tmp_path / "mnist" / "3.0.1" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ImportError, match="is not prepared as ArrayRecord"):
        data.load("mnist", tmp_path)


def test_validation_out_of_range():
    with pytest.raises(ValueError, match="validation=1498"):
        data.load("digits", validation=1498)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_lenet_on_mnist(prepared_data, tmp_path):
    splits = data.load("mnist", prepared_data)
    assert [len(split.labels) for split in splits[:3]] == [55_000, 5_000, 10_000]
    (result,) = run(tmp_path, "--dataset", "mnist", "--data-dir", str(prepared_data))
    assert result["parameters"] == 266_610
    assert result["dense_test_error"] < 10


def test_picture_of_colour_images():
    history = [
        sj.Check(i, i, 0.9 - i / 100, i / 10, 10, i < 3, True, False, "pruned", 1, 0.1, {})
        for i in range(1, 6)
    ]
    params = {"dense": {"kernel": np.linspace(-1, 1, 48 * 2).reshape(48, 2)}}
    mask = jax.tree.map(lambda w: np.abs(w) > 0.5, params)
    figure = figures.report("", history, 0.88, params, params, mask, (4, 4, 3))
    (image,) = figure.axes[2].images
    wanted = mask["dense"]["kernel"].sum(axis=1).reshape(4, 4, 3).sum(axis=2)
    np.testing.assert_array_equal(image.get_array(), wanted)
