"""How irrelevant is each weight, from 0 (the loss depends on it) to 1 (it does not).

A score is any function ``(gradient, weight, scale) -> irrelevance`` on one leaf: three arrays in
(``scale`` a scalar in the unit of the gradient), one out, with the gradient's shape and dtype. The
functions here are pure and defined everywhere:

- a gradient of exactly 0 has irrelevance 1, also at a scale of 0;
- a gradient that is not finite has irrelevance 0 (nothing is known, so nothing is shrunk), except
  under :func:`constant_irrelevance`, which looks at no gradient.
"""

import math
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

Irrelevance = Callable[[chex.Array, chex.Array, chex.Numeric], jax.Array]


def exponential_irrelevance(
    gradient: chex.Array, weight: chex.Array, scale: chex.Numeric
) -> jax.Array:
    r"""The paper's irrelevance, :math:`I = \exp(-|g| / \alpha)`.

    Args:
      gradient: the loss's gradient :math:`g` with respect to one leaf, any shape.
      weight: the leaf; not looked at.
      scale: the scalar :math:`\alpha` > 0, in the unit of the gradient.

    Returns:
      The irrelevance in [0, 1], with the gradient's shape and dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> print(exponential_irrelevance(jnp.array([0.0, 1.0, jnp.nan]), jnp.ones(3), 1.0).round(3))
      [1.    0.368 0.   ]

    References:
      Bonetta et al., `Regularization-based Pruning of Irrelevant Weights in Deep Neural
      Architectures <https://arxiv.org/abs/2204.04977>`_
    """
    del weight
    relative = _relative(gradient, scale)
    return _defined(_exp_of_negative(relative), relative, gradient)


def linear_irrelevance(
    gradient: chex.Array, weight: chex.Array, scale: chex.Numeric
) -> jax.Array:
    r"""LOBSTER's irrelevance, :math:`I = \max(0, 1 - |g| / \alpha)`.

    Args:
      gradient: the loss's gradient :math:`g` with respect to one leaf, any shape.
      weight: the leaf; not looked at.
      scale: the scalar :math:`\alpha` > 0, in the unit of the gradient (LOBSTER's is 1).

    Returns:
      The irrelevance in [0, 1], with the gradient's shape and dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> print(linear_irrelevance(jnp.array([0.0, 0.25, -3.0]), jnp.ones(3), 1.0))
      [1.   0.75 0.  ]

    References:
      Tartaglione et al., `LOss-Based SensiTivity rEgulaRization: towards deep sparse neural
      networks <https://arxiv.org/abs/2011.09905>`_
    """
    del weight
    relative = _relative(gradient, scale)
    return _defined(jax.lax.max(1 - relative, jnp.zeros_like(relative)), relative, gradient)


def constant_irrelevance(
    gradient: chex.Array, weight: chex.Array, scale: chex.Numeric
) -> jax.Array:
    r"""Irrelevance :math:`I \equiv 1`: plain weight decay, on the same code path.

    Args:
      gradient: any array; only its shape and dtype are looked at.
      weight: not looked at.
      scale: not looked at.

    Returns:
      Ones, with the gradient's shape and dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> print(constant_irrelevance(jnp.array([0.0, 5.0]), jnp.ones(2), 1.0))
      [1. 1.]
    """
    del weight, scale
    return jnp.ones_like(gradient)


def _relative(gradient: chex.Array, scale: chex.Numeric) -> jax.Array:
    # One division for the scale, a product for each entry.
    return jnp.abs(gradient) * (1 / jnp.asarray(scale, gradient.dtype))


def _defined(irrelevance: jax.Array, relative: jax.Array, gradient: chex.Array) -> jax.Array:
    # Beyond the limit: what exp cannot show, an infinite gradient, the NaN of a NaN gradient, and
    # that of 0/0 (an all-zero gradient relative to its own scale).
    limit = jnp.asarray(-jnp.log(jnp.finfo(gradient.dtype).tiny), gradient.dtype)
    zero = (gradient == jnp.zeros((), gradient.dtype)).astype(gradient.dtype)
    return jnp.where(relative < limit, irrelevance, zero)


def _exp_of_negative(x: jax.Array) -> jax.Array:
    """``exp(-x)`` for 0 <= x < 87, in f32 to 1e-7 by products and bits alone.

    Before Adam three consumers read the sum of gradient and term. XLA's CPU backend recomputes
    cheap arithmetic in each, but not ``exp``, for which it writes and reads another array the size
    of the params: 1.7 times the time of the whole optimizer step.
    """
    if x.dtype == jnp.float64:
        return jnp.exp(-x)
    if x.dtype != jnp.float32:
        return _exp_of_negative(x.astype(jnp.float32)).astype(x.dtype)
    # exp(-x) = 2^-n 2^f with n an integer, |f| <= 1/2, and the Taylor series of 2^f.
    y = jnp.minimum(x * math.log2(math.e), 126)
    n = jnp.floor(y + 0.5)
    f = n - y
    series = jnp.full_like(x, math.log(2) ** 6 / math.factorial(6))
    for power in range(5, -1, -1):
        series = series * f + math.log(2) ** power / math.factorial(power)
    exponent = (127 - n.astype(jnp.int32)) << 23
    return series * jax.lax.bitcast_convert_type(exponent, jnp.float32)
