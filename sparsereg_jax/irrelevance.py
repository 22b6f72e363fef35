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
import numpy as np

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
    gradient = jnp.asarray(gradient)
    halvings = _relative(gradient, scale, unit=math.log2(math.e))
    limit = -math.log2(jnp.finfo(gradient.dtype).tiny)
    return _defined(_exp2_of_negative(halvings), halvings, limit)


def linear_irrelevance(gradient: chex.Array, weight: chex.Array, scale: chex.Numeric) -> jax.Array:
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
    relative = _relative(jnp.asarray(gradient), scale)
    return _defined(1 - relative, relative, limit=1.0)


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


def _relative(gradient: chex.Array, scale: chex.Numeric, unit: float = 1.0) -> jax.Array:
    """``|gradient| / scale * unit``."""
    scale = jnp.asarray(scale, gradient.dtype)
    # Bounded, so that at a scale of 0, that of an all-zero gradient, a gradient of 0 stays 0.
    inverse = jnp.minimum(unit / scale, jnp.finfo(gradient.dtype).max)
    return jnp.abs(gradient) * inverse


def _defined(irrelevance: jax.Array, relative: jax.Array, limit: float) -> jax.Array:
    # Not below the limit: what has no irrelevance left, Inf, NaN.
    return jnp.where(relative < limit, irrelevance, jnp.zeros_like(irrelevance))


# A polynomial for (2^f - 1) / f, |f| <= 1/2, so that 2^f is right to 2e-7 and exact at 0.
_F = np.cos(np.pi * (np.arange(100) + 0.5) / 100) / 2
_SERIES = np.polynomial.Polynomial.fit(_F, np.expm1(_F * math.log(2)) / _F, 4).convert().coef


def _exp2_of_negative(y: jax.Array) -> jax.Array:
    """``2^-y`` where 0 <= y < 126, in f32 to 3e-7 by products and bits alone.

    Before Adam three consumers read the sum of gradient and term. XLA's CPU backend recomputes
    cheap arithmetic in each, but not ``exp``, for which it writes and reads another array the size
    of the params: 1.7 times the time of the whole optimizer step.
    """
    if y.dtype == jnp.float64:
        return jnp.exp2(-y)
    if y.dtype != jnp.float32:
        return _exp2_of_negative(y.astype(jnp.float32)).astype(y.dtype)
    # 2^-y = 2^-n 2^f with n an integer and |f| <= 1/2.
    n = jnp.round(y)
    f = n - y
    series = jnp.full_like(y, _SERIES[-1])
    for coefficient in _SERIES[-2::-1]:
        series = series * f + float(coefficient)
    # 2^23 + 127 - n has the exponent of 2^-n in its lowest bits; a conversion would saturate first.
    exponent = jax.lax.bitcast_convert_type((2.0**23 + 127) - n, jnp.int32)
    return jax.lax.bitcast_convert_type(exponent << 23, jnp.float32) * (1 + series * f)
