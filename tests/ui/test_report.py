"""A report is one file that asks the network for nothing, says everything, and treats all it shows as text."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from ftw.errors import DataError
from ftw.hat.timeline import Timeline
from ftw.ui import plots
from ftw.ui.report import write_report

HOSTILE = "\"><img src=x onerror=alert(1)>'"


class Page(HTMLParser):
    """Elements, attributes and text of a page, as a browser's parser finds them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))


@pytest.fixture
def page(tmp_path: Path, timeline: Timeline, evaluation: Any) -> Page:
    path = write_report(
        tmp_path,
        title=f"Title {HOSTILE}",
        timelines=[timeline, timeline],
        evaluation=evaluation,
        recipe={"layers": [9, 18, 27], "calibration": {"method": "platt"}, HOSTILE: None},
        inputs=[
            {"name": HOSTILE, "address": f"https://example.org/{HOSTILE}", "sha256": "ab" * 32, "notice": HOSTILE},
            {"name": "model", "address": "/models", "sha256": {"a.bin": "cd" * 32, "b.bin": "ef" * 32, "c": "01" * 32}},
        ],
        config_yaml="seed: 0\ntitle: </pre><script>alert(2)</script>",
        versions={"torch": "2.13"},
        command=f"ftw demo prompt='{HOSTILE}'",
        timings={"Collect": 70.0, "Train": 2.5},
        notes=[HOSTILE],
        pictures={"Calibration": plots.svg(plots.reliability([0.1, 0.9], [0, 1]), prefix="p", themed=True)},
    )
    assert path == tmp_path / "report.html"
    return Page(path)


def test_nothing_hostile_becomes_markup(page: Page) -> None:
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 1  # our own
    assert "img" not in tags
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert "<script>alert(1)</script>" in page.text  # there, as text
    assert "\x1b" not in page.text
    assert "\u202e" not in page.text


def test_nothing_is_asked_of_the_network(page: Page) -> None:
    outward = {"src", "href", "xlink:href", "action", "data", "srcset"}
    found = [value for _, attributes in page.elements for name, value in attributes.items() if name in outward]
    assert all(value is not None and value.startswith("#") for value in found)
    style = "".join(page.words)
    assert "@import" not in style
    assert not re.search(r"url\((?!#)", style)


def test_the_policy_allows_only_the_pages_own_script(page: Page) -> None:
    import base64
    import hashlib

    policy = next(a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a)
    assert policy is not None
    script = next(words for words in page.words if "sortable" in words and "addEventListener" in words)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_everything_a_reader_needs_is_there(page: Page) -> None:
    for words in (
        "Whales",  # the answer
        "mean AUROC of the lenses on held-out text",
        "1 of 51 lenses, marked *",
        "calibration.method",
        "9, 18, 27",
        "ab" * 32,
        "sha256 of 3 files",
        "seed: 0",
        "torch",
        "1 min 10 s",
        "one note",
        "Calibration",
    ):
        assert words in page.text
    assert "im_start" not in page.text  # special tokens are not shown


def test_coloured_tokens_can_be_reached_with_the_keyboard(page: Page) -> None:
    tokens = [a for tag, a in page.elements if tag == "span" and (a.get("class") or "").startswith("tok")]
    coloured = [attributes for attributes in tokens if " on " in f"{attributes['class']} "]
    assert len(coloured) == 6  # three in each of two timelines
    assert all(attributes.get("tabindex") == "0" for attributes in coloured)
    assert len(tokens) == 20


def test_ids_are_unique(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_any_part_may_be_missing(tmp_path: Path, timeline: Timeline, evaluation: Any) -> None:
    parts: list[dict[str, Any]] = [{}, {"timelines": timeline}, {"evaluation": evaluation}, {"timings": {"a": 0.0}}]
    for number, part in enumerate(parts):
        path = write_report(tmp_path / f"{number}.html", title="Part", **part)
        assert "Part" in Page(path).text


def test_an_evaluation_without_figures_shows_dashes(tmp_path: Path, evaluation: Any) -> None:
    evaluation.concepts, evaluation.mean = {"a": {}, "b": {"auroc": None}}, {}
    assert "–" in Page(write_report(tmp_path, title="Empty", evaluation=evaluation)).text


def test_a_picture_must_be_svg(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"ftw\.ui\.plots\.svg"):
        write_report(tmp_path, title="x", pictures={"x": "<script>"})
    assert not list(tmp_path.iterdir())


def test_what_was_chosen_for_each_lens_stands_with_its_evidence(tmp_path: Path, evaluation: Any) -> None:
    evidence = {"mean": 0.81, "last": 0.93, "all": 0.9, "combined": 0.94, "text": float("nan")}
    choice = {"pools": {"mean": 0.25, "last": 0.75}, "evidence": evidence, "num_positive": 12, "num_negative": 34}
    evaluation.concepts["concept 3"]["choice"] = choice | {"text_weight": 0.5}
    evaluation.concepts["<i>worst</i>"]["choice"] = {"pools": {"mean": 1.0}, "difference_of_means": True}
    html = write_report(tmp_path, title="t", evaluation=evaluation).read_text("utf-8")
    assert "12 + 34" in html
    assert "mean 25 %, last 75 %" in html
    assert "<b>0.930</b>" in html
    assert "too few rows: difference of means" in html
    assert "<i>worst</i>" not in html
    assert "why</h2>" not in write_report(tmp_path, title="t").read_text("utf-8")
