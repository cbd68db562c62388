"""The sequence families by name: what a configuration asks for, and what it takes to build a head again."""

from ftw.errors import ConfigError
from ftw.hat.lens import HeadConfig
from ftw.hat.temporal.pooling import AttentionHead, TokenHead
from ftw.hat.temporal.recurrent import GATES, RecurrentHead
from ftw.hat.temporal.sequence import SequenceHead

UNITS, QUERIES = 256, 4


def build_head(config: HeadConfig, num_lenses: int, width: int) -> SequenceHead:
    """N untrained sequence lenses.

    Raises:
        ConfigError: a family that is none of these.
    """
    if config.family in GATES:
        units = config.hidden or UNITS
        return RecurrentHead(num_lenses, width, cell=config.family, hidden=units, dropout=config.dropout)
    if config.family == "attention":
        return AttentionHead(num_lenses, width, queries=config.hidden or QUERIES)
    if config.family in ("token_max", "token_mean"):
        return TokenHead(num_lenses, width, pool=config.family.removeprefix("token_"))
    raise ConfigError(f"hat.lens.family={config.family!r} reads no sequences")


def described(head: SequenceHead) -> HeadConfig:
    """The configuration that builds a head of this kind again."""
    if isinstance(head, RecurrentHead):
        return HeadConfig(family=head.cell, hidden=head.hidden, dropout=head.dropout)
    if isinstance(head, AttentionHead):
        return HeadConfig(family="attention", hidden=head.queries)
    assert isinstance(head, TokenHead)  # there are no others
    return HeadConfig(family=f"token_{head.pool}")
