"""Figures of a bench are what they say: ratios of the same run, floors of the same bytes, in plain JSON."""

import time

import numpy as np
import pytest
import torch

from ftw.bench.machine import machine
from ftw.bench.measure import LEAST_ROUNDS, BenchConfig, Row, Stopwatch, interval
from ftw.errors import ConfigError


def stopwatch(**config: object) -> Stopwatch:
    return Stopwatch(BenchConfig(seconds=0.01, quick=True, device="cpu", **config))  # type: ignore[arg-type]


def test_calls_are_timed_in_turns():
    order: list[str] = []
    times = stopwatch().times({"a": lambda: order.append("a"), "b": lambda: order.append("b")})
    assert order == ["a", "b"] * (len(order) // 2)
    assert len(times["a"]) == len(times["b"]) >= LEAST_ROUNDS


def test_processor_time_does_not_count_waiting():
    wall, cpu = (
        stopwatch(clock=clock).times({"sleep": lambda: time.sleep(0.005)}, rounds=3)["sleep"].min()
        for clock in ("wall", "cpu")
    )
    assert wall >= 5 > 2 > cpu


def test_a_row_tells_its_ratios_to_baseline_and_floor():
    row = Row(case="c", n=2, d=3, ms=2.0, baseline="b", baseline_ms=8.0, floor_ms=0.5, more={"precision": "int8"})
    assert row.record() == {
        "case": "c", "n": 2, "d": 3, "ms": 2.0, "baseline": "b", "baseline_ms": 8.0, "ratio": 0.25, "floor_ms": 0.5,
        "over_floor": 4.0, "precision": "int8",
    }  # fmt: skip


def test_a_case_without_bytes_has_no_floor():
    row = stopwatch().row("c", lambda: None, n=1, d=1, baseline=("b", lambda: time.sleep(0.002)))
    assert (row.floor_ms, row.record()["over_floor"]) == (None, None)
    assert row.baseline_ms >= 2


def test_the_floor_reads_as_many_bytes_as_the_case():
    reading = stopwatch().reading(10 * 2**20)
    buffer = reading.__self__  # type: ignore[attr-defined]
    assert isinstance(buffer, torch.Tensor)
    assert abs(buffer.numel() * buffer.element_size() - 10 * 2**20) <= 4096


def test_the_interval_of_a_ratio_holds_it_and_narrows_with_rounds():
    random = np.random.default_rng(0)
    few, many = (interval(random.normal(11, 1, n), random.normal(10, 1, n), seed=0) for n in (20, 2000))
    assert few[0] < 1.1 < few[1]
    assert many[1] - many[0] < few[1] - few[0]


def test_the_machine_is_described_in_plain_data():
    described = machine(torch.device("cpu"))
    assert {"processor", "cores", "torch", "torch_threads", "load", "device"} <= set(described)
    assert all(value is None or isinstance(value, str | int | float) for value in described.values())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"seconds": 0}, "seconds=0"),
        ({"threads": 0}, "threads=0"),
        ({"device": "tpu"}, "cuda"),
        ({"clock": "sun"}, "wall"),
    ],
)
def test_what_cannot_be_measured_is_refused(config: dict, words: str):
    with pytest.raises(ConfigError, match=words):
        BenchConfig(**config)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none_is_refused():
    with pytest.raises(ConfigError, match="device=cpu"):
        Stopwatch(BenchConfig(device="cuda"))
