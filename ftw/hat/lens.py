"""A lens never stands alone: a head is N classifiers of one family in one module.

`Head` is the only interface that training, banks and packs know. Its parameters carry the lens axis first, so that any
row can be read, written, copied or saved on its own; a single lens is a head of one.

Axes: N lenses, B batch, W input width (model width D, basis rank R, or several layers side by side).
"""

import copy
import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ftw.errors import ConceptError, ConfigError
from ftw.hat.pages import empty_rows

SEQUENCE_FAMILIES = ("lstm", "gru", "attention", "trunk_lstm", "token_max", "token_mean")
FAMILIES = ("linear", "mlp", *SEQUENCE_FAMILIES)


@dataclass(kw_only=True)
class HeadConfig:
    """Which classifier reads a state.

    Attributes:
        family: "linear" (logistic) or "mlp" (W -> hidden -> hidden/2 -> 1) on pooled states; on sequences "lstm",
            "gru", "attention", "trunk_lstm" (one shared LSTM, a linear head a concept), "token_max" or "token_mean".
        hidden: width of the first hidden layer; a positive width makes a linear head an MLP. Units of an LSTM or GRU in
            each direction (0: 256), queries of an attention lens (0: 4).
        dropout: share of hidden units dropped in training (MLP, LSTM and GRU).
    """

    family: str = "linear"
    hidden: int = 0
    dropout: float = 0.0

    @property
    def reads_sequences(self) -> bool:
        """Whether such lenses read the states of several tokens, not one pooled state."""
        return self.family in SEQUENCE_FAMILIES

    def build(self, num_lenses: int, width: int) -> "Head":
        """N untrained lenses over inputs of `width` numbers (of a trunk's output, for trunk_lstm)."""
        # Imported here: the families import this module for their parent class.
        from ftw.hat.linear import LinearHead
        from ftw.hat.mlp import MLPHead

        if self.family not in FAMILIES:
            raise ConfigError(f"hat.lens.family={self.family!r} is not a lens family; choose {', '.join(FAMILIES)}")
        if self.hidden < 0 or not 0 <= self.dropout < 1:
            raise ConfigError(f"hat.lens: hidden={self.hidden} must be >= 0 and dropout={self.dropout} in [0, 1)")
        if self.family == "trunk_lstm" or (self.hidden == 0 and self.family == "linear"):
            return LinearHead(num_lenses, width)
        if self.reads_sequences:
            from ftw.hat.temporal.families import build_head

            return build_head(self, num_lenses, width)
        if self.hidden < 2:
            raise ConfigError(
                f"hat.lens.hidden={self.hidden}: an MLP lens needs at least 2 hidden units (128 is usual)"
            )
        return MLPHead(num_lenses, width, hidden=self.hidden, dropout=self.dropout)


class Head(nn.Module, ABC):
    """N classifiers that read the same input vector.

    Every parameter and buffer has the lens axis first; `rows`, `copy_rows` and packs rely on it.
    """

    num_lenses: int
    width: int

    @abstractmethod
    def forward(self, x_BW: Tensor) -> Tensor:
        """Logit of every lens for every input: [B, N]."""

    @abstractmethod
    def weights(self) -> list[Tensor]:
        """The parameters that an L2 penalty counts (no biases), lens axis first."""

    @abstractmethod
    def fold_inputs(self, center_W: Tensor, scale_W: Tensor) -> "Head":
        """The head that gives on x what this one gives on (x - center) / scale."""

    @abstractmethod
    def rows(self, index: Tensor) -> "Head":
        """A head of the chosen lenses, in that order, on the CPU, sharing nothing with this one."""

    @abstractmethod
    def stored(self, precision: str) -> "Head":
        """The same lenses with weights of another precision: to read with, not to train."""

    @abstractmethod
    def fold_norm(self, gain_NW: Tensor, shift_NW: Tensor) -> "Head":
        """The head that gives on x what each lens of this one gives on gain x + shift, its own affine layer norm."""

    def part(self, start: int, stop: int) -> "Head":
        """Consecutive lenses as a head that shares its tensors with this one: to read with, not to train."""
        return self._with(stop - start, lambda tensor: tensor[start:stop])

    def with_room(self, capacity: int) -> "Head":
        """A copy of the head with rows for more lenses behind its own; what stands in those is undefined."""
        return self._with(capacity, lambda tensor: enlarged(tensor, capacity))

    def _with(self, num_lenses: int, change: Callable[[Tensor], Tensor]) -> "Head":
        view = copy.copy(self)
        view._parameters = {
            name: nn.Parameter(change(tensor.detach()), requires_grad=False) for name, tensor in self.named_parameters()
        }
        view._buffers = {name: None if tensor is None else change(tensor) for name, tensor in self._buffers.items()}
        view.num_lenses = num_lenses
        return view

    def row_tensors(self) -> dict[str, Tensor]:
        """All tensors by name, lens axis first; what a pack stores."""
        return {name: tensor.detach() for name, tensor in self.state_dict().items()}

    @torch.no_grad()
    def copy_rows(self, source: "Head", mask_N: Tensor) -> None:
        """Overwrite the lenses where `mask_N` is true with those of `source`."""
        if not mask_N.any():
            return
        theirs = source.state_dict()
        for name, tensor in self.state_dict().items():
            tensor[mask_N] = theirs[name][mask_N]


def enlarged(tensor_N: Tensor, capacity: int) -> Tensor:
    """A copy of the rows of a tensor with others behind them, which are undefined."""
    larger = empty_rows(capacity, tensor_N)
    larger[: len(tensor_N)] = tensor_N
    return larger


def find_rows(names: Sequence[str], index: Mapping[str, int]) -> list[int]:
    """Rows of some concepts.

    Raises:
        ConceptError: a name without a row, with the nearest names that have one.
    """
    for name in names:
        if name not in index:
            near = difflib.get_close_matches(name, index, n=3, cutoff=0.5)
            raise ConceptError(f"no lens for concept {name!r}; nearest: {', '.join(near) or 'none'}")
    return [index[name] for name in names]
