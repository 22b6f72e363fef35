"""Somebody's trainer: Flax Linen, TrainState, optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits

import sparsereg_jax as sj

digits = load_digits()
images, labels = jnp.asarray(digits.data / 16, jnp.float32), jnp.asarray(digits.target)


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(64)(x))
        return nn.Dense(10)(x)


@jax.jit
def train_step(state, x, y):
    def loss_fn(params):
        logits = state.apply_fn(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return state.apply_gradients(grads=jax.grad(loss_fn)(state.params))


def train_epoch(state):
    order = np.random.default_rng(int(state.step)).permutation(1200)
    for batch in order.reshape(-1, 100):
        state = train_step(state, images[batch], labels[batch])
    return state


@jax.jit
def accuracy(params):
    return jnp.mean(jnp.argmax(MLP().apply(params, images[1200:]), -1) == labels[1200:])


def main(epochs=20):
    tx = sj.hold_zeros(sj.selective_adam(5e-3))
    params = MLP().init(jax.random.key(0), images[:1])
    state = TrainState.create(apply_fn=MLP().apply, params=params, tx=tx)
    for _ in range(epochs):
        state = train_epoch(state)
    step = sj.fraction_step(0.2)
    pruning = sj.iterative_pruning(tx, train_epoch, accuracy, step, bound=0.9, max_checks=25)
    state = sj.run_pruning(pruning, pruning.init(state))[0].good
    return state.params, accuracy(state.params)
