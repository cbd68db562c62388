"""Rows for interpreters: states around one direction a concept, as texts of a concept would lie."""

import numpy as np
import torch

from ftw.hat.interpreter import InterpreterConfig, Slot
from ftw.map.training.interpreter import InterpreterFit
from ftw.map.training.interpreter_data import InterpreterRows
from ftw.map.training.interpreter_task import InterpreterTrainingConfig

WIDTH = 16
SMALL = {"width": 32, "num_blocks": 2, "num_heads": 4, "feedforward": 64}


def toy_rows(
    num_concepts: int = 6, each: int = 12, *, seed: int = 0, noise: float = 0.3, names: list[str] | None = None
) -> InterpreterRows:
    """`each` rows a concept, every sixth to validate on, every sixth to test on."""
    random = np.random.default_rng(seed)
    middle_CTD = random.standard_normal((num_concepts, 2, WIDTH))
    labels = np.repeat(np.arange(num_concepts), each)
    states = middle_CTD[labels] + noise * random.standard_normal((len(labels), 2, WIDTH))
    place = np.tile(np.arange(each), num_concepts)
    parts = np.where(place % 6 == 4, "dev", np.where(place % 6 == 5, "test", "train")).tolist()
    return InterpreterRows(
        names=names or [f"concept {number}" for number in range(num_concepts)],
        slots=[Slot(1, "mean"), Slot(2, "mean")],
        states_STD=torch.from_numpy(states.astype(np.float16)),
        labels_S=torch.from_numpy(labels),
        groups=[f"template {number}" for number in place],
        parts=parts,
        kinds=["named" if number % 2 else "unnamed" for number in place],
        texts=[f"text {number}" for number in range(len(labels))],
    )


def toy_fit(**options: object) -> InterpreterFit:
    """A fit that takes a second; `options` go to the model or the training, by their names."""
    model = {name: value for name, value in options.items() if hasattr(InterpreterConfig(), name)}
    training = {name: value for name, value in options.items() if hasattr(InterpreterTrainingConfig(), name)}
    return InterpreterFit(
        model=InterpreterConfig(**{**SMALL, **model}),
        training=InterpreterTrainingConfig(**{"batch": 16, "learning_rate": 3e-3, **training}),
        epochs=int(options.get("epochs", 8)),
        seed=int(options.get("seed", 0)),
    )
