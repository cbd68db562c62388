"""Every verb is run on a toy substrate and toy texts."""

from collections.abc import Iterator

import pytest
from toy_run import ToyRun, inside, toy_run

__all__ = ["toy_run"]


@pytest.fixture
def toy(toy_run: ToyRun) -> Iterator[ToyRun]:
    """The toy run, with its folder as the current one."""
    with inside(toy_run):
        yield toy_run
