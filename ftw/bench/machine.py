"""What figures were measured on: the machine, and the commit of the code."""

import contextlib
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch


def machine(device: torch.device) -> dict[str, Any]:
    """Processor, cores, memory, versions and load; with CUDA the card and its driver."""
    described: dict[str, Any] = {
        "platform": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": str(device),
        "load": load(),
    }
    if (free := free_bytes()) is not None:
        described["free_gb"] = round(free / 1e9, 1)
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        described |= {"card": card.name, "card_gb": round(card.total_memory / 1e9, 1), "driver": _driver()}
    return described


def load() -> float | None:
    """Processes that wanted to run, mean over the last minute; None where the system does not say."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def free_bytes() -> int | None:
    """Memory that a process may still take; None where the system does not say."""
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    return None


def processor() -> str:
    """Name of the processor."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model n")]
        if name := next((name for name in names if not name.isdigit()), None):
            return name
    return platform.processor()


def git_state() -> dict[str, Any] | None:
    """Commit of the checkout that FTW runs from, or None when it was installed."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit.stdout.strip(), "dirty": bool(dirty.stdout.strip())}


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
        return answer.stdout.splitlines()[0].strip() if answer.stdout else None
    return None
