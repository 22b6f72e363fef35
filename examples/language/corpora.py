"""Pairs of texts: translations and turns of dialogues, split into training, validation and test."""

import csv
import gettext
import hashlib
import importlib
import importlib.resources
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..data import prepared, rows

USER, AGENT = ("<user>", "<enduser>"), ("<agent>", "<endagent>")
TAGS = (*USER, *AGENT)


class Pairs(NamedTuple):
    """One split."""

    source: list[str]
    target: list[str]


class Corpus(NamedTuple):
    """A text with its splits; nothing is chosen by the test pairs, which are looked at once."""

    train: Pairs
    validation: Pairs
    test: Pairs
    title: str  # as a table should name it
    note: str  # on how it was split
    symbols: tuple[str, ...] = ()  # that are to be one token each


def plain(text: str) -> str:
    """What near-duplicates have in common: lower case, no digits and no punctuation."""
    return " ".join(re.sub(r"[\W\d_]+", " ", text.casefold()).split())


def by_hash(
    pairs: Iterable[tuple[str, str]], title: str, keys: Iterable[str] | None = None
) -> Corpus:
    """Splits by a hash of what is :func:`plain` of a key, so that no near-duplicate is torn.

    Args:
      pairs: source and target; the same pair again is left out.
      title: of the corpus.
      keys: a text for each pair; by default its source.

    Returns:
      The corpus: 5 % for validation, 7 % for the test.
    """
    splits: dict[str, list[tuple[str, str]]] = {"train": [], "validation": [], "test": []}
    pairs = list(pairs)
    keys = [source for source, _ in pairs] if keys is None else keys
    seen, number = set(), 0
    for pair, key in dict(zip(pairs, keys, strict=True)).items():
        same = plain(key)
        share = int.from_bytes(hashlib.sha256(same.encode()).digest()[:8], "big") / 2**64
        splits["validation" if share < 0.05 else "test" if share < 0.12 else "train"].append(pair)
        seen.add(same)
        number += 1
    note = (
        f"{number} pairs, split by a hash; {number - len(seen)} near-duplicates (alike but for"
        " case, digits and punctuation) are in the split of the one that they repeat"
    )
    train, validation, test = map(_pairs, splits.values())
    return Corpus(train, validation, test, title, note)


def jupyterlab() -> Corpus:
    """English to French: the interface of JupyterLab, from ``jupyterlab-language-pack-fr-FR``."""
    folder = importlib.resources.files("jupyterlab_language_pack_fr_FR") / "locale/fr_FR"
    pairs = []
    for path in sorted((folder / "LC_MESSAGES").iterdir(), key=lambda path: path.name):
        if path.name.endswith(".mo"):
            with path.open("rb") as file:
                catalog = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
            for key, translated in catalog.items():
                # With a context the key is "context \x04 text"; plural forms are tuples.
                text = key.split("\x04")[-1] if isinstance(key, str) else ""
                if text and translated and text != translated:
                    pairs.append((" ".join(text.split()), " ".join(translated.split())))
    first = dict(reversed(pairs))  # of a text that is translated twice
    return by_hash(first.items(), "JupyterLab's interface, English to French")


def tsv(path: Path) -> Corpus:
    """A tab-separated pair a line, the source first.

    Raises:
      ValueError: a line is no pair.
    """
    pairs = []
    with path.open(encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, 1):
            fields = line.rstrip("\r\n").split("\t")
            if len(fields) != 2 or not all(fields):
                raise ValueError(
                    f"tsv: line {number} of {path} is not two texts with a tab between them:"
                    f" {line[:60]!r}"
                )
            pairs.append((fields[0], fields[1]))
    return by_hash(pairs, path.stem)


def translation(name: str, data_dir: str | Path | None = None, source: str | None = None) -> Corpus:
    """A tensorflow-datasets set with a pair of languages, in its own splits.

    Where it has no validation or no test split, training pairs are taken for it, by a hash.

    Args:
      name: such as ``"wmt14_translate/de-en"`` or ``"ted_hrlr_translate/pt_to_en"``.
      data_dir: where tensorflow-datasets keeps its data, None for its own default.
      source: the language to translate from; by default the first of the pair.

    Returns:
      The corpus.

    Raises:
      ImportError: the set is not prepared as ArrayRecord, and TensorFlow is missing.
      ValueError: the set has no pair of languages, or ``source`` is none of them.
    """
    # Without TensorFlow the sets of this module are registered only by importing it.
    importlib.import_module("tensorflow_datasets.translate")

    builder = prepared(name, data_dir)
    keys = builder.info.supervised_keys
    if keys is None or len(keys) != 2:
        raise ValueError(f"dataset: {name!r} has no pair of languages.")
    if source is not None and source not in keys:
        raise ValueError(f"source: {source!r} is none of the languages {sorted(keys)} of {name!r}.")
    first = source or keys[0]
    (second,) = set(keys) - {first}

    def pairs(split: str) -> Pairs:
        return _pairs((_text(row[first]), _text(row[second])) for row in rows(builder, split))

    title, own = f"{name}, {first} to {second}", "the set's own splits"
    parts = {
        split: pairs(split) for split in ("validation", "test") if split in builder.info.splits
    }
    if len(parts) == 2:
        return Corpus(pairs("train"), parts["validation"], parts["test"], title, own)
    hashed = by_hash(zip(*pairs("train"), strict=True), title)
    note = "; ".join([*[f"{split}: its own" for split in parts], f"of training, {hashed.note}"])
    return Corpus(
        hashed.train,
        parts.get("validation", hashed.validation),
        parts.get("test", hashed.test),
        title,
        note,
    )


def chatterbot() -> Corpus:
    """Utterances and replies in English, from ``chatterbot-corpus``.

    Each utterance but the first of a conversation is a reply. Conversations that begin alike are in
    the same split.
    """
    import yaml

    pairs, first = [], []
    folder = importlib.resources.files("chatterbot_corpus") / "data/english"
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        if path.name.endswith(".yml"):
            for turns in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
                for last in range(1, len(turns)):
                    said = [((last - i) % 2 == 1, str(turns[i])) for i in range(last + 1)]
                    pairs += (found := turn_pairs(said)[-1:])
                    first += [str(turns[0])] * len(found)
    corpus = by_hash(pairs, "chatterbot-corpus, English", first)
    number = sum(len(split.source) for split in corpus[:3])
    note = f"{number} pairs, split by a hash of how a conversation begins"
    return corpus._replace(note=note, symbols=TAGS)


def taskmaster(folder: Path) -> Corpus:
    """Dialogues in the files of Taskmaster-1 (Byrne et al. 2019).

    Args:
      folder: has ``self-dialogs.json``, ``woz-dialogs.json`` or both, and ``train.csv``,
        ``dev.csv`` and ``test.csv``, ids of conversations, there or in ``train-dev-test``.

    Returns:
      The corpus; dialogues that are in no list are left out.

    Raises:
      ValueError: a file is missing or is not of this form.
    """
    paths = [path for name in ("self", "woz") if (path := folder / f"{name}-dialogs.json").exists()]
    lists = folder if (folder / "train.csv").exists() else folder / "train-dev-test"
    splits = {split: lists / f"{split}.csv" for split in ("train", "dev", "test")}
    if not paths or not all(path.exists() for path in splits.values()):
        raise ValueError(
            f"dialogues: {folder} needs self-dialogs.json (or woz-dialogs.json), and train.csv,"
            " dev.csv and test.csv with ids of conversations, there or in train-dev-test."
        )
    dialogues: dict[str, list[tuple[bool, str]]] = {}
    for path in paths:
        try:
            for dialogue in json.loads(path.read_text(encoding="utf-8")):
                dialogues[dialogue["conversation_id"]] = [
                    (turn["speaker"].upper() == "USER", turn["text"])
                    for turn in dialogue["utterances"]
                ]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"dialogues: {path} is not a list of dialogues with conversation_id and utterances"
                f" of speaker and text: {error!r}"
            ) from error
    found, listed = [], 0
    for path in splits.values():
        with path.open(encoding="utf-8", newline="") as file:
            names = [row[0].strip() for row in csv.reader(file) if row]
        known = [dialogues[name] for name in names if name in dialogues]
        listed += len(known)
        found.append(_pairs(pair for turns in known for pair in turn_pairs(turns)))
    note = f"the files' own splits, by dialogue; {len(dialogues) - listed} in none are left out"
    train, validation, test = found
    return Corpus(train, validation, test, folder.resolve().name, note, TAGS)


def dialogues(name: str, data_dir: str | Path | None = None) -> Corpus:
    """``schema_guided_dialogue`` of tensorflow-datasets, in its own splits.

    Args:
      name: of a set with ``utterances`` and ``first_speaker``.
      data_dir: where tensorflow-datasets keeps its data, None for its own default.

    Returns:
      The corpus.

    Raises:
      ImportError: the set is not prepared as ArrayRecord, and TensorFlow is missing.
      ValueError: it is not of that form.
    """
    builder = prepared(name, data_dir)
    if not {"utterances", "first_speaker"} <= set(builder.info.features):
        raise ValueError(f"dataset: {name!r} has no utterances and first_speaker.")
    user = builder.info.features["first_speaker"].str2int("USER")

    def pairs(split: str) -> Pairs:
        return _pairs(
            pair
            for row in rows(builder, split)
            for pair in turn_pairs(
                [
                    ((row["first_speaker"] == user) == (i % 2 == 0), _text(turn))
                    for i, turn in enumerate(row["utterances"])
                ]
            )
        )

    train, validation, test = map(pairs, ("train", "dev", "test"))
    return Corpus(train, validation, test, name, "the set's own splits", TAGS)


def turn_pairs(turns: Sequence[tuple[bool, str]]) -> list[tuple[str, str]]:
    """From each turn of the user, with all that was said before, to the assistant's next one.

    Args:
      turns: whether it is the user's, and the text; turns of one speaker in a row are one turn.

    Returns:
      The history with tags around each turn, and the reply.
    """
    joined: list[tuple[bool, str]] = []
    for user, text in turns:
        text = " ".join(text.split())
        if joined and joined[-1][0] == user:
            joined[-1] = (user, f"{joined[-1][1]} {text}")
        elif text:
            joined.append((user, text))
    pairs, history = [], ""
    for i, (user, text) in enumerate(joined):
        before, after = USER if user else AGENT
        if not user and i > 0:
            pairs.append((history, text))
        history += f"{before}{text}{after}"
    return pairs


def _pairs(pairs: Iterable[tuple[str, str]]) -> Pairs:
    listed = list(pairs)
    return Pairs([source for source, _ in listed], [target for _, target in listed])


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
