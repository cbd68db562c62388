"""What `ftw VERB --help` prints: examples, groups with their choices, keys with their values as they are."""

import textwrap
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from omegaconf import DictConfig, OmegaConf

WIDTH, COLUMN = 116, 20
OWN = ""  # where the keys of no part stand


def help_text(verb: str, folder: str) -> str:
    """Help of a verb, made from its configuration, so that it cannot be out of date."""
    with hydra.initialize_config_dir(version_base="1.3", config_dir=folder):
        config = hydra.compose(verb, return_hydra_config=True)
        chosen = {
            name: option for name, option in config.hydra.runtime.choices.items() if not name.startswith("hydra/")
        }
        options = {name: _options(name) for name in sorted(chosen)}
    GlobalHydra.instance().clear()
    parts: dict[str, list[str]] = {OWN: []}
    for key in (key for key in config if key not in ("hydra", *[name for name in options if chosen[name] is None])):
        _collect(str(key), config, "", parts)
    groups = [
        f"  {name:<{COLUMN}} " + "  ".join(f"{option}*" if option == chosen[name] else option for option in choices)
        for name, choices in options.items()
        if len(choices) > 1 or chosen[name] is None
    ]
    lines = [config.hydra.help.header.strip(), "", textwrap.indent(config.hydra.help.template.rstrip(), "  ")]
    if groups:
        lines += ["", "Groups: group=choice exchanges a whole part (* as it is)", *groups]
    lines += [
        "",
        "Keys: part.key=value changes one",
        *(_paragraph(part, words) for part, words in parts.items() if words),
    ]
    return "\n".join([*lines, "", "--cfg job prints the whole configuration; --hydra-help what else Hydra can do."])


def _options(group: str) -> list[str]:
    options = GlobalHydra.instance().config_loader().get_group_options(group, ObjectType.CONFIG)
    return [option for option in options if not option.endswith("_schema")]


def _collect(key: str, node: DictConfig, path: str, parts: dict[str, list[str]]) -> None:
    """Every key of a node as "key=value", under the path of the part it belongs to."""
    if OmegaConf.is_missing(node, key):
        parts.setdefault(path, []).append(f"{key}=???")
        return
    value = node[key]
    if isinstance(value, DictConfig) and len(value):
        for inner in value:
            _collect(str(inner), value, f"{path}.{key}" if path else key, parts)
    elif key != "_target_":
        parts.setdefault(path, []).append(
            f"{key}={_flow(OmegaConf.to_container(value) if OmegaConf.is_config(value) else value)}"
        )


def _flow(value: Any) -> str:
    """A value in a line, as it can be typed; long lists are cut."""
    if isinstance(value, list):
        shown = ",".join(_flow(item) for item in value[:4])
        return f"[{shown},...{len(value)}]" if len(value) > 4 else f"[{shown}]"
    words = {None: "null", True: "true", False: "false", "": '""'}
    return words[value] if value is None or isinstance(value, bool) or value == "" else str(value)


def _paragraph(part: str, words: list[str]) -> str:
    # Values with spaces (a prompt) would be broken anywhere; they are short enough to be kept whole.
    text = "  ".join(word.replace(" ", "\u00a0") for word in words)
    indent = " " * (COLUMN + 3)
    body = textwrap.fill(
        text, WIDTH, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    name = f"  {part + '.' if part else '':<{COLUMN}} "
    return (name + body[len(name) :] if len(name) <= len(indent) else f"{name.rstrip()}\n{body}").replace("\u00a0", " ")
