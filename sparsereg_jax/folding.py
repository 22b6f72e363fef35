"""Constants of dead units, moved to where they can stay when the units go.

A unit whose incoming weights are all zero has a constant value c, the activation of its bias. What
it adds to the next layer, c · W[unit], is a constant too: it goes into the bias that follows, and
W[unit] becomes zero. Where no bias can take it (none is there, or zero padding makes the
contribution of a convolution differ at the border), all constant units go into one of them: it
keeps its value c₁ and gets the weights Σ (cᵢ / c₁) W[i]. The function stays the same.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .dataflow import PRODUCTS, Known
from .indicators import full_product
from .program import Program, Step, all_steps, bind

# What may stand between a leaf and its use, or between a product and the bias that follows; casts
# from one floating type to another, too.
_TRANSPARENT = frozenset(["reshape", "transpose", "squeeze", "broadcast_in_dim", "copy"])


class Fold(NamedTuple):
    """One product relieved of the constants among its inputs."""

    where: str  # the product
    units: int  # how many units lost their outgoing weights
    leaf: int  # the slot of the leaf that took them: a bias, or the weights themselves
    added: np.ndarray | None  # what the bias took; None where one unit was kept for all


class Units(NamedTuple):
    """The contracted entries of a product that hold one nonzero constant wherever they are read."""

    mask: np.ndarray  # bool over the contracted axes, in the order in which the product pairs them
    values: np.ndarray  # float64, zero where the mask is False
    inputs: tuple[int, ...]  # the contracted axes of the operand that holds them
    weights: tuple[int, ...]  # and of the other one, in the same order


def fold_constants(
    program: Program,
    known: dict[int, Known],
    leaves: Sequence[int],
    removed: Callable[[int], np.ndarray] | None = None,
) -> tuple[dict[int, np.ndarray], list[Fold]]:
    """Moves the constants of dead units out of the way.

    Args:
        program: the traced function.
        known: what ``dataflow.forwards`` says of it.
        leaves: the slots of the parameters' leaves.
        removed: which entries of a slot's value will go. Constants of units that stay are left
            where they are, so that their gradients stay, too. None: all may go.

    Returns:
        The leaves that change, with their new values, and what was done.
    """
    graph = _Graph(program, leaves)
    values: dict[int, np.ndarray] = {}
    folds: list[Fold] = []
    for step in graph.steps:
        for side in (0, 1) if step.name in PRODUCTS else ():
            weights = graph.lineage(step.inputs[side])
            units = _constant_units(step, 1 - side, known[step.inputs[1 - side]])
            if weights is None or units is None:
                continue
            going = units.mask
            if removed is not None:
                gone = removed(step.inputs[1 - side])
                order = (*units.inputs, *(d for d in range(gone.ndim) if d not in units.inputs))
                gone = np.transpose(gone, order).reshape(*going.shape, -1)
                going = going & gone.all(axis=-1)
            if not going.any():
                continue
            leaf, chain = weights
            old = values.get(leaf, known[leaf].value)
            if old is None or not jnp.issubdtype(old.dtype, jnp.floating):
                continue
            operand = _along(chain, old)
            if operand.size != old.size:
                continue
            rows = np.moveaxis(operand.astype(np.float64), units.weights, range(units.mask.ndim))
            moved = units._replace(mask=going, values=np.where(going, units.values, 0.0))
            bias = _into_bias(graph, step, side, moved, operand)
            if bias is not None:
                where, added = bias
                taking = np.asarray(values.get(where, known[where].value))
                with np.errstate(over="ignore"):
                    taken = (taking.astype(np.float64) + added).astype(taking.dtype)
            if bias is not None and np.isfinite(taken).all():
                values[where] = taken
                rows[going] = 0
                folds.append(Fold(step.where, int(going.sum()), where, added))
            elif units.mask.sum() > 1 and units.mask.ndim == 1:
                staying = units.values if removed is None else np.where(going, 0.0, units.values)
                if not staying.any():
                    continue
                stays = int(np.argmax(np.abs(staying)))
                going = going & (np.arange(going.size) != stays)
                rows[stays] += np.tensordot(
                    units.values[going] / units.values[stays], rows[going], 1
                )
                rows[going] = 0
                folds.append(Fold(step.where, int(going.sum()), leaf, None))
            else:
                continue
            new = np.moveaxis(rows, range(units.mask.ndim), units.weights)
            values[leaf] = _back(chain, new, old.shape).astype(old.dtype)
            break
    return values, folds


class _Graph:
    """Who makes a slot and who uses it."""

    def __init__(self, program: Program, leaves: Sequence[int]) -> None:
        self.program = program
        self.leaves = frozenset(leaves)
        self.steps = [step for step in all_steps(program.block) if step.call is None]
        self.maker = {slot: step for step in self.steps for slot in step.outputs}
        self.user = {slot: step for step in self.steps for slot in step.inputs}
        self.uses = Counter(slot for step in self.steps for slot in step.inputs)
        self.uses.update(program.block.outputs)
        for step in all_steps(program.block):
            if step.call is not None and step.call.rules:  # which use what it is given, too
                self.uses.update(step.inputs)
            if step.call is not None:
                self.uses.update(step.call.body.outputs)

    def is_transparent(self, step: Step) -> bool:
        """Whether a step only moves entries, or casts them between floating types."""
        if step.name == "convert_element_type":
            slots = (*step.inputs, *step.outputs)
            return all(
                jnp.issubdtype(self.program.avals[slot].dtype, jnp.floating) for slot in slots
            )
        return step.name in _TRANSPARENT

    def lineage(self, slot: int) -> tuple[int, list[Step]] | None:
        """The leaf that a slot is, but for moves, if nothing else uses it."""
        chain: list[Step] = []
        while self.uses[slot] == 1:
            if slot in self.leaves:
                return slot, chain[::-1]
            step = self.maker.get(slot)
            if step is None or not self.is_transparent(step):
                return None
            chain.append(step)
            (slot,) = step.inputs
        return None


def _constant_units(step: Step, side: int, operand: Known) -> Units | None:
    value = operand.value
    if value is None or value.size == 0 or not jnp.issubdtype(value.dtype, jnp.floating):
        return None
    numbers = step.params["dimension_numbers"]
    if step.name == "dot_general":
        contracted, batch = numbers
        if batch[0] or not contracted[0]:
            return None
        mine, others = contracted[side], contracted[1 - side]
    else:
        if side != 0 or step.params["batch_group_count"] * step.params["feature_group_count"] != 1:
            return None
        mine, others = (numbers[0][1],), (numbers[1][1],)
    entries = np.moveaxis(value, mine, range(len(mine)))
    entries = entries.reshape(*entries.shape[: len(mine)], -1)
    fixed = ~np.moveaxis(operand.varies, mine, range(len(mine))).reshape(entries.shape)
    first = entries[..., :1]
    mask = (fixed & (entries == first)).all(axis=-1) & (first[..., 0] != 0)
    if not mask.any():
        return None
    values = np.where(mask, first[..., 0].astype(np.float64), 0.0)
    return Units(mask, values, tuple(mine), tuple(others))


def _into_bias(
    graph: _Graph,
    step: Step,
    side: int,
    units: Units,
    operand: np.ndarray,
) -> tuple[int, np.ndarray] | None:
    """The bias that follows a product, and what it takes for the units' contribution."""
    if step.name == "conv_general_dilated" and any(map(any, step.params["padding"])):
        return None  # under zero padding the contribution is another one at the border
    shape = graph.program.avals[step.inputs[1 - side]].shape
    free = tuple(d for d in range(len(shape)) if d not in units.inputs)
    constants = np.transpose(units.values, np.argsort(units.inputs))
    constants = np.broadcast_to(np.expand_dims(constants, free), shape)
    pair = (operand, constants) if side == 0 else (constants, operand)
    delta = np.asarray(full_product(step, *pair, dtype=jnp.result_type(float)))
    (slot,) = step.outputs
    while graph.uses[slot] == 1 and slot in graph.user:
        user = graph.user[slot]
        if graph.is_transparent(user) and user.name != "broadcast_in_dim":
            delta = _along([user], delta)
        elif user.name in ("add", "add_any", "sub"):
            place = user.inputs.index(slot)
            if user.name == "sub" and place == 1:
                delta = -delta
            bias = graph.lineage(user.inputs[1 - place])
            if bias is not None:
                sign = -1.0 if user.name == "sub" and place == 0 else 1.0
                return _taken(graph, bias, sign * delta)
            if graph.program.avals[user.outputs[0]].shape != delta.shape:
                return None
        else:
            return None
        (slot,) = user.outputs
    return None


def _taken(
    graph: _Graph, bias: tuple[int, list[Step]], delta: np.ndarray
) -> tuple[int, np.ndarray] | None:
    """What a leaf, moved and broadcast as it is, must take to add ``delta``; None if it cannot."""
    leaf, chain = bias
    aval = graph.program.avals[leaf]
    if not jnp.issubdtype(aval.dtype, jnp.floating):
        return None

    def forth(x):
        for step in chain:
            if step.name != "convert_element_type":
                (x,) = bind(step, x)
        return jnp.broadcast_to(x, delta.shape)

    pull = jax.linear_transpose(forth, np.zeros(aval.shape, jnp.result_type(float)))
    copies = np.asarray(pull(jnp.ones(delta.shape, jnp.result_type(float)))[0])
    added = np.asarray(pull(jnp.asarray(delta, jnp.result_type(float)))[0]) / np.maximum(copies, 1)
    image = np.asarray(forth(jnp.asarray(added)))
    close = np.allclose(image, delta, rtol=1e-5, atol=1e-6 * np.abs(delta).max(initial=0.0))
    return (leaf, added) if close else None


def _along(chain: Sequence[Step], value: np.ndarray) -> np.ndarray:
    """Takes a value through moves, without rounding it on the way."""
    for step in chain:
        if step.name != "convert_element_type":
            value = np.asarray(bind(step, jnp.asarray(value))[0])
    return value


def _back(chain: Sequence[Step], value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Undoes moves that neither drop nor repeat an entry."""
    if not chain:
        return value
    *rest, last = chain
    before = _along(rest, np.zeros(shape, np.float32)).shape
    if last.name == "transpose":
        value = np.transpose(value, np.argsort(last.params["permutation"]))
    return _back(rest, value.reshape(before), shape)
