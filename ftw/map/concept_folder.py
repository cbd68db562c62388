"""The First Light folder of a concept pack: which files there are, and how the concepts come out of them and go back.

    pack.json · hierarchy.json (strict tree, keys "Name:level") · hierarchy/layerN.json (records of level N)

Nothing is trusted: sizes before reading, nesting, types, names and paths. Nothing is lost: unknown keys and further
files are carried and written again.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from ftw.errors import ConceptError
from ftw.map.concept_record import MAX_LEVEL, Concept, read_record, split_key
from ftw.paths import replace_folder

MAX_FILE_BYTES = 256 * 2**20
MAX_CARRIED_BYTES = 64 * 2**20  # First Light's embedding index has 12 MB; a larger file is no part of an ontology

_LAYER_FILE = re.compile(r"layer(\d{1,4})\.json")


@dataclass(kw_only=True)
class PackFiles:
    """What a pack's folder holds beside `pack.json` and the records.

    Attributes:
        hierarchy: `hierarchy.json` with all its keys.
        heads: each layer file without its records.
        carried: further files, by path inside the folder; links and files over 64 MiB stay behind.
    """

    hierarchy: dict[str, Any] = field(default_factory=dict)
    heads: dict[int, dict[str, Any]] = field(default_factory=dict)
    carried: dict[str, bytes] = field(default_factory=dict)


def read_folder(folder: Path) -> tuple[dict[str, Any], list[Concept], PackFiles]:
    """`pack.json`, all concepts with their parents (the tree parent first), and the rest.

    Raises:
        ConceptError: files missing, too large, not JSON, or with records that cannot be read.
    """
    if not (folder / "pack.json").is_file():
        raise ConceptError(f"no concept pack in {folder}: it has no pack.json; build one with: ftw concepts build")
    info = _read_json(folder / "pack.json")
    for key in ("pack_id", "version"):
        if not isinstance(info.get(key, ""), str):
            raise ConceptError(f"{folder / 'pack.json'}: {key} must be text, got {info[key]!r}")
    heads: dict[int, dict[str, Any]] = {}
    concepts: list[Concept] = []
    for level, file in _layer_files(folder).items():
        head = _read_json(file)
        records = head.pop("concepts", None)
        if not isinstance(records, list):
            raise ConceptError(f"{file}: 'concepts' must be a list of records")
        heads[level] = head
        concepts += [read_record(record, level, str(file)) for record in records]
    tree = next(
        (file for file in (folder / "hierarchy.json", folder / "hierarchy/hierarchy.json") if file.is_file()), None
    )
    hierarchy = _read_json(tree) if tree else {}
    parent_of = _tree_edges(hierarchy, str(tree))
    concepts = _resolve(concepts, parent_of, info.get("names_with_level", []), str(tree or folder))
    known = {"pack.json", "hierarchy.json", *(f"hierarchy/layer{level}.json" for level in heads)}
    return info, concepts, PackFiles(hierarchy=hierarchy, heads=heads, carried=_read_carried(folder, known))


def write_folder(folder: Path, info: Mapping[str, Any], concepts: Iterable[Concept], files: PackFiles) -> None:
    """Write a pack whole or not at all.

    Raises:
        ConceptError: the folder already holds files that this pack does not carry and would lose.
    """
    layers = {level: {**head, "concepts": []} for level, head in files.heads.items()}
    for concept in concepts:
        layers.setdefault(concept.level, {"layer": concept.level, "concepts": []})["concepts"].append(concept.record)
    texts = {"pack.json": info, "hierarchy.json": files.hierarchy}
    texts |= {f"hierarchy/layer{level}.json": layer for level, layer in layers.items()}
    contents = {
        **files.carried,
        **{name: (json.dumps(value, indent=2) + "\n").encode() for name, value in texts.items()},
    }
    for name in contents:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ConceptError(f"concept pack for {folder}: the file name {name!r} leads out of the folder")
    if lost := sorted(set(_files(folder)) - contents.keys()):
        raise ConceptError(f"{folder} holds {len(lost)} files of something else ({lost[0]}, ...); save to a new folder")
    with replace_folder(folder) as fresh:
        for name, content in contents.items():
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            (fresh / name).write_bytes(content)


def build_hierarchy(concepts: Mapping[str, Concept]) -> dict[str, Any]:
    """`hierarchy.json` of some concepts: the tree that their first parents make."""
    key = {name: f"{concept.term}:{concept.level}" for name, concept in concepts.items()}
    parent_of = {key[name]: key[c.parents[0]] for name, c in concepts.items() if c.parents and c.parents[0] in key}
    children: dict[str, list[str]] = {}
    for child, parent in parent_of.items():
        children.setdefault(parent, []).append(child)
    leaves = [name for name in key.values() if name not in children]
    roots = [name for name in key.values() if name not in parent_of]
    return {
        "parent_to_children": children,
        "child_to_parent": parent_of,
        "leaf_concepts": leaves,
        "root_concepts": roots,
        "total_concepts": len(key),
        "total_leaves": len(leaves),
        "total_parents": len(children),
        "total_roots": len(roots),
    }


def count_levels(concepts: Iterable[Concept]) -> dict[str, Any]:
    """The counts that `pack.json` states under `concept_metadata`."""
    counts = Counter(concept.level for concept in concepts)
    return {
        "total_concepts": counts.total(),
        "layers": sorted(counts),
        "layer_distribution": {str(level): counts[level] for level in sorted(counts)},
    }


def _tree_edges(hierarchy: Mapping[str, Any], file: str) -> dict[str, str]:
    """Key of each child to the key of its tree parent."""
    listed = hierarchy.get("child_to_parent", {})
    if not listed and isinstance(below := hierarchy.get("parent_to_children"), dict):
        listed = {
            child: parent for parent, children in below.items() if isinstance(children, list) for child in children
        }
    if not isinstance(listed, dict):
        raise ConceptError(f"{file}: child_to_parent must map a concept to its parent, got {type(listed).__name__}")
    edges = {}
    for child, parent in listed.items():
        first = parent[0] if isinstance(parent, list) and parent else parent
        if not isinstance(first, str):
            raise ConceptError(f"{file}: the parent of concept {child!r} must be a name, got {str(parent)[:60]!r}")
        edges[child] = first
    return edges


def _resolve(concepts: list[Concept], parent_of: dict[str, str], levelled: object, file: str) -> list[Concept]:
    """Give namesakes their level as part of the name, and turn the files' words for parents into names."""
    levels: dict[str, list[int]] = {}
    for concept in concepts:
        if concept.level in levels.setdefault(concept.name, []):
            raise ConceptError(f"hierarchy/layer{concept.level}.json holds concept {concept.name!r} twice; remove one")
        levels[concept.name].append(concept.level)
    keep_level = set(map(str, levelled)) if isinstance(levelled, list) else set()

    def name_of(term: str, level: int) -> str:
        key = f"{term}:{level}"
        return key if len(levels[term]) > 1 or key in keep_level else term

    def find(word: str, below: int) -> str:
        """The concept that a word means to a child of level `below`; the word itself where nothing fits."""
        if word in levels:
            above = [level for level in levels[word] if level < below]
            return name_of(word, max(above, default=levels[word][0]))
        term, level = split_key(word)
        return name_of(term, level) if level is not None and level in levels.get(term, ()) else word

    resolved = []
    for concept in concepts:
        parents = [find(word, concept.level) for word in concept.parents]
        if tree := parent_of.pop(f"{concept.name}:{concept.level}", None) or parent_of.pop(concept.name, None):
            term, level = split_key(tree)
            known = level is not None and level in levels.get(term, ())
            parents.insert(0, name_of(term, level) if known and level is not None else find(tree, concept.level))
        name = name_of(concept.name, concept.level)
        resolved.append(replace(concept, name=name, parents=list(dict.fromkeys(parents))))
    if parent_of:
        raise ConceptError(f"{file}: concept {next(iter(parent_of))!r} stands in the tree, but no layer file has it")
    return resolved


def _layer_files(folder: Path) -> dict[int, Path]:
    """Layer files by level, ascending."""
    found = {int(match[1]): file for file in folder.glob("hierarchy/*") if (match := _LAYER_FILE.fullmatch(file.name))}
    if not found:
        raise ConceptError(f"no concepts in {folder}: it has no hierarchy/layer0.json, layer1.json, ...")
    if max(found) > MAX_LEVEL:
        raise ConceptError(f"{found[max(found)]}: level {max(found)} is beyond {MAX_LEVEL}; is this a concept pack?")
    return dict(sorted(found.items()))


def _files(folder: Path) -> list[str]:
    """Regular files of a folder, by path inside it; links are not followed."""
    if not folder.is_dir():
        return []
    found = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return sorted(path.relative_to(folder).as_posix() for path in found)


def _read_carried(folder: Path, known: set[str]) -> dict[str, bytes]:
    names = [name for name in _files(folder) if name not in known]
    return {name: (folder / name).read_bytes() for name in names if (folder / name).stat().st_size <= MAX_CARRIED_BYTES}


def _read_json(file: Path) -> dict[str, Any]:
    """A JSON object of bounded size and depth."""
    try:
        if (size := file.stat().st_size) > MAX_FILE_BYTES:
            raise ConceptError(f"{file} has {size:,} bytes (at most {MAX_FILE_BYTES:,}); is this a concept pack?")
        content = json.loads(file.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ConceptError(f"{file} is nested too deeply to be a concept pack") from error
    except (OSError, ValueError) as error:  # ValueError: not JSON, not UTF-8, or a number of thousands of digits
        raise ConceptError(f"cannot read {file}: {error}; fetch or build the concept pack again") from error
    if not isinstance(content, dict):
        raise ConceptError(f"{file} must hold a JSON object, got {type(content).__name__}")
    return content


def _refuse_constant(word: str) -> float:
    raise ValueError(f"{word} is not JSON")
