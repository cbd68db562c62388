"""`ftw collect`: run the substrate over texts and keep its states in an encyclopedia."""

from pathlib import Path

from rich.console import Console

from ftw.cli import _run
from ftw.cli._samples import capture, prepare
from ftw.cli._schema_train import DATA, CollectJob
from ftw.cli._sources import Sources
from ftw.cli._verb import verb
from ftw.map.collect import collect, encyclopedia_folder
from ftw.map.dense import export_dense
from ftw.map.estimate import estimate
from ftw.ui.steps import steps
from ftw.ui.terminal import overview


def run(job: CollectJob) -> None:
    """Collect what is missing, or with dry_run=true say what it would cost."""
    console = Console()
    run_steps, sources = steps(console=console), Sources()
    substrate, made = prepare(job, sources, run_steps)
    if not job.dry_run:
        _run.begin(job)
    config = capture(job.map.encyclopedia, made.table, job.data, job.seed)
    spec = config.spec(substrate)
    folder = encyclopedia_folder(made.table, spec)
    if job.dry_run:
        cost = estimate(made.table, spec, substrate, measure=True)
        console.print("\n".join(cost.lines()), highlight=False)
        console.print(f"would go to {folder}", highlight=False)
        return
    with run_steps.step("Collect states") as step, collect(substrate, made.table, config) as encyclopedia:
        step.note(f"{len(encyclopedia.table):,} texts")
        if job.dense is not None:
            export_dense(encyclopedia, Path(job.dense))
    _run.write_json(_run.run_folder() / "run.json", _run.provenance(job, sources.fetched))
    console.print(
        overview("Encyclopedia", {"folder": str(folder), "layers": str(list(spec.layers)), "precision": spec.precision})
    )


def main() -> None:
    """The verb, from the command line."""
    verb("collect", run, CollectJob, data=DATA)


if __name__ == "__main__":
    main()
