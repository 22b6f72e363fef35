"""The Transformer, its decoding, packing and loss: against references written out plainly."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples import translation
from examples.language import decoding, experiment, products, text
from examples.language.methods import plain_adam
from examples.language.transformer import EOS, PAD, Transformer, positions, segments

from .programs import equations

VOCABULARY = 6
MODEL = Transformer(VOCABULARY, 16, 24, heads=2, layers=2, source_length=12, target_length=12)
EXACT = translation.USUAL._replace(smoothing=0.0, bfloat16=False)


@pytest.fixture(scope="module")
def params():
    """Weights large enough that tokens matter."""
    tokens = jnp.full((1, 4), EOS)
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), tokens, tokens)
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.5 * rng.standard_normal(leaf.shape), leaf.dtype), shapes
    )


APPLY = jax.jit(MODEL.apply)


def logits(params, source, target):
    """Rows are filled up to one length, so that one program does: padding changes nothing."""
    rows = [[*tokens, *[PAD] * (12 - len(tokens))] for tokens in (source, target)]
    found = APPLY(params, *(jnp.array([row]) for row in rows))[0]
    return np.asarray(found[: len(target)], np.float64)


def log_probabilities(params, source, target):
    """Among all but padding, which is no word."""
    found = np.exp(logits(params, source, target))
    found[:, PAD] = 0
    with np.errstate(divide="ignore"):
        return np.log(found / found.sum(-1, keepdims=True))


def test_sentences_of_a_row():
    row = jnp.array([[4, 5, EOS, 3, EOS, EOS, PAD, PAD], [3, 3, 3, 3, 3, 3, 3, EOS]])
    np.testing.assert_array_equal(
        segments(row), [[1, 1, 1, 2, 2, 3, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]]
    )
    np.testing.assert_array_equal(
        positions(row), [[0, 1, 2, 0, 1, 0, 0, 0], [0, 1, 2, 3, 4, 5, 6, 7]]
    )


def test_no_position_sees_the_future_or_itself(params):
    source, target = [3, 4, EOS], [2, 3, 4, 5, EOS]
    usual = logits(params, source, target)
    for i in range(4):
        for token in {2, 3, 4, 5} - {target[i]}:
            changed = logits(params, source, [*target[:i], token, *target[i + 1 :]])
            np.testing.assert_array_equal(changed[: i + 1], usual[: i + 1])
            assert np.abs(changed[i + 1] - usual[i + 1]).max() > 1e-5  # the next one is told


def test_packing_and_padding_change_nothing(params):
    sources = [[3, 4, EOS], [5, EOS], [2, 2, 3, EOS]]
    targets = [[4, EOS], [2, 3, 5, EOS], [3, EOS]]
    packed = logits(
        params, [*itertools.chain(*sources), PAD, PAD], [*itertools.chain(*targets), PAD, PAD, PAD]
    )
    start = 0
    for source, target in zip(sources, targets, strict=True):
        alone = logits(params, source, target)
        np.testing.assert_allclose(packed[start : start + len(target)], alone, atol=2e-5)
        start += len(target)
    other = [[5, 5, EOS], *sources[1:]]  # another first source: only the first target changes
    changed = logits(
        params, [*itertools.chain(*other), PAD, PAD], [*itertools.chain(*targets), PAD, PAD, PAD]
    )
    np.testing.assert_allclose(changed[2:8], packed[2:8], atol=2e-5)
    assert np.abs(changed[:2] - packed[:2]).max() > 1e-3
    assert np.isfinite(packed).all()


def greedy_reference(params, source, length):
    """The whole network anew for each token."""
    found = []
    while len(found) < length:
        found.append(int(log_probabilities(params, source, [*found, 2])[-1].argmax()))
        if found[-1] == EOS:
            break
    return found + [PAD] * (length - len(found))


SOURCES = [[3, 4, EOS, PAD, PAD], [5, 5, 2, 2, EOS], [2, EOS, PAD, PAD, PAD], [4, 3, 2, EOS, PAD]]


def test_greedy_against_an_uncached_reference(params):
    found = decoding.greedy(MODEL, 7)(params, jnp.array([*SOURCES, [PAD] * 5]))
    for row, source in zip(found, SOURCES, strict=False):
        assert list(row) == greedy_reference(params, [t for t in source if t != PAD], 7)
    assert not np.asarray(found[-1]).any()  # a row that only fills the batch


def test_a_step_with_the_cache_is_a_position_of_the_whole(params):
    tokens = [3, 5, 2, 4]
    memory = MODEL.apply(params, jnp.array(SOURCES), method=MODEL.encode)

    @jax.jit
    def step(token, position, cache):
        tokens = jnp.full(len(SOURCES), token)
        return MODEL.apply(params, tokens, position, memory, cache, method=MODEL.next_token)

    cache = MODEL.empty_cache(len(SOURCES), 7, jnp.float32)  # two slots are never filled
    for position, token in enumerate([EOS, *tokens]):
        found, cache = step(token, position, cache)
        for row, source in zip(found, SOURCES, strict=True):
            whole = logits(params, [t for t in source if t != PAD], [*tokens, EOS])
            np.testing.assert_allclose(row, whole[position], atol=2e-5)


def all_hypotheses(params, source, length):
    """(log probability, tokens) of every hypothesis that ends, one by one."""
    found = []
    for size in range(length):
        for middle in itertools.product(range(2, VOCABULARY), repeat=size):
            tokens = [*middle, EOS]
            log = log_probabilities(params, source, tokens)
            found.append((sum(log[i, token] for i, token in enumerate(tokens)), tokens))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("penalty", [0.0, 0.6, 2.0])
def test_wide_beam_search_against_brute_force(params, penalty):
    length = 4
    search = decoding.beam_search(MODEL, length, beams=64, penalty=penalty)
    tokens, scores = search(params, jnp.array(SOURCES[:2]))
    for row, score, source in zip(tokens, scores, SOURCES[:2], strict=True):
        every = all_hypotheses(params, [t for t in source if t != PAD], length)
        best = max((log / len(found) ** penalty, found) for log, found in every)
        np.testing.assert_allclose(score, best[0], rtol=1e-4)
        assert list(row) == best[1] + [PAD] * (length - len(best[1]))


def beam_reference(params, source, length, beams, penalty):
    """The search in plain Python, without a cache and without stopping early."""
    alive, ended = [(0.0, [])], []
    for size in range(1, length + 1):
        following = []
        for log, tokens in alive:
            for token, more in enumerate(log_probabilities(params, source, [*tokens, 2])[-1]):
                following.append((log + more, [*tokens, token]))
        following = sorted(following, reverse=True)[: 2 * beams]
        ended += [(log / size**penalty, t) for log, t in following if t[-1] == EOS]
        ended = sorted(ended, reverse=True)[:beams]
        alive = [(log, t) for log, t in following if t[-1] != EOS][:beams]
    return ended[0] if ended else (alive[0][0] / length**penalty, alive[0][1])


@pytest.mark.slow
@pytest.mark.parametrize(("beams", "penalty"), [(1, 0.0), (2, 0.6), (3, 1.2)])
def test_narrow_beam_search_against_a_plain_one(params, beams, penalty):
    tokens, scores = decoding.beam_search(MODEL, 6, beams, penalty)(params, jnp.array(SOURCES))
    for row, score, source in zip(tokens, scores, SOURCES, strict=True):
        best = beam_reference(params, [t for t in source if t != PAD], 6, beams, penalty)
        np.testing.assert_allclose(score, best[0], rtol=1e-4)
        assert list(row) == best[1] + [PAD] * (6 - len(best[1]))


@pytest.mark.slow
def test_where_nothing_ends_the_likeliest_is_given(params):
    never = jax.tree.map(lambda w: w, params)
    table = never["params"]["embedding"]["embedding"]
    never["params"]["embedding"]["embedding"] = table.at[EOS].set(-100 * jnp.sign(table[3]))
    one, _ = decoding.beam_search(MODEL, 4, 2, 0.6)(never, jnp.array(SOURCES[:1]))
    if EOS in np.asarray(one):
        pytest.fail("the hypothesis was to have no end")
    best = beam_reference(never, [3, 4, EOS], 4, 2, 0.6)
    assert list(one[0]) == best[1]


@pytest.mark.parametrize("leading", [(5,), (3, 40), (2, 3, 5)])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_products_against_numpy(leading, axis, bfloat16):
    """In float64, of the operands and the gradient as they are or rounded to bfloat16."""
    rng = np.random.default_rng(0)
    x, given = (rng.standard_normal((*leading, size)).astype(np.float32) for size in (64, 96))
    weights = rng.standard_normal((64, 96) if axis == 0 else (96, 64)).astype(np.float32)

    @jax.jit
    def found(x, weights, given):
        y, back = jax.vjp(lambda *both: products.multiplication(bfloat16)(*both, axis), x, weights)
        return y, *back(given)

    def exactly(value):
        return value.astype(jnp.bfloat16 if bfloat16 else np.float64).astype(np.float64)

    a, b, c = (exactly(value) for value in (x, weights, given))
    matrix = b if axis == 0 else b.T
    of_matrix = np.einsum("ni,nj->ij", a.reshape(-1, 64), c.reshape(-1, 96))
    wanted = a @ matrix, c @ matrix.T, of_matrix if axis == 0 else of_matrix.T
    for got, right, like in zip(found(x, weights, given), wanted, (given, x, weights), strict=True):
        assert got.dtype == like.dtype
        np.testing.assert_allclose(got, right, rtol=1e-4, atol=1e-4)


def test_rounded_products_keep_dtypes():
    x, weights = jnp.ones((2, 3), jnp.float16), jnp.ones((3, 4), jnp.float32)
    y, back = jax.vjp(products.rounded_product, x, weights)
    of_x, of_weights = back(y)
    assert (y.dtype, of_x.dtype, of_weights.dtype) == (jnp.float16, jnp.float16, jnp.float32)


def test_loss_against_numpy():
    rng = np.random.default_rng(0)
    values, target = rng.standard_normal((2, 3, 7)), np.array([[3, EOS, PAD], [6, 2, EOS]])
    log = values - np.log(np.exp(values).sum(-1, keepdims=True))
    for smoothing in (0.0, 0.1):
        wanted = (1 - smoothing) * np.eye(7)[target] + smoothing / 7
        each = -(wanted * log).sum(-1) * (target != PAD)
        found = experiment.cross_entropy(jnp.asarray(values), jnp.asarray(target), smoothing)
        np.testing.assert_allclose(found, each, rtol=1e-5, atol=1e-6)


def test_loss_counts_tokens_not_rows(params):
    source, target = jnp.array([[3, EOS, PAD], [4, 2, EOS]]), jnp.array([[4, EOS], [EOS, PAD]])
    still = MODEL.clone(dropout=0.0)
    loss = jax.jit(experiment.train_loss(still, EXACT))
    value, _ = loss(params, {}, (source, target), jax.random.key(0))
    logs = [
        np.asarray(jax.nn.log_softmax(logits(params, source, target)))
        for source, target in (([3, EOS], [4, EOS]), ([4, 2, EOS], [EOS]))
    ]
    wanted = -(logs[0][0, 4] + logs[0][1, EOS] + logs[1][0, EOS]) / 3
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    lower, _ = jax.jit(experiment.train_loss(still, EXACT._replace(bfloat16=True)))(
        params, {}, (source, target), jax.random.key(0)
    )
    assert lower.dtype == jnp.float32
    np.testing.assert_allclose(lower, wanted, rtol=0.05)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_training_rounds_each_product_with_weights(params, bfloat16):
    """Of two layers: 4 and 2 in the encoder's, 8 and 2 in the decoder's, and the output's."""
    batch = jnp.array([[3, EOS, PAD]]), jnp.array([[4, EOS]])
    loss = experiment.train_loss(MODEL, EXACT._replace(bfloat16=bfloat16))
    program = jax.make_jaxpr(jax.grad(lambda *given: loss(*given)[0]))(
        params, {}, batch, jax.random.key(0)
    )
    products = [
        tuple(str(variable.aval.dtype) for variable in (*equation.invars, *equation.outvars))
        for equation in equations(program.jaxpr)
        if equation.primitive.name == "dot_general"
    ]
    rounded = [types for types in products if types[:2] == ("bfloat16", "bfloat16")]
    assert set(rounded) <= {("bfloat16", "bfloat16", "float32")}
    assert len(rounded) == (3 * (2 * (6 + 10) + 1) if bfloat16 else 0)
    assert set(products) - set(rounded) == {("float32",) * 3}


@pytest.mark.slow
def test_training_drops_and_smooths(params):
    """What is dropped changes with the key; smoothed labels give the loss written out."""
    batch = (jnp.array([[3, EOS, PAD], [4, 2, EOS]]), jnp.array([[4, EOS], [EOS, PAD]]))

    def losses(dropout, smoothing):
        model, settings = MODEL.clone(dropout=dropout), EXACT._replace(smoothing=smoothing)
        loss = experiment.train_loss(model, settings)
        keys = jax.random.split(jax.random.key(0), 8)
        return np.asarray(jax.jit(jax.vmap(lambda key: loss(params, {}, batch, key)[0]))(keys))

    still, dropped, smooth = losses(0.0, 0.0), losses(0.5, 0.0), losses(0.0, 0.3)
    assert np.ptp(still) == 0
    assert len(set(dropped)) == 8
    logs = [
        np.asarray(jax.nn.log_softmax(logits(params, source, target)))
        for source, target in (([3, EOS], [4, EOS]), ([4, 2, EOS], [EOS]))
    ]
    rows = [(logs[0][0], 4), (logs[0][1], EOS), (logs[1][0], EOS)]
    wanted = -sum(0.7 * row[token] + 0.3 * row.mean() for row, token in rows) / 3
    np.testing.assert_allclose(smooth, wanted, rtol=1e-5)


def test_accumulated_batches_step_as_one():
    """Adam on the mean of two gradients, in numbers that can be written down."""
    settings = translation.USUAL._replace(accumulate=2)
    tx = experiment.accumulated(settings, plain_adam(0.1))
    params = jnp.array([1.0, -2.0])
    state, update = tx.init(params), jax.jit(tx.update)
    gradients = [jnp.array([1.0, 4.0]), jnp.array([3.0, -6.0])]
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        if gradient is gradients[0]:
            np.testing.assert_array_equal(params, [1.0, -2.0])
    # The first step of Adam is the learning rate, against the sign of the mean.
    np.testing.assert_allclose(params, [0.9, -1.9], rtol=1e-5)
    assert experiment.accumulated(settings._replace(accumulate=1), tx) is tx


def test_tokens_are_learned_alike_from_a_sample(monkeypatch):
    monkeypatch.setattr(text, "LEARNED_FROM", 60)
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghij"), 4)) for _ in range(80)]
    lines = [" ".join(rng.choice(words, 6)) for _ in range(300)]
    first, second = (text.train_tokenizer(lines, 80) for _ in range(2))
    assert first.serialized_model_proto() == second.serialized_model_proto()
    monkeypatch.setattr(text, "LEARNED_FROM", 300)
    whole = text.train_tokenizer(lines, 80)
    assert whole.serialized_model_proto() != first.serialized_model_proto()
    rows = np.array([[*first.encode("abcd"), EOS, 7, PAD]])
    assert text.decode(first, rows) == ["abcd"]


def test_pack_keeps_every_pair_once_and_together():
    rng = np.random.default_rng(0)
    sources = [[*rng.integers(2, 9, rng.integers(0, 9)), EOS] for _ in range(300)]
    targets = [[*rng.integers(2, 9, rng.integers(0, 7)), EOS] for _ in range(300)]
    packed = text.pack(sources, targets, 24, 20, open_rows=8)
    assert packed.source.dtype == np.uint16

    def sentences(row):
        ends = np.flatnonzero(row == EOS) + 1
        assert not row[ends[-1] :].any()
        return [tuple(part) for part in np.split(row, ends)[:-1]]

    found = []
    for source, target in zip(*packed, strict=True):
        found += zip(sentences(source), sentences(target), strict=True)
    wanted = [(tuple(s), tuple(t)) for s, t in zip(sources, targets, strict=True)]
    assert sorted(found) == sorted(wanted)
    tokens = sum(map(len, sources))
    assert math.isclose(packed.padding()[0], 1 - tokens / packed.source.size)
    assert packed.padding()[0] < 0.2
    with pytest.raises(ValueError, match=r"pair 1 has 25 and 1 tokens; a row has 24 and 20"):
        text.pack([[EOS], [2] * 24 + [EOS]], [[EOS], [EOS]], 24, 20)


def test_generate_gives_outputs_in_the_order_of_the_sources():
    def reverse(params, rows):
        return np.asarray(rows)[:, ::-1]

    sources = [[7, 8, EOS], [9, EOS], [3, 4, 5, EOS], [2, EOS], [6, EOS]]
    found = text.generate(reverse, None, sources, batch=2, length=6)
    assert [[t for t in row if t != PAD] for row in found] == [source[::-1] for source in sources]
