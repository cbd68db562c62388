"""Text lenses over a sentence encoder: what a text is about, whichever words it uses.

A lens is a direction and a bias: logit = bias + direction · embedding. For family "embedding" the direction is that of
a logistic regression; for "centroid" it points from the mean of the negative texts to that of the positive ones, so
that the logit is a calibrated difference of two cosines. One product reads all lenses; the encoder is what costs, once
a text.

Axes: N lenses, B texts, D width of embeddings, Q quantiles.
"""

import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ftw.errors import ConfigError, PackError
from ftw.hat.percentile import interpolate
from ftw.hat.text import TextBank
from ftw.substrate.encoder import SentenceEncoder
from ftw.substrate.sources import lock

FAMILIES = ("embedding", "centroid")
FORMAT = 1
WORD = re.compile(r"\w+")
_ARRAYS = ("weights_ND", "bias", "quantiles_NQ", "levels_Q")


@dataclass(frozen=True, eq=False, kw_only=True)
class EmbeddingBank:
    """N text lenses over one sentence encoder.

    Attributes:
        names: N concept names. family: "embedding" or "centroid": how the directions were found.
        weights_ND, bias: float32. encoder, fingerprint: name and fingerprint of the encoder.
        is_calibrated: σ(logit) is a probability, comparable with that of an activation lens.
        quantiles_NQ, levels_Q: of each lens's logits on background text; None without.
        given: the encoder itself, where it is there already.

    Raises:
        PackError: parts of unequal length, or no such family.
    """

    names: list[str]
    weights_ND: np.ndarray
    bias: np.ndarray
    encoder: str
    fingerprint: str
    family: str = "embedding"
    is_calibrated: bool = False
    quantiles_NQ: np.ndarray | None = None
    levels_Q: np.ndarray | None = None
    given: SentenceEncoder | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        num, num_levels = len(self.names), 0 if self.levels_Q is None else self.levels_Q.size
        shapes = {"bias": (num,), "quantiles_NQ": (num, num_levels), "levels_Q": (num_levels,)}
        shapes["weights_ND"] = (num, self.weights_ND.shape[-1] if self.weights_ND.ndim else 0)
        for name, shape in shapes.items():
            array = getattr(self, name)
            if array is not None and array.shape != shape:
                raise PackError(f"text lenses: {name} has shape {array.shape}, expected {shape}")
        if (self.quantiles_NQ is None) != (self.levels_Q is None):
            raise PackError("text lenses: need both quantiles and their levels, or neither")
        if self.quantiles_NQ is not None and not (np.diff(self.quantiles_NQ, axis=1) >= 0).all():
            raise PackError("text lenses: the background quantiles of a lens do not rise")
        if self.family not in FAMILIES:
            raise PackError(f"text lenses of family {self.family!r}; this FTW knows {', '.join(FAMILIES)}")

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def reader(self) -> SentenceEncoder:
        """The encoder, loaded when it is first needed.

        Raises:
            ConfigError: it is not of the lock file; a pack must not choose what is fetched. PackError: it is another
                than the lenses were fitted with.
        """
        if self.given is None and self.encoder not in lock():
            raise ConfigError(
                f"these text lenses read embeddings of {self.encoder!r}, which FTW does not fetch by itself; give the "
                "encoder: text_encoder=FOLDER, in Python pack.text.using(SentenceEncoder.load(FOLDER))"
            )
        return self._checked(self.given or SentenceEncoder.load(self.encoder))

    def using(self, encoder: SentenceEncoder) -> "EmbeddingBank":
        """The same lenses with an encoder that is there already.

        Raises:
            PackError: it is another than the lenses were fitted with.
        """
        return replace(self, given=self._checked(encoder))

    def score(self, texts: Sequence[str]) -> Tensor:
        """Logit of every lens for every text, float32 [B, N]; a text without words gets the biases."""
        weights_ND, bias_N = torch.from_numpy(self.weights_ND), torch.from_numpy(self.bias)
        return torch.addmm(bias_N, self.reader.encode(texts), weights_ND.T)

    def percentile(self, logits_BN: Tensor) -> Tensor:
        """Share of background text that each logit exceeds, in [0, 1]; NaN without background."""
        if self.quantiles_NQ is None or self.levels_Q is None:
            return torch.full_like(logits_BN, torch.nan)
        quantiles_NQ, levels_Q = torch.from_numpy(self.quantiles_NQ), torch.from_numpy(self.levels_Q)
        return interpolate(logits_BN.T.contiguous(), quantiles_NQ, levels_Q).T

    def subset(self, names: Sequence[str]) -> "EmbeddingBank":
        """The bank of some lenses, in the order named."""
        place = {name: index for index, name in enumerate(self.names)}
        if unknown := [name for name in names if name not in place]:
            raise PackError(f"text lenses: no lens {unknown[0]!r} among {len(self)}")
        chosen = np.array([place[name] for name in names], dtype=np.int64)
        rows = {name: getattr(self, name) for name in ("weights_ND", "bias", "quantiles_NQ")}
        return replace(
            self, names=list(names), **{name: None if part is None else part[chosen] for name, part in rows.items()}
        )

    def tensors(self) -> dict[str, Tensor]:
        """The numbers, for a safetensors file."""
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        return {name: torch.from_numpy(array) for name, array in arrays.items() if array is not None}

    def description(self) -> dict[str, Any]:
        """The words and options, for a JSON file."""
        told = {"family": self.family, "encoder": self.encoder, "fingerprint": self.fingerprint}
        return {"format": FORMAT, "names": self.names, **told, "is_calibrated": self.is_calibrated}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> "EmbeddingBank":
        """Read what `tensors` and `description` gave.

        Raises:
            PackError: a part is missing or of another shape, or the format is another.
        """
        if missing := {"weights_ND", "bias"} - set(tensors) or {"names", "encoder", "fingerprint"} - set(description):
            raise PackError(f"text lenses: {', '.join(sorted(missing))} is missing; the pack is incomplete")
        if description.get("format") != FORMAT:
            raise PackError(f"text lenses of format {description.get('format')!r}; this FTW reads {FORMAT}")
        arrays = {name: tensors[name].float().contiguous().numpy() for name in _ARRAYS if name in tensors}
        return cls(
            names=[str(name) for name in description["names"]],
            weights_ND=arrays["weights_ND"],
            bias=arrays["bias"],
            quantiles_NQ=arrays.get("quantiles_NQ"),
            levels_Q=arrays.get("levels_Q"),
            encoder=str(description["encoder"]),
            fingerprint=str(description["fingerprint"]),
            family=str(description["family"]),
            is_calibrated=bool(description.get("is_calibrated", False)),
        )

    def _checked(self, encoder: SentenceEncoder) -> SentenceEncoder:
        if encoder.fingerprint != self.fingerprint or encoder.width != self.weights_ND.shape[1]:
            raise PackError(
                f"these text lenses were fitted with the encoder {self.encoder!r} (fingerprint "
                f"{self.fingerprint[:12]}, width {self.weights_ND.shape[1]}), not with {encoder.name!r} "
                f"({encoder.fingerprint[:12]}, width {encoder.width}); give that one"
            )
        return encoder


AnyText = TextBank | EmbeddingBank


class EmbeddingWindow:
    """A sliding window over decoded pieces, embedded anew where its text has changed.

    Args:
        tokens: pieces held.
    """

    def __init__(self, bank: EmbeddingBank, *, tokens: int = 32) -> None:
        if tokens < 1:
            raise ConfigError(f"a text window of {tokens} tokens holds nothing; give at least 1 (32 by default)")
        self.bank, self.tokens = bank, tokens
        _ = bank.reader  # an encoder that is not to be had is an error before anything is generated
        self.clear()

    def clear(self) -> None:
        """Forget everything, as between two turns of a chat."""
        self._pieces: deque[str] = deque()
        self._before = ""  # the last character that left
        self._read: tuple[str, Tensor] | None = None

    @property
    def text(self) -> str:
        """What is read: the pieces held, without a word that is cut at the left."""
        whole = "".join(self._pieces)
        cut = WORD.match(whole) if WORD.fullmatch(self._before) else None
        return whole if cut is None else whole[cut.end() :]

    @property
    def has_words(self) -> bool:
        """Whether there is anything to read."""
        return bool(self.text.strip())

    def push(self, piece: str) -> None:
        """Take the next decoded piece; the oldest one leaves a full window."""
        self._pieces.append(piece)
        if len(self._pieces) > self.tokens:
            self._before = (self._before + self._pieces.popleft())[-1:]

    def logits(self) -> Tensor:
        """Logit of every lens for the window's text, float32 [N]; equal to the bank's `score` of it."""
        text = self.text
        if self._read is None or self._read[0] != text:
            self._read = text, self.bank.score([text])[0]
        return self._read[1]
