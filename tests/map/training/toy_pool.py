"""A pool of synthetic states in which each concept is a direction, and trainers for it."""

from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
import torch

from ftw.hat.lens import HeadConfig
from ftw.map.training.callbacks import quiet_trainer
from ftw.map.training.data import EncyclopediaDataModule, Pool, group_folds
from ftw.map.training.fit import build_task, fitting
from ftw.map.training.lens_task import LensTask, TrainingConfig

CONFIG = TrainingConfig(batch_texts=32, learning_rate=0.03, folds=3, patience=2)


def toy_pool(
    *, num: int = 3, rows: int = 90, layers: int = 2, width: int = 8, noise: float = 1.0, seed: int = 0
) -> Pool:
    """Texts of the true side of a random direction are positives; every third pair has no mark."""
    generator = torch.Generator().manual_seed(seed)
    states_SLW = torch.randn(rows, layers, width, generator=generator)
    directions_NW = torch.randn(num, width, generator=generator)
    score_SN = states_SLW.mean(1) @ directions_NW.T + noise * torch.randn(rows, num, generator=generator)
    return Pool(
        states_SLW=states_SLW,
        labels_SN=(score_SN > 0).float(),
        weights_SN=(torch.rand(rows, num, generator=generator) > 1 / 3).float() * 2,
        folds_S=torch.from_numpy(group_folds([f"group {row // 2}" for row in range(rows)], CONFIG.folds, seed)),
        center_LW=torch.zeros(layers, width),
        scale_LW=torch.ones(layers, width),
        basis=None,
        names=[f"c{n}" for n in range(num)],
        layers=tuple(range(layers)),
    )


def of_lenses(pool: Pool, lenses: list[int]) -> Pool:
    """The same texts, marked for some lenses only."""
    names = [pool.names[n] for n in lenses]
    return replace(pool, labels_SN=pool.labels_SN[:, lenses], weights_SN=pool.weights_SN[:, lenses], names=names)


def of_rows(pool: Pool, rows: slice) -> Pool:
    """Some of the texts."""
    tensors = {name: getattr(pool, name)[rows] for name in ("states_SLW", "labels_SN", "weights_SN", "folds_S")}
    return replace(pool, **tensors)


def fitted(
    pool: Pool,
    training: TrainingConfig = CONFIG,
    *,
    head: HeadConfig | None = None,
    epochs: int = 6,
    seed: int = 0,
    checkpoint: Any = None,
    **options: Any,
) -> LensTask:
    """A task after `fit`."""
    task = build_task(pool, head or HeadConfig(), training, seed=seed)
    trainer: pl.Trainer = quiet_trainer(epochs, **options)
    with fitting():
        trainer.fit(task, EncyclopediaDataModule(pool, training, seed=seed), ckpt_path=checkpoint)
    return task
