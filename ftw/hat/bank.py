"""The bank: all loaded lenses as one module, from raw states to readings.

A state is layer-normed token by token (in float32, without parameters), projected onto the shared basis when there is
one, and read by every lens at once. A lens that reads several layers is the average of its calibrated logits:
logit_n = offset_n + sum_l scale_ln head_ln(x_l). For linear lenses that sum is itself one linear map over the layers
side by side, so the bank keeps only that: one matrix product a token however many layers are read.

Axes: N lenses, B batch (any states: tokens, texts, streams), L layers, D model width, Q quantiles, K kept, V watched.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ftw.errors import ConfigError, PackError, SubstrateError
from ftw.hat.basis import Basis
from ftw.hat.floor import middle_spread
from ftw.hat.lens import Head, enlarged, find_rows
from ftw.hat.linear import LinearHead
from ftw.hat.percentile import interpolate
from ftw.hat.slots import Slots

NORM_EPS = 1e-5
FEW = 4  # states up to which one at a time is quicker


def normalise(states: Tensor) -> Tensor:
    """Layer norm without parameters over the last axis, in float32: what every lens reads."""
    width, num = states.shape[-1:], states[..., 0].numel()
    if states.device.type == "cpu" and 1 < num <= FEW:
        # One by one: waking a second thread for a few rows takes longer than the rows.
        rows = states.float().reshape(num, *width).split(1)
        return torch.cat([torch.nn.functional.layer_norm(row, width, eps=NORM_EPS) for row in rows]).view_as(states)
    return torch.nn.functional.layer_norm(states.float(), width, eps=NORM_EPS)


@dataclass(frozen=True)
class BankReading:
    """The strongest lenses and the watched ones, for each state.

    Attributes:
        index_BK: lens indices, strongest first. logit_BK, percentile_BK: their readings.
        watch_logit_BV, watch_percentile_BV: readings of the watch list, in its order.
    """

    index_BK: Tensor
    logit_BK: Tensor
    percentile_BK: Tensor
    watch_logit_BV: Tensor
    watch_percentile_BV: Tensor


class LensBank(nn.Module):
    """N lenses read together, with room for more if asked for (`hot`).

    Args:
        names: N concept names.
        layers: the substrate's layers that the lenses read, in the order of the L axis.
        heads: one head over all layers side by side (linear), or one head a layer.
        scale_LN, offset_N: how the heads' logits are combined; an empty scale when that is folded into a single head.
        quantiles_NQ, levels_Q: quantiles of each lens's logits on background tokens; empty when not calibrated.
        basis: shared projection, or None.

    All tensors may have more rows than there are names: `slots` fills and empties them.
    """

    levels: Tensor

    def __init__(
        self,
        *,
        names: Sequence[str],
        layers: Sequence[int],
        heads: Sequence[Head],
        scale_LN: Tensor,
        offset_N: Tensor,
        quantiles_NQ: Tensor | None = None,
        levels_Q: Tensor | None = None,
        basis: Basis | None = None,
    ) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self._all = list(heads)
        self.heads = nn.ModuleList(self._all)
        self.basis = basis
        self._width = sum(head.width for head in heads) // len(self.layers) if basis is None else basis.mean.shape[-1]
        quantiles_NQ = torch.empty(len(offset_N), 0) if quantiles_NQ is None else quantiles_NQ
        self.register_buffer("levels", torch.empty(0) if levels_Q is None else levels_Q)
        rows = {"scale": scale_LN.T, "offset": offset_N, "quantiles": quantiles_NQ}
        if quantiles_NQ.shape[1]:
            # Background median of each lens, and its distance to the 99th percentile: what `rank` needs at every token.
            rows["median"], rows["spread"] = middle_spread(quantiles_NQ, self.levels)
        for name, tensor in rows.items():
            self.register_buffer(f"row_{name}", tensor)
        self.requires_grad_(False).eval()
        self.slots = Slots(self._row_tensors(), names)
        self.refresh()

    def hot(self, capacity: int, *, precision: str = "float32") -> "LensBank":
        """A copy of the bank with room for `capacity` lenses, its weights in another precision if asked.

        Raises:
            ConfigError: less room than lenses, or no such precision.
        """
        if capacity < len(self):
            raise ConfigError(f"{len(self)} lenses for {capacity} rows; choose a larger capacity")
        bank = LensBank(
            names=(),
            layers=self.layers,
            heads=[head.stored(precision).with_room(capacity) for head in self._now],
            scale_LN=enlarged(self.scale.T, capacity).T,
            offset_N=enlarged(self.offset, capacity),
            quantiles_NQ=enlarged(self.quantiles, capacity),
            levels_Q=self.levels,
            basis=self.basis,
        )
        bank.slots = Slots(bank.slots.tensors, self.names)
        bank.refresh()
        return bank

    def stored(self, precision: str = "auto") -> "LensBank":
        """The same lenses to read with, their weights in another precision.

        Args:
            precision: "auto" is float16, or float32 where a weight is beyond its range. Half the bytes; on First Light
                it moves no concept's AUROC by more than 0.0005, and 99 of 100 percentiles by less than 0.0002.

        Raises:
            ConfigError: no such precision, or weights that do not fit into it.
        """
        if precision != "auto":
            return self if precision == "float32" else self.hot(len(self), precision=precision)
        try:
            return self.stored("float16")
        except ConfigError:
            return self

    def put(self, lenses: "LensBank", *, drop: Iterable[str] = ()) -> None:
        """Lenses come, in place of those that leave; nothing else is touched.

        Args:
            lenses: a bank of the same kind (layers, family, precision, basis, quantiles).
            drop: names that leave.

        Raises:
            PackError: lenses of another kind. ConceptError: one that is here already, or one to drop that is not.
            ConfigError: no room.
        """
        mine, theirs = (_kinds(bank) for bank in (self, lenses))
        if mine != theirs:
            raise PackError(f"lenses of another kind than the bank's: {sorted(mine ^ theirs)[0]}; read them apart")
        self.slots.take(lenses.names, lenses.slots, drop=drop)
        self.refresh()

    def drop(self, names: Iterable[str]) -> None:
        """Lenses leave.

        Raises:
            ConceptError: one that is not here, with the nearest names.
        """
        self.slots.drop(names)
        self.refresh()

    def __len__(self) -> int:
        return len(self.slots)

    @property
    def names(self) -> list[str]:
        """The lenses, in the order of the N axis; a new list whenever they change."""
        return self.slots.names

    @property
    def index(self) -> dict[str, int]:
        """Place of each lens in the N axis."""
        return self.slots.index

    @property
    def num_bytes(self) -> int:
        """Memory of everything that reads: rows filled or not, and the basis."""
        shared = [self.levels] if self.basis is None else [self.levels, self.basis.mean, self.basis.components]
        return self.slots.num_bytes + sum(tensor.numel() * tensor.element_size() for tensor in shared)

    @property
    def width(self) -> int:
        """Width of the states that the bank reads."""
        return self._width

    @property
    def calibrated(self) -> bool:
        """Whether percentiles can be given."""
        return self.quantiles.shape[1] > 0

    def forward(self, states_BLD: Tensor) -> Tensor:
        """Logit of every lens for every state: [B, N].

        Args:
            states_BLD: outputs of blocks `layers`, as the substrate gives them.

        Raises:
            SubstrateError: the states are of another width or number of layers.
        """
        if states_BLD.shape[-2:] != (len(self.layers), self.width):
            raise SubstrateError(
                f"states of shape {tuple(states_BLD.shape)} for a bank that reads layers {list(self.layers)} "
                f"of width {self.width}; tap exactly those layers, in that order"
            )
        return self.logits(normalise(states_BLD))

    def logits(self, normed_BLD: Tensor, part: slice | None = None) -> Tensor:
        """Logits for states (or means of states) that are layer-normed already: [B, N], or those of some rows."""
        x_BLW = normed_BLD if self.basis is None else self.basis(normed_BLD)
        start, stop, _ = slice(None).indices(len(self)) if part is None else part.indices(len(self))
        heads = self._now if part is None else [head.part(start, stop) for head in self._now]
        if self._folded:
            return heads[0](x_BLW.flatten(-2))
        total_BN = self.offset[start:stop]
        for layer, head in enumerate(heads):
            total_BN = total_BN + self.scale[layer, start:stop] * head(x_BLW[..., layer, :])
        return total_BN

    def percentile(self, logits_BN: Tensor, lenses: Tensor | None = None) -> Tensor:
        """Share of background tokens that a lens's logit exceeds, in [0, 1]: linear between quantiles.

        Args:
            logits_BN: logits; with `lenses` [B, K], the logits of those lenses only.
        """
        if not self.calibrated:
            return torch.full_like(logits_BN, torch.nan)
        if lenses is None:
            return interpolate(logits_BN.T, self.quantiles, self.levels).T
        flat = lenses.flatten()
        return interpolate(logits_BN.reshape(-1, 1), self.quantiles[flat], self.levels).view_as(logits_BN)

    def rank(self, logits_BN: Tensor) -> Tensor:
        """What lenses are compared by: distance from the background median in units of its upper spread.

        Logits of different lenses are not on one scale, and percentiles saturate at 1; this orders both. An
        uncalibrated bank ranks by logit.
        """
        return (logits_BN - self.median) / self.spread if self.calibrated else logits_BN

    def background(self) -> tuple[Tensor, Tensor]:
        """Quantiles of each lens's logits on background tokens, [N, Q], and the levels they stand for."""
        return self.quantiles, self.levels

    def read(self, states_BLD: Tensor, *, k: int, watch: Tensor | None = None) -> BankReading:
        """The k strongest lenses and the watched ones."""
        logits_BN: Tensor = self(states_BLD)
        index_BK = self.rank(logits_BN).topk(min(k, len(self)), dim=-1).indices
        logit_BK = logits_BN.gather(-1, index_BK)
        watch_V = index_BK.new_empty(0) if watch is None else watch
        watch_BV = watch_V.expand(len(logits_BN), -1)
        watch_logit_BV = logits_BN[:, watch_V]
        return BankReading(
            index_BK,
            logit_BK,
            self.percentile(logit_BK, index_BK),
            watch_logit_BV,
            self.percentile(watch_logit_BV, watch_BV),
        )

    def rows_of(self, names: Sequence[str]) -> Tensor:
        """Lens indices of some concepts.

        Raises:
            ConceptError: a name that the bank does not read, with the nearest names.
        """
        return torch.tensor(find_rows(names, self.index), dtype=torch.long, device=self.offset.device)

    @property
    def filled(self) -> list[Head]:
        """The heads of the lenses that are there, one a layer (or one for all layers, folded)."""
        return self._now

    @property
    def _folded(self) -> bool:
        return self.scale.shape[0] == 0

    def _row_tensors(self) -> dict[str, Tensor]:
        """Every tensor with an axis of lenses, that axis first."""
        heads = {f"{layer}.{name}": t for layer, head in enumerate(self.heads) for name, t in head.state_dict().items()}
        return heads | {
            name: tensor for name, tensor in self._buffers.items() if name.startswith("row_") and tensor is not None
        }

    def refresh(self) -> None:
        """Point at the filled rows: to be called when `slots` were changed by other means than `put` and `drop`."""
        num, rows = len(self.slots), self.slots.tensors
        self._now = [head.part(0, num) for head in self._all]
        self.scale, self.offset, self.quantiles = (
            rows["row_scale"][:num].T,
            rows["row_offset"][:num],
            rows["row_quantiles"][:num],
        )
        if self.calibrated:
            self.median, self.spread = rows["row_median"][:num], rows["row_spread"][:num]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LensBank":
        super()._apply(fn, recurse)
        # Moved to another device, the tensors are others than those that `slots` holds.
        self.slots.tensors = self._row_tensors()
        self.refresh()
        return self


def combine_linear(heads: Sequence[LinearHead], scale_LN: Tensor, offset_N: Tensor) -> LinearHead:
    """One linear head over all layers side by side that equals offset + sum of scale x head, exactly."""
    combined = LinearHead(heads[0].num_lenses, sum(head.width for head in heads))
    with torch.no_grad():
        combined.weight.copy_(
            torch.cat([scale.unsqueeze(1) * head.weight for scale, head in zip(scale_LN, heads, strict=True)], dim=1)
        )
        combined.bias.copy_(offset_N + sum(scale * head.bias for scale, head in zip(scale_LN, heads, strict=True)))
    return combined


def build_bank(
    *,
    names: Sequence[str],
    layers: Sequence[int],
    heads: Sequence[Head],
    scale_LN: Tensor,
    offset_N: Tensor,
    quantiles_NQ: Tensor | None = None,
    levels_Q: Tensor | None = None,
    basis: Basis | None = None,
) -> LensBank:
    """A bank from one head a layer, linear heads folded into a single product."""
    linear = [head for head in heads if isinstance(head, LinearHead)]
    if linear and len(linear) == len(heads):
        heads = [combine_linear(linear, scale_LN, offset_N)]
        scale_LN, offset_N = torch.empty(0, len(names)), torch.zeros(len(names))
    return LensBank(
        names=names,
        layers=layers,
        heads=heads,
        scale_LN=scale_LN,
        offset_N=offset_N,
        quantiles_NQ=quantiles_NQ,
        levels_Q=levels_Q,
        basis=basis,
    )


def _kinds(bank: LensBank) -> set[str]:
    rows = {f"{name} {list(tensor.shape[1:])} {tensor.dtype}" for name, tensor in bank.slots.tensors.items()}
    return rows | {f"layers {list(bank.layers)}", f"basis {None if bank.basis is None else bank.basis.rank}"}
