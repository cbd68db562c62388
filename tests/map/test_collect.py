"""Collecting: the right states, the same bytes whatever happens on the way, and nothing finished lost."""

import contextlib
import errno
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from ftw.errors import ConfigError, DataError, DiskFullError, EncyclopediaError, SubstrateError
from ftw.map.collect import CollectConfig, collect, encyclopedia_folder, evenly_spaced
from ftw.map.encyclopedia import Encyclopedia, estimate
from ftw.map.samples import SampleTable, SampleTableBuilder
from ftw.substrate.model import Substrate

WORDS = ("the", "cat", "sat", "on", "a", "mat", "while", "seven", "dogs", "argued", "about", "northern", "rivers")


def build_table(num_texts: int = 22, seed: int = 0) -> SampleTable:
    """Texts of one to forty words in all splits."""
    rng = random.Random(seed)
    builder = SampleTableBuilder(["cat", "dog"])
    for number in range(num_texts):
        text = f"{number} " + " ".join(rng.choices(WORDS, k=rng.randint(1, 12)))
        split = ("train", "test", "background")[number % 3]
        row = builder.text(text, group=f"g{number}", split=split, source="context")
        if split != "background":
            builder.mark(row, "cat", number % 2)
            builder.mark(row, "dog", 1)
    return builder.build()


def small_config(**changes: object) -> CollectConfig:
    values = {"layers": [1, 3], "max_tokens": 64, "batch_tokens": 256, "precision": "float32", "shard_texts": 5}
    return CollectConfig(**{**values, **changes})


def gather(substrate: Substrate, table: SampleTable, **changes: object) -> Encyclopedia:
    return collect(substrate, table, small_config(**changes), progress=False)


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.h5"))}


def states_of(substrate: Substrate, text: str, layer: int, max_tokens: int) -> np.ndarray:
    """Layer-normed states of one text without its first position, straight from transformers."""
    ids = torch.tensor([substrate.encode(text, max_tokens=max_tokens)])
    with torch.no_grad():
        states_TD = substrate.model(input_ids=ids, output_hidden_states=True).hidden_states[layer + 1][0, 1:].double()
    centred = states_TD - states_TD.mean(-1, keepdim=True)
    return (centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()).numpy()


def test_states_are_those_of_transformers_layer_normed_and_pooled(tiny_substrate: Substrate) -> None:
    table = build_table()
    # Layer 3, the last, is left out of the oracle: transformers puts the final norm into its hidden_states.
    with gather(tiny_substrate, table, layers=[1, 2]) as encyclopedia:
        for layer in (1, 2):
            mean, last = encyclopedia.pooled(layer, "mean"), encyclopedia.pooled(layer, "last")
            for row, text in enumerate(table.texts):
                expected = states_of(tiny_substrate, text, layer, 64)
                assert encyclopedia.num_tokens[row] == len(expected)
                np.testing.assert_allclose(mean[row], expected.mean(0), atol=2e-3)
                np.testing.assert_allclose(last[row], expected[-1], atol=4e-3)
            rows = table.where("background")
            tokens, offsets = encyclopedia.token_states(layer, rows)
            for place, row in enumerate(rows):
                expected = states_of(tiny_substrate, table.texts[row], layer, 64)
                np.testing.assert_allclose(tokens[offsets[place] : offsets[place + 1]], expected, atol=4e-3)
        assert encyclopedia.token_rows().tolist() == rows.tolist()
        assert encyclopedia.verify() == []


def test_k_tokens_of_a_text_are_spread_evenly(tiny_substrate: Substrate) -> None:
    table = build_table(6)
    with gather(tiny_substrate, table, tokens_per_text={"train": 3, "test": -1}) as some:
        every, ends = some.token_states(1, table.where("test"))
        kept, offsets = some.token_states(1, table.where("train"))
        assert np.diff(offsets).tolist() == [min(3, count) for count in some.num_tokens[table.where("train")]]
        assert np.diff(ends).tolist() == some.num_tokens[table.where("test")].tolist()
    with gather(tiny_substrate, table, tokens_per_text={"train": -1}) as full:
        every, ends = full.token_states(1, table.where("train"))
        for place in range(len(ends) - 1):
            text = every[ends[place] : ends[place + 1]]
            chosen = text[evenly_spaced(len(text), min(3, len(text)))]
            np.testing.assert_array_equal(kept[offsets[place] : offsets[place + 1]], chosen)


@pytest.mark.parametrize(("num_tokens", "num_kept"), [(1, 1), (7, 7), (10, 3), (128, 1), (5, 4)])
def test_evenly_spaced_positions_are_distinct_and_inside(num_tokens: int, num_kept: int) -> None:
    positions = evenly_spaced(num_tokens, num_kept)
    assert len(set(positions.tolist())) == num_kept
    assert positions.min() >= 0
    assert positions.max() < num_tokens


def test_long_texts_are_cut_and_counted(tiny_substrate: Substrate) -> None:
    table = build_table()
    lengths = [len(tiny_substrate.encode(text)) for text in table.texts]
    with gather(tiny_substrate, table, max_tokens=20) as encyclopedia:
        assert encyclopedia.num_tokens.tolist() == [min(length, 20) - 1 for length in lengths]
        assert encyclopedia.num_cut == sum(length > 20 for length in lengths) > 0


def test_a_permutation_of_the_texts_gives_each_the_same_states(tiny_substrate: Substrate) -> None:
    table = build_table()
    order = np.random.default_rng(1).permutation(len(table))
    place = np.argsort(order)
    shuffled = SampleTable(
        texts=[table.texts[i] for i in order],
        groups=[table.groups[i] for i in order],
        splits=[table.splits[i] for i in order],
        sources=[table.sources[i] for i in order],
        concepts=table.concepts,
        rows=place[table.rows],
        cols=table.cols,
        labels=table.labels,
        weights=table.weights,
    )
    with gather(tiny_substrate, table) as first, gather(tiny_substrate, shuffled) as second:
        assert first.folder != second.folder
        np.testing.assert_allclose(
            first.pooled(3, "last")[order].astype(np.float32), second.pooled(3, "last").astype(np.float32), atol=4e-3
        )
        np.testing.assert_allclose(first.statistics(3).mean_ND, second.statistics(3).mean_ND, atol=4e-3)


def test_a_second_collection_reads_nothing_anew(tiny_substrate: Substrate, monkeypatch: pytest.MonkeyPatch) -> None:
    table = build_table()
    with gather(tiny_substrate, table) as encyclopedia:
        folder = encyclopedia.folder
    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("*.h5")}
    with gather(tiny_substrate, table) as encyclopedia:
        assert encyclopedia.folder == folder == encyclopedia_folder(table, small_config().spec(tiny_substrate))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.h5")} == stamps


def test_damaged_shards_alone_are_collected_anew_with_the_same_bytes(tiny_substrate: Substrate) -> None:
    table = build_table()
    with gather(tiny_substrate, table) as encyclopedia:
        folder = encyclopedia.folder
        state = encyclopedia.pooled(3, "last", [7]).tobytes()
    before = folder_bytes(folder)
    flipped, truncated, gone = (folder / "shards" / f"00000{number}.h5" for number in (1, 2, 3))
    flipped.write_bytes(flipped.read_bytes().replace(state, state[:-1] + bytes([state[-1] ^ 1])))
    truncated.write_bytes(truncated.read_bytes()[:-7])
    gone.unlink()
    kept = (folder / "shards" / "000000.h5").stat().st_mtime_ns
    with pytest.warns(UserWarning, match="counts as missing") as warned:
        gather(tiny_substrate, table).close()
    assert len(warned) == 2
    assert folder_bytes(folder) == before
    assert (folder / "shards" / "000000.h5").stat().st_mtime_ns == kept


def test_a_moved_folder_is_opened_without_the_model(tiny_substrate: Substrate, tmp_path: Path) -> None:
    table = build_table()
    with gather(tiny_substrate, table) as encyclopedia:
        expected = encyclopedia.pooled(1, "mean")
    shutil.move(encyclopedia.folder, tmp_path / "moved")
    with Encyclopedia.open(tmp_path / "moved") as moved:
        assert moved.complete
        np.testing.assert_array_equal(moved.pooled(1, "mean"), expected)
        moved.check_substrate(tiny_substrate.name, tiny_substrate.fingerprint)


def test_a_text_without_tokens_is_named(tiny_substrate: Substrate) -> None:
    builder = SampleTableBuilder(["a"])
    builder.text("fine", group="g", split="train", source="s")
    builder.text("", group="article 7", split="test", source="s")
    with pytest.raises(DataError, match=r"text 1 \(''.*article 7.* has no tokens"):
        gather(tiny_substrate, builder.build())


def test_a_text_with_states_that_are_not_finite_is_named(tiny_substrate: Substrate) -> None:
    table = build_table(9)

    def poison(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        # The byte "7" occurs in the head of text 7 alone; its state becomes infinite.
        token = tiny_substrate.encode("7")[1]
        return torch.where((args[0] == token)[..., None], torch.inf, output)

    handle = tiny_substrate.model.get_input_embeddings().register_forward_hook(poison)
    try:
        with pytest.raises(DataError, match=r"text 7 \('7 .*not finite"):
            gather(tiny_substrate, table)
    finally:
        handle.remove()
    with gather(tiny_substrate, table) as encyclopedia:
        assert encyclopedia.complete


def test_a_disk_that_fills_up_loses_only_the_shard_in_hand(
    tiny_substrate: Substrate, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = build_table()
    folder = encyclopedia_folder(table, small_config().spec(tiny_substrate))
    real = os.fsync

    def full(descriptor: int) -> None:
        if len(list((folder / "shards").glob("0*.h5"))) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as edge:
        edge.setattr(os, "fsync", full)
        with pytest.raises(DiskFullError, match="no room on the disk"):
            gather(tiny_substrate, table)
    assert Encyclopedia.open(folder).missing() == [2, 3, 4]
    gather(tiny_substrate, table).close()
    resumed = folder_bytes(folder)
    shutil.rmtree(folder)
    gather(tiny_substrate, table).close()
    assert folder_bytes(folder) == resumed


def test_too_small_a_disk_is_refused_before_any_work(
    tiny_substrate: Substrate, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1234})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DiskFullError, match=r"needs .* kB, but the disk has 1\.2 kB free"):
        gather(tiny_substrate, build_table())


def test_ctrl_c_says_how_to_go_on(
    tiny_substrate: Substrate, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = build_table()

    def interrupt(module: torch.nn.Module, args: tuple) -> None:
        if len(list(Path(os.environ["FTW_HOME"]).rglob("shards/*.h5"))) == 3:
            raise KeyboardInterrupt

    handle = tiny_substrate.blocks[0].register_forward_pre_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            gather(tiny_substrate, table)
    finally:
        handle.remove()
    assert "3 of 5 shards are kept" in capsys.readouterr().err


def test_another_folder_with_other_texts_is_refused(tiny_substrate: Substrate, tmp_path: Path) -> None:
    collect(tiny_substrate, build_table(), small_config(), progress=False, folder=tmp_path / "e").close()
    with pytest.raises(EncyclopediaError, match="other texts"):
        collect(tiny_substrate, build_table(seed=1), small_config(), progress=False, folder=tmp_path / "e")


def test_the_estimate_is_the_truth_for_small_tables(tiny_substrate: Substrate) -> None:
    table = build_table(60)
    spec = small_config(max_tokens=30).spec(tiny_substrate)
    cost = estimate(table, spec, tiny_substrate)
    with gather(tiny_substrate, table, max_tokens=30) as encyclopedia:
        assert cost.exact
        assert cost.num_texts == 60
        assert cost.num_tokens == encyclopedia.num_tokens.sum()
        assert cost.num_cut == encyclopedia.num_cut
        assert cost.num_kept_tokens == len(encyclopedia.token_states(1, encyclopedia.token_rows())[0])
        size = sum(path.stat().st_size for path in encyclopedia.folder.rglob("*.h5"))
    assert size <= cost.bytes < 3 * size
    assert len(cost.lines()) == 4


def test_a_measured_estimate_gives_a_speed(tiny_substrate: Substrate) -> None:
    cost = estimate(build_table(), small_config().spec(tiny_substrate), tiny_substrate, measure=True)
    assert cost.measured
    assert cost.tokens_per_second > 0
    assert cost.seconds == pytest.approx(cost.num_tokens / cost.tokens_per_second)


def test_large_tables_are_estimated_from_a_sample(tiny_substrate: Substrate, monkeypatch: pytest.MonkeyPatch) -> None:
    table = build_table(900)
    spec = small_config().spec(tiny_substrate)
    truth = estimate(table, spec, tiny_substrate)
    monkeypatch.setattr("ftw.map.estimate.EXACT_TEXTS", 600)
    sampled = estimate(table, spec, tiny_substrate)
    assert not sampled.exact
    assert sampled.num_tokens == pytest.approx(truth.num_tokens, rel=0.1)
    assert "about" in sampled.lines()[1]


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"layers": [9]}, SubstrateError),
        ({"layers": []}, SubstrateError),
        ({"max_tokens": 1}, ConfigError),
        ({"max_tokens": 513}, ConfigError),
        ({"precision": "float8"}, ConfigError),
        ({"pools": ["max"]}, ConfigError),
    ],
)
def test_a_config_that_cannot_be_is_refused(tiny_substrate: Substrate, changes: dict, error: type[Exception]) -> None:
    with pytest.raises(error):
        small_config(**changes).spec(tiny_substrate)


def test_shards_of_wide_models_hold_fewer_texts(tiny_substrate: Substrate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ftw.map.collect.SHARD_BYTES_LIMIT", 64 * 1024)
    # A text: (2 pooled + 64 token) states of 2 layers of 32 numbers of 2 bytes.
    assert CollectConfig(layers=[1, 3], max_tokens=64).spec(tiny_substrate).shard_texts == 65536 // (66 * 2 * 32 * 2)


# A process that has imported everything and forks a collector for every line it reads: `folder` in, `pid` out at the
# start and `status number-of-shards-computed` at the end. Importing torch once saves the tests a minute.
ZYGOTE = """
import json, os, sys
import torch
torch.set_num_threads(1)
from toy_model import byte_tokenizer, tiny_llama
from map.test_collect import build_table, small_config
import ftw.map.collect as module
from ftw.substrate.model import Substrate
substrate = Substrate.from_model(tiny_llama(), byte_tokenizer(), name="tiny-llama")
table, config = build_table(300), small_config(shard_texts=12)
read_shard, computed = module.read_shard, []
def counted(*args):
    computed.append(1)
    return read_shard(*args)
module.read_shard = counted
print("[]", flush=True)
for line in sys.stdin:
    folders = json.loads(line)
    pids = []
    for folder in folders:
        pid = os.fork()
        if not pid:
            module.collect(substrate, table, config, progress=False, folder=folder).close()
            os._exit(100 + len(computed))
        pids.append(pid)
    print(json.dumps(pids), flush=True)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)
"""
NUM_SHARDS = 25


class Collectors:
    """Starts collecting processes and tells how each ended."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def start(self, *folders: Path) -> list[int]:
        assert self.process.stdin
        self.process.stdin.write(json.dumps([str(folder) for folder in folders]) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> list[int]:
        assert self.process.stdout
        return json.loads(self.process.stdout.readline())

    def shards_computed(self, *folders: Path) -> list[int]:
        """Run to the end; how many shards each process computed."""
        self.start(*folders)
        return [status - 100 for status in self.answer()]


@pytest.fixture(scope="module")
def collectors() -> Iterator[Collectors]:
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])}
    with subprocess.Popen(
        [sys.executable, "-c", ZYGOTE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            started = Collectors(process)
            assert started.answer() == []
            yield started
        finally:
            with contextlib.suppress(BrokenPipeError):
                assert process.stdin
                process.stdin.close()
            process.kill()


@pytest.mark.parametrize("num_kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_collection_killed_at_random_moments_and_resumed_has_the_bytes_of_an_unbroken_one(
    num_kills: int, collectors: Collectors, tmp_path: Path
) -> None:
    start = time.perf_counter()
    assert collectors.shards_computed(tmp_path / "unbroken") == [NUM_SHARDS]
    duration = time.perf_counter() - start
    rng = random.Random(num_kills)
    broken = tmp_path / "broken"
    killed = 0
    for _ in range(num_kills):
        (pid,) = collectors.start(broken)
        time.sleep(rng.uniform(0, duration / num_kills))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 9)
        killed += collectors.answer() == [-9]
    finished = len(list(broken.glob("shards/0*.h5")))
    assert killed >= num_kills - 1
    assert collectors.shards_computed(broken) == [NUM_SHARDS - finished]
    assert folder_bytes(broken) == folder_bytes(tmp_path / "unbroken")
    assert not list(broken.glob("shards/.*.tmp"))


def test_two_processes_share_one_collection(collectors: Collectors, tmp_path: Path) -> None:
    assert collectors.shards_computed(tmp_path / "alone") == [NUM_SHARDS]
    together = collectors.shards_computed(tmp_path / "shared", tmp_path / "shared")
    assert sum(together) == NUM_SHARDS
    assert min(together) > 0
    assert folder_bytes(tmp_path / "shared") == folder_bytes(tmp_path / "alone")
