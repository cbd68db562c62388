"""From texts and labels to a pack; Ctrl-C stays Ctrl-C, and a run that was stopped ends as if it had not been."""

import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from toy_encyclopedia import Sizes, toy_encyclopedia
from toy_pool import CONFIG

from ftw.errors import ConfigError, DataError, EncyclopediaError
from ftw.hat.monitor import Monitor
from ftw.map.collect import CollectConfig
from ftw.map.encyclopedia import Encyclopedia
from ftw.map.evaluate import EvaluateConfig
from ftw.map.pack import LensPack
from ftw.map.training.callbacks import quiet_trainer
from ftw.map.training.checkpoints import FileCheckpointIO, PacedCheckpoint
from ftw.map.training.train import FitConfig, _table, train_lenses, train_pack
from ftw.substrate.model import Substrate

FIT = FitConfig(training=replace(CONFIG, solver="adamw"), evaluate=EvaluateConfig(draws=20, floor_draws=5))
RECIPE = replace(FIT, training=replace(CONFIG, pools=["mean", "max", "last", "tail", "spread"], penalties=[1e-3, 1e-1]))
TOKENS = CollectConfig(tokens_per_text={"train": -1, "test": -1})
EPOCHS = 8
TEXTS = [f"the {word} sat on {number}" for word in ("cat", "dog", "ox", "ZZZ", "QQQ", "XXX") for number in range(8)]
LABELS = [int(text.split()[1].isupper()) for text in TEXTS]


class StopAt(pl.Callback):
    """Ctrl-C in an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, index: int
    ) -> None:
        if trainer.current_epoch == self.epoch and index == 1:
            raise KeyboardInterrupt


def trainers(folder: Path, *further: pl.Callback) -> Callable[[list[pl.Callback]], pl.Trainer]:
    """Trainers as the command line makes them, with `last.ckpt` after every epoch."""

    def make(callbacks: list[pl.Callback]) -> pl.Trainer:
        checkpoint = PacedCheckpoint(
            dirpath=folder, filename="last", save_on_train_epoch_end=False, enable_version_counter=False
        )
        options = {"enable_checkpointing": True, "plugins": [FileCheckpointIO()]}
        return quiet_trainer(EPOCHS, callbacks=[*callbacks, checkpoint, *further], **options)

    return make


def store_of(substrate: Substrate, folder: Path, *, train: int = 60, test: int = 30) -> Encyclopedia:
    """Synthetic states that claim to be the substrate's."""
    sizes = Sizes(train=train, test=test)
    return toy_encyclopedia(folder, sizes=sizes, width=substrate.width, fingerprint=substrate.fingerprint)


def assert_same(one: LensPack, other: LensPack, tolerance: float = 0.0) -> None:
    pairs = [(one.stack.lens_tensors(), other.stack.lens_tensors())]
    pairs += [(one.stack.calibration_tensors(), other.stack.calibration_tensors())]
    for ours, theirs in pairs:
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=tolerance)
    assert one.metrics == other.metrics


def test_texts_and_labels_make_a_pack_that_reads(tiny_substrate: Substrate):
    pack = train_lenses(tiny_substrate, (TEXTS, LABELS), concept="capitals", config=FIT, progress=False)
    assert pack.names == ["capitals"]
    figures = pack.metrics["capitals"]
    assert (figures["num_positive"], figures["num_negative"]) == (6, 6)
    assert figures["auroc"] > 0.9
    pack.check(tiny_substrate)
    assert pack.bank().calibrated
    assert pack.recipe.layers == [1, 2, 3]
    timeline = Monitor(tiny_substrate, pack.bank()).generate("Hi", max_new_tokens=3)
    assert timeline.concepts == ["capitals"]
    # The states are kept, and everything is drawn from the seed.
    assert_same(pack, train_lenses(tiny_substrate, (TEXTS, LABELS), concept="capitals", config=FIT, progress=False))


def test_the_recipe_makes_a_pack_that_reads_texts_as_it_was_judged(tmp_path: Path, tiny_substrate: Substrate):
    data, options = (TEXTS, LABELS), {"concept": "capitals", "collect_config": TOKENS, "progress": False}
    pack = train_lenses(tiny_substrate, data, config=RECIPE, **options)
    figures, again = pack.metrics["capitals"], LensPack.load(pack.save(tmp_path / "pack"))
    assert figures["auroc"] > 0.9
    assert {"auroc_both", "auroc_text", "auroc_shuffled"} <= set(figures)
    assert set(figures["choice"]["evidence"]) == {"mean", "max", "last", "tail", "spread", "all", "combined", "text"}
    assert pack.recipe.solver == "logistic"
    assert pack.recipe.pooling == "per lens"
    for one in (pack, again):
        assert one.stack.pooling is not None
        for name, tensor in one.stack.pooling.tensors().items():
            torch.testing.assert_close(tensor, pack.stack.pooling.tensors()[name], rtol=0, atol=0)
    assert_same(pack, train_lenses(tiny_substrate, data, config=RECIPE, **options))


def test_the_strongest_token_asks_for_stored_tokens(tiny_substrate: Substrate):
    with pytest.raises(DataError, match="tokens_per_text"):
        train_lenses(tiny_substrate, (TEXTS, LABELS), config=RECIPE, progress=False)


def test_a_checkpoint_of_a_solver_that_leaves_none_is_refused(tmp_path: Path, tiny_substrate: Substrate):
    config = replace(RECIPE, training=replace(CONFIG, pools=["mean", "last"]))
    with store_of(tiny_substrate, tmp_path / "store") as store, pytest.raises(ConfigError, match="no checkpoint"):
        train_pack(store, config, substrate=tiny_substrate, checkpoint=tmp_path / "last.ckpt")


def test_without_enough_texts_to_hold_out_there_are_no_figures(tiny_substrate: Substrate):
    pack = train_lenses(
        tiny_substrate, (["red cat", "red dog", "BLUE OX", "BLUE YAK"], [0, 0, 1, 1]), config=FIT, progress=False
    )
    assert pack.metrics == {}
    assert torch.isfinite(pack.bank()(torch.randn(2, 3, 32))).all()


@pytest.mark.parametrize(
    ("texts", "labels", "words"),
    [
        (["a", "b"], [1], "2 texts and 1 labels"),
        (["a", "b"], [1, 2], "label 2 of text 'b'"),
        (["a", "b"], [1, 1], "one class only"),
        (["a", "a"], [0, 1], "marked both 0 and 1"),
        ([], [], "no texts"),
    ],
)
def test_data_that_cannot_be_learnt_from_is_refused(
    tiny_substrate: Substrate, texts: list[str], labels: list[int], words: str
):
    with pytest.raises(DataError, match=words):
        train_lenses(tiny_substrate, (texts, labels), progress=False)


def test_a_text_given_twice_is_not_trained_on_and_tested_on():
    table = _table(["same"] * 9 + [f"other {n}" for n in range(9)], [0] * 9 + [1] * 9, concept="c")
    assert len(set(table.texts)) == len(table.texts) == 10
    assert len(table.where("test")) == 2


def test_ctrl_c_reaches_the_caller_and_the_run_can_go_on(tmp_path: Path, tiny_substrate: Substrate):
    handler = signal.getsignal(signal.SIGINT)
    with store_of(tiny_substrate, tmp_path / "store", train=90, test=60) as store:
        unbroken, _ = train_pack(store, FIT, substrate=tiny_substrate, trainer=trainers(tmp_path / "whole"))
        make = trainers(tmp_path / "broken", StopAt(4))
        with pytest.raises(KeyboardInterrupt):
            train_pack(store, FIT, substrate=tiny_substrate, trainer=make, folder=tmp_path / "pack")
        assert signal.getsignal(signal.SIGINT) is handler
        assert not (tmp_path / "pack").exists()
        resumed, _ = train_pack(
            store,
            FIT,
            substrate=tiny_substrate,
            trainer=trainers(tmp_path / "resumed"),
            folder=tmp_path / "pack",
            checkpoint=tmp_path / "broken" / "last.ckpt",
        )
    assert_same(unbroken, resumed, 1e-6)
    assert_same(LensPack.load(tmp_path / "pack"), resumed)


def test_ctrl_c_while_the_controls_are_fitted_reaches_the_caller(tmp_path: Path, tiny_substrate: Substrate):
    def stop(step: str) -> None:
        if step == "shuffled labels":
            raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    store = store_of(tiny_substrate, tmp_path / "store")
    with store, pytest.raises(KeyboardInterrupt):
        train_pack(store, FIT, substrate=tiny_substrate, trainer=trainers(tmp_path / "run"), step=stop)
    assert signal.getsignal(signal.SIGINT) is handler


def test_an_error_while_fitting_is_the_error_that_the_caller_sees(tmp_path: Path, tiny_substrate: Substrate):
    class Broken(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            raise DataError("broken on purpose")

    store = store_of(tiny_substrate, tmp_path / "store")
    with store, pytest.raises(DataError, match="on purpose"):
        train_pack(store, FIT, substrate=tiny_substrate, trainer=trainers(tmp_path / "run", Broken()))


def test_states_of_another_substrate_are_refused(tmp_path: Path, tiny_substrate: Substrate):
    store = toy_encyclopedia(tmp_path / "store", sizes=Sizes(train=60, test=30))
    with store, pytest.raises(EncyclopediaError, match="not of tiny-llama"):
        train_pack(store, FIT, substrate=tiny_substrate)
