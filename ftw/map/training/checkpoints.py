"""Checkpoints that cost little: not after every epoch where they are large, and never twice in memory."""

import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins import TorchCheckpointIO

from ftw.paths import replace_file

ASSUMED_BYTES_PER_SECOND = 2e8  # of a slow disk
MOMENT = 0.25  # seconds that a checkpoint may always take


class PacedCheckpoint(ModelCheckpoint):
    """Lightning's checkpoint after validation and at the end, as often as a share of the training's time allows.

    The weights and moments of a hundred LSTMs are gigabytes: saved after every epoch they took longer than the epochs.
    What takes a moment is saved after every epoch.

    Args:
        share: of the time since the last checkpoint that the next may take; the last, of the whole training's.
        options: of `ModelCheckpoint`.
    """

    def __init__(self, *, share: float = 0.1, **options: Any) -> None:
        super().__init__(**options)
        self._share, self._seconds, self._started, self._saved = share, 0.0, 0.0, 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._started = self._saved = time.monotonic()
        # What the first will take, from its size: weights, and two moments of AdamW for each that is trained.
        sizes = (p.numel() * p.element_size() * (3 if p.requires_grad else 1) for p in pl_module.parameters())
        self._seconds = sum(sizes) / ASSUMED_BYTES_PER_SECOND

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save_if_due(trainer, pl_module, since=self._saved)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save_if_due(trainer, pl_module, since=self._started)

    def _save_if_due(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, since: float) -> None:
        due = self._seconds < MOMENT or (time.monotonic() - since) * self._share >= self._seconds
        if trainer.strategy.broadcast(due):  # every rank has to save, or none
            super().on_validation_end(trainer, pl_module)

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        before = time.monotonic()
        super()._save_checkpoint(trainer, filepath)
        self._saved = time.monotonic()
        self._seconds = self._saved - before


class FileCheckpointIO(TorchCheckpointIO):
    """Writes straight into a file beside the last checkpoint, then renames it; Lightning's fills the memory twice."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        with replace_file(Path(path)) as temporary, temporary.open("wb") as written:
            torch.save(checkpoint, written)
