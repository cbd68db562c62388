"""`ftw train sweep=...`: Hydra's multirun led by an Optuna study, one run of the verb a trial, and a table of them all.

Each trial is a run like any other, in a folder of its own (`SWEEP/3`), with its report and its loggers. The study is a
journal in the sweep's folder: the same command with `hydra.sweep.dir=FOLDER` goes on where it was stopped. What is
swept is written in Hydra's own words, in `hydra.sweeper.params` or on the command line: `choice(a,b)`, `range(1,9)`,
`interval(0.1,1)`, `tag(log,interval(1e-4,1))`, `int(interval(1,9))`.

Hydra's own plugin for Optuna asks for Optuna 2; this is what a verb needs of it, on the Optuna of today.

Source: Akiba et al. 2019, Optuna: a next-generation hyperparameter optimization framework.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep, Transformer
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from ftw.cli import _run
from ftw.errors import ConfigError

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler

STUDY, JOURNAL, TRIALS = "sweep", "study.journal", "trials.json"
# Figures of a run that stand beside what was swept.
FIGURES = ("auroc", "auroc_low", "auroc_high", "auroc_text", "auroc_both", "difference", "ece", "fpr_at_threshold_1")


@dataclass(kw_only=True)
class OptunaSweeperConfig:
    """How a sweep is led.

    Attributes:
        num_trials: runs, those of an earlier part of the same sweep included. sampler: "tpe" or "random".
        params: what is swept, key -> words of Hydra. seed: of the draws.
        wandb: project that the table of trials goes to (offline, in the sweep's folder); null for none.
    """

    _target_: str = "hydra_plugins._ftw.OptunaSweeper"
    num_trials: int = 20
    sampler: str = "tpe"
    params: dict[str, str] = field(default_factory=dict)
    seed: int = 0
    wandb: str | None = None


class OptunaSweeper(Sweeper):
    """Asks the study, runs, tells the study, until there are as many finished trials as asked for."""

    def __init__(self, *, num_trials: int, sampler: str, params: DictConfig, seed: int, wandb: str | None) -> None:
        self._num_trials, self._sampler, self._seed, self._wandb = num_trials, sampler, seed, wandb
        self._params = {str(key): str(value) for key, value in params.items()}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config, self.hydra_context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> float:
        """The best value found."""
        assert self.config is not None  # Hydra calls setup first
        assert self.launcher is not None
        space, fixed = search_space(self._params, arguments)
        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        study = open_study(folder, self._sampler, self._seed)
        while (done := len(finished(study))) < self._num_trials:
            trial = study.ask(space)
            swept = [f"{key}={value}" for key, value in trial.params.items()]
            Console().rule(f"trial {done + 1} of {self._num_trials}: {', '.join(swept)}", align="left")
            (result,) = self.launcher.launch([[*fixed, *swept]], initial_job_idx=trial.number)
            value, run = result.return_value, result.hydra_cfg
            assert run is not None  # of a run that has ended
            if value is None or not math.isfinite(value):
                raise ConfigError(f"a run of {swept} gave no figure to compare; a sweep needs texts of split 'test'")
            trial.set_user_attr("folder", str(run.hydra.runtime.output_dir))
            study.tell(trial, value)
        self._tell(study, folder)
        return float(study.best_value)

    def _tell(self, study: "Study", folder: Path) -> None:
        """All trials, best first: printed, as a file, and as a table of wandb."""
        rows = sorted(map(_row, finished(study)), key=lambda row: -row["value"])
        columns = list(dict.fromkeys(key for row in rows for key in row))
        _run.write_json(folder / TRIALS, rows)
        table = Table(*columns)
        for row in rows:
            table.add_row(*(_cell(row.get(column)) for column in columns))
        Console().print(table)
        Console().print(
            f"best: {' '.join(f'{key}={value}' for key, value in study.best_params.items())}", soft_wrap=True
        )
        Console().print(f"all of them: {_run.shown(folder)}/{TRIALS}", style="dim", soft_wrap=True)
        if self._wandb is not None:
            log_trials(self._wandb, folder, columns, rows)


def register_sweeper() -> None:
    """Make `hydra/sweeper: optuna` known to Hydra."""
    from hydra_plugins._ftw import OptunaSweeper

    Plugins.instance().register(OptunaSweeper)
    ConfigStore.instance().store(group="hydra/sweeper", name="optuna", node=OptunaSweeperConfig, provider="ftw")


def search_space(
    params: Mapping[str, str], arguments: Sequence[str]
) -> tuple[dict[str, "BaseDistribution"], list[str]]:
    """What is swept, by key, and the other words of the command line.

    What is swept on the command line stands in place of all of `params`; a plain value there takes its key out of them.

    Raises:
        ConfigError: nothing is swept, or a parameter of `params` names a single value.
    """
    parser = OverridesParser.create()
    typed = parser.parse_overrides(list(arguments))
    configured = parser.parse_overrides([f"{key}={value}" for key, value in params.items()])
    if plain := [one.key_or_group for one in configured if not one.is_sweep_override()]:
        raise ConfigError(
            f"hydra.sweeper.params.{plain[0]}: {params[plain[0]]} is no choice(...), range(...) or interval(...)"
        )
    given = {one.key_or_group for one in typed}
    swept = [one for one in typed if one.is_sweep_override()]
    swept = swept or [one for one in configured if one.key_or_group not in given]
    if not swept:
        raise ConfigError("nothing is swept; give hydra.sweeper.params or key=choice(a,b) on the command line")
    fixed = [str(one.input_line) for one in typed if not one.is_sweep_override()]
    return {one.get_key_element(): _distribution(one) for one in swept}, fixed


def _distribution(override: Override) -> "BaseDistribution":
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value = override.value()
    if isinstance(value, IntervalSweep):
        whole = isinstance(value.start, int) and isinstance(value.end, int)
        made = IntDistribution if whole else FloatDistribution
        return made(value.start, value.end, log="log" in value.tags)  # pyright: ignore[reportArgumentType]
    if isinstance(value, RangeSweep) and not value.shuffle:
        numbers = list(override.sweep_iterator(transformer=Transformer.identity))
        whole = all(isinstance(number, int) for number in numbers)
        made = IntDistribution if whole else FloatDistribution
        return made(min(numbers), max(numbers), step=abs(value.step))  # pyright: ignore[reportArgumentType]
    # As Hydra writes them, so that a list or a group's option is a choice like any other.
    return CategoricalDistribution(tuple(override.sweep_string_iterator()))


def open_study(folder: Path, sampler: str, seed: int) -> "Study":
    """The study of a sweep's folder; trials that a stop left unfinished are given up."""
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend
    except ImportError as error:
        raise ConfigError("a sweep needs Optuna: pip install 'ftw-lenses[sweep]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
    study = optuna.create_study(storage=storage, study_name=STUDY, direction="maximize", load_if_exists=True)
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    # What goes on draws anew: the same seed would ask for the first trials again.
    study.sampler = _sampler(sampler, seed + len(study.trials))
    return study


def _sampler(name: str, seed: int) -> "BaseSampler":
    from optuna.samplers import RandomSampler, TPESampler

    known = {"tpe": TPESampler, "random": RandomSampler}
    if name not in known:
        raise ConfigError(f"hydra.sweeper.sampler={name!r}; choose {', '.join(known)}")
    return known[name](seed=seed)


def finished(study: "Study") -> list[Any]:
    """The trials that have a value."""
    from optuna.trial import TrialState

    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def _row(trial: Any) -> dict[str, Any]:
    """One trial: value, what was swept, figures of its run, seconds."""
    folder = Path(trial.user_attrs["folder"])
    metrics = folder / "metrics.json"
    mean = json.loads(metrics.read_text("utf-8"))["mean"] if metrics.is_file() else {}
    figures = {key: mean[key] for key in FIGURES if mean.get(key) is not None}
    seconds = round(trial.duration.total_seconds(), 1)
    return {"trial": trial.number, "value": trial.value, **trial.params, **figures, "seconds": seconds}


def _cell(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "" if value is None else str(value)


def log_trials(project: str, folder: Path, columns: Sequence[str], rows: list[dict[str, Any]]) -> None:
    """The trials as one table of wandb, offline: `wandb sync FOLDER/wandb/offline-*` sends it."""
    try:
        import wandb
    except ImportError as error:
        raise ConfigError("hydra.sweeper.wandb needs wandb: pip install 'ftw-lenses[wandb]'") from error
    with wandb.init(
        project=project, dir=str(folder), job_type="sweep", mode="offline", settings=wandb.Settings(silent=True)
    ) as run:
        data = [[row.get(column) for column in columns] for row in rows]
        run.log({"trials": wandb.Table(columns=list(columns), data=data)})
        run.summary["best"] = rows[0]["value"]
