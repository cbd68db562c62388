"""What a growing encyclopedia holds, and what the next stage would cost.

Axes: N concepts.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ftw.map.estimate import readable_bytes, readable_seconds
from ftw.map.growing.plan import STAGES
from ftw.map.growing.store import GrowingEncyclopedia

# Mean tokens of a text of each stage, and how many tokens are generated for one; measured on WordNet's nouns.
READ_TOKENS = {1: 13, 2: 36, 3: 20}
CONFIDENCE_EDGES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
STATE_BYTES = 2


@dataclass(frozen=True)
class StageStatus:
    """Concepts that stand at one stage.

    Attributes:
        stage, num_concepts, num_samples (all of theirs, of all stages).
        confidence: mean, NaN where nobody judged. variance: mean over concepts with two samples or more, and over
            features, at the middle layer; NaN without such.
    """

    stage: int
    num_concepts: int
    num_samples: int
    confidence: float
    variance: float


@dataclass(frozen=True)
class Status:
    """What there is."""

    stages: list[StageStatus]
    num_concepts: int
    num_rounds: int
    num_tests: int
    pending: bool
    bytes: int
    judged: dict[str, Any]
    confidence_counts: list[int]

    @property
    def bytes_a_concept(self) -> float:
        """Bytes on disk by concept."""
        return self.bytes / max(1, self.num_concepts)


def status(growing: GrowingEncyclopedia) -> Status:
    """Concepts by stage and confidence, samples, variance, size."""
    stage_N, count_N, confidence_N = growing.stage, growing.num_samples, growing.confidence
    layer = growing.layers[len(growing.layers) // 2]
    several = np.flatnonzero(count_N > 1)
    variance_N = np.full(len(growing), np.nan)
    if len(several):
        variance_N[several] = growing.moments(layer, several).variance().mean(axis=1)
    stages = []
    for stage in np.unique(stage_N):
        mine = stage_N == stage
        stages.append(
            StageStatus(
                int(stage),
                int(mine.sum()),
                int(count_N[mine].sum()),
                _mean(confidence_N[mine]),
                _mean(variance_N[mine]),
            )
        )
    known = confidence_N[~np.isnan(confidence_N)]
    return Status(
        stages=stages,
        num_concepts=len(growing),
        num_rounds=growing.num_rounds,
        num_tests=len(growing.rows(split="test")),
        pending=growing.pending is not None,
        bytes=folder_bytes(growing),
        judged=growing.judged,
        confidence_counts=np.histogram(known, bins=CONFIDENCE_EDGES)[0].tolist(),
    )


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def folder_bytes(growing: GrowingEncyclopedia) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in growing.folder.rglob("*") if path.is_file())


@dataclass(frozen=True)
class StageCost:
    """What bringing all concepts of one stage to the next would take, at about the nominal speed of this machine."""

    stage: int
    num_concepts: int
    num_texts: int
    num_tokens: int
    seconds: float
    bytes: int

    def words(self) -> str:
        """The cost in a line."""
        return (
            f"stage {self.stage} ({STAGES[self.stage]}) for {self.num_concepts:,} concepts: {self.num_texts:,} texts, "
            f"about {self.num_tokens:,} tokens, {readable_seconds(self.seconds)}, {readable_bytes(self.bytes)}"
        )


def next_costs(growing: GrowingEncyclopedia, *, contexts: int, new_tokens: int) -> list[StageCost]:
    """For every stage that some concepts stand at, what the next one would cost them.

    Args:
        contexts: texts a concept. new_tokens: of a text that is written.
    """
    costs = []
    for stage in range(3):
        num = int((growing.stage == stage).sum())
        if not num:
            continue
        copies = 2 if stage + 1 == 2 else 1  # written texts are kept a second time, masked
        texts = num * contexts * copies
        read = texts * READ_TOKENS[stage + 1]
        generated = num * contexts * new_tokens if stage + 1 == 2 else 0
        # A token that is generated costs about three that are read at once.
        seconds = (read + 3 * generated) / growing.tokens_per_second
        size = texts * len(growing.layers) * growing.width * STATE_BYTES
        size += num * len(growing.layers) * growing.width * 8
        costs.append(StageCost(stage + 1, num, texts, read + generated, seconds, size))
    return costs
