"""The interpreter and its tree: probabilities add up, padding and order change nothing, what is saved is what was."""

import json
from pathlib import Path

import pytest
import torch

from ftw.errors import ConceptError, ConfigError, PackError, SubstrateError
from ftw.hat.concept_tree import ConceptTree
from ftw.hat.interpreter import Interpreter, InterpreterConfig, Slot, calibrated, confidence

SMALL = InterpreterConfig(width=16, num_blocks=2, num_heads=4, feedforward=32)
NAMES = ["animal", "dog", "cat", "oak", "poodle"]
PARENTS = {"dog": "animal", "cat": "animal", "poodle": "dog", "animal": "[living]", "oak": "[living]"}
SLOTS = [Slot(1, "mean"), Slot(2, "mean"), Slot(2, "last")]


def interpreter(*, seed: int = 0, **options: object) -> Interpreter:
    """A random one, with states of width 8."""
    torch.manual_seed(seed)
    config = InterpreterConfig(**{**vars(SMALL), **options})
    tree = ConceptTree(NAMES, PARENTS)
    made = Interpreter(config, names=NAMES, slots=SLOTS, state_width=8, fingerprint="f", tree=tree)
    made.center_JD.normal_()
    made.scale_JD.uniform_(0.5, 2)
    made.directions_JDR.normal_()
    made.places_CR.copy_(torch.nn.functional.normalize(torch.randn_like(made.places_CR), dim=1))
    made.trust.fill_(3.0)
    return made.eval()


def test_probabilities_along_a_tree_are_products_of_choices_and_sums_of_what_lies_below() -> None:
    tree = ConceptTree(NAMES, PARENTS)
    logits_BM = torch.randn(7, tree.num_nodes) * 5
    leaf_BC = tree.log_probabilities(logits_BM).exp()
    assert torch.allclose(leaf_BC.sum(1), torch.ones(7), atol=1e-5)
    place = {name: number for number, name in enumerate(tree.names)}
    # By hand: [living] is the only root; below it stand animal and oak; below animal dog, cat and animal itself.
    own = dict(zip(["animal", "dog"], range(len(tree.names), tree.num_nodes), strict=True))
    top_B2 = logits_BM[:, [place["animal"], place["oak"]]].softmax(1)
    below_B3 = logits_BM[:, [place["dog"], place["cat"], own["animal"]]].softmax(1)
    dog_B2 = logits_BM[:, [place["poodle"], own["dog"]]].softmax(1)
    assert torch.allclose(leaf_BC[:, NAMES.index("poodle")], top_B2[:, 0] * below_B3[:, 0] * dog_B2[:, 0], atol=1e-6)
    assert torch.allclose(leaf_BC[:, NAMES.index("oak")], top_B2[:, 1], atol=1e-6)
    nodes_BK = tree.node_probabilities(leaf_BC)
    assert torch.allclose(nodes_BK[:, place["animal"]], top_B2[:, 0], atol=1e-5)
    assert torch.allclose(nodes_BK[:, place["dog"]], leaf_BC[:, NAMES.index("dog")] + leaf_BC[:, 4], atol=1e-6)
    assert torch.allclose(nodes_BK[:, place["[living]"]], torch.ones(7), atol=1e-5)


@pytest.mark.parametrize("hierarchical", [False, True])
def test_a_category_has_the_probability_of_its_concepts_at_any_temperature(hierarchical: bool) -> None:
    names = [f"c{number}" for number in range(9)]
    categories = {name: "abc"[number % 3] for number, name in enumerate(names)}
    config = InterpreterConfig(**{**vars(SMALL), "hierarchical": hierarchical})
    tree = ConceptTree.of_categories(names, categories)
    made = Interpreter(config, names=names, slots=SLOTS, state_width=8, tree=tree).eval()
    made.temperature.fill_(2.5)
    chance_BC = made.probabilities(torch.randn(4, 3, 8) * 3)
    found = made.categories(chance_BC)
    assert set(found) == {"[a]", "[b]", "[c]"}
    for name, chance_B in found.items():
        own = [number for number, concept in enumerate(names) if f"[{categories[concept]}]" == name]
        assert torch.allclose(chance_B, chance_BC[:, own].sum(1), atol=1e-6)
    assert torch.allclose(sum(found.values(), torch.zeros(4)), torch.ones(4), atol=1e-5)


def test_extreme_logits_stay_finite_and_so_do_their_gradients() -> None:
    tree = ConceptTree(NAMES, PARENTS)
    logits_BM = (torch.randn(3, tree.num_nodes) * 1e4).requires_grad_()
    torch.nn.functional.cross_entropy(tree.log_probabilities(logits_BM), torch.tensor([0, 3, 4])).backward()
    assert logits_BM.grad is not None
    assert logits_BM.grad.isfinite().all()


@pytest.mark.parametrize("options", [{}, {"hierarchical": True, "direct": 4}, {"similarity": 6, "direct": 4}])
def test_padding_changes_nothing_whatever_it_holds(options: dict[str, object]) -> None:
    made = interpreter(**options)
    x_BTD, slots_T = torch.randn(5, 4, 8), torch.tensor([0, 1, 2, 1])
    plain = made(x_BTD, slots_T=slots_T)
    padded_BTD = torch.cat([x_BTD, torch.full((5, 3, 8), float("nan"))], dim=1)
    mask_BT = torch.arange(7).expand(5, -1) < 4
    with_padding = made(padded_BTD, slots_T=torch.cat([slots_T, torch.zeros(3, dtype=torch.long)]), mask_BT=mask_BT)
    assert torch.allclose(plain.logits_BC, with_padding.logits_BC, atol=1e-5)
    # Padding in front, and in the middle.
    order = torch.tensor([4, 0, 5, 1, 2, 6, 3])
    slots_7 = torch.cat([slots_T, torch.zeros(3, dtype=torch.long)])[order]
    mixed = made(padded_BTD[:, order], slots_T=slots_7, mask_BT=mask_BT[:, order])
    assert torch.allclose(plain.logits_BC, mixed.logits_BC, atol=1e-5)


@pytest.mark.parametrize("direct", [0, 4])
def test_the_order_of_tokens_changes_nothing_and_the_slot_of_a_token_does(direct: int) -> None:
    made, x_BTD = interpreter(direct=direct), torch.randn(5, 3, 8)
    order = torch.tensor([2, 0, 1])
    first, second = made(x_BTD), made(x_BTD[:, order], slots_T=order)
    assert torch.allclose(first.logits_BC, second.logits_BC, atol=1e-5)
    assert not torch.allclose(first.logits_BC, made(x_BTD[:, order]).logits_BC, atol=1e-3)


@pytest.mark.parametrize("direct", [0, 4])
def test_one_state_many_layers_or_all_tokens_of_a_text_are_read(direct: int) -> None:
    made = interpreter(direct=direct)
    assert made(torch.randn(2, 1, 8), slots_T=torch.tensor([1])).logits_BC.shape == (2, len(NAMES))
    assert made(torch.randn(2, 3, 8)).logits_BC.shape == (2, len(NAMES))
    assert made(torch.randn(2, 40, 8), slots_T=torch.full((40,), 2)).logits_BC.shape == (2, len(NAMES))


def test_the_direct_path_reads_the_mean_of_the_tokens_of_each_slot() -> None:
    made, x_BTD, slots_T = interpreter(direct=4), torch.randn(4, 7, 8), torch.tensor([0, 0, 0, 1, 2, 2, 2])
    expected_BR = torch.zeros(4, 4)
    for slot in range(3):
        mean_BD = (x_BTD[:, slots_T == slot].mean(1) - made.center_JD[slot]) / made.scale_JD[slot]
        expected_BR += mean_BD @ made.directions_JDR[slot]
    expected_BR = torch.nn.functional.normalize(expected_BR, dim=1)
    assert torch.allclose(made.direct(x_BTD, slots_T=slots_T), expected_BR, atol=1e-5)
    alone_BC = interpreter(direct=4)(x_BTD, slots_T=slots_T)
    encoded_BC = alone_BC.parts[0]
    assert torch.allclose(alone_BC.logits_BC, encoded_BC + 3 * expected_BR @ made.places_CR.T, atol=1e-5)


def test_rows_of_a_batch_do_not_mix() -> None:
    made, x_BTD = interpreter(similarity=6, direct=4), torch.randn(5, 3, 8)
    together = made(x_BTD)
    for row in range(5):
        alone = made(x_BTD[row : row + 1])
        assert torch.allclose(together.logits_BC[row], alone.logits_BC[0], atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"hierarchical": True, "direct": 4}, {"similarity": 6, "direct": 4}])
def test_gradients_reach_every_parameter(options: dict[str, object]) -> None:
    made = interpreter(**options).train()
    read = made(torch.randn(8, 3, 8))
    loss = torch.nn.functional.cross_entropy(read.logits_BC, torch.arange(8) % len(NAMES))
    if read.similarity_BZ is not None:
        loss = loss + (read.similarity_BZ @ torch.randn(6)).sum()
    loss.backward()
    lacking = [name for name, one in made.named_parameters() if one.grad is None or not one.grad.abs().sum()]
    # Attention's key bias shifts all keys alike, which a softmax does not see; the root's logit stands alone.
    assert not [name for name in lacking if "in_proj_bias" not in name]


def test_confidence_is_nought_for_a_guess_and_one_for_certainty() -> None:
    assert torch.allclose(confidence(torch.full((1, 50), 1 / 50)), torch.zeros(1), atol=1e-6)
    assert torch.allclose(confidence(torch.eye(50)[:1]), torch.ones(1))
    between = confidence(torch.tensor([[0.5, 0.5, 0.0, 0.0]]))
    assert torch.allclose(between, torch.tensor([0.5]))  # ln 2 of ln 4


def test_temperature_changes_the_confidence_and_not_the_order() -> None:
    logits_BC = torch.randn(20, 9) * 3
    cold, warm = calibrated(logits_BC, 0.5), calibrated(logits_BC, 4.0)
    assert (confidence(cold) > confidence(warm)).all()
    assert torch.equal(cold.argsort(1), warm.argsort(1))


@pytest.mark.parametrize("options", [{}, {"hierarchical": True, "direct": 4}, {"similarity": 6, "direct": 4}])
def test_what_is_saved_reads_the_same_when_loaded(options: dict[str, object], tmp_path: Path) -> None:
    made, x_BTD = interpreter(**options), torch.randn(4, 3, 8)
    made.temperature.fill_(1.7)
    loaded = Interpreter.load(made.save(tmp_path / "interpreter"))
    assert torch.equal(made.probabilities(x_BTD), loaded.probabilities(x_BTD))
    assert (loaded.names, loaded.slots, loaded.layers, loaded.fingerprint) == (NAMES, SLOTS, (1, 2), "f")
    assert loaded.categories(loaded.probabilities(x_BTD)).keys() == made.categories(made.probabilities(x_BTD)).keys()


@pytest.mark.parametrize("change", ["missing", "text", "format", "sizes", "tensors", "nan", "loop"])
def test_a_damaged_folder_is_refused(change: str, tmp_path: Path) -> None:
    folder = interpreter().save(tmp_path / "interpreter")
    info = json.loads((folder / "interpreter.json").read_text())
    if change == "missing":
        folder = tmp_path / "nowhere"
    elif change == "text":
        (folder / "interpreter.json").write_text("[" * 100_000)
    elif change == "format":
        (folder / "interpreter.json").write_text(json.dumps(info | {"format": 2}))
    elif change == "sizes":
        (folder / "interpreter.json").write_text(json.dumps(info | {"state_width": 1 << 40}))
    elif change == "loop":
        (folder / "interpreter.json").write_text(json.dumps(info | {"parents": {"dog": "cat", "cat": "dog"}}))
    elif change == "nan":
        made = interpreter()
        made.query.data.fill_(float("nan"))
        folder = made.save(tmp_path / "second")
    else:
        (folder / "interpreter.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    with pytest.raises(PackError):
        Interpreter.load(folder)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="multiple"):
        InterpreterConfig(width=10, num_heads=4).check()
    with pytest.raises(ConfigError, match="two concepts"):
        Interpreter(SMALL, names=["one"], slots=SLOTS, state_width=8)
    with pytest.raises(ConfigError, match="needs a tree"):
        Interpreter(InterpreterConfig(**{**vars(SMALL), "hierarchical": True}), names=NAMES, slots=SLOTS, state_width=8)
    with pytest.raises(ConfigError, match="no categories"):
        Interpreter(SMALL, names=NAMES, slots=SLOTS, state_width=8).categories(torch.ones(1, 5))
    with pytest.raises(SubstrateError, match="width 8"):
        interpreter()(torch.randn(2, 3, 9))
    with pytest.raises(ConceptError, match="twice"):
        ConceptTree(["a", "a"], {})
    with pytest.raises(ConceptError, match="comes back"):
        ConceptTree(["a", "b"], {"a": "b", "b": "a"})
