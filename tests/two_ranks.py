"""Train the toy interpreter on two ranks and save it; started by a test, and by Lightning for the second rank.

python two_ranks.py FOLDER RANKS
"""

import json
import sys
from pathlib import Path

import torch
from toy_rows import toy_fit, toy_rows

from ftw.errors import DataError
from ftw.map.training.callbacks import quiet_trainer
from ftw.map.training.interpreter import train_interpreter

OPTIONS = {"dropout": 0.0, "similarity": 8, "direct": 8, "batch": 15, "epochs": 3}


def main() -> None:
    torch.set_num_threads(1)
    folder, ranks = Path(sys.argv[1]), int(sys.argv[2])

    def trainer(callbacks: list) -> object:
        plan = {"strategy": "ddp", "devices": ranks, "use_distributed_sampler": False} if ranks > 1 else {}
        return quiet_trainer(3, callbacks=callbacks, accelerator="cpu", gradient_clip_val=1.0, **plan)

    rows = toy_rows(each=13)
    train_interpreter(rows, toy_fit(**OPTIONS), trainer=trainer, folder=folder)
    try:
        train_interpreter(rows.select(rows.where("train")[:1]), toy_fit(**OPTIONS), trainer=trainer)
    except DataError as error:
        (folder / "refused.json").write_text(json.dumps(str(error)))


if __name__ == "__main__":
    main()
