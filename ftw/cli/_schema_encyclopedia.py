"""The typed configuration of `ftw encyclopedia`."""

from dataclasses import dataclass, field

from ftw.map.collect import CollectConfig
from ftw.map.concept_source import ConceptsConfig
from ftw.map.growing.choose import ChooseConfig
from ftw.map.growing.convergence import ConvergenceConfig
from ftw.map.growing.grow import GrowConfig
from ftw.map.growing.writing import WritingConfig
from ftw.map.training.interpreter import InterpreterFit
from ftw.substrate.model import SubstrateConfig


@dataclass(kw_only=True)
class EncyclopediaJob:
    """`ftw encyclopedia`.

    Attributes:
        action: what to do. name: of the encyclopedia under $FTW_HOME, or a folder (with a "/").
        capture: which states are kept, of a bootstrap. choose: which concepts are refined.
        stage: of a refinement; null for the next of each concept. contexts: texts a concept gets.
        test_contexts: sentences a concept gets to test readers on.
        confidence: who judges: interpreter or nearest_mean. interpreter: how it is made and trained.
        readers: interpreters that judge; of several, what they disagree on most is refined first.
        out: file of an export, or folder of what convergence leaves. path: file of an import.
    """

    action: str = "status"
    name: str = "growing"
    substrate: SubstrateConfig = field(default_factory=SubstrateConfig)
    concepts: ConceptsConfig = field(default_factory=ConceptsConfig)
    capture: CollectConfig = field(default_factory=CollectConfig)
    choose: ChooseConfig = field(default_factory=ChooseConfig)
    writing: WritingConfig = field(default_factory=WritingConfig)
    interpreter: InterpreterFit = field(default_factory=InterpreterFit)
    grow: GrowConfig = field(default_factory=GrowConfig)
    convergence: ConvergenceConfig = field(default_factory=ConvergenceConfig)
    stage: int | None = None
    contexts: int = 5
    test_contexts: int = 3
    confidence: str = "interpreter"
    readers: int = 2
    out: str | None = None
    path: str | None = None
    seed: int = 0
    dry_run: bool = False
    json: bool = False
