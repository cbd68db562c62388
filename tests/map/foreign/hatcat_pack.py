"""HatCat packs made by hand, in every spelling, with the modules that their lenses came from."""

import json
from pathlib import Path

import torch
from torch import nn

WIDTH = 12
SPELLINGS = ("plain", "norm", "old", "old norm", "linear")


def module(spelling: str, width: int = WIDTH) -> nn.Sequential:
    """The network of the ancestor: an optional layer norm, W -> 8 -> 4 -> 1 with ReLU; or one linear layer."""
    if spelling == "linear":
        return nn.Sequential(nn.Linear(width, 1))
    body = [
        nn.Linear(width, 8),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(8, 4),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(4, 1),
    ]
    made = nn.Sequential(*([nn.LayerNorm(width)] if "norm" in spelling else []), *body)
    if "norm" in spelling:
        nn.init.normal_(made[0].weight)
        nn.init.normal_(made[0].bias)
    return made


def state_of(network: nn.Sequential, spelling: str) -> dict[str, torch.Tensor]:
    """Its state dict as HatCat wrote it."""
    state = network.state_dict()
    if spelling == "linear":
        return {f"linear.{key.removeprefix('0.')}": tensor for key, tensor in state.items()}
    return state if spelling.startswith("old") else {f"net.{key}": tensor for key, tensor in state.items()}


def write_lens(path: Path, spelling: str, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """A lens file with random weights; the module that it is of."""
    network = module(spelling).to(dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state_of(network, spelling), path)
    return network.float().eval()


def write_info(folder: Path, **further: object) -> None:
    """A pack_info.json of the ancestor."""
    info = {"source_pack": "first-light", "pack_version": "1.0.0", "model": "apertus-8b", "trained_layers": [0, 1]}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pack_info.json").write_text(json.dumps({**info, **further}))
