"""Train an interpreter from rows or an encyclopedia, and say of which concepts it is unsure: the functions to call.

    interpreter = train_interpreter(read_rows(encyclopedia), InterpreterFit())
    unsure = uncertainty(interpreter, rows)

Axes: S rows, C concepts.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ftw.errors import DataError
from ftw.hat.concept_tree import ConceptTree
from ftw.hat.interpreter import Interpreted, Interpreter, InterpreterConfig, calibrated, confidence
from ftw.map.encyclopedia import Encyclopedia
from ftw.map.training.callbacks import quiet_lightning, quiet_trainer
from ftw.map.training.fit import fitting
from ftw.map.training.interpreter_data import TRAIN, InterpreterDataModule, InterpreterRows, read_rows
from ftw.map.training.interpreter_directions import find_directions
from ftw.map.training.interpreter_task import InterpreterTask, InterpreterTrainingConfig
from ftw.substrate.taps import cpu_has_bfloat16

EPOCHS = 12
TEMPERATURES = torch.logspace(-1, 1, 81)
READ_AT_ONCE = 1024
MIXES = (0.0, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0)  # of the cosine to a prototype, beside the logits
TRUSTS = (0.0, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)  # of the direct path's cosine, likewise
TRUST = 40.0  # where nothing is validated


@dataclass(kw_only=True)
class InterpreterFit:
    """Everything that decides a fit, besides the rows.

    Attributes:
        model: size and variant. training: how it is fitted. epochs: where no trainer is given. seed: of weights, order
            and dropout.
    """

    model: InterpreterConfig = field(default_factory=InterpreterConfig)
    training: InterpreterTrainingConfig = field(default_factory=InterpreterTrainingConfig)
    epochs: int = EPOCHS
    seed: int = 0


@dataclass(frozen=True)
class Uncertainty:
    """How sure an interpreter is of each concept, over rows about it; NaN where there are none.

    Attributes:
        confidence_C: mean of 1 - H / ln C. margin_C: mean of the highest probability minus the second.
        probability_C: mean probability of the concept itself. num_rows_C: rows that this rests on.
    """

    confidence_C: np.ndarray
    margin_C: np.ndarray
    probability_C: np.ndarray
    num_rows_C: np.ndarray


def train_interpreter(
    rows: InterpreterRows | Encyclopedia,
    config: InterpreterFit | None = None,
    *,
    tree: ConceptTree | None = None,
    trainer: Callable[[list[pl.Callback]], pl.Trainer] | None = None,
    callbacks: Callable[[], list[pl.Callback]] = list,
    folder: Path | None = None,
    checkpoint: Path | None = None,
) -> Interpreter:
    """Fit an interpreter, keep its best epoch, and calibrate it on the validation rows.

    Args:
        rows: with parts train and dev; without dev rows, one of ten groups is set aside where concepts can spare it.
        tree: of the concepts, for the hierarchical variant.
        trainer: makes the Lightning trainer from the callbacks it must have; default: a quiet one of `epochs`.
        folder: where the interpreter is saved, by the first rank. checkpoint: of a run to go on with.

    Raises:
        DataError: no training rows, or fewer than ranks. ConfigError: values that cannot be.
    """
    config = config or InterpreterFit()
    quiet_lightning()
    if isinstance(rows, Encyclopedia):
        rows = read_rows(rows)
    rows = rows.with_validation(config.seed)
    similar = config.model.similarity > 0 and config.training.contrast > 0
    data = InterpreterDataModule(rows, batch=config.training.batch, seed=config.seed, further=similar)
    task = build_task(rows, config, tree)
    made = callbacks()
    built = trainer(made) if trainer else _trainer(config.epochs, made)
    with fitting():
        built.fit(task, datamodule=data, ckpt_path=None if checkpoint is None else str(checkpoint))
    interpreter = task.best if data.validated else task.interpreter
    interpreter = interpreter.cpu().eval().requires_grad_(False)
    if similar:
        interpreter.prototypes_CZ.copy_(prototypes(interpreter, rows.select(rows.where(TRAIN))))
    if config.model.direct:
        _lay_directions(interpreter, rows, config.training.shrinkage)
    if data.validated:
        calibrate(interpreter, rows.select(data.dev_rows))
    if folder is not None and built.is_global_zero:
        interpreter.save(folder)
    return interpreter


def build_task(rows: InterpreterRows, config: InterpreterFit, tree: ConceptTree | None) -> InterpreterTask:
    """The task, its interpreter's inputs standardised by the training rows, weights drawn by the seed."""
    with torch.random.fork_rng([]):
        torch.manual_seed(config.seed)
        interpreter = Interpreter(
            config.model,
            names=rows.names,
            slots=rows.slots,
            state_width=rows.states_STD.shape[-1],
            fingerprint=rows.fingerprint,
            tree=tree,
        )
    chosen = torch.from_numpy(rows.where(TRAIN))
    if rows.mask_ST is not None:
        tokens_XD = rows.states_STD[chosen][rows.mask_ST[chosen]].float()
        interpreter.center_JD.copy_(tokens_XD.mean(0))
        interpreter.scale_JD.copy_(tokens_XD.std(0).nan_to_num(1.0).clamp_min(1e-3))
    else:
        for slot in range(len(rows.slots)):  # one after the other: float32 of all of them may not fit into memory
            x_SD = rows.states_STD[chosen, slot].float()
            interpreter.center_JD[slot] = x_SD.mean(0)
            interpreter.scale_JD[slot] = x_SD.std(0).nan_to_num(1.0).clamp_min(1e-3)
    return InterpreterTask(interpreter, config.training, kinds=sorted(set(rows.kinds)), seed=config.seed)


def mixed_precision() -> str:
    """Lightning's name for the fastest arithmetic that this machine computes in hardware."""
    fast = torch.cuda.is_bf16_supported() if torch.cuda.is_available() else cpu_has_bfloat16()
    return "bf16-mixed" if fast else "16-mixed" if torch.cuda.is_available() else "32-true"


def _trainer(epochs: int, callbacks: list[pl.Callback]) -> pl.Trainer:
    return quiet_trainer(epochs, callbacks=callbacks, precision=mixed_precision(), gradient_clip_val=1.0)


def read_logits(interpreter: Interpreter, rows: InterpreterRows) -> Tensor:
    """Logits of all rows, float32 [S, C] on the CPU."""
    logits = [_read(interpreter, part).logits_BC.float().cpu() for part in _in_parts(rows)]
    return torch.cat(logits) if logits else torch.empty(0, len(interpreter.names))


def read_parts(interpreter: Interpreter, rows: InterpreterRows) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What the parts of an interpreter say of some rows (`Interpreted.parts`), float32 [S, C] on the CPU."""
    encoded, near, direct = zip(*(_read(interpreter, part).parts for part in _in_parts(rows)), strict=True)

    def joined(parts: Sequence[Tensor | None]) -> Tensor | None:
        there = [part.float().cpu() for part in parts if part is not None]
        return torch.cat(there) if there else None

    return torch.cat([part.float().cpu() for part in encoded]), joined(near), joined(direct)


def _in_parts(rows: InterpreterRows) -> Iterator[InterpreterRows]:
    """Some rows at a time."""
    for start in range(0, len(rows), READ_AT_ONCE):
        yield rows.select(np.arange(start, min(start + READ_AT_ONCE, len(rows))))


@torch.no_grad()
def _read(interpreter: Interpreter, rows: InterpreterRows) -> Interpreted:
    device, slots_T, mask_BT = interpreter.query.device, None, None
    if rows.mask_ST is not None:
        slots_T = torch.zeros(rows.states_STD.shape[1], dtype=torch.long, device=device)
        mask_BT = rows.mask_ST.to(device)
    fast = mixed_precision() == "bf16-mixed"
    with torch.autocast(device.type, torch.bfloat16) if fast else contextlib.nullcontext():
        return interpreter(rows.states_STD.to(device), slots_T=slots_T, mask_BT=mask_BT)


def prototypes(interpreter: Interpreter, rows: InterpreterRows) -> Tensor:
    """Mean embedding of each concept's rows, of length one, [C, Z]; zero for a concept without any."""
    sums_CZ = torch.zeros_like(interpreter.prototypes_CZ)
    for part in _in_parts(rows):
        embedded_BZ = _read(interpreter, part).similarity_BZ
        assert embedded_BZ is not None  # asked only with a similarity head
        sums_CZ.index_add_(0, part.labels_S, embedded_BZ.float().cpu() * part.weights.unsqueeze(1))
    return nn.functional.normalize(sums_CZ, dim=1)


def _lay_directions(interpreter: Interpreter, rows: InterpreterRows, shrinkage: float) -> None:
    """Compute the direct path."""
    found = find_directions(
        rows,
        interpreter.center_JD,
        interpreter.scale_JD,
        num=interpreter.places_CR.shape[1],
        shrinkage=shrinkage,
    )
    interpreter.directions_JDR.copy_(found.directions_JDR)
    interpreter.places_CR.copy_(found.places_CR)
    interpreter.trust.fill_(TRUST)


def calibrate(interpreter: Interpreter, rows: InterpreterRows) -> None:
    """Set the temperature, and how much prototypes and direct path count, to what makes the rows likeliest."""
    encoded_SC, near_SC, direct_SC = read_parts(interpreter, rows)
    found = []
    for mix, trust in product((0.0,) if near_SC is None else MIXES, (0.0,) if direct_SC is None else TRUSTS):
        logits_SC = encoded_SC
        if near_SC is not None:
            logits_SC = logits_SC + mix * near_SC
        if direct_SC is not None:
            logits_SC = logits_SC + trust * direct_SC
        found.append((*softmax_temperature(logits_SC, rows), mix, trust))
    _, temperature, mix, trust = min(found)
    interpreter.mix.fill_(mix)
    interpreter.trust.fill_(trust)
    interpreter.temperature.fill_(temperature)


def softmax_temperature(logits_SC: Tensor, rows: InterpreterRows) -> tuple[float, float]:
    """The lowest loss of some logits at any temperature, and that temperature; kinds weigh the same."""
    _, kind_S, counts = np.unique(rows.kinds, return_inverse=True, return_counts=True)
    weights_S = torch.from_numpy(1 / counts[kind_S])
    losses = [
        float((nn.functional.cross_entropy(logits_SC / one, rows.labels_S, reduction="none") * weights_S).sum())
        for one in TEMPERATURES
    ]
    best = int(np.argmin(losses))
    return losses[best], float(TEMPERATURES[best])


def uncertainty(interpreter: Interpreter, rows: InterpreterRows | Encyclopedia) -> Uncertainty:
    """How sure the interpreter is of each concept, over the given rows (those it was not trained on say most).

    Raises:
        DataError: the rows are about other concepts.
    """
    if isinstance(rows, Encyclopedia):
        rows = read_rows(rows, pools=list(dict.fromkeys(slot.pool for slot in interpreter.slots)))
    if rows.names != interpreter.names:
        raise DataError(f"the rows are about other concepts ({len(rows.names)}) than the interpreter knows")
    sums = np.zeros((4, len(rows.names)))
    for part in _in_parts(rows):
        chance_BC = calibrated(read_logits(interpreter, part), interpreter.temperature)
        best_B2 = chance_BC.topk(2).values
        own_B = chance_BC.gather(1, part.labels_S.unsqueeze(1))[:, 0]
        figures = (confidence(chance_BC), best_B2[:, 0] - best_B2[:, 1], own_B, torch.ones(len(part)))
        for number, values_B in enumerate(figures):
            np.add.at(sums[number], part.labels_S.numpy(), values_B.double().numpy())
    counts = np.where(sums[3] > 0, sums[3], np.nan)
    return Uncertainty(sums[0] / counts, sums[1] / counts, sums[2] / counts, sums[3].astype(np.int64))
