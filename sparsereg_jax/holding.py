"""Pruned entries, and the optimizer's memory of them, stay at exactly zero.

Both ends of the optimizer have to be held. Masking its gradients alone lets momentum move a pruned
weight; masking its updates alone lets the pruned weight's gradient refill the moments. So the
wrapper here stands around the whole optimizer.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .pruning import apply_mask, check_pruning_mask, full_mask
from .selection import is_float, leaf_keys, leaf_path
from .shrinkage import restart_if_any

PyTree = Any


class HoldZerosState(NamedTuple):
    """State of :func:`hold_zeros`."""

    pruning_mask: PyTree  # the params' structure and shapes, dtype=bool, True = keep
    inner_state: optax.OptState


def hold_zeros(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    r"""Wraps an optimizer so that pruned entries get no gradient and stay exactly 0.

    .. math::
      g_i \leftarrow m_i \, g_i, \qquad
      u_i \leftarrow \begin{cases} \mathrm{inner}(g)_i & m_i = 1 \\ -w_i & m_i = 0 \end{cases}

    with the pruning mask :math:`m` kept in the state (all ones at ``init``); :func:`prune` sets it.
    Both are choices, not products, so a NaN in a pruned entry's gradient does no harm.

    Place it around the whole chain, learning rate, shrinkage, clipping and all:
    ``hold_zeros(optax.chain(...))``. It may itself stand inside ``optax.MultiSteps``,
    ``optax.apply_if_finite``, ``flax.training.train_state.TrainState`` or ``nnx.Optimizer``. What
    changes weights behind it (an average of the weights, a lookahead) is not held.

    Entry-wise moments of a pruned entry are zeroed by :func:`prune` and stay 0, those with a
    leading memory axis (of ``optax.lbfgs``) included. Of optax's own optimizers these keep other
    state too, in which a pruned entry cannot be told apart or does not rest at 0; its weight is
    held all the same:

    =================  ==========================================================================
    adabelief          second moment rests at ``eps_root``
    adafactor          sums over rows and columns of large matrices; elsewhere rests at ``eps``
    adamax, adamaxw    largest gradient seen rests at ``eps``
    lbfgs              its line search keeps the gradient of the ``value_fn`` it is given
    sm3                largest gradients seen in rows and columns
    =================  ==========================================================================

    Nor do the moments of a pruned entry stay 0 behind a transformation that mixes the gradients of
    a leaf (``optax.centralize``) or adds to them (``optax.add_noise``).

    Args:
      inner: any optimizer or chain that returns finished updates.

    Returns:
      A transformation with state :class:`HoldZerosState`; extra arguments go to ``inner``.

    Raises:
      ValueError: in ``update``, ``params`` is None.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> tx = hold_zeros(optax.adam(0.1))
      >>> params = {"w": jnp.array([1.0, 2.0])}
      >>> params, state = prune(tx, params, tx.init(params), {"w": jnp.array([False, True])})
      >>> updates, state = tx.update({"w": jnp.array([5.0, 5.0])}, state, params)
      >>> print(optax.apply_updates(params, updates)["w"])
      [0.  1.9]
    """
    inner = optax.with_extra_args_support(inner)

    def init_fn(params):
        return HoldZerosState(full_mask(params), inner.init(params))

    def update_fn(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError(
                "hold_zeros: a pruned weight is held by the update -w; call"
                " `update(gradients, state, params)`."
            )
        gradients = _kept(state.pruning_mask, updates)
        updates, inner_state = inner.update(gradients, state.inner_state, params, **extra_args)
        updates = jax.tree.map(
            lambda update, keep, weight: (
                update
                if update is None or not is_float(weight)
                else jnp.where(keep, update, -jnp.asarray(weight, update.dtype))
            ),
            updates,
            state.pruning_mask,
            params,
            is_leaf=lambda leaf: leaf is None,
        )
        return updates, HoldZerosState(state.pruning_mask, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def prune(
    tx: optax.GradientTransformation,
    params: PyTree,
    opt_state: optax.OptState,
    pruning_mask: PyTree,
) -> tuple[PyTree, optax.OptState]:
    """Prunes: weights and moments outside the mask to zero, the mask held, the shrinkage restarted.

    All that belongs to one pruning, in one pure, jit-able call (``tx`` is static):

    1. the weights outside ``pruning_mask`` become exactly 0;
    2. every :func:`hold_zeros` state in ``opt_state`` gets the mask;
    3. the entry-wise moments of pruned entries become 0; all else in the state, step counts
       included, goes on;
    4. the shrinkage schedules restart (:func:`sparsereg_jax.restart_shrinkage`), if there are any.

    Args:
      tx: the optimizer that ``opt_state`` belongs to, holding zeros somewhere.
      params: the parameters, any tree.
      opt_state: the optimizer's state; also the ``opt_state`` of an ``nnx.Optimizer``, then with
        ``params = nnx.state(model, nnx.Param)``.
      pruning_mask: bool arrays, True = keep, with the structure and shapes of ``params``.

    Returns:
      The params and the optimizer state, structures, shapes and dtypes kept.

    Raises:
      ValueError: ``opt_state`` holds no mask, or none for a leaf that is to be pruned (a traced
        mask leaves such a leaf as it is), or ``pruning_mask`` or ``opt_state`` does not fit
        ``params``.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> tx = hold_zeros(optax.sgd(0.1, momentum=0.9))
      >>> w = jnp.array([0.01, -2.0])
      >>> w, state = prune(tx, w, tx.init(w), jnp.abs(w) > 0.1)
      >>> print(w, state.pruning_mask)
      [ 0. -2.] [False  True]
    """
    check_pruning_mask(params, pruning_mask)
    if not _holders(opt_state):
        raise ValueError(
            "prune: the optimizer state holds no pruning mask, so the next update would bring"
            " pruned weights back. Wrap the optimizer before `init`: tx = hold_zeros(tx)."
        )
    # nnx.Optimizer boxes the leaves of its state; unboxed it has the structure that `init` gives.
    leaves, boxed = jax.tree.flatten(opt_state)
    fresh = jax.eval_shape(tx.init, params)
    shapes = [leaf.shape for leaf in jax.tree.leaves(fresh)]
    if shapes != [jnp.shape(leaf) for leaf in leaves]:
        raise ValueError(
            f"prune: opt_state has leaves of shapes {[jnp.shape(leaf) for leaf in leaves]} where"
            f" tx.init(params) gives {shapes}. Pass the transformation and the params that it was"
            " made with."
        )
    state = jax.tree.unflatten(jax.tree.structure(fresh), leaves)
    pruning_mask = _only_held(pruning_mask, state)
    state = restart_if_any(_set_masks(_forget(state, pruning_mask), pruning_mask))
    return apply_mask(params, pruning_mask), jax.tree.unflatten(boxed, jax.tree.leaves(state))


def held_mask(params: PyTree, opt_state: optax.OptState) -> PyTree:
    """Reads the pruning mask that an optimizer state holds.

    Args:
      params: the parameters; they give the structure.
      opt_state: an optimizer state that contains :class:`HoldZerosState`, at any depth; under
        ``optax.masked`` or ``optax.partition`` each holds a part of the leaves.

    Returns:
      A pruning mask for ``params``: bool arrays, all True where no state holds a leaf.

    Raises:
      ValueError: ``opt_state`` holds no mask.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> params = {"w": jnp.ones(2)}
      >>> print(held_mask(params, hold_zeros(optax.sgd(0.1)).init(params))["w"])
      [ True  True]
    """
    if not _holders(opt_state):
        raise ValueError(
            "held_mask: the optimizer state holds no pruning mask. Wrap the optimizer before"
            " `init`: tx = hold_zeros(tx)."
        )
    held = _held(opt_state)

    def mask_of(kp, leaf):
        keys = leaf_keys(kp)
        return held[keys] if keys in held else full_mask(leaf)

    return jax.tree_util.tree_map_with_path(mask_of, params)


def unheld(params: PyTree, mask: PyTree, opt_state: optax.OptState) -> list[str]:
    """The paths of the leaves that ``mask``, a tree of Python bools, selects and no state holds."""
    held = _held(opt_state)
    return [
        leaf_path(kp)
        for (kp, _), selected in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(mask), strict=True
        )
        if selected and leaf_keys(kp) not in held
    ]


def _kept(pruning_mask: PyTree, tree: PyTree) -> PyTree:
    return jax.tree.map(
        lambda leaf, keep: (
            leaf if leaf is None or not is_float(leaf) else _kept_or_zero(jnp.asarray(leaf), keep)
        ),
        tree,
        pruning_mask,
        is_leaf=lambda leaf: leaf is None,
    )


@jax.custom_jvp
def _kept_or_zero(leaf: jax.Array, keep: jax.Array) -> jax.Array:
    """``jnp.where(keep, leaf, 0)``, also of NaN, by bits.

    Of the ``where`` XLA's CPU backend makes AVX-512 masked loads, which AMD processors are slow at:
    2.5 times the time of Adam alone, where this takes 1.3.
    """
    bits = jnp.dtype(f"uint{jnp.finfo(leaf.dtype).bits}")
    all_or_none = -keep.astype(bits)
    return jax.lax.bitcast_convert_type(
        jax.lax.bitcast_convert_type(leaf, bits) & all_or_none, leaf.dtype
    )


@_kept_or_zero.defjvp
def _kept_or_zero_jvp(primals, tangents):
    (leaf, keep), (tangent, _) = primals, tangents
    return _kept_or_zero(leaf, keep), jnp.where(keep, tangent, jnp.zeros_like(tangent))


def _is_holder(node: Any) -> bool:
    return isinstance(node, HoldZerosState)


def _is_hole(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _holders(opt_state: PyTree) -> list[HoldZerosState]:
    return [node for node in jax.tree.leaves(opt_state, is_leaf=_is_holder) if _is_holder(node)]


def _by_keys(tree: PyTree) -> dict[tuple[Any, ...], Any]:
    return {leaf_keys(kp): leaf for kp, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _held(opt_state: PyTree) -> dict[tuple[Any, ...], Any]:
    """The mask of every leaf that some state holds."""
    masks = [_by_keys(holder.pruning_mask) for holder in _holders(opt_state)]
    return {keys: keep for mask in masks for keys, keep in mask.items()}


def _only_held(pruning_mask: PyTree, opt_state: PyTree) -> PyTree:
    """The mask, all True where nothing would hold the zeros."""
    held = _held(opt_state)

    def only_held(kp, keep):
        if leaf_keys(kp) in held:
            return keep
        if not isinstance(keep, jax.core.Tracer) and not keep.all():
            raise ValueError(
                f"prune: no hold_zeros holds {leaf_path(kp)!r}, whose pruned weights would come"
                " back. Put hold_zeros around the whole optimizer, or leave the leaf out by mask."
            )
        return jnp.ones_like(keep)

    return jax.tree_util.tree_map_with_path(only_held, pruning_mask)


def _set_masks(opt_state: PyTree, pruning_mask: PyTree) -> PyTree:
    new = _by_keys(pruning_mask)

    def set_mask(node):
        if not _is_holder(node):
            return node
        # A copy: the state may be donated, the caller's mask may not.
        mask = jax.tree_util.tree_map_with_path(
            lambda kp, _: jnp.array(new[leaf_keys(kp)], copy=True), node.pruning_mask
        )
        return node._replace(pruning_mask=mask)

    return jax.tree.map(set_mask, opt_state, is_leaf=_is_holder)


def _forget(opt_state: PyTree, pruning_mask: PyTree) -> PyTree:
    """Zeroes the pruned entries of every tree of moments, also behind leading (memory) axes.

    Such a tree is known by its structure: that of the params, with or without holes. (The
    placeholders of ``optax.tree.map_params`` do not get through ``init`` of lbfgs and sm3.)
    """
    params_structure: Any = jax.tree.structure(pruning_mask)
    lone: Any = jax.tree.structure(0)
    if params_structure == lone and not jnp.ndim(pruning_mask):
        return opt_state  # it would have the shape of every hyper-parameter

    def like_params(node):
        structure: Any = jax.tree.structure(node, is_leaf=_is_hole)
        if structure in (params_structure, lone):
            return structure == params_structure
        try:
            below = structure.flatten_up_to(pruning_mask)
        except (ValueError, TypeError, KeyError):
            return False
        nodes = jax.tree.leaves(node, is_leaf=_is_hole)
        return all(
            _is_hole(leaf) or jax.tree.structure(keep) == lone
            for leaf, keep in zip(nodes, below, strict=True)
        )

    def forget(moment, keep):
        if _is_hole(moment) or not is_float(moment):
            return moment
        if moment.shape[moment.ndim - keep.ndim :] != keep.shape:
            return moment
        return jnp.where(keep, moment, jnp.zeros_like(moment))

    return jax.tree.map(
        lambda node: (
            jax.tree.map(forget, node, pruning_mask, is_leaf=_is_hole)
            if like_params(node)
            else node
        ),
        opt_state,
        is_leaf=like_params,
    )
