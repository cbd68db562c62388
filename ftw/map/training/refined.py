"""Lenses in closed form that grow until they pass (`graduation`) and are told apart from their siblings (`siblings`).

Both decide on validation texts: of another make than the training texts, and apart from the test texts. What was
decided for each lens stands in its metrics, so that a report can say it.

Axes: S texts, N lenses, L layers, D model width.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from ftw.errors import ConfigError
from ftw.hat.store import LensStack
from ftw.map.concept import ConceptPack
from ftw.map.encyclopedia import Encyclopedia
from ftw.map.samples import SampleTable
from ftw.map.text_level import pooled_states
from ftw.map.training.graduation import GRADUATED, GraduationConfig, Validation, graduate, subset
from ftw.map.training.siblings import Rows, SiblingConfig, families, refine_siblings, validate_ranks
from ftw.map.training.solver import solve_stack
from ftw.map.training.sparse import SparsePool

# Marks of all texts for all lenses as a table: above this refinement would need gigabytes.
MOST_CELLS = 100_000_000


@dataclass
class Refined:
    """A stack, the texts it was fitted on, what was decided for each lens, and that in sentences."""

    stack: LensStack
    pool: SparsePool
    details: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def tell(self, name: str, key: str, found: dict[str, Any]) -> None:
        """Enter what was decided for a lens."""
        self.details.setdefault(name, {})[key] = found


def check_refinement(training: Any, solver: str, concepts: ConceptPack | None, validation: Encyclopedia | None) -> None:
    """Raise ConfigError where graduation or refinement is asked for and cannot be."""
    asked = [key for key in ("graduate", "refine_siblings") if getattr(training, key)]
    if not asked:
        return
    if solver != "lda":
        raise ConfigError(
            f"map.training.{asked[0]}=true is for lenses in closed form: map.training.solver=lda (this is {solver})"
        )
    if concepts is None or validation is None:
        raise ConfigError(
            f"map.training.{asked[0]}=true decides on texts of another make and needs a concept pack: data=wordnet"
        )


def grown(
    pool: SparsePool,
    shrinkage: float,
    concepts: ConceptPack,
    validation: Encyclopedia,
    config: GraduationConfig,
    *,
    seed: int,
    step: Callable[[str], None],
) -> Refined:
    """Lenses whose samples grew until they passed."""
    rows, (labels_VN, weights_VN) = _rows(validation, pool.names)
    found = graduate(
        pool,
        Validation(pooled_states(validation, pool.layers, pool.pool, rows), labels_VN, weights_VN),
        replace(config, shrinkage=shrinkage, seed=seed),
        siblings={name: concepts.siblings(name) for name in pool.names},
        step=lambda number, texts: step(f"graduation, round {number + 1}: {texts:,} texts"),
    )
    made = Refined(found.stack, subset(pool, found.used_S))
    for name, record in found.records.items():
        made.tell(name, "graduation", asdict(record))
    states = Counter(record.tier or record.state for record in found.records.values())
    passed = sum(record.state == GRADUATED for record in found.records.values())
    told = ", ".join(f"{count} {state}" for state, count in states.most_common())
    made.notes.append(
        f"graduation: {found.num_texts:,} of {len(pool.states_SLD):,} texts; {passed} of {len(pool.names)} lenses "
        f"passed ({told})"
    )
    return made


def told_apart(
    made: Refined, encyclopedia: Encyclopedia, validation: Encyclopedia, concepts: ConceptPack, config: SiblingConfig
) -> Refined:
    """The lenses moved so that siblings are ranked apart, where validation reads no worse."""
    names, layers, pool = made.stack.names, made.stack.layers, made.pool.pool
    table = encyclopedia.table
    train = table.where("train")
    if len(train) * len(names) > MOST_CELLS:
        raise ConfigError(
            f"map.training.refine_siblings: {len(train):,} texts times {len(names):,} lenses are too many marks to "
            "rank; take fewer levels (concepts.levels)"
        )
    rows, marks = _rows(validation, names)
    held_out = Rows(pooled_states(validation, layers, pool, rows), *marks)
    groups, roots = families(concepts, names), [name for name in concepts.roots if name in names]
    before = validate_ranks(made.stack, held_out, groups, roots=roots)
    learnt = Rows(pooled_states(encyclopedia, layers, pool, train), *_marks(table, train, names))
    stack, report = refine_siblings(made.stack, learnt, held_out, groups, config)
    after = validate_ranks(stack, held_out, groups, roots=roots)
    made = replace(made, stack=stack)
    for name in names:
        ranks = {"first_before": before.first.get(name), "first_after": after.first.get(name)}
        made.tell(name, "siblings", {"moved": name in report.kept, **ranks, "root_in_three": after.domain.get(name)})
    domain = f"; own root among the first three {np.mean(list(after.domain.values())):.3f}" if after.domain else ""
    made.notes.append(
        f"siblings: {len(report.kept)} of {len(names)} lenses moved; own lens first {before.mean_first:.3f} before, "
        f"{after.mean_first:.3f} after{domain} (validation texts)"
    )
    return made


def refined(
    pool: SparsePool,
    encyclopedia: Encyclopedia,
    config: Any,
    *,
    shrinkage: float,
    concepts: ConceptPack | None,
    validation: Encyclopedia | None,
    step: Callable[[str], None],
) -> Refined:
    """The stack of a pool, grown and told apart as far as the configuration (a `FitConfig`) asks for it."""
    training = config.training
    if concepts is None or validation is None:
        return Refined(solve_stack(pool, shrinkage=shrinkage, seed=config.seed), pool)
    if training.graduate:
        made = grown(pool, shrinkage, concepts, validation, config.graduation, seed=config.seed, step=step)
    else:
        made = Refined(solve_stack(pool, shrinkage=shrinkage, seed=config.seed), pool)
    if training.refine_siblings:
        step("siblings")
        made = told_apart(made, encyclopedia, validation, concepts, replace(config.siblings, seed=config.seed))
    return made


def _rows(encyclopedia: Encyclopedia, names: list[str]) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    rows = encyclopedia.table.where("test")
    return rows, _marks(encyclopedia.table, rows, names)


def _marks(table: SampleTable, rows: np.ndarray, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    place = {name: column for column, name in enumerate(table.concepts)}
    labels_SN, weights_SN = table.matrices(rows)
    order = [place[name] for name in names]
    return labels_SN[:, order], weights_SN[:, order]
