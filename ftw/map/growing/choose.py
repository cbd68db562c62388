"""Which concepts to refine: by name, from a file, the most doubtful, all, or by chance."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ftw.errors import ConceptError, ConfigError, EncyclopediaError
from ftw.map.growing.store import GrowingEncyclopedia

WAYS = ("uncertain", "random", "all")
MAX_LIST_BYTES = 100_000_000


@dataclass(kw_only=True)
class ChooseConfig:
    """Which concepts.

    Attributes:
        which: uncertain (what the last judge doubts most), random, all, or a file with one name a line.
        share: of all concepts, for uncertain and random. names: by name instead.
    """

    which: str = "uncertain"
    share: float = 0.2
    names: list[str] = field(default_factory=list)


def choose(growing: GrowingEncyclopedia, config: ChooseConfig, seed: int = 0) -> list[int]:
    """Indices of the chosen concepts, ascending.

    Raises:
        ConfigError: a share outside 0..1, or a way that there is not. ConceptError: an unknown name.
        EncyclopediaError: nobody has judged the concepts yet.
    """
    if config.names:
        return indices(growing, config.names)
    if config.which == "all":
        return list(range(len(growing)))
    if config.which not in WAYS:
        return indices(growing, listed(config.which))
    if not 0 < config.share <= 1:
        raise ConfigError(f"choose.share={config.share}: give a share above 0, at most 1")
    num = max(1, round(config.share * len(growing)))
    if config.which == "random":
        return sorted(np.random.default_rng(seed).permutation(len(growing))[:num].tolist())
    doubt = growing.doubt
    if np.isnan(doubt).all():
        raise EncyclopediaError(
            f"nobody has judged the concepts of {growing.name!r} yet; "
            "run ftw encyclopedia judge, or take choose.which=random"
        )
    return most_doubtful(doubt, num)


def most_doubtful(doubt_N: np.ndarray, num: int) -> list[int]:
    """The `num` concepts of largest doubt, ascending; what was not judged comes first, ties by index."""
    return sorted(np.argsort(-np.nan_to_num(doubt_N, nan=np.inf), kind="stable")[:num].tolist())


def indices(growing: GrowingEncyclopedia, names: Sequence[str]) -> list[int]:
    """Indices of some names, ascending.

    Raises:
        ConceptError: a name that there is not, or one given twice.
    """
    if unknown := [name for name in names if name not in growing.index]:
        near = difflib.get_close_matches(unknown[0], growing.index, n=3, cutoff=0.5)
        raise ConceptError(
            f"encyclopedia {growing.name!r} has no concept {unknown[0]!r} "
            f"({len(unknown)} of {len(names)} names unknown); nearest: {', '.join(near) or 'none'}"
        )
    if len(set(names)) < len(names):
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise ConceptError(f"concept {twice!r} is given twice; give each once")
    return sorted(growing.index[name] for name in names)


def listed(path: str) -> list[str]:
    """Names of a file, one a line; blank lines are none.

    Raises:
        ConfigError: there is no such file, it is no list, or it is empty.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"choose.which={path!r} is neither {', '.join(WAYS)} nor a file with one name a line")
    if file.stat().st_size > MAX_LIST_BYTES:
        raise ConfigError(f"{file} has {file.stat().st_size:,} bytes; a list of names has at most {MAX_LIST_BYTES:,}")
    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise ConfigError(f"{file} is no list of names in UTF-8 ({error})") from error
    if not any(names):
        raise ConfigError(f"{file} has no name in it; write one a line")
    return [name for name in names if name]
