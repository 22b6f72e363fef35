"""The example end to end in a few steps, and its data through tensorflow-datasets' real files."""

import argparse
import functools
import importlib.util
import io
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

import sparsereg_jax as sj
from examples import (
    ablations,
    command,
    data,
    experiment,
    figures,
    lenet5,
    lenet300,
    methods,
    models,
    nnx_digits,
    pack,
    reproduce,
    resnet32,
    search,
    sparsify,
    tables,
    trainer,
)
from examples.experiment import EXPERIMENTS
from examples.methods import METHODS, STRENGTHS, with_own_bound

SETTINGS = EXPERIMENTS["lenet300-digits"]
FEW = ["--dense-epochs", "1", "--interval", "5", "--bound", "0.02"]


def run(tmp_path, *arguments, epochs="6"):
    return lenet300.main([*FEW, "--epochs", epochs, "--out", str(tmp_path), *arguments])


def test_lenet_on_digits(tmp_path, capsys):
    (result,) = run(tmp_path)
    # 64-300-100-10, and round(12.5 %) of what is left at each check before the last.
    assert result["parameters"] == 64 * 300 + 300 + 300 * 100 + 100 + 100 * 10 + 10
    left, shares = result["parameters"], [0.0]
    for _ in range(result["checks"] - 1):
        left -= round(0.125 * left)
        shares.append(1 - left / result["parameters"])
    assert result["checks"] == (6 - 1 - 1) * 8 // 5  # 8 steps an epoch, one epoch of tuning
    assert result["kept"] == left == sum(layer["kept"] for layer in result["layers"])
    assert result["sparsity"] == 1 - left / result["parameters"]
    assert result["settings"]["bound"] == 0.02
    assert result["strength"] == STRENGTHS["lenet300-digits"]["default"]
    reached = [point[0] for point in result["curve"]]
    # A few weights are 0 before anything is pruned: biases of units that never were active.
    assert all(np.isclose(share, shares, rtol=0, atol=1e-3).any() for share in reached)
    assert reached[0] < 1e-3
    assert reached[-1] == pytest.approx(shares[-1], abs=2e-6)
    kept = 1 - np.array(reached[:-1])
    assert (kept[1:] <= 0.9 * kept[:-1] + 1e-6).all()

    small = result["compacted"]
    first, second = small["widths"][:2]
    assert 0 < first <= 300
    assert 0 < second <= 100

    stem = "lenet300-digits-default-seed0"
    network = tmp_path / "networks" / f"{stem}.safetensors"
    sparse, _ = sj.load_sparse(network)
    assert sum(np.count_nonzero(leaf) for leaf in jax.tree.leaves(sparse)) == left
    assert result["file_bytes"] == network.stat().st_size
    assert json.loads((tmp_path / f"{stem}.json").read_text()) == json.loads(json.dumps(result))
    splits = data.load("digits")
    logits = models.LeNet300().apply(sparse, splits.test.images)
    wrong = np.mean(np.argmax(np.asarray(logits), 1) != splits.test.labels)
    assert result["test_error"] == pytest.approx(100 * wrong, abs=1e-3)
    picture = np.asarray(Image.open(network.with_suffix(".png")).convert("L"))
    assert picture.shape[1] > 1000
    assert picture.std() > 10
    shown = capsys.readouterr().out
    assert "params/Dense_0/kernel" in shown
    assert f"{left:,}" in shown
    assert re.search(r"test error: dense [\d.]+ %, sparse [\d.]+ %", shown)


@pytest.mark.slow
def test_same_seed_same_numbers_and_every_method(tmp_path, capsys):
    chosen = STRENGTHS["lenet300-digits"]
    results = run(tmp_path, "--method", *chosen, "--seed", "1", epochs="5")
    assert {result["method"] for result in results} == set(chosen)
    assert len({result["dense_test_error"] for result in results}) == 1
    assert "mean over seeds" in capsys.readouterr().out
    for result in results:
        if not METHODS[result["method"]].bounded:
            assert result["sparsity"] == pytest.approx(result["strength"], abs=5e-3)
    again = run(tmp_path, "--seed", "1", "--report", epochs="5")
    page = (tmp_path / "report-lenet300-digits-default-seed1" / "report.html").read_text()
    assert f"{again[0]['kept']:,} are kept" in page
    assert f"{again[0]['checks']} checks" in page
    by_name = {result["method"]: result for result in results}
    for key in ("kept", "test_error", "validation_accuracy", "dense_test_error", "curve"):
        assert again[0][key] == by_name["default"][key]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["default", "lottery", "snip"])
def test_cut_off_and_resumed_is_the_same(method, tmp_path, capsys):
    """Stopped after every check and epoch, by the clock of a run that has no time at all."""
    tuned = 2 if METHODS[method].tune else 0  # a tenth of 15 epochs
    few = ["--dense-epochs", "2", "--method", method, "--epochs", "15" if tuned else "4"]
    (whole,) = run(tmp_path / "whole", *few)
    stops = 0
    while True:
        found = run(tmp_path / "slices", *few, "--resume", "--minutes", "0")
        if found:
            break
        stops += 1
        assert "--resume goes on" in capsys.readouterr().out
    assert stops == 2 + whole["checks"] + tuned  # the dense network's epochs are 2 as well
    for key in ("kept", "test_error", "validation_accuracy", "curve", "checks"):
        assert found[0][key] == whole[key]
    # With its record there it is not run again; with other settings it is.
    (again,) = run(tmp_path / "slices", *few, "--resume", "--minutes", "0")
    assert again == json.loads(json.dumps(found[0]))
    assert run(tmp_path / "slices", *few, "--resume", "--minutes", "0", "--interval", "6") == []


@pytest.mark.slow
def test_images_are_changed_while_tuning_alone():
    """Tuned on images that are all 0, the first layer gets no gradient; in the loop it does."""

    def blank(key, images):
        del key
        return jnp.zeros_like(images)

    settings = SETTINGS._replace(bound=0.02, dense_epochs=1, epochs=10, interval=5)
    bench = experiment.load(settings)
    recipe = METHODS["default"]._replace(tuner=optax.adam)
    # 9 epochs of the loop, then one of tuning; without tuning, the same loop.
    loops = (9, recipe._replace(tune=0.0))
    for network, ways in (
        (bench.network, ((blank, True), (None, False))),
        # A network with an augmentation of its own, which tuning has as well unless told otherwise.
        (bench.network._replace(augment=blank), ((None, True), (lambda key, x: x, False))),
    ):
        ends = [
            sparsify.sparsify(
                bench._replace(settings=settings._replace(epochs=epochs), network=network),
                method,
                1e-3,
                0,
            )
            for epochs, method in (loops, *((10, recipe._replace(augment=way)) for way, _ in ways))
        ]
        assert len({tuple(check.metric for check in end.history) for end in ends}) == 1
        loop, *tuned = (end.sparse.params["params"] for end in ends)
        for params, (_, blind) in zip(tuned, ways, strict=True):
            assert np.array_equal(params["Dense_0"]["kernel"], loop["Dense_0"]["kernel"]) == blind
            assert np.abs(params["Dense_2"]["bias"] - loop["Dense_2"]["bias"]).max() > 0


@pytest.mark.slow
def test_networks_at_levels(tmp_path, monkeypatch):
    levels = (0.0, 0.3, 0.6, 0.99)
    monkeypatch.setitem(experiment.LEVELS, "lenet300-digits", levels)

    def at_levels(name, epochs, *more):
        return run(tmp_path / name, "--method", "none", *more, epochs=epochs)

    # 0.06 of 6 epochs are none: nothing is tuned.
    (as_found,) = at_levels("found", "6")
    networks = tmp_path / "found" / "networks"
    stem = command.stem(SETTINGS, "none", 0)
    lines = (networks / f"{stem}.jsonl").read_text().splitlines()
    checks = [sj.check_from_json(line) for line in lines]
    tuned = as_found["tuned"]
    assert list(tuned) == ["0", "0.3"]
    assert tuned["0"][1:] == pytest.approx(
        [as_found["dense_validation_accuracy"], as_found["dense_test_error"]], abs=1e-3
    )
    first = next(each for each in checks if each.sparsity >= 0.3)
    assert tuned["0.3"][:2] == pytest.approx([first.sparsity, first.metric], abs=1e-3)
    sparse, _ = sj.load_sparse(networks / f"{stem}-0.3.safetensors")
    kept = sum(np.count_nonzero(leaf) for leaf in jax.tree.leaves(sparse))
    assert kept == round((1 - tuned["0.3"][0]) * as_found["parameters"])

    (whole,) = at_levels("whole", "15")  # one epoch of tuning each
    assert list(whole["tuned"]) == ["0", "0.3", "0.6"]
    dense = [whole["dense_validation_accuracy"], whole["dense_test_error"]]
    assert whole["tuned"]["0"][1:] != pytest.approx(dense, abs=1e-3)
    stops = 0
    while not (found := at_levels("slices", "15", "--resume", "--minutes", "0")):
        stops += 1
    assert stops == 1 + 1 + whole["checks"] + 2  # the dense network, tuned; checks; two tuned
    assert found[0]["tuned"] == whole["tuned"]
    # Cut off with other levels, the loop begins anew.
    monkeypatch.setitem(experiment.LEVELS, "lenet300-digits", (0.0, 0.6))
    for _ in range(9):
        assert at_levels("changed", "15", "--resume", "--minutes", "0") == []
    monkeypatch.setitem(experiment.LEVELS, "lenet300-digits", levels)
    (changed,) = at_levels("changed", "15", "--resume")
    assert changed["tuned"] == whole["tuned"]
    # The dense network is tuned once for all methods, and a record without levels is run again.
    (place,) = (tmp_path / "slices").glob("checkpoints/*/tuned-dense-seed0-1")
    before = place.stat().st_mtime_ns
    (other,) = run(tmp_path / "slices", "--method", "paper", "--resume", epochs="15")
    assert other["tuned"]["0"] == whole["tuned"]["0"]
    assert place.stat().st_mtime_ns == before
    monkeypatch.setitem(experiment.LEVELS, "lenet300-digits", (0.0, 0.5))
    (again,) = at_levels("slices", "15", "--resume")
    assert list(again["tuned"]) == ["0", "0.5"]


def test_a_network_at_a_level_has_met_the_bound(tmp_path):
    settings = SETTINGS._replace(dense_epochs=1, epochs=6, interval=5, bound=0.5)
    bench, missed = experiment.load(settings), []

    def once_below(variables):
        zeros = np.mean([np.mean(leaf == 0) for leaf in jax.tree.leaves(variables)])
        missed.append(zeros >= 0.1 and True not in missed)
        return 0.4 if missed[-1] else 0.9

    bench = bench._replace(validation=once_below)
    done = sparsify.sparsify(
        bench, METHODS["none"], 0.12, 0, levels=(0.1,), folder=tmp_path / "run"
    )
    assert [check.met_bound for check in done.history[:4]] == [True, False, True, True]
    assert [round(check.sparsity, 2) for check in done.history[:4]] == [0, 0.12, 0.12, 0.23]
    assert done.tuned[0.1].point.sparsity == pytest.approx(0.12, abs=1e-3)


@pytest.mark.slow
def test_a_level_reached_after_the_last_checkpoint_is_reached_again(tmp_path):
    """Killed between two checkpoints, what lay there already is not what the run came to."""
    bench = experiment.load(SETTINGS._replace(dense_epochs=1, epochs=15, interval=5, bound=0.0))
    arguments = (bench, METHODS["none"], 0.12, 0)
    whole = sparsify.sparsify(*arguments, levels=(0.3,), folder=tmp_path / "whole" / "run")
    stale = tmp_path / "stale" / "run" / "tuning-0.3.safetensors"
    stale.parent.mkdir(parents=True)
    sj.save_sparse(stale, jax.tree.map(jnp.zeros_like, trainer.variables(whole.dense)))
    again = sparsify.sparsify(*arguments, levels=(0.3,), folder=stale.parent)
    assert again.tuned[0.3].point == whole.tuned[0.3].point
    # And of a level that this run does not come to, it is not.
    stale.with_name("tuning-0.999.safetensors").write_bytes(stale.read_bytes())
    rest = sparsify.sparsify(*arguments, levels=(0.3, 0.999), folder=stale.parent)
    assert list(rest.tuned) == [0.3]


def test_levels_need_a_folder():
    settings = SETTINGS._replace(dense_epochs=0, epochs=5, interval=5, bound=0.0)
    with pytest.raises(ValueError, match="folder: the networks at levels need one"):
        sparsify.sparsify(experiment.load(settings), METHODS["none"], 0.1, 0, levels=(0.5,))


def test_a_rewound_round_starts_from_the_early_weights():
    tx = sj.hold_zeros(optax.adam(0.1))
    early = trainer.start({"w": jnp.arange(1.0, 5.0)}, tx, 4, 0, {"batch_stats": jnp.ones(2)})
    trained = early._replace(
        params={"w": jnp.full(4, 9.0)}, model_state={"batch_stats": jnp.zeros(2)}
    )
    seen = []
    one_round = sparsify.rewinding(lambda record: seen.append(record) or record, tx, early)
    assert one_round(trained) is trained  # the dense training is the first round
    assert not seen
    mask = {"w": jnp.array([True, False, True, False])}
    params, opt_state = sj.prune(tx, trained.params, trained.opt_state, mask)
    one_round(trained._replace(params=params, opt_state=opt_state))
    (record,) = seen
    np.testing.assert_array_equal(record.params["w"], [1, 0, 3, 0])
    np.testing.assert_array_equal(record.model_state["batch_stats"], [1, 1])
    np.testing.assert_array_equal(sj.held_mask(record.params, record.opt_state)["w"], mask["w"])


def test_what_is_wrong_is_said_before_anything_is_trained(tmp_path, capsys):
    for arguments, message in [
        (["--dense-epochs", "6"], "epochs: of 6, 6 are for the dense network"),
        (["--batch", "2000"], "batch: 2000 is more than the 898 training images"),
        (["--train-images", "50"], "batch: 100 is more than the 50 training images"),
        (["--fraction", "0.88"], "fraction_step: fraction=1.1 "),
        (["--method", "none", "--strength", "0"], "fraction_step: fraction=0.0 "),
        (["--validation", "1498"], "validation=1498 is not between"),
        (["--validation", "few"], "invalid int value: 'few'"),
        (["--method", "l1", "l2", "--strength", "1e-3"], "one method's own number"),
        (["--method", "paper", "--strength", "1e-4"], "paper has 0.001 and no other"),
        (["--method", "gradual", "--strength", "1"], "a sparsity, in \\(0, 1\\)"),
        (["--strength", "-1"], "at least 0"),
    ]:
        with pytest.raises(SystemExit):
            run(tmp_path, *arguments)
        assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "networks").exists()


def test_flags_are_those_of_the_data_set(capsys):
    for dataset, shown in (("digits", "1500"), ("mnist", "260")):
        with pytest.raises(SystemExit, match="0"):
            lenet300.main(["--dataset", dataset, "--help"])
        assert re.search(rf"epochs in all.*\s+\(default:\s+{shown}\)", capsys.readouterr().out)
    parser, settings = argparse.ArgumentParser(), SETTINGS._replace(validation=9)
    command.add_flags(parser, settings, ("network", "dataset"))
    flags = ["--bound", "none", "--validation", "7", "--no-bfloat16", "--train-images", "None"]
    assert command.given(parser.parse_args(flags), settings) == {
        "bound": None,
        "validation": 7,
        "bfloat16": False,
        "train_images": None,
    }
    assert command.given(parser.parse_args([]), settings) == {}
    assert command.stem(settings._replace(dataset="emnist/letters:3.1.0"), "l2", 4) == (
        "lenet300-emnist-letters-3.1.0-l2-seed4"
    )


def test_what_cannot_be_shown_or_run_is_said(tmp_path, capsys):
    for main, arguments, said in (
        (tables.main, ["--results", str(tmp_path / "no")], "there is no folder"),
        (reproduce.main, ["--experiment", "resnet32-cifar10"], "needs --five-seeds"),
        (reproduce.main, ["--part", "2", "2"], "--part 2 2: I is from 0 to N - 1"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert said in capsys.readouterr().err
    alone = {
        method: [record(method, seed, 0.9, 2.0, [])] for seed, method in enumerate(["paper", "l2"])
    }
    assert tables.comparison(alone, (0.95,), "paper", "l2") == (
        "paper and l2 have fewer than two seeds in common."
    )


def test_records_of_other_copies_of_the_data_are_kept_apart(tmp_path):
    settings = EXPERIMENTS["resnet32-cifar10"]
    entries = {
        "settings": settings._asdict(),
        "fingerprint": methods.fingerprint(METHODS["l2"]),
        "strength": 1e-3,
        "levels": list(experiment.levels(settings)),
    }
    for seed, title in ((0, "cifar10, JPEG copy"), (1, "cifar10")):
        path = tmp_path / f"resnet32-cifar10-l2-seed{seed}.json"
        path.write_text(json.dumps({**entries, "seed": seed, "data": title}))
        for wanted in ("cifar10", "cifar10, JPEG copy"):
            found = command.recorded(tmp_path, settings, "l2", 1e-3, seed, wanted)
            assert (found is not None) == (wanted == title)
        assert command.recorded(tmp_path, settings, "l2", 1e-3, seed) is not None
    with pytest.raises(ValueError, match="not made with the same data"):
        tables.read(tmp_path, "resnet32-cifar10")


def test_a_bound_that_is_missed_does_not_end_the_other_runs(tmp_path, capsys):
    with pytest.raises(SystemExit, match="1"):
        run(tmp_path, "--bound", "0.9999", "--seed", "0", "1")
    assert capsys.readouterr().out.count("misses the bound") == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_networks_with_convolutions(tmp_path, monkeypatch):
    """ResNet-32's command with one block a stage instead of five, to compile faster."""
    shallow = functools.partial(models.ResNet32, blocks=1)
    monkeypatch.setattr(models, "ResNet32", shallow)
    size = 75_290  # 74,160 of convolutions, 480 of batch norm, 650 of the last layer
    write_tiny("mnist", "3.0.1", (28, 28, 1), tmp_path)
    write_tiny("cifar10", "3.0.2", (32, 32, 3), tmp_path)
    few = ["--data-dir", str(tmp_path), "--out", str(tmp_path), "--dense-epochs", "1"]
    few += ["--interval", "1", "--bound", "0", "--epochs", "3", "--train-images", "20"]
    few += ["--batch", "10", "--validation", "10"]
    (five,) = lenet5.main(few)
    assert five["parameters"] == 431_080
    (image,) = (tmp_path / "networks").glob("*.png")
    assert image.name == "lenet5-mnist-default-seed0.png"
    (residual,) = resnet32.main([*few, "--method", "none", "--report"])
    assert residual["parameters"] == size
    assert residual["kept"] < size
    assert residual["compacted"]["parameters"] <= size
    network = tmp_path / "networks" / "resnet32-cifar10-none-seed0.safetensors"
    variables, _ = sj.load_sparse(network)
    test = data.load("cifar10", tmp_path, validation=10).test
    logits = shallow().apply(variables, test.images)
    right = np.mean(np.argmax(np.asarray(logits), 1) == test.labels)
    assert residual["test_error"] == pytest.approx(100 * (1 - right), abs=1e-3)
    # Two rounds, each from the early weights and statistics.
    (lottery,) = resnet32.main([*few, "--method", "lottery", "--strength", "0.5", "--epochs", "9"])
    assert lottery["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert residual["data"] == "cifar10"


@pytest.mark.slow
def test_search_runs_what_is_not_there(tmp_path, monkeypatch):
    settings = experiment.settings("lenet300", "digits")
    few = settings._replace(dense_epochs=1, epochs=10, interval=8, bound=0.02)
    monkeypatch.setitem(search.EXPERIMENTS, "lenet300-digits", few)
    load = experiment.load

    def without_test(*arguments):
        def look(variables):
            raise AssertionError("the search looks at the test images")

        return load(*arguments)._replace(test=look)

    monkeypatch.setattr(experiment, "load", without_test)
    search.main(["lenet300-digits", "--method", "none", "--out", str(tmp_path)])
    lines = search.read(tmp_path / "search-lenet300-digits.jsonl")
    assert [line["strength"] for line in lines] == list(METHODS["none"].strengths)
    assert {line["epochs"] for line in lines} == {1 + (10 - 1) // 3}
    for line in lines:  # three checks; the last finds what two have pruned
        left = (1 - line["strength"]) ** 2
        assert line["sparsity"] == pytest.approx(1 - left, abs=1e-4)
    search.main(["lenet300-digits", "--method", "none", "--out", str(tmp_path)])
    assert search.read(tmp_path / "search-lenet300-digits.jsonl") == lines  # none is run again
    own = ["--method", "none", "--strength", "0.3", "0.4", "--out", str(tmp_path)]
    search.main(["lenet300-digits", *own])
    more = search.read(tmp_path / "search-lenet300-digits.jsonl")[len(lines) :]
    assert [line["strength"] for line in more] == [0.3, 0.4]


def test_a_search_of_strengths_of_ones_own_is_of_one_method(tmp_path, capsys):
    own = ["--strength", "0.3", "--out", str(tmp_path)]
    with pytest.raises(SystemExit):
        search.main(["lenet300-digits", *own])
    assert "give one --method with it" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        search.main(["lenet300-digits", "--method", "snip", *own[:1], "2", *own[2:]])
    assert "a sparsity, in (0, 1)" in capsys.readouterr().err


def test_the_table_of_a_search_shows_all_that_was_tried_and_what_was_chosen():
    tried = [
        ("none", 0.3, 0.99, 0.97),
        ("none", 0.1, 0.75, 0.985),  # would be the most accurate, were the bound the recipe's 99 %
        ("none", 0.2, 0.8, 0.98),
        ("l2", 1e-4, 0.5, 0.97),
        ("l2", 3e-4, 0.4, 0.975),  # nothing meets the bound
    ]
    keys = ("method", "strength", "sparsity", "validation")
    same = {"epochs": 50, "version": 1, "seed": 0}
    lines = [dict(zip(keys, each, strict=True)) | same for each in tried]
    settings = EXPERIMENTS["lenet5-mnist"]  # the bound of both is 98 %
    shown = search.table(lines, settings, validation=5000)
    assert shown.splitlines()[2:] == [
        "| `l2` | 0.0001: 50.00 @ 97.00 | **0.0003: 40.00 @ 97.50** |  |",
        "| `none` | 0.1: 75.00 @ 98.50 | **0.2: 80.00 @ 98.00** | 0.3: 99.00 @ 97.00 |",
    ]
    assert {line.count("|") for line in shown.splitlines()} == {5}
    assert "**" not in search.table(lines, settings._replace(dataset="", bound=None), 5000)
    with pytest.raises(ValueError, match="those of 'l2' differ in epochs"):
        search.table([*lines, lines[-1] | {"epochs": 22}], settings, validation=5000)


def test_the_choice_is_the_sparsest_within_a_standard_error():
    some = [(0.9, 0.97), (0.95, 0.96), (0.99, 0.9)]
    some = [
        {"strength": i, "sparsity": share, "validation": metric}
        for i, (share, metric) in enumerate(some)
    ]
    assert search.chosen(some, bound=0.965, validation=1000) == 1  # 0.0058 below at the most
    assert search.chosen(some, bound=0.965, validation=10_000) == 0
    assert search.chosen(some, bound=0.99, validation=10_000) == 0


def test_runs_of_everything():
    runs = reproduce.runs(five_seeds=False)
    assert len(runs) == len(set(runs)) == 7 * 5 + 8 * 2 + (7 + 7) * 3 + 3 * 5
    assert [seed for *_, seed in runs] == sorted(seed for *_, seed in runs)
    assert {method for name, method, _ in runs if name == "lenet300-mnist"} == set(METHODS) - {
        "longer",
        "larger-first",
        "higher-rate",
        "shifted",
        "straight",
    }
    many = reproduce.runs(five_seeds=True)
    assert {name for name, *_ in many} == set(STRENGTHS) - {"lenet300-digits"}
    assert all(method in STRENGTHS[name] for name, method, _ in (*runs, *many))


def test_ablations_change_one_thing():
    recipe, found = METHODS["default"], []
    for name, variant in ablations.LENET300.items():
        fields = zip(variant.method._fields, variant.method, recipe, strict=True)
        differing = [field for field, ours, theirs in fields if ours != theirs]
        differing += variant.settings
        assert len(differing) == (0 if name in ("gamma", "no regularizer") else 1), name
        found += [{"method": name, "strength": strength} for strength in variant.strengths]
    lines = [
        line | {"seed": i, "sparsity": 0.5, "validation": 0.25 * i}
        for line in found
        for i in (1, 2)
    ]
    rows = ablations.table(ablations.LENET300, lines, []).splitlines()[2:]
    assert len(rows) == len(found)
    assert rows[0] == "| gamma | 0.0003 | 1, 2 | 50.00 (0.00) | 37.50 (17.68) |"
    # The default itself: with all its seeds, and with those that the variants have.
    known = [
        {"seed": i, "strength": 1e-3, "sparsity": 0.9, "validation_accuracy": i} for i in range(4)
    ]
    rows = ablations.table(ablations.LENET300, lines, known).splitlines()[2:]
    assert rows[:2] == [
        "| nothing | 0.001 | 0, 1, 2, 3 | 90.00 (0.00) | 150.00 (129.10) |",
        "| nothing | 0.001 | 1, 2 | 90.00 (0.00) | 150.00 (70.71) |",
    ]
    assert len(rows) == 2 + len(found)


def test_gates_that_read_other_gradients():
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=9), jnp.float32) for name in "ab"}
    first, then = (
        {"a": jnp.asarray(scale * rng.normal(size=9), jnp.float32), "b": jnp.full(9, 1e-2 * scale)}
        for scale in (3e-3, 1e-3)
    )

    def added(name):
        """What each of two steps added to the gradients, from Adam's first moment."""
        tx = ablations.LENET300[name].method.optimizer(1e-3, 1e-3, 100)
        state, before, terms = tx.init(params), jax.tree.map(jnp.zeros_like, params), []
        for gradients in (first, then):
            _, state = tx.update(gradients, state, params)
            moment = state[1].mu
            terms.append(
                jax.tree.map(lambda m, b, g: (m - 0.9 * b) / 0.1 - g, moment, before, gradients)
            )
            before = moment
        return [jax.tree.map(np.asarray, term) for term in terms]

    weights, (one, two) = (
        jax.tree.map(np.float64, params),
        (jax.tree.map(np.float64, gradients) for gradients in (first, then)),
    )
    got = added("gate on each weight's running rms of g, alpha 3e-3")
    strength = [float(sj.paper_strength(1e-3, 100)(step)) for step in (0, 1)]
    for leaf in params:
        second = (0.99 * 0.01 * one[leaf] ** 2 + 0.01 * two[leaf] ** 2) / (1 - 0.99**2)
        for step, rms in enumerate((np.abs(one[leaf]), np.sqrt(second))):
            expected = strength[step] * weights[leaf] * np.exp(-rms / 3e-3)
            np.testing.assert_allclose(got[step][leaf], expected, rtol=1e-3, atol=1e-7)
    got = added("gate, alpha = running rms of g over the network")
    seconds = (
        one[leaf] ** 2 if step == 0 else (0.99 * one[leaf] ** 2 + two[leaf] ** 2) / 1.99
        for step in (0, 1)
        for leaf in params
    )
    for step, gradients in enumerate((one, two)):
        rms = np.sqrt(np.mean([next(seconds) for _ in params]))
        for leaf in params:
            expected = strength[step] * weights[leaf] * np.exp(-np.abs(gradients[leaf]) / rms)
            np.testing.assert_allclose(got[step][leaf], expected, rtol=1e-3, atol=1e-6)


def test_variants_of_lenet5_change_the_experiment():
    bench = experiment.Experiment(
        EXPERIMENTS["lenet5-mnist"], None, experiment.Network(None, None, True, None), 1, None, None
    )
    made = {name: ablations.with_variant(bench, v) for name, v in ablations.LENET5.items()}
    assert made["gamma"] == bench
    assert made["twice the budget"].settings == bench.settings._replace(epochs=100)
    shift = made["images shifted by up to 2 pixels"].network.augment
    dot = jnp.zeros((50, 7, 7, 1)).at[:, 3, 3].set(1.0)
    places = np.argwhere(np.asarray(shift(jax.random.key(0), dot)))
    assert len(places) == 50
    assert places[:, 1:3].min(0).tolist() == [1, 1]
    assert places[:, 1:3].max(0).tolist() == [5, 5]


def test_a_checkpoint_of_resnet32_is_small():
    shapes = jax.eval_shape(models.ResNet32().init, jax.random.key(0), jnp.ones((1, 32, 32, 3)))
    tx = sj.hold_zeros(METHODS["paper"].optimizer(1e-3, 1e-3, 351))
    statistics = {"batch_stats": shapes["batch_stats"]}
    record = jax.eval_shape(
        lambda params, state: trainer.start(params, tx, 45_000, 0, state),
        {"params": shapes["params"]},
        statistics,
    )
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(record))
    assert 3 * 4 * 464_154 < size < 8 * 2**20  # the present one and the good one: 16 MiB


def test_a_multiple_of_a_rate_and_of_a_schedule():
    for rate, wanted in ((0.1, [-0.2, -0.2]), (lambda step: 0.1 * (step + 1), [-0.2, -0.4])):
        tx = methods.at_rate(2.0, optax.sgd)(rate)
        state, found = tx.init(jnp.zeros(())), []
        for _ in range(2):
            update, state = tx.update(jnp.ones(()), state)
            found.append(float(update))
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_a_rate_that_falls_from_twice_toward_zero_and_restarts():
    tx = ablations.falling(optax.sgd, 4)(0.1)
    state, found = tx.init(jnp.zeros(())), []
    for _ in range(6):
        update, state = tx.update(jnp.ones(()), state)
        found.append(-float(update))
    root = np.sqrt(0.5)
    wanted = 0.1 * np.array([2, 1 + root, 1, 1 - root, 2, 1 + root])
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.parametrize("row", ["straight", "higher-rate"])
def test_the_falling_rows_differ_from_theirs_in_the_rate_alone(row):
    variant = ablations.FASHION[f"row `{row}`, the rate falling within each interval"]
    own = METHODS[row]._replace(optimizer=variant.method.optimizer)
    assert variant.method == own
    settings = EXPERIMENTS["lenet5-fashion_mnist"]
    assert settings._replace(**variant.settings) == with_own_bound(settings, row)


@pytest.mark.parametrize("row", ["straight", "higher-rate"])
def test_the_falling_rate_is_in_phase_with_the_intervals(row):
    method = ablations.FASHION[f"row `{row}`, the rate falling within each interval"].method
    interval = EXPERIMENTS["lenet5-fashion_mnist"].interval
    tx = sj.hold_zeros(method.optimizer(1e-3, method.strengths[0], 550))
    weight, gradient = jnp.zeros(()), jnp.ones(())  # Adam's step is the rate; nothing to shrink
    state = tx.init(weight)

    def step(state, _):
        update, state = tx.update(gradient, state, weight)
        return state, -update

    for _ in range(2):
        state, rates = jax.lax.scan(step, state, length=interval)
        np.testing.assert_allclose(rates[0], 4e-3, rtol=1e-3)
        np.testing.assert_allclose(rates[interval // 2], 2e-3, rtol=1e-3)
        assert rates[-1] < 1e-6
        # A check prunes in between, which restarts the strength, not the rate.
        _, state = sj.prune(tx, weight, state, jnp.ones((), bool))


@pytest.mark.slow
def test_nnx():
    sparsity, accuracy = nnx_digits.main(dense_epochs=2, checks=3, bound=0.1)
    weights = 64 * 300 + 300 * 100 + 100 * 10  # biases stay
    assert sparsity == pytest.approx((1 - 0.9**2) * weights / (weights + 410), abs=1e-4)
    assert accuracy > 0.5


def record(method, seed, sparsity, wrong, curve):
    return {
        "kept": 1000 * (1 - sparsity),
        "method": method,
        "strength": 1e-3,
        "seed": seed,
        "sparsity": sparsity,
        "test_error": wrong,
        "curve": curve,
    }


def test_errors_at_equal_sparsity():
    curves = [[[0.9, 0.98, 1.5], [0.99, 0.97, 2.5]], [[0.9, 0.98, 2.0], [0.95, 0.98, 2.0]]]
    runs = [
        record("l2", s, 0.99, 2.0, c) | {"dense_test_error": 1.0 + s} for s, c in enumerate(curves)
    ]
    found = {"l2": runs, "snip": [record("snip", 0, 0.9, 4, []) | {"dense_test_error": 1.0}]}
    wanted = 1.5 + np.log(0.1 / 0.03) / np.log(10)  # at 97 %, of the first run alone
    half = 12.706205 * 0.25  # of 1.5 and 2.0: their standard error, times Student's quantile
    rows = tables.at_equal_sparsity(found, (0.9, 0.97, 0.995)).splitlines()
    assert rows[2:] == [f"| l2 | 2 | 1.50 | 1.75 ± {half:.2f} | {wanted:.2f} (1 runs) | - |"]


def test_sparsest_networks_at_an_accuracy():
    curves = (
        [[0.0, 0.99, 1.0], [0.5, 0.98, 2.0], [0.8, 0.985, 3.0], [0.9, 0.97, 4.0]],
        [[0.0, 0.99, 1.0], [0.7, 0.981, 1.5]],
        [[0.0, 0.979, 1.0]],
    )
    runs = [record("l2", seed, 0.9, 4.0, curve) for seed, curve in enumerate(curves)]
    text = tables.on_the_way({"l2": runs, "snip": [record("snip", 0, 0.9, 4, [])]}, (0.98, 0.97, 1))
    # Of the first run 80 % @ 3, of the second 70 % @ 1.5, of the third nothing; then 90, 70 and 0.
    assert text.splitlines()[2:] == ["| l2 | 75.00 @ 2.25 (2 runs) | 53.33 @ 2.17 | - |"]
    for accuracy in (0.905, 0.982, 0.988):  # those of float32 are a little less
        just = [record("l2", 0, 0.9, 4.0, [[0.9, float(np.float32(accuracy)), 4.0]])]
        assert "90.00 @ 4.00" in tables.on_the_way({"l2": just}, (accuracy,))
        assert "90.00" not in tables.on_the_way({"l2": just}, (accuracy + 2e-4,))


def test_networks_tuned_at_levels():
    def tuned(seed, **levels):
        return record("l2", seed, 0.9, 4.0, []) | {"tuned": levels}

    runs = [
        tuned(0, **{"0": [0.0, 0.9, 8.0], "0.8": [0.81, 0.9, 9.0], "0.95": [0.951, 0.9, 11.0]}),
        tuned(1, **{"0": [0.0, 0.9, 8.5], "0.8": [0.80, 0.9, 9.0]}),
    ]
    rows = tables.at_levels({"l2": runs, "none": [record("none", 0, 0.9, 4.0, [])]}).splitlines()
    assert rows[0].endswith("| dense, tuned | 80 % | 95 % |")
    half = 12.7062047 * 0.25  # Student's t of one degree of freedom; deviation / sqrt(2) = 0.25
    assert rows[2:] == [
        f"| l2 | 2 | 0.00 @ 8.25 ± {half:.2f} | 80.50 @ 9.00 ± 0.00 | 95.10 @ 11.00 (1 runs) |"
    ]
    assert tables.at_levels({"none": [record("none", 0, 0.9, 4.0, [])]}) == ""

    for run in runs:
        run |= {"settings": {"network": "resnet32"}, "data": "cifar10", "dense_test_error": 8.0}
        paths = [f"params/{name}/kernel" for name in ("Conv_0", "Conv_10", "Conv_2", "Dense_0")]
        run["layers"] = [{"path": path, "sparsity": 0.9} for path in paths]
    tradeoff, layers = figures.comparison({"l2": runs}, {}).axes
    names = [label.get_text() for label in layers.get_yticklabels()]
    assert names == ["Conv_0", "Conv_2", "Conv_10", "Dense_0"]
    lines = [np.transpose(line.get_data()) for line in tradeoff.lines]
    expected = [[1, 8.25], [1 / (1 - 0.805), 9]]  # what both have
    assert any(line.shape == (2, 2) and np.allclose(line, expected) for line in lines)
    assert "diamonds: tuned there" in tradeoff.get_ylabel()


def test_numbers_of_the_tables():
    mean, half = tables.interval([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3)
    assert half == pytest.approx(4.302653 * np.std([1, 2, 4], ddof=1) / np.sqrt(3), rel=1e-5)
    assert np.isnan(tables.interval([1.0])[1])
    curve = [[0.9, 0.98, 1.0], [0.99, 0.97, 3.0]]  # half way in the logarithm: 1 - sqrt(1e-3)
    run = record("l2", 0, 0.99, 3.0, curve)
    assert tables.at_sparsity(run, 1 - 10**-1.5) == pytest.approx(2.0)
    assert np.isnan(tables.at_sparsity(run, 0.995))
    mean, half, p = tables.paired([1.0, 2.0, 4.0], [0.0, 1.5, 2.0])
    assert mean == pytest.approx(3.5 / 3)
    assert half == pytest.approx(4.302653 * np.std([1, 0.5, 2], ddof=1) / np.sqrt(3), rel=1e-5)
    assert 0.05 < p < 0.2
    runs = {
        "paper": [
            record("paper", s, 0.99, 2.0, [[0.9, 0.98, 1.5], [0.99, 0.97, 2.0]]) for s in (0, 1)
        ],
        "l2": [record("l2", s, 0.98, 2.0, [[0.9, 0.98, 1.0], [0.99, 0.97, 1.5]]) for s in (1, 0)],
    }
    text = tables.comparisons(runs, (0.95, 0.995))
    assert "sparsity, points | +1.00 ± 0.00" in text
    assert f"logarithms) | {100 * np.log(0.5):+.2f} ± 0.00" in text
    assert "at 95 % sparsity (2 of 2 pairs reach it): test error, points | +0.50 ± 0.00" in text
    assert "99.5 %" not in text
    others = [run | {"strength": 1e-4} for run in runs["l2"]]
    assert tables.comparisons(runs | {"l2": others}, (0.95,)) == ""  # more than the gate differs


@pytest.mark.slow
def test_tables_and_figures_from_records(tmp_path, capsys):
    run(tmp_path, "--method", "paper", "preset-l2", "--seed", "0", "1")
    tables.main(["--results", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "## lenet300, digits" in shown
    assert METHODS["paper"].title in shown
    assert "paired over 2 seeds" in shown
    picture = np.asarray(Image.open(tmp_path / "lenet300-digits.png").convert("L"))
    assert picture.std() > 10


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


def test_strided_convolutions_are_centred_where_the_shortcut_reads():
    """He et al. pad by one on either side: with one tap in the middle both see the same pixels."""
    model = models.ResNet32(blocks=1, widths=(1, 2))
    x = jnp.asarray(np.random.default_rng(0).random((1, 8, 8, 1), np.float32))
    variables = model.init(jax.random.key(0), x)
    taps = jax.tree.map(
        lambda leaf: jnp.zeros_like(leaf).at[1, 1].set(1.0) if leaf.ndim == 4 else leaf,
        variables["params"],
    )
    _, seen = model.apply(
        {**variables, "params": taps}, x, capture_intermediates=True, mutable=["intermediates"]
    )
    before = seen["intermediates"]["BatchNorm_2"]["__call__"][0]  # of the first stage's block
    after = seen["intermediates"]["Conv_3"]["__call__"][0]
    first = jax.nn.relu(before + jax.nn.relu(seen["intermediates"]["BatchNorm_0"]["__call__"][0]))
    np.testing.assert_allclose(after[..., 0], first[:, ::2, ::2, 0], rtol=1e-6)


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
    assert splits.title == name  # in PNG, as they are
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
def test_packed_data_are_the_same(tmp_path):
    write_tiny("mnist", "3.0.1", (28, 28, 1), tmp_path)
    write_tiny("cifar10", "3.0.2", (32, 32, 3), tmp_path)
    for name in ("mnist", "cifar10"):
        pack.main([name, "--data-dir", str(tmp_path), str(tmp_path / "file.npz")])
        among_others = tmp_path / "packed"
        among_others.mkdir(exist_ok=True)
        shutil.copy(tmp_path / "file.npz", among_others / f"{name}.npz")
        wanted = jax.tree.leaves(data.load(name, tmp_path, validation=10))
        for place in (tmp_path / "file.npz", among_others):
            there = jax.tree.leaves(data.load(name, place, validation=10))
            for one, other in zip(wanted, there, strict=True):
                np.testing.assert_array_equal(one, other)
    with pytest.raises(ValueError, match=r"file\.npz holds 'cifar10', not 'mnist'"):
        data.load("mnist", tmp_path / "file.npz")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match=r"other\.npz holds no data set, not 'mnist'"):
        data.load("mnist", tmp_path / "other.npz")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is not None,
    reason="what is said where TensorFlow is missing",
)
def test_says_that_tensorflow_is_needed(tmp_path, capsys):
    with pytest.raises(ImportError, match=r"'mnist' is not prepared in .*pip install tensorflow"):
        data.load("mnist", tmp_path)
    for main in (
        pack.main,
        lambda _: run(tmp_path, "--dataset", "mnist", "--data-dir", str(tmp_path)),
    ):
        with pytest.raises(SystemExit):
            main(["mnist", "--data-dir", str(tmp_path), str(tmp_path / "file.npz")])
        assert "pip install tensorflow" in capsys.readouterr().err
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
@pytest.mark.parametrize(
    ("name", "title", "train"),
    [("mnist", "mnist", 55_000), ("cifar10", "cifar10, JPEG copy", 45_000)],
)
def test_real_data(prepared_data, name, title, train):
    splits = data.load(name, prepared_data)
    assert [len(split.labels) for split in splits[:3]] == [train, 5_000, 10_000]
    assert splits.title == title


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_lenet_on_mnist(prepared_data, tmp_path):
    few = ["--interval", "250", "--data-dir", str(prepared_data)]
    (result,) = run(tmp_path, "--dataset", "mnist", *few, epochs="3")
    assert result["parameters"] == 266_610
    assert result["checks"] == 2 * 550 // 250
    assert result["dense_test_error"] < 10


def test_picture_of_colour_images():
    history = [
        sj.Check(i, i, 0.9 - i / 100, i / 10, 10, i < 3, True, False, "pruned", 1, 0.1, {})
        for i in range(1, 6)
    ]
    params = {"dense": {"kernel": np.linspace(-1, 1, 48 * 2).reshape(48, 2)}}
    mask = jax.tree.map(lambda w: np.abs(w) > 0.5, params)
    figure = figures.report("", history, 0.88, params, params, mask, np.zeros((4, 4, 3)))
    (image,) = figure.axes[2].images
    wanted = mask["dense"]["kernel"].sum(axis=1).reshape(4, 4, 3).sum(axis=2)
    np.testing.assert_array_equal(image.get_array(), wanted)
