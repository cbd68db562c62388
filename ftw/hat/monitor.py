"""Reading lenses while a model generates.

`Monitor.generate` is the substrate's own `generate` with a tap on it: every sampling option, the KV cache and batches of
prompts work as ever, and the tokens are those of plain `generate` with the same seed. A token's reading is made of the
state at its own position, as in training. The last token is never fed back by `generate`; one more step reads it.

Axes: B sequences, T tokens, L layers, N lenses.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from ftw.errors import FTWError, SubstrateError
from ftw.hat.bank import LensBank
from ftw.hat.timeline import Reading, Timeline, TokenReading
from ftw.substrate.model import Substrate
from ftw.substrate.taps import Tap

OnToken = Callable[[int, TokenReading], None]
CHUNK = 4096  # readings of a long prompt are computed this many positions at a time, to bound memory


class Monitor:
    """Lenses over a substrate.

    Args:
        substrate: the model under observation.
        bank: the lenses; they must have been trained on this substrate.
        top_k: concepts in each token's reading.
        watch: concepts read at every token, whether strong or not.
        meta: kept with every timeline (pack id, version).

    Raises:
        ConceptError: an unknown concept in `watch`. SubstrateError: the bank reads states of another width.
    """

    def __init__(
        self,
        substrate: Substrate,
        bank: LensBank,
        *,
        top_k: int = 5,
        watch: Sequence[str] = (),
        meta: Mapping[str, Any] | None = None,
    ) -> None:
        if bank.width != substrate.width:
            raise SubstrateError(
                f"the lenses read states of width {bank.width}; {substrate.name!r} has width {substrate.width}. "
                "Load the substrate that the pack names"
            )
        self.substrate, self.bank = substrate, bank.to(substrate.device).eval()
        self.top_k, self.watch = top_k, list(watch)
        self._watch_rows = bank.rows_of(self.watch)
        self._meta = {"substrate": substrate.name, "fingerprint": substrate.fingerprint, "layers": list(bank.layers), **(meta or {})}

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        chat: bool = True,
        system: str | None = None,
        seed: int | None = None,
        on_token: OnToken | None = None,
        **options: Any,
    ) -> Timeline | list[Timeline]:
        """Answer a prompt (or each of several) and read every token of it.

        Args:
            chat: put the prompt into the model's chat template. system: system text for it.
            seed: of torch, for this call only; None leaves the generator alone.
            on_token: called as `on_token(sequence, reading)` when a token has been read.
            options: of transformers' `generate` (max_new_tokens, do_sample, temperature, top_p, ...).

        Returns:
            One timeline for a prompt, a list for a list of prompts (times `num_return_sequences`).

        Raises:
            SubstrateError: a prompt longer than the context, or beam search and assisted decoding, which reorder
                or skip tokens behind the tap's back.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        encoded = [self.substrate.chat(text, system=system) if chat else self.substrate.encode(text) for text in prompts]
        timelines = self._run(prompts, encoded, seed, on_token, options)
        return timelines[0] if isinstance(prompt, str) and len(timelines) == 1 else timelines

    def stream(self, prompt: str, **options: Any) -> "Stream":
        """Iterate over `TokenReading`s as they come; `.timeline` holds the whole when the iteration has ended."""
        return Stream(self, prompt, options)

    @torch.inference_mode()
    def read(self, text: str) -> Timeline:
        """Read a text that is already there: one forward pass, no generation."""
        token_ids = self.substrate.encode(text)
        self._check_length(len(token_ids), 0)
        recorder = _Recorder(self, [text], [token_ids], on_token=None)
        ids = torch.tensor([token_ids], device=self.substrate.device)
        with Tap(self.substrate, self.bank.layers, recorder.on_states, stop=True):
            self.substrate.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        return recorder.timelines(ids.cpu(), texts=[text])[0]

    @torch.inference_mode()
    def _run(
        self,
        prompts: list[str],
        encoded: list[list[int]],
        seed: int | None,
        on_token: OnToken | None,
        options: dict[str, Any],
    ) -> list[Timeline]:
        model, device = self.substrate.model, self.substrate.device
        _refuse_reordering(model, options)
        longest = max(len(ids) for ids in encoded)
        self._check_length(longest, int(options.get("max_new_tokens") or 0))
        ids_BT = torch.full((len(encoded), longest), self.substrate.pad_token_id)
        mask_BT = torch.zeros_like(ids_BT)
        for row, ids in enumerate(encoded):  # left padding, so that all answers start in the same column
            ids_BT[row, longest - len(ids) :] = torch.tensor(ids)
            mask_BT[row, longest - len(ids) :] = 1
        recorder = _Recorder(self, prompts, encoded, on_token)
        criteria = StoppingCriteriaList([*options.pop("stopping_criteria", []), recorder])
        with torch.random.fork_rng(enabled=seed is not None), Tap(self.substrate, self.bank.layers, recorder.on_states):
            if seed is not None:
                torch.manual_seed(seed)
            output = model.generate(
                input_ids=ids_BT.to(device),
                attention_mask=mask_BT.to(device),
                pad_token_id=self.substrate.pad_token_id,
                stopping_criteria=criteria,
                return_dict_in_generate=True,
                **options,
            )
            self._read_last(output, mask_BT.to(device))
        sequences = output.sequences
        recorder.finish(sequences)
        texts = [self.substrate.tokenizer.decode(row[longest:], skip_special_tokens=True) for row in sequences]
        generation = {name: value for name, value in options.items() if isinstance(value, str | int | float | bool)}
        return recorder.timelines(sequences.cpu(), texts=texts, meta={"generation": generation, "seed": seed})

    def _read_last(self, output: Any, mask_BT: Tensor) -> None:
        """One step over the final token, which `generate` chose but never fed back."""
        sequences = output.sequences
        repeats = len(sequences) // len(mask_BT)
        mask_BT = mask_BT.repeat_interleave(repeats, dim=0)
        full_BT = torch.cat([mask_BT, mask_BT.new_ones(len(sequences), sequences.shape[1] - mask_BT.shape[1])], dim=1)
        cache = getattr(output, "past_key_values", None)
        if cache is None:
            self.substrate.model(input_ids=sequences, attention_mask=full_BT, use_cache=False)
        else:
            positions_B1 = full_BT.sum(1, keepdim=True) - 1
            self.substrate.model(
                input_ids=sequences[:, -1:], attention_mask=full_BT, past_key_values=cache, position_ids=positions_B1
            )

    def _check_length(self, num_tokens: int, num_new: int) -> None:
        limit = self.substrate.context_tokens
        if num_tokens + num_new > limit:
            raise SubstrateError(
                f"{num_tokens} prompt tokens and {num_new} new ones exceed the context of {limit} tokens of "
                f"{self.substrate.name!r}; shorten the prompt or lower max_new_tokens"
            )


class Stream(Iterator[TokenReading]):
    """Readings of one generation as they come. Leaving early (`close`, or a `with`) stops the generation."""

    def __init__(self, monitor: Monitor, prompt: str, options: dict[str, Any]) -> None:
        self._readings: queue.SimpleQueue[TokenReading | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._error: BaseException | None = None
        self._timeline: Timeline | None = None
        criteria = [*options.pop("stopping_criteria", []), _StopWhen(self._closed)]
        run = lambda: self._run(monitor, prompt, {**options, "stopping_criteria": criteria})  # noqa: E731
        self._thread = threading.Thread(target=run, name="ftw-monitor", daemon=True)
        self._thread.start()

    def __next__(self) -> TokenReading:
        reading = self._readings.get()
        if reading is not None:
            return reading
        self._readings.put(None)  # a second `next` must not wait for ever
        if self._error is not None:
            raise self._error
        raise StopIteration

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop generating and wait for the model to come to rest."""
        self._closed.set()
        self._thread.join()

    @property
    def timeline(self) -> Timeline:
        """Everything read; waits for the end of the generation."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._timeline is not None  # the thread ended without an error
        return self._timeline

    def _run(self, monitor: Monitor, prompt: str, options: dict[str, Any]) -> None:
        try:
            timeline = monitor.generate(prompt, on_token=lambda _, reading: self._readings.put(reading), **options)
            if isinstance(timeline, list):
                raise FTWError("a stream follows one sequence; use generate() for num_return_sequences > 1")
            self._timeline = timeline
        except BaseException as error:  # noqa: BLE001 (handed to the reader, who is on another thread)
            self._error = error
        finally:
            self._readings.put(None)


class _StopWhen(StoppingCriteria):
    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), self._event.is_set(), device=input_ids.device)


class _Recorder(StoppingCriteria):
    """Turns tapped states into readings, and tells them as soon as the token is known.

    As a stopping criterion it sees the sequences after every step and never stops them.
    """

    def __init__(self, monitor: Monitor, prompts: list[str], encoded: list[list[int]], on_token: OnToken | None) -> None:
        self._monitor, self._prompts, self._encoded, self._on_token = monitor, prompts, encoded, on_token
        self._pending: dict[int, Tensor] = {}
        self._logits: list[Tensor] = []  # [B, t, N] parts, on the device until the end
        self._num_read, self._num_told = 0, 0
        self._total = max(len(ids) for ids in encoded)
        self._prompt_width = self._total
        self._lens_seconds = 0.0
        tokenizer, stop = monitor.substrate.tokenizer, monitor.substrate.model.generation_config.eos_token_id
        self._special_ids = set(tokenizer.all_special_ids)
        self._stop_ids = set(stop if isinstance(stop, list) else [stop])
        self._template = [self._template_mask(ids, text) for ids, text in zip(encoded, prompts, strict=True)]
        self._ms: list[float] = []
        self._clock = time.perf_counter()

    def on_states(self, layer: int, states_BTD: Tensor) -> None:
        """Keep a block's output; when the deepest wanted layer has come, read the lenses."""
        # Without a KV cache a pass goes over the whole sequence again: only what is new counts.
        num_new = min(states_BTD.shape[1], self._total - self._num_read)
        self._pending[layer] = states_BTD[:, states_BTD.shape[1] - num_new :]
        if len(self._pending) == len(self._monitor.bank.layers):
            self._read(torch.stack([self._pending[layer] for layer in self._monitor.bank.layers], dim=2))
            self._pending.clear()

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if len(input_ids) % len(self._encoded):
            raise SubstrateError("the number of sequences changed during generation; use plain sampling or greedy decoding")
        self._tell(input_ids)
        self._total = input_ids.shape[1]
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def finish(self, sequences: Tensor) -> None:
        """Tell what was read after the last step."""
        self._tell(sequences)

    def timelines(self, sequences: Tensor, *, texts: list[str], meta: Mapping[str, Any] | None = None) -> list[Timeline]:
        """One timeline a sequence, padding left out."""
        monitor, bank = self._monitor, self._monitor.bank
        logits_BTN = torch.cat(self._logits, dim=1)
        num_read = logits_BTN.shape[1]
        flat = logits_BTN.flatten(0, 1)
        percentiles_BTN = bank.percentile(flat).view_as(logits_BTN).cpu().numpy()
        rank_BTN = bank.rank(flat).view_as(logits_BTN).cpu().numpy()
        logits_BTN = logits_BTN.cpu().numpy()
        repeats = len(sequences) // len(self._encoded)
        lens_ms = 1000 * self._lens_seconds / max(num_read, 1)
        result = []
        for row, ids in enumerate(sequences.tolist()):
            given = self._encoded[row // repeats]
            start = self._prompt_width - len(given)
            stop = _end_of_answer(ids, self._prompt_width, self._stop_ids)
            template = self._template[row // repeats]
            kept, kept_ids = slice(start, min(stop, num_read)), ids[start : min(stop, num_read)]
            ms = np.full(len(kept_ids), np.nan, dtype=np.float32)
            answer_ms = self._ms[: max(len(kept_ids) - len(given), 0)]
            ms[len(given) : len(given) + len(answer_ms)] = answer_ms
            result.append(
                Timeline(
                    tokens=pieces(monitor.substrate, kept_ids),
                    token_ids=np.array(kept_ids),
                    is_prompt=np.arange(len(kept_ids)) < len(given),
                    is_special=np.array([*template, *(token in self._special_ids for token in kept_ids[len(template) :])]),
                    concepts=bank.names,
                    logits_TN=logits_BTN[row, kept],
                    percentiles_TN=percentiles_BTN[row, kept],
                    rank_TN=rank_BTN[row, kept],
                    ms_per_token=ms,
                    prompt=self._prompts[row // repeats],
                    text=texts[row],
                    meta={**monitor._meta, **(meta or {}), "lens_ms_per_token": round(lens_ms, 4)},
                )
            )
        return result

    def _read(self, states_BTLD: Tensor) -> None:
        start = time.perf_counter()
        num_rows, num_new = states_BTLD.shape[:2]
        flat = states_BTLD.flatten(0, 1)
        parts = [self._monitor.bank(flat[at : at + CHUNK]) for at in range(0, len(flat), CHUNK)]
        self._logits.append(torch.cat(parts).view(num_rows, num_new, -1))
        self._num_read += num_new
        self._lens_seconds += time.perf_counter() - start

    def _tell(self, sequences: Tensor) -> None:
        """Hand over readings of positions that were read and whose tokens are known."""
        now = time.perf_counter()
        if self._num_told:
            self._ms.append(1000 * (now - self._clock))
        self._clock = now
        if self._on_token is not None and self._num_read > self._num_told:
            ids, num_new = sequences.tolist(), self._num_read - self._num_told
            # Every read appends one part, and each is told before the next one comes.
            for step in range(num_new):
                self._tell_position(self._num_told + step, ids, self._logits[-1][:, -num_new + step], self._on_token)
        self._num_told = self._num_read

    def _tell_position(self, position: int, ids: list[list[int]], logits_BN: Tensor, on_token: OnToken) -> None:
        repeats = len(ids) // len(self._encoded)
        top_BK, watch_BV = self._readings(logits_BN)
        is_prompt = position < self._prompt_width
        for row, row_ids in enumerate(ids):
            start = self._prompt_width - len(self._encoded[row // repeats])
            if not start <= position < _end_of_answer(row_ids, self._prompt_width, self._stop_ids):
                continue
            upto = row_ids[start : position + 1]
            on_token(
                row,
                TokenReading(
                    position=position - start,
                    token=pieces(self._monitor.substrate, upto, last=1)[-1],
                    token_id=upto[-1],
                    is_prompt=is_prompt,
                    is_special=self._template[row // repeats][position - start] if is_prompt else upto[-1] in self._special_ids,
                    top=top_BK[row],
                    watch=watch_BV[row],
                    ms=None if is_prompt or not self._ms else self._ms[-1],
                ),
            )

    def _readings(self, logits_BN: Tensor) -> tuple[list[list[Reading]], list[list[Reading]]]:
        bank, monitor = self._monitor.bank, self._monitor
        index_BK = bank.rank(logits_BN).nan_to_num(-torch.inf).topk(min(monitor.top_k, len(bank)), dim=-1).indices
        watch_BV = monitor._watch_rows.to(index_BK.device).expand(len(logits_BN), -1)
        index = torch.cat([index_BK, watch_BV], dim=1)
        logit = logits_BN.gather(1, index)
        rows = torch.stack([index.float(), logit, torch.sigmoid(logit), bank.percentile(logit, index)], dim=-1).cpu().tolist()
        readings = [[Reading(bank.names[int(n)], z, p, q) for n, z, p, q in row] for row in rows]
        kept = index_BK.shape[1]
        return [row[:kept] for row in readings], [row[kept:] for row in readings]

    def _template_mask(self, given: list[int], prompt: str) -> list[bool]:
        """Which tokens of a prompt belong to the tokenizer or the chat template, not to the user's text."""
        parts = pieces(self._monitor.substrate, given)
        ends = np.cumsum([len(part) for part in parts])
        at = "".join(parts).rfind(prompt)
        special = np.isin(given, list(self._special_ids))
        special[0] = True
        if at >= 0:  # a tokenizer that does not give the prompt back letter by letter leaves its template uncovered
            special |= (ends <= at) | (ends - [len(part) for part in parts] >= at + len(prompt))
        return special.tolist()


def pieces(substrate: Substrate, ids: Sequence[int], *, last: int | None = None) -> list[str]:
    """What each token adds to the text, so that the pieces joined are the text; bytes of an unfinished letter wait.

    Args:
        last: only the pieces of the last so many tokens.
    """
    decode = substrate.tokenizer.decode
    result = []
    for end in range(0 if last is None else len(ids) - last, len(ids)):
        start = max(0, end - 6)  # no letter takes more tokens than that
        before = decode(ids[start:end], clean_up_tokenization_spaces=False).rstrip("\ufffd")
        through = decode(ids[start : end + 1], clean_up_tokenization_spaces=False)
        result.append("" if through.endswith("\ufffd") else through[len(before) :])
    return result


def _end_of_answer(ids: Sequence[int], prompt_width: int, stop_ids: set[int]) -> int:
    """Position after the first stop token of the answer: what follows is padding."""
    for position in range(prompt_width, len(ids)):
        if ids[position] in stop_ids:
            return position + 1
    return len(ids)


def _refuse_reordering(model: Any, options: Mapping[str, Any]) -> None:
    config = options.get("generation_config") or model.generation_config
    beams = options.get("num_beams", config.num_beams) or 1
    if beams > 1:
        raise SubstrateError(f"num_beams={beams}: beams swap rows while the lenses read; use sampling or greedy decoding")
    for name in ("assistant_model", "prompt_lookup_num_tokens"):
        if options.get(name):
            raise SubstrateError(f"{name}: assisted decoding drops tokens that were read; leave it out")
