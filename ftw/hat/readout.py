"""From the logits of all lenses at a token to the few readings that are told: the strongest, the watched, the alarms.

Activation and text lenses are read out alike. One copy a token comes from the device, of the rows that are told.

Axes: M tokens at once, N lenses, K kept, V watched, G guarded (watched, or below a watched one), C asked for besides.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import compress
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ftw.errors import ConfigError
from ftw.hat.floor import chance_floor, logits_at, middle_spread
from ftw.hat.lens import find_rows
from ftw.hat.lineage import Lineage
from ftw.hat.percentile import flat_numbers, interpolate, percentile_of
from ftw.hat.text_embedding import AnyText
from ftw.hat.timeline import Alarm, Reading

BISECTIONS, LOGIT_LIMIT = 60, 1e4
FEW_GUARDED = 32


class Readable(Protocol):
    """N lenses that compare and rank logits, whoever computed them."""

    @property
    def names(self) -> list[str]: ...
    @property
    def calibrated(self) -> bool: ...
    def __len__(self) -> int: ...
    def rows_of(self, names: Sequence[str], /) -> Tensor: ...
    def rank(self, logits_BN: Tensor, /) -> Tensor: ...
    def background(self) -> tuple[Tensor, Tensor]: ...
    def percentile(self, logits_BN: Tensor, lenses: Tensor | None = None, /) -> Tensor: ...


class TextLenses:
    """A text bank as `Readable`: its logits ranked against the background text it was given."""

    def __init__(self, bank: AnyText) -> None:
        self.bank, self.names = bank, list(bank.names)
        self._quantiles_NQ = torch.empty(len(bank), 0)
        self._levels_Q = torch.empty(0)
        if bank.quantiles_NQ is not None and bank.levels_Q is not None:
            self._quantiles_NQ, self._levels_Q = torch.from_numpy(bank.quantiles_NQ), torch.from_numpy(bank.levels_Q)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def calibrated(self) -> bool:
        return self._quantiles_NQ.shape[1] > 0

    def rows_of(self, names: Sequence[str], /) -> Tensor:
        return torch.tensor(find_rows(names, {name: row for row, name in enumerate(self.names)}), dtype=torch.long)

    def rank(self, logits_BN: Tensor, /) -> Tensor:
        """Distance from the background median in units of its upper spread, as activation lenses are compared."""
        return (logits_BN - self._median_spread[0]) / self._median_spread[1] if self.calibrated else logits_BN

    def background(self) -> tuple[Tensor, Tensor]:
        return self._quantiles_NQ, self._levels_Q

    def percentile(self, logits_BN: Tensor, lenses: Tensor | None = None, /) -> Tensor:
        if lenses is None or not self.calibrated:
            return self.bank.percentile(logits_BN)
        quantiles_MQ = self._quantiles_NQ[lenses.flatten()]
        return interpolate(logits_BN.reshape(-1, 1), quantiles_MQ, self._levels_Q).view_as(logits_BN)

    @cached_property
    def _median_spread(self) -> tuple[Tensor, Tensor]:
        return middle_spread(self._quantiles_NQ, self._levels_Q)


class Cell(NamedTuple):
    """One lens at one token, by its row."""

    row: int
    logit: float
    probability: float
    percentile: float


class Told(NamedTuple):
    """What is told of one token: readings without NaN (missing), but for the watch list, which is always whole.

    `lead` is the strongest concept, if it stands out from what chance gives among so many lenses. `cells`: everything
    that was read for it, and what was asked for besides.
    """

    top: list[Reading]
    watch: list[Reading]
    alarms: list[Alarm]
    lead: str | None
    cells: list[Cell]


# The cells of each token; whether the strongest stands out; which guarded lenses fire.
_Copied = tuple[list[list[Cell]], Sequence[bool], Sequence[Sequence[bool]]]


class Readout:
    """The strongest and the watched lenses of each token, and which of the guarded ones are above the alarm.

    Args:
        top_k: strongest concepts told. watch: concepts told always.
        alarm: percentile from which a watched concept, or one below it, is told as an alarm; None for 0.99.
        lineage: who stands below whom; None guards the watched concepts alone.

    Raises:
        ConceptError: an unknown concept in `watch`.
        ConfigError: a negative `top_k`, an alarm outside (0, 1], or one asked of lenses without background.
    """

    def __init__(
        self,
        lenses: Readable,
        *,
        top_k: int,
        watch: Sequence[str] = (),
        alarm: float | None = None,
        lineage: Lineage | None = None,
    ) -> None:
        if top_k < 0:
            raise ConfigError(f"top_k={top_k}: choose 0 or more concepts a token")
        if alarm is not None and not 0 < alarm <= 1:
            raise ConfigError(f"alarm={alarm} is a percentile as a share; choose one above 0 and at most 1, say 0.999")
        if alarm is not None and watch and not lenses.calibrated:
            raise ConfigError(f"alarm={alarm}: these lenses have no background to take a percentile from; leave it out")
        self.lenses, self.top_k, self.floor = lenses, top_k, chance_floor(lenses)
        self.watch_rows_V = lenses.rows_of(watch)
        self._watched_by = guarded(lenses.names, watch, lineage)
        self._guarded_G = lenses.rows_of(list(self._watched_by))
        self._limits_G = self._alarm_logits(0.99 if alarm is None else alarm)
        self._lead_N = logits_at(lenses, self.floor) if lenses.calibrated else torch.full((len(lenses),), torch.inf)
        # The same as plain numbers, for the host.
        self._watched, self._guarded = self.watch_rows_V.tolist(), self._guarded_G.tolist()
        self._limits, self._leads = self._limits_G.tolist(), flat_numbers(self._lead_N.cpu())
        self._background: tuple[Tensor, Sequence[float], Sequence[float]] | None = None

    def __call__(self, logits_MN: Tensor, asked_MC: Tensor | None = None) -> list[Told]:
        """Read out M tokens; `asked_MC`: rows of further lenses to tell of each."""
        names, num_watched = self.lenses.names, len(self.watch_rows_V)
        index_MK = self.strongest(logits_MN, self.top_k)
        num_top = index_MK.shape[1]
        copied = self._on_host if logits_MN.device.type == "cpu" else self._from_device
        cells_MX, leads_M, fires_MG = copied(logits_MN, index_MK, asked_MC)
        told = []
        for m, cells in enumerate(cells_MX):
            all_read = [Reading(names[cell[0]], *cell[1:]) for cell in cells[: num_top + num_watched]]
            alarms = self._alarms(logits_MN[m], fires_MG[m]) if any(fires_MG[m]) else []
            top, watch = all_read[:num_top], all_read[num_top:]
            lead = top[0].concept if leads_M[m] else None
            told.append(Told([one for one in top if one.logit == one.logit], watch, alarms, lead, cells))
        return told

    def _on_host(self, logits_MN: Tensor, index_MK: Tensor, asked_MC: Tensor | None) -> _Copied:
        """What is told, in plain numbers: after a model's forward pass calls on arrays cost more than the numbers."""
        all_MN, has_top = logits_MN.numpy(), index_MK.shape[1] > 0
        rows_MX = [rows_K + self._watched for rows_K in index_MK.tolist()]
        if asked_MC is not None:
            rows_MX = [rows + asked for rows, asked in zip(rows_MX, asked_MC.tolist(), strict=True)]
        cells_MX, leads_M, fires_MG = [], [], []
        for logits_N, rows_X in zip(all_MN, rows_MX, strict=True):
            cells_MX.append(self.cells(logits_N, rows_X))
            leads_M.append(has_top and cells_MX[-1][0].logit >= self._leads[rows_X[0]])
            fires_MG.append(self._firing(logits_N))
        return cells_MX, leads_M, fires_MG

    def cells(self, logits_N: np.ndarray, rows: Sequence[int]) -> list[Cell]:
        """Some lenses at a token, from the logits of all of them on the host."""
        quantiles, levels = self._numbers()
        logits_X = [logits_N[row].item() for row in rows]
        return [
            Cell(
                row, x, _probability(x), percentile_of(x, quantiles, levels, row * len(levels)) if levels else math.nan
            )
            for row, x in zip(rows, logits_X, strict=True)
        ]

    def _firing(self, logits_N: np.ndarray) -> Sequence[bool]:
        """Which of the guarded lenses are above the alarm: a few one by one, many at once."""
        if len(self._guarded) > FEW_GUARDED:
            return (logits_N[self._guarded] >= self._limits).tolist()
        return [logits_N[row].item() >= limit for row, limit in zip(self._guarded, self._limits, strict=True)]

    def _numbers(self) -> tuple[Sequence[float], Sequence[float]]:
        """Background quantiles of all lenses one after another, and their levels; made anew when the lenses change."""
        quantiles_NQ, levels_Q = self.lenses.background()
        if self._background is None or self._background[0] is not quantiles_NQ:
            self._background = quantiles_NQ, flat_numbers(quantiles_NQ.cpu()), levels_Q.tolist()
        return self._background[1:]

    def _from_device(self, logits_MN: Tensor, index_MK: Tensor, asked_MC: Tensor | None) -> _Copied:
        """What is told, in one copy from the device."""
        parts = [index_MK, self.watch_rows_V.expand(len(index_MK), -1), *([] if asked_MC is None else [asked_MC])]
        index_MX, num_top = torch.cat(parts, dim=1), index_MK.shape[1]
        num, cells = index_MX.shape
        logit = logits_MN.gather(1, index_MX)
        leads_M1 = (logit >= self._lead_N[index_MX])[:, : min(1, num_top)].any(dim=1, keepdim=True)
        numbers = torch.stack([logit, torch.sigmoid(logit), self.lenses.percentile(logit, index_MX)], dim=-1)
        fires_MG = logits_MN[:, self._guarded_G] >= self._limits_G
        copied = torch.cat([numbers.flatten(1), index_MX, leads_M1, fires_MG], dim=1).cpu()
        numbers_MX3, rows_MX = copied[:, : 3 * cells].view(num, cells, 3), copied[:, 3 * cells : 4 * cells].long()
        cells_MX = [
            [Cell(row, *numbers) for row, numbers in zip(rows, read, strict=True)]
            for rows, read in zip(rows_MX.tolist(), numbers_MX3.tolist(), strict=True)
        ]
        flags_MF = copied[:, 4 * cells :].bool().tolist()
        return cells_MX, [flags_F[0] for flags_F in flags_MF], [flags_F[1:] for flags_F in flags_MF]

    def strongest(self, logits_MN: Tensor, k: int) -> Tensor:
        """Rows of the k strongest lenses of each token, [M, K]; a missing reading (NaN) is the weakest."""
        k, rank_MN = min(k, len(self.lenses)), self.lenses.rank(logits_MN)
        top = rank_MN.topk(k, dim=-1)
        if k and rank_MN.device.type == "cpu" and top.values[:, 0].sum().item() < math.inf:
            return top.indices  # NaN would have been the strongest
        return rank_MN.nan_to_num(-torch.inf).topk(k, dim=-1).indices

    def _alarms(self, logits_N: Tensor, fires_G: Sequence[bool]) -> list[Alarm]:
        """The guarded concepts that fire, highest percentile first."""
        rows, names = list(compress(self._guarded, fires_G)), self.lenses.names
        alarms = [
            Alarm(self._watched_by[names[cell.row]], Reading(names[cell.row], *cell[1:]))
            for cell in self.cells(logits_N.cpu().numpy(), rows)
        ]
        return sorted(alarms, key=lambda alarm: -alarm.reading.percentile)

    def _alarm_logits(self, alarm: float) -> Tensor:
        """The lowest logit of each guarded lens whose percentile is at least `alarm`, [G]; never reached without one.

        Percentiles rise with logits, so it is found by halving; at each token one comparison is left to do.
        """
        low_G = torch.full((len(self._guarded_G),), -LOGIT_LIMIT, device=self._guarded_G.device)
        high_G = -low_G
        if not self.lenses.calibrated or not len(low_G):
            return torch.full_like(low_G, torch.inf)
        for _ in range(BISECTIONS):
            middle_G = (low_G + high_G) / 2
            reached_G = self.lenses.percentile(middle_G[None], self._guarded_G[None])[0] >= alarm
            low_G, high_G = torch.where(reached_G, low_G, middle_G), torch.where(reached_G, middle_G, high_G)
        return high_G


def guarded(names: Sequence[str], watch: Sequence[str], lineage: Lineage | None) -> Mapping[str, str]:
    """Watched concepts and those below them, each with the watched one it is guarded for."""
    known, found = set(names), dict[str, str]()
    for watched in watch:
        found[watched] = watched
    for watched in watch:
        if lineage is not None and watched in lineage.row_of:
            for name in lineage.names_of(lineage.reach(lineage.row_of[watched]).tolist()):
                if name in known:
                    found.setdefault(name, watched)
    return found


def _probability(logit: float) -> float:
    """σ(logit), without overflow."""
    small = math.exp(-abs(logit))
    return 1 / (1 + small) if logit >= 0 else small / (1 + small)
