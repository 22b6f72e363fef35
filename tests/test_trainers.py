"""Somebody else's trainer goes sparse by a change of ten lines at most."""

import difflib
import importlib
from pathlib import Path

import jax
import pytest

TRAINERS = Path(__file__).parent / "trainers"


@pytest.mark.parametrize("name", ["linen", "nnx"])
def test_ten_lines(name):
    dense, sparse = (TRAINERS / f"{name}_{kind}.py" for kind in ("dense", "sparse"))
    changes = [
        line
        for line in difflib.ndiff(dense.read_text().splitlines(), sparse.read_text().splitlines())
        if line[2:].strip()
    ]
    assert 0 < sum(line.startswith("+ ") for line in changes) <= 10
    assert sum(line.startswith("- ") for line in changes) <= 2


@pytest.mark.parametrize("name", [pytest.param("linen", marks=pytest.mark.slow), "nnx"])
def test_the_sparse_trainer_is_nearly_as_good(name):
    (_, dense_accuracy), (params, accuracy) = (
        importlib.import_module(f".trainers.{name}_{kind}", __package__).main(epochs=15)
        for kind in ("dense", "sparse")
    )
    assert accuracy >= 0.95 * dense_accuracy
    kernels = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim == 2]
    nonzero = sum(int((kernel != 0).sum()) for kernel in kernels)
    assert nonzero < 0.3 * sum(kernel.size for kernel in kernels)
