"""Checkpoints by orbax: a tree of arrays and a log beside it, the newest one kept."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp


def save(folder: Path, step: int, tree: Any, log: Any = None) -> None:
    """Writes a checkpoint; the one before goes when the new one is whole.

    Args:
      folder: of this run alone.
      step: a number larger than that of the checkpoint before.
      tree: arrays.
      log: anything that JSON can hold.
    """
    with _manager(folder) as manager:
        manager.save(
            step,
            args=ocp.args.Composite(
                tree=ocp.args.StandardSave(tree), log=ocp.args.JsonSave({"log": log})
            ),
        )


def restore(folder: Path, like: Any) -> tuple[int, Any, Any] | None:
    """Reads the newest checkpoint.

    Args:
      folder: that of :func:`save`.
      like: a tree of the same structure and shapes.

    Returns:
      Step, tree and log; None where there is no checkpoint.
    """
    if not folder.exists():
        return None
    with _manager(folder) as manager:
        step = manager.latest_step()
        if step is None:
            return None
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        found = manager.restore(
            step,
            args=ocp.args.Composite(
                tree=ocp.args.StandardRestore(abstract), log=ocp.args.JsonRestore()
            ),
        )
    return step, found.tree, found.log["log"]


def _manager(folder: Path) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
        folder.absolute(),
        options=ocp.CheckpointManagerOptions(
            max_to_keep=1, create=True, enable_async_checkpointing=False
        ),
    )
