"""The typed configuration of every verb.

Each part's schema stands beside the class that it configures; here they are put together into jobs and registered, so
that Hydra refuses a wrong key or type before any work begins.
"""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from ftw.hat.lens import HeadConfig
from ftw.map.collect import CollectConfig
from ftw.map.compose import ComposeConfig
from ftw.map.concept_source import ConceptsConfig
from ftw.map.evaluate import EvaluateConfig
from ftw.map.labelled import LabelledConfig
from ftw.map.text_control import TextConfig
from ftw.map.training.lens_task import TrainingConfig
from ftw.substrate.model import SubstrateConfig


@dataclass(kw_only=True)
class HatNode:
    """What reads."""

    lens: HeadConfig = field(default_factory=HeadConfig)


@dataclass(kw_only=True)
class MapNode:
    """What is stored, and how lenses are fitted."""

    encyclopedia: CollectConfig = field(default_factory=CollectConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    text: TextConfig = field(default_factory=TextConfig)


@dataclass(kw_only=True)
class GenerationConfig:
    """How an answer is generated.

    Attributes:
        max_new_tokens, do_sample, temperature, top_p: of transformers' `generate`.
        options: any further option of it.
        chat: put the prompt into the model's chat template. system: text for it.
    """

    max_new_tokens: int = 120
    do_sample: bool = True
    temperature: float = 0.7
    top_p: float = 0.95
    options: dict[str, Any] = field(default_factory=dict)
    chat: bool = True
    system: str | None = None


@dataclass(kw_only=True)
class SamplesJob:
    """What every verb that makes samples needs."""

    substrate: SubstrateConfig = field(default_factory=SubstrateConfig)
    concepts: ConceptsConfig = field(default_factory=ConceptsConfig)
    data: Any = MISSING
    layers: list[float] = field(default_factory=lambda: [0.3, 0.6, 0.9])
    seed: int = 0
    dry_run: bool = False


@dataclass(kw_only=True)
class ConceptsJob:
    """`ftw concepts`."""

    action: str = "show"
    concepts: ConceptsConfig = field(default_factory=ConceptsConfig)
    out: str | None = None
    max_level: int | None = 2


@dataclass(kw_only=True)
class CollectJob(SamplesJob):
    """`ftw collect`."""

    map: MapNode = field(default_factory=MapNode)


@dataclass(kw_only=True)
class TrainJob(CollectJob):
    """`ftw train`."""

    hat: HatNode = field(default_factory=HatNode)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    pack_id: str = "lenses"
    version: str = "0.1.0"
    watch_prompt: str | None = None
    resume: str | None = None
    trainer: Any = MISSING
    logger: Any = None
    callbacks: Any = None
    experiment: Any = None


@dataclass(kw_only=True)
class EvaluateJob:
    """`ftw evaluate`."""

    pack: str = "runs/latest/pack"
    substrate: SubstrateConfig = field(default_factory=SubstrateConfig)
    texts: str | None = None
    data: Any = MISSING
    map: MapNode = field(default_factory=MapNode)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    seed: int = 0


@dataclass(kw_only=True)
class MonitorJob:
    """`ftw monitor`."""

    pack: str = "runs/latest/pack"
    prompt: str | None = None
    text: str | None = None
    substrate: SubstrateConfig = field(default_factory=SubstrateConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    top_k: int = 5
    watch: list[str] = field(default_factory=list)
    levels: list[int] | None = None
    json: bool = False
    save: str | None = None
    seed: int = 0


@dataclass(kw_only=True)
class DemoJob(TrainJob):
    """`ftw demo`."""

    prompt: str = MISSING
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    top_k: int = 5


JOBS = {
    "concepts": ConceptsJob,
    "collect": CollectJob,
    "train": TrainJob,
    "evaluate": EvaluateJob,
    "monitor": MonitorJob,
    "demo": DemoJob,
}


def register() -> None:
    """Tell Hydra the schemas."""
    store = ConfigStore.instance()
    for verb, job in JOBS.items():
        store.store(name=f"{verb}_schema", node=job)
    store.store(group="data", name="wordnet_schema", node=ComposeConfig)
    store.store(group="data", name="labelled_schema", node=LabelledConfig)
