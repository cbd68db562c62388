"""Where a run's inputs come from: fetched once, and remembered with their hashes for the run's record."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftw.errors import PackError
from ftw.map.concept import ConceptPack
from ftw.map.concept_source import ConceptsConfig, load_concepts
from ftw.map.labelled import find_files
from ftw.map.pack import LensPack, load_pack
from ftw.map.pack_index import PackIndex
from ftw.substrate.model import Substrate, SubstrateConfig
from ftw.substrate.sources import Fetched, fetch, hash_file

SOURCE = "source:"


def lens_pack(folder: str, *, levels: list[int] | None = None) -> LensPack:
    """The pack in a folder.

    Raises:
        PackError: there is none (the message says how to make one), or it is damaged.
    """
    return load_pack(_pack_folder(folder), levels=levels)


def pack_index(folder: str, *, levels: list[int] | None = None) -> PackIndex:
    """The pack in a folder, of which only the index is read.

    Raises:
        PackError: as of `lens_pack`.
    """
    return PackIndex.open(_pack_folder(folder), levels=levels)


def _pack_folder(folder: str) -> str:
    if not Path(folder).is_dir():
        raise PackError(f"no lens pack at {folder}; make one with `ftw train` or `ftw demo`, or name one: pack=FOLDER")
    return folder


@dataclass
class Sources:
    """Fetches sources and remembers them, so that a run can say what it was made of."""

    fetched: list[Fetched] = field(default_factory=list)

    def fetch(self, name: str, **options: Any) -> Fetched:
        """A source by its name in the lock file, from the cache or from its addresses."""
        known = next((one for one in self.fetched if one.name == name), None)
        if known is None:
            known = fetch(name, **options)
            self.fetched.append(known)
        return known

    def substrate(self, config: SubstrateConfig) -> Substrate:
        """The substrate of a configuration."""
        self.fetch(config.name, order=config.sources, path=config.path, revision=config.revision)
        return config.build()

    def texts(self, path: str) -> str:
        """Where the texts at a path are: `source:NAME` or `source:NAME/FILE` is a source of the lock file, fetched.

        Raises:
            DataError: there is no such file.
        """
        if not path.startswith(SOURCE):
            hashes = {file.name: hash_file(file) for file in find_files(path)}
            self._own("texts", Path(path), hashes)
            return path
        name, _, file = path.removeprefix(SOURCE).partition("/")
        return str(self.fetch(name).folder / file)

    def concepts(self, config: ConceptsConfig) -> ConceptPack:
        """The concept pack of a configuration."""
        pack = load_concepts(config, lambda: self.fetch("wordnet-3.0").folder)
        if config.path is not None and config.kind == "pack":
            self._own(pack.pack_id, Path(config.path), {"content": pack.content_hash()})
        return pack

    def _own(self, name: str, folder: Path, sha256: dict[str, str]) -> None:
        self.fetched.append(
            Fetched(name=name, folder=folder, address=str(folder), sha256=sha256, notice="given by the user")
        )
