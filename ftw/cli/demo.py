"""`ftw demo`: the whole way on real input, from concepts to a live reading and a report."""

from rich.console import Console

from ftw import paths
from ftw.cli import _run
from ftw.cli._schema_train import DATA, DemoJob
from ftw.cli._verb import verb
from ftw.cli.monitor import Live, answer, concept_paths
from ftw.cli.train import leave_results, train_run
from ftw.hat.monitor import Monitor
from ftw.ui.colours import concept_colours
from ftw.ui.steps import steps
from ftw.ui.terminal import overview


def demo(job: DemoJob) -> None:
    """Fetch, build, collect, train, calibrate, evaluate, and read an answer token by token."""
    run_steps = steps(total=6, console=Console())
    trained = train_run(job, run_steps)
    if trained is None:
        return
    with run_steps.step("Answer a prompt, lenses live"):
        meta = {"pack": trained.pack.pack_id, "pack_version": trained.pack.version}
        reader = Monitor(trained.substrate, trained.pack.bank(), top_k=job.top_k, meta=meta)
        live = Live(reader=reader, paths=concept_paths(trained.pack))
        colours = concept_colours(trained.pack.names, live.paths)
        timeline = answer(live, job.prompt, job.generation, job.seed, colours, run_steps.console)
        timeline.save(trained.folder / "timeline.json")
    leave_results(job, trained, run_steps, title="FTW demo", timeline=timeline)
    run_steps.console.print(run_steps.table())
    latest = _run.shown(paths.runs() / "latest")
    rows = {"report": f"{latest}/report.html", "figures": f"{latest}/metrics.json", "pack": f"{latest}/pack"}
    run_steps.console.print(overview("Written", {**rows, "next": 'ftw monitor prompt="Tell me about volcanoes."'}))


def main() -> None:
    """The verb, from the command line."""
    verb("demo", demo, DemoJob, data=DATA)


if __name__ == "__main__":
    main()
