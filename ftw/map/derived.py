"""Pooled states that were not collected but can be made: where all tokens of a text are kept, so is every pool of them.

Made once for all texts of an encyclopedia and kept beside its shards as arrays; a damaged one is made again.

Axes: S texts, T tokens, D model width.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

from ftw.errors import EncyclopediaError
from ftw.hat.pooling import STATE_POOLS, pool_tokens
from ftw.map.encyclopedia import Encyclopedia
from ftw.paths import replace_file

FOLDER = "derived"
BLOCK_TEXTS = 512
LONG_JOB = 20 * BLOCK_TEXTS


def pooled(
    encyclopedia: Encyclopedia, layer: int, pool: str, rows: np.ndarray | Sequence[int] | None = None
) -> np.ndarray:
    """Pooled states of some texts (default: all), float16 [S, D]; collected, or made from kept tokens.

    Raises:
        EncyclopediaError: the pool was not collected, and not all tokens of these texts are kept.
    """
    if pool in encyclopedia.spec.pools:
        return encyclopedia.pooled(layer, pool, rows)
    wanted = np.arange(len(encyclopedia)) if rows is None else np.asarray(rows, dtype=np.int64)
    place_S = np.full(len(encyclopedia), -1)
    whole = whole_texts(encyclopedia)
    place_S[whole] = np.arange(len(whole))
    if pool not in STATE_POOLS or (place_S[wanted] < 0).any():
        has = ", ".join(encyclopedia.spec.pools) or "none"
        raise EncyclopediaError(
            f"encyclopedia {encyclopedia.name!r} has no pool {pool!r} (it has {has}) and does not keep all tokens of "
            f"these texts; collect with map.encyclopedia.pools=[{','.join(STATE_POOLS)}]"
        )
    states_SD = _kept(_path(encyclopedia, layer, pool), (len(whole), encyclopedia.spec.width))
    if states_SD is None:
        _make(encyclopedia, layer, whole)
        states_SD = _kept(_path(encyclopedia, layer, pool), (len(whole), encyclopedia.spec.width))
        assert states_SD is not None  # it was written just now
    return np.asarray(states_SD[place_S[wanted]])


def whole_texts(encyclopedia: Encyclopedia) -> np.ndarray:
    """Indices of the texts all of whose tokens are kept."""
    kept = [split for split, count in encyclopedia.spec.tokens_per_text.items() if count < 0]
    return np.flatnonzero(np.isin(np.asarray(encyclopedia.table.splits), kept))


def _make(encyclopedia: Encyclopedia, layer: int, whole: np.ndarray) -> None:
    """All pools that were not collected, in one pass over the tokens of a layer."""
    pools = [pool for pool in STATE_POOLS if pool not in encyclopedia.spec.pools]
    made = {pool: np.empty((len(whole), encyclopedia.spec.width), dtype=np.float16) for pool in pools}
    starts = range(0, len(whole), BLOCK_TEXTS)
    hidden = len(whole) < LONG_JOB
    for start in track(starts, f"pooling tokens of layer {layer}", disable=hidden, transient=True):
        block = whole[start : start + BLOCK_TEXTS]
        tokens_TD, offsets = encyclopedia.token_states(layer, block)
        tokens = torch.from_numpy(tokens_TD.astype(np.float32))
        for place in range(len(block)):
            text_TD = tokens[offsets[place] : offsets[place + 1]]
            for pool in pools:
                made[pool][start + place] = pool_tokens(text_TD, pool).numpy()
    for pool, states_SD in made.items():
        path = _path(encyclopedia, layer, pool)
        path.parent.mkdir(exist_ok=True)
        with replace_file(path) as temporary, temporary.open("wb") as file:
            np.save(file, states_SD)


def _path(encyclopedia: Encyclopedia, layer: int, pool: str) -> Path:
    return encyclopedia.folder / FOLDER / f"layer_{layer}_{pool}.npy"


def _kept(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """The array of a file, memory-mapped; None where there is none, or one that a full disk or a stop cut short."""
    try:
        states_SD = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return states_SD if states_SD.shape == shape and states_SD.dtype == np.float16 else None
