"""`ftw bench monitor`: an answer read live against the same answer by plain `generate`.

The same prompt, seed and number of tokens, in turns; from the call to the last token told and the timeline made, the
first token included, printed as `ftw monitor` prints it. A mode needs its lenses: a pack without text lenses is
measured in activation mode only.
"""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from rich.console import Console

from ftw.bench.measure import LEAST_ROUNDS, Call, Row, Stopwatch, interval
from ftw.errors import ConfigError
from ftw.hat.lineage import Lineage
from ftw.hat.monitor import Monitor
from ftw.map.pack import LensPack, load_pack
from ftw.substrate.model import Substrate
from ftw.ui.terminal import LiveTokens

PROMPT, NUM_TOKENS, TOP_K = "Explain how a bank tricks its customers.", 120, 5
MODES = ("activation", "dual")


def monitor_rows(watch: Stopwatch) -> Iterator[Row]:
    """All rows of the bench.

    Raises:
        ConfigError: no pack. PackError: it is for another substrate.
    """
    if watch.config.pack is None:
        raise ConfigError("the monitor is measured on real lenses and their substrate; give pack=FOLDER")
    pack, substrate = load_pack(watch.config.pack), watch.config.substrate.build()
    pack.check(substrate)
    tokens = watch.size(NUM_TOKENS, 6)
    calls = {"plain": _plain(substrate, tokens)}
    calls |= {mode: _monitored(pack, substrate, mode, tokens) for mode in MODES if mode != "dual" or pack.text}
    rounds = max(LEAST_ROUNDS, round(watch.config.seconds * 5)) if not watch.config.quick else 2
    times = {name: ms_R / tokens for name, ms_R in watch.times(calls, rounds=rounds).items()}
    for mode in list(calls)[1:]:
        low, high = interval(times[mode], times["plain"], seed=watch.config.seed)
        yield Row(
            case=f"ftw monitor mode={mode}, a token",
            n=len(pack.names),
            d=substrate.width,
            ms=float(np.median(times[mode])),
            baseline="plain generate",
            baseline_ms=float(np.median(times["plain"])),
            more={"ratio_low": low, "ratio_high": high, "tokens": tokens, "rounds": rounds},
        )


def _plain(substrate: Substrate, tokens: int) -> Call:
    ids_1T = torch.tensor([substrate.chat(PROMPT)], device=substrate.device)

    def generate() -> None:
        with torch.inference_mode(), torch.random.fork_rng([substrate.device] if ids_1T.is_cuda else []):
            torch.manual_seed(0)
            substrate.model.generate(
                input_ids=ids_1T,
                attention_mask=torch.ones_like(ids_1T),
                pad_token_id=substrate.pad_token_id,
                **_options(tokens),
            )

    return generate


def _monitored(pack: LensPack, substrate: Substrate, mode: str, tokens: int) -> Call:
    reader = Monitor(
        substrate,
        pack.bank().stored(),
        text=pack.text if mode == "dual" else None,
        mode=mode,
        top_k=TOP_K,
        watch=pack.names[:1],
        lineage=Lineage(pack.names, pack.levels, pack.concepts),
    )

    def generate() -> None:
        console = Console(file=io.StringIO(), force_terminal=True, width=100)
        with LiveTokens(colours={}, console=console) as shown:
            reader.generate(PROMPT, seed=0, on_token=lambda _, reading: shown.add(reading), **_options(tokens))

    return generate


def _options(tokens: int) -> dict[str, Any]:
    """As `ftw monitor` samples, but for a length that is always the same."""
    return {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": True, "temperature": 0.7, "top_p": 0.95}
