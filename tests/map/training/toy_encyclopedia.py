"""An encyclopedia of synthetic states whose labels are drawn from a known logistic model."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ftw.map.encyclopedia import CaptureSpec, Encyclopedia, ShardStates
from ftw.map.samples import SampleTable

LAYERS, WIDTH, TOKENS = (1, 3), 8, 3


@dataclass(frozen=True)
class Sizes:
    """Texts by split."""

    train: int = 240
    test: int = 120
    background: int = 60


def table(sizes: Sizes, states: np.ndarray, concepts: int, sharpness: float, seed: int) -> SampleTable:
    """Every training and test text is marked for every concept; P(1) = σ(sharpness · direction · state)."""
    rng = np.random.default_rng([seed, 1])
    splits = ["train"] * sizes.train + ["test"] * sizes.test + ["background"] * sizes.background
    width = states.shape[1]
    directions = rng.normal(size=(concepts, width)) / np.sqrt(width)
    chance = 1 / (1 + np.exp(-sharpness * states @ directions.T))
    labels = (rng.random(chance.shape) < chance)[: sizes.train + sizes.test]
    rows, cols = np.indices(labels.shape)
    texts = [f"text {number} of {split}" for number, split in enumerate(splits)]
    return SampleTable(
        texts=texts,
        groups=texts,
        splits=splits,
        sources=["given"] * len(texts),
        concepts=[f"c{n}" for n in range(concepts)],
        rows=rows.reshape(-1).astype(np.int32),
        cols=cols.reshape(-1).astype(np.int32),
        labels=labels.reshape(-1).astype(np.int8),
        weights=np.ones(labels.size, dtype=np.float32),
        columns={"parity": [str(number % 2) for number in range(len(texts))]},
    )


def toy_encyclopedia(
    folder: Path,
    *,
    sizes: Sizes = Sizes(),
    concepts: int = 3,
    sharpness: float = 4.0,
    kept: Mapping[str, int] = {"train": 0, "test": 0, "background": -1},
    seed: int = 0,
    width: int = WIDTH,
    fingerprint: str = "0" * 64,
) -> Encyclopedia:
    """Both layers hold the same signal; `kept` says of which splits token states are kept."""
    rng = np.random.default_rng(seed)
    num = sizes.train + sizes.test + sizes.background
    states = rng.normal(size=(num, width))
    samples = table(sizes, states, concepts, sharpness, seed)
    spec = CaptureSpec(
        substrate_name="toy",
        fingerprint=fingerprint,
        layers=LAYERS,
        width=width,
        pools=("mean",),
        tokens_per_text=dict(kept),
        max_tokens=16,
        batch_tokens=64,
        precision="float32",
        shard_texts=num,
    )
    counts = np.array([TOKENS if kept.get(split, 0) else 0 for split in samples.splits])
    total = int(counts.sum())
    further = {}
    if any(kept.values()):
        further = {
            "tokens": {layer: rng.normal(size=(total, width)).astype(np.float16) for layer in LAYERS},
            "offsets": np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            "positions": np.tile(np.arange(TOKENS), total // TOKENS).astype(np.int32),
        }
    store = Encyclopedia.create(folder, samples, spec)
    pooled = {layer: (states + rng.normal(scale=0.3, size=states.shape)).astype(np.float16) for layer in LAYERS}
    store.write_shard(0, ShardStates(num_tokens=np.full(num, TOKENS), pooled={"mean": pooled}, **further))
    return store
