"""Sequence lenses are trained side by side as if each were alone, judged on prompts that they have not seen."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ftw.errors import ConfigError, DataError
from ftw.hat.lens import HeadConfig
from ftw.map.encyclopedia import CaptureSpec, Encyclopedia, ShardStates
from ftw.map.pack import LensPack
from ftw.map.samples import SampleTable
from ftw.map.text_control import TextConfig
from ftw.map.training.callbacks import quiet_trainer
from ftw.map.training.sequence_data import RowsOfEpoch, SequencePool, build_sequence_pool
from ftw.map.training.temporal import fit_sequences, read_answers, shuffled_stack
from ftw.map.training.temporal_task import SequenceTask, SequenceTrainingConfig
from ftw.map.training.train import FitConfig, train_pack
from ftw.substrate.model import Substrate

FAMILIES = ("lstm", "gru", "attention", "trunk_lstm", "token_max", "token_mean")
LAYERS, WIDTH, LONGEST, CONCEPTS = (1, 3), 32, 6, 3
TRAINING = SequenceTrainingConfig(batch=16, trunk_batch=32, learning_rate=0.02, patience=2)


def spoken_about(num_prompts: int = 60, samples: int = 2, seed: int = 0) -> SampleTable:
    """Every prompt is about one concept; the next one's answers are its negatives. Some prompts are everyday ones."""
    prompts = [f"prompt {number}" for number in range(num_prompts)]
    rows = [(number, prompt) for number, prompt in enumerate(prompts) for _ in range(samples)]
    splits = [("train", "train", "test", "background")[number // CONCEPTS % 4] for number, _ in rows]
    marks = [
        (row, concept, int(number % CONCEPTS == concept))
        for row, (number, _) in enumerate(rows)
        for concept in range(CONCEPTS)
        if splits[row] != "background"
    ]
    rows_E, cols_E, labels_E = np.array(marks).T
    return SampleTable(
        texts=[prompt for _, prompt in rows],
        groups=[prompt for _, prompt in rows],
        splits=splits,
        sources=["sampled" if split != "background" else "everyday" for split in splits],
        concepts=[f"c{n}" for n in range(CONCEPTS)],
        rows=rows_E.astype(np.int32),
        cols=cols_E.astype(np.int32),
        labels=labels_E.astype(np.int8),
        weights=np.ones(len(rows_E), dtype=np.float32),
    )


def toy_answers(folder: Path, *, fingerprint: str = "0" * 64, noise: float = 0.5, seed: int = 0) -> Encyclopedia:
    """One token of each answer lies in the direction of what it is about; answers have 0 to 6 tokens."""
    rng = np.random.default_rng(seed)
    table = spoken_about()
    directions = rng.normal(size=(CONCEPTS, WIDTH))
    lengths = rng.integers(1, LONGEST + 1, size=len(table))
    lengths[5] = 0
    states = noise * rng.normal(size=(int(lengths.sum()), WIDTH))
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    about = {int(row): int(col) for row, col, label in zip(table.rows, table.cols, table.labels, strict=True) if label}
    for row, length in enumerate(lengths):
        if row in about and length:
            states[starts[row] + rng.integers(length)] += directions[about[row]]
    spec = CaptureSpec(
        substrate_name="toy",
        fingerprint=fingerprint,
        layers=LAYERS,
        width=WIDTH,
        pools=(),
        tokens_per_text=dict.fromkeys(("train", "test", "background"), -1),
        shard_texts=len(table),
        sampling={"max_new_tokens": LONGEST, "temperature": 1.0, "seed": 0},
    )
    store = Encyclopedia.create(folder, table, spec)
    shard = ShardStates(
        num_tokens=lengths.astype(np.int32),
        tokens={layer: (states + 0.1 * rng.normal(size=states.shape)).astype(np.float16) for layer in LAYERS},
        offsets=starts,
        positions=np.concatenate([np.arange(length) for length in lengths]).astype(np.int32),
        token_ids=rng.integers(40, 120, size=len(states)).astype(np.int32),
    )
    store.write_shard(0, shard)
    return store


def pool_of(folder: Path, **options) -> SequencePool:
    with toy_answers(folder) as encyclopedia:
        return build_sequence_pool(encyclopedia, **{"folds": 4, "basis_rank": 0, "seed": 0, **options})


def head_of(family: str) -> HeadConfig:
    return HeadConfig(family=family, hidden={"lstm": 6, "gru": 6, "trunk_lstm": 8}.get(family, 0))


def fitted(pool: SequencePool, family: str, *, epochs: int = 12, **options):
    training = replace(TRAINING, **options)
    return fit_sequences(pool, head_of(family), training, trainer=lambda _: quiet_trainer(epochs), seed=0)


def test_the_pool_holds_each_answer_whole_and_prompts_on_one_side(tmp_path: Path):
    with toy_answers(tmp_path) as encyclopedia:
        pool = build_sequence_pool(encyclopedia, folds=4, basis_rank=0, seed=0)
        rows = encyclopedia.table.where("train")
        states_TD, offsets = encyclopedia.token_states(LAYERS[1], rows)
        groups = [encyclopedia.table.groups[row] for row in rows]
    held_out = {group for group, held in zip(groups, pool.held_out_S.tolist(), strict=True) if held}
    kept = {group for group, held in zip(groups, pool.held_out_S.tolist(), strict=True) if not held}
    assert held_out
    assert not held_out & kept
    x_STW, lengths_S = pool.read(torch.arange(len(pool)), 1)
    for row, length in enumerate(lengths_S.tolist()):
        own = x_STW[row, :length].float() * pool.scale_LW[1] + pool.center_LW[1]
        assert np.abs(own.numpy() - states_TD[offsets[row] : offsets[row + 1]]).max(initial=0) < 0.05
    assert (pool.weights_SN[lengths_S == 0] == 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_finds_the_token_that_tells(tmp_path: Path, family: str):
    with toy_answers(tmp_path) as encyclopedia:
        pool = build_sequence_pool(encyclopedia, folds=4, basis_rank=0, seed=0)
        stack = fitted(pool, family, epochs=25)
        rows = encyclopedia.table.where("test")
        logits_SN = read_answers(stack.sequence_bank(), encyclopedia, rows)
        labels_SN, _ = encyclopedia.table.matrices(rows)
    assert np.isfinite(logits_SN).all()
    assert ((logits_SN > 0) == (labels_SN > 0)).mean() > 0.7


@pytest.mark.parametrize("family", ["lstm", "attention"])
def test_lenses_trained_side_by_side_are_those_trained_alone(tmp_path: Path, family: str):
    pool = pool_of(tmp_path)
    # As many answers for each, since the longest says how many batches an epoch has. Dropout draws for all lenses of a
    # part together; the toy families have none.
    pool = replace(pool, held_out_S=torch.from_numpy(pool.rows // (2 * CONCEPTS) % 8 == 0))
    together, apart = (fitted(pool, family, epochs=4, lenses_at_once=size) for size in (128, 1))
    assert apart.names == together.names
    for layer in range(len(LAYERS)):
        alone = apart.heads[layer].state_dict()
        for name, tensor in together.heads[layer].state_dict().items():
            assert (tensor - alone[name]).abs().max() < 2e-3  # bfloat16 products of other sizes round otherwise
    assert (together.scale_NL - apart.scale_NL).abs().max() < 0.05 * together.scale_NL.abs().max()


def test_an_epoch_reads_all_positives_and_as_many_negatives_and_the_next_ones_follow(tmp_path: Path):
    pool = pool_of(tmp_path)
    used_SN = (pool.weights_SN > 0) & ~pool.held_out_S.unsqueeze(1)
    draw = RowsOfEpoch(pool, seed=3)
    epochs = [draw(epoch) for epoch in range(4)]
    for lens in range(CONCEPTS):
        positives, negatives = (
            set((used_SN[:, lens] & (pool.labels_SN[:, lens] == label)).nonzero().flatten().tolist())
            for label in (1, 0)
        )
        seen = [[row for row in epoch[lens].tolist() if row >= 0] for epoch in epochs]
        for rows in seen:
            assert len(rows) == len(set(rows)) == 2 * len(positives)
            assert positives < set(rows) < positives | negatives
        assert set().union(*seen) == positives | negatives
        alone = RowsOfEpoch(pool.of_lenses(slice(lens, lens + 1)), seed=3)(2)[0].tolist()
        assert alone == seen[2]


@pytest.mark.parametrize("drawn", [True, False])
def test_the_classes_of_a_lens_weigh_the_same_however_many_of_each_are_read(tmp_path: Path, drawn: bool):
    pool = pool_of(tmp_path)
    balance_N2 = pool.balance(drawn=drawn)
    for lens in range(CONCEPTS):
        rows = RowsOfEpoch(pool, seed=0)(0)[lens] if drawn else pool.rows_of_lenses(held_out=False)[lens]
        labels = pool.labels_SN[rows[rows >= 0], lens].long()
        for label in (0, 1):
            assert float(balance_N2[lens, labels[labels == label]].sum()) == pytest.approx(0.5)


def test_marks_of_one_lens_do_not_move_another(tmp_path: Path):
    pool = pool_of(tmp_path)
    flipped = pool.labels_SN.clone()
    flipped[:, 2] = 1 - flipped[:, 2]
    plain, other = (fitted(one, "lstm", epochs=3) for one in (pool, replace(pool, labels_SN=flipped)))
    for name, tensor in plain.heads[0].state_dict().items():
        assert torch.equal(tensor[:2], other.heads[0].state_dict()[name][:2])
        assert not torch.equal(tensor[2], other.heads[0].state_dict()[name][2])


def test_a_done_lens_stays_as_it_was_however_long_others_train(tmp_path: Path):
    pool = pool_of(tmp_path)
    short, long = (fitted(pool, "attention", epochs=epochs, patience=0) for epochs in (30, 60))
    for name, tensor in short.heads[0].state_dict().items():
        assert torch.allclose(tensor, long.heads[0].state_dict()[name])


@pytest.mark.parametrize("family", ["lstm", "token_max", "trunk_lstm"])
def test_the_held_out_loss_hangs_on_no_padding_and_on_no_lens_that_is_done(tmp_path: Path, family: str):
    pool, own = pool_of(tmp_path), family != "trunk_lstm"
    task = SequenceTask(pool, head=head_of(family), training=TRAINING).eval()
    rows_NK = pool.rows_to_stop_by(own=own)
    wider_NK, fewer_NK = torch.nn.functional.pad(rows_NK, (0, 7), value=-1), rows_NK.clone()
    fewer_NK[0] = -1
    with torch.no_grad():
        loss_LN, wider_LN, fewer_LN = (task._held_out_loss(rows) for rows in (rows_NK, wider_NK, fewer_NK))
    torch.testing.assert_close(wider_LN, loss_LN)
    torch.testing.assert_close(fewer_LN[:, 1:], loss_LN[:, 1:])
    assert (fewer_LN[:, 0] == 0).all()


def test_no_held_out_prompts_are_refused_before_the_work(tmp_path: Path):
    with pytest.raises(DataError, match="no held-out prompts"):
        fitted(pool_of(tmp_path, folds=1), "token_max")


def test_shuffled_labels_give_lenses_that_know_nothing(tmp_path: Path):
    with toy_answers(tmp_path) as encyclopedia:
        pool = build_sequence_pool(encyclopedia, folds=4, basis_rank=0, seed=0)
        rows = encyclopedia.table.where("test")
        labels_SN, _ = encyclopedia.table.matrices(rows)
        control = shuffled_stack(pool, head_of("token_mean"), TRAINING, trainer=lambda _: quiet_trainer(10), seed=0)
        logits_SN = read_answers(control.sequence_bank(), encyclopedia, rows)
    order = logits_SN.argsort(0).argsort(0)
    positive = [order[labels_SN[:, n] > 0, n].mean() for n in range(CONCEPTS)]
    assert abs(np.mean(positive) / (len(rows) - 1) - 0.5) < 0.25


def test_a_concept_without_negatives_is_refused_by_name(tmp_path: Path):
    with toy_answers(tmp_path) as encyclopedia:
        table = encyclopedia.table
        kept = (table.cols != 1) | (table.labels == 1)
        marks = {name: getattr(table, name)[kept] for name in ("rows", "cols", "labels", "weights")}
        encyclopedia.table = replace(table, **marks)
        with pytest.raises(DataError, match=r"'c1' \(\d+ positive, 0 negative\)"):
            build_sequence_pool(encyclopedia, folds=4, basis_rank=0, seed=0)


def test_states_that_are_not_numbers_are_refused_not_learned(tmp_path: Path):
    with toy_answers(tmp_path) as encyclopedia:
        states = encyclopedia.token_states(LAYERS[0], encyclopedia.table.where("train"))
        states[0][3, 1] = np.nan
        encyclopedia.token_states = lambda *_: states
        with pytest.raises(DataError, match="not finite"):
            build_sequence_pool(encyclopedia, folds=4, basis_rank=0, seed=0)


def test_answers_that_are_all_alike_cannot_be_learned_from_and_that_is_said(tmp_path: Path):
    pool = pool_of(tmp_path)
    with pytest.raises(DataError, match="constant logits"):
        fitted(replace(pool, tokens_LTW=torch.zeros_like(pool.tokens_LTW)), "token_max", epochs=2)


@pytest.mark.parametrize("family", ["lstm", "trunk_lstm", "attention"])
def test_a_pack_reads_after_loading_as_before_saving(tmp_path: Path, family: str, tiny_substrate: Substrate):
    config = FitConfig(head=head_of(family), sequences=TRAINING, text=TextConfig(folds=2, window_words=0))
    config.training = replace(config.training, num_shuffles=1, basis_rank=8 if family == "attention" else 0)
    config.evaluate = replace(config.evaluate, draws=20, floor_draws=5)
    with toy_answers(tmp_path / "store", fingerprint=tiny_substrate.fingerprint) as encyclopedia:
        pack, evaluation = train_pack(
            encyclopedia,
            config,
            substrate=tiny_substrate,
            folder=tmp_path / "pack",
            trainer=lambda callbacks: quiet_trainer(4, callbacks=callbacks),
        )
        rows = encyclopedia.table.where("test")
        again = LensPack.load(tmp_path / "pack")
        before, after = (read_answers(one.stack.sequence_bank(), encyclopedia, rows) for one in (pack, again))
    assert np.abs(before - after).max() < 1e-5
    assert again.recipe.family == family
    assert again.reader().calibrated
    assert evaluation is not None
    assert {
        "auroc_token_max",
        "auroc_text",
        "auroc_shuffled",
        "accuracy_all",
        "accuracy_difference_all_token_max",
    } <= set(evaluation.mean)


def test_pooled_families_are_refused_on_answers(tmp_path: Path, tiny_substrate: Substrate):
    with (
        toy_answers(tmp_path, fingerprint=tiny_substrate.fingerprint) as encyclopedia,
        pytest.raises(ConfigError, match="hat/lens=lstm"),
    ):
        train_pack(encyclopedia, FitConfig(), substrate=tiny_substrate)
