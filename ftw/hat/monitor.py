"""Reading lenses while a model generates.

`Monitor.generate` is the substrate's own `generate` with a tap on it: every sampling option, the KV cache and batches
of prompts work as ever, and the tokens are those of plain `generate` with the same seed. A token's reading is made of
the state at its own position, as in training. The last token is never fed back by `generate`; one more step reads it.

Axes: B sequences, T tokens.
"""

import inspect
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList, StopStringCriteria

from ftw.errors import ConfigError, SubstrateError
from ftw.hat.bank import LensBank
from ftw.hat.lineage import Lineage
from ftw.hat.live_text import Comparison, LiveText
from ftw.hat.readout import Readout, TextLenses
from ftw.hat.recorder import Bank, OnToken, Recorder
from ftw.hat.temporal.bank import PooledTokens, SequenceBank, SequenceReader
from ftw.hat.temporal.windows import WindowReader
from ftw.hat.text_embedding import AnyText
from ftw.hat.text_window import text_timeline
from ftw.hat.timeline import Timeline, TokenReading
from ftw.substrate.model import Substrate
from ftw.substrate.taps import Tap

MODES = ("activation", "text", "dual", "timeline")
# Options of `generate` that the monitor fills in itself.
OWN_OPTIONS = ("inputs", "input_ids", "inputs_embeds", "attention_mask", "return_dict_in_generate")


class Monitor:
    """Lenses over a substrate: what it thinks (activation), what it writes (text), or both and their difference (dual).

    Args:
        substrate: the model under observation.
        bank: the activation lenses; they must have been trained on this substrate. None in text mode.
        text: the text lenses; None in activation mode.
        mode: "activation", "text" or "dual"; None: what there are lenses for. "timeline" reads sliding windows of the
            answer (of the text, where one is read), with sequence lenses or those of single states.
        top_k: concepts in each token's reading, of each kind, and differences in dual mode.
        watch: concepts read at every token, whether strong or not.
        alarm: percentile from which a watched concept, or one below it, is told as an alarm; None for 0.99.
        lineage: who stands below whom, for alarms; None: the watched concepts alone.
        text_window: pieces that the text lenses read together.
        window, stride: in tokens, in timeline mode.
        meta: kept with every timeline (pack id, version).

    A lens that fails while a model generates costs its reading (`is_missing`, counted in the timeline's meta), not the
    generation.

    Raises:
        ConceptError: an unknown concept in `watch`.
        ConfigError: a negative `top_k`, an alarm that is no percentile, a mode without its lenses.
        SubstrateError: the bank reads states of another width, or layers that the substrate does not have.
    """

    def __init__(
        self,
        substrate: Substrate,
        bank: "LensBank | SequenceReader | Bank | None" = None,
        *,
        text: AnyText | None = None,
        mode: str | None = None,
        top_k: int = 5,
        watch: Sequence[str] = (),
        alarm: float | None = None,
        lineage: Lineage | None = None,
        text_window: int = 32,
        window: int = 20,
        stride: int = 5,
        meta: Mapping[str, Any] | None = None,
    ) -> None:
        self.mode = _mode(mode, bank, text)
        self.substrate, self.top_k, self.watch = substrate, top_k, list(watch)
        self.bank = None if bank is None or self.mode == "text" else _fitting(bank, substrate)
        if self.mode == "timeline":
            self.bank = WindowReader(_windowed(self.bank), window=window, stride=stride)
            meta = {**(meta or {}), "window": window, "stride": stride}
        elif isinstance(self.bank, SequenceBank):
            raise ConfigError("these lenses read sequences, not single states; use mode='timeline'")
        self.text = text if self.mode in ("text", "dual") else None
        told = {"top_k": top_k, "alarm": alarm, "lineage": lineage}
        self._live = None if self.text is None else LiveText(self.text, tokens=text_window)
        written = None if self.text is None else TextLenses(self.text)
        lenses = self.bank if self.bank is not None else written
        assert lenses is not None  # `_mode` has seen to it
        self._readout, self._comparison = Readout(lenses, watch=self.watch, **told), None
        if self.bank is not None and written is not None:
            self._comparison = Comparison(
                readout=Readout(written, top_k=top_k),
                names=self.bank.names,
                by_percentile=self.bank.calibrated and written.calibrated,
                top_k=top_k,
            )
        # In text mode no lens reads a state; one block is tapped all the same, to know which tokens have been passed.
        self._layers = (0,) if self.bank is None else tuple(self.bank.layers)
        self._meta = {
            "substrate": substrate.name,
            "fingerprint": substrate.fingerprint,
            "layers": [] if self.bank is None else list(self.bank.layers),
            "mode": self.mode,
            **(meta or {}),
        }

    def written(self, timeline: Timeline) -> Timeline:
        """What the text lenses say at every token of a timeline, to set against what the lenses said.

        Raises:
            ConfigError: a monitor without text lenses.
        """
        if self.text is None or self._live is None:
            raise ConfigError("this monitor has no text lenses; give text=pack.text and mode='dual'")
        return text_timeline(timeline, self.text, tokens=self._live.tokens)

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
            SubstrateError: no prompt, one longer than the context, or beam search and assisted decoding, which
                reorder or skip tokens behind the tap's back.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise SubstrateError("no prompt to answer; give a text or a list of texts")
        encoded = [
            self.substrate.chat(text, system=system) if chat else self.substrate.encode(text) for text in prompts
        ]
        timelines = self._run(prompts, encoded, seed, on_token, options)
        return timelines[0] if isinstance(prompt, str) and len(timelines) == 1 else timelines

    def stream(self, prompt: str, **options: Any) -> "Stream":
        """Iterate over `TokenReading`s as they come; `.timeline` holds the whole when the iteration has ended."""
        return Stream(self, prompt, options)

    @torch.inference_mode()
    def read(self, text: str, *, on_token: OnToken | None = None) -> Timeline:
        """Read a text that is already there: one forward pass, no generation."""
        token_ids = self.substrate.encode(text)
        self._check_length(len(token_ids), 0)
        recorder = self._recorder([text], [token_ids], on_token=on_token)
        recorder.windows_from = 1  # after the sink
        ids = torch.tensor([token_ids], device=self.substrate.device)
        with Tap(self.substrate, self._layers, recorder.on_states, stop=True):
            self.substrate.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        recorder.finish(ids)
        return recorder.timelines(ids.cpu(), self._meta, texts=[text])[0]

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
        self._check_length(longest, _num_new(model, options, longest))
        generation = {name: value for name, value in options.items() if isinstance(value, str | int | float | bool)}
        pad = options.pop("pad_token_id", self.substrate.pad_token_id)
        ids_BT, mask_BT = (tensor.to(device) for tensor in _left_padded(encoded, longest, pad))
        criteria = StoppingCriteriaList(options.pop("stopping_criteria", None) or [])
        if strings := _option(model, options, "stop_strings"):
            # Seen by the recorder too, which must know where a row of a batch ends.
            criteria.append(StopStringCriteria(options.setdefault("tokenizer", self.substrate.tokenizer), strings))
        stop_ids = _token_ids(_option(model, options, "eos_token_id"))
        recorder = self._recorder(prompts, encoded, stop_ids=stop_ids, criteria=criteria, on_token=on_token)
        recorder.windows_from = longest  # where the answers begin
        devices, output = [device] if device.type == "cuda" else [], None
        with (
            torch.random.fork_rng(devices, enabled=seed is not None),
            Tap(self.substrate, self._layers, recorder.on_states),
        ):
            if seed is not None:
                torch.manual_seed(seed)
            output = model.generate(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                pad_token_id=pad,
                stopping_criteria=StoppingCriteriaList([recorder]),
                return_dict_in_generate=True,
                **options,
            )
            self._read_last(output, mask_BT)
        assert output is not None  # a tap without `stop` swallows no exception
        recorder.finish(output.sequences)
        return recorder.timelines(output.sequences.cpu(), {**self._meta, "generation": generation, "seed": seed})

    def _recorder(self, prompts: Sequence[str], encoded: Sequence[Sequence[int]], **options: Any) -> Recorder:
        return Recorder(
            substrate=self.substrate,
            bank=self.bank,
            layers=self._layers,
            readout=self._readout,
            text=self._live,
            comparison=self._comparison,
            prompts=prompts,
            encoded=encoded,
            **options,
        )

    def _read_last(self, output: Any, mask_BT: Tensor) -> None:
        """One step over the final token, which `generate` chose but never fed back."""
        sequences = output.sequences
        repeats = len(sequences) // len(mask_BT)
        mask_BT = mask_BT.repeat_interleave(repeats, dim=0)
        full_BT = torch.cat([mask_BT, mask_BT.new_ones(len(sequences), sequences.shape[1] - mask_BT.shape[1])], dim=1)
        positions_BT = (full_BT.cumsum(1) - 1).clamp_min(0)
        inputs = {"input_ids": sequences, "position_ids": positions_BT, "use_cache": False}
        cache = getattr(output, "past_key_values", None)
        if isinstance(cache, DynamicCache):  # a static one has no room for one more; then all is computed again
            inputs = {"input_ids": sequences[:, -1:], "position_ids": positions_BT[:, -1:], "past_key_values": cache}
        body = self.substrate.model.base_model  # without the LM head: no further token is asked for
        if "position_ids" not in inspect.signature(body.forward).parameters:
            del inputs["position_ids"]
        body(attention_mask=full_BT, **inputs)

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
        if not isinstance(prompt, str) or (_option(monitor.substrate.model, options, "num_return_sequences") or 1) > 1:
            raise SubstrateError("a stream follows one sequence; use generate() with on_token for several")
        self._readings: queue.SimpleQueue[TokenReading | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._error: BaseException | None = None
        self._timeline: Timeline | None = None
        criteria = [*(options.pop("stopping_criteria", None) or []), _StopWhen(self._closed)]
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
            assert isinstance(timeline, Timeline)  # several sequences were refused
            self._timeline = timeline
        except BaseException as error:  # noqa: BLE001 (handed to the reader, who is on another thread)
            self._error = error
        finally:
            self._readings.put(None)


class _StopWhen(StoppingCriteria):
    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        return torch.full((len(input_ids),), self._event.is_set(), device=input_ids.device)


def _mode(mode: str | None, bank: object | None, text: object | None) -> str:
    """The mode asked for, or the one that there are lenses for.

    Raises:
        ConfigError: no such mode, or no lenses for it.
    """
    mode = mode or ("dual" if bank is not None and text is not None else "text" if bank is None else "activation")
    if mode not in MODES:
        raise ConfigError(f"mode={mode!r}: choose {', '.join(MODES)}")
    if bank is None and mode != "text":
        raise ConfigError(f"mode={mode!r} needs activation lenses; give a bank, or use mode='text'")
    if text is None and mode in ("text", "dual"):
        raise ConfigError(f"mode={mode!r} needs text lenses, and this pack has none; use mode='activation'")
    return mode


def _windowed(bank: Any) -> SequenceReader:
    """What reads windows: sequence lenses as they are, lenses of single states over the mean of a window."""
    return PooledTokens(bank) if isinstance(bank, LensBank) else bank


def _fitting(bank: Any, substrate: Substrate) -> Any:
    """The lenses, where the substrate is; refused if they cannot read it."""
    if bank.width != substrate.width:
        raise SubstrateError(
            f"the lenses read states of width {bank.width}; {substrate.name!r} has width {substrate.width}. "
            "Load the substrate that the pack names"
        )
    substrate.layers(bank.layers)
    return bank.to(substrate.device).eval() if isinstance(bank, LensBank | SequenceBank) else bank


def _left_padded(encoded: Sequence[Sequence[int]], longest: int, pad: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask, padded on the left, so that all answers start in the same column."""
    ids_BT = torch.full((len(encoded), longest), pad)
    mask_BT = torch.zeros_like(ids_BT)
    for row, ids in enumerate(encoded):
        ids_BT[row, longest - len(ids) :] = torch.tensor(ids)
        mask_BT[row, longest - len(ids) :] = 1
    return ids_BT, mask_BT


def _option(model: Any, options: Mapping[str, Any], name: str) -> Any:
    """An option of `generate` as it will take it: the argument, else the configuration given, else the model's."""
    configs = (options.get("generation_config"), model.generation_config)
    values = (options.get(name), *(getattr(config, name, None) for config in configs))
    return next((value for value in values if value is not None), None)


def _token_ids(value: Any) -> set[int]:
    return set() if value is None else set(torch.as_tensor(value).flatten().tolist())


def _num_new(model: Any, options: Mapping[str, Any], longest: int) -> int:
    """How many tokens may be generated at most, as far as that is said."""
    if (num := _option(model, options, "max_new_tokens")) is not None:
        return int(num)
    return max(1, int(options.get("max_length") or 0) - longest)


def _refuse_reordering(model: Any, options: Mapping[str, Any]) -> None:
    if own := [name for name in OWN_OPTIONS if name in options]:
        raise SubstrateError(f"{own[0]} is made from the prompt by the monitor; leave it out")
    if (beams := _option(model, options, "num_beams") or 1) > 1:
        raise SubstrateError(
            f"num_beams={beams}: beams swap rows while the lenses read; use sampling or greedy decoding"
        )
    for name in ("assistant_model", "prompt_lookup_num_tokens"):
        if _option(model, options, name):
            raise SubstrateError(f"{name}: assisted decoding drops tokens that were read; leave it out")
