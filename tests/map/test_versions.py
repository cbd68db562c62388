"""Versions order as semver says, and a lens's hash changes exactly when the lens does."""

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_pack import make_pack

from ftw.errors import PackError
from ftw.map.manifest import read_json
from ftw.map.pack import load_pack
from ftw.map.versions import FILE, Version, diff, lens_hashes, release

# The order that semver.org 2.0.0 gives as its example, and releases around it.
PRE = ["alpha", "alpha.1", "alpha.beta", "beta", "beta.2", "beta.11", "rc.1"]
ASCENDING = [*(f"1.0.0-{pre}" for pre in PRE), "1.0.0", "1.0.1", "1.2.0", "2.0.0"]


def test_versions_order_as_semver_says():
    assert sorted(sorted(ASCENDING), key=Version.sort_key) == ASCENDING
    assert [str(Version.parse(version)) for version in ASCENDING] == ASCENDING
    assert str(Version.parse("1.2.3").next_patch()) == "1.2.4"


@pytest.mark.parametrize(
    "text", ["", "1", "1.2", "01.2.3", "1.2.3.4", "v1.2.3", "1.2.-3", "1.2.3 ", "latest", "9" * 40]
)
def test_what_is_no_version_is_refused(text: str):
    with pytest.raises(PackError, match="three numbers"):
        Version.parse(text)


@given(st.text(max_size=12))
def test_any_text_is_a_version_that_writes_itself_or_an_error(text: str):
    with contextlib.suppress(PackError):
        assert str(Version.parse(text)) == text


@pytest.mark.parametrize("kind", [{}, {"hidden": 6}, {"rank": 5}], ids=str)
def test_a_lens_keeps_its_hash_wherever_it_stands_and_changes_it_with_any_number(tmp_path: Path, kind: dict):
    pack = make_pack(**kind)
    hashes = lens_hashes(pack.stack)
    assert len(set(hashes.values())) == len(pack.names)
    again = load_pack(pack.save(tmp_path / "pack"))
    assert lens_hashes(again.stack) == hashes
    assert lens_hashes(again.subset(pack.names[2:4]).stack) == {name: hashes[name] for name in pack.names[2:4]}
    written = read_json(tmp_path / "pack" / FILE)["lenses"]
    assert {name: entry["sha256"] for name, entry in written.items()} == hashes
    for change in ("scale_NL", "quantiles_NQ", "threshold_N"):
        other = make_pack(**kind)
        tensor = getattr(other.stack, change)
        tensor[3] += 1e-3
        assert [name for name, digest in lens_hashes(other.stack).items() if digest != hashes[name]] == ["concept3"]


def test_a_diff_names_what_came_went_and_changed():
    before, after = make_pack(), make_pack()
    after.stack.threshold_N[2] += 1
    after.metrics["concept2"]["auroc"] = 0.99
    after = after.subset([name for name in after.names if name != "concept5"])
    before = before.subset([name for name in before.names if name != "concept0"])
    changed = diff(before, after)
    assert (changed.added, changed.retrained, changed.removed) == (["concept0"], ["concept2"], ["concept5"])
    assert changed.unchanged == ["concept1", "concept3", "concept4"]
    assert changed.metrics == {"concept2": {"auroc": (0.92, 0.99)}}
    assert changed.mean_change("auroc") == pytest.approx(0.07)
    assert changed.recipe == {}
    assert changed.unchanged_bytes > 0
    assert diff(before, before).unchanged == before.names


def test_a_history_says_since_when_each_lens_is_unchanged(tmp_path: Path):
    first, second = make_pack(), make_pack()
    second.stack.threshold_N[2] += 1
    third = make_pack()
    third.stack.threshold_N[2] += 1
    third.stack.threshold_N[4] += 1
    second = release(second, "1.3.0", previous=first)
    third = load_pack(release(third, "2.0.0", previous=second).save(tmp_path / "third"))
    assert [entry["version"] for entry in third.history.entries] == ["1.2.3", "1.3.0", "2.0.0"]
    assert third.history.entries[-1]["retrained"] == 1
    assert {third.history.since[name] for name in ("concept0", "concept1")} == {"1.2.3"}
    assert (third.history.since["concept2"], third.history.since["concept4"]) == ("1.3.0", "2.0.0")
    assert third.provenance["based_on"] == {"pack_id": "toy", "version": "1.3.0"}
    with pytest.raises(PackError, match=r"not above 2\.0\.0"):
        release(replace(third), "2.0.0-rc.1", previous=third)
