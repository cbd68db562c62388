"""Versions of a pack: what a number means, a hash for every lens, and what changed between two packs.

A lens's hash covers its weights and its calibration in float32, whatever file or row they stand in: a lens that was
left alone has the same hash in every version.

Axes: N lenses.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ftw.errors import PackError
from ftw.hat.store import LensStack
from ftw.map.installed import now

if TYPE_CHECKING:
    from ftw.map.pack import LensPack

FILE = "version_manifest.json"
_SEMVER = re.compile(r"(0|[1-9]\d{0,8})\.(0|[1-9]\d{0,8})\.(0|[1-9]\d{0,8})(-[0-9A-Za-z.-]+)?(\+[0-9A-Za-z.-]+)?")


@dataclass(frozen=True, kw_only=True)
class Version:
    """A semantic version (semver.org 2.0.0): major.minor.patch, a pre-release before it, a build beside it."""

    major: int
    minor: int
    patch: int
    pre: str = ""
    build: str = ""

    @classmethod
    def parse(cls, text: str) -> "Version":
        """Read one.

        Raises:
            PackError: it is none.
        """
        match = _SEMVER.fullmatch(text)
        if not match:
            raise PackError(f"{text!r:.40} is no version; write three numbers: 1.2.0, or 1.2.0-rc.1 before a release")
        major, minor, patch, pre, build = match.groups()
        pre, build = (pre or "").removeprefix("-"), (build or "").removeprefix("+")
        return cls(major=int(major), minor=int(minor), patch=int(patch), pre=pre, build=build)

    def __str__(self) -> str:
        pre, build = f"-{self.pre}" if self.pre else "", f"+{self.build}" if self.build else ""
        return f"{self.major}.{self.minor}.{self.patch}{pre}{build}"

    def next_patch(self) -> "Version":
        """The version after this one when lenses only became better."""
        return self if self.pre else Version(major=self.major, minor=self.minor, patch=self.patch + 1)

    @property
    def order(self) -> tuple[Any, ...]:
        """Orders versions by precedence: a pre-release stands before its release, its numbers count as numbers."""
        parts = [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in self.pre.split(".") if part]
        return (self.major, self.minor, self.patch, not self.pre, parts)

    @classmethod
    def sort_key(cls, text: str) -> tuple[Any, ...]:
        """Orders tags; what is no version stands first."""
        try:
            return (1, cls.parse(text).order)
        except PackError:
            return (0, (text,))


@dataclass(frozen=True, kw_only=True)
class History:
    """Earlier versions of a pack.

    Attributes:
        entries: for each version, oldest first, its number, time, and how many lenses came, changed and went.
        since: version that each lens is unchanged since.
    """

    entries: list[dict[str, Any]] = field(default_factory=list)
    since: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "History":
        """Read the file of a pack.

        Raises:
            PackError: it is no history.
        """
        entries, lenses = value.get("history"), value.get("lenses")
        if not isinstance(entries, list) or not isinstance(lenses, dict):
            raise PackError(f"{FILE} has no history and lenses; fetch the pack again")
        if not all(isinstance(entry, dict) for entry in [*entries, *lenses.values()]):
            raise PackError(f"{FILE} holds entries that are no objects; fetch the pack again")
        return cls(entries=entries, since={name: str(entry.get("since", "")) for name, entry in lenses.items()})


@dataclass(frozen=True, kw_only=True)
class PackDiff:
    """What changed from one pack to another.

    Attributes:
        added, retrained, removed, unchanged: lenses by name, in the order of the packs.
        metrics: for each lens in both, the figures that changed, as (before, after).
        recipe: fields of the recipe that differ, as (before, after).
        unchanged_bytes: weights and calibration that need not be fetched again.
    """

    added: list[str]
    retrained: list[str]
    removed: list[str]
    unchanged: list[str]
    metrics: dict[str, dict[str, tuple[Any, Any]]]
    recipe: dict[str, tuple[Any, Any]]
    unchanged_bytes: int

    def mean_change(self, figure: str) -> float | None:
        """Mean change of a figure over the lenses that have it before and after."""
        pairs = [change[figure] for change in self.metrics.values() if figure in change]
        numbers = [after - before for before, after in pairs if before is not None and after is not None]
        return sum(numbers) / len(numbers) if numbers else None


def lens_hashes(stack: LensStack) -> dict[str, str]:
    """Hash of every lens: its layers, the names and shapes of its tensors, and their numbers as float32."""
    tensors = _row_tensors(stack)
    modules = [module for module in (stack.basis, stack.trunk) if module is not None]
    shared = [*(tensor for module in modules for tensor in module.state_dict().values()), stack.levels_Q]
    head = hashlib.sha256(json.dumps([stack.layers, {n: list(t.shape[1:]) for n, t in tensors.items()}]).encode())
    for tensor in shared:
        head.update(_bytes(tensor))
    arrays = [tensor.detach().float().reshape(len(tensor), -1).contiguous().numpy() for tensor in tensors.values()]
    hashes = {}
    for row, name in enumerate(stack.names):
        digest = head.copy()
        for array in arrays:
            digest.update(array[row].data)
        hashes[name] = digest.hexdigest()
    return hashes


def diff(before: "LensPack", after: "LensPack") -> PackDiff:
    """What changed between two packs, lens by lens."""
    old, new = lens_hashes(before.stack), lens_hashes(after.stack)
    both = [name for name in new if name in old]
    unchanged = [name for name in both if old[name] == new[name]]
    row_bytes = sum(t[0].numel() * t.element_size() for t in _row_tensors(after.stack).values()) if new else 0
    metrics = {name: _changes(before.metrics.get(name, {}), after.metrics.get(name, {})) for name in both}
    return PackDiff(
        added=[name for name in new if name not in old],
        retrained=[name for name in both if old[name] != new[name]],
        removed=[name for name in old if name not in new],
        unchanged=unchanged,
        metrics={name: changes for name, changes in metrics.items() if changes},
        recipe=_changes(vars(before.recipe), vars(after.recipe)),
        unchanged_bytes=row_bytes * len(unchanged),
    )


def release(pack: "LensPack", version: str, *, previous: "LensPack | None" = None) -> "LensPack":
    """The pack as a version of its own, with what changed since the previous one in its history.

    Raises:
        PackError: no semantic version, or not above the previous one's.
    """
    number = Version.parse(version)
    if previous is None:
        return replace(pack, version=version, history=History())
    if number.order <= Version.parse(previous.version).order:
        raise PackError(f"version {version} is not above {previous.version}, which it follows; choose a higher one")
    changed = diff(previous, pack)
    since = {name: previous.history.since.get(name) or previous.version for name in changed.unchanged}
    counts = {key: len(getattr(changed, key)) for key in ("added", "retrained", "removed", "unchanged")}
    entries = previous.history.entries or [_entry(previous.version, {"added": len(previous.names)})]
    based_on = {"pack_id": previous.pack_id, "version": previous.version}
    return replace(
        pack,
        version=version,
        history=History(entries=[*entries, _entry(version, counts)], since=since),
        provenance={**pack.provenance, "based_on": based_on},
    )


def version_json(pack: "LensPack") -> dict[str, Any]:
    """What `version_manifest.json` of a pack says."""
    hashes, since = lens_hashes(pack.stack), pack.history.since
    created = str(pack.provenance.get("created", now()))
    entries = pack.history.entries or [_entry(pack.version, {"added": len(hashes)}, created=created)]
    lenses = {
        name: {"level": pack.levels.get(name, 0), "sha256": digest, "since": since.get(name) or pack.version}
        for name, digest in hashes.items()
    }
    return {"schema": 1, "pack_id": pack.pack_id, "version": pack.version, "history": entries, "lenses": lenses}


def _entry(version: str, counts: Mapping[str, int], *, created: str | None = None) -> dict[str, Any]:
    return {"version": version, "created": created or now(), **counts}


def _row_tensors(stack: LensStack) -> dict[str, Tensor]:
    calibration = {name: tensor for name, tensor in stack.calibration_tensors().items() if name != "levels"}
    pooling = {} if stack.pooling is None else stack.pooling.tensors()
    return {
        **stack.lens_tensors(),
        **{f"calibration.{name}": tensor for name, tensor in calibration.items()},
        **{f"pooling.{name}": tensor for name, tensor in pooling.items()},
    }


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().to(torch.float32).contiguous().flatten().numpy().data


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    keys = [*before, *(key for key in after if key not in before)]
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}
