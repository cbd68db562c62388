"""What each text says about each concept, checked against the definition of the relations on random taxonomies."""

import dataclasses
import os
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy_dictionary import write_wordnet

from ftw.errors import ConfigError, DataError
from ftw.map.compose import ComposeConfig, check_leaks, compose, notes, preview
from ftw.map.concept import Concept, ConceptPack
from ftw.map.kinship import Kinship
from ftw.map.samples import SampleTable
from ftw.map.sentences import CONTEXTS, phrase, written
from ftw.map.wikipedia import Article, part
from ftw.map.wordnet import WordNet

NOUNS = {
    "entity": (["entity"], [], "that which exists"),
    "animal": (["animal", "beast"], ["entity"], 'it moves; "the animal slept in the barn"'),
    "dog": (["dog"], ["animal"], 'it barks; "the dog barked at the moon"'),
    "terrier": (["terrier"], ["dog"], "it digs"),
    "rex": (["Rex"], ["dog"], "a dog of the pharaohs"),
    "cat": (["cat"], ["animal"], "it meows"),
    "lion": (["lion"], ["cat"], "it roars"),
    "food": (["food"], ["entity"], "it is eaten"),
    "sausage": (["sausage", "dog"], ["food"], "meat in a skin"),
    "bread": (["bread"], ["food"], "it is baked"),
}
LEAD = "{} has been written about at some length, so that what is said here is long enough to be kept by everyone."
PLAIN = ComposeConfig(contexts=2, neutral=5, background_articles=4)


@pytest.fixture
def wordnet(tmp_path: Path) -> WordNet:
    return write_wordnet(tmp_path / "wn", NOUNS)


def pack_of(wordnet: WordNet, keys: list[str]) -> ConceptPack:
    """A pack of some synsets; parents are the nearest kept hypernyms."""
    names = {f"{key}.n.01": key for key in keys}
    above = {name: wordnet.ancestors(name) & names.keys() for name in names}
    concepts = {}
    for name, key in names.items():
        parents = sorted(up for up in above[name] if not any(up in above[other] for other in above[name]))
        concepts[key] = Concept(
            name=key,
            level=len(above[name]),
            parents=[names[parent] for parent in parents],
            definition=wordnet.synset(name).definition,
            lemmas=list(wordnet.synset(name).lemmas),
            synsets=[name],
        )
    return ConceptPack(pack_id="toy", version="1.0.0", concepts=concepts)


def articles_of(titles: list[str], wanted: str = "test") -> list[Article]:
    """An article on each title that falls into the wanted part (what stands in parentheses means nothing)."""
    numbered = ((title, f"{title} ({number})") for title in titles for number in range(60))
    chosen = {title: name for title, name in numbered if part(name) == wanted}
    return [Article(name, LEAD.format(name)) for name in chosen.values()]


def marks(table: SampleTable, split: str) -> dict[tuple[str, str], int]:
    """(text, concept) -> label, for the texts of one split."""
    rows = zip(table.rows, table.cols, table.labels, strict=True)
    return {(table.texts[r], table.concepts[c]): int(label) for r, c, label in rows if table.splits[r] == split}


def test_each_gloss_says_yes_above_nothing_below_and_no_elsewhere(wordnet: WordNet) -> None:
    pack = pack_of(wordnet, ["animal", "dog", "cat", "food"])
    said = marks(compose(pack, wordnet, None, dataclasses.replace(PLAIN, contexts=0), 0, []), "train")

    def of(text: str) -> list[int | None]:
        return [said.get((text, concept)) for concept in ("animal", "dog", "cat", "food")]

    assert of("it digs") == [1, 1, 0, 0]
    assert of("the dog barked at the moon") == [1, 1, 0, 0]
    assert of("it moves") == [1, None, None, 0]
    assert of("meat in a skin") == [0, 0, 0, 1]
    assert of("it was bright outside all morning") == [0, 0, 0, 0]
    assert of("the dog moved away") == [None] * 4  # names a concept: not neutral


def test_negatives_from_siblings_weigh_three_times(wordnet: WordNet) -> None:
    table = compose(pack_of(wordnet, ["animal", "dog", "cat", "food"]), wordnet, None, PLAIN, 0, [])
    weight = {
        (table.texts[r], table.concepts[c]): float(w)
        for r, c, w in zip(table.rows, table.cols, table.weights, strict=True)
    }
    assert weight["it digs", "cat"] == 3
    assert weight["it digs", "dog"] == weight["it is baked", "cat"] == 1


def test_a_context_that_names_an_outsider_says_nothing_of_him(wordnet: WordNet) -> None:
    pack = pack_of(wordnet, ["dog", "food"])
    kinship = Kinship(pack, wordnet)
    assert kinship.spoken_of("Two terriers slept.") == {0}
    assert kinship.spoken_of("The bread was late") == {1}
    assert kinship.spoken_of("It is the can of all.") == frozenset()
    config = dataclasses.replace(PLAIN, contexts=20)
    for (text, concept), label in marks(compose(pack, wordnet, None, config, 0, []), "train").items():
        names = {pack.names[index] for index in kinship.spoken_of(text)}
        assert label == 1 or concept not in names or text in {row[2] for row in NOUNS.values()}


@st.composite
def taxonomies(draw: st.DrawFn) -> tuple[dict, list[str]]:
    """A random DAG of synsets, and which of them are concepts."""
    size = draw(st.integers(3, 12))
    nouns = {}
    for number in range(size):
        above = draw(st.lists(st.integers(0, max(0, number - 1)), max_size=2, unique=True)) if number else []
        nouns[f"w{number}x"] = ([f"w{number}x"], [f"w{other}x" for other in above], f"gloss of number {number}")
    keys = draw(st.lists(st.sampled_from(sorted(nouns)), min_size=2, max_size=6, unique=True))
    return nouns, keys


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(taxonomies(), st.integers(0, 3), st.integers(0, 6))
def test_no_text_of_a_concept_its_ancestors_or_descendants_is_its_negative(
    taxonomy: tuple[dict, list[str]], seed: int, max_negatives: int
) -> None:
    nouns, keys = taxonomy
    above: dict[str, set[str]] = {}
    for key, (_, parents, _) in nouns.items():
        above[key] = {key}.union(*(above[parent] for parent in parents))
    with tempfile.TemporaryDirectory() as folder:
        wordnet = write_wordnet(Path(folder), nouns)
        config = dataclasses.replace(PLAIN, contexts=3, max_negatives=max_negatives)
        table = compose(pack_of(wordnet, keys), wordnet, None, config, seed, [])
    glosses = {row[2]: key for key, row in nouns.items()}
    negatives: Counter[str] = Counter()
    for (text, concept), label in marks(table, "train").items():
        negatives[concept] += label == 0
        if text in glosses:
            key = glosses[text]
            assert label == (concept in above[key])
            assert label == 1 or key not in above[concept]
    assert not max_negatives or max(negatives.values(), default=0) <= max_negatives
    covered = {text for text in table.texts if text in glosses}
    assert covered >= {nouns[key][2] for key in keys}


def test_the_same_seed_gives_the_same_table_and_another_seed_another(tmp_path: Path) -> None:
    nouns = {"root": (["root"], [], "the top")} | {
        f"leaf{n}": ([f"leaf{n}"], ["root"], f"gloss number {n}") for n in range(40)
    }
    wordnet = write_wordnet(tmp_path / "leaves", nouns)
    pack = pack_of(wordnet, ["root", "leaf3"])
    config = dataclasses.replace(PLAIN, max_positives=10)
    first, second, third = (compose(pack, wordnet, None, config, seed, []) for seed in (1, 1, 2))
    assert first.content_hash() == second.content_hash() != third.content_hash()


def test_a_further_concept_leaves_the_draws_of_the_others_alone(wordnet: WordNet) -> None:
    config = dataclasses.replace(PLAIN, max_positives=2, neutral=0)
    small = compose(pack_of(wordnet, ["animal", "food"]), wordnet, None, config, 0, [])
    large = compose(pack_of(wordnet, ["animal", "food", "cat"]), wordnet, None, config, 0, [])
    assert set(small.texts) <= set(large.texts)


def test_held_out_articles_are_judged_by_the_senses_of_their_titles(wordnet: WordNet) -> None:
    pack = pack_of(wordnet, ["animal", "dog", "food"])
    articles = articles_of(["Dog", "Terrier", "Sausage", "Animal", "Entity", "Lion"])
    said = {
        (text.split(" (")[0], concept): label
        for (text, concept), label in marks(compose(pack, wordnet, None, PLAIN, 0, articles), "test").items()
    }
    assert said["Terrier", "dog"] == said["Lion", "animal"] == said["Sausage", "food"] == 1
    assert said["Dog", "dog"] == 1
    assert ("Dog", "food") not in said  # a further sense of "dog" is a sausage
    assert ("Animal", "dog") not in said  # an ancestor
    assert said["Lion", "dog"] == said["Sausage", "animal"] == 0
    assert not any(title == "Entity" for title, _ in said)  # of no concept


def test_background_test_and_dev_share_no_article(wordnet: WordNet) -> None:
    titles = ["Dog", "Terrier", "Sausage", "Lion", "Cat", "Bread"]
    articles = [article for name in ("test", "dev", "background") for article in articles_of(titles, name)]
    pack = pack_of(wordnet, ["animal", "food"])
    by_part = {}
    for name in ("test", "dev"):
        table = compose(pack, wordnet, None, dataclasses.replace(PLAIN, heldout_part=name), 0, articles)
        by_part[name] = {table.groups[row] for row in table.where("test")}
        background = {table.groups[row] for row in table.where("background")}
        assert len(background) == PLAIN.background_articles
        assert not background & by_part[name]
        assert not set(table.rows) & set(table.where("background"))
    assert by_part["test"]
    assert by_part["dev"]
    assert not by_part["test"] & by_part["dev"]


def test_the_preview_counts_what_compose_gives(wordnet: WordNet) -> None:
    pack = pack_of(wordnet, ["animal", "dog", "food"])
    articles = articles_of(["Dog", "Sausage", "Lion"]) + articles_of(["Cat"], "background")
    counted = preview(pack, wordnet, PLAIN, 0, articles)
    table = compose(pack, wordnet, None, PLAIN, 0, articles)
    assert counted.pop("generated") == 0
    assert counted.pop("background") == len(table.where("background"))
    train = Counter(table.sources[row] for row in table.where("train"))
    assert counted == {**train, "wikipedia": len(table.where("test"))}


def test_concepts_with_few_articles_are_noted(wordnet: WordNet) -> None:
    pack = pack_of(wordnet, ["animal", "food", "terrier"])
    told = notes(compose(pack, wordnet, None, PLAIN, 0, articles_of(["Dog", "Lion", "Sausage"])), few=2)
    assert told == [
        "food: only 1 held-out positives",
        "terrier: no held-out positive, so no held-out figure",
    ]


def test_the_substrate_writes_about_members_of_the_closure(wordnet: WordNet, tiny_substrate) -> None:
    pack = pack_of(wordnet, ["animal", "food"])
    config = dataclasses.replace(PLAIN, generated=2, max_new_tokens=60)
    assert preview(pack, wordnet, config, 0, [])["generated"] == 4
    table = compose(pack, wordnet, tiny_substrate, config, 0, [])
    again = compose(pack, wordnet, tiny_substrate, config, 0, [])
    assert table.content_hash() == again.content_hash()
    generated = [row for row, source in enumerate(table.sources) if source == "generated"]
    assert all(table.groups[row].startswith("prompt: ") for row in generated)


def test_a_pack_that_is_not_of_wordnet_uses_its_own_hierarchy(wordnet: WordNet) -> None:
    offset = f"{wordnet.synset('dog.n.01').offset:08d}.n"
    concepts = [
        Concept(name="Mind", level=0, definition="What &%thinks."),
        Concept(
            name="Guard", level=1, parents=["Mind"], synsets=[offset, "invented.n.01"], definition="Watches the house."
        ),
        Concept(
            name="Wish",
            level=1,
            parents=["Mind"],
            definition="What is wanted.",
            record={"training_hints": {"positive_examples": ["I would so like a terrier of my own.", 7]}},
        ),
    ]
    pack = ConceptPack(pack_id="own", version="1.0.0", concepts={concept.name: concept for concept in concepts})
    kinship = Kinship(pack, wordnet)
    assert not kinship.taxonomic
    assert kinship.unknown == ["invented.n.01"]
    said = marks(compose(pack, wordnet, None, dataclasses.replace(PLAIN, contexts=0), 0, []), "train")
    assert said["What thinks.", "Mind"] == said["it barks", "Guard"] == said["it barks", "Mind"] == 1
    assert said["What is wanted.", "Mind"] == 1
    assert said["What is wanted.", "Guard"] == said["Watches the house.", "Wish"] == 0
    assert ("What thinks.", "Wish") not in said
    hint = "I would so like a terrier of my own."
    assert said[hint, "Wish"] == 1
    assert (hint, "Guard") not in said


def test_a_text_in_two_splits_is_refused_by_name() -> None:
    empty = np.array([], dtype=int)
    table = SampleTable(
        texts=["It barks, and runs.", "it  barks and runs"],
        groups=["dog", "Dog"],
        splits=["train", "test"],
        sources=["definition", "wikipedia"],
        concepts=["dog"],
        rows=empty,
        cols=empty,
        labels=empty,
        weights=empty,
    )
    with pytest.raises(DataError, match=r"1 texts stand in two splits: 'it  barks and runs' in train \(dog\) and test"):
        check_leaks(table)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"heldout": "wiki"}, "the choices are wikipedia, none"),
        ({"heldout_part": "train"}, "the choices are test, dev, all"),
        ({"max_positives": 0}, "must be at least 1"),
        ({"generated": 1}, "needs a substrate"),
        ({"max_characters": 10}, "at least 80"),
    ],
)
def test_options_that_cannot_be_are_refused(wordnet: WordNet, change: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        compose(pack_of(wordnet, ["animal"]), wordnet, None, dataclasses.replace(PLAIN, **change), 0, [])


def test_a_concept_without_any_text_is_named(wordnet: WordNet) -> None:
    pack = ConceptPack(pack_id="own", version="1", concepts={"Bare": Concept(name="Bare", level=0)})
    with pytest.raises(DataError, match="no training text for 'Bare'"):
        compose(pack, wordnet, None, PLAIN, 0, [])


def test_sentences_are_many_and_have_one_gap() -> None:
    assert len(set(CONTEXTS)) == len(CONTEXTS) >= 20
    assert all(context.count("{}") == 1 for context in CONTEXTS)


def test_names_stand_bare_and_things_have_an_article(wordnet: WordNet) -> None:
    assert phrase(wordnet, "rex.n.01") == "Rex"
    assert phrase(wordnet, "sausage.n.01") == "the sausage"


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        ("Sure! Here are two sentences: The dog ran over the wide field. It was", "The dog ran over the wide field."),
        (
            "Certainly, here is an entry:\n\nThe dog is an animal that lives\nwith us.",
            "The dog is an animal that lives with us.",
        ),
        ("1. The dog has four legs and a tail. 2.", "The dog has four legs and a tail."),
        ("The dog which ran over the wide green field and", ""),
        ("I'm sorry, but I can't write about that at all.", ""),
        ("Dog.", ""),
    ],
)
def test_of_a_reply_the_text_is_kept(reply: str, text: str) -> None:
    assert written(reply, 700) == text


@pytest.mark.skipif("FTW_FIRST_LIGHT" not in os.environ, reason="set FTW_FIRST_LIGHT to the folder of that pack")
def test_first_light_composes_with_bounded_marks(wordnet: WordNet) -> None:
    pack = ConceptPack.load(Path(os.environ["FTW_FIRST_LIGHT"])).subset(levels=[0, 1, 2])
    table = compose(pack, wordnet, None, dataclasses.replace(PLAIN, max_negatives=100), 0, [])
    negatives = np.bincount(table.cols[table.labels == 0], minlength=len(table.concepts))
    assert len(table.concepts) == len(pack)
    assert negatives.max() == 100
    positives = np.bincount(table.cols[table.labels == 1], minlength=len(table.concepts))
    assert positives.min() >= 1
    place = {name: index for index, name in enumerate(table.concepts)}
    for name in pack.names:
        assert all(positives[place[name]] >= positives[place[child]] for child in pack.children(name))
