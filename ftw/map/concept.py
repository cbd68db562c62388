"""Concepts and the packs that hold them: an ontology as files, read and written in the First Light form.

A pack is `pack.json`, `hierarchy.json` (a strict tree) and `hierarchy/layerN.json` (records; a "layer" there is a
*level*). The tree is trusted first, then the records' `parent_concepts`; their lists of children are often stale and
never used. Reading is tolerant and writing lossless: what FTW does not know is kept as it came.
"""

import difflib
import functools
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ftw.errors import ConceptError
from ftw.map.concept_folder import PackFiles, build_hierarchy, count_levels, read_folder, write_folder
from ftw.map.concept_record import Concept, name_fault, trimmed_record, write_record

__all__ = ["Concept", "ConceptPack"]


@dataclass(kw_only=True)
class ConceptPack:
    """All concepts of an ontology with their hierarchy. A changed pack is a new pack: caches trust `concepts`.

    Attributes:
        pack_id, version: identity, as `pack.json` gives it.
        concepts: by name, in order of level, then as given.
        info: `pack.json` as read.
        files: the other files as read (the tree with its extra keys, heads of the layer files, further JSON).
    """

    pack_id: str
    version: str
    concepts: dict[str, Concept]
    info: dict[str, Any] = field(default_factory=dict)
    files: PackFiles = field(default_factory=PackFiles)

    def __post_init__(self) -> None:
        by_level = sorted(self.concepts.values(), key=lambda concept: concept.level)
        self.concepts = {c.name: replace(c, record=write_record(c)) for c in by_level}
        self.info = {**self.info, "pack_id": self.pack_id, "version": self.version}
        heads = {level: self.files.heads.get(level, {"layer": level}) for level in {*self.levels, *self.files.heads}}
        hierarchy = self.files.hierarchy or build_hierarchy(self.concepts)
        self.files = replace(self.files, hierarchy=hierarchy, heads=dict(sorted(heads.items())))

    @classmethod
    def of(cls, pack_id: str, version: str, concepts: Iterable[Concept], info: dict[str, Any]) -> "ConceptPack":
        """A new pack of some concepts, with their counts in its `pack.json`."""
        listed = list(concepts)
        known = info.get("concept_metadata")
        metadata = {**(known if isinstance(known, dict) else {}), **count_levels(listed)}
        if clash := [name for name, num in Counter(c.name for c in listed).items() if num > 1]:
            raise ConceptError(f"concept pack {pack_id!r} holds concept {clash[0]!r} twice; names must be unique")
        return cls(
            pack_id=pack_id,
            version=version,
            concepts={concept.name: concept for concept in listed},
            info={**info, "concept_metadata": metadata},
        )

    @classmethod
    def load(cls, folder: Path | str, *, strict: bool = True) -> "ConceptPack":
        """Read a pack in the First Light form.

        Args:
            folder: where `pack.json` is.
            strict: refuse a hierarchy that contradicts itself; otherwise `verify` lists what is wrong.

        Raises:
            ConceptError: damaged or hostile files, or (strict) contradictions; names the concept and the file.
        """
        folder = Path(folder)
        info, concepts, files = read_folder(folder)
        pack = cls(
            pack_id=info.get("pack_id", folder.name),
            version=info.get("version", "0.0.0"),
            concepts={concept.name: concept for concept in concepts},
            info=info,
            files=files,
        )
        if strict and (problems := pack.contradictions()):
            listed = "\n  ".join(problems[:5])
            raise ConceptError(
                f"concept pack {folder} contradicts itself in {len(problems)} places; list all with: "
                f"ftw concepts verify\n  {listed}"
            )
        return pack

    def save(self, folder: Path | str) -> None:
        """Write the pack in the First Light form, whole or not at all; loading it again gives an equal pack."""
        write_folder(Path(folder), self.info, self.concepts.values(), self.files)

    # --- names ---------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.concepts)

    def __contains__(self, name: object) -> bool:
        return name in self.concepts

    def __getitem__(self, name: str) -> Concept:
        """The concept of a name.

        Raises:
            ConceptError: there is none; the message names the nearest.
        """
        if name not in self.concepts:
            nearest = ", ".join(self.closest(name))
            raise ConceptError(
                f"concept pack {self.pack_id!r} has no concept {name!r} among its {len(self)}"
                + (f"; nearest: {nearest}" if nearest else "; list them with: ftw concepts show")
            )
        return self.concepts[name]

    @property
    def names(self) -> list[str]:
        """All names by level, then in the order given."""
        return list(self.concepts)

    @functools.cached_property
    def levels(self) -> dict[int, list[str]]:
        """Names of each level, ascending."""
        levels: dict[int, list[str]] = {}
        for concept in self.concepts.values():
            levels.setdefault(concept.level, []).append(concept.name)
        return levels

    @property
    def roots(self) -> list[str]:
        """Names of the concepts without parents."""
        return [name for name in self.concepts if not self.parents(name)]

    def closest(self, name: str, num: int = 4) -> list[str]:
        """Names spelt like `name`, nearest first, whatever their case."""
        folded: dict[str, list[str]] = defaultdict(list)
        for known in self.concepts:
            folded[known.casefold()].append(known)
        matches = difflib.get_close_matches(name.casefold(), folded, n=num)
        return [known for match in matches for known in folded[match]][:num]

    # --- hierarchy -----------------------------------------------------------------------------------------------

    def parents(self, name: str) -> list[str]:
        """Direct parents; the first is the parent in the tree."""
        return [parent for parent in self[name].parents if parent in self.concepts]

    def children(self, name: str) -> list[str]:
        """Direct children along all parents; those whose tree parent this is come first."""
        return self._children.get(self[name].name, [])

    def tree_children(self, name: str) -> list[str]:
        """Children in the tree: every concept but the roots is the tree child of exactly one other."""
        return [child for child in self.children(name) if self.parents(child)[0] == name]

    def siblings(self, name: str) -> list[str]:
        """The other tree children of its tree parent; for a root, the other roots."""
        parents = self.parents(name)
        family = self.tree_children(parents[0]) if parents else self.roots
        return [other for other in family if other != name]

    def ancestors(self, name: str) -> frozenset[str]:
        """Everything above, along all parents; without the concept itself."""
        return self._reach(self._ancestors, name, self.parents)

    def descendants(self, name: str) -> frozenset[str]:
        """Everything below, along all parents; without the concept itself."""
        return self._reach(self._descendants, name, self.children)

    def path(self, name: str) -> list[str]:
        """Names from the root to the concept, along tree parents."""
        path = [self[name].name]
        while (parents := self.parents(path[-1])) and parents[0] not in path:
            path.append(parents[0])
        return path[::-1]

    def antonyms(self, name: str) -> list[str]:
        """Concepts of the pack that the record calls antonyms."""
        relationships = self[name].record.get("relationships")
        listed = relationships.get("antonyms") if isinstance(relationships, dict) else None
        return [other for other in listed if other in self.concepts] if isinstance(listed, list) else []

    @functools.cached_property
    def _children(self) -> dict[str, list[str]]:
        in_tree: dict[str, list[str]] = defaultdict(list)
        beside: dict[str, list[str]] = defaultdict(list)
        for name in self.concepts:
            for place, parent in enumerate(self.parents(name)):
                (beside if place else in_tree)[parent].append(name)
        return {name: in_tree[name] + beside[name] for name in self.concepts}

    @functools.cached_property
    def _ancestors(self) -> dict[str, frozenset[str]]:
        return {}

    @functools.cached_property
    def _descendants(self) -> dict[str, frozenset[str]]:
        return {}

    def _reach(self, cache: dict[str, frozenset[str]], name: str, step: Callable[[str], list[str]]) -> frozenset[str]:
        """Everything reachable by `step`; a set known already is taken whole, and a cycle ends the walk."""
        if name not in cache:
            reached: set[str] = set()
            waiting = list(step(name))
            while waiting:
                other = waiting.pop()
                if other not in reached:
                    reached.add(other)
                    if other in cache:
                        reached |= cache[other]
                    else:
                        waiting.extend(step(other))
            cache[name] = frozenset(reached - {name})
        return cache[name]

    # --- parts and checks ----------------------------------------------------------------------------------------

    def subset(self, names: Iterable[str] | None = None, *, levels: Iterable[int] | None = None) -> "ConceptPack":
        """A pack of some concepts; each hangs below its nearest kept ancestors and keeps its level.

        Args:
            names: concepts to keep; None for all.
            levels: levels to keep; None for all. With both, a concept must satisfy both.

        Raises:
            ConceptError: an unknown name or level, or nothing left.
        """
        kept = set(self.concepts) if names is None else {self[name].name for name in names}
        if levels is not None:
            levels = set(levels)
            if unknown := levels - self.levels.keys():
                raise ConceptError(f"{self.pack_id!r} has no level {min(unknown)}; its levels are {list(self.levels)}")
            kept = {name for name in kept if self.concepts[name].level in levels}
        if not kept:
            raise ConceptError(f"nothing of {self.pack_id!r} is left; give names or levels that overlap")
        if len(kept) == len(self):
            return self
        terms = {self.concepts[name].term for name in kept}
        concepts = [
            replace(concept, parents=self._nearest_kept(name, kept), record=trimmed_record(concept.record, terms))
            for name, concept in self.concepts.items()
            if name in kept
        ]
        info = {**self.info, "subset_of": {"pack_id": self.pack_id, "content_hash": self.content_hash()}}
        if levelled := [concept.name for concept in concepts if concept.name != concept.term]:
            info["names_with_level"] = levelled  # a namesake that is left alone keeps the name its lens has
        return ConceptPack.of(self.pack_id, self.version, concepts, info)

    def _nearest_kept(self, name: str, kept: set[str]) -> list[str]:
        """Kept ancestors that no other kept ancestor stands below; the tree parent first.

        The tree parent is the nearest on the old path, else the deepest of those above the concept's level.
        """
        above = self.ancestors(name) & kept
        nearest = [other for other in self.concepts if other in above and not above & self.descendants(other)]
        tree = [other for other in reversed(self.path(name)[:-1]) if other in kept]
        rising = [other for other in reversed(nearest) if self._rises(other, name)]
        return list(dict.fromkeys([*(tree or rising)[:1], *nearest]))

    def content_hash(self) -> str:
        """sha256 over names, levels, parents, definitions and synsets; equal ontologies give equal hashes."""
        rows = [[c.name, c.level, c.parents, c.definition, c.synsets] for c in self.concepts.values()]
        return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()

    def contradictions(self) -> list[str]:
        """What makes the hierarchy unusable: missing parents, cycles, names unfit for files."""
        problems = []
        for name, concept in self.concepts.items():
            where = f"concept {name!r} in hierarchy/layer{concept.level}.json"
            if fault := name_fault(name):
                problems.append(f"{where}: its name {fault}")
            for parent in concept.parents:
                if parent not in self.concepts:
                    problems.append(f"{where}: its parent {parent!r} does not exist")
                elif parent == name or name in self.ancestors(parent):
                    problems.append(f"{where}: it stands above its own parent {parent!r}, a cycle")
        return problems

    def _rises(self, parent: str, child: str) -> bool:
        return self.concepts[parent].level < self.concepts[child].level

    def verify(self) -> list[str]:
        """Everything a person should know before trusting the pack: contradictions, then gaps; empty if all is well."""
        problems = self.contradictions()
        silent = [c for c in self.concepts.values() if not c.definition.strip()]
        if silent:
            leaves = sum(not self.children(concept.name) for concept in silent)
            first = ", ".join(concept.name for concept in silent[:3])
            problems.append(
                f"{len(silent)} of {len(self)} concepts have no definition, {leaves} of them leaves: {first}, ..."
            )
        for kind, places in (("tree", slice(0, 1)), ("further", slice(1, None))):
            flat = [
                (name, up) for name in self.concepts for up in self.parents(name)[places] if not self._rises(up, name)
            ]
            if flat:
                first = "; ".join(f"{up!r} above {name!r}" for name, up in flat[:3])
                problems.append(f"{len(flat)} {kind} parents are not of a lower level than their child: {first}")
        stated = self.info.get("concept_metadata")
        total = stated.get("total_concepts", len(self)) if isinstance(stated, dict) else len(self)
        if total != len(self):
            problems.append(f"pack.json states {total} concepts, the layer files hold {len(self)}")
        return problems

    # --- as text -------------------------------------------------------------------------------------------------

    def summary(self) -> str:
        """Name, size and the number of concepts of each level, for a terminal."""
        leaves = sum(not self.tree_children(name) for name in self.concepts)
        head = f"{self.pack_id} {self.version}: {len(self):,} concepts, {len(self.roots)} roots, {leaves:,} leaves"
        return "\n".join([head, *(f"  level {level}: {len(names):,}" for level, names in self.levels.items())])

    def tree(self, max_level: int | None = None) -> list[str]:
        """The tree as lines, two spaces a step; a concept cut off at `max_level` shows how many stand below it."""
        lines: list[str] = []
        waiting = [(name, 0) for name in reversed(self.roots)]
        while waiting:
            name, depth = waiting.pop()
            children = self.tree_children(name)
            shown = [child for child in children if max_level is None or self.concepts[child].level <= max_level]
            below = len(self.descendants(name)) if len(shown) < len(children) else 0
            lines.append("  " * depth + name + (f"  ({below:,} below)" if below else ""))
            waiting += [(child, depth + 1) for child in reversed(shown)]
        return lines
