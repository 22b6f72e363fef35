"""The benchmarks, once and tiny: that they run, and that what they compare is comparable."""

import io
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import sparsereg_jax as sj
from benchmarks import (
    fuzz_sparse_file,
    lenet_epoch,
    masks,
    run,
    sparse_files,
    steps,
    timing,
    transformer_step,
)
from sparsereg_jax import sparse_file


@pytest.fixture
def tiny(monkeypatch):
    """Steps are not repeated to fill a timing."""
    monkeypatch.setattr(timing, "LEAST", 0.0)


def _check(rows, benchmark, pairs):
    assert [(row.ours, row.against) for row in rows] == pairs
    for row in rows:
        assert row.benchmark == benchmark
        low, high = row.quartiles
        assert 0 < low <= row.ratio <= high < math.inf
        assert min(row.milliseconds, row.against_milliseconds) > 0


STEP_PAIRS = [
    ("selective_adam", "add_decayed_weights + adam"),
    ("selective_adam, zeros held", "add_decayed_weights + adam"),
    ("selective_adamw", "adamw"),
    ("selective_adamw, zeros held", "adamw"),
]


@pytest.mark.slow
def test_everything_in_one_table(tiny, monkeypatch, tmp_path, capsys):
    small = {"width": 16, "layers": 2}
    whole, alone = steps.training_step, steps.optimizer_step
    exact, epoch = masks.measure, lenet_epoch.measure
    monkeypatch.setattr(steps, "training_step", lambda rounds: whole(rounds, **small, batch=4))
    monkeypatch.setattr(steps, "optimizer_step", lambda rounds: alone(rounds, **small))
    monkeypatch.setattr(masks, "measure", lambda rounds: exact(rounds, width=16, depth=2))
    monkeypatch.setattr(lenet_epoch, "measure", lambda rounds: epoch(rounds, images=20, batch=10))
    out = tmp_path / "there" / "record.json"
    rows = run.main(["--rounds", "2", "--out", str(out)])

    _check(rows[:4], "training step", STEP_PAIRS)
    _check(rows[4:8], "optimizer step", STEP_PAIRS)
    _check(
        rows[8:12],
        "exact masks at 80 %",
        [
            (f"mask_by_sparsity, {scope}{place}", "jnp.sort")
            for scope in ("per tensor", "global")
            for place in ("", ", outside jit")
        ],
    )
    _check(
        rows[12:],
        "LeNet-300-100 epoch",
        [("selective_adam", "adam"), ("selective_adam, zeros held", "adam")],
    )
    assert [(row.must, row.goal) for row in rows] == (
        [(1.20, 1.05)] * 4
        + [(None, None)] * 2
        + [(1.20, 1.05)] * 2
        + [(10, 20)] * 4
        + [(1.10, None)] * 2
    )
    known = [row.temporaries is not None for row in rows[:12]]
    assert known == [True] * 8 + [True, False] * 2

    record = json.loads(out.read_text())
    assert record["rounds"] == 2
    assert record["device"] == jax.devices()[0].device_kind
    assert set(record["versions"]) >= {"jax", "optax"}
    assert [row["ratio"] for row in record["rows"]] == [row.ratio for row in rows]
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(table) == 2 + len(rows)
    assert len({line.count("|") for line in table}) == 1
    assert "ms" not in table[0]  # of a CPU, ratios alone


def _one(benchmark="b", ratio=1.0, speedup=False, must=1.2, goal=1.05):
    return timing.Row(
        benchmark,
        "ours",
        "theirs",
        speedup,
        ratio,
        (ratio, ratio),
        must,
        goal,
        3.0,
        2.0,
        2**20,
        2**21,
        5,
    )


@pytest.mark.parametrize(
    ("row", "must", "goal"),
    [
        (_one(ratio=1.05), True, True),
        (_one(ratio=1.2), True, False),
        (_one(ratio=1.21), False, False),
        (_one(ratio=1.204), False, False),
        (_one(ratio=9.9, speedup=True, must=10, goal=20), False, False),
        (_one(ratio=21.0, speedup=True, must=10, goal=20), True, True),
        (_one(ratio=3.0, must=None, goal=None), True, True),
    ],
)
def test_limits(row, must, goal):
    assert run.meets(row, row.must) == must
    assert run.meets(row, row.goal) == goal


def test_a_row_as_text():
    assert run.cells(_one(ratio=1.125), milliseconds=True) == [
        "b",
        "ours",
        "theirs",
        "1.12",
        "1.12 to 1.12",
        "≤ 1.20",
        "≤ 1.05",
        "3.00 / 2.00",
        "1.0 / 2.0",
    ]
    assert run.cells(_one(ratio=1.204), milliseconds=False)[3] == "1.204"
    assert run.cells(_one(ratio=1.054), milliseconds=False)[3] == "1.054"
    assert run.cells(_one(ratio=1.206), milliseconds=False)[3] == "1.21"
    assert run.cells(_one(ratio=30.0, speedup=True, must=10, goal=20), milliseconds=False)[3:7] == [
        "30.0 times faster",
        "30.0 to 30.0",
        "≥ 10",
        "≥ 20",
    ]
    shown = io.StringIO()
    rows = [_one("first"), _one("second", ratio=1.5)]
    run.show(Console(file=shown, width=160), rows, "title", milliseconds=True)
    assert all(text in shown.getvalue() for text in ("title", "first", "1.50", "3.00 / 2.00"))


def test_ratios_are_those_of_the_rounds():
    runs = {name: timing.Candidate(lambda carry: carry, None, None) for name in ("ours", "theirs")}
    seconds = {"ours": np.array([2.0, 30.0, 2.0]), "theirs": np.array([1.0, 10.0, 2.0])}
    row = timing.compare("b", runs, seconds, "ours", "theirs")
    assert row.ratio == 2
    assert row.quartiles == (1.5, 2.5)
    assert (row.milliseconds, row.against_milliseconds) == (2000, 2000)
    assert timing.compare("b", runs, seconds, "ours", "theirs", speedup=True).ratio == 0.5


def test_rounds_alternate_and_slow_ones_are_few(tiny, monkeypatch):
    order = []

    def candidate(name):
        def step(carry):
            order.append(name)
            return carry + 1

        return timing.Candidate(step, jnp.zeros((), jnp.int32))

    runs = {name: candidate(name) for name in "abc"}
    monkeypatch.setattr(timing, "MOST", math.inf)
    monkeypatch.setattr(timing, "LEAST", 1e-9)
    with monkeypatch.context() as patch:
        patch.setattr(timing, "MOST", 0.0)
        assert len(timing.interleave(runs, 9)[0]["a"]) == 3
    order.clear()
    monkeypatch.setattr(timing, "MOST", 1e9)
    seconds, carries = timing.interleave(runs, 4)
    assert "".join(order[-12:]) == "abccbaabccba"
    assert {name: int(carry) for name, carry in carries.items()} == dict.fromkeys("abc", 6)
    assert all(times.shape == (4,) for times in seconds.values())


@pytest.mark.parametrize("form", ["coupled", "decoupled"])
def test_with_constant_irrelevance_both_sides_compute_the_same(form):
    pair = steps.optimizers(sj.constant_irrelevance)[form]
    params = steps.network(width=8, layers=2)
    gradients = jax.tree.map(lambda leaf: jnp.cos(leaf), params)

    def make(tx):
        return lambda carry, gradients: steps._apply(tx, carry, gradients)

    runs = steps.candidates(make, pair, (gradients,), params)
    assert list(runs) == [*pair, list(pair)[1] + steps.HELD]
    (baseline, _), (ours, _), (held, state) = [
        run.step(run.step(run.carry)) for run in runs.values()
    ]
    mask = sj.held_mask(params, state)
    assert float(sj.sparsity(mask)) > 0.75  # the biases are all kept
    for path, keep in jax.tree_util.tree_leaves_with_path(mask):
        theirs, plain, sparse = (
            np.asarray(tree[path[0].key][path[1].key]) for tree in (baseline, ours, held)
        )
        np.testing.assert_allclose(plain, theirs, rtol=1e-6, atol=1e-9)
        np.testing.assert_array_equal(sparse, np.where(keep, plain, 0))


def test_sparse_files(tiny, monkeypatch, tmp_path, capsys):
    layers = {"a": ((30, 40), 100), "b": ((5, 5, 3, 400), 7000), "c": ((8, 70_000), 90)}
    small = sparse_files.network(layers, biases=4)
    monkeypatch.setattr(sparse_files, "networks", lambda: {"small": small})
    out = tmp_path / "record.json"
    rows = sparse_files.main(["--rounds", "2", "--out", str(out)])
    assert [row.form for row in rows] == [*sparse_files.FORMS, "bound"]
    sizes = {row.form: row.bytes for row in rows}
    values = 4 * (100 + 7000 + 90 + 3 * 4)
    assert values < sizes["bound"] < values + small["b/kernel"].size / 8 + 90 * 2 + 100
    assert sizes["bound"] < sizes["ours"] == min(sizes[form] for form in sparse_files.FORMS)
    assert sizes["dense safetensors"] > 4 * sum(array.size for array in small.values())
    columns = sparse_files.to_csr(small)
    assert columns["a/kernel.columns"].dtype == np.uint16
    assert columns["c/kernel.columns"].dtype == np.uint32
    for row in rows[:-1]:
        assert row.written > 0
        assert row.read > 0
        assert row.of_bound == row.bytes / sizes["bound"] > 1
    assert json.loads(out.read_text())["rows"] == [row._asdict() for row in rows]
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(table) == 2 + len(rows)
    assert table[-1].startswith(f"| bound | {sizes['bound']:,.0f} (1.00) | - |")


def test_the_fuzzer_of_sparse_files(monkeypatch, tmp_path, capsys):
    """Its command line, without the limit on memory, which would stay with the tests."""
    limited = []
    monkeypatch.setattr(sparse_file, "LARGEST_HEADER", 2**16)
    monkeypatch.setattr(fuzz_sparse_file, "_limit_memory", lambda: limited.append(True))
    out = tmp_path / "record.json"
    assert fuzz_sparse_file.main(["--count", "40", "--seed", "5", "--out", str(out)]) == 0
    assert limited == [True]
    record = json.loads(out.read_text())
    assert sum(record["refused"].values()) + sum(record["read"].values()) == record["count"] == 40
    assert record["failures"] == []
    assert 0 < record["peak"] < record["max_bytes"]
    assert "40 files, 0 failures" in capsys.readouterr().out


@pytest.mark.slow
def test_transformer_step(tiny, monkeypatch, tmp_path, capsys):
    small = transformer_step.SIZES["translation"]._replace(
        vocabulary=50, width=8, hidden=8, heads=2, layers=1, row=16, batch=2
    )
    monkeypatch.setitem(transformer_step.SIZES, "translation", small)
    out = tmp_path / "record.json"
    rows = transformer_step.main(["--rounds", "2", "--out", str(out)])
    _check(
        rows,
        "training step",
        [
            ("selective_adam", "adam"),
            ("selective_adam, zeros held", "adam"),
            ("adam, products of bfloat16", "adam"),
        ],
    )
    record = json.loads(out.read_text())
    assert record["tokens"] == 2 * 2 * 16
    # Adam: two moments as large as the params, and a count; held zeros: a mask besides.
    plain, selective, held, rounded = record["bytes"].values()
    assert rounded == plain
    assert plain["optimizer"] == 2 * plain["params"] + 4
    assert held["params"] == plain["params"] == selective["params"]
    assert held["optimizer"] > selective["optimizer"] >= plain["optimizer"]
    assert "zeros held" in capsys.readouterr().out
