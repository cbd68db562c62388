"""The picture of how data flows through FTW, as SVG for the README: it follows the reader's light or dark theme."""

from html import escape

WIDTH, HEIGHT, BOX, TALL, GAP = 1082, 314, 152, 74, 33.6
TRAINING = (
    ("Concept pack", "names, definitions,", "hierarchy"),
    ("Texts", "positives, siblings,", "background"),
    ("Substrate", "a language model,", "its blocks tapped"),
    ("Encyclopedia", "states on disk,", "sharded, resumable"),
    ("Lenses", "N concepts trained", "at once, calibrated"),
    ("Lens pack", "weights, controls,", "recipe, hashes"),
)
READING = (
    ("Prompt", "anything you ask", ""),
    ("Substrate", "writes, one token", "at a time"),
    ("Monitor", "every lens reads", "every token"),
    ("Timeline", "which concepts,", "when, how strongly"),
)
STYLE = """
  svg { font-family: ui-sans-serif, system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }
  .box { fill: #ffffff; stroke: #b9c0c8; } .own { fill: #eef4fa; stroke: #2f6fb5; }
  .name { font-size: 15px; font-weight: 600; fill: #14171a; } .words { font-size: 12px; fill: #5a626b; }
  .row { font-size: 12px; letter-spacing: .08em; fill: #5a626b; }
  .way { stroke: #7b858f; stroke-width: 1.4; fill: none; } .tip { fill: #7b858f; }
  .cell { fill: #2f6fb5; }
  @media (prefers-color-scheme: dark) {
    .box { fill: #171b20; stroke: #4a525b; } .own { fill: #13263a; stroke: #5b9bd8; }
    .name { fill: #eceff2; } .words, .row { fill: #a2abb5; } .way { stroke: #87919b; } .tip { fill: #87919b; }
    .cell { fill: #7db4e6; }
  }
"""


def architecture_picture() -> str:
    """SVG text: concept pack → texts → substrate → encyclopedia → lenses → pack; then the pack read by the monitor."""
    top, low = 46.0, 232.0
    step = BOX + GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'aria-labelledby="title what">',
        '<title id="title">How data flows through FTW</title>',
        '<desc id="what">A concept pack gives texts; a substrate reads them; its states make an encyclopedia; lenses '
        "are trained on it and saved as a lens pack; a monitor reads new text with the pack, token by token.</desc>",
        f"<style>{STYLE}</style>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path class="tip" d="M0 0.6 8 4 0 7.4z"/></marker></defs>',
        _text(0.5, 22, "row", "MAKE LENSES, ONCE"),
        _text(0.5, low - 24, "row", "READ, LIVE"),
    ]
    for index, words in enumerate(TRAINING):
        parts.append(_box(0.5 + index * step, top, words, own=index == len(TRAINING) - 1))
        if index:
            parts.append(_way(f"M{index * step - GAP + 3:.1f} {top + TALL / 2}H{index * step - 4:.1f}"))
    for index, words in enumerate(READING):
        parts.append(_box(0.5 + index * step, low, words, own=index == 2))
        if index:
            parts.append(_way(f"M{index * step - GAP + 3:.1f} {low + TALL / 2}H{index * step - 4:.1f}"))
    # The pack goes down, left between the rows, and into the monitor from above.
    start, end, turn = 5 * step + BOX / 2, 2 * step + BOX / 2, (top + TALL + low) / 2
    parts.append(
        _way(
            f"M{start:.1f} {top + TALL + 3}V{turn - 10}q0 10 -10 10H{end + 10:.1f}q-10 0 -10 10V{low - 5}",
        )
    )
    parts.append(_heat(4 * step - 2, low + 2))
    return "\n".join([*parts, "</svg>\n"])


def _box(x: float, y: float, words: tuple[str, str, str], *, own: bool) -> str:
    name, first, second = words
    return (
        f'<rect class="box{" own" if own else ""}" x="{x:.1f}" y="{y}" width="{BOX}" height="{TALL}" rx="7"/>'
        + _text(x + 13, y + 26, "name", name)
        + _text(x + 13, y + 45, "words", first)
        + (_text(x + 13, y + 61, "words", second) if second else "")
    )


def _text(x: float, y: float, kind: str, words: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(words)}</text>'


def _way(path: str) -> str:
    return f'<path class="way" marker-end="url(#tip)" d="{path}"/>'


def _heat(x: float, y: float) -> str:
    """A small heat map beside the timeline, the picture a reader will meet in the report."""
    rows = (
        "9421000010000036521",
        "0159630000012000010",
        "0001367942000000000",
        "2000000013697520003",
        "0010020000102478974",
    )
    cells = [
        f'<rect class="cell" x="{x + 17 * column:.1f}" y="{y + 14.5 * row:.1f}" width="15" height="12.5" rx="1.5" '
        f'opacity="{0.07 + 0.1 * int(level):.2f}"/>'
        for row, levels in enumerate(rows)
        for column, level in enumerate(levels)
    ]
    return "".join(cells)
