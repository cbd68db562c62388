"""What all verbs share: Hydra around a typed job, errors in one sentence, an exit status that scripts can trust.

Status 0: done. 1: a defect of FTW (with traceback). 2: something the user can mend. 130: stopped with Ctrl-C.
"""

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar

import hydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.text import Text

from ftw import paths
from ftw.cli._arguments import check, readable
from ftw.cli._help import help_text
from ftw.cli._schema import register
from ftw.errors import FTWError

GO_ON = "stopped; run the same command again to go on: what was finished is kept"
T = TypeVar("T")


def verb(name: str, function: Callable[[Any], object], job: type, *, data: Mapping[str, type] | None = None) -> None:
    """Run `function` on the job that the command line describes; `data` has the schemas of the group `data`."""
    register(name, job, data or {})
    folder = str(paths.conf())
    if any(word in ("--help", "-h") for word in sys.argv[1:]):
        print(help_text(name, folder))
        return
    # In place: Lightning starts further processes with sys.argv, and what Hydra can read, they can.
    sys.argv[1:] = readable(name, sys.argv[1:])
    guarded(lambda: check(name, sys.argv[1:], folder))

    def run(config: DictConfig) -> object:
        return guarded(lambda: function(OmegaConf.to_object(config)))

    hydra.main(version_base="1.3", config_path=folder, config_name=name)(run)()


def guarded(function: Callable[[], T]) -> T:
    """Call, turning what a user can mend into a sentence on stderr and a status."""
    try:
        return function()
    except FTWError as error:
        fail(str(error))
    except OmegaConfBaseException as error:
        fail(next((line for line in str(error).splitlines() if line.strip()), type(error).__name__))
    except KeyboardInterrupt as stop:
        fail(str(stop) or GO_ON, status=130)
    except BrokenPipeError:
        # The reader (head, less) has seen enough; a flush at exit must not complain about it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def fail(message: str, *, status: int = 2) -> NoReturn:
    """Print one error and end."""
    Console(stderr=True).print(Text.assemble(("ftw:", "bold red"), f" {message}"), soft_wrap=True)
    sys.exit(status)
