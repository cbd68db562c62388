"""Every choice of every group makes a typed job, and `--help` names them all."""

from pathlib import Path

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from ftw import paths
from ftw.__main__ import VERBS
from ftw.cli._help import help_text
from ftw.cli._schema import BenchJob, ConceptsJob, InterpretJob, MonitorJob, PackJob, TimelineJob, register
from ftw.cli._schema_encyclopedia import EncyclopediaJob
from ftw.cli._schema_train import DATA, CollectJob, DemoJob, EvaluateJob, TrainJob

CONF = paths.conf()
JOBS = {
    "train": TrainJob,
    "demo": DemoJob,
    "collect": CollectJob,
    "evaluate": EvaluateJob,
    "monitor": MonitorJob,
    "interpret": InterpretJob,
    "concepts": ConceptsJob,
    "bench": BenchJob,
    "timeline": TimelineJob,
    "pack": PackJob,
    "encyclopedia": EncyclopediaJob,
}
NEEDED = [
    "substrate=local",
    "substrate.path=MODEL",
    "concepts=pack",
    "concepts.path=PACK",
    "data=labelled",
    "data.path=TEXTS",
]


def choices() -> list[tuple[str, str]]:
    files = [(file.parent.relative_to(CONF).as_posix(), file.stem) for file in sorted(CONF.rglob("*.yaml"))]
    return [(group, choice) for group, choice in files if group != "." and not group.startswith("hydra")]


def job(verb: str, *overrides: str):
    register(verb, JOBS[verb], DATA)
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        config = hydra.compose(verb, overrides=list(overrides))
    GlobalHydra.instance().clear()
    OmegaConf.resolve(config)
    return OmegaConf.to_object(config)


@pytest.mark.parametrize(("group", "choice"), choices())
def test_every_choice_of_every_group_makes_a_typed_job(group: str, choice: str):
    own = [word for word in NEEDED if word.startswith(f"{group}.") and choice in ("local", "pack", "labelled")]
    verb = "monitor" if group == "hat/aperture" else "train"
    assert isinstance(job(verb, f"{group}={choice}", *own), JOBS[verb])


@pytest.mark.parametrize("experiment", sorted(file.stem for file in (CONF / "experiment").glob("*.yaml")))
@pytest.mark.parametrize("verb", ["train", "demo"])
def test_every_experiment_makes_a_typed_job(verb: str, experiment: str):
    made, plain = job(verb, f"experiment={experiment}"), job(verb)
    assert isinstance(made, JOBS[verb])
    assert made != plain


@pytest.mark.parametrize("verb", JOBS)
def test_every_verb_has_a_job_that_composes_and_help_that_names_its_choices(verb: str):
    groups = {name for name in NEEDED if "=" in name}
    own = {
        "monitor": NEEDED[:2],
        "interpret": NEEDED[:2],
        "bench": [*NEEDED[:2], "bench=bank"],
        "concepts": NEEDED[2:4],
        "evaluate": [*NEEDED[:2], *NEEDED[4:]],
        "timeline": [],
        "pack": [],
        "encyclopedia": NEEDED[:4],
    }.get(verb, groups)
    assert isinstance(job(verb, *own), JOBS[verb])
    text = help_text(verb, str(CONF))
    assert text.startswith(f"ftw {verb}: ")
    assert max(len(line) for line in text.splitlines()) <= 130
    assert len(text.splitlines()) <= 66
    assert "_schema" not in text
    for group, choice in choices():
        if f"\n  {group} " in text:
            assert choice in text


def test_every_verb_has_a_module_and_a_configuration():
    assert set(VERBS) == set(JOBS)
    for verb in VERBS:
        assert (CONF / f"{verb}.yaml").is_file()
        assert (Path(paths.__file__).parent / "cli" / f"{verb}.py").is_file()
