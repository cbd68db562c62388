"""FTW reads what a language model represents while it writes.

    import ftw

    substrate = ftw.load_substrate()
    pack = ftw.train_lenses(substrate, (texts, labels), concept="refusal")
    timeline = ftw.Monitor(substrate, pack.bank()).generate("Tell me a story.", max_new_tokens=60)

The names below are the public interface; they load what they need on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ftw.errors import FTWError as FTWError
    from ftw.hat.bank import LensBank as LensBank
    from ftw.hat.monitor import Monitor as Monitor
    from ftw.hat.timeline import Reading as Reading
    from ftw.hat.timeline import Timeline as Timeline
    from ftw.hat.timeline import TokenReading as TokenReading
    from ftw.map.collect import collect as collect
    from ftw.map.concept import ConceptPack as ConceptPack
    from ftw.map.dynamic import DynamicLensManager as DynamicLensManager
    from ftw.map.encyclopedia import Encyclopedia as Encyclopedia
    from ftw.map.pack import LensPack as LensPack
    from ftw.map.pack import load_pack as load_pack
    from ftw.map.samples import SampleTable as SampleTable
    from ftw.map.training.train import train_lenses as train_lenses
    from ftw.substrate.model import Substrate as Substrate
    from ftw.substrate.model import load_substrate as load_substrate
    from ftw.substrate.taps import Tap as Tap

_HOME = {
    "FTWError": "ftw.errors",
    "Substrate": "ftw.substrate.model",
    "load_substrate": "ftw.substrate.model",
    "Tap": "ftw.substrate.taps",
    "LensBank": "ftw.hat.bank",
    "Monitor": "ftw.hat.monitor",
    "Reading": "ftw.hat.timeline",
    "TokenReading": "ftw.hat.timeline",
    "Timeline": "ftw.hat.timeline",
    "ConceptPack": "ftw.map.concept",
    "SampleTable": "ftw.map.samples",
    "DynamicLensManager": "ftw.map.dynamic",
    "Encyclopedia": "ftw.map.encyclopedia",
    "collect": "ftw.map.collect",
    "LensPack": "ftw.map.pack",
    "load_pack": "ftw.map.pack",
    "train_lenses": "ftw.map.training.train",
}
__all__ = list(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ftw' has no attribute {name!r}; it has {', '.join(_HOME)}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*_HOME]
