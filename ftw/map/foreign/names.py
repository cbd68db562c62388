"""Concept names as file names that every file system keeps apart, and back.

What a file system may refuse or fold is written as %XX, as in a URL. Of two names that differ by case alone, the later
one has a capital written so: `Basketball` and `%42asketBall`.
"""

from collections.abc import Iterable
from urllib.parse import quote, unquote

SAFE = " -_.()',+=@~"
# Windows opens devices under these names, whatever the suffix.
DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}


def file_names(names: Iterable[str]) -> dict[str, str]:
    """A file name without suffix for each concept of one folder; `concept_name` gives the concept back."""
    taken: set[str] = set()
    found = {}
    for name in names:
        stem = quote(name, safe=SAFE)
        if stem.partition(".")[0].casefold() in DEVICES or stem[:1] in (".", " "):
            stem = f"%{ord(stem[0]):02X}{stem[1:]}"
        if stem[-1:] in (".", " "):
            stem = f"{stem[:-1]}%{ord(stem[-1]):02X}"
        for place in [place for place, letter in enumerate(stem) if letter.isupper()]:
            if stem.casefold() not in taken:
                break
            if "%" not in stem[max(0, place - 2) : place]:  # a digit of an escape is no letter of the name
                stem = f"{stem[:place]}%{ord(stem[place]):02X}{stem[place + 1 :]}"
        while stem.casefold() in taken:  # names of small letters alone that differ in a letter's form (ß and ss)
            place = next(i for i in range(len(stem)) if stem[i] != "%" and "%" not in stem[max(0, i - 2) : i])
            stem = f"{stem[:place]}%{ord(stem[place]):02X}{stem[place + 1 :]}"
        taken.add(stem.casefold())
        found[name] = stem
    return found


def concept_name(stem: str) -> str:
    """The concept that a file name without suffix stands for."""
    return unquote(stem)
