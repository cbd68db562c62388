"""Colours are the same every time, readable, and alike only for relatives."""

import itertools

import pytest

from ftw.ui.colours import concept_colours, contrast, ink, oklch

PATHS = {
    name: path
    for root, leaves in {"animal": ["whale", "dog", "owl"], "art": ["music", "film"], "law": ["court", "crime"]}.items()
    for name, path in [(root, [root]), *((leaf, [root, leaf]) for leaf in leaves)]
}


def test_order_of_names_does_not_matter() -> None:
    assert concept_colours(PATHS, PATHS) == concept_colours(list(PATHS)[::-1], PATHS)


@pytest.mark.parametrize("paths", [PATHS, None])
def test_every_ink_is_readable_on_its_ground(paths: dict | None) -> None:
    for colour in concept_colours([*PATHS, *(f"concept {index}" for index in range(64))], paths).values():
        assert contrast(colour.light, colour.light_ink) >= 4.5
        assert contrast(colour.dark, colour.dark_ink) >= 4.5


def test_concepts_of_a_small_pack_all_differ() -> None:
    colours = concept_colours(PATHS, PATHS)
    assert len({colour.light for colour in colours.values()}) == len(PATHS)


def test_relatives_are_closer_than_strangers() -> None:
    colours = concept_colours(PATHS, PATHS)

    def distance(one: str, two: str) -> float:
        pairs = ((colours[one].line_light[at : at + 2], colours[two].line_light[at : at + 2]) for at in (1, 3, 5))
        return sum((int(a, 16) - int(b, 16)) ** 2 for a, b in pairs)

    within = [distance(a, b) for a, b in itertools.combinations(PATHS, 2) if PATHS[a][0] == PATHS[b][0]]
    across = [distance(a, b) for a, b in itertools.combinations(PATHS, 2) if PATHS[a][0] != PATHS[b][0]]
    assert sum(within) / len(within) < 0.6 * sum(across) / len(across)


def test_known_colours() -> None:
    assert oklch(1.0, 0.0, 0.0) == "#ffffff"
    assert oklch(0.0, 0.0, 0.0) == "#000000"
    assert oklch(0.62796, 0.25768, 29.234) == "#ff0000"  # sRGB red, as Ottosson gives it
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert ink("#ffffff") != ink("#000000")
