"""Packs by name, from Python, on the default registry.

from ftw.map import registry

registry.list_lens_packs()
registry.pull_lens_pack("apertus-8b-first-light", version="1.2.0", levels=[0, 1])
pack = registry.load_lens_pack("apertus-8b-first-light", layer=2, concept="Deception")
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ftw.map.concept import ConceptPack
from ftw.map.installed import CONCEPT, LENS
from ftw.map.pack import LensPack, load_pack
from ftw.map.pack_registry import PackRegistry


def list_concept_packs() -> list[dict[str, Any]]:
    """Concept packs on this machine: name, source, version, revision, whether changed here, ..."""
    return PackRegistry().listed(CONCEPT)


def list_lens_packs() -> list[dict[str, Any]]:
    """Lens packs on this machine: name, source, version, revision, levels, whether changed here, ..."""
    return PackRegistry().listed(LENS)


def status() -> list[dict[str, Any]]:
    """All packs on this machine, and whether the Hub has newer ones."""
    return PackRegistry().status()


def pull_concept_pack(name: str, *, version: str | None = None, **options: Any) -> Path:
    """Bring a concept pack from the Hub; its folder. Options as `PackRegistry.pull`."""
    return PackRegistry().pull(CONCEPT, name, version=version, **options)


def pull_lens_pack(
    name: str, *, version: str | None = None, levels: Sequence[int] | None = None, **options: Any
) -> Path:
    """Bring a lens pack, or some levels of it, from the Hub; its folder. Options as `PackRegistry.pull`."""
    return PackRegistry().pull(LENS, name, version=version, levels=levels, **options)


def push_concept_pack(name: str, *, repo_id: str | None = None, private: bool = True) -> str:
    """Publish a concept pack of this machine on the Hub (`$HF_TOKEN`); the commit."""
    return PackRegistry().push(CONCEPT, name, repo_id=repo_id, private=private)


def push_lens_pack(name: str, *, repo_id: str | None = None, private: bool = True) -> str:
    """Publish a lens pack of this machine on the Hub (`$HF_TOKEN`); the commit."""
    return PackRegistry().push(LENS, name, repo_id=repo_id, private=private)


def load_concept_pack(name: str, *, version: str | None = None) -> ConceptPack:
    """A concept pack by name, pulled if it is not here."""
    return ConceptPack.load(PackRegistry().ensure(CONCEPT, name, version=version))


def load_lens_pack(
    name: str,
    *,
    version: str | None = None,
    levels: Sequence[int] | None = None,
    layer: int | None = None,
    concept: str | None = None,
) -> LensPack:
    """A lens pack by name, pulled if it is not here, or some of its lenses.

    Args:
        levels: of the hierarchy; None for all that are here. layer: a single one, as older packs call a level.
        concept: a single lens.

    Raises:
        PackError, SourceError: as `PackRegistry.pull`. ConceptError: no such lens, with the nearest names.
    """
    levels = [layer] if levels is None and layer is not None else levels
    pack = load_pack(PackRegistry().ensure(LENS, name, version=version, levels=levels), levels=levels)
    return pack if concept is None else pack.subset([concept])
