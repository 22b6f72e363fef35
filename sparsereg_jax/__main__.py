"""The command line: ``python -m sparsereg_jax inspect FILE`` prints what is in a sparse file."""

import argparse
import io
import json
import sys
from collections.abc import Sequence

from .gap_coding import entropy_bits
from .sparse_file import (
    DTYPES_BY_NAME,
    SparseFile,
    SparseFileError,
    SparseLeaf,
    inspect_sparse,
)

COLUMNS = ("path", "shape", "dtype", "kept", "of", "sparsity", "bytes", "pattern", "bound")
NAMES = 3  # of the columns, aligned to the left


def table(file: SparseFile) -> str:
    """Says what is in a file: a line a leaf, totals, and what was written beside them.

    Bytes are those of values and pattern. The pattern's bits an entry stand beside their bound,
    the entropy of independent positions of the leaf's density; a leaf without them is stored dense.

    Args:
      file: what ``inspect_sparse`` returns.

    Returns:
      The text.

    Example:
      >>> leaf = SparseLeaf("w", (40, 25), "float32", 1000, 20, 80, 19)
      >>> print(table(SparseFile(400, [leaf], {"epoch": 7}, {"sparsereg_jax": "0.1.0"})))
      path   shape     dtype    kept    of  sparsity  bytes  pattern  bound
      w      (40, 25)  float32    20  1000   98.00 %     99    0.152  0.141
      total                       20  1000   98.00 %     99    0.152  0.141
      <BLANKLINE>
      400 bytes, 301 of them header and names; dense 4000, 10.0 times as many
      written by sparsereg_jax 0.1.0
      metadata {"epoch": 7}
    """
    rows: list[tuple[str, ...]] = [COLUMNS]
    rows += [
        (_printable(leaf.path), str(leaf.shape), leaf.dtype, *_numbers([leaf]))
        for leaf in file.leaves
    ]
    rows.append(("total", "", "", *_numbers(file.leaves)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i < NAMES else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    stored = sum(map(_bytes, file.leaves))
    dense = sum(leaf.size * DTYPES_BY_NAME[leaf.dtype].itemsize for leaf in file.leaves)
    return "\n".join(
        [
            *lines,
            "",
            f"{file.bytes} bytes, {file.bytes - stored} of them header and names;"
            f" dense {dense}, {dense / file.bytes:.1f} times as many",
            _printable("written by " + ", ".join(f"{k} {v}" for k, v in file.written_by.items())),
            f"metadata {json.dumps(file.metadata)}",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      arguments: those after the program's name; None are the process's own.

    Returns:
      The exit status: 1 where the file cannot be read or is malformed.
    """
    parser = argparse.ArgumentParser(prog="python -m sparsereg_jax")
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser(
        "inspect",
        help="print what is in a sparse file",
        description="Prints the leaves, totals and metadata of a file that save_sparse wrote, from"
        " its header alone: the data is not read.",
    )
    inspect.add_argument("file", metavar="FILE")
    options = parser.parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):  # of a terminal or a file that is not UTF-8
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        print(table(inspect_sparse(options.file)))
    except (OSError, SparseFileError) as error:
        print(_printable(str(error)), file=sys.stderr)
        return 1
    return 0


def _bytes(leaf: SparseLeaf) -> int:
    return leaf.values_bytes + (leaf.pattern_bytes or 0)


def _numbers(leaves: Sequence[SparseLeaf]) -> tuple[str, ...]:
    """The cells from ``kept`` on, of one leaf or of several."""
    kept, size = sum(leaf.kept for leaf in leaves), sum(leaf.size for leaf in leaves)
    coded = [leaf for leaf in leaves if leaf.pattern_bytes is not None]
    entries = sum(leaf.size for leaf in coded)
    bits = 8 * sum(leaf.pattern_bytes or 0 for leaf in coded)
    bound = sum(entropy_bits(leaf.size, leaf.kept) for leaf in coded)
    return (
        str(kept),
        str(size),
        f"{1 - kept / size:.2%}".replace("%", " %") if size else "-",
        str(sum(map(_bytes, leaves))),
        f"{bits / entries:.3f}" if entries else "-",
        f"{bound / entries:.3f}" if entries else "-",
    )


def _printable(text: str) -> str:
    """The text without what would move a terminal's cursor or hide something."""
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)


if __name__ == "__main__":
    sys.exit(main())
