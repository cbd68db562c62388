"""Does a lens read the concept or the word? Take the telling words out of the texts and read them again.

Telling words are the lemmas of a concept and the words that its text lens leans on most. They are removed from
positives and negatives alike, the substrate reads what is left, and the fall in AUROC is set beside that of the text
lens on the same edited texts.

Axes: S texts, n lenses under study, P (text, lens) pairs that an edit changed.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from ftw.hat.store import LensStack
from ftw.hat.text import CHARS_MARK, TextBank
from ftw.hat.text_embedding import AnyText
from ftw.map import metrics
from ftw.map.bootstrap import bootstrap
from ftw.map.concept import ConceptPack
from ftw.map.contributions import TextReader

DRAWS = 400


@dataclass(frozen=True)
class WordsRemoved:
    """How a lens reads with the telling words gone, on the same texts before and after.

    Attributes:
        words: what was removed. num_positive, num_negative: texts that were compared. num_changed: of these, edited.
        auroc_before, auroc_after: of the lens. drop_low, drop_high: 95 % of before minus after, over groups.
        text_before, text_after: AUROC of the text lens on the same texts; NaN without text lenses.
    """

    words: list[str]
    num_positive: int
    num_negative: int
    num_changed: int
    auroc_before: float
    auroc_after: float
    drop_low: float
    drop_high: float
    text_before: float
    text_after: float


@dataclass(frozen=True)
class HeldOut:
    """Held-out texts with what is true of them for n lenses, and what the lenses read.

    Attributes:
        texts, groups: S of each. labels, weights, logits: [S, n], in the order of `names`.
    """

    names: list[str]
    texts: list[str]
    groups: list[str]
    labels: np.ndarray
    weights: np.ndarray
    logits: np.ndarray

    def of(self, names: Sequence[str]) -> "HeldOut":
        """The same texts for some of the lenses."""
        place = {name: column for column, name in enumerate(self.names)}
        columns = [place[name] for name in names]
        parts = (array[:, columns] for array in (self.labels, self.weights, self.logits))
        return HeldOut(list(names), self.texts, self.groups, *parts)


def telling_words(
    name: str,
    concepts: ConceptPack | None,
    text: AnyText | None,
    positives: Sequence[str],
    negatives: Sequence[str],
    num: int,
) -> list[str]:
    """Lemmas of a concept (its name where it has none), then the `num` words that do most to tell these texts apart.

    That is the weight of a word in the text lens, times the share of positives that hold it minus that of negatives.
    """
    lemmas = [name]
    if concepts is not None and name in concepts:
        lemmas = concepts[name].lemmas or [concepts[name].term]
    found = [re.sub(r"[_\s]+", " ", _spaced(lemma)).strip().lower() for lemma in lemmas]
    if isinstance(text, TextBank) and name in text.names:
        found += _strongest_words(text.subset([name]), positives, negatives, num)
    return list(dict.fromkeys(word for word in found if word))


def _spaced(lemma: str) -> str:
    """CamelCase as words, which is how some packs write a name of several."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", lemma)


def _strongest_words(lens: TextBank, positives: Sequence[str], negatives: Sequence[str], num: int) -> list[str]:
    worth_V = np.zeros(len(lens.vocabulary))
    worth_V[np.repeat(np.arange(len(worth_V)), np.diff(lens.row_starts))] = lens.numerators
    apart_V = np.zeros(len(worth_V))
    for texts, sign in ((positives, 1), (negatives, -1)):
        for text in texts:
            apart_V[list(lens.counts(text))] += sign / len(texts)
    # A word that is rarer among positives tells nothing, whatever its weight.
    worth_V = worth_V * apart_V.clip(0)
    words = (lens.vocabulary[row] for row in np.argsort(-worth_V, kind="stable") if worth_V[row] > 0)
    return list(islice((word for word in words if " " not in word and not word.startswith(CHARS_MARK)), num))


def without_words(text: str, words: Sequence[str]) -> str:
    """A text without these words and their plurals, whatever their case."""
    if not words:
        return text
    forms = [*words, *(f"{word[:-1]}ies" for word in words if word.endswith("y"))]
    choices = "|".join(r"\s+".join(map(re.escape, form.split())) for form in sorted(forms, key=len, reverse=True))
    left = re.sub(rf"(?<!\w)(?:{choices})(?:e?s)?(?!\w)", "", text, flags=re.IGNORECASE)
    return text if left == text else re.sub(r"\s+([,.;:!?)])", r"\1", re.sub(r"\s+", " ", left)).strip()


def remove_words(
    held_out: HeldOut,
    words: Sequence[Sequence[str]],
    *,
    stack: LensStack,
    reader: TextReader,
    text: AnyText | None,
    most: int,
    seed: int,
) -> list[WordsRemoved | None]:
    """Read the texts again without each lens's telling words.

    Args:
        words: of each lens of `held_out`, whose order `stack` has too.
        most: positives of a lens that are compared, and negatives that an edit changes; more are drawn by `seed`.

    Returns:
        One entry a lens; None where positives or negatives are left out entirely.
    """
    changed: dict[tuple[int, int], str] = {}
    kept_Sn = np.zeros(held_out.labels.shape, dtype=bool)
    for lens, removed in enumerate(words):
        edited = _edits(held_out, lens, removed, most, np.random.default_rng([seed, lens]), reader)
        kept_Sn[:, lens], new = edited
        changed |= {(row, lens): left for row, left in new.items()}
    after_Sn = held_out.logits.astype(np.float64).copy()
    said = {} if text is None else {"before": text.score(held_out.texts).double().numpy()}
    said |= {"after": said["before"].copy()} if said else {}
    if changed:
        places = tuple(np.array(list(changed)).T)
        lefts = list(dict.fromkeys(changed.values()))
        place_of = {left: place for place, left in enumerate(lefts)}
        place_P = np.array([place_of[left] for left in changed.values()])
        after_Sn[places] = reader.logits(stack, lefts, telling="reading edited texts").numpy()[place_P, places[1]]
        if text is not None:
            said["after"][places] = text.score(lefts).double().numpy()[place_P, places[1]]
    counts = np.bincount([lens for _, lens in changed], minlength=len(words))
    return _compared(held_out, kept_Sn, after_Sn, said, words, counts, seed)


def _edits(
    held_out: HeldOut, lens: int, words: Sequence[str], most: int, random: np.random.Generator, reader: TextReader
) -> tuple[np.ndarray, dict[int, str]]:
    """Which texts are compared for a lens, [S], and what is left of those that the edit changes."""
    kept_S = np.zeros(len(held_out.texts), dtype=bool)
    changed: dict[int, str] = {}
    budget = {True: most, False: most}
    used = np.flatnonzero(held_out.weights[:, lens] > 0)
    for row in random.permutation(used).tolist():
        positive = bool(held_out.labels[row, lens] > 0)
        left = without_words(held_out.texts[row], words)
        is_changed = left != held_out.texts[row]
        if (positive or is_changed) and not budget[positive]:
            continue
        if is_changed and len(reader.token_ids(left)) < 2:
            continue  # nothing is left to read
        if positive or is_changed:
            budget[positive] -= 1
        kept_S[row] = True
        if is_changed:
            changed[row] = left
    return kept_S, changed


def _compared(
    held_out: HeldOut,
    kept_Sn: np.ndarray,
    after_Sn: np.ndarray,
    said: dict[str, np.ndarray],
    words: Sequence[Sequence[str]],
    num_changed: np.ndarray,
    seed: int,
) -> list[WordsRemoved | None]:
    labels_Sn, weights_Sn = held_out.labels, np.where(kept_Sn, held_out.weights, 0)
    before, after = (metrics.auroc(each, labels_Sn, weights_Sn) for each in (held_out.logits, after_Sn))
    said_n = {when: metrics.auroc(each, labels_Sn, weights_Sn) for when, each in said.items()}
    systems = {"before": held_out.logits, "after": after_Sn}
    _, group_S = np.unique(np.asarray(held_out.groups, dtype=object).astype(str), return_inverse=True)
    drawn = bootstrap(systems, labels_Sn, weights_Sn, group_S, draws=DRAWS, seed=seed)
    drop_Rn = drawn["before"] - drawn["after"]
    result: list[WordsRemoved | None] = []
    for lens, removed in enumerate(words):
        known_R = drop_Rn[np.isfinite(drop_Rn[:, lens]), lens]
        if not np.isfinite(before[lens]) or not len(known_R):
            result.append(None)
            continue
        low, high = np.quantile(known_R, (0.025, 0.975))
        positive_S = (labels_Sn[:, lens] > 0) & (weights_Sn[:, lens] > 0)
        result.append(
            WordsRemoved(
                words=list(removed),
                num_positive=int(positive_S.sum()),
                num_negative=int(((weights_Sn[:, lens] > 0) & ~positive_S).sum()),
                num_changed=int(num_changed[lens]),
                auroc_before=float(before[lens]),
                auroc_after=float(after[lens]),
                drop_low=float(low),
                drop_high=float(high),
                text_before=float(said_n["before"][lens]) if said else float("nan"),
                text_after=float(said_n["after"][lens]) if said else float("nan"),
            )
        )
    return result
