"""Random small networks with planted zeros: is the compacted network the same function?

    python -m tests.random_graphs --count 1000

The outputs of each, in float32 or bfloat16; of some also those at another batch size, the gradients
of the kept entries that are not zero, and that compacting again finds nothing more.
"""

import argparse
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from tqdm import tqdm

import sparsereg_jax as sj


@jax.custom_vjp
def clipped(x):
    """The identity with a gradient of its own."""
    return x * 1.0


clipped.defvjp(lambda x: (x * 1.0, x), lambda x, g: (jnp.clip(g, -0.5, 0.5) * (jnp.abs(x) < 3),))

ACTIVATIONS = (
    jax.nn.relu,
    jnp.tanh,
    jax.nn.gelu,
    jax.nn.silu,
    jax.nn.sigmoid,
    jax.nn.softplus,
    jax.nn.elu,
    jax.nn.leaky_relu,
    jax.nn.softmax,
    clipped,
    jnp.square,
    jax.nn.relu6,
)


class Network:
    """A network whose structure is drawn from a seed, anew at each call and always the same."""

    def __init__(self, seed, kind):
        self.seed, self.kind = seed, kind

    def init(self, x):
        """Params with planted zeros, and whether what comes out depends on what goes in.

        Where it does not they are drawn again, each time with fewer zeros: between two constants
        nothing that is cut wrongly could be seen.
        """
        shapes = {}

        def make(name, shape):
            shapes[name] = shape
            return jnp.zeros(shape)

        jax.eval_shape(lambda x: self(make, x), x)
        forward = jax.jit(self)
        for attempt in range(40):
            rng = np.random.default_rng([self.seed, 1, attempt])
            found = {
                name: rng.normal(size=shape).astype(np.float32) / np.sqrt(max(1, shape[0]))
                for name, shape in shapes.items()
            }
            params = plant(found, rng, 0.93**attempt)
            y = np.asarray(forward(params, x), np.float64)
            if np.ptp(y, axis=0).max() > 0.02 * np.abs(y).max():
                return params, True
        return params, False

    def __call__(self, params, x):
        rng = np.random.default_rng(self.seed)
        names = iter(range(10**6))

        def param(*shape):
            name = f"p{next(names):03}"
            return params(name, shape) if callable(params) else params[name]

        if self.kind == "image":
            x = images(rng, param, x)
        elif self.kind == "tokens":
            x = sequence(rng, param, x)
        return features(rng, param, x)


def plant(params, rng, share=1.0):
    """Zeros: slices of single leaves, one index of every axis of some size, single entries."""
    params = {name: value.copy() for name, value in params.items()}
    for value in params.values():
        for axis in range(value.ndim):
            if rng.random() < 0.25 * share and value.shape[axis] > 1:
                dead = rng.random(value.shape[axis]) < rng.uniform(0, 0.5)
                value[tuple(dead if d == axis else slice(None) for d in range(value.ndim))] = 0
        if rng.random() < 0.3 * share:
            value[rng.random(value.shape) < 0.5] = 0
    if rng.random() < 0.5 * share:
        for n in {n for value in params.values() for n in value.shape if n > 2}:
            index = int(rng.integers(n))
            for value in params.values():
                for axis in range(value.ndim):
                    if value.shape[axis] == n:
                        np.moveaxis(value, axis, 0)[index] = 0
    return params


def dense(rng, param, x, width):
    n = x.shape[-1]
    layout = rng.integers(4)
    if layout == 0:
        y = x @ param(n, width)
    elif layout == 1:
        y = lax.dot_general(x, param(width, n), (((x.ndim - 1,), (1,)), ((), ())))
    elif layout == 2:
        y = jnp.einsum("...i,io->...o", x, param(n, width))
    else:
        y = jnp.moveaxis(jnp.tensordot(param(n, width), x, axes=((0,), (x.ndim - 1,))), 0, -1)
    bias = rng.integers(4)
    if bias == 0:
        return y
    if bias == 1:
        return y - param(width)
    return y + param(width)


def normalized(rng, param, x):
    n = x.shape[-1]
    kind = rng.integers(4)
    if kind == 0:  # layer norm, the variance as a difference of means
        mean, square = x.mean(-1, keepdims=True), (x * x).mean(-1, keepdims=True)
        y = (x - mean) * lax.rsqrt(jnp.maximum(square - mean * mean, 0) + 0.1)
    elif kind == 1:  # the variance as the mean of squares
        mean = x.mean(-1, keepdims=True)
        y = (x - mean) / jnp.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + 0.1)
    elif kind == 2:  # RMS norm
        y = x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 0.1)
    else:  # batch norm with running statistics
        y = (x - param(n)) * lax.rsqrt(jnp.abs(param(n)) + 0.5)
    return y * param(n) + param(n) if rng.random() < 0.8 else y


def features(rng, param, x):
    """Layers on the last axis of (batch, ..., features)."""
    earlier = [x]
    width = int(rng.integers(3, 9))
    for _ in range(rng.integers(3, 8)):
        n = x.shape[-1]
        what = rng.integers(14)
        if what <= 3:
            x = ACTIVATIONS[rng.integers(len(ACTIVATIONS))](dense(rng, param, x, width))
        elif what == 4:
            same = [y for y in earlier if y.shape == x.shape]
            other = same[rng.integers(len(same))] if same else x
            x = x + other if rng.random() < 0.6 else x * other
        elif what == 5:
            x = jnp.concatenate([x, earlier[rng.integers(len(earlier))]], axis=-1)
        elif what == 6:
            x = normalized(rng, param, x)
        elif what == 7 and n >= 4:
            a, b = jnp.split(x, [n // 2], axis=-1)
            x = jnp.concatenate([jnp.tanh(b), a], axis=-1) if rng.random() < 0.5 else a
        elif what == 8 and n % 2 == 0:  # heads, and back
            y = jnp.swapaxes(x.reshape(*x.shape[:-1], 2, n // 2), -1, -2)
            y = jnp.einsum("...dh,dhe->...he", y, param(n // 2, 2, 3))
            x = jax.nn.relu(y + param(2, 3)).reshape(*x.shape[:-1], 6)
        elif what == 9:
            low, high = (int(k) for k in rng.integers(0, 3, size=2))
            x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(low, high)])
        elif what == 10:
            x = x * jax.nn.sigmoid(dense(rng, param, x, n))
        elif what == 11:
            step = rng.integers(6)
            if step == 0:
                x = jnp.cumsum(x, axis=-1)
            elif step == 1:
                x = x[..., ::-1]
            elif step == 2:
                x = jnp.sort(x, axis=-1)
            elif step == 3:
                x = lax.scan(lambda c, w: (jnp.tanh(c * w), None), x, param(2, n))[0]
            elif step == 4:
                x = jnp.where(jnp.arange(n) % 2 == 0, x, 0.5)
            else:
                x = x[..., ::2] if n > 2 else x
        elif what == 12:
            w, b = param(n, width), param(width)
            block = jax.checkpoint(lambda x, w, b: jax.nn.relu(x @ w + b))
            x = block(x, w, b)
        else:
            w = param(n)
            x = jax.jit(lambda x, w: jax.nn.relu(x * w))(x, w)
        earlier.append(x)
        if len(earlier) == 2 and x.shape[-1] > 40:
            x = dense(rng, param, x, width)
    return dense(rng, param, x, 2)


def images(rng, param, x):
    """Convolutions on (batch, height, width, channels), flattened or averaged at the end."""
    for _ in range(rng.integers(1, 4)):
        c = x.shape[-1]
        groups = int(rng.choice([1, 1, c, 2])) if c % 2 == 0 else int(rng.choice([1, c]))
        out = groups * int(rng.integers(1, 4))
        k = int(rng.integers(1, 4))
        y = lax.conv_general_dilated(
            x,
            param(k, k, c // groups, out),
            (1, 1) if rng.random() < 0.7 else (2, 2),
            "SAME" if rng.random() < 0.5 or x.shape[1] < 4 else "VALID",
            rhs_dilation=(1, 1) if rng.random() < 0.8 else (1, 2),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )
        if rng.random() < 0.7:
            y = y + param(out)
        if rng.random() < 0.4:
            y = normalized(rng, param, y)
        y = ACTIVATIONS[rng.integers(len(ACTIVATIONS))](y)
        if y.shape == x.shape and rng.random() < 0.7:
            y = x + y
        if min(y.shape[1:3]) >= 2 and rng.random() < 0.5:
            window, by = (1, 2, 2, 1), (1, 2, 2, 1)
            if rng.random() < 0.5:
                y = lax.reduce_window(y, -jnp.inf, lax.max, window, by, "VALID")
            else:
                y = lax.reduce_window(y, 0.0, lax.add, window, by, "SAME") / 4
        x = y
    return x.mean((1, 2)) if rng.random() < 0.4 else x.reshape(x.shape[0], -1)


def sequence(rng, param, ids):
    """Embedded tokens, attention with heads, the mean over positions or each of them."""
    d, heads, size = 6, int(rng.choice([1, 2])), int(rng.integers(2, 4))
    x = jnp.take(param(11, d), ids, axis=0) + param(7, d)[: ids.shape[1]]
    for _ in range(rng.integers(1, 3)):
        y = normalized(rng, param, x)
        project = [param(d, heads, size) for _ in range(3)]
        q, k, v = (jnp.einsum("btd,dhs->bths", y, w) for w in project)
        if rng.random() < 0.7:
            q, k, v = q + param(heads, size), k + param(heads, size), v + param(heads, size)
        scores = jnp.einsum("bqhs,bkhs->bhqk", q, k)
        if rng.random() < 0.5:
            scores = jnp.where(jnp.tril(jnp.ones((ids.shape[1],) * 2, bool)), scores, -1e9)
        y = jnp.einsum("bhqk,bkhs->bqhs", jax.nn.softmax(scores), v)
        x = x + jnp.einsum("bqhs,hsd->bqd", y, param(heads, size, d))
        x = x + dense(rng, param, jax.nn.relu(dense(rng, param, normalized(rng, param, x), 8)), d)
    return (x.mean(1), x[:, 0], x)[rng.integers(3)]


def example(kind, rng, batch):
    if kind == "tokens":
        return jnp.asarray(rng.integers(0, 11, size=(batch, 5)))
    shape = (batch, 6, 5, 2) if kind == "image" else (batch, 6)
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def check(seed):
    """Raises if the compacted network of this seed differs.

    Returns entries before and after, and whether the network depends on its input at all. Three
    kinds of network in turn, each in float32 and in bfloat16; a quarter of the float32 ones is
    looked at more closely.
    """
    kind = ("features", "image", "tokens")[seed % 3]
    single = seed // 3 % 2 == 0
    rng = np.random.default_rng([seed, 2])
    x = example(kind, rng, 2)
    network = Network(seed, kind)
    params, alive = network.init(x)
    if not single:
        params = {name: jnp.asarray(value, jnp.bfloat16) for name, value in params.items()}
        x = x if kind == "tokens" else x.astype(jnp.bfloat16)
    small = sj.compact(network, params, x)
    tolerance = 1e-4 if single else 0.1
    close(seed, jax.jit(network)(params, x), jax.jit(small.fn)(small.params, x), tolerance)
    if seed // 6 % 4 == 0 and single:
        y = example(kind, rng, 5)
        close(seed, jax.jit(network)(params, y), jax.jit(small.fn)(small.params, y), tolerance)
        if not small.plan.folded:  # what acted through folded constants only is fixed from then on
            compare_gradients(seed, network, params, small, x)
        again = sj.compact(small.fn, small.params, x)
        if any(leaf.shape != leaf.new_shape for leaf in (*again.plan.leaves, *again.plan.inputs)):
            raise AssertionError(f"seed {seed}: compacting again removes more")
    sizes = [(np.prod(leaf.shape), np.prod(leaf.new_shape)) for leaf in small.plan.leaves]
    return np.sum(sizes, axis=0), alive


def compare_gradients(seed, network, params, small, x):
    def loss(fn):
        return lambda params: jnp.sum(jnp.sin(fn(params, x)))

    before = jax.jit(jax.grad(loss(network)))(params)
    after = jax.jit(jax.grad(loss(small.fn)))(small.params)
    scale = max(float(jnp.abs(g).max(initial=0)) for g in before.values()) + 1e-3
    for leaf, old, new, value in zip(
        small.plan.leaves, before.values(), after.values(), small.params.values(), strict=True
    ):
        cut = np.asarray(old)
        for axis, kept in enumerate(leaf.kept):
            cut = cut if kept is None else np.take(cut, kept, axis)
        where = np.asarray(value) != 0
        close(seed, cut[where], np.asarray(new)[where], 1e-3, scale)


def close(seed, old, new, tolerance, scale=None):
    old, new = np.asarray(old, np.float64), np.asarray(new, np.float64)
    if old.shape != new.shape:
        raise AssertionError(f"seed {seed}: shapes {old.shape} and {new.shape}")
    scale = np.abs(old).max(initial=0) + 1e-3 if scale is None else scale
    if not np.isfinite(old).all():
        return  # the promise is for finite values
    error = np.abs(old - new).max(initial=0) / scale
    if not error <= tolerance:
        raise AssertionError(f"seed {seed}: relative error {error:.2e} above {tolerance:.0e}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    totals, smaller, living = np.zeros(2), 0, 0
    for seed in tqdm(range(options.first, options.first + options.count)):
        sizes, alive = check(seed)
        living += alive
        totals += sizes
        smaller += int(sizes[1] < sizes[0])
        if seed % 100 == 99:
            jax.clear_caches()
    print(
        f"{options.count} random networks, {living} of them not constant, are the same functions"
        f" after compaction; {smaller} became smaller, all together"
        f" {totals[0] / totals[1]:.2f} times."
    )


if __name__ == "__main__":
    warnings.simplefilter("error")
    jax.config.update("jax_disable_most_optimizations", True)  # compiled for one call each
    main()
