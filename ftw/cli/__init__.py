"""The command line: one module a verb, each a Hydra program over a typed job."""

import sys
from types import TracebackType


def _quiet_interrupt(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Ctrl-C while modules are still being imported is no defect: one line instead of a traceback."""
    if issubclass(kind, KeyboardInterrupt):
        print("ftw: stopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _quiet_interrupt
