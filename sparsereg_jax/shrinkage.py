r"""Selective shrinkage: a decay of each weight in proportion to its irrelevance.

One term, :math:`s \, w \, I(g)`, in three forms:

- coupled, :func:`add_selective_shrinkage`: joins the gradient before the optimizer's
  preconditioner, as a penalty added to the loss would;
- decoupled, :func:`decouple_selective_shrinkage` and :func:`shrink_selectively`: joins the update
  after it, as in AdamW;
- :func:`selective_penalty`: the value of the penalty whose gradient the coupled form adds.

In optax "selective" can mean that whole leaves are frozen; here every entry of a leaf is shrunk by
its own amount.
"""

import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .irrelevance import Irrelevance, exponential_irrelevance
from .selection import Mask, is_float, leaf_path, resolve_mask

PyTree = Any


class SelectiveShrinkageState(NamedTuple):
    """State of the shrinkage term, wherever it stands."""

    # shape=(), dtype=int32: optimizer steps since the last pruning, or since the start
    count: jax.Array  # type: ignore[assignment]
    # running rms of each leaf's gradient, shape=(), dtype=float32 or the leaf's if wider, 0 before
    # the first; EmptyState() where alpha is absolute
    gradient_rms: PyTree


class DecoupledShrinkageState(NamedTuple):
    """State of a wrapped transformation with a decoupled shrinkage term."""

    shrinkage: SelectiveShrinkageState
    inner_state: optax.OptState


def add_selective_shrinkage(
    strength: optax.ScalarOrSchedule,
    irrelevance: Irrelevance | None = None,
    alpha: optax.ScalarOrSchedule = 1.0,
    rms_decay: float | None = None,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds the gradient of the selective penalty: the paper's regularizer, coupled.

    .. math::
      g_i \leftarrow g_i + s_t \, w_i \, I(g_i), \qquad I(g) = \exp(-|g| / \alpha)

    This is the gradient of :math:`\frac{s}{2} \sum_i w_i^2 I(g_i)` with :math:`I` held constant;
    the paper's :math:`\gamma` is :math:`s / 2`. With :func:`constant_irrelevance` it is
    ``optax.add_decayed_weights(strength)``.

    Place it *before* the preconditioner, so that the penalty passes through the moments as in the
    paper: ``optax.chain(add_selective_shrinkage(s), optax.scale_by_adam(),
    optax.scale_by_learning_rate(lr))``. What stands before it in the chain decides which gradient
    is measured; put gradient clipping after it if the raw one is meant.

    Args:
      strength: :math:`s`, a scalar or a schedule of the optimizer steps since the last pruning (see
        :func:`restart_shrinkage`), read at 0 by the first step. Under
        ``optax.inject_hyperparams`` what is given as a function, a schedule, ``irrelevance`` or
        ``mask``, must be named in ``static_args``: an injected schedule is read from a count of its
        own, which no pruning restarts, and ``mask`` would be called with that count.
      irrelevance: the score, ``(gradient, weight, scale) -> [0, 1]``, leaf by leaf in at least f32;
        None is :func:`sparsereg_jax.exponential_irrelevance`, the paper's.
      alpha: the score's scale: absolute, in the unit of the gradient, when ``rms_decay`` is None;
        otherwise relative to each leaf's running rms of the gradient. A schedule is read like
        ``strength``.
      rms_decay: decay of the running rms, in [0, 1); 0 means the rms of this step alone. Entries
        that are not finite are left out of it, and those whose weight and gradient are both zero,
        as pruned ones are; a leaf without others keeps its rms.
      mask: which leaves are shrunk: a prefix tree of Python bools, a function of the params, or
        None for every float leaf. Non-float leaves pass through always.

    Returns:
      A transformation with state :class:`SelectiveShrinkageState`. Shapes and dtypes of the updates
      are kept; the term is computed in f32 (f64 for f64 leaves) and cast once.

    Raises:
      ValueError: ``strength`` < 0, ``alpha`` <= 0 or ``rms_decay`` outside [0, 1), when they are
        Python numbers; in ``update``, ``params`` is None or the score changes a leaf's shape.
      TypeError: in ``update``, a leaf of ``mask`` is not a Python bool.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> tx = optax.chain(add_selective_shrinkage(2e-3), optax.sgd(0.1))
      >>> params = {"w": jnp.array([1.0, 1.0])}
      >>> gradients = {"w": jnp.array([0.0, 50.0])}  # the loss does not depend on the first
      >>> updates, state = tx.update(gradients, tx.init(params), params)
      >>> print(updates["w"])
      [-2.e-04 -5.e+00]

      Under ``inject_hyperparams`` alpha can be changed while training, the schedule restarts:

      >>> tx = optax.inject_hyperparams(
      ...     add_selective_shrinkage, static_args=("strength", "irrelevance", "mask")
      ... )(optax.linear_schedule(2e-3, 0.0, 100), alpha=0.5)
      >>> state = restart_shrinkage(tx.init(params))
      >>> print(state.hyperparams["alpha"])
      0.5

    References:
      Bonetta et al., `Regularization-based Pruning of Irrelevant Weights in Deep Neural
      Architectures <https://arxiv.org/abs/2204.04977>`_
    """
    init_term, add_term = _term(
        "add_selective_shrinkage", strength, irrelevance, alpha, rms_decay, mask, sign=1
    )

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        return add_term(updates, state, gradients=updates, params=params)

    return optax.GradientTransformationExtraArgs(init_term, update_fn)


def decouple_selective_shrinkage(
    core: optax.GradientTransformation,
    strength: optax.ScalarOrSchedule,
    irrelevance: Irrelevance | None = None,
    alpha: optax.ScalarOrSchedule = 1.0,
    rms_decay: float | None = None,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Wraps a preconditioner and adds the shrinkage term outside it, as AdamW does.

    .. math::
      u_i \leftarrow \mathrm{core}(g)_i + s_t \, w_i \, I(g_i)

    The irrelevance is measured on the gradient that comes in, not on what ``core`` makes of it.

    Place ``optax.scale_by_learning_rate`` *after* it:
    ``optax.chain(decouple_selective_shrinkage(optax.scale_by_adam(), s),
    optax.scale_by_learning_rate(lr))``. Each step then shrinks a weight by the share
    ``lr * s * I``. With :func:`constant_irrelevance` this chain is ``optax.adamw``.

    Args:
      core: a transformation without learning rate, such as ``optax.scale_by_adam()``. For an
        optimizer that has one, use :func:`shrink_selectively`.
      strength: as in :func:`add_selective_shrinkage`.
      irrelevance: as in :func:`add_selective_shrinkage`.
      alpha: as in :func:`add_selective_shrinkage`.
      rms_decay: as in :func:`add_selective_shrinkage`.
      mask: which leaves are shrunk, as in :func:`add_selective_shrinkage`; ``core`` gets them all.

    Returns:
      A transformation with state :class:`DecoupledShrinkageState`; extra arguments go to ``core``.

    Raises:
      ValueError: as in :func:`add_selective_shrinkage`.
      TypeError: in ``update``, a leaf of ``mask`` is not a Python bool.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> tx = optax.chain(
      ...     decouple_selective_shrinkage(optax.scale_by_adam(), strength=0.1, alpha=3e-3),
      ...     optax.scale_by_learning_rate(1e-3),
      ... )
      >>> params = {"w": jnp.array([1.0, 1.0])}
      >>> gradients = {"w": jnp.array([0.0, 1.0])}
      >>> updates, state = tx.update(gradients, tx.init(params), params)
      >>> print(updates["w"].round(6))  # the first only shrinks, the second only learns
      [-0.0001 -0.001 ]
    """
    return _decoupled(
        "decouple_selective_shrinkage", core, strength, irrelevance, alpha, rms_decay, mask, sign=1
    )


def shrink_selectively(
    optimizer: optax.GradientTransformation,
    rate: optax.ScalarOrSchedule,
    irrelevance: Irrelevance | None = None,
    alpha: optax.ScalarOrSchedule = 1.0,
    rms_decay: float | None = None,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Wraps a finished optimizer and lets its weights shrink beside what it does.

    .. math::
      w_i \leftarrow w_i + \mathrm{optimizer}(g)_i - r_t \, w_i \, I(g_i)

    The optimizer's learning rate is inside it, so the rate of shrinkage is given apart.

    Place it where the optimizer would stand, last in the chain.

    Args:
      optimizer: any optax optimizer, for example ``optax.lion(1e-3)``.
      rate: :math:`r`, the share of an irrelevant weight that one step takes away; a scalar or a
        schedule, read like ``strength`` in :func:`add_selective_shrinkage`.
      irrelevance: as in :func:`add_selective_shrinkage`.
      alpha: as in :func:`add_selective_shrinkage`.
      rms_decay: as in :func:`add_selective_shrinkage`.
      mask: which leaves are shrunk, as in :func:`add_selective_shrinkage`.

    Returns:
      A transformation with state :class:`DecoupledShrinkageState`; extra arguments go to
      ``optimizer``.

    Raises:
      ValueError: as in :func:`add_selective_shrinkage`.
      TypeError: in ``update``, a leaf of ``mask`` is not a Python bool.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> tx = shrink_selectively(optax.lion(1e-3, weight_decay=0.0), rate=1e-2, alpha=3e-3)
      >>> params = {"w": jnp.array([1.0, 1.0])}
      >>> gradients = {"w": jnp.array([0.0, 1.0])}
      >>> updates, state = tx.update(gradients, tx.init(params), params)
      >>> print(updates["w"])
      [-0.01  -0.001]
    """
    return _decoupled(
        "shrink_selectively", optimizer, rate, irrelevance, alpha, rms_decay, mask, sign=-1
    )


def selective_penalty(
    params: PyTree,
    gradients: PyTree,
    strength: jax.typing.ArrayLike = 1.0,
    irrelevance: Irrelevance | None = None,
    alpha: jax.typing.ArrayLike = 1.0,
    relative: bool = False,
    mask: Mask = None,
) -> jax.Array:
    r"""The value of the penalty, for a log or for an objective of one's own.

    .. math::
      R = \frac{s}{2} \sum_i w_i^2 \, I(g_i)

    The irrelevance is a constant here (``jax.lax.stop_gradient``), so ``jax.grad`` of this with
    respect to ``params`` is :math:`s \, w \, I(g)`, what :func:`add_selective_shrinkage` adds.

    Args:
      params: the weights :math:`w`.
      gradients: the loss's gradients :math:`g`, measured beforehand; a tree like ``params``.
      strength: the scalar :math:`s`, twice the paper's :math:`\gamma`.
      irrelevance: as in :func:`add_selective_shrinkage`.
      alpha: the score's scale.
      relative: whether ``alpha`` is relative to the rms of each leaf's gradient (as ``rms_decay=0``
        is in :func:`add_selective_shrinkage`).
      mask: which leaves take part, as in :func:`add_selective_shrinkage`.

    Returns:
      The scalar :math:`R`, in f32 (f64 if a leaf is).

    Raises:
      ValueError: ``params`` and ``gradients`` differ in structure, or in a shape where ``mask``
        selects, or the score changes a shape.
      TypeError: a leaf of ``mask`` is not a Python bool.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> params, gradients = {"w": jnp.array([2.0, 2.0])}, {"w": jnp.array([0.0, 100.0])}
      >>> print(selective_penalty(params, gradients, strength=0.5))
      1.0
      >>> print(jax.grad(selective_penalty)(params, gradients, strength=0.5)["w"])
      [1. 0.]
    """
    selected = resolve_mask(mask, params)

    def leaf_penalty(key_path, taken, weight, gradient):
        if not taken:
            return None
        alone = jax.tree_util.all_leaves([gradient])
        if not alone or jnp.shape(gradient) != jnp.shape(weight):
            found = f"shape {jnp.shape(gradient)}" if alone else "no leaf"
            raise ValueError(
                f"gradients: at {leaf_path(key_path)!r} they have {found}, params shape"
                f" {jnp.shape(weight)}. Give the gradients of these params."
            )
        dtype = _term_dtype(gradient, weight)
        gradient, weight = jnp.asarray(gradient, dtype), jnp.asarray(weight, dtype)
        scale = jnp.asarray(alpha, dtype)
        if relative:
            scale = scale * _rms(gradient, weight)[0]
        score = jax.lax.stop_gradient(_score(irrelevance, key_path, gradient, weight, scale))
        half = jnp.asarray(strength, dtype) / jnp.asarray(2, dtype)
        return half * jnp.sum(jnp.square(weight) * score)

    terms = jax.tree.leaves(
        jax.tree_util.tree_map_with_path(leaf_penalty, selected, params, gradients)
    )
    dtype = _term_dtype(*terms)
    return sum((term.astype(dtype) for term in terms), start=jnp.zeros((), dtype))


def restart_shrinkage(opt_state: PyTree) -> PyTree:
    """Sets the count that schedules of the strength are read at back to 0.

    Call it when the network has been pruned (:func:`sparsereg_jax.prune` does). It finds every
    shrinkage state at any depth of an optimizer's state, through ``optax.chain``, ``masked``,
    ``partition``, ``MultiSteps``, ``inject_hyperparams`` and in an ``nnx.Optimizer``'s
    ``opt_state``, and touches no other count, Adam's for instance. Pure and jit-able.

    Args:
      opt_state: the state of any optimizer that contains a shrinkage term.

    Returns:
      The state with those counts at 0, all else as it was.

    Raises:
      ValueError: there is no shrinkage state in it.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> tx = optax.chain(add_selective_shrinkage(optax.linear_schedule(2e-3, 0, 100)),
      ...                  optax.scale_by_adam())
      >>> params = jnp.ones(3)
      >>> _, state = tx.update(params, tx.init(params), params)
      >>> restarted = restart_shrinkage(state)
      >>> print(state[0].count, restarted[0].count, restarted[1].count)
      1 0 1
    """
    if not any(map(_is_shrinkage, jax.tree.leaves(opt_state, is_leaf=_is_shrinkage))):
        raise ValueError(
            "restart_shrinkage: the optimizer state contains no shrinkage state. Build the"
            " optimizer with add_selective_shrinkage, decouple_selective_shrinkage,"
            " shrink_selectively or one of the selective_* aliases, and pass the whole state."
        )
    return restart_if_any(opt_state)


def restart_if_any(opt_state: PyTree) -> PyTree:
    """``restart_shrinkage`` for states that may hold no shrinkage, such as a baseline's."""

    def restart(node):
        if _is_shrinkage(node):
            return node._replace(count=jax.tree.map(jnp.zeros_like, node.count))
        return node

    return jax.tree.map(restart, opt_state, is_leaf=_is_shrinkage)


def paper_strength(gamma: float, steps_per_epoch: int) -> optax.Schedule:
    r"""The authors' schedule: linearly to 0 over the epoch that follows a pruning.

    .. math::
      s_t = 2 \gamma \max(0, 1 - t / N), \qquad t = 1, 2, \dots

    optax reads a schedule at 0 first, where the authors' first value is the one at t = 1; so the
    returned schedule maps a count c to :math:`s_{c + 1}`.

    Args:
      gamma: the paper's :math:`\gamma`, 1e-3 in its image experiments.
      steps_per_epoch: :math:`N`, optimizer steps.

    Returns:
      A schedule for ``strength``.

    Raises:
      ValueError: ``gamma`` < 0 or ``steps_per_epoch`` < 1.

    Example:
      >>> schedule = paper_strength(gamma=0.5, steps_per_epoch=4)
      >>> [float(schedule(count)) for count in range(5)]
      [0.75, 0.5, 0.25, 0.0, 0.0]
    """
    _check_number("paper_strength", "gamma", gamma, 0.0)
    _check_number("paper_strength", "steps_per_epoch", steps_per_epoch, 1)

    def schedule(count):
        elapsed = (jnp.asarray(count, jnp.result_type(float)) + 1) / steps_per_epoch
        return 2 * gamma * jnp.maximum(0, 1 - elapsed)

    return schedule


def selective_sgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float | None = None,
    nesterov: bool = False,
    accumulator_dtype: Any | None = None,
    *,
    strength: optax.ScalarOrSchedule = 3e-3,
    irrelevance: Irrelevance | None = None,
    alpha: optax.ScalarOrSchedule = 3e-3,
    rms_decay: float | None = None,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """SGD with coupled selective shrinkage: the term passes through the momentum.

    Minibatch gradients of a classifier are of order 1e-4 to 1e-2, so at the paper's ``alpha`` of 1
    every weight counts as irrelevant and SGD has no preconditioner that would tell them apart:
    hence the smaller default. With the default strength LeNet-300-100 is pruned as far as by Adam;
    three times as much stopped the loop at once (``results/images.md``; momentum 0.9, a rate of
    0.02).

    Args:
      learning_rate: a scalar or a schedule.
      momentum: decay of the momentum; None for none.
      nesterov: whether the momentum is Nesterov's.
      accumulator_dtype: dtype of the momentum; None for that of the params.
      strength: see :func:`add_selective_shrinkage`.
      irrelevance: see :func:`add_selective_shrinkage`.
      alpha: see :func:`add_selective_shrinkage`.
      rms_decay: see :func:`add_selective_shrinkage`.
      mask: see :func:`add_selective_shrinkage`.

    Returns:
      A finished optimizer; last in a chain.

    Raises:
      ValueError: see :func:`add_selective_shrinkage`.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = selective_sgd(0.1, strength=0.5)
      >>> w = jnp.array([1.0, 1.0])
      >>> print(tx.update(jnp.array([0.0, 1.0]), tx.init(w), w)[0])
      [-0.05 -0.1 ]
    """
    return optax.chain(
        add_selective_shrinkage(strength, irrelevance, alpha, rms_decay, mask),
        optax.sgd(learning_rate, momentum, nesterov, accumulator_dtype),
    )


def selective_sgdw(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float | None = None,
    nesterov: bool = False,
    accumulator_dtype: Any | None = None,
    *,
    strength: optax.ScalarOrSchedule = 3e-3,
    irrelevance: Irrelevance | None = None,
    alpha: optax.ScalarOrSchedule = 3e-3,
    rms_decay: float | None = None,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """SGD with decoupled selective shrinkage: the term stays out of the momentum.

    Without momentum it is :func:`selective_sgd`. With a momentum of m that one shrinks 1 / (1 - m)
    times as much at the same strength.

    Args:
      learning_rate: a scalar or a schedule.
      momentum: decay of the momentum; None for none.
      nesterov: whether the momentum is Nesterov's.
      accumulator_dtype: dtype of the momentum; None for that of the params.
      strength: see :func:`decouple_selective_shrinkage`.
      irrelevance: see :func:`add_selective_shrinkage`.
      alpha: see :func:`add_selective_shrinkage`.
      rms_decay: see :func:`add_selective_shrinkage`.
      mask: see :func:`add_selective_shrinkage`.

    Returns:
      A finished optimizer; last in a chain.

    Raises:
      ValueError: see :func:`add_selective_shrinkage`.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = selective_sgdw(0.1, momentum=0.9, strength=0.5)
      >>> w = jnp.array([1.0, 1.0])
      >>> print(tx.update(jnp.array([0.0, 1.0]), tx.init(w), w)[0])
      [-0.05 -0.1 ]
    """
    core = (
        optax.identity() if momentum is None else optax.trace(momentum, nesterov, accumulator_dtype)
    )
    return optax.chain(
        decouple_selective_shrinkage(core, strength, irrelevance, alpha, rms_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def selective_adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    mu_dtype: Any | None = None,
    *,
    nesterov: bool = False,
    strength: optax.ScalarOrSchedule = 4e-4,
    irrelevance: Irrelevance | None = None,
    alpha: optax.ScalarOrSchedule = 1.0,
    rms_decay: float | None = None,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam with coupled selective shrinkage: the paper's optimizer.

    The defaults are those of the paper's image experiments but for the strength, which they let
    decay after each pruning: give ``strength=paper_strength(1e-3, steps_per_epoch)`` for that. The
    default is constant, a fifth of what the paper's begins with: as large as that, LeNet-300-100
    never came back to its accuracy (``results/images.md``).

    Args:
      learning_rate: a scalar or a schedule.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      eps_root: added under the root.
      mu_dtype: dtype of the first moment; None for that of the params.
      nesterov: whether to use Nesterov's momentum.
      strength: see :func:`add_selective_shrinkage`.
      irrelevance: see :func:`add_selective_shrinkage`.
      alpha: see :func:`add_selective_shrinkage`.
      rms_decay: see :func:`add_selective_shrinkage`.
      mask: see :func:`add_selective_shrinkage`.

    Returns:
      A finished optimizer; last in a chain.

    Raises:
      ValueError: see :func:`add_selective_shrinkage`.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = selective_adam(1e-3)
      >>> w = jnp.array([1.0, 1.0])
      >>> print(tx.update(jnp.array([0.0, 1.0]), tx.init(w), w)[0])  # both moments see the term
      [-0.001 -0.001]
    """
    return optax.chain(
        add_selective_shrinkage(strength, irrelevance, alpha, rms_decay, mask),
        optax.adam(learning_rate, b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov),
    )


def selective_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    mu_dtype: Any | None = None,
    *,
    nesterov: bool = False,
    strength: optax.ScalarOrSchedule = 0.1,
    irrelevance: Irrelevance | None = None,
    alpha: optax.ScalarOrSchedule = 3e-3,
    rms_decay: float | None = None,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam with decoupled selective shrinkage; with I = 1, ``optax.adamw``.

    Args:
      learning_rate: a scalar or a schedule.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      eps_root: added under the root.
      mu_dtype: dtype of the first moment; None for that of the params.
      nesterov: whether to use Nesterov's momentum.
      strength: see :func:`decouple_selective_shrinkage`.
      irrelevance: see :func:`add_selective_shrinkage`.
      alpha: see :func:`add_selective_shrinkage`.
      rms_decay: see :func:`add_selective_shrinkage`.
      mask: see :func:`add_selective_shrinkage`.

    Returns:
      A finished optimizer; last in a chain.

    Raises:
      ValueError: see :func:`add_selective_shrinkage`.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = selective_adamw(1e-3)
      >>> w = jnp.array([1.0, 1.0])
      >>> print(tx.update(jnp.array([0.0, 1.0]), tx.init(w), w)[0].round(6))
      [-0.0001 -0.001 ]
    """
    core = optax.scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov)
    return optax.chain(
        decouple_selective_shrinkage(core, strength, irrelevance, alpha, rms_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def _is_shrinkage(node: Any) -> bool:
    return isinstance(node, SelectiveShrinkageState)


def _check_number(
    name: str,
    argument: str,
    value: Any,
    low: float,
    high: float = float("inf"),
    *,
    open_low: bool = False,
) -> None:
    # Tracers (inject_hyperparams) and schedules cannot be checked, arrays are not worth a transfer.
    if not isinstance(value, numbers.Real):
        return
    if not (low < float(value) < high if open_low else low <= float(value) < high):
        bounds = f"{'(' if open_low else '['}{low}, {high})"
        raise ValueError(f"{name}: {argument}={value} is outside {bounds}.")


def _term(
    name: str,
    strength: optax.ScalarOrSchedule,
    irrelevance: Irrelevance | None,
    alpha: optax.ScalarOrSchedule,
    rms_decay: float | None,
    mask: Mask,
    sign: int,
) -> tuple[Callable[[PyTree], SelectiveShrinkageState], Callable[..., tuple[PyTree, Any]]]:
    """The kernel of every form: ``updates + sign * strength * w * I(g)`` and its state."""
    _check_number(name, "rate" if sign < 0 else "strength", strength, 0.0)
    _check_number(name, "alpha", alpha, 0.0, open_low=True)
    _check_number(name, "rms_decay", rms_decay, 0.0, 1.0)

    def init_fn(params):
        if rms_decay is None:
            gradient_rms = optax.EmptyState()
        else:
            gradient_rms = jax.tree.map(
                lambda p: jnp.zeros((), _term_dtype(p) if is_float(p) else jnp.float32), params
            )
        return SelectiveShrinkageState(jnp.zeros((), jnp.int32), gradient_rms)

    def add_fn(updates, state, gradients, params):
        if params is None:
            raise ValueError(
                f"{name}: the term needs the weights; call `update(gradients, state, params)`."
            )
        strength_now = strength(state.count) if callable(strength) else strength
        alpha_now = alpha(state.count) if callable(alpha) else alpha
        if rms_decay is None:
            gradient_rms, scales = state.gradient_rms, jax.tree.map(lambda _: alpha_now, updates)
        else:
            gradient_rms = jax.tree.map(
                lambda old, gradient, weight: _running_rms(old, gradient, weight, rms_decay),
                state.gradient_rms,
                gradients,
                params,
            )
            scales = jax.tree.map(lambda rms: jnp.asarray(alpha_now, rms.dtype) * rms, gradient_rms)

        def add(key_path, update, gradient, weight, taken, scale):
            if update is None or not taken:
                return update
            if jnp.shape(gradient) != jnp.shape(weight):
                raise ValueError(
                    f"{name}: at {leaf_path(key_path)!r} the gradient has shape"
                    f" {jnp.shape(gradient)} and the weight {jnp.shape(weight)}. Call"
                    " `update(gradients, state, params)` with the gradients of these params."
                )
            dtype, update = _term_dtype(gradient, weight), jnp.asarray(update)
            gradient, weight = jnp.asarray(gradient, dtype), jnp.asarray(weight, dtype)
            score = _score(irrelevance, key_path, gradient, weight, jnp.asarray(scale, dtype))
            term = (jnp.asarray(strength_now, dtype) * weight * score).astype(update.dtype)
            return update + term if sign > 0 else update - term

        updates = jax.tree_util.tree_map_with_path(
            add,
            updates,
            gradients,
            params,
            resolve_mask(mask, params),
            scales,
            is_leaf=lambda leaf: leaf is None,
        )
        return updates, SelectiveShrinkageState(optax.safe_increment(state.count), gradient_rms)

    return init_fn, add_fn


def _decoupled(
    name: str,
    inner: optax.GradientTransformation,
    strength: optax.ScalarOrSchedule,
    irrelevance: Irrelevance | None,
    alpha: optax.ScalarOrSchedule,
    rms_decay: float | None,
    mask: Mask,
    sign: int,
) -> optax.GradientTransformationExtraArgs:
    inner = optax.with_extra_args_support(inner)
    init_term, add_term = _term(name, strength, irrelevance, alpha, rms_decay, mask, sign)

    def init_fn(params):
        return DecoupledShrinkageState(init_term(params), inner.init(params))

    def update_fn(updates, state, params=None, **extra_args):
        gradients = updates
        updates, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        updates, shrinkage = add_term(updates, state.shrinkage, gradients=gradients, params=params)
        return updates, DecoupledShrinkageState(shrinkage, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _term_dtype(*leaves: jax.Array) -> Any:
    """At least f32: in half precision a strength of 1e-5 is subnormal or lost."""
    wide = any(jnp.result_type(leaf) == jnp.float64 for leaf in leaves)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def _score(
    irrelevance: Irrelevance | None,
    key_path: tuple[Any, ...],
    gradient: jax.Array,
    weight: jax.Array,
    scale: jax.Array,
) -> jax.Array:
    # None, not the function, is the default: inject_hyperparams takes a function for a schedule.
    score = (exponential_irrelevance if irrelevance is None else irrelevance)(
        gradient, weight, scale
    )
    if jnp.shape(score) != gradient.shape:
        raise ValueError(
            f"irrelevance: it returned shape {jnp.shape(score)} for the gradient of shape"
            f" {gradient.shape} at {leaf_path(key_path)!r}. Return one score an entry."
        )
    return jnp.asarray(score, gradient.dtype)


def _rms(gradient: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Root mean square of the finite entries, and whether there is any.

    Pruned entries do not count: at 99 % of zeros they would make the scale a tenth of what it is.
    """
    counted = jnp.isfinite(gradient) & ((gradient != 0) | (weight != 0))
    magnitude = jnp.where(counted, jnp.abs(gradient), jnp.zeros((), gradient.dtype))
    # Divided by the largest first: squares of 1e20 or 1e-30 are not to be had in f32.
    largest = jnp.max(magnitude, initial=0)
    safe = jnp.where(largest > 0, largest, jnp.ones((), gradient.dtype))
    number = jnp.sum(counted, dtype=gradient.dtype)
    total = jnp.sum(jnp.square(magnitude / safe))
    return safe * jnp.sqrt(total / jnp.maximum(number, 1)), number > 0


def _running_rms(
    old: jax.Array, gradient: jax.Array, weight: jax.Array, decay: jax.typing.ArrayLike
) -> jax.Array:
    if gradient is None or not is_float(gradient):
        return old
    new, known = _rms(jnp.asarray(gradient, old.dtype), weight)
    decay = jnp.asarray(decay, old.dtype)
    # 0 is "nothing seen yet": the first gradient that is not all zero starts the average.
    average = jnp.where(old > 0, decay * old + (1 - decay) * new, new)
    return jnp.where(known, average, old)
