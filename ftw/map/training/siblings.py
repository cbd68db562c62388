"""Lenses against their siblings: does a concept's own lens rank first on its texts, and can it be made to?

Each lens is fitted on its own; that they are read side by side is nobody's loss. `refine_siblings` takes fitted linear
lenses and moves the weights of each family a little, so that on a text of one sibling its own lens reads higher, by a
margin, than the others. Inputs are normalised as in training, because the heads are those of the stack. A lens keeps
its new weights only where validation texts read no worse, by AUROC and by Brier score, and its family ranks the right
one first more often; where the whole way is too far, a half, a quarter or an eighth of it is tried. `validate_ranks` is
the report: own lens first among siblings, own domain among the first three.

Sources: Burges et al. 2005, Learning to rank using gradient descent; margin loss as in Weston & Watkins 1999.

Axes: S texts, N lenses, n lenses of one family, P (text, own, other) triples, L layers, D model width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from ftw.errors import ConfigError, DataError
from ftw.hat.lens import Head
from ftw.hat.linear import LinearHead
from ftw.hat.store import LensStack
from ftw.map.concept import ConceptPack
from ftw.map.metrics import auroc, brier

SHARES = (1.0, 0.5, 0.25, 0.125)  # of the way, the farthest that validation allows


@dataclass(kw_only=True)
class SiblingConfig:
    """How far siblings are told apart after the fit.

    Attributes:
        margin: in logits, by which the own lens is to read higher. steps, learning_rate: of Adam.
        anchor: weight of the squared distance to the fitted logits, which keeps a lens what it was.
        most_texts: of each sibling, at most so many are ranked. seed: of their draw.
    """

    margin: float = 1.0
    steps: int = 20
    learning_rate: float = 1e-3
    anchor: float = 0.1
    most_texts: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if self.margin <= 0 or self.steps < 1 or self.learning_rate <= 0 or self.anchor < 0 or self.most_texts < 1:
            raise ConfigError(
                f"siblings: margin={self.margin}, learning_rate={self.learning_rate}, steps={self.steps} and "
                f"most_texts={self.most_texts} must be above 0, anchor={self.anchor} at least 0"
            )


@dataclass(frozen=True)
class Rows:
    """Texts with their marks, in the order of a stack's lenses.

    Attributes:
        states_SLD: layer-normed, as the heads read them. labels_SN, weights_SN: marks (weight 0: not used).
    """

    states_SLD: Tensor
    labels_SN: np.ndarray
    weights_SN: np.ndarray

    def __post_init__(self) -> None:
        if self.labels_SN.shape != self.weights_SN.shape or len(self.labels_SN) != len(self.states_SLD):
            raise DataError(
                f"{len(self.states_SLD)} states, labels {self.labels_SN.shape} and weights {self.weights_SN.shape} "
                "do not fit"
            )

    def of(self, columns: Sequence[int]) -> "Rows":
        """The same texts for some of the lenses."""
        return Rows(self.states_SLD, self.labels_SN[:, columns], self.weights_SN[:, columns])

    @property
    def positive_SN(self) -> np.ndarray:
        return (self.labels_SN > 0) & (self.weights_SN > 0)

    @property
    def negative_SN(self) -> np.ndarray:
        return (self.labels_SN <= 0) & (self.weights_SN > 0)


@dataclass(frozen=True)
class RankReport:
    """How lenses rank on validation texts.

    Attributes:
        first: concept -> share of its texts on which its lens reads highest among its siblings.
        domain: root concept -> share of its texts on which its lens is among the `top` roots.
        others: root concept -> mean rank of the roots that the text is not of, 0 best, as a share of their number.
    """

    first: dict[str, float]
    domain: dict[str, float]
    others: dict[str, float]

    @property
    def mean_first(self) -> float:
        """Mean over the concepts that have siblings and texts."""
        return float(np.mean(list(self.first.values()))) if self.first else float("nan")


@dataclass
class SiblingReport:
    """What refinement did: figures on validation texts before and after, and which lenses kept their new weights."""

    auroc_before: dict[str, float] = field(default_factory=dict)
    auroc_after: dict[str, float] = field(default_factory=dict)
    first_before: dict[str, float] = field(default_factory=dict)
    first_after: dict[str, float] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)


def families(concepts: ConceptPack, names: Sequence[str]) -> list[list[str]]:
    """Groups of two or more of these concepts that share their tree parent; roots are siblings too."""
    groups: dict[str, list[str]] = {}
    for name in names:
        parents = concepts.parents(name)
        groups.setdefault(parents[0] if parents else "", []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def validate_ranks(
    stack: LensStack, rows: Rows, groups: Sequence[Sequence[str]], *, roots: Sequence[str] = (), top: int = 3
) -> RankReport:
    """Own lens first among siblings, and own domain among the first `top` of `roots`, on the texts of each concept.

    Only texts are ranked that are a positive of one sibling and a negative of those it is ranked against.
    """
    place = {name: column for column, name in enumerate(stack.names)}
    logits_SN = _logits(stack, rows)
    first: dict[str, float] = {}
    for group in groups:
        columns = [place[name] for name in group]
        first |= _first_shares(logits_SN[:, columns], rows.of(columns), group)
    domain: dict[str, float] = {}
    others: dict[str, float] = {}
    columns = [place[name] for name in roots]
    for name, column in zip(roots, columns, strict=True):
        own_S = rows.positive_SN[:, column]
        if not own_S.any() or len(columns) < 2:
            continue
        rank_Sr = np.argsort(np.argsort(-logits_SN[own_S][:, columns], axis=1), axis=1)
        at, away_Sr = columns.index(column), rows.negative_SN[own_S][:, columns]
        domain[name] = float((rank_Sr[:, at] < top).mean())
        others[name] = float(rank_Sr[away_Sr].mean() / (len(columns) - 1)) if away_Sr.any() else float("nan")
    return RankReport(first, domain, others)


def refine_siblings(
    stack: LensStack,
    train: Rows,
    validation: Rows,
    groups: Sequence[Sequence[str]],
    config: SiblingConfig | None = None,
) -> tuple[LensStack, SiblingReport]:
    """Linear lenses moved so that siblings are ranked apart, each only where validation does not fall.

    Probabilities stay calibrated in so far as Brier scores on validation do not rise; percentiles are to be made anew
    afterwards (`ftw.map.training.fit.with_percentiles`).

    Raises:
        ConfigError: the lenses are not linear, or read texts by several pools.
    """
    config = config or SiblingConfig()
    if stack.pooling is not None or not all(isinstance(head, LinearHead) for head in stack.heads):
        raise ConfigError(
            "siblings are ranked apart for linear lenses that read one pool; train with map.training.solver=lda"
        )
    place = {name: column for column, name in enumerate(stack.names)}
    report = SiblingReport()
    heads = [head.rows(torch.arange(len(stack.names))) for head in stack.heads]
    for number, group in enumerate(groups):
        columns, part = [place[name] for name in group], stack.rows(group)
        way_LnW = _way(part, train.of(columns), config, seed=config.seed + number)
        for share in SHARES if way_LnW else ():
            moved = _moved(part, way_LnW, share)
            if kept := _accepted(part, moved, validation.of(columns), report):
                for head, new in zip(heads, moved.heads, strict=True):
                    _put(head, new, [columns[at] for at in kept], kept)
                report.kept += [group[at] for at in kept]
                break
    return replace(stack, heads=heads), report


def _logits(stack: LensStack, rows: Rows) -> np.ndarray:
    return stack.bank().logits(rows.states_SLD).numpy()


def _first_shares(logits_Sn: np.ndarray, rows: Rows, group: Sequence[str]) -> dict[str, float]:
    """Share of the texts of each sibling on which it reads above all siblings that the text is a negative of."""
    shares: dict[str, float] = {}
    positive_Sn, negative_Sn = rows.positive_SN, rows.negative_SN
    for own, name in enumerate(group):
        # A text that is positive for its own lens is no negative of it, so the own lens is no rival.
        ranked_S = positive_Sn[:, own] & negative_Sn.any(axis=1)
        if ranked_S.any():
            best_s = np.where(negative_Sn, logits_Sn, -np.inf)[ranked_S].max(axis=1)
            shares[name] = float((logits_Sn[ranked_S, own] > best_s).mean())
    return shares


def _triples(train: Rows, config: SiblingConfig, seed: int) -> np.ndarray:
    """(text, own, other) with own and other as places in the family, for texts of one and not of the other: [P, 3]."""
    random, found = np.random.default_rng(seed), []
    positive_Sn, negative_Sn = train.positive_SN, train.negative_SN
    for own in range(positive_Sn.shape[1]):
        texts = random.permutation(np.flatnonzero(positive_Sn[:, own]))[: config.most_texts]
        text_P, other_P = np.nonzero(negative_Sn[texts])
        found.append(np.stack([texts[text_P], np.full_like(text_P, own), other_P], axis=1))
    return np.concatenate(found)


def _way(part: LensStack, train: Rows, config: SiblingConfig, *, seed: int) -> list[Tensor]:
    """How the weights of one family would move, [n, W] a layer; empty where there is nothing to rank."""
    triples_P3 = torch.from_numpy(_triples(train, config, seed))
    if not len(triples_P3):
        return []
    texts, place_P = torch.unique(triples_P3[:, 0], return_inverse=True)
    own_P, other_P = triples_P3[:, 1], triples_P3[:, 2]
    x_SLW = train.states_SLD[texts] if part.basis is None else part.basis(train.states_SLD[texts])
    scale_Ln = (part.scale_NL / len(part.layers)).T
    with torch.no_grad():
        start_Sn = part.bank().logits(train.states_SLD[texts])
    way_LnW = [torch.zeros(len(part.names), x_SLW.shape[-1], requires_grad=True) for _ in part.layers]
    optimiser = torch.optim.Adam(way_LnW, lr=config.learning_rate)
    for _ in range(config.steps):
        optimiser.zero_grad()
        change_Sn = torch.zeros_like(start_Sn)
        for layer, way_nW in enumerate(way_LnW):
            change_Sn = change_Sn + scale_Ln[layer] * (x_SLW[:, layer] @ way_nW.T)
        logits_Sn = start_Sn + change_Sn
        ahead_P = logits_Sn[place_P, own_P] - logits_Sn[place_P, other_P]
        loss = (config.margin - ahead_P).clamp_min(0).mean() + config.anchor * change_Sn.square().mean()
        loss.backward()
        optimiser.step()
    return [way_nW.detach() for way_nW in way_LnW]


def _moved(part: LensStack, way_LnW: list[Tensor], share: float) -> LensStack:
    """The lenses of a family, a share of the way."""
    heads = [head.rows(torch.arange(len(part.names))) for head in part.heads]
    with torch.no_grad():
        for head, way_nW in zip(heads, way_LnW, strict=True):
            assert isinstance(head, LinearHead)
            head.weight.add_(share * way_nW)
    return replace(part, heads=heads)


def _accepted(part: LensStack, moved: LensStack, validation: Rows, report: SiblingReport) -> list[int]:
    """Places of the lenses of a family that stay moved: none reads worse, and the family ranks better; else none."""
    old_Sn, new_Sn = _logits(part, validation), _logits(moved, validation)
    marks, group = (validation.labels_SN, validation.weights_SN), part.names
    before_n, after_n = (auroc(logits_Sn, *marks) for logits_Sn in (old_Sn, new_Sn))
    error_n, new_error_n = (brier(1 / (1 + np.exp(-logits_Sn)), *marks, prior=0.5) for logits_Sn in (old_Sn, new_Sn))
    # NaN compares as false: a lens that validation says nothing about stays as it was fitted.
    better_n = (after_n >= before_n) & (new_error_n <= error_n)
    first = _first_shares(old_Sn, validation, group)
    mixed = _first_shares(np.where(better_n, new_Sn, old_Sn), validation, group)
    if not mixed or np.mean(list(mixed.values())) <= np.mean(list(first.values())):
        better_n, mixed = np.zeros_like(better_n), first
    report.auroc_before |= dict(zip(group, before_n.tolist(), strict=True))
    report.auroc_after |= dict(zip(group, np.where(better_n, after_n, before_n).tolist(), strict=True))
    report.first_before |= first
    report.first_after |= mixed
    return np.flatnonzero(better_n).tolist()


@torch.no_grad()
def _put(head: Head, new: Head, rows: list[int], places: list[int]) -> None:
    """Write the weights at `places` of a family's head into rows of the whole one."""
    assert isinstance(head, LinearHead)
    assert isinstance(new, LinearHead)
    head.weight[torch.tensor(rows)] = new.weight[torch.tensor(places)]
