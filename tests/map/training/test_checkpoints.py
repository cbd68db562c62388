"""Checkpoints: as many as their cost allows, and never half of one."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pytorch_lightning import Callback
from toy_pool import fitted, toy_pool

from ftw.errors import DiskFullError
from ftw.map.training import checkpoints
from ftw.map.training.checkpoints import FileCheckpointIO, PacedCheckpoint


class Epochs(Callback):
    """An epoch takes a second of the clock, a checkpoint `cost`; notes after how many epochs one was saved."""

    def __init__(self, clock: SimpleNamespace, cost: float) -> None:
        self.clock, self.cost, self.saved = clock, cost, list[int]()

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        self.clock.now += 1

    def on_save_checkpoint(self, trainer, pl_module, checkpoint) -> None:
        self.clock.now += self.cost
        self.saved.append(trainer.current_epoch + 1)


@pytest.mark.parametrize(
    ("cost", "share", "saved"),
    [
        (0.01, 0.1, list(range(1, 13))),  # what costs little, after every epoch
        (0.35, 0.1, [1, 5, 9]),  # what costs a third of an epoch, after four more of them
        (0.35, 0.0, [1]),  # the first is small enough to be tried
    ],
)
def test_checkpoints_take_a_share_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cost: float, share: float, saved: list[int]
):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(checkpoints, "time", SimpleNamespace(monotonic=lambda: clock.now))
    epochs = Epochs(clock, cost)
    paced = PacedCheckpoint(share=share, dirpath=tmp_path, filename="last", save_on_train_epoch_end=False)
    fitted(toy_pool(), epochs=12, callbacks=[epochs, paced], enable_checkpointing=True)
    at_the_end = [13] if cost > 0.1 and share else []  # a tenth of all the time is enough for one more
    assert epochs.saved == saved + at_the_end


def test_the_first_of_a_large_task_waits_until_it_is_worth_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(checkpoints, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(checkpoints, "ASSUMED_BYTES_PER_SECOND", 1.0)
    epochs = Epochs(clock, 0.0)
    paced = PacedCheckpoint(dirpath=tmp_path, filename="last", save_on_train_epoch_end=False)
    fitted(toy_pool(), epochs=3, callbacks=[epochs, paced], enable_checkpointing=True)
    assert not epochs.saved


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, writer = tmp_path / "last.ckpt", FileCheckpointIO()
    writer.save_checkpoint({"epoch": 1, "weights": torch.ones(3)}, path)
    sizes = itertools.count()
    open_file = Path.open

    def full(self: Path, *args, **kwargs):
        return open_file(Path("/dev/full"), *args, **kwargs) if next(sizes) == 0 else open_file(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(DiskFullError, match="no room"):
        writer.save_checkpoint({"epoch": 2, "weights": torch.ones(10**6)}, path)
    monkeypatch.undo()
    assert writer.load_checkpoint(path)["epoch"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
