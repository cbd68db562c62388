"""A colour for every concept: relatives look alike, strangers do not, and the same pack always gives the same colours.

The circle of hues is shared out down the hierarchy, each branch a slice as wide as the concepts under it (Tennekes and
de Jonge, 2014, "Tree Colors: Color Schemes for Tree-Structured Data"). Neighbours in hue alternate in lightness, so
that they stay apart for readers who do not tell the hues apart. Colours are built in OKLCH (Ottosson, 2020), where
equal lightness looks equally light, and carry an ink that is readable on them.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

INK_DARK, INK_LIGHT = "#161616", "#ffffff"
GAP = 0.12  # share of a slice left empty between siblings' slices
START_HUE = 25.0
# Lightness by place among the siblings, per use; chroma is cut to what the screen can show.
LIGHT, DARK = (0.885, 0.815, 0.92), (0.47, 0.39, 0.54)
LINE_LIGHT, LINE_DARK = (0.58, 0.48, 0.66), (0.72, 0.64, 0.80)


@dataclass(frozen=True)
class Colour:
    """One concept's colour as `#rrggbb`: a ground with its ink for light and dark pages, and a line for each."""

    light: str
    light_ink: str
    dark: str
    dark_ink: str
    line_light: str
    line_dark: str


@dataclass
class _Node:
    children: dict[str, "_Node"] = field(default_factory=dict)
    is_concept: bool = False

    def weight(self) -> int:
        return self.is_concept + sum(child.weight() for child in self.children.values())


def concept_colours(names: Iterable[str], paths: Mapping[str, Sequence[str]] | None = None) -> dict[str, Colour]:
    """Colours of concepts; give the whole pack, so that a concept keeps its colour in every picture.

    Args:
        names: concept names, in any order.
        paths: root … name for a name, as `ConceptPack.path` gives it. A name without one is a root.
    """
    names = list(names)
    root = _Node()
    for name in sorted(names):
        node = root
        for step in (paths or {}).get(name) or [name]:
            node = node.children.setdefault(step, _Node())
        node.is_concept = True
    places: dict[str, tuple[float, int]] = {}
    _share_hues(root, START_HUE, START_HUE + 360.0, 0, places)
    return {name: _colour(*places[name]) for name in names}


def _share_hues(node: _Node, low: float, high: float, depth: int, places: dict[str, tuple[float, int]]) -> None:
    """Give each child its slice of [low, high) degrees and note the middle of it with its lightness step."""
    total = sum(child.weight() for child in node.children.values())
    gap = GAP if len(node.children) > 1 and depth > 0 else 0.0
    start = low
    for index, (name, child) in enumerate(sorted(node.children.items())):
        width = (high - low) * child.weight() / total
        # A single child is as wide as its parent: its lightness, not its hue, tells them apart.
        places[name] = ((start + width / 2) % 360, (index + depth) % 3)
        _share_hues(child, start + gap / 2 * width, start + (1 - gap / 2) * width, depth + 1, places)
        start += width


def _colour(hue: float, step: int) -> Colour:
    light, dark = oklch(LIGHT[step], 0.095, hue), oklch(DARK[step], 0.11, hue)
    return Colour(
        light=light,
        light_ink=ink(light),
        dark=dark,
        dark_ink=ink(dark),
        line_light=oklch(LINE_LIGHT[step], 0.16, hue),
        line_dark=oklch(LINE_DARK[step], 0.14, hue),
    )


def ink(ground: str) -> str:
    """Black or white, whichever reads better on `ground`."""
    return max((INK_DARK, INK_LIGHT), key=lambda colour: contrast(colour, ground))


def contrast(first: str, second: str) -> float:
    """Contrast ratio of two `#rrggbb`, 1 to 21 (WCAG 2.2; 4.5 is enough for text)."""
    lighter, darker = sorted((_luminance(first), _luminance(second)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(colour: str) -> float:
    channels = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def oklch(lightness: float, chroma: float, hue: float) -> str:
    """`#rrggbb` of an OKLCH colour (hue in degrees), with as much of the chroma as sRGB holds."""
    while chroma > 0 and not all(-1e-4 <= value <= 1.0001 for value in _linear_rgb(lightness, chroma, hue)):
        chroma -= 0.005
    return "#" + "".join(f"{_byte(value):02x}" for value in _linear_rgb(lightness, max(chroma, 0.0), hue))


def _linear_rgb(lightness: float, chroma: float, hue: float) -> tuple[float, float, float]:
    """OKLCH to linear sRGB; the matrices are Ottosson's."""
    a, b = chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue))
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    return (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )


def _byte(linear: float) -> int:
    linear = min(max(linear, 0.0), 1.0)
    value = 12.92 * linear if linear <= 0.0031308 else 1.055 * linear ** (1 / 2.4) - 0.055
    return round(255 * value)
