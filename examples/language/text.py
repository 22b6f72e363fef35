"""Text to tokens and back, and many sentences packed into rows of one length."""

import io
import itertools
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import sentencepiece

from .transformer import EOS, PAD

LEARNED_FROM = 2_000_000  # sentences at most are what the tokens are learned from


class Packed(NamedTuple):
    """Pairs of sentences, several a row; what is left of a row is ``PAD``."""

    source: np.ndarray  # shape=[rows, source length], tokens
    target: np.ndarray  # shape=[rows, target length], tokens

    def padding(self) -> tuple[float, float]:
        """The share of padding in the sources and in the targets."""
        return float(np.mean(self.source == PAD)), float(np.mean(self.target == PAD))


def train_tokenizer(
    sentences: Sequence[str], vocabulary: int, symbols: Sequence[str] = ()
) -> sentencepiece.SentencePieceProcessor:
    """Learns byte-pair encoding; fewer tokens than asked for where the text does not have more.

    The same sentences give the same tokens, so that a run that was cut off can learn them again.

    Args:
      sentences: of the training split alone, both sides; of more than :data:`LEARNED_FROM` so many
        are drawn.
      vocabulary: tokens, ``PAD`` and ``EOS`` among them.
      symbols: that are one token each, tags of speakers for instance.

    Raises:
      RuntimeError: the vocabulary does not fit the sentences (SentencePiece says how).
    """
    if len(sentences) > LEARNED_FROM:  # here, as SentencePiece draws others in each process
        sentences = random.Random(0).sample(sentences, LEARNED_FROM)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocabulary,
        hard_vocab_limit=False,
        user_defined_symbols=list(symbols),
        pad_id=PAD,
        eos_id=EOS,
        unk_id=2,
        bos_id=-1,
        max_sentence_length=1 << 16,
        character_coverage=1.0,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def encode(
    tokenizer: sentencepiece.SentencePieceProcessor,
    sentences: Sequence[str],
    length: int,
    keep: str = "first",
) -> list[np.ndarray]:
    """Tokens of each sentence with ``EOS``; of longer ones the first (or last) ``length - 1``."""
    cut = slice(length - 1) if keep == "first" else slice(-(length - 1), None)
    dtype = _dtype(tokenizer.vocab_size())
    found = []
    for i in range(0, len(sentences), 10_000):  # Python's own numbers would fill the memory
        for tokens in tokenizer.encode(list(sentences[i : i + 10_000])):
            found.append(np.array([*tokens[cut], EOS], dtype))
    return found


def decode(tokenizer: sentencepiece.SentencePieceProcessor, tokens: np.ndarray) -> list[str]:
    """Text of rows of tokens, each up to its first ``EOS``."""
    rows = [itertools.takewhile(lambda token: token != EOS, row.tolist()) for row in tokens]
    return tokenizer.decode([[token for token in row if token != PAD] for row in rows])


def pack(
    sources: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    source_length: int,
    target_length: int,
    open_rows: int = 200,
) -> Packed:
    """Puts each pair into the first row that has room for both sides (first fit).

    Args:
      sources: tokens with ``EOS``, none longer than ``source_length``.
      targets: likewise.
      source_length: of a row.
      target_length: of a row.
      open_rows: that are looked through; the oldest is closed when there would be more.

    Returns:
      The rows, as uint16 where that is enough.

    Raises:
      ValueError: a pair is longer than a row.
    """
    rows: list[list[int]] = []  # numbers of pairs
    room: list[tuple[int, int, int]] = []  # number of the row, what is left on both sides
    for i, (source, target) in enumerate(zip(sources, targets, strict=True)):
        a, b = len(source), len(target)
        for place, (row, left, right) in enumerate(room):
            if a <= left and b <= right:
                rows[row].append(i)
                room[place] = (row, left - a, right - b)
                break
        else:
            if a > source_length or b > target_length:
                raise ValueError(
                    f"pack: pair {i} has {a} and {b} tokens; a row has {source_length} and"
                    f" {target_length}. Truncate it (encode) or lengthen the rows."
                )
            del room[: max(0, len(room) - open_rows + 1)]
            room.append((len(rows), source_length - a, target_length - b))
            rows.append([i])

    def side(sentences: Sequence[Sequence[int]], length: int) -> np.ndarray:
        packed = np.full((len(rows), length), PAD, _dtype(1 + max(map(max, sentences), default=0)))
        for numbers, row in zip(rows, packed, strict=True):
            end = 0
            for i in numbers:
                start, end = end, end + len(sentences[i])
                row[start:end] = sentences[i]
        return packed

    return Packed(side(sources, source_length), side(targets, target_length))


def padded(sentences: Sequence[Any], length: int) -> np.ndarray:
    """A sentence a row, ``PAD`` after it."""
    largest = max((max(sentence, default=0) for sentence in sentences), default=0)
    rows = np.full((len(sentences), length), PAD, _dtype(largest + 1))
    for row, sentence in zip(rows, sentences, strict=True):
        row[: len(sentence)] = sentence
    return rows


def _dtype(vocabulary: int) -> Any:
    return np.uint16 if vocabulary <= 1 << 16 else np.int32


def generate(
    decode_batch: Any, params: Any, sources: Sequence[Any], batch: int, length: int
) -> np.ndarray:
    """Decodes all sources, those of like length together, in batches of one shape.

    Args:
      decode_batch: from params and sources, shape=[batch, length], to tokens.
      params: of the network.
      sources: tokens with ``EOS``, a list or an array each.
      batch: sentences at a time.
      length: of the longest source.

    Returns:
      Tokens, in the order of ``sources``.
    """
    order = np.argsort([len(source) for source in sources], kind="stable")
    rows = padded([sources[i] for i in order], length)
    more = -len(rows) % batch
    rows = np.concatenate([rows, np.full((more, length), PAD, rows.dtype)])
    parts = [
        np.asarray(decode_batch(params, rows[i : i + batch].astype(np.int32)))
        for i in range(0, len(rows), batch)
    ]
    found = np.concatenate(parts)[: len(order)]
    return found[np.argsort(order)]
