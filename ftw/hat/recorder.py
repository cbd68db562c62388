"""What the monitor keeps while a model generates: tapped states become readings, readings become a timeline.

The recorder sits in two places of `generate`: a tap hands it the states of each forward pass, and as a stopping
criterion it sees the sequences after each step. A token is told as soon as its state has been read.

Axes: B sequences, T tokens, L layers, N lenses, M readings at once, K kept.
"""

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from ftw.errors import SubstrateError
from ftw.hat.live_text import CANDIDATES, Comparison, LiveText
from ftw.hat.readout import Readable, Readout, Told
from ftw.hat.temporal.windows import WindowReader
from ftw.hat.text_window import text_timeline
from ftw.hat.timeline import Gap, Reading, Timeline, TokenReading
from ftw.substrate.model import Substrate

OnToken = Callable[[int, TokenReading], None]
POSITIONS_AT_ONCE = 512  # readings of a long prompt are computed in parts, to bound the memory of what lies between


class Bank(Readable, Protocol):
    """Activation lenses: a bank, or lenses behind an aperture, whose logits are NaN where they were not read."""

    @property
    def layers(self) -> tuple[int, ...]: ...
    @property
    def width(self) -> int: ...
    def __call__(self, states_BLD: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class _Token:
    """A token that is about to be told: its place among the rows of logits, and what the text lenses say."""

    at: int
    row: int
    position: int
    token_id: int
    piece: str
    is_prompt: bool
    is_special: bool
    written_N: Tensor | None


@dataclass(kw_only=True, eq=False)
class Recorder(StoppingCriteria):
    """Turns tapped states into readings, and tells them as soon as the token is known.

    Attributes:
        substrate, bank: the model and the lenses; without a bank only what is written is read.
        layers: of the substrate, whose states come. readout: what is told of the bank, or of the text lenses alone.
        text, comparison: the text lenses, and how they are set against the bank's; None where that is not asked for.
        prompts, encoded: what is asked, as text and as tokens.
        stop_ids: tokens that end an answer. criteria: the caller's own stopping criteria.
        on_token: told each reading.
        windows_from: first position that windows read, where the bank is a `WindowReader`.
    """

    substrate: Substrate
    bank: Bank | None
    layers: Sequence[int]
    readout: Readout
    text: LiveText | None = None
    comparison: Comparison | None = None
    prompts: Sequence[str]
    encoded: Sequence[Sequence[int]]
    stop_ids: Collection[int] = ()
    criteria: StoppingCriteriaList = field(default_factory=StoppingCriteriaList)
    on_token: OnToken | None = None
    windows_from: int = 0

    def __post_init__(self) -> None:
        self._pending: dict[int, Tensor] = {}
        self._logits: list[Tensor] = []  # [B, t, N] parts, on the device until the end; t only without a bank
        self._num_rows = 0
        self._num_read, self._num_told, self._telling = 0, 0, False
        self._total = self._prompt_width = max(len(ids) for ids in self.encoded)
        self._special_ids = set(self.substrate.tokenizer.all_special_ids)
        self._template = [self._template_mask(ids, text) for ids, text in zip(self.encoded, self.prompts, strict=True)]
        self._ends: list[int | None] = []  # where each answer ended; what follows is padding
        self._pieces: list[Pieces] = []
        self._lens_seconds, self._text_seconds, self._ms, self._clock = 0.0, 0.0, [], time.perf_counter()
        self._last_error, self._told_seconds = "", 0.0
        self._lengths: list[int] = []  # tokens of each sequence that windows read
        if self.text is not None:
            self.text.begin()
        if isinstance(self.bank, WindowReader):
            self.bank.begin()

    def on_states(self, layer: int, states_BTD: Tensor) -> None:
        """Keep a block's output; when the deepest wanted layer has come, read the lenses."""
        if self._telling:  # the caller's own use of the model inside `on_token`
            return
        # Without a KV cache a pass goes over the whole sequence again: only what is new counts.
        num_new = min(states_BTD.shape[1], self._total - self._num_read)
        self._pending[layer] = states_BTD[:, states_BTD.shape[1] - num_new :]
        if len(self._pending) == len(self.layers):
            self._read([self._pending[layer] for layer in self.layers], num_new)
            self._pending.clear()

    def __call__(self, input_ids: Any, scores: Any, **options: Any) -> Any:
        """Note which rows have ended, tell what was read; only the caller's criteria stop anything."""
        num_rows = len(input_ids)
        if num_rows % len(self.encoded) or num_rows != self._num_rows:
            raise SubstrateError(
                f"{len(self.encoded)} prompts, {num_rows} sequences and {self._num_rows} rows of states: "
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
        ends = self._ends or [None] * len(sequences)
        self._ends = [sequences.shape[1] if end is None else end for end in ends]
        self._read_tails(sequences)
        self._tell(sequences)

    def timelines(
        self, sequences: Tensor, meta: Mapping[str, Any], *, texts: Sequence[str] | None = None
    ) -> list[Timeline]:
        """One timeline a sequence, padding left out. `texts`: of what is timed; default: the answers."""
        values = self._matrices()
        meta = {**meta, **self._costs(values)}
        ends = self._ends or [sequences.shape[1]] * len(sequences)
        result = []
        for row, (ids, end) in enumerate(zip(sequences.tolist(), ends, strict=True)):
            assert end is not None  # `finish` has been called
            prompt = row // self._repeats(len(sequences))
            start = self._prompt_width - len(self.encoded[prompt])
            kept = slice(start, min(end, self._num_read))
            text = None if texts is None else texts[prompt]
            timeline = self._timeline(prompt, ids[kept], [matrix[row, kept] for matrix in values], text, meta)
            if self.bank is None and self.text is not None:
                written = text_timeline(timeline, self.text.bank, tokens=self.text.tokens)
                timeline = replace(written, ms_per_token=timeline.ms_per_token)
            result.append(timeline)
        return result

    def _matrices(self) -> list[np.ndarray]:
        """Logits, percentiles and ranks of everything read, [B, T, N] each; NaN without a bank."""
        if self.bank is None:
            return [np.full((self._num_rows, self._num_read, len(self.readout.lenses)), np.nan, np.float32)] * 3
        logits_BTN = torch.cat(self._logits, dim=1)
        percentiles_BTN, rank_BTN = torch.empty_like(logits_BTN), torch.empty_like(logits_BTN)
        for start in range(0, logits_BTN.shape[1], POSITIONS_AT_ONCE):
            for row, logits_TN in enumerate(logits_BTN[:, start : start + POSITIONS_AT_ONCE]):
                part = (row, slice(start, start + len(logits_TN)))
                percentiles_BTN[part], rank_BTN[part] = self.bank.percentile(logits_TN), self.bank.rank(logits_TN)
        return [tensor.cpu().numpy() for tensor in (logits_BTN, percentiles_BTN, rank_BTN)]

    def _costs(self, values: list[np.ndarray]) -> dict[str, Any]:
        """Milliseconds a token, and readings that are missing."""
        num = max(self._num_read, 1)
        costs: dict[str, Any] = {"lens_ms_per_token": round(1000 * self._lens_seconds / num, 4)}
        if self.bank is not None:
            missing_BT = np.isnan(values[0]).min(axis=2)
            if isinstance(self.bank, WindowReader):
                due_T = [self.bank.is_end(at + 1 - self.windows_from) for at in range(missing_BT.shape[1])]
                within_BT = np.arange(len(due_T)) < self.windows_from + np.array(self._lengths)[:, None]
                missing_BT = missing_BT & within_BT & due_T
            costs["num_missing"] = int(missing_BT.sum())
        if self.text is not None:
            costs |= {"text_ms_per_token": round(1000 * self._text_seconds / num, 4)}
            costs |= {"text_window_tokens": self.text.tokens, "num_text_missing": self.text.num_failed}
        if error := self._last_error or (self.text.last_error if self.text is not None else ""):
            costs["last_lens_error"] = error
        return costs

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
            concepts=list(self.readout.lenses.names),
            logits_TN=values[0],
            percentiles_TN=values[1],
            rank_TN=values[2],
            floor=self.readout.floor if self.readout.lenses.calibrated else None,
            ms_per_token=ms,
            prompt=self.prompts[prompt],
            text=text,
            meta=dict(meta),
        )

    def _repeats(self, num_rows: int) -> int:
        return num_rows // len(self.encoded)

    def _read(self, states: list[Tensor], num_new: int) -> None:
        self._num_rows = len(states[0])
        if self.bank is not None:
            start = time.perf_counter()
            logits = []
            for at in range(0, num_new, POSITIONS_AT_ONCE):
                part_BTLD = torch.stack([layer_BTD[:, at : at + POSITIONS_AT_ONCE] for layer_BTD in states], dim=2)
                logits.append(self._logits_of(part_BTLD, self._num_read + at))
            self._logits.append(torch.cat(logits, dim=1))
            self._lens_seconds += time.perf_counter() - start
        self._num_read += num_new

    def _read_tails(self, sequences: Tensor) -> None:
        """Read the window at the end of each sequence, where none was due; a token that ends it belongs to none."""
        if not isinstance(self.bank, WindowReader) or not self._logits:
            return
        start, self._lengths = time.perf_counter(), list[int]()
        for row, end in enumerate(self._ends):
            last = min(self._num_read if end is None else end, self._num_read)
            if last > self.windows_from and int(sequences[row, last - 1]) in self._special_ids:
                last -= 1
                self._write(row, last, torch.full((len(self.bank),), torch.nan))
            self._lengths.append(max(0, last - self.windows_from))
        try:
            for row, logits_N in self.bank.tails(self._lengths).items():
                self._write(row, self.windows_from + self._lengths[row] - 1, logits_N)
        except Exception as error:  # noqa: BLE001 (as in `_logits_of`)
            self._last_error = f"{type(error).__name__}: {error}"
        self._lens_seconds += time.perf_counter() - start

    def _write(self, row: int, place: int, logits_N: Tensor) -> None:
        """Put the logits of one position where they belong among the parts."""
        for part_BTN in self._logits:
            if place < part_BTN.shape[1]:
                part_BTN[row, place] = logits_N.masked_fill(~logits_N.isfinite(), torch.nan)
                return
            place -= part_BTN.shape[1]

    def _logits_of(self, states_BTLD: Tensor, first: int) -> Tensor:
        """Logits of states from position `first` on, [B, T, N]; NaN where the lenses failed, or a number is not finite.

        Windows end at some tokens only; at the others nothing is read, and that is NaN too.
        """
        assert self.bank is not None  # asked only with one
        shape = states_BTLD.shape[:2]
        try:
            if isinstance(self.bank, WindowReader):
                before = min(max(0, self.windows_from - first), shape[1])
                blank_BTN = torch.full((shape[0], before, len(self.bank)), torch.nan, device=states_BTLD.device)
                logits_BTN = torch.cat([blank_BTN, self.bank.push(states_BTLD[:, before:])], dim=1)
            else:
                logits_BTN = self.bank(states_BTLD.flatten(0, 1)).unflatten(0, shape)
        except Exception as error:  # noqa: BLE001 (a generation must not die because a lens does)
            self._last_error = f"{type(error).__name__}: {error}"
            return torch.full((*shape, len(self.bank)), torch.nan, device=states_BTLD.device)
        if logits_BTN.device.type == "cpu" and math.isfinite(logits_BTN.sum().item()):
            return logits_BTN  # one pass where nothing is wrong; on a device it would wait
        return logits_BTN.masked_fill(~logits_BTN.isfinite(), torch.nan)

    def _tell(self, sequences: Tensor) -> None:
        """Hand over readings of positions that were read and whose tokens are known."""
        now = time.perf_counter()
        if self._num_told:
            self._ms.append(1000 * (now - self._clock))
        self._clock = now
        if self.on_token is not None and self._num_read > self._num_told:
            ids = sequences[:, self._num_told : self._num_read].tolist()
            self._telling = True
            try:
                for at in range(0, len(ids[0]), POSITIONS_AT_ONCE):
                    part = slice(at, at + POSITIONS_AT_ONCE)
                    self._tell_part(self._num_told + at, [row[part] for row in ids], self._new(part), self.on_token)
            finally:
                self._telling = False
        self._num_told = self._num_read

    def _new(self, part: slice) -> Tensor | None:
        """Logits of a part of what has been read and not been told, [B, t, N]."""
        if self.bank is None:
            return None
        # Every read but those of a prompt in chunks appends one part, and each is told before the next one comes.
        new_BTN = self._logits[-1] if self._num_told or len(self._logits) == 1 else torch.cat(self._logits, dim=1)
        return new_BTN[:, part]

    def _tell_part(self, first: int, ids: list[list[int]], logits_BTN: Tensor | None, on_token: OnToken) -> None:
        """Tell some positions of all rows: position by position, row by row."""
        begun = time.perf_counter()
        tokens = self._tokens(first, ids)
        written = self._written(tokens)
        read = time.perf_counter()
        self._text_seconds += read - begun if self.text is not None else 0.0
        thought, gaps = self._thought(tokens, logits_BTN)
        self._lens_seconds += time.perf_counter() - read if self.bank is not None else 0.0
        told_before, self._told_seconds = self._told_seconds, self._lens_seconds + self._text_seconds
        lens_ms = 1000 * (self._told_seconds - told_before) / max(len(tokens), 1)
        for place, token in enumerate(tokens):
            told = written[place] if self.bank is None else thought[place]
            on_token(
                token.row,
                TokenReading(
                    position=token.position,
                    token=token.piece,
                    token_id=token.token_id,
                    is_prompt=token.is_prompt,
                    is_special=token.is_special,
                    top=told.top,
                    watch=told.watch,
                    ms=None if token.is_prompt or not self._ms else self._ms[-1],
                    lens_ms=lens_ms,
                    text=written[place].top if self.comparison is not None else None,
                    dissonance=gaps[place] if self.comparison is not None else None,
                    alarms=() if token.is_special else told.alarms,
                    lead=None if token.is_special else told.lead,
                    is_missing=self._is_missing(token, told),
                ),
            )

    def _is_missing(self, token: _Token, told: Told) -> bool:
        """Whether a reading was due and did not come."""
        if self.bank is None or told.top or not self.readout.top_k:
            return False
        if not isinstance(self.bank, WindowReader):
            return True
        if token.is_special:
            return False
        start = self._prompt_width - len(self.encoded[token.row // self._repeats(self._num_rows)])
        return self.bank.is_end(token.position + start + 1 - self.windows_from)

    def _tokens(self, first: int, ids: list[list[int]]) -> list[_Token]:
        """The tokens of some positions, decoded, and what the text lenses say after each."""
        num_rows, num_new = len(ids), len(ids[0])
        self._pieces = self._pieces or [Pieces(self.substrate) for _ in ids]
        ends = [end if end is not None else first + num_new + 1 for end in self._ends]
        tokens = []
        for step in range(num_new):
            for row in range(num_rows):
                prompt, position = row // self._repeats(num_rows), first + step
                start = self._prompt_width - len(self.encoded[prompt])
                if not start <= position < ends[row]:
                    continue
                token, is_prompt, at = ids[row][step], position < self._prompt_width, row * num_new + step
                special = self._template[prompt][position - start] if is_prompt else token in self._special_ids
                piece = self._pieces[row].add(token, last=position == ends[row] - 1)
                live, flags = self.text, {"is_prompt": is_prompt, "is_special": special}
                said_N = None if live is None else live.push(row, piece, **flags)
                tokens.append(_Token(at, row, position - start, token, piece, is_prompt, special, said_N))
        return tokens

    def _written(self, tokens: Sequence[_Token]) -> list[Told]:
        """What the text lenses say of each token; nothing of a special one."""
        readout = self.readout if self.comparison is None else self.comparison.readout
        said = [token.written_N for token in tokens if token.written_N is not None]
        told = iter(readout(torch.stack(said)) if said else ())
        nothing = Told([], self._unread(readout), [], None, [])
        return [nothing if token.written_N is None else next(told) for token in tokens]

    def _thought(self, tokens: Sequence[_Token], logits_BTN: Tensor | None) -> tuple[list[Told], list[list[Gap]]]:
        """What the lenses say of each token, and where what is written differs from it."""
        if logits_BTN is None:
            return [], []
        places = torch.tensor([token.at for token in tokens], dtype=torch.long, device=logits_BTN.device)
        logits_MN = logits_BTN.flatten(0, 1)[places]
        if self.comparison is None:
            return self.readout(logits_MN), []
        compare = self.comparison
        asked = [self.readout.strongest(logits_MN, CANDIDATES)]
        blank_N = torch.full((len(compare.readout.lenses),), torch.nan)
        written_MN = torch.stack([blank_N if token.written_N is None else token.written_N for token in tokens])
        asked.append(compare.candidates(written_MN).clamp_min(0).to(logits_MN.device))
        told = self.readout(logits_MN, torch.cat(asked, dim=1))
        pairs = zip(told, written_MN, strict=True)
        return told, [compare.gaps(one, said_N) for one, said_N in pairs]

    @staticmethod
    def _unread(readout: Readout) -> list[Reading]:
        """The watch list of a token that could not be read."""
        names = [readout.lenses.names[row] for row in readout.watch_rows_V.tolist()]
        return [Reading(name, np.nan, np.nan, np.nan) for name in names]

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
