"""The measured recipe: linear lenses on several layers and pools of a text, calibrated out of fold and combined.

1. For each lens, layer and pooled state of its texts (mean of the tokens, last token, ...) a logistic regression; the
   penalty by cross-validation over groups. The lens of the means also reads single tokens: the largest logit counts.
2. Each (layer, pool) is calibrated on out-of-fold rows (Platt). The calibrated logits are combined: by a second,
   strongly penalised logistic regression on them ("stack"), whose weights are close to how well each alone ranks; or by
   the best single pool or all ("choose"); or all alike ("average"). Where positives of siblings are among the
   negatives, they alone decide: a lens's own easy negatives choose wrongly.
3. The combination is itself made out of fold, and calibrated once more on that; the same rows give the thresholds.
4. With fewer than twenty rows of a class nothing is chosen: one penalty, and the average of all layers and pools. With
   fewer than three a lens is the difference of its class means, and is marked.

Sources: Kantamneni et al. 2025, Are sparse autoencoders useful? (benchmark and baselines); Platt 1999, Probabilistic
outputs for support vector machines; Wolpert 1992, Stacked generalization.

Axes: S rows of one lens, N lenses, L layers, P pools, U pools in use, X = L x U, F copies (all rows, then without each
fold), C penalties, D model width, T tokens.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import joblib
import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from ftw.errors import ConfigError, DataError
from ftw.hat.lens import Head
from ftw.hat.pooling import POOLS, STATE_POOLS, Pooling, linear_head
from ftw.hat.store import LensStack
from ftw.map.derived import pooled
from ftw.map.encyclopedia import Encyclopedia
from ftw.map.metrics import auroc
from ftw.map.training.combine import COMBINATIONS, SMALL_PENALTY, Choice, Draft, Lens, finish_lens
from ftw.map.training.lens_rows import LensRows
from ftw.map.training.logistic import Rotated, logistic_columns, logistic_paths, rotate

# From this share of common texts on, one eigenbasis serves all lenses.
SHARED_ROWS = 0.7
# Texts whose tokens are read at once.
BLOCK_TEXTS = 512


@dataclass(frozen=True)
class Solved:
    """A stack with its pooling and thresholds, the choices, and the out-of-fold logits of every lens's own rows."""

    stack: LensStack
    choices: dict[str, Choice]
    held_out: list[np.ndarray]


def solve_recipe(
    encyclopedia: Encyclopedia,
    lenses: Sequence[LensRows],
    *,
    layers: Sequence[int] | None = None,
    pools: Sequence[str] = POOLS,
    combine: str = "stack",
    penalties: Sequence[float] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0),
    folds: int = 4,
    seed: int = 0,
    progress: bool = True,
) -> Solved:
    """Fit, choose and calibrate one lens for each set of rows.

    Args:
        lenses: the training rows of each lens. layers: of those collected; default all.
        pools: what is read; "max" needs states of the rows' tokens.
        combine: "stack", "choose" or "average". penalties: candidates of C.
        folds: groups left out in turn; a lens with fewer groups of a class has fewer.

    Raises:
        DataError: a lens of one class, unknown pools, or "max" without stored tokens of the training texts.
    """
    layers = encyclopedia.spec.layers if layers is None else tuple(layers)
    _check(encyclopedia, lenses, pools, combine)
    others = [pool for pool in STATE_POOLS if pool in pools and pool != "mean"]
    drafts = [_draft(rows, len(layers), encyclopedia.spec.width, others, folds, seed) for rows in lenses]
    with _progress(progress, total=len(lenses) * len(layers)) as bar, _one_thread():
        workers = joblib.Parallel(n_jobs=-1, prefer="threads", return_as="generator_unordered")
        for place, layer in enumerate(layers):
            # The means come always: live reading needs their heads.
            states = {pool: _states(encyclopedia, layer, pool, lenses) for pool in ("mean", *others)}
            jobs = (joblib.delayed(_fit_layer)(draft, states, place, layer, penalties) for draft in drafts)
            for _ in workers(jobs):
                bar()
    if "max" in pools:
        _score_tokens(encyclopedia, drafts, layers, progress=progress)
    made = [finish_lens(draft, [pool for pool in POOLS if pool in pools], combine) for draft in drafts]
    return Solved(
        _stack([draft.rows.name for draft in drafts], layers, drafts, made),
        {draft.rows.name: lens.choice for draft, lens in zip(drafts, made, strict=True)},
        [lens.held_out_S for lens in made],
    )


def shuffled_recipe(
    encyclopedia: Encyclopedia,
    lenses: Sequence[LensRows],
    choices: Mapping[str, Choice],
    *,
    num: int,
    seed: int,
    progress: bool = True,
) -> list[list[Head]]:
    """Control lenses: labels permuted among the rows of each concept, the rest as chosen, read on means of tokens.

    Returns:
        `num` lists of one head a layer.
    """
    layers, width = encyclopedia.spec.layers, encyclopedia.spec.width
    weight_LPND = torch.zeros(len(layers), num, len(lenses), width)
    bias_LPN = torch.zeros(len(layers), num, len(lenses))

    def fit(place: int, lens: int, states: _States) -> None:
        rows = lenses[lens]
        standard, center_D, scale_D = states.standard(rows)
        labels_SP = np.stack(
            [np.random.default_rng([seed, 1 + p, lens]).permutation(rows.labels) for p in range(num)], 1
        )
        penalty = choices[rows.name].penalties.get(f"{layers[place]} mean", 1e-3)
        weight_DP, bias_P = logistic_columns(
            standard, torch.from_numpy(labels_SP), torch.ones(len(rows)), penalty=penalty
        )
        weight_DP = weight_DP / scale_D[:, None]
        weight_LPND[place, :, lens], bias_LPN[place, :, lens] = weight_DP.T, bias_P - center_D @ weight_DP

    with _progress(progress, total=len(lenses) * len(layers), label="shuffled labels") as bar, _one_thread():
        workers = joblib.Parallel(n_jobs=-1, prefer="threads", return_as="generator_unordered")
        for place, layer in enumerate(layers):
            states = _states(encyclopedia, layer, "mean", lenses)
            for _ in workers(joblib.delayed(fit)(place, lens, states) for lens in range(len(lenses))):
                bar()
    return [
        [linear_head(weight_LPND[place, p], bias_LPN[place, p]) for place in range(len(layers))] for p in range(num)
    ]


def _check(encyclopedia: Encyclopedia, lenses: Sequence[LensRows], pools: Sequence[str], combine: str) -> None:
    if combine not in COMBINATIONS:
        raise ConfigError(f"map.training.combine={combine!r}; choose {', '.join(COMBINATIONS)}")
    if not pools or not set(pools) <= set(POOLS):
        raise ConfigError(f"map.training.pools={list(pools)}: choose from {', '.join(POOLS)}")
    poor = [rows for rows in lenses if not (rows.num_positive and rows.num_negative)]
    if poor:
        shown = ", ".join(
            f"{one.name!r} ({one.num_positive} positive, {one.num_negative} negative)" for one in poor[:5]
        )
        raise DataError(
            f"{len(poor)} of {len(lenses)} concepts have training rows of one class only: {shown}; "
            "add the other class or leave them out"
        )
    if "max" in pools and encyclopedia.spec.tokens_per_text.get("train", 0) != -1:
        raise DataError(
            "pool max reads single tokens, which this encyclopedia does not keep of training texts; collect with "
            "map.encyclopedia.tokens_per_text.train=-1, or train with map.training.pools=[mean,last,tail,spread]"
        )


@dataclass(frozen=True)
class _States:
    """States of the texts that lenses learn from; where nearly all lenses learn from the same texts, rotated once."""

    rows: np.ndarray
    states_SD: np.ndarray
    center_D: Tensor | None = None
    scale_D: Tensor | None = None
    rotated: Rotated | None = None

    def of(self, lens: LensRows) -> Tensor:
        """States of one lens's texts, float32 [S, D]."""
        return torch.from_numpy(self.states_SD[np.searchsorted(self.rows, lens.rows)].astype(np.float32))

    def standard(self, lens: LensRows) -> tuple[Tensor | Rotated, Tensor, Tensor]:
        """The same standardised, with centre and scale."""
        if self.rotated is not None and self.center_D is not None and self.scale_D is not None:
            places = torch.from_numpy(np.searchsorted(self.rows, lens.rows))
            return self.rotated.take(places), self.center_D, self.scale_D
        x_SD = self.of(lens)
        center_D, scale_D = x_SD.mean(0), x_SD.std(0).clamp_min(1e-4)
        return (x_SD - center_D) / scale_D, center_D, scale_D


def _states(encyclopedia: Encyclopedia, layer: int, pool: str, lenses: Sequence[LensRows]) -> _States:
    rows = np.unique(np.concatenate([each.rows for each in lenses]))
    states_SD = pooled(encyclopedia, layer, pool, rows)
    if sum(map(len, lenses)) < SHARED_ROWS * len(rows) * len(lenses) or len(lenses) == 1:
        return _States(rows, states_SD)
    x_SD = torch.from_numpy(states_SD.astype(np.float32))
    center_D, scale_D = x_SD.mean(0), x_SD.std(0).clamp_min(1e-4)
    return _States(rows, states_SD, center_D, scale_D, rotate((x_SD - center_D) / scale_D))


def _draft(rows: LensRows, num_layers: int, width: int, others: Sequence[str], folds: int, seed: int) -> Draft:
    num_folds = min(folds, rows.fewest_groups)
    num_folds = num_folds if num_folds > 1 else 0
    return Draft(
        rows=rows,
        folds_S=rows.folds(num_folds, seed),
        num_folds=num_folds,
        token_LFD=torch.zeros(num_layers, num_folds + 1, width),
        token_bias_LF=torch.zeros(num_layers, num_folds + 1),
        other_LD={pool: torch.zeros(num_layers, width) for pool in others},
        other_bias_L={pool: torch.zeros(num_layers) for pool in others},
        held_out_LPS=np.zeros((num_layers, len(POOLS), len(rows)), dtype=np.float32),
    )


def _fit_layer(draft: Draft, states: Mapping[str, _States], place: int, layer: int, penalties: Sequence[float]) -> None:
    """The heads of one lens on one layer."""
    for pool, each in states.items():
        if draft.few:
            weight_DF, bias_F, held_out_S = _difference_of_means(each.of(draft.rows), draft)
        else:
            weight_DF, bias_F, held_out_S, penalty = _logistic(each, draft, penalties)
            draft.penalties[f"{layer} {pool}"] = penalty
        draft.held_out_LPS[place, POOLS.index(pool)] = held_out_S
        if pool == "mean":
            draft.token_LFD[place], draft.token_bias_LF[place] = weight_DF.T, bias_F
        else:
            draft.other_LD[pool][place], draft.other_bias_L[pool][place] = weight_DF[:, 0], bias_F[0]


def _logistic(states: _States, draft: Draft, penalties: Sequence[float]) -> tuple[Tensor, Tensor, np.ndarray, float]:
    """Weights [D, F] and biases [F] on layer-normed states at the penalty of best cross-validated AUROC."""
    standard, center_D, scale_D = states.standard(draft.rows)
    folds_S = torch.from_numpy(draft.folds_S)
    paths = logistic_paths(
        standard,
        torch.from_numpy(draft.rows.labels),
        torch.from_numpy(draft.rows.balanced(draft.rows.weights)),
        folds_S,
        num_folds=draft.num_folds,
        penalties=penalties,
    )
    x_SD = standard.x_SW if isinstance(standard, Rotated) else standard
    held_out_SC = paths.held_out(x_SD, folds_S).numpy()
    best = _best_penalty(held_out_SC, draft, penalties)
    weight_DF = paths.weight_WFC[..., best] / scale_D[:, None]
    bias_F = paths.bias_FC[:, best] - center_D @ weight_DF
    return weight_DF, bias_F, held_out_SC[:, best], float(penalties[best])


def _best_penalty(held_out_SC: np.ndarray, draft: Draft, penalties: Sequence[float]) -> int:
    """Of the highest mean AUROC within folds, the strongest of equals; of few rows the one nearest to 1e-3."""
    if not draft.num_folds or draft.small:
        return int(np.argmin([abs(np.log10(penalty / SMALL_PENALTY)) for penalty in penalties]))
    labels_SC = np.repeat(draft.rows.labels[:, None], held_out_SC.shape[1], axis=1)
    weights_SC = np.repeat(draft.rows.weights[:, None], held_out_SC.shape[1], axis=1)
    areas_FC = np.stack(
        [
            auroc(held_out_SC[inside], labels_SC[inside], weights_SC[inside])
            for inside in (draft.folds_S == fold for fold in range(draft.num_folds))
        ]
    )
    order = np.argsort(penalties)
    return int(order[np.argmax(np.nanmean(areas_FC, axis=0)[order].round(6))])


def _difference_of_means(x_SD: Tensor, draft: Draft) -> tuple[Tensor, Tensor, np.ndarray]:
    """The lens whose logit is +1 at the mean of the positives and -1 at that of the negatives."""
    positive = torch.from_numpy(draft.rows.labels > 0)
    high_D, low_D = x_SD[positive].mean(0), x_SD[~positive].mean(0)
    gap_D = high_D - low_D
    weight_D = 2 * gap_D / (gap_D @ gap_D).clamp_min(1e-12)
    bias = -(weight_D @ (high_D + low_D)) / 2
    copies = draft.num_folds + 1
    return weight_D[:, None].expand(-1, copies), bias.expand(copies), (x_SD @ weight_D + bias).numpy()


def _score_tokens(encyclopedia: Encyclopedia, drafts: list[Draft], layers: tuple[int, ...], *, progress: bool) -> None:
    """Out-of-fold logits of each row's strongest token, block of texts by block."""
    column, num_pool = [], POOLS.index("max")
    wanted: dict[int, list[tuple[int, int]]] = {}
    for lens, draft in enumerate(drafts):
        column.append(np.where(draft.num_folds > 0, draft.folds_S + 1, 0))
        for place, row in enumerate(draft.rows.rows.tolist()):
            wanted.setdefault(row, []).append((lens, place))
    rows = np.array(sorted(wanted))
    blocks = [rows[start : start + BLOCK_TEXTS] for start in range(0, len(rows), BLOCK_TEXTS)]
    with _progress(progress, total=len(blocks) * len(layers), label="strongest tokens") as bar:
        for block in blocks:
            present = sorted({lens for row in block.tolist() for lens, _ in wanted[row]})
            for layer_place, layer in enumerate(layers):
                states, offsets = encyclopedia.token_states(layer, block)
                weight_WD = torch.cat([drafts[lens].token_LFD[layer_place] for lens in present])
                bias_W = torch.cat([drafts[lens].token_bias_LF[layer_place] for lens in present])
                logits_TW = torch.from_numpy(states.astype(np.float32)) @ weight_WD.T + bias_W
                highest_SW = np.maximum.reduceat(logits_TW.numpy(), offsets[:-1], axis=0)
                first = dict(zip(present, np.cumsum([0, *(drafts[n].num_folds + 1 for n in present)]), strict=False))
                for at, row in enumerate(block.tolist()):
                    for lens, place in wanted[row]:
                        copy = first[lens] + int(column[lens][place])
                        drafts[lens].held_out_LPS[layer_place, num_pool, place] = highest_SW[at, copy]
                bar()


def _stack(names: list[str], layers: tuple[int, ...], drafts: list[Draft], made: list[Lens]) -> LensStack:
    places = range(len(layers))
    return LensStack(
        names=names,
        layers=layers,
        heads=[
            linear_head(
                torch.stack([draft.token_LFD[place, 0] for draft in drafts]),
                torch.stack([draft.token_bias_LF[place, 0] for draft in drafts]),
            )
            for place in places
        ],
        scale_NL=_tensor(np.stack([lens.token_scale_L for lens in made])),
        offset_NL=_tensor(np.stack([lens.token_offset_L for lens in made])),
        threshold_N=_tensor(np.array([lens.threshold for lens in made])),
        threshold_1fpr_N=_tensor(np.array([lens.threshold_1fpr for lens in made])).clamp_max(1e30),
        pooling=Pooling(
            heads={
                pool: [
                    linear_head(
                        torch.stack([draft.other_LD[pool][place] for draft in drafts]),
                        torch.stack([draft.other_bias_L[pool][place] for draft in drafts]),
                    )
                    for place in places
                ]
                for pool in drafts[0].other_LD
            },
            scale_NLP=_tensor(np.stack([lens.scale_LP for lens in made])),
            offset_N=_tensor(np.array([lens.offset for lens in made])),
        ),
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Lenses are fitted side by side; threads inside each would only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _progress(shown: bool, *, total: int, label: str = "fitting lenses") -> Iterator[Callable[[], None]]:
    with Progress(transient=True, disable=not shown) as bar:
        task = bar.add_task(label, total=total)
        yield lambda: bar.advance(task)


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
