"""What every page that FTW writes has: one file, no requests, and text from outside that stays text."""

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ftw.ui import figures
from ftw.ui.passage import visible

# Control characters, changes of writing direction, invisible marks, halves of surrogate pairs.
STEERING = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)
TEMPLATES = Path(__file__).parent / "templates"


def tamed(words: Any) -> Any:
    """What any expression of a template gives, without characters that steer instead of show."""
    # Exactly str: its child Markup is the template's own.
    return STEERING.sub("·", words) if type(words) is str else words


def environment() -> Environment:
    """The templates, with everything that is put into them escaped and tamed."""
    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=tamed,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(visible=visible, percent=figures.percent, duration=figures.duration)
    return made


def with_policy(page: str) -> str:
    """Allow this page's own script, by its hash, and nothing else: hostile text stays text even if an escape failed."""
    script = re.search(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    allowed = "'none'"
    if script is not None:
        digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
        allowed = f"'sha256-{digest}'"
    return page.replace("SCRIPT-HASH", allowed, 1)
