"""Claims about the page of cards: one file without requests, data that reads back, and hostile text that stays text."""

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from ftw.map.cards import Card, Cards, ShownText
from ftw.map.telling_words import WordsRemoved
from ftw.ui.cards import write_cards

HOSTILE = "</script><script>alert(1)</script><!--\u2028\u202e\ud83d&<b>"


def cards_of(num: int) -> Cards:
    concepts: dict[str, dict[str, Any]] = {
        f"concept {n}": {"auroc": 0.5 + n / (2 * num), "auroc_low": 0.4, "auroc_high": 1.0} for n in range(num)
    }
    concepts["concept 1"] |= {"no_better_than": ["text"], "ece": float("nan"), "auroc_text": 0.99}
    concepts[HOSTILE] = {"auroc": float("nan"), "num_positive": 0}
    shown = ShownText(HOSTILE, 1, "given", 1.25, [(HOSTILE, 0.5), (" x", -0.25)])
    words = WordsRemoved([HOSTILE], 3, 4, 2, 0.9, 0.8, 0.01, 0.2, float("nan"), float("nan"))
    card = Card(
        HOSTILE, HOSTILE, ["root", HOSTILE], [(0.25, 0.5, 4.0), (0.9, 1.0, 0.3)], [-1.0, 0.0, 1.0], [1, 2], [3, 4], True
    )
    card.strongest, card.confused, card.words = [shown], [("concept 0", 0.25, 3)], words
    return Cards(concepts, {"auroc": 0.9}, dict.fromkeys(concepts, 0), {HOSTILE: card}, [HOSTILE])


@pytest.fixture
def page(tmp_path: Path) -> str:
    path = write_cards(tmp_path / "cards.html", cards_of(8), title=f"Cards {HOSTILE}", command=HOSTILE)
    return path.read_text("utf-8")


def document(page: str) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, flags=re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_the_data_reads_back_with_its_text_tamed_and_what_is_no_number_as_null(page: str):
    data = document(page)
    tamed = HOSTILE.replace("\u202e", "·").replace("\ud83d", "·")
    assert data["lenses"][-1]["name"] == tamed
    assert data["cards"][tamed]["strongest"][0]["pieces"] == [[tamed, 0.5], [" x", -0.25]]
    assert data["cards"][tamed]["words"]["text_before"] is None
    by_name = {lens["name"]: dict(zip(data["keys"], lens["values"], strict=True)) for lens in data["lenses"]}
    assert by_name["concept 1"]["auroc_text"] == 0.99
    assert by_name["concept 0"]["auroc_text"] is None
    aurocs = [lens["values"][0] for lens in data["lenses"][:-1]]
    assert aurocs == sorted(aurocs, reverse=True)
    assert [lens["weak"] for lens in data["lenses"] if lens["name"] == "concept 1"] == [["text"]]


def test_shares_of_the_reliability_picture_have_intervals_that_hold_them(page: str):
    (card,) = document(page)["cards"].values()
    for stated, found, texts, low, high in card["reliability"]:
        assert 0 <= low <= found <= high <= 1
        assert (stated, texts) in {(0.25, 4.0), (0.9, 0.3)}


def test_only_the_pages_own_script_may_run_and_nothing_is_requested(page: str):
    scripts = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    assert len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page
    assert "alert(1)</script>" not in page
    assert not re.search(r"(src|href)\s*=", page)
    assert "innerHTML" not in page


def test_thousands_of_lenses_stay_a_small_file(tmp_path: Path):
    path = write_cards(tmp_path / "cards.html", cards_of(5000), title="many")
    assert path.stat().st_size < 1_000_000
