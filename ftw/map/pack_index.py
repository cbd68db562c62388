"""Opening a lens pack without reading it: index files and headers only, all else when it is asked for.

Whether a file is the one that was packed is known from its hash, which is computed once (`verified`). The same holds
for the concepts of each level, whose index carries all metrics.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ftw.errors import FTWError, PackError
from ftw.hat.bank import LensBank
from ftw.hat.cold import ColdLenses
from ftw.hat.lens import HeadConfig
from ftw.hat.shelf import Shelf, ShelfConfig
from ftw.hat.store import is_sane, read_tensors
from ftw.hat.text_embedding import AnyText
from ftw.map.concept import ConceptPack
from ftw.map.levels import InstalledRows, installed_rows
from ftw.map.manifest import safe_member
from ftw.map.pack import Recipe, check_substrate, read_concepts, read_info, read_rows, read_text
from ftw.map.verified import verify_pack
from ftw.substrate.model import Substrate


@dataclass(kw_only=True)
class PackIndex:
    """A pack, of which only the index is read: concepts, text lenses and weights come when they are first asked for.

    Attributes:
        folder, pack_id, version, recipe: of the pack. rows_of: concepts of each level that is read, in row order.
        here: which rows of the pack's common tensors are theirs.
    """

    folder: Path
    pack_id: str
    version: str
    recipe: Recipe
    rows_of: dict[int, list[str]]
    here: InstalledRows

    @classmethod
    def open(cls, folder: Path | str, *, levels: Sequence[int] | None = None) -> "PackIndex":
        """Read the index of a pack, its files verified; `levels`: of the hierarchy that are read, None for all.

        Raises:
            PackError: the pack is damaged, hostile, of another version, or has no such level.
        """
        folder = Path(folder).absolute()
        known, files = verify_pack(folder)
        info = read_info(folder)
        with _sound(folder):
            all_here, here = installed_rows(folder, info), installed_rows(folder, info, levels)
            rows = known.facts.get("rows")
            if rows is None or set(rows) != {str(level) for level in all_here.levels}:
                rows = {str(level): list(names) for level, names in read_rows(folder, all_here.levels).items()}
                _check_finite(folder, all_here.levels)
                known.facts["rows"] = rows
                known.keep(files)
            return cls(
                folder=folder,
                pack_id=str(info["pack_id"]),
                version=str(info["version"]),
                recipe=Recipe.from_json(info["recipe"]),
                rows_of={level: [str(name) for name in rows[str(level)]] for level in here.levels},
                here=here,
            )

    @cached_property
    def levels(self) -> dict[str, int]:
        """Level of each concept in its hierarchy."""
        return {name: level for level, names in self.rows_of.items() for name in names}

    @property
    def names(self) -> list[str]:
        """The concepts that it reads."""
        return list(self.levels)

    @cached_property
    def concepts(self) -> ConceptPack | None:
        """The concept pack; None where the lenses are of labelled data.

        Raises:
            PackError: it is damaged, or another than the pack names.
        """
        with _sound(self.folder):
            return read_concepts(self.folder, read_info(self.folder)["concept_pack"])

    @cached_property
    def text(self) -> AnyText | None:
        """The text lenses, or None; tens to hundreds of megabytes.

        Raises:
            PackError: they are damaged, or not those of the pack's concepts.
        """
        with _sound(self.folder):
            return read_text(self.folder, self.names, self.here)

    def check(self, substrate: Substrate) -> None:
        """Refuse another substrate than the one the lenses were trained on.

        Raises:
            PackError: naming what differs.
        """
        check_substrate(self.pack_id, self.recipe, substrate)

    def bank(self) -> LensBank:
        """All lenses as one module.

        Raises:
            PackError: tensors and index disagree, the disk fails, or the lenses read sequences.
        """
        cold = self.cold()
        try:
            bank = cold.bank(len(cold))
            failed = cold.fill(bank.slots, cold.names, precision="float32")
        finally:
            cold.close()
        if failed:
            name, why = next(iter(failed.items()))
            raise PackError(f"pack {self.folder}: {len(failed)} lenses cannot be read, {name!r} first: {why}")
        bank.refresh()
        return bank

    def cold(self) -> ColdLenses:
        """The lenses, on disk.

        Raises:
            PackError: tensors and index disagree, or the lenses read sequences.
        """
        recipe, folder = self.recipe, self.folder
        head = HeadConfig(family=recipe.family, hidden=recipe.hidden)
        if head.reads_sequences:
            raise PackError("these lenses read sequences, not single states; read windows: ftw monitor mode=timeline")
        calibration = read_tensors(safe_member(folder, "calibration.safetensors"))
        return ColdLenses(
            names_of={
                safe_member(folder, f"layer{level}/lenses.safetensors"): names for level, names in self.rows_of.items()
            },
            layers=tuple(recipe.layers),
            width=recipe.width,
            head=head,
            calibration=self.here.of(calibration, str(folder)),
            basis=read_tensors(safe_member(folder, "basis.safetensors")) if recipe.basis_rank else None,
            basis_rank=recipe.basis_rank,
            where=str(folder),
        )


@contextmanager
def _sound(folder: Path) -> Iterator[None]:
    """Whatever a damaged file makes go wrong is an error of the pack."""
    try:
        yield
    except PackError:
        raise
    except FTWError as error:  # of the concept pack inside
        raise PackError(f"pack {folder}: {error}") from error
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError, OSError) as error:
        raise PackError(
            f"pack {folder} contradicts its own index ({type(error).__name__}: {error}); fetch it again"
        ) from error


def open_shelf(folder: Path | str, config: ShelfConfig | None = None, *, always: Sequence[str] = ()) -> Shelf:
    """A shelf of a pack's lenses: opened in a moment, the weights brought when they are asked for.

    Raises:
        PackError: the pack is damaged or hostile. ConfigError, ConceptError: as `Shelf`.
    """
    return Shelf(PackIndex.open(folder).cold(), config, always=always)


def _check_finite(folder: Path, levels: Iterable[int]) -> None:
    """A lens that is read later, row by row, is not looked through again.

    Raises:
        PackError: a number that is not finite.
    """
    for level in levels:
        path = safe_member(folder, f"layer{level}/lenses.safetensors")
        for name, tensor in read_tensors(path).items():
            if tensor.is_floating_point() and not is_sane(tensor):
                raise PackError(f"{path}: tensor {name!r} holds numbers that are not finite; do not use this pack")
