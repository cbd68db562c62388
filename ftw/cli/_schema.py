"""The typed configuration of the verbs that need no trainer, and how any of them is made known to Hydra.

Each part's schema stands beside the class that it configures; here they are put together into jobs, so that Hydra
refuses a wrong key or type before any work begins. What trains stands in `_schema_train`: importing Lightning takes
seconds, which a live reading need not wait for.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from ftw.bench.measure import BenchConfig
from ftw.cat.narrative import NarrativeConfig
from ftw.cli._sweeper import register_sweeper
from ftw.hat.interpreter import InterpreterConfig
from ftw.map.concept_source import ConceptsConfig
from ftw.map.live import DynamicConfig, ResidentConfig
from ftw.substrate.model import SubstrateConfig

BENCHES = ("bank", "shelf", "text", "monitor", "train", "load", "temporal", "collect", "pack")
# Which lenses a monitor reads: the names in conf/hat/aperture, with their schemas.
APERTURES = {"all": ResidentConfig, "dynamic": DynamicConfig}
MODELS = {"interpreter": InterpreterConfig}  # the names in conf/model


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
class BenchJob(BenchConfig):
    """`ftw bench`.

    Attributes:
        bench: what is measured: bank, shelf, text, monitor, train, load, temporal or collect.
        json: file for the rows. plot: file for the cost curve of `bank`; beside the JSON if null.
    """

    bench: str = ""
    json: str | None = None
    plot: str | None = None


@dataclass(kw_only=True)
class ConceptsJob:
    """`ftw concepts`."""

    action: str = "show"
    concepts: ConceptsConfig = field(default_factory=ConceptsConfig)
    out: str | None = None
    max_level: int | None = 2


@dataclass(kw_only=True)
class MonitorHat:
    """What a monitor reads with: `aperture` is one of `APERTURES`."""

    aperture: Any = MISSING


@dataclass(kw_only=True)
class MonitorJob:
    """`ftw monitor`.

    Attributes:
        mode: activation (what the model thinks), text (what it writes), dual (both, and where they differ) or timeline
            (sliding windows of the answer, with sequence lenses or any others).
        window, stride: tokens of a window, and from one to the next, in timeline mode. threshold: probability from
            which a concept is told of a window.
        watch: concepts read at every token; they and all below them alarm above the percentile `alarm` (0.99 if null).
        text_window: pieces of text that the text lenses read together. text_encoder: of text lenses that embed; null
            for the one that the pack names.
        levels: of the hierarchy that are read; null for all.
        hat: which lenses are read at each token. manifest: a deployment's rules, a file or the name of a preset.
    """

    pack: str = "runs/latest/pack"
    prompt: str | None = None
    text: str | None = None
    substrate: SubstrateConfig = field(default_factory=SubstrateConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    mode: str = "activation"
    top_k: int = 5
    watch: list[str] = field(default_factory=list)
    alarm: float | None = None
    text_window: int = 32
    text_encoder: str | None = None
    window: int = 20
    stride: int = 5
    threshold: float = 0.5
    levels: list[int] | None = None
    hat: MonitorHat = field(default_factory=MonitorHat)
    manifest: str | None = None
    json: bool = False
    save: str | None = None
    seed: int = 0


@dataclass(kw_only=True)
class InterpretJob:
    """`ftw interpret`.

    Attributes:
        interpreter: folder of one. prompt, text: what is answered, or read. top_k: concepts told.
        window: tokens, the newest last, that each token of an answer is read with.
    """

    interpreter: str = "runs/latest/interpreter"
    prompt: str | None = None
    text: str | None = None
    substrate: SubstrateConfig = field(default_factory=SubstrateConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    top_k: int = 5
    window: int = 16
    json: bool = False
    seed: int = 0


@dataclass(kw_only=True)
class TimelineJob:
    """`ftw timeline`.

    Attributes:
        action: show or compare. files: timelines that `ftw monitor ... save=FILE` wrote.
        story: how it is told. out: folder for pictures and numbers; formats: png, svg, html, json, parquet.
        wandb: project that pictures and words go to; null for none.
    """

    action: str = "show"
    files: list[str] = field(default_factory=list)
    story: NarrativeConfig = field(default_factory=NarrativeConfig)
    out: str | None = None
    formats: list[str] = field(default_factory=lambda: ["png", "svg", "html", "json"])
    json: bool = False
    wandb: str | None = None


@dataclass(kw_only=True)
class PackJob:
    """`ftw pack`.

    Attributes:
        action: what to do. name: of a pack of the registry, or a folder. other: the second pack of a diff.
        kind: lens or concept. version, levels: of a pull; of an import, its version. org, repo: where on the Hub.
        out: name or folder of what is made. precision, rank: of a conversion (rank 0 keeps the basis as it is).
        encyclopedia: folder of states that a conversion is fitted to and judged on.
        fingerprint, layer: of the model that an imported pack was trained on, and which of its layers.
        private: whether a new repository is. force: replace or delete what is only here. key: a signature's, a file.
        trust_pickle: open pickled text lenses of an import, which run code; in a process of its own, after a scan.
    """

    action: str = "list"
    name: str | None = None
    other: str | None = None
    kind: str = "lens"
    version: str | None = None
    levels: list[int] | None = None
    org: str | None = None
    repo: str | None = None
    out: str | None = None
    precision: str | None = None
    rank: int = 0
    encyclopedia: str | None = None
    fingerprint: str = ""
    layer: int | None = None
    private: bool = True
    force: bool = False
    key: str | None = None
    trust_pickle: bool = False
    dry_run: bool = False
    json: bool = False


def register(verb: str, job: type, data: Mapping[str, type]) -> None:
    """Tell Hydra the schema of a verb's job and of the kinds of data it takes."""
    store = ConfigStore.instance()
    store.store(name=f"{verb}_schema", node=job)
    register_sweeper()
    for group, kinds in (("data", data), ("hat/aperture", APERTURES), ("model", MODELS)):
        for name, kind in kinds.items():
            store.store(group=group, name=f"{name}_schema", node=kind)
