"""A run's folder: what was asked, what it was made of, and where the newest one is."""

import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from ftw import paths
from ftw.bench.machine import git_state, processor
from ftw.substrate.sources import Fetched

PACKAGES = (
    "ftw-lenses",
    "torch",
    "transformers",
    "pytorch-lightning",
    "hydra-core",
    "scikit-learn",
    "h5py",
    "safetensors",
    "numpy",
)


def run_folder() -> Path:
    """Folder of this run, made by Hydra."""
    return Path(HydraConfig.get().runtime.output_dir)


def command() -> str:
    """The command line that started this run, as it was typed."""
    typed = sys.orig_argv
    words = typed[typed.index("-m") + 2 :] if "-m" in typed else sys.argv[1:]
    return shlex.join(["ftw", Path(sys.argv[0]).stem, *words])


def begin(job: Any) -> Path:
    """Write the resolved configuration into the run's folder, before any work: a run that fails has it too."""
    folder = run_folder()
    (folder / "config.yaml").write_text(config_yaml(job), encoding="utf-8")
    return folder


def config_yaml(job: Any) -> str:
    """The resolved configuration."""
    return OmegaConf.to_yaml(asdict(job) if is_dataclass(job) and not isinstance(job, type) else job)


def provenance(job: Any, inputs: Sequence[Fetched]) -> dict[str, Any]:
    """Command, configuration, versions, machine, commit, inputs with hashes, time."""
    return {
        "command": command(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": getattr(job, "seed", None),
        "git": git_state(),
        "versions": versions(),
        "machine": {
            "platform": platform.platform(),
            "processor": processor(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "inputs": inputs_table(inputs),
        "config": json.loads(json.dumps(asdict(job), default=str)),
    }


def inputs_table(inputs: Sequence[Fetched]) -> list[dict[str, Any]]:
    """Every source with the address that gave it and the hashes of its files."""
    return [{"name": i.name, "address": i.address, "sha256": i.sha256, "notice": i.notice} for i in inputs]


def versions() -> dict[str, str]:
    """Versions of what computes."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_json(path: Path, value: Any) -> None:
    """A JSON file, whole or not at all."""
    with paths.replace_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def point_latest(folder: Path) -> None:
    """Make `runs/latest` a link to a finished run, which may be one of a sweep (`runs/SWEEP/3`) or lie elsewhere."""
    root = paths.runs()
    root.mkdir(parents=True, exist_ok=True)
    folder = folder.absolute()
    temporary = root / f".latest.{os.getpid()}"
    temporary.unlink(missing_ok=True)
    # Relative, so that runs/ can be moved.
    temporary.symlink_to(folder.relative_to(root) if folder.is_relative_to(root) else folder)
    temporary.replace(root / "latest")


def shown(folder: Path) -> str:
    """A folder as a user would type it from here."""
    return str(folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder)
