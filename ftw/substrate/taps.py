"""Taps read or edit what chosen blocks put out; `read_states` runs many texts through the substrate for just that.

A tap is a context manager: its hooks are gone when the block is left, however it is left. A tap that never fired is an
error, because silence would look like an answer.

Axes: B texts of a batch, T tokens, L layers, D model width.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ftw.errors import ConfigError, SubstrateError
from ftw.substrate.model import Substrate

OnStates = Callable[[int, Tensor], Tensor | None]


class _ForwardEnded(BaseException):
    """Leaves the model from inside a block; a BaseException, so that no `except Exception` on the way keeps it."""

    def __init__(self, tap: "Tap") -> None:
        self.tap = tap


class Tap:
    """Calls back with the output of chosen blocks, at every forward pass inside the `with`.

        with Tap(substrate, [9], lambda layer, states_BTD: print(states_BTD.shape)):
            substrate.model(input_ids=token_ids_BT)

    `on_states(layer, states_BTD)` gets the block's own output, on its device, in its dtype. A tensor it returns (same
    shape) goes on in its place; None leaves the output alone. With `stop=True` the first forward pass ends after the
    deepest tapped block, and the `with` ends there too: statements after the model call inside it do not run.

    Raises:
        SubstrateError: no such layer; a returned tensor of another shape; a tapped layer that never fired.
    """

    def __init__(self, substrate: Substrate, layers: Sequence[int], on_states: OnStates, *, stop: bool = False) -> None:
        self.substrate = substrate
        self.layers = substrate.layers(layers)
        self.on_states = on_states
        self.stop = stop
        self.num_fired: dict[int, int] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> "Tap":
        if self._handles:
            raise SubstrateError("this tap is open already; make a second one")
        self.num_fired = dict.fromkeys(self.layers, 0)
        for layer in self.layers:
            self._handles.append(self.substrate.blocks[layer].register_forward_hook(self._hook(layer)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        ended_here = isinstance(error, _ForwardEnded) and error.tap is self
        silent = [layer for layer, fired in self.num_fired.items() if not fired]
        if silent and (error is None or ended_here):
            raise SubstrateError(
                f"the tap on layers {silent} of {self.substrate.name!r} never fired; "
                "run the substrate's own model inside the `with`"
            )
        return ended_here

    def _hook(self, layer: int) -> Callable[[nn.Module, Any, Any], Any]:
        def fire(_: nn.Module, __: Any, output: Any) -> Any:
            # Blocks of some models return (states, attention, ...), of others the bare tensor.
            states_BTD: Tensor = output[0] if isinstance(output, tuple) else output
            edited_BTD = self.on_states(layer, states_BTD)
            self.num_fired[layer] += 1
            if self.stop and layer == max(self.layers):
                raise _ForwardEnded(self)
            if edited_BTD is None:
                return None
            if edited_BTD.shape != states_BTD.shape:
                raise SubstrateError(
                    f"an edit of layer {layer} has shape {list(edited_BTD.shape)}, not {list(states_BTD.shape)}"
                )
            edited_BTD = edited_BTD.to(states_BTD)
            return (edited_BTD, *output[1:]) if isinstance(output, tuple) else edited_BTD

        return fire


def read_states(
    substrate: Substrate,
    token_ids: Sequence[Sequence[int]],
    layers: Sequence[int],
    *,
    batch_tokens: int = 2048,
    precision: str = "auto",
) -> Iterator[tuple[int, Tensor]]:
    """States of many texts, one text at a time; see `read_batches`.

    Yields:
        (index into `token_ids`, states_LTD float32 on the CPU, without position 0, not normalised).
    """
    for indices, states_LBTD, lengths in read_batches(
        substrate, token_ids, layers, batch_tokens=batch_tokens, precision=precision
    ):
        for row, (index, length) in enumerate(zip(indices, lengths, strict=True)):
            # A copy, so that a kept text does not keep its whole batch in memory.
            yield index, states_LBTD[:, row, :length].clone()


def read_batches(
    substrate: Substrate,
    token_ids: Sequence[Sequence[int]],
    layers: Sequence[int],
    *,
    batch_tokens: int = 2048,
    precision: str = "auto",
) -> Iterator[tuple[list[int], Tensor, list[int]]]:
    """States of many texts, a batch in memory at a time, longest texts first.

    Args:
        token_ids: one sequence a text, as `Substrate.encode` makes them (sink token first).
        layers: block indices; the L axis of the result has their order.
        batch_tokens: padded tokens in a batch; a longer text is a batch of its own.
        precision: see `resolve_precision`.

    Yields:
        (indices into `token_ids`, states_LBTD float32 on the CPU, without position 0, not normalised; padded on the
        right beyond the lengths that come last). The order and the batches depend on nothing but the lengths and
        `batch_tokens`.

    Raises:
        SubstrateError: a text that is empty or longer than the context, or states that are not finite (names the text).
    """
    layers = substrate.layers(layers)
    precision = resolve_precision(substrate, precision)
    _check_lengths(substrate, token_ids)
    for batch in plan_batches([len(ids) for ids in token_ids], batch_tokens):
        states_LBTD = _read_batch(substrate, [token_ids[index] for index in batch], layers, precision)[:, :, 1:]
        lengths = [len(token_ids[index]) - 1 for index in batch]
        finite_B = states_LBTD.sum(dim=(0, 2, 3)).isfinite()
        for row in (~finite_B).nonzero()[:, 0].tolist():
            if not states_LBTD[:, row, : lengths[row]].isfinite().all():
                raise SubstrateError(
                    f"the states of text {batch[row]} are not finite in {precision}; "
                    "try precision=float32; if that fails too, the weights are damaged: fetch the model again"
                )
        yield batch, states_LBTD, lengths


def plan_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices in batches of at most `batch_tokens` padded tokens, longest first (a lack of memory shows at once)."""
    if batch_tokens < 1:
        raise ConfigError(f"batch_tokens={batch_tokens} must be at least 1")
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def resolve_precision(substrate: Substrate, precision: str) -> str:
    """What "auto" means on this machine: "bfloat16" or "float32".

    "bfloat16" is autocast: matrix products in bfloat16, the residual stream in float32 (for float32 weights). "auto"
    chooses it on CUDA devices and on CPUs with bfloat16 instructions, where it is two to three times as fast.
    "float32" computes in the dtype of the weights, without autocast.
    """
    if precision == "auto":
        return "bfloat16" if fast_type(substrate.device) == torch.bfloat16 else "float32"
    if precision not in ("float32", "bfloat16"):
        raise ConfigError(f"precision={precision!r} is unknown; choose from auto, float32, bfloat16")
    return precision


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX)."""
    # torch has no public question for these; where a version lacks one, the answer is the slower, exact way.
    questions = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, question, bool)() for question in questions)


def fast_type(device: torch.device) -> torch.dtype:
    """What matrix products are fast in: bfloat16 on a GPU and on a CPU that has it, else float32."""
    fast = device.type == "cuda" or (device.type == "cpu" and cpu_has_bfloat16())
    return torch.bfloat16 if fast else torch.float32


def autocast(substrate: Substrate, precision: str) -> contextlib.AbstractContextManager[Any]:
    """The autocast of a resolved precision, on the substrate's device."""
    enabled = precision == "bfloat16"
    return torch.autocast(substrate.device.type, torch.bfloat16) if enabled else contextlib.nullcontext()


def _read_batch(substrate: Substrate, texts: list[Sequence[int]], layers: tuple[int, ...], precision: str) -> Tensor:
    """states_LBTD, float32 on the CPU, of texts sorted by falling length; padded on the right."""
    shape = (len(texts), len(texts[0]))
    token_ids_BT = torch.full(shape, substrate.pad_token_id)
    mask_BT = torch.zeros(shape, dtype=torch.long)
    for row, ids in enumerate(texts):
        token_ids_BT[row, : len(ids)] = torch.as_tensor(ids)
        mask_BT[row, : len(ids)] = 1
    inputs = {"input_ids": token_ids_BT.to(substrate.device), "attention_mask": mask_BT.to(substrate.device)}
    kept: dict[int, Tensor] = {}
    with (
        torch.inference_mode(),
        autocast(substrate, precision),
        Tap(substrate, layers, on_states=kept.__setitem__, stop=True),
    ):
        substrate.model.base_model(**inputs, use_cache=False)
    # One transfer a batch: the device is asked to wait once, not once a layer.
    return torch.stack([kept[layer] for layer in layers]).to("cpu").float()


def _check_lengths(substrate: Substrate, token_ids: Sequence[Sequence[int]]) -> None:
    for index, ids in enumerate(token_ids):
        if len(ids) < 2:
            raise SubstrateError(f"text {index} has no tokens after the sink token; leave empty texts out")
        if len(ids) > substrate.context_tokens:
            raise SubstrateError(
                f"text {index} has {len(ids)} tokens; {substrate.name!r} takes {substrate.context_tokens}. "
                "Cut it with encode(text, max_tokens=...)"
            )
