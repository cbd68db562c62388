"""A lens pack in HatCat's layout: `layerN/{Concept}.pt`, one state dict a lens, for programs that read that.

Calibration is folded into the last layer, and a shared basis into the first, so that a file's logit is the lens's own.
What has no place in the layout (text lenses, pooling, intervals) stays behind.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ftw import paths
from ftw.errors import PackError
from ftw.map.concept import ConceptPack
from ftw.map.concept_record import split_key
from ftw.map.foreign.names import file_names
from ftw.map.pack import LensPack


def write_hatcat(pack: LensPack, folder: Path) -> list[str]:
    """Write a pack in HatCat's layout, whole or not at all; what was left behind.

    Lenses that read several layers become one file for each, `{Concept}@L{layer}.pt`, whose mean logit is the lens's.
    """
    if folder.exists() and any(folder.iterdir()):
        raise PackError(f"{folder} is not empty; name a new folder: out=FOLDER")
    states, several = _states(pack), len(pack.recipe.layers) > 1
    rows = {name: row for row, name in enumerate(pack.names)}
    with paths.replace_folder(folder) as fresh:
        probes: dict[str, Any] = {}
        for level in sorted(set(pack.levels.values())):
            names = [name for name in pack.names if pack.levels[name] == level]
            terms = {name: _term(name, level) for name in names}
            stems = file_names(terms.values())
            (fresh / f"layer{level}").mkdir()
            for name in names:
                for place, layer in enumerate(pack.recipe.layers):
                    key = f"layer{level}/{stems[terms[name]]}" + (f"@L{layer}" if several else "")
                    state = {part: tensor[rows[name]].clone() for part, tensor in states[place].items()}
                    torch.save(state, fresh / f"{key}.pt")
                    if not several and pack.stack.levels_Q.numel():
                        probes[key] = {"model_layer": layer, "quantiles": _even_quantiles(pack, rows[name])}
            results = [{"concept": terms[name], "layer": level, **pack.metrics.get(name, {})} for name in names]
            _write(
                fresh / f"layer{level}" / "results.json",
                {"layer": level, "n_concepts": len(results), "results": results},
            )
        if probes:
            _write(fresh / "probe_calibration.json", {"method": "percentile", "probes": probes})
        _write(fresh / "pack_info.json", _info(pack))
        if pack.concepts is not None:
            _write_hierarchy(pack.concepts, fresh)
    left = {"text lenses": pack.text, "pooling of whole texts": pack.stack.pooling}
    return [f"{what}: no place in HatCat's layout, left out" for what, part in left.items() if part is not None]


def _write_hierarchy(concepts: ConceptPack, folder: Path) -> None:
    concepts.save(folder / "concept_pack")
    (folder / "concept_pack" / "hierarchy").rename(folder / "hierarchy")
    (folder / "concept_pack" / "hierarchy.json").rename(folder / "hierarchy.json")


def _states(pack: LensPack) -> list[dict[str, Tensor]]:
    """For each layer, the tensors of all lenses under HatCat's names."""
    stack, states = pack.stack, []
    for layer, head in enumerate(stack.heads):
        tensors = {name: tensor.float() for name, tensor in head.row_tensors().items()}
        first, bias = ("weight", "bias") if "weight" in tensors else ("w1", "b1")
        if stack.basis is not None:
            components_DR, mean_D = stack.basis.components[layer], stack.basis.mean[layer]
            tensors[first] = tensors[first] @ components_DR.T
            tensors[bias] = tensors[bias] - tensors[first] @ mean_D
        scale_N, offset_N = stack.scale_NL[:, layer], stack.offset_NL[:, layer]
        last, last_bias = ("weight", "bias") if "weight" in tensors else ("w3", "b3")
        tensors[last] = tensors[last] * scale_N[:, None]
        tensors[last_bias] = tensors[last_bias] * scale_N + offset_N
        if "weight" in tensors:
            states.append({"linear.weight": tensors["weight"][:, None], "linear.bias": tensors["bias"][:, None]})
        else:
            states.append(
                {
                    "net.0.weight": tensors["w1"],
                    "net.0.bias": tensors["b1"],
                    "net.3.weight": tensors["w2"],
                    "net.3.bias": tensors["b2"],
                    "net.6.weight": tensors["w3"][:, None],
                    "net.6.bias": tensors["b3"][:, None],
                }
            )
    return states


def _even_quantiles(pack: LensPack, row: int, num: int = 1001) -> list[float]:
    """Background quantiles of a lens's probability at even levels, as HatCat keeps them."""
    levels_Q, quantiles_Q = pack.stack.levels_Q.double(), pack.stack.quantiles_NQ[row].double()
    wanted = torch.linspace(0, 1, num, dtype=torch.float64)
    above = torch.searchsorted(levels_Q, wanted).clamp(1, len(levels_Q) - 1)
    share = (wanted - levels_Q[above - 1]) / (levels_Q[above] - levels_Q[above - 1])
    values = torch.lerp(quantiles_Q[above - 1], quantiles_Q[above], share.clamp(0, 1))
    return values.sigmoid().tolist()


def _info(pack: LensPack) -> dict[str, Any]:
    concepts, layers = pack.concepts, pack.recipe.layers
    return {
        "source_pack": concepts.pack_id if concepts is not None else pack.pack_id,
        "pack_version": pack.version,
        "lens_pack_id": pack.pack_id,
        "model": pack.recipe.substrate,
        "hidden_dim": pack.recipe.width,
        "trained_layers": sorted(set(pack.levels.values())),
        **({"model_layer": layers[0]} if len(layers) == 1 else {}),
        "normalize_hidden_states": True,
        "exported_from": {"pack_id": pack.pack_id, "version": pack.version, "recipe": asdict(pack.recipe)},
    }


def _term(name: str, level: int) -> str:
    term, at = split_key(name)
    return term if at == level else name


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
