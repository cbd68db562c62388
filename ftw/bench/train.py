"""`ftw bench train`: lenses a second in closed form, against a loop of scikit-learn's logistic regressions.

Both learn from the same marks and are judged on the same held-out texts. Without an encyclopedia the samples are made
up: a text's state is its concept's direction among features of very unequal size, as a language model's are.

Axes: S texts, N lenses, L layers, D model width, E marks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from ftw.bench.measure import Row, Stopwatch
from ftw.bench.synthetic import NUM_LENSES, WIDTH
from ftw.map import metrics
from ftw.map.encyclopedia import Encyclopedia
from ftw.map.training.solver import solve_stack
from ftw.map.training.sparse import Marks, SparsePool, read_sparse_pool

FOLDS, POSITIVES, NEGATIVES, TEST_TEXTS = 3, 6, 60, 3  # a concept; the last: texts to be judged on
STRENGTH = 0.35  # of a concept's direction, for lenses neither perfect nor poor
TIMED_LENSES, ROUNDS = 100, 3


@dataclass(frozen=True, kw_only=True, eq=False)
class Samples:
    """What both learn from, and held-out texts to judge them on.

    Attributes:
        pool: training rows. test_SLD: states. labels_SN, weights_SN: what is true of them.
    """

    pool: SparsePool
    test_SLD: np.ndarray
    labels_SN: np.ndarray
    weights_SN: np.ndarray

    def auroc(self, logits_SN: np.ndarray, lenses: Sequence[int]) -> float:
        """Mean over some lenses, those without both classes left out."""
        area_N = metrics.auroc(logits_SN, self.labels_SN[:, lenses], self.weights_SN[:, lenses])
        return float(np.nanmean(area_N))


def train_rows(watch: Stopwatch) -> Iterator[Row]:
    """All rows of the bench."""
    samples = _collected(watch) if watch.config.encyclopedia else made_up_samples(watch)
    pool, num = samples.pool, len(samples.pool.names)
    random = np.random.default_rng(watch.config.seed)
    timed = np.sort(random.permutation(num)[: watch.size(TIMED_LENSES, 5)]).tolist()
    solved, fitted = [], []

    def solve() -> None:
        solved.append(solve_stack(pool, seed=watch.config.seed, progress=False))

    def fit() -> None:
        fitted.append(logits_one_by_one(samples, timed))

    times = watch.times({"case": solve, "baseline": fit}, rounds=watch.size(ROUNDS, 1))
    ms, baseline_ms = float(np.median(times["case"])) / num, float(np.median(times["baseline"])) / len(timed)
    bank = solved[-1].bank()
    ours_SN = bank.logits(torch.from_numpy(samples.test_SLD)).numpy()[:, timed]
    yield Row(
        case="train a lens, closed form, three folds for calibration",
        n=num,
        d=pool.states_SLD.shape[-1],
        ms=ms,
        baseline="LogisticRegression, no folds, no calibration",
        baseline_ms=baseline_ms,
        more={
            "layers": len(pool.layers),
            "lenses_per_second": 1000 / ms,
            "baseline_lenses_per_second": 1000 / baseline_ms,
            "auroc": samples.auroc(ours_SN, timed),
            "baseline_auroc": samples.auroc(fitted[-1], timed),
            "baseline_lenses": len(timed),
            "texts": len(pool.states_SLD),
            "marks": len(pool.marks.rows_E),
        },
    )


def logits_one_by_one(samples: Samples, lenses: Sequence[int]) -> np.ndarray:
    """Logits on the held-out texts by a logistic regression for each lens and layer, mean over layers: [S, n]."""
    pool = samples.pool
    states_SLD = pool.states_SLD.astype(np.float32)
    center_LD, scale_LD = states_SLD.mean(0), states_SLD.std(0).clip(1e-4)
    train_SLD, test_SLD = ((x_SLD - center_LD) / scale_LD for x_SLD in (states_SLD, samples.test_SLD))
    logits_SN = np.zeros((len(test_SLD), len(lenses)), dtype=np.float32)
    for place, lens in enumerate(lenses):
        marks = pool.marks.part(lens, lens + 1)
        for layer in range(len(pool.layers)):
            classifier = LogisticRegression(class_weight="balanced", max_iter=1000)
            classifier.fit(train_SLD[marks.rows_E, layer], marks.positive_E, sample_weight=marks.weights_E)
            logits_SN[:, place] += classifier.decision_function(test_SLD[:, layer]) / len(pool.layers)
    return logits_SN


def made_up_samples(watch: Stopwatch) -> Samples:
    """One layer of states around random directions, each concept with a few positives and negatives of others."""
    random = np.random.default_rng(watch.config.seed)
    num, width = watch.size(NUM_LENSES, 12), watch.size(WIDTH, 32)
    spread_D = np.arange(1, width + 1) ** -0.5
    direction_ND = random.normal(size=(num, width)) * STRENGTH

    def drawn(concept_S: np.ndarray) -> np.ndarray:
        states_SD = (direction_ND[concept_S] + random.normal(size=(len(concept_S), width))) * spread_D
        return ((states_SD - states_SD.mean(1, keepdims=True)) / states_SD.std(1, keepdims=True))[:, None]

    concept_S = random.permutation(np.repeat(np.arange(num), POSITIVES))
    marks = _marks(concept_S, num, random)
    test_S = np.repeat(np.arange(num), TEST_TEXTS)
    pool = SparsePool(
        states_SLD=drawn(concept_S).astype(np.float16),
        marks=marks,
        fold_starts_K=np.linspace(0, len(concept_S), FOLDS + 1).astype(np.int64),
        names=[f"concept {n}" for n in range(num)],
        layers=(0,),
    )
    labels_SN = (test_S[:, None] == np.arange(num)).astype(np.float32)
    return Samples(
        pool=pool,
        test_SLD=drawn(test_S).astype(np.float32),
        labels_SN=labels_SN,
        weights_SN=np.ones_like(labels_SN),
    )


def _marks(concept_S: np.ndarray, num: int, random: np.random.Generator) -> Marks:
    """Every text a positive of its concept, and some texts of others negatives of each."""
    rows, positive = [], []
    own_of = np.split(np.argsort(concept_S, kind="stable"), num)
    for own in own_of:
        others = np.setdiff1d(random.choice(len(concept_S), min(NEGATIVES, len(concept_S) // 2), replace=False), own)
        row = np.sort(np.concatenate([own, others]))
        rows.append(row)
        positive.append(np.isin(row, own))
    sizes = [len(row) for row in rows]
    return Marks(
        rows_E=np.concatenate(rows).astype(np.int32),
        positive_E=np.concatenate(positive),
        weights_E=np.ones(sum(sizes), dtype=np.float32),
        starts_N=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
    )


def _collected(watch: Stopwatch) -> Samples:
    """The rows of an encyclopedia."""
    with Encyclopedia.open(str(watch.config.encyclopedia)) as encyclopedia:
        pool = read_sparse_pool(encyclopedia, folds=FOLDS, seed=watch.config.seed)
        rows = encyclopedia.table.where("test")
        labels_SN, weights_SN = encyclopedia.table.matrices(rows)
        states = [encyclopedia.pooled(layer, pool.pool, rows).astype(np.float32) for layer in pool.layers]
    return Samples(pool=pool, test_SLD=np.stack(states, axis=1), labels_SN=labels_SN, weights_SN=weights_SN)
