"""What a collection will cost, before it starts: tokens, bytes on disk, seconds.

Tables of up to 5,000 texts are tokenised whole; of larger ones a seeded sample of every split.

Axes: S texts, T tokens, L layers, N concepts, D model width.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ftw.errors import DataError
from ftw.map.samples import SPLITS, SampleTable
from ftw.map.shard import CaptureSpec
from ftw.substrate.model import Substrate
from ftw.substrate.sampling import sample_answers
from ftw.substrate.taps import read_states

EXACT_TEXTS = 5_000
# Sustained arithmetic of a transformer forward pass, for a guess without a measurement: two cores with bfloat16
# instructions gave 3e11 FLOP/s on SmolLM2-135M; a data-centre GPU reaches some 1e14 on batches of thousands of tokens.
NOMINAL_FLOPS = {"cpu": 3e11, "cuda": 1e14}
SHARD_OVERHEAD_BYTES = 16_384
# Tokens generated one after another, of those read at once: a third on two cores at 64 answers side by side.
SAMPLING_SHARE = 1 / 3
TRIAL_PROMPTS = 64
STATE_BYTES = 2


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a collection reads and leaves.

    Attributes:
        num_texts, num_tokens: texts, and their content tokens after the cut.
        num_cut: texts longer than `max_tokens`.
        num_kept_tokens: tokens whose own states are kept.
        bytes: size of the finished folder.
        tokens_per_second, seconds: speed and time; `measured` says whether by a trial on this machine.
        exact: whether every text was tokenised (else the counts are scaled up from a sample).
    """

    num_texts: int
    num_tokens: int
    num_cut: int
    num_kept_tokens: int
    bytes: int
    tokens_per_second: float
    seconds: float
    measured: bool
    exact: bool

    def lines(self) -> list[str]:
        """The estimate in words, a line each."""
        about = "" if self.exact else "about "
        cut = f" ({about}{self.num_cut:,} texts cut)" if self.num_cut else ""
        speed = "measured" if self.measured else "nominal"
        return [
            f"texts   {self.num_texts:,}",
            f"tokens  {about}{self.num_tokens:,}{cut}; states of {about}{self.num_kept_tokens:,} single tokens kept",
            f"disk    {readable_bytes(self.bytes)}",
            f"time    {readable_seconds(self.seconds)} at {self.tokens_per_second:,.0f} tokens/s ({speed})",
        ]


def estimate(
    table: SampleTable, spec: CaptureSpec, substrate: Substrate, *, measure: bool = False, moments: bool = True
) -> Estimate:
    """What collecting this table would cost.

    Args:
        measure: time a few batches on this machine (seconds); else a nominal speed is assumed.
        moments: whether mean and variance of every concept are written as well.

    Raises:
        DataError: the table has no texts, or one of them no tokens.
    """
    if not len(table):
        raise DataError("the sample table has no texts; nothing can be collected")
    if spec.sampling:
        return _of_answers(table, spec, substrate, measure=measure)
    rng = np.random.default_rng(0)
    tokens = cut = kept = 0.0
    sampled: list[list[int]] = []
    exact = len(table) <= EXACT_TEXTS
    for split in SPLITS:
        rows = table.where(split)
        if not len(rows):
            continue
        chosen = rows if exact else rng.choice(rows, size=min(len(rows), EXACT_TEXTS // len(SPLITS)), replace=False)
        encoded = [encode_row(substrate, spec, table, int(row)) for row in chosen]
        scale = len(rows) / len(chosen)
        tokens += scale * sum(len(token_ids) - 1 for token_ids, _ in encoded)
        cut += scale * sum(was_cut for _, was_cut in encoded)
        kept += scale * sum(spec.kept_tokens(split, len(token_ids) - 1) for token_ids, _ in encoded)
        sampled += [token_ids for token_ids, _ in encoded]
    rate = _measured_rate(substrate, spec, sampled) if measure else nominal_rate(substrate, spec)
    return Estimate(
        num_texts=len(table),
        num_tokens=round(tokens),
        num_cut=round(cut),
        num_kept_tokens=round(kept),
        bytes=_folder_bytes(table, spec, round(kept), moments=moments),
        tokens_per_second=rate,
        seconds=tokens / rate,
        measured=measure,
        exact=exact,
    )


def _of_answers(table: SampleTable, spec: CaptureSpec, substrate: Substrate, *, measure: bool) -> Estimate:
    """What sampling an answer to every prompt costs, all of them of full length."""
    assert spec.sampling is not None  # the caller has seen to it
    most = int(spec.sampling["max_new_tokens"])
    tokens, rate = len(table) * most, nominal_rate(substrate, spec) * SAMPLING_SHARE
    if measure:
        options = {"max_new_tokens": most, "temperature": spec.sampling["temperature"], "precision": spec.precision}
        trial = [substrate.chat(text) for text in table.texts[:TRIAL_PROMPTS]]
        start = time.perf_counter()
        num = sum(len(answer.token_ids) for answer in sample_answers(substrate, trial, spec.layers, **options))
        rate = max(num, 1) / (time.perf_counter() - start)
    return Estimate(
        num_texts=len(table),
        num_tokens=tokens,
        num_cut=0,
        num_kept_tokens=tokens,
        bytes=_folder_bytes(table, spec, tokens),
        tokens_per_second=rate,
        seconds=tokens / rate,
        measured=measure,
        exact=False,
    )


def encode_row(substrate: Substrate, spec: CaptureSpec, table: SampleTable, row: int) -> tuple[list[int], bool]:
    """Token ids of one text, sink first, and whether it was cut.

    Raises:
        DataError: the text has no content tokens.
    """
    # One token more than is kept shows whether there was more, without tokenising the text twice.
    token_ids = substrate.encode(table.texts[row], max_tokens=spec.max_tokens + 1)
    if len(token_ids) < 2:
        raise DataError(
            f"text {row} ({table.texts[row][:60]!r}, group {table.groups[row]!r}) has no tokens; leave it out"
        )
    return token_ids[: spec.max_tokens], len(token_ids) > spec.max_tokens


def nominal_rate(substrate: Substrate, spec: CaptureSpec) -> float:
    """Tokens a second that a machine like ours reads, from the number of weights below the deepest layer."""
    blocks = substrate.blocks[: spec.layers[-1] + 1]
    weights = sum(parameter.numel() for block in blocks for parameter in block.parameters())
    return NOMINAL_FLOPS.get(substrate.device.type, NOMINAL_FLOPS["cpu"]) / (2 * max(1, weights))


def _measured_rate(substrate: Substrate, spec: CaptureSpec, sampled: Sequence[list[int]]) -> float:
    """Tokens a second over about four batches of the sampled texts, after one text to warm up."""
    order = np.random.default_rng(1).permutation(len(sampled))
    trial: list[list[int]] = []
    budget = 4 * spec.batch_tokens
    for place in order:
        if budget <= 0:
            break
        trial.append(sampled[place])
        budget -= len(sampled[place])
    options = {"batch_tokens": spec.batch_tokens, "precision": spec.precision}
    list(read_states(substrate, trial[:1], spec.layers, **options))
    start = time.perf_counter()
    num_tokens = sum(states_LTD.shape[1] for _, states_LTD in read_states(substrate, trial, spec.layers, **options))
    return num_tokens / (time.perf_counter() - start)


def _folder_bytes(table: SampleTable, spec: CaptureSpec, num_kept_tokens: int, *, moments: bool = True) -> int:
    """States, texts, marks and the moments of the concepts."""
    vector = len(spec.layers) * spec.width
    states = (len(table) * len(spec.pools) + num_kept_tokens) * vector * STATE_BYTES
    known = len(table.concepts) * vector * 8 if moments and "mean" in spec.pools else 0
    words = sum(len(text) for text in table.texts) + 64 * len(table) + 13 * len(table.rows)
    num_shards = -(-len(table) // spec.shard_texts)
    return states + known + words + SHARD_OVERHEAD_BYTES * (num_shards + 1)


def readable_bytes(count: float) -> str:
    """Bytes for people: 1,234,567 is "1.2 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def readable_seconds(seconds: float) -> str:
    """Seconds for people: 3,700 is "1 h 02 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f} min"
