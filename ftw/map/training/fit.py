"""From an encyclopedia to a lens pack: fit, calibrate, threshold, control, evaluate.

1. `LensTask` fits all lenses with folds; its out-of-fold logits are what nothing was fitted on.
2. Platt's calibration maps each layer's logit to a probability; the calibrated layers are averaged and calibrated once
   more, because an average of calibrated logits is too timid.
3. Background tokens give the percentiles; out-of-fold rows give the thresholds.
4. The same task, on labels shuffled within each concept, gives the control that a lens must beat; a text lens on the
   same rows gives the other.
5. All are evaluated on rows of split "test", which nothing above has seen.

Axes: S texts, N lenses, L layers, W input width, T tokens, P permutations.
"""

import contextlib
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from ftw.errors import DataError
from ftw.hat.lens import Head, HeadConfig
from ftw.hat.store import LensStack
from ftw.hat.text_embedding import AnyText
from ftw.map.calibrate import background_quantiles, best_f1_threshold, fit_platt, fpr_threshold
from ftw.map.controls import control_scores
from ftw.map.encyclopedia import Encyclopedia
from ftw.map.evaluate import EvaluateConfig, Evaluation, evaluate
from ftw.map.text_level import pooled_states, text_level_logits
from ftw.map.training.data import EncyclopediaDataModule, Pool
from ftw.map.training.lens_task import LensTask, TrainingConfig, balance_classes

CHUNK_TOKENS = 8192


def build_task(pool: Pool, head: HeadConfig, training: TrainingConfig, *, seed: int) -> LensTask:
    """The task that fits the lenses of a pool."""
    if training.folds == 1 or training.folds < 0:
        raise DataError(
            f"map.training.folds={training.folds}: choose 2 or more, or 0 to calibrate on the training rows"
        )
    return LensTask(
        num_lenses=len(pool.names),
        num_layers=len(pool.layers),
        width=pool.states_SLW.shape[-1],
        head=head,
        training=training,
        balance_FN2=balance_classes(pool.labels_SN, pool.weights_SN, pool.folds_S, training.folds),
        num_rows=len(pool.states_SLW),
        seed=seed,
    )


@contextlib.contextmanager
def fitting() -> Iterator[None]:
    """Around Lightning's `fit`: without warnings that tell an FTW user nothing, and Ctrl-C stays KeyboardInterrupt."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        with warnings.catch_warnings():
            # Batches come from memory: loader workers, which Lightning advises, would only slow them.
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning 2.6 with torch 2.13
            # A run that goes on has a folder of its own, and the callbacks that its configuration names.
            warnings.filterwarnings(
                "ignore", message=".*dirpath has changed.*|.*callbacks used to create the checkpoint.*"
            )
            yield
    except SystemExit as stopped:
        if not isinstance(stopped.__context__, KeyboardInterrupt):
            raise
        # Lightning makes a SystemExit of it, and leaves the process deaf to the next one.
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from stopped


def calibrated_stack(task: LensTask, pool: Pool, encyclopedia: Encyclopedia) -> LensStack:
    """The fitted lenses with calibration, thresholds and percentiles."""
    labels_SN, weights_SN = pool.labels_SN.numpy(), pool.weights_SN.numpy()
    oof_SLN = task.out_of_fold(pool.states_SLW, pool.folds_S).numpy()
    layers = [fit_platt(oof_SLN[:, layer], labels_SN, weights_SN, prior=0.5) for layer in range(len(pool.layers))]
    mean_SN = np.mean([fit.scale_N * oof_SLN[:, layer] + fit.offset_N for layer, fit in enumerate(layers)], axis=0)
    last = fit_platt(mean_SN, labels_SN, weights_SN, prior=0.5)
    logits_SN = last.scale_N * mean_SN + last.offset_N
    threshold_N = best_f1_threshold(logits_SN, labels_SN, weights_SN)
    stack = LensStack(
        names=pool.names,
        layers=pool.layers,
        heads=pool.fold(task.full_fits()),
        # mean over layers of (scale x head + offset), then the last calibration: the last offset is shared out evenly.
        scale_NL=_tensor(np.stack([last.scale_N * fit.scale_N for fit in layers], axis=1)),
        offset_NL=_tensor(np.stack([last.scale_N * fit.offset_N + last.offset_N for fit in layers], axis=1)),
        threshold_N=_tensor(np.nan_to_num(threshold_N)),
        threshold_1fpr_N=_tensor(np.nan_to_num(fpr_threshold(logits_SN, labels_SN, weights_SN), nan=np.inf)).clamp_max(
            1e30
        ),
        basis=pool.basis,
    )
    return with_percentiles(stack, encyclopedia)


def with_percentiles(stack: LensStack, encyclopedia: Encyclopedia) -> LensStack:
    """The stack with quantiles of its logits on background tokens, read as they are read live.

    Without a background split the tokens kept of training texts serve; without any tokens the stack stays as it is.
    """
    kept = encyclopedia.spec.tokens_per_text
    split = next(
        (name for name in ("background", "train") if kept.get(name) and len(encyclopedia.table.where(name))), None
    )
    if split is None:
        return stack
    rows, bank = encyclopedia.table.where(split), stack.bank()
    tokens = [encyclopedia.token_states(layer, rows)[0] for layer in stack.layers]
    parts = []
    for start in range(0, len(tokens[0]), CHUNK_TOKENS):
        x_TLD = torch.stack(
            [torch.from_numpy(states[start : start + CHUNK_TOKENS]).float() for states in tokens], dim=1
        )
        parts.append(bank.logits(x_TLD).numpy())
    quantiles_NQ, levels_Q = background_quantiles(np.concatenate(parts))
    return replace(stack, quantiles_NQ=_tensor(quantiles_NQ), levels_Q=_tensor(levels_Q))


def fit_shuffled(
    pool: Pool,
    head: HeadConfig,
    training: TrainingConfig,
    *,
    epochs: int,
    trainer: Callable[[int], pl.Trainer],
    seed: int,
) -> list[list[Head]]:
    """Control lenses: the same fit on labels permuted among the rows of each concept. P lists of one head a layer."""
    num = training.num_shuffles
    permuted = [_permute(pool.labels_SN, pool.weights_SN, seed=seed + 1 + p) for p in range(num)]
    control = replace(
        pool,
        labels_SN=torch.cat(permuted, dim=1),
        weights_SN=(pool.weights_SN > 0).float().repeat(1, num),
        names=[f"{name}#{p}" for p in range(num) for name in pool.names],
    )
    config = replace(training, folds=0, patience=epochs)
    task = build_task(control, head, config, seed=seed)
    with fitting():
        trainer(epochs).fit(task, EncyclopediaDataModule(control, config, seed=seed))
    heads = pool.fold(task.full_fits())
    count = len(pool.names)
    return [[layer.rows(torch.arange(p * count, (p + 1) * count)) for layer in heads] for p in range(num)]


def evaluate_stack(
    stack: LensStack,
    encyclopedia: Encyclopedia,
    *,
    config: EvaluateConfig,
    pool: str = "mean",
    text: AnyText | None = None,
    texts: Sequence[str] | None = None,
    shuffled: list[list[Head]] | None = None,
) -> Evaluation:
    """Figures on the test rows of an encyclopedia, beside the controls.

    Args:
        pool: read by a stack without a pooling of its own, and by the controls.
        texts: what text lenses read of each text of the table, where that is less than the whole.

    Raises:
        DataError: there are no test rows.
    """
    table = encyclopedia.table
    rows = table.where("test")
    if len(rows) == 0:
        raise DataError("no test texts to evaluate on; give rows with split 'test' (or data.test_fraction)")
    column = {name: index for index, name in enumerate(table.concepts)}
    order = [column[name] for name in stack.names]
    labels_SN, weights_SN = (matrix[:, order] for matrix in table.matrices(rows))
    logits_SN = text_level_logits(stack, encyclopedia, rows, pool=pool, wanted_SN=weights_SN > 0)
    scores: dict[str, object] = {"activation": logits_SN}
    if text is not None:
        read = list(texts or table.texts)
        words_SN = text.score([read[row] for row in rows.tolist()])
        scores["text"] = words_SN.numpy()
        if stack.pooling is not None and stack.pooling.both_N3 is not None:
            scores["both"] = stack.pooling.with_text(torch.from_numpy(logits_SN), words_SN).numpy()
    controls = control_scores(encyclopedia, rows, layers=stack.layers, pool=pool, seed=config.seed)
    scores |= {name: said_SN[:, order] for name, said_SN in controls.items()}
    if shuffled:
        x_SLD = pooled_states(encyclopedia, stack.layers, pool, rows)
        scores["shuffled"] = np.stack([_layer_mean(heads, x_SLD, stack) for heads in shuffled])
    return evaluate(
        scores,
        labels=labels_SN,
        weights=weights_SN,
        groups=[table.groups[row] for row in rows],
        concepts=stack.names,
        probabilities=1 / (1 + np.exp(-logits_SN)),
        thresholds={"threshold": stack.threshold_N.numpy(), "threshold_1": stack.threshold_1fpr_N.numpy()},
        slices={name: [values[row] for row in rows] for name, values in table.columns.items()},
        config=config,
    )


def _layer_mean(heads: list[Head], x_SLD: Tensor, stack: LensStack) -> np.ndarray:
    x_SLW = x_SLD if stack.basis is None else stack.basis(x_SLD)
    with torch.no_grad():
        return torch.stack([head(x_SLW[:, layer]) for layer, head in enumerate(heads)]).mean(0).numpy()


def _permute(labels_SN: Tensor, weights_SN: Tensor, *, seed: int) -> Tensor:
    """Labels shuffled among the used rows of each lens."""
    generator = torch.Generator().manual_seed(seed)
    permuted = labels_SN.clone()
    for lens in range(labels_SN.shape[1]):
        rows = (weights_SN[:, lens] > 0).nonzero()[:, 0]
        permuted[rows, lens] = labels_SN[rows[torch.randperm(len(rows), generator=generator)], lens]
    return permuted


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
