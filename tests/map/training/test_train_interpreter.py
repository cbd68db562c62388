"""Training interpreters: what is learnt is held-out, resumed runs equal unbroken ones, bad rows are refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from toy_rows import toy_fit, toy_rows

from ftw.errors import ConfigError, DataError
from ftw.hat.concept_tree import ConceptTree
from ftw.hat.interpreter import Interpreter
from ftw.map.training.callbacks import quiet_trainer
from ftw.map.training.interpreter import InterpreterFit, read_logits, train_interpreter, uncertainty
from ftw.map.training.interpreter_baselines import baselines
from ftw.map.training.interpreter_data import InterpreterDataModule, InterpreterRows
from ftw.map.training.interpreter_task import InterpreterTrainingConfig

TREE = {f"concept {number}": "ab"[number % 2] for number in range(6)}


def tree_of(rows: InterpreterRows) -> ConceptTree:
    return ConceptTree.of_categories(rows.names, TREE)


def accuracy(interpreter: Interpreter, rows: InterpreterRows, part: str = "test") -> float:
    held = rows.select(rows.where(part))
    return float((read_logits(interpreter, held).argmax(1) == held.labels_S).float().mean())


@pytest.mark.parametrize(
    "options",
    [{}, {"hierarchical": True, "direct": 8}, {"similarity": 8, "direct": 8}, {"sampled": 3}],
)
def test_every_variant_learns_what_rows_of_unseen_groups_are_about(options: dict[str, object]) -> None:
    rows = toy_rows()
    interpreter = train_interpreter(rows, toy_fit(**options), tree=tree_of(rows))
    assert accuracy(interpreter, rows) >= 0.9
    assert 0.1 <= float(interpreter.temperature) <= 10


def test_shuffled_labels_are_not_learnt() -> None:
    rows = toy_rows(each=24)
    shuffled = rows.labels_S[torch.from_numpy(np.random.default_rng(0).permutation(len(rows)))]
    interpreter = train_interpreter(replace(rows, labels_S=shuffled), toy_fit(epochs=4))
    assert accuracy(interpreter, replace(rows, labels_S=shuffled)) < 0.5


@pytest.mark.parametrize("direct", [0, 8])
def test_texts_of_tokens_are_read_with_a_mask(direct: int) -> None:
    rows = toy_rows()
    tokens_STD = rows.states_STD[:, :1].repeat(1, 5, 1)
    mask_ST = torch.arange(5).expand(len(rows), -1) <= torch.arange(len(rows)).unsqueeze(1) % 5
    tokens_STD = tokens_STD.masked_fill(~mask_ST.unsqueeze(-1), 100.0)
    ragged = replace(rows, states_STD=tokens_STD, mask_ST=mask_ST, slots=rows.slots[:1])
    assert accuracy(train_interpreter(ragged, toy_fit(direct=direct)), ragged) >= 0.9


@pytest.mark.parametrize(
    "options", [{"dropout": 0.2}, {"similarity": 8, "slot_dropout": 0.2, "noise": 0.1, "direct": 8}]
)
def test_a_resumed_run_equals_an_unbroken_one(options: dict[str, object], tmp_path: Path) -> None:
    rows, fit = toy_rows(), toy_fit(**options)

    def run(folder: str, checkpoint: Path | None = None, stop_after: int | None = None) -> Interpreter:
        def trainer(callbacks: list) -> object:
            keep = ModelCheckpoint(tmp_path / folder, filename="{epoch}", save_top_k=-1)
            built = quiet_trainer(6, callbacks=[*callbacks, keep], enable_checkpointing=True, gradient_clip_val=1.0)
            return built

        return train_interpreter(rows, fit, trainer=trainer, checkpoint=checkpoint)

    unbroken = run("first")
    resumed = run("second", checkpoint=tmp_path / "first" / "epoch=2.ckpt")
    assert all(torch.equal(one, resumed.state_dict()[name]) for name, one in unbroken.state_dict().items())


def test_the_same_seed_gives_the_same_interpreter_and_another_another() -> None:
    rows = toy_rows()
    first, again = (train_interpreter(rows, toy_fit(epochs=2)) for _ in range(2))
    assert all(torch.equal(one, again.state_dict()[name]) for name, one in first.state_dict().items())
    other = train_interpreter(rows, toy_fit(epochs=2, seed=1))
    assert not torch.equal(first.query, other.query)


def test_validation_goes_by_group_and_leaves_every_concept_a_row_to_train_on() -> None:
    rows = toy_rows(each=24)
    rows = replace(rows, parts=["train"] * len(rows)).with_validation(seed=0)
    groups = {part: {rows.groups[row] for row in rows.where(part)} for part in ("train", "dev")}
    assert groups["dev"]
    assert not groups["dev"] & groups["train"]
    assert set(rows.labels_S[rows.where("train")].tolist()) == set(range(6))
    single = replace(toy_rows(each=1), parts=["train"] * 6, groups=["term"] * 6).with_validation(seed=0)
    assert set(single.parts) == {"train"}


def test_one_row_a_concept_trains_without_validation() -> None:
    rows = replace(toy_rows(each=1), parts=["train"] * 6, groups=["term"] * 6)
    interpreter = train_interpreter(rows, toy_fit(epochs=20, direct=8))
    assert accuracy(interpreter, rows, "train") == 1
    assert float(interpreter.temperature) == 1


def test_concepts_whose_texts_look_alike_are_the_uncertain_ones() -> None:
    rows = toy_rows(num_concepts=6, each=24)
    states = rows.states_STD.clone()
    states[24:48] = states[:24]  # concept 1 is read as concept 0 is
    rows = replace(rows, states_STD=states)
    interpreter = train_interpreter(rows, toy_fit())
    unsure = uncertainty(interpreter, rows.select(rows.where("test")))
    assert set(np.argsort(unsure.margin_C)[:2]) == {0, 1}
    assert set(np.argsort(unsure.confidence_C)[:2]) == {0, 1}
    assert unsure.num_rows_C.tolist() == [4] * 6
    empty = uncertainty(interpreter, rows.select(np.flatnonzero(rows.labels_S.numpy() != 3)))
    assert np.isnan(empty.confidence_C[3])


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_each_batch_and_together_see_every_row_once(world: int) -> None:
    rows = toy_rows(each=13)
    data = InterpreterDataModule(rows, batch=16)
    seen, sizes = [], []
    for rank in range(world):
        data.trainer = type("Ranks", (), {"world_size": world, "global_rank": rank})()
        loader = data.train_dataloader()
        loader.sampler.set_epoch(1)
        batches = list(loader.sampler)
        sizes.append([num for _, num, _ in batches])
        seen += [row for *_, numbers in batches for row in numbers]
        assert all(numbers for *_, numbers in batches)
    assert sorted(seen) == rows.where("train").tolist()
    assert all(size == sizes[0] for size in sizes)


def test_fewer_rows_than_ranks_is_an_error() -> None:
    rows = toy_rows()
    data = InterpreterDataModule(rows.select(rows.where("train")[:3]), batch=16)
    data.trainer = type("Ranks", (), {"world_size": 4, "global_rank": 0})()
    with pytest.raises(DataError, match="3 rows for 4 ranks"):
        data.train_dataloader()


def test_a_partner_is_another_row_of_the_same_concept() -> None:
    rows = toy_rows()
    loader = InterpreterDataModule(rows, batch=16).train_dataloader()
    for batch in loader:
        own = {
            tuple(state.flatten().tolist()): label for state, label in zip(rows.states_STD, rows.labels_S, strict=True)
        }
        for row, partner, label in zip(batch["states"], batch["partners"], batch["labels"], strict=True):
            assert own[tuple(partner.flatten().tolist())] == label
            assert not torch.equal(row, partner)


def test_rows_that_cannot_be_are_refused() -> None:
    rows = toy_rows()
    with pytest.raises(DataError, match="no training rows"):
        train_interpreter(rows.select(rows.where("dev")), toy_fit())
    with pytest.raises(DataError, match="labels"):
        replace(rows, labels_S=rows.labels_S + 1)
    with pytest.raises(DataError, match="unknown part"):
        replace(rows, parts=["other"] * len(rows))
    with pytest.raises(DataError, match="groups"):
        replace(rows, groups=rows.groups[1:])
    with pytest.raises(DataError, match="not finite"):
        replace(rows, states_STD=rows.states_STD.masked_fill(rows.states_STD > 0, torch.nan))
    with pytest.raises(ConfigError, match="warmup"):
        train_interpreter(rows, InterpreterFit(training=InterpreterTrainingConfig(warmup=1.5)))
    with pytest.raises(DataError, match="other concepts"):
        uncertainty(train_interpreter(rows, toy_fit(epochs=1)), toy_rows(num_concepts=5))


def test_rows_about_further_concepts_train_the_similarity_and_nothing_is_asked_about_them() -> None:
    rows = toy_rows(num_concepts=9)
    further = [part == "train" and label >= 6 for part, label in zip(rows.parts, rows.labels_S, strict=True)]
    kept = np.flatnonzero([mine or label < 6 for mine, label in zip(further, rows.labels_S, strict=True)])
    parts = ["further" if mine else part for mine, part in zip(further, rows.parts, strict=True)]
    rows = replace(rows, parts=parts).select(kept)
    rows = replace(rows, names=rows.names[:6])
    interpreter = train_interpreter(rows, toy_fit(similarity=8))
    assert accuracy(interpreter, rows) >= 0.9
    assert interpreter.prototypes_CZ.norm(dim=1).tolist() == pytest.approx([1] * 6, abs=1e-4)
    without = rows.select(np.flatnonzero(np.asarray(rows.parts) != "further"))
    plain, same = (train_interpreter(one, toy_fit(epochs=2)) for one in (rows, without))
    assert torch.equal(plain.query, same.query)  # without a similarity they are not read at all


def test_a_prototype_alone_names_the_concept_of_texts_like_its_own() -> None:
    rows = toy_rows()
    interpreter = train_interpreter(rows, toy_fit(similarity=8))
    held = rows.select(rows.where("test"))
    with torch.no_grad():
        similarity_BZ = interpreter(held.states_STD).similarity_BZ
    assert similarity_BZ is not None
    nearest = (similarity_BZ @ interpreter.prototypes_CZ.T).argmax(1)
    assert float((nearest == held.labels_S).float().mean()) >= 0.9


def test_baselines_learn_too_and_chance_does_not() -> None:
    rows = toy_rows(each=24)
    words = [f"word{label} text" for label in rows.labels_S.tolist()]
    said = baselines(replace(rows, texts=words))
    labels = rows.labels_S[rows.where("test")].numpy()
    assert set(said) == {"linear softmax", "linear, whitened", "nearest mean", "TF-IDF", "chance"}
    for name, chance_SC in said.items():
        assert chance_SC.sum(1) == pytest.approx(np.ones(len(labels)), abs=1e-4)
        if name != "chance":
            assert (chance_SC.argmax(1) == labels).mean() >= 0.9
