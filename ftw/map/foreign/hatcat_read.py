"""HatCat's lens packs, read: one file a lens, banks, several depths a concept, calibration by moments or percentiles.

    layerN/{Concept}.pt · {Concept}_classifier.pt · classifiers/ · {Concept}@L{layer}.pt · banks/ + bank_index.json

A folder's layer number is a *level* of the hierarchy; the layer of the model stands in pack_info.json or behind the @L.

Axes: N lenses, L layers, W width, Q quantiles.
"""

import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ftw.errors import FTWError, PackError
from ftw.hat.lens import Head, HeadConfig
from ftw.hat.store import LensStack
from ftw.map.calibrate import quantile_levels
from ftw.map.concept import ConceptPack
from ftw.map.foreign.names import concept_name
from ftw.map.foreign.state_dict import MAX_BANK_BYTES, ReadLens, parse_lens, read_pt
from ftw.map.installed import now
from ftw.map.manifest import read_json, safe_member
from ftw.map.pack import LensPack, Recipe

MAX_LENSES = 200_000
MAX_QUANTILES = 10_001
CLAMP = 1e-6  # HatCat keeps probabilities this far from 0 and 1 before it takes a logit
READERS = 2
_LEVEL = re.compile(r"layer(\d{1,4})")
_FILE = re.compile(r"(?P<stem>.+?)(?:_classifier)?(?:@L(?P<layer>\d{1,4}))?\.pt")


@dataclass(frozen=True, kw_only=True)
class FoundLens:
    """A lens as it lies in a pack: whose, at which level, for which layer of the model, where, and itself."""

    concept: str
    level: int
    layer: int | None
    place: str
    lens: ReadLens

    @property
    def key(self) -> str:
        """How probe_calibration.json names it: layer2/Concept@L19, as its file is named."""
        stem = self.place.rpartition("/")[2].removesuffix(".pt").replace("_classifier", "")
        return f"layer{self.level}/{stem if self.is_file else self.concept}"

    @property
    def is_file(self) -> bool:
        """It lies in a file of its own, not in a bank."""
        return not self.place.endswith(".bank.pt")


class Background(NamedTuple):
    """Quantiles of each lens's logits on a background, and the levels they stand for."""

    quantiles_NQ: Tensor
    levels_Q: Tensor


NO_BACKGROUND = Background(torch.empty(0, 0), torch.empty(0))


@dataclass(kw_only=True)
class ImportedPack:
    """A pack and what a reader must know of how it came to be."""

    pack: LensPack
    notes: list[str] = field(default_factory=list)


def read_hatcat(
    folder: Path,
    *,
    fingerprint: str = "",
    layer: int | None = None,
    version: str | None = None,
    advance: Callable[[int, int], None] | None = None,
) -> ImportedPack:
    """A HatCat lens pack as one of FTW.

    Args:
        fingerprint: of the substrate that it was trained on, where that is known; without, it reads on none.
        layer: of the model, where the pack does not say. advance: told lenses read and lenses in all.

    Raises:
        PackError: no such pack, a hostile file, lenses of different forms, or no layer given anywhere.
    """
    info = _optional_json(folder, "pack_info.json") or _optional_json(folder, "pack.json")
    layer = layer if layer is not None else _layer_of(info)
    found = list(_find(folder, advance))
    if not found:
        raise PackError(f"no lenses in {folder}: it has no layer0/*.pt and no banks; is this a pack of HatCat?")
    if any(one.layer is None for one in found) and layer is None:
        raise PackError(f"{folder} does not say which layer of the model its lenses read; give it: layer=15")
    names = _names(found)
    layers = sorted({one.layer if one.layer is not None else int(layer or 0) for one in found})
    stack, notes = _stack(found, names, layers, int(layer or 0), _optional_json(folder, "probe_calibration.json"))
    concepts, remark = _concepts(folder, info, set(stack.names))
    notes += [remark] if remark else []
    levels = {names[one.concept, one.level]: one.level for one in found}
    dtypes = {one.lens.dtype for one in found}
    recipe = Recipe(
        substrate=str(info.get("model") or _inner(info, "model_info").get("model_name") or "unknown"),
        fingerprint=fingerprint or "unknown",
        width=_width(stack.heads[0]),
        dtype="unknown",
        precision="float32",
        layers=layers,
        family="linear" if "weight" in found[0].lens.tensors else "mlp",
        hidden=0 if "weight" in found[0].lens.tensors else len(found[0].lens.tensors["b1"]),
        normalisation="layer norm per token (float32, no parameters)",
        calibration="none: the lenses' own logits, mean over layers",
        solver="HatCat",
    )
    if not fingerprint:
        notes.append("the pack names no fingerprint of its substrate; give fingerprint=... to read with it")
    pack = LensPack(
        pack_id=re.sub(r"[^\w.-]+", "-", str(info.get("lens_pack_id") or info.get("source_pack") or folder.name)),
        version=version or str(info.get("pack_version") or info.get("version") or "0.1.0"),
        stack=stack,
        recipe=recipe,
        levels={name: levels[name] for name in stack.names},
        concepts=concepts,
        metrics=_metrics(folder, found, names),
        stored="bfloat16" if dtypes == {torch.bfloat16} and not any(one.lens.norm for one in found) else "float32",
        provenance={"imported_from": f"HatCat pack {folder.name}", "created": now(), "source_info": info},
    )
    return ImportedPack(pack=pack, notes=notes)


def _find(folder: Path, advance: Callable[[int, int], None] | None) -> Iterator[FoundLens]:
    """Every lens of a pack, once: single files first, then what stands in banks only."""
    files = []
    for level_folder in sorted([*folder.glob("layer*"), *folder.glob("individual/layer*")]):
        match = _LEVEL.fullmatch(level_folder.name)
        if match and level_folder.is_dir() and not level_folder.is_symlink():
            for path in sorted([*level_folder.glob("*.pt"), *level_folder.glob("classifiers/*.pt")]):
                parts = _FILE.fullmatch(path.name)
                assert parts is not None  # `.+?` takes any name that ends so
                depth = None if parts["layer"] is None else int(parts["layer"])
                files.append((concept_name(parts["stem"]), int(match[1]), depth, path))
    if len(files) > MAX_LENSES:
        raise PackError(f"{folder} holds {len(files):,} lenses; at most {MAX_LENSES:,} are read")
    known = set()
    with ThreadPoolExecutor(READERS) as pool:
        states = pool.map(lambda file: parse_lens(read_pt(file[3]), str(file[3].relative_to(folder))), files)
        for number, ((concept, level, depth, path), lens) in enumerate(zip(files, states, strict=True)):
            place = path.relative_to(folder).as_posix()
            if (concept, level, depth) in known:
                raise PackError(f"{folder}: {place} is a second lens for {concept!r} on level {level}; remove one")
            known.add((concept, level, depth))
            if advance and number % 50 == 49:
                advance(50, len(files))
            yield FoundLens(concept=concept, level=level, layer=depth, place=place, lens=lens)
    for one in _find_in_banks(folder):
        if (one.concept, one.level, one.layer) not in known:
            known.add((one.concept, one.level, one.layer))
            yield one


def _find_in_banks(folder: Path) -> Iterator[FoundLens]:
    for entry in _optional_json(folder, "bank_index.json").values():
        place = entry.get("bank_path") if isinstance(entry, dict) else None
        if not isinstance(place, str):
            raise PackError(f"{folder / 'bank_index.json'}: an entry without bank_path; the pack is damaged")
        match = re.search(r"(?:^|/)layer(\d{1,4})/", place)
        for concept, state in read_pt(safe_member(folder, place), max_bytes=MAX_BANK_BYTES).items():
            term, level = _split(str(concept))
            if not isinstance(state, dict) or (level is None and match is None):
                raise PackError(f"{folder / place}: {concept!r} is no lens of a level")
            yield FoundLens(
                concept=term,
                level=int(match[1]) if level is None and match else int(level or 0),
                layer=None,
                place=place,
                lens=parse_lens(state, f"{place}: {concept}"),
            )


def _names(found: list[FoundLens]) -> dict[tuple[str, int], str]:
    """Name of each concept and level: with the level where a pack repeats a name."""
    levels: dict[str, set[int]] = {}
    for one in found:
        levels.setdefault(one.concept, set()).add(one.level)
    return {
        (name, level): name if len(known) == 1 else f"{name}:{level}"
        for name, known in levels.items()
        for level in known
    }


def _stack(
    found: list[FoundLens],
    names: Mapping[tuple[str, int], str],
    layers: list[int],
    default: int,
    calibration: Mapping[str, Any],
) -> tuple[LensStack, list[str]]:
    """All lenses as one stack; a lens without a probe at a layer has the weight 0 there."""
    forms = {one.lens.form for one in found}
    if len(forms) > 1:
        kinds = "; ".join(str(dict(form))[:80] for form in list(forms)[:2])
        raise PackError(f"lenses of {len(forms)} forms ({kinds}), and a pack has one; import them apart")
    rows = {name: row for row, name in enumerate(dict.fromkeys(names[one.concept, one.level] for one in found))}
    place = {layer: index for index, layer in enumerate(layers)}
    shape = (len(rows), len(layers))
    lens = {n: torch.zeros(*shape, *t.shape) for n, t in found[0].lens.tensors.items()}
    width = found[0].lens.tensors["weight" if "weight" in lens else "w1"].shape[-1]
    gain, shift = torch.ones(*shape, width), torch.zeros(*shape, width)
    present_NL = torch.zeros(*shape)
    for one in found:
        at = rows[names[one.concept, one.level]], place[default if one.layer is None else one.layer]
        for name, tensor in one.lens.tensors.items():
            lens[name][at] = tensor
        if one.lens.norm is not None:
            gain[at], shift[at] = one.lens.norm
        present_NL[at] = 1
    hidden = 0 if "weight" in lens else lens["b1"].shape[-1]
    heads = [_head(lens, layer, hidden, width) for layer in range(len(layers))]
    if any(one.lens.norm is not None for one in found):
        heads = [head.fold_norm(gain[:, layer], shift[:, layer]) for layer, head in enumerate(heads)]
    # A bank takes the mean over all layers: a lens with fewer probes gets as much more weight for each.
    scale_NL = present_NL * len(layers) / present_NL.sum(1, keepdim=True)
    background, notes = _background(found, calibration)
    return LensStack(
        names=list(rows),
        layers=tuple(layers),
        heads=heads,
        scale_NL=scale_NL,
        offset_NL=torch.zeros(*shape),
        quantiles_NQ=background.quantiles_NQ,
        levels_Q=background.levels_Q,
    ), notes


def _background(found: list[FoundLens], calibration: Mapping[str, Any]) -> tuple[Background, list[str]]:
    """Quantiles of every lens's background logits, from those of its probabilities at even levels; else why not."""
    probes = calibration.get("probes")
    if not isinstance(probes, dict):
        return NO_BACKGROUND, []
    again = "collect states of a background and calibrate anew"
    if len({(one.concept, one.level) for one in found}) < len(found):
        # Each probe has its own, and nothing tells those of their mean.
        return NO_BACKGROUND, [f"the percentiles of concepts with several probes are left out; {again}"]
    if missing := [one.key for one in found if one.key not in probes]:
        return NO_BACKGROUND, [f"{len(missing)} lenses have no percentiles ({missing[0]}): all are left out; {again}"]
    kept = [_quantiles(one.key, probes[one.key]) for one in found]
    if len({len(values_Q) for values_Q in kept}) > 1:
        return NO_BACKGROUND, [f"percentiles of different fineness are left out; {again}"]
    logits_NE = torch.stack(kept).clamp(CLAMP, 1 - CLAMP).logit()
    levels_Q = torch.from_numpy(quantile_levels())
    place_Q = levels_Q * (logits_NE.shape[1] - 1)
    below_Q = place_Q.long().clamp_max(logits_NE.shape[1] - 2)
    quantiles_NQ = torch.lerp(logits_NE[:, below_Q], logits_NE[:, below_Q + 1], place_Q - below_Q).cummax(dim=1).values
    return Background(quantiles_NQ.float(), levels_Q.float()), []


def _quantiles(key: str, probe: Any) -> Tensor:
    values = probe.get("quantiles") if isinstance(probe, dict) else None
    if not isinstance(values, list) or not 2 <= len(values) <= MAX_QUANTILES:
        raise PackError(f"probe_calibration.json: {key} needs a list of 2 to {MAX_QUANTILES} quantiles")
    if not all(isinstance(x, int | float) and 0 <= x <= 1 for x in values) or values != sorted(values):
        raise PackError(f"probe_calibration.json: the quantiles of {key} are no rising probabilities")
    return torch.tensor(values, dtype=torch.float64)


def _head(lens: Mapping[str, Tensor], layer: int, hidden: int, width: int) -> Head:
    with torch.device("meta"):
        head = HeadConfig(family="mlp" if hidden else "linear", hidden=hidden).build(
            len(lens["bias" if not hidden else "b1"]), width
        )
    head.load_state_dict({name: tensor[:, layer].contiguous() for name, tensor in lens.items()}, assign=True)
    return head


def _metrics(folder: Path, found: list[FoundLens], names: Mapping[tuple[str, int], str]) -> dict[str, dict[str, Any]]:
    """What HatCat noted of each lens, under its own name: its figures are not FTW's, and were not taken held out."""
    notes: dict[str, dict[str, Any]] = {}
    for level in sorted({one.level for one in found}):
        results = _optional_json(folder, f"layer{level}/results.json").get("results", [])
        rows = results.items() if isinstance(results, dict) else [(None, row) for row in results]
        for key, row in rows:
            if isinstance(row, dict):
                name = names.get((str(row.get("concept", key)), level))
                if name:
                    notes.setdefault(name, {})["results"] = row
    for key, row in _inner(_optional_json(folder, "calibration.json"), "calibration").items():
        term, _, level = str(key).rpartition("_L")
        name = names.get((term, int(level))) if level.isascii() and level.isdigit() else None
        if name and isinstance(row, dict):
            notes.setdefault(name, {})["calibration"] = row
    return {name: {"hatcat": value} for name, value in notes.items()}


def _concepts(folder: Path, info: Mapping[str, Any], names: set[str]) -> tuple[ConceptPack | None, str]:
    """The bundled hierarchy, if there is one that can be read."""
    files = sorted(folder.glob("hierarchy/layer*.json"))
    if not files:
        return None, ""
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        (place / "hierarchy").mkdir()
        for file in [*files, folder / "hierarchy.json", folder / "hierarchy" / "hierarchy.json"]:
            if file.is_file() and not file.is_symlink():
                target = place / file.name if file.name == "hierarchy.json" else place / "hierarchy" / file.name
                shutil.copyfile(file, target)
        (place / "pack.json").write_text("{}", encoding="utf-8")
        try:
            pack = ConceptPack.load(place)
            kept = [name for name in pack.names if name in names]
            pack.pack_id = str(info.get("source_pack") or info.get("concept_pack_id") or folder.name)
            pack.info["pack_id"] = pack.pack_id
            return (pack if len(kept) == len(pack) else pack.subset(kept)), ""
        except FTWError as error:
            return None, f"its hierarchy is left out: {error}"


def _layer_of(info: Mapping[str, Any]) -> int | None:
    value = info.get("model_layer")
    return value if type(value) is int and 0 <= value < 10_000 else None


def _width(head: Head) -> int:
    return head.width


def _inner(value: Mapping[str, Any], key: str) -> dict[str, Any]:
    inner = value.get(key)
    return inner if isinstance(inner, dict) else {}


def _split(key: str) -> tuple[str, int | None]:
    for sign in (":", "_L"):
        term, found, level = key.rpartition(sign)
        if found and level.isascii() and level.isdigit() and len(level) <= 4:
            return term, int(level)
    return key, None


def _optional_json(folder: Path, name: str) -> dict[str, Any]:
    path = safe_member(folder, name)
    return read_json(path) if path.is_file() else {}
