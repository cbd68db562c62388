"""The growing encyclopedia: a folder of rounds, each an ordinary encyclopedia of new texts, and what is known so far.

    growing.json            which substrate, layers and pools
    concepts.jsonl.gz       the concepts in words
    rounds/0000/            an encyclopedia (texts, states); plan.json says what it was to hold, moments.h5 closes it
    confidence.json         how sure an interpreter was of each concept, after which round

A round is collected like anything else here: shard by shard, whole or not at all. It counts from the moment its
moments are written; until then every reader sees the encyclopedia as it was before.

    with GrowingEncyclopedia.open(folder) as growing:
        growing.concepts                        # N names, in the order of every index below
        growing.entries[7]                      # the words of concept 7: term, lemmas, definition, parent
        rows = growing.rows(stages=[0, 1])      # a table: concept, stage, group, text, named, one row a sample
        x_SLD = growing.states(rows, [9, 18])   # float16, in the order of the rows
        tests = growing.rows(split="test")      # texts of test rounds, of templates and makes unseen in training

Axes: N concepts, S rows, L layers, D model width.
"""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ftw.errors import ConfigError, EncyclopediaError
from ftw.map.encyclopedia import ConceptStatistics, Encyclopedia
from ftw.map.growing.entries import Entry, check_entries, read_entries, write_entries
from ftw.map.growing.moments import FILE as MOMENTS
from ftw.map.growing.moments import Moments, RoundMoments, write_moments
from ftw.map.growing.plan import Plan, read_json, write_json
from ftw.map.growing.rows import Rows
from ftw.map.growing.verdict import Verdict
from ftw.map.index import positives, sample_stages
from ftw.map.shard import CaptureSpec
from ftw.substrate.model import Substrate

FORMAT = "ftw-growing-encyclopedia"
SCHEMA_VERSION = 1
HEAD, ENTRIES, PLAN, ROUNDS = "growing.json", "concepts.jsonl.gz", "plan.json", "rounds"
NAMED = "named"


class GrowingEncyclopedia:
    """States of many concepts, in rounds; a context manager that closes its files."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder).expanduser().absolute()
        head = read_json(self.folder / HEAD, "bootstrap one with: ftw encyclopedia bootstrap")
        found = head.get("format"), head.get("schema_version")
        if found != (FORMAT, SCHEMA_VERSION):
            raise EncyclopediaError(
                f"{self.folder / HEAD} is of format {found[0]!r}, version {found[1]!r}; this ftw reads {FORMAT!r}, "
                f"version {SCHEMA_VERSION}"
            )
        try:
            self.spec = CaptureSpec.from_json(head["spec"])
            self.tokens_per_second = max(1.0, float(head["tokens_per_second"]))
        except (KeyError, TypeError, ValueError, ConfigError) as error:
            raise EncyclopediaError(f"{self.folder / HEAD} is damaged ({error}); restore it") from error
        self.entries = read_entries(self.folder / ENTRIES)
        self.concepts = [entry.name for entry in self.entries]
        self.index = {name: place for place, name in enumerate(self.concepts)}
        self._open: dict[int, Encyclopedia] = {}
        self._closed: list[RoundMoments | None] = []
        self.refresh()

    @classmethod
    def open(cls, folder: Path | str) -> "GrowingEncyclopedia":
        """Open a growing encyclopedia.

        Raises:
            EncyclopediaError: there is none, or it is damaged.
        """
        return cls(folder)

    @classmethod
    def create(
        cls, folder: Path | str, entries: Sequence[Entry], spec: CaptureSpec, *, tokens_per_second: float = 1000.0
    ) -> "GrowingEncyclopedia":
        """A new one without rounds, or the one that is there if it is for the same concepts and spec.

        Args:
            tokens_per_second: that the substrate reads on a machine like this one, for forecasts.

        Raises:
            ConceptError: a name twice, or no concepts. EncyclopediaError: the folder holds another one.
        """
        check_entries(entries)
        folder = Path(folder).expanduser().absolute()
        if (folder / HEAD).exists():
            present = cls.open(folder)
            present.check_same(entries, spec)
            return present
        write_entries(folder / ENTRIES, entries)
        head = {"format": FORMAT, "schema_version": SCHEMA_VERSION, "spec": spec.as_json()}
        head["tokens_per_second"] = round(tokens_per_second, 1)
        write_json(folder / HEAD, head)
        return cls.open(folder)

    def __enter__(self) -> "GrowingEncyclopedia":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close every file; the next read opens what it needs again."""
        while self._open:
            self._open.popitem()[1].close()

    def __len__(self) -> int:
        return len(self.concepts)

    def __repr__(self) -> str:
        layers = ", ".join(str(layer) for layer in self.layers)
        return f"GrowingEncyclopedia({self.name!r}: {len(self):,} concepts, {self.num_rounds} rounds, layers {layers})"

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.name

    @property
    def layers(self) -> tuple[int, ...]:
        """Block indices whose states are kept."""
        return self.spec.layers

    @property
    def width(self) -> int:
        """Length D of a state."""
        return self.spec.width

    # --- what it is for -------------------------------------------------------------------------------------------

    def check_same(self, entries: Sequence[Entry], spec: CaptureSpec) -> None:
        """Raise EncyclopediaError if it holds other concepts, or states of another substrate or kind."""
        there, asked = self.spec.as_json(), spec.as_json()
        differences = [
            f"{key} {there[key]} instead of {asked.get(key)}" for key in there if there[key] != asked.get(key)
        ]
        if list(entries) != self.entries:
            differences.append(f"other concepts ({len(self.entries):,}, asked for {len(entries):,})")
        if differences:
            raise EncyclopediaError(
                f"encyclopedia {self.name!r} holds something else: {'; '.join(differences)}; "
                f"name another folder, or delete {self.folder}"
            )

    def check_substrate(self, substrate: Substrate) -> None:
        """Raise EncyclopediaError if the states are not those of this substrate."""
        if substrate.fingerprint != self.spec.fingerprint:
            raise EncyclopediaError(
                f"encyclopedia {self.name!r} holds states of {self.spec.substrate_name} (fingerprint "
                f"{self.spec.fingerprint[:12]}), not of {substrate.name} (fingerprint {substrate.fingerprint[:12]}); "
                "bootstrap another one for this model"
            )

    # --- rounds ---------------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Look again which rounds are there and closed."""
        self._closed = []
        while (folder := self.round_folder(len(self._closed))).joinpath(PLAN).exists():
            file = folder / MOMENTS
            self._closed.append(RoundMoments.open(file, len(self)) if file.exists() else None)
            if self._closed[-1] is None:
                break
        self._newest = np.full(len(self), -1, dtype=np.int64)
        self._at = np.zeros(len(self), dtype=np.int64)
        for number, moments in enumerate(self._closed):
            if moments is not None:
                self._newest[moments.concepts] = number
                self._at[moments.concepts] = np.arange(len(moments.concepts))

    @property
    def num_rounds(self) -> int:
        """How many rounds are closed."""
        return sum(moments is not None for moments in self._closed)

    @property
    def pending(self) -> Plan | None:
        """The plan of a round that was begun and is not closed."""
        return self.plan(len(self._closed) - 1) if self._closed and self._closed[-1] is None else None

    def round_folder(self, number: int) -> Path:
        """Folder of a round."""
        return self.folder / ROUNDS / f"{number:04d}"

    def plan(self, number: int) -> Plan:
        """What a round was to hold."""
        return Plan.load(self.round_folder(number) / PLAN, len(self))

    def begin(self, plan: Plan) -> int:
        """Number of a new round with this plan.

        Raises:
            EncyclopediaError: another round is not closed yet.
        """
        if self.pending is not None:
            raise EncyclopediaError(f"round {self.num_rounds} of encyclopedia {self.name!r} is not finished yet")
        number = len(self._closed)
        write_json(self.round_folder(number) / PLAN, plan.record())
        self.refresh()
        return number

    def discard(self, number: int) -> None:
        """Remove a round that was begun and cannot be finished.

        Raises:
            EncyclopediaError: it is closed, or there is none.
        """
        if self.pending is None or number != len(self._closed) - 1:
            raise EncyclopediaError(f"round {number} of encyclopedia {self.name!r} is not one that was left unfinished")
        if encyclopedia := self._open.pop(number, None):
            encyclopedia.close()
        # The plan goes first: without it the rest is nothing to any reader.
        (self.round_folder(number) / PLAN).unlink()
        shutil.rmtree(self.round_folder(number))
        self.refresh()

    def encyclopedia(self, number: int) -> Encyclopedia:
        """The texts and states of a round."""
        if number not in self._open:
            self._open[number] = Encyclopedia.open(self.round_folder(number))
        return self._open[number]

    def finish(self, number: int) -> None:
        """Close a collected round: merge its samples into the moments so far of the concepts that it touched."""
        encyclopedia, plan = self.encyclopedia(number), self.plan(number)
        table = encyclopedia.table
        to_global = np.array([self.index[name] for name in table.concepts], dtype=np.int64)
        rows, cols = positives(table) if plan.split == "train" else (np.zeros(0, np.int64), np.zeros(0, np.int64))
        touched, place_E = np.unique(to_global[cols], return_inverse=True)
        count = self.num_samples[touched] + np.bincount(place_E, minlength=len(touched))
        stage = self.stage[touched]
        np.maximum.at(stage, place_E, sample_stages(table)[rows].astype(np.int64))
        only = np.full(len(touched), -1)
        only[place_E] = rows
        write_moments(
            self.round_folder(number) / MOMENTS,
            concepts=touched,
            count=count,
            stage=stage,
            row=np.where(count == 1, only, -1),
            by_layer=self._merged(encyclopedia, touched[count > 1], (rows, to_global[cols])),
        )
        self.refresh()

    def _merged(
        self, encyclopedia: Encyclopedia, concepts: np.ndarray, marks: tuple[np.ndarray, np.ndarray]
    ) -> Iterator[tuple[int, Moments]]:
        """For each layer, the moments of some concepts with the samples of a round (text rows, concepts) added."""
        rows, concept_E = marks
        kept = np.isin(concept_E, concepts)
        rows, place_E = rows[kept], np.searchsorted(concepts, concept_E[kept])
        if not len(concepts):
            return
        for layer in self.layers:
            new = Moments.of(encyclopedia.pooled(layer, "mean", rows), place_E, len(concepts))
            yield layer, self.moments(layer, concepts).merged(new)

    # --- what is known so far --------------------------------------------------------------------------------------

    @property
    def num_samples(self) -> np.ndarray:
        """N counts of training samples."""
        return self._so_far("count", 0)

    @property
    def stage(self) -> np.ndarray:
        """N highest stages of a concept's samples, -1 without any."""
        return self._so_far("stage", -1)

    def _so_far(self, name: str, missing: int) -> np.ndarray:
        found = np.full(len(self), missing, dtype=np.int64)
        for number in np.unique(self._newest[self._newest >= 0]):
            moments, mine = self._closed[number], self._newest == number
            found[mine] = getattr(moments, name)[self._at[mine]]
        return found

    def moments(self, layer: int, concepts: np.ndarray | None = None) -> Moments:
        """Count, mean and sum of squared deviations of some concepts (default: all) at a layer.

        Raises:
            EncyclopediaError: no such layer, or damaged files.
        """
        self._check_layers([layer])
        wanted = np.arange(len(self)) if concepts is None else np.asarray(concepts, dtype=np.int64)
        found = Moments.none(len(wanted), self.width)
        newest, at = self._newest[wanted], self._at[wanted]
        for number in np.unique(newest[newest >= 0]):
            stored, mine = self._closed[number], np.flatnonzero(newest == number)
            assert stored is not None  # it is the newest that speaks for a concept
            count, place = stored.count[at[mine]], stored.place[at[mine]]
            found.count[mine] = count
            single, several = mine[count == 1], mine[count > 1]
            if len(single):
                rows = stored.row[at[single]]
                found.mean[single] = self.encyclopedia(int(number)).pooled(layer, "mean", rows)
            if len(several):
                found.mean[several], found.m2[several] = stored.read(layer, place[count > 1])
        return found

    def statistics(self, layer: int) -> ConceptStatistics:
        """Moments, stage and confidence of every concept at a layer; NaN for what is not known."""
        moments = self.moments(layer)
        return ConceptStatistics(
            num_samples=moments.count,
            mean_ND=np.where(moments.count[:, None] > 0, moments.mean, np.nan).astype(np.float32),
            variance_ND=moments.variance().astype(np.float32),
            stage=self.stage,
            confidence=self.confidence,
        )

    @property
    def confidence(self) -> np.ndarray:
        """N values in 0..1 that the last judge set, NaN where none has."""
        return self._verdict().confidence_N

    @property
    def doubt(self) -> np.ndarray:
        """N values by which the last judge says what to refine first, NaN where none has."""
        return self._verdict().doubt_N

    @property
    def confused_with(self) -> list[list[int]]:
        """For each concept, the indices of those that the last judge confused it with, most confused first."""
        return self._verdict().confused_with

    @property
    def judged(self) -> dict[str, Any]:
        """By which judge, after which round, the confidence was set; empty before."""
        return self._verdict().judged

    def _verdict(self) -> Verdict:
        return Verdict.load(self.folder, len(self))

    def set_confidence(
        self, confidence: np.ndarray, doubt: np.ndarray, confused_with: Sequence[Sequence[int]], **judged: Any
    ) -> None:
        """Keep how sure a judge is of each concept, and what it confuses it with.

        Args:
            confidence: N values in 0..1, or NaN. doubt: N values, the larger to be refined the sooner, or NaN.
            judged: words about the judge, plain JSON values.

        Raises:
            DataError: another number of values, or one outside 0..1.
        """
        others = [[int(other) for other in one] for one in confused_with]
        judged = {"round": self.num_rounds, **judged}
        confidence, doubt = (np.asarray(values, dtype=np.float64) for values in (confidence, doubt))
        Verdict(confidence, doubt, others, judged).save(self.folder, len(self))

    # --- samples -----------------------------------------------------------------------------------------------------

    def rows(
        self, stages: Sequence[int] | None = None, *, split: str = "train", concepts: Sequence[int] | None = None
    ) -> Rows:
        """All samples of some stages (default: all), in the order they were collected.

        Args:
            split: "train"; "test" for texts to test readers on, "background" for those that concepts are judged on.
            concepts: indices of the concepts wanted; None for all.
        """
        wanted = None if concepts is None else np.isin(np.arange(len(self)), np.asarray(concepts))
        parts = [self._round_rows(number, split) for number in range(self.num_rounds)]
        found = Rows.joined([part for part in parts if part is not None])
        kept = np.ones(len(found), dtype=bool)
        if stages is not None:
            kept &= np.isin(found.stage, list(stages))
        if wanted is not None:
            kept &= wanted[found.concept]
        return found if kept.all() else found.take(kept)

    def _round_rows(self, number: int, split: str) -> Rows | None:
        table = self.encyclopedia(number).table
        marked = (table.labels == 1) & (np.asarray(table.splits) == split)[table.rows]
        text_rows, cols = table.rows[marked], table.cols[marked]
        if not len(text_rows):
            return None
        to_global = np.array([self.index[name] for name in table.concepts], dtype=np.int32)
        named = np.array([word == "1" for word in table.columns[NAMED]])
        return Rows(
            to_global[cols],
            sample_stages(table)[text_rows],
            [table.groups[row] for row in text_rows],
            [table.texts[row] for row in text_rows],
            [table.sources[row] for row in text_rows],
            named[text_rows],
            np.full(len(text_rows), number, dtype=np.int32),
            text_rows.astype(np.int32),
        )

    def states(self, rows: Rows, layers: Sequence[int] | None = None, *, pool: str = "mean") -> np.ndarray:
        """Pooled states of some rows, float16 [S, L, D], layer-normed residual stream.

        Args:
            layers: block indices, the order of the L axis; None for all.

        Raises:
            EncyclopediaError: no such layer or pool, or damaged files.
        """
        layers = self.layers if layers is None else tuple(layers)
        self._check_layers(layers)
        states_SLD = np.empty((len(rows), len(layers), self.width), dtype=np.float16)
        for number in np.unique(rows.rounds):
            mine = np.flatnonzero(rows.rounds == number)
            for place, layer in enumerate(layers):
                states_SLD[mine, place] = self.encyclopedia(int(number)).pooled(layer, pool, rows.text_rows[mine])
        return states_SLD

    def _check_layers(self, layers: Sequence[int]) -> None:
        if missing := [layer for layer in layers if layer not in self.layers]:
            has = ", ".join(str(layer) for layer in self.layers)
            raise EncyclopediaError(
                f"encyclopedia {self.name!r} has no layer {missing[0]} (it has {has}); bootstrap another one with it"
            )
