"""Whole runs of the language experiments, small: resumed as uninterrupted, tables, quick ones."""

import hashlib
import io
import itertools
import json
import re
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sacrebleu
import tensorflow_datasets as tfds

import sparsereg_jax as sj
from examples import dialogue, translation, wmt14
from examples.language import command, corpora, experiment, samples, sparsify, tables, write
from examples.language.corpora import Pairs
from examples.language.methods import METHODS, STRENGTHS
from examples.language.transformer import Transformer

from .test_corpora import write_taskmaster, write_tiny

SMALL = shlex.split(
    "--vocabulary 60 --width 16 --hidden 16 --heads 2 --layers 1 --source-length 16"
    " --target-length 16 --row 16 --batch 8 --dense-epochs 2 --loop-epochs 5 --tune-epochs 2"
    " --interval 3 --share 0 --fraction 0.25 --validation-pairs 10 --beams 2"
)


def write_pairs(folder):
    """A language in which each sentence is read backwards; of four words, as BLEU counts them."""
    sentences = map(" ".join, itertools.product(("alpha", "beta", "gamma", "eta"), repeat=4))
    path = folder / "pairs.tsv"
    path.write_text("".join(f"{sentence}\t{sentence[::-1]}\n" for sentence in sentences))
    return path


def translate(path, out, *more):
    return translation.main([*SMALL, "--tsv", str(path), "--out", str(out), *more])


def without_times(record):
    if isinstance(record, list):
        return [without_times(each) for each in record]
    if not isinstance(record, dict):
        return record
    timed = ("seconds", "dense_seconds", "tune_seconds", "scoring_seconds", "date")
    return {key: without_times(value) for key, value in record.items() if key not in timed}


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
    method = ["--method", "default", "--accumulate", "2", "--metric", "loss", "--share", "0.1"]
    (whole,) = translate(path, tmp_path / "whole", *method)
    looks, parts, seen = itertools.chain([1], itertools.repeat(20)), [], []
    while not parts:
        monkeypatch.setattr(sparsify, "time", Clock(next(looks)))
        parts = translate(path, tmp_path / "parts", *method, "--minutes", "60", "--resume")
        seen.append({path.name for path in (tmp_path / "parts" / "checkpoints").glob("*/*/*")})
    # While the dense network trained, in the loop, and among networks that are tuned and scored.
    assert not any(name in seen[0] for name in ("loop", "scores-0.5.json"))
    assert "loop" in seen[1]
    assert "scores-0.5.json" not in seen[1]
    assert any({"tuning-0.5", "scores-0.5.json"} <= each for each in seen)
    assert without_times(parts[0]) == without_times(whole)
    outputs = [tmp_path / out / "outputs/pairs-default-seed0.jsonl" for out in ("whole", "parts")]
    assert outputs[0].read_text() == outputs[1].read_text()
    levels = {point["level"] for point in whole["points"]}
    saved = {path.stem for path in (tmp_path / "whole" / "networks").glob("*.safetensors")}
    assert saved == {f"pairs-default-seed0-{level:g}" for level in levels}
    # What has a record is not run again, unless the text is another one.
    assert translate(path, tmp_path / "whole", *method, "--resume") == [whole]
    path.write_text(path.read_text() + "new\twen\n")
    (other,) = translate(path, tmp_path / "whole", *method, "--resume")
    assert other["digest"] != whole["digest"]


@pytest.mark.parametrize("cosine", [0.0, 0.8, 1.0])
def test_learning_rate_of_the_loop(cosine):
    """r / 2 (1 + cos(pi c t / T)) at step t of T."""
    settings = translation.USUAL._replace(learning_rate=2e-3, cosine=cosine)
    steps = np.arange(0, 1001, 8)
    rates = np.broadcast_to(sparsify.loop_schedule(settings, 1000)(steps), steps.shape)
    wanted = 1e-3 * (1 + np.cos(np.pi * cosine * steps / 1000))
    np.testing.assert_allclose(rates, wanted, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(("accumulate", "interval", "updates"), [(1, 4, 16), (3, 4, 4), (4, 8, 4)])
def test_schedule_of_the_loop_counts_updates(accumulate, interval, updates, tmp_path, monkeypatch):
    """In 2 epochs of 8 batches; an interval of 4 is rounded up to 6 batches, that is 2 updates."""

    class Asked(Exception):
        pass

    def schedule(settings, number):
        raise Asked(number)

    settings = translation.USUAL._replace(
        vocabulary=60, width=16, hidden=16, heads=2, layers=1, row=16, source_length=16,
        target_length=16, batch=1, dense_epochs=0, loop_epochs=2, train_pairs=40,
        accumulate=accumulate, interval=interval,
    )  # fmt: skip
    bench = experiment.load(settings, corpora.tsv(write_pairs(tmp_path)))
    bench = bench._replace(steps=8)
    monkeypatch.setattr(sparsify, "loop_schedule", schedule)
    with pytest.raises(Asked, match=f"^{updates}$"):
        sparsify.sparsify(bench, METHODS["none"], 0.0, 0, tmp_path / "run")


def test_selective_adam_as_it_comes_is_that_but_for_the_betas():
    """Three updates in a row, the strength as it is: none is restarted, none decays."""
    random = np.random.default_rng(0)
    params = {"w": jnp.asarray(random.standard_normal(50), jnp.float32)}
    ours = METHODS["ready-made"].optimizer(0.1, STRENGTHS["ready-made"], 2)
    plain = sj.selective_adam(0.1, 0.85, 0.997)
    state, wanted_state = ours.init(params), plain.init(params)
    for _ in range(3):
        gradients = {"w": jnp.asarray(1e-3 * random.standard_normal(50), jnp.float32)}
        updates, state = ours.update(gradients, state, params)
        wanted, wanted_state = plain.update(gradients, wanted_state, params)
        np.testing.assert_array_equal(updates["w"], wanted["w"])
        params = optax.apply_updates(params, updates)


def test_figure_shows_means_bands_and_smaller_networks():
    def record(seed, bleu):
        points = [{"level": 0.5, "sparsity": 0.52, "bleu": bleu, "loss": 2}]
        points += [{"level": 0.9, "sparsity": 0.9, "bleu": bleu - 10, "loss": 2 + bleu / 10}]
        shared = {"data": "pairs", "digest": "a", "parameters": 1000, "seed": seed}
        shared["settings"] = {"width": 64, "bfloat16": True, "dense_epochs": 40, "beams": 4}
        return shared | {"dense": {"bleu": 4 * bleu - 58, "loss": 1}, "points": points}

    def alone(digest, width, parameters, **changed):
        settings = {"width": width, "bfloat16": width == 24, "dense_epochs": 40, "beams": 4}
        settings |= changed
        scores = {"bleu": width / 2, "loss": 3}
        return {"digest": digest, "parameters": parameters, "settings": settings, **scores}

    smaller = [alone("a", 32, 250), alone("a", 24, 200), alone("a", 8, 50), alone("b", 16, 250)]
    # Before these one is too sparse and one of another text; not smaller, trained for less, greedy.
    smaller += [alone("a", 64, 1000), alone("a", 28, 250, dense_epochs=20)]
    smaller += [alone("a", 20, 250, beams=1)]
    # Dense networks of 22 and 38 BLEU, 30 in the mean.
    methods = {"paper": [record(0, 20), record(1, 24)], "none": [record(1, 22)]}
    methods["none"][0]["dense"] = methods["paper"][1]["dense"]
    bleu, loss = tables.figure(methods, smaller).axes

    def drawn(axes):
        return {line.get_label(): np.transpose(line.get_data()) for line in axes.lines}

    lines = drawn(bleu)
    paper, none = "paper (seed 0, 1)", "none (seed 1)"
    assert list(lines) == ["dense", "dense, width 32, float32", "dense, width 24", paper, none]
    np.testing.assert_allclose(lines["dense"][:, 1], 0)
    np.testing.assert_allclose(lines["dense, width 32, float32"], [[75, -14]])
    np.testing.assert_allclose(lines["dense, width 24"], [[80, -18]])
    np.testing.assert_allclose(lines[paper], [[52, -8], [90, -18]])
    np.testing.assert_allclose(lines[none], [[52, -16], [90, -26]])
    band, _ = bleu.collections
    corners = {tuple(map(float, np.round(corner, 6))) for corner in band.get_paths()[0].vertices}
    assert corners == {(52, -14), (52, -2), (90, -24), (90, -12)}
    lines = drawn(loss)
    np.testing.assert_allclose(lines["dense, width 24"], [[80, 2]])
    np.testing.assert_allclose(lines[paper], [[52, 1], [90, 3.2]])


@pytest.mark.slow
def test_records_and_tables(tmp_path, capsys, monkeypatch):
    path = write_pairs(tmp_path)
    records = translate(path, tmp_path, "--method", "paper", "none", "--seed", "0", "1")
    assert len(records) == 4
    # Once for all methods of a seed the dense network is tuned, and measured.
    first, second = (
        {record["seed"]: record["points"][0] for record in records if record["method"] == method}
        for method in ("paper", "none")
    )
    assert first == second
    assert first[0] != first[1]
    for record in records:
        levels = [point["level"] for point in record["points"]]
        assert levels == sorted(sparsify.LEVELS)[: len(levels)]
        assert {0.5, 0.75} <= set(levels)
        for point in record["points"]:
            assert point["level"] - 0.002 <= point["sparsity"] < point["level"] + 0.15
            assert all(0 <= share <= 1 for share in point["kinds"].values())
        assert record["signatures"][0].startswith("nrefs:1|case:mixed|eff:no|tok:intl")
    # The methods of a seed start from the same network.
    dense = [without_times(record["dense"]) for record in records]
    assert dense[0] == dense[1] != dense[2]
    lines = samples.read(tmp_path / "outputs" / "pairs-paper-seed0.jsonl")
    score = sacrebleu.corpus_bleu(
        [line["sparse"] for line in lines], [[line["reference"] for line in lines]], tokenize="intl"
    ).score
    (point,) = [point for point in records[0]["points"] if point["level"] == 0.75]
    np.testing.assert_allclose(point["bleu"], score)
    capsys.readouterr()
    tables.main(["--results", str(tmp_path)])
    shown = capsys.readouterr().out
    mean = np.mean([record["points"][0]["bleu"] for record in (records[0], records[2])])
    assert f"{mean:.2f} [" in shown
    assert shown.count("| none ") >= 2
    assert (tmp_path / "pairs.png").stat().st_size > 10_000
    page = samples.page(tmp_path / "outputs" / "pairs-paper-seed0.jsonl")
    assert page.count("| reference |") == 10
    # What a run saved writes what the run wrote.
    saved = tmp_path / "networks" / "pairs-paper-seed0-0.75.safetensors"
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{each['source']}\n" for each in lines)))
    write.main([str(saved)])
    assert capsys.readouterr().out.splitlines() == [each["sparse"] for each in lines]


# What --quick does, with fewer pairs and epochs.
QUICK = shlex.split(
    "--quick --train-pairs 800 --dense-epochs 1 --loop-epochs 1 --interval 10 --share 0"
    " --test-pairs 20 --method none"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("main", "corpus"), [(translation.main, "jupyterlab"), (dialogue.main, "chatterbot")]
)
def test_quick_runs(main, corpus, tmp_path):
    (record,) = main([*QUICK, "--out", str(tmp_path)])
    assert corpus in record["data"].lower()
    assert [point["level"] for point in record["points"][:2]] == [0.0, 0.5]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # tensorflow-datasets' own
def test_wmt14_on_a_tiny_copy(tmp_path, capsys):
    rows = {
        split: [{"en": f"one {i}", "de": f"eins {i}"} for i in range(number)]
        for split, number in (("train", 60), ("validation", 10), ("test", 10))
    }
    features = tfds.features.Translation(languages=("de", "en"))
    write_tiny("wmt14_translate", "de-en", "1.0.0", features, rows, tmp_path)
    small = [*SMALL[2:], "--vocabulary", "40", "--batch", "2", "--no-bfloat16"]
    arguments = [*small, "--data-dir", str(tmp_path), "--out", str(tmp_path / "out")]
    (record,) = wmt14.main(arguments)
    assert record["data"] == "wmt14_translate/de-en, en to de"
    assert "26.86" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="1"):
        wmt14.main([*arguments, "--bound", "99"])
    assert "misses the bound 99" in capsys.readouterr().out


def test_beside_the_paper():
    table = wmt14.beside_the_paper({"points": [{"level": 0.75, "sparsity": 0.751, "bleu": 25.5}]})
    cells = [list(column.cells) for column in table.columns]
    assert cells[1] == ["26.86", "26.60", "26.81", "26.53", "26.02", "25.56"]
    assert cells[4] == ["-", "-", "-", "-", "25.50", "-"]


@pytest.mark.slow
def test_dialogues_from_files(tmp_path):
    write_taskmaster(tmp_path, tmp_path)
    small = [*SMALL[2:], "--vocabulary", "70", "--batch", "1", "--train-pairs", "4"]
    (record,) = dialogue.main(
        [*small, "--folder", str(tmp_path), "--out", str(tmp_path / "out"), "--authors"]
    )
    assert record["pairs"] == [4, 2]
    assert record["settings"]["beams"] == 2  # what is given goes before --authors
    assert record["settings"]["patience"] == 10
    assert record["settings"]["cosine"] == 0.8  # 40 epochs of a cosine of 50


@pytest.mark.slow
def test_a_bound_on_bleu_holds_the_loop(tmp_path):
    path = write_pairs(tmp_path)
    more = ["--dense-epochs", "40", "--share", "0.9", "--method", "none", "--width", "32"]
    (record,) = translate(path, tmp_path, *more)
    assert record["dense_metric"] > 20  # it has learned something
    assert record["bound"] == pytest.approx(0.9 * record["dense_metric"])
    met = [met for *_, met in record["curve"]]
    assert True in met
    assert False in met
    for (sparsity, _, held), (following, *_) in itertools.pairwise(record["curve"]):
        assert (following > sparsity) == held  # pruned where the bound was met, and only there


def test_bootstrap_tells_better_from_worse(tmp_path):
    """One that misses two words in each sentence, and two that miss them in another sentence."""
    folder = tmp_path / "outputs"
    folder.mkdir()
    rng = np.random.default_rng(0)
    references = [" ".join(rng.choice(list("abcdefgh"), 9)) for _ in range(40)]
    # U+2028 ends a line for Python, not for JSON.
    worse = [reference[2:] + "\u2028" for reference in references]
    dense, other = ([*references] for _ in range(2))
    dense[3], other[4] = worse[3], worse[4]
    # Outputs of l2 are there, but its record is of another seed.
    for method, sparse in (("none", other), ("paper", worse), ("l2", worse)):
        with (folder / f"toy-{method}-seed3.jsonl").open("w", encoding="utf-8") as file:
            for reference, before, own in zip(references, dense, sparse, strict=True):
                line = {"source": "", "reference": reference, "dense": before, "sparse": own}
                print(json.dumps(line, ensure_ascii=False), file=file)
    # Outputs of l1 are of a run from another dense network.
    with (folder / "toy-l1-seed3.jsonl").open("w", encoding="utf-8") as file:
        for reference, before, own in zip(references, other, worse, strict=True):
            line = {"source": "", "reference": reference, "dense": before, "sparse": own}
            print(json.dumps(line), file=file)
    seeds = {"paper": 3, "l2": 0, "l1": 3, "none": 3}
    records = {method: [{"seed": seed}] for method, seed in seeds.items()}
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in tables.bootstrap(tmp_path, "toy", records).splitlines()[2:]
    ]
    assert [row[:3] for row in rows] == [
        ["paper", "dense", "3"],
        ["none", "dense", "3"],
        ["paper", "none", "3"],
        ["l1", "dense", "3"],
    ]
    scores = {
        name: sacrebleu.corpus_bleu(outputs, [references], tokenize="intl").score
        for name, outputs in (("dense", dense), ("none", other), ("paper", worse))
    }
    *rows, (_, _, _, score, difference, _) = rows
    assert score == f"{scores['paper']:.2f}"
    assert difference == f"{scores['paper'] - scores['none']:+.2f}"  # "none" wrote l1's dense
    for name, base, _, score, difference, p in rows:
        assert score == f"{scores[name]:.2f}"
        assert difference == f"{scores[name] - scores[base]:+.2f}"
        assert float(p) < 0.01 if name == "paper" else float(p) > 0.1


def test_tables_compare_the_same_seeds():
    """A row of all seeds, and where another method has fewer, one of these."""

    def run(seed, bleu):
        dense = {"bleu": 30.0 + seed, "chrf": 0.0, "loss": 0.1 * seed, "validation_loss": 1.0}
        point = {"level": 0.5, "sparsity": 0.5, "kinds": dict.fromkeys(sparsify.KINDS, 0.5)}
        return {"seed": seed, "dense": dense, "points": [point | dense | {"bleu": bleu}]}

    records = {"paper": [run(0, 20.0), run(1, 24.0)], "l1": [run(0, 21.0)]}
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in tables.by_level(records).splitlines()[2:]
    ]
    assert [[row[0].split(":")[0], *row[1:]] for row in rows] == [
        ["paper", "0, 1", "30.50 [30.00, 31.00]", "22.00 [20.00, 24.00]"],
        ["paper", "0", "30.00", "20.00"],
        ["l1", "0", "30.00", "21.00"],
    ]
    # The dense network of a seed counts once; one that was trained anew is another.
    assert tables.in_full(records).splitlines()[2].split("|")[2].strip() == "2"
    records["l1"][0]["dense"] = run(0, 0.0)["dense"] | {"bleu": 30.5}
    assert tables.in_full(records).splitlines()[2].split("|")[2].strip() == "3"


def test_digest_is_that_of_the_whole_corpus():
    corpus = corpora.jupyterlab()
    expected = hashlib.sha256(repr(corpus).encode()).hexdigest()[:16]
    assert experiment._digest(corpus) == expected
    assert experiment._digest(corpus._replace(note="")) != expected


def test_kinds_of_layers_are_all():
    """Every parameter of the Transformer is of one kind, and of one alone."""
    model = Transformer(20, 8, 8, 2, 2, 16, 16)
    tokens = jnp.ones((1, 4), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens, tokens)
    full = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), params)
    for row in sj.summary(full, full):
        kinds = [
            kind for kind, pattern in sparsify.KINDS.items() if re.fullmatch(pattern, row.path)
        ]
        assert len(kinds) == 1, (row.path, kinds)


def test_replies_that_training_has_seen():
    seen, asked = Pairs(["a", "b", "c"], ["x", "y", "x"]), Pairs(["d"] * 4, list("xzzx"))
    assert experiment.known(seen, asked) == 0.5


def test_wrong_options(tmp_path, capsys):
    for arguments, said in (
        (["--tsv", str(tmp_path / "no.tsv"), "--dataset", "x"], "give one of them"),
        (["--method", "l2", "none", "--strength", "1"], "one --method with it"),
        (["--metric", "accuracy"], "neither 'bleu' nor 'loss'"),
        (["--tsv", str(tmp_path / "no.tsv")], "no.tsv"),
        (["--width", "30", "--heads", "4"], "heads: 4 do not divide the width, 30"),
        (["--vocabulary", "20"], "vocabulary: 20 does not fit"),
        (["--interval", "0"], "interval: 0 is too small"),
        (["--dropout", "1"], "dropout: 1.0 must be less than 1"),
        (["--share", "1.3"], "share: 1.3 is a share, 1 at most"),
        (["--cosine", "1.3"], "cosine: 1.3 is a share, 1 at most"),
        (["--cosine", "-1"], "cosine: -1.0 is too small"),
        (["--method", "paper", "--strength", "1"], "paper has 1e-05 and no other"),
    ):
        with pytest.raises(SystemExit):
            translation.main([*arguments, "--out", str(tmp_path)])
        assert said in capsys.readouterr().err
    assert command.SHOWN in sparsify.LEVELS


def test_signatures_are_there_before_anything_is_scored(monkeypatch):
    """A run that is taken up when all its networks have their scores."""
    for metric in ("BLEU", "CHRF"):
        monkeypatch.setattr(experiment, metric, type(getattr(experiment, metric))())
    bleu, chrf = experiment.signatures()
    assert "nrefs:1|case:mixed" in bleu
    assert "nrefs:1|case:mixed" in chrf
