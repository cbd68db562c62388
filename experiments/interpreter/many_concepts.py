"""What training costs with 50,000 concepts, a step over all of them or a sample, and the direct path; one thread.

States are random: only time is measured.

python experiments/interpreter/many_concepts.py
"""

import time
from functools import partial

import torch
from pytorch_lightning import Callback, Trainer

from ftw.hat.interpreter import InterpreterConfig, Slot
from ftw.map.training.callbacks import quiet_lightning, quiet_trainer
from ftw.map.training.interpreter import InterpreterFit, mixed_precision, train_interpreter
from ftw.map.training.interpreter_data import InterpreterRows
from ftw.map.training.interpreter_directions import find_directions
from ftw.map.training.interpreter_task import InterpreterTrainingConfig

CONCEPTS, ROWS, LAYERS, WIDTH, STEPS, DIRECTIONS = 50_000, 50_000, 5, 576, 12, 512


def rows() -> InterpreterRows:
    """One row a concept, as after stage 0."""
    return InterpreterRows(
        names=[f"concept {number}" for number in range(CONCEPTS)],
        slots=[Slot(layer, "mean") for layer in range(LAYERS)],
        states_STD=torch.randn(ROWS, LAYERS, WIDTH, generator=torch.Generator().manual_seed(0)).half(),
        labels_S=torch.arange(ROWS) % CONCEPTS,
        groups=["term"] * ROWS,
        parts=["train"] * ROWS,
        kinds=["all"] * ROWS,
        texts=[""] * ROWS,
    )


class Clock(Callback):
    """Notes when each step ends."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *_: object) -> None:
        self.times.append(time.perf_counter())


def main() -> None:
    """Seconds a step, after two to warm up, and seconds for the direct path, which is computed once."""
    torch.set_num_threads(1)
    quiet_lightning()
    data, model = rows(), InterpreterConfig(width=256, num_blocks=2, feedforward=512)
    for sampled in (0, 8192, 2048):
        clock = Clock()

        def trainer(callbacks: list[Callback], clock: Callback) -> Trainer:
            options = {"limit_train_batches": STEPS, "limit_val_batches": 0, "precision": mixed_precision()}
            return quiet_trainer(1, callbacks=[*callbacks, clock], **options)

        training = InterpreterTrainingConfig(batch=256, sampled=sampled)
        train_interpreter(data, InterpreterFit(model=model, training=training), trainer=partial(trainer, clock=clock))
        step = (clock.times[-1] - clock.times[2]) / (len(clock.times) - 3)
        print(
            f"sampled={sampled}: {1000 * step:.0f} ms a step of 256 rows, {ROWS / 256 * step:.0f} s an epoch",
            flush=True,
        )
    standard = torch.zeros(LAYERS, WIDTH), torch.ones(LAYERS, WIDTH)
    start = time.perf_counter()
    find_directions(data, *standard, num=DIRECTIONS, shrinkage=0.01)
    print(f"{DIRECTIONS} directions of {LAYERS * WIDTH} features: {time.perf_counter() - start:.0f} s, once")


if __name__ == "__main__":
    main()
