"""Made-up lenses, packs and hierarchies of the size of First Light: what they read means nothing, what it costs does.

Axes: N lenses, L layers, D model width, H first hidden width, Q quantiles.
"""

from pathlib import Path

import torch
from torch import Tensor

from ftw.hat.lens import Head, HeadConfig
from ftw.hat.lineage import Lineage
from ftw.hat.store import LensStack, head_of
from ftw.map.pack import LensPack, Recipe

NUM_LENSES, WIDTH, LAYERS = 7947, 576, (9, 18, 27)
HIDDEN, BRANCHES, NUM_QUANTILES, LENSES_A_FILE = 128, 8, 129, 1000


def made_up_stack(
    num: int, *, layers: tuple[int, ...] = LAYERS, width: int = WIDTH, hidden: int = 0, seed: int = 0
) -> LensStack:
    """Random lenses whose logits are of order one, calibrated against a normal background."""
    random = torch.Generator().manual_seed(seed)
    levels_Q = torch.linspace(0, 1, NUM_QUANTILES)
    normal_Q = torch.special.ndtri(levels_Q.clamp(0.001, 0.999))
    return LensStack(
        names=[f"concept {n}" for n in range(num)],
        layers=layers,
        heads=[_head(num, width, hidden, random) for _ in layers],
        scale_NL=torch.ones(num, len(layers)),
        offset_NL=torch.zeros(num, len(layers)),
        quantiles_NQ=(normal_Q * (0.5 + torch.rand(num, 1, generator=random))).contiguous(),
        levels_Q=levels_Q,
    )


def made_up_pack(
    folder: Path, num: int, *, hidden: int = 0, width: int = WIDTH, layers: tuple[int, ...] = LAYERS
) -> Path:
    """A pack of random lenses on disk, in files of a thousand."""
    stack = made_up_stack(num, layers=layers, width=width, hidden=hidden)
    head = head_of(stack)
    recipe = Recipe(
        substrate="made up",
        fingerprint="made up",
        width=width,
        dtype="float32",
        precision="float32",
        layers=list(layers),
        family=head.family,
        hidden=head.hidden,
    )
    levels = {name: row // LENSES_A_FILE for row, name in enumerate(stack.names)}
    pack = LensPack(pack_id="made-up", version="0.0.0", stack=stack, recipe=recipe, levels=levels)
    return pack.save(folder / "pack")


def made_up_lineage(names: list[str]) -> Lineage:
    """A tree over lenses in the order of their levels, `BRANCHES` children each."""
    parents = {name: [] if row < BRANCHES else [names[row // BRANCHES - 1]] for row, name in enumerate(names)}
    return Lineage(names, {name: level_of(row) for row, name in enumerate(names)}, _Tree(parents))


def level_of(row: int) -> int:
    """Level of a row in a tree with `BRANCHES` roots and as many children each."""
    level, end, size = 0, BRANCHES, BRANCHES
    while row >= end:
        size *= BRANCHES
        level, end = level + 1, end + size
    return level


def states(num: int, *, layers: int, width: int, seed: int = 0) -> Tensor:
    """States [num, L, D] that drift as those of a text do: each keeps most of the one before."""
    random = torch.Generator().manual_seed(seed)
    drawn = torch.randn(num, layers, width, generator=random)
    for place in range(1, num):
        drawn[place] = 0.8 * drawn[place - 1] + 0.6 * drawn[place]
    return drawn


class _Tree:
    def __init__(self, parents: dict[str, list[str]]) -> None:
        self._parents = parents

    def __contains__(self, name: object) -> bool:
        return name in self._parents

    def parents(self, name: str) -> list[str]:
        return self._parents[name]


def _head(num: int, width: int, hidden: int, random: torch.Generator) -> Head:
    with torch.device("meta"):
        head = HeadConfig(hidden=hidden).build(num, width)
    head.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in head.state_dict().values():
            # Of a normalised state, a row of such weights makes a number of order one.
            fan_in = tensor.shape[-1] if tensor.ndim > 1 else 1
            tensor.normal_(generator=random).mul_(fan_in**-0.5 if tensor.ndim > 1 else 0.1)
    return head
