"""`ftw evaluate`: figures of a lens pack on held-out texts, and a card for each of its lenses."""

from dataclasses import replace

import numpy as np
from rich.console import Console

from ftw.cli import _run
from ftw.cli._samples import capture as answers_capture
from ftw.cli._samples import samples
from ftw.cli._schema_train import DATA, EvaluateJob
from ftw.cli._sources import Sources, lens_pack
from ftw.cli._verb import verb
from ftw.errors import ConfigError, DataError
from ftw.map.cards import Cards, make_cards, marks_of
from ftw.map.collect import CollectConfig, collect
from ftw.map.compose import ComposeConfig
from ftw.map.contributions import TextReader
from ftw.map.encyclopedia import Encyclopedia
from ftw.map.evaluate import Evaluation
from ftw.map.pack import LensPack
from ftw.map.recipe import SEQUENCE
from ftw.map.samples import SampleTable
from ftw.map.sequences import SequencesConfig
from ftw.map.text_level import text_level_logits
from ftw.map.training.finish import visible_texts
from ftw.map.training.fit import evaluate_stack
from ftw.map.training.sequence_pack import spoken
from ftw.map.training.temporal import evaluate_sequences
from ftw.substrate.model import Substrate
from ftw.ui.cards import write_cards
from ftw.ui.report import write_report
from ftw.ui.steps import steps
from ftw.ui.terminal import evaluation_table, overview

WRITTEN = {"report": "report.html", "cards": "cards.html", "figures": "metrics.json"}


def evaluate(job: EvaluateJob) -> None:
    """Read the test rows of the data with the pack's lenses; print and write the figures."""
    pack = lens_pack(job.pack)
    check(job, pack)
    run_steps, sources, folder = steps(console=Console()), Sources(), _run.begin(job)
    with run_steps.step("Load the substrate"):
        substrate = sources.substrate(job.substrate)
        pack.check(substrate)
    with run_steps.step("Make the samples") as step:
        made = samples(job, substrate, sources, concepts=pack.concepts)
        table = test_rows(made.table, pack)
        step.note(f"{len(table):,} texts")
    known = pack.subset([name for name in pack.names if name in set(table.concepts)])
    with run_steps.step("Collect states"):
        encyclopedia = collect(substrate, table, capture(job, known, table))
        words = heard(encyclopedia, substrate)
    written = dict(WRITTEN)
    with encyclopedia, run_steps.step("Evaluate"):
        evaluation = figures(job, known, encyclopedia, words)
    title = f"Lens pack {pack.pack_id} on {getattr(job.data, 'path', 'held-out text')}"
    if pack.recipe.pooling == SEQUENCE:
        del written["cards"]  # they tell of lenses that read texts
    else:
        with encyclopedia, run_steps.step("Make the cards") as step:
            cards = lens_cards(job, known, substrate, encyclopedia, evaluation, texts=words.texts, training=made.table)
            _run.write_json(folder / "cards.json", cards.to_json())
            write_cards(folder / "cards.html", cards, title=title, command=_run.command())
            step.note(f"{len(cards.cards)} of {len(known.names):,} lenses")
    _run.write_json(folder / "metrics.json", evaluation.to_json())
    _run.write_json(folder / "run.json", _run.provenance(job, sources.fetched))
    write_report(
        folder / "report.html",
        title=title,
        evaluation=evaluation,
        recipe=vars(pack.recipe),
        inputs=_run.inputs_table(sources.fetched),
        config_yaml=_run.config_yaml(job),
        versions=_run.versions(),
        command=_run.command(),
        timings=run_steps.seconds,
        notes=[*made.lines, *evaluation.notes],
    )
    run_steps.console.print(evaluation_table(evaluation, where=str(folder / "metrics.json")))
    run_steps.console.print(
        overview("Written", {what: f"{_run.shown(folder)}/{file}" for what, file in written.items()})
    )


def check(job: EvaluateJob, pack: LensPack) -> None:
    """Refuse data that the lenses of a pack cannot be judged on.

    Raises:
        ConfigError: layers of the job's own, articles without concepts, or sampled answers for lenses of pooled states.
    """
    if job.map.encyclopedia.layers:
        raise ConfigError("map.encyclopedia.layers: a pack is evaluated on the layers it was trained on; leave it out")
    if pack.concepts is None and isinstance(job.data, ComposeConfig | SequencesConfig):
        raise ConfigError(
            f"pack {pack.pack_id!r} was trained on labelled texts and has no concepts to find articles for; "
            "evaluate it on labelled texts: texts=FILE"
        )
    if isinstance(job.data, SequencesConfig) and pack.recipe.pooling != SEQUENCE:
        raise ConfigError(
            f"data=sequences: the lenses of pack {pack.pack_id!r} read pooled states, and sampled answers have none; "
            "evaluate them on texts: data=wordnet or texts=FILE"
        )


def heard(encyclopedia: Encyclopedia, substrate: Substrate) -> SampleTable:
    """The table with what the substrate read of each text, or said in answer to it."""
    if encyclopedia.spec.sampling:
        return spoken(encyclopedia, substrate)
    return replace(encyclopedia.table, texts=visible_texts(encyclopedia, substrate))


def figures(job: EvaluateJob, pack: LensPack, encyclopedia: Encyclopedia, words: SampleTable) -> Evaluation:
    """The figures of lenses on the test rows of an encyclopedia, beside those of the words."""
    if pack.recipe.pooling == SEQUENCE:
        return evaluate_sequences(
            pack.stack, encyclopedia, config=job.evaluate, concepts=pack.concepts, words=words, text=pack.text
        )
    return evaluate_stack(
        pack.stack,
        encyclopedia,
        config=job.evaluate,
        pool=pack.recipe.pooling,
        text=pack.text,
        texts=words.texts,
    )


def capture(job: EvaluateJob, pack: LensPack, table: SampleTable) -> CollectConfig:
    """What has to be kept of held-out texts for the lenses of a pack to read them."""
    pooling, recipe = pack.stack.pooling, pack.recipe
    config = replace(job.map.encyclopedia, layers=[float(layer) for layer in recipe.layers])
    if isinstance(job.data, SequencesConfig):
        return answers_capture(config, table, job.data, job.seed)
    config = replace(config, max_tokens=recipe.max_tokens)
    if recipe.pooling == SEQUENCE:
        return replace(config, pools=[], tokens_per_text={"test": -1})
    return replace(
        config,
        pools=config.pools if pooling is None else pooling.states,
        tokens_per_text={"test": -1} if pooling is not None and pooling.uses("max") else {},
    )


def lens_cards(
    job: EvaluateJob,
    pack: LensPack,
    substrate: Substrate,
    encyclopedia: Encyclopedia,
    evaluation: Evaluation,
    *,
    texts: list[str],
    training: SampleTable,
) -> Cards:
    """The cards of a pack on the texts of an encyclopedia, as far as they were read.

    Args:
        training: may hold the texts that the lenses learned from.
    """
    recipe = pack.recipe
    table = replace(encyclopedia.table, texts=texts)
    _, weights_SN = marks_of(table, pack.names)
    logits_SN = text_level_logits(
        pack.stack, encyclopedia, np.arange(len(table)), pool=recipe.pooling, wanted_SN=weights_SN > 0
    )
    return make_cards(
        pack,
        TextReader(substrate, tuple(recipe.layers), recipe.pooling, recipe.max_tokens, encyclopedia.spec.precision),
        table,
        evaluation,
        logits_SN,
        training=training,
        config=job.cards,
        evaluate=job.evaluate,
    )


def test_rows(table: SampleTable, pack: LensPack) -> SampleTable:
    """The test rows of a table, for concepts that the pack reads.

    Raises:
        DataError: there are none.
    """
    known = [name for name in table.concepts if name in set(pack.names)]
    if not known:
        raise DataError(
            f"the texts are about {', '.join(table.concepts[:5])}; pack {pack.pack_id!r} reads none of these "
            f"({', '.join(pack.names[:5])}, ...)"
        )
    return table.select(table.where("test"), known)


def main() -> None:
    """The verb, from the command line."""
    verb("evaluate", evaluate, EvaluateJob, data=DATA)


if __name__ == "__main__":
    main()
