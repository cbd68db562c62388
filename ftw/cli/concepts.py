"""`ftw concepts`: build, show or verify a concept pack."""

from pathlib import Path

from rich.console import Console
from rich.markup import escape

from ftw.cli._schema import ConceptsJob
from ftw.cli._sources import Sources
from ftw.cli._verb import verb
from ftw.errors import ConceptError, ConfigError

ACTIONS = ("show", "build", "verify")


def concepts(job: ConceptsJob) -> None:
    """Show a pack's levels and tree, write it to a folder, or list what contradicts itself."""
    console = Console()
    if job.action not in ACTIONS:
        raise ConfigError(f"action={job.action!r} is none of {', '.join(ACTIONS)}")
    pack = Sources().concepts(job.concepts)
    if job.action == "build":
        folder = Path(job.out or f"concept_packs/{pack.pack_id}")
        pack.save(folder)
        console.print(
            f"{len(pack)} concepts written to {folder}; "
            f"show them with: ftw concepts concepts=pack concepts.path={folder}"
        )
        return
    console.print(escape(pack.summary()), highlight=False)
    if job.action == "show":
        console.print("\n".join(escape(line) for line in pack.tree(job.max_level)), highlight=False)
        return
    problems = pack.verify()
    for problem in problems:
        console.print(f"  {escape(problem)}", highlight=False)
    if contradictions := pack.contradictions():
        raise ConceptError(f"{pack.pack_id}: {len(contradictions)} contradictions, the first: {contradictions[0]}")
    console.print(f"{pack.pack_id} is sound" + (f" ({len(problems)} remarks)" if problems else ""))


def main() -> None:
    """The verb, from the command line."""
    verb("concepts", concepts, ConceptsJob)


if __name__ == "__main__":
    main()
