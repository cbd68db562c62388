"""A timeline and an evaluation with everything hostile or missing that the outside can bring."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from ftw.hat.timeline import Timeline

NAMES = [f"concept {index}" for index in range(50)]
HOSTILE = "</span><script>alert(1)</script>\x1b[2J\u202e"


@dataclass
class Figures:
    """What an evaluation is to tables and pictures."""

    concepts: dict[str, dict[str, Any]]
    mean: dict[str, Any]
    notes: list[str] = field(default_factory=list)


@pytest.fixture
def evaluation() -> Figures:
    rng = np.random.default_rng(1)
    concepts: dict[str, dict[str, Any]] = {}
    for name, auroc in zip(NAMES, rng.uniform(0.8, 0.99, len(NAMES)), strict=True):
        concepts[name] = {"auroc": auroc, "auroc_low": auroc - 0.02, "auroc_high": auroc + 0.01, "auroc_text": 0.9}
        concepts[name] |= {"auroc_shuffled": 0.5, "difference": auroc - 0.9, "num_positive": 20, "num_negative": 1200}
    concepts["concept 3"] |= {"auroc": 0.55, "no_better_than": ["text", "shuffled"]}
    concepts["concept 4"] = {"auroc": float("nan"), "num_positive": 0}
    concepts["<i>worst</i>"] = {"auroc": 0.3}
    return Figures(concepts, {"auroc": 0.9, "auroc_text": 0.88, "auroc_shuffled": 0.5}, ["one note"])


@pytest.fixture
def timeline() -> Timeline:
    rng = np.random.default_rng(2)
    tokens = ["<|im_start|>", "Tell", " me", "<|im_end|>", " Whales", " sing", HOSTILE, "\n", " at", " \x07 "]
    tokens += [" sea", "\ud83d"]
    num_tokens, concepts = len(tokens), ["whale", "music", HOSTILE, "$x_1$"]
    logits_TN = rng.normal(0, 1, (num_tokens, 4)).astype(np.float32)
    percentiles_TN = rng.uniform(0, 0.9, (num_tokens, 4)).astype(np.float32)
    percentiles_TN[4, 0], percentiles_TN[5, 1], percentiles_TN[6, 2] = 1.0, 0.995, 1.0
    percentiles_TN[0, 3] = 1.0  # special: never shown
    logits_TN[8] = percentiles_TN[8] = np.nan
    return Timeline(
        tokens=tokens,
        token_ids=np.arange(num_tokens),
        is_prompt=np.arange(num_tokens) < 4,
        is_special=np.isin(np.arange(num_tokens), [0, 3]),
        concepts=concepts,
        logits_TN=logits_TN,
        percentiles_TN=percentiles_TN,
        ms_per_token=np.full(num_tokens, 20.0),
        prompt="Tell me",
        text="Whales sing",
        meta={"layers": [9, 18], "seed": 0},
    )
