"""A lens pack: trained lenses with everything needed to read with them, and to know what they are worth.

A folder of safetensors and JSON (layout in `LensPack.save`), verified by hash on load. It names the substrate it was
trained on, by fingerprint, and reads on no other. Nothing in it is code.

Axes: N lenses, L layers.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ftw import paths
from ftw.errors import FTWError, PackError
from ftw.hat.bank import LensBank
from ftw.hat.lens import HeadConfig
from ftw.hat.pooling import Pooling, pooling_from_tensors
from ftw.hat.store import LensStack, head_of, quantised, read_tensors, stack_from_tensors, write_tensors
from ftw.hat.temporal.bank import POOLS, PooledTokens, SequenceReader
from ftw.hat.temporal.pooled_windows import PooledWindows
from ftw.hat.text import TextBank
from ftw.hat.text_embedding import FAMILIES, AnyText, EmbeddingBank
from ftw.map import versions
from ftw.map.concept import ConceptPack
from ftw.map.levels import InstalledRows, installed_rows
from ftw.map.manifest import level_of, read_json, safe_member, write_manifest
from ftw.map.recipe import PER_LENS, Recipe
from ftw.map.verified import verify_pack
from ftw.map.versions import History
from ftw.substrate.model import Substrate

SCHEMA = 1


@dataclass(kw_only=True)
class LensPack:
    """N lenses with their recipe, concepts, text lenses and metrics.

    Attributes:
        pack_id, version: name and semantic version.
        stack: the lenses. recipe: how they were made.
        levels: level of each concept in its hierarchy.
        concepts: the concept pack, or None (labelled data has no hierarchy).
        text: one text lens a concept, or None.
        metrics: held-out figures by concept. mean_metrics: their means, with intervals of their own.
        history: earlier versions. stored: precision of the weights on disk.
        provenance: command, versions, inputs with hashes, time; plain data.
    """

    pack_id: str
    version: str
    stack: LensStack
    recipe: Recipe
    levels: dict[str, int]
    concepts: ConceptPack | None = None
    text: AnyText | None = None
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    mean_metrics: dict[str, Any] = field(default_factory=dict)
    history: History = field(default_factory=History)
    stored: str = "float32"
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The concepts that it reads."""
        return self.stack.names

    def bank(self) -> LensBank:
        """The lenses as one module."""
        return self.stack.bank()

    def reader(self, *, precision: str = "auto", device: torch.device | None = None) -> SequenceReader:
        """The lenses as what reads windows: sequence lenses, or those of texts, which read a window as a text.

        Args:
            precision, device: of sequence lenses while they read (see `SequenceBank.stored`); others read in float32.
        """
        stack, pool = self.stack, self.recipe.pooling
        if stack.reads_sequences:
            return stack.sequence_bank().stored(precision, device)
        if stack.pooling is not None:
            return PooledWindows(stack.bank(), stack.heads, stack.pooling)
        return PooledTokens(stack.bank(), pool if pool in POOLS else "mean")

    def check(self, substrate: Substrate) -> None:
        """Refuse another substrate than the one the lenses were trained on.

        Raises:
            PackError: naming what differs.
        """
        check_substrate(self.pack_id, self.recipe, substrate)

    def save(self, folder: Path | str) -> Path:
        """Write the pack, whole or not at all.

        pack_info.json                      id, version, recipe, levels, provenance
        hierarchy/                          the concept pack
        basis.safetensors                   when the recipe has one
        trunk.safetensors                   when the lenses share an encoder of sequences
        layer<level>/lenses.safetensors     stacked tensors of that level, axis 0 = row
        layer<level>/pooling.safetensors    how whole texts are read, where that is more than a mean
        layer<level>/results.json           row -> concept, with metrics
        calibration.safetensors             rows in the order of the levels
        text.safetensors, text.json         text lenses
        version_manifest.json               hash of every lens, and what changed in each version
        MANIFEST.json                       size and sha256 of every file
        """
        folder = Path(folder)
        by_level = self._rows_by_level()
        with paths.replace_folder(folder) as temporary:
            for level, names in by_level.items():
                self._save_level(temporary / f"layer{level}", level, names)
            ordered = [name for names in by_level.values() for name in names]
            write_tensors(temporary / "calibration.safetensors", self.stack.rows(ordered).calibration_tensors())
            if self.stack.basis is not None:
                write_tensors(temporary / "basis.safetensors", dict(self.stack.basis.state_dict()))
            if self.stack.trunk is not None:
                write_tensors(temporary / "trunk.safetensors", dict(self.stack.trunk.state_dict()))
            if self.concepts is not None:
                self.concepts.save(temporary / "hierarchy")
            if self.text is not None:
                text = self.text.subset(ordered)
                write_tensors(temporary / "text.safetensors", text.tensors())
                _write_json(temporary / "text.json", text.description())
            _write_json(temporary / "pack_info.json", self._info(by_level))
            _write_json(temporary / versions.FILE, versions.version_json(self))
            write_manifest(temporary)
        return folder

    def _save_level(self, folder: Path, level: int, names: list[str]) -> None:
        """The lenses of one level, how they read texts, and what each is worth."""
        part = self.stack.rows(names)
        write_tensors(folder / "lenses.safetensors", quantised(part.lens_tensors(), self.stored))
        if part.pooling is not None:
            write_tensors(folder / "pooling.safetensors", part.pooling.tensors())
        results = [
            {"concept": name, "row": row, "metrics": self.metrics.get(name, {})} for row, name in enumerate(names)
        ]
        _write_json(folder / "results.json", {"level": level, "results": results})

    def _info(self, by_level: dict[int, list[str]]) -> dict[str, Any]:
        """What the pack says of itself."""
        concepts = self.concepts
        return {
            "schema": SCHEMA,
            "pack_id": self.pack_id,
            "version": self.version,
            "levels": {str(level): len(names) for level, names in by_level.items()},
            "concept_pack": None
            if concepts is None
            else {"pack_id": concepts.pack_id, "version": concepts.version, "sha256": concepts.content_hash()},
            "recipe": asdict(self.recipe),
            "stored": self.stored,
            "metrics": self.mean_metrics,
            "provenance": self.provenance,
        }

    @classmethod
    def load(cls, folder: Path | str, *, levels: Sequence[int] | None = None) -> "LensPack":
        """Read a pack, or some levels of it.

        Raises:
            PackError: the pack is damaged, hostile, of another version, or has no such level.
        """
        folder = Path(folder)
        _, files = verify_pack(folder, only=[])
        info = read_info(folder)
        try:
            here = installed_rows(folder, info, levels)
            verify_pack(folder, only={name for name in files if level_of(name) in {None, *here.levels}})
            recipe = Recipe.from_json(info["recipe"])
            names_of = read_rows(folder, here.levels)
            stack = _read_stack(folder, recipe, names_of, here)
            return cls(
                pack_id=str(info["pack_id"]),
                version=str(info["version"]),
                stack=stack,
                recipe=recipe,
                levels={name: level for level, rows in names_of.items() for name in rows},
                concepts=read_concepts(folder, info["concept_pack"]),
                text=read_text(folder, stack.names, here),
                metrics={name: metrics for rows in names_of.values() for name, metrics in rows.items()},
                mean_metrics=dict(info.get("metrics", {})),
                history=_read_history(folder),
                stored=_precision(info.get("stored", "float32")),
                provenance=dict(info["provenance"]),
            )
        except PackError:
            raise
        except FTWError as error:  # of the concept pack inside
            raise PackError(f"pack {folder}: {error}") from error
        except (
            LookupError,
            TypeError,
            ValueError,
            AttributeError,
            RuntimeError,
            ArithmeticError,
            OSError,
            MemoryError,
        ) as error:
            raise PackError(
                f"pack {folder} contradicts its own index ({type(error).__name__}: {error}); fetch it again"
            ) from error

    def subset(self, names: Sequence[str]) -> "LensPack":
        """The pack of some of its lenses.

        Raises:
            PackError: none is left. ConceptError: a name that it does not read, with the nearest.
        """
        if not names:
            raise PackError(
                f"pack {self.pack_id!r} has no such concepts; its levels are {sorted(set(self.levels.values()))}"
            )
        return LensPack(
            pack_id=self.pack_id,
            version=self.version,
            stack=self.stack.rows(names),
            recipe=self.recipe,
            levels={name: self.levels[name] for name in names},
            concepts=self.concepts,
            text=None if self.text is None else self.text.subset(names),
            metrics={name: self.metrics[name] for name in names if name in self.metrics},
            stored=self.stored,
            provenance=self.provenance,
        )

    def _rows_by_level(self) -> dict[int, list[str]]:
        by_level: dict[int, list[str]] = {}
        for name in self.names:
            by_level.setdefault(self.levels.get(name, 0), []).append(name)
        return dict(sorted(by_level.items()))


def check_substrate(pack_id: str, recipe: Recipe, substrate: Substrate) -> None:
    """Refuse another substrate than the one of a recipe.

    Raises:
        PackError: naming what differs.
    """
    if recipe.fingerprint != substrate.fingerprint:
        width = f", width {recipe.width} against {substrate.width}" if recipe.width != substrate.width else ""
        raise PackError(
            f"lens pack {pack_id!r} was trained on {recipe.substrate!r} (fingerprint "
            f"{recipe.fingerprint[:12]}), not on {substrate.name!r} ({substrate.fingerprint[:12]}){width}; "
            "load that substrate, or train a pack for this one"
        )


def read_info(folder: Path) -> dict[str, Any]:
    """The pack_info.json of a pack.

    Raises:
        PackError: it is not readable, or of another version of the format.
    """
    info = read_json(folder / "pack_info.json")
    if info.get("schema") != SCHEMA:
        raise PackError(
            f"pack {folder} has schema {info.get('schema')!r}; this FTW reads {SCHEMA}; update FTW or train it again"
        )
    return info


def load_pack(folder: Path | str, *, levels: Sequence[int] | None = None) -> LensPack:
    """Load a lens pack from a folder, verified by hash."""
    return LensPack.load(folder, levels=levels)


def read_rows(folder: Path, levels: Mapping[int, int]) -> dict[int, dict[str, dict[str, Any]]]:
    """Concept -> metrics for each level, in row order.

    Raises:
        PackError: index and declared numbers disagree.
    """
    rows_of = {}
    for level, num in sorted(levels.items()):
        path = safe_member(folder, f"layer{level}/results.json")
        results = read_json(path)["results"]
        names = [str(row["concept"]) for row in results]
        if len(set(names)) != len(names) or len(names) != num:
            raise PackError(f"{path} lists {len(names)} rows ({len(set(names))} concepts); pack_info.json says {num}")
        if [row["row"] for row in results] != list(range(num)):
            raise PackError(f"{path}: rows are not 0 to {num - 1} in order; fetch or train the pack again")
        rows_of[level] = {name: dict(row.get("metrics", {})) for name, row in zip(names, results, strict=True)}
    return rows_of


def _read_stack(
    folder: Path, recipe: Recipe, names_of: Mapping[int, Mapping[str, Any]], here: InstalledRows
) -> LensStack:
    names = [name for rows in names_of.values() for name in rows]
    if len(set(names)) != len(names):
        raise PackError(f"pack {folder}: a concept stands on two levels; fetch the pack again")
    parts = []
    for level, rows in names_of.items():
        tensors = read_tensors(safe_member(folder, f"layer{level}/lenses.safetensors"))
        for name, tensor in tensors.items():
            if tensor.ndim == 0 or len(tensor) != len(rows):
                raise PackError(
                    f"pack {folder}: layer{level} has {len(rows)} rows in its index, another number in {name!r}"
                )
            if not tensor.is_floating_point() and not (tensor.dtype == torch.int8 and f"{name}_step" in tensors):
                raise PackError(f"pack {folder}: tensor {name!r} of layer{level} is {tensor.dtype}; weights are floats")
        parts.append(tensors)
    if len({frozenset((name, t.dtype, t.shape[1:]) for name, t in part.items()) for part in parts}) > 1:
        raise PackError(f"pack {folder}: its levels differ in the names, types or shapes of their tensors")
    lens = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    stack = stack_from_tensors(
        names=names,
        layers=tuple(recipe.layers),
        width=recipe.width,
        head=HeadConfig(family=recipe.family, hidden=recipe.hidden),
        lens=lens,
        calibration=here.of(read_tensors(safe_member(folder, "calibration.safetensors")), str(folder)),
        basis=read_tensors(safe_member(folder, "basis.safetensors")) if recipe.basis_rank else None,
        basis_rank=recipe.basis_rank,
        trunk=read_tensors(safe_member(folder, "trunk.safetensors")) if recipe.family == "trunk_lstm" else None,
        where=str(folder),
    )
    return replace(stack, pooling=_read_pooling(folder, recipe, names_of))


def _read_pooling(folder: Path, recipe: Recipe, names_of: Mapping[int, Mapping[str, Any]]) -> Pooling | None:
    if recipe.pooling != PER_LENS:
        return None
    parts = [read_tensors(safe_member(folder, f"layer{level}/pooling.safetensors")) for level in names_of]
    shared = set(parts[0]).intersection(*parts)
    return pooling_from_tensors(
        {name: torch.cat([part[name] for part in parts]) for name in shared},
        num_lenses=sum(map(len, names_of.values())),
        num_layers=len(recipe.layers),
        width=recipe.width,
        where=str(folder),
    )


def read_concepts(folder: Path, listed: Mapping[str, Any] | None) -> ConceptPack | None:
    if listed is None:
        return None
    concepts = ConceptPack.load(folder / "hierarchy")
    if concepts.content_hash() != listed["sha256"]:
        raise PackError(
            f"pack {folder}: its hierarchy is not the concept pack that pack_info.json names; fetch it again"
        )
    return concepts


def _precision(word: object) -> str:
    if word not in ("float32", "bfloat16", "float16", "int8"):
        raise PackError(f"pack_info.json says stored={word!r:.20}, which is no precision; fetch the pack again")
    return str(word)


def _read_history(folder: Path) -> History:
    path = safe_member(folder, versions.FILE)
    return History.from_json(read_json(path)) if path.is_file() else History()


def read_text(folder: Path, names: list[str], here: InstalledRows) -> AnyText | None:
    if not (folder / "text.json").is_file():
        return None
    tensors = read_tensors(safe_member(folder, "text.safetensors"))
    for name, tensor in tensors.items():
        if tensor.is_floating_point() == (name in ("row_starts", "lenses")) or not torch.isfinite(tensor).all():
            raise PackError(
                f"pack {folder}: text tensor {name!r} is {tensor.dtype} or holds numbers that are not finite"
            )
    description = read_json(folder / "text.json")
    kind = EmbeddingBank if description.get("family") in FAMILIES else TextBank
    text = kind.from_tensors(tensors, description)
    if len(text) != here.total or [name for rows in here.rows for name in text.names[rows]] != names:
        raise PackError(f"pack {folder}: its text lenses are not those of its concepts; fetch the pack again")
    return text if len(names) == here.total else text.subset(names)


def head_fields(stack: LensStack) -> dict[str, Any]:
    """Family and hidden width of a stack, as a recipe records them."""
    head = head_of(stack)
    return {"family": head.family, "hidden": head.hidden}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
