"""A page says what a pack says, with controls and intervals, and lets no name of a pack become markup."""

from dataclasses import replace
from pathlib import Path

import yaml
from toy_pack import make_pack

from ftw.map.model_card import model_card, write_card
from ftw.map.pack import load_pack


def test_a_page_has_a_header_figures_with_controls_and_warnings(tmp_path: Path):
    pack = make_pack()
    figures = {"auroc": 0.9, "auroc_low": 0.85, "auroc_high": 0.95, "auroc_text": 0.8, "no_better_than": ["text"]}
    pack = replace(pack, metrics={**pack.metrics, "concept0": figures}, mean_metrics={**figures, "auroc_shuffled": 0.5})
    folder = pack.save(tmp_path / "pack")
    text = model_card(folder)
    header = yaml.safe_load(text.split("---\n")[1])
    assert header["library_name"] == "ftw"
    assert (header["substrate"], header["version"]) == ("tiny", "1.2.3")
    for words in ("0.850 – 0.950", "words alone", "shuffled labels", "1 of them are no better than a control"):
        assert words in text
    for words in ("What it must not be used for", "`ftw train`", "| 0 | 2 |", "do not show who wrote them"):
        assert words in text
    write_card(folder)
    assert load_pack(folder).names


def test_a_pack_without_figures_says_so(tmp_path: Path):
    assert "No figures" in model_card(make_pack(whole=False).save(tmp_path / "pack"))


def test_no_name_becomes_markup(tmp_path: Path):
    pack = make_pack()
    evil = "x | <script>alert(1)</script> [a](http://b) `c`\n# title\n---"
    pack = replace(pack, pack_id=evil, recipe=replace(pack.recipe, substrate=evil, solver=evil))
    text = model_card(pack.save(tmp_path / "pack"))
    header, body = text.split("---\n", 2)[1:]
    assert "<script>" not in body
    assert "\n# title" not in body
    assert yaml.safe_load(header)["substrate"] == evil
