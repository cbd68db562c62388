"""Who holds the activation lenses: a bank that has them all, or a shelf that brings them when they are asked for.

`Holder` is all that the aperture's reader knows of either, so that a pack too large for memory is read by the same code
as one that is resident.

Axes: N lenses, B states, L layers, D model width, M rows asked for.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ftw.errors import ConfigError
from ftw.hat.bank import LensBank


class Holder(Protocol):
    """Activation lenses by row; the rows are those of `names`."""

    @property
    def names(self) -> Sequence[str]: ...
    @property
    def layers(self) -> tuple[int, ...]: ...
    @property
    def width(self) -> int: ...
    @property
    def calibrated(self) -> bool: ...

    def begin(self, states_BLD: Tensor) -> None:
        """Take the states that the next calls of `logits` are about."""
        ...

    def logits(self, rows: np.ndarray) -> np.ndarray:
        """Logits of some lenses, float32 [B, M], bringing them in; NaN for one that cannot be brought."""
        ...

    def percentile(self, logits_M: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Share of background that each logit exceeds, [M]; NaN without background."""
        ...

    def rank(self, logits_BN: Tensor) -> Tensor:
        """What all lenses are compared by; logits without background."""
        ...

    def background(self) -> tuple[Tensor, Tensor]:
        """Quantiles of each lens's logits on background, [N, Q], and the levels they stand for, on the CPU."""
        ...

    def drop(self, rows: np.ndarray) -> None:
        """Learn that these are read no more until they are asked for again."""
        ...

    def prefetch(self, rows: np.ndarray) -> None:
        """Learn that these may be asked for soon; returns at once."""
        ...

    def preload(self, max_bytes: int) -> int:
        """Bring as many lenses into memory as fit; returns how many are there."""
        ...

    def statistics(self) -> dict[str, Any]:
        """Counts for a person: hits, misses, bytes."""
        ...


class ResidentLenses:
    """A holder that has every lens in one bank: one product reads them all, and the aperture is a view."""

    def __init__(self, bank: LensBank) -> None:
        self._bank = bank.eval()
        self._logits_BN = np.empty((0, len(bank)), dtype=np.float32)

    @property
    def names(self) -> Sequence[str]:
        return self._bank.names

    @property
    def layers(self) -> tuple[int, ...]:
        return self._bank.layers

    @property
    def width(self) -> int:
        return self._bank.width

    @property
    def calibrated(self) -> bool:
        return self._bank.calibrated

    @torch.inference_mode()
    def begin(self, states_BLD: Tensor) -> None:
        self._logits_BN = self._bank(states_BLD.to(self._bank.offset.device)).float().cpu().numpy()

    def logits(self, rows: np.ndarray) -> np.ndarray:
        return self._logits_BN[:, rows]

    @torch.inference_mode()
    def percentile(self, logits_M: np.ndarray, rows: np.ndarray) -> np.ndarray:
        device = self._bank.offset.device
        logits_1M = torch.from_numpy(np.asarray(logits_M, dtype=np.float32))[None].to(device)
        return self._bank.percentile(logits_1M, torch.from_numpy(rows)[None].to(device))[0].cpu().numpy()

    @torch.inference_mode()
    def rank(self, logits_BN: Tensor) -> Tensor:
        return self._bank.rank(logits_BN.to(self._bank.offset.device)).cpu()

    def background(self) -> tuple[Tensor, Tensor]:
        return self._bank.quantiles.cpu(), self._bank.levels.cpu()

    def drop(self, rows: np.ndarray) -> None:
        pass  # nothing to gain: all lenses are one matrix

    def prefetch(self, rows: np.ndarray) -> None:
        pass

    def preload(self, max_bytes: int) -> int:
        if max_bytes < (held := self._num_bytes()):
            raise ConfigError(
                f"{max_bytes / 2**20:.1f} MB are fewer than the {held / 2**20:.1f} MB that all {len(self.names)} "
                "lenses take, and they are resident; give at least that, or hold the pack on a shelf"
            )
        return len(self.names)

    def statistics(self) -> dict[str, Any]:
        return {"resident": len(self.names), "resident_bytes": self._num_bytes()}

    def _num_bytes(self) -> int:
        tensors = [*self._bank.parameters(), *self._bank.buffers()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
