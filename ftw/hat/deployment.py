"""Deployment manifests: which concepts a deployment may read, so that two of them stay comparable.

A manifest bounds how deep concepts are read, by default, by domain and by branch, and names concepts that are always or
never read. Two deployments on one manifest read the same concepts even where their packs differ; the fingerprint over
what is admitted is the evidence. The file is JSON; its word "layer" is a *level* of the hierarchy here. Fields that FTW
does not know are kept.

Patterns of branches: "*" is everything, "X" a concept and everything below it, "X/*" everything below it.
"""

import hashlib
import json
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from ftw.errors import ConfigError
from ftw.hat.lineage import Lineage
from ftw.paths import replace_file

PRIORITIES = ("low", "normal", "critical")
MAX_BYTES = 16 * 2**20


@dataclass(kw_only=True)
class PackRange:
    """Concept packs that the manifest is for."""

    pack_id: str = ""
    min_version: str | None = None
    max_version: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class LayerBounds:
    """Levels read by default, at most, and always."""

    default_max_layer: int = 2
    absolute_max_layer: int = 4
    always_load_layers: list[int] = field(default_factory=lambda: [0, 1])
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class DomainRule:
    """Deepest level read in a domain (a root of the hierarchy)."""

    max_layer: int
    priority: str = "normal"
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class BranchRule:
    """Deepest level read in a branch; of several the nearest to the concept holds, then the higher priority."""

    branch: str
    max_layer: int
    priority: str = "normal"
    reason: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class ExplicitConcepts:
    """Concepts read, or not read, whatever the rules say."""

    always_include: list[str] = field(default_factory=list)
    always_exclude: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class DynamicLoading:
    """How the aperture works; not enabled: everything admitted is read always."""

    enabled: bool = True
    parent_threshold: float = 0.7
    unload_threshold: float = 0.1
    cooldown_ticks: int = 100
    max_loaded_concepts: int = 2000
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class Comparability:
    """Manifests whose readings may be compared, on which levels, and the fingerprint of what was admitted."""

    comparable_with: list[str] = field(default_factory=list)
    comparison_layers: list[int] = field(default_factory=lambda: [0, 1, 2])
    fingerprint: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class ApertureRule:
    """Some branches, why, and for which assessor."""

    branches: list[str]
    reason: str = ""
    cat_scope: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class ApertureRules:
    """Branches that must, may and must not be read; what no rule names is not."""

    must_enable: list[ApertureRule] = field(default_factory=list)
    may_enable: list[ApertureRule] = field(default_factory=list)
    must_not_enable: list[ApertureRule] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Admission:
    """What a manifest admits of some concepts.

    Attributes:
        reasons: of every concept: the rule that admits it or keeps it out.
        admitted, required: names; the required ones (included, or `must_enable`) are read always.
        unknown: names in the manifest that no concept here has: packs differ, and a manifest outlives them.
    """

    reasons: dict[str, str]
    admitted: frozenset[str]
    required: frozenset[str]
    unknown: list[str]


@dataclass(kw_only=True)
class DeploymentManifest:
    """One deployment's rules, as its file has them.

    Attributes:
        aperture: None allows all branches. concept_calibration: kept as it came; packs hold their own calibration.
        extra: fields that FTW does not know.
    """

    manifest_id: str
    manifest_version: str = "1.0.0"
    created: str | None = None
    concept_pack: PackRange = field(default_factory=PackRange)
    layer_bounds: LayerBounds = field(default_factory=LayerBounds)
    domain_overrides: dict[str, DomainRule] = field(default_factory=dict)
    branch_rules: list[BranchRule] = field(default_factory=list)
    explicit_concepts: ExplicitConcepts = field(default_factory=ExplicitConcepts)
    dynamic_loading: DynamicLoading = field(default_factory=DynamicLoading)
    comparability: Comparability = field(default_factory=Comparability)
    aperture: ApertureRules | None = None
    concept_calibration: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def resolve(self, lineage: Lineage) -> Admission:
        """Admit concepts: exclude, include, absolute maximum, levels always read, branch, domain, default, siblings.

        The first rule that speaks holds. Then sibling coherence: where one child of a (tree) parent is admitted its
        siblings are, unless excluded, because a child is judged against its siblings.
        """
        rules = _Rules(self, lineage)
        verdicts = {name: rules.verdict(row) for row, name in enumerate(lineage.names)}
        admitted = {name for name, (is_in, _) in verdicts.items() if is_in}
        reasons = {name: reason for name, (_, reason) in verdicts.items()}
        for family in lineage.families:
            names = lineage.names_of(family)
            if first := next((name for name in names if name in admitted), None):
                for name in names:
                    if name not in admitted and not reasons[name].startswith("excluded"):
                        admitted.add(name)
                        reasons[name] = f"sibling of {first}"
        required = {name for row, name in enumerate(lineage.names) if row in rules.included and name in admitted}
        return Admission(
            reasons=reasons, admitted=frozenset(admitted), required=frozenset(required), unknown=rules.unknown
        )

    def save(self, path: Path | str) -> Path:
        """Write the file, whole or not at all, with every field it was read with."""
        with replace_file(Path(path)) as temporary:
            temporary.write_text(json.dumps(_plain(self), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return Path(path)

    @classmethod
    def load(cls, path: Path | str) -> "DeploymentManifest":
        """Read a file.

        Raises:
            ConfigError: no such file, no JSON, or a field of the wrong type or range; names the field.
        """
        path = Path(path)
        try:
            if path.stat().st_size > MAX_BYTES:
                raise ConfigError(f"manifest {path} has {path.stat().st_size} bytes; at most {MAX_BYTES} are read")
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"manifest {path} cannot be read ({error}); save one with .save(path)") from error
        return cls.from_json(values, where=f"manifest {path}")

    @classmethod
    def from_json(cls, values: Any, *, where: str = "manifest") -> "DeploymentManifest":
        """A manifest from plain data; `where` begins the errors' text."""
        manifest = _read(cls, values, where)
        _check(manifest, where)
        return manifest


def fingerprint(names: Iterable[str], levels: Mapping[str, int]) -> str:
    """sha256 over the sorted lines "name:level": equal for deployments that read the same concepts."""
    lines = sorted(f"{name}:{levels.get(name, 0)}" for name in names)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class _Rules:
    """A manifest's names turned into rows of one lineage."""

    def __init__(self, manifest: DeploymentManifest, lineage: Lineage) -> None:
        self._lineage, self._bounds = lineage, manifest.layer_bounds
        self.unknown: list[str] = []
        explicit, rules = manifest.explicit_concepts, manifest.aperture or ApertureRules()
        self.excluded = dict.fromkeys(self._known(explicit.always_exclude), "excluded by name")
        for row, reason in self._reach_all(rules.must_not_enable).items():
            self.excluded.setdefault(row, f"excluded by the aperture{reason}")
        self.included = {
            row: f"required by the aperture{why}" for row, why in self._reach_all(rules.must_enable).items()
        }
        self.included |= dict.fromkeys(self._known(explicit.always_include), "included by name")
        self._open = None
        if manifest.aperture is not None:
            self._open = {*self.included, *self._reach_all(rules.may_enable)}
        self._branches = self._branch_limits(manifest.branch_rules)
        self._domains = {row: manifest.domain_overrides[lineage.names[row]].max_layer
                         for row in self._known(manifest.domain_overrides)}  # fmt: skip

    def verdict(self, row: int) -> tuple[bool, str]:
        level, bounds = int(self._lineage.level_N[row]), self._bounds
        if row in self.excluded:
            return False, self.excluded[row]
        if row in self.included:
            return True, self.included[row]
        if self._open is not None and row not in self._open:
            return False, "excluded: the aperture does not name it"
        if level > bounds.absolute_max_layer:
            return False, f"level {level} is beyond absolute_max_layer {bounds.absolute_max_layer}"
        if level in bounds.always_load_layers:
            return True, f"level {level} is always read"
        limit, rule = bounds.default_max_layer, "default_max_layer"
        if row in self._branches:
            limit, rule = self._branches[row]
        elif (root := self._lineage.row(self._lineage.path(self._lineage.names[row])[0])) in self._domains:
            limit, rule = self._domains[root], f"domain {self._lineage.names[root]}"
        return level <= limit, f"level {level} against {limit} of {rule}"

    def _branch_limits(self, rules: list[BranchRule]) -> dict[int, tuple[int, str]]:
        """Limit of every concept in some branch, by the nearest rule."""
        best: dict[int, tuple[tuple[int, int, int], str]] = {}
        for rule in rules:
            root = self._lineage.row_of.get(rule.branch.removesuffix("/*"))
            depth = -1 if root is None else int(self._lineage.level_N[root])
            key = (depth, PRIORITIES.index(rule.priority), rule.max_layer)
            for row in self._reach(rule.branch):
                if row not in best or key > best[row][0]:
                    best[row] = (key, f"branch {rule.branch}")
        return {row: (key[2], words) for row, (key, words) in best.items()}

    def _reach_all(self, rules: list[ApertureRule]) -> dict[int, str]:
        return {
            row: f" ({rule.reason})" if rule.reason else ""
            for rule in rules
            for branch in rule.branches
            for row in self._reach(branch)
        }

    def _reach(self, pattern: str) -> Collection[int]:
        if pattern == "*":
            return range(len(self._lineage))
        name = pattern.removesuffix("/*")
        rows = [below for row in self._known([name]) for below in self._lineage.reach(row).tolist()]
        return rows if pattern.endswith("/*") else [*self._known([name]), *rows]

    def _known(self, names: Iterable[str]) -> list[int]:
        names = list(names)
        missing = [name for name in names if name not in self._lineage.row_of]
        self.unknown += [name for name in missing if name not in self.unknown]
        return [self._lineage.row_of[name] for name in names if name in self._lineage.row_of]


# --- files ---------------------------------------------------------------------------------------------------------


def _read(kind: Any, value: Any, where: str) -> Any:
    """A value as its type says, unknown fields in `extra`; an error names the field."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return (
            None if value is None else _read(next(kind for kind in arguments if kind is not type(None)), value, where)
        )
    if is_dataclass(kind) or origin is dict or kind is dict:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise _wrong(where, value, "an object")
        if not is_dataclass(kind):
            return {key: _read(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
        return _read_fields(kind, value, where)
    if origin is list:
        if not isinstance(value, list):
            raise _wrong(where, value, "a list")
        return [_read(arguments[0], item, f"{where}[{place}]") for place, item in enumerate(value)]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise _wrong(
            where, value, {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}[kind]
        )
    return value


def _read_fields(kind: Any, values: Mapping[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(kind)
    known = [entry.name for entry in fields(kind) if entry.name != "extra"]
    dot = ": " if kind is DeploymentManifest else "."
    found = {name: _read(hints[name], values[name], where + dot + name) for name in known if name in values}
    try:
        return kind(**found, extra={name: item for name, item in values.items() if name not in known})
    except TypeError as error:
        raise ConfigError(f"{where}: a field is missing ({str(error).split(': ')[-1]}); add it to the file") from error


def _plain(value: Any) -> Any:
    """Plain data: the fields, then what was kept beside them; what is None and was never given is left out."""
    if is_dataclass(value):
        known = {entry.name: getattr(value, entry.name) for entry in fields(value) if entry.name != "extra"}
        given = {name: _plain(item) for name, item in known.items() if item is not None}
        return given | value.extra  # pyright: ignore[reportAttributeAccessIssue] (every dataclass here has it)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _check(manifest: DeploymentManifest, where: str) -> None:
    """Ranges and words that types do not tell."""
    loading, bounds = manifest.dynamic_loading, manifest.layer_bounds
    for name in ("parent_threshold", "unload_threshold"):
        if not 0 <= getattr(loading, name) <= 1:
            raise _wrong(f"{where}: dynamic_loading.{name}", getattr(loading, name), "a number from 0 to 1")
    if loading.unload_threshold > loading.parent_threshold:
        raise _wrong(f"{where}: dynamic_loading.unload_threshold", loading.unload_threshold, "at most parent_threshold")
    numbers = {"dynamic_loading.cooldown_ticks": loading.cooldown_ticks}
    numbers |= {"dynamic_loading.max_loaded_concepts": loading.max_loaded_concepts}
    numbers |= {f"layer_bounds.{name}": getattr(bounds, name) for name in ("default_max_layer", "absolute_max_layer")}
    numbers |= {f"layer_bounds.always_load_layers[{n}]": level for n, level in enumerate(bounds.always_load_layers)}
    for name, value in numbers.items():
        if value < 0:
            raise _wrong(f"{where}: {name}", value, "0 or more")
    priorities = {f"branch_rules[{n}].priority": rule.priority for n, rule in enumerate(manifest.branch_rules)}
    priorities |= {
        f"domain_overrides.{name}.priority": rule.priority for name, rule in manifest.domain_overrides.items()
    }
    for name, value in priorities.items():
        if value not in PRIORITIES:
            raise _wrong(f"{where}: {name}", value, f"one of {', '.join(PRIORITIES)}")


def _wrong(where: str, value: Any, expected: str) -> ConfigError:
    return ConfigError(f"{where} is {value!r:.60}; expected {expected}")


# --- presets -------------------------------------------------------------------------------------------------------

# Branches of First Light that a safety audit reads to the ground; a pack without one of them simply has no such branch.
AUDITED = ("Deception", "Manipulation", "AttackPattern", "CyberOperation", "Safety")


def preset(name: str) -> DeploymentManifest:
    """A manifest by name: general-chat, safety-auditor, minimal-efficient or benchmark-v1.

    Raises:
        ConfigError: another name.
    """
    if name not in PRESETS:
        raise ConfigError(f"no deployment preset {name!r}; choose {', '.join(PRESETS)}, or load a file")
    return DeploymentManifest.from_json({"manifest_id": name, **PRESETS[name]}, where=f"preset {name}")


PRESETS: dict[str, dict[str, Any]] = {
    "general-chat": {},
    "safety-auditor": {
        "layer_bounds": {"default_max_layer": 3, "absolute_max_layer": 6, "always_load_layers": [0, 1, 2]},
        "branch_rules": [
            {"branch": branch, "max_layer": 6, "priority": "critical", "reason": "read to the ground"}
            for branch in AUDITED
        ],
        "dynamic_loading": {"parent_threshold": 0.5, "max_loaded_concepts": 4000},
    },
    "minimal-efficient": {
        "layer_bounds": {"default_max_layer": 1, "absolute_max_layer": 2, "always_load_layers": [0]},
        "dynamic_loading": {"cooldown_ticks": 20, "max_loaded_concepts": 500},
    },
    "benchmark-v1": {
        "layer_bounds": {"default_max_layer": 2, "absolute_max_layer": 2, "always_load_layers": [0, 1, 2]},
        "dynamic_loading": {"enabled": False},
        "comparability": {"comparison_layers": [0, 1, 2]},
    },
}
