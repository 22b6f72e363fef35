"""Somebody's trainer: Flax NNX and nnx.Optimizer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import sparsereg_jax as sj

digits = load_digits()
images, labels = jnp.asarray(digits.data / 16, jnp.float32), jnp.asarray(digits.target)


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(64, 64, rngs=rngs)
        self.out = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.hidden(x)))


@nnx.jit
def train_step(model, optimizer, x, y):
    def loss_fn(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    optimizer.update(model, nnx.grad(loss_fn)(model))


def train_epoch(model, optimizer):
    order = np.random.default_rng(int(optimizer.step[...])).permutation(1200)
    for batch in order.reshape(-1, 100):
        train_step(model, optimizer, images[batch], labels[batch])
    return nnx.state(model, nnx.Param)


@functools.partial(jax.jit, static_argnums=0)
def accuracy(graphdef, params):
    logits = nnx.merge(graphdef, params)(images[1200:])
    return jnp.mean(jnp.argmax(logits, -1) == labels[1200:])


def main(epochs=20):
    model = MLP(nnx.Rngs(0))
    tx = sj.hold_zeros(sj.selective_adam(5e-3))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    evaluate = functools.partial(accuracy, nnx.graphdef(model))
    for _ in range(epochs):
        params = train_epoch(model, optimizer)

    def train(record):
        nnx.update(model, record.params)
        optimizer.opt_state = record.opt_state
        return sj.Record(train_epoch(model, optimizer), optimizer.opt_state)

    pruning = sj.iterative_pruning(tx, train, evaluate, sj.fraction_step(0.2), 0.9, max_checks=25)
    state, _ = sj.run_pruning(pruning, pruning.init(sj.Record(params, optimizer.opt_state)))
    params = state.good.params
    return params, evaluate(params)
