"""A language experiment: a corpus as tokens on the device, a Transformer, and its metrics."""

import hashlib
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

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
    """What all methods of an experiment share; each is a flag of the commands."""

    vocabulary: Annotated[int, "tokens of the byte-pair encoding, both sides together"]
    width: Annotated[int, "size of a token's vector"]
    hidden: Annotated[int, "width of the feed-forward layers"]
    heads: Annotated[int, "of attention"]
    layers: Annotated[int, "of the encoder, and as many of the decoder"]
    dropout: Annotated[float, "share of what is dropped in training"]
    source_length: Annotated[int, "tokens of the longest source, EOS included; the rest is cut off"]
    target_length: Annotated[int, "tokens of the longest target, likewise"]
    row: Annotated[int, "tokens of a packed row, on the side that has more of them"]
    batch: Annotated[int, "rows a step"]
    dense_epochs: Annotated[int, "epochs of the dense network"]
    loop_epochs: Annotated[int, "epochs of the pruning loop"]
    tune_epochs: Annotated[int, "epochs for which each reported network is tuned"]
    interval: Annotated[int, "batches between two checks, rounded up to steps of the optimizer"]
    share: Annotated[float, "the bound: this share of the dense BLEU, or the dense loss over it"]
    bound: Annotated[float | None, "instead of --share, the metric itself"] = None
    patience: Annotated[int | None, "stop when the metric fell at so many checks in a row"] = None
    fraction: Annotated[float, "of what is left, pruned at a check that meets the bound"] = 0.1
    metric: Annotated[str, "bleu, of greedy decoding, or loss, on validation pairs"] = "bleu"
    validation_pairs: Annotated[int, "validation pairs that the loop decodes"] = 300
    train_pairs: Annotated[int | None, "training pairs, drawn at random; None: all"] = None
    test_pairs: Annotated[int | None, "test pairs, drawn at random; None: all"] = None
    learning_rate: Annotated[float, "of Adam, at its highest"] = 1e-3
    warmup: Annotated[float, "share of the dense training in which the learning rate rises"] = 0.1
    accumulate: Annotated[int, "batches whose gradients are averaged for one step"] = 1
    cosine: Annotated[float, "share of a cosine that the loop's rate goes down; 0: constant"] = 1.0
    smoothing: Annotated[float, "of the labels"] = 0.0
    bfloat16: Annotated[bool, "train with products of bfloat16, the sums in float32"] = False
    beams: Annotated[int, "of beam search, on the test pairs"] = 4
    penalty: Annotated[float, "exponent of the length by which a beam's score is divided"] = 0.6


class Tokens(NamedTuple):
    """A split as tokens."""

    sources: list[np.ndarray]  # each with EOS
    references: list[str]
    packed: text.Packed


class Scores(NamedTuple):
    """What a network reaches."""

    validation_loss: float  # nats a token
    validation_bleu: float  # of greedy decoding, on the pairs that the loop decodes
    loss: float  # on the test pairs, as the following ones
    bleu: float  # of beam search
    chrf: float
    outputs: list[str]
    scoring_seconds: float  # that it took to measure all this


class Experiment(NamedTuple):
    """What the runs of an experiment share."""

    settings: Settings
    corpus: Corpus
    digest: str  # of the text
    tokenizer: sentencepiece.SentencePieceProcessor
    model: Transformer
    train_pairs: Pairs
    test_pairs: Pairs
    train: text.Packed
    validation: Tokens
    few: Tokens  # validation pairs that the loop decodes
    test: Tokens
    steps: int  # batches an epoch
    loss: Callable[[Any, Tokens], float]  # of params, nats a token
    greedy: Callable[[Any, jax.Array], jax.Array]
    search: Callable[[Any, jax.Array], jax.Array]  # beam search
    known: float  # see :func:`known`


# The tokenization nearest to that of the paper's figures.
BLEU = sacrebleu.metrics.BLEU(tokenize="intl")
CHRF = sacrebleu.metrics.CHRF()


def load(settings: Settings, corpus: Corpus) -> Experiment:
    """Learns the tokens from the training pairs, encodes all and makes the network.

    Raises:
      ValueError: a setting is out of range or does not fit the corpus.
    """
    _check(settings, corpus)
    train_pairs, test_pairs = (
        _some(corpus.train, settings.train_pairs),
        _some(corpus.test, settings.test_pairs),
    )
    learned = [*dict.fromkeys(train_pairs.source), *train_pairs.target]
    if corpus.symbols:  # each history repeats the one before: the replies and last turns say all
        learned = [*train_pairs.target, *map(_last_turn, train_pairs.source)]
    try:
        tokenizer = text.train_tokenizer(learned, settings.vocabulary, corpus.symbols)
    except RuntimeError as error:
        raise ValueError(f"vocabulary: {settings.vocabulary} does not fit: {error}") from error
    model = network(settings, tokenizer.vocab_size())

    def tokens(pairs: Pairs) -> Tokens:
        sources = encoded(settings, tokenizer, pairs.source, bool(corpus.symbols))
        targets = text.encode(tokenizer, pairs.target, settings.target_length)
        # Neighbours in a file are alike, and a row keeps its sentences for all epochs: shuffled.
        order = np.random.default_rng(0).permutation(len(sources))
        packed = text.pack(
            [sources[i] for i in order],
            [targets[i] for i in order],
            *_rows(settings, sources, targets),
        )
        return Tokens(sources, list(pairs.target), packed)

    train = tokens(train_pairs).packed
    if settings.batch > len(train.source):
        raise ValueError(
            f"batch: {settings.batch} rows are more than the {len(train.source)} of training."
        )
    return Experiment(
        settings,
        corpus,
        _digest(corpus),
        tokenizer,
        model,
        train_pairs,
        test_pairs,
        train,
        tokens(corpus.validation),
        tokens(_some(corpus.validation, settings.validation_pairs)),
        tokens(test_pairs),
        len(train.source) // settings.batch,
        _loss(model),
        decoding.greedy(model, settings.target_length),
        search(settings, model),
        known(train_pairs, test_pairs),
    )


def _digest(corpus: Corpus) -> str:
    """The hash of ``repr(corpus)``, which of millions of pairs would take gigabytes, in pieces."""

    def pieces(value: Any) -> Iterator[str]:
        if hasattr(value, "_fields"):
            yield f"{type(value).__name__}("
            for i, (name, each) in enumerate(zip(value._fields, value, strict=True)):
                yield f"{', ' if i else ''}{name}="
                yield from pieces(each)
            yield ")"
        elif isinstance(value, list):
            yield "["
            for i, each in enumerate(value):
                yield f"{', ' if i else ''}{each!r}"
            yield "]"
        else:
            yield repr(value)

    digest = hashlib.sha256()
    for piece in pieces(corpus):
        digest.update(piece.encode())
    return digest.hexdigest()[:16]


def network(settings: Settings, vocabulary: int) -> Transformer:
    """The Transformer of these sizes."""
    return Transformer(
        vocabulary,
        settings.width,
        settings.hidden,
        settings.heads,
        settings.layers,
        settings.source_length,
        settings.target_length,
        settings.dropout,
    )


def encoded(
    settings: Settings,
    tokenizer: sentencepiece.SentencePieceProcessor,
    sources: Sequence[str],
    dialogue: bool,
) -> list[np.ndarray]:
    """Sources as tokens; of what is too long, a history keeps its end and a text its beginning."""
    keep = "last" if dialogue else "first"
    return text.encode(tokenizer, sources, settings.source_length, keep)


def search(settings: Settings, model: Transformer) -> Callable[[Any, jax.Array], jax.Array]:
    """Beam search: from params and sources to the likeliest outputs."""
    beam = decoding.beam_search(model, settings.target_length, settings.beams, settings.penalty)
    return lambda params, source: beam(params, source)[0]


def _check(settings: Settings, corpus: Corpus) -> None:
    zero = ("dropout", "smoothing", "penalty", "warmup", "cosine", "share", "bound", "dense_epochs")
    for name, value in settings._asdict().items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number and (value < 0 or (value == 0 and name not in zero)):
            raise ValueError(f"{name}: {value} is too small.")
    for name in ("dropout", "smoothing", "warmup"):
        if getattr(settings, name) >= 1:
            raise ValueError(f"{name}: {getattr(settings, name)} must be less than 1.")
    for name in ("fraction", "share", "cosine"):
        if getattr(settings, name) > 1:
            raise ValueError(f"{name}: {getattr(settings, name)} is a share, 1 at most.")
    if settings.metric not in ("bleu", "loss"):
        raise ValueError(f"metric: {settings.metric!r} is neither 'bleu' nor 'loss'.")
    if settings.width % settings.heads:
        raise ValueError(f"heads: {settings.heads} do not divide the width, {settings.width}.")
    for name in ("train", "validation", "test"):
        if not getattr(corpus, name).source:
            raise ValueError(f"{corpus.title}: there are no {name} pairs.")


def known(train: Pairs, test: Pairs) -> float:
    """The share of test pairs whose target is that of a training pair too."""
    targets = set(train.target)
    return float(np.mean([target in targets for target in test.target]))


def metric(experiment: Experiment, params: Any) -> float:
    """What steers the loop: greedy BLEU on some validation pairs, or the loss on all of them."""
    if experiment.settings.metric == "loss":
        return experiment.loss(params, experiment.validation)
    return greedy_bleu(experiment, params)


def greedy_bleu(experiment: Experiment, params: Any) -> float:
    """On the validation pairs that the loop decodes."""
    few = experiment.few
    return bleu(_generate(experiment, experiment.greedy, params, few), few.references)


def bleu(outputs: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU, sacrebleu's with the tokenization ``intl``."""
    return BLEU.corpus_score(list(outputs), [list(references)]).score


def signatures() -> list[str]:
    """sacrebleu's, of BLEU and chrF; it has them only when something was scored."""
    for metric in (BLEU, CHRF):
        metric.corpus_score(["a"], [["a"]])
    return [str(metric.get_signature()) for metric in (BLEU, CHRF)]


def scores(experiment: Experiment, params: Any) -> Scores:
    """On validation pairs; on the test pairs by beam search."""
    began, test = time.monotonic(), experiment.test
    outputs = _generate(experiment, experiment.search, params, test)
    numbers = (
        experiment.loss(params, experiment.validation),
        greedy_bleu(experiment, params),
        experiment.loss(params, test),
        bleu(outputs, test.references),
        CHRF.corpus_score(outputs, [test.references]).score,
    )
    return Scores(*numbers, outputs, time.monotonic() - began)


def train_loss(model: Transformer, settings: Settings) -> trainer.Loss:
    """The mean over a batch's tokens of the cross-entropy with smoothed labels, while dropping."""
    model = model.clone(bfloat16=settings.bfloat16)

    def loss(params, model_state, batch, key):
        source, target = (side.astype(jnp.int32) for side in batch)
        logits: Any = model.apply(params, source, target, train=True, rngs={"dropout": key})
        each = cross_entropy(logits, target, settings.smoothing)
        return each.sum() / jnp.maximum(1, jnp.sum(target != PAD)), model_state

    return loss


def cross_entropy(logits: jax.Array, target: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """Cross-entropy of each token with smoothed labels (Szegedy et al. 2016, section 7).

    With s = ``smoothing``, p the softmax of the logits and V tokens it is
    -(1 - s) log p[target] - (s / V) sum_v log p[v]; 0 where the target is ``PAD``.

    Args:
      logits: shape=[..., V]; computed in float32.
      target: shape=[...], tokens.
      smoothing: in [0, 1).

    Returns:
      float32, shape=[...], in nats.
    """
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
    loss = train_loss(experiment.model, settings)
    return trainer.interval(loss, tx, experiment.train, settings.batch, steps)


def parts(experiment: Experiment) -> int:
    """So many parts has an epoch, after which a checkpoint may be: 5,000 batches at most."""
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
) -> tuple[trainer.Record, float]:
    """Trains the dense network of a seed: Adam, its learning rate rising, then falling as a cosine.

    Args:
      experiment: the corpus and the network.
      seed: of the initial weights, of the order of the rows and of what is dropped.
      folder: for checkpoints; a training that was cut off, or one that is done, is taken up there.
      overdue: asked after each epoch whether to save a checkpoint and stop.
      progress_bar: shows one.

    Returns:
      The record, without optimizer state, and the seconds of training.

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
    record, seconds = checkpoints.epochs(
        lambda record, epoch: train(jax.tree.map(jnp.copy, record)),
        record,
        settings.dense_epochs * parts(experiment),
        folder,
        overdue,
        f"dense, seed {seed}" if progress_bar else None,
    )
    return record._replace(opt_state=()), seconds


def folder(out: Path, experiment: Experiment) -> Path:
    """The folder for checkpoints of all runs that start from the same dense networks."""
    shared = experiment.settings._replace(
        loop_epochs=0, tune_epochs=0, interval=0, share=0.0, bound=None, patience=None,
        fraction=0.0, metric="", cosine=0.0, beams=0, penalty=0.0, validation_pairs=0, test_pairs=0,
    )  # fmt: skip
    digest = hashlib.sha256((repr(shared) + experiment.digest).encode()).hexdigest()[:8]
    return out / "checkpoints" / f"{name(experiment)}-{digest}"


def name(experiment: Experiment) -> str:
    """Of the files of an experiment."""
    return re.sub(r"[\W_]+", "-", experiment.corpus.title.lower()).strip("-")


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


def _generate(experiment, decode, params, tokens):
    rows = text.generate(decode, params, tokens.sources, 100, experiment.settings.source_length)
    return text.decode(experiment.tokenizer, rows)


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
