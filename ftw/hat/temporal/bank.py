"""A bank of sequence lenses: from the states of several tokens to one calibrated logit a concept.

The same shape as the bank of single states: layer norm token by token, a shared basis when there is one, heads,
calibration. `tokens` and `pooled` keep apart what is done once a token and once a window, for windows that overlap.

Axes: N lenses, B sequences, T tokens, L layers, D model width, W what a head reads of a token, X leading axis of parts.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from ftw.errors import ConfigError, SubstrateError
from ftw.hat.bank import LensBank, normalise
from ftw.hat.basis import Basis
from ftw.hat.readout import Readable
from ftw.hat.temporal.sequence import READ_BYTES, SequenceHead, check_precision, lenses_at_once
from ftw.hat.temporal.side_by_side import side_by_side
from ftw.hat.temporal.trunk import Trunk
from ftw.substrate.taps import fast_type

POOLS = ("mean", "max", "last")


class SequenceReader(Readable, Protocol):
    """Lenses that read sequences: work once a token, then once a sequence."""

    @property
    def layers(self) -> tuple[int, ...]: ...
    @property
    def width(self) -> int: ...
    def tokens(self, states_BTLD: Tensor, /) -> list[Tensor]: ...
    def pooled(self, parts_XBTF: list[Tensor], lengths_B: Tensor, /) -> Tensor: ...


class SequenceBank(nn.Module):
    """N sequence lenses read together.

    Args:
        lenses: their heads (or the linear heads behind a trunk) with calibration and quantiles.
        basis: shared projection of every token, or None. trunk: shared encoder, or None.
    """

    def __init__(self, lenses: LensBank, *, basis: Basis | None = None, trunk: Trunk | None = None) -> None:
        super().__init__()
        self.lenses, self.basis, self.trunk = lenses, basis, trunk
        self.requires_grad_(False).eval()

    @property
    def names(self) -> list[str]:
        """The concepts, in the order of the N axis."""
        return self.lenses.names

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers of the substrate, in the order of the L axis."""
        return self.lenses.layers

    @property
    def width(self) -> int:
        """Width of the states that the bank reads."""
        if self.basis is not None:
            return self.basis.mean.shape[-1]
        return self.trunk.width if self.trunk is not None else self.lenses.width

    @property
    def calibrated(self) -> bool:
        """Whether percentiles can be given."""
        return self.lenses.calibrated

    def __len__(self) -> int:
        return len(self.lenses)

    def stored(self, precision: str = "auto", device: torch.device | None = None) -> "SequenceBank":
        """The same lenses to read with, their large weights in another precision; those behind a trunk as they are.

        Args:
            precision: what is read is computed in it: "float32", "bfloat16" or "auto", what the device is fast in.
            device: where it will be read; None: where it is.

        Raises:
            ConfigError: no such precision.
        """
        if precision == "auto":
            precision = str(fast_type(device or self.lenses.offset.device)).removeprefix("torch.")
        check_precision(precision)
        if self.trunk is not None:
            return self
        return SequenceBank(self.lenses.stored(precision), basis=self.basis)

    def rows_of(self, names: Sequence[str], /) -> Tensor:
        """Lens indices of some concepts; an unknown one is a ConceptError."""
        return self.lenses.rows_of(names)

    def rank(self, logits_BN: Tensor, /) -> Tensor:
        """What lenses are compared by (see `LensBank.rank`)."""
        return self.lenses.rank(logits_BN)

    def background(self) -> tuple[Tensor, Tensor]:
        """Quantiles of background windows (see `LensBank.background`)."""
        return self.lenses.background()

    def percentile(self, logits_BN: Tensor, lenses: Tensor | None = None, /) -> Tensor:
        """Share of background windows that a logit exceeds."""
        return self.lenses.percentile(logits_BN, lenses)

    def forward(self, states_BTLD: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """Logit of every lens for every sequence, [B, N]; NaN for a sequence without tokens.

        Args:
            states_BTLD: outputs of blocks `layers`, padded on the right. lengths_B: true lengths; None: all tokens.

        Raises:
            SubstrateError: states of another width or number of layers.
        """
        return self.logits(normalise(self._checked(states_BTLD)), lengths_B)

    def logits(self, normed_BTLD: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """Logits for states that are layer-normed already."""
        batch, num_tokens = normed_BTLD.shape[:2]
        if lengths_B is None:
            lengths_B = torch.full((batch,), num_tokens, device=normed_BTLD.device)
        x_BTLW = normed_BTLD if self.basis is None else self.basis(normed_BTLD.flatten(0, 1)).unflatten(0, (batch, -1))
        if self.trunk is not None:
            return self.pooled([self.trunk.tokens(x_BTLW)], lengths_B)
        # Lens by lens, not token by token: what a part of the lenses makes of all tokens stays in the cache.
        lengths_B1 = lengths_B.clamp_min(1)

        def read(head: SequenceHead, layer: int, _: slice) -> Tensor:
            return head(x_BTLW[:, :, layer], lengths_B1)

        return _gaps(self.decided(self.parts(batch, num_tokens), lengths_B.device, read), lengths_B)

    def tokens(self, states_BTLD: Tensor, /) -> list[Tensor]:
        """What windows need of each token, computed once however many windows it stands in: [X, B, T, F] each."""
        normed_BTLD = normalise(self._checked(states_BTLD))
        x = normed_BTLD
        if self.basis is not None:
            x = self.basis(normed_BTLD.flatten(0, 1)).unflatten(0, normed_BTLD.shape[:2])
        if self.trunk is not None:
            return [self.trunk.tokens(x)]
        return [head.tokens(x[:, :, layer]) for layer, head in enumerate(self.heads(slice(0, len(self))))]

    def pooled(self, parts_XBTF: list[Tensor], lengths_B: Tensor, /) -> Tensor:
        """Logits of sequences or windows, [B, N], from what `tokens` gave."""
        lengths_B1 = lengths_B.clamp_min(1)
        if self.trunk is not None:
            return _gaps(self.lenses.logits(self.trunk.pooled(parts_XBTF[0], lengths_B1)), lengths_B)

        def read(head: SequenceHead, layer: int, part: slice) -> Tensor:
            return head.pooled(parts_XBTF[layer][part], lengths_B1)

        return _gaps(self.decided(self.parts(*parts_XBTF[0].shape[1:3]), lengths_B.device, read), lengths_B)

    def decided(
        self, parts: list[slice], device: torch.device, read: Callable[[SequenceHead, int, slice], Tensor]
    ) -> Tensor:
        """Calibrated logits [B, N] of what `read` gives for a part of the lenses on one layer."""

        def total(part: slice) -> Tensor:
            total_Bn = self.lenses.offset[part]
            for layer, head in enumerate(self.heads(part)):
                total_Bn = total_Bn + self.lenses.scale[layer, part] * read(head, layer, part)
            return total_Bn

        return torch.cat(list(side_by_side(total, parts, device)), dim=1)

    def heads(self, part: slice) -> list[SequenceHead]:
        """Heads of some lenses, one a layer; none behind a trunk."""
        heads = [head.part(part.start, part.stop) for head in self.lenses.filled]
        return [head for head in heads if isinstance(head, SequenceHead)]

    def parts(self, batch: int, num_tokens: int) -> list[slice]:
        """Lenses in parts that are read at once."""
        at_once = min(
            lenses_at_once(head, batch, num_tokens, cached_bytes=READ_BYTES) for head in self.heads(slice(0, len(self)))
        )
        return [slice(at, min(at + at_once, len(self))) for at in range(0, len(self), at_once)]

    def _checked(self, states_BTLD: Tensor) -> Tensor:
        if states_BTLD.ndim != 4 or states_BTLD.shape[2:] != (len(self.layers), self.width):
            raise SubstrateError(
                f"states of shape {tuple(states_BTLD.shape)} for sequence lenses that read layers {list(self.layers)} "
                f"of width {self.width}; give [sequences, tokens, layers, width]"
            )
        return states_BTLD


class PooledTokens:
    """A bank of single states that reads windows: of their mean or last state, or the highest of its logits.

    Args:
        pool: "mean", "max" or "last", as the lenses were trained.
    """

    def __init__(self, bank: LensBank, pool: str = "mean") -> None:
        if pool not in POOLS:
            raise ConfigError(f"pool={pool!r} of a window: choose {', '.join(POOLS)}")
        self.bank, self.pool = bank, pool
        self.names, self.layers, self.width, self.calibrated = bank.names, bank.layers, bank.width, bank.calibrated
        self.rows_of, self.rank, self.percentile = bank.rows_of, bank.rank, bank.percentile
        self.background = bank.background

    def __len__(self) -> int:
        return len(self.bank)

    def tokens(self, states_BTLD: Tensor, /) -> list[Tensor]:
        """Layer-normed states, or the logits of every token where the highest is wanted: [1, B, T, F]."""
        normed_BTLD = normalise(states_BTLD)
        if self.pool == "max":
            return [self.bank.logits(normed_BTLD.flatten(0, 1)).unflatten(0, states_BTLD.shape[:2]).unsqueeze(0)]
        return [normed_BTLD.flatten(2).unsqueeze(0)]

    def pooled(self, parts_XBTF: list[Tensor], lengths_B: Tensor, /) -> Tensor:
        """Logits of windows, [B, N]."""
        tokens_BTF = parts_XBTF[0][0]
        lengths_B11 = lengths_B.view(-1, 1, 1)
        padding_BT1 = torch.arange(tokens_BTF.shape[1], device=lengths_B.device).view(1, -1, 1) >= lengths_B11
        if self.pool == "max":
            return _gaps(tokens_BTF.masked_fill(padding_BT1, -torch.inf).amax(1), lengths_B)
        if self.pool == "last":
            last_B1F = (lengths_B11 - 1).clamp_min(0).expand(-1, 1, tokens_BTF.shape[2])
            state_BF = tokens_BTF.gather(1, last_B1F)[:, 0]
        else:
            state_BF = tokens_BTF.masked_fill(padding_BT1, 0).sum(1) / lengths_B11[:, 0].clamp_min(1)
        return _gaps(self.bank.logits(state_BF.unflatten(1, (len(self.layers), -1))), lengths_B)


def _gaps(logits_BN: Tensor, lengths_B: Tensor) -> Tensor:
    """NaN, the mark of what was not read, for sequences without tokens."""
    return logits_BN.masked_fill((lengths_B < 1).unsqueeze(1), torch.nan)
