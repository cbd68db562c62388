"""Contexts that the substrate writes itself, block by block, so that a killed run loses at most one block.

A concept's requests go by its name and the seed. What comes back is kept if it is text about the thing (no preamble, no
refusal, no half sentence); a text that names the concept can be kept a second time with its words masked, so that a
reader learns what is said of a thing besides its name.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ftw.errors import ConfigError
from ftw.map.growing.contexts import Context, draw, wanted
from ftw.map.growing.plan import Plan
from ftw.map.growing.store import GrowingEncyclopedia
from ftw.map.sentences import CONTRAST_PROMPTS, WRITING_PROMPTS, written
from ftw.paths import replace_file
from ftw.substrate.model import Substrate
from ftw.substrate.prompts import generate_texts

BLOCK_PROMPTS = 256


@dataclass(kw_only=True)
class WritingConfig:
    """How the substrate writes contexts.

    Attributes:
        max_new_tokens: of a text. temperature: of the sampling. max_characters: of what is kept.
        masked: keep each text that names its concept a second time, with the words for it masked.
    """

    max_new_tokens: int = 48
    temperature: float = 0.8
    max_characters: int = 300
    masked: bool = True

    def __post_init__(self) -> None:
        if self.max_new_tokens < 8 or self.max_characters < 40 or self.temperature < 0:
            raise ConfigError(
                f"writing: max_new_tokens={self.max_new_tokens} must be at least 8, max_characters="
                f"{self.max_characters} at least 40, temperature={self.temperature} not negative"
            )

    def record(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        return asdict(self)


def write_contexts(
    growing: GrowingEncyclopedia, substrate: Substrate, plan: Plan, folder: Path, *, progress: bool = True
) -> list[Context]:
    """The texts that the substrate writes for a plan of stage 2 or 3, in the order of the concepts.

    Args:
        folder: where finished blocks are kept until the round's texts are stored.
    """
    config = WritingConfig(**plan.options)
    asked = _requests(growing, plan)
    contexts: list[Context] = []
    for start in range(0, len(asked), BLOCK_PROMPTS):
        block = asked[start : start + BLOCK_PROMPTS]
        replies = _replies(substrate, block, folder / f"{start:08d}.json", plan.seed + start, config, progress=progress)
        for (context, _), reply in zip(block, replies, strict=True):
            entry = growing.entries[context.concept]
            if text := written(reply, config.max_characters):
                contexts.append(context._replace(text=text))
                if config.masked and entry.names_itself(text):
                    contexts.append(context._replace(text=entry.masked(text), source="masked"))
    return contexts


def _requests(growing: GrowingEncyclopedia, plan: Plan) -> list[tuple[Context, str]]:
    """For every text to be written: the context without its text, and what the substrate is asked."""
    asked = []
    for place, index in enumerate(wanted(growing, plan)):
        entry = growing.entries[index]
        if plan.stage == 2:
            order = draw(plan.seed, entry.name, len(WRITING_PROMPTS))
            for number in range(plan.contexts):
                form = int(order[number % len(order)])
                context = Context(index, "", f"prompt {form}", "written")
                asked.append((context, WRITING_PROMPTS[form].format(thing=entry.phrase)))
        elif plan.against and (others := plan.against[place]):
            for form, prompt in enumerate(CONTRAST_PROMPTS):
                other = growing.entries[others[form % len(others)]]
                context = Context(index, "", f"contrast {form}", "written")
                asked.append((context, prompt.format(thing=entry.phrase, other=other.phrase)))
    return asked


def _replies(
    substrate: Substrate,
    block: Sequence[tuple[Context, str]],
    path: Path,
    seed: int,
    config: WritingConfig,
    *,
    progress: bool,
) -> list[str]:
    """What the substrate answers to a block of requests; read back if it was written before."""
    prompts = [prompt for _, prompt in block]
    if path.exists():
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            kept = None  # written anew
        if isinstance(kept, dict) and kept.get("prompts") == prompts and len(kept.get("replies", ())) == len(prompts):
            return [str(reply) for reply in kept["replies"]]
    replies = generate_texts(
        substrate,
        prompts,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        seed=seed,
        progress=progress,
    )
    with replace_file(path) as temporary:
        temporary.write_text(json.dumps({"prompts": prompts, "replies": replies}) + "\n", encoding="utf-8")
    return replies
