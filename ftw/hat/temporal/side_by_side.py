"""Parts of the lenses side by side: on a CPU every core reads, or trains, a part of its own.

torch would split each operation over the cores. A recurrence is made of thousands of small ones, and of those nothing
is left to split: two cores were no faster than one (`ftw bench temporal`).
"""

import functools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Part = TypeVar("Part")
Result = TypeVar("Result")


def side_by_side(function: Callable[[Part], Result], parts: Sequence[Part], device: torch.device) -> Iterator[Result]:
    """What a function gives for each part, in their order; whether gradients are kept is as where it was called."""
    num = torch.get_num_threads()
    if device.type != "cpu" or num < 2 or len(parts) < 2:
        return map(function, parts)
    inference, gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def run(part: Part) -> Result:
        with torch.inference_mode(inference), torch.set_grad_enabled(gradients):
            return function(part)

    return _cores(num, os.getpid()).map(run, parts)


@functools.cache
def _cores(num: int, process: int) -> ThreadPoolExecutor:
    """So many threads that compute on one core each; a forked process has none of its parent's, so it starts anew."""
    cores = ThreadPoolExecutor(num, thread_name_prefix="ftw-core")
    started = threading.Barrier(num)

    def start(_: int) -> None:
        torch.get_num_threads()  # the first question sets the thread's number to the process's; only then set it
        torch.set_num_threads(1)
        started.wait()

    list(cores.map(start, range(num)))
    torch.set_num_threads(num)  # part of what the threads have set holds for all
    return cores
