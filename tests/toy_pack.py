"""A small lens pack with everything in it, and the concept pack inside."""

from dataclasses import replace
from typing import Any

import numpy as np
from random_lenses import random_stack

from ftw.hat.text import TextBank, TextLens
from ftw.map.concept import Concept, ConceptPack
from ftw.map.pack import LensPack, Recipe, head_fields

LEVELS = [2, 0, 1, 2, 1, 0]


def make_pack(*, whole: bool = True, fingerprint: str = "f" * 64, **kind: Any) -> LensPack:
    """A pack of six random lenses on three levels; `whole` adds a concept pack, text lenses and metrics."""
    stack = random_stack(**kind)
    recipe = Recipe(
        substrate="tiny",
        fingerprint=fingerprint,
        width=32,
        dtype="float32",
        precision="float32",
        layers=list(stack.layers),
        basis_rank=kind.get("rank", 0),
        **head_fields(stack),
    )
    pack = LensPack(
        pack_id="toy",
        version="1.2.3",
        stack=stack,
        recipe=recipe,
        levels=dict(zip(stack.names, LEVELS, strict=True)),
        provenance={"command": "ftw train", "inputs": [{"sha256": "ab"}]},
    )
    if not whole:
        return pack
    lenses = [
        TextLens(
            name=name, vocabulary=["a cat", name], idf=np.array([1.5, 2]), coefficients=np.array([n, -1.0]), bias=n
        )
        for n, name in enumerate(stack.names)
    ]
    return replace(
        pack,
        concepts=make_concepts(pack.levels),
        text=TextBank.from_lenses(lenses),
        metrics={name: {"auroc": 0.9 + n / 100, "auroc_low": None} for n, name in enumerate(stack.names)},
    )


def make_concepts(levels: dict[str, int]) -> ConceptPack:
    """A concept pack of those names, without a tree."""
    concepts = [
        Concept(name=name, level=level, parents=[], definition=f"the {name}", lemmas=[name], synsets=[], record={})
        for name, level in levels.items()
    ]
    return ConceptPack.of("animals", "2.0.0", concepts, {})
