"""Fit the text lenses: the control that every activation lens has to beat, on the same texts and the same marks.

One TF-IDF vectoriser is fitted on the whole training pool; each concept then gets a logistic regression on its own
marked texts. What comes out is a `TextBank` of plain arrays, which needs no scikit-learn to be read.

Axes: S texts, N concepts, V grams, E coefficients that are not zero.
"""

import logging
import warnings
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import joblib
import numpy as np
from rich.progress import track
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from ftw.errors import ConfigError, DataError
from ftw.hat.text import WORDS, TextBank
from ftw.map.samples import SampleTable

log = logging.getLogger(__name__)

MAX_STEPS = 1000


@dataclass(kw_only=True)
class TextConfig:
    """How the text lenses are fitted.

    Attributes:
        ngrams: longest run of words that is a feature. min_df: texts that a gram must stand in.
        max_features: grams kept, the most frequent first; None keeps all.
        sublinear_tf: a gram met c times counts 1 + ln c.
        c: inverse strength of the L2 penalty. class_weight: "balanced", or None for the weights of the marks alone.
    """

    ngrams: int = 2
    c: float = 10.0
    min_df: int = 1
    sublinear_tf: bool = True
    class_weight: str | None = "balanced"
    max_features: int | None = None

    def __post_init__(self) -> None:
        if self.ngrams < 1 or self.min_df < 1 or self.c <= 0:
            raise ConfigError(f"text lenses: ngrams={self.ngrams} and min_df={self.min_df} must be ≥ 1, c={self.c} > 0")
        if self.class_weight not in (None, "balanced"):
            raise ConfigError(f"text lenses: class_weight={self.class_weight!r}; choose balanced or null")


class _Fit(NamedTuple):
    grams: np.ndarray
    coefficients: np.ndarray
    bias: float
    converged: bool


def fit_text_bank(
    table: SampleTable, config: TextConfig | None = None, *, rows: np.ndarray | None = None, progress: bool = True
) -> TextBank:
    """Text lenses of all concepts of a table.

    A concept whose marked texts have one class gets a lens that says 0 (no opinion) on every text; a warning is logged
    with its name. Fits run in threads: the solver leaves Python while it works.

    Args:
        rows: indices of the texts to learn from; None takes the split "train". Folds leave texts out with it.

    Raises:
        DataError: there are no texts, no words in them, or no concept has two classes.
    """
    config = config or TextConfig()
    rows = table.where("train") if rows is None else np.unique(rows)
    vectoriser, features_SV = _features(table, rows, config)
    place = np.full(len(table), -1, dtype=np.int64)
    place[rows] = np.arange(len(rows))
    kept = np.flatnonzero(place[table.rows] >= 0)
    kept = kept[np.argsort(table.cols[kept], kind="stable")]
    edges = np.searchsorted(table.cols[kept], np.arange(len(table.concepts) + 1))
    marks = [kept[start:stop] for start, stop in pairwise(edges)]
    jobs = (
        joblib.delayed(_fit)(features_SV, place[table.rows[mark]], table.labels[mark], table.weights[mark], config)
        for mark in marks
    )
    with warnings.catch_warnings():
        # Told once for all lenses, by name, instead of once a lens.
        warnings.simplefilter("ignore", ConvergenceWarning)
        running = joblib.Parallel(n_jobs=-1, prefer="threads", return_as="generator")(jobs)
        fits: list[_Fit | None] = list(track(running, "text lenses", total=len(marks), disable=not progress))
    _report(table.concepts, fits, config)
    return _bank(table.concepts, fits, vectoriser, config)


def _features(table: SampleTable, rows: np.ndarray, config: TextConfig) -> tuple[TfidfVectorizer, sparse.csr_matrix]:
    """The vectoriser of the pool and the texts as it sees them."""
    vectoriser = TfidfVectorizer(
        ngram_range=(1, config.ngrams),
        token_pattern=WORDS.pattern,
        min_df=config.min_df,
        max_features=config.max_features,
        sublinear_tf=config.sublinear_tf,
    )
    if not len(rows):
        raise DataError("text lenses: no texts to learn from; the sample table needs texts of split 'train'")
    try:
        return vectoriser, sparse.csr_matrix(vectoriser.fit_transform([table.texts[row] for row in rows]))
    except ValueError as error:
        raise DataError(
            f"text lenses: no gram stands in min_df={config.min_df} of the {len(rows)} training texts; lower min_df or "
            f"give texts with words ({error})"
        ) from error


def _fit(
    features_SV: sparse.csr_matrix, rows: np.ndarray, labels: np.ndarray, weights: np.ndarray, config: TextConfig
) -> _Fit | None:
    """One lens on its own texts, or None where they have one class."""
    if len(np.unique(labels)) < 2:
        return None
    features_sV = features_SV[rows]
    # Only the grams that occur: the solver's work vectors are as long as the features are wide.
    occurring, columns = np.unique(features_sV.indices, return_inverse=True)
    features_sv = sparse.csr_matrix((features_sV.data, columns, features_sV.indptr), (len(rows), len(occurring)))
    # The dual coordinate descent of liblinear: with more grams than texts it is the fastest by far, and it calls no
    # BLAS, whose own threads slow parallel fits down by a factor of twenty.
    model = LogisticRegression(
        C=config.c, class_weight=config.class_weight, solver="liblinear", dual=True, max_iter=MAX_STEPS, random_state=0
    )
    model.fit(features_sv, labels, sample_weight=weights)
    return _Fit(
        occurring, np.ravel(model.coef_), float(np.ravel(model.intercept_)[0]), int(np.max(model.n_iter_)) < MAX_STEPS
    )


def _report(concepts: list[str], fits: list[_Fit | None], config: TextConfig) -> None:
    """Say which lenses could not be fitted or were stopped early."""
    missing = [name for name, fit in zip(concepts, fits, strict=True) if fit is None]
    if len(missing) == len(concepts):
        raise DataError(
            f"text lenses: none of {len(concepts)} concepts has positives and negatives among the training texts"
        )
    if missing:
        names = ", ".join(missing[:20])
        log.warning("text lenses: one class only, no opinion on %d concepts: %s", len(missing), names)
    stopped = [name for name, fit in zip(concepts, fits, strict=True) if fit and not fit.converged]
    if stopped:
        words = "text lenses: %d stopped after %d steps with c=%g (a smaller c converges sooner): %s"
        log.warning(words, len(stopped), MAX_STEPS, config.c, ", ".join(stopped[:20]))


def _bank(concepts: list[str], fits: list[_Fit | None], vectoriser: TfidfVectorizer, config: TextConfig) -> TextBank:
    """The fitted lenses as one table with a row per gram."""
    vocabulary = [str(gram) for gram in vectoriser.get_feature_names_out()]
    gram_E = np.concatenate([fit.grams for fit in fits if fit])
    lens_E = np.concatenate([np.full(len(fit.grams), lens) for lens, fit in enumerate(fits) if fit])
    weight_E = np.concatenate([fit.coefficients for fit in fits if fit])
    table_VN = sparse.csr_matrix((weight_E, (gram_E, lens_E)), shape=(len(vocabulary), len(concepts)))
    table_VN.eliminate_zeros()
    table_VN.sort_indices()
    idf_V = np.asarray(vectoriser.idf_)
    return TextBank(
        names=list(concepts),
        vocabulary=vocabulary,
        row_starts=table_VN.indptr.astype(np.int64),
        lenses=table_VN.indices.astype(np.int32),
        numerators=(table_VN.data * np.repeat(idf_V, np.diff(table_VN.indptr))).astype(np.float32),
        bias=np.array([fit.bias if fit else 0.0 for fit in fits], dtype=np.float32),
        idf=idf_V.astype(np.float32),
        ngrams=config.ngrams,
        sublinear_tf=config.sublinear_tf,
    )
