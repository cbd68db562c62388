"""What all verbs share: Hydra around a typed job, errors in one sentence, an exit status that scripts can trust.

Status 0: done. 1: a defect of FTW (with traceback). 2: something the user can mend. 130: stopped with Ctrl-C.
"""

import difflib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from ftw import paths
from ftw.cli._schema import register
from ftw.errors import FTWError

FLAGS = {"--json": "json=true", "--dry-run": "dry_run=true"}
T = TypeVar("T")


def verb(name: str, function: Callable[[Any], object]) -> None:
    """Run `function` on the job that the command line describes.

    The arguments are checked by composing the job once before Hydra runs it: its own message for a wrong key does not
    say which keys there are.
    """
    register()
    sys.argv[1:] = [FLAGS.get(word, word) for word in sys.argv[1:]]
    folder = str(paths.conf())
    check(name, sys.argv[1:], folder)

    def run(config: DictConfig) -> None:
        guarded(lambda: function(OmegaConf.to_object(config)))

    hydra.main(version_base="1.3", config_path=folder, config_name=name)(run)()


def guarded(function: Callable[[], T]) -> T:
    """Call, turning what a user can mend into a sentence on stderr and a status."""
    try:
        return function()
    except FTWError as error:
        fail(str(error))
    except OmegaConfBaseException as error:
        fail(first_line(error))
    except KeyboardInterrupt:
        fail("stopped; run the same command again to go on: what was finished is kept", status=130)
    except BrokenPipeError:
        # The reader (head, less) has seen enough; a flush at exit must not complain about it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def fail(message: str, *, status: int = 2) -> Any:
    """Print one error and end."""
    Console(stderr=True).print(f"[bold red]ftw:[/] {_escape(message)}", highlight=False, soft_wrap=True)
    sys.exit(status)


def check(name: str, arguments: Sequence[str], folder: str) -> None:
    """Compose the job once; on a wrong key, value or choice say which there are, and end with status 2."""
    # Hydra's own options (`--cfg job`) have no "=": what is left are overrides.
    overrides = [word for word in arguments if not word.startswith("-") and ("=" in word or word.startswith("~"))]
    try:
        with hydra.initialize_config_dir(version_base="1.3", config_dir=folder):
            base = hydra.compose(name)
            try:
                config = hydra.compose(name, overrides=_first_of_sweeps(overrides))
                if not any(word in ("--help", "-h", "--cfg", "-c", "--info", "-i") for word in arguments):
                    OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
            except (HydraException, OmegaConfBaseException) as error:
                fail(explain(error, overrides, base))
    finally:
        GlobalHydra.instance().clear()


def explain(error: Exception, overrides: Sequence[str], base: DictConfig) -> str:
    """Why the arguments do not make a job, with the choices there are."""
    cause = error.__cause__ or error
    key = getattr(cause, "full_key", None)
    text = "\n".join(line for line in str(error).splitlines() if line.strip() and "reference_type" not in line and "object_type" not in line)
    for override in overrides:
        name = override.split("=")[0].lstrip("+~")
        parent, _, last = name.rpartition(".")
        node = OmegaConf.select(base, parent) if parent else base
        if "=" in override and isinstance(node, DictConfig) and last not in node and "Could not override" in text:
            choices = [str(choice) for choice in node]
            near = difflib.get_close_matches(last, choices, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            where = f" of {parent!r}" if parent else ""
            return f"no key {name!r}{hint} The keys{where} are: {', '.join(choices)}"
    if "Missing mandatory value" in text and key:
        return f"{key} needs a value; give it as {key}=..."
    if key:
        return f"{key}: {first_line(cause)}"
    return text.partition("Config search path")[0].rstrip()


def first_line(error: BaseException) -> str:
    """The part of an error of Hydra or OmegaConf that a user can use."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _first_of_sweeps(overrides: Sequence[str]) -> list[str]:
    """Overrides with the first value of each sweep (`key=1,2,3`), which composing alone cannot take."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    single = []
    for override in parsed:
        if override.is_sweep_override():
            first = next(iter(override.sweep_string_iterator()))
            single.append(f"{override.key_or_group}={first}")
        else:
            single.append(str(override.input_line))
    return single


def _escape(text: str) -> str:
    return text.replace("[", r"\[")
