"""Runs a program on the smaller operands that a cut leaves."""

from collections.abc import Sequence
from typing import Any

import jax

from .axis_rules import Cut, run_cut
from .program import Block, Call, Step, bind


def run_block(block: Block, arguments: Sequence[Any], cut: Cut) -> list[Any]:
    """Runs a block's steps on operands that are cut already; returns its results, cut."""
    values = dict(zip(block.inputs, arguments, strict=True))
    constants = cut.relations.program.constants

    def read(slot: int) -> Any:
        return values[slot] if slot in values else cut.take(slot, constants[slot])

    for step in block.steps:
        operands = [read(slot) for slot in step.inputs]
        if all(cut.is_whole(slot) for slot in (*step.inputs, *step.outputs)):
            results: Sequence[Any] = bind(step, *operands)
        elif step.call is None:
            results = run_cut(step, operands, cut)
        else:
            results = _call(step, step.call, operands, cut)
        values |= dict(zip(step.outputs, results, strict=True))
    return [read(slot) for slot in block.outputs]


def _call(step: Step, call: Call, operands: Sequence[Any], cut: Cut) -> Sequence[Any]:
    """Runs a call on cut operands as a call of the same kind, with its rules cut alike."""
    count = len(step.outputs)

    def body(*arguments):
        return tuple(run_block(call.body, arguments, cut))

    if call.kind == "checkpoint":
        policy, prevent = step.params["policy"], step.params["prevent_cse"]
        return jax.checkpoint(body, policy=policy, prevent_cse=prevent)(*operands)
    if call.kind == "custom_jvp":
        (rule,) = call.rules
        function = jax.custom_jvp(body)

        def jvp(primals, tangents):
            chosen = [tangents[i] for i in call.differentiable]
            out = run_block(rule, [*primals, *chosen], cut)
            return tuple(out[:count]), tuple(out[count:])

        function.defjvp(jvp)
        return function(*operands)
    forward, backward = call.rules
    reverse = jax.custom_vjp(body)

    def there(*arguments):
        out = run_block(forward, arguments, cut)
        return tuple(out[:count]), out[count:]

    def back(residuals, cotangents):
        found = iter(run_block(backward, [*residuals, *cotangents], cut))
        return tuple(
            next(found) if i in call.differentiable else None for i in range(len(step.inputs))
        )

    reverse.defvjp(there, back)
    return reverse(*operands)
