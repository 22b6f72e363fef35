"""What a program that JAX traced consists of."""

import jax


def equations(jaxpr):
    """All equations of a jaxpr, those of inner jaxprs included."""
    for equation in jaxpr.eqns:
        yield equation
        values = list(equation.params.values())
        for inner in jax.tree.leaves(values, is_leaf=_is_program):
            if _is_program(inner):
                yield from equations(getattr(inner, "jaxpr", inner))


def _is_program(value):
    return hasattr(value, "jaxpr") or hasattr(value, "eqns")
