"""What each primitive does with axes: which it joins, and how it runs on cut operands."""

import math
from typing import Any, NamedTuple

import jax
import numpy as np

from .axes import Axis, Dimensions
from .program import Block, Program, Step, bind

ELEMENTWISE = frozenset(
    [
        "abs",
        "acos",
        "acosh",
        "add",
        "add_any",
        "and",
        "asin",
        "asinh",
        "atan",
        "atan2",
        "atanh",
        "cbrt",
        "ceil",
        "clamp",
        "clz",
        "complex",
        "conj",
        "convert_element_type",
        "copy",
        "cos",
        "cosh",
        "digamma",
        "div",
        "eq",
        "eq_to",
        "erf",
        "erf_inv",
        "erfc",
        "exp",
        "exp2",
        "expm1",
        "floor",
        "ge",
        "gt",
        "igamma",
        "igammac",
        "imag",
        "integer_pow",
        "is_finite",
        "le",
        "le_to",
        "lgamma",
        "log",
        "log1p",
        "log2",
        "logistic",
        "lt",
        "lt_to",
        "max",
        "min",
        "mul",
        "name",
        "ne",
        "neg",
        "nextafter",
        "not",
        "or",
        "polygamma",
        "population_count",
        "pow",
        "real",
        "reduce_precision",
        "rem",
        "round",
        "rsqrt",
        "select_n",
        "shift_left",
        "shift_right_arithmetic",
        "shift_right_logical",
        "sign",
        "sin",
        "sinh",
        "sqrt",
        "square",
        "stop_gradient",
        "sub",
        "tan",
        "tanh",
        "xor",
    ]
)
REDUCTIONS = frozenset(
    [
        "reduce_sum",
        "reduce_max",
        "reduce_min",
        "reduce_prod",
        "reduce_and",
        "reduce_or",
        "reduce_xor",
        "argmax",
        "argmin",
    ]
)
WINDOWS = frozenset(["reduce_window_sum", "reduce_window_max", "reduce_window_min"])
_ALONG = {  # primitives that work along one axis -> where they say which
    "cumsum": "axis",
    "cumprod": "axis",
    "cummax": "axis",
    "cummin": "axis",
    "cumlogsumexp": "axis",
    "sort": "dimension",
}
LOOKUPS = frozenset({"gather", "dynamic_slice"})
CARRIERS = REDUCTIONS | WINDOWS | LOOKUPS | frozenset(_ALONG) | {"transpose", "squeeze", "rev"}


class Frozen(NamedTuple):
    """A primitive that keeps axes whole, because it looks at single indices or is not known."""

    primitive: str
    where: str
    axis: Axis


def carried(step: Step, avals: list[Any]) -> list[list[int | None]]:
    """Per operand and axis, the axis of the results that has the same indices, or None."""
    ranks = [len(avals[slot].shape) for slot in step.inputs]
    same: list[list[int | None]] = [list(range(rank)) for rank in ranks]
    params = step.params
    if step.name == "transpose":
        same[0] = [list(params["permutation"]).index(d) for d in range(ranks[0])]
    elif step.name in REDUCTIONS or step.name == "squeeze":
        gone = params["dimensions" if step.name == "squeeze" else "axes"]
        left = [d for d in range(ranks[0]) if d not in tuple(gone)]
        same[0] = [left.index(d) if d in left else None for d in range(ranks[0])]
    elif step.name in _ALONG:
        for axes in same:
            axes[params[_ALONG[step.name]]] = None
    elif step.name == "rev":
        for d in params["dimensions"]:
            same[0][d] = None
    elif step.name in WINDOWS:
        trivial = zip(
            params["window_dimensions"], params["window_strides"], params["padding"], strict=True
        )
        for d, (size, stride, padding) in enumerate(trivial):
            if (
                size != 1
                or stride != 1
                or tuple(padding) != (0, 0)
                or params["base_dilation"][d] != 1
            ):
                same[0][d] = None
    elif step.name == "dynamic_slice":
        whole, part = avals[step.inputs[0]].shape, params["slice_sizes"]
        same[0] = [d if _same(whole[d], part[d]) else None for d in range(ranks[0])]
    elif step.name == "gather":
        numbers = params["dimension_numbers"]
        shape, sizes = avals[step.inputs[0]].shape, params["slice_sizes"]
        windows = [
            d
            for d in range(ranks[0])
            if d not in numbers.collapsed_slice_dims and d not in numbers.operand_batching_dims
        ]
        same[0] = [None] * ranks[0]
        for d, out in zip(windows, numbers.offset_dims, strict=True):
            # A window as long as the axis cannot move, where it is clipped to stay within.
            held = d not in numbers.start_index_map or "CLIP" in str(params["mode"])
            if _same(sizes[d], shape[d]) and held:
                same[0][d] = out
        rank = len(avals[step.outputs[0]].shape)
        batch = [d for d in range(rank) if d not in numbers.offset_dims]
        same[1] = [*batch, None]
        for d in numbers.start_indices_batching_dims:
            same[1][d] = None
    return same


class Relations:
    """The axes of every slot of a program, unified as its steps ask."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.dimensions = Dimensions()
        self.axes: list[tuple[Axis, ...]] = [
            tuple(self.dimensions.new(size) for size in getattr(aval, "shape", ()))
            for aval in program.avals
        ]
        self.stops: list[Frozen] = []
        self.kept: list[tuple[Axis, np.ndarray]] = []  # indices that must stay
        self.gathered: dict[tuple[int, int], Axis] = {}  # (slot, axis) -> what is flattened into it
        self._sliced: dict[tuple[int, int], np.ndarray] = {}  # (slot, axis) -> what slices read
        for slot in program.constants:
            self.dimensions.pin(self._flat(slot))
        self._block(program.block)
        for axis, step in self.dimensions.settle():
            self.stops.append(Frozen(step.name, step.where, axis))
        for (slot, d), parts in self.gathered.items():
            if any(map(self.dimensions.is_pinned, self.dimensions.expand(self.axes[slot][d]))):
                self.dimensions.pin(parts)
        for (slot, d), read in self._sliced.items():  # unread for want of a slice, not of weights
            self.kept.append((self.axes[slot][d], np.flatnonzero(~read)))

    def _block(self, block: Block) -> None:
        for step in block.steps:
            if step.call is None:
                self._step(step)
                continue
            self._block(step.call.body)
            self._alike(step.outputs, step.call.body.outputs)
            inputs = [step.inputs[i] for i in step.call.differentiable]
            for rule in step.call.rules:
                self._block(rule)
            if step.call.kind == "custom_jvp":
                (rule,) = step.call.rules
                self._alike(rule.inputs[len(step.inputs) :], inputs)
                self._alike(rule.outputs, (*step.outputs, *step.outputs))
            elif step.call.kind == "custom_vjp":
                forward, backward = step.call.rules
                count = len(step.outputs)
                self._alike(forward.outputs[:count], step.outputs)
                self._alike(backward.inputs[len(backward.inputs) - count :], step.outputs)
                self._alike(backward.outputs, inputs)

    def _alike(self, first: tuple[int, ...], second: Any) -> None:
        for a, b in zip(first, second, strict=True):
            for left, right in zip(self.axes[a], self.axes[b], strict=True):
                self.dimensions.unify(left, right)

    def _flat(self, slot: int) -> Axis:
        return tuple(dimension for axis in self.axes[slot] for dimension in axis)

    def _shape(self, slot: int) -> tuple[Any, ...]:
        return self.program.avals[slot].shape

    def _stop(self, step: Step, *axes: Axis, pin: bool = True) -> None:
        for axis in axes:
            self.dimensions.freeze(axis)
            if pin:
                self.dimensions.pin(axis)
            if axis:
                self.stops.append(Frozen(step.name, step.where, axis))

    def _step(self, step: Step) -> None:
        name, params, unify, axes = step.name, step.params, self.dimensions.unify, self.axes
        if name in ELEMENTWISE:
            for slot in step.inputs:
                for out in step.outputs:
                    if self._shape(slot):
                        for a, b, n, m in zip(
                            axes[slot], axes[out], self._shape(slot), self._shape(out), strict=True
                        ):
                            if _same(n, m):
                                unify(a, b)
        elif name == "dot_general":
            lhs, rhs, result = (axes[slot] for slot in (*step.inputs, *step.outputs))
            (left, right), (left_batch, right_batch) = params["dimension_numbers"]
            for a, b in zip((*left, *left_batch), (*right, *right_batch), strict=True):
                unify(lhs[a], rhs[b])
            free = [lhs[d] for d in left_batch]
            free += [lhs[d] for d in range(len(lhs)) if d not in (*left, *left_batch)]
            free += [rhs[d] for d in range(len(rhs)) if d not in (*right, *right_batch)]
            for a, b in zip(free, result, strict=True):
                unify(a, b)
        elif name == "conv_general_dilated":
            self._convolution(step)
        elif name == "reshape":
            self._reshape(step)
        elif name == "broadcast_in_dim":
            (out,) = step.outputs
            for d, to in enumerate(params["broadcast_dimensions"]):
                if _same(self._shape(step.inputs[0])[d], self._shape(out)[to]):
                    unify(axes[step.inputs[0]][d], axes[out][to])
        elif name == "iota":
            self._stop(step, axes[step.outputs[0]][params["dimension"]])
        elif name == "concatenate":
            self._pieces(step, step.outputs[0], step.inputs, params["dimension"])
        elif name == "split":
            self._pieces(step, step.inputs[0], step.outputs, params["axis"])
        elif name == "slice":
            whole, part = step.inputs[0], step.outputs[0]
            strides = params["strides"] or (1,) * len(axes[whole])
            for d, (start, stride) in enumerate(zip(params["start_indices"], strides, strict=True)):
                size = self._shape(whole)[d]
                if isinstance(size, int) and size != 1:
                    read = self._sliced.setdefault((whole, d), np.zeros((size,), bool))
                    read[start : params["limit_indices"][d] : stride] = True
                self._part(step, whole, part, d, start, stride)
        elif name == "pad":
            part, whole = step.inputs[0], step.outputs[0]
            for d, (low, high, interior) in enumerate(params["padding_config"]):
                plain = low >= 0 and high >= 0 and interior == 0
                self._part(step, whole, part, d, low if plain else -1, 1)
        elif name == "dynamic_update_slice":
            operand, update = step.inputs[:2]
            self._alike((operand,), step.outputs)
            for d, (n, m) in enumerate(zip(self._shape(operand), self._shape(update), strict=True)):
                if _same(n, m):
                    unify(axes[operand][d], axes[update][d])
                else:
                    self._stop(step, axes[operand][d], axes[update][d])
        elif name in CARRIERS:
            self._carry(step)
        else:
            # All of an unknown primitive's results vary alike if an input reaches it; if none does,
            # its results are some constant pattern of just this size.
            pin = not self.program.reached[step.outputs[0]] if step.outputs else False
            for slot in (*step.inputs, *step.outputs):
                self._stop(step, *axes[slot], pin=pin)

    def _reshape(self, step: Step) -> None:
        (whole,), (out,) = step.inputs, step.outputs
        if self.program.weighted[whole]:
            if not self.dimensions.unify(self._flat(whole), self._flat(out)):
                both = self.dimensions.expand((*self._flat(whole), *self._flat(out)))
                frozen = tuple(filter(self.dimensions.is_frozen, both))
                self.stops.append(Frozen(step.name, step.where, frozen))
            return
        # Before the first weights an axis that others are flattened into (the pixels of an image)
        # need not be cut as their product: single indices are taken from it.
        for before, after in _blocks(self._shape(whole), self._shape(out)):
            axes = tuple(dim for d in before for dim in self.axes[whole][d])
            if len(axes) > 1 and sum(bool(self.axes[out][d]) for d in after) == 1:
                (flat,) = (d for d in after if self.axes[out][d])
                self.dimensions.freeze(axes)
                self.gathered[out, flat] = axes
            else:
                self.dimensions.unify(axes, tuple(dim for d in after for dim in self.axes[out][d]))

    def _gather_batches(self, step: Step) -> tuple[set[int], set[int], set[int]]:
        """Ties the batches of a gather; their places in the result, the operand, the indices."""
        numbers, (result,) = step.params["dimension_numbers"], step.outputs
        of_operand = tuple(numbers.operand_batching_dims)
        of_indices = tuple(numbers.start_indices_batching_dims)
        rest = [d for d in range(len(self.axes[result])) if d not in numbers.offset_dims]
        places = {rest[e] for e in of_indices}
        for d, e in zip(of_operand, of_indices, strict=True):
            batch = self.axes[result][rest[e]]
            self.dimensions.unify(self.axes[step.inputs[0]][d], batch)
            self.dimensions.unify(self.axes[step.inputs[1]][e], batch)
            self.dimensions.freeze(batch)
        return places, set(of_operand), set(of_indices)

    def _carry(self, step: Step) -> None:
        taken: set[int] = set()
        batched: list[set[int]] = [set() for _ in step.inputs]  # axes along which it works alike
        if step.name == "gather":
            taken, batched[0], batched[1] = self._gather_batches(step)
        places_of = carried(step, self.program.avals)
        for slot, places, alike in zip(step.inputs, places_of, batched, strict=True):
            for d, (axis, place) in enumerate(zip(self.axes[slot], places, strict=True)):
                if place is None:
                    if step.name not in REDUCTIONS and d not in alike:
                        self._stop(step, axis)
                else:
                    taken.add(place)
                    for out in step.outputs:
                        self.dimensions.unify(axis, self.axes[out][place])
        for out in step.outputs:
            for place, axis in enumerate(self.axes[out]):
                if place not in taken:
                    self._stop(step, axis)

    def _pieces(self, step: Step, whole: int, parts: tuple[int, ...], along: int) -> None:
        start = 0
        for part in parts:
            for d in range(len(self.axes[whole])):
                if d == along:
                    self._part(step, whole, part, d, start, 1)
                else:
                    self.dimensions.unify(self.axes[whole][d], self.axes[part][d])
            start += self._shape(part)[along]

    def _part(self, step: Step, whole: int, part: int, d: int, start: int, stride: int) -> None:
        """Axis d of ``part`` is a run of the indices of axis d of ``whole``."""
        n, m = self._shape(whole)[d], self._shape(part)[d]
        a, b = self.axes[whole][d], self.axes[part][d]
        if _same(n, m) and start >= 0:
            self.dimensions.unify(a, b)
        elif stride != 1 or start < 0 or not isinstance(n, int) or not isinstance(m, int) or m == 0:
            self._stop(step, a, b)
        elif m == 1:
            self.dimensions.pin(a)
            self.kept.append((a, np.array([start])))
        else:
            self.dimensions.link(a, np.arange(start, start + m), b, np.arange(m), step)

    def _convolution(self, step: Step) -> None:
        params, dimensions = step.params, self.dimensions
        lhs, rhs, out = (self.axes[slot] for slot in (*step.inputs, *step.outputs))
        left, right, result = params["dimension_numbers"]
        if params["batch_group_count"] != 1:
            return self._stop(step, *lhs, *rhs, *out)
        dimensions.unify(lhs[left[0]], out[result[0]])
        groups = params["feature_group_count"]
        group = dimensions.new(groups)
        inner = dimensions.new(self._shape(step.inputs[1])[right[1]])
        outer = dimensions.new(self._shape(step.inputs[1])[right[0]] // groups)
        dimensions.unify(lhs[left[1]], group + inner)
        dimensions.unify(rhs[right[1]], inner)
        dimensions.unify(rhs[right[0]], group + outer)
        dimensions.unify(out[result[1]], group + outer)
        for d in range(len(left) - 2):
            trivial = (
                self._shape(step.inputs[1])[right[2 + d]] == 1
                and params["window_strides"][d] == 1
                and tuple(params["padding"][d]) == (0, 0)
                and params["lhs_dilation"][d] == 1
            )
            if trivial:
                dimensions.unify(lhs[left[2 + d]], out[result[2 + d]])
            else:
                self._stop(step, lhs[left[2 + d]], out[result[2 + d]])
            dimensions.freeze(rhs[right[2 + d]])  # the window: no unit is lost by keeping it
        return None


class Cut(NamedTuple):
    """A program with some indices of its dimensions removed."""

    relations: Relations
    keep: dict[int, np.ndarray]  # dimension -> bool per index; not there: all stay

    def mask(self, slot: int, d: int) -> np.ndarray | None:
        """Which indices of this axis stay; None for all."""
        dimensions = self.relations.dimensions
        roots = dimensions.expand(self.relations.axes[slot][d])
        if not any(root in self.keep for root in roots):
            return None
        mask = np.ones((1,), bool)
        for root in roots:
            here = self.keep.get(root)
            if here is None:
                here = np.ones((dimensions.size(root),), bool)
            mask = (mask[:, None] & here[None, :]).reshape(-1)
        return mask

    def shape(self, slot: int) -> tuple[Any, ...]:
        """The shape after the cut."""
        dimensions = self.relations.dimensions

        def cut(axis: Any, size: Any) -> Any:
            roots = dimensions.expand(axis)
            if not any(root in self.keep for root in roots):
                return size
            # Root by root: a mask of the whole axis has no size where one of them is symbolic.
            return math.prod(
                int(self.keep[root].sum()) if root in self.keep else dimensions.size(root)
                for root in roots
            )

        shape = self.relations.program.avals[slot].shape
        return tuple(map(cut, self.relations.axes[slot], shape))

    def is_whole(self, slot: int) -> bool:
        """Whether nothing is removed from the slot's value."""
        expand = self.relations.dimensions.expand
        axes = self.relations.axes[slot]
        return not any(root in self.keep for axis in axes for root in expand(axis))

    def entries(self, slot: int) -> np.ndarray:
        """Which entries of the slot's value stay."""
        shape = self.relations.program.avals[slot].shape
        kept: np.ndarray = np.broadcast_to(np.True_, shape)
        for d in range(len(shape)):
            if (mask := self.mask(slot, d)) is not None:
                kept = kept & mask.reshape([-1 if e == d else 1 for e in range(len(shape))])
        return kept

    def take(self, slot: int, value: Any, apart: bool = False) -> Any:
        """The kept part of a whole value; ``apart``: see :func:`take_apart`."""
        for d in range(len(self.relations.axes[slot])):
            if (mask := self.mask(slot, d)) is not None:
                value = (take_apart if apart else take)(value, mask, d)
        return value


def take(value: Any, mask: np.ndarray, axis: int) -> Any:
    """The indices of an axis where a mask is True; as a slice where they are one run."""
    indices = np.flatnonzero(mask)
    if indices.size and indices[-1] - indices[0] + 1 == indices.size:
        return jax.lax.slice_in_dim(value, int(indices[0]), int(indices[-1]) + 1, axis=axis)
    return jax.numpy.take(value, indices, axis=axis, mode="clip", unique_indices=True)


def take_apart(value: Any, mask: np.ndarray, axis: int) -> Any:
    """:func:`take` of data, in memory of its own.

    XLA's CPU backend fuses a gather into the product that follows, which then runs without its fast
    routines: three times slower than both apart.
    """
    return jax.lax.optimization_barrier(take(value, mask, axis))


def run_cut(step: Step, operands: list[Any], cut: Cut) -> list[Any]:
    """Runs a step on operands that are cut already; returns its results, cut."""
    name, params = step.name, step.params
    if name == "broadcast_in_dim":
        return bind(step, *operands, shape=cut.shape(step.outputs[0]))
    if name == "reshape":
        (slot,) = step.outputs
        flat = [d for d in range(len(cut.shape(slot))) if (slot, d) in cut.relations.gathered]
        whole = cut.relations.program.avals[slot].shape
        new = tuple(whole[d] if d in flat else size for d, size in enumerate(cut.shape(slot)))
        (value,) = bind(step, *operands, new_sizes=new)
        for d in flat:
            if (mask := cut.mask(slot, d)) is not None:
                value = take_apart(value, mask, d)
        return [value]
    if name == "iota":
        return bind(step, *operands, shape=cut.shape(step.outputs[0]))
    if name == "split":
        axis = params["axis"]
        return bind(step, *operands, sizes=tuple(cut.shape(slot)[axis] for slot in step.outputs))
    if name == "slice":
        shape = cut.shape(step.outputs[0])
        starts = [
            start if (mask := cut.mask(step.inputs[0], d)) is None else int(mask[:start].sum())
            for d, start in enumerate(params["start_indices"])
        ]
        if all(cut.mask(step.inputs[0], d) is None for d in range(len(shape))):
            return bind(step, *operands)
        limits = [
            limit if cut.mask(step.inputs[0], d) is None else starts[d] + shape[d]
            for d, limit in enumerate(params["limit_indices"])
        ]
        return bind(step, *operands, start_indices=tuple(starts), limit_indices=tuple(limits))
    if name == "pad":
        config = [
            (low, high, interior)
            if (mask := cut.mask(step.outputs[0], d)) is None
            else (int(mask[:low].sum()), int(mask[len(mask) - high :].sum()), interior)
            for d, (low, high, interior) in enumerate(params["padding_config"])
        ]
        return bind(step, *operands, padding_config=tuple(config))
    if name == "conv_general_dilated":
        left, right, _ = params["dimension_numbers"]
        channels = cut.shape(step.inputs[0])[left[1]]
        return bind(
            step,
            *operands,
            feature_group_count=channels // cut.shape(step.inputs[1])[right[1]],
        )
    if name in LOOKUPS:
        places = carried(step, cut.relations.program.avals)[0]
        shape = cut.shape(step.inputs[0])
        sizes = tuple(
            shape[d] if place is not None else size
            for d, (place, size) in enumerate(zip(places, params["slice_sizes"], strict=True))
        )
        return bind(step, *operands, slice_sizes=sizes)
    return bind(step, *operands)


def _same(a: Any, b: Any) -> bool:
    return bool(a == b)


def _blocks(before: tuple[Any, ...], after: tuple[Any, ...]) -> list[tuple[list[int], list[int]]]:
    """Pairs of runs of axes with the same product, as short as can be: what a reshape reshapes."""
    blocks: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        left: list[int] = []
        right: list[int] = []
        m: Any = 1
        n: Any = 1
        while i < len(before) or j < len(after):
            if left and right and _same(m, n):
                break
            compared = isinstance(m, int) and isinstance(n, int)  # symbolic sizes are not
            from_left = not left or (bool(right) and (m < n if compared else True))
            if (from_left and i < len(before)) or j == len(after):
                left.append(i)
                m, i = m * before[i], i + 1
            else:
                right.append(j)
                n, j = n * after[j], j + 1
        blocks.append((left, right))
    return blocks
