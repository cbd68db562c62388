"""Sampled answers with the states of their tokens: what the substrate says to a prompt, and what it thinks as it does.

A prompt is read once however many answers are sampled from it, and the beginning that all prompts share once for all
of them. States come from the very steps that generate, so there is no second pass; the token that is sampled last is
fed as well, so that every token of an answer has its state.

Axes: P prompts of a batch, B answers of a batch, T tokens, L layers, D model width, V vocabulary.
"""

import dataclasses
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from ftw.errors import ConfigError, SubstrateError
from ftw.substrate.model import Substrate, find_blocks
from ftw.substrate.prompts import fast_copy
from ftw.substrate.taps import Tap


class Answer(NamedTuple):
    """One sampled answer: which prompt (index), its tokens without the one that ended it, and their states."""

    prompt: int
    token_ids: list[int]
    states_LTD: Tensor


def sample_answers(
    substrate: Substrate,
    prompts: Sequence[Sequence[int]],
    layers: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    precision: str = "auto",
) -> Iterator[Answer]:
    """One answer to every prompt, in their order within batches of prompts of like length.

    Args:
        prompts: token ids, as `Substrate.chat` makes them; equal ones next to each other are read once.
        layers: block indices; the L axis has their order.
        temperature: 1 samples from the model's own distribution; 0 takes the likeliest token.
        seed: the same seed, prompts and machine give the same answers; torch's random state is left alone.
        precision: "bfloat16" computes with a bfloat16 copy of the weights, "float32" with the model as it is, "auto"
            chooses.

    Yields:
        Answers; states are float32 on the CPU, not normalised. An answer may be empty.

    Raises:
        ConfigError: an option out of its range. SubstrateError: a prompt that leaves no room for the answer, or states
            that are not finite.
    """
    if max_new_tokens < 1 or batch_size < 1 or temperature < 0:
        raise ConfigError(
            f"max_new_tokens={max_new_tokens} and batch_size={batch_size} must be at least 1, "
            f"temperature={temperature} at least 0"
        )
    longest = max(map(len, prompts), default=0)
    if longest + max_new_tokens > substrate.context_tokens:
        raise SubstrateError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones do not fit into the "
            f"{substrate.context_tokens} tokens of {substrate.name!r}; shorten the prompt or max_new_tokens"
        )
    layers = substrate.layers(layers)
    generator = torch.Generator().manual_seed(seed)
    order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), list(prompts[index]), index))
    with fast_copy(substrate, precision) as model, torch.inference_mode():
        reader = dataclasses.replace(substrate, model=model, blocks=find_blocks(model))
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            draws_TB = torch.rand(max_new_tokens, len(batch), generator=generator)
            run = _Batch(reader, [list(prompts[index]) for index in batch], layers, temperature)
            yield from (answer._replace(prompt=batch[answer.prompt]) for answer in run.answers(draws_TB))


class _Batch:
    """Some prompts answered side by side."""

    def __init__(
        self, substrate: Substrate, prompts: list[list[int]], layers: tuple[int, ...], temperature: float
    ) -> None:
        self._substrate, self._layers, self._temperature = substrate, layers, temperature
        self._kept: dict[int, Tensor] = {}
        unique = [prompt for place, prompt in enumerate(prompts) if place == 0 or prompt != prompts[place - 1]]
        counts = torch.zeros(len(unique), dtype=torch.long)
        place = -1
        for index, prompt in enumerate(prompts):
            place += index == 0 or prompt != prompts[index - 1]
            counts[place] += 1
        self._unique, self._counts = unique, counts
        stops = {substrate.tokenizer.eos_token_id, *substrate.tokenizer.all_special_ids}
        stops |= set(torch.as_tensor(substrate.model.generation_config.eos_token_id or []).flatten().tolist())
        self._stop_ids = torch.tensor(sorted(stop for stop in stops if stop is not None), device=substrate.device)

    def answers(self, draws_TB: Tensor) -> Iterator[Answer]:
        """Read the prompts, then one token of all answers at a time."""
        logits_BV, mask_BT, cache = self._read_prompts()
        ids, states = list[Tensor](), list[Tensor]()
        lengths_B = torch.full((len(mask_BT),), len(draws_TB), device=mask_BT.device)
        for step, draws_B in enumerate(draws_TB.to(mask_BT.device)):
            ids_B = self._choose(logits_BV, draws_B)
            ended_B = torch.isin(ids_B, self._stop_ids) & (lengths_B > step)
            lengths_B = lengths_B.masked_fill(ended_B, step)
            if not (lengths_B > step).any():
                break
            ids.append(ids_B)
            mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(mask_BT), 1)], dim=1)
            last = step == len(draws_TB) - 1
            logits_BV = self._forward(ids_B.unsqueeze(1), mask_BT, cache, body_only=last)
            states.append(torch.stack([self._kept[layer][:, -1] for layer in self._layers]))
        lengths = lengths_B.tolist()
        if not ids:
            empty_LTD = torch.zeros(len(self._layers), 0, self._substrate.width)
            yield from (Answer(row, [], empty_LTD) for row in range(len(lengths)))
            return
        ids_BT, states_BLTD = torch.stack(ids, dim=1).tolist(), torch.stack(states, dim=2).transpose(0, 1).cpu()
        for row, length in enumerate(lengths):
            states_LTD = states_BLTD[row, :, :length].float()
            if not states_LTD.isfinite().all():
                raise SubstrateError(
                    f"the states of an answer of {self._substrate.name!r} are not finite; try precision=float32"
                )
            yield Answer(row, ids_BT[row][:length], states_LTD)

    def _read_prompts(self) -> tuple[Tensor, Tensor, DynamicCache]:
        """Logits of the first token, mask and cache, repeated for every answer.

        What all prompts begin with is read once; the last tokens are read apart, as only they need the model's head.
        """
        num, device, cache = len(self._unique), self._substrate.device, DynamicCache()
        same = self._num_same()
        mask_PT = torch.ones(num, same, dtype=torch.long, device=device)
        if same:
            same_1T = torch.tensor([self._unique[0][:same]], device=device)
            self._forward(same_1T, mask_PT[:1], cache, body_only=True)
            cache.batch_repeat_interleave(num)
        own = [prompt[same:] for prompt in self._unique]
        width = max(map(len, own))
        ids_PT = torch.full((num, width), self._substrate.pad_token_id, device=device)
        known_PT = torch.zeros_like(ids_PT)
        for row, ids in enumerate(own):
            ids_PT[row, width - len(ids) :] = torch.tensor(ids, device=device)
            known_PT[row, width - len(ids) :] = 1
        mask_PT = torch.cat([mask_PT, known_PT], dim=1)
        if width > 1:
            self._forward(ids_PT[:, :-1], mask_PT[:, :-1], cache, body_only=True)
        logits_PV = self._forward(ids_PT[:, -1:], mask_PT, cache)
        rows_B = torch.repeat_interleave(torch.arange(num), self._counts).to(device)
        if len(rows_B) > num:
            cache.batch_select_indices(rows_B)
        return logits_PV[rows_B], mask_PT[rows_B], cache

    def _num_same(self) -> int:
        """Tokens that all prompts begin with, the last of each left out; 0 where padding behind them would count."""
        model: Any = self._substrate.model
        window = getattr(model.config.get_text_config(), "sliding_window", None)
        has_positions = "position_ids" in inspect.signature(model.forward).parameters
        if window is not None or not has_positions or len(self._unique) == 1:
            return 0
        shortest = min(map(len, self._unique)) - 1
        columns = zip(*(prompt[:shortest] for prompt in self._unique), strict=True)
        return next((place for place, ids in enumerate(columns) if len(set(ids)) > 1), shortest)

    def _forward(self, ids_BT: Tensor, mask_BT: Tensor, cache: DynamicCache, *, body_only: bool = False) -> Tensor:
        """Logits after the last of some tokens, [B, V]; without the head nothing.

        One token at a time where logits are wanted: of more, the head would read a strided slice, for which torch
        copies its weights once a row.
        """
        model = self._substrate.model
        run: Any = model.base_model if body_only else model
        known = inspect.signature(run.forward).parameters
        options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        if "position_ids" in known:
            options["position_ids"] = (mask_BT.cumsum(1) - 1).clamp_min(0)[:, -ids_BT.shape[1] :]
        output: Any = None
        with Tap(self._substrate, self._layers, on_states=self._kept.__setitem__):
            output = run(input_ids=ids_BT, attention_mask=mask_BT, past_key_values=cache, use_cache=True, **options)
        return ids_BT.new_empty(0) if body_only else output.logits[:, -1].float()

    def _choose(self, logits_BV: Tensor, draws_B: Tensor) -> Tensor:
        """A token each: the place of a number between 0 and 1 in the cumulated probabilities."""
        if self._temperature == 0:
            return logits_BV.argmax(-1)
        cumulated_BV = (logits_BV / self._temperature).softmax(-1).cumsum(-1)
        # Rounding may end the sum below one, or a draw may be zero where the first tokens are impossible.
        place_B1 = torch.searchsorted(cumulated_BV, draws_B.unsqueeze(1) * cumulated_BV[:, -1:], right=True)
        return place_B1[:, 0].clamp_max(logits_BV.shape[-1] - 1)
