"""An interpreter on a live model: of a whole text, or of each token as it is generated, over the tokens just before.

`InterpretedTokens` is what `Monitor` reads windows with, so generation, streaming and taps are the monitor's own. An
interpreter was trained on pooled states of texts; at each token it reads the same pools of the last tokens.

Axes: B sequences, T tokens, L layers, D model width, J slots, C concepts, X leading axis of parts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ftw.errors import SubstrateError
from ftw.hat.bank import normalise
from ftw.hat.interpreter import Interpreter, confidence
from ftw.hat.lens import find_rows
from ftw.hat.pooling import pool_tokens
from ftw.substrate.model import Substrate
from ftw.substrate.taps import read_states

TOKEN = "token"


@dataclass(frozen=True)
class Interpretation:
    """What a text, or a stretch of one, is about.

    Attributes:
        concepts: the most probable, with their probabilities. categories: likewise; empty without a tree.
        confidence: 1 - H / ln C of the distribution over all concepts.
    """

    concepts: Sequence[tuple[str, float]]
    categories: Sequence[tuple[str, float]]
    confidence: float

    def record(self) -> dict[str, Any]:
        """The same as plain data for JSON."""
        record: dict[str, Any] = {
            "confidence": round(self.confidence, 4),
            "concepts": [{"concept": name, "probability": round(chance, 4)} for name, chance in self.concepts],
        }
        if self.categories:
            record["categories"] = [{"category": name, "probability": round(p, 4)} for name, p in self.categories]
        return record


def interpret_text(
    interpreter: Interpreter, substrate: Substrate, text: str, *, top_k: int = 5, max_tokens: int = 128
) -> Interpretation:
    """What a text is about, by the states of one pass over it.

    Args:
        max_tokens: read of the text, the sink included; interpreters are trained on texts no longer than that.

    Raises:
        SubstrateError: another substrate than the interpreter was trained on, or a text without tokens.
    """
    check_fingerprint(interpreter, substrate)
    token_ids = substrate.encode(text, max_tokens=max_tokens)
    if len(token_ids) < 2:
        raise SubstrateError("the text has no tokens; give some words")
    ((_, states_LTD),) = read_states(substrate, [token_ids], interpreter.layers)
    x_1TD, slots_T = pooled_states(interpreter, normalise(states_LTD).unsqueeze(1))
    return interpretation(interpreter, interpreter.probabilities(x_1TD, slots_T=slots_T)[0], top_k=top_k)


def interpretation(interpreter: Interpreter, chance_C: Tensor, *, top_k: int) -> Interpretation:
    """The strongest concepts and categories of a distribution over all concepts."""

    def strongest(names: Sequence[str], values: Tensor) -> list[tuple[str, float]]:
        best = values.topk(min(top_k, len(names)))
        rows: list[int] = best.indices.tolist()
        return [(names[row], float(value)) for row, value in zip(rows, best.values.tolist(), strict=True)]

    categories: list[tuple[str, float]] = []
    if interpreter.tree is not None and interpreter.tree.categories:
        found = interpreter.categories(chance_C.unsqueeze(0))
        categories = strongest([name.strip("[]") for name in found], torch.stack([one[0] for one in found.values()]))
    sure = float(confidence(chance_C.unsqueeze(0))[0])
    return Interpretation(strongest(interpreter.names, chance_C), categories, sure)


def pooled_states(interpreter: Interpreter, normed_LBTD: Tensor) -> tuple[Tensor, Tensor]:
    """What an interpreter reads of texts of equal length: [B, T, D] and the slot of each, from their normed tokens.

    Args:
        normed_LBTD: of `interpreter.layers`, in their order.
    """
    parts, slots = list[Tensor](), list[int]()
    for number, slot in enumerate(interpreter.slots):
        tokens_BTD = normed_LBTD[interpreter.layers.index(slot.layer)]
        if slot.pool == TOKEN:
            parts.append(tokens_BTD)
            slots += [number] * tokens_BTD.shape[1]
        else:
            parts.append(pool_tokens(tokens_BTD, slot.pool).unsqueeze(1))
            slots.append(number)
    return torch.cat(parts, dim=1), torch.tensor(slots, device=normed_LBTD.device)


def check_fingerprint(interpreter: Interpreter, substrate: Substrate) -> None:
    """Raise SubstrateError where the interpreter was trained on another model."""
    if interpreter.fingerprint and interpreter.fingerprint != substrate.fingerprint:
        raise SubstrateError(
            f"the interpreter was trained on a substrate of fingerprint {interpreter.fingerprint[:12]}, "
            f"{substrate.name!r} has {substrate.fingerprint[:12]}; load the substrate that it names, or train anew"
        )


class InterpretedTokens:
    """An interpreter as a reader of windows: logits ln p / (1 - p) of its probabilities.

    `interpretations` has one entry for each window that was read, in the order of reading.
    """

    def __init__(self, interpreter: Interpreter, *, top_k: int = 5) -> None:
        self.interpreter, self._top_k = interpreter, top_k
        self.names, self.layers, self.width = interpreter.names, interpreter.layers, interpreter.state_width
        self.calibrated = False
        self.interpretations: list[Interpretation] = []

    def __len__(self) -> int:
        return len(self.names)

    def rows_of(self, names: Sequence[str], /) -> Tensor:
        """Numbers of some concepts; an unknown one is a ConceptError."""
        found = find_rows(names, {name: row for row, name in enumerate(self.names)})
        return torch.tensor(found, dtype=torch.long)

    def rank(self, logits_BC: Tensor, /) -> Tensor:
        """Concepts are compared by their probabilities."""
        return logits_BC

    def background(self) -> tuple[Tensor, Tensor]:
        """None: what concepts compete for needs no background."""
        return torch.empty(len(self), 0), torch.empty(0)

    def percentile(self, logits_BC: Tensor, lenses: Tensor | None = None, /) -> Tensor:
        """Not known without a background: NaN."""
        return torch.full_like(logits_BC, torch.nan)

    def tokens(self, states_BTLD: Tensor, /) -> list[Tensor]:
        """Layer-normed states, [L, B, T, D]."""
        return [normalise(states_BTLD).permute(2, 0, 1, 3)]

    def pooled(self, parts_XBTF: list[Tensor], lengths_B: Tensor, /) -> Tensor:
        """Logits of windows, [B, C]; NaN for one without tokens."""
        normed_LBTD = parts_XBTF[0]
        logits_BC = normed_LBTD.new_full((normed_LBTD.shape[1], len(self)), torch.nan)
        for row, length in enumerate(lengths_B.tolist()):
            if length:
                x_1TD, slots_T = pooled_states(self.interpreter, normed_LBTD[:, row : row + 1, :length])
                chance_1C = self.interpreter.probabilities(x_1TD, slots_T=slots_T)
                self.interpretations.append(interpretation(self.interpreter, chance_1C[0], top_k=self._top_k))
                logits_BC[row] = torch.logit(chance_1C[0], eps=1e-7)
        return logits_BC
