"""What the monitor keeps while a model generates: tapped states become readings, readings become a timeline.

The recorder sits in two places of `generate`: a tap hands it the states of each forward pass, and as a stopping
criterion it sees the sequences after each step. A token is told as soon as its state has been read.

Axes: B sequences, T tokens, L layers, N lenses, M readings at once, K kept.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from ftw.errors import SubstrateError
from ftw.hat.bank import LensBank
from ftw.hat.timeline import Reading, Timeline, TokenReading
from ftw.substrate.model import Substrate

OnToken = Callable[[int, TokenReading], None]
POSITIONS_AT_ONCE = 512  # readings of a long prompt are computed in parts, to bound the memory of what lies between


@dataclass(kw_only=True, eq=False)
class Recorder(StoppingCriteria):
    """Turns tapped states into readings, and tells them as soon as the token is known.

    Attributes:
        substrate, bank: the model and the lenses. top_k, watch_rows_V: what a token's reading holds.
        prompts, encoded: what is asked, as text and as tokens.
        stop_ids: tokens that end an answer. criteria: the caller's own stopping criteria.
        on_token: told each reading.
    """

    substrate: Substrate
    bank: LensBank
    top_k: int
    watch_rows_V: Tensor
    prompts: Sequence[str]
    encoded: Sequence[Sequence[int]]
    stop_ids: Collection[int] = ()
    criteria: StoppingCriteriaList = field(default_factory=StoppingCriteriaList)
    on_token: OnToken | None = None

    def __post_init__(self) -> None:
        self._pending: dict[int, Tensor] = {}
        self._logits: list[Tensor] = []  # [B, t, N] parts, on the device until the end
        self._num_read, self._num_told, self._telling = 0, 0, False
        self._total = self._prompt_width = max(len(ids) for ids in self.encoded)
        self._special_ids = set(self.substrate.tokenizer.all_special_ids)
        self._template = [self._template_mask(ids, text) for ids, text in zip(self.encoded, self.prompts, strict=True)]
        self._ends: list[int | None] = []  # where each answer ended; what follows is padding
        self._pieces: list[Pieces] = []
        self._lens_seconds, self._ms, self._clock = 0.0, [], time.perf_counter()

    def on_states(self, layer: int, states_BTD: Tensor) -> None:
        """Keep a block's output; when the deepest wanted layer has come, read the lenses."""
        if self._telling:  # the caller's own use of the model inside `on_token`
            return
        # Without a KV cache a pass goes over the whole sequence again: only what is new counts.
        num_new = min(states_BTD.shape[1], self._total - self._num_read)
        self._pending[layer] = states_BTD[:, states_BTD.shape[1] - num_new :]
        if len(self._pending) == len(self.bank.layers):
            self._read([self._pending[layer] for layer in self.bank.layers], num_new)
            self._pending.clear()

    def __call__(self, input_ids: Any, scores: Any, **options: Any) -> Any:
        """Note which rows have ended, tell what was read; only the caller's criteria stop anything."""
        num_rows = len(input_ids)
        if num_rows % len(self.encoded) or num_rows != len(self._logits[-1]):
            raise SubstrateError(
                f"{len(self.encoded)} prompts, {num_rows} sequences and {len(self._logits[-1])} rows of states: "
                "this way of decoding reorders what the lenses read; use sampling or greedy decoding"
            )
        done_B = torch.zeros(num_rows, dtype=torch.bool, device=input_ids.device)
        if self.criteria:
            done_B |= self.criteria(input_ids, scores, **options)
        self._ends = self._ends or [None] * num_rows
        for row, (token, done) in enumerate(zip(input_ids[:, -1].tolist(), done_B.tolist(), strict=True)):
            if self._ends[row] is None and (done or token in self.stop_ids):
                self._ends[row] = input_ids.shape[1]
        self._tell(input_ids)
        self._total = input_ids.shape[1]
        return done_B

    def finish(self, sequences: Tensor) -> None:
        """Tell what was read after the last step."""
        self._ends = [sequences.shape[1] if end is None else end for end in self._ends]
        self._tell(sequences)

    def timelines(
        self, sequences: Tensor, meta: Mapping[str, Any], *, texts: Sequence[str] | None = None
    ) -> list[Timeline]:
        """One timeline a sequence, padding left out. `texts`: of what is timed; default: the answers."""
        logits_BTN = torch.cat(self._logits, dim=1)
        percentiles_BTN, rank_BTN = torch.empty_like(logits_BTN), torch.empty_like(logits_BTN)
        for start in range(0, logits_BTN.shape[1], POSITIONS_AT_ONCE):
            for row, logits_TN in enumerate(logits_BTN[:, start : start + POSITIONS_AT_ONCE]):
                part = (row, slice(start, start + len(logits_TN)))
                percentiles_BTN[part], rank_BTN[part] = self.bank.percentile(logits_TN), self.bank.rank(logits_TN)
        meta = {**meta, "lens_ms_per_token": round(1000 * self._lens_seconds / max(self._num_read, 1), 4)}
        values = [tensor.cpu().numpy() for tensor in (logits_BTN, percentiles_BTN, rank_BTN)]
        ends = self._ends or [sequences.shape[1]] * len(sequences)
        result = []
        for row, (ids, end) in enumerate(zip(sequences.tolist(), ends, strict=True)):
            assert end is not None  # `finish` has been called
            prompt = row // self._repeats(len(sequences))
            start = self._prompt_width - len(self.encoded[prompt])
            kept = slice(start, min(end, self._num_read))
            text = None if texts is None else texts[prompt]
            result.append(self._timeline(prompt, ids[kept], [matrix[row, kept] for matrix in values], text, meta))
        return result

    def _timeline(
        self, prompt: int, ids: list[int], values: list[np.ndarray], text: str | None, meta: Mapping[str, Any]
    ) -> Timeline:
        num_given = len(self.encoded[prompt])
        is_special = [*self._template[prompt], *(token in self._special_ids for token in ids[num_given:])]
        tokens = pieces(self.substrate, ids)
        ms = np.full(len(ids), np.nan, dtype=np.float32)
        answer_ms = self._ms[: len(ids) - num_given]
        ms[num_given : num_given + len(answer_ms)] = answer_ms
        if text is None:
            text = "".join(
                token for token, hidden in zip(tokens[num_given:], is_special[num_given:], strict=True) if not hidden
            )
        return Timeline(
            tokens=tokens,
            token_ids=np.array(ids),
            is_prompt=np.arange(len(ids)) < num_given,
            is_special=np.array(is_special),
            concepts=self.bank.names,
            logits_TN=values[0],
            percentiles_TN=values[1],
            rank_TN=values[2],
            ms_per_token=ms,
            prompt=self.prompts[prompt],
            text=text,
            meta=dict(meta),
        )

    def _repeats(self, num_rows: int) -> int:
        return num_rows // len(self.encoded)

    def _read(self, states: list[Tensor], num_new: int) -> None:
        start = time.perf_counter()
        logits = [
            self.bank(
                torch.stack([layer_BTD[:, at : at + POSITIONS_AT_ONCE] for layer_BTD in states], dim=2).flatten(0, 1)
            )
            for at in range(0, num_new, POSITIONS_AT_ONCE)
        ]
        num_rows = len(states[0])
        self._logits.append(torch.cat([part.unflatten(0, (num_rows, -1)) for part in logits], dim=1))
        self._num_read += num_new
        self._lens_seconds += time.perf_counter() - start

    def _tell(self, sequences: Tensor) -> None:
        """Hand over readings of positions that were read and whose tokens are known."""
        now = time.perf_counter()
        if self._num_told:
            self._ms.append(1000 * (now - self._clock))
        self._clock = now
        if self.on_token is not None and self._num_read > self._num_told:
            # Every read but those of a prompt in chunks appends one part, and each is told before the next one comes.
            new_BTN = self._logits[-1] if self._num_told or len(self._logits) == 1 else torch.cat(self._logits, dim=1)
            ids = sequences[:, self._num_told : self._num_read].tolist()
            self._telling = True
            try:
                for at in range(0, len(ids[0]), POSITIONS_AT_ONCE):
                    part = slice(at, at + POSITIONS_AT_ONCE)
                    self._tell_part(self._num_told + at, [row[part] for row in ids], new_BTN[:, part], self.on_token)
            finally:
                self._telling = False
        self._num_told = self._num_read

    def _tell_part(self, first: int, ids: list[list[int]], logits_BTN: Tensor, on_token: OnToken) -> None:
        """Tell some positions of all rows: position by position, row by row."""
        num_rows, num_new = logits_BTN.shape[:2]
        top, watched = self._readings(logits_BTN.flatten(0, 1))
        self._pieces = self._pieces or [Pieces(self.substrate) for _ in ids]
        ends = [end if end is not None else first + num_new + 1 for end in self._ends]
        for step in range(num_new):
            for row in range(num_rows):
                prompt, position = row // self._repeats(num_rows), first + step
                start = self._prompt_width - len(self.encoded[prompt])
                if not start <= position < ends[row]:
                    continue
                token, is_prompt, at = ids[row][step], position < self._prompt_width, row * num_new + step
                special = self._template[prompt][position - start] if is_prompt else token in self._special_ids
                on_token(
                    row,
                    TokenReading(
                        position=position - start,
                        token=self._pieces[row].add(token, last=position == ends[row] - 1),
                        token_id=token,
                        is_prompt=is_prompt,
                        is_special=special,
                        top=top[at],
                        watch=watched[at],
                        ms=None if is_prompt or not self._ms else self._ms[-1],
                    ),
                )

    def _readings(self, logits_MN: Tensor) -> tuple[list[list[Reading]], list[list[Reading]]]:
        """The strongest and the watched concepts of each state; percentiles are computed for these alone."""
        bank = self.bank
        index_MK = bank.rank(logits_MN).nan_to_num(-torch.inf).topk(min(self.top_k, len(bank)), dim=-1).indices
        index = torch.cat([index_MK, self.watch_rows_V.expand(len(logits_MN), -1)], dim=1)
        logit = logits_MN.gather(1, index)
        values = torch.stack([logit, torch.sigmoid(logit), bank.percentile(logit, index)], dim=-1).tolist()
        readings = [
            [Reading(bank.names[n], *numbers) for n, numbers in zip(*row, strict=True)]
            for row in zip(index.tolist(), values, strict=True)
        ]
        kept = index_MK.shape[1]
        return [row[:kept] for row in readings], [row[kept:] for row in readings]

    def _template_mask(self, given: Sequence[int], prompt: str) -> list[bool]:
        """Which tokens of a prompt belong to the tokenizer or the chat template, not to the user's text."""
        parts = pieces(self.substrate, given)
        ends = np.cumsum([len(part) for part in parts])
        whole, prompt = "".join(parts), prompt.strip()  # templates trim what they are given
        at = whole.rfind(prompt)
        special = np.isin(given, list(self._special_ids))
        special[0] = True
        if at >= 0:  # a tokenizer that does not give the prompt back letter by letter leaves its template uncovered
            special |= (ends <= at) | (ends - [len(part) for part in parts] >= at + len(prompt))
        return special.tolist()


class Pieces:
    """What each token adds to the text, so that the pieces joined are the text; bytes of an unfinished letter wait."""

    def __init__(self, substrate: Substrate) -> None:
        self._tokenizer = substrate.tokenizer
        self._settled: list[int] = []  # tokens of the piece before: some tokenizers strip the space of the very first
        self._waiting: list[int] = []

    def add(self, token: int, *, last: bool = False) -> str:
        """The piece of the next token; the last one brings what is still waiting."""
        self._waiting.append(token)
        before, through = self._decode(self._settled), self._decode(self._settled + self._waiting)
        if through.endswith("\ufffd") and not last:
            return ""
        self._settled, self._waiting = self._waiting, []
        return through[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, clean_up_tokenization_spaces=False) if ids else ""


def pieces(substrate: Substrate, ids: Sequence[int]) -> list[str]:
    """What each of some tokens adds to the text (see `Pieces`)."""
    told = Pieces(substrate)
    return [told.add(token, last=place == len(ids) - 1) for place, token in enumerate(ids)]
