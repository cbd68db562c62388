"""Training an interpreter: one LightningModule, cross-entropy over all concepts, and a contrastive term if asked.

1. A step takes rows of all concepts mixed. The loss is cross-entropy with smoothed labels; with many thousands of
   concepts it may be taken over those of the batch and a sample of the others.
2. With a similarity head, each row's embedding is drawn to that of a partner (another text about the same concept) and
   away from all others of the batch (Chen et al. 2020, SimCLR; Khosla et al. 2020, with labels).
3. AdamW with warm-up and cosine. After each epoch the validation rows are read; the best weights so far are kept.

Axes: B rows of this rank's batch, A rows of all ranks, T tokens, D model width, C concepts, Z similarity width.
"""

import copy
import math
from dataclasses import asdict, dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ftw.errors import ConfigError
from ftw.hat.interpreter import Interpreter
from ftw.map.training.interpreter_data import InterpreterDataModule

FIGURES = ("loss", "top1", "top5")


@dataclass(kw_only=True)
class InterpreterTrainingConfig:
    """How an interpreter is fitted.

    Attributes:
        batch: rows of a step, over all ranks. learning_rate: at the end of the warm-up. weight_decay: of AdamW.
        warmup: share of the steps in which the learning rate rises.
        label_smoothing: share of a row's probability that is spread over all concepts.
        slot_dropout: chance that a token of a row is hidden in a step.
        noise: standard deviation of what is added to the standardised states in training.
        sampled: 0 takes the loss over all concepts; above, over those of the batch and so many others.
        contrast: weight of the contrastive term, for interpreters with a similarity head. sharpness: of its softmax.
        shrinkage: of the covariance that the direct path counts out, in units of its mean variance.
        pools: states of a text that are read at each layer.
        baselines: whether a linear softmax, nearest means and TF-IDF are set beside it.
    """

    batch: int = 256
    learning_rate: float = 5e-4
    weight_decay: float = 0.05
    warmup: float = 0.1
    label_smoothing: float = 0.1
    slot_dropout: float = 0.0
    noise: float = 0.0
    sampled: int = 0
    contrast: float = 0.3
    sharpness: float = 10.0
    shrinkage: float = 0.01
    pools: list[str] = field(default_factory=lambda: ["mean", "last"])
    baselines: bool = True

    def check(self) -> None:
        """Raise ConfigError for values that cannot be."""
        shares = {name: getattr(self, name) for name in ("warmup", "label_smoothing", "slot_dropout")}
        if wrong := {name: value for name, value in shares.items() if not 0 <= value < 1}:
            name, value = next(iter(wrong.items()))
            raise ConfigError(f"map.interpreter.{name}={value}: choose a share from 0 to below 1")
        for name in ("learning_rate", "sharpness", "shrinkage"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"map.interpreter.{name}={getattr(self, name)}: must be above 0")
        for name in ("weight_decay", "noise", "sampled", "contrast"):
            if getattr(self, name) < 0:
                raise ConfigError(f"map.interpreter.{name}={getattr(self, name)}: choose 0 or more")


class InterpreterTask(pl.LightningModule):
    """Fits an interpreter; `best` holds the weights of the best epoch.

    Args:
        interpreter: what is fitted. training: how. kinds: of the rows, in the order of their numbers. seed: of dropout
            and samples.
    """

    best_loss: Tensor
    best_epoch: Tensor

    def __init__(
        self, interpreter: Interpreter, training: InterpreterTrainingConfig, *, kinds: list[str], seed: int = 0
    ) -> None:
        super().__init__()
        training.check()
        # Plain values only: a checkpoint that holds objects cannot be loaded by current torch.
        self.save_hyperparameters({"model": asdict(interpreter.config), "training": asdict(training)})
        self.interpreter, self.training_config, self.kinds, self.seed = interpreter, training, kinds, seed
        self.best = copy.deepcopy(interpreter).requires_grad_(False)
        self.register_buffer("best_loss", torch.tensor(torch.inf))
        self.register_buffer("best_epoch", torch.tensor(-1))
        self._sums = torch.zeros(len(kinds), 1 + len(FIGURES))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        # Dropout and samples are drawn by seed, step and rank alone: a resumed run draws what an unbroken one drew.
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed((self.seed * 1_000_003 + self.global_step) * 1_009 + self.global_rank)
            encoded_BW = self._encode(batch["states"], batch["mask"])
            # Rows about further concepts, which the interpreter does not tell apart, train the similarity alone.
            own_B = batch["labels"] < len(self.interpreter.names)
            losses_B = self._entropy(encoded_BW, batch["labels"].masked_fill(~own_B, 0))
            loss = self._over_all(losses_B * batch["weights"] * own_B, batch)
            self.log(
                "train/loss", loss.detach(), on_epoch=True, on_step=False, batch_size=len(losses_B), sync_dist=True
            )
            if self.interpreter.similarity is not None and self.training_config.contrast:
                partner_BW = self._encode(batch["partners"], batch["partner_mask"])
                contrast = self._over_all(self._contrast(encoded_BW, partner_BW, batch["labels"]), batch)
                self.log(
                    "train/contrast",
                    contrast.detach(),
                    on_epoch=True,
                    on_step=False,
                    batch_size=len(losses_B),
                    sync_dist=True,
                )
                loss = loss + self.training_config.contrast * contrast
        return loss

    def _over_all(self, losses_B: Tensor, batch: dict[str, Any]) -> Tensor:
        """This rank's part of the mean over a batch: the ranks' parts average to the loss that one rank would have."""
        return losses_B.sum() * (self.trainer.world_size / batch["num_all"])

    def _encode(self, states_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
        config, x_BTD = self.training_config, states_BTD.float()
        slots_T = None
        if mask_BT is not None:
            slots_T = torch.zeros(x_BTD.shape[1], dtype=torch.long, device=x_BTD.device)
        if config.noise:
            scale = self.interpreter.scale_JD if slots_T is None else self.interpreter.scale_JD[slots_T]
            x_BTD = x_BTD + config.noise * torch.randn_like(x_BTD) * scale
        if config.slot_dropout:
            kept_BT = torch.rand(x_BTD.shape[:2], device=x_BTD.device) >= config.slot_dropout
            mask_BT = kept_BT if mask_BT is None else kept_BT & mask_BT
        return self.interpreter.encode(x_BTD, slots_T=slots_T, mask_BT=mask_BT)

    def _entropy(self, encoded_BW: Tensor, labels_B: Tensor) -> Tensor:
        """Cross-entropy of each row, with smoothed labels; over a sample of the concepts if that is asked."""
        config, smoothing = self.training_config, self.training_config.label_smoothing
        num_concepts = len(self.interpreter.names)
        if not config.sampled or self.interpreter.config.hierarchical or config.sampled >= num_concepts:
            logits_BC = self.interpreter.logits(encoded_BW)
            return nn.functional.cross_entropy(logits_BC, labels_B, label_smoothing=smoothing, reduction="none")
        others = torch.randint(num_concepts, (config.sampled,), device=labels_B.device)
        concepts = torch.cat([labels_B, others]).unique()
        output = self.interpreter.output
        logits_BS = nn.functional.linear(encoded_BW, output.weight[concepts], output.bias[concepts]).float()
        labels_B = torch.searchsorted(concepts, labels_B)
        return nn.functional.cross_entropy(logits_BS, labels_B, label_smoothing=smoothing, reduction="none")

    def _contrast(self, encoded_BW: Tensor, partner_BW: Tensor, labels_B: Tensor) -> Tensor:
        """Cross-entropy of finding each row's partner among the partners of all ranks; other rows of its concept, whose
        partners are as right, are left out."""
        assert self.interpreter.similarity is not None  # asked only with one
        embedded_BZ, partner_BZ = (
            nn.functional.normalize(self.interpreter.similarity(one).float(), dim=-1)
            for one in (encoded_BW, partner_BW)
        )
        first, partner_AZ, labels_A = 0, partner_BZ, labels_B
        if self.trainer.world_size > 1:
            partner_AZ, labels_A, first = self._of_all_ranks(partner_BZ, labels_B)
        logits_BA = embedded_BZ @ partner_AZ.T * self.training_config.sharpness
        own_B = first + torch.arange(len(labels_B), device=labels_B.device)
        same_BA = labels_B.unsqueeze(1) == labels_A
        same_BA[torch.arange(len(labels_B)), own_B] = False
        return nn.functional.cross_entropy(logits_BA.masked_fill(same_BA, -torch.inf), own_B, reduction="none")

    def _of_all_ranks(self, partner_BZ: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor, int]:
        """Partners and labels of all ranks, and where this rank's begin. Ranks may differ by a row, so they are padded.

        Gathering passes gradients back to the ranks that they came from.
        """
        sizes = self._gathered(torch.tensor(len(labels_B), device=labels_B.device)).tolist()
        missing = max(sizes) - len(labels_B)
        padded_BZ = nn.functional.pad(partner_BZ, (0, 0, 0, missing))
        gathered_RBZ = self._gathered(padded_BZ, sync_grads=True)
        gathered_RB = self._gathered(nn.functional.pad(labels_B, (0, missing), value=-1))
        partner_AZ = torch.cat([part[:size] for part, size in zip(gathered_RBZ, sizes, strict=True)])
        labels_A = torch.cat([part[:size] for part, size in zip(gathered_RB, sizes, strict=True)])
        return partner_AZ, labels_A, sum(sizes[: self.global_rank])

    def _gathered(self, tensor: Tensor, *, sync_grads: bool = False) -> Tensor:
        """A tensor of every rank, stacked."""
        gathered: Any = self.all_gather(tensor, sync_grads=sync_grads)
        return gathered

    def on_validation_epoch_start(self) -> None:
        self._sums = torch.zeros(len(self.kinds), 1 + len(FIGURES), device=self.device)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        slots_T = None
        if batch["mask"] is not None:
            slots_T = torch.zeros(batch["states"].shape[1], dtype=torch.long, device=self.device)
        logits_BC = self.interpreter(batch["states"], slots_T=slots_T, mask_BT=batch["mask"]).logits_BC
        labels_B1 = batch["labels"].unsqueeze(1)
        best_BK = logits_BC.topk(min(5, logits_BC.shape[1])).indices
        hits_BK = best_BK == labels_B1
        loss_B = nn.functional.cross_entropy(logits_BC, batch["labels"], reduction="none")
        figures_B4 = torch.stack([torch.ones_like(loss_B), loss_B, hits_BK[:, 0], hits_BK.any(1)], dim=1)
        self._sums.index_add_(0, batch["kinds"], figures_B4.to(self._sums.dtype))

    def on_validation_epoch_end(self) -> None:
        sums_K4 = self._gathered(self._sums).sum(0) if self.trainer.world_size > 1 else self._sums
        if self.trainer.sanity_checking:
            return
        there_K = sums_K4[:, 0] > 0
        means_K3 = sums_K4[:, 1:] / sums_K4[:, :1].clamp_min(1)
        # Kinds weigh the same, however many rows each has: an easy kind must not decide when training ends.
        for number, name in enumerate(FIGURES):
            self.log(f"val/{name}", means_K3[there_K, number].mean(), prog_bar=number < 2, sync_dist=True)
            for kind, value in zip(self.kinds, means_K3[:, number], strict=True):
                if len(self.kinds) > 1:
                    self.log(f"val/{name}_{kind}", value, sync_dist=True)
        loss = means_K3[there_K, 0].mean()
        if loss < self.best_loss:
            self.best_loss.copy_(loss)
            self.best_epoch.fill_(self.current_epoch)
            self.best.load_state_dict(self.interpreter.state_dict())

    def configure_optimizers(self) -> Any:
        config, decayed, free = self.training_config, list[nn.Parameter](), list[nn.Parameter]()
        for parameter in self.interpreter.parameters():
            (decayed if parameter.ndim > 1 else free).append(parameter)
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": free, "weight_decay": 0.0}]
        # Attention does not see a bias of its keys; an eps above rounding keeps AdamW from making steps of its noise.
        optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), eps=1e-6)
        total = max(1, int(self.trainer.estimated_stepping_batches))
        rising = max(1, round(config.warmup * total))

        def rate(step: int) -> float:
            if step < rising:
                return (step + 1) / rising
            return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rising) / max(1, total - rising))))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def data_of(trainer: pl.Trainer) -> InterpreterDataModule:
    """The data module that a trainer fits an interpreter to."""
    module = getattr(trainer, "datamodule", None)
    assert isinstance(module, InterpreterDataModule)
    return module
