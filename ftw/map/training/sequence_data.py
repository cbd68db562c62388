"""The pool that sequence lenses train on: token states of sampled answers, with their marks.

States are standardised over the training tokens, or projected onto the shared basis and standardised there. Each lens
draws its own answers from the pool, so that nothing is multiplied for pairs that have no mark; of many negatives it
reads as many in an epoch as it has positives, and the next ones in the next epoch.

Axes: S answers, N lenses, T tokens, L layers, W input width, K rows of a lens, B rows of a batch.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Sampler

from ftw.errors import DataError
from ftw.hat.basis import Basis, fit_basis
from ftw.map.encyclopedia import Encyclopedia
from ftw.map.sequences import NEGATED
from ftw.map.training.data import group_folds
from ftw.substrate.taps import fast_type

# Where each lens reads its own answers, so many positives in an epoch (50 are sampled for a concept; one that stands
# above many has thousands), and so many held-out negatives for each: more would take longer to read than to train on.
EPOCH_POSITIVES, HELD_OUT_NEGATIVES = 50, 4
BASIS_TOKENS = 20_000  # enough for a basis of any width that is in use


@dataclass(kw_only=True)
class SequencePool:
    """Everything that a `SequenceTask` trains on.

    Attributes:
        tokens_LTW: standardised states of all answers, one after the other; float32 or bfloat16.
        starts_S, lengths_S: where each answer begins, and its tokens (0: nothing was said).
        labels_SN, weights_SN: marks (weight 0 = not used). held_out_S: answers for early stopping and calibration.
        center_LW, scale_LW: what the states were standardised by. basis: shared projection, or None.
        names: N concepts. layers: L layers of the substrate. rows: S rows of the encyclopedia's table.
    """

    tokens_LTW: Tensor
    starts_S: Tensor
    lengths_S: Tensor
    labels_SN: Tensor
    weights_SN: Tensor
    held_out_S: Tensor
    center_LW: Tensor
    scale_LW: Tensor
    basis: Basis | None
    names: list[str]
    layers: tuple[int, ...]
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.starts_S)

    @property
    def longest(self) -> int:
        """Tokens of the longest answer."""
        return int(self.lengths_S.max())

    def read(self, rows: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """States of some answers of any shape [...], padded: [..., T, W], and their lengths."""
        lengths = self.lengths_S[rows]
        places = self.starts_S[rows].unsqueeze(-1) + torch.arange(max(1, int(lengths.max())), device=rows.device)
        # What lies beyond an answer's end is padding, whatever it holds; it only must exist.
        return self.tokens_LTW[layer][places.clamp_max(self.tokens_LTW.shape[1] - 1)], lengths

    def of_lenses(self, lenses: slice) -> "SequencePool":
        """The same answers, marked for some lenses only."""
        return replace(
            self,
            labels_SN=self.labels_SN[:, lenses],
            weights_SN=self.weights_SN[:, lenses],
            names=self.names[lenses],
        )

    def rows_of_lenses(self, *, held_out: bool) -> list[Tensor]:
        """Rows that each lens uses, [K] each; on the CPU."""
        # Marks may have gone to a GPU with the lenses; the lists of rows are made on the CPU.
        used_NS = ((self.weights_SN.cpu() > 0) & (self.held_out_S == held_out).unsqueeze(1)).T.contiguous()
        return [used_S.nonzero().flatten() for used_S in used_NS]

    def rows_to_stop_by(self, *, own: bool) -> Tensor:
        """Held-out rows that each lens is stopped and calibrated by, [N, K]; -1 behind the last of a lens.

        Args:
            own: each lens reads its own, so not all of them: positives as in `RowsOfEpoch`, and `HELD_OUT_NEGATIVES`
                for each.
        """
        if own:
            return _padded(list(_Turns(self, held_out=True, negatives=HELD_OUT_NEGATIVES, seed=0).rows(0)))
        return _padded(self.rows_of_lenses(held_out=True))

    def balance(self, *, drawn: bool) -> Tensor:
        """Row weights [N, 2] such that the training answers of a lens sum to one, half of it on either class.

        Args:
            drawn: the answers of one epoch (`RowsOfEpoch`); else all.
        """
        weights_SN, labels_SN = self.weights_SN.cpu() * ~self.held_out_S.unsqueeze(1), self.labels_SN.cpu()
        classes = torch.stack([1 - labels_SN, labels_SN])
        totals_2N, num_2N = (weights_SN * classes).sum(1), ((weights_SN > 0) * classes).sum(1)
        if drawn:
            positive_N = num_2N[1].clamp_max(EPOCH_POSITIVES)
            totals_2N *= torch.stack([positive_N.clamp_max(num_2N[0]), positive_N]) / num_2N
        return torch.nan_to_num(0.5 / totals_2N.T, nan=0.0, posinf=0.0)


class RowsOfEpoch:
    """Rows that each lens trains on in an epoch, [N, K] in random order; -1 behind the last of a lens.

    At most `EPOCH_POSITIVES` and as many negatives; each epoch takes the next ones. The order of a lens hangs on seed,
    epoch and the concept's name alone.
    """

    def __init__(self, pool: SequencePool, seed: int) -> None:
        self._turns = _Turns(pool, held_out=False, negatives=1, seed=seed)
        self._keys, self._seed = [key_of(name) for name in pool.names], seed

    def __call__(self, epoch: int) -> Tensor:
        drawn = []
        for rows_K, key in zip(self._turns.rows(epoch), self._keys, strict=True):
            order = np.random.default_rng([self._seed, epoch, key]).permutation(len(rows_K))
            drawn.append(rows_K[torch.from_numpy(order)])
        return _padded(drawn)


class _Turns:
    """Some positives of each lens, and so many negatives for each of them; the next ones at each turn."""

    def __init__(self, pool: SequencePool, *, held_out: bool, negatives: int, seed: int) -> None:
        labels_NS = (pool.labels_SN.cpu() > 0.5).T.contiguous()
        self._classes = []
        for name, rows_K, label_S in zip(pool.names, pool.rows_of_lenses(held_out=held_out), labels_NS, strict=True):
            random, positive_K = np.random.default_rng([seed, key_of(name)]), label_S[rows_K]
            num_positives = min(int(positive_K.sum()), EPOCH_POSITIVES)
            for rows, most in (
                (rows_K[positive_K], num_positives),
                (rows_K[~positive_K], max(1, num_positives) * negatives),
            ):
                self._classes.append((rows[torch.from_numpy(random.permutation(len(rows)))], min(most, len(rows))))

    def rows(self, turn: int) -> Iterator[Tensor]:
        """Rows [K] of one lens after the other, its positives first."""
        parts = (_turned(rows, most, turn) for rows, most in self._classes)
        return (torch.cat(pair) for pair in zip(parts, parts, strict=True))


def _turned(rows: Tensor, most: int, turn: int) -> Tensor:
    """So many rows from where the turn before ended, round and round."""
    return rows[torch.arange(turn * most, (turn + 1) * most) % max(1, len(rows))]


def _padded(rows: list[Tensor]) -> Tensor:
    return pad_sequence(rows, batch_first=True, padding_value=-1)


def build_sequence_pool(
    encyclopedia: Encyclopedia,
    *,
    folds: int,
    basis_rank: int,
    seed: int,
    split: str = "train",
    layers: Sequence[int] = (),
) -> SequencePool:
    """Read the answers of a split; those to negated prompts, and empty ones, are not used.

    Args:
        layers: some of the encyclopedia's; empty: all.

    Raises:
        DataError: there are none, or a concept has one class only.
        EncyclopediaError: the encyclopedia keeps no token states.
    """
    table, layers = encyclopedia.table, tuple(layers) or encyclopedia.spec.layers
    rows = table.where(split)
    if not len(rows):
        raise DataError(f"no answers of split {split!r}; collect with: ftw collect data=sequences")
    states = [encyclopedia.token_states(layer, rows) for layer in layers]
    offsets = states[0][1]
    lengths_S = torch.from_numpy(np.diff(offsets))
    labels_SN, weights_SN = (torch.from_numpy(matrix) for matrix in table.matrices(rows))
    negated_S = torch.tensor([table.sources[row] == NEGATED for row in rows])
    weights_SN[negated_S | (lengths_S == 0)] = 0
    held_out = np.zeros(len(rows), dtype=np.int64)
    if split == "train" and folds > 1:
        held_out = group_folds([table.groups[row] for row in rows], folds, seed) == 0
    pool = _standardised([torch.from_numpy(part[0]) for part in states], basis_rank)
    pool = SequencePool(
        tokens_LTW=pool[0],
        starts_S=torch.from_numpy(offsets[:-1].copy()),
        lengths_S=lengths_S,
        labels_SN=labels_SN,
        weights_SN=weights_SN,
        held_out_S=torch.from_numpy(np.asarray(held_out, dtype=bool)),
        center_LW=pool[1],
        scale_LW=pool[2],
        basis=pool[3],
        names=list(table.concepts),
        layers=tuple(layers),
        rows=rows,
    )
    _refuse_one_class(pool)
    return pool


def _standardised(states: list[Tensor], basis_rank: int) -> tuple[Tensor, Tensor, Tensor, Basis | None]:
    """Tokens of every layer as they are trained on, with what they were standardised by."""
    dtype = fast_type(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    basis = None
    if basis_rank:
        step = max(1, len(states[0]) // BASIS_TOKENS)
        basis = fit_basis(torch.stack([layer_TD[::step].float() for layer_TD in states], dim=1), basis_rank)
    tokens, centers, scales = [], [], []
    for layer, layer_TD in enumerate(states):
        x_TW = layer_TD.float()
        if not x_TW.isfinite().all():
            raise DataError("states of the answers are not finite; collect again with precision=float32")
        if basis is not None:
            x_TW = (x_TW - basis.mean[layer]) @ basis.components[layer]
        center_W, scale_W = x_TW.mean(0), x_TW.std(0).clamp_min(1e-4)
        tokens.append(((x_TW - center_W) / scale_W).to(dtype))
        centers.append(center_W)
        scales.append(scale_W)
    return torch.stack(tokens), torch.stack(centers), torch.stack(scales), basis


def _refuse_one_class(pool: SequencePool) -> None:
    used_SN = (pool.weights_SN > 0) & ~pool.held_out_S.unsqueeze(1)
    positive_N = (used_SN & (pool.labels_SN > 0.5)).sum(0)
    negative_N = used_SN.sum(0) - positive_N
    if poor := [n for n in range(len(pool.names)) if not positive_N[n] or not negative_N[n]]:
        shown = ", ".join(f"{pool.names[n]!r} ({positive_N[n]} positive, {negative_N[n]} negative)" for n in poor[:5])
        raise DataError(
            f"{len(poor)} of {len(pool.names)} concepts have training answers of one class only: {shown}; "
            "sample more (data.positives, data.siblings, data.distant), or leave these concepts out"
        )


class SequenceDataModule(pl.LightningDataModule):
    """Batches of rows: of each lens's own answers [N, B] (-1: none), or of shared answers [1, B].

    Args:
        own: each lens its own. batch: answers in a step. Order by seed and epoch alone.
    """

    def __init__(self, pool: SequencePool, *, own: bool, batch: int, seed: int) -> None:
        super().__init__()
        self.pool, self._own, self._batch, self._seed = pool, own, batch, seed

    def train_dataloader(self) -> DataLoader:
        draw = RowsOfEpoch(self.pool, self._seed) if self._own else self._shared_rows
        return _loader(_RowBatches(draw, self._batch))

    def val_dataloader(self) -> DataLoader:
        rows_NK = self.pool.rows_to_stop_by(own=self._own)
        return _loader(_RowBatches(lambda _: rows_NK, max(1, rows_NK.shape[1])))

    def _shared_rows(self, epoch: int) -> Tensor:
        rows_1K = ((self.pool.weights_SN.cpu() > 0).any(1) & ~self.pool.held_out_S).nonzero().T
        order = np.random.default_rng([self._seed, epoch, key_of("all")]).permutation(rows_1K.shape[1])
        return rows_1K[:, torch.from_numpy(order)]


def _loader(batches: "_RowBatches") -> DataLoader:
    # Batches are rows of tensors in memory; workers would only copy them.
    return DataLoader(batches, sampler=_EpochNumbers(len(batches)), batch_size=None, num_workers=0)


class _EpochNumbers(Sampler[tuple[int, int]]):
    """Epoch and number of each batch: a resumed run sees what an unbroken one saw."""

    def __init__(self, num: int) -> None:
        self._num, self._epoch = num, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._num

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((self._epoch, number) for number in range(self._num))


class _RowBatches(Dataset):
    """The rows [N, K] of an epoch in batches along K; `draw` gives as many in every epoch."""

    def __init__(self, draw: Callable[[int], Tensor], batch: int) -> None:
        self._draw, self._batch, self._rows, self._epoch = draw, batch, draw(0), 0

    def __len__(self) -> int:
        return max(1, -(-self._rows.shape[1] // self._batch))

    def __getitem__(self, place: tuple[int, int]) -> Tensor:
        epoch, number = place
        if epoch != self._epoch:
            self._rows, self._epoch = self._draw(epoch), epoch
        return self._rows[:, number * self._batch : (number + 1) * self._batch]


def key_of(name: str) -> int:
    """A number that depends on a concept's name alone: what is drawn for it does not hang on its neighbours."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=6).digest(), "big")
