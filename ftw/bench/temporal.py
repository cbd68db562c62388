"""What sequence lenses cost: training many at once, and reading sliding windows live.

Training is held against a loop of torch's own float32 LSTM, live reading against the same loop over windows; each case
and its baseline are timed in turn. The floor is the arithmetic (or, live, the weights to be read once) at the rate that
this machine's matrix product (memory) was measured to reach in the same minute.

Axes: N lenses, B sequences, T tokens, D model width, H units.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ftw.hat.linear import LinearHead
from ftw.hat.store import LensStack
from ftw.hat.temporal.recurrent import RecurrentHead
from ftw.hat.temporal.sequence import lenses_at_once
from ftw.hat.temporal.trunk import Trunk
from ftw.hat.temporal.windows import WindowReader
from ftw.substrate.taps import cpu_has_bfloat16

WIDTH, UNITS, TOKENS, BATCH, STRIDE = 576, 256, 20, 32, 5
Row = dict[str, Any]


def temporal(*, num_trained: int = 8, num_live: int = 100, num_trunk: int = 1000, repeats: int = 5) -> list[Row]:
    """Rows of measurements, milliseconds each.

    Args:
        num_trained: lenses in a training step. num_live, num_trunk: lenses read live, each alone or behind a trunk.
    """
    torch.manual_seed(0)
    return [
        _training(num_trained, repeats, rank=0),
        _training(num_trained, repeats, rank=128),
        _live("live lstm, a token", _recurrent_stack(num_live), num_live, repeats),
        _live("live trunk_lstm, a token", _trunk_stack(num_trunk), num_trunk, repeats),
    ]


def _training(num: int, repeats: int, *, rank: int) -> Row:
    """A step of `num` lenses together, each on 32 answers of its own, against one after the other with nn.LSTM."""
    width = rank or WIDTH
    dtype = torch.bfloat16 if torch.cuda.is_available() or cpu_has_bfloat16() else torch.float32
    at_once = lenses_at_once(RecurrentHead(num, width, hidden=UNITS), BATCH, TOKENS)
    parts = [RecurrentHead(min(at_once, num - at), width, hidden=UNITS) for at in range(0, num, at_once)]
    optimizers = [torch.optim.AdamW(part.parameters(), fused=True) for part in parts]
    own = [torch.randn(part.num_lenses, BATCH, TOKENS, width, dtype=dtype) for part in parts]
    x_BTD = torch.randn(BATCH, TOKENS, WIDTH)
    single = nn.LSTM(WIDTH, UNITS, batch_first=True, bidirectional=True)
    alone = torch.optim.AdamW(single.parameters(), fused=True)

    def together() -> None:
        for part, optimizer, x_nBTD in zip(parts, optimizers, own, strict=True):
            optimizer.zero_grad()
            part(x_nBTD).square().sum().backward()
            optimizer.step()

    def one_by_one() -> None:
        for _ in range(num):
            alone.zero_grad()
            single(x_BTD)[1][0].square().sum().backward()
            alone.step()

    ms, baseline_ms = _in_turn([together, one_by_one], repeats)
    flops = 6 * num * BATCH * TOKENS * 2 * 4 * UNITS * (width + UNITS)
    case = "train lstm, a step" + (f", basis {rank}" if rank else "")
    return _row(case, num, width, ms, "nn.LSTM float32, a loop", baseline_ms, 1000 * flops / _product_rate(dtype))


def _live(case: str, stack: LensStack, num: int, repeats: int) -> Row:
    """Windows of 20 tokens every 5, per token, against torch's LSTM over each window for each lens."""
    bank = stack.sequence_bank()
    reader = WindowReader(bank, window=TOKENS, stride=STRIDE)
    fresh_BtLD = torch.randn(1, STRIDE, 1, WIDTH)
    reader.push(torch.randn(1, TOKENS, 1, WIDTH))
    single, window_BTD = nn.LSTM(WIDTH, UNITS, batch_first=True, bidirectional=True), torch.randn(1, TOKENS, WIDTH)

    def windows() -> None:
        with torch.inference_mode():
            for token in range(STRIDE):
                reader.push(fresh_BtLD[:, token : token + 1])

    def loop() -> None:
        with torch.inference_mode():
            for _ in range(10):
                single(window_BTD)

    ms, ten_ms = _in_turn([windows, loop], repeats)
    tensors = [*bank.lenses.state_dict().values(), *(bank.trunk.state_dict().values() if bank.trunk else ())]
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    floor_ms = 1000 * num_bytes / _memory_rate() / STRIDE
    return _row(case, num, WIDTH, ms / STRIDE, "nn.LSTM, a loop", ten_ms / 10 * num / STRIDE, floor_ms)


def _recurrent_stack(num: int) -> LensStack:
    head = RecurrentHead(num, WIDTH, hidden=UNITS).stored("bfloat16" if cpu_has_bfloat16() else "float32")
    return _stack(num, head)


def _trunk_stack(num: int) -> LensStack:
    stack = _stack(num, LinearHead(num, 2 * UNITS))
    stack.trunk = Trunk(1, WIDTH, hidden=UNITS)
    return stack


def _stack(num: int, head: Any) -> LensStack:
    names = [f"lens {n}" for n in range(num)]
    return LensStack(names=names, layers=(0,), heads=[head], scale_NL=torch.ones(num, 1), offset_NL=torch.zeros(num, 1))


def _in_turn(functions: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Median milliseconds of each, run in turn so that whatever else the machine does meets all alike."""
    times: list[list[float]] = [[] for _ in functions]
    for function in functions:
        function()
    for _ in range(repeats):
        for found, function in zip(times, functions, strict=True):
            start = time.perf_counter()
            function()
            found.append(1000 * (time.perf_counter() - start))
    return [statistics.median(found) for found in times]


def _product_rate(dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product."""
    a: Tensor = torch.randn(1536, 1536).to(dtype)
    (ms,) = _in_turn([lambda: a @ a], 5)
    return 2 * 1536**3 / (ms / 1000)


def _memory_rate() -> float:
    """Bytes a second that a sum over much memory reads."""
    much = torch.ones(2**25)
    (ms,) = _in_turn([much.sum], 5)
    return much.numel() * 4 / (ms / 1000)


def _row(case: str, num: int, width: int, ms: float, baseline: str, baseline_ms: float, floor_ms: float) -> Row:
    return {
        "case": case,
        "n": num,
        "d": width,
        "ms": round(ms, 3),
        "baseline": baseline,
        "baseline_ms": round(baseline_ms, 3),
        "ratio": round(baseline_ms / ms, 2),
        "floor_ms": round(floor_ms, 3),
        "over_floor": round(ms / floor_ms, 2),
    }
