"""Judges: one reader doubts by its entropy, several by what they disagree on, and that is refined first."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_growing import started

from ftw.errors import ConfigError
from ftw.hat.interpreter import InterpreterConfig
from ftw.map.growing.choose import ChooseConfig, choose, most_doubtful
from ftw.map.growing.judge import judge, judge_of, together
from ftw.map.growing.rounds import add_judging
from ftw.map.training.interpreter import InterpreterFit
from ftw.substrate.model import Substrate

SURE, OTHER, EVEN = [1.0, 0.0], [0.0, 1.0], [0.5, 0.5]


@pytest.mark.parametrize(
    ("posteriors", "doubt"),
    [
        ([EVEN], math.log(2)),  # one reader: its entropy
        ([SURE], 0),
        ([SURE, OTHER], math.log(2)),  # each is certain, of something else
        ([EVEN, EVEN], 0),  # both know that they do not know: more contexts would not settle it
        ([SURE, SURE, SURE], 0),
    ],
)
def test_several_readers_doubt_what_they_disagree_on(posteriors: list[list[float]], doubt: float):
    mean_BN, doubt_B = together(torch.tensor([one]) for one in posteriors)
    assert mean_BN[0].tolist() == pytest.approx(np.mean(posteriors, axis=0).tolist())
    assert float(doubt_B[0]) == pytest.approx(doubt, abs=1e-6)


def test_the_most_doubtful_are_refined_first_and_those_never_judged_before_all():
    assert most_doubtful(np.array([0.1, 0.9, np.nan, 0.5, -np.inf]), 2) == [1, 2]
    assert most_doubtful(np.array([0.1, 0.9, np.nan, 0.5, -np.inf]), 4) == [0, 1, 2, 3]


def test_readers_of_different_seeds_judge_together(tmp_path: Path, tiny_substrate: Substrate):
    growing = started(tmp_path / "growing", tiny_substrate)
    add_judging(growing, tiny_substrate, progress=False)
    fit = InterpreterFit(model=InterpreterConfig(width=16, num_blocks=1, num_heads=2, feedforward=16), epochs=2)
    one, two = (judge(growing, judge_of("interpreter", fit, readers)) for readers in (1, 2))
    log_num = math.log(len(growing))
    np.testing.assert_allclose(one.doubt_N, (1 - one.confidence_N) * log_num, atol=1e-4)
    assert growing.judged["readers"] == 2
    assert (two.doubt_N >= 0).all()
    assert (two.doubt_N < (1 - two.confidence_N) * log_num).all()
    most = choose(growing, ChooseConfig(share=1 / len(growing)))
    assert most == [int(np.argmax(np.round(two.doubt_N, 6)))]


def test_no_reader_is_refused():
    with pytest.raises(ConfigError, match="readers=0"):
        judge_of("interpreter", InterpreterFit(), readers=0)
