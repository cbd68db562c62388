"""Leads of articles: what is read, to which part an article belongs, and what its title means."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_dictionary import write_wordnet

from ftw.errors import DataError, SourceError
from ftw.map.wikipedia import PARTS, Article, cut, load_articles, part, title_senses

LEAD = "It is a thing that has been written about at some length, so that its lead is long enough to be kept here."


def write(folder: Path, content: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summaries_en-us.json").write_text(json.dumps(content))
    return folder


def test_articles_are_found_below_a_folder_without_stubs_and_second_copies(tmp_path: Path) -> None:
    content = {
        title: {"title": title, "extract": extract, "topic": None}
        for title, extract in [("B", LEAD), ("A", LEAD + " A."), ("Copy of B", LEAD), ("Stub", "Short.")]
    }
    write(tmp_path / "package" / "data", content)
    assert [article.title for article in load_articles(tmp_path)] == ["A", "B"]


@pytest.mark.parametrize("content", [{"A": {"title": "A"}}, [1], {"A": {"title": "A", "extract": 3}}, 7])
def test_a_file_of_another_shape_is_refused_by_name(tmp_path: Path, content: object) -> None:
    with pytest.raises(DataError, match=r"summaries_en-us\.json is not a table"):
        load_articles(write(tmp_path, content))


def test_a_folder_without_articles_says_what_to_fetch(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="fetch the source wikipedia-leads"):
        load_articles(tmp_path)


def test_titles_fall_into_three_parts_for_good() -> None:
    counts = Counter(part(f"Title {number}") for number in range(4000))
    assert set(counts) == set(PARTS)
    assert counts["test"] > counts["dev"] > counts["background"] > 200
    assert part("Dog") == part("Dog")


def test_a_title_means_the_senses_of_its_lemma_most_frequent_first(tmp_path: Path) -> None:
    wordnet = write_wordnet(
        tmp_path,
        {
            "dog": (["dog"], [], "it barks"),
            "sausage": (["sausage", "dog"], [], "it is eaten"),
            "great_dane": (["Great Dane"], ["dog"], "a large dog"),
        },
    )
    assert title_senses(Article("Dog (animal)", ""), wordnet) == ["dog.n.01", "sausage.n.01"]
    assert title_senses(Article("Great Dane", ""), wordnet) == ["great_dane.n.01"]
    assert title_senses(Article("Quark", ""), wordnet) == []
    assert title_senses(Article("(nothing else)", ""), wordnet) == []


@given(st.text(alphabet="ab .!?\"')\n", min_size=1, max_size=400), st.integers(80, 200))
def test_a_cut_text_is_a_beginning_of_the_text_within_the_limit(text: str, limit: int) -> None:
    short = cut(text, limit)
    assert text.startswith(short)
    assert len(short) <= limit
    assert len(text) > limit or short == text


def test_a_text_is_cut_behind_a_sentence_where_there_is_one() -> None:
    sentences = "This is a first sentence of a good length, as sentences go. " * 4
    assert cut(sentences, 150) == sentences[:119]
    assert cut("word " * 100, 99) == ("word " * 100)[:94]
