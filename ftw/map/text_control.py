"""Fit the text lenses: the control that every activation lens has to beat, on the same texts and the same marks.

One TF-IDF vectoriser is fitted on the whole training pool; each concept then gets a logistic regression on its own
marked texts, and one more without each fold of groups, whose logits on that fold calibrate the first. Windows of
background text give the percentiles. What comes out is a `TextBank` of plain arrays, which needs no scikit-learn to be
read.

Axes: S texts, N concepts, n concepts of one slice, V grams, E coefficients that are not zero, M marks of one concept.
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise
from typing import NamedTuple

import joblib
import numpy as np
from rich.progress import track
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from ftw.errors import ConfigError, DataError
from ftw.hat.text import LONGEST_GRAM, TextBank, grams
from ftw.hat.text_embedding import FAMILIES, AnyText
from ftw.map.calibrate import background_quantiles, fit_platt
from ftw.map.samples import SampleTable
from ftw.map.training.data import group_folds
from ftw.substrate.encoder import DEFAULT

log = logging.getLogger(__name__)

MAX_STEPS, TOLERANCE = 1000, 1e-5
# The solver's linear algebra starts threads of its own for vectors of 10,000 grams, which then fight with ours. A lens
# whose texts have this many grams, repeats counted, may be one of those.
WIDE = 20_000
CELLS_AT_ONCE = 4_000_000  # logits calibrated together: a few matrices of 32 MB
# A lens whose out-of-fold logits run against its labels has nothing to say: its probabilities are held at one half, but
# its texts keep their order, so that as a control it is judged by what it learned.
SMALLEST_SCALE = 1e-3


@dataclass(kw_only=True)
class TextConfig:
    """How the text lenses are fitted.

    Attributes:
        family: "tfidf" (words), "embedding" (logistic regression on sentence embeddings) or "centroid" (cosine to the
            positive minus cosine to the negative texts). encoder: of the latter two: a name in the lock file, a local
            folder or a repository on the Hub. Options of words are of no account to them.
        ngrams: longest run of words that is a feature; 0 for none. chars: shortest and longest run of characters within
            a word, for example [3, 5], which also know pieces of words; empty for none.
        min_df: texts that a gram must stand in. max_features: grams kept, the most frequent first; None keeps all.
        sublinear_tf: a gram met c times counts 1 + ln c.
        c: inverse strength of the L2 penalty. class_weight: "balanced", or None for the weights of the marks alone.
        folds: groups of texts left out in turn to calibrate probabilities, at a base rate of ½ as those of activation
            lenses are; 0 leaves the logits raw. seed: of the folds.
        window_words: words in a window of background text; 0 for no percentiles. num_windows: taken at most.
        kept: share of the weights, over all lenses, that stay: those that move a logit most. Negative texts leave each
            lens thousands of weights that say next to nothing, and they are most of a large pack.
    """

    family: str = "tfidf"
    encoder: str = DEFAULT
    ngrams: int = 2
    chars: list[int] = field(default_factory=list)
    c: float = 10.0
    min_df: int = 1
    sublinear_tf: bool = True
    class_weight: str | None = "balanced"
    max_features: int | None = None
    folds: int = 4
    seed: int = 0
    window_words: int = 24
    num_windows: int = 4096
    kept: float = 1.0

    def __post_init__(self) -> None:
        if self.ngrams < 0 or self.min_df < 1 or self.c <= 0 or self.ngrams > LONGEST_GRAM:
            raise ConfigError(
                f"text lenses: ngrams={self.ngrams} must be 0 to {LONGEST_GRAM}, min_df={self.min_df} ≥ 1 and "
                f"c={self.c} > 0"
            )
        if self.chars and not (len(self.chars) == 2 and 1 <= self.chars[0] <= self.chars[1] <= LONGEST_GRAM):
            raise ConfigError(f"text lenses: chars={self.chars}; give the shortest and the longest run, as in [3, 5]")
        if not self.ngrams and not self.chars:
            raise ConfigError("text lenses: ngrams=0 and no chars leave no features; set one of them")
        if self.family not in ("tfidf", *FAMILIES):
            raise ConfigError(f"text lenses: family={self.family!r}; choose tfidf, {', '.join(FAMILIES)}")
        if self.class_weight not in (None, "balanced"):
            raise ConfigError(f"text lenses: class_weight={self.class_weight!r}; choose balanced or null")
        if self.folds == 1 or self.folds < 0:
            raise ConfigError(f"text lenses: folds={self.folds}; choose 2 or more, or 0 for uncalibrated logits")
        if not 0 < self.kept <= 1:
            raise ConfigError(f"text lenses: kept={self.kept}; give a share of the weights, above 0 and at most 1")
        if self.window_words < 0 or self.num_windows < 1:
            raise ConfigError(
                f"text lenses: window_words={self.window_words} must be ≥ 0 and num_windows={self.num_windows} ≥ 1"
            )

    @property
    def char_range(self) -> tuple[int, int] | None:
        """Shortest and longest run of characters, or None."""
        return (self.chars[0], self.chars[1]) if self.chars else None


class _Fit(NamedTuple):
    """One lens: its coefficients, and out-of-fold logits of its own marks (NaN where no fold could give one)."""

    grams: np.ndarray
    coefficients: np.ndarray
    bias: float
    converged: bool
    held_out_M: np.ndarray


class _Marks(NamedTuple):
    """The texts of one lens: places in the pool, labels, weights, folds."""

    rows: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    folds: np.ndarray


class FittedText(NamedTuple):
    """Text lenses, and the calibrated out-of-fold logits of each one's marked texts (NaN where no fold gave one)."""

    bank: AnyText
    held_out: list[np.ndarray]


def fit_text_bank(
    table: SampleTable, config: TextConfig | None = None, *, rows: np.ndarray | None = None, progress: bool = True
) -> AnyText:
    """The bank of `fit_text_lenses`."""
    return fit_text_lenses(table, config, rows=rows, progress=progress).bank


def fit_text_lenses(
    table: SampleTable, config: TextConfig | None = None, *, rows: np.ndarray | None = None, progress: bool = True
) -> FittedText:
    """Text lenses of all concepts of a table, calibrated out of fold, with quantiles on background text.

    A concept whose marked texts have one class gets a lens that says 0 (no opinion) on every text; a warning is logged
    with its name. The same table and config give the same bank.

    Args:
        rows: indices of the texts to learn from; None takes the split "train". Folds leave texts out with it.

    Raises:
        DataError: there are no texts, no words in them, or no concept has two classes.
    """
    config = config or TextConfig()
    if config.family in FAMILIES:
        # Imported here: it fits with what stands below.
        from ftw.map.text_embedding import fit_embedding_lenses

        return fit_embedding_lenses(table, config, rows=rows, progress=progress)
    rows = table.where("train") if rows is None else np.unique(rows)
    vectoriser, features_SV = _features(table, rows, config)
    marks = _marks(table, rows, config)
    fits = _fit_all(features_SV, marks, config, progress)
    _report(table.concepts, fits, config)
    bank = _bank(table.concepts, fits, vectoriser, config)
    if config.kept < 1:
        bank = slimmed(bank, features_SV, config.kept)
    scale_N, offset_N, fitted_N = _calibration(bank.names, fits, marks, config)
    if fitted_N.any():
        bank = bank.calibrated(scale_N, offset_N)
    held_out = [
        scale * fit.held_out_M + offset if fit else np.full(len(part.rows), np.nan)
        for fit, part, scale, offset in zip(fits, marks, scale_N, offset_N, strict=True)
    ]
    return FittedText(_with_background(bank, table, rows, config), held_out)


def window_texts(texts: Sequence[str], *, words: int, limit: int) -> list[str]:
    """Windows of at most `words` words over texts, one ending at each word; `limit` of them, evenly spaced.

    Like the windows read live they are short where a text begins.
    """
    split = [text.split() for text in texts]
    edges = np.cumsum([0, *(len(parts) for parts in split)])
    ends = np.unique(np.linspace(0, edges[-1] - 1, min(limit, int(edges[-1]))).round().astype(np.int64))
    numbers = np.searchsorted(edges, ends, side="right") - 1
    return [
        " ".join(split[number][max(0, end + 1 - words) : end + 1])
        for number, end in zip(numbers.tolist(), (ends - edges[numbers]).tolist(), strict=True)
    ]


def with_percentiles(bank: TextBank, windows: Sequence[str]) -> TextBank:
    """The bank with quantiles of its logits on windows of background text, cut as they are cut where it is used.

    Raises:
        DataError: there are no windows.
    """
    quantiles_NQ, levels_Q = background_quantiles(bank.score(windows).numpy())
    return replace(bank, quantiles_NQ=quantiles_NQ, levels_Q=levels_Q.astype(np.float32))


def slimmed(bank: TextBank, features_SV: sparse.csr_matrix, kept: float) -> TextBank:
    """The bank with the share `kept` of its weights: those with the largest |coefficient| · root mean square of tf-idf.

    One limit holds for all lenses, so that a broad concept keeps more weights than a narrow one. What is left out adds
    its mean over the texts to the intercept; norms are those of the whole vocabulary, as before.

    Args:
        features_SV: tf-idf of the texts the bank was fitted on, by rows of its vocabulary.
    """
    assert bank.idf is not None  # lenses that share a vocabulary
    idf_V = bank.idf.astype(np.float64)
    mean_V = np.asarray(features_SV.mean(axis=0)).ravel() / idf_V
    size_V = np.sqrt(np.asarray(features_SV.power(2).mean(axis=0)).ravel()) / idf_V
    length_V = np.diff(bank.row_starts)
    moves_E = np.abs(bank.numerators) * np.repeat(size_V, length_V).astype(np.float32)
    num_dropped = len(moves_E) - max(1, round(kept * len(moves_E)))
    limit = np.partition(moves_E, num_dropped)[num_dropped]
    kept_E = moves_E >= limit
    dropped_E = np.where(kept_E, 0, bank.numerators * np.repeat(mean_V, length_V))
    bias_N = bank.bias + np.bincount(bank.lenses, dropped_E, minlength=len(bank))
    before_E = np.concatenate([[0], np.cumsum(kept_E)])
    return replace(
        bank,
        row_starts=before_E[bank.row_starts].astype(np.int64),
        lenses=bank.lenses[kept_E],
        numerators=bank.numerators[kept_E],
        bias=bias_N.astype(np.float32),
    )


def _with_background(bank: TextBank, table: SampleTable, rows: np.ndarray, config: TextConfig) -> TextBank:
    windows = background_windows(table, rows, config)
    return with_percentiles(bank, windows) if windows else bank


def background_windows(table: SampleTable, rows: np.ndarray, config: TextConfig) -> list[str]:
    """Windows of the split "background"; without one of the training texts, as for activation lenses; or none."""
    background = table.where("background")
    texts = [table.texts[row] for row in (background if len(background) else rows)]
    return window_texts(texts, words=config.window_words, limit=config.num_windows) if config.window_words else []


def _marks(table: SampleTable, rows: np.ndarray, config: TextConfig) -> list[_Marks]:
    """The marks of each concept on the texts of the pool."""
    place = np.full(len(table), -1, dtype=np.int64)
    place[rows] = np.arange(len(rows))
    # The same folds as those of activation lenses with this seed and number.
    folds = group_folds([table.groups[row] for row in rows], config.folds, config.seed)
    kept = np.flatnonzero(place[table.rows] >= 0)
    kept = kept[np.argsort(table.cols[kept], kind="stable")]
    edges = np.searchsorted(table.cols[kept], np.arange(len(table.concepts) + 1))
    marks = [kept[start:stop] for start, stop in pairwise(edges)]
    places = [place[table.rows[mark]] for mark in marks]
    return [
        _Marks(at, table.labels[mark], table.weights[mark], folds[at]) for at, mark in zip(places, marks, strict=True)
    ]


def _features(table: SampleTable, rows: np.ndarray, config: TextConfig) -> tuple[TfidfVectorizer, sparse.csr_matrix]:
    """The vectoriser of the pool and the texts as it sees them."""
    vectoriser = TfidfVectorizer(
        # The function that cuts texts at run time cuts them here (the type stubs know names of analyzers alone).
        analyzer=lambda text: grams(text, config.ngrams, config.char_range),  # pyright: ignore[reportArgumentType]
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


def _fit_all(
    features_SV: sparse.csr_matrix, marks: list[_Marks], config: TextConfig, progress: bool
) -> list[_Fit | None]:
    """All lenses: those of few grams side by side in threads, then the others one by one."""
    size_S = np.diff(features_SV.indptr)
    wide = {lens for lens, part in enumerate(marks) if size_S[part.rows].sum() > WIDE}
    narrow = [lens for lens in range(len(marks)) if lens not in wide]
    fits: dict[int, _Fit | None] = {}
    with warnings.catch_warnings():
        # Told once for all lenses, by name, instead of once a lens.
        warnings.simplefilter("ignore", ConvergenceWarning)
        jobs = (joblib.delayed(_fit)(features_SV, marks[lens], config) for lens in narrow)
        running = joblib.Parallel(n_jobs=-1, prefer="threads", return_as="generator")(jobs)
        solved = chain(zip(narrow, running, strict=True), ((n, _fit(features_SV, marks[n], config)) for n in wide))
        for lens, fit in track(solved, "text lenses", total=len(marks), disable=not progress):
            fits[lens] = fit
    return [fits[lens] for lens in range(len(marks))]


def _fit(features_SV: sparse.csr_matrix, marks: _Marks, config: TextConfig) -> _Fit | None:
    """One lens on its own texts, or None where they have one class."""
    if len(np.unique(marks.labels)) < 2:
        return None
    features_MV = features_SV[marks.rows]
    # Only the grams that occur: the solver's work vectors are as long as the features are wide.
    occurring, columns = np.unique(features_MV.indices, return_inverse=True)
    features_Mv = sparse.csr_matrix((features_MV.data, columns, features_MV.indptr), (len(marks.rows), len(occurring)))
    held_out_M = np.full(len(marks.rows), np.nan)
    for fold in range(config.folds):
        out_M = marks.folds == fold
        if out_M.any() and len(np.unique(marks.labels[~out_M])) == 2:
            model = _solve(features_Mv[~out_M], marks.labels[~out_M], marks.weights[~out_M], config)
            held_out_M[out_M] = model.decision_function(features_Mv[out_M])
    model = _solve(features_Mv, marks.labels, marks.weights, config)
    converged = int(np.max(model.n_iter_)) < MAX_STEPS
    return _Fit(occurring, np.ravel(model.coef_), float(np.ravel(model.intercept_)[0]), converged, held_out_M)


def _solve(
    features_Mv: sparse.csr_matrix, labels_M: np.ndarray, weights_M: np.ndarray, config: TextConfig
) -> LogisticRegression:
    # Newton steps in the primal: nothing is drawn at random. The dual solver of liblinear draws from one generator for
    # the whole process, so that lenses fitted in threads would not come out the same twice.
    model = LogisticRegression(
        C=config.c, class_weight=config.class_weight, solver="liblinear", tol=TOLERANCE, max_iter=MAX_STEPS
    )
    return model.fit(features_Mv, labels_M, sample_weight=weights_M)


def _calibration(
    names: list[str], fits: list[_Fit | None], marks: list[_Marks], config: TextConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Platt's scale and offset of the out-of-fold logits, and who has some; a lens without stays raw, at 1 and 0."""
    scale_N, offset_N, fitted_N = np.ones(len(names)), np.zeros(len(names)), np.zeros(len(names), dtype=bool)
    for lenses, logits_Mn, labels_Mn, weights_Mn in _held_out(fits, marks):
        try:
            platt = fit_platt(logits_Mn, labels_Mn, weights_Mn, prior=0.5)
        except DataError:
            continue  # none of this slice can be calibrated; all that cannot are named below
        backwards_n = platt.fitted_N & (platt.scale_N < SMALLEST_SCALE)
        scale_N[lenses] = np.where(backwards_n, SMALLEST_SCALE, platt.scale_N)
        offset_N[lenses] = np.where(backwards_n, 0.0, platt.offset_N)
        fitted_N[lenses] = platt.fitted_N
    raw = [name for name, fit, fitted in zip(names, fits, fitted_N, strict=True) if fit and not fitted]
    if raw and config.folds:
        words = "text lenses: %d are not calibrated, for want of groups with positives and negatives: %s"
        log.warning(words, len(raw), ", ".join(raw[:20]))
    return scale_N, offset_N, fitted_N


def _held_out(
    fits: list[_Fit | None], marks: list[_Marks]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Slices of lenses with their out-of-fold logits, labels and weights, one column a lens, padded with weight 0.

    Lenses with about as many marks come together, so that one with very many does not stretch the columns of all.
    """
    usable = [lens for lens, fit in enumerate(fits) if fit and np.isfinite(fit.held_out_M).any()]
    order, start = sorted(usable, key=lambda lens: -len(marks[lens].rows)), 0
    while start < len(order):
        height = len(marks[order[start]].rows)
        lenses = np.array(order[start : start + max(1, CELLS_AT_ONCE // height)])
        logits_Mn, labels_Mn, weights_Mn = (np.zeros((height, len(lenses))) for _ in range(3))
        for column, lens in enumerate(lenses):
            fit, part = fits[lens], marks[lens]
            assert fit is not None
            known_M, size = np.isfinite(fit.held_out_M), len(part.rows)
            logits_Mn[:size, column] = np.where(known_M, fit.held_out_M, 0)
            labels_Mn[:size, column], weights_Mn[:size, column] = part.labels, np.where(known_M, part.weights, 0)
        yield lenses, logits_Mn, labels_Mn, weights_Mn
        start += len(lenses)


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
        chars=config.char_range,
        sublinear_tf=config.sublinear_tf,
    )
