"""`ftw bench temporal`: what sequence lenses cost, to train many at once and to read in sliding windows live.

Training is held against a loop of torch's own float32 LSTM, live reading against the same loop over windows and beside
a token of the substrate. The floor of training is its arithmetic at the rate of this machine's large matrix products;
live, the weights read once a window.

Axes: n lenses of a part, B sequences, T tokens, D model width, H units.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ftw.bench.measure import Call, Row, Stopwatch
from ftw.bench.synthetic import WIDTH
from ftw.bench.token import substrate_token
from ftw.hat.lens import Head
from ftw.hat.linear import LinearHead
from ftw.hat.store import LensStack
from ftw.hat.temporal.recurrent import RecurrentHead
from ftw.hat.temporal.sequence import TRAINED_BYTES, lenses_at_once
from ftw.hat.temporal.side_by_side import side_by_side
from ftw.hat.temporal.trunk import Trunk
from ftw.hat.temporal.windows import WindowReader
from ftw.substrate.taps import fast_type

TOKENS, BATCH, STRIDE = 20, 32, 5
TRAINED, LIVE, BEHIND_TRUNK, RANK = 8, 100, 1000, 128
PRODUCT = 1536
LOOPED = 4  # lenses that a loop is timed on; its time for more is scaled up


def temporal_rows(watch: Stopwatch) -> Iterator[Row]:
    """All rows of the bench."""
    torch.manual_seed(watch.config.seed)
    units = watch.size(256, 8)
    yield _training(watch, watch.size(WIDTH, 16), units, basis=False)
    yield _training(watch, watch.size(RANK, 8), units, basis=True)
    token = substrate_token(watch)[1]
    yield _live(watch, "live lstm, a token", _lenses(watch, units), token)
    yield _live(watch, "live trunk_lstm, a token", _behind_trunk(watch, units), token)


def _training(watch: Stopwatch, width: int, units: int, *, basis: bool) -> Row:
    """A step of many lenses together, each on answers of its own, against one after the other with nn.LSTM."""
    num, dtype = watch.size(TRAINED, 2), fast_type(watch.device)
    at_once = lenses_at_once(RecurrentHead(num, width, hidden=units), BATCH, TOKENS, cached_bytes=TRAINED_BYTES)
    parts = [
        RecurrentHead(min(at_once, num - at), width, hidden=units).to(watch.device) for at in range(0, num, at_once)
    ]
    optimizers = [torch.optim.AdamW(part.parameters(), fused=True) for part in parts]
    own = [torch.randn(part.num_lenses, BATCH, TOKENS, width, dtype=dtype, device=watch.device) for part in parts]
    single = nn.LSTM(watch.size(WIDTH, 16), units, batch_first=True, bidirectional=True).to(watch.device)
    alone = torch.optim.AdamW(single.parameters(), fused=True)
    x_BTD = torch.randn(BATCH, TOKENS, single.input_size, device=watch.device)

    def gradients(place: int) -> int:
        optimizers[place].zero_grad()
        parts[place](own[place]).square().sum().backward()
        return place

    def together() -> None:
        for place in side_by_side(gradients, range(len(parts)), watch.device):
            optimizers[place].step()

    def one_by_one() -> None:
        for _ in range(num):
            alone.zero_grad()
            single(x_BTD)[1][0].square().sum().backward()
            alone.step()

    side: Tensor = torch.randn(watch.size(PRODUCT, 64), watch.size(PRODUCT, 64), device=watch.device).to(dtype)
    times = watch.times({"case": together, "baseline": one_by_one, "product": lambda: side @ side})
    ms = {name: float(np.median(found)) for name, found in times.items()}
    # Forward and two products back, for the inputs and the states of both directions.
    flops = 6 * num * BATCH * TOKENS * 2 * 4 * units * (width + units)
    return Row(
        case=f"train lstm, a step{', basis' if basis else ''}",
        n=num,
        d=width,
        ms=ms["case"],
        baseline="nn.LSTM one by one, float32",
        baseline_ms=ms["baseline"],
        floor_ms=flops / (2 * side.shape[0] ** 3) * ms["product"],
        more={
            "precision": str(dtype).removeprefix("torch."),
            "flops_a_second": round(2 * side.shape[0] ** 3 / ms["product"] * 1e3),
            # The measure of the original design: 10 epochs of 100 sequences, 32 in a step.
            "seconds_a_lens_10_epochs_100_sequences": round(10 * 100 / BATCH * ms["case"] / num / 1e3, 3),
        },
    )


def _live(watch: Stopwatch, case: str, stack: LensStack, token: Call) -> Row:
    """Windows of 20 tokens, one for every 5, a token's share of it; against torch's LSTM over each window and lens."""
    bank, width = stack.sequence_bank().to(watch.device).stored(), watch.size(WIDTH, 16)
    units = bank.trunk.hidden if bank.trunk is not None else _hidden(stack.heads[0])
    reader = WindowReader(bank, window=TOKENS, stride=STRIDE)
    fresh_BtLD = torch.randn(1, STRIDE, 1, width, device=watch.device)
    single = nn.LSTM(width, units, batch_first=True, bidirectional=True).to(watch.device)
    window_BTD = torch.randn(1, TOKENS, width, device=watch.device)

    reader.push(torch.randn(1, TOKENS, 1, width, device=watch.device))

    def windows() -> None:
        with torch.inference_mode():
            reader.push(fresh_BtLD)

    def loop() -> None:
        with torch.inference_mode():
            for _ in range(LOOPED):
                single(window_BTD)

    tensors = [*bank.lenses.state_dict().values(), *(bank.trunk.state_dict().values() if bank.trunk else ())]
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    times = watch.times({"case": windows, "baseline": loop, "floor": watch.reading(num_bytes), "token": token})
    token_ms = float(np.median(times.pop("token")))
    ms = {name: float(np.median(found)) / STRIDE for name, found in times.items()}
    return Row(
        case=case,
        n=len(bank),
        d=width,
        ms=ms["case"],
        baseline="nn.LSTM, window by window",
        baseline_ms=ms["baseline"] / LOOPED * len(bank),
        floor_ms=ms["floor"],
        more={
            "megabytes": round(num_bytes / 1e6, 2),
            "substrate_ms": round(token_ms, 2),
            "share_of_a_token": round(ms["case"] / token_ms, 4),
        },
    )


def _lenses(watch: Stopwatch, units: int) -> LensStack:
    """Independent LSTM lenses."""
    num = watch.size(LIVE, 3)
    return _stack(num, RecurrentHead(num, watch.size(WIDTH, 16), hidden=units))


def _behind_trunk(watch: Stopwatch, units: int) -> LensStack:
    """Linear lenses behind one shared LSTM."""
    num = watch.size(BEHIND_TRUNK, 5)
    stack = _stack(num, LinearHead(num, 2 * units))
    stack.trunk = Trunk(1, watch.size(WIDTH, 16), hidden=units)
    return stack


def _stack(num: int, head: Head) -> LensStack:
    scale_NL, offset_NL = torch.ones(num, 1), torch.zeros(num, 1)
    names = [f"lens {n}" for n in range(num)]
    return LensStack(names=names, layers=(0,), heads=[head], scale_NL=scale_NL, offset_NL=offset_NL)


def _hidden(head: Any) -> int:
    return head.hidden
