"""Every bench runs through on small sizes, and what it compares is the same thing done in two ways."""

import importlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_model import byte_tokenizer, tiny_llama

from ftw.bench.bank import _one_by_one, auroc_change
from ftw.bench.measure import BenchConfig, Row, Stopwatch
from ftw.bench.synthetic import made_up_lineage, made_up_pack, made_up_stack, states
from ftw.bench.text import made_up_bank, pipeline
from ftw.bench.train import logits_one_by_one, made_up_samples
from ftw.cli._schema import BENCHES, BenchJob
from ftw.cli.bench import bench
from ftw.errors import ConfigError
from ftw.map.pack import load_pack
from ftw.substrate.model import SubstrateConfig

QUICK = {"seconds": 0.002, "quick": True, "device": "cpu"}


def measured(name: str, **config: object) -> list[Row]:
    watch = Stopwatch(BenchConfig(**{**QUICK, **config}))  # type: ignore[arg-type]
    return list(getattr(importlib.import_module(f"ftw.bench.{name}"), f"{name}_rows")(watch))


@pytest.mark.parametrize("name", [name for name in BENCHES if name not in ("monitor", "bank", "collect")])
def test_a_bench_gives_rows_that_json_takes(name: str):
    check(measured(name))


def test_collecting_is_held_against_bare_passes_and_single_prompts(tmp_path: Path):
    tiny_llama().save_pretrained(tmp_path / "toy")
    byte_tokenizer().save_pretrained(tmp_path / "toy")
    rows = measured("collect", substrate=SubstrateConfig(name="local", path=str(tmp_path / "toy"), sources=["path"]))
    check(rows)
    assert [row.baseline.split()[0] for row in rows] == ["bare", "output_hidden_states,"]


def test_the_bank_bench_has_every_family_precision_and_size_and_draws_its_curve(tmp_path: Path):
    rows = bench(BenchJob(bench="bank", json=str(tmp_path / "bank.json"), **QUICK))
    check(rows)
    cases = " ".join(row.case for row in rows)
    for words in ("linear, 1 layer, float32", "linear, 3 layers, int8", "share of a token", "mlp", "change", "curve"):
        assert words in cases
    told = json.loads((tmp_path / "bank.json").read_text())
    assert set(told) == {"machine", "commit", "rows"}
    assert len(told["rows"]) == len(rows)
    assert "<svg" in (tmp_path / "bank.svg").read_text()


def test_rows_can_be_printed_as_json_and_nothing_else(capsys: pytest.CaptureFixture[str]):
    rows = bench(BenchJob(bench="text", json="", **QUICK))
    assert len(json.loads(capsys.readouterr().out)["rows"]) == len(rows)


def test_a_pack_can_be_measured_instead_of_made_up_lenses(tmp_path: Path):
    folder = made_up_pack(tmp_path, 400, width=64, layers=(0, 2))
    for name in ("load", "shelf"):
        rows = measured(name, pack=str(folder))
        check(rows)
        assert any(row.n == 400 for row in rows) or name == "shelf"


@pytest.mark.parametrize(
    ("job", "words"),
    [
        ({"bench": "bnk"}, "bank"),
        ({"bench": "text", "plot": "x.svg"}, "curve"),
        ({"bench": "bank", "plot": ""}, "--plot"),
        ({"bench": "monitor"}, "pack=FOLDER"),
    ],
)
def test_what_cannot_be_done_is_refused(job: dict, words: str):
    with pytest.raises(ConfigError, match=words):
        bench(BenchJob(**{**QUICK, **job}))


def test_lenses_one_by_one_give_what_their_bank_gives():
    bank = made_up_stack(7, layers=(0,), width=64, hidden=16).bank()
    state_1LD, found = states(1, layers=1, width=64), list[torch.Tensor]()
    call = _one_by_one(bank, state_1LD, found.append)
    call()
    torch.testing.assert_close(torch.cat(found, dim=1), bank(state_1LD), rtol=1e-5, atol=1e-5)


def test_a_precision_that_changes_nothing_changes_no_auroc():
    bank = made_up_stack(20, layers=(0,), width=64).bank()
    changed = auroc_change(bank, bank)
    assert (changed["auroc_change_largest"], changed["order_kept"]) == (0, 1)
    assert 0.6 < changed["auroc"] < 0.99


def test_the_pipelines_give_what_the_text_bank_gives():
    bank, texts = made_up_bank(Stopwatch(BenchConfig(**QUICK)), np.random.default_rng(0))  # type: ignore[arg-type]
    for lens in (0, 7):
        expected = pipeline(bank, lens).decision_function(texts[:5])
        np.testing.assert_allclose(bank.score(texts[:5])[:, lens].numpy(), expected, atol=1e-4)


def test_made_up_samples_are_learned_by_the_loop():
    samples = made_up_samples(Stopwatch(BenchConfig(**QUICK)))  # type: ignore[arg-type]
    lenses = range(6)
    assert 0.6 < samples.auroc(logits_one_by_one(samples, lenses), lenses) < 1


def test_a_made_up_pack_is_sound_and_its_tree_has_every_lens(tmp_path: Path):
    pack = load_pack(made_up_pack(tmp_path, 80, hidden=4, width=32))
    lineage = made_up_lineage(pack.names)
    assert lineage.is_root_N.sum() == 8
    assert sum(len(rows) for rows in lineage.children_of) == 72
    assert all(
        lineage.level_N[child] == lineage.level_N[row] + 1 for row in range(8) for child in lineage.children_of[row]
    )


def check(rows: Sequence[Row]) -> None:
    assert rows
    for row in rows:
        record = row.record()
        assert json.loads(json.dumps(record)) == record
        assert record["ms"] > 0
        assert record["baseline_ms"] > 0
        assert record["ratio"] == pytest.approx(row.ms / row.baseline_ms, rel=1e-3)
        if row.floor_ms is not None:
            assert record["over_floor"] == pytest.approx(row.ms / row.floor_ms, rel=1e-3)
