"""Which entries of a function's values depend on its input, and which its result depends on.

Entry by entry, at one example shape. Forwards: an entry *varies* if some input can change it;
otherwise its value is known. Backwards: an entry is *needed* if changing it could change the
result. A product with a known zero neither varies nor needs its other factor, and a known zero
that is only summed up is not needed. What is not known here varies whenever an input reaches it,
and needs all it is given.

Values are taken to be finite: 0 times an infinity is not looked at.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .axis_rules import CARRIERS, ELEMENTWISE, LOOKUPS, REDUCTIONS, WINDOWS, carried
from .indicators import MOVES, move, move_back, product, product_back, transpose
from .program import Block, Call, Program, Step, all_steps, bind

PRODUCTS = frozenset({"dot_general", "conv_general_dilated"})


@dataclasses.dataclass(frozen=True)
class Known:
    """What is known of one value: where it varies, and what it is where it does not."""

    varies: np.ndarray  # bool, of the value's shape (perhaps a broadcast view)
    value: np.ndarray | None  # meaningless where it varies; None where all of it does

    @functools.cached_property
    def nonzero(self) -> np.ndarray:
        """Entries that may differ from zero."""
        if self.value is None:
            return self.varies
        return self.varies | (self.value != 0)


def constant(value: Any) -> Known:
    """A value that no input changes."""
    if hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jax.dtypes.extended):
        return unknown(value.shape)
    value = np.asarray(value)
    return Known(np.broadcast_to(np.False_, value.shape), value)


def unknown(shape: tuple[int, ...]) -> Known:
    """A value of which every entry varies."""
    return Known(np.broadcast_to(np.True_, shape), None)


def forwards(program: Program, values: Sequence[Known]) -> dict[int, Known]:
    """What is known of every slot, from what is known of the program's inputs."""
    known = dict(zip(program.block.inputs, values, strict=True))
    known |= {slot: constant(value) for slot, value in program.constants.items()}
    _follow(program.block, known, program.avals)
    return known


def _follow(block: Block, known: dict[int, Known], avals: list[Any]) -> None:
    """Adds what is known of a block's slots, from what is known of its inputs."""
    for step in all_steps(block):
        if step.call is not None:
            results = [known[slot] for slot in step.call.body.outputs]
        else:
            results = _forward(step, [known[slot] for slot in step.inputs], avals)
        known |= dict(zip(step.outputs, results, strict=True))


def backwards(
    program: Program, known: dict[int, Known], kept: Callable[[int], np.ndarray] | None = None
) -> dict[int, np.ndarray]:
    """Which entries of every slot are needed for the program's results.

    Args:
      program: the traced function.
      known: what :func:`forwards` says of it.
      kept: the entries of a slot that a cut leaves; None for all that are not needed. Whatever a
        needed operation reads must have the value that it had, be it a zero that is not needed: so
        these entries of its operands are needed, too.
    """
    needed: dict[int, np.ndarray] = {}
    for slot in program.block.outputs:
        _need(needed, slot, np.broadcast_to(np.True_, program.avals[slot].shape))
    _trace_back(program.block, known, program.avals, needed, kept)
    return needed


def _need(needed: dict[int, np.ndarray], slot: int, which: np.ndarray) -> None:
    old = needed.get(slot)
    needed[slot] = which if old is None or which.all() else old | which


def _trace_back(
    block: Block,
    known: dict[int, Known],
    avals: list[Any],
    needed: dict[int, np.ndarray],
    kept: Callable[[int], np.ndarray] | None,
) -> None:
    """Adds what is needed of a block's slots, from what is needed of its outputs."""
    for step in reversed(list(all_steps(block))):
        wanted = [
            needed.get(slot, np.broadcast_to(np.False_, avals[slot].shape)) for slot in step.outputs
        ]
        if not any(want.any() for want in wanted):
            if step.call is None and (not step.outputs or "callback" in step.name):
                for slot in step.inputs:  # printed, or sent somewhere else
                    _need(needed, slot, np.broadcast_to(np.True_, avals[slot].shape))
            continue
        if kept is not None:
            for slot in step.inputs:
                _need(needed, slot, kept(slot))
        if step.call is not None:
            for slot, want in zip(step.call.body.outputs, wanted, strict=True):
                _need(needed, slot, want)
            if kept is not None and step.call.rules:
                _through_rules(step, step.call, wanted, known, avals, needed, kept)
        else:
            through = _backward(step, [known[slot] for slot in step.inputs], wanted, avals)
            for slot, want in zip(step.inputs, through, strict=True):
                _need(needed, slot, want)


def _through_rules(
    step: Step,
    call: Call,
    wanted: Sequence[np.ndarray],
    known: dict[int, Known],
    avals: list[Any],
    needed: dict[int, np.ndarray],
    kept: Callable[[int], np.ndarray],
) -> None:
    """Adds what a call's derivative rules read for the derivatives of the entries that stay."""
    here = dict(known)
    if call.kind == "custom_jvp":
        (rule,) = call.rules
        for slot in rule.inputs[len(step.inputs) :]:
            here[slot] = unknown(avals[slot].shape)
        _follow(rule, here, avals)
        seeds = list(zip(rule.outputs, (*wanted, *wanted), strict=True))
    else:
        forward, backward = call.rules
        _follow(forward, here, avals)
        cotangents = backward.inputs[len(backward.inputs) - len(step.outputs) :]
        for slot, want in zip(cotangents, wanted, strict=True):  # zero where nothing needs it
            here[slot] = Known(want, np.zeros(avals[slot].shape, avals[slot].dtype))
        _follow(backward, here, avals)
        seeds = list(zip(forward.outputs, wanted, strict=False))
        seeds += [
            (slot, kept(step.inputs[i]))
            for slot, i in zip(backward.outputs, call.differentiable, strict=True)
        ]
    for slot, which in seeds:
        _need(needed, slot, which)
    for rule in reversed(call.rules):
        _trace_back(rule, here, avals, needed, kept)


def summed_constants(program: Program, known: dict[int, Known]) -> list[tuple[int, int]]:
    """Axes (of slots) over which a sum of constants is taken: it depends on how long they are."""
    found = []
    for step in all_steps(program.block):
        if step.name in ("reduce_sum", "reduce_prod"):
            axes = [[int(axis) for axis in step.params["axes"]]]
        elif step.name == "dot_general":
            axes = step.params["dimension_numbers"][0]
        else:
            continue
        result = known[step.outputs[0]]
        if result.value is not None and (~result.varies & (result.value != 0)).any():
            found += [
                (slot, d) for slot, which in zip(step.inputs, axes, strict=True) for d in which
            ]
    return found


def _run(step: Step, operands: Sequence[Any], shapes: list[tuple[int, ...]]) -> list[Any]:
    """The results of a step on host arrays, from all its operands and the results' shapes."""
    if step.name in MOVES:
        return move(step, operands, shapes)
    return bind(step, *map(jnp.asarray, operands))


def _forward(step: Step, operands: list[Known], avals: list[Any]) -> list[Known]:
    shapes = [avals[slot].shape for slot in step.outputs]
    if not shapes or "callback" in step.name:
        return [unknown(shape) for shape in shapes]  # what has effects is not run
    if not any(operand.varies.any() for operand in operands):
        if any(operand.value is None for operand in operands):
            return [unknown(shape) for shape in shapes]  # keys of random numbers, empty arrays
        return [
            constant(out) for out in _run(step, [operand.value for operand in operands], shapes)
        ]
    varies = _varies(step, operands, shapes, avals)
    if varies is None or all(which.all() for which in varies):
        return [unknown(shape) for shape in shapes]
    if step.name in LOOKUPS and any(operand.varies.any() for operand in operands[1:]):
        values = _looked_up(step, operands, avals)
    else:
        placeholders = [0] * len(operands)
        if step.name == "div":
            placeholders[1] = 1  # a known zero divided by whatever it is
        filled = [
            np.full(avals[slot].shape, placeholder, avals[slot].dtype)
            if operand.value is None
            else np.where(
                operand.varies, np.asarray(placeholder, operand.value.dtype), operand.value
            )
            for slot, operand, placeholder in zip(step.inputs, operands, placeholders, strict=True)
        ]
        values = _run(step, filled, shapes)
    return [Known(which, np.asarray(value)) for which, value in zip(varies, values, strict=True)]


def _varies(
    step: Step, operands: list[Known], shapes: list[tuple[int, ...]], avals: list[Any]
) -> list[np.ndarray] | None:
    """Which entries of the results vary; None for all of them."""
    name = step.name
    if name in ELEMENTWISE:
        which = [np.broadcast_to(operand.varies, shapes[0]) for operand in operands]
        out = np.logical_or.reduce(which)
        if name in ("mul", "and"):
            out = out & operands[0].nonzero & operands[1].nonzero
        elif name == "div":
            out = out & operands[0].nonzero
        elif name == "select_n" and operands[0].value is not None:
            chosen = _chosen(operands, shapes[0])
            out = which[0] | np.logical_or.reduce(
                [(chosen == i) & case for i, case in enumerate(which[1:])]
            )
        if name == "select_n" and all(case.value is not None for case in operands[1:]):
            first = operands[1]
            alike = [~case.varies & (case.value == first.value) for case in operands[1:]]
            out = out & ~np.logical_and.reduce(alike)  # the same constant, whichever is chosen
        return [np.broadcast_to(out, shapes[0])]
    if name in PRODUCTS:
        a, b = operands
        if a.varies.all() and b.varies.all():
            return None
        out = np.zeros(shapes[0], bool)
        if a.varies.any():
            out |= product(step, a.varies, b.nonzero)
        if b.varies.any():
            out |= product(step, a.nonzero, b.varies)
        return [out]
    if name in MOVES:
        if all(operand.varies.all() for operand in operands):
            return None
        return move(step, [operand.varies for operand in operands], shapes)
    if name in LOOKUPS:
        if any(operand.varies.any() for operand in operands[1:]):
            table = operands[0]
            if table.value is None:
                return None
            gone = _gone(step, avals)
            mixed = table.varies | (table.value != _first(table.value, gone))
            mixed = mixed | _may_fill(step, table.value)
            return [_spread(mixed.any(axis=gone), step, avals, shapes[0])]
        moved = bind(
            step,
            jnp.asarray(operands[0].varies.astype(np.float32)),
            *(jnp.asarray(operand.value) for operand in operands[1:]),
            **({"fill_value": None} if name == "gather" else {}),
        )
        return [np.asarray(out) != 0 for out in moved]
    if name in CARRIERS:
        which = []
        for places, operand in zip(carried(step, avals), operands, strict=True):
            if operand.varies.all():
                return None
            if name in WINDOWS:
                which.append(np.asarray(_window_sum(step, operand.varies.astype(np.float32))) != 0)
                continue
            gone = tuple(d for d, place in enumerate(places) if place is None)
            out = operand.varies.any(axis=gone, keepdims=name not in REDUCTIONS)
            which.append(np.broadcast_to(out, shapes[0]))
        return [np.logical_or.reduce(which)] * len(shapes)
    return None


def _chosen(operands: list[Known], shape: tuple[int, ...]) -> np.ndarray:
    """The case that a choice takes for each entry, meaningless where its index varies.

    As XLA does, an index beyond the cases is taken to be the nearest.
    """
    index = np.asarray(operands[0].value).astype(int)
    return np.broadcast_to(np.clip(index, 0, len(operands) - 2), shape)


def _backward(
    step: Step, operands: list[Known], wanted: list[np.ndarray], avals: list[Any]
) -> list[np.ndarray]:
    name = step.name
    shapes = [operand.varies.shape for operand in operands]
    if name in ELEMENTWISE:
        (want,) = wanted
        each = [want] * len(operands)
        if name == "mul":
            each = [want & operands[1].nonzero, want & operands[0].nonzero]
        elif name == "select_n" and operands[0].value is not None:
            chosen = _chosen(operands, want.shape)
            fixed = ~np.broadcast_to(operands[0].varies, want.shape)
            each = [want] + [want & ~(fixed & (chosen != i)) for i in range(len(operands) - 1)]
        return [_narrow(which, shape) for which, shape in zip(each, shapes, strict=True)]
    if name in PRODUCTS:
        (want,) = wanted
        a, b = operands
        first, second = product_back(step, a.nonzero, b.nonzero, want)
        return [first & a.nonzero, second & b.nonzero]
    if name in MOVES:
        return move_back(step, shapes, wanted)
    if name in REDUCTIONS:
        (want,) = wanted
        gone = tuple(int(axis) for axis in step.params["axes"])
        out = np.broadcast_to(np.expand_dims(want, gone), shapes[0])
        return [out & operands[0].nonzero if name == "reduce_sum" else out]
    if name in WINDOWS:
        (out,) = transpose(lambda x: [_window_sum(step, x)], shapes[:1], *wanted)
        return [out & operands[0].nonzero if name == "reduce_window_sum" else out]
    if name in LOOKUPS:
        (want,) = wanted
        rest = [np.broadcast_to(np.True_, shape) for shape in shapes[1:]]
        if not any(operand.varies.any() for operand in operands[1:]):
            indices = [jnp.asarray(operand.value) for operand in operands[1:]]
            changed = {"fill_value": None} if name == "gather" else {}
            (out,) = transpose(lambda x: bind(step, x, *indices, **changed), shapes[:1], want)
            return [out, *rest]
        places = carried(step, avals)[0]
        left = [place for place in places if place is not None]
        along = want.any(axis=tuple(d for d in range(want.ndim) if d not in left))
        order = sorted(left)
        along = np.transpose(along, [order.index(place) for place in left])
        gone = _gone(step, avals)
        return [np.broadcast_to(np.expand_dims(along, gone), shapes[0]), *rest]
    if name in CARRIERS:
        gone = tuple(d for d, place in enumerate(carried(step, avals)[0]) if place is None)
        want = np.logical_or.reduce([which.any(axis=gone, keepdims=True) for which in wanted])
        return [np.broadcast_to(want, shape) for shape in shapes]
    return [np.broadcast_to(np.True_, shape) for shape in shapes]


def _window_sum(step: Step, operand: Any) -> Any:
    params = step.params
    return jax.lax.reduce_window(
        operand,
        np.float32(0),
        jax.lax.add,
        params["window_dimensions"],
        params["window_strides"],
        params["padding"],
        params["base_dilation"],
        params["window_dilation"],
    )


def _narrow(which: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Undoes a broadcast: an entry is needed if any of its copies is."""
    if len(shape) < which.ndim:
        return np.asarray(which.any()).reshape(shape)
    stretched = tuple(d for d, n in enumerate(shape) if n != which.shape[d])
    return np.asarray(which.any(axis=stretched, keepdims=True)) if stretched else which


def _may_fill(step: Step, value: np.ndarray) -> np.ndarray:
    """Entries that an index out of range would replace by another value (NaN is not looked at)."""
    if step.name != "gather" or "FILL" not in str(step.params["mode"]):
        return np.zeros((), bool)
    fill = step.params["fill_value"]
    if fill is None:  # NaN, or of integers the least or the largest
        return np.asarray(not jnp.issubdtype(value.dtype, jnp.inexact))
    return np.asarray(False) if np.isnan(fill) else value != fill


def _gone(step: Step, avals: list[Any]) -> tuple[int, ...]:
    return tuple(d for d, place in enumerate(carried(step, avals)[0]) if place is None)


def _first(value: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    return value[tuple(slice(0, 1) if d in axes else slice(None) for d in range(value.ndim))]


def _spread(along: np.ndarray, step: Step, avals: list[Any], shape: tuple[int, ...]) -> np.ndarray:
    """Puts the axes that a lookup carries where they are in its result."""
    left = [place for place in carried(step, avals)[0] if place is not None]
    order = sorted(range(len(left)), key=left.__getitem__)
    full = [1] * len(shape)
    for axis in order:
        full[left[axis]] = along.shape[axis]
    return np.broadcast_to(np.transpose(along, order).reshape(full), shape)


def _looked_up(step: Step, operands: list[Known], avals: list[Any]) -> list[np.ndarray]:
    value, gone = np.asarray(operands[0].value), _gone(step, avals)
    along = _first(value, gone).reshape([n for d, n in enumerate(value.shape) if d not in gone])
    return [_spread(along, step, avals, avals[step.outputs[0]].shape)]
