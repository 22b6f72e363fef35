"""A language experiment: a corpus as tokens on the device, a Transformer, and its metrics."""

import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sacrebleu
import sentencepiece

from .. import checkpoints, trainer
from . import decoding, text
from .corpora import Corpus, Pairs
from .methods import plain_adam
from .transformer import PAD, Transformer


class Settings(NamedTuple):
    """What all methods of an experiment share."""

    vocabulary: int  # tokens of the byte-pair encoding, both sides together
    width: int
    hidden: int  # width of the feed-forward layers
    heads: int
    layers: int  # of the encoder, and as many of the decoder
    dropout: float
    source_length: int  # tokens of the longest source, EOS included; what is more is cut off
    target_length: int
    row: int  # tokens of a packed row, on the side that has more of them
    batch: int  # rows a step
    dense_epochs: int
    loop_epochs: int
    tune_epochs: int  # of each reported network
    checks: int  # in the loop
    share: float  # of the dense network's metric, the bound; of a loss the multiple allowed
    bound: float | None = None  # instead, the metric itself
    fraction: float = 0.1  # of what is left, pruned at a check that meets the bound
    metric: str = "bleu"  # of greedy decoding, or "loss", on validation pairs
    validation_pairs: int = 300  # that are decoded
    train_pairs: int | None = None  # None: all
    test_pairs: int | None = None
    learning_rate: float = 1e-3
    warmup: float = 0.1  # share of the dense training
    accumulate: int = 1  # batches whose gradients are averaged for a step of the optimizer
    smoothing: float = 0.0  # of the labels
    bfloat16: bool = False
    beams: int = 4
    penalty: float = 0.6  # of length, in beam search


class Tokens(NamedTuple):
    """A split as tokens."""

    sources: list[list[int]]
    references: list[str]
    packed: text.Packed


class Scores(NamedTuple):
    """Of a network on a split."""

    loss: float  # nats a token
    bleu: float
    chrf: float
    outputs: list[str]

    @property
    def perplexity(self) -> float:
        """Of a token."""
        return math.exp(self.loss)


class Experiment(NamedTuple):
    """What the runs of an experiment share."""

    settings: Settings
    corpus: Corpus
    tokenizer: sentencepiece.SentencePieceProcessor
    model: Transformer
    train_pairs: Pairs
    test_pairs: Pairs
    train: text.Packed
    validation: Tokens
    test: Tokens
    steps: int  # of a batch, an epoch
    metric: Callable[[Any], float]  # of params, on the validation pairs, in the loop
    loss: Callable[[Any, Tokens], float]  # of params, nats a token
    search: Callable[[Any, jax.Array], jax.Array]  # beam search


# Without a look at the outputs' details: what the paper's figures are nearest to.
BLEU = sacrebleu.metrics.BLEU(tokenize="intl")
CHRF = sacrebleu.metrics.CHRF()


def load(settings: Settings, corpus: Corpus) -> Experiment:
    """Learns the tokens from the training pairs, encodes all and makes the network.

    Raises:
      ValueError: a setting does not fit the corpus.
    """
    train_pairs = _some(corpus.train, settings.train_pairs)
    if settings.metric not in ("bleu", "loss"):
        raise ValueError(f"metric: {settings.metric!r} is neither 'bleu' nor 'loss'.")
    learned = [*dict.fromkeys(train_pairs.source), *train_pairs.target]
    if corpus.symbols:  # each history repeats the one before: the replies and last turns say all
        learned = [*train_pairs.target, *(_last_turn(source) for source in train_pairs.source)]
    tokenizer = text.train_tokenizer(learned, settings.vocabulary, corpus.symbols)
    model = Transformer(
        tokenizer.vocab_size(),
        settings.width,
        settings.hidden,
        settings.heads,
        settings.layers,
        max(settings.source_length, settings.target_length),
        settings.dropout,
    )

    def tokens(pairs: Pairs) -> Tokens:
        keep = "last" if corpus.symbols else "first"
        sources = text.encode(tokenizer, pairs.source, settings.source_length, keep)
        targets = text.encode(tokenizer, pairs.target, settings.target_length)
        packed = text.pack(sources, targets, *_rows(settings, sources, targets))
        return Tokens(sources, list(pairs.target), packed)

    train = tokens(train_pairs).packed
    if settings.batch > len(train.source):
        raise ValueError(
            f"batch: {settings.batch} rows are more than the {len(train.source)} of training."
        )
    validation = tokens(corpus.validation)
    few = tokens(_some(corpus.validation, settings.validation_pairs))
    test_pairs = _some(corpus.test, settings.test_pairs)
    loss = _loss(model)
    greedy = decoding.greedy(model, settings.target_length)
    beam = decoding.beam_search(model, settings.target_length, settings.beams, settings.penalty)

    def metric(params: Any) -> float:
        if settings.metric == "loss":
            return loss(params, validation)
        return bleu(generate(greedy, params), few.references)

    def generate(search, params):
        return _generate(search, params, few, tokenizer, settings)

    return Experiment(
        settings,
        corpus,
        tokenizer,
        model,
        train_pairs,
        test_pairs,
        train,
        validation,
        tokens(test_pairs),
        len(train.source) // settings.batch,
        metric,
        loss,
        lambda params, source: beam(params, source)[0],
    )


def bleu(outputs: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU, sacrebleu's with the tokenization ``intl``."""
    return BLEU.corpus_score(list(outputs), [list(references)]).score


def scores(experiment: Experiment, params: Any, tokens: Tokens) -> Scores:
    """Loss, and BLEU and chrF of beam search."""
    outputs = _generate(
        experiment.search, params, tokens, experiment.tokenizer, experiment.settings
    )
    chrf = CHRF.corpus_score(outputs, [tokens.references]).score
    return Scores(experiment.loss(params, tokens), bleu(outputs, tokens.references), chrf, outputs)


def train_loss(model: Transformer, smoothing: float, bfloat16: bool) -> trainer.Loss:
    """The mean over a batch's tokens of the cross-entropy with smoothed labels, while dropping."""

    def loss(params, model_state, batch, key):
        source, target = (side.astype(jnp.int32) for side in batch)
        if bfloat16:
            params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
        logits: Any = model.apply(params, source, target, train=True, rngs={"dropout": key})
        each = cross_entropy(logits, target, smoothing)
        return each.sum() / jnp.maximum(1, jnp.sum(target != PAD)), model_state

    return loss


def cross_entropy(logits: jax.Array, target: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """Of each token, 0 for padding: 1 - ``smoothing`` for the right one, the rest shared by all."""
    logits = logits.astype(jnp.float32)
    total = jax.nn.logsumexp(logits, axis=-1)
    right = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
    each = total - (1 - smoothing) * right
    if smoothing:
        each -= smoothing * logits.mean(-1)
    return jnp.where(target == PAD, 0, each)


def make_trainer(
    experiment: Experiment, tx: optax.GradientTransformation, steps: int
) -> Callable[[trainer.Record], trainer.Record]:
    """A function from a record to the record so many batches later."""
    settings = experiment.settings
    loss = train_loss(experiment.model, settings.smoothing, settings.bfloat16)
    return trainer.interval(loss, tx, experiment.train, settings.batch, steps)


def parts(experiment: Experiment) -> int:
    """So many parts has an epoch, a checkpoint after each: none is longer than 5,000 batches."""
    return math.ceil(experiment.steps / 5000)


def accumulated(settings: Settings, tx: optax.GradientTransformation) -> Any:
    """The optimizer, stepping once in so many batches."""
    if settings.accumulate == 1:
        return tx
    return optax.MultiSteps(tx, settings.accumulate).gradient_transformation()


def dense(
    experiment: Experiment,
    seed: int,
    folder: Path | None = None,
    overdue: Callable[[], bool] = lambda: False,
    progress_bar: bool = False,
) -> trainer.Record:
    """Trains the dense network of a seed: Adam, its learning rate rising, then falling as a cosine.

    Args:
      experiment: the corpus and the network.
      seed: of the initial weights, of the order of the rows and of what is dropped.
      folder: for checkpoints; a training that was cut off, or one that is done, is taken up there.
      overdue: asked after each epoch whether to save a checkpoint and stop.
      progress_bar: shows one.

    Returns:
      The record, without optimizer state.

    Raises:
      OutOfTime: ``overdue`` said so.
    """
    settings = experiment.settings
    steps = max(2, settings.dense_epochs * experiment.steps // settings.accumulate)
    rate = optax.warmup_cosine_decay_schedule(
        0.0, settings.learning_rate, max(1, round(settings.warmup * steps)), steps
    )
    tx = accumulated(settings, plain_adam(rate))
    none = jnp.zeros((1, 8), jnp.int32)
    params = jax.jit(experiment.model.init)(jax.random.key(seed), none, none)
    record = trainer.start(params, tx, len(experiment.train.source), seed)
    train = make_trainer(experiment, tx, experiment.steps // parts(experiment))
    record = checkpoints.epochs(
        lambda record, epoch: train(jax.tree.map(jnp.copy, record)),
        record,
        settings.dense_epochs * parts(experiment),
        folder,
        overdue,
        f"dense, seed {seed}" if progress_bar else None,
    )
    return record._replace(opt_state=())


def folder(out: Path, experiment: Experiment) -> Path:
    """The folder for checkpoints of all runs that start from the same dense networks."""
    shared = experiment.settings._replace(
        loop_epochs=0, tune_epochs=0, checks=0, share=0.0, bound=None, fraction=0.0, metric="",
        beams=0, penalty=0.0, validation_pairs=0, test_pairs=0,
    )  # fmt: skip
    data = hashlib.sha256(experiment.train.source.tobytes() + experiment.train.target.tobytes())
    digest = hashlib.sha256((repr(shared) + data.hexdigest()).encode()).hexdigest()[:8]
    return out / "checkpoints" / f"{name(experiment)}-{digest}"


def name(experiment: Experiment) -> str:
    """Of the files of an experiment."""
    return "".join(c if c.isalnum() else "-" for c in experiment.corpus.title.split(",")[0].lower())


def _loss(model):
    @jax.jit
    def part(params, source, target):
        source, target = (side.astype(jnp.int32) for side in (source, target))
        logits: Any = model.apply(params, source, target)
        each = cross_entropy(logits, target)
        return each.sum(), jnp.sum(target != PAD)

    def loss(params, tokens):
        rows, size = tokens.packed, 16
        more = -len(rows.source) % size
        source, target = (np.pad(side, [(0, more), (0, 0)]) for side in rows)
        parts = [
            part(params, source[i : i + size], target[i : i + size])
            for i in range(0, len(source), size)
        ]
        total, number = np.array(jax.device_get(parts), np.float64).sum(0)
        return float(total / number)

    return loss


def _generate(search, params, tokens, tokenizer, settings):
    rows = text.generate(search, params, tokens.sources, 100, settings.source_length)
    return text.decode(tokenizer, rows)


def _rows(settings, sources, targets):
    """Lengths of packed rows, in the ratio of the tokens on the two sides."""
    a, b = sum(map(len, sources)), sum(map(len, targets))
    longer = settings.row

    def length(mine, theirs, longest):
        share = longer if mine >= theirs else longer * mine / theirs
        return max(longest, 8 * math.ceil(share / 8))

    return length(a, b, settings.source_length), length(b, a, settings.target_length)


def _some(pairs: Pairs, number: int | None) -> Pairs:
    """So many of the pairs, drawn once and for all, in their order."""
    if number is None or number >= len(pairs.source):
        return pairs
    drawn = np.sort(np.random.default_rng(0).permutation(len(pairs.source))[:number])
    return Pairs(*([side[i] for i in drawn] for side in pairs))


def _last_turn(history: str) -> str:
    return history[history.rindex("<user>") :] if "<user>" in history else history
