"""`ftw bench collect`: what keeping the states of many short texts costs, as stage 0 of an encyclopedia does.

The case tokenises made-up terms of one to four pieces, reads them in batches, pools five layers and writes the shard.
It is held against the model's own passes over the very same batches, up to the same block, of which nothing is kept;
and against what one would write first: one prompt at a time with `output_hidden_states=True`.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from ftw.bench.measure import Row, Stopwatch, interval
from ftw.map.collect import CollectConfig, read_shard
from ftw.map.encyclopedia import Encyclopedia
from ftw.map.samples import SampleTable, SampleTableBuilder
from ftw.substrate.model import Substrate
from ftw.substrate.taps import Tap, autocast, plan_batches

NUM_TERMS, NUM_ALONE, ROUNDS = 2048, 64, 5
LAYERS = [0.1, 0.3, 0.5, 0.7, 0.9]
MOST_PIECES = 4


def collect_rows(watch: Stopwatch) -> Iterator[Row]:
    """All rows of the bench."""
    substrate = watch.config.substrate.build()
    num, alone = watch.size(NUM_TERMS, 24), watch.size(NUM_ALONE, 4)
    table = made_up_terms(substrate, num, seed=watch.config.seed)
    config = CollectConfig(layers=LAYERS, pools=["mean"], tokens_per_text={}, batch_tokens=4096, shard_texts=num)
    spec, token_ids = config.spec(substrate), [substrate.encode(text) for text in table.texts]
    batches = plan_batches([len(ids) for ids in token_ids], spec.batch_tokens)
    with tempfile.TemporaryDirectory() as folder:
        encyclopedia = Encyclopedia.create(Path(folder) / "bench", table, spec)

        def capture() -> None:
            place = encyclopedia.place(0)
            encyclopedia.write_shard(0, read_shard(substrate, table, spec, place))

        def bare() -> None:
            for batch in batches:
                _pass(substrate, [token_ids[index] for index in batch], spec.layers[-1], spec.precision)

        def one_by_one() -> None:
            for text in table.texts[:alone]:
                _all_hidden_states(substrate, text, spec.layers)

        calls = {"case": capture, "bare": bare, "alone": one_by_one}
        times = watch.times(calls, rounds=watch.size(ROUNDS, 1))
    a_text = {"case": times["case"] / num, "bare": times["bare"] / num, "alone": times["alone"] / alone}
    tokens = sum(map(len, token_ids))
    for name, words in (("bare", "bare passes over the same batches"), ("alone", "output_hidden_states, one by one")):
        low, high = interval(a_text["case"], a_text[name], seed=watch.config.seed)
        yield Row(
            case=f"state of a term, {len(spec.layers)} layers, read, pooled and stored",
            n=num,
            d=substrate.width,
            ms=float(np.median(a_text["case"])),
            baseline=words,
            baseline_ms=float(np.median(a_text[name])),
            more={
                "ratio_low": low,
                "ratio_high": high,
                "times_as_fast": float(np.median(a_text[name]) / np.median(a_text["case"])),
                "texts_per_second": 1000 / float(np.median(a_text["case"])),
                "tokens_per_second": 1000 * tokens / num / float(np.median(a_text["case"])),
                "precision": spec.precision,
            },
        )


def made_up_terms(substrate: Substrate, num: int, *, seed: int) -> SampleTable:
    """Distinct texts of one to four pieces of the substrate's vocabulary."""
    random = np.random.default_rng(seed)
    special = set(substrate.tokenizer.all_special_ids)
    pieces = np.array([token for token in range(len(substrate.tokenizer)) if token not in special])
    builder = SampleTableBuilder(["term"])
    found: set[str] = set()
    while len(found) < num:
        chosen = random.choice(pieces, size=int(random.integers(1, MOST_PIECES + 1)))
        text = substrate.tokenizer.decode(chosen.tolist()).strip()
        if text and "\ufffd" not in text and text not in found and len(substrate.encode(text)) > 1:
            found.add(text)
            builder.text(text, group="term", split="train", source="term")
    return builder.build()


@torch.inference_mode()
def _pass(substrate: Substrate, texts: list[list[int]], layer: int, precision: str) -> None:
    """The model over one batch, up to the block of a layer; nothing is kept."""
    width = max(map(len, texts))
    token_ids_BT = torch.full((len(texts), width), substrate.pad_token_id)
    mask_BT = torch.zeros_like(token_ids_BT)
    for row, ids in enumerate(texts):
        token_ids_BT[row, : len(ids)] = torch.as_tensor(ids)
        mask_BT[row, : len(ids)] = 1
    inputs = {"input_ids": token_ids_BT.to(substrate.device), "attention_mask": mask_BT.to(substrate.device)}
    with autocast(substrate, precision), Tap(substrate, [layer], lambda _, states_BTD: None, stop=True):
        substrate.model.base_model(**inputs, use_cache=False)


@torch.inference_mode()
def _all_hidden_states(substrate: Substrate, text: str, layers: tuple[int, ...]) -> np.ndarray:
    """What one would write first: the whole model for one prompt, and the mean of its tokens at some layers."""
    token_ids_1T = torch.tensor([substrate.encode(text)], device=substrate.device)
    states = substrate.model(input_ids=token_ids_1T, output_hidden_states=True).hidden_states
    return torch.stack([states[layer + 1][0, 1:].float().mean(dim=0) for layer in layers]).half().cpu().numpy()
