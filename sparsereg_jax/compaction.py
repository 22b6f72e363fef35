"""A smaller dense network that computes the same function, from the jaxpr of any JAX function.

Each step has its own module: ``program`` flattens the jaxpr; ``axis_rules`` says which axes must
be cut alike; ``dataflow`` says which entries vary and which are needed; ``folding`` moves the
constants of dead units out of the way; ``cutting`` chooses the indices that go. The smaller
function traces the original anew at each input shape and runs its primitives on the smaller
operands (``replay``).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from .axis_rules import Cut, Relations
from .cutting import choose, complete
from .dataflow import Known, constant, forwards, summed_constants, unknown
from .folding import fold_constants
from .program import Program, trace
from .replay import run_block
from .selection import aligned, leaf_path


class LeafPlan(NamedTuple):
    """What stays of one leaf, of the parameters or of the inputs."""

    path: str
    shape: tuple[int, ...]
    kept: tuple[np.ndarray | None, ...]  # per axis: the indices that stay, int64; None: all

    @property
    def new_shape(self) -> tuple[int, ...]:
        """The shape of what stays."""
        return tuple(
            size if kept is None else len(kept)
            for size, kept in zip(self.shape, self.kept, strict=True)
        )


class FoldedConstants(NamedTuple):
    """Units of constant value whose contribution to a product was moved."""

    where: str  # the product
    units: int  # how many of them need no longer be there
    path: str  # the leaf that took their contribution: a bias, or the weights
    added: np.ndarray | None  # what the bias took, of its shape; None: one unit stays for all


class Stop(NamedTuple):
    """Axes of parameters that stay whole because of one operation."""

    primitive: str
    where: str  # its module, and the line of the program that it comes from
    axes: tuple[tuple[str, int], ...]  # (path of the leaf, axis)


class CompactionPlan(NamedTuple):
    """What :func:`compact` found; :func:`compaction_table` prints it."""

    leaves: tuple[LeafPlan, ...]  # in the order of ``jax.tree.leaves(params)``
    inputs: tuple[LeafPlan, ...]  # in the order of ``jax.tree.leaves(inputs)``
    folded: tuple[FoldedConstants, ...]
    stops: tuple[Stop, ...]
    variable: tuple[tuple[bool, ...], ...]  # per input leaf and axis: may it have another size?
    zeros: int  # entries of the parameters that were zero


class Compacted(NamedTuple):
    """A smaller network."""

    fn: Callable[..., Any]  # (smaller params, *inputs) -> what the original returns
    params: chex.ArrayTree  # smaller arrays in the same tree
    plan: CompactionPlan


def compact(fn: Callable[..., Any], params: chex.ArrayTree, *inputs: Any) -> Compacted:
    r"""Makes a network with zeros really smaller: dead units are removed, the function stays.

    A unit (a column of a kernel, a channel of a convolution, a head of an attention) goes

    - if nothing reads it: all its outgoing weights are zero;
    - if no input changes it: all its incoming weights are zero. Its constant :math:`c = f(b)` goes
      into the bias that follows, :math:`b' \leftarrow b' + c\,W'`; where there is no such bias, one
      constant unit is kept for all of them.

    Both are found for any traceable function, without knowing its layers: from the function's jaxpr
    and the zeros of ``params``, forwards and backwards through residual branches, normalizations,
    attention, reshapes, concatenations. What an operation that is not understood touches stays as
    it is, and the plan's ``stops`` name that operation. Pixels or features that no weight reads are
    cut from the inputs inside the smaller function, which takes the same inputs (of an image that
    is flattened, if more than an eighth of them goes).

    Args:
        fn: ``fn(params, *inputs)``, traceable by JAX; without training-time randomness (dropout
            off, batch norm with running statistics), so that there is one function to keep. For a
            Linen model ``model.apply``; for an nnx one
            ``lambda state, x: nnx.merge(graphdef, state)(x)`` after ``nnx.split(model)``.
        params: a tree of arrays with zeros, after ``prune`` or ``apply_mask``. Statistics of batch
            norms belong here, too: ``variables`` of a Linen model.
        *inputs: examples, or their shapes (``jax.ShapeDtypeStruct``). Only shapes and dtypes count,
            so a batch of one or two is enough. What changes from call to call (a cache, a random
            key) is an input, not a parameter.

    Returns:
        ``Compacted(fn, params, plan)``. ``fn(params, *inputs)`` is traced anew at each shape, so
        wrap it in ``jax.jit``; every input axis of more than one along which the function works
        alike, and a first axis of one (a batch), may have another size than in the example, a
        symbolic one (``jax.export``) too, if the same units go where it is twice as long or one
        shorter: ``fn`` is traced and analysed there as well. It stays trainable: custom derivative
        rules are kept (for first derivatives), and kept entries that are not zero have the
        gradients that they had, but for what acted through folded constants: these are fixed, or
        follow the unit kept for all.
        ``plan.leaves`` has the kept indices of each leaf and axis; ``new_widths(plan)`` the widths
        with which the model can be built anew. ``params`` keep their dtypes. Where there is nothing
        to remove, the network is returned as it is and the plan's table says why.

    Raises:
        TypeError: ``fn`` cannot be traced, or a leaf of ``params`` or ``inputs`` is no array.
        ValueError: an input's shape is symbolic or has a zero. And later, in the smaller function:
            parameters of another structure or shape, or inputs of another size along an axis that
            may not vary.

    Numerics: sums of the same terms, without the zeros, in another order; so equal to float
    tolerance. All intermediate values must be finite: 0 times infinity is taken for 0.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> def mlp(params, x):
        ...     hidden = jax.nn.relu(x @ params["w1"] + params["b1"][None])
        ...     return hidden @ params["w2"] + params["b2"][None]
        >>> params = {
        ...     "w1": jnp.array([[1.0, 0.0, 2.0], [3.0, 0.0, 4.0]]),  # unit 1 reads nothing
        ...     "b1": jnp.array([0.0, 0.5, 0.0]),
        ...     "w2": jnp.array([[1.0], [2.0], [0.0]]),  # nothing reads unit 2
        ...     "b2": jnp.array([0.25]),
        ... }
        >>> small = compact(mlp, params, jax.ShapeDtypeStruct((1, 2), jnp.float32))
        >>> print(compaction_table(small.plan))
        path   shape   compacted
        b1     (3,)    (1,)
        b2     (1,)    (1,)
        w1     (2, 3)  (2, 1)
        w2     (3, 1)  (1, 1)
        total  13      5
        1 constant unit folded into b2
        >>> x = jnp.array([[1.0, -1.0], [0.5, 2.0]])
        >>> mlp(params, x)
        Array([[1.25],
               [7.75]], dtype=float32)
        >>> jax.jit(small.fn)(small.params, x)
        Array([[1.25],
               [7.75]], dtype=float32)
    """
    _check_values(params)
    structs = _structs(params, "params")
    examples = _structs(inputs, "inputs")
    _check_sizes(examples)
    count = len(jax.tree.leaves(structs))
    leaves = jax.tree.leaves(params)
    analysis = _analysed(_traced(fn, structs, examples), leaves)
    program, relations, known, cut, changed, folds = analysis
    entries = program.block.inputs

    new_leaves = [
        cut.take(slot, jnp.asarray(changed[slot]) if slot in changed else leaf)
        for slot, leaf in zip(entries[:count], leaves, strict=True)
    ]
    paths = _paths(params)
    where = dict(zip(entries[:count], paths, strict=True))
    shapes = [struct.shape for struct in jax.tree.leaves(examples)]
    plan = CompactionPlan(
        leaves=tuple(
            LeafPlan(path, program.avals[slot].shape, _kept(cut, slot))
            for slot, path in zip(entries[:count], paths, strict=True)
        ),
        inputs=tuple(
            LeafPlan(path, shape, _kept(cut, slot))
            for slot, path, shape in zip(
                entries[count:], _paths({"inputs": inputs}), shapes, strict=True
            )
        ),
        folded=tuple(FoldedConstants(f.where, f.units, where[f.leaf], f.added) for f in folds),
        stops=_stops(relations, where),
        variable=_variable_axes(fn, structs, examples, analysis, leaves),
        zeros=sum(int((~known[slot].nonzero).sum()) for slot in entries[:count]),
    )
    return Compacted(
        _smaller(fn, structs, plan),
        jax.tree.unflatten(jax.tree.structure(params), new_leaves),
        plan,
    )


def new_widths(plan: CompactionPlan) -> dict[str, int]:
    """The widths with which a model can be built anew to hold the smaller parameters.

    Args:
        plan: of :func:`compact`.

    Returns:
        Per module (the path of its leaves without the last part), the size of the last axis that
        all its leaves share, which in Flax is the number of features; modules whose leaves do not
        share one are left out.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> params = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
        >>> fn = lambda params, x: x @ params["dense"]["kernel"] + params["dense"]["bias"][None]
        >>> new_widths(compact(fn, params, jnp.ones((1, 2))).plan)
        {'dense': 3}
    """
    found: dict[str, set[int]] = {}
    for leaf in plan.leaves:
        module = leaf.path.rpartition("/")[0]
        found.setdefault(module, set()).add(leaf.new_shape[-1] if leaf.shape else 0)
    return {module: sizes.pop() for module, sizes in found.items() if len(sizes) == 1}


def compaction_table(plan: CompactionPlan) -> str:
    """Shows a plan: each leaf's shape before and after, and what was moved or stood in the way.

    Args:
        plan: of :func:`compact`, which has an example.

    Returns:
        The table as text, one leaf a line, the totals, the inputs that are cut; then a line for
        each product whose constants were folded and for each operation that kept axes whole.
    """
    rows: list[tuple[str, ...]] = [("path", "shape", "compacted")]
    rows += [(leaf.path, str(leaf.shape), str(leaf.new_shape)) for leaf in plan.leaves]
    sizes = [(np.prod(leaf.shape), np.prod(leaf.new_shape)) for leaf in plan.leaves]
    totals = [int(sum(column)) for column in zip(*sizes, strict=True)] or [0, 0]
    rows.append(("total", *map(str, totals)))
    for leaf in plan.inputs:
        if leaf.new_shape != leaf.shape:
            rows.append((leaf.path, str(leaf.shape), str(leaf.new_shape)))
    lines = aligned(rows)
    if all(leaf.shape == leaf.new_shape for leaf in (*plan.leaves, *plan.inputs)):
        why = "no unit is without incoming or outgoing weights, or what is listed below kept it."
        none = "the parameters have no zeros."
        lines.append(f"Nothing to remove: {why if plan.zeros else none}")
    for fold in plan.folded:
        units = f"{fold.units} constant unit{'s' if fold.units > 1 else ''}"
        into = "folded into" if fold.added is not None else "joined with another in"
        lines.append(f"{units} {into} {fold.path}")
    for stop in plan.stops:
        axes = ", ".join(f"{path} axis {axis}" for path, axis in stop.axes)
        lines.append(f"kept whole by {stop.primitive} at {stop.where}: {axes}")
    return "\n".join(lines)


def _check_values(params: Any) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if isinstance(leaf, jax.ShapeDtypeStruct | jax.core.Tracer):
            raise TypeError(
                f"params: the leaf {leaf_path(path)!r} has no values; compact looks for zeros. "
                "Call it outside of jit, with the trained parameters."
            )


def _check_sizes(examples: Any) -> None:
    for path, struct in jax.tree_util.tree_leaves_with_path({"inputs": examples}):
        if 0 in struct.shape:
            raise ValueError(
                f"inputs: {leaf_path(path)} has no entries, its shape is {struct.shape}; give an "
                "example of at least one."
            )
        if not all(isinstance(size, int) for size in struct.shape):
            raise ValueError(
                f"inputs: {leaf_path(path)} has the symbolic shape {struct.shape}; give an example "
                "with numbers. The function that is returned takes symbolic sizes."
            )


def _structs(tree: Any, name: str) -> Any:
    def struct(path, leaf):
        try:
            aval = jax.typeof(leaf)
        except TypeError:
            if isinstance(leaf, jax.ShapeDtypeStruct):
                return leaf
            raise TypeError(
                f"{name}: the leaf {leaf_path(path)!r} is a {type(leaf).__name__}, not an array; "
                "bind what is no array to fn beforehand, for instance by functools.partial."
            ) from None
        return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type)

    return jax.tree_util.tree_map_with_path(struct, tree)


class _Analysis(NamedTuple):
    """What a trace says: which units go, and which leaves take their constants."""

    program: Program
    relations: Relations
    known: dict[int, Known]
    cut: Cut
    changed: dict[int, Any]  # by slot, leaves that constants were folded into
    folds: Sequence[Any]


def _analysed(program: Program, leaves: Sequence[Any]) -> _Analysis:
    entries = program.block.inputs[: len(leaves)]
    relations = Relations(program)
    _pin(relations, entries)
    with jax.ensure_compile_time_eval(), jax.debug_nans(False), jax.debug_infs(False):
        known = _known(program, leaves, {})
        for slot, d in summed_constants(program, known):
            relations.dimensions.pin(relations.axes[slot][d])
        everything, _ = fold_constants(program, known, entries)
        cut = choose(relations, _known(program, leaves, everything), program.block.inputs)
        # Once more, with the constants of just those units that go.
        changed, folds = fold_constants(program, known, entries, lambda slot: ~cut.entries(slot))
        if changed.keys() | everything.keys():
            cut = choose(relations, _known(program, leaves, changed), program.block.inputs)
    return _Analysis(program, relations, known, cut, changed, folds)


def _variable_axes(
    fn: Callable[..., Any],
    structs: Any,
    examples: Sequence[Any],
    analysis: _Analysis,
    leaves: Sequence[Any],
) -> tuple[tuple[bool, ...], ...]:
    """The axes of the inputs that may have another size: at another size the same units go.

    A constant may count an axis that it does not have: a mean over ones, a scan over a dead branch,
    a shape in Python. So it is tried: all axes along which the function works alike are taken
    longer, and a first axis of one, a batch; where the function does not take that, or other units
    would go, fewer are.
    """
    shapes = [leaf.shape for leaf in jax.tree.leaves(examples)]
    slots = analysis.program.block.inputs[len(leaves) :]
    free = [_variable(analysis.relations, slot) for slot in slots]

    def marked(choose: Callable[[int, int, int], bool]) -> list[list[bool]]:
        """By input and axis; ``choose`` is asked with the number of both and the size."""
        return [
            [free[i][d] and (n != 1 or d == 0) and choose(i, d, n) for d, n in enumerate(shape)]
            for i, shape in enumerate(shapes)
        ]

    def double(size: int) -> int:
        return 2 * size

    def other_size(size: int) -> int:
        return size - 1 if size > 2 else 2

    trials: list[tuple[list[list[bool]], Callable[[int], int]]] = [
        (marked(lambda i, d, n: True), double),
        (marked(lambda i, d, n: n != 2), other_size),  # where it may not be longer
        (marked(lambda i, d, n: n > 1), double),
        (marked(lambda i, d, n: n > 2), other_size),
        (marked(lambda i, d, n: d == 0), double),
        (marked(lambda i, d, n: n == 1), double),
    ]
    batches = trials[-1][0]
    nothing = [[False] * len(row) for row in batches]
    for i, row in enumerate(batches):  # each input alone
        trials.append(([*nothing[:i], row, *nothing[i + 1 :]], double))
    tried = []
    for marks, resize in trials:
        others = [
            tuple(resize(n) if mark else n for n, mark in zip(shape, row, strict=True))
            for shape, row in zip(shapes, marks, strict=True)
        ]
        if others == shapes or others in tried:
            continue
        tried.append(others)
        flat, tree = jax.tree.flatten(examples)
        resized = [
            jax.ShapeDtypeStruct(shape, leaf.dtype, weak_type=leaf.weak_type)
            for shape, leaf in zip(others, flat, strict=True)
        ]
        try:
            arguments = (structs, *jax.tree.unflatten(tree, resized))
            program, _ = trace(fn, arguments, (False,) + (True,) * len(examples))
        except Exception:  # whatever fn says of another size
            continue
        other = _analysed(program, leaves)
        if _agree(analysis, other, len(leaves)):
            there = [_variable(other.relations, s) for s in program.block.inputs[len(leaves) :]]
            return tuple(
                tuple(mark and alike for mark, alike in zip(*rows, strict=True))
                for rows in zip(marks, there, strict=True)
            )
    return tuple((False,) * len(shape) for shape in shapes)


def _agree(one: _Analysis, other: _Analysis, leaves: int) -> bool:
    """Whether two analyses cut and change the leaves alike."""

    def same(a: Any, b: Any) -> bool:
        if a is None or b is None:
            return a is b
        return a.shape == b.shape and np.allclose(
            np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=1e-4, atol=1e-6
        )

    slots = (analysis.program.block.inputs[:leaves] for analysis in (one, other))
    return all(
        same(one.changed.get(a), other.changed.get(b))
        and all(map(same, _kept(one.cut, a), _kept(other.cut, b)))
        for a, b in zip(*slots, strict=True)
    )


def _traced(fn: Callable[..., Any], structs: Any, examples: Sequence[Any]) -> Program:
    """Traces the example."""
    varying = (False,) + (True,) * len(examples)
    try:
        return trace(fn, (structs, *examples), varying)[0]
    except (jax.errors.JAXTypeError, jax.errors.UnexpectedTracerError) as error:
        raise TypeError(
            "fn cannot be traced: it looks at the values of its arguments (see above). compact "
            "needs a function that jax.jit takes; bind flags and sizes by functools.partial."
        ) from error


def _paths(tree: Any) -> list[str]:
    return [leaf_path(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def _pin(relations: Relations, slots: Iterable[int]) -> None:
    for slot in slots:
        for axis in relations.axes[slot]:
            relations.dimensions.pin(axis)


def _kept(cut: Cut, slot: int) -> tuple[np.ndarray | None, ...]:
    masks = [cut.mask(slot, d) for d in range(len(cut.shape(slot)))]
    return tuple(None if mask is None else np.flatnonzero(mask) for mask in masks)


def _variable(relations: Relations, slot: int) -> tuple[bool, ...]:
    dimensions = relations.dimensions
    return tuple(
        not any(dimensions.is_pinned(root) for root in dimensions.expand(axis))
        for axis in relations.axes[slot]
    )


def _stops(relations: Relations, paths: dict[int, str]) -> tuple[Stop, ...]:
    dimensions = relations.dimensions
    found: dict[tuple[str, str], list[tuple[str, int]]] = {}
    for stop in relations.stops:
        roots = set(dimensions.expand(stop.axis))
        for slot, path in paths.items():
            for d, axis in enumerate(relations.axes[slot]):
                if roots & set(dimensions.expand(axis)):
                    axes = found.setdefault((stop.primitive, stop.where), [])
                    if (path, d) not in axes:
                        axes.append((path, d))
    return tuple(Stop(*key, tuple(axes)) for key, axes in found.items())


def _known(
    program: Program, leaves: Sequence[Any], changed: dict[int, np.ndarray]
) -> dict[int, Known]:
    entries = program.block.inputs
    values = [
        constant(changed.get(slot, leaf)) for slot, leaf in zip(entries, leaves, strict=False)
    ]
    varying = [unknown(program.avals[slot].shape) for slot in entries[len(leaves) :]]
    return forwards(program, [*values, *varying])


def _smaller(fn: Callable[..., Any], structs: Any, plan: CompactionPlan) -> Callable[..., Any]:
    expected = jax.tree.structure(structs)

    def compacted(params: Any, *inputs: Any) -> Any:
        leaves = _checked(params, expected, plan)
        examples = _structs(inputs, "inputs")
        _check_inputs(jax.tree.leaves(examples), plan, plan.variable)
        dense = [
            jax.ShapeDtypeStruct(planned.shape, leaf.dtype, weak_type=leaf.weak_type)
            for planned, leaf in zip(plan.leaves, map(jax.typeof, leaves), strict=True)
        ]
        arguments = (jax.tree.unflatten(expected, dense), *examples)
        program, out = trace(fn, arguments, (False,) + (True,) * len(examples))
        entries = program.block.inputs
        relations = Relations(program)
        _pin(relations, entries[: len(leaves)])
        given = entries[len(leaves) :]
        variable = [_variable(relations, slot) for slot in given]
        _check_inputs([program.avals[slot] for slot in given], plan, variable)
        cut = _planned(relations, entries, plan)
        cut_inputs = [
            cut.take(slot, value, apart=True)
            for slot, value in zip(given, jax.tree.leaves(inputs), strict=True)
        ]
        results = run_block(program.block, [*leaves, *cut_inputs], cut)
        return jax.tree.unflatten(out, results)

    return compacted


def _checked(params: Any, expected: Any, plan: CompactionPlan) -> list[Any]:
    found: Any = jax.tree.structure(params)
    if found != expected:
        raise ValueError(
            f"params: the tree is not the one that was compacted. Expected {expected}, got {found}."
        )
    leaves = jax.tree.leaves(params)
    for leaf, planned in zip(leaves, plan.leaves, strict=True):
        if jnp.shape(leaf) != planned.new_shape:
            dense = " (as before compaction)" if jnp.shape(leaf) == planned.shape else ""
            raise ValueError(
                f"params: the leaf {planned.path!r} has shape {jnp.shape(leaf)}{dense}; the "
                f"compacted network needs {planned.new_shape}. Pass the params that compact "
                "returned, or ones trained from them."
            )
    return leaves


def _check_inputs(
    inputs: Sequence[Any], plan: CompactionPlan, variable: Sequence[Sequence[bool]]
) -> None:
    """Refuses sizes other than the example's along axes that may not vary."""
    if len(inputs) != len(plan.inputs):
        raise ValueError(
            f"inputs: {len(inputs)} arrays were given; the function was compacted for "
            f"{len(plan.inputs)}."
        )
    for value, planned, free in zip(inputs, plan.inputs, variable, strict=True):
        said = f"{planned.path} has shape {value.shape}; the function was compacted for"
        if len(value.shape) != len(planned.shape):
            raise ValueError(f"{said} {planned.shape}.")
        for d, (size, old) in enumerate(zip(value.shape, planned.shape, strict=True)):
            if not free[d] and not (isinstance(size, int) and size == old):
                raise ValueError(
                    f"{said} {planned.shape}, and along axis {d} it looks at single indices, sums "
                    "constants, depends on how long it is, or had but one. Compact it for this "
                    "shape, too."
                )


def _planned(relations: Relations, entries: Sequence[int], plan: CompactionPlan) -> Cut:
    """The plan's cut in a new trace; raises if it does not fit there."""
    dimensions = relations.dimensions
    owned: dict[int, np.ndarray] = {}
    plans = (*plan.leaves, *plan.inputs)
    for slot, planned in zip(entries, plans, strict=True):
        for axis, kept in zip(relations.axes[slot], planned.kept, strict=True):
            roots = dimensions.expand(axis)
            sizes = [dimensions.size(root) for root in roots]
            if not all(isinstance(size, int) for size in sizes):
                continue
            mask = np.full(int(np.prod(sizes)), kept is None)
            if kept is not None:
                mask[kept] = True
            for place, root in enumerate(roots):
                others = tuple(e for e in range(len(sizes)) if e != place)
                along = np.asarray(mask.reshape(sizes).any(axis=others))
                owned[root] = owned.get(root, np.zeros((), bool)) | along
    cut = Cut(relations, complete(relations, owned))
    leaves = zip(entries, plan.leaves, strict=False)
    wrong = [planned.path for slot, planned in leaves if cut.shape(slot) != planned.new_shape]
    wrong += [
        planned.path
        for slot, planned in zip(entries, plans, strict=True)
        if any(dimensions.is_frozen(d) for d in _cut_dimensions(cut, slot))
    ]
    if wrong:
        raise ValueError(
            "inputs: at these shapes the function is another one: it treats the axes of "
            f"{', '.join(dict.fromkeys(wrong))} in another way than the one that was compacted. "
            "Compact it for these shapes, too."
        )
    return cut


def _cut_dimensions(cut: Cut, slot: int) -> list[int]:
    expand = cut.relations.dimensions.expand
    return [d for axis in cut.relations.axes[slot] for d in expand(axis) if d in cut.keep]
