"""Timelines with a known story: three acts, one concept each."""

import numpy as np

from ftw.hat.timeline import Timeline

CONCEPTS = ["democracy", "voting", "security", "cheese"]


def timeline_of(values_TN: np.ndarray, *, windows: tuple[int, int] | None = None, num_prompt: int = 3) -> Timeline:
    """A timeline whose probabilities are given for the answer; the prompt has none."""
    num = len(values_TN)
    with np.errstate(divide="ignore"):
        logits = np.log(values_TN / (1 - values_TN)).clip(-20, 20)
    blank = np.full((num_prompt, values_TN.shape[1]), np.nan)
    return Timeline(
        tokens=[f" t{t}" for t in range(num_prompt + num)],
        token_ids=np.arange(num_prompt + num),
        is_prompt=np.arange(num_prompt + num) < num_prompt,
        is_special=np.zeros(num_prompt + num, dtype=bool),
        concepts=CONCEPTS[: values_TN.shape[1]],
        logits_TN=np.concatenate([blank, logits]),
        percentiles_TN=np.full((num_prompt + num, values_TN.shape[1]), np.nan),
        meta={} if windows is None else {"window": windows[0], "stride": windows[1]},
    )


def acts(num: int = 90, seed: int = 0) -> np.ndarray:
    """Three acts of 30 tokens: democracy, voting, security."""
    rng = np.random.default_rng(seed)
    values = rng.uniform(0.02, 0.1, size=(num, 4))
    for act in range(3):
        values[30 * act : 30 * act + 30, act] = rng.uniform(0.85, 0.95, size=30)
    return values


def read_windows(values_TN: np.ndarray, window: int, stride: int) -> np.ndarray:
    """Values at window ends: means over the window; NaN elsewhere."""
    read = np.full(values_TN.shape, np.nan)
    for end in [*range(stride, len(values_TN), stride), len(values_TN)]:
        read[end - 1] = values_TN[max(0, end - window) : end].mean(axis=0)
    return read
