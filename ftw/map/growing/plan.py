"""What a round is to hold, and the small JSON files of an encyclopedia, read with suspicion and written whole.

Axes: N concepts.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ftw.errors import EncyclopediaError
from ftw.map.samples import SPLITS
from ftw.paths import replace_file

STAGES = {0: "term", 1: "templates", 2: "written", 3: "opposed"}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a round is to hold; its texts follow from this and from the rounds before it.

    Attributes:
        stage: 0-3.
        split: "train"; or "test" (to test readers on) or "background" (to judge concepts on), which count nowhere.
        concepts: indices of the concepts; None for all.
        contexts: texts a concept is to get.
        seed: of every choice.
        against: for stage 3, the indices of the concepts that each of `concepts` is contrasted with.
        options: further settings of the texts.
    """

    stage: int
    split: str = "train"
    concepts: list[int] | None = None
    contexts: int = 1
    seed: int = 0
    against: list[list[int]] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """The plan as plain JSON values."""
        return {**asdict(self), "options": dict(self.options)}

    @classmethod
    def load(cls, path: Path, num_concepts: int) -> "Plan":
        """The plan in a file.

        Raises:
            EncyclopediaError: it is damaged, or of another encyclopedia.
        """
        record = read_json(path, "run the same command again")
        try:
            plan = cls(**record)
            if plan.stage not in STAGES or plan.split not in SPLITS:
                raise ValueError("a stage or a split that there is not")
            chosen = [*(plan.concepts or []), *(other for others in plan.against or [] for other in others)]
            if any(type(one) is not int or not 0 <= one < num_concepts for one in chosen):
                raise ValueError("a concept that there is not")
        except (TypeError, ValueError) as error:
            raise EncyclopediaError(f"{path} is no plan of a round ({error}); delete its folder") from error
        return plan


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file; raises EncyclopediaError, with the remedy, where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise EncyclopediaError(f"there is no {path}; {remedy}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise EncyclopediaError(f"{path} is damaged ({error}); {remedy}") from error
    if not isinstance(found, dict):
        raise EncyclopediaError(f"{path} is damaged (a {type(found).__name__}); {remedy}")
    return found


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    with replace_file(path) as temporary:
        temporary.write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
