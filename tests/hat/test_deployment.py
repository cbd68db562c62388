"""Manifests admit what their rules say, in the order they say it, and survive their files."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftw.errors import ConfigError
from ftw.hat.deployment import PRESETS, DeploymentManifest, fingerprint, preset
from ftw.hat.lineage import Lineage

PARENTS = {
    "Mind": [],
    "Matter": [],
    "Deception": ["Mind"],
    "Joy": ["Mind"],
    "Lie": ["Deception"],
    "Fraud": ["Deception"],
    "WhiteLie": ["Lie"],
    "BlackLie": ["Lie"],
    "Rock": ["Matter"],
    "Granite": ["Rock"],
    "PinkGranite": ["Granite"],
}
LEVELS = {"Mind": 0, "Matter": 0, "Deception": 1, "Joy": 1, "Rock": 1, "Lie": 2, "Fraud": 2, "Granite": 2}
LEVELS |= {"WhiteLie": 3, "BlackLie": 3, "PinkGranite": 3}


class Tree(dict[str, list[str]]):
    def parents(self, name: str) -> list[str]:
        return self[name]


LINEAGE = Lineage(list(PARENTS), LEVELS, Tree(PARENTS))
BOUNDS = {"default_max_layer": 1, "absolute_max_layer": 3, "always_load_layers": [0]}


def admitted(**fields: Any) -> set[str]:
    values = {"manifest_id": "test", "layer_bounds": BOUNDS, **fields}
    return set(DeploymentManifest.from_json(values).resolve(LINEAGE).admitted)


UPPER = {"Mind", "Matter", "Deception", "Joy", "Rock"}


def test_without_rules_the_default_level_is_the_limit():
    assert admitted() == UPPER


def test_a_branch_may_go_deeper_than_its_domain_and_a_domain_deeper_than_the_default():
    domain = {"Matter": {"max_layer": 3}}
    assert admitted(domain_overrides=domain) == UPPER | {"Granite", "PinkGranite"}
    branch = [{"branch": "Deception", "max_layer": 2}]
    assert admitted(branch_rules=branch) == UPPER | {"Lie", "Fraud"}
    shallow = [{"branch": "Rock", "max_layer": 2}]
    assert "PinkGranite" not in admitted(domain_overrides=domain, branch_rules=shallow)


def test_the_nearest_branch_rule_holds_then_the_higher_priority():
    rules = [
        {"branch": "Deception", "max_layer": 1},
        {"branch": "Lie", "max_layer": 3},
        {"branch": "*", "max_layer": 0},
    ]
    found = admitted(branch_rules=rules)
    assert {"WhiteLie", "BlackLie", "Lie", "Fraud"} <= found  # Fraud as the sibling of Lie
    assert "Granite" not in found
    twice = [{"branch": "Lie/*", "max_layer": 1, "priority": "low"}, {"branch": "Lie/*", "max_layer": 3}]
    assert "WhiteLie" in admitted(branch_rules=twice)
    assert "WhiteLie" not in admitted(branch_rules=[{**twice[0], "priority": "critical"}, twice[1]])


def test_the_absolute_maximum_beats_branches_and_include_beats_it():
    bounds = {**BOUNDS, "absolute_max_layer": 2}
    rules = [{"branch": "Lie", "max_layer": 9}]
    assert "WhiteLie" not in admitted(layer_bounds=bounds, branch_rules=rules)
    include = {"always_include": ["WhiteLie"]}
    assert {"WhiteLie", "BlackLie"} <= admitted(layer_bounds=bounds, explicit_concepts=include)


def test_exclude_beats_everything_siblings_included():
    explicit = {"always_include": ["Lie", "Fraud"], "always_exclude": ["Fraud", "Mind"]}
    found = admitted(explicit_concepts=explicit)
    assert "Lie" in found
    assert not {"Fraud", "Mind"} & found


def test_always_loaded_levels_beat_a_shallow_branch():
    bounds = {**BOUNDS, "always_load_layers": [0, 1]}
    assert "Rock" in admitted(layer_bounds=bounds, branch_rules=[{"branch": "Matter", "max_layer": 0}])


def test_an_aperture_admits_what_it_names_and_keeps_out_the_rest():
    rules = {
        "must_enable": [{"branches": ["Lie/*"], "reason": "audit"}],
        "may_enable": [{"branches": ["Mind"]}],
        "must_not_enable": [{"branches": ["Joy"]}],
    }
    manifest = DeploymentManifest.from_json({"manifest_id": "t", "layer_bounds": BOUNDS, "aperture": rules})
    found = manifest.resolve(LINEAGE)
    assert found.admitted == {"Mind", "Deception", "WhiteLie", "BlackLie"}
    assert found.required == {"WhiteLie", "BlackLie"}
    assert "audit" in found.reasons["WhiteLie"]
    assert "does not name it" in found.reasons["Rock"]


def test_names_that_a_pack_lacks_are_told_and_harm_nothing():
    manifest = DeploymentManifest.from_json(
        {"manifest_id": "t", "branch_rules": [{"branch": "Dragon/*", "max_layer": 3}],
         "explicit_concepts": {"always_include": ["Unicorn"]}}
    )  # fmt: skip
    assert set(manifest.resolve(LINEAGE).unknown) == {"Dragon", "Unicorn"}


NAMES = st.lists(st.sampled_from(list(PARENTS)), max_size=4)
BRANCHES = st.lists(
    st.fixed_dictionaries(
        {"branch": st.sampled_from(["*", *PARENTS, *(f"{name}/*" for name in PARENTS)]), "max_layer": st.integers(0, 4)}
    ),
    max_size=4,
)


@settings(max_examples=80, deadline=None)
@given(include=NAMES, exclude=NAMES, branches=BRANCHES, absolute=st.integers(0, 3), default=st.integers(0, 3))
def test_families_are_admitted_whole_but_for_the_excluded(
    include: list[str], exclude: list[str], branches: list[dict[str, Any]], absolute: int, default: int
):
    found = admitted(
        layer_bounds={"default_max_layer": default, "absolute_max_layer": absolute, "always_load_layers": [0]},
        explicit_concepts={"always_include": include, "always_exclude": exclude},
        branch_rules=branches,
    )
    assert not found & set(exclude)
    assert set(include) - set(exclude) <= found
    for family in LINEAGE.families:
        names = set(LINEAGE.names_of(family)) - set(exclude)
        assert names <= found or not names & found
    beyond = {name for name in found if LEVELS[name] > absolute}
    assert not beyond or set(include) - set(exclude)  # only what is included by name, and its siblings


@pytest.mark.parametrize("name", PRESETS)
def test_presets_resolve_and_round_trip(name: str, tmp_path: Path):
    manifest = preset(name)
    assert DeploymentManifest.load(manifest.save(tmp_path / "m.json")) == manifest
    assert {"Mind", "Matter"} <= manifest.resolve(LINEAGE).admitted


def test_presets_differ_as_they_say():
    assert preset("minimal-efficient").dynamic_loading.max_loaded_concepts == 500
    assert not preset("benchmark-v1").dynamic_loading.enabled
    assert "WhiteLie" in preset("safety-auditor").resolve(LINEAGE).admitted
    with pytest.raises(ConfigError, match="general-chat"):
        preset("chat")


def test_what_ftw_does_not_know_is_kept(tmp_path: Path):
    values = {
        "manifest_id": "m",
        "signed_by": {"name": "us", "keys": [1, 2]},
        "layer_bounds": {"default_max_layer": 1, "soft_max_layer": 9},
        "branch_rules": [{"branch": "Mind", "max_layer": 2, "owner": "x"}],
        "concept_calibration": {"Mind": {"gen_fire_rate": 0.25}},
    }
    (tmp_path / "in.json").write_text(json.dumps(values))
    written = json.loads(DeploymentManifest.load(tmp_path / "in.json").save(tmp_path / "out.json").read_text())
    assert written["signed_by"] == values["signed_by"]
    assert written["layer_bounds"]["soft_max_layer"] == 9
    assert written["branch_rules"][0]["owner"] == "x"
    assert written["concept_calibration"] == values["concept_calibration"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([], "manifest is .*expected an object"),
        ({}, "manifest_id"),
        ({"manifest_id": 3}, "manifest_id is 3; expected a text"),
        ({"layer_bounds": {"default_max_layer": "two"}}, r"layer_bounds\.default_max_layer is 'two'; .*whole number"),
        ({"layer_bounds": {"default_max_layer": True}}, r"default_max_layer is True"),
        ({"layer_bounds": {"always_load_layers": [0, -1]}}, r"always_load_layers\[1\] is -1"),
        ({"branch_rules": [{"branch": "X"}]}, r"branch_rules\[0\].*max_layer"),
        ({"branch_rules": [{"branch": "X", "max_layer": 1, "priority": "high"}]}, r"branch_rules\[0\]\.priority"),
        ({"dynamic_loading": {"parent_threshold": 1.5}}, r"dynamic_loading\.parent_threshold is 1.5"),
        ({"dynamic_loading": {"parent_threshold": 0.1, "unload_threshold": 0.2}}, "unload_threshold"),
        ({"dynamic_loading": {"parent_threshold": float("nan")}}, "parent_threshold is nan"),
        ({"domain_overrides": {"Mind": 3}}, r"domain_overrides\.Mind is 3; expected an object"),
        ({"aperture": {"must_enable": [{"branches": "X"}]}}, r"aperture\.must_enable\[0\]\.branches is 'X'"),
    ],
)
def test_an_error_names_the_field(values: Any, words: str):
    given = {"manifest_id": "m", **values} if isinstance(values, dict) and values else values
    with pytest.raises(ConfigError, match=words):
        DeploymentManifest.from_json(given)


def test_damaged_files_are_refused(tmp_path: Path):
    for text in ("", "{", '{"manifest_id": "m", "layer_bounds": ' + "[" * 100_000):
        (tmp_path / "m.json").write_text(text)
        with pytest.raises(ConfigError, match="cannot be read"):
            DeploymentManifest.load(tmp_path / "m.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        DeploymentManifest.load(tmp_path / "none.json")


def test_a_fingerprint_is_of_the_set_and_of_the_levels():
    one = fingerprint(["Mind", "Joy"], LEVELS)
    assert one == fingerprint(["Joy", "Mind"], LEVELS)
    assert len(one) == 64
    assert one != fingerprint(["Mind", "Joy"], {**LEVELS, "Joy": 2})
    assert one != fingerprint(["Mind"], LEVELS)
