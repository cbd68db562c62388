"""Lightning's own objects from configuration: trainer, loggers, callbacks, by Hydra's `_target_`, from an allow-list."""

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
from hydra.utils import instantiate
from rich.console import Console

from ftw.cli import _run
from ftw.errors import ConfigError

# A configuration names classes to be built; only Lightning's may be.
ALLOWED = ("pytorch_lightning.",)


def make_trainer(job: Any, callbacks: list[pl.Callback], console: Console) -> pl.Trainer:
    """The trainer of a job with its loggers and callbacks, writing into the run's folder.

    Raises:
        ConfigError: a `_target_` outside the allow-list.
    """
    folder = str(_run.run_folder())
    loggers = [built for built in _build_all(job.logger, save_dir=folder)]
    further = _build_all(job.callbacks, dirpath=folder)
    if not console.is_terminal:
        further = [one for one in further if not isinstance(one, pl.callbacks.ProgressBar)]
    options = dict(job.trainer)
    _allowed(options)
    bar = any(isinstance(one, pl.callbacks.ProgressBar) for one in further)
    return instantiate(
        options, logger=loggers or False, callbacks=[*callbacks, *further], enable_progress_bar=bar, default_root_dir=folder
    )


def _build_all(group: Mapping[str, Any] | None, **places: str) -> list[Any]:
    """One object for each entry of a group; a place is given to those entries that leave that key null."""
    built = []
    for entry in (group or {}).values():
        if entry is None:
            continue
        _allowed(entry)
        filled = {key: places.get(key, value) if value is None else value for key, value in entry.items()}
        built.append(instantiate(filled))
    return built


def _allowed(entry: Mapping[str, Any]) -> None:
    for key, value in entry.items():
        if key == "_target_" and not str(value).startswith(ALLOWED):
            raise ConfigError(f"_target_={value!r} is not allowed; only classes of {', '.join(ALLOWED)} are built from configuration")
        if isinstance(value, Mapping):
            _allowed(value)
