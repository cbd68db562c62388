"""The pool that all lenses train on: pooled states of an encyclopedia with their marks and folds.

States are standardised by the training rows (per layer and feature), or projected onto the shared basis and
standardised there; `Pool.fold` puts both back into the heads, so that a bank reads plain layer-normed states.

Axes: S training texts, N lenses, L layers, D model width, W input width (D or the basis rank), T tokens.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ftw.errors import DataError
from ftw.hat.basis import Basis, fit_basis
from ftw.hat.lens import Head
from ftw.map.encyclopedia import Encyclopedia
from ftw.map.training.lens_task import TrainingConfig


@dataclass
class Pool:
    """Everything that a `LensTask` trains on.

    Attributes:
        states_SLW: standardised inputs. labels_SN, weights_SN: marks (weight 0 = not used).
        folds_S: fold of each text, 0 to K-1; texts of a group share one.
        center_LW, scale_LW: what the inputs were standardised by. basis: shared projection, or None.
        names: N concepts. layers: L layers of the substrate.
    """

    states_SLW: Tensor
    labels_SN: Tensor
    weights_SN: Tensor
    folds_S: Tensor
    center_LW: Tensor
    scale_LW: Tensor
    basis: Basis | None
    names: list[str]
    layers: tuple[int, ...]

    def fold(self, heads: list[Head]) -> list[Head]:
        """Heads that read layer-normed states (or basis coordinates) instead of standardised ones."""
        return [head.fold_inputs(self.center_LW[layer], self.scale_LW[layer]) for layer, head in enumerate(heads)]


def build_pool(encyclopedia: Encyclopedia, config: TrainingConfig, *, seed: int) -> Pool:
    """Read the training rows of an encyclopedia.

    Raises:
        DataError: there are no training rows, or a concept has one class only.
    """
    table, layers = encyclopedia.table, encyclopedia.spec.layers
    rows = table.where("train")
    if len(rows) == 0:
        raise DataError("no training texts; give rows with split 'train'")
    labels_SN, weights_SN = (torch.from_numpy(matrix) for matrix in table.matrices(rows))
    _refuse_one_class(table.concepts, labels_SN, weights_SN)
    x_SLD = torch.stack(
        [torch.from_numpy(encyclopedia.pooled(layer, config.pool, rows)).float() for layer in layers], dim=1
    )
    if not torch.isfinite(x_SLD).all():
        bad = int((~torch.isfinite(x_SLD)).flatten(1).any(1).nonzero()[0])
        raise DataError(
            f"states of text {table.texts[rows[bad]][:60]!r} are not finite; collect again with precision=float32"
        )
    basis = _shared_basis(encyclopedia, config, x_SLD) if config.basis_rank else None
    x_SLW = x_SLD if basis is None else basis(x_SLD)
    center_LW, scale_LW = x_SLW.mean(0), x_SLW.std(0).clamp_min(1e-4)
    return Pool(
        states_SLW=(x_SLW - center_LW) / scale_LW,
        labels_SN=labels_SN,
        weights_SN=weights_SN,
        folds_S=torch.from_numpy(group_folds([table.groups[row] for row in rows], config.folds, seed)),
        center_LW=center_LW,
        scale_LW=scale_LW,
        basis=basis,
        names=list(table.concepts),
        layers=tuple(layers),
    )


def group_folds(groups: list[str], num_folds: int, seed: int) -> np.ndarray:
    """Fold of each text: groups are dealt out in the order of a hash, so that their texts never part.

    Dealing keeps the folds even; a hash alone would put all groups of a small set into one fold every now and then,
    and leave its copy nothing to train on.
    """
    if num_folds < 2:
        return np.zeros(len(groups), dtype=np.int64)

    def draw(group: str) -> bytes:
        return hashlib.blake2b(f"{seed}:{group}".encode("utf-8", "surrogatepass"), digest_size=8).digest()

    dealt = {group: place % num_folds for place, group in enumerate(sorted(set(groups), key=lambda g: (draw(g), g)))}
    return np.array([dealt[group] for group in groups], dtype=np.int64)


class EncyclopediaDataModule(pl.LightningDataModule):
    """Batches of the pool: shuffled for training by seed and epoch, in order for out-of-fold validation.

    Args:
        source: an encyclopedia, read on first use, or a pool that is in memory already.
    """

    def __init__(self, source: Encyclopedia | Pool, config: TrainingConfig, *, seed: int = 0) -> None:
        super().__init__()
        self._source, self._config, self._seed = source, config, seed

    @property
    def pool(self) -> Pool:
        """The rows, read on first use."""
        if not isinstance(self._source, Pool):
            self._source = build_pool(self._source, self._config, seed=self._seed)
        return self._source

    def setup(self, stage: str) -> None:
        _ = self.pool

    def train_dataloader(self) -> DataLoader:
        return self._loader(shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return self._loader(shuffle=False)

    def _loader(self, *, shuffle: bool) -> DataLoader:
        # Batches are sliced from tensors in memory; workers would only copy them.
        batches = _EpochBatches(
            len(self.pool.states_SLW), self._config.batch_texts, seed=self._seed if shuffle else None
        )
        return DataLoader(_PoolRows(self.pool), sampler=batches, batch_size=None, num_workers=0)


class _EpochBatches(Sampler[list[int]]):
    """Lists of rows whose order depends on seed and epoch alone: a resumed run sees what an unbroken one saw."""

    def __init__(self, num_rows: int, batch: int, *, seed: int | None) -> None:
        self._num_rows, self._batch, self._seed, self._epoch = num_rows, batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return -(-self._num_rows // self._batch)

    def __iter__(self) -> Iterator[list[int]]:
        order = np.arange(self._num_rows)
        if self._seed is not None:
            order = np.random.default_rng([self._seed, self._epoch]).permutation(self._num_rows)
        for start in range(0, self._num_rows, self._batch):
            yield order[start : start + self._batch].tolist()


class _PoolRows(Dataset):
    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def __len__(self) -> int:
        return len(self._pool.states_SLW)

    def __getitem__(self, rows: list[int]) -> dict[str, Tensor]:
        pool = self._pool
        return {
            "states": pool.states_SLW[rows],
            "labels": pool.labels_SN[rows],
            "weights": pool.weights_SN[rows],
            "folds": pool.folds_S[rows],
        }


def _shared_basis(encyclopedia: Encyclopedia, config: TrainingConfig, x_SLD: Tensor) -> Basis:
    """Principal components of background tokens where the encyclopedia keeps some, else of the pooled states."""
    rows = encyclopedia.table.where("background")
    if len(rows) and encyclopedia.spec.tokens_per_text.get("background", 0):
        tokens = [
            torch.from_numpy(encyclopedia.token_states(layer, rows)[0]).float() for layer in encyclopedia.spec.layers
        ]
        return fit_basis(torch.stack(tokens, dim=1), config.basis_rank)
    return fit_basis(x_SLD, config.basis_rank)


def _refuse_one_class(names: list[str], labels_SN: Tensor, weights_SN: Tensor) -> None:
    used = weights_SN > 0
    positive_N = ((labels_SN > 0.5) & used).sum(0)
    negative_N = used.sum(0) - positive_N
    poor = [n for n in range(len(names)) if positive_N[n] < 1 or negative_N[n] < 1]
    if poor:
        shown = ", ".join(f"{names[n]!r} ({positive_N[n]} positive, {negative_N[n]} negative)" for n in poor[:5])
        raise DataError(
            f"{len(poor)} of {len(names)} concepts have training rows of one class only: {shown}; "
            "add the other class or leave them out"
        )
