"""Whole runs of the language experiments, small: resumed as uninterrupted, tables, quick ones."""

import json
import re
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sacrebleu

import sparsereg_jax as sj
from examples import dialogue, translation, wmt14
from examples.language import command, samples, sparsify, tables
from examples.language.transformer import Transformer

SMALL = shlex.split(
    "--vocabulary 60 --width 16 --hidden 16 --heads 2 --layers 1 --source-length 16"
    " --target-length 16 --row 16 --batch 8 --dense-epochs 2 --loop-epochs 5 --tune-epochs 1"
    " --checks 10 --share 0 --fraction 0.25 --validation-pairs 10 --beams 2"
)


def write_pairs(folder):
    """A language in which each word is read backwards."""
    words = ["alpha", "beta", "gamma", "delta", "eta", "theta"]
    lines = [f"{a} {b} {c}" for a in words for b in words for c in words]
    path = folder / "pairs.tsv"
    path.write_text("".join(f"{line}\t{line[::-1]}\n" for line in lines))
    return path


def translate(path, out, *more):
    return translation.main([*SMALL, "--tsv", str(path), "--out", str(out), *more])


def without_times(record):
    return {key: value for key, value in record.items() if key not in ("seconds", "date")}


class Clock:
    """Time is up after so many looks at it."""

    def __init__(self, looks):
        self.left = looks

    def monotonic(self):
        self.left -= 1
        return 0.0 if self.left > 0 else 1e9

    perf_counter = staticmethod(lambda: 0.0)


@pytest.mark.slow
def test_cut_off_and_resumed_is_the_same(tmp_path, monkeypatch):
    path = write_pairs(tmp_path)
    method = ["--method", "default", "--accumulate", "2", "--metric", "loss", "--share", "9"]
    (whole,) = translate(path, tmp_path / "whole", *method)
    looks = iter([1, 12, 24, 30, 10**6])  # while training densely, in the loop, while tuning
    parts, calls = [], 0
    while not parts:
        monkeypatch.setattr(sparsify, "time", Clock(next(looks)))
        parts = translate(path, tmp_path / "parts", *method, "--minutes", "60", "--resume")
        calls += 1
    assert calls > 3
    assert without_times(parts[0]) == without_times(whole)
    outputs = [tmp_path / out / "outputs/pairs-default-seed0.jsonl" for out in ("whole", "parts")]
    assert outputs[0].read_text() == outputs[1].read_text()
    # What has a record is not run again.
    assert translate(path, tmp_path / "whole", *method, "--resume") == [whole]


@pytest.mark.slow
def test_records_and_tables(tmp_path, capsys):
    path = write_pairs(tmp_path)
    records = translate(path, tmp_path, "--method", "paper", "none", "--seed", "0", "1")
    assert len(records) == 4
    for record in records:
        levels = [point["level"] for point in record["points"]]
        assert levels == sorted(sparsify.LEVELS)[: len(levels)]
        assert {0.5, 0.75} <= set(levels)
        for point in record["points"]:
            assert point["level"] - 0.002 <= point["sparsity"] < point["level"] + 0.15
            assert all(0 <= share <= 1 for share in point["kinds"].values())
        assert record["signatures"][0].startswith("nrefs:1|case:mixed|eff:no|tok:intl")
    # The methods of a seed start from the same network.
    assert records[0]["dense"] == records[1]["dense"] != records[2]["dense"]
    lines = [
        json.loads(line)
        for line in (tmp_path / "outputs" / "pairs-paper-seed0.jsonl").read_text().splitlines()
    ]
    score = sacrebleu.corpus_bleu(
        [line["sparse"] for line in lines], [[line["reference"] for line in lines]], tokenize="intl"
    ).score
    (point,) = [point for point in records[0]["points"] if point["level"] == 0.75]
    np.testing.assert_allclose(point["test"]["bleu"], score)
    capsys.readouterr()
    tables.main(["--results", str(tmp_path)])
    shown = capsys.readouterr().out
    mean = np.mean([record["points"][0]["test"]["bleu"] for record in (records[0], records[2])])
    assert f"{mean:.2f} [" in shown
    assert shown.count("| none ") >= 2
    assert (tmp_path / "pairs.png").stat().st_size > 10_000
    page = samples.page(tmp_path / "outputs" / "pairs-paper-seed0.jsonl")
    assert page.count("| reference |") == 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("main", "corpus"), [(translation.main, "jupyterlab"), (dialogue.main, "chatterbot")]
)
def test_quick_runs(main, corpus, tmp_path):
    """What --quick does, with fewer epochs."""
    fewer = shlex.split("--dense-epochs 2 --loop-epochs 2 --checks 8 --share 0 --test-pairs 20")
    (record,) = main(["--quick", *fewer, "--out", str(tmp_path), "--method", "none"])
    assert corpus in record["data"].lower()
    assert record["points"][0]["level"] == 0.5


def test_wmt14_is_the_papers():
    settings = wmt14.USUAL
    assert (settings.width, settings.hidden, settings.heads, settings.layers) == (512, 2048, 8, 6)
    assert (settings.bound, settings.accumulate, settings.fraction) == (27.2, 3, 0.1)
    point = {"level": 0.75, "sparsity": 0.751, "test": {"bleu": 25.5}}
    table = wmt14.beside_the_paper({"points": [point]})
    cells = [list(column.cells) for column in table.columns]
    assert cells[1] == ["26.86", "26.60", "26.53", "26.02", "25.56"]
    assert cells[4] == ["-", "-", "-", "25.50", "-"]


def test_kinds_of_layers_are_all():
    """Every parameter of the Transformer is of one kind, and of one alone."""
    model = Transformer(20, 8, 8, 2, 2, 16)
    tokens = jnp.ones((1, 4), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens, tokens)
    full = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), params)
    for row in sj.summary(full, full):
        kinds = [
            kind for kind, pattern in sparsify.KINDS.items() if re.fullmatch(pattern, row.path)
        ]
        assert len(kinds) == 1, (row.path, kinds)


def test_wrong_options(tmp_path, capsys):
    for arguments, said in (
        (["--tsv", str(tmp_path / "no.tsv"), "--dataset", "x"], "give one of them"),
        (["--method", "l2", "none", "--strength", "1"], "one --method with it"),
        (["--metric", "accuracy"], "neither 'bleu' nor 'loss'"),
    ):
        with pytest.raises(SystemExit):
            translation.main([*arguments, "--out", str(tmp_path)])
        assert said in capsys.readouterr().err
    assert command.SHOWN in sparsify.LEVELS
