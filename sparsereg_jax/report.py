"""What was gained: a page with tables and pictures, and the same in a terminal.

``report_page`` puts Markdown and HTML together, ``report_pictures`` draws, ``flops`` counts.
"""

import functools
import io
import math
import os
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .compaction import Compacted
from .flops import count_flops, count_flops_by_leaf
from .iterative import Check
from .pruning import check_pruning_mask
from .selection import PyTree, is_float, leaf_path
from .sparse_file import stored_bytes

PICTURED = 12  # layers that get a picture, the largest


class _Layer(NamedTuple):
    """What is known of one float leaf; None is what cannot be known."""

    path: str
    dtype: str
    values: np.ndarray
    keep: np.ndarray  # bool, of the shape of values
    dense: np.ndarray | None
    stored: int | None  # bytes of values and pattern in a sparse file
    flops: float | None
    small_shape: tuple[int, ...] | None
    small_flops: float | None

    @property
    def size(self) -> int:
        return self.values.size

    @property
    def kept(self) -> int:
        return int(self.keep.sum())


class _Facts(NamedTuple):
    layers: list[_Layer]
    others: list[str]  # paths of the leaves that hold no floats
    flops: float | None
    small_flops: float | None
    inputs: str  # the shapes that FLOPs are counted for
    counted: bool
    compacted: Compacted | None


class _Section(NamedTuple):
    """A part of the report: plain text throughout, escaped where it is written."""

    heading: str
    lines: Sequence[str] = ()
    items: Sequence[str] = ()
    table: tuple[Sequence[str], Sequence[Sequence[str]], int] | None = None
    notes: Sequence[str] = ()
    pictures: Sequence[tuple[str, str]] = ()  # (file, what it shows)


def write_report(
    folder: str | os.PathLike[str],
    params: PyTree,
    pruning_mask: PyTree = None,
    *,
    title: str = "A sparse network",
    dense: PyTree = None,
    fn: Callable[..., Any] | None = None,
    inputs: Sequence[Any] = (),
    history: Sequence[Check] = (),
    bound: float | None = None,
    compacted: Compacted | None = None,
) -> Path:
    """Writes a page on a sparse network: Markdown with pictures beside it, and one HTML file.

    ``report.html`` holds its pictures and needs nothing else, no script and no network;
    ``report.md`` refers to the PNG files beside it. Both have totals, warnings for layers that are
    empty or nearly so, the table layer by layer, the trade-off curve, magnitudes before and after
    and a map of the kept weights for each of the 12 largest layers.

    Args:
      folder: where to; made if it is not there. Files of these names in it are replaced.
      params: the sparse parameters, any tree of arrays; float leaves are its layers.
      pruning_mask: what remains; None: what differs from zero.
      title: of the page.
      dense: the parameters before pruning, for the magnitudes before.
      fn: ``fn(params, *inputs)``, for its FLOPs by XLA's cost analysis; it is compiled, not run.
      inputs: examples or shapes (``jax.ShapeDtypeStruct``); FLOPs are those of this batch.
      history: the records of the loop, for the trade-off curve.
      bound: the metric's bound, for a line in the curve.
      compacted: what :func:`sparsereg_jax.compact` made of these params.

    Returns:
      The path of the HTML file.

    Raises:
      ImportError: matplotlib, markdown-it-py or tabulate is missing.
      ValueError: the mask, ``dense`` or ``compacted`` does not fit the params, or ``inputs`` come
        without a function.
      OSError: the folder or a file cannot be written.

    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> params = {"kernel": jnp.zeros((8, 4)).at[3, 1].set(2.0), "bias": jnp.zeros(4)}
      >>> page = write_report(tempfile.mkdtemp(), params, title="One weight")
      >>> sorted(file.name for file in page.parent.iterdir())
      ['layer-01.png', 'layer-02.png', 'magnitudes.png', 'report.html', 'report.md']
    """
    try:
        import tabulate  # noqa: F401

        from . import report_page, report_pictures
    except ImportError as error:
        raise _missing("write_report", error) from error
    facts = _facts(params, pruning_mask, dense, fn, inputs, compacted)
    figures: dict[str, Any] = {}
    sections = _sections(facts)
    if history:
        figures["curve.png"] = report_pictures.curve(history, bound)
        sections.append(_curve_section(history, bound))
    befores = [layer.dense for layer in facts.layers if layer.dense is not None]
    afters = [_kept_values(layer) for layer in facts.layers]
    figures["magnitudes.png"] = report_pictures.magnitudes(
        None if dense is None else befores, afters
    )
    sections.append(_magnitudes_section(dense is not None))
    drawn = _pictured(facts.layers)
    names = [f"layer-{number:02d}.png" for number in range(1, len(drawn) + 1)]
    for name, layer in zip(names, drawn, strict=True):
        figures[name] = report_pictures.layer(
            layer.path, layer.keep, layer.dense, _kept_values(layer)
        )
    if drawn:
        sections.append(_maps_section(facts, list(zip(names, drawn, strict=True))))

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {name: _png(figure) for name, figure in figures.items()}
    for name, picture in pictures.items():
        (folder / name).write_bytes(picture)
    markdown = _markdown(title, sections)
    (folder / "report.md").write_text(markdown, encoding="utf-8")
    page = folder / "report.html"
    page.write_text(report_page.to_html(title, markdown, pictures), encoding="utf-8")
    return page


def report_text(
    params: PyTree,
    pruning_mask: PyTree = None,
    *,
    title: str = "A sparse network",
    fn: Callable[..., Any] | None = None,
    inputs: Sequence[Any] = (),
    history: Sequence[Check] = (),
    compacted: Compacted | None = None,
) -> str:
    """Says in a terminal what :func:`write_report` says on its page, without the pictures.

    Args:
      params: as for :func:`write_report`, like all that follow.
      pruning_mask: what remains; None: what differs from zero.
      title: the first line.
      fn: for its FLOPs.
      inputs: what ``fn`` takes beside the params.
      history: the records of the loop.
      compacted: what :func:`sparsereg_jax.compact` made of these params.

    Returns:
      The text.

    Raises:
      ImportError: tabulate is missing.
      ValueError: the mask or ``compacted`` does not fit the params, or ``inputs`` come without a
        function.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"kernel": jnp.zeros((8, 4)).at[3, 1].set(2.0), "bias": jnp.ones(4)}
      >>> print(report_text(params, title="Two leaves"))  # doctest: +ELLIPSIS
      Two leaves
      ...
      Layer by layer
      --------------
      ...
    """
    try:
        import tabulate  # noqa: F401
    except ImportError as error:
        raise _missing("report_text", error) from error
    facts = _facts(params, pruning_mask, None, fn, inputs, compacted)
    sections = _sections(facts)
    if history:
        sections.append(_curve_section(history, None)._replace(pictures=()))
    return _text(title, sections)


# What is known.


def _facts(
    params: PyTree,
    pruning_mask: PyTree,
    dense: PyTree,
    fn: Callable[..., Any] | None,
    inputs: Sequence[Any],
    compacted: Compacted | None,
) -> _Facts:
    flat = _by_path(params)
    if pruning_mask is not None:
        check_pruning_mask(params, pruning_mask)
    if dense is not None:
        _check_alike("dense", dense, params)
    plans: Sequence[Any] = [None] * len(flat)
    if compacted is not None:
        _check_compacted(compacted, flat)
        plans = compacted.plan.leaves
    if len(inputs) and fn is None:
        raise ValueError("inputs: given without fn, the function that takes them. Give fn, too.")
    nothing = [None] * len(flat)
    flops = small_flops = None
    by_leaf: Sequence[float | None] = nothing
    small_by_leaf: Sequence[float | None] = nothing
    if fn is not None:
        flops = count_flops(fn, params, *inputs)
        by_leaf = count_flops_by_leaf(fn, params, *inputs)
        if compacted is not None:
            small_flops = count_flops(compacted.fn, compacted.params, *inputs)
            small_by_leaf = count_flops_by_leaf(compacted.fn, compacted.params, *inputs)
    masks = jax.tree.leaves(pruning_mask) if pruning_mask is not None else nothing
    befores = {}
    if dense is not None:
        befores = {key: np.asarray(leaf) for key, leaf in _numbered(dense) if is_float(leaf)}

    layers, others = [], []
    every = zip(_numbered(params), masks, by_leaf, plans, small_by_leaf, strict=True)
    for ((path, number), leaf), mask, count, plan, small_count in every:
        if not is_float(leaf):
            others.append(_printable(path))
            continue
        values = np.asarray(leaf)
        keep = values != 0 if mask is None else np.asarray(mask)
        layer = _Layer(
            path=_printable(path),
            dtype=str(jnp.result_type(leaf)),
            values=values,
            keep=keep,
            dense=befores.get((path, number)),
            stored=None,
            flops=count,
            small_shape=None if plan is None else plan.new_shape,
            small_flops=small_count,
        )
        layers.append(layer._replace(stored=stored_bytes(_kept_values(layer))))
    shapes = ", ".join(
        f"{jnp.result_type(leaf)} {tuple(jnp.shape(leaf))}" for leaf in jax.tree.leaves(inputs)
    )
    return _Facts(layers, others, flops, small_flops, shapes, fn is not None, compacted)


def _kept_values(layer: _Layer) -> np.ndarray:
    return np.where(layer.keep, layer.values, np.zeros((), layer.values.dtype))


def _by_path(tree: PyTree) -> list[tuple[str, Any]]:
    return [(leaf_path(kp), leaf) for kp, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _numbered(tree: PyTree) -> Iterator[tuple[tuple[str, int], Any]]:
    """Paths with a number, as ``{"a": {"b": x}, "a/b": y}`` has two leaves of one path."""
    seen: Counter[str] = Counter()
    for path, leaf in _by_path(tree):
        yield (path, seen[path]), leaf
        seen[path] += 1


def _printable(path: str) -> str:
    """A name without what would break a line, move a cursor or hide something; never empty."""
    text = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in path)
    return text or "(the array)"


def _check_alike(name: str, tree: PyTree, params: PyTree) -> None:
    ours, theirs = ({key: jnp.shape(leaf) for key, leaf in _numbered(t)} for t in (tree, params))
    for key in [*theirs, *ours]:
        if ours.get(key) != theirs.get(key):
            raise ValueError(
                f"{name}: the leaf {key[0]!r} has shape {ours.get(key, 'none (it is not there)')},"
                f" in params {theirs.get(key, 'none (it is not there)')}. Give the same network's"
                " parameters."
            )


def _check_compacted(compacted: Compacted, flat: list[tuple[str, Any]]) -> None:
    planned = [(leaf.path, leaf.shape) for leaf in compacted.plan.leaves]
    given = [(path, jnp.shape(leaf)) for path, leaf in flat]
    if planned != given:
        raise ValueError(
            f"compacted: made of other parameters, {planned}, than params, {given}. Compact these"
            " params, or give those that were compacted."
        )


# What is said.


def _sections(facts: _Facts) -> list[_Section]:
    size = sum(layer.size for layer in facts.layers)
    kept = sum(layer.kept for layer in facts.layers)
    if not size:
        lines = ["The parameters hold no floats."]
    else:
        ratio = f"{size / kept:,.1f} times fewer" if kept else "nothing is left"
        lines = [
            f"{size - kept:,} of {size:,} weights are pruned, {_percent(1 - kept / size)} of them;"
            f" {kept:,} are kept ({ratio})."
        ]
    if facts.others:
        lines.append(f"Not counted, since they hold no floats: {', '.join(facts.others)}.")
    return [
        _Section("Totals", lines, table=_totals(facts), notes=_totals_notes(facts)),
        _Section("Warnings", items=_warnings(facts) or ["None: no layer is empty or nearly so."]),
        _Section("Layer by layer", table=_layer_table(facts), notes=_layer_notes(facts)),
    ]


def _warnings(facts: _Facts) -> list[str]:
    found = []
    for layer in facts.layers:
        if layer.size and not layer.kept:
            what = "Nothing passes through it." if layer.values.ndim > 1 else "It is a constant 0."
            found.append(f"Wholly empty: {layer.path}, none of {layer.size:,} kept. {what}")
        elif _nearly_empty(layer):
            found.append(f"Nearly empty: {layer.path}, {layer.kept:,} of {layer.size:,} kept.")
    for layer in facts.layers:
        stray = np.count_nonzero(layer.values[~layer.keep])
        if stray:
            found.append(
                f"Not pruned yet: {layer.path}, {stray:,} of the weights outside the mask differ"
                " from zero; here they count as pruned."
            )
        bad = np.count_nonzero(~np.isfinite(layer.values))
        if bad:
            found.append(f"Not finite: {layer.path}, NaN or infinite in {bad:,} places.")
    return found


def _nearly_empty(layer: _Layer) -> bool:
    """Less than 1 % kept, and less than one weight a unit (a place of the last axis)."""
    units = layer.values.shape[-1] if layer.values.ndim else 1
    return layer.kept > 0 and 100 * layer.kept < layer.size and layer.kept < units


def _totals(facts: _Facts) -> tuple[Sequence[str], Sequence[Sequence[str]], int]:
    layers, small = facts.layers, facts.compacted is not None
    size, kept = sum(layer.size for layer in layers), sum(layer.kept for layer in layers)
    nbytes = sum(layer.values.nbytes for layer in layers)
    stored = _sum([layer.stored for layer in layers])
    header = ["", "dense", "sparse"]
    rows = [
        ["weights", f"{size:,}", f"{kept:,}"],
        ["compression (dense weights / these)", "1.0", _ratio(size, kept)],
        ["bytes", f"{nbytes:,}", _number(stored)],
        ["dense bytes / these", "1.0", _ratio(nbytes, stored)],
    ]
    if small:
        header.append("compacted")
        less = sum(map(_small_size, layers))
        less_bytes = sum(_small_size(layer) * layer.values.itemsize for layer in layers)
        cells = [f"{less:,}", _ratio(size, less), f"{less_bytes:,}", _ratio(nbytes, less_bytes)]
        rows = [[*row, cell] for row, cell in zip(rows, cells, strict=True)]
    if facts.counted:
        same = ["the same" if facts.flops is not None else "-"]
        cells = ["FLOPs of the whole function", _number(facts.flops), *same]
        ratio = ["dense FLOPs / these", "1.0", "1.0"]
        if small:
            cells.append(_number(facts.small_flops))
            ratio.append(_ratio(facts.flops, facts.small_flops))
        rows += [cells, ratio]
    return header, rows, 1


def _totals_notes(facts: _Facts) -> list[str]:
    notes = [
        "Bytes: dense and compacted, those of the arrays; sparse, those of values and positions in"
        " a file of save_sparse, its header apart."
    ]
    if facts.counted:
        inputs = f"inputs of {facts.inputs}" if facts.inputs else "no inputs"
        notes.append(
            f"FLOPs: of one call of the compiled function with {inputs}, by XLA's cost analysis"
            f" (jax {jax.__version__}, {jax.devices()[0].device_kind}); a loop's body counts once."
            " Zeros are multiplied like any number, so a sparse network has the dense one's."
        )
        if facts.flops is None:
            notes.append("XLA does not tell the FLOPs on this device.")
    return notes


def _layer_table(facts: _Facts) -> tuple[Sequence[str], Sequence[Sequence[str]], int]:
    small = facts.compacted is not None
    header = ["layer", "shape", "dtype", "weights", "kept", "sparsity", "bytes", "sparse bytes"]
    header += ["FLOPs"] if facts.counted else []
    header += ["compacted"] if small else []
    header += ["compacted FLOPs"] if small and facts.counted else []
    rows = []
    for layer in facts.layers:
        row = [layer.path, _shape(layer.values.shape), layer.dtype, *_counts([layer])]
        row += [_number(layer.flops)] if facts.counted else []
        row += [_shape(layer.small_shape)] if small else []
        row += [_number(layer.small_flops)] if small and facts.counted else []
        rows.append(row)
    total = ["all", "", "", *_counts(facts.layers)]
    total += [""] if facts.counted else []
    total += [f"{sum(map(_small_size, facts.layers)):,} weights"] if small else []
    total += [""] if small and facts.counted else []
    return header, [*rows, total], 3


def _layer_notes(facts: _Facts) -> list[str]:
    notes = ["Sparsity: the share of a layer's weights that are pruned."]
    if facts.counted:
        notes.append(
            "FLOPs of a layer: of the operations that read it, each counted by XLA alone, before"
            " they are fused. One that reads two leaves counts for both, one that reads none (an"
            " activation) for neither, so that they do not sum up to the whole function's, which"
            " stands under Totals. A layer that a loop or a branch reads has a dash."
        )
    if facts.compacted is not None:
        notes.append("Compacted: the layer's shape after the removal of dead units.")
    notes.append(
        "Nearly empty: less than 1 % kept, and less than one weight for each place of the last"
        " axis."
    )
    return notes


def _curve_section(history: Sequence[Check], bound: float | None) -> _Section:
    met = [check for check in history if check.met_bound]
    lines = [
        f"{len(history)} checks, {sum(check.pruned for check in history)} of which ended in a"
        f" pruning; {sum(check.action == 'went back' for check in history)} times the loop went"
        f" back; {sum(check.seconds for check in history):.1f} seconds."
    ]
    if met:
        best = max(met, key=lambda check: check.sparsity)
        lines.append(
            f"The sparsest network that met the bound{'' if bound is None else f' of {bound:g}'}:"
            f" {_percent(best.sparsity)} sparse with a metric of {best.metric:.6g}, at check"
            f" {best.check}."
        )
    else:
        lines.append("No check met the bound.")
    alt = (
        "Trade-off curve: the metric at each check of the loop over the compression of the network,"
        f" {len(met)} checks that met the bound and {len(history) - len(met)} that missed it."
    )
    return _Section("Trade-off curve", lines, pictures=[("curve.png", alt)])


def _magnitudes_section(before: bool) -> _Section:
    line = "|w| of all layers together" + (", before pruning and after." if before else ".")
    alt = f"Histogram of {line[:-1]}, both axes logarithmic."
    return _Section("Magnitudes", [line], pictures=[("magnitudes.png", alt)])


def _maps_section(facts: _Facts, drawn: list[tuple[str, _Layer]]) -> _Section:
    lines = [
        "Above, which weights are kept: the last axis to the right, all others downwards, the"
        " darker the more of a cell is kept. Below, |w|."
    ]
    left = len(facts.layers) - len(drawn)
    if left:
        lines.append(f"The {len(drawn)} largest layers; {left} more are in the table alone.")
    pictures = [
        (
            name,
            f"{layer.path}: map of its kept weights, {layer.kept:,} of {layer.size:,}, and"
            " histogram of their magnitudes.",
        )
        for name, layer in drawn
    ]
    return _Section("Kept weights of each layer", lines, pictures=pictures)


def _pictured(layers: Sequence[_Layer]) -> list[_Layer]:
    """The largest layers, in the order of the table."""
    sizes = [layer.size for layer in layers]
    largest = sorted((i for i, size in enumerate(sizes) if size), key=lambda i: -sizes[i])
    return [layers[i] for i in sorted(largest[:PICTURED])]


def _counts(layers: Sequence[_Layer]) -> list[str]:
    size, kept = sum(layer.size for layer in layers), sum(layer.kept for layer in layers)
    return [
        f"{size:,}",
        f"{kept:,}",
        _percent(1 - kept / size) if size else "-",
        f"{sum(layer.values.nbytes for layer in layers):,}",
        _number(_sum([layer.stored for layer in layers])),
    ]


def _small_size(layer: _Layer) -> int:
    return math.prod(layer.small_shape or ())


def _sum(numbers: Sequence[int | None]) -> int | None:
    known = [number for number in numbers if number is not None]
    return sum(known) if len(known) == len(numbers) else None


def _number(number: float | None) -> str:
    return "-" if number is None else f"{number:,.0f}"


def _ratio(whole: float | None, part: float | None) -> str:
    return f"{whole / part:,.1f}" if whole is not None and part else "-"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _shape(shape: tuple[int, ...] | None) -> str:
    return "-" if shape is None else " x ".join(map(str, shape)) or "scalar"


# How it is written.


def _markdown(title: str, sections: Sequence[_Section]) -> str:
    from .report_page import escape

    blocks = [f"# {escape(_printable(title))}"]
    for section in sections:
        blocks.append(f"## {escape(section.heading)}")
        blocks += map(escape, section.lines)
        if section.items:
            blocks.append("\n".join(f"- {escape(item)}" for item in section.items))
        if section.table is not None:
            header, rows, left = section.table
            escaped = [[*map(escape, row)] for row in rows]
            blocks.append(_aligned([*map(escape, header)], escaped, left, "pipe"))
        blocks += map(escape, section.notes)
        if section.pictures:
            pictures = (f"![{escape(alt)}]({name})" for name, alt in section.pictures)
            blocks.append("\n".join(pictures))
    return "\n\n".join(blocks) + "\n"


def _text(title: str, sections: Sequence[_Section]) -> str:
    wrap = functools.partial(
        textwrap.fill, width=100, break_long_words=False, break_on_hyphens=False
    )
    blocks = [_printable(title)]
    for section in sections:
        lines = [section.heading, "-" * len(section.heading), *map(wrap, section.lines)]
        lines += [wrap(item, initial_indent="- ", subsequent_indent="  ") for item in section.items]
        if section.table is not None:
            lines.append(_aligned(*section.table, "simple"))
        blocks.append("\n".join([*lines, *map(wrap, section.notes)]))
    return "\n\n".join(blocks)


def _aligned(header: Sequence[str], rows: Sequence[Sequence[str]], left: int, form: str) -> str:
    """A table of cells that are text already; all columns but the first ``left`` to the right."""
    from tabulate import tabulate

    align = ["left" if i < left else "right" for i in range(len(header))]
    return tabulate(rows, header, tablefmt=form, colalign=align, disable_numparse=True)


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _missing(name: str, error: ImportError) -> ImportError:
    return ImportError(
        f'{name} needs {error.name}, which is missing: pip install "sparsereg_jax[report]".'
    )
