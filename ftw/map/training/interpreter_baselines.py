"""What an interpreter must beat, on the same rows: a linear softmax, nearest means, and TF-IDF on the texts.

The linear softmax is fitted twice: to the standardised states, and to the states along the directions of the
interpreter's direct path, so that what these alone are worth is seen. Every choice (epoch, weight decay, vectoriser) is
made on the validation rows, as the interpreter's are, and every system's temperature too.

Axes: S rows, A rows that are asked about (validation and test), F features, C concepts.
"""

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from ftw.map.training.interpreter import softmax_temperature
from ftw.map.training.interpreter_data import DEV, TEST, TRAIN, InterpreterRows
from ftw.map.training.interpreter_directions import find_directions, slot_states

EPOCHS, PATIENCE, BATCH, RATE = 20, 2, 512, 1e-3
DECAYS = (0.01, 0.3, 1.0)
SHRINKAGE = 0.01
WHITENED = "linear, whitened"
SHARPEST = 64.0  # a cosine as a logit; the temperature does the rest


def baselines(rows: InterpreterRows, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Probabilities of every baseline for the test rows, [rows, C], in their order.

    Rows without a validation part are chosen on the training rows.
    """
    num_dev = len(rows.where(DEV))
    asked = np.concatenate([rows.where(DEV), rows.where(TEST)])
    judge = _Judge(rows.select(asked[:num_dev]))
    systems: dict[str, Callable[[], Tensor]] = {
        "linear softmax": lambda: linear_softmax(rows, asked, judge, _features(rows), seed=seed),
        WHITENED: lambda: linear_softmax(rows, asked, judge, _whitened(rows), seed=seed),
        "nearest mean": lambda: nearest_mean(rows, asked),
    }
    if any(rows.texts):
        systems["TF-IDF"] = lambda: tfidf(rows, asked, judge)
    found = {}
    for name, system in systems.items():
        logits_AC = system()
        if num_dev:
            logits_AC = logits_AC / softmax_temperature(logits_AC[:num_dev], judge.rows)[1]
        found[name] = logits_AC[num_dev:].softmax(-1).numpy()
    return found | {"chance": np.full((len(asked) - num_dev, len(rows.names)), 1 / len(rows.names), np.float32)}


class _Judge:
    """Keeps the best of several logits by their top-1 on the validation rows, kinds weighing the same."""

    def __init__(self, rows: InterpreterRows) -> None:
        self.rows = rows
        self._best, self._logits = -1.0, torch.empty(0)

    def share(self, logits_AC: Tensor) -> float:
        """Top-1 on the validation rows, kinds weighing the same; these logits are kept if none before were better.

        Without validation rows the latest are kept.
        """
        right = (logits_AC[: len(self.rows)].argmax(1) == self.rows.labels_S).double()
        kinds = np.asarray(self.rows.kinds)
        share = float(np.mean([right[kinds == kind].mean() for kind in set(self.rows.kinds)])) if len(kinds) else 0.0
        if share > self._best or not len(kinds):
            self._best, self._logits = share, logits_AC
        return share

    def best(self) -> Tensor:
        """The best logits; the next system begins anew."""
        logits, self._best, self._logits = self._logits, -1.0, torch.empty(0)
        return logits


def linear_softmax(
    rows: InterpreterRows, asked: np.ndarray, judge: _Judge, features_SF: Tensor, *, seed: int = 0
) -> Tensor:
    """Logits [A, C] of one linear layer on all states of a row side by side; decay and epoch by validation."""
    train = torch.from_numpy(rows.where(TRAIN))
    asked_AF = features_SF[torch.from_numpy(asked)]
    for decay in DECAYS:
        layer = nn.Linear(features_SF.shape[1], len(rows.names))
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=RATE, weight_decay=decay, fused=True)
        best, worse = -1.0, 0
        for epoch in range(EPOCHS):
            order = torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(len(train)))
            for part in train[order].split(BATCH):
                with _fast():
                    logits_BC = layer(features_SF[part])
                losses_B = nn.functional.cross_entropy(logits_BC.float(), rows.labels_S[part], reduction="none")
                optimizer.zero_grad()
                (losses_B * rows.weights[part]).mean().backward()
                optimizer.step()
            with torch.no_grad(), _fast():
                share = judge.share(layer(asked_AF).float())
            best, worse = (share, 0) if share > best else (best, worse + 1)
            if worse == PATIENCE and len(judge.rows):
                break
    return judge.best()


def nearest_mean(rows: InterpreterRows, asked: np.ndarray) -> Tensor:
    """Cosine to the mean of each concept's training rows, states standardised, as logits [A, C]."""
    features_SF, train = _features(rows), torch.from_numpy(rows.where(TRAIN))
    means_CF = torch.zeros(len(rows.names), features_SF.shape[1])
    means_CF.index_add_(0, rows.labels_S[train], features_SF[train].float() * rows.weights[train].unsqueeze(1))
    asked_AF = nn.functional.normalize(features_SF[torch.from_numpy(asked)].float(), dim=1)
    return SHARPEST * asked_AF @ nn.functional.normalize(means_CF, dim=1).T


def tfidf(rows: InterpreterRows, asked: np.ndarray, judge: _Judge) -> Tensor:
    """Cosine to the mean TF-IDF vector of each concept, or complement naive Bayes: what is best in validation."""
    from scipy.sparse import csr_matrix
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.naive_bayes import ComplementNB
    from sklearn.preprocessing import normalize

    train, num = rows.where(TRAIN), len(rows.names)
    labels = rows.labels_S.numpy()[train]
    for stop_words, longest in (("english", 1), ("english", 2), (None, 1)):
        vectoriser = TfidfVectorizer(sublinear_tf=True, stop_words=stop_words, ngram_range=(1, longest))
        known = vectoriser.fit_transform([rows.texts[row] for row in train])
        texts = vectoriser.transform([rows.texts[row] for row in asked])
        shares = csr_matrix((rows.weights.numpy()[train], (labels, np.arange(len(train)))), (num, len(train)))
        means = csr_matrix(normalize(shares @ known))
        found = [SHARPEST * (texts @ means.T).toarray()]
        for alpha in (0.03, 0.3):
            model = ComplementNB(alpha=alpha).fit(known, labels)
            found.append(np.full((len(asked), num), -1e4))
            found[-1][:, model.classes_] = model.predict_log_proba(texts)
        for logits in found:
            judge.share(torch.from_numpy(logits.astype(np.float32)))
    return judge.best()


def _features(rows: InterpreterRows) -> Tensor:
    """States of a row side by side, standardised by the training rows, in bfloat16; the mean of a text's tokens."""
    states_SJD, center_JD, scale_JD = _standards(rows)
    return ((states_SJD - center_JD) / scale_JD).flatten(1).bfloat16()


def _whitened(rows: InterpreterRows) -> Tensor:
    """All of a row's states along the directions of an interpreter's direct path, as many as there are, in bfloat16."""
    states_SJD, center_JD, scale_JD = _standards(rows)
    num = min(len(rows.names) - 1, center_JD.numel())
    directions_JDR = find_directions(rows, center_JD, scale_JD, num=num, shrinkage=SHRINKAGE).directions_JDR
    features_SR = ((states_SJD - center_JD) / scale_JD).flatten(1) @ directions_JDR.flatten(0, 1)
    return (features_SR / features_SR.std().clamp_min(1e-3)).bfloat16()


def _standards(rows: InterpreterRows) -> tuple[Tensor, Tensor, Tensor]:
    """States by slot, and by the training rows their center and scale."""
    states_SJD, train = slot_states(rows, torch.arange(len(rows))), torch.from_numpy(rows.where(TRAIN))
    return states_SJD, states_SJD[train].mean(0), states_SJD[train].std(0).clamp_min(1e-3)


@contextlib.contextmanager
def _fast() -> Iterator[None]:
    """The arithmetic that the interpreter has."""
    with torch.autocast("cpu", torch.bfloat16):
        yield
