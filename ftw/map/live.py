"""From a pack on disk to the activation lenses of a monitor: all of them, or what an aperture lets in.

Either is described by a config of its own, so that a key of the one is refused for the other instead of being ignored.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ftw.hat.deployment import DeploymentManifest
from ftw.hat.holder import ResidentLenses
from ftw.hat.shelf import ShelfConfig
from ftw.map.dynamic import DynamicLensManager
from ftw.map.pack_index import PackIndex

Manifest = DeploymentManifest | Path | str


@dataclass(kw_only=True)
class ResidentConfig:
    """All lenses in memory; each is read at every token, unless a deployment manifest closes some.

    Attributes:
        precision: of the weights: auto (float16 where it can hold them), float32, float16, bfloat16 or int8.
    """

    precision: str = "auto"

    def open(
        self, pack: PackIndex, *, manifest: Manifest | None = None, watch: Sequence[str] = ()
    ) -> DynamicLensManager | None:
        """The lenses behind the aperture of a manifest, or None where nothing is closed.

        Raises:
            ConfigError, ConceptError, PackError: as of `DynamicLensManager`.
        """
        if manifest is None:
            return None
        holder = ResidentLenses(pack.bank().stored(self.precision))
        return DynamicLensManager(pack, manifest=manifest, watch=watch, holder=holder)


@dataclass(kw_only=True)
class DynamicConfig:
    """Lenses are read as the hierarchy opens, and brought from disk when they are read.

    Attributes:
        base_levels: *levels* that are always read. load_threshold, unload_threshold, cooldown_ticks: when a branch
            opens and closes. max_loaded: concepts read at once. Each null: the deployment manifest's, else [0], 0.3,
            0.1, 10, and as many as the hot budget holds.
        keep_top_k, max_depth, beam: of the aperture. by: what thresholds are about, "probability" or "percentile".
        shelf: budgets of the tiers; null keeps all lenses in memory.
    """

    base_levels: list[int] | None = None
    keep_top_k: int = 200
    load_threshold: float | None = None
    unload_threshold: float | None = None
    cooldown_ticks: int | None = None
    max_loaded: int | None = None
    max_depth: int = 5
    beam: int = 10
    by: str = "probability"
    shelf: ShelfConfig | None = field(default_factory=ShelfConfig)

    def open(
        self, pack: PackIndex, *, manifest: Manifest | None = None, watch: Sequence[str] = ()
    ) -> DynamicLensManager:
        """The lenses behind this aperture; to be closed.

        Raises:
            ConfigError, ConceptError, PackError: as of `DynamicLensManager`.
        """
        return DynamicLensManager(
            pack,
            base_layers=self.base_levels,
            keep_top_k=self.keep_top_k,
            load_threshold=self.load_threshold,
            unload_threshold=self.unload_threshold,
            cooldown_ticks=self.cooldown_ticks,
            max_loaded_lenses=self.max_loaded,
            max_depth=self.max_depth,
            beam=self.beam,
            watch=watch,
            manifest=manifest,
            by=self.by,
            shelf=self.shelf,
        )
