"""Claims about siblings: refinement ranks them apart, and cannot make a lens worse on validation texts."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ftw.errors import ConfigError, DataError
from ftw.hat.lens import HeadConfig
from ftw.hat.linear import LinearHead
from ftw.hat.store import LensStack
from ftw.map.concept import ConceptPack
from ftw.map.concept_record import Concept
from ftw.map.metrics import auroc, brier
from ftw.map.training.siblings import Rows, SiblingConfig, families, refine_siblings, validate_ranks

NAMES = ["cat", "dog", "horse", "stone", "sand"]
FAMILIES = [["cat", "dog", "horse"], ["stone", "sand"]]
LAYERS, WIDTH = (1, 4), 10


def rows(num: int, seed: int, directions_ND: torch.Tensor, noise: float = 1.0) -> Rows:
    """Each text is about one concept: its state is that direction in noise, at both layers."""
    generator = torch.Generator().manual_seed(seed)
    about_S = torch.randint(len(NAMES), (num,), generator=generator)
    states_SLD = 2 * directions_ND[about_S][:, None] + noise * torch.randn(num, len(LAYERS), WIDTH, generator=generator)
    labels_SN = (about_S[:, None] == torch.arange(len(NAMES))).float().numpy()
    return Rows(states_SLD, labels_SN, np.ones_like(labels_SN))


@pytest.fixture
def directions_ND() -> torch.Tensor:
    """Siblings lie close together: a family's direction with a little of one's own."""
    generator = torch.Generator().manual_seed(3)
    family_FD, own_ND = (torch.randn(num, WIDTH, generator=generator) for num in (2, len(NAMES)))
    return torch.nn.functional.normalize(family_FD[[0, 0, 0, 1, 1]] + 0.6 * own_ND, dim=1)


def stack_of(weight_ND: torch.Tensor) -> LensStack:
    heads = []
    for _ in LAYERS:
        head = LinearHead(len(NAMES), WIDTH)
        with torch.no_grad():
            head.weight.copy_(weight_ND)
        heads.append(head)
    ones_NL = torch.ones(len(NAMES), len(LAYERS))
    return LensStack(names=NAMES, layers=LAYERS, heads=heads, scale_NL=ones_NL, offset_NL=0 * ones_NL - 1)


def careless(directions_ND: torch.Tensor) -> torch.Tensor:
    """What a fit on few texts finds: the directions with errors."""
    return directions_ND + 0.3 * torch.randn(len(NAMES), WIDTH, generator=torch.Generator().manual_seed(9))


STRONG = SiblingConfig(learning_rate=0.02, steps=60)


def test_siblings_are_ranked_apart_and_no_lens_loses_auroc(directions_ND: torch.Tensor):
    stack, train, validation = (
        stack_of(careless(directions_ND)),
        rows(600, 0, directions_ND),
        rows(400, 1, directions_ND),
    )
    refined, report = refine_siblings(stack, train, validation, FAMILIES, STRONG)
    before, after = (validate_ranks(each, validation, FAMILIES) for each in (stack, refined))
    assert report.kept
    assert after.mean_first > before.mean_first + 0.03
    assert report.first_before == before.first
    assert report.first_after == after.first
    unseen = rows(800, 2, directions_ND)
    assert validate_ranks(refined, unseen, FAMILIES).mean_first > validate_ranks(stack, unseen, FAMILIES).mean_first


@pytest.mark.parametrize("seed", range(6))
def test_refinement_cannot_worsen_a_lens_or_a_family_on_validation_texts(directions_ND: torch.Tensor, seed: int):
    # Training texts that say nothing, or the wrong thing, about the validation texts.
    generator = torch.Generator().manual_seed(seed)
    wrong_ND = torch.randn(len(NAMES), WIDTH, generator=generator)
    stack = stack_of(directions_ND + 0.3 * torch.randn(len(NAMES), WIDTH, generator=generator))
    train, validation = rows(200, seed, wrong_ND), rows(150, seed + 50, directions_ND)
    refined, report = refine_siblings(stack, train, validation, FAMILIES, STRONG)
    marks = validation.labels_SN, validation.weights_SN
    old_N, new_N = (auroc(each.bank().logits(validation.states_SLD).numpy(), *marks) for each in (stack, refined))
    assert (new_N >= old_N).all()
    assert list(report.auroc_after.values()) == pytest.approx(new_N.tolist())
    chances = [1 / (1 + np.exp(-each.bank().logits(validation.states_SLD).numpy())) for each in (stack, refined)]
    old_error_N, new_error_N = (brier(chance_SN, *marks, prior=0.5) for chance_SN in chances)
    assert (new_error_N <= old_error_N).all()
    before, after = (validate_ranks(each, validation, FAMILIES).first for each in (stack, refined))
    for family in FAMILIES:
        assert np.mean([after[name] for name in family]) >= np.mean([before[name] for name in family])
    for column, name in enumerate(NAMES):
        if name not in report.kept:
            assert torch.equal(
                refined.heads[0].row_tensors()["weight"][column], stack.heads[0].row_tensors()["weight"][column]
            )


def test_validation_of_nothing_keeps_every_lens_as_it_was(directions_ND: torch.Tensor):
    stack, train, validation = stack_of(directions_ND), rows(100, 0, directions_ND), rows(80, 1, directions_ND)
    unmarked = replace(validation, weights_SN=np.zeros_like(validation.weights_SN))
    refined, report = refine_siblings(stack, train, unmarked, FAMILIES, STRONG)
    assert not report.kept
    assert torch.equal(refined.bank().logits(train.states_SLD), stack.bank().logits(train.states_SLD))


def test_ranks_are_those_of_a_plain_count(directions_ND: torch.Tensor):
    stack, texts = stack_of(directions_ND), rows(60, 5, directions_ND)
    logits_SN = stack.bank().logits(texts.states_SLD).numpy()
    report = validate_ranks(stack, texts, FAMILIES, roots=NAMES, top=3)
    for family in FAMILIES:
        columns = [NAMES.index(name) for name in family]
        for name in family:
            own = [row for row in range(60) if texts.labels_SN[row, NAMES.index(name)]]
            won = [max(columns, key=lambda column, row=row: logits_SN[row, column]) == NAMES.index(name) for row in own]
            assert report.first[name] == pytest.approx(np.mean(won))
    for name in NAMES:
        column = NAMES.index(name)
        own = [row for row in range(60) if texts.labels_SN[row, column]]
        within = [int((logits_SN[row] > logits_SN[row, column]).sum()) < 3 for row in own]
        assert report.domain[name] == pytest.approx(np.mean(within))


def test_families_share_a_parent_and_roots_are_one():
    level = {"animal": 0, "plant": 0, "cat": 1, "dog": 1, "oak": 1}
    parents = {"cat": ["animal"], "dog": ["animal"], "oak": ["plant"]}
    pack = ConceptPack.of(
        "toy", "1.0.0", [Concept(name=n, level=at, parents=parents.get(n, [])) for n, at in level.items()], {}
    )
    assert families(pack, pack.names) == [["animal", "plant"], ["cat", "dog"]]


def test_what_cannot_be_refined_is_named(directions_ND: torch.Tensor):
    texts = rows(20, 0, directions_ND)
    mlp = replace(stack_of(directions_ND), heads=[HeadConfig(family="mlp", hidden=3).build(5, WIDTH) for _ in LAYERS])
    with pytest.raises(ConfigError, match="linear"):
        refine_siblings(mlp, texts, texts, FAMILIES)
    with pytest.raises(DataError, match="do not fit"):
        Rows(texts.states_SLD[:3], texts.labels_SN, texts.weights_SN)
    with pytest.raises(ConfigError, match="margin"):
        SiblingConfig(margin=0)
