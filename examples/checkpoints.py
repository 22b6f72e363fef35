"""Checkpoints by orbax: a tree of arrays and a log beside it, the newest one kept."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from tqdm.auto import tqdm

SECONDS = 60  # between two checkpoints of a run


class OutOfTime(Exception):
    """The time was up; the same call with the same folder goes on from the last checkpoint."""


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


def epochs(
    one_epoch: Callable[[Any, int], Any],
    state: Any,
    number: int,
    folder: Path | None = None,
    overdue: Callable[[], bool] = lambda: False,
    title: str | None = None,
) -> tuple[Any, float]:
    """Trains epoch by epoch; a training that was cut off, or one that is done, is taken up.

    Args:
      one_epoch: from a tree of arrays and the number of the epoch, from 1, to the next tree.
      state: the tree before the first epoch.
      number: of epochs.
      folder: for checkpoints; None for none.
      overdue: asked after each epoch whether to save a checkpoint and stop.
      title: of a progress bar; None for none.

    Returns:
      The tree after the last epoch, and the seconds of training, those before a cut included.

    Raises:
      OutOfTime: ``overdue`` said so.
    """
    done, seconds = 0, 0.0
    if folder is not None and (found := restore(folder, state)):
        done, state, seconds = found
    saved = time.monotonic()
    bar = tqdm(range(done + 1, number + 1), title, unit="epoch", disable=title is None)
    for epoch in bar:
        began = time.monotonic()
        state = jax.block_until_ready(one_epoch(state, epoch))
        seconds += time.monotonic() - began
        late = overdue()
        if folder is not None and (late or epoch == number or time.monotonic() > saved + SECONDS):
            save(folder, epoch, state, seconds)
            saved = time.monotonic()
        if late:
            raise OutOfTime
    return state, seconds


def _manager(folder: Path) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
        folder.absolute(),
        options=ocp.CheckpointManagerOptions(
            max_to_keep=1, create=True, enable_async_checkpointing=False
        ),
    )
