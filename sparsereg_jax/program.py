"""A traced function as one flat list of steps over numbered slots.

A jaxpr nests (``jit`` inside ``jit``) and shares: two calls of one inner function may be the same
object. Here every value of every call has a slot of its own, so that an analysis can hold facts
about values in plain lists. Only calls that carry a derivative rule of their own, or a memory
policy (``jax.checkpoint``), stay calls, with their bodies beside them.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

_INLINED = {"pjit", "jit", "closed_call", "core_call", "core_closed_call"}
_CHECKPOINTS = {"remat", "remat2", "checkpoint"}
_CUSTOM_JVP = {"custom_jvp_call"}
_CUSTOM_VJP = {"custom_vjp_call", "custom_vjp_call_jaxpr"}


def _stack(*operands: Any, axis: int) -> Any:
    return jax.lax.concatenate([jax.lax.expand_dims(x, (axis,)) for x in operands], axis)


def _unstack(operand: Any, *, axis: int) -> list[Any]:
    return [
        jax.lax.index_in_dim(operand, i, axis, keepdims=False) for i in range(operand.shape[axis])
    ]


def _tile(operand: Any, *, reps: Sequence[int]) -> Any:
    pairs = [size for pair in zip(reps, operand.shape, strict=True) for size in pair]
    places = range(1, len(pairs), 2)
    shape = [rep * size for rep, size in zip(reps, operand.shape, strict=True)]
    return jax.lax.reshape(jax.lax.broadcast_in_dim(operand, pairs, tuple(places)), shape)


# Newer JAX has primitives for what older JAX composes.
_COMPOSED: dict[str, Callable[..., Any]] = {"stack": _stack, "unstack": _unstack, "tile": _tile}


class Block(NamedTuple):
    """Steps with their entries and exits, as slots."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    steps: tuple["Step", ...]


class Call(NamedTuple):
    """A step with a body: ``kind`` is checkpoint, custom_jvp or custom_vjp.

    ``rules`` are the derivative rules as blocks over the whole shapes. custom_jvp: one block, from
    the inputs and the tangents of the ``differentiable`` ones to outputs and their tangents.
    custom_vjp: forward, from inputs to outputs and residuals; backward, from residuals and
    cotangents to the cotangents of the ``differentiable`` inputs.
    """

    kind: str
    body: Block
    rules: tuple[Block, ...] = ()
    differentiable: tuple[int, ...] = ()


class Step(NamedTuple):
    """One equation."""

    primitive: core.Primitive
    params: dict[str, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    where: str  # the module, and the line of the user's program
    call: Call | None = None

    @property
    def name(self) -> str:
        """The primitive's name."""
        return self.primitive.name


class Program(NamedTuple):
    """A whole traced function."""

    block: Block
    avals: list[Any]  # per slot: shape and dtype
    constants: dict[int, Any]  # slots of literals and closed-over arrays -> values
    reached: list[bool]  # per slot: does it depend on a varying input?
    weighted: list[bool]  # per slot: does it depend on a fixed one, a parameter?


def bind(step: Step, *operands: Any, **changed: Any) -> list[Any]:
    """Runs a step's primitive on other operands, with some of its parameters changed."""
    found = step.primitive.get_bind_params(step.params | changed)
    functions, params = (
        found if isinstance(found, tuple) else ((), found)
    )  # jax before 0.10: a pair
    out = step.primitive.bind(*functions, *operands, **params)
    return list(out) if step.primitive.multiple_results else [out]


def all_steps(block: Block) -> Iterator[Step]:
    """A block's steps in order, bodies of calls before the call itself; rules left out."""
    for step in block.steps:
        if step.call is not None:
            yield from all_steps(step.call.body)
        yield step


def trace(
    fn: Callable[..., Any], arguments: Sequence[Any], varying: Sequence[bool]
) -> tuple[Program, Any]:
    """Traces ``fn(*arguments)`` at the given shapes.

    Args:
        fn: the function.
        arguments: pytrees of arrays or of shapes (``jax.ShapeDtypeStruct``, symbolic ones too).
        varying: per argument, whether its values may vary from call to call.

    Returns:
        The program, whose block has an input for each leaf of the arguments, and the treedef of the
        function's result.
    """
    closed, shape = jax.make_jaxpr(fn, return_shape=True)(*arguments)
    flags = [
        flag for tree, flag in zip(arguments, varying, strict=True) for _ in jax.tree.leaves(tree)
    ]
    table = _Table()
    inputs = tuple(
        table.new(var.aval, flag, not flag)
        for var, flag in zip(closed.jaxpr.invars, flags, strict=True)
    )
    block = table.inline(closed.jaxpr, closed.consts, inputs)
    program = Program(block, table.avals, table.constants, table.reached, table.weighted)
    return program, jax.tree.structure(shape)


class _Table:
    """Gives out slots while a jaxpr is flattened."""

    def __init__(self) -> None:
        self.avals: list[Any] = []
        self.constants: dict[int, Any] = {}
        self.reached: list[bool] = []
        self.weighted: list[bool] = []
        self.in_rule = False

    def new(self, aval: Any, reached: bool = False, weighted: bool = False) -> int:
        self.avals.append(aval)
        self.reached.append(reached)
        self.weighted.append(weighted)
        return len(self.avals) - 1

    def struct(self, slot: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self.avals[slot].shape, self.avals[slot].dtype)

    def constant(self, aval: Any, value: Any) -> int:
        slot = self.new(aval)
        self.constants[slot] = value
        return slot

    def inline(
        self, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[int], outer: str = ""
    ) -> Block:
        slots: dict[Any, int] = dict(zip(jaxpr.invars, inputs, strict=True))
        for var, value in zip(jaxpr.constvars, consts, strict=True):
            slots[var] = self.constant(var.aval, value)
        steps: list[Step] = []

        def read(atom: Any) -> int:
            if isinstance(atom, core.Literal):
                return self.constant(atom.aval, atom.val)
            return slots[atom]

        def take_in(eqn: Any, jaxpr: Any, operands: tuple[int, ...]) -> None:
            block = self.inline(*_open(jaxpr), operands, _where(eqn, outer))
            steps.extend(block.steps)
            slots.update(zip(eqn.outvars, block.outputs, strict=True))

        for eqn in jaxpr.eqns:
            operands = tuple(map(read, eqn.invars))
            name = eqn.primitive.name
            if name in _INLINED:
                inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
                take_in(eqn, inner, operands)
                continue
            if name in _COMPOSED:
                composed = functools.partial(_COMPOSED[name], **eqn.params)
                inner = jax.make_jaxpr(composed)(*(self.struct(slot) for slot in operands))
                take_in(eqn, inner, operands)
                continue
            reached = any(self.reached[slot] for slot in operands)
            weighted = any(self.weighted[slot] for slot in operands)
            results = tuple(self.new(var.aval, reached, weighted) for var in eqn.outvars)
            slots.update(zip(eqn.outvars, results, strict=True))
            step = Step(eqn.primitive, eqn.params, operands, results, _where(eqn, outer))
            if name in _CHECKPOINTS:
                body = self.inline(*_open(eqn.params["jaxpr"]), operands)
                step = step._replace(call=Call("checkpoint", body))
            elif name in _CUSTOM_JVP | _CUSTOM_VJP and self.in_rule:
                # A rule calls its own function again: its rules would have no end.
                inner = eqn.params.get("call_jaxpr", eqn.params.get("fun_jaxpr"))
                take_in(eqn, inner, operands)
                continue
            elif name in _CUSTOM_JVP:
                step = step._replace(call=self.custom_jvp(step, eqn))
            elif name in _CUSTOM_VJP:
                step = step._replace(call=self.custom_vjp(step, eqn))
            steps.append(step)
        return Block(tuple(inputs), tuple(map(read, jaxpr.outvars)), tuple(steps))

    def custom_jvp(self, step: Step, eqn: Any) -> Call:
        body = self.inline(*_open(eqn.params["call_jaxpr"]), step.inputs)
        primals, which, call = self._differentiable(step)

        def rule(primals, tangents):
            chosen = [primals[i] for i in which]
            return jax.jvp(functools.partial(call, primals), (chosen,), (tangents,))

        closed = jax.make_jaxpr(rule)(primals, [primals[i] for i in which])
        tangents = [self.new(self.avals[step.inputs[i]], True, True) for i in which]
        block = self.rule(closed, (*step.inputs, *tangents))
        return Call("custom_jvp", body, (block,), which)

    def custom_vjp(self, step: Step, eqn: Any) -> Call:
        inner = eqn.params.get("call_jaxpr", eqn.params.get("fun_jaxpr"))
        body = self.inline(*_open(inner), step.inputs)
        primals, which, call = self._differentiable(step)
        structure = None

        def forward(primals):
            nonlocal structure
            out, pull = jax.vjp(functools.partial(call, primals), [primals[i] for i in which])
            residuals, structure = jax.tree.flatten(pull)
            return out, residuals

        def backward(residuals, cotangents):
            return jax.tree.unflatten(structure, residuals)(cotangents)[0]

        there, (out, residuals) = jax.make_jaxpr(forward, return_shape=True)(primals)
        back = jax.make_jaxpr(backward)(residuals, out)
        forwards = self.rule(there, step.inputs)
        cotangents = [self.new(self.avals[slot], True, True) for slot in step.outputs]
        entries = (*forwards.outputs[len(step.outputs) :], *cotangents)
        backwards = self.rule(back, entries)
        return Call("custom_vjp", body, (forwards, backwards), which)

    def rule(self, closed: Any, inputs: Sequence[int]) -> Block:
        self.in_rule = True
        block = self.inline(closed.jaxpr, closed.consts, inputs)
        self.in_rule = False
        return block

    def _differentiable(self, step: Step) -> tuple[list[Any], tuple[int, ...], Callable[..., Any]]:
        primals = [self.struct(slot) for slot in step.inputs]
        which = tuple(
            i for i, primal in enumerate(primals) if jax.numpy.issubdtype(primal.dtype, np.inexact)
        )

        def call(primals, chosen):
            operands = list(primals)
            for i, value in zip(which, chosen, strict=True):
                operands[i] = value
            return bind(step, *operands)

        return primals, which, call


def _open(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    return (jaxpr.jaxpr, jaxpr.consts) if hasattr(jaxpr, "consts") else (jaxpr, ())


def _where(eqn: Any, outer: str) -> str:
    """The module and the user's line; ``outer`` is that of the call around it."""
    stack = str(eqn.source_info.name_stack)
    frames = eqn.source_info.traceback.frames if eqn.source_info.traceback is not None else ()
    libraries = ("/jax/", "/flax/", "/haiku/", "/sparsereg_jax/", "/equinox/", "<frozen")
    for frame in frames:
        if not any(part in frame.file_name.replace("\\", "/") for part in libraries):
            line = f"{frame.file_name.replace(chr(92), '/').rsplit('/', 1)[-1]}:{frame.line_num}"
            return outer or (f"{stack} ({line})" if stack else line)
    return outer or stack or "a place that JAX does not name"
