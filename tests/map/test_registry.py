"""Packs come whole, as the Hub lists them, or not at all; the registry says what is here, whatever happened."""

import errno
import json
import random
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from hub_server import HubServer, hub, running_hub
from pull_process import start_pull
from toy_pack import make_concepts, make_pack

from ftw.errors import ConceptError, DiskFullError, FTWError, PackError, SourceError
from ftw.map import registry
from ftw.map.concept import ConceptPack
from ftw.map.installed import CONCEPT, LENS, REGISTRY
from ftw.map.pack import load_pack
from ftw.map.pack_index import PackIndex
from ftw.map.pack_registry import PackRegistry
from ftw.map.versions import release

__all__ = ["hub"]

REPO, CONCEPTS = "ftw-project/lens-toy", "ftw-project/concept-pack-animals"
# huggingface_hub 2.4 uploads in a way that its HTTP client would have written differently.
CLIENT_WARNS = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
OFFLINE = "huggingface_hub.constants.HF_HUB_OFFLINE"


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two versions of a pack: in the second, one lens is retrained."""
    folder = tmp_path_factory.mktemp("versions")
    first = make_pack(rank=5)
    other = make_pack(rank=5, seed=1)
    changed = first.stack
    changed.threshold_N[2] = other.stack.threshold_N[2]
    second = release(replace(first, stack=changed), "1.3.0", previous=make_pack(rank=5))
    return make_pack(rank=5).save(folder / "first"), second.save(folder / "second")


@pytest.fixture
def published(hub: HubServer, versions: tuple[Path, Path]) -> HubServer:
    """A Hub that has the first version."""
    hub.publish(REPO, versions[0], version="1.2.3")
    return hub


def same_lenses(one: Path, other: Path) -> bool:
    return all(
        (one / f"layer{n}/lenses.safetensors").read_bytes() == (other / f"layer{n}/lenses.safetensors").read_bytes()
        for n in (0, 1, 2)
    )


def only_entry() -> dict:
    [entry] = registry.list_lens_packs()
    text = (PackRegistry().packs(LENS).root / REGISTRY).read_text()
    assert json.loads(text)["packs"].keys() == {entry["name"]}
    return entry


# --- down ---------------------------------------------------------------------------------------------------------


def test_a_pulled_pack_is_the_one_that_was_published(published: HubServer, versions: tuple[Path, Path]):
    folder = registry.pull_lens_pack("toy")
    assert same_lenses(folder, versions[0])
    assert load_pack(folder).names == load_pack(versions[0]).names
    entry = only_entry()
    assert entry["source"] == f"hf://{REPO}"
    assert (entry["version"], entry["modified"], entry["levels_installed"]) == ("1.2.3", False, [0, 1, 2])
    assert entry["revision"] == published.repos[REPO].head
    assert not list(folder.parent.glob(".staging/*"))


def test_a_pack_that_is_here_is_used_without_the_network(published: HubServer, monkeypatch: pytest.MonkeyPatch):
    first = registry.load_lens_pack("toy")
    published.asked.clear()
    again = registry.load_lens_pack("toy", version="1.2.3", layer=1, concept="concept2")
    assert published.asked == []
    assert again.names == ["concept2"]
    assert first.levels["concept2"] == 1
    monkeypatch.setattr(OFFLINE, True)
    assert registry.pull_lens_pack("toy").is_dir()
    [row] = registry.status()
    assert row["outdated"] is None
    assert "OFFLINE" in row["remark"]
    with pytest.raises(SourceError, match="HF_HUB_OFFLINE"):
        registry.load_lens_pack("another")
    with pytest.raises(ConceptError, match="concept2"):
        registry.load_lens_pack("toy", concept="concept22")


def test_some_levels_come_alone_and_others_later(published: HubServer, versions: tuple[Path, Path]):
    folder = registry.pull_lens_pack("toy", levels=[1])
    assert not any("/layer0/" in line or "/layer2/" in line for line in published.asked)
    assert only_entry()["levels_installed"] == [1]
    some, whole = load_pack(folder), load_pack(versions[0], levels=[1])
    assert some.names == whole.names == PackIndex.open(folder).rows_of[1]
    assert all(
        (one == other).all()
        for one, other in zip(
            some.stack.calibration_tensors().values(), whole.stack.calibration_tensors().values(), strict=True
        )
    )
    assert some.text is not None
    assert some.text.names == some.names
    with pytest.raises(PackError, match="level 0 is on the Hub"):
        load_pack(folder, levels=[0])
    published.asked.clear()
    assert registry.load_lens_pack("toy", layer=2).names == ["concept0", "concept3"]
    assert not any("GET /ftw-project/lens-toy/resolve" in line and "layer1" in line for line in published.asked)
    assert only_entry()["levels_installed"] == [1, 2]
    assert PackIndex.open(folder).rows_of.keys() == {1, 2}
    registry.pull_lens_pack("toy", levels=[0])
    assert load_pack(folder).names == load_pack(versions[0]).names
    with pytest.raises(PackError, match="no level 7"):
        registry.pull_lens_pack("toy", levels=[7])


def test_versions_are_pinned_and_a_newer_one_is_told(published: HubServer, versions: tuple[Path, Path]):
    registry.pull_lens_pack("toy", version="1.2.3")
    assert [row["outdated"] for row in registry.status()] == [False]
    published.publish(REPO, versions[1], version="1.3.0")
    [row] = registry.status()
    assert (row["outdated"], row["latest"]) == (True, "1.3.0")
    assert registry.load_lens_pack("toy").version == "1.2.3"
    published.asked.clear()
    registry.pull_lens_pack("toy")
    assert only_entry()["version"] == "1.3.0"
    assert only_entry()["based_on"] == "toy@1.2.3"
    assert sum("GET /" in line and "resolve" in line for line in published.asked) <= 5  # what both have is not fetched
    registry.pull_lens_pack("toy", version="1.2.3")
    assert same_lenses(PackRegistry().packs(LENS).folder("toy"), versions[0])
    with pytest.raises(SourceError, match=r"no version 2.0.0; it has 1.2.3, 1.3.0"):
        registry.pull_lens_pack("toy", version="2.0.0")


def test_a_concept_pack_comes_the_same_way(hub: HubServer, tmp_path: Path):
    make_concepts({"cat": 1, "animal": 0}).save(tmp_path / "animals")
    (tmp_path / "animals" / "run.py").write_text("print('no')")
    hub.publish(CONCEPTS, tmp_path / "animals", version="2.0.0")
    pack = registry.load_concept_pack("animals")
    assert pack.names == ["animal", "cat"]
    folder = registry.pull_concept_pack("animals")
    assert not (folder / "run.py").exists()
    assert [entry["name"] for entry in registry.list_concept_packs()] == ["animals"]
    assert registry.list_lens_packs() == []


def test_a_plan_changes_nothing(published: HubServer):
    plan = PackRegistry().plan(LENS, "toy", levels=[0])
    assert plan.num_bytes == sum(plan.snapshot.files[name].num_bytes for name in plan.names) > 0
    assert registry.list_lens_packs() == []


# --- what goes wrong on the way -----------------------------------------------------------------------------------

FAULTS = {
    "401 on the page": ({"pattern": "GET /api/models/.*lens-toy$|revision", "status": 401}, SourceError, "HF_TOKEN"),
    "403 on a file": ({"pattern": "resolve.*layer1", "status": 403}, SourceError, "ask its owner"),
    "404 on a file": ({"pattern": "resolve.*layer1", "status": 404}, SourceError, "no such"),
    "404 on the tree": ({"pattern": "tree", "status": 404}, SourceError, "no such"),
    "429": ({"pattern": "api/models", "status": 429}, SourceError, "too often"),
    "500": ({"pattern": "GET .*resolve.*layer1", "status": 500}, SourceError, "not well"),
    "503 on the page": ({"pattern": "api/models", "status": 503}, SourceError, "not well"),
    "always cut": ({"pattern": "GET .*layer1/lenses", "cut_after": 10}, SourceError, "run the same command again"),
    "a flipped bit": (
        {"pattern": "GET .*layer1/lenses", "damage": lambda content: content[:-1] + bytes([content[-1] ^ 1])},
        PackError,
        "hash differs",
    ),
    "another index": (
        {"pattern": "GET .*pack_info", "damage": lambda content: content.replace(b"1.2.3", b"1.2.4")},
        PackError,
        "hash differs",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAULTS)
def test_a_pull_that_fails_installs_nothing_and_goes_on_afterwards(
    published: HubServer, versions: tuple[Path, Path], name: str
):
    how, error, words = FAULTS[name]
    published.fault(**how)
    with pytest.raises(error, match=words):
        registry.pull_lens_pack("toy")
    assert registry.list_lens_packs() == []
    published.faults.clear()
    assert same_lenses(registry.pull_lens_pack("toy"), versions[0])
    assert only_entry()["modified"] is False


def test_a_cut_connection_goes_on_where_it_was_cut(published: HubServer, versions: tuple[Path, Path]):
    published.fault("GET .*layer1/lenses", cut_after=10, times=3)
    assert same_lenses(registry.pull_lens_pack("toy"), versions[0])


def test_after_a_broken_pull_what_has_come_is_not_fetched_again(published: HubServer):
    published.fault("GET .*text.safetensors", status=500, times=1)
    with pytest.raises(SourceError):
        registry.pull_lens_pack("toy")
    published.asked.clear()
    registry.pull_lens_pack("toy")
    assert not any("GET /" in line and "layer0" in line for line in published.asked)


def test_a_repository_that_changes_between_two_calls_gives_one_commit(
    published: HubServer, versions: tuple[Path, Path]
):
    first = published.repos[REPO].head
    published.fault("GET .*resolve", times=1, then=lambda: published.publish(REPO, versions[1], version="1.3.0"))
    folder = registry.pull_lens_pack("toy")
    assert only_entry()["revision"] == first != published.repos[REPO].head
    assert same_lenses(folder, versions[0])
    assert load_pack(folder).version == "1.2.3"


def test_a_pack_without_room_is_refused_before_and_while_it_comes(
    published: HubServer, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))  # pyright: ignore
        with pytest.raises(DiskFullError, match="FTW_HOME"):
            registry.pull_lens_pack("toy")

    def full(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.file_download.http_get", full)
        with pytest.raises(DiskFullError, match="no room"):
            registry.pull_lens_pack("toy")
    assert registry.list_lens_packs() == []
    assert registry.pull_lens_pack("toy").is_dir()


def test_a_private_pack_needs_the_token_of_the_environment(published: HubServer, monkeypatch: pytest.MonkeyPatch):
    published.repos[REPO].private = True
    with pytest.raises(SourceError, match="HF_TOKEN"):
        registry.pull_lens_pack("toy")
    monkeypatch.setenv("HF_TOKEN", "good")
    assert registry.pull_lens_pack("toy").is_dir()


def hostile(files: dict[str, bytes], kind: str) -> dict[str, bytes]:
    manifest = json.loads(files["MANIFEST.json"])
    match kind:
        case "climbs":
            return files | {"../outside.json": b"{}"}
        case "absolute":
            return files | {"/etc/outside.json": b"{}"}
        case "case":
            return files | {"Pack_Info.json": b"{}"}
        case "not listed":
            return files | {"layer1/more.json": b"{}"}
        case "listed, not there":
            return {name: content for name, content in files.items() if name != "layer1/lenses.safetensors"}
        case "lists a climb":
            manifest["files"]["../../outside"] = {"bytes": 0, "sha256": ""}
            return files | {"MANIFEST.json": json.dumps(manifest).encode()}
        case "other version":
            return files | {"pack_info.json": files["pack_info.json"].replace(b"1.2.3", b"9.9.9")}
        case "pickles":
            return {"layer0/Cat.pt": b"\x80\x04", "pack_info.json": b"{}"}
    raise AssertionError(kind)


@pytest.mark.parametrize(
    "kind",
    ["climbs", "absolute", "case", "not listed", "listed, not there", "lists a climb", "other version", "pickles"],
)
def test_a_hostile_repository_is_refused(published: HubServer, own_home: Path, kind: str):
    repo = published.repos[REPO]
    repo.tags["v1.2.3"] = repo.commit(hostile(repo.commits[repo.head], kind))
    with pytest.raises(PackError):
        registry.pull_lens_pack("toy", version="1.2.3")
    assert registry.list_lens_packs() == []
    assert not list(own_home.parent.rglob("outside*"))


# --- here ---------------------------------------------------------------------------------------------------------


def test_a_change_here_is_seen_and_never_overwritten_unasked(published: HubServer, versions: tuple[Path, Path]):
    folder = registry.pull_lens_pack("toy")
    (folder / "README.md").write_text("a page of my own")
    assert only_entry()["modified"] is False
    (folder / "layer1" / "results.json").write_text("{}")
    assert only_entry()["modified"] is True
    published.publish(REPO, versions[1], version="1.3.0")
    with pytest.raises(PackError, match="was changed here"):
        registry.pull_lens_pack("toy")
    with pytest.raises(PackError, match="force=true"):
        PackRegistry().remove(LENS, "toy")
    registry.pull_lens_pack("toy", version="1.3.0", force=True)
    assert only_entry()["modified"] is False
    PackRegistry().remove(LENS, "toy")
    assert registry.list_lens_packs() == []
    with pytest.raises(PackError, match="ftw pack pull toy"):
        PackRegistry().remove(LENS, "toy")


def test_a_copy_under_another_name_knows_what_it_is_based_on(published: HubServer):
    folder = registry.pull_lens_pack("toy")
    shutil.copytree(folder, folder.parent / "mine")
    (folder.parent / "mine" / "text.json").unlink()
    mine = next(entry for entry in registry.list_lens_packs() if entry["name"] == "mine")
    assert (mine["source"], mine["based_on"], mine["modified"]) == ("local", "toy@1.2.3", True)
    with pytest.raises(PackError, match="was made here"):
        registry.pull_lens_pack("mine")


@pytest.mark.parametrize("name", ["../toy", "", ".hidden", "a/b", "a b", "x" * 97, "C:evil"])
def test_a_name_that_is_no_folder_is_refused(name: str):
    with pytest.raises(PackError, match="is no name for a pack"):
        registry.pull_lens_pack(name)


def test_a_damaged_registry_is_written_anew(published: HubServer):
    folder = registry.pull_lens_pack("toy")
    (folder.parent / REGISTRY).write_text("{")
    assert only_entry()["source"] == f"hf://{REPO}"
    (folder / REGISTRY).write_text('{"packs": {"toy": 3}}')
    assert only_entry()["source"] == "local"


# --- up -----------------------------------------------------------------------------------------------------------


@CLIENT_WARNS
def test_a_pushed_pack_comes_back_and_a_version_never_changes(
    hub: HubServer, versions: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
):
    PackRegistry().adopt(LENS, versions[0], "mine")
    assert only_entry()["source"] == "local"
    with pytest.raises(SourceError, match="HF_TOKEN"):
        registry.push_lens_pack("mine", repo_id="me/lens-mine")
    monkeypatch.setenv("HF_TOKEN", "good")
    commit = registry.push_lens_pack("mine", repo_id="me/lens-mine")
    entry = only_entry()
    assert (entry["revision"], entry["source"], entry["modified"]) == (commit, "hf://me/lens-mine", False)
    assert hub.repos["me/lens-mine"].private
    assert b"lens-pack" in hub.repos["me/lens-mine"].commits[commit]["README.md"]
    assert registry.push_lens_pack("mine") == commit  # nothing new
    again = registry.pull_lens_pack("again", repo_id="me/lens-mine", version="1.2.3")
    assert same_lenses(again, versions[0])
    PackRegistry().adopt(LENS, versions[1], "other")
    registry.push_lens_pack("other", repo_id="me/lens-mine")
    assert set(hub.repos["me/lens-mine"].tags) == {"v1.2.3", "v1.3.0"}
    make_pack(rank=5, seed=3).save(PackRegistry().packs(LENS).folder("other"))
    with pytest.raises(PackError, match=r"a version never changes.*1\.2\.4"):
        registry.push_lens_pack("other", repo_id="me/lens-mine")


@CLIENT_WARNS
def test_a_push_of_somebody_else_in_between_is_a_conflict(
    hub: HubServer, versions: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_TOKEN", "good")
    PackRegistry().adopt(LENS, versions[0], "mine")
    hub.fault("POST .*preupload", times=1, then=lambda: hub.publish("me/lens-mine", versions[1]))
    with pytest.raises(SourceError, match="somebody else"):
        registry.push_lens_pack("mine", repo_id="me/lens-mine")
    assert only_entry()["source"] == "local"


@CLIENT_WARNS
def test_a_concept_pack_round_trips_over_the_hub(hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HF_TOKEN", "good")
    pack = make_concepts({"Non Profit": 1, "NonProfit": 1, "nonprofit": 0})
    pack.save(tmp_path / "animals")
    PackRegistry().adopt(CONCEPT, tmp_path / "animals", "animals")
    registry.push_concept_pack("animals")
    PackRegistry().remove(CONCEPT, "animals")
    again = registry.load_concept_pack("animals")
    assert again.content_hash() == pack.content_hash()
    assert ConceptPack.load(tmp_path / "animals").info == again.info


# --- several processes, and death ---------------------------------------------------------------------------------


@pytest.fixture
def patient_hub(versions: tuple[Path, Path]):
    """A Hub in this process, slow enough to be interrupted."""
    with running_hub() as server:
        server.publish(REPO, versions[0], version="1.2.3")
        server.publish(REPO, versions[1], version="1.3.0")
        yield server


def test_two_processes_that_pull_at_once_bring_one_pack(patient_hub: HubServer, own_home: Path):
    patient_hub.pause = 0.002
    both = [start_pull(patient_hub.url, own_home) for _ in "ab"]
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert sum("GET /" in line and "text.safetensors" in line for line in patient_hub.asked) == 1
    assert only_entry()["version"] == "1.3.0"
    assert load_pack(PackRegistry().packs(LENS).folder("toy")).version == "1.3.0"


def test_whenever_a_pull_is_killed_the_registry_is_right(
    patient_hub: HubServer, own_home: Path, versions: tuple[Path, Path]
):
    draw, outcomes = random.Random(0), []
    for number in range(20):
        version = ("1.2.3", "1.3.0")[number % 2]
        patient_hub.asked.clear()
        process = start_pull(patient_hub.url, own_home, version)
        # Half of them die while files come, half when the last has come and the pack is verified and put in place.
        num_asked = draw.randint(1, 35) if number % 4 < 2 else 35
        while process.is_alive() and len(patient_hub.asked) < num_asked:
            process.join(0.001)
        process.join(draw.uniform(0, 0.005 if num_asked < 35 else 0.2))
        process.kill()
        process.join()
        outcomes.append(process.exitcode)
        if registry.list_lens_packs():
            entry, folder = only_entry(), PackRegistry().packs(LENS).folder("toy")
            assert entry["modified"] is False
            assert entry["revision"] == patient_hub.repos[REPO].tags[f"v{entry['version']}"]
            assert load_pack(folder).version == entry["version"]
            assert same_lenses(folder, versions[entry["version"] == "1.3.0"])
    assert -signal.SIGKILL in outcomes
    start_pull(patient_hub.url, own_home, "1.3.0").join()
    assert only_entry()["version"] == "1.3.0"


def test_every_error_of_a_pull_is_one_that_a_user_can_read(published: HubServer):
    published.fault("api/models", damage=None, status=418)
    with pytest.raises(FTWError, match="418"):
        registry.pull_lens_pack("toy")
