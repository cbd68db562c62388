"""The dual-lens interface works as its design writes it, and every number in it is that of one bank or the other."""

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_lenses import random_stack

from ftw.errors import ConceptError, ConfigError, FTWError, PackError, SubstrateError
from ftw.hat.deployment import DeploymentManifest, fingerprint
from ftw.hat.monitor import Monitor
from ftw.hat.shelf import ShelfConfig
from ftw.hat.text import TextBank, TextLens
from ftw.hat.timeline import Timeline, TokenReading
from ftw.map.concept import Concept, ConceptPack
from ftw.map.dynamic import DynamicLensManager
from ftw.map.pack import LensPack, Recipe, load_pack
from ftw.map.pack_index import PackIndex, open_shelf
from ftw.substrate.model import Substrate

PARENTS: dict[str, list[str]] = {
    "Living": [],
    "Made": [],
    "Animal": ["Living"],
    "Plant": ["Living"],
    "Tool": ["Made"],
    "Cat": ["Animal"],
}
LEVEL = {"Living": 0, "Made": 0, "Animal": 1, "Plant": 1, "Tool": 1, "Cat": 2}
WIDE: dict[str, Any] = {"load_threshold": 0.0, "unload_threshold": 0.0}


def text_bank(names: list[str]) -> TextBank:
    rng = np.random.default_rng(1)
    words = ["cat", "hammer", "feline"]
    return TextBank.from_lenses(
        [
            TextLens(name=name, vocabulary=words, idf=np.ones(3), coefficients=2 * rng.normal(size=3), bias=-0.5)
            for name in names
        ]
    )


def make_pack(
    substrate: Substrate, *, layers: tuple[int, ...] = (1, 2), text: list[str] | None = None, hidden: int = 0
) -> LensPack:
    stack = random_stack(layers=layers, hidden=hidden)
    stack.names = list(PARENTS)
    concepts = ConceptPack.of(
        "toy", "1.0.0", [Concept(name=name, level=LEVEL[name], parents=up) for name, up in PARENTS.items()], {}
    )
    recipe = Recipe(
        substrate=substrate.name,
        fingerprint=substrate.fingerprint,
        width=32,
        dtype="float32",
        precision="float32",
        layers=list(layers),
        family="mlp" if hidden else "linear",
        hidden=hidden,
    )
    return LensPack(
        pack_id="toy",
        version="1.0.0",
        stack=stack,
        recipe=recipe,
        levels=dict(LEVEL),
        concepts=concepts,
        text=text_bank(list(PARENTS) if text is None else text),
    )


@pytest.fixture(scope="module")
def pack(tiny_substrate: Substrate) -> LensPack:
    return make_pack(tiny_substrate)


def state(seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 2, 32, generator=torch.Generator().manual_seed(seed))


def dual(pack: LensPack, **options: Any) -> DynamicLensManager:
    return DynamicLensManager(pack, use_activation_lenses=True, use_text_lenses=True, base_layers=[0], **options)


def test_activation_only_as_the_design_writes_it(pack: LensPack):
    manager = DynamicLensManager(
        pack, use_activation_lenses=True, use_text_lenses=False, base_layers=[0], keep_top_k=200, **WIDE
    )
    results, timing = manager.detect_and_expand(state())
    probability_N = torch.sigmoid(pack.bank()(state()))[0]
    expected = sorted(((name, float(p), LEVEL[name]) for name, p in zip(pack.names, probability_N, strict=True)),
                      key=lambda row: -row[1])  # fmt: skip
    assert [(name, level) for name, _, level in results] == [(name, level) for name, _, level in expected]
    np.testing.assert_allclose([row[1] for row in results], [row[1] for row in expected], atol=1e-6)
    assert {"total", "initial_detection", "child_loading", "loaded_lenses"} <= timing.keys()
    short, nothing = manager.detect_and_expand(state(), 2, return_timing=False, return_logits=True)
    assert (len(short), len(short[0]), nothing) == (2, 4, {})


def test_text_only_needs_no_hidden_state(pack: LensPack):
    manager = DynamicLensManager(
        pack, use_activation_lenses=False, use_text_lenses=True, base_layers=[0], keep_top_k=200, **WIDE
    )
    results, timing = manager.detect_and_expand_text("feline")
    assert pack.text is not None
    expected = dict(zip(pack.names, torch.sigmoid(pack.text.score(["feline"]))[0].tolist(), strict=True))
    assert {name: probability for name, probability, _ in results} == pytest.approx(expected, abs=1e-6)
    assert timing["total"] > 0
    with pytest.raises(ConfigError, match="text lenses only"):
        manager.detect_and_expand(state())


def test_dual_has_both_their_maximum_and_their_difference(pack: LensPack):
    manager = dual(pack, keep_top_k=200, **WIDE)
    results = manager.detect_and_expand_dual(hidden_state=state(), token_text="cat")
    thinks, writes = results["activation_scores"], results["text_scores"]
    assert thinks == {name: probability for name, probability, _ in results["activation"]}
    assert {name: probability for name, probability, _ in results["combined"]} == results["combined_scores"]
    assert results["combined_scores"] == {name: max(thinks[name], writes[name]) for name in pack.names}
    assert len(results["dissonance"]) == len(pack.names)
    for row in results["dissonance"]:
        assert row["activation_prob"] == thinks[row["concept"]]
        assert row["text_prob"] == writes[row["concept"]]
        assert row["divergence"] == abs(row["signed"]) == abs(row["activation_prob"] - row["text_prob"])
    sizes = [row["divergence"] for row in results["dissonance"]]
    assert sizes == sorted(sizes, reverse=True)


def test_a_concept_with_one_kind_only_has_no_dissonance(tiny_substrate: Substrate):
    one_sided = make_pack(tiny_substrate, text=["Living", "Cat"])
    results = dual(one_sided, **WIDE).detect_and_expand_dual(hidden_state=state(), token_text="cat")
    assert {row["concept"] for row in results["dissonance"]} == {"Living", "Cat"}
    assert len(results["activation"]) == len(results["combined"]) == 6
    assert len(results["text"]) == 2


def test_keep_top_k_counts_each_kind_separately(pack: LensPack):
    results = dual(pack, keep_top_k=1, load_threshold=1.0, unload_threshold=1.0).detect_and_expand_dual(
        hidden_state=state(), token_text="cat"
    )
    assert len(results["activation"]) == len(results["text"]) == 1


def test_a_pack_is_opened_from_its_folder_and_by_default_the_latest(
    pack: LensPack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("FTW_RUNS", str(tmp_path))
    pack.save(tmp_path / "latest" / "pack")
    expected, _ = dual(pack).detect_and_expand(state())
    for given in (None, tmp_path / "latest" / "pack", str(tmp_path / "latest" / "pack")):
        results, _ = dual(given).detect_and_expand(state())  # type: ignore[arg-type]
        assert [row[0] for row in results] == [row[0] for row in expected]
    with pytest.raises(PackError):
        DynamicLensManager(tmp_path / "none")


def test_a_state_with_nan_is_missing_and_a_wrong_one_is_refused(pack: LensPack):
    manager = dual(pack)
    broken = state()
    broken[0, 0, 0] = float("nan")
    results, timing = manager.detect_and_expand(broken)
    assert (results, timing["missing"], manager.statistics["missing"]) == ([], 1, 1)
    assert manager.get_introspection_reading(["Living"])[0]["strength"] == "unread"
    with pytest.raises(SubstrateError, match=r"\[1, 2, 32\]"):
        manager.detect_and_expand(torch.zeros(1, 32))


def test_a_prompt_warms_what_its_strongest_tokens_open(pack: LensPack, tiny_substrate: Substrate):
    manager = dual(pack, load_threshold=0.5)
    opened = manager.prewarm_from_prompt("What is a cat?", tiny_substrate)
    assert set(manager.loaded_lenses) == {"Living", "Made", *opened}
    with pytest.raises(ConfigError, match="use_activation_lenses"):
        DynamicLensManager(pack, use_activation_lenses=False, use_text_lenses=True).prewarm_from_prompt(
            "Hi", tiny_substrate
        )


def test_paths_fingerprints_and_the_way_back_to_the_base(pack: LensPack):
    manager = dual(pack, **WIDE)
    assert manager.get_concept_path("Cat") == ["Living", "Animal", "Cat"]
    with pytest.raises(ConceptError, match="nearest: Cat"):
        manager.get_concept_path("cat")
    base = manager.get_loaded_fingerprint()
    assert base == fingerprint(["Made", "Living"], LEVEL)
    manager.detect_and_expand(state())
    assert manager.get_loaded_fingerprint() == fingerprint(PARENTS, LEVEL)
    assert manager.statistics["loads"] == 4
    manager.reset_to_base()
    assert manager.get_loaded_fingerprint() == base
    with pytest.raises(FTWError, match="nothing has been read"):
        manager.get_introspection_reading()


def test_introspection_says_strong_above_seven_tenths(pack: LensPack):
    manager = dual(pack, **WIDE)
    manager.detect_and_expand(state())
    for reading in manager.get_introspection_reading():
        probability = reading["probability"]
        words = {True: "strong", False: "moderate" if probability > 0.4 else "weak"}
        assert reading["strength"] == words[probability > 0.7]
        assert reading["path"][-1] == reading["concept"]


def test_requests_open_and_close_branches(pack: LensPack):
    manager = dual(pack, load_threshold=1.0, unload_threshold=1.0)
    assert manager.request_lens_expansion("Animal", "curious")["opened"] == ["Animal", "Plant", "Cat"]
    manager.detect_and_expand(state())
    assert "Cat" in manager.loaded_lenses
    assert set(manager.request_lens_collapse("Living")["closed"]) == {"Animal", "Plant", "Cat"}
    with pytest.raises(ConceptError, match="Cat"):
        manager.request_lens_expansion("Cats")


def test_a_manifest_bounds_what_is_read_and_arguments_go_before_it(pack: LensPack):
    manifest = DeploymentManifest.from_json(
        {
            "manifest_id": "m",
            "layer_bounds": {"default_max_layer": 1, "always_load_layers": [0]},
            "explicit_concepts": {"always_exclude": ["Tool"]},
            "dynamic_loading": {"parent_threshold": 0.0, "unload_threshold": 0.0, "max_loaded_concepts": 3},
        }
    )
    small = DynamicLensManager(pack, manifest=manifest)
    small.detect_and_expand(state())
    assert small.statistics["refused"] == 1
    large = DynamicLensManager(pack, manifest=manifest, max_loaded_lenses=10)
    large.detect_and_expand(state())
    assert set(large.loaded_lenses) == {"Living", "Made", "Animal", "Plant"}
    with pytest.raises(ConfigError, match="does not admit 'Tool': excluded by name"):
        large.request_lens_expansion("Tool")
    static = DynamicLensManager(pack, manifest="benchmark-v1")
    assert set(static.loaded_lenses) == set(PARENTS)
    with pytest.raises(ConfigError, match="no deployment preset"):
        DynamicLensManager(pack, manifest="chat")


def test_budgets_that_cannot_be_are_refused(pack: LensPack):
    manager = dual(pack)
    assert manager.preload_pack_to_ram(64) == manager.preload_pack_to_ram() == 6
    for budget in (0, 0.001):
        with pytest.raises(ConfigError, match=r"MB|max_ram_mb"):
            manager.preload_pack_to_ram(budget)
    with pytest.raises(ConfigError, match="smallest workable value is 2"):
        dual(pack, max_loaded_lenses=1)


def test_watched_concepts_are_always_read(pack: LensPack):
    manager = dual(pack, load_threshold=1.0, unload_threshold=1.0, watch=["Animal"], keep_top_k=1)
    results, _ = manager.detect_and_expand(state())
    assert {"Animal", "Cat"} <= {name for name, _, _ in results}


def test_on_a_shelf_with_room_for_half_the_readings_are_the_same(pack: LensPack, tmp_path: Path):
    folder = pack.save(tmp_path / "pack")
    row_bytes = PackIndex.open(folder).cold().bank(1).slots.row_bytes
    with open_shelf(folder, ShelfConfig(hot_mb=3.5 * row_bytes / 2**20)) as shelf:
        resident, loaded = dual(pack), dual(pack, holder=shelf)
        for seed in range(8):
            one, other = (
                manager.detect_and_expand_dual(hidden_state=state(seed), token_text=" cat")
                for manager in (resident, loaded)
            )
            for kind in ("activation_scores", "text_scores", "combined_scores"):
                assert one[kind] == pytest.approx(other[kind], abs=1e-5)
            assert resident.get_loaded_fingerprint() == loaded.get_loaded_fingerprint()
        assert loaded.statistics["holder"]["cold_loads"] > 0
        assert loaded.statistics["errors"] == 0


def test_from_a_folder_nothing_is_read_that_is_not_asked_for(pack: LensPack, tmp_path: Path):
    index = PackIndex.open(pack.save(tmp_path / "pack"))
    expected, _ = dual(pack).detect_and_expand_text("feline")
    for shard in (tmp_path / "pack").glob("layer*/lenses.safetensors"):
        shard.unlink()
    writes = DynamicLensManager(index, use_activation_lenses=False, use_text_lenses=True, base_layers=[0])
    assert writes.detect_and_expand_text("feline")[0] == expected
    assert writes.get_concept_path("Cat") == ["Living", "Animal", "Cat"]
    assert writes.statistics["holder"] == {}


def test_a_shelf_of_its_own_holds_what_the_budget_says_and_is_let_go(pack: LensPack, tmp_path: Path):
    folder = pack.save(tmp_path / "pack")
    row_mb = PackIndex.open(folder).cold().bank(1).slots.row_bytes / 2**20
    with DynamicLensManager(folder, base_layers=[0], shelf=ShelfConfig(hot_mb=4.5 * row_mb)) as manager:
        resident = DynamicLensManager(pack, base_layers=[0], max_loaded_lenses=4)
        for seed in range(6):
            one, other = (each.detect_and_expand(state(seed))[0] for each in (manager, resident))
            assert dict(row[:2] for row in one) == pytest.approx(dict(row[:2] for row in other), abs=1e-5)
        held = manager.statistics["holder"]
        assert held["hot"] <= 4
        assert held["hot_bytes"] <= 4.5 * row_mb * 2**20
    with pytest.raises(ConfigError, match=r"smallest workable budget is hot_mb=(\S+) \(3 lenses\)") as refused:
        DynamicLensManager(folder, base_layers=[0], shelf=ShelfConfig(hot_mb=row_mb))
    least = float(str(refused.value).split("hot_mb=")[-1].split(" ")[0])
    DynamicLensManager(folder, base_layers=[0], shelf=ShelfConfig(hot_mb=least)).close()
    with pytest.raises(ConfigError, match="give the pack's folder"):
        DynamicLensManager(pack, shelf=ShelfConfig())
    with pytest.raises(ConfigError, match="by='rank'"):
        DynamicLensManager(folder, shelf=ShelfConfig(), by="rank")
    assert not [thread for thread in threading.enumerate() if thread.name == "ftw-shelf"]


def test_a_file_cut_while_the_model_writes_costs_readings_and_not_the_answer(tmp_path: Path, tiny_substrate: Substrate):
    pack = make_pack(tiny_substrate, hidden=64)  # wide enough not to be kept in memory from the start
    folder, tokens = pack.save(tmp_path / "pack"), list[int]()
    row_mb = PackIndex.open(folder).cold().bank(1).slots.row_bytes / 2**20

    def cut(_: int, reading: TokenReading) -> None:
        tokens.append(reading.token_id)
        if len(tokens) == 6:
            for shard in folder.glob("layer[12]/lenses.safetensors"):
                os.truncate(shard, 200)

    options = {"max_new_tokens": 24, "do_sample": True, "seed": 0}
    budget = ShelfConfig(hot_mb=3.5 * row_mb, prefetch=False)
    # More lenses than fit: they are read in turns, from disk at every token.
    with DynamicLensManager(folder, base_layers=[0], max_loaded_lenses=6, shelf=budget, **WIDE) as manager:
        timeline = Monitor(tiny_substrate, manager.bank).generate("Hello", on_token=cut, **options)
        statistics = manager.statistics
    expected = Monitor(tiny_substrate, pack.bank()).generate("Hello", **options)
    assert isinstance(timeline, Timeline)
    assert isinstance(expected, Timeline)
    assert timeline.token_ids.tolist() == expected.token_ids.tolist()
    there_TN = ~np.isnan(timeline.logits_TN)
    assert there_TN[:3].all()
    assert there_TN[-1].any()
    assert not there_TN[-1].all()
    np.testing.assert_allclose(timeline.logits_TN[there_TN], expected.logits_TN[there_TN], atol=1e-5)
    assert statistics["holder"]["failed"] == (~there_TN[-1]).sum()
    assert statistics["missing_lenses"] == (~there_TN).sum()


@pytest.mark.parametrize("levels", [None, [1], [0, 2]])
def test_an_index_gives_what_the_whole_pack_gives(pack: LensPack, tmp_path: Path, levels: list[int] | None):
    whole = load_pack(pack.save(tmp_path / "pack"), levels=levels)
    index = PackIndex.open(tmp_path / "pack", levels=levels)
    assert (index.names, index.levels) == (whole.names, whole.levels)
    assert index.text is not None
    assert whole.text is not None
    assert torch.equal(index.text.score(["the cat"]), whole.text.score(["the cat"]))
    for state_BLD in (state(0), state(1)):
        logits = index.bank()(state_BLD)
        assert torch.equal(logits, whole.bank()(state_BLD))
        assert torch.equal(index.bank().percentile(logits), whole.bank().percentile(logits))
    assert index.concepts is not None
    assert index.concepts.path("Cat") == ["Living", "Animal", "Cat"]
    with pytest.raises(PackError, match=r"its levels are \[0, 1, 2\]"):
        PackIndex.open(tmp_path / "pack", levels=[7])
