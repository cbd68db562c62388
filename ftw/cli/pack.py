"""`ftw pack`: list, fetch, verify, compare, convert, import, export, sign, publish and remove packs."""

import contextlib
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from ftw.cli._arguments import PACK_ACTIONS, near
from ftw.cli._schema import PackJob
from ftw.cli._verb import verb
from ftw.errors import ConfigError, PackError
from ftw.map import hub
from ftw.map.concept import ConceptPack
from ftw.map.installed import KINDS, LENS
from ftw.map.manifest import verify_manifest
from ftw.map.model_card import model_card, write_card
from ftw.map.pack import LensPack, load_pack, read_info
from ftw.map.pack_registry import PackRegistry, Plan, check_folder

MOST_SHOWN = 20
TEXT_LENSES = "ftw.map.joblib_text"  # of HatCat: pickles, opened in a process of its own


def pack(job: PackJob) -> None:
    """Do one action on packs."""
    if job.action not in PACK_ACTIONS:
        raise ConfigError(f"action={job.action!r} is none of {', '.join(PACK_ACTIONS)}{near(job.action, PACK_ACTIONS)}")
    if job.kind not in KINDS:
        raise ConfigError(f"kind={job.kind!r} is none of {', '.join(KINDS)}")
    ACTIONS[job.action](job, Console(), PackRegistry(org=job.org))


def list_packs(job: PackJob, console: Console, registry: PackRegistry) -> None:
    """Packs on this machine."""
    rows = [{"kind": kind.word, **row} for kind in KINDS.values() for row in registry.listed(kind)]
    _show_packs(job, console, rows)


def status(job: PackJob, console: Console, registry: PackRegistry) -> None:
    """Packs on this machine beside what the Hub has."""
    rows = registry.status()
    _show_packs(job, console, rows)
    for row in rows:
        if row["remark"] and not job.json:
            console.print(escape(f"{row['name']}: {row['remark']}"), highlight=False)


def info(job: PackJob, console: Console, registry: PackRegistry) -> None:
    """The page of a pack."""
    kind, folder = KINDS[job.kind], _folder(job, registry)
    if kind is not LENS:
        console.print(escape(ConceptPack.load(folder, strict=False).summary()), highlight=False)
    elif job.json:
        print(json.dumps(read_info(folder), indent=1))
    elif console.is_terminal:
        console.print(Markdown(model_card(folder).split("---\n", 2)[2]))
    else:
        print(model_card(folder), end="")


def pull(job: PackJob, console: Console, registry: PackRegistry) -> None:
    """Bring a pack from the Hub."""
    kind, name = KINDS[job.kind], _needed(job.name, "name")
    wanted: dict[str, Any] = {"version": job.version, "levels": job.levels, "repo_id": job.repo}
    if job.dry_run:
        plan = registry.plan(kind, name, **wanted)
        console.print(escape(_plan_words(plan)), highlight=False)
        return
    with _progress(console) as bar:

        def start(plan: Plan) -> hub.Progress:
            task = bar.add_task(f"{plan.snapshot.repo_id}", total=plan.num_bytes)
            return lambda file, num: bar.advance(task, num)

        folder = registry.pull(kind, name, **wanted, force=job.force, progress=start)
    record = registry.packs(kind).record(name)
    levels = f", levels {record.levels_installed}" if record.levels_installed else ""
    commit = f" at {record.revision[:12]}" if record.revision else ""
    console.print(escape(f"{name} {record.version}{commit}{levels}, verified: {folder}"), highlight=False)


def push(job: PackJob, console: Console, registry: PackRegistry) -> None:
    """Publish a pack on the Hub."""
    kind, name = KINDS[job.kind], _needed(job.name, "name")
    repo_id, record = job.repo or registry.repo_id(kind, name), registry.packs(kind).record(name)
    words = f"{name} {record.version} ({record.size_bytes / 1e6:,.1f} MB) to {repo_id}"
    if job.dry_run:
        check_folder(kind, registry.packs(kind).folder(name))
        console.print(escape(f"would push {words}"), highlight=False)
        return
    with console.status(escape(f"pushing {words}")):
        commit = registry.push(kind, name, repo_id=repo_id, private=job.private)
    console.print(escape(f"pushed {words}: commit {commit[:12]}, tag v{record.version}"), highlight=False)


def verify(job: PackJob, console: Console, registry: PackRegistry) -> None:
    """Check everything that can be checked about a pack."""
    kind, folder, begun = KINDS[job.kind], _folder(job, registry), time.perf_counter()
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    with console.status(f"verifying {size / 1e6:,.0f} MB"):
        if kind is LENS:
            verify_manifest(folder)  # what was hashed before, too: a disk may rot without a file's times changing
        num = len(load_pack(folder).names) if kind is LENS else len(ConceptPack.load(folder))
        if job.key:
            from ftw.map.signing import verify_signature

            verify_signature(folder, Path(job.key))
    seconds = time.perf_counter() - begun
    hashes = ", every file as packed" if kind is LENS else ""
    console.print(
        escape(f"{folder.name} is sound: {num:,} {kind.word} entries, {size / 1e6:,.0f} MB in {seconds:.1f} s{hashes}"),
        highlight=False,
    )
    signed = f"signed by the owner of {job.key}" if job.key else "who made it, hashes do not show (key=FILE.pub does)"
    console.print(escape(signed), highlight=False)


def diff(job: PackJob, console: Console, registry: PackRegistry) -> None:
    """What changed between two packs."""
    from ftw.map.versions import diff as compare

    folders = _folder(job, registry), _folder(replace(job, name=_needed(job.other, "other")), registry)
    before, after = (load_pack(folder) for folder in folders)
    changed = compare(before, after)
    if job.json:
        print(json.dumps(asdict(changed), indent=1, default=str))
        return
    for word in ("added", "retrained", "removed", "unchanged"):
        names = getattr(changed, word)
        shown = (
            "" if word == "unchanged" else f"  {', '.join(names[:MOST_SHOWN])}{', ...' if names[MOST_SHOWN:] else ''}"
        )
        console.print(escape(f"{len(names):>8,} {word}{shown}"), highlight=False)
    for name, (old, new) in changed.recipe.items():
        console.print(escape(f"  recipe: {name} {old} -> {new}"), highlight=False)
    for figure in ("auroc", "auroc_text", "ece"):
        if (change := changed.mean_change(figure)) is not None:
            console.print(f"  {figure}: {change:+.4f} on average over the lenses in both", highlight=False)
    console.print(f"  {changed.unchanged_bytes / 1e6:,.1f} MB of lenses are the same in both", highlight=False)


def convert(job: PackJob, console: Console, registry: PackRegistry) -> None:
    """Write a pack in another precision, or on a shared basis."""
    from ftw.map.convert import convert as converted
    from ftw.map.convert import stack_bytes
    from ftw.map.encyclopedia import Encyclopedia

    source = load_pack(_folder(job, registry))
    if not job.precision and not job.rank:
        raise ConfigError("say what to convert to: precision=bfloat16 (or int8, float32), or rank=64 of a shared basis")
    if job.dry_run:
        size = stack_bytes(source.stack, job.precision or source.stored)
        console.print(f"lenses of {stack_bytes(source.stack, source.stored) / 1e6:,.1f} MB -> {size / 1e6:,.1f} MB")
        return
    with contextlib.ExitStack() as stack:
        states = stack.enter_context(Encyclopedia.open(job.encyclopedia)) if job.encyclopedia else None
        stack.enter_context(console.status("converting"))
        made, change = converted(source, precision=job.precision, rank=job.rank, encyclopedia=states)
        place = _deliver(made, job, registry)
    console.print(escape(f"{change.words()}: {place}"), highlight=False)


def import_pack(job: PackJob, console: Console, registry: PackRegistry) -> None:
    """Read a pack of FTW or of HatCat from a folder into the registry."""
    folder = Path(_needed(job.name, "name")).expanduser()
    if not folder.is_dir():
        raise PackError(f"there is no folder {folder} to import")
    if (folder / "MANIFEST.json").is_file() or job.kind != LENS.word:
        name = job.out or folder.name
        console.print(escape(f"imported: {registry.adopt(KINDS[job.kind], folder, name, force=job.force)}"))
        return
    from ftw.map.foreign.hatcat_read import read_hatcat

    with _progress(console, counts=True) as bar:
        task = bar.add_task(folder.name, total=None)
        found = read_hatcat(
            folder,
            fingerprint=job.fingerprint,
            layer=job.layer,
            version=job.version,
            advance=lambda num, total: bar.update(task, advance=num, total=total),
        )
    made, notes = _with_text_lenses(found.pack, folder, job), found.notes
    words = f"{len(made.names):,} lenses on levels {sorted(set(made.levels.values()))}, layers {made.recipe.layers}"
    place = "not written (dry run)" if job.dry_run else _deliver(made, job, registry)
    console.print(escape(f"{words}: {place}"), highlight=False)
    for note in notes:
        console.print(escape(f"  {note}"), highlight=False)


def export_pack(job: PackJob, console: Console, registry: PackRegistry) -> None:
    """Write a pack in HatCat's layout."""
    from ftw.map.foreign.hatcat_write import write_hatcat

    source, folder = load_pack(_folder(job, registry), levels=job.levels), Path(_needed(job.out, "out")).expanduser()
    if job.dry_run:
        num = len(source.names) * len(source.recipe.layers)
        console.print(escape(f"would write {num:,} .pt files below {folder}"), highlight=False)
        return
    with console.status(f"writing {len(source.names):,} lenses"):
        left = write_hatcat(source, folder)
    console.print(escape(f"{len(source.names):,} lenses written to {folder}"), highlight=False)
    for remark in left:
        console.print(escape(f"  {remark}"), highlight=False)


def sign(job: PackJob, console: Console, registry: PackRegistry) -> None:
    """Sign a lens pack."""
    from ftw.map.signing import sign_pack

    target = sign_pack(_folder(job, registry), Path(_needed(job.key, "key")).expanduser())
    console.print(escape(f"signed: {target}; publish the public key where others know it is yours"), highlight=False)


def remove(job: PackJob, console: Console, registry: PackRegistry) -> None:
    """Delete a pack from this machine."""
    kind, name = KINDS[job.kind], _needed(job.name, "name")
    record = registry.packs(kind).record(name)
    words = f"{name} {record.version} ({record.size_bytes / 1e6:,.1f} MB)"
    if job.dry_run:
        console.print(escape(f"would remove {words}"), highlight=False)
        return
    registry.remove(kind, name, force=job.force)
    console.print(escape(f"removed {words}"), highlight=False)


ACTIONS = {
    "list": list_packs,
    "status": status,
    "info": info,
    "pull": pull,
    "push": push,
    "verify": verify,
    "diff": diff,
    "convert": convert,
    "import": import_pack,
    "export": export_pack,
    "sign": sign,
    "remove": remove,
}


def _needed(value: str | None, key: str) -> str:
    if not value:
        raise ConfigError(f"{key} needs a value; write ftw pack ACTION NAME, or {key}=...")
    return value


def _folder(job: PackJob, registry: PackRegistry) -> Path:
    """Folder of the pack that is meant: one that exists, else one of the registry."""
    name, kind = _needed(job.name, "name"), KINDS[job.kind]
    folder = Path(name).expanduser()
    if (folder / kind.index).is_file():
        return folder
    if "/" in name:
        raise PackError(f"no {kind.word} pack in {folder}: it has no {kind.index}")
    registry.packs(kind).record(name)
    return registry.packs(kind).folder(name)


def _deliver(made: LensPack, job: PackJob, registry: PackRegistry) -> Path:
    """Write a pack to the folder or under the name that was asked for, with its page."""
    out = _needed(job.out, "out")
    if "/" in out:
        if Path(out).expanduser().exists() and not job.force:
            raise PackError(f"{out} exists; name another folder, or force=true")
        folder = made.save(Path(out).expanduser())
        write_card(folder)
        return folder
    with tempfile.TemporaryDirectory(dir=registry.root) as temporary:
        folder = replace(made, pack_id=out).save(Path(temporary) / out)
        write_card(folder)
        return registry.adopt(LENS, folder, out, force=job.force)


def _with_text_lenses(made: LensPack, folder: Path, job: PackJob) -> LensPack:
    """The pack with HatCat's text lenses, where there are any; those are pickles."""
    if not any(folder.glob("layer*/text_lenses/*.joblib")):
        return made
    try:
        reader = import_module(TEXT_LENSES)
    except ModuleNotFoundError as error:
        raise PackError(f"{folder} has pickled text lenses, which this FTW cannot read; remove text_lenses/") from error
    bank = reader.import_text_lenses(folder, trust_pickle=job.trust_pickle)
    known = set(bank.names)
    if missing := [name for name in made.names if name not in known]:
        raise PackError(f"{folder}: {len(missing)} lenses have no text lens ({missing[0]}, ...); remove text_lenses/")
    return replace(made, text=bank.subset(made.names))


def _plan_words(plan: Plan) -> str:
    levels = f", levels {plan.levels}" if plan.levels is not None else ""
    left = f"; {len(plan.left)} other files stay there" if plan.left else ""
    what = f"{len(plan.names)} files, {plan.num_bytes / 1e6:,.1f} MB"
    return f"would fetch {what}, of {plan.snapshot.repo_id} at {plan.snapshot.commit[:12]}{levels}{left}"


def _show_packs(job: PackJob, console: Console, rows: list[dict[str, Any]]) -> None:
    if job.json:
        print(json.dumps(rows, indent=1))
        return
    if not rows:
        console.print("no packs here; fetch one with: ftw pack pull NAME (kind=concept for a concept pack)")
        return
    table = Table(box=None, pad_edge=False)
    for column in ("name", "kind", "version", "source", "levels", "MB", ""):
        table.add_column(column, justify="right" if column == "MB" else "left", overflow="fold")
    for row in rows:
        marks = ["changed here"] if row["modified"] else []
        marks += [f"newer on the Hub: {row['latest'] or 'untagged'}"] if row.get("outdated") else []
        marks += [f"based on {row['based_on']}"] if row["based_on"] else []
        levels = ",".join(map(str, row["levels_installed"] or []))
        partial = row["levels_installed"] != row["levels_available"]
        table.add_row(
            escape(row["name"]),
            row["kind"],
            escape(row["version"]),
            escape(row["source"]),
            f"{levels} of {len(row['levels_available'] or [])}" if partial else levels,
            f"{row['size_bytes'] / 1e6:,.1f}",
            escape("; ".join(marks)),
        )
    console.print(table)


@contextlib.contextmanager
def _progress(console: Console, *, counts: bool = False) -> Iterator[Progress]:
    columns = [] if counts else [DownloadColumn(), TransferSpeedColumn()]
    with Progress(
        TextColumn("{task.description}"), BarColumn(), *columns, TimeRemainingColumn(), console=console, transient=True
    ) as bar:
        yield bar


def main() -> None:
    """The verb, from the command line."""
    verb("pack", pack, PackJob)


if __name__ == "__main__":
    main()
