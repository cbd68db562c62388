"""States times weights: the product that reading lenses spends its time in, for every precision of the weights.

One state against a large matrix is a matter of memory traffic, and libraries differ by a factor of three in how much of
the bandwidth they use; what is chosen here was measured (`ftw bench bank`). Reduced precisions are for reading, never
for training.

Axes: B states, M rows of weights, W width.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ftw.errors import ConfigError

PRECISIONS = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}
FEW = 4  # states up to which memory traffic decides, not arithmetic
BLOCK = 64
VECTOR = 32  # torch's product of bfloat16 states with int8 weights reads past the end of rows that are no multiple
FINE = 254  # a coarse step of an int8 state is split into this many fine ones: half a step is 127 of them


def precision_of(name: str) -> torch.dtype:
    """The type that weights of this precision are kept in.

    Raises:
        ConfigError: no such precision.
    """
    if name not in PRECISIONS:
        raise ConfigError(f"precision {name!r} of a bank: choose {', '.join(PRECISIONS)}")
    return PRECISIONS[name]


def stored(weight: Tensor, precision: str) -> tuple[Tensor, Tensor | None]:
    """Weights in a precision, and for int8 the size of one step of each row (last axis), else None.

    Raises:
        ConfigError: a weight too large for float16.
    """
    dtype = precision_of(precision)
    if dtype == torch.int8:
        step = weight.abs().amax(-1).clamp_min(1e-30) / 127
        return (weight / step.unsqueeze(-1)).round_().to(torch.int8), step
    kept = weight.to(dtype)
    if dtype == torch.float16 and not (kept.sum().isfinite() or kept.isfinite().all()):
        raise ConfigError("weights beyond 65504 do not fit into float16; choose precision bfloat16")
    return kept, None


def product(x_BW: Tensor, weight_MW: Tensor, step_M: Tensor | None, bias_M: Tensor) -> Tensor:
    """x W^T + bias in float32, [B, M]; W is float32, bfloat16, float16, or int8 with the step of each row."""
    if weight_MW.dtype == torch.float32:
        few = 0 < len(x_BW) < FEW and x_BW.device.type == "cpu" and len(weight_MW) >= 2 * BLOCK
        if not few:
            return torch.nn.functional.linear(x_BW, weight_MW, bias_M)
        return _one_by_one(_in_blocks, x_BW, weight_MW).add_(bias_M)
    if step_M is not None:
        return _int8(x_BW, weight_MW, step_M) + bias_M
    if weight_MW.dtype == torch.float16 and x_BW.device.type == "cpu":
        if len(x_BW) > FEW:  # CPUs multiply float16 matrices far slower than float32 ones
            return torch.nn.functional.linear(x_BW, weight_MW.float(), bias_M)
        return _one_by_one(torch.nn.functional.linear, x_BW.half(), weight_MW).float().add_(bias_M)
    return torch.nn.functional.linear(x_BW.to(weight_MW.dtype), weight_MW).float() + bias_M


def _one_by_one(multiply: Callable[[Tensor, Tensor], Tensor], x_BW: Tensor, weight_MW: Tensor) -> Tensor:
    if len(x_BW) == 1:
        return multiply(x_BW, weight_MW)
    return torch.cat([multiply(x_1W, weight_MW) for x_1W in x_BW.split(1)])


def _in_blocks(x_1W: Tensor, weight_MW: Tensor) -> Tensor:
    """As a batch of small products: MKL's matrix-vector product reads 15 GB/s on an AMD EPYC, this 30 of 36."""
    blocks = len(weight_MW) // BLOCK
    cut = blocks * BLOCK
    x_W1 = x_1W.T  # one state at a time: with a second column the same call takes six times as long
    whole_1M = torch.bmm(weight_MW[:cut].unflatten(0, (blocks, BLOCK)), x_W1.expand(blocks, -1, -1)).view(1, -1)
    return whole_1M if cut == len(weight_MW) else torch.cat([whole_1M, (weight_MW[cut:] @ x_W1).T], dim=1)


def _int8(x_BW: Tensor, weight_MW: Tensor, step_M: Tensor) -> Tensor:
    """Products of the state's coarse and fine part.

    A state has features a hundred times larger than others, which eight bits cannot hold side by side; sixteen can.
    """
    if 0 < len(x_BW) <= FEW and x_BW.device.type == "cpu" and weight_MW.shape[1] % VECTOR == 0:
        coarse_BW = x_BW.bfloat16()
        both_CW = torch.cat([coarse_BW, (x_BW - coarse_BW.float()).bfloat16()])
        one_M = torch.ones(len(weight_MW), dtype=torch.bfloat16)  # a step would be rounded to bfloat16 here
        coarse_BM, fine_BM = torch._weight_int8pack_mm(both_CW, weight_MW, one_M).float().chunk(2)
        return (coarse_BM + fine_BM) * step_M
    step_B1 = x_BW.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    steps_BW = x_BW / step_B1
    coarse_BW = steps_BW.round()
    fine_BW = ((steps_BW - coarse_BW) * FINE).round_()
    coarse_BM, fine_BM = _integer(torch.cat([coarse_BW, fine_BW]).to(torch.int8), weight_MW).chunk(2)
    return (coarse_BM + fine_BM / FINE) * step_B1 * step_M


def _integer(x_BW: Tensor, weight_MW: Tensor) -> Tensor:
    if x_BW.device.type == "cpu":
        return torch._int_mm(x_BW, weight_MW.T)
    rows, width = weight_MW.shape
    if rows % 8 or width % 8:  # CUDA's integer product takes multiples of 8 only
        return x_BW.float() @ weight_MW.T.float()
    padded = torch.nn.functional.pad(x_BW, (0, 0, 0, max(0, 32 - len(x_BW))))  # and more than 16 states
    return torch._int_mm(padded, weight_MW.T)[: len(x_BW)]
