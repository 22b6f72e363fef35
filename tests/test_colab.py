"""The notebook: in step with its script, installs carefully, and the same numbers on 8 devices."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import jupytext
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import sparsereg_jax as sj
from examples import data, install, models, trainer

EXAMPLES = Path(install.__file__).parent
NOTEBOOK = EXAMPLES / "colab.ipynb"


def cells():
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def test_notebook_is_in_step_with_its_script():
    """If it is not: jupytext --update --to ipynb examples/colab.py."""
    script = jupytext.read(EXAMPLES / "colab.py")["cells"]
    ours = [(cell.cell_type, cell.source, cell.metadata.get("tags")) for cell in script]
    theirs = [
        (cell["cell_type"], "".join(cell["source"]), cell["metadata"].get("tags"))
        for cell in cells()
    ]
    assert len(ours) > 15
    assert ours == theirs


def test_notebook_has_no_outputs_and_its_parameters_first():
    code = [cell for cell in cells() if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert code[0]["metadata"]["tags"] == ["parameters"]
    names = {}
    exec("".join(code[0]["source"]), names)
    assert names["DATASET"] == "mnist"
    assert {"SOURCE", "DATA_DIR", "OUT"} <= names.keys()
    # Nothing but parameters, so that another cell of assignments can follow it.
    assert all(line.split(" = ")[0].isupper() for line in "".join(code[0]["source"]).splitlines())


def run_notebook(out, devices, batch):
    """All code cells but the installation, on the digits."""
    settings = {"DATASET": "digits", "OUT": str(out), "DEVICES": devices, "BATCH": batch}
    settings |= {"DENSE_EPOCHS": 4, "INTERVAL": 12, "FRACTION": 0.3, "BOUND": 0.7, "CHECKS": 4}
    names = {"Path": Path}  # the installation imports it
    for cell in cells():
        tags = cell["metadata"].get("tags", [])
        if cell["cell_type"] == "code" and tags != ["install"]:
            exec(compile("".join(cell["source"]), "colab.ipynb", "exec"), names)
        if tags == ["parameters"]:
            assert settings.keys() <= names.keys()
            names |= settings
    return names


@pytest.mark.slow
def test_eight_devices_give_the_numbers_of_one(tmp_path, capsys):
    # 60 is no multiple of 8, so eight devices take 64, eight each.
    eight = run_notebook(tmp_path / "eight", 8, 60)
    assert "on 8 x cpu" in capsys.readouterr().out
    one = run_notebook(tmp_path / "one", 1, 64)
    assert "on 1 x cpu" in capsys.readouterr().out
    assert eight["batch"] == one["batch"] == 64
    for names, number in ((eight, 8), (one, 1)):
        for leaf in jax.tree.leaves((names["dense"], names["sparse"])):
            assert len(leaf.sharding.device_set) == number
    for ours, theirs in zip(
        jax.tree.leaves(eight["dense"]), jax.tree.leaves(one["dense"]), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-4)
    assert len(eight["history"]) == len(one["history"]) == 4
    for ours, theirs in zip(eight["history"], one["history"], strict=True):
        assert (ours.kept, ours.action) == (theirs.kept, theirs.action)
        np.testing.assert_allclose(ours.metric, theirs.metric, atol=0.011)  # six of 600 images
    left = 50_610
    for _ in range(3):
        left -= round(0.3 * left)
    assert eight["history"][-1].kept == left
    masks = jax.device_get((eight["mask"], one["mask"]))  # they live on different devices
    assert float(sj.overlap(*masks)) > 0.95
    assert float(eight["difference"]) < 1e-4
    accuracy = float(eight["test_accuracy"](eight["sparse"]))
    np.testing.assert_allclose(np.mean(eight["guessed"] == eight["splits"].test.labels), accuracy)
    restored, metadata = sj.load_sparse(tmp_path / "eight" / "lenet.safetensors")
    assert metadata == {"data": "digits", "bound": 0.7}
    for ours, theirs in zip(
        jax.tree.leaves(restored), jax.tree.leaves(eight["sparse"]), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    assert "report.html" in {file.name for file in (tmp_path / "eight").iterdir()}


@pytest.mark.slow
def test_each_device_works_on_its_part_of_the_batch_and_the_sum_is_the_same():
    splits, model, tx = data.load("digits"), models.LeNet300(), optax.adam(1e-3)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("batch",))
    divided = NamedSharding(mesh, PartitionSpec("batch"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    seen = []

    def apply(params, images):
        logits = model.apply(params, images)
        jax.debug.inspect_array_sharding(logits, callback=seen.append)
        return logits

    params = model.init(jax.random.key(0), jnp.asarray(splits.train.images[:1]))
    start = jax.device_get(trainer.start(params, tx, 897, 0))  # a trainer donates its record
    eight = trainer.trainer(trainer.stateless(apply), tx, splits.train, 64, 3, sharding=divided)(
        jax.device_put(start, everywhere)
    )
    assert seen
    assert all(sharding.is_equivalent_to(divided, 2) for sharding in seen)
    forward = trainer.stateless(model.apply)
    one = trainer.trainer(forward, tx, splits.train, 64, 3)(jax.device_put(start))
    for ours, theirs in zip(jax.tree.leaves(eight), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def plan(**versions):
    return {"install": [{"metadata": {"name": n, "version": v}} for n, v in versions.items()]}


def test_what_pip_would_replace():
    installed = {"jax": "0.6.0", "jaxlib": "0.6.0", "numpy": "2.0.2", "optax": "0.2.4"}
    installed |= {"jax-cuda12-plugin": "0.6.0", "libtpu": "0.0.9", "sparsereg-jax": "0.0.1"}
    assert install.replaced(plan(), installed) == []
    assert install.replaced(plan(optax="0.2.8", sparsereg_jax="0.1.0"), installed) == []
    assert install.replaced(plan(jax="0.6.0", tabulate="0.9"), installed) == []
    assert install.replaced(
        plan(jax="0.10.2", numpy="2.4", libtpu="1.0", jax_cuda12_plugin="0.10.2"), installed
    ) == [
        "jax 0.6.0 by 0.10.2",
        "numpy 2.0.2 by 2.4",
        "libtpu 0.0.9 by 1.0",
        "jax-cuda12-plugin 0.6.0 by 0.10.2",
    ]
    assert install.replaced(plan(jax="0.10.2"), {}) == []  # a machine without jax gets one


def test_nothing_is_installed_where_jax_would_be_replaced(tmp_path, monkeypatch):
    calls, pinned = [], []

    def pip(*arguments):
        calls.append(arguments)
        pinned.append(Path(arguments[arguments.index("-c") + 1]).read_text().splitlines())
        if "--report" in arguments:
            report = Path(arguments[arguments.index("--report") + 1])
            report.write_text(json.dumps(plan(jax=version)))

    monkeypatch.setattr(install, "_pip", pip)
    version = "0.0.1"
    with pytest.raises(RuntimeError, match=rf"would replace jax {jax.__version__} by 0.0.1"):
        install.install(tmp_path)
    assert [call[:2] for call in calls] == [("install", "--dry-run")]
    version = jax.__version__
    install.install(tmp_path)
    assert [call[:2] for call in calls[1:]] == [
        ("install", "--dry-run"),
        ("install", "-c"),
    ]
    assert calls[-1][3:] == (f"{tmp_path.resolve()}[examples]",)
    install.install(tmp_path, also=["tensorflow-cpu"])
    assert all(call[-1] == "tensorflow-cpu" for call in calls[-2:])
    assert f"jax=={jax.__version__}" in pinned[-1]
    assert f"numpy=={np.__version__}" in pinned[-1]
    assert not any(line.startswith("flax") for line in pinned[-1])


def test_pip_failures_are_said(tmp_path):
    with pytest.raises(RuntimeError, match=r"pip .* failed:"):
        install.install(tmp_path)


def test_the_notebook_says_where_no_checkout_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (cell,) = [c for c in cells() if c["metadata"].get("tags") == ["install"]]
    with pytest.raises(FileNotFoundError, match="SOURCE: no checkout of sparsereg_jax in"):
        exec("".join(cell["source"]), {"SOURCE": "."})
