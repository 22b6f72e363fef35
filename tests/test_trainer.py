"""The image trainer: one step against NumPy, scan against a loop, batch norm, augmentation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import sparsereg_jax as sj
from examples import augment, batch_last, data, models, trainer

RANDOM = np.random.default_rng(0)


def images(number, shape=(28, 28, 1), classes=10):
    return data.Images(
        RANDOM.standard_normal((number, *shape), dtype=np.float32),
        RANDOM.integers(0, classes, number, dtype=np.int32),
    )


def linear(params, images):
    return images.reshape(images.shape[0], -1) @ params["w"]


def test_an_epoch_of_sgd_against_numpy():
    some = images(12, (2, 2, 1), 3)
    tx = optax.sgd(0.5)
    start = trainer.start({"w": jnp.zeros((4, 3))}, tx, 12, seed=3)
    train = trainer.trainer(trainer.stateless(linear), tx, some, 4, 3, smoothing=0.3)
    order = np.asarray(train(jax.tree.map(jnp.copy, start)).order)
    np.testing.assert_array_equal(np.sort(order), np.arange(12))
    assert not np.array_equal(order, np.arange(12))
    w = np.zeros((4, 3))
    for rows in order.reshape(3, 4):  # each image once an epoch, in the shuffled order
        x, y = some.images[rows].reshape(4, 4).astype(np.float64), np.eye(3)[some.labels[rows]]
        logits = x @ w
        chance = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        w -= 0.5 * x.T @ (chance - (0.7 * y + 0.1)) / 4
    record = train(start)
    np.testing.assert_allclose(record.params["w"], w, rtol=1e-5, atol=1e-6)
    assert int(record.step) == 3


@pytest.mark.parametrize(
    "augmented",
    [
        pytest.param(None, marks=pytest.mark.slow),
        functools.partial(augment.crop_and_flip, margin=2),
    ],
)
def test_a_scan_and_a_loop_of_steps_give_the_same(augmented):
    some = images(40, (8, 8, 3))
    model = nn.Sequential([nn.Conv(4, (3, 3)), nn.relu, lambda x: x.mean((1, 2)), nn.Dense(10)])
    params = model.init(jax.random.key(0), some.images[:1])
    tx = sj.hold_zeros(sj.selective_adam(1e-2))
    records = [
        trainer.trainer(
            trainer.stateless(model.apply), tx, some, 8, 7, augment=augmented, scan=scan
        )(trainer.start(jax.tree.map(jnp.copy, params), tx, 40, seed=1))
        for scan in (True, False)
    ]
    for one, other in zip(*map(jax.tree.leaves, records), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


class Normalized(nn.Module):
    """One batch norm, so that its statistics can be worked out by hand."""

    @nn.compact
    def __call__(self, images, train=False):
        x = images.reshape(images.shape[0], -1)
        return nn.BatchNorm(use_running_average=not train, momentum=0.75)(x)


def test_running_statistics_are_carried_along():
    some, model = images(6, (1, 1, 10)), Normalized()
    variables = model.init(jax.random.key(0), some.images[:1])
    tx = optax.sgd(0.0)
    record = trainer.start(
        {"params": variables["params"]}, tx, 6, 0, {"batch_stats": variables["batch_stats"]}
    )
    train = trainer.trainer(trainer.with_batch_stats(model.apply), tx, some, 6, 2)
    record = train(record)
    mean = some.images.reshape(6, 10).mean(0)
    found = trainer.variables(record)["batch_stats"]["BatchNorm_0"]["mean"]
    np.testing.assert_allclose(found, (1 - 0.75**2) * mean, rtol=1e-5, atol=1e-6)

    def evaluate(variables):
        return jnp.abs(variables["batch_stats"]["BatchNorm_0"]["mean"]).sum()

    tx = sj.hold_zeros(tx)
    record = record._replace(opt_state=tx.init(record.params))
    train = trainer.trainer(trainer.with_batch_stats(model.apply), tx, some, 6, 1)
    pruning = sj.iterative_pruning(
        tx,
        train,
        evaluate,
        sj.fraction_step(0.5),
        bound=0.0,
        max_checks=1,
        mask=sj.every_parameter,
        view=trainer.variables,
    )
    _, history = sj.run_pruning(pruning, pruning.init(record))
    assert history[0].metric == pytest.approx((1 - 0.75**3) * np.abs(mean).sum(), rel=1e-5)


def test_bfloat16_computes_in_it_and_keeps_float32():
    seen = []

    def apply(params, images):
        seen.append((params["w"].dtype, images.dtype))
        return linear(params, images)

    some, tx = images(4, (2, 2, 1)), optax.sgd(0.1)
    forward = trainer.in_bfloat16(trainer.stateless(apply))
    record = trainer.start({"w": jnp.ones((4, 10))}, tx, 4, 0)
    record = trainer.trainer(forward, tx, some, 4, 1)(record)
    assert set(seen) == {(jnp.dtype(jnp.bfloat16),) * 2}
    assert record.params["w"].dtype == jnp.float32
    assert not np.array_equal(record.params["w"], np.ones((4, 10)))


def test_crop_and_flip_only_shifts_and_mirrors():
    image = np.arange(1, 26, dtype=np.float32).reshape(5, 5, 1)
    batch = jnp.asarray(np.repeat(image[None], 400, axis=0))
    changed = np.asarray(augment.crop_and_flip(jax.random.key(0), batch, margin=1))
    padded = np.pad(image, [(1, 1), (1, 1), (0, 0)])
    possible = [padded[i : i + 5, j : j + 5] for i in range(3) for j in range(3)]
    possible += [each[:, ::-1] for each in possible]
    counts = np.array([(changed == each).all((1, 2, 3)).sum() for each in possible])
    assert counts.sum() == 400
    assert counts.min() > 5  # all 18 occur, 22 times each on average
    shifted = np.asarray(augment.crop(jax.random.key(0), batch, margin=1, mode="edge"))
    padded = np.pad(image, [(1, 1), (1, 1), (0, 0)], mode="edge")
    possible = [padded[i : i + 5, j : j + 5] for i in range(3) for j in range(3)]
    counts = np.array([(shifted == each).all((1, 2, 3)).sum() for each in possible])
    assert counts.sum() == 400
    assert counts.min() > 15  # of 9


@pytest.mark.slow
@pytest.mark.parametrize(("number", "classes"), [(6, 10), (7, 3), (1, 3)])
def test_lenet5_with_the_batch_last_is_the_same_function(number, classes):
    some = images(number, classes=classes)
    some.images[:, :9] = some.images[:, :, :9] = -0.4  # a margin, where all of a window is equal
    model = models.LeNet5(classes)
    params = model.init(jax.random.key(0), some.images[:1])

    # Not of the images: which of two equal entries is larger in the last bit is another matter.
    def loss(apply, params, images):
        return jnp.sum(jnp.sin(apply(params, images)))

    x = jnp.asarray(some.images)
    wanted, found = (
        (apply(params, x), jax.grad(functools.partial(loss, apply))(params, x))
        for apply in (model.apply, batch_last.lenet5)
    )
    for one, other in zip(*map(jax.tree.leaves, (wanted, found)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5)


def test_accuracy_in_parts():
    some = images(12, (2, 2, 1), 3)
    params = {"w": jnp.asarray(RANDOM.standard_normal((4, 3)), jnp.float32)}
    wanted = np.mean(np.argmax(linear(params, some.images), 1) == some.labels)
    for batch in (None, 4, 12):
        assert float(trainer.accuracy(linear, some, batch)(params)) == pytest.approx(wanted)
    with pytest.raises(ValueError, match="batch=5 does not divide the 12 images"):
        trainer.accuracy(linear, some, 5)


def test_each_step_has_a_key_and_each_epoch_an_order_of_its_own():
    def loss(params, model_state, batch, key):
        del batch
        return params["w"] * jax.random.uniform(key), model_state

    tx = optax.sgd(1.0)
    train = trainer.interval(loss, tx, np.zeros(8, np.float32), 2, 1)
    record, at, orders = trainer.start({"w": jnp.zeros(())}, tx, 8, 0), [0.0], set()
    for _ in range(8):  # two epochs
        record = train(record)
        at.append(float(record.params["w"]))
        orders.add(tuple(np.asarray(record.order)))
    assert len(set(np.round(np.diff(at), 6))) == 8
    assert len(orders) == 2
