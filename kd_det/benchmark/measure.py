"""Time, memory, kernels and waits of a function, on the CPU or on a GPU."""

import collections
import itertools
import os
import traceback
import warnings
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import timer

__all__ = ["kernels", "peak_bytes", "seconds", "waits"]


def seconds(function: Callable, calls: int = 1) -> float:
    """Mean time of a call. ``timer`` synchronises a GPU only before the first call and after the last one."""
    start = timer()
    for _ in range(calls):
        function()
    return (timer() - start) / calls


def peak_bytes(function: Callable, device: str) -> int:
    """The most memory that is allocated during a call on top of what is allocated before."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports each of its starts on stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(itertools.accumulate(changes), default=0)


def kernels(function: Callable) -> int:
    """How many kernels a call launches on the GPU; copies and memsets are not counted."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        function()
        torch.cuda.synchronize()
    return sum(event.count for event in profiler.key_averages() if "LaunchKernel" in event.key)


def waits(function: Callable) -> collections.Counter:
    """How often the host waits for the GPU in a call, by the innermost line of kd_det or Detectron2."""
    found = collections.Counter()

    def count(message, *args, **kwargs):
        if "synchronizing CUDA operation" in str(message):
            found[_place()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = count
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return found


def _place() -> str:
    for frame in reversed(traceback.extract_stack()):
        for package in ("kd_det", "detectron2"):
            _, found, path = frame.filename.rpartition(f"/{package}/")
            if found and not path.startswith("benchmark/"):
                return f"{package}/{path}:{frame.lineno}"
    return "outside kd_det and Detectron2"
