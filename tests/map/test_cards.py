"""Claims about cards: every number on them is that of the texts they show."""

import json

import numpy as np
import pytest
from toy_run import WORDS

from ftw.errors import ConfigError
from ftw.map.cards import CardsConfig, confusions, make_cards, most_telling, reliability_bins, with_training_controls
from ftw.map.collect import CollectConfig, collect
from ftw.map.concept import ConceptPack
from ftw.map.concept_record import Concept
from ftw.map.contributions import TextReader
from ftw.map.evaluate import EvaluateConfig
from ftw.map.pack import LensPack, Recipe
from ftw.map.samples import SampleTable, SampleTableBuilder
from ftw.map.telling_words import HeldOut
from ftw.map.text_control import fit_text_bank
from ftw.map.text_level import text_level_logits
from ftw.map.training.fit import evaluate_stack
from ftw.map.training.solver import solve_stack
from ftw.substrate.model import Substrate

NAMES = [*WORDS, "empty"]


def samples() -> SampleTable:
    """Texts of either concept, each a negative of the other; nothing held out for "empty"."""
    builder, draw = SampleTableBuilder(NAMES), np.random.default_rng(0)
    for split, num in (("train", 24), ("test", 14)):
        for number in range(num):
            for concept, words in WORDS.items():
                chosen = " ".join(draw.choice(words, 3))
                row = builder.text(f"{chosen} {split} {number}", group=f"{split} {number}", split=split, source="given")
                for other in NAMES if split == "train" else WORDS:
                    builder.mark(row, other, int(other == concept or (other == "empty" and number % 2 == 0)))
    return builder.build()


@pytest.fixture(scope="module")
def made(tiny_substrate: Substrate, tmp_path_factory: pytest.TempPathFactory):
    """A pack with its held-out texts, figures, logits and cards."""
    table = samples()
    config = CollectConfig(layers=[1, 3], pools=["mean"], tokens_per_text={}, precision="float32")
    folder = tmp_path_factory.mktemp("cards") / "store"
    with collect(tiny_substrate, table, config, progress=False, folder=folder) as store:
        stack = solve_stack(store, shrinkage=20.0, progress=False)
        evaluation = evaluate_stack(stack, store, config=EvaluateConfig(draws=20, floor_draws=2))
        rows = table.where("test")
        logits_SN = text_level_logits(stack, store, rows, wanted_SN=np.ones((len(rows), len(NAMES)), dtype=bool))
    recipe = Recipe(
        substrate="tiny",
        fingerprint=tiny_substrate.fingerprint,
        width=32,
        dtype="float32",
        precision="float32",
        layers=[1, 3],
    )
    concepts = ConceptPack.of("toy", "1.0.0", [Concept(name=n, level=0, definition=f"a {n}") for n in NAMES], {})
    pack = LensPack(
        pack_id="toy",
        version="0.1.0",
        stack=stack,
        recipe=recipe,
        levels=dict.fromkeys(NAMES, 0),
        concepts=concepts,
        text=fit_text_bank(table, progress=False),
    )
    reader = TextReader(tiny_substrate, (1, 3), "mean", 128, "float32")
    held_out = table.select(rows, NAMES)
    cards = make_cards(pack, reader, held_out, evaluation, logits_SN, training=table, config=CardsConfig(words=5))
    return pack, held_out, logits_SN, cards


def test_histograms_hold_every_text_and_reliability_every_bin(made):
    _, held_out, _, cards = made
    for name in WORDS:
        card = cards.cards[name]
        assert sum(card.positive) == sum(card.negative) == len(held_out) / 2
        assert len(card.edges) == len(card.positive) + 1 == 25
        assert sum(texts for *_, texts in card.reliability) <= len(held_out) + 1e-9
    assert cards.cards["whale"].definition == "a whale"


def test_shown_texts_have_the_logits_they_were_evaluated_with_and_shares_that_add_up(made):
    pack, held_out, logits_SN, cards = made
    row_of = {text: row for row, text in enumerate(held_out.texts)}
    for name in WORDS:
        card, lens = cards.cards[name], pack.names.index(name)
        assert card.exact
        logits = [shown.logit for shown in card.strongest]
        assert logits == sorted(logits, reverse=True)
        # The store keeps states in float16.
        assert logits == pytest.approx(np.sort(logits_SN[:, lens])[::-1][:4].tolist(), abs=0.02)
        assert all(shown.label for shown in card.missed)
        for shown in [*card.strongest, *card.missed]:
            assert "".join(piece for piece, _ in shown.pieces) == shown.text
            assert shown.logit == pytest.approx(float(logits_SN[row_of[shown.text], lens]), abs=0.02)
            assert sum(share for _, share in shown.pieces) == pytest.approx(shown.logit, abs=1e-3)
        assert len(card.training) == 3
        assert all("train" in shown.text for shown in card.training)


def test_a_lens_without_held_out_texts_has_a_card_that_says_so(made):
    card = made[-1].cards["empty"]
    assert (sum(card.positive), card.strongest, card.confused, card.words) == (0, [], [], None)
    assert card.training


def test_telling_words_are_taken_out_of_the_texts_of_each_card(made):
    whale, car = (made[-1].cards[name].words for name in WORDS)
    assert set(whale.words) == set(WORDS["whale"])
    assert set(car.words) == set(WORDS["car"])
    assert whale.num_changed == car.num_changed == 14


def test_confusion_is_one_minus_the_auroc_against_that_concept_alone(made):
    pack = made[0]
    rng = np.random.default_rng(1)
    labels = np.eye(3)[np.arange(30) % 3]
    logits = rng.normal(size=(30, 3)).round(1) + labels
    held_out = HeldOut(NAMES, ["t"] * 30, ["g"] * 30, labels, np.ones((30, 3)), logits)
    found = {name: (share, num) for name, share, num in confusions(pack, held_out, NAMES)["whale"]}
    for other in (1, 2):
        gaps = logits[labels[:, 0] > 0, 0][:, None] - logits[labels[:, other] > 0, 0]
        expected = 1 - ((gaps > 0) + 0.5 * (gaps == 0)).mean()
        assert found[NAMES[other]] == (pytest.approx(expected), 10)


def test_concepts_above_and_below_are_no_confusions(made):
    pack = made[0]
    level = {"whale": 1, "car": 0, "empty": 0}
    listed = [Concept(name=n, level=at, parents=["car"] if n == "whale" else []) for n, at in level.items()]
    tree = LensPack(**{**vars(pack), "concepts": ConceptPack.of("toy", "1.0.0", listed, {})})
    labels = np.eye(3)[np.arange(30) % 3]
    held_out = HeldOut(NAMES, ["t"] * 30, ["g"] * 30, labels, np.ones((30, 3)), -labels)
    found = confusions(tree, held_out, NAMES)
    assert [name for name, *_ in found["whale"]] == ["empty"]
    assert [name for name, *_ in found["car"]] == ["empty"]


def test_a_calibrated_lens_lies_on_the_diagonal_at_the_prior_whatever_the_base_rate():
    rng = np.random.default_rng(0)
    chance = rng.random(200_000)
    positive = rng.random(len(chance)) < chance
    kept = positive | (rng.random(len(chance)) < 0.2)  # negatives are rarer than the prior says
    bins = reliability_bins(chance[kept], positive[kept], np.ones(int(kept.sum())), 10, 0.5)
    assert len(bins) == 10
    for stated, found, texts in bins:
        assert found == pytest.approx(stated, abs=0.02)
        assert texts > 1000


def test_the_most_telling_are_weak_ones_and_the_extremes_and_no_more_than_asked():
    figures = {
        f"c{n}": {"auroc": 0.8, "difference": 0.0, "num_positive": 20, "ece": 0.1, "ece_floor": 0.1} for n in range(50)
    }
    figures["c7"] |= {"auroc": 0.5, "no_better_than": ["shuffled"]}
    figures["c8"]["difference"] = 0.3
    figures["c9"]["difference"] = -0.3
    figures["c10"]["fpr_at_threshold_1"] = 0.4
    figures["c11"]["ece"] = 0.5
    figures["c12"]["auroc"] = float("nan")
    assert set(most_telling(figures, 5)) == {"c7", "c8", "c9", "c10", "c11"}
    assert len(most_telling(figures, 20)) == 20
    assert most_telling(figures, 50) == list(figures)
    assert most_telling(figures, 0) == []


def test_controls_of_training_are_carried_over_where_the_texts_give_none(made):
    pack = made[0]
    pack.metrics = {"whale": {"auroc_shuffled": 0.5, "selectivity": 0.4, "no_better_than": ["shuffled", "text"]}}
    here = {"whale": {"auroc": 0.9, "auroc_text": 0.8, "no_better_than": []}, "car": {"auroc": 0.9}}
    figures, carried = with_training_controls(here, pack)
    assert carried == ["shuffled"]
    assert figures["whale"]["selectivity"] == 0.4
    assert figures["whale"]["no_better_than"] == ["shuffled"]  # text was measured here, and beaten
    assert figures["car"]["no_better_than"] == []


def test_cards_are_plain_json_and_wrong_numbers_are_named(made):
    text = json.dumps(made[-1].to_json(), allow_nan=False)
    assert json.loads(text)["cards"]["car"]["name"] == "car"
    for wrong in ({"limit": -1}, {"texts": 0}, {"bins": 1}, {"edited_texts": 1}):
        with pytest.raises(ConfigError, match="cards"):
            CardsConfig(**wrong)
