"""Two processes that talk through gloo train the interpreter that one trains."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from toy_rows import toy_fit, toy_rows
from two_ranks import OPTIONS

from ftw.hat.interpreter import Interpreter
from ftw.map.training.callbacks import quiet_trainer
from ftw.map.training.interpreter import train_interpreter

SCRIPT = Path(__file__).parents[2] / "two_ranks.py"


def test_two_ranks_give_the_interpreter_of_one_and_refuse_a_single_row(tmp_path: Path) -> None:
    folder, root = tmp_path / "two", SCRIPT.parents[1]
    path = os.pathsep.join([str(root), str(SCRIPT.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(folder), "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    alone = train_interpreter(
        toy_rows(each=13),
        toy_fit(**OPTIONS),
        trainer=lambda callbacks: quiet_trainer(3, callbacks=callbacks, accelerator="cpu", gradient_clip_val=1.0),
    )
    together = Interpreter.load(folder)
    start = train_interpreter(toy_rows(each=13), toy_fit(**OPTIONS), trainer=lambda c: quiet_trainer(0, callbacks=c))
    for name, tensor in alone.state_dict().items():
        assert torch.allclose(tensor, together.state_dict()[name], atol=2e-5), name
    assert not torch.allclose(alone.query, start.query, atol=1e-3)  # it has learnt something
    assert "1 rows for 2 ranks" in json.loads((folder / "refused.json").read_text())
