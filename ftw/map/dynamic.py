"""Dual lenses with dynamic loading, as one object: hand it states and words, and get concepts back.

This is the interface of the dual-lens design over `ftw.hat.dynamic`: probabilities of activation lenses (what the model
thinks), of text lenses (what it writes), their larger one, and their difference. It stands in `map` because it opens
packs and compares both kinds.

Axes: N concepts, L layers, D model width, T tokens.

Source: the dual lens design of HatCat (dynamic hierarchical loading of activation and text lenses).
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ftw import paths
from ftw.cat.divergence import dissonance_rows
from ftw.errors import ConfigError, FTWError
from ftw.hat.aperture import Aperture, ApertureConfig
from ftw.hat.deployment import DeploymentManifest, fingerprint, preset
from ftw.hat.dynamic import ACTIVATION, TEXT, ApertureBank, LiveLenses, Tick
from ftw.hat.holder import Holder, ResidentLenses
from ftw.hat.lineage import Lineage
from ftw.hat.shelf import Shelf, ShelfConfig
from ftw.hat.timeline import sigmoid
from ftw.map.pack import LensPack
from ftw.map.pack_index import PackIndex
from ftw.substrate.model import Substrate
from ftw.substrate.taps import read_states

STRONG, MODERATE = 0.7, 0.4
# (concept, probability, level) — with `return_logits` (concept, probability, logit, level).
Result = tuple[Any, ...]


class DynamicLensManager:
    """Activation and text lenses of a pack, read concept by concept as the hierarchy opens.

    Example:
        manager = DynamicLensManager(pack, use_activation_lenses=True, use_text_lenses=True, keep_top_k=200)
        for token, hidden_state in generation:
            results = manager.detect_and_expand_dual(hidden_state=hidden_state, token_text=token)

    Args:
        pack: a lens pack or its folder; None: `runs/latest/pack`. Of a folder only the index is read at once: text
            lenses if they are used, weights if no shelf or other holder brings them.
        use_activation_lenses, use_text_lenses: which kinds are read; both for dissonance.
        base_layers: *levels* of the hierarchy that are always read, beside concepts without parents; not layers of the
            substrate. None: the manifest's, else [0].
        keep_top_k: concepts shown of *each* kind, and among which a parent must be to open.
        load_threshold, unload_threshold: probability at which a parent opens, and below which its family cools. None:
            the manifest's, else 0.3 and 0.1.
        cooldown_ticks: ticks before a cool family closes. None: the manifest's, else 10.
        max_loaded_lenses: concepts read at once, the base included; 0 for no limit. None: the manifest's, else what a
            shelf holds hot, else 0.
        max_depth, beam: steps down in one tick, parents opened in a step.
        watch: concepts always read, with their descendants.
        manifest: a deployment manifest, its file, or the name of a preset. Arguments given here go before it.
        by: what order and thresholds are about: "probability" or "percentile".
        text_window: pieces of text that the text lenses read together; 1 reads each piece alone.
        device: of the lenses. shelf: budgets for lenses that are brought from the folder when they are read; `close`
            the manager then, or use it in a `with`. holder: what else holds them; None keeps them all in one bank.

    Raises:
        ConfigError: values that cannot be, budgets too small for the concepts that are always read, or text lenses of
            a pack that has none. ConceptError: an unknown concept. PackError: a damaged pack.
    """

    def __init__(
        self,
        pack: LensPack | PackIndex | Path | str | None = None,
        *,
        use_activation_lenses: bool = True,
        use_text_lenses: bool = False,
        base_layers: Sequence[int] | None = None,
        keep_top_k: int = 200,
        load_threshold: float | None = None,
        unload_threshold: float | None = None,
        cooldown_ticks: int | None = None,
        max_loaded_lenses: int | None = None,
        max_depth: int = 5,
        beam: int = 10,
        watch: Sequence[str] = (),
        manifest: DeploymentManifest | Path | str | None = None,
        by: str = "probability",
        text_window: int = 32,
        device: str | torch.device = "cpu",
        shelf: ShelfConfig | None = None,
        holder: Holder | None = None,
    ) -> None:
        folder = paths.runs() / "latest" / "pack" if pack is None else pack
        self.pack = PackIndex.open(folder) if isinstance(folder, Path | str) else folder
        if use_text_lenses and self.pack.text is None:
            raise ConfigError(
                f"pack {self.pack.pack_id!r} has no text lenses; use use_text_lenses=False, or train them"
            )
        self.manifest = _manifest(manifest)
        self._lineage = Lineage(self.pack.names, self.pack.levels, self.pack.concepts)
        self.admission = None if self.manifest is None else self.manifest.resolve(self._lineage)
        given = {
            "base_levels": None if base_layers is None else list(base_layers),
            "load_threshold": load_threshold,
            "unload_threshold": unload_threshold,
            "cooldown_ticks": cooldown_ticks,
            "max_loaded": max_loaded_lenses,
        }
        own = {"keep_top_k": keep_top_k, "max_depth": max_depth, "beam": beam, "watch": list(watch)}
        config = replace(_aperture_config(self.manifest, set(self.pack.levels.values()), given), **own)
        aperture = Aperture(
            self._lineage,
            config,
            admitted=None if self.admission is None else self.admission.admitted,
            required=() if self.admission is None else self.admission.required,
            static=self.manifest is not None and not self.manifest.dynamic_loading.enabled,
        )
        text = self.pack.text if use_text_lenses else None
        self._opened = ExitStack()
        if use_activation_lenses and holder is None:
            holder = self._resident(device) if shelf is None else self._on_shelf(shelf, aperture)
        thought = holder if use_activation_lenses else None
        try:
            self.lenses = LiveLenses(aperture, activation=thought, text=text, by=by, window_tokens=text_window)
        except BaseException:
            self.close()
            raise
        self._last: Tick | None = None

    def __enter__(self) -> "DynamicLensManager":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of a shelf that was opened here."""
        self._opened.close()

    # --- reading -----------------------------------------------------------------------------------------------------

    def detect_and_expand(
        self, hidden_state: Tensor, top_k: int = 10, *, return_timing: bool = True, return_logits: bool = False
    ) -> tuple[list[Result], dict[str, float]]:
        """What the model thinks: the strongest concepts of one state, opening branches that pass.

        Args:
            hidden_state: [1, D] for a pack of one layer, [1, L, D] for several: outputs of the pack's layers at one
                token, as the substrate gives them.
            return_timing: fill the second value; else it is empty.

        Returns:
            [(concept, probability, level)], strongest first; nothing where the state is not finite (`missing` in the
            timing, and counted). Timing in milliseconds with counts beside it.

        Raises:
            SubstrateError: a state of another shape or dtype.
        """
        tick = self._tick(hidden_state, None)
        return self._results(tick, ACTIVATION, top_k, return_logits), self._timing(tick) if return_timing else {}

    def detect_and_expand_text(
        self, token_text: str, top_k: int = 10, *, return_timing: bool = True, return_logits: bool = False
    ) -> tuple[list[Result], dict[str, float]]:
        """What the model writes: the strongest concepts of the last pieces of text; needs no hidden state."""
        tick = self._tick(None, token_text)
        return self._results(tick, TEXT, top_k, return_logits), self._timing(tick) if return_timing else {}

    def detect_and_expand_dual(self, hidden_state: Tensor, token_text: str, top_k: int | None = None) -> dict[str, Any]:
        """Both, side by side, and where they differ.

        Args:
            top_k: concepts of each kind; None shows all, `keep_top_k` of each.

        Returns:
            activation, text, combined: [(concept, probability, level)], strongest first; combined has the larger of
                both. activation_scores, text_scores, combined_scores: the same as {concept: probability}.
            dissonance: [{concept, activation_prob, text_prob, divergence, signed}] for concepts with both readings,
                the largest divergence |activation − text| first.
            timing: as of `detect_and_expand`.

        Raises:
            ConfigError: the manager has one kind of lens only.
        """
        tick = self._tick(hidden_state, token_text)
        shown = {kind: self._results(tick, kind, top_k) for kind in (ACTIVATION, TEXT)}
        level_of = {name: level for results in shown.values() for name, _, level in results}
        rows = self._lineage.rows(level_of)
        # A concept shown for one kind counts with its reading of the other kind too, shown or not.
        read = {kind: _probabilities(level_of, tick.logits(kind)[rows]) for kind in shown}
        combined = {name: max(values[name] for values in read.values() if name in values) for name in level_of}
        ordered = sorted(combined, key=lambda name: -combined[name])
        return {
            **shown,
            "combined": [(name, combined[name], level_of[name]) for name in ordered],
            "activation_scores": {name: probability for name, probability, _ in shown[ACTIVATION]},
            "text_scores": {name: probability for name, probability, _ in shown[TEXT]},
            "combined_scores": {name: combined[name] for name in ordered},
            "dissonance": dissonance_rows(read[ACTIVATION], read[TEXT]),
            "timing": self._timing(tick),
        }

    @property
    def bank(self) -> ApertureBank:
        """The same lenses for `Monitor(substrate, manager.bank)`, which then reads through this aperture.

        Raises:
            ConfigError: the manager has no activation lenses.
        """
        return ApertureBank(self.lenses)

    # --- loading -----------------------------------------------------------------------------------------------------

    def preload_pack_to_ram(self, max_ram_mb: float | None = None) -> int:
        """Bring as many lenses into memory as fit; returns how many are there.

        Raises:
            ConfigError: a budget below the smallest that works.
        """
        if max_ram_mb is not None and max_ram_mb <= 0:
            raise ConfigError(f"max_ram_mb={max_ram_mb}: give a positive number of megabytes, or None for no limit")
        holder = self.lenses.activation
        return 0 if holder is None else holder.preload(2**63 - 1 if max_ram_mb is None else int(max_ram_mb * 2**20))

    def prewarm_from_prompt(self, prompt: str, substrate: Substrate) -> list[str]:
        """Open what a prompt calls for before the answer begins; returns the concepts that are read now in addition.

        Raises:
            PackError: the pack is for another substrate. ConfigError: the manager has no activation lenses.
        """
        holder = self.lenses.activation
        if holder is None:
            raise ConfigError("prewarming reads hidden states; use use_activation_lenses=True")
        self.pack.check(substrate)
        token_ids = substrate.chat(prompt)
        states = read_states(substrate, [token_ids], holder.layers, precision="float32")
        _, states_LTD = next(iter(states))
        self._last = self.lenses.read_all(states_LTD.transpose(0, 1))
        return self._lineage.names_of(self._last.decision.to_load)

    def reset_to_base(self) -> None:
        """Close everything, and forget the words read so far."""
        self.lenses.reset()
        self._last = None

    def request_lens_expansion(self, concept: str, reason: str = "") -> dict[str, Any]:
        """Read the children of a concept from now on, until `request_lens_collapse` or `reset_to_base`.

        Returns:
            {concept, reason, opened: names read in addition, loaded_lenses}.

        Raises:
            ConceptError: an unknown concept. ConfigError: the deployment does not admit it, or there is no room.
        """
        row = self._lineage.row(concept)
        if not self.lenses.aperture.admitted_N[row]:
            why = "" if self.admission is None else f": {self.admission.reasons[concept]}"
            raise ConfigError(f"the deployment does not admit {concept!r}{why}")
        rows = self.lenses.open(row)
        return self._request(concept, reason, "opened", rows)

    def request_lens_collapse(self, concept: str, reason: str = "") -> dict[str, Any]:
        """Stop reading what only this concept keeps open, for at least a cool-down; the base and watch list stay."""
        rows = self.lenses.close(self._lineage.row(concept))
        return self._request(concept, reason, "closed", rows)

    # --- knowing -----------------------------------------------------------------------------------------------------

    def get_concept_path(self, concept: str) -> list[str]:
        """Names from the root of the hierarchy to the concept."""
        self._lineage.row(concept)
        concepts = self.pack.concepts
        return concepts.path(concept) if concepts is not None and concept in concepts else [concept]

    def get_loaded_fingerprint(self) -> str:
        """sha256 over the sorted "name:level" of what is read now."""
        return fingerprint(self.loaded_lenses, self.pack.levels)

    @property
    def loaded_lenses(self) -> list[str]:
        """Concepts that are read now."""
        return self._lineage.names_of(np.flatnonzero(self.lenses.aperture.scored_N))

    @property
    def statistics(self) -> dict[str, Any]:
        """Counts since the beginning: ticks, loads, unloads, opened, closed, refused, missing; and the holder's."""
        lenses = self.lenses
        names = ("ticks", "loads", "unloads", "opened", "closed", "refused", "missing", "missing_lenses", "errors")
        return {
            **{name: lenses.counts[name] for name in names},
            "texts_without_known_words": lenses.counts["texts_without_known_words"],
            "last_error": lenses.last_error,
            "loaded_lenses": len(self.loaded_lenses),
            "open_parents": self._lineage.names_of(lenses.aperture.open_parents),
            "holder": {} if lenses.activation is None else lenses.activation.statistics(),
        }

    def get_introspection_reading(
        self, concepts: Iterable[str] | None = None, *, top_k: int = 10
    ) -> list[dict[str, Any]]:
        """The last reading in words: probability above 0.7 is strong, above 0.4 moderate, else weak.

        Args:
            concepts: which; one that was not read has probability None and strength "unread". None: the strongest.

        Raises:
            FTWError: nothing has been read yet.
        """
        tick = self._last
        if tick is None:
            raise FTWError("nothing has been read yet; call detect_and_expand first")
        kind = tick.kinds[0]
        wanted = self._lineage.names_of(tick.shown(kind)[:top_k]) if concepts is None else list(concepts)
        rows = self._lineage.rows(wanted)
        logits_M = tick.logits(kind)[rows]
        percentiles_M = self.lenses.percentiles(kind, logits_M, rows)
        return [
            {
                "concept": name,
                "level": int(self._lineage.level_N[row]),
                "kind": kind,
                "probability": None if logit != logit else float(sigmoid(logit)),
                "percentile": None if percentile != percentile else float(percentile),
                "strength": _strength(float(sigmoid(logit))),
                "path": self.get_concept_path(name),
            }
            for name, row, logit, percentile in zip(wanted, rows, logits_M, percentiles_M, strict=True)
        ]

    # --- parts -------------------------------------------------------------------------------------------------------

    def _resident(self, device: str | torch.device) -> ResidentLenses:
        return ResidentLenses(self.pack.bank().to(device))

    def _on_shelf(self, config: ShelfConfig, aperture: Aperture) -> Shelf:
        """The lenses on a shelf where what is always read never leaves the bank."""
        if not isinstance(self.pack, PackIndex):
            raise ConfigError("a shelf brings lenses from a folder; give the pack's folder, or leave out shelf")
        always = self._lineage.names_of(np.flatnonzero(aperture.base_N))
        shelf = self._opened.enter_context(Shelf(self.pack.cold(), config, always=always))
        if not aperture.config.max_loaded:  # more would be read in turns, and brought anew at every token
            aperture.config = replace(aperture.config, max_loaded=shelf.bank.slots.capacity)
        return shelf

    def _tick(self, hidden_state: Tensor | None, token_text: str | None) -> Tick:
        self._last = self.lenses.read(hidden_state, token_text)
        return self._last

    def _results(self, tick: Tick, kind: str, top_k: int | None, return_logits: bool = False) -> list[Result]:
        rows = tick.shown(kind)[: None if top_k is None else max(top_k, 0)]
        logits_M = tick.logits(kind)[rows].astype(np.float64)
        found = zip(rows.tolist(), sigmoid(logits_M).tolist(), logits_M.tolist(), strict=True)
        names, level_N = self._lineage.names, self._lineage.level_N
        if return_logits:
            return [(names[row], probability, logit, int(level_N[row])) for row, probability, logit in found]
        return [(names[row], probability, int(level_N[row])) for row, probability, _ in found]

    def _timing(self, tick: Tick) -> dict[str, float]:
        return {
            **tick.ms,
            "num_children_loaded": len(tick.decision.to_load),
            "num_unloaded": len(tick.decision.to_unload),
            "parents_opened": len(tick.decision.opened),
            "loaded_lenses": int(self.lenses.aperture.scored_N.sum()),
            "missing": len(tick.missing),
        }

    def _request(self, concept: str, reason: str, what: str, rows: np.ndarray) -> dict[str, Any]:
        changed = self._lineage.names_of(rows)
        return {"concept": concept, "reason": reason, what: changed, "loaded_lenses": len(self.loaded_lenses)}


def _manifest(given: DeploymentManifest | Path | str | None) -> DeploymentManifest | None:
    if given is None or isinstance(given, DeploymentManifest):
        return given
    if isinstance(given, Path) or given.endswith(".json") or Path(given).is_file():
        return DeploymentManifest.load(given)
    return preset(given)


def _aperture_config(manifest: DeploymentManifest | None, levels: set[int], given: Mapping[str, Any]) -> ApertureConfig:
    """What the caller gives (not None), else the manifest; without one no limit, as all lenses are resident."""
    config = ApertureConfig(max_loaded=0)
    if manifest is not None:
        loading = manifest.dynamic_loading
        config = ApertureConfig(
            base_levels=[level for level in manifest.layer_bounds.always_load_layers if level in levels],
            load_threshold=loading.parent_threshold,
            unload_threshold=loading.unload_threshold,
            cooldown_ticks=loading.cooldown_ticks,
            max_loaded=loading.max_loaded_concepts,
        )
    return replace(config, **{name: value for name, value in given.items() if value is not None})


def _probabilities(names: Iterable[str], logits_M: np.ndarray) -> dict[str, float]:
    values = sigmoid(logits_M.astype(np.float64)).tolist()
    return {name: value for name, value in zip(names, values, strict=True) if value == value}


def _strength(probability: float) -> str:
    if probability != probability:
        return "unread"
    return "strong" if probability > STRONG else "moderate" if probability > MODERATE else "weak"
