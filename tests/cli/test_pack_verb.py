"""`ftw pack`: each action does what its line of help says, on a Hub of its own."""

import json
from pathlib import Path

import pytest
from hub_server import HubServer, hub
from toy_pack import make_concepts, make_pack
from toy_run import run_verb

from ftw.map import registry
from ftw.map.pack import load_pack
from ftw.map.pack_registry import PackRegistry
from ftw.map.versions import release

__all__ = ["hub"]

REPO = "ftw-project/lens-toy"


@pytest.fixture
def published(hub: HubServer, tmp_path: Path) -> HubServer:
    make_pack().save(tmp_path / "first")
    hub.publish(REPO, tmp_path / "first", version="1.2.3")
    return hub


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    run_verb("pack", *words)
    return " ".join(capsys.readouterr().out.split())


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        run_verb("pack", *words)
    assert stop.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_a_pack_is_fetched_listed_shown_verified_and_removed(published: HubServer, capsys: pytest.CaptureFixture[str]):
    assert "no packs here" in said(capsys)
    assert "would fetch" in said(capsys, "pull", "toy", "levels=[0]", "--dry-run")
    assert registry.list_lens_packs() == []
    assert "levels [0]" in said(capsys, "pull", "toy", "levels=[0]")
    assert "0 of 3" in said(capsys, "list")
    assert "levels [0, 1, 2]" in said(capsys, "pull", "toy")
    assert json.loads(said(capsys, "list", "--json"))[0]["version"] == "1.2.3"
    assert json.loads(said(capsys, "info", "toy", "--json"))["pack_id"] == "toy"
    page = said(capsys, "info", "toy")
    assert "6 lenses (probes)" in page
    assert "must not be used" in page
    assert "is sound: 6 lens entries" in said(capsys, "verify", "toy")
    published.publish(REPO, make_pack(seed=1).save(Path("second")))
    assert "newer on the Hub" in said(capsys, "status")
    assert "removed toy" in said(capsys, "remove", "toy")
    assert "no packs here" in said(capsys)


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_a_pack_is_imported_pushed_and_compared(
    hub: HubServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_TOKEN", "good")
    second = make_pack()
    second.stack.threshold_N[2] += 1
    make_pack().save("one")
    release(second, "1.3.0", previous=make_pack()).save("two")
    assert "1 retrained concept2" in said(capsys, "diff", "./one", "./two")
    assert json.loads(said(capsys, "diff", "one", "two", "--json"))["retrained"] == ["concept2"]
    said(capsys, "import", "one", "out=mine")
    assert "would push mine 1.2.3" in said(capsys, "push", "mine", "repo=me/lens-mine", "--dry-run")
    assert "me/lens-mine" not in hub.repos
    assert "tag v1.2.3" in said(capsys, "push", "mine", "repo=me/lens-mine")
    make_concepts({"cat": 1, "animal": 0}).save("animals")
    said(capsys, "import", "animals", "kind=concept")
    assert "2 concept entries" in said(capsys, "verify", "animals", "kind=concept")


def test_a_pack_is_converted_exported_and_imported_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    make_pack(hidden=6).save("one")
    assert "MB" in said(capsys, "convert", "one", "precision=int8", "out=./small", "--dry-run")
    assert "random states" in said(capsys, "convert", "one", "precision=int8", "out=./small")
    assert load_pack("small").stored == "int8"
    assert (tmp_path / "small" / "README.md").is_file()
    said(capsys, "export", "small", "out=theirs")
    assert "12 .pt files" in said(capsys, "export", "small", "out=again", "--dry-run")
    words = said(capsys, "import", "theirs", "out=back", "fingerprint=abc")
    assert "6 lenses on levels [0, 1, 2], layers [1, 2]" in words
    assert load_pack(PackRegistry().root / "lens_packs" / "back").recipe.fingerprint == "abc"


def test_what_cannot_be_is_said_in_a_sentence(published: HubServer, capsys: pytest.CaptureFixture[str]):
    assert "did you mean pull" in refused(capsys, "pul", "toy")
    assert "name needs a value" in refused(capsys, "pull")
    assert "HF_TOKEN" in refused(capsys, "pull", "nothing")
    assert "ftw pack pull toy" in refused(capsys, "verify", "toy")
    assert "none of lens, concept" in refused(capsys, "list", "kind=other")
    assert "precision=bfloat16" in refused(capsys, "convert", str(make_pack().save(Path("one"))), "out=x")
    Path("theirs/layer0/text_lenses").mkdir(parents=True)
    assert "no lenses in" in refused(capsys, "import", "theirs", "out=x")
