"""Clocks and gauges: time inside the model, peak memory, and what machine this is."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from dllm_var import __version__
from dllm_var.model.transformer import Transformer


class ForwardClock:
    """Adds up the time that transformers spend in their forwards: layers and output head.

    On the CPU two readings of the clock per call; on CUDA events on the stream, so that nothing waits for the device.

    Args:
        models: The transformers to watch.
    """

    def __init__(self, models: Sequence[Transformer]) -> None:
        self.models = models
        self.calls = 0
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> ForwardClock:
        for model in self.models:
            model.hidden_states = self._timed(model.hidden_states, counts=True)  # type: ignore[method-assign]
            model.lm_head.forward = self._timed(model.lm_head.forward)  # type: ignore[method-assign]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for model in self.models:  # what was set on the object hides the class's own
            del model.hidden_states
            del model.lm_head.forward

    @property
    def seconds(self) -> float:
        """Time spent so far."""
        for start, end in self._events:
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1000
        self._events.clear()
        return self._seconds

    def _timed(self, function: Callable[..., Any], counts: bool = False) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += counts
            if self.models[0].embedding.weight.is_cuda:
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                result = function(*args, **kwargs)
                end.record()
                self._events.append((start, end))
                return result
            began = time.perf_counter()
            result = function(*args, **kwargs)
            self._seconds += time.perf_counter() - began
            return result

        return call


class PeakMemory:
    """Measures how many bytes a piece of code holds at its peak, beyond what was held when it began.

    On CUDA what torch allocated; on Linux the process's resident memory, whose peak the kernel is told to forget first
    (`/proc/self/clear_refs`), after the allocator has given back what it keeps. `bytes` is null where neither works.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None
        self._before: int | None = None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            _return_free_memory()
            self._before = _resident("VmRSS") if _forget_peak() else None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is None:
            return
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _resident("VmHWM")
        self.bytes = None if peak is None else max(0, peak - self._before)


def _return_free_memory() -> None:
    with suppress(OSError, AttributeError, TypeError):  # raised where the C library is not glibc
        ctypes.CDLL(None).malloc_trim(0)


def _forget_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident(field: str) -> int | None:
    """Returns a line of /proc/self/status in bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = next((line for line in lines if line.startswith(f"{field}:")), None)
    return None if found is None else int(found.split()[1]) * 1024


def synchronise(device: torch.device) -> None:
    """Waits for the device, so that a clock read now counts all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Returns what figures depend on: processor, device, threads, versions and commit."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dllm_var": __version__,
        "commit": commit(),
    }


def cpu_name() -> str:
    """Returns the processor's name as the system knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str | None:
    """Returns the checkout's commit, with `+changes` when files differ from it; null outside a checkout."""
    root = Path(__file__).parent.parent.parent
    if not (root / ".git").exists():
        return None
    try:
        run: dict[str, Any] = dict(cwd=root, capture_output=True, text=True, timeout=10, check=True)
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **run).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], **run).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+changes" if changed else "")


def command_line() -> str:
    """Returns how this process was started, as it would be typed."""
    import shlex

    return shlex.join(["python", "-m", "dllm_var", *sys.argv[1:]])
