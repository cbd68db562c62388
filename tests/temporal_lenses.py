"""Random sequence lenses of every family, for tests that need lenses but no training."""

import torch
from random_lenses import random_stack

from ftw.hat.lens import HeadConfig
from ftw.hat.store import LensStack
from ftw.hat.temporal.trunk import Trunk

LAYERS = (1, 2)


def stack_of(family: str, *, num: int = 5, width: int = 8, rank: int = 0, seed: int = 0) -> LensStack:
    """Random sequence lenses with the calibration of `random_stack`."""
    plain = random_stack(num=num, layers=LAYERS, width=width, rank=rank, seed=seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = HeadConfig(family=family, hidden=3 if family in ("lstm", "gru", "trunk_lstm") else 0)
        trunk = Trunk(len(LAYERS), rank or width, hidden=3) if family == "trunk_lstm" else None
        plain.heads = [head.build(num, 6 if trunk else rank or width) for _ in LAYERS]
        for one in plain.heads:
            for parameter in one.parameters():
                torch.nn.init.normal_(parameter, std=0.5)
        plain.trunk = trunk
    return plain
