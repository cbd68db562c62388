"""What stands on both sides of a split: groups, texts, and texts that nearly repeat each other. Looked for before work.

Lenses that have read their test texts measure memory. Every concept is looked at for itself: a text that one concept
learns from and another is judged on is no leak. Near-copies are found exactly, not by sketches:

1. A text is the set of its runs of one to three words, as numbers, the rarest run first.
2. Two sets of Jaccard similarity t or more share at least one run among the rarest |x| - ⌈t |x|⌉ + 1 of each. Only
   pairs that share such a run are candidates; rare runs stand in few texts, so these are few.
3. Candidates are counted out.

Sources: Chaudhuri, Ganti & Kaushik 2006, A primitive operator for similarity joins in data cleaning; Bayardo, Ma &
Srikant 2007, Scaling up all pairs similarity search.

Axes: S texts, E runs of all texts, P pairs.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import scipy.sparse

from ftw.errors import ConfigError, LeakError
from ftw.map.near_duplicates import LONGEST_RUN, WORDS
from ftw.map.samples import SampleTable

log = logging.getLogger(__name__)

SHOWN = 3
ROUNDING = 1e-9  # 0.7 of 10 is 7, whatever the machine makes of 0.7
# Candidates held in memory at once (24 bytes each), and those counted out at once.
MOST_CANDIDATES, BLOCK_PAIRS = 4_000_000, 4096
# A split that leaks this often is no accident; the search ends.
ENOUGH = 1000
MIX = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], dtype=np.uint64)


@dataclass(kw_only=True)
class LeakConfig:
    """What is looked for before training, and whether it ends the run.

    Attributes:
        allow: go on all the same, with a warning and a note in the report.
        similarity: Jaccard similarity of word runs from which on two texts are copies; 0 looks for equal texts alone.
            A little above the 0.7 that groups labelled texts, whose sketches miss some pairs that are just that alike.
    """

    allow: bool = False
    similarity: float = 0.8

    def __post_init__(self) -> None:
        if not 0 <= self.similarity <= 1:
            raise ConfigError(f"map.leaks.similarity={self.similarity}: must lie between 0 (equal texts alone) and 1")


@dataclass(frozen=True)
class LeakReport:
    """What was found: names of groups, and (training text, test text), on both sides of the split for one concept."""

    groups: list[str] = field(default_factory=list)
    pairs: list[tuple[int, int]] = field(default_factory=list)
    num_texts: int = 0
    similarity: float = 0.0
    seconds: float = 0.0

    def __bool__(self) -> bool:
        return bool(self.groups or self.pairs)

    def line(self) -> str:
        """The report in a sentence."""
        alike = f"{self.similarity:.0%} alike or more" if self.similarity else "equal"
        found = f"{len(self.groups):,} groups and {len(self.pairs):,} pairs of texts" if self else "nothing"
        return (
            f"on both sides of the split: {found} ({self.num_texts:,} texts, {alike}; looked for {self.seconds:.1f} s)"
        )


def check_leaks(table: SampleTable, config: LeakConfig | None = None) -> LeakReport:
    """Look for leaks between train and test; the report is kept with the figures.

    Raises:
        LeakError: there are some, and they are not allowed.
    """
    config = config or LeakConfig()
    report = find_leaks(table, config.similarity, enough=ENOUGH)
    log.log(logging.WARNING if report else logging.INFO, report.line())
    if report and not config.allow:
        raise LeakError(_told(report, table))
    return report


def find_leaks(table: SampleTable, similarity: float, *, enough: int | None = None) -> LeakReport:
    """Groups with texts on both sides, and for each test text a training text it repeats; concept by concept.

    Args:
        enough: copies after which the search may end; None finds all.
    """
    start = time.perf_counter()
    sides = {split: table.where(split) for split in ("train", "test")}
    marked_SN = scipy.sparse.csr_array(
        (np.ones(len(table.rows), dtype=bool), (table.rows, table.cols)), shape=(len(table), len(table.concepts))
    )
    groups = _shared_groups(table, sides, marked_SN)
    pairs = _shared_texts(table.texts, sides, marked_SN, similarity, enough)
    return LeakReport(groups, pairs, sum(map(len, sides.values())), similarity, time.perf_counter() - start)


def _told(report: LeakReport, table: SampleTable) -> str:
    shown = [f"group {name[:60]!r}" for name in report.groups[:SHOWN]]
    shown += [f"{table.texts[one][:60]!r} ~ {table.texts[other][:60]!r}" for one, other in report.pairs[:SHOWN]]
    return (
        f"{report.line()}: {'; '.join(shown)}. Figures on such a split measure memory. Give rows that belong together "
        "one group and let FTW divide them (no split column), or take the copies out of one side; to train all the "
        "same: map.leaks.allow=true"
    )


def _shared_groups(table: SampleTable, sides: dict[str, np.ndarray], marked_SN: scipy.sparse.csr_array) -> list[str]:
    """Groups with training and test texts of one concept."""
    numbers: dict[str, int] = {}
    group_S = np.array([numbers.setdefault(group, len(numbers)) for group in table.groups], dtype=np.int64)
    names, held = list(numbers), []
    for rows in sides.values():
        member_GS = scipy.sparse.csr_array((np.ones(len(rows), bool), (group_S[rows], rows)), (len(names), len(table)))
        held.append((member_GS @ marked_SN).astype(bool))
    return [names[group] for group in np.unique((held[0] * held[1]).nonzero()[0]).tolist()]


def _shared_texts(
    texts: list[str],
    sides: dict[str, np.ndarray],
    marked_SN: scipy.sparse.csr_array,
    similarity: float,
    enough: int | None,
) -> list[tuple[int, int]]:
    """Pairs of alike texts of which some concept learns from one and is judged on the other, one for each test text."""
    train, test = sides["train"], sides["test"]
    first: dict[int, int] = {}
    for one_P, other_P in similar_pairs([texts[row] for row in train], [texts[row] for row in test], similarity):
        one_P, other_P = train[one_P], test[other_P]
        both_P = np.asarray((marked_SN[one_P] * marked_SN[other_P]).sum(axis=1)) > 0
        for one, other in zip(one_P[both_P].tolist(), other_P[both_P].tolist(), strict=True):
            first.setdefault(other, one)
        if enough is not None and len(first) >= enough:
            break
    return sorted((one, other) for other, one in first.items())


def similar_pairs(
    ones: Sequence[str], others: Sequence[str], similarity: float
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Places (in `ones`, in `others`) of all pairs of at least this similarity (0: of all equal texts), in parts."""
    if not len(ones) or not len(others):
        return
    if not similarity:
        places: dict[str, list[int]] = {}
        for place, text in enumerate(ones):
            places.setdefault(text, []).append(place)
        pairs = [(one, other) for other, text in enumerate(others) for one in places.get(text, [])]
        if pairs:
            one_P, other_P = np.array(pairs, dtype=np.int64).T
            yield one_P, other_P
        return
    run_E, starts_S = _runs([*ones, *others])
    sizes_S = np.diff(starts_S)
    text_E = np.repeat(np.arange(len(sizes_S)), sizes_S)
    run_E = run_E[np.lexsort((run_E, text_E))]  # runs are numbered from the rarest on
    prefix_S = sizes_S - np.ceil(similarity * sizes_S - ROUNDING).astype(np.int64) + 1
    early_E = np.arange(len(run_E)) - starts_S[text_E] < prefix_S[text_E]
    shape = (len(sizes_S), int(run_E.max(initial=0)) + 1)
    whole_SR, early_SR = (
        scipy.sparse.csr_array((np.ones(kept_E.sum(), np.int32), (text_E[kept_E], run_E[kept_E])), shape=shape)
        for kept_E in (np.ones(len(run_E), dtype=bool), early_E)
    )
    early_RS = early_SR[: len(ones)].T.tocsr()
    for start, stop in _blocks(early_SR[len(ones) :] @ np.diff(early_RS.indptr)):
        candidates = (early_SR[len(ones) + start : len(ones) + stop] @ early_RS).tocoo()
        one_P, other_P = candidates.col.astype(np.int64), candidates.row.astype(np.int64) + len(ones) + start
        low_P, high_P = np.sort(np.stack([sizes_S[one_P], sizes_S[other_P]]), axis=0)
        fits_P = low_P >= similarity * high_P - ROUNDING  # sets of very different sizes cannot be alike
        pairs_2P = np.stack([one_P[fits_P], other_P[fits_P]])
        one_P, other_P = pairs_2P[:, _alike(whole_SR, sizes_S, pairs_2P, similarity)]
        if len(one_P):
            yield one_P, other_P - len(ones)


def _blocks(costs: np.ndarray) -> Iterator[tuple[int, int]]:
    """Bounds of consecutive texts whose candidates fit into memory; at least one text each."""
    total, start = np.cumsum(costs), 0
    while start < len(costs):
        before = total[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(total, before + MOST_CANDIDATES, side="right")))
        yield start, stop
        start = stop


def _alike(
    whole_SR: scipy.sparse.csr_array, sizes_S: np.ndarray, pairs_2P: np.ndarray, similarity: float
) -> np.ndarray:
    """Whether pairs are as similar as that, counted out."""
    shared = [np.zeros(0, dtype=np.int64)]
    for start in range(0, pairs_2P.shape[1], BLOCK_PAIRS):
        ones, others = pairs_2P[:, start : start + BLOCK_PAIRS]
        shared.append(np.asarray((whole_SR[ones] * whole_SR[others]).sum(axis=1)))
    shared_P = np.concatenate(shared)
    return shared_P >= similarity * (sizes_S[pairs_2P].sum(axis=0) - shared_P) - ROUNDING


def _runs(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Distinct word runs of all texts, numbered from the rarest on, text after text, and where each text begins."""
    numbers: dict[str, int] = {}
    words = [WORDS.findall(text.lower()) or [text] for text in texts]
    ids_W = np.array([numbers.setdefault(word, len(numbers)) for part in words for word in part], dtype=np.uint64)
    lengths_S = np.array([len(part) for part in words])
    text_W = np.repeat(np.arange(len(texts)), lengths_S)
    hashes, owners = [], []
    mixed_W = np.zeros(len(ids_W), dtype=np.uint64)
    for length in range(1, LONGEST_RUN + 1):
        # A run is told by a mix of its words' numbers; 64 bits keep tens of millions of runs apart.
        kept = len(ids_W) - length + 1
        mixed_W = (mixed_W[:kept] ^ (mixed_W[:kept] >> np.uint64(29))) * MIX[0] + (ids_W[length - 1 :] + MIX[1]) * MIX[
            2
        ]
        inside = text_W[:kept] == text_W[length - 1 :]
        hashes.append(mixed_W[inside])
        owners.append(text_W[:kept][inside])
    owner_E, hash_E = np.concatenate(owners), np.concatenate(hashes)
    order_E = np.lexsort((hash_E, owner_E))
    owner_E, hash_E = owner_E[order_E], hash_E[order_E]
    new_E = np.ones(len(owner_E), dtype=bool)
    new_E[1:] = (owner_E[1:] != owner_E[:-1]) | (hash_E[1:] != hash_E[:-1])
    owner_E, hash_E = owner_E[new_E], hash_E[new_E]
    _, run_E, count_R = np.unique(hash_E, return_inverse=True, return_counts=True)
    rank_R = np.empty(len(count_R), dtype=np.int64)
    rank_R[np.argsort(count_R, kind="stable")] = np.arange(len(count_R))
    return rank_R[run_E], np.concatenate([[0], np.cumsum(np.bincount(owner_E, minlength=len(texts)))])
