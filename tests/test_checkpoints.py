"""Training in slices: what is taken up, and how long it took."""

import itertools
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from examples import checkpoints


def test_epochs_in_slices_are_those_of_one_go_and_their_time_adds_up(tmp_path, monkeypatch):
    clock = itertools.count()  # a second passes at each look
    monkeypatch.setattr(checkpoints, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    seen = []

    def one_epoch(tree, epoch):
        seen.append(epoch)
        return {"x": 2 * tree["x"] + epoch}

    def train(folder, *overdue):
        looks = iter(overdue)
        return checkpoints.epochs(
            one_epoch, {"x": jnp.ones(())}, 4, folder, lambda: next(looks, False)
        )

    for late in ([True], [False, True]):
        with pytest.raises(checkpoints.OutOfTime):
            train(tmp_path, *late)
    assert train(tmp_path)[0]["x"] == 2 * (2 * (2 * (2 * 1 + 1) + 2) + 3) + 4
    assert seen == [1, 2, 3, 4]
    # Between the two looks that enclose an epoch one second passes; a finished training adds none.
    assert train(tmp_path) == ({"x": 42.0}, 4.0)
    assert train(None) == ({"x": 42.0}, 4.0)
    assert seen == [1, 2, 3, 4, 1, 2, 3, 4]
