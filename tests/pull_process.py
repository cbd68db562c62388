"""A pull in a process of its own, which can be killed."""

import multiprocessing
import os
from multiprocessing.process import BaseProcess
from pathlib import Path

from ftw.map import registry


def start_pull(endpoint: str, home: Path, version: str | None = None) -> BaseProcess:
    """Start `pull_lens_pack("toy")` against a Hub, in a process that has imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ftw.map.registry", "huggingface_hub.hf_api", "huggingface_hub.file_download"])
    process = context.Process(target=_pull, args=(endpoint, str(home), version))
    process.start()
    return process


def _pull(endpoint: str, home: str, version: str | None) -> None:
    from huggingface_hub import constants

    os.environ.update(HF_ENDPOINT=endpoint, FTW_HOME=home)
    constants.HF_HUB_OFFLINE = False
    constants.HF_HUB_DISABLE_XET = True
    registry.pull_lens_pack("toy", version=version)
