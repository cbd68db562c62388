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

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ftw.hat.lens import Head, HeadConfig


@dataclass(kw_only=True)
class TrainingConfig:
    """How lenses are fitted.

    Attributes:
        solver: "logistic" (the default recipe: linear heads, penalty and pools chosen lens by lens), "adamw" (heads of
            any family, by Lightning), "lda" (linear heads in closed form, for thousands of concepts), or "auto":
            logistic for linear heads on full states, else adamw.
        pools: of "logistic": what decisions about texts are made of: mean, last, tail, spread, and max (the strongest
            token), which needs states of single tokens: map.encyclopedia.tokens_per_text={train: -1, test: -1}. Empty:
            mean for a concept pack, whose concepts are mentioned somewhere in a text; all four states for labelled
            texts, whose labels may be about the whole, or its end.
        combine: of "logistic": "stack" (weights learnt out of fold), "choose" (one pool or all) or "average".
        penalties: of "logistic": C, inverse strength beside a sum over rows, as in scikit-learn.
        pool: of the others: state that a text is represented by, "mean" or "last".
        batch_texts: texts in a step. learning_rate: of AdamW.
        l2: strength of ½ l2 ‖w‖² beside the mean loss of a lens (1 / (C x rows) of scikit-learn).
        folds: groups of texts left out in turn, for early stopping and calibration.
        patience: epochs without a better out-of-fold loss after which a lens is done.
        basis_rank: width of the shared basis; 0 reads full states.
        num_shuffles: control lenses trained on shuffled labels, per concept.
        shrinkage: of "lda", in texts; 0 chooses it on out-of-fold rows.
        graduate: of "lda": samples of a concept grow until its lens passes on articles of the part kept for choices.
        refine_siblings: of "lda": lenses of one family are ranked apart, where those articles read no worse.
    """

    solver: str = "auto"
    pools: list[str] = field(default_factory=list)
    combine: str = "stack"
    penalties: list[float] = field(default_factory=lambda: [1e-4, 1e-3, 1e-2, 1e-1, 1.0])
    pool: str = "mean"
    batch_texts: int = 512
    learning_rate: float = 0.02
    l2: float = 0.05
    folds: int = 4
    patience: int = 5
    basis_rank: int = 0
    num_shuffles: int = 5
    shrinkage: float = 0.0
    graduate: bool = False
    refine_siblings: bool = False


class LensTask(pl.LightningModule):
    """N lenses on L layers, F copies each.

    Args:
        num_lenses, num_layers, width: sizes N, L, W.
        head: family of the lenses.
        training: how they are fitted.
        balance_FN2: weight of a negative and of a positive row for each copy and lens, such that each lens's rows sum
            to one and its two classes weigh the same. num_rows: S, rows of an epoch.
        seed: of initial weights and dropout.
    """

    best_loss: Tensor
    best_epoch: Tensor
    balance: Tensor
    _next_epoch: Tensor

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
        self.seed = seed
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            self.heads = _per_layer(head, self.num_copies * num_lenses, num_layers, width)
            self.best_heads = _per_layer(head, self.num_copies * num_lenses, num_layers, width)
        self.best_heads.requires_grad_(False)
        self.best_heads.load_state_dict(self.heads.state_dict())
        self.register_buffer("balance", balance_FN2)
        self.register_buffer("best_loss", torch.full((num_layers, num_lenses), torch.inf))
        self.register_buffer("best_epoch", torch.full((num_layers, num_lenses), -1, dtype=torch.long))
        self.register_buffer("_next_epoch", torch.zeros((), dtype=torch.long))
        self._epoch_loss_LN = torch.zeros(num_layers, num_lenses)

    def forward(self, x_BLW: Tensor) -> Tensor:
        """Logits of every copy of every lens on every layer: [B, L, F, N]."""
        logits = [head(x_BLW[:, layer]) for layer, head in enumerate(self.heads)]
        return torch.stack(logits, dim=1).unflatten(-1, (self.num_copies, self.num_lenses))

    @property
    def waiting(self) -> Tensor:
        """Which lenses may still improve, bool [L, N]: a lens is done `patience` epochs after its best."""
        return self._next_epoch - 1 - self.best_epoch <= self.training_config.patience

    def on_train_start(self) -> None:
        # A run that goes on from the checkpoint of a finished one has nothing left to do.
        if not self.waiting.any():
            self.trainer.should_stop = True

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        # Dropout draws by seed and step alone, so that a resumed run drops what an unbroken one dropped.
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self.seed * 1_000_003 + self.global_step)
            logits_BLFN = self(batch["states"])
        row_BFN = self._row_weights(batch)
        loss_BLFN = _binary_cross_entropy(logits_BLFN, batch["labels"][:, None, None])
        # Row weights sum to one over the whole pool; this brings a batch's share back to that scale.
        data = (loss_BLFN * row_BFN.unsqueeze(1)).sum() * (self.num_rows / len(logits_BLFN))
        penalty = sum(
            (weight.square().sum() for head in self.heads for weight in _head(head).weights()), torch.zeros(())
        )
        # Reported per lens, so that runs of different sizes compare; the gradient is the sum's, so lenses do not mix.
        self.log(
            "train/loss",
            data.detach() / logits_BLFN[0].numel(),
            on_epoch=True,
            on_step=False,
            batch_size=len(logits_BLFN),
        )
        return data + 0.5 * self.training_config.l2 * penalty

    def on_validation_epoch_start(self) -> None:
        self._epoch_loss_LN = torch.zeros_like(self.best_loss)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        for rows, logits_bLN in self._held_out(self.heads, batch["states"], batch["folds"]):
            labels_bN, weights_bN = batch["labels"][rows], batch["weights"][rows]
            class_bN = torch.where(labels_bN > 0.5, self.balance[0, :, 1], self.balance[0, :, 0])
            loss_bLN = _binary_cross_entropy(logits_bLN, labels_bN.unsqueeze(1))
            self._epoch_loss_LN += (loss_bLN * (class_bN * weights_bN).unsqueeze(1)).sum(0)

    def on_validation_epoch_end(self) -> None:
        if self.trainer.sanity_checking:
            return
        # A lens that is done stays as it is however long others train: it is the lens it would be alone.
        better_LN = (self._epoch_loss_LN < self.best_loss - 1e-4) & self.waiting
        self.best_loss[better_LN] = self._epoch_loss_LN[better_LN]
        self.best_epoch[better_LN] = self.current_epoch
        for layer, (kept, current) in enumerate(zip(self.best_heads, self.heads, strict=True)):
            _head(kept).copy_rows(_head(current), better_LN[layer].repeat(self.num_copies))
        self._next_epoch.fill_(self.current_epoch + 1)
        waiting_LN = self.waiting
        self.log("val/loss", self._epoch_loss_LN.mean(), prog_bar=True)
        self.log("val/best_loss", self.best_loss.mean())
        self.log("val/improving", waiting_LN.float().mean(), prog_bar=True)
        if not waiting_LN.any():
            self.trainer.should_stop = True

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # With balanced classes the first gradient of a bias is zero but for rounding, and Adam would make a full step
        # of its sign. An eps above rounding and far below every real gradient keeps it where it is.
        return torch.optim.AdamW(
            self.heads.parameters(), lr=self.training_config.learning_rate, weight_decay=0.0, eps=1e-6
        )

    @torch.no_grad()
    def out_of_fold(self, states_SLW: Tensor, folds_S: Tensor, *, batch: int = 1024) -> Tensor:
        """Logit of every row by the best copy that did not train on it, on the CPU: [S, L, N]."""
        self.best_heads.eval()  # no dropout: this is reading, and fitting has left the task in training mode
        logits_SLN = torch.empty(len(states_SLW), len(self.heads), self.num_lenses)
        for start in range(0, len(states_SLW), batch):
            part = slice(start, start + batch)
            for rows, logits_bLN in self._held_out(
                self.best_heads, states_SLW[part].to(self.device), folds_S[part].to(self.device)
            ):
                logits_SLN[part][rows.cpu()] = logits_bLN.cpu()
        return logits_SLN

    def full_fits(self) -> list[Head]:
        """The lenses trained on all rows, at their best epochs: one head a layer, on the CPU."""
        rows = torch.arange(self.num_lenses)
        return [_head(head).rows(rows).eval() for head in self.best_heads]

    def _held_out(self, heads: nn.ModuleList, x_BLW: Tensor, folds_B: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows, and their logits [b, L, N] by the copy that does not train on them; copies without rows are left out.

        Without folds there is one copy, and it is judged on its own rows.
        """
        for copy in range(1, self.num_copies) if self.num_copies > 1 else [0]:
            rows = (folds_B + 1 == copy).nonzero()[:, 0] if copy else torch.arange(len(folds_B), device=folds_B.device)
            if len(rows):
                parts = [_head(head).part(copy * self.num_lenses, (copy + 1) * self.num_lenses) for head in heads]
                x_bLW = x_BLW[rows]
                yield rows, torch.stack([part(x_bLW[:, layer]) for layer, part in enumerate(parts)], dim=1)

    def _row_weights(self, batch: dict[str, Tensor]) -> Tensor:
        """Weight of each row for each copy and lens, [B, F, N]; zero for the rows that a copy does not train on."""
        labels_BN, weights_BN, folds_B = batch["labels"], batch["weights"], batch["folds"]
        used_BF = folds_B.unsqueeze(1) + 1 != torch.arange(self.num_copies, device=labels_BN.device)
        class_BFN = torch.where(labels_BN.unsqueeze(1) > 0.5, self.balance[..., 1], self.balance[..., 0])
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


def _binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.binary_cross_entropy_with_logits(logits, labels.expand_as(logits), reduction="none")
