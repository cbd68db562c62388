"""Rounds resume to the bytes of an unbroken run, and what cannot be is refused with the old data intact."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from toy_growing import capture, entries, started
from toy_model import byte_tokenizer, tiny_llama

from ftw.errors import ConceptError, ConfigError, DataError, DiskFullError, EncyclopediaError
from ftw.map.growing import Entry, GrowingEncyclopedia
from ftw.map.growing.choose import ChooseConfig, choose
from ftw.map.growing.grow import GrowConfig, grow
from ftw.map.growing.judge import Judgement, judge, nearest_mean
from ftw.map.growing.plan import Plan
from ftw.map.growing.rounds import add_judging, bootstrap, finish_pending, refine
from ftw.map.growing.writing import WritingConfig
from ftw.map.sentences import CONTEXTS
from ftw.substrate.model import Substrate


def contents(folder: Path) -> dict[str, str]:
    """sha256 of every file that says something; locks and the time used do not."""
    files = [path for path in folder.rglob("*") if path.is_file() and ".locks" not in path.parts]
    hashes = {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return {name: value for name, value in hashes.items() if name != "grow.json"}


def by_nearest_mean(growing: GrowingEncyclopedia, seed: int) -> Judgement:
    return nearest_mean(growing)


def kill(growing: GrowingEncyclopedia, *left: str) -> None:
    """What a killed process leaves of the last round: its plan, and what is named."""
    folder = growing.round_folder(growing.num_rounds - 1)
    for path in list(folder.iterdir()):
        if path.name not in ("plan.json", *left):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize("left", [(), ("index.h5",), ("index.h5", "shards")])
def test_a_killed_refinement_ends_like_an_unbroken_one(
    tmp_path: Path, tiny_substrate: Substrate, left: tuple[str, ...]
):
    growing = started(tmp_path / "whole", tiny_substrate)
    refine(growing, tiny_substrate, [0, 1, 4], 1, contexts=4, progress=False)
    whole = contents(growing.folder)
    kill(growing, *left)
    with GrowingEncyclopedia.open(growing.folder) as opened:
        assert opened.num_samples.tolist() == [1] * 6
        number = refine(opened, tiny_substrate, [0, 1, 4], 1, contexts=4, progress=False)
        assert number == 1
        assert opened.num_rounds == 2
    assert contents(growing.folder) == whole


def test_another_refinement_finishes_the_one_that_was_begun_first(tmp_path: Path, tiny_substrate: Substrate):
    growing = started(tmp_path / "growing", tiny_substrate)
    growing.begin(Plan(stage=1, concepts=[3], contexts=2))
    refine(growing, tiny_substrate, [5], 1, contexts=1, progress=False)
    assert growing.num_samples.tolist() == [1, 1, 1, 3, 1, 2]


@pytest.mark.parametrize("stop_at", [1, 2, 3])
def test_grow_interrupted_and_resumed_equals_an_unbroken_one(tmp_path: Path, tiny_substrate: Substrate, stop_at: int):
    config = GrowConfig(cycles=3, share=0.4, contexts=2, highest_stage=1, target=1.0)
    whole = started(tmp_path / "whole", tiny_substrate)
    ledger = grow(whole, tiny_substrate, by_nearest_mean, config, progress=False)
    assert len(ledger.cycles) == 3
    calls = 0

    def stopping(growing: GrowingEncyclopedia, seed: int) -> Judgement:
        nonlocal calls
        calls += 1
        if calls > stop_at:
            raise KeyboardInterrupt
        return nearest_mean(growing)

    broken = started(tmp_path / "broken", tiny_substrate)
    with pytest.raises(KeyboardInterrupt):
        grow(broken, tiny_substrate, stopping, config, progress=False)
    kill(broken, "index.h5")  # and the round before the judge was killed as well
    with GrowingEncyclopedia.open(broken.folder) as opened:
        resumed = grow(opened, tiny_substrate, by_nearest_mean, config, progress=False)
    assert resumed.cycles == ledger.cycles
    assert contents(broken.folder) == contents(whole.folder)
    again = grow(whole, tiny_substrate, by_nearest_mean, config, progress=False)
    assert again.cycles == ledger.cycles  # nothing more to do


def test_grow_stops_at_its_target_and_at_its_budget(tmp_path: Path, tiny_substrate: Substrate):
    growing = started(tmp_path / "growing", tiny_substrate)
    easy = grow(growing, tiny_substrate, by_nearest_mean, GrowConfig(target=1e-9), progress=False)
    assert easy.cycles == []
    short = GrowConfig(budget_minutes=1e-9, highest_stage=1, target=1.0)
    assert grow(growing, tiny_substrate, by_nearest_mean, short, progress=False).cycles == []


def test_grow_ends_where_all_templates_are_used(tmp_path: Path, tiny_substrate: Substrate):
    growing, told = started(tmp_path / "growing", tiny_substrate), list[str]()
    config = GrowConfig(cycles=9, share=0.7, contexts=len(CONTEXTS), highest_stage=1, target=1.0)
    ledger = grow(growing, tiny_substrate, by_nearest_mean, config, tell=told.append, progress=False)
    assert len(ledger.cycles) == 2  # those of the first have no template left, so the second takes the others
    assert set(growing.num_samples.tolist()) == {1 + len(CONTEXTS)}
    assert "grow.highest_stage=2" in told[-1]


def test_texts_written_before_a_kill_are_read_back_and_kept_masked_too(tmp_path: Path, tiny_substrate: Substrate):
    growing = started(tmp_path / "growing", tiny_substrate)
    refine(growing, tiny_substrate, [0, 1], 1, contexts=1, progress=False)
    number = growing.begin(Plan(stage=2, concepts=[0, 1], contexts=2, options=WritingConfig().record()))
    from ftw.map.growing.writing import _requests  # the requests follow from the plan alone

    prompts = [prompt for _, prompt in _requests(growing, growing.plan(number))]
    replies = ["The heron waits in the shallow water for fish.", "It waits in the shallow water for hours and hours."]
    block = {"prompts": prompts, "replies": [*replies, "I cannot do that, I am sorry to say, my friend.", "no"]}
    folder = growing.round_folder(number) / "written"
    folder.mkdir()
    (folder / "00000000.json").write_text(json.dumps(block))
    finish_pending(growing, tiny_substrate, progress=False)
    rows = growing.rows(stages=[2])
    assert rows.concept.tolist() == [0, 0, 0]
    assert rows.texts == [replies[0], "this waits in the shallow water for fish.", replies[1]]
    assert rows.named.tolist() == [True, False, False]
    assert growing.stage.tolist() == [2, 1, 0, 0, 0, 0]  # nothing of use was written about the wolf: it stays


def test_a_round_without_any_text_is_refused_and_leaves_no_trace(tmp_path: Path, tiny_substrate: Substrate):
    growing = started(tmp_path / "growing", tiny_substrate)
    refine(growing, tiny_substrate, [0], 1, contexts=100, progress=False)  # every template there is
    before = contents(growing.folder)
    with pytest.raises(DataError, match="no concept gets a text"):
        refine(growing, tiny_substrate, [0], 1, contexts=1, progress=False)
    assert contents(growing.folder) == before
    assert growing.pending is None


def test_contrasts_name_the_concepts_that_one_is_confused_with(tmp_path: Path, tiny_substrate: Substrate):
    growing = started(tmp_path / "growing", tiny_substrate)
    refine(growing, tiny_substrate, [1], 1, contexts=1, progress=False)
    with pytest.raises(EncyclopediaError, match="have not had stage 1"):
        refine(growing, tiny_substrate, [0], 2, progress=False)
    with pytest.raises(EncyclopediaError, match="nobody has judged"):
        refine(growing, tiny_substrate, [1], 3, progress=False)
    add_judging(growing, tiny_substrate, progress=False)
    judge(growing, by_nearest_mean)
    assert all(own not in others for own, others in enumerate(growing.confused_with))
    with pytest.raises(EncyclopediaError, match="have not had stage 2"):
        refine(growing, tiny_substrate, [1], 3, progress=False)


def test_names_come_from_a_file_and_one_without_any_is_refused(tmp_path: Path, tiny_substrate: Substrate):
    growing, names = started(tmp_path / "growing", tiny_substrate), tmp_path / "names.txt"
    names.write_text(f"{growing.concepts[2]}\n\n  {growing.concepts[0]}\n")
    assert choose(growing, ChooseConfig(which=str(names))) == [0, 2]
    names.write_text(" \n\n")
    with pytest.raises(ConfigError, match="no name in it"):
        choose(growing, ChooseConfig(which=str(names)))
    with pytest.raises(ConceptError, match=f"nearest: {growing.concepts[0]}"):
        choose(growing, ChooseConfig(names=[growing.concepts[0] + "z"]))


@pytest.mark.parametrize(
    ("error", "message", "attempt"),
    [
        (ConfigError, "stage=7", lambda growing, substrate: refine(growing, substrate, [0], 7)),
        (ConfigError, "at least 1 text", lambda growing, substrate: refine(growing, substrate, [0], 1, contexts=0)),
        (DataError, "no concepts to refine", lambda growing, substrate: refine(growing, substrate, [], 1)),
        (ConceptError, "no concept 'emu'", lambda growing, substrate: choose(growing, ChooseConfig(names=["emu"]))),
        (ConceptError, "given twice", lambda growing, substrate: choose(growing, ChooseConfig(names=["dog", "dog"]))),
        (ConfigError, "neither", lambda growing, substrate: choose(growing, ChooseConfig(which="nowhere.txt"))),
        (ConfigError, "share", lambda growing, substrate: choose(growing, ChooseConfig(which="random", share=2))),
        (EncyclopediaError, "nobody has judged", lambda growing, substrate: choose(growing, ChooseConfig())),
    ],
)
def test_what_cannot_be_is_refused_with_the_remedy(
    tmp_path: Path,
    tiny_substrate: Substrate,
    error: type[Exception],
    message: str,
    attempt: Callable[[GrowingEncyclopedia, Substrate], object],
):
    growing = started(tmp_path / "growing", tiny_substrate)
    before = contents(growing.folder)
    with pytest.raises(error, match=message):
        attempt(growing, tiny_substrate)
    assert contents(growing.folder) == before


def test_states_of_another_substrate_are_never_mixed_in(tmp_path: Path, tiny_substrate: Substrate):
    growing = started(tmp_path / "growing", tiny_substrate)
    other = Substrate.from_model(tiny_llama(seed=5), byte_tokenizer(), name="other")
    with pytest.raises(EncyclopediaError, match="not of other"):
        refine(growing, other, [0], 1, contexts=1, progress=False)
    with pytest.raises(EncyclopediaError, match="something else"):
        bootstrap(growing.folder, other, entries(), capture(), progress=False)


def test_terms_without_tokens_are_all_named(tmp_path: Path, tiny_substrate: Substrate):
    nameless = [*entries(), Entry(name="void", term="\t \n", phrase="void")]
    with pytest.raises((DataError, ConceptError), match="void"):
        bootstrap(tmp_path / "growing", tiny_substrate, nameless, capture(), progress=False)
    assert not (tmp_path / "growing").exists()


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, tiny_substrate: Substrate, monkeypatch: pytest.MonkeyPatch):
    growing = started(tmp_path / "growing", tiny_substrate)
    known = growing.statistics(1).mean_ND
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(DiskFullError, match="free some space"):
            refine(growing, tiny_substrate, [0], 1, contexts=2, progress=False)
    with GrowingEncyclopedia.open(growing.folder) as opened:
        np.testing.assert_array_equal(opened.statistics(1).mean_ND, known)
        assert opened.num_samples.tolist() == [1] * 6
        refine(opened, tiny_substrate, [0], 1, contexts=2, progress=False)
        assert opened.num_samples.tolist() == [3, 1, 1, 1, 1, 1]


FILES = ("growing.json", "concepts.jsonl.gz", "rounds/0000/plan.json", "rounds/0001/moments.h5")


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_are_named(tmp_path: Path, tiny_substrate: Substrate, name: str):
    growing = started(tmp_path / "growing", tiny_substrate)
    refine(growing, tiny_substrate, [0], 1, contexts=2, progress=False)
    path = growing.folder / name
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(EncyclopediaError, match=path.name.partition(".")[0]):
        GrowingEncyclopedia.open(growing.folder).plan(0)
