"""Heads of other families on the same rows, one set at a time, three layers averaged: logits of a set's test texts.

All read means over tokens but the attention, which reads the tokens. Each family is fitted as the library fits it.

Axes: S training rows, T tokens, L layers, D model width.
"""

from functools import cache

import numpy as np
import torch
from torch import Tensor

from ftw.hat.lens import HeadConfig
from ftw.map.calibrate import fit_platt
from ftw.map.derived import pooled
from ftw.map.encyclopedia import Encyclopedia
from ftw.map.text_level import pooled_states
from ftw.map.training.callbacks import quiet_trainer
from ftw.map.training.data import EncyclopediaDataModule, Pool
from ftw.map.training.fit import build_task, fitting
from ftw.map.training.lens_rows import LensRows
from ftw.map.training.lens_task import TrainingConfig
from ftw.map.training.sequence_data import SequencePool
from ftw.map.training.solver import choose_shrinkage, solve_stack
from ftw.map.training.sparse import Marks, SparsePool
from ftw.map.training.temporal import fit_sequences, read_answers
from ftw.map.training.temporal_task import SequenceTrainingConfig
from ftw.map.training.train import quiet_lightning

LAYERS, FOLDS, SEED, EPOCHS = (9, 18, 27), 4, 0, 80


def discriminant(encyclopedia: Encyclopedia, rows: LensRows, test: np.ndarray) -> np.ndarray:
    """Fisher's discriminant in closed form, its shrinkage chosen out of fold."""
    fold_S = rows.folds(FOLDS, SEED)
    order = np.argsort(fold_S, kind="stable")
    states_SLD = np.stack([pooled(encyclopedia, layer, "mean", rows.rows[order]) for layer in LAYERS], axis=1)
    marks = Marks(
        rows_E=np.arange(len(rows), dtype=np.int32),
        positive_E=rows.labels[order] > 0,
        weights_E=rows.weights[order],
        starts_N=np.array([0, len(rows)]),
    )
    starts_K = np.searchsorted(fold_S[order], np.arange(FOLDS + 1))
    pool = SparsePool(states_SLD=states_SLD, marks=marks, fold_starts_K=starts_K, names=[rows.name], layers=LAYERS)
    stack = solve_stack(pool, shrinkage=choose_shrinkage(pool, seed=SEED), seed=SEED, progress=False)
    return stack.bank().logits(pooled_states(encyclopedia, LAYERS, "mean", test)).numpy()[:, 0]


def centroids(encyclopedia: Encyclopedia, rows: LensRows, test: np.ndarray, *, standard: bool = True) -> np.ndarray:
    """The difference of the class means; logits are distances in units of half the gap."""
    total = np.zeros(len(test))
    for layer in LAYERS:
        train_SD, test_SD = (pooled(encyclopedia, layer, "mean", some).astype(np.float64) for some in (rows.rows, test))
        scale_D = train_SD.std(0).clip(1e-4) if standard else np.ones(train_SD.shape[1])
        high_D, low_D = ((train_SD[rows.labels == label] / scale_D).mean(0) for label in (1, 0))
        gap_D = high_D - low_D
        total += 2 * (test_SD / scale_D - (high_D + low_D) / 2) @ gap_D / (gap_D @ gap_D)
    return total / len(LAYERS)


def descent(encyclopedia: Encyclopedia, rows: LensRows, test: np.ndarray, *, family: str, hidden: int) -> np.ndarray:
    """Any head on means by AdamW, stopped by out-of-fold rows and calibrated on them."""
    _quiet()
    x_SLD = pooled_states(encyclopedia, LAYERS, "mean", rows.rows)
    center_LD, scale_LD = x_SLD.mean(0), x_SLD.std(0).clamp_min(1e-4)
    pool = Pool(
        states_SLW=(x_SLD - center_LD) / scale_LD,
        labels_SN=torch.from_numpy(rows.labels)[:, None],
        weights_SN=torch.from_numpy(rows.weights)[:, None],
        folds_S=torch.from_numpy(rows.folds(FOLDS, SEED)),
        center_LW=center_LD,
        scale_LW=scale_LD,
        basis=None,
        names=[rows.name],
        layers=LAYERS,
    )
    config = TrainingConfig(folds=FOLDS)
    head = HeadConfig(family=family, hidden=hidden, dropout=0.1 if family == "mlp" else 0.0)
    task = build_task(pool, head, config, seed=SEED)
    with fitting():
        quiet_trainer(EPOCHS).fit(task, datamodule=EncyclopediaDataModule(pool, config, seed=SEED))
    held_out_SL = task.out_of_fold(pool.states_SLW, pool.folds_S)[:, :, 0].numpy()
    x_SLD = pooled_states(encyclopedia, LAYERS, "mean", test)
    with torch.no_grad():
        logits_SL = torch.cat([each(x_SLD[:, at]) for at, each in enumerate(pool.fold(task.full_fits()))], dim=1)
    fit = fit_platt(held_out_SL, *rows.columns(len(LAYERS)), prior=0.5)
    return (logits_SL.numpy() * fit.scale_N + fit.offset_N).mean(axis=1)


def attention(encyclopedia: Encyclopedia, rows: LensRows, test: np.ndarray) -> np.ndarray:
    """Four learned queries over the tokens, stopped and calibrated on the first of four folds."""
    _quiet()
    stack = fit_sequences(
        _token_pool(encyclopedia, rows),
        HeadConfig(family="attention"),
        SequenceTrainingConfig(),
        trainer=lambda _: quiet_trainer(EPOCHS),
        seed=SEED,
    )
    return read_answers(stack.sequence_bank().stored(), encyclopedia, test)[:, 0]


def _token_pool(encyclopedia: Encyclopedia, rows: LensRows) -> SequencePool:
    read = [encyclopedia.token_states(layer, rows.rows) for layer in LAYERS]
    tokens_LTD = torch.stack([torch.from_numpy(states.astype(np.float32)) for states, _ in read])
    center_LD, scale_LD = tokens_LTD.mean(1), tokens_LTD.std(1).clamp_min(1e-4)
    offsets: Tensor = torch.from_numpy(read[0][1])
    return SequencePool(
        tokens_LTW=(tokens_LTD - center_LD[:, None]) / scale_LD[:, None],
        starts_S=offsets[:-1].clone(),
        lengths_S=offsets.diff(),
        labels_SN=torch.from_numpy(rows.labels)[:, None],
        weights_SN=torch.from_numpy(rows.weights)[:, None],
        held_out_S=torch.from_numpy(rows.folds(FOLDS, SEED) == 0),
        center_LW=center_LD,
        scale_LW=scale_LD,
        basis=None,
        names=[rows.name],
        layers=LAYERS,
        rows=rows.rows,
    )


@cache
def _quiet() -> None:
    quiet_lightning()
