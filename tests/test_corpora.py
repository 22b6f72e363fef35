"""Pairs of texts: each reader on small files in the real formats, and where near-duplicates go."""

import itertools
import json
from pathlib import Path

import pytest

from examples.language import corpora, text
from examples.language.corpora import Corpus, Pairs

SGD = Path(__file__).parents[2] / "shared" / "data" / "dialogue" / "sgd"


def test_near_duplicates_stay_together():
    pairs = [(f"{word} {number}: the {word}s, page {number}?", word) for word in "abcdefghij" * 3
             for number in range(7)]  # fmt: skip
    corpus = corpora.by_hash(pairs, "made")
    places = {}
    for split in ("train", "validation", "test"):
        for source, target in zip(*getattr(corpus, split), strict=True):
            places.setdefault(target, set()).add(split)
            assert corpora.plain(source) == f"{target} the {target}s page"
    assert all(len(splits) == 1 for splits in places.values())
    assert "70 pairs" in corpus.note  # without those that are alike altogether
    assert "60 near-duplicates" in corpus.note
    assert corpora.by_hash(pairs, "made") == corpus


def test_shares_of_the_split():
    corpus = corpora.by_hash(((chr(19968 + i) * 2, "x") for i in range(5000)), "made")
    assert [len(split.source) for split in corpus[:3]] == pytest.approx([4400, 250, 350], abs=60)


def test_no_character_is_unknown():
    sentences = ["a plain text"] * 5000 + ["one û & Ê _ only"]
    tokenizer = text.train_tokenizer(sentences, 40)
    assert tokenizer.decode(tokenizer.encode(sentences[-1])) == sentences[-1]


def test_tsv(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text("one\tun\ntwo\tdeux\n", encoding="utf-8")
    corpus = corpora.tsv(path)
    found = {pair for split in corpus[:3] for pair in zip(*split, strict=True)}
    assert found == {("one", "un"), ("two", "deux")}
    path.write_text("one\tun\ntwo\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"line 2 of .*pairs.tsv is not two texts.*'two"):
        corpora.tsv(path)


TURNS = [
    ("USER", "Hi."),
    ("USER", "A table, please."),
    ("ASSISTANT", "Where?"),
    ("user", " In  Oakland. "),
    ("ASSISTANT", "Done."),
    ("ASSISTANT", "Anything else?"),
]
PAIRS = [
    ("<user>Hi. A table, please.<enduser>", "Where?"),
    (
        "<user>Hi. A table, please.<enduser><agent>Where?<endagent><user>In Oakland.<enduser>",
        "Done. Anything else?",
    ),
]


def write_taskmaster(folder, lists, name="self"):
    dialogues = [
        {
            "conversation_id": f"dlg-{i}",
            "instruction_id": "x",
            "utterances": [
                {"index": j, "speaker": speaker, "text": f"{words} {i}"}
                for j, (speaker, words) in enumerate(TURNS)
            ],
        }
        for i in range(5)
    ]
    (folder / f"{name}-dialogs.json").write_text(json.dumps(dialogues))
    lists.mkdir(exist_ok=True)
    for split, ids in (("train", (0, 2)), ("dev", (3,)), ("test", (1,))):
        (lists / f"{split}.csv").write_text("".join(f"dlg-{i},\n" for i in ids))


@pytest.mark.parametrize("lists", [".", "train-dev-test"])
@pytest.mark.parametrize("name", ["self", "woz"])
def test_taskmaster(tmp_path, lists, name):
    write_taskmaster(tmp_path, tmp_path / lists, name)
    corpus = corpora.taskmaster(tmp_path)
    assert [len(split.source) for split in corpus[:3]] == [4, 2, 2]
    assert corpus.test == Pairs(
        [
            "<user>Hi. 1 A table, please. 1<enduser>",
            "<user>Hi. 1 A table, please. 1<enduser><agent>Where? 1<endagent>"
            "<user>In Oakland. 1<enduser>",
        ],
        ["Where? 1", "Done. 1 Anything else? 1"],
    )
    assert "1 in none are left out" in corpus.note
    assert corpus.symbols == ("<user>", "<enduser>", "<agent>", "<endagent>")


def test_taskmaster_says_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match=r"needs self-dialogs.json .*train.csv"):
        corpora.taskmaster(tmp_path)
    write_taskmaster(tmp_path, tmp_path)
    (tmp_path / "dev.csv").unlink()
    with pytest.raises(ValueError, match=r"needs self-dialogs.json .*dev.csv"):
        corpora.taskmaster(tmp_path)
    (tmp_path / "dev.csv").touch()
    (tmp_path / "self-dialogs.json").write_text('[{"conversation_id": "a"}]')
    with pytest.raises(ValueError, match=r"self-dialogs.json is not a list of dialogues"):
        corpora.taskmaster(tmp_path)


def test_turns():
    said = [(speaker.upper() == "USER", words) for speaker, words in TURNS]
    assert corpora.turn_pairs(said) == PAIRS
    # An assistant that opens has nothing to reply to.
    opened = corpora.turn_pairs([(False, "Welcome."), *said])
    assert opened[0] == ("<agent>Welcome.<endagent>" + PAIRS[0][0], "Where?")


def test_a_tag_is_one_token():
    tokenizer = text.train_tokenizer(["in oakland", "a table"] * 5, 60, corpora.TAGS)
    history = PAIRS[1][0].lower().replace(",", "").replace(".", "").replace("?", "")
    (tokens,) = text.encode(tokenizer, [history], 64)
    numbers = [tokenizer.piece_to_id(tag) for tag in corpora.TAGS]
    assert [token for token in tokens if token in numbers] == [
        numbers[i] for i in (0, 1, 2, 3, 0, 1)
    ]
    (last,) = text.encode(tokenizer, [history], 6, keep="last")
    assert last.tolist() == tokens[-6:].tolist()


def test_defaults_come_with_pip():
    jupyterlab, chatterbot = corpora.jupyterlab(), corpora.chatterbot()
    assert jupyterlab.note.startswith("2961 pairs")
    assert "Fichier" in " ".join(jupyterlab.train.target)
    assert chatterbot.note.startswith("1249 pairs")
    beginnings = [
        {source.split("<enduser>")[0].split("<endagent>")[0] for source in split.source}
        for split in chatterbot[:3]
    ]
    assert all(split.isdisjoint(other) for split, other in itertools.combinations(beginnings, 2))
    assert all(source.startswith(("<user>", "<agent>")) for source in chatterbot.train.source)
    assert all(source.endswith("<enduser>") for source in chatterbot.train.source)


@pytest.mark.skipif(not SGD.exists(), reason="needs the shared dialogues")
def test_real_dialogues():
    corpus = corpora.taskmaster(SGD)
    assert len(corpus.train.source) == 57_004
    assert "; 0 in none" in corpus.note


def write_tiny(name, config, version, features, splits, folder):
    """A set of texts in tensorflow-datasets' own files."""
    import tensorflow_datasets as tfds

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(version)
        pkg_dir_path = folder
        if config:
            BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config, version=version)]

        def _info(self):
            return self.dataset_info_from_configs(features=features)

        def _split_generators(self, dl_manager):
            return {split: enumerate(rows) for split, rows in splits.items()}

        def _generate_examples(self):
            raise NotImplementedError

    Tiny.name = name
    Tiny(data_dir=folder, config=config, file_format="array_record").download_and_prepare()


@pytest.mark.filterwarnings("ignore")  # tensorflow-datasets' own
@pytest.mark.parametrize(
    ("name", "config", "languages", "source"),
    [
        ("wmt14_translate", "de-en", ("de", "en"), "en"),
        ("ted_hrlr_translate", "pt_to_en", ("pt", "en"), None),
    ],
)
def test_translations_by_name(name, config, languages, source, tmp_path):
    import tensorflow_datasets as tfds

    rows = {
        split: [{code: f"{split} {i} {code} é" for code in languages} for i in range(number)]
        for split, number in (("train", 5), ("validation", 2), ("test", 3))
    }
    features = tfds.features.Translation(languages=languages)
    write_tiny(name, config, "1.0.0", features, rows, tmp_path)
    corpus = corpora.translation(f"{name}/{config}", tmp_path, source)
    first = source or languages[0]
    (second,) = set(languages) - {first}
    assert isinstance(corpus, Corpus)
    assert [len(split.source) for split in corpus[:3]] == [5, 2, 3]
    pairs = sorted(zip(*corpus.test, strict=True))
    assert pairs == [(f"test {i} {first} é", f"test {i} {second} é") for i in range(3)]
    with pytest.raises(ValueError, match=r"source: 'fr' is none of the languages"):
        corpora.translation(f"{name}/{config}", tmp_path, "fr")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("own", [[], ["test"]])
def test_a_translation_without_splits_for_all(own, tmp_path):
    import tensorflow_datasets as tfds

    words = ["open", "close", "save", "print", "find", "move", "copy", "cut"]
    texts = [f"{a} the {b} {c}" for a in words for b in words for c in ("file", "page")]
    rows = {"train": [{"en": text, "fr": text.upper()} for text in texts]}
    rows |= {split: [{"en": "its own", "fr": "LE SIEN"}] for split in own}
    features = tfds.features.Translation(languages=("en", "fr"))
    write_tiny("para_crawl", "enfr", "1.2.0", features, rows, tmp_path)
    corpus = corpora.translation("para_crawl/enfr", tmp_path)
    hashed = corpora.by_hash([(text, text.upper()) for text in texts], "")
    parts = [sorted(part.source) for part in corpus[:3]]
    wanted = [sorted(part.source) for part in hashed[:3]]
    assert all(wanted)
    assert parts == ([*wanted[:2], ["its own"]] if own else wanted)
    assert ("test: its own" in corpus.note) == bool(own)


@pytest.mark.filterwarnings("ignore")
def test_dialogues_by_name(tmp_path):
    import numpy as np
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict(
        {
            "utterances": tfds.features.Sequence(tfds.features.Text()),
            "first_speaker": tfds.features.ClassLabel(names=["USER", "SYSTEM"]),
            "metadata": {"services": tfds.features.Sequence({"name": np.str_})},
        }
    )
    row = {
        "utterances": ["Hi. A table, please.", "Where?", "In Oakland.", "Done. Anything else?"],
        "first_speaker": "USER",
        "metadata": {"services": [{"name": "Restaurants_1"}]},
    }
    other = row | {"first_speaker": "SYSTEM", "utterances": ["Welcome.", *row["utterances"]]}
    splits = {"train": [row, other], "dev": [row], "test": [row]}
    write_tiny("schema_guided_dialogue", None, "1.0.0", features, splits, tmp_path)
    corpus = corpora.dialogues("schema_guided_dialogue", tmp_path)
    assert list(zip(*corpus.test, strict=True)) == PAIRS
    assert len(corpus.train.source) == 4
