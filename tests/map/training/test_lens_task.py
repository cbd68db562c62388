"""Lenses that train together are the lenses they would be alone, and a broken run goes on as an unbroken one."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from toy_pool import CONFIG, fitted, of_lenses, of_rows, toy_pool

from ftw.errors import DataError
from ftw.hat.lens import HeadConfig
from ftw.map.training.fit import build_task
from ftw.map.training.lens_task import LensTask, balance_classes

MLP = HeadConfig(hidden=8, dropout=0.3)


def weights(task: LensTask) -> list[torch.Tensor]:
    """Best weights of all copies, layer by layer, as [F, N, ...]."""
    shape = (task.num_copies, task.num_lenses)
    return [tensor.unflatten(0, shape) for tensor in task.best_heads.state_dict().values()]


def assert_same(one: LensTask, other: LensTask, tolerance: float = 0.0) -> None:
    for ours, theirs in zip(weights(one), weights(other), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
    assert torch.equal(one.best_epoch, other.best_epoch)


def checkpointing(folder: Path) -> dict:
    """The callback of `conf/callbacks/default.yaml`."""
    callback = pl.callbacks.ModelCheckpoint(
        dirpath=folder, filename="last", every_n_epochs=1, save_on_train_epoch_end=False, enable_version_counter=False
    )
    return {"callbacks": [callback], "enable_checkpointing": True}


def test_lenses_trained_together_equal_each_trained_alone():
    pool = toy_pool(noise=2.0)
    together = fitted(pool, epochs=12)
    for n in range(3):
        alone = fitted(of_lenses(pool, [n]), epochs=12)
        for ours, theirs in zip(weights(together), weights(alone), strict=True):
            torch.testing.assert_close(ours[:, n], theirs[:, 0], rtol=0, atol=1e-5)
        assert torch.equal(together.best_epoch[:, n], alone.best_epoch[:, 0])
    assert together.best_epoch.unique().numel() > 1  # the lenses did stop at different epochs


def test_a_fold_copy_never_sees_the_rows_it_is_judged_on():
    pool = toy_pool()
    held_S = pool.folds_S == 1
    changed = replace(pool, labels_SN=torch.where(held_S[:, None], 1 - pool.labels_SN, pool.labels_SN))
    # Balance counts labels of other folds only, so it must not change either; early stopping sees them and is left out.
    one, other = (fitted(each, replace(CONFIG, patience=99), epochs=3) for each in (pool, changed))
    for ours, theirs in zip(one.heads.state_dict().values(), other.heads.state_dict().values(), strict=True):
        ours, theirs = (tensor.unflatten(0, (4, 3)) for tensor in (ours, theirs))
        assert torch.equal(ours[2], theirs[2])
        assert not torch.equal(ours[0], theirs[0])
        assert not torch.equal(ours[1], theirs[1])


def test_pairs_without_a_mark_never_matter():
    pool = toy_pool()
    noise_SN = torch.where(pool.weights_SN > 0, pool.labels_SN, 1 - pool.labels_SN)
    one, other = fitted(pool), fitted(replace(pool, labels_SN=noise_SN))
    assert_same(one, other)
    assert torch.equal(one.out_of_fold(pool.states_SLW, pool.folds_S), other.out_of_fold(pool.states_SLW, pool.folds_S))


def test_only_ratios_of_weights_count():
    pool = toy_pool()
    assert_same(fitted(pool), fitted(replace(pool, weights_SN=pool.weights_SN * 8)), 1e-5)


def test_a_row_of_weight_two_is_two_rows_of_weight_one():
    pool = toy_pool(rows=20)
    pool.weights_SN.fill_(1)
    pool.weights_SN[:5] = 2
    twice = [*range(20), *range(5)]
    doubled = replace(
        pool,
        states_SLW=pool.states_SLW[twice],
        labels_SN=pool.labels_SN[twice],
        weights_SN=torch.ones(25, 3),
        folds_S=pool.folds_S[twice],
    )
    one, other = (fitted(each, replace(CONFIG, batch_texts=999), epochs=8) for each in (pool, doubled))
    assert_same(one, other, 2e-3)  # rounding of gradients that are zero, times the learning rate


def test_the_kept_lens_is_that_of_its_best_epoch():
    pool, losses, heads = toy_pool(noise=3.0), [], []

    class Note(pl.Callback):
        def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            assert isinstance(pl_module, LensTask)
            losses.append(pl_module._epoch_loss_LN.clone())
            heads.append({name: tensor.clone() for name, tensor in pl_module.heads.state_dict().items()})

    task = fitted(pool, replace(CONFIG, patience=3, learning_rate=0.1), epochs=60, callbacks=[Note()])
    assert len(losses) == int(task.best_epoch.max()) + 3 + 2  # patience over, and not an epoch more
    for layer in range(2):
        for n in range(3):
            epoch = int(task.best_epoch[layer, n])
            seen = [float(loss[layer, n]) for loss in losses[: epoch + 4]]
            assert seen[epoch] <= min(seen) + 1e-4
            kept_FW = task.best_heads.state_dict()[f"{layer}.weight"].unflatten(0, (4, 3))[:, n]
            assert torch.equal(kept_FW, heads[epoch][f"{layer}.weight"].unflatten(0, (4, 3))[:, n])


def test_out_of_fold_logits_are_those_of_the_copy_without_the_fold():
    pool = toy_pool()
    task = fitted(pool)
    logits_SLN = task.out_of_fold(pool.states_SLW, pool.folds_S, batch=7)
    for row in range(0, 90, 11):
        for layer in range(2):
            head = task.best_heads[layer]
            all_FN = head(pool.states_SLW[row : row + 1, layer])[0].unflatten(0, (4, 3))
            torch.testing.assert_close(logits_SLN[row, layer], all_FN[int(pool.folds_S[row]) + 1])


def test_out_of_fold_loss_is_balanced_cross_entropy():
    pool = toy_pool()
    task = fitted(pool, replace(CONFIG, patience=99), epochs=4)
    logits_SLN = task.out_of_fold(pool.states_SLW, pool.folds_S).double().numpy()
    for layer in range(2):
        for n in range(3):
            used = pool.weights_SN[:, n].numpy() > 0
            y, z = pool.labels_SN[used, n].numpy(), logits_SLN[used, layer, n]
            loss = np.logaddexp(0, -z) * (y == 1) / (2 * (y == 1).sum()) + np.logaddexp(0, z) * (y == 0) / (
                2 * (y == 0).sum()
            )
            np.testing.assert_allclose(task.best_loss[layer, n], loss.sum(), rtol=1e-5)


def test_balance_gives_both_classes_half_of_the_weight():
    pool = toy_pool()
    balance_FN2 = balance_classes(pool.labels_SN, pool.weights_SN, pool.folds_S, 3)
    for copy in range(4):
        used_SN = pool.weights_SN * (pool.folds_S + 1 != copy)[:, None]
        for label, column in ((pool.labels_SN, 1), (1 - pool.labels_SN, 0)):
            torch.testing.assert_close((used_SN * label).sum(0) * balance_FN2[copy, :, column], torch.full((3,), 0.5))


def test_without_folds_a_lens_is_judged_on_its_own_rows():
    pool, config = toy_pool(), replace(CONFIG, folds=0)
    task = fitted(pool, config)
    expected_SN = task.best_heads[1](pool.states_SLW[:, 1])
    torch.testing.assert_close(task.out_of_fold(pool.states_SLW, pool.folds_S)[:, 1], expected_SN)


@pytest.mark.parametrize("folds", [1, -2])
def test_a_number_of_folds_that_cannot_be_is_refused(folds: int):
    with pytest.raises(DataError, match=rf"folds={folds}"):
        build_task(toy_pool(), HeadConfig(), replace(CONFIG, folds=folds), seed=0)


def test_a_linear_lens_is_as_good_as_logistic_regression():
    whole = toy_pool(rows=1600, layers=1, width=16, noise=3.0)
    pool, held = of_rows(whole, slice(0, 400)), of_rows(whole, slice(400, None))
    task = fitted(pool, replace(CONFIG, patience=5, batch_texts=128), epochs=30)
    ours_SN = task.full_fits()[0](held.states_SLW[:, 0]).detach()
    for n in range(3):
        used = pool.weights_SN[:, n] > 0
        model = LogisticRegression(C=1 / (0.05 * int(used.sum())), class_weight="balanced")
        model.fit(pool.states_SLW[used, 0].numpy(), pool.labels_SN[used, n].numpy())
        theirs = roc_auc_score(held.labels_SN[:, n], model.decision_function(held.states_SLW[:, 0].numpy()))
        assert 0.7 < theirs < 0.99
        assert abs(roc_auc_score(held.labels_SN[:, n], ours_SN[:, n]) - theirs) < 0.01


@pytest.mark.parametrize("head", [HeadConfig(), HeadConfig(hidden=8)], ids=["linear", "mlp"])
def test_gradients_reach_every_parameter_of_every_copy(head: HeadConfig):
    pool = toy_pool()
    task = build_task(pool, head, CONFIG, seed=0)
    names = ("states", "labels", "weights", "folds")
    rows = (pool.states_SLW, pool.labels_SN, pool.weights_SN, pool.folds_S)
    assert task(rows[0]).shape == (90, 2, 4, 3)
    for parameter in task.heads.parameters():
        torch.nn.init.normal_(parameter)  # from zero, balanced classes give a bias no gradient
    task.log = lambda *_, **__: None  # there is no trainer to log to
    task.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, barebones=False)
    task.training_step(dict(zip(names, rows, strict=True)), 0).backward()
    for name, parameter in task.heads.named_parameters():
        assert parameter.grad is not None
        assert (parameter.grad.reshape(12, -1).abs().sum(1) > 0).all(), name
    assert all(parameter.grad is None for parameter in task.best_heads.parameters())


@pytest.mark.parametrize("head", [HeadConfig(), MLP], ids=["linear", "mlp with dropout"])
@pytest.mark.parametrize("broken_after", [1, 4])
def test_a_resumed_run_ends_as_the_unbroken_one(tmp_path: Path, head: HeadConfig, broken_after: int):
    pool = toy_pool(noise=2.0)
    unbroken = fitted(pool, head=head, epochs=9)
    torch.manual_seed(99)  # whatever else drew numbers meanwhile
    fitted(pool, head=head, epochs=broken_after, **checkpointing(tmp_path))
    options = checkpointing(tmp_path / "other")
    resumed = fitted(pool, head=head, epochs=9, checkpoint=str(tmp_path / "last.ckpt"), **options)
    assert_same(unbroken, resumed, 1e-6)
    torch.testing.assert_close(unbroken.best_loss, resumed.best_loss, rtol=0, atol=1e-6)


def test_going_on_with_a_finished_run_changes_nothing(tmp_path: Path):
    pool = toy_pool(noise=3.0)
    config = replace(CONFIG, learning_rate=0.1, patience=1)
    done = fitted(pool, config, epochs=60, **checkpointing(tmp_path))
    again = fitted(pool, config, epochs=60, checkpoint=str(tmp_path / "last.ckpt"))
    assert int(done.best_epoch.max()) < 50  # it did stop early
    assert_same(done, again)


@pytest.mark.parametrize("head", [HeadConfig(), MLP], ids=["linear", "mlp with dropout"])
def test_two_runs_of_one_seed_are_equal_and_leave_the_generator_alone(head: HeadConfig):
    pool = toy_pool()
    torch.manual_seed(1)
    one = fitted(pool, head=head, epochs=3)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    build_task(pool, head, CONFIG, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(one, fitted(pool, head=head, epochs=3))


def test_a_checkpoint_holds_plain_values_only(tmp_path: Path):
    fitted(toy_pool(), head=MLP, epochs=1, **checkpointing(tmp_path))
    loaded = torch.load(tmp_path / "last.ckpt", weights_only=True)  # noqa: TID251 (this is what is tested)
    assert loaded["hyper_parameters"]["training"]["folds"] == 3
    assert loaded["epoch"] == 0
