"""Text that the substrate writes itself: many prompts at once, the same again for the same seed.

Prompts go through the model's chat template. Generation here is for making training texts, so it takes the fastest
arithmetic the machine has; the live monitor generates with the model as it is loaded.

Axes: B prompts of a batch, T tokens.
"""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from ftw.errors import ConfigError, SubstrateError
from ftw.substrate.model import Substrate, cast_parameters, quiet_transformers
from ftw.substrate.taps import resolve_precision


def generate_texts(
    substrate: Substrate,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch_size: int = 64,
    progress: bool = True,
) -> list[str]:
    """Answers to many prompts, in their order, without special tokens.

    Args:
        prompts: what a user would type; the chat template is put around each.
        max_new_tokens: tokens an answer has at most.
        temperature: 0 takes the likeliest token each time; above 0 samples among the 50 likeliest.
        seed: the same seed, prompts and machine give the same texts; the caller's random state is left alone.
        batch_size: prompts generated side by side.
        progress: show a bar.

    Raises:
        SubstrateError: a prompt that leaves no room for the answer in the model's context.
    """
    if max_new_tokens < 1 or batch_size < 1 or temperature < 0:
        raise ConfigError(
            f"max_new_tokens={max_new_tokens} and batch_size={batch_size} must be at least 1, "
            f"temperature={temperature} at least 0"
        )
    token_ids = [substrate.chat(prompt) for prompt in prompts]
    longest = max(map(len, token_ids), default=0)
    if longest + max_new_tokens > substrate.context_tokens:
        raise SubstrateError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones do not fit into the "
            f"{substrate.context_tokens} tokens of {substrate.name!r}; shorten the prompt or max_new_tokens"
        )
    # Prompts of a kind have like lengths; sorting keeps the padding small.
    order = sorted(range(len(prompts)), key=lambda index: (len(token_ids[index]), index))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    texts = [""] * len(prompts)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    hidden = not (progress and console.is_interactive)  # in a log it would leave an empty line
    with (
        Progress(*columns, console=console, disable=hidden, transient=True) as bar,
        fast_copy(substrate) as model,
        _own_random_state(substrate.device, seed),
        torch.inference_mode(),
        quiet_transformers(),
    ):
        task = bar.add_task("writing texts", total=len(prompts))
        for batch in batches:
            new_BT = _generate(substrate, model, [token_ids[index] for index in batch], max_new_tokens, temperature)
            decoded = substrate.tokenizer.batch_decode(new_BT, skip_special_tokens=True)
            for index, text in zip(batch, decoded, strict=True):
                texts[index] = text.strip()
            bar.advance(task, len(batch))
    return texts


def _generate(
    substrate: Substrate, model: Any, token_ids: list[list[int]], max_new_tokens: int, temperature: float
) -> Tensor:
    """new_BT: the generated tokens alone. Padded on the left, so that all answers start in one column."""
    width = max(map(len, token_ids))
    prompt_BT = torch.full((len(token_ids), width), substrate.pad_token_id)
    mask_BT = torch.zeros_like(prompt_BT)
    for row, ids in enumerate(token_ids):
        prompt_BT[row, width - len(ids) :] = torch.tensor(ids)
        mask_BT[row, width - len(ids) :] = 1
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 50} if temperature else {"do_sample": False}
    output_BT = model.generate(
        prompt_BT.to(substrate.device),
        attention_mask=mask_BT.to(substrate.device),
        max_new_tokens=max_new_tokens,
        pad_token_id=substrate.pad_token_id,
        **sampling,
    )
    return output_BT[:, width:].cpu()


@contextlib.contextmanager
def fast_copy(substrate: Substrate, precision: str = "auto") -> Iterator[Any]:
    """The model, or a bfloat16 copy of it where that is asked for, or faster ("auto").

    A copy, not autocast: autocast would round all weights anew for every token, which costs more than the token.
    """
    if substrate.dtype != "float32" or resolve_precision(substrate, precision) == "float32":
        yield substrate.model
        return
    model = copy.deepcopy(substrate.model)
    cast_parameters(model, torch.bfloat16)
    yield model


@contextlib.contextmanager
def _own_random_state(device: torch.device, seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
