"""Taking a concept's own words out of a text, so that what is left describes it without naming it.

A lemma is found in any case, with its plural, possessive and hyphenation, together with the article before it.
"""

import re
from collections.abc import Sequence
from functools import lru_cache

STAND_IN = "something"
_ENDING = r"(?:s|es|'s|’s|s'|s’)?"


def names_it(text: str, lemmas: Sequence[str]) -> bool:
    """Whether a text holds one of the lemmas."""
    return _pattern(tuple(lemmas)).search(text) is not None


def without_lemmas(text: str, lemmas: Sequence[str], stand_in: str = STAND_IN) -> str:
    """The text with a stand-in for every lemma.

    Example:
        without_lemmas("A whale is large. Whales sing.", ["whale"])
        # 'Something is large. Something sing.'
    """
    edited = _pattern(tuple(lemmas)).sub(stand_in, text)
    # An acronym or another name in brackets behind the stand-in is the name once more.
    edited = re.sub(rf"\b({re.escape(stand_in)}) \((?:[^()]|\([^()]*\))*\)", r"\1", edited)
    edited = re.sub(rf"(^|[.!?] )({re.escape(stand_in)})", lambda found: found[1] + stand_in.capitalize(), edited)
    return re.sub(r"\s+", " ", edited).strip()


@lru_cache(maxsize=65536)
def _pattern(lemmas: tuple[str, ...]) -> re.Pattern[str]:
    """One pattern for all lemmas, the longest first, so that "sea lion" goes before "lion"."""
    words = [re.split(r"[\s_-]+", lemma.strip()) for lemma in lemmas if lemma.strip()]
    forms = {r"[\s_-]?".join(map(re.escape, parts)) + _ENDING for parts in words}
    forms |= {
        r"[\s_-]?".join([*map(re.escape, parts[:-1]), re.escape(parts[-1][:-1]) + "ies"])
        for parts in words
        if parts[-1][-1:].lower() == "y" and len(parts[-1]) > 2
    }
    if not forms:
        return re.compile(r"(?!)")
    either = "|".join(sorted(forms, key=lambda form: (-len(form), form)))
    return re.compile(rf"(?:\b(?:an?|the)\s+)?(?<!\w)(?:{either})(?!\w)", re.IGNORECASE)
