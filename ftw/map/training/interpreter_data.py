"""Rows that an interpreter learns from and is judged on: the states of a text, and the concept it is about.

Rows come from an encyclopedia or from arrays. Splits go by group (template, article, gloss), never by concept: every
concept is trained on, in other texts than it is judged by.

Axes: S rows, T tokens (one for each slot, or those of a text), D model width, C concepts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ftw.errors import ConfigError, DataError
from ftw.hat.interpreter import Slot
from ftw.map.encyclopedia import Encyclopedia
from ftw.map.training.data import group_folds

TRAIN, DEV, TEST, FURTHER = "train", "dev", "test", "further"
FOLDS = 10  # of the groups, one is validation where the data name none


@dataclass(kw_only=True)
class InterpreterRows:
    """S texts, each about one concept.

    Attributes:
        names: C concepts. slots: T kinds of state; with `mask_ST`, one kind that all tokens are of.
        states_STD: layer-normed states, float16. mask_ST: where there is a token; None: everywhere.
        labels_S: which concept. groups: what a text was made from. parts: S of train, dev (validation), test, and
            further: rows about other concepts, numbered from C on, which only a similarity is trained on.
        kinds: S words for what a row tests ("named", "unnamed"); weights_S: how much it counts in training.
        texts: what was read; may be empty strings. fingerprint: of the substrate.
    """

    names: list[str]
    slots: list[Slot]
    states_STD: Tensor
    labels_S: Tensor
    groups: list[str]
    parts: list[str]
    kinds: list[str]
    texts: list[str]
    fingerprint: str = ""
    weights_S: Tensor | None = None
    mask_ST: Tensor | None = None

    def __post_init__(self) -> None:
        num = len(self.states_STD)
        lengths = {name: len(getattr(self, name)) for name in ("labels_S", "groups", "parts", "kinds", "texts")}
        if wrong := {name: size for name, size in lengths.items() if size != num}:
            raise DataError(f"{num} rows of states, but {', '.join(f'{size} {name}' for name, size in wrong.items())}")
        if unknown := set(self.parts) - {TRAIN, DEV, TEST, FURTHER}:
            raise DataError(f"unknown part {sorted(unknown)}; the parts are {TRAIN}, {DEV}, {TEST}, {FURTHER}")
        own_S = self.labels_S[torch.tensor([part != FURTHER for part in self.parts], dtype=torch.bool)]
        if len(own_S) and not 0 <= int(own_S.min()) <= int(own_S.max()) < len(self.names):
            raise DataError(f"labels of the rows must lie in 0-{len(self.names) - 1}, one for each concept")
        if not self.states_STD.isfinite().all():
            raise DataError("states of the rows are not finite; collect again with precision=float32")

    def __len__(self) -> int:
        return len(self.states_STD)

    @property
    def weights(self) -> Tensor:
        """How much each row counts, float32 [S]."""
        return torch.ones(len(self)) if self.weights_S is None else self.weights_S

    def where(self, part: str, kind: str | None = None) -> np.ndarray:
        """Rows of a part, and of a kind if one is given."""
        chosen = np.asarray(self.parts) == part
        return np.flatnonzero(chosen if kind is None else chosen & (np.asarray(self.kinds) == kind))

    def select(self, rows: np.ndarray) -> "InterpreterRows":
        """Some of the rows, in the order given."""
        at = torch.from_numpy(np.asarray(rows, dtype=np.int64))
        words = {
            name: [getattr(self, name)[row] for row in at.tolist()] for name in ("groups", "parts", "kinds", "texts")
        }
        masks = {name: None if (one := getattr(self, name)) is None else one[at] for name in ("weights_S", "mask_ST")}
        return replace(self, states_STD=self.states_STD[at], labels_S=self.labels_S[at], **words, **masks)

    def with_validation(self, seed: int) -> "InterpreterRows":
        """The rows with a dev part: as they are if they have one, else one of ten groups of the training rows.

        A concept always keeps a row to train on; where that leaves no group to validate on, there is no dev part.
        """
        if DEV in self.parts or TRAIN not in self.parts:
            return self
        rows = self.where(TRAIN)
        held_out = group_folds([self.groups[row] for row in rows], FOLDS, seed) == 0
        left = np.bincount(self.labels_S[rows[~held_out]].numpy(), minlength=len(self.names))
        moved = rows[held_out & (left[self.labels_S[rows].numpy()] > 0)]
        parts = list(self.parts)
        for row in moved.tolist():
            parts[row] = DEV
        return replace(self, parts=parts)


def read_rows(encyclopedia: Encyclopedia, *, pools: Sequence[str] = ("mean", "last")) -> InterpreterRows:
    """The rows of an encyclopedia: its texts with a positive mark.

    A text that is about several concepts counts for the one with the fewest texts, which is the most specific; where
    several have as few, it is a row of each, and counts for each a share.

    Raises:
        DataError: no text is about anything. EncyclopediaError: a pool that was not collected.
    """
    table, spec = encyclopedia.table, encyclopedia.spec
    positive = np.asarray(table.labels) == 1
    texts, concepts = np.asarray(table.rows)[positive], np.asarray(table.cols)[positive]
    if not len(texts):
        raise DataError(f"no text of encyclopedia {encyclopedia.name!r} is marked as about a concept")
    num_texts = np.bincount(concepts, minlength=len(table.concepts))
    fewest = np.full(len(table), np.iinfo(np.int64).max)
    np.minimum.at(fewest, texts, num_texts[concepts])
    kept = num_texts[concepts] == fewest[texts]
    texts, concepts = texts[kept], concepts[kept]
    shares = 1 / np.bincount(texts, minlength=len(table))[texts]
    slots = [Slot(layer, pool) for layer in spec.layers for pool in pools]
    states_STD = np.stack([encyclopedia.pooled(slot.layer, slot.pool, texts) for slot in slots], axis=1)
    parts, kinds = table.columns.get("part"), table.columns.get("kind")
    splits = {"train": TRAIN, "test": TEST}
    return InterpreterRows(
        names=list(table.concepts),
        slots=slots,
        states_STD=torch.from_numpy(states_STD),
        labels_S=torch.from_numpy(concepts.astype(np.int64)),
        weights_S=torch.from_numpy(shares.astype(np.float32)),
        groups=[table.groups[row] for row in texts],
        parts=[parts[row] if parts else splits[table.splits[row]] for row in texts],
        kinds=[kinds[row] if kinds else "all" for row in texts],
        texts=[table.texts[row] for row in texts],
        fingerprint=spec.fingerprint,
    )


def without_held_out(rows: InterpreterRows, texts: set[str]) -> InterpreterRows:
    """The rows without those of some texts among the dev and test rows: copies of what is trained on, say."""
    kept = [part in (TRAIN, FURTHER) or text not in texts for part, text in zip(rows.parts, rows.texts, strict=True)]
    return rows if all(kept) else rows.select(np.flatnonzero(kept))


def with_further(rows: InterpreterRows, encyclopedia: Encyclopedia) -> InterpreterRows:
    """The rows with those of an encyclopedia about other concepts (part `further`).

    Raises:
        DataError: states of another substrate. EncyclopediaError: a layer or pool that was not collected.
    """
    if encyclopedia.spec.fingerprint != rows.fingerprint:
        raise DataError(f"encyclopedia {encyclopedia.name!r} holds states of another substrate; collect it anew")
    more = read_rows(encyclopedia, pools=list(dict.fromkeys(slot.pool for slot in rows.slots)))
    if more.slots != rows.slots:
        raise DataError(f"encyclopedia {encyclopedia.name!r} has other layers; collect it with the same ones")
    return replace(
        rows,
        states_STD=torch.cat([rows.states_STD, more.states_STD]),
        labels_S=torch.cat([rows.labels_S, more.labels_S + len(rows.names)]),
        weights_S=torch.cat([rows.weights, more.weights]),
        groups=[*rows.groups, *more.groups],
        parts=[*rows.parts, *[FURTHER] * len(more)],
        kinds=[*rows.kinds, *[rows.kinds[0]] * len(more)],
        texts=[*rows.texts, *more.texts],
    )


class InterpreterDataModule(pl.LightningDataModule):
    """Batches of the training rows, shuffled by seed and epoch alone, and of the validation rows, in order.

    With several ranks each takes its share of every batch, so a step sees the rows that one rank would see.

    Args:
        rows: with a dev part if there is to be validation. batch: rows of a step, over all ranks.
        further: whether rows about further concepts are among the training rows.

    Raises:
        DataError: no training rows, or fewer than ranks.
    """

    def __init__(self, rows: InterpreterRows, *, batch: int, seed: int = 0, further: bool = False) -> None:
        super().__init__()
        if batch < 1:
            raise ConfigError(f"map.interpreter.batch={batch}: choose 1 row or more")
        self.rows, self._batch, self._seed = rows, batch, seed
        self.train_rows, self.dev_rows = rows.where(TRAIN), rows.where(DEV)
        if not len(self.train_rows):
            raise DataError("no training rows; give rows of the part 'train'")
        if further:
            self.train_rows = np.concatenate([self.train_rows, rows.where(FURTHER)])

    @property
    def validated(self) -> bool:
        """Whether there are rows that training does not see."""
        return len(self.dev_rows) > 0

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.train_rows, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        # Without rows to validate on, the fit is followed on some that are trained on.
        return self._loader(
            self.dev_rows if self.validated else self.train_rows[:: max(1, len(self.train_rows) // 2000)]
        )

    def _loader(self, rows: np.ndarray, *, shuffle: bool = False) -> DataLoader:
        world, rank = (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)
        if len(rows) < world:
            raise DataError(
                f"{len(rows)} rows for {world} ranks; train on fewer devices (trainer.devices={max(1, len(rows))})"
            )
        sampler = _ShardedBatches(rows, max(self._batch, world), world, rank, self._seed if shuffle else None)
        # Batches are sliced from tensors in memory; workers would only copy them.
        return DataLoader(_Rows(self.rows, seed=self._seed), sampler=sampler, batch_size=None, num_workers=0)


class _ShardedBatches(Sampler[tuple[int, int, list[int]]]):
    """For each batch: the epoch, its number of rows over all ranks, and the rows of this rank.

    Batches differ by one row at most, so every rank has a row of each.
    """

    def __init__(self, rows: np.ndarray, batch: int, world: int, rank: int, seed: int | None) -> None:
        self._rows, self._world, self._rank, self._seed, self._epoch = rows, world, rank, seed, 0
        self._num = max(1, len(rows) // batch)

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._num

    def __iter__(self) -> Iterator[tuple[int, int, list[int]]]:
        rows = self._rows
        if self._seed is not None:
            rows = rows[np.random.default_rng([self._seed, self._epoch]).permutation(len(rows))]
        for part in np.array_split(rows, self._num):
            yield self._epoch, len(part), part[self._rank :: self._world].tolist()


class _Rows(Dataset):
    """Rows by number, each with a partner: another row of its concept, drawn by seed, epoch and row alone."""

    def __init__(self, rows: InterpreterRows, *, seed: int) -> None:
        self._rows, self._seed = rows, seed
        self._kinds = {kind: number for number, kind in enumerate(sorted(set(rows.kinds)))}
        train = np.concatenate([rows.where(TRAIN), rows.where(FURTHER)])
        labels = rows.labels_S.numpy()
        self._of_concept = train[np.argsort(labels[train], kind="stable")]
        counts = np.bincount(labels[train], minlength=int(labels.max()) + 1)
        self._counts, self._first = counts, np.concatenate([[0], np.cumsum(counts)[:-1]])
        self._place = np.zeros(len(rows), dtype=np.int64)
        self._place[self._of_concept] = np.arange(len(train)) - np.repeat(self._first, counts)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, batch: tuple[int, int, list[int]]) -> dict[str, Tensor | int | None]:
        epoch, num_all, numbers = batch
        rows, at = self._rows, torch.tensor(numbers)
        partner = torch.from_numpy(self._partners(np.asarray(numbers), epoch))
        return {
            "states": rows.states_STD[at],
            "mask": None if rows.mask_ST is None else rows.mask_ST[at],
            "partners": rows.states_STD[partner],
            "partner_mask": None if rows.mask_ST is None else rows.mask_ST[partner],
            "labels": rows.labels_S[at],
            "weights": rows.weights[at],
            "kinds": torch.tensor([self._kinds[rows.kinds[number]] for number in numbers]),
            "num_all": num_all,
        }

    def _partners(self, numbers: np.ndarray, epoch: int) -> np.ndarray:
        """A row each of the same concept, another one where there is one; itself for a concept that is not trained."""
        labels = self._rows.labels_S.numpy()[numbers]
        counts = self._counts[labels]
        draws = np.array([np.random.default_rng([self._seed, epoch, number]).random() for number in numbers])
        step = 1 + (draws * np.maximum(counts - 1, 1)).astype(np.int64)
        place = (self._place[numbers] + step) % np.maximum(counts, 1)
        return np.where(
            counts > 0, self._of_concept[np.minimum(self._first[labels] + place, len(self._of_concept) - 1)], numbers
        )
