"""Training all lenses at once: one LightningModule, one pool of texts, one matrix product a step.

1. Every lens is trained K + 1 times side by side: once on all training rows and once without each of K folds of groups.
   The copies are further rows of the same head, so this costs arithmetic, not code.
2. The loss is binary cross-entropy, masked and weighted per pair of text and concept, normalised per lens so that each
   lens trains as if alone (AdamW's state is per weight), plus an L2 penalty.
3. After each epoch every training row is scored by the copy that did not see it. Where a lens's out-of-fold loss is the
   lowest so far, all its copies are kept. Training ends when no lens has improved for `patience` epochs.
4. What remains: the full fit of each lens at its own best epoch, and out-of-fold logits to calibrate it with.

Axes: N lenses, F = K + 1 copies, S texts, B batch, L layers, W input width.
"""

from dataclasses import asdict, dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ftw.hat.lens import Head, HeadConfig


@dataclass(kw_only=True)
class TrainingConfig:
    """How lenses are fitted.

    Attributes:
        pool: state that a text is represented by in training: "mean" or "last".
        batch_texts: texts in a step. learning_rate: of AdamW.
        l2: strength of ½ l2 ‖w‖² beside the mean loss of a lens (1 / (C x rows) of scikit-learn).
        folds: groups of texts left out in turn, for early stopping and calibration.
        patience: epochs without a better out-of-fold loss after which a lens is done.
        basis_rank: width of the shared basis; 0 reads full states.
        num_shuffles: control lenses trained on shuffled labels, per concept.
    """

    pool: str = "mean"
    batch_texts: int = 512
    learning_rate: float = 0.01
    l2: float = 0.05
    folds: int = 4
    patience: int = 5
    basis_rank: int = 0
    num_shuffles: int = 5


class LensTask(pl.LightningModule):
    """N lenses on L layers, F copies each.

    Args:
        num_lenses, num_layers, width: sizes N, L, W.
        head: family of the lenses.
        training: how they are fitted.
        balance_FN2: weight of a negative and of a positive row for each copy and lens, such that each lens's rows sum to
            one and its two classes weigh the same.
    """

    best_loss: Tensor
    best_epoch: Tensor
    balance: Tensor

    def __init__(
        self,
        *,
        num_lenses: int,
        num_layers: int,
        width: int,
        head: HeadConfig,
        training: TrainingConfig,
        balance_FN2: Tensor,
        num_rows: int,
        seed: int = 0,
    ) -> None:
        super().__init__()
        # Plain values only: a checkpoint that holds objects cannot be loaded by current torch.
        self.save_hyperparameters({"head": asdict(head), "training": asdict(training), "num_lenses": num_lenses})
        self.training_config, self.num_lenses, self.num_rows = training, num_lenses, num_rows
        self.num_copies = balance_FN2.shape[0]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.heads = _per_layer(head, self.num_copies * num_lenses, num_layers, width)
            self.best_heads = _per_layer(head, self.num_copies * num_lenses, num_layers, width)
        self.best_heads.requires_grad_(False)
        self.best_heads.load_state_dict(self.heads.state_dict())
        self.register_buffer("balance", balance_FN2)
        self.register_buffer("best_loss", torch.full((num_layers, num_lenses), torch.inf))
        self.register_buffer("best_epoch", torch.full((num_layers, num_lenses), -1, dtype=torch.long))
        self._epoch_loss_LN = torch.zeros(num_layers, num_lenses)

    def forward(self, x_BLW: Tensor, *, best: bool = False) -> Tensor:
        """Logits of every copy of every lens on every layer: [B, L, F, N]."""
        heads = self.best_heads if best else self.heads
        logits = [head(x_BLW[:, layer]) for layer, head in enumerate(heads)]
        return torch.stack(logits, dim=1).unflatten(-1, (self.num_copies, self.num_lenses))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        logits_BLFN = self(batch["states"])
        row_BFN = self._row_weights(batch, in_fold=False)
        loss_BLFN = _binary_cross_entropy(logits_BLFN, batch["labels"])
        # Row weights sum to one over the whole pool; this brings a batch's share back to that scale.
        data = (loss_BLFN * row_BFN.unsqueeze(1)).sum() * (self.num_rows / len(logits_BLFN))
        penalty = sum((weight.square().sum() for head in self.heads for weight in _head(head).weights()), torch.zeros(()))
        # Reported per lens, so that runs of different sizes compare; the gradient is the sum's, so lenses do not mix.
        self.log("train/loss", data.detach() / logits_BLFN[0].numel(), on_epoch=True, on_step=False, batch_size=len(logits_BLFN))
        return data + 0.5 * self.training_config.l2 * penalty

    def on_validation_epoch_start(self) -> None:
        self._epoch_loss_LN = torch.zeros_like(self.best_loss)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        logits_BLFN = self(batch["states"])
        row_BFN = self._row_weights(batch, in_fold=True)
        loss_BLFN = _binary_cross_entropy(logits_BLFN, batch["labels"])
        self._epoch_loss_LN += (loss_BLFN * row_BFN.unsqueeze(1)).sum(dim=(0, 2))

    def on_validation_epoch_end(self) -> None:
        if self.trainer.sanity_checking:
            return
        better_LN = self._epoch_loss_LN < self.best_loss - 1e-4
        self.best_loss[better_LN] = self._epoch_loss_LN[better_LN]
        self.best_epoch[better_LN] = self.current_epoch
        for layer, (kept, current) in enumerate(zip(self.best_heads, self.heads, strict=True)):
            _head(kept).copy_rows(_head(current), better_LN[layer].repeat(self.num_copies))
        waiting_LN = self.current_epoch - self.best_epoch <= self.training_config.patience
        self.log("val/loss", self._epoch_loss_LN.mean(), prog_bar=True)
        self.log("val/best_loss", self.best_loss.mean())
        self.log("val/improving", waiting_LN.float().mean(), prog_bar=True)
        if not waiting_LN.any():
            self.trainer.should_stop = True

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.heads.parameters(), lr=self.training_config.learning_rate, weight_decay=0.0)

    @torch.no_grad()
    def out_of_fold(self, states_SLW: Tensor, folds_S: Tensor, *, batch: int = 1024) -> Tensor:
        """Logit of every row by the best copy that did not train on it: [S, L, N]."""
        parts = []
        for start in range(0, len(states_SLW), batch):
            logits_BLFN = self(states_SLW[start : start + batch], best=True)
            copy_B = folds_S[start : start + batch] + 1 if self.num_copies > 1 else torch.zeros(len(logits_BLFN), dtype=torch.long)
            parts.append(logits_BLFN[torch.arange(len(logits_BLFN)), :, copy_B])
        return torch.cat(parts)

    def full_fits(self) -> list[Head]:
        """The lenses trained on all rows, at their best epochs: one head a layer."""
        rows = torch.arange(self.num_lenses)
        return [_head(head).rows(rows) for head in self.best_heads]

    def _row_weights(self, batch: dict[str, Tensor], *, in_fold: bool) -> Tensor:
        """Weight of each row for each copy and lens, [B, F, N]: the rows a copy trains on, or those it is judged on."""
        labels_BN, weights_BN, folds_B = batch["labels"], batch["weights"], batch["folds"]
        copies_F = torch.arange(self.num_copies, device=labels_BN.device)
        held_BF = folds_B.unsqueeze(1) + 1 == copies_F
        # Without folds there is one copy and nothing is left out: it is judged on its own rows.
        used_BF = held_BF if in_fold and self.num_copies > 1 else ~held_BF if not in_fold else torch.ones_like(held_BF)
        balance_FN2 = self.balance[:1].expand_as(self.balance) if in_fold else self.balance
        class_BFN = torch.where(labels_BN.unsqueeze(1) > 0.5, balance_FN2[..., 1], balance_FN2[..., 0])
        return class_BFN * (weights_BN.unsqueeze(1) * used_BF.unsqueeze(2))


def balance_classes(labels_SN: Tensor, weights_SN: Tensor, folds_S: Tensor, num_folds: int) -> Tensor:
    """Row weights [F, N, 2] such that for each copy and lens all rows sum to one, half of it on either class."""
    balance = []
    for copy in range(num_folds + 1):
        used_SN = weights_SN * (folds_S + 1 != copy).unsqueeze(1)
        positive_N = (used_SN * labels_SN).sum(0)
        negative_N = used_SN.sum(0) - positive_N
        balance.append(torch.stack([0.5 / negative_N, 0.5 / positive_N], dim=-1))
    # A lens with one class only is refused before training; a fold without positives of a lens simply adds nothing.
    return torch.nan_to_num(torch.stack(balance), nan=0.0, posinf=0.0)


def _per_layer(head: HeadConfig, num_lenses: int, num_layers: int, width: int) -> nn.ModuleList:
    return nn.ModuleList(head.build(num_lenses, width) for _ in range(num_layers))


def _head(module: Any) -> Head:
    return module


def _binary_cross_entropy(logits_BLFN: Tensor, labels_BN: Tensor) -> Tensor:
    labels = labels_BN[:, None, None, :].expand_as(logits_BLFN)
    return torch.nn.functional.binary_cross_entropy_with_logits(logits_BLFN, labels, reduction="none")
