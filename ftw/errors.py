"""What can go wrong, said so that the person who meets it knows the next step.

Every error that FTW raises on purpose is an `FTWError`; its message names the value, the limit and what to do. The
command line prints the message alone (no traceback) and exits with status 2.
"""


class FTWError(Exception):
    """Anything that FTW refuses, with the remedy in its message."""


class ConfigError(FTWError):
    """A key or value of the configuration that cannot be."""


class SourceError(FTWError):
    """A model or a data set that none of its addresses gave, or whose bytes are not the promised ones."""


class SubstrateError(FTWError):
    """A language model that cannot be read, or a tap that did not fire."""


class ConceptError(FTWError):
    """A concept, synset or concept pack that does not exist or contradicts itself."""


class DataError(FTWError):
    """Texts, labels or states that nothing honest can be computed on."""


class LeakError(DataError):
    """Texts or groups that stand on both sides of a split."""


class EncyclopediaError(FTWError):
    """A store of states that is damaged, incomplete, or of another substrate."""


class PackError(FTWError):
    """A lens pack that is damaged, hostile, or made for another substrate."""


class DiskFullError(FTWError):
    """No room for a file; what was finished before is intact."""
