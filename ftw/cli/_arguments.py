"""What a user types, made into what Hydra reads, and checked before any work begins.

Hydra's grammar gives commas, brackets, colons, quotes and `${` a meaning; in a prompt they are punctuation. And its own
message for a wrong key does not say which keys there are.
"""

import difflib
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path

import hydra
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, Quote, QuotedString
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ftw.cli._schema import BENCHES
from ftw.errors import ConfigError

# A dry run leaves no folder.
FLAGS = {
    "--json": ["json=true"],
    "--dry-run": ["dry_run=true", "hydra.run.dir=.", "hydra.output_subdir=null"],
    "--force": ["force=true"],
    "--trust-pickle": ["trust_pickle=true"],
}
FILE_FLAGS = {"bench": ("--json", "--plot")}  # options that take a file
ALIASES = {"evaluate": {"texts": "data.path"}}
PACK_ACTIONS = (
    "list", "status", "info", "pull", "push", "verify", "diff", "convert", "import", "export", "sign", "remove"
)  # fmt: skip
ACTIONS = {
    "concepts": {action: f"action={action}" for action in ("show", "build", "verify")},
    "bench": {name: f"bench={name}" for name in BENCHES},
    "timeline": {action: f"action={action}" for action in ("show", "compare")},
}
# What words without "=" mean, in their order.
POSITIONS = {"pack": ("action", "name", "other"), "encyclopedia": ("action", "name")}
# Verbs whose further words without "=" are names of files, and the key that lists them.
FILES = {"timeline": "files"}
TEXT_KEYS = ("prompt", "text", "watch_prompt", "generation.system")
PATH_KEYS = (
    "data.path",
    "texts",
    "pack",
    "save",
    "resume",
    "out",
    "concepts.path",
    "substrate.path",
    "encyclopedia",
    "plot",
    "manifest",
    "name",
    "other",
    "key",
    "path",
    "choose.which",
    "text_encoder",
    "map.text.encoder",
)
# Hydra's options; the second group takes a value.
OPTIONS = (
    "--help",
    "-h",
    "--hydra-help",
    "--version",
    "--resolve",
    "--run",
    "-r",
    "--multirun",
    "-m",
    "--shell-completion",
    "-sc",
)
VALUED = (
    "--cfg",
    "-c",
    "--package",
    "-p",
    "--config-path",
    "-cp",
    "--config-name",
    "-cn",
    "--config-dir",
    "-cd",
    "--info",
    "-i",
)
MOST_CHECKED = 50  # values of a sweep composed in advance, a sixth of a second each


def readable(verb: str, words: Sequence[str]) -> list[str]:
    """The words of a command line with flags and aliases written out and free text quoted for Hydra.

    Hydra's own options come first: its parser refuses keys on both sides of one.
    """
    several = is_multirun(words)
    options: list[str] = []
    result: list[str] = []
    files: list[str] = []
    rest, positions = deque(words), iter(POSITIONS.get(verb, ()))
    while rest:
        word = rest.popleft()
        if not word.startswith("-") and "=" not in word:
            position = next(positions, None)
            word = word if position is None else f"{position}={word}"
        key, equals, value = word.partition("=")
        key = ALIASES.get(verb, {}).get(key, key)
        if key in FILE_FLAGS.get(verb, ()):
            # What follows is the file, unless it is a flag, a key or an action of its own.
            follows = not equals and rest and not re.match(r"-|.*=", rest[0]) and rest[0] not in ACTIONS.get(verb, {})
            result.append(f"{key[2:]}={quoted(rest.popleft() if follows else value)}")
        elif word in FLAGS:
            result += FLAGS[word]
        elif word.startswith("-"):
            options += [word, *([rest.popleft()] if word in VALUED and rest else [])]
        elif verb in FILES and word not in ACTIONS[verb] and (not equals or Path(word).is_file()):
            files.append(QuotedString(text=word, quote=Quote.single).with_quotes())
        elif not equals:
            result.append(ACTIONS.get(verb, {}).get(word, word))
        elif key.lstrip("+") in TEXT_KEYS:
            result.append(f"{key}={quoted(_plain_dollars(value))}")
        elif key.lstrip("+") in PATH_KEYS and not (several and "," in value):
            result.append(f"{key}={quoted(str(Path(value).expanduser()) if value.startswith('~') else value)}")
        else:
            result.append(f"{key}={value}")
    return [*options, *result, *([f"{FILES[verb]}=[{','.join(files)}]"] if files else [])]


def quoted(value: str) -> str:
    """A value that Hydra takes letter by letter; null, plain paths, and what is quoted already, stay as they are."""
    if value == "null" or re.fullmatch(r"[A-Za-z_/][\w-]*[./][\w./-]*", value, flags=re.ASCII):
        return value
    if value[:1] in ("'", '"'):
        try:
            if isinstance(_parse([f"key={value}"])[0].value(), QuotedString | str):
                return value
        except HydraException:
            pass
    return QuotedString(text=value, quote=Quote.single).with_quotes()


def is_multirun(words: Iterable[str]) -> bool:
    """Whether one run for each value is asked for, or a sweep that draws values."""
    return any(word in ("-m", "--multirun") or re.fullmatch(r"\+?sweep=(?!null).+", word) for word in words)


def check(verb: str, words: Sequence[str], folder: str) -> None:
    """Compose the job of every value that is given, without running anything.

    Raises:
        ConfigError: a wrong option, key, value, choice or type, or a value that is missing; the message says which
            there are.
    """
    overrides, config_dir = _split(words)
    try:
        with hydra.initialize_config_dir(version_base="1.3", config_dir=folder):
            try:
                parsed = _parse(overrides)
                several = is_multirun(words)
                for single in _single_runs(parsed, several):
                    _compose(verb, [*single, *config_dir], complete="--cfg" not in words and "-c" not in words)
            except (HydraException, OmegaConfBaseException) as error:
                raise ConfigError(_explain(error, verb, overrides, config_dir)) from error
            except yaml.YAMLError as error:
                raise ConfigError(f"a configuration file is not YAML: {' '.join(str(error).split())}") from error
    finally:
        GlobalHydra.instance().clear()


def near(word: str, choices: Iterable[str]) -> str:
    """The end of a sentence about a wrong word: "; did you mean ...?" where a choice is close, else a full stop."""
    found = difflib.get_close_matches(word, list(choices), n=1)
    return f"; did you mean {found[0]}?" if found else "."


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides, and Hydra's option --config-dir as an override of its search path."""
    overrides, config_dir, rest = [], [], iter(words)
    for word in rest:
        option, equals, value = word.partition("=")
        if not word.startswith("-"):
            overrides.append(word)
        elif option in VALUED:
            value = value if equals else next(rest, "")
            if option in ("--config-dir", "-cd"):
                config_dir = [f"hydra.searchpath=[{quoted('file://' + str(Path(value).absolute()))}]"]
        elif option not in OPTIONS:
            raise ConfigError(
                f"there is no option {option}{near(option, [*FLAGS, *OPTIONS, *VALUED])} Keys are given as key=value"
            )
    return overrides, config_dir


def _parse(overrides: Sequence[str]) -> list[Override]:
    return OverridesParser.create().parse_overrides(list(overrides))


def _single_runs(parsed: Sequence[Override], several: bool) -> Iterator[list[str]]:
    """Overrides without sweeps: the first value of each, then every other value of one sweep at a time."""
    values: list[list[str]] = []
    for override in parsed:
        line = str(override.input_line)
        if override.is_sweep_override():
            if not several:
                value = line.partition("=")[2]
                raise ConfigError(
                    f"{line}: several values; add -m for one run each, or write a list: "
                    f"{override.get_key_element()}=[{value}]"
                )
            values.append([f"{override.get_key_element()}={value}" for value in _swept(override)])
        else:
            values.append([line])
    first = [choices[0] for choices in values]
    yield first
    for place, choices in enumerate(values):
        for other in choices[1:MOST_CHECKED]:
            yield [*first[:place], other, *first[place + 1 :]]


def _swept(override: Override) -> list[str]:
    """The values of a sweep; of an interval its ends."""
    value = override.value()
    if isinstance(value, IntervalSweep):
        return [str(value.start), str(value.end)]
    return list(override.sweep_string_iterator())


def _compose(verb: str, overrides: list[str], *, complete: bool) -> None:
    config = hydra.compose(verb, overrides=overrides)
    for override in _parse(overrides):
        parent, _, last = override.key_or_group.rpartition(".")
        node = OmegaConf.select(config, parent) if parent else config
        # Hydra lets `+key` into a typed part, where nothing would ever read it.
        if override.is_add() and isinstance(node, DictConfig) and is_dataclass(schema := OmegaConf.get_type(node)):
            keys = [known.name for known in fields(schema)]
            if last not in keys and not _is_group(override.key_or_group):
                raise ConfigError(_unknown(override.key_or_group, last, keys, parent))
    if complete:
        OmegaConf.to_container(config, resolve=True, throw_on_missing=True)


def _explain(error: Exception, verb: str, overrides: Sequence[str], config_dir: list[str]) -> str:
    """Why the arguments do not make a job, with the choices there are."""
    if isinstance(error, OverrideParseException):
        return _unreadable(
            next((one for one in overrides if error.override and error.override in one), str(error.override)), verb
        )
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        options = [name for name in error.options if not name.endswith("_schema")]
        return f"{group}={option}: no such choice{near(option, options)} Choose from {', '.join(options)}"
    groups = [one for one in overrides if _is_group(one.lstrip("+~").partition("=")[0])]
    if added := [one for one in groups if one.startswith("+") and "Multiple values" in str(error)]:
        return f"{added[0]}: this group is there already; leave out the +"
    # The keys there are depend on the groups that were chosen.
    try:
        base = hydra.compose(verb, overrides=[*groups, *config_dir])
    except (HydraException, OmegaConfBaseException):
        base = hydra.compose(verb)
    cause = error.__cause__ or error
    for override in overrides:
        key = override.lstrip("~").partition("=")[0]
        if override not in groups and not key.startswith(("+", "hydra.")) and (words := _no_key(key, base)):
            return words
    key = getattr(cause, "full_key", None)
    if type(cause).__name__ == "MissingMandatoryValue":
        short = next((alias for alias, meant in ALIASES.get(verb, {}).items() if meant == key), key)
        return f"{key} needs a value; give it as {short}=..."
    words = next((line for line in str(cause if key else error).splitlines() if line.strip()), type(error).__name__)
    if "is not a ListConfig" in words:
        words = f"a list is needed; write {key}=[first,second]"
    return f"{key}: {words}" if key else words


def _no_key(key: str, config: DictConfig) -> str | None:
    """What to say of a key that does not exist, naming the first part of it that is wrong; None if it exists."""
    node, path = config, ""
    for part in key.partition("@")[0].replace("/", ".").split("."):
        if not isinstance(node, DictConfig):
            return None
        keys = [str(name) for name in node if name != "_target_"]  # `in node` would deny a key without a value
        if part not in keys:
            return _unknown(key, part, keys, path)
        path = f"{path}.{part}" if path else part
        node = None if OmegaConf.is_missing(node, part) else node[part]
    return None


def _unknown(key: str, part: str, keys: Sequence[str], parent: str) -> str:
    return f"no key {key}{near(part, keys)} The keys{' of ' + parent if parent else ''} are: {', '.join(keys)}"


def _is_group(key: str) -> bool:
    return bool(GlobalHydra.instance().config_loader().get_group_options(key.partition("@")[0]))


def _unreadable(word: str, verb: str) -> str:
    if "=" in word:
        key = word.partition("=")[0]
        return f"{word}: a sign in this value is grammar to Hydra; put it in two kinds of quotes: {key}='\"...\"'"
    if actions := ACTIONS.get(verb):
        return f"{word!r} is none of {', '.join(actions)}{near(word, actions)} Keys are given as key=value"
    example = (
        f'; a prompt is given as prompt="{word}"' if verb in ("monitor", "demo", "interpret") else "; write key=value"
    )
    return f"{word!r} is not of the form key=value{example} (ftw {verb} --help says which keys there are)"


def _plain_dollars(value: str) -> str:
    """`${` without OmegaConf's meaning."""
    return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", value)
