"""Lead paragraphs of Wikipedia articles: natural text that no lens has been trained on.

The title tells what an article is about: where it is a noun that WordNet knows, its senses place the article among the
concepts. The leads are CC BY-SA 4.0 text, read from the JSON file of a package whose code is never run.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from ftw.errors import DataError, SourceError
from ftw.map.wordnet import WordNet

FILE = "summaries_en-us.json"
PARTS = ("test", "dev", "background")
MIN_CHARACTERS = 80  # shorter leads are disambiguation pages and stubs
MAX_FILE_BYTES = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Article:
    """One article: its title, and its lead paragraph as `text`."""

    title: str
    text: str
    description: str = ""
    topic: str = ""


def load_articles(folder: Path | str) -> list[Article]:
    """All leads of a folder, by title; those under 80 characters and second copies of a text are left out.

    Args:
        folder: holds summaries_en-us.json, at most five folders down; or that file itself.

    Raises:
        SourceError: no such file. DataError: it is not a table of {title, extract}.
    """
    file = _find(Path(folder))
    if file.stat().st_size > MAX_FILE_BYTES:
        raise DataError(
            f"{file} has {file.stat().st_size:,} bytes, over the limit of {MAX_FILE_BYTES:,}; fetch it again"
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        records = sorted(content.values() if isinstance(content, dict) else content, key=lambda record: record["title"])
        articles = [
            Article(
                record["title"], record["extract"].strip(), *(record.get(key) or "" for key in ("description", "topic"))
            )
            for record in records
        ]
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{file} is not a table of articles with title and extract ({error!r}); fetch it again"
        ) from error
    distinct: dict[str, Article] = {}
    for article in articles:
        if len(article.text) >= MIN_CHARACTERS:
            distinct.setdefault(article.text, article)
    return list(distinct.values())


def _find(folder: Path) -> Path:
    if folder.is_file():
        return folder
    for depth in range(6):
        if found := sorted(folder.glob("*/" * depth + FILE)):
            return found[0]
    raise SourceError(f"no {FILE} in {folder} or up to five folders below; fetch the source wikipedia-leads")


def part(title: str) -> str:
    """The part that an article belongs to for good: "test" (7 of 10), "dev" (2 of 10) or "background" (1 of 10).

    Choices of the recipe are made on dev, figures are reported on test, percentiles come from background.
    """
    place = int.from_bytes(hashlib.sha256(title.encode()).digest()[:8], "big") % 10
    return "test" if place < 7 else "dev" if place < 9 else "background"


def title_lemma(title: str) -> str:
    """The title as WordNet would write it: without what stands in parentheses, lower case, underscores."""
    return re.sub(r"\s*\(.*\)$", "", title).lower().replace(" ", "_")


def title_senses(article: Article, wordnet: WordNet) -> list[str]:
    """Names of the noun synsets of the title, most frequent first; empty if WordNet lacks it."""
    lemma = title_lemma(article.title)
    return [synset.name for synset in wordnet.synsets(lemma)] if lemma else []


def cut(text: str, max_characters: int) -> str:
    """The text up to the last sentence end within `max_characters`; failing that, up to the last space."""
    if len(text) <= max_characters:
        return text
    ends = [match.end() for match in re.finditer(r"[.!?][\"'”’)\]]*(?=\s)", text[: max_characters + 1])]
    if ends and ends[-1] >= min(MIN_CHARACTERS, max_characters // 2):
        return text[: ends[-1]]
    return text[:max_characters].rsplit(None, 1)[0]
