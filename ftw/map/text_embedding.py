"""Fit text lenses over a sentence encoder: logistic regressions or differences of centroids, all in one bank.

They are fitted, calibrated out of fold and given percentiles as the lenses over words are (`text_control`), on the same
texts and folds; only the features of a text are others.

Axes: S texts, N concepts, D width of embeddings, M marks of one concept.
"""

from dataclasses import replace

import numpy as np
from rich.progress import track
from scipy import sparse

from ftw.errors import DataError
from ftw.hat.text_embedding import EmbeddingBank
from ftw.map.calibrate import background_quantiles
from ftw.map.samples import SampleTable
from ftw.map.text_control import (
    FittedText,
    TextConfig,
    _calibration,
    _Fit,
    _fit_all,
    _Marks,
    _marks,
    _report,
    background_windows,
)
from ftw.substrate.encoder import SentenceEncoder

TEXTS_AT_ONCE = 512


def fit_embedding_lenses(
    table: SampleTable,
    config: TextConfig,
    *,
    rows: np.ndarray | None = None,
    progress: bool = True,
    encoder: SentenceEncoder | None = None,
) -> FittedText:
    """Text lenses of all concepts of a table, as `fit_text_lenses` describes them.

    Args:
        encoder: what embeds; None loads `config.encoder`.

    Raises:
        DataError: there are no texts, or no concept has two classes. SourceError, SubstrateError: no such encoder.
    """
    encoder = encoder or SentenceEncoder.load(config.encoder)
    rows = table.where("train") if rows is None else np.unique(rows)
    if not len(rows):
        raise DataError("text lenses: no texts to learn from; the sample table needs texts of split 'train'")
    embedded_SD = _embedded([table.texts[row] for row in rows], encoder, progress)
    marks = _marks(table, rows, config)
    if config.family == "centroid":
        fits = [_centroids(embedded_SD, part) for part in marks]
    else:
        fits = _fit_all(sparse.csr_matrix(embedded_SD.astype(np.float64)), marks, config, progress)
    _report(table.concepts, fits, config)
    scale_N, offset_N, fitted_N = _calibration(table.concepts, fits, marks, config)
    weights_ND, bias_N = np.zeros((len(fits), encoder.width)), np.zeros(len(fits))
    for lens, fit in enumerate(fits):
        if fit is not None:
            weights_ND[lens, fit.grams], bias_N[lens] = scale_N[lens] * fit.coefficients, scale_N[lens] * fit.bias
    bank = EmbeddingBank(
        names=list(table.concepts),
        weights_ND=weights_ND.astype(np.float32),
        bias=(bias_N + offset_N).astype(np.float32),
        encoder=encoder.name,
        fingerprint=encoder.fingerprint,
        family=config.family,
        is_calibrated=bool(fitted_N.any()),
        given=encoder,
    )
    if windows := background_windows(table, rows, config):
        logits_SN = _embedded(windows, encoder, progress) @ bank.weights_ND.T + bank.bias
        quantiles_NQ, levels_Q = background_quantiles(logits_SN)
        bank = replace(bank, quantiles_NQ=quantiles_NQ, levels_Q=levels_Q.astype(np.float32))
    held_out = [
        scale * fit.held_out_M + offset if fit else np.full(len(part.rows), np.nan)
        for fit, part, scale, offset in zip(fits, marks, scale_N, offset_N, strict=True)
    ]
    return FittedText(bank, held_out)


def _embedded(texts: list[str], encoder: SentenceEncoder, progress: bool) -> np.ndarray:
    """Embeddings of texts, each different one encoded once, float32 [S, D]."""
    different = list(dict.fromkeys(texts))
    parts = [different[start : start + TEXTS_AT_ONCE] for start in range(0, len(different), TEXTS_AT_ONCE)]
    done = [encoder.encode(part).numpy() for part in track(parts, "embed texts", disable=not progress)]
    place = {text: number for number, text in enumerate(different)}
    return np.concatenate(done)[[place[text] for text in texts]]


def _centroids(embedded_SD: np.ndarray, marks: _Marks) -> _Fit | None:
    """The direction from the negatives' centroid to the positives', and its logits on folds that it has not seen."""
    if len(np.unique(marks.labels)) < 2:
        return None
    texts_MD, held_out_M = embedded_SD[marks.rows].astype(np.float64), np.full(len(marks.rows), np.nan)
    for fold in np.unique(marks.folds):
        out_M = marks.folds == fold
        direction_D = _direction(texts_MD, marks, ~out_M)
        if direction_D is not None:
            held_out_M[out_M] = texts_MD[out_M] @ direction_D
    direction_D = _direction(texts_MD, marks, np.ones(len(marks.rows), dtype=bool))
    if direction_D is None:  # all the weight is on one class
        return None
    return _Fit(np.arange(texts_MD.shape[1]), direction_D, 0.0, True, held_out_M)


def _direction(texts_MD: np.ndarray, marks: _Marks, used_M: np.ndarray) -> np.ndarray | None:
    """Unit centroid of the positives minus that of the negatives: cosine to the one minus cosine to the other."""
    units = []
    for label in (1, 0):
        weights_M = np.where(used_M & (marks.labels == label), marks.weights, 0.0)
        mean_D = weights_M @ texts_MD
        length = float(np.linalg.norm(mean_D))
        if not length > 0:
            return None
        units.append(mean_D / length)
    return units[0] - units[1]
