"""A card for each lens: what its figures rest on, in numbers that a page can draw.

The figures say how well a lens separates; a card says where they come from: the spread of positives and negatives, how
far stated probabilities hold, the texts that it reads strongest with the share of each token, the concepts whose texts
it ranks above its own, and what is left when the telling words are taken out. All lenses get a row; the most telling
`limit` of them get a card, because the texts of a card are read by the substrate once more.

Axes: S held-out texts, N lenses, n lenses with a card, K bins.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import scipy.sparse

from ftw.errors import ConfigError
from ftw.map import metrics
from ftw.map.contributions import TextReader, is_exact, pieces, shares_of_tokens
from ftw.map.evaluate import EvaluateConfig, Evaluation
from ftw.map.pack import LensPack
from ftw.map.samples import SampleTable
from ftw.map.telling_words import HeldOut, WordsRemoved, remove_words, telling_words

FEW_POSITIVES = 8  # differences of lenses with fewer held-out positives are noise
MOST_CONFUSED = 6
MOST_NEGATIVES = 200  # that tell which words are no more frequent among positives
# Controls that only training can make; a card shows them as the pack has them.
CARRIED = ("shuffled", "length", "position", "random", "first_layer")


@dataclass(kw_only=True)
class CardsConfig:
    """How many lenses get a card, and how much each of them shows.

    Attributes:
        limit: lenses with a card, the most telling ones where the pack has more; 0 for none.
        texts: strongest held-out texts shown, and half as many positives that are missed.
        train_texts: positives of the training data read for each card, of which the strongest three are shown.
        words: words of the text lens that are removed beside the concept's lemmas; 0 leaves the test out.
        edited_texts: positives, and as many edited negatives, that the test compares at most.
        bins: bars of a histogram.
    """

    limit: int = 24
    texts: int = 4
    train_texts: int = 16
    words: int = 8
    edited_texts: int = 24
    bins: int = 24

    def __post_init__(self) -> None:
        for name, least in (("limit", 0), ("texts", 1), ("train_texts", 0), ("words", 0), ("edited_texts", 2)):
            if getattr(self, name) < least:
                raise ConfigError(f"cards.{name}={getattr(self, name)}: must be at least {least}")
        if not 4 <= self.bins <= 200:
            raise ConfigError(f"cards.bins={self.bins}: choose 4 to 200")


@dataclass(frozen=True)
class ShownText:
    """One text on a card: label 1 or 0, the lens's logit, and the share of each piece in it."""

    text: str
    label: int
    source: str
    logit: float
    pieces: list[tuple[str, float]]


@dataclass
class Card:
    """Everything that is drawn of one lens.

    Attributes:
        reliability: stated probability, share of positives at the prior, and effective number of texts, bin by bin.
        edges, positive, negative: histogram of held-out logits.
        strongest, missed, training: texts. exact: whether the shares of their pieces add up.
        confused: (concept, share of pairs in which a text of it is ranked above one of the lens's own, its texts).
        words: the test without the telling words, where it could be made.
    """

    name: str
    definition: str
    path: list[str]
    reliability: list[tuple[float, float, float]]
    edges: list[float]
    positive: list[int]
    negative: list[int]
    exact: bool = False
    strongest: list[ShownText] = field(default_factory=list)
    missed: list[ShownText] = field(default_factory=list)
    training: list[ShownText] = field(default_factory=list)
    confused: list[tuple[str, float, int]] = field(default_factory=list)
    words: WordsRemoved | None = None


@dataclass
class Cards:
    """Rows for all lenses, cards for some, and what a reader must know."""

    concepts: dict[str, dict[str, Any]]
    mean: dict[str, Any]
    levels: dict[str, int]
    cards: dict[str, Card]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """Plain lists, dictionaries and numbers; what is not a number becomes null."""
        return _plain({"mean": self.mean, "lenses": self.concepts, "levels": self.levels, "notes": self.notes}) | {
            "cards": {name: _plain(asdict(card)) for name, card in self.cards.items()}
        }


def make_cards(
    pack: LensPack,
    reader: TextReader,
    table: SampleTable,
    evaluation: Evaluation,
    logits_SN: np.ndarray,
    *,
    training: SampleTable | None = None,
    config: CardsConfig | None = None,
    evaluate: EvaluateConfig | None = None,
) -> Cards:
    """Cards of the most telling lenses of a pack, and rows for all.

    Args:
        table: the held-out texts. logits_SN: what the pack's lenses, in its order, read there.
        evaluation: their figures. training: a table with the texts that the lenses learned from, if there is one.
    """
    config, evaluate = config or CardsConfig(), evaluate or EvaluateConfig()
    labels_SN, weights_SN = marks_of(table, pack.names)
    held_out = HeldOut(pack.names, table.texts, table.groups, labels_SN, weights_SN, logits_SN)
    figures, carried = with_training_controls(evaluation.concepts, pack)
    names = most_telling(figures, config.limit)
    notes = list(evaluation.notes)
    if len(names) < len(pack.names):
        notes.append(f"cards for the {len(names)} most telling of {len(pack.names)} lenses (cards.limit)")
    shown = held_out.of(names)
    confused = confusions(pack, held_out, names)
    cards = {name: _numbers(pack, shown, lens, config, evaluate) for lens, name in enumerate(names)}
    exact = bool(names) and is_exact(pack.stack.rows(names), reader.pool)
    for name, pairs in confused.items():
        cards[name].confused, cards[name].exact = pairs, exact
    if names:
        _read_texts(pack, reader, shown, table.sources, training, cards, config, evaluate.seed)
        if config.words:
            _without_words(pack, reader, shown, cards, config, evaluate.seed)
    levels = {name: pack.levels.get(name, 0) for name in pack.names}
    notes += [f"as measured when the pack was trained: {', '.join(carried)}"] if carried else []
    return Cards(figures, dict(evaluation.mean), levels, cards, notes)


def with_training_controls(
    figures: Mapping[str, dict[str, Any]], pack: LensPack
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Figures of each lens with the controls that these texts could not give, and which controls those are."""
    result: dict[str, dict[str, Any]] = {}
    carried: dict[str, None] = {}
    for name, here in figures.items():
        stored = pack.metrics.get(name, {})
        old = [word for word in CARRIED if f"auroc_{word}" in stored and f"auroc_{word}" not in here]
        carried |= dict.fromkeys(old)
        weak = [word for word in stored.get("no_better_than") or () if word in old]
        keys = [f"auroc_{word}" for word in old] + (["selectivity"] if "shuffled" in old else [])
        more = {key: math.nan if stored.get(key) is None else float(stored[key]) for key in keys}
        result[name] = {**here, **more, "no_better_than": [*(here.get("no_better_than") or ()), *weak]}
    return result, list(carried)


def most_telling(figures: dict[str, dict[str, Any]], limit: int) -> list[str]:
    """Names of at most `limit` lenses, dealt in turn from: weak ones, far above words, far below, false alarms, ECE."""
    if len(figures) <= limit:
        return list(figures)

    def value(name: str, key: str) -> float:
        found = figures[name].get(key)
        return -math.inf if found is None or math.isnan(found) else float(found)

    known = [name for name in figures if value(name, "auroc") > -math.inf]
    enough = [name for name in known if value(name, "num_positive") >= FEW_POSITIVES] or known
    weak = [name for name in enough if figures[name].get("no_better_than")]
    orders = [
        sorted(weak or enough, key=lambda name: value(name, "auroc")),
        sorted(enough, key=lambda name: -value(name, "difference")),
        sorted(enough, key=lambda name: value(name, "difference")),
        sorted(enough, key=lambda name: -value(name, "fpr_at_threshold_1")),
        sorted(enough, key=lambda name: value(name, "ece_floor") - value(name, "ece")),
    ]
    chosen: dict[str, None] = {}
    for place in range(len(figures)):
        for order in orders:
            if place < len(order) and len(chosen) < limit:
                chosen.setdefault(order[place])
    return sorted(chosen, key=list(figures).index)


def confusions(pack: LensPack, held_out: HeldOut, names: Sequence[str]) -> dict[str, list[tuple[str, float, int]]]:
    """Concepts whose held-out positives a lens ranks above its own positives, worst first.

    The share is over pairs (a text of the other concept that is a negative of this one, a positive of this one), ties
    counting half: one minus the AUROC against that concept alone. Concepts above or below are not confusions.
    """
    positive_SN = scipy.sparse.csc_array((held_out.labels > 0) & (held_out.weights > 0), dtype=np.float64)
    place = {name: column for column, name in enumerate(held_out.names)}
    result: dict[str, list[tuple[str, float, int]]] = {}
    for name in names:
        lens = place[name]
        used_S = held_out.weights[:, lens] > 0
        own_S = used_S & (held_out.labels[:, lens] > 0)
        other = np.flatnonzero(used_S & ~own_S)
        own_sorted = np.sort(held_out.logits[own_S, lens])
        if not len(own_sorted) or not len(other):
            result[name] = []
            continue
        value = held_out.logits[other, lens]
        below = (np.searchsorted(own_sorted, value, "left") + np.searchsorted(own_sorted, value, "right")) / 2
        texts_N = positive_SN[other].sum(axis=0)
        share_N = np.divide(
            below / len(own_sorted) @ positive_SN[other], texts_N, out=np.zeros(len(texts_N)), where=texts_N > 0
        )
        for kin in _lineage(pack, name):
            if kin in place:
                share_N[place[kin]] = 0
        order = [n for n in np.lexsort((-texts_N, -share_N))[:MOST_CONFUSED].tolist() if share_N[n] > 0]
        result[name] = [(held_out.names[n], float(share_N[n]), int(texts_N[n])) for n in order]
    return result


def _lineage(pack: LensPack, name: str) -> frozenset[str]:
    if pack.concepts is None or name not in pack.concepts:
        return frozenset({name})
    return pack.concepts.ancestors(name) | pack.concepts.descendants(name) | {name}


def marks_of(table: SampleTable, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Labels and weights [S, N] of all texts for some concepts, in their order."""
    labels_SN, weights_SN = table.matrices(np.arange(len(table)))
    column = {name: index for index, name in enumerate(table.concepts)}
    order = [column[name] for name in names]
    return labels_SN[:, order], weights_SN[:, order]


def _numbers(pack: LensPack, shown: HeldOut, lens: int, config: CardsConfig, evaluate: EvaluateConfig) -> Card:
    """The parts of a card that need no further reading."""
    name, used_S = shown.names[lens], shown.weights[:, lens] > 0
    logits_s, positive_s = shown.logits[used_S, lens].astype(np.float64), shown.labels[used_S, lens] > 0
    # The middle 99 % decides the range; what lies outside stands in the outer bars.
    low, high = np.quantile(logits_s, (0.005, 0.995)) if len(logits_s) else (0.0, 1.0)
    edges_K = np.linspace(low, max(high, low + 1e-3), config.bins + 1)
    inside_s = np.clip(logits_s, edges_K[0], edges_K[-1])
    known = pack.concepts is not None and name in pack.concepts
    return Card(
        name=name,
        definition=pack.concepts[name].definition if known and pack.concepts else "",
        path=pack.concepts.path(name) if known and pack.concepts else [name],
        reliability=reliability_bins(
            1 / (1 + np.exp(-logits_s)), positive_s, shown.weights[used_S, lens], evaluate.bins, evaluate.prior
        ),
        edges=edges_K.tolist(),
        positive=np.histogram(inside_s[positive_s], edges_K)[0].tolist(),
        negative=np.histogram(inside_s[~positive_s], edges_K)[0].tolist(),
    )


def reliability_bins(
    chance_S: np.ndarray, positive_S: np.ndarray, weights_S: np.ndarray, bins: int, prior: float
) -> list[tuple[float, float, float]]:
    """Mean stated probability, share of positives at the prior, and effective number of texts, of each filled bin."""
    share_S = metrics.weights_at_prior(positive_S[:, None].astype(np.float64), weights_S[:, None], prior)[:, 0]
    place_S = np.clip((chance_S * bins).astype(int), 0, bins - 1)
    result: list[tuple[float, float, float]] = []
    for place in range(bins):
        held = share_S[place_S == place]
        if held.sum() > 0:
            stated = float((held * chance_S[place_S == place]).sum() / held.sum())
            found = float((held * positive_S[place_S == place]).sum() / held.sum())
            result.append((stated, found, float(held.sum() ** 2 / (held**2).sum())))
    return result


@dataclass(frozen=True)
class _Wanted:
    """A text that a card shows, and in which of its lists."""

    lens: int
    kind: str
    label: int
    source: str


def _read_texts(
    pack: LensPack,
    reader: TextReader,
    shown: HeldOut,
    sources: Sequence[str],
    training: SampleTable | None,
    cards: dict[str, Card],
    config: CardsConfig,
    seed: int,
) -> None:
    """Fill the lists of texts: every text is read once, whatever number of cards shows it."""
    wanted: dict[str, list[_Wanted]] = {}
    for lens in range(len(shown.names)):
        for kind, row in _picked(shown, lens, config.texts):
            label = int(shown.labels[row, lens] > 0)
            wanted.setdefault(shown.texts[row], []).append(_Wanted(lens, kind, label, sources[row]))
    for lens, row in _training_rows(training, shown.names, config.train_texts, seed):
        assert training is not None
        wanted.setdefault(training.texts[row], []).append(_Wanted(lens, "training", 1, training.sources[row]))
    stack = pack.stack.rows(shown.names)
    texts = list(wanted)
    for index, normed_TLD in reader.tokens(texts, telling="reading texts for cards"):
        logit_n, share_Tn = shares_of_tokens(stack, normed_TLD, reader.pool)
        words = pieces(reader.substrate.tokenizer, reader.token_ids(texts[index])[1:])
        for want in wanted[texts[index]]:
            parts = list(zip(words, share_Tn[:, want.lens].tolist(), strict=True))
            made = ShownText(texts[index], want.label, want.source, float(logit_n[want.lens]), parts)
            getattr(cards[shown.names[want.lens]], want.kind).append(made)
    for card in cards.values():
        card.strongest.sort(key=lambda text: -text.logit)
        card.missed.sort(key=lambda text: text.logit)
        card.training = sorted(card.training, key=lambda text: -text.logit)[:3]


def _picked(shown: HeldOut, lens: int, num: int) -> list[tuple[str, int]]:
    """Rows of the strongest texts of whatever label, and of the weakest positives."""
    used = np.flatnonzero(shown.weights[:, lens] > 0)
    falling = used[np.argsort(-shown.logits[used, lens], kind="stable")]
    positive = [row for row in falling.tolist() if shown.labels[row, lens] > 0]
    strongest = falling[:num].tolist()
    missed = [row for row in positive[-max(1, num // 2) :] if row not in strongest]
    return [("strongest", row) for row in strongest] + [("missed", row) for row in missed]


def _training_rows(training: SampleTable | None, names: Sequence[str], num: int, seed: int) -> list[tuple[int, int]]:
    """(lens, row) of positives among the training texts, drawn by seed."""
    if training is None or not num:
        return []
    column = {name: index for index, name in enumerate(training.concepts)}
    in_train_E = np.asarray(training.splits)[training.rows] == "train"
    found: list[tuple[int, int]] = []
    for lens, name in enumerate(names):
        rows = training.rows[in_train_E & (training.cols == column.get(name, -1)) & (training.labels > 0)]
        drawn = np.random.default_rng([seed, lens]).permutation(rows)[:num]
        found += [(lens, int(row)) for row in drawn]
    return found


def _without_words(
    pack: LensPack, reader: TextReader, shown: HeldOut, cards: dict[str, Card], config: CardsConfig, seed: int
) -> None:
    words = []
    for lens, name in enumerate(shown.names):
        used = np.flatnonzero(shown.weights[:, lens] > 0)
        used = np.random.default_rng([seed, lens]).permutation(used)
        by_label = [
            [shown.texts[row] for row in used if (shown.labels[row, lens] > 0) == label] for label in (True, False)
        ]
        positives, negatives = by_label[0], by_label[1][:MOST_NEGATIVES]
        words.append(telling_words(name, pack.concepts, pack.text, positives, negatives, config.words))
    removed = remove_words(
        shown,
        words,
        stack=pack.stack.rows(shown.names),
        reader=reader,
        text=None if pack.text is None else pack.text.subset(shown.names),
        most=config.edited_texts,
        seed=seed,
    )
    for name, words in zip(shown.names, removed, strict=True):
        cards[name].words = words


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float):
        return round(value, 5) if math.isfinite(value) else None
    return value
