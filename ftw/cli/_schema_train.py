"""The typed configuration of the verbs that make samples: collect, train, evaluate, demo."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from ftw.cli._schema import GenerationConfig
from ftw.hat.lens import HeadConfig
from ftw.map.cards import CardsConfig
from ftw.map.collect import CollectConfig
from ftw.map.compose import ComposeConfig
from ftw.map.concept_source import ConceptsConfig
from ftw.map.descriptions import DescriptionsConfig
from ftw.map.evaluate import EvaluateConfig
from ftw.map.labelled import LabelledConfig
from ftw.map.leaks import LeakConfig
from ftw.map.sequences import SequencesConfig
from ftw.map.text_control import TextConfig
from ftw.map.training.graduation import GraduationConfig
from ftw.map.training.interpreter_task import InterpreterTrainingConfig
from ftw.map.training.lens_task import TrainingConfig
from ftw.map.training.siblings import SiblingConfig
from ftw.map.training.temporal_task import SequenceTrainingConfig
from ftw.substrate.model import SubstrateConfig

# Kinds of data: the names in conf/data, with their schemas.
DATA = {
    "wordnet": ComposeConfig,
    "labelled": LabelledConfig,
    "sequences": SequencesConfig,
    "descriptions": DescriptionsConfig,
}


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
    sequences: SequenceTrainingConfig = field(default_factory=SequenceTrainingConfig)
    leaks: LeakConfig = field(default_factory=LeakConfig)
    graduation: GraduationConfig = field(default_factory=GraduationConfig)
    siblings: SiblingConfig = field(default_factory=SiblingConfig)
    interpreter: InterpreterTrainingConfig = field(default_factory=InterpreterTrainingConfig)


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
class StatesJob(SamplesJob):
    """What every verb that collects states needs."""

    map: MapNode = field(default_factory=MapNode)


@dataclass(kw_only=True)
class CollectJob(StatesJob):
    """`ftw collect`; `dense` is a file that sampled answers are exported to, in the layout of the original design."""

    dense: str | None = None


@dataclass(kw_only=True)
class TrainJob(StatesJob):
    """`ftw train`.

    Attributes:
        model: trains an interpreter instead of lenses.
        objective: what a sweep compares: "out_of_fold" (AUROC of training rows, which the solver logistic gives),
            "heldout" (AUROC of the held-out rows, which then are no longer independent of the choice), or "auto".
    """

    model: Any = None
    hat: HatNode = field(default_factory=HatNode)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    pack_id: str = "lenses"
    version: str = "0.1.0"
    watch_prompt: str | None = None
    resume: str | None = None
    objective: str = "auto"
    trainer: Any = MISSING
    logger: Any = None
    callbacks: Any = None


@dataclass(kw_only=True)
class EvaluateJob:
    """`ftw evaluate`; `texts=FILE` on the command line is short for `data.path=FILE`."""

    pack: str = "runs/latest/pack"
    substrate: SubstrateConfig = field(default_factory=SubstrateConfig)
    data: Any = MISSING
    map: MapNode = field(default_factory=MapNode)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    cards: CardsConfig = field(default_factory=CardsConfig)
    seed: int = 0


@dataclass(kw_only=True)
class DemoJob(TrainJob):
    """`ftw demo`."""

    prompt: str = MISSING
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    top_k: int = 5
