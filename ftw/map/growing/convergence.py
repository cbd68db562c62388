"""How many contexts until a concept's mean state settles?

Every concept stands in every template, so what a template adds is the same for all and can be taken out. The templates
are halved at random, many times; the mean over the first n of one half is held against the mean over all of the other:

    distance(n)    |a - b| / |b|
    corrected(n)   sqrt(max(0, |a - b|² - s² (1/n + 1/m))) / |b|, s² the variance over templates, summed over features
    cosine(n)      a·b / |a||b|
    reliability(n) correlation of a and b over concepts and features, each feature's mean over the concepts taken out

The distance of two means of noisy samples cannot fall below the noise, however well both have settled; the corrected
one can. Between halves drawn at random it is nothing by construction, on average: it shows that all of the plain
distance is noise. Between two sets of sentences that were written apart (`between`) it is what the sets themselves
differ by. `contexts_needed` says at how many contexts the noise alone is 5 % of the mean: n = s² / (0.05 |b|)².

Axes: N concepts, T templates, n contexts, D model width, R draws.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ftw.errors import ConfigError, DataError
from ftw.map.growing.contexts import fill
from ftw.map.growing.entries import Entry
from ftw.map.samples import SampleTable, SampleTableBuilder
from ftw.map.sentences import CONTEXTS, TEST_CONTEXTS, familiar_lemma, is_first_sense, with_article
from ftw.map.wordnet import WordNet

TEMPLATES = (*CONTEXTS, *TEST_CONTEXTS)
# Branches of WordNet's nouns. What lies below both kinds is left out.
CONCRETE = ("artifact.n.01", "animal.n.01", "plant.n.02", "food.n.01", "body_part.n.01", "natural_object.n.01")
ABSTRACT = ("psychological_feature.n.01", "attribute.n.02", "relation.n.01", "communication.n.02")
CRITERION = 0.05  # of the seed: relative distance at ten contexts
AT = 10


@dataclass(kw_only=True)
class ConvergenceConfig:
    """What is measured.

    Attributes:
        num: nouns of each kind. half: templates of each half. splits: random halvings, whose figures are averaged.
        draws: of the bootstrap over concepts.
    """

    num: int = 200
    half: int = 20
    splits: int = 20
    draws: int = 1000

    def check(self) -> None:
        """Raise ConfigError for values that cannot be."""
        if not 2 <= self.half <= len(TEMPLATES) // 2:
            raise ConfigError(
                f"convergence.half={self.half}: there are {len(TEMPLATES)} templates; take 2 to half of them"
            )
        if self.num < 2 or self.splits < 1 or self.draws < 10:
            raise ConfigError(
                f"convergence: num={self.num} from 2, splits={self.splits} from 1, draws={self.draws} from 10"
            )


@dataclass(frozen=True)
class Point:
    """Figures of one kind of concept at one layer after n contexts; each with its 95 % interval over concepts."""

    kind: str
    layer: int
    n: int
    distance: tuple[float, float, float]
    corrected: tuple[float, float, float]
    cosine: tuple[float, float, float]
    reliability: tuple[float, float, float]
    passing: tuple[float, float, float]

    def record(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def nouns(wordnet: WordNet, num: int) -> list[tuple[Entry, str]]:
    """Nouns of both kinds, "concrete" and "abstract", those most often met in tagged texts first.

    Raises:
        DataError: a kind has fewer.
    """
    below = {kind: frozenset().union(*(wordnet.closure(root) for root in roots))
             for kind, roots in (("concrete", CONCRETE), ("abstract", ABSTRACT))}  # fmt: skip
    both = below["concrete"] & below["abstract"]
    counts = wordnet.tag_counts()
    found: list[tuple[Entry, str]] = []
    for kind, names in below.items():
        chosen = []
        for name in sorted(names - both, key=lambda name: (-counts[name], name)):
            synset = wordnet.synset(name)
            lemma = familiar_lemma(wordnet, synset)
            if is_first_sense(wordnet, lemma, synset):
                chosen.append((_entry(name, lemma), kind))
            if len(chosen) == num:
                break
        if len(chosen) < num:
            raise DataError(f"convergence.num={num}: WordNet has only {len(chosen)} {kind} nouns of their own word")
        found += chosen
    return found


def _entry(name: str, lemma: str) -> Entry:
    return Entry(name=name, term=lemma, phrase=with_article(lemma), synset=name)


def crossed_table(entries: Sequence[Entry]) -> SampleTable:
    """Every concept in every template; groups are the templates.

    Raises:
        DataError: two concepts fill a template alike.
    """
    builder = SampleTableBuilder([entry.name for entry in entries])
    for entry in entries:
        for number, template in enumerate(TEMPLATES):
            row = builder.text(fill(template, entry), group=f"template {number}", split="train", source="template")
            builder.mark(row, entry.name, 1)
    table = builder.build()
    if len(table) != len(entries) * len(TEMPLATES):
        raise DataError("two concepts share a word; give concepts of different words")
    return table


def measure(
    states_NTD: np.ndarray, kinds: Sequence[str], layer: int, config: ConvergenceConfig, seed: int = 0
) -> list[Point]:
    """The figures of one layer, for each kind, after 1 to `half` contexts.

    Args:
        states_NTD: states of N concepts in T templates, the same templates for all.
    """
    config.check()
    random, kind_N = np.random.default_rng(seed), np.asarray(kinds)
    shape = (config.splits, config.half, len(kind_N))
    figures = {name: np.empty(shape) for name in ("distance", "corrected", "cosine", "product", "own", "other")}
    for split in range(config.splits):
        order = random.permutation(states_NTD.shape[1])
        first, second = order[: config.half], order[config.half : 2 * config.half]
        for name, values in _one_split(states_NTD[:, first], states_NTD[:, second], kind_N).items():
            figures[name][split] = values
    points = []
    for kind in dict.fromkeys(kinds):
        mine = np.flatnonzero(kind_N == kind)
        drawn_RN = random.integers(len(mine), size=(config.draws, len(mine)))
        for n in range(1, config.half + 1):
            at = {name: values[:, n - 1, mine] for name, values in figures.items()}
            points.append(_point(kind, layer, n, at, drawn_RN))
    return points


def _one_split(first_NTD: np.ndarray, second_NTD: np.ndarray, kind_N: np.ndarray) -> dict[str, np.ndarray]:
    """All figures of one halving, [n, N] each."""
    first_NTD, second_NTD = first_NTD.astype(np.float64), second_NTD.astype(np.float64)
    num = np.arange(1, first_NTD.shape[1] + 1)
    a_NnD = np.cumsum(first_NTD, axis=1) / num[:, None]
    b_ND = second_NTD.mean(axis=1)
    both = np.concatenate([first_NTD, second_NTD], axis=1)
    noise_N = both.var(axis=1, ddof=1).sum(axis=-1)
    size_N = np.linalg.norm(b_ND, axis=-1)
    square_Nn = ((a_NnD - b_ND[:, None]) ** 2).sum(axis=-1)
    expected_Nn = noise_N[:, None] * (1 / num + 1 / second_NTD.shape[1])
    centred_NnD, centred_ND = a_NnD.copy(), b_ND.copy()
    for kind in np.unique(kind_N):
        centred_NnD[kind_N == kind] -= a_NnD[kind_N == kind].mean(axis=0)
        centred_ND[kind_N == kind] -= b_ND[kind_N == kind].mean(axis=0)
    return {
        "distance": (np.sqrt(square_Nn) / size_N[:, None]).T,
        # Squares are kept signed here: clipped one by one, noise would average to something.
        "corrected": ((square_Nn - expected_Nn) / size_N[:, None] ** 2).T,
        "cosine": (np.einsum("ind,id->in", a_NnD, b_ND) / np.linalg.norm(a_NnD, axis=-1) / size_N[:, None]).T,
        "product": np.einsum("ind,id->in", centred_NnD, centred_ND).T,
        "own": (centred_NnD**2).sum(axis=-1).T,
        "other": np.broadcast_to((centred_ND**2).sum(axis=-1), (len(num), len(b_ND))),
    }


def _point(kind: str, layer: int, n: int, at: dict[str, np.ndarray], drawn_RN: np.ndarray) -> Point:
    mean = {name: values.mean(axis=0) for name, values in at.items()}
    passing = (at["distance"] < CRITERION).mean(axis=0)

    def interval(values: np.ndarray) -> tuple[float, float, float]:
        return _interval(float(values.mean()), values[drawn_RN].mean(axis=1))

    def root(square: float) -> float:
        return float(np.sqrt(max(0.0, square)))

    corrected = interval(mean["corrected"])
    sums = {name: mean[name][drawn_RN].sum(axis=1) for name in ("product", "own", "other")}
    reliability = float(mean["product"].sum() / np.sqrt(mean["own"].sum() * mean["other"].sum()))
    return Point(
        kind,
        layer,
        n,
        interval(mean["distance"]),
        (root(corrected[0]), root(corrected[1]), root(corrected[2])),
        interval(mean["cosine"]),
        _interval(reliability, sums["product"] / np.sqrt(sums["own"] * sums["other"])),
        interval(passing),
    )


def _interval(value: float, draws_R: np.ndarray) -> tuple[float, float, float]:
    low, high = np.quantile(draws_R, [0.025, 0.975])
    return value, float(low), float(high)


def between(
    states_NTD: np.ndarray, kinds: Sequence[str], layer: int, config: ConvergenceConfig, seed: int = 0
) -> list[dict[str, Any]]:
    """How far the means over the sentences to learn from and over those to test with lie apart, for each kind.

    The distance, the same with the noise of both means taken out of its square, the latter with what the sentences add
    to all concepts of a kind alike taken out of the states first, and the share of concepts under 5 % by it.
    """
    kind_N, random = np.asarray(kinds), np.random.default_rng(seed)
    states_NTD = states_NTD.astype(np.float64)
    found = []
    for kind in dict.fromkeys(kinds):
        mine_NTD = states_NTD[kind_N == kind]
        size_N = np.linalg.norm(mine_NTD.mean(axis=1), axis=-1)
        own_NTD = mine_NTD - mine_NTD.mean(axis=0)
        plain_N, square_N = _apart(mine_NTD)
        _, own_square_N = _apart(own_NTD)
        drawn_RN = random.integers(len(size_N), size=(config.draws, len(size_N)))
        row: dict[str, Any] = {"kind": kind, "layer": layer}
        values = {"distance": plain_N / size_N, "corrected": square_N / size_N**2, "own": own_square_N / size_N**2}
        for name, values_N in values.items():
            figures = np.array(_interval(float(values_N.mean()), values_N[drawn_RN].mean(axis=1)))
            row[name] = (figures if name == "distance" else np.sqrt(figures.clip(0))).tolist()
        row["under"] = float((own_square_N < (CRITERION * size_N) ** 2).mean())
        found.append(row)
    return found


def _apart(states_NTD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance [N] of the means over the two sets of sentences, and its square less the noise of both."""
    parts = states_NTD[:, : len(CONTEXTS)], states_NTD[:, len(CONTEXTS) :]
    square_N = ((parts[0].mean(axis=1) - parts[1].mean(axis=1)) ** 2).sum(axis=-1)
    noise_N = sum(part.var(axis=1, ddof=1).sum(axis=-1) / part.shape[1] for part in parts)
    return np.sqrt(square_N), square_N - noise_N


def contexts_needed(states_NTD: np.ndarray) -> np.ndarray:
    """N numbers of contexts at which the noise of a mean is 5 % of its size."""
    states_NTD = states_NTD.astype(np.float64)
    noise_N = states_NTD.var(axis=1, ddof=1).sum(axis=-1)
    num = states_NTD.shape[1]
    # The mean's own square holds a share of the noise.
    size_N = (states_NTD.mean(axis=1) ** 2).sum(axis=-1) - noise_N / num
    return noise_N / (CRITERION**2 * size_N.clip(1e-9))
