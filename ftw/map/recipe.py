"""How the lenses of a pack read states: what a reader must do alike, as plain data that a hostile file may claim."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ftw.errors import PackError

PER_LENS, SEQUENCE = "per lens", "sequence"


@dataclass(kw_only=True)
class Recipe:
    """How states were read and lenses fitted; reading must do the same.

    Attributes:
        substrate, fingerprint, width: the language model. dtype: of its weights when states were collected.
        layers: blocks whose outputs are read. normalisation: of each token's state, before any lens.
        pooling: what a decision about a whole text is made of: a pool, "per lens" (chosen for each), or "sequence"
            (token after token).
        max_tokens: of a text, in training.
        family, hidden, basis_rank: of the lenses. prior: base rate that probabilities are for.
        solver, l2, penalties, shrinkage, folds and seed: of the fit.
    """

    substrate: str
    fingerprint: str
    width: int
    dtype: str
    precision: str
    layers: list[int]
    normalisation: str = (
        "layer norm per token (float32, no parameters); features standardised by training rows, folded in"
    )
    pooling: str = "mean"
    max_tokens: int = 128
    family: str = "linear"
    hidden: int = 0
    basis_rank: int = 0
    calibration: str = "Platt per layer on out-of-fold rows, mean over layers, Platt again; balanced prior"
    prior: float = 0.5
    solver: str = "adamw"
    l2: float = 0.0
    penalties: list[float] = field(default_factory=list)
    shrinkage: float = 0.0
    folds: int = 0
    seed: int = 0
    num_texts: int = 0
    encyclopedia: str = ""

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Recipe":
        """A recipe from a file that may be hostile.

        Raises:
            PackError: a value of another type than the recipe's, or a size that cannot be.
        """
        types = {entry.name: entry.type for entry in fields(cls)}
        for name, value in values.items():
            expected = types.get(name, str)
            fits = {
                str: isinstance(value, str),
                int: type(value) is int and 0 <= value < 2**31,
                float: isinstance(value, int | float) and not isinstance(value, bool),
                list[float]: isinstance(value, list) and all(isinstance(item, int | float) for item in value),
            }.get(expected, isinstance(value, list) and all(type(item) is int and 0 <= item < 2**31 for item in value))
            if not fits:
                raise PackError(f"the recipe says {name}={value!r:.60}, which is no {expected}; fetch the pack again")
        recipe = cls(**values)
        if not recipe.layers or len(set(recipe.layers)) != len(recipe.layers) or recipe.width < 1:
            raise PackError(f"the recipe reads layers {recipe.layers} of width {recipe.width}; fetch the pack again")
        return recipe
