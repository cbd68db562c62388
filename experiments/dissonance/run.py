"""Does dissonance mean something? It should be higher where a concept is thought and not written.

Reads matched cases (`cases.py`) with both kinds of lens, measures how well the concept's dissonance tells hidden from
plain ones, beside what each kind of lens tells alone, and draws it. Choices of window and mean were made beforehand.

Axes: C cases, T tokens, N concepts.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cases import THINGS, Case, instructed, masked, written
from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ftw.cat.divergence import Dissonance, Lag, dissonance
from ftw.errors import DataError, SubstrateError
from ftw.hat.monitor import Monitor
from ftw.hat.picture import Picture
from ftw.hat.text_window import text_timeline
from ftw.hat.timeline import Timeline
from ftw.map.bootstrap import bootstrap
from ftw.map.compose import ComposeConfig, compose
from ftw.map.kinship import Kinship
from ftw.map.metrics import auroc
from ftw.map.pack import LensPack, load_pack
from ftw.map.wordnet import WordNet
from ftw.substrate.model import load_substrate
from ftw.substrate.sources import fetch
from ftw.ui.plots import ACCENT, CONTROL, FAINT, STYLE, dissonance_heatmap, dissonance_scatter, png

MAX_NEW_TOKENS = 40
WINDOW, LAG_WINDOW, MAX_LAG, CHANCE = 8, 2, 5, 0.05
BATCH, DRAWS = 24, 2000
SHOWN_TOKENS = 12
# Higher where the concept is hidden, if they tell anything: the text reading with its sign turned.
MEASURES = ("dissonance", "largest window", "size", "activation alone", "text alone", "another concept")


@dataclass(frozen=True, kw_only=True)
class Read:
    """A case, its text, what was read of it, and whether the text names the concept."""

    case: Case
    text: str
    names_it: bool
    measures: dict[str, float]
    mean_activation: float
    mean_text: float
    lag: Lag | None
    dissonance: Dissonance


def timelines(monitor: Monitor, cases: Sequence[Case]) -> Iterator[tuple[Case, Timeline]]:
    """What the lenses say of each case, batches of unanswered prompts first."""
    asked = [case for case in cases if not case.answer]
    for start in track(range(0, len(asked), BATCH), "writing", transient=True):
        part = asked[start : start + BATCH]
        read = monitor.generate([case.prompt for case in part], max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        assert isinstance(read, list)
        yield from zip(part, read, strict=True)
    for case in track([case for case in cases if case.answer], "reading", transient=True):
        yield case, forced(monitor, case) if case.prompt else monitor.read(case.answer)


def forced(monitor: Monitor, case: Case) -> Timeline:
    """A given answer to a prompt, read as if the substrate had written it."""
    substrate = monitor.substrate
    asked = substrate.tokenizer.apply_chat_template(
        [{"role": "user", "content": case.prompt}], tokenize=False, add_generation_prompt=True
    )
    sink = substrate.tokenizer.convert_ids_to_tokens(substrate.sink_token_id)
    timeline, prompt_ids = monitor.read(asked.removeprefix(sink) + case.answer), substrate.chat(case.prompt)
    if timeline.token_ids[: len(prompt_ids)].tolist() != prompt_ids:
        raise SubstrateError(f"the chat template of {substrate.name!r} is cut otherwise with an answer behind it")
    timeline.is_prompt = np.arange(len(timeline)) < len(prompt_ids)
    return timeline


def measure(case: Case, timeline: Timeline, pack: LensPack, kinship: Kinship) -> Read:
    """Everything that is asked of one case."""
    assert pack.text is not None
    found = dissonance(timeline, text_timeline(timeline, pack.text))
    names = list(THINGS)
    column = found.concepts.index(case.concept)
    other = found.concepts.index(names[(names.index(case.concept) + 3) % len(names)])
    counted = found.counted
    values_TN, windows_TN = found.values_TN[counted], found.window_means(WINDOW)[counted]
    activation, text = (float(side[counted, column].mean()) for side in (found.activation_TN, found.text_TN))
    written_text = "".join(token for token, is_counted in zip(timeline.tokens, counted, strict=True) if is_counted)
    values = (
        values_TN[:, column].mean(),
        windows_TN[:, column].max(),
        np.abs(values_TN[:, column]).mean(),
        activation,
        -text,
        values_TN[:, other].mean(),
    )
    lags: list[Lag] = []
    if case.make == "written" and counted.sum() >= 4 * MAX_LAG + 2:
        near = dissonance(timeline, text_timeline(timeline, pack.text, tokens=LAG_WINDOW))
        lags = near.lags([case.concept], max_lag=MAX_LAG)
    return Read(
        case=case,
        text=written_text.strip(),
        names_it=kinship.names.index(case.concept) in kinship.spoken_of(written_text),
        measures=dict(zip(MEASURES, map(float, values), strict=True)),
        mean_activation=activation,
        mean_text=text,
        lag=lags[0] if lags else None,
        dissonance=found,
    )


def separation(name: str, reads: Sequence[Read], *, seed: int) -> dict[str, Any]:
    """AUROC of each measure for hidden against plain cases, with intervals over concepts."""
    labels_C1 = np.array([[read.case.hidden] for read in reads], dtype=np.int8)
    ones_C1, groups = np.ones(labels_C1.shape), np.array([read.case.concept for read in reads])
    scores = {measure: np.array([[read.measures[measure]] for read in reads]) for measure in MEASURES}
    drawn = bootstrap(scores, labels_C1, ones_C1, groups, draws=DRAWS, seed=seed)

    def edges(drawn_R: np.ndarray) -> list[float]:
        return [round(float(edge), 3) for edge in np.nanquantile(drawn_R, (0.025, 0.975))]

    found: dict[str, Any] = {"cases": name, "hidden": int(labels_C1.sum()), "plain": int((1 - labels_C1).sum())}
    found["concepts"] = len(set(groups))
    found["hidden_naming_it"] = _share([read for read in reads if read.case.hidden])
    found["plain_naming_it"] = _share([read for read in reads if not read.case.hidden])
    for measure, scores_C1 in scores.items():
        value = round(float(auroc(scores_C1, labels_C1, ones_C1)[0]), 3)
        found[measure] = {"auroc": value, "interval": edges(drawn[measure][:, 0])}
    for measure in MEASURES:
        found[measure] |= paired(reads, measure, seed=seed)
    for alone in ("text alone", "activation alone"):
        found[f"dissonance over {alone}"] = edges((drawn["dissonance"] - drawn[alone])[:, 0])
    return found


def paired(reads: Sequence[Read], measure: str, *, seed: int) -> dict[str, Any]:
    """In which share of the pairs the hidden case reads higher, ties half, with an interval over concepts."""
    pairs: dict[str, dict[bool, Read]] = {}
    for read in reads:
        pairs.setdefault(f"{read.case.make} {read.case.pair}", {})[read.case.hidden] = read
    by_concept: dict[str, list[float]] = {}
    for pair in pairs.values():
        if len(pair) == 2:
            above = np.sign(pair[True].measures[measure] - pair[False].measures[measure])
            by_concept.setdefault(pair[True].case.concept, []).append(float(above + 1) / 2)
    won_N, num_N = (np.array([part(shares) for shares in by_concept.values()]) for part in (sum, len))
    chosen_RN = np.random.default_rng(seed).integers(len(won_N), size=(DRAWS, len(won_N)))
    low, high = np.quantile(won_N[chosen_RN].sum(axis=1) / num_N[chosen_RN].sum(axis=1), (0.025, 0.975))
    interval = [round(float(low), 3), round(float(high), 3)]
    return {
        "pairs": int(num_N.sum()),
        "paired": round(float(won_N.sum() / num_N.sum()), 3),
        "paired_interval": interval,
    }


def lags(reads: Sequence[Read]) -> dict[str, Any]:
    """How often thought and word move together, and which comes first where they do."""
    known = [read.lag for read in reads if read.lag is not None]
    clear = [lag.tokens for lag in known if lag.p_value <= CHANCE]
    return {
        "readings": len(known),
        "share_with_p_0.05": round(len(clear) / max(len(known), 1), 3),
        "tokens_quartiles": [float(edge) for edge in np.quantile(clear, (0.25, 0.5, 0.75))] if clear else None,
        "thought_first": sum(tokens > 0 for tokens in clear),
        "same_token": sum(tokens == 0 for tokens in clear),
        "word_first": sum(tokens < 0 for tokens in clear),
    }


def groups_of(reads: Sequence[Read]) -> dict[str, list[Read]]:
    """The cases by make, and the written ones by kind and by whether the instruction was obeyed."""
    own = [read for read in reads if read.case.make == "written"]
    obeyed = [read for read in own if read.names_it != read.case.hidden]
    kinds = {f"written: {kind}": [r for r in own if r.case.kind == kind] for kind in {r.case.kind: 0 for r in own}}
    makes = {make: [r for r in reads if r.case.make == make] for make in ("masked", "instructed")}
    return {"written": own, **kinds, "written, obeyed": obeyed, **makes}


def scatter(reads: Sequence[Read]) -> Figure:
    """A point a case: mean activation across, mean text up; a panel for each make."""
    with rc_context(STYLE):
        figure = Picture(figsize=(9.6, 3.6), layout="constrained")
        for axes, make in zip(figure.subplots(1, 3, sharey=True), ("written", "masked", "instructed"), strict=True):
            axes.plot([0, 1], [0, 1], color=FAINT, linewidth=0.8)
            for hidden, colour, label in ((False, CONTROL, "plain"), (True, ACCENT, "hidden")):
                part = [read for read in reads if read.case.make == make and read.case.hidden == hidden]
                places = [read.mean_activation for read in part], [read.mean_text for read in part]
                axes.plot(*places, "o", color=colour, markersize=3.6, alpha=0.55, markeredgewidth=0, label=label)
            axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", title=make, xlabel="thinks (mean percentile)")
        figure.axes[0].set_ylabel("writes (mean percentile)")
        figure.axes[0].legend(frameon=False, fontsize=8)
    return figure


def draw(reads: Sequence[Read], folder: Path) -> None:
    """All cases as points, and the most dissonant hidden answer token by token."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scatter.png").write_bytes(png(scatter(reads), dpi=110))
    hidden = [read for read in reads if read.case.make == "written" and read.case.hidden]
    # One that is no mere word or two and keeps to the instruction, if there is any.
    long = [read for read in hidden if read.dissonance.counted.sum() >= SHOWN_TOKENS] or hidden
    shown = max(long, key=lambda read: (not read.names_it, read.measures["dissonance"]))
    (folder / "hidden.txt").write_text(f"{shown.case.prompt}\n\n{shown.text}\n", encoding="utf-8")
    (folder / "hidden.png").write_bytes(png(dissonance_heatmap(shown.dissonance), dpi=110))
    (folder / "hidden-scatter.png").write_bytes(png(dissonance_scatter(shown.dissonance), dpi=90))


def show(rows: Sequence[dict[str, Any]]) -> None:
    """The tables of separations: any hidden case against any plain one, and against its own."""
    for title, value, edges in (("AUROC", "auroc", "interval"), ("share of pairs", "paired", "paired_interval")):
        table = Table("cases", "hidden + plain", "naming it", *MEASURES, title=title)
        for row in rows:
            cells = [f"{row[m][value]:.3f} ({row[m][edges][0]:.2f} – {row[m][edges][1]:.2f})" for m in MEASURES]
            naming = f"{row['hidden_naming_it']:.0%} / {row['plain_naming_it']:.0%}"
            table.add_row(row["cases"], f"{row['hidden']} + {row['plain']}", naming, *cells)
        Console(width=220).print(table)


def _share(reads: Sequence[Read]) -> float:
    return round(sum(read.names_it for read in reads) / max(len(reads), 1), 3)


def main() -> None:
    """Read all cases, and tell what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pack", type=Path, help="a pack of the demo's concepts: `ftw train` leaves one in its run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write figures and texts there")
    parser.add_argument("--pictures", type=Path, help="folder for scatter.png and hidden.png")
    arguments = parser.parse_args()
    pack, substrate = load_pack(arguments.pack), load_substrate()
    pack.check(substrate)
    unknown = [name for name in THINGS if name not in pack.names]
    if pack.concepts is None or pack.text is None or unknown:
        raise DataError(f"{arguments.pack} is no pack of the demo's concepts with text lenses; it lacks {unknown}")
    wordnet = WordNet.open(fetch("wordnet-3.0").folder)
    kinship = Kinship(pack.concepts, wordnet)
    table = compose(pack.concepts, wordnet, None, ComposeConfig(), arguments.seed)
    monitor = Monitor(substrate, pack.bank(), mode="activation")
    cases = [*written(), *masked(table, kinship), *instructed(table)]
    reads = [measure(case, timeline, pack, kinship) for case, timeline in timelines(monitor, cases)]
    rows = [separation(name, part, seed=arguments.seed) for name, part in groups_of(reads).items()]
    show(rows)
    followed = {"plain": lags([r for r in reads if r.case.make == "written" and not r.case.hidden])}
    followed["hidden"] = lags([r for r in reads if r.case.make == "written" and r.case.hidden])
    Console().print(followed)
    if arguments.pictures is not None:
        draw(reads, arguments.pictures)
    if arguments.json is not None:
        texts = [{**vars(r.case), "text": r.text, "names_it": r.names_it, "measures": r.measures} for r in reads]
        content = {"separation": rows, "lags": followed, "cases": texts}
        arguments.json.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
