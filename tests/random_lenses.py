"""Random lenses of every kind, for tests that need lenses but no training."""

import torch

from ftw.hat.basis import Basis
from ftw.hat.lens import HeadConfig
from ftw.hat.store import LensStack


def random_stack(
    *,
    num: int = 6,
    layers: tuple[int, ...] = (1, 2),
    width: int = 32,
    hidden: int = 0,
    rank: int = 0,
    calibrated: bool = True,
    seed: int = 0,
) -> LensStack:
    """Lenses with random weights and calibration; `hidden` makes them MLPs, `rank` gives them a basis."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        heads = [HeadConfig(hidden=hidden).build(num, rank or width) for _ in layers]
        for head in heads:
            for parameter in head.parameters():
                torch.nn.init.normal_(parameter, std=0.3)
        basis = Basis(torch.randn(len(layers), width), torch.randn(len(layers), width, rank)) if rank else None
        further = {}
        if calibrated:
            levels_Q = torch.cat([torch.linspace(0, 0.9, 20), torch.tensor([0.99, 0.999, 1])])
            further = {
                "quantiles_NQ": (2 * torch.randn(num, len(levels_Q))).sort(1).values,
                "levels_Q": levels_Q,
                "threshold_N": torch.randn(num),
                "threshold_1fpr_N": torch.randn(num),
            }
        return LensStack(
            names=[f"concept{n}" for n in range(num)],
            layers=layers,
            heads=heads,
            scale_NL=torch.rand(num, len(layers)) + 0.5,
            offset_NL=torch.randn(num, len(layers)),
            basis=basis,
            **further,
        )
