"""Instruments of the benchmarks: clocks for decoding and training, a gauge of peak memory, the machine's name."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from dllm_var.checkpoints.run_checkpoint import provenance
from dllm_var.model.transformer import Transformer

T = TypeVar("T")
PHASES = ("data", "forward", "head_and_loss", "backward", "optimizer")  # of a training step


class ForwardClock:
    """Adds up the time that transformers spend in their forwards, layers and output head, and counts the forwards.

    On the CPU it reads the clock twice per call; on CUDA it records events, so that nothing waits for the device.
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

    def __exit__(self, *_: Any) -> None:
        for model in self.models:  # the object's attributes hid the methods of its class
            del model.hidden_states
            del model.lm_head.forward

    @property
    def seconds(self) -> float:
        """Time spent so far; on CUDA this waits for the device."""
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


@dataclass
class Step:
    """One optimizer step: the time in each phase, and what its batch holds."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    tokens: int = 0  # of samples, without padding
    positions: int = 0  # with padding
    loss_tokens: int = 0
    pairs: int = 0  # of tokens, without padding, of which one attends to the other


class StepClock:
    """Cuts the time of training into phases without a gap: each mark ends one phase and begins the next.

    Each mark waits for the device, so that a phase is charged with its own work.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.restart()

    def restart(self) -> None:
        """Forgets all steps; the time from now to the first mark belongs to the first step."""
        self.steps: list[Step] = []
        self._step = Step()
        self._last = time.perf_counter()

    def mark(self, phase: str) -> None:
        """Charges a phase with the time since the last mark."""
        synchronise(self.device)
        now = time.perf_counter()
        self._step.seconds[phase] += now - self._last
        self._last = now

    def end_step(self, segment_ids: Tensor, loss_tokens: int, full_attention: bool) -> None:
        """Ends the last phase, `optimizer`, and the step.

        Args:
            segment_ids: Of the step's batch [B, L]: the sample that each position belongs to, below 0 for padding.
            loss_tokens: Positions with a loss.
            full_attention: Whether samples see their whole row, or only themselves.
        """
        self.mark("optimizer")
        step, self._step = self._step, Step()
        step.tokens, step.positions = int((segment_ids >= 0).sum()), segment_ids.numel()
        step.loss_tokens = loss_tokens
        within_samples = sum(int(row[row >= 0].bincount().square().sum()) for row in segment_ids)
        step.pairs = segment_ids.size(1) * step.tokens if full_attention else within_samples
        self.steps.append(step)


class PeakMemory:
    """Measures how many bytes a block of code holds at its peak, beyond the bytes held when it began.

    On CUDA these are torch's allocations. On Linux it is the process's resident memory: the C allocator first returns
    its free memory, and the kernel forgets the old peak (`/proc/self/clear_refs`). `bytes` is None on other systems.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        self._before: int | None = None
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
            return self
        with suppress(OSError, AttributeError, TypeError):  # raised where the C library is not glibc
            ctypes.CDLL(None).malloc_trim(0)
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
            self._before = _resident("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            cuda = self.device.type == "cuda"
            peak = torch.cuda.max_memory_allocated(self.device) if cuda else _resident("VmHWM")
            self.bytes = max(0, peak - self._before)


def _resident(field: str) -> int:
    """Returns a line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])


def shown(title: str, items: Sequence[T]) -> Iterator[T]:
    """Yields the items; standard error shows a bar that moves on a terminal, and the title alone elsewhere."""
    if not sys.stderr.isatty():
        print(title, file=sys.stderr, flush=True)
    yield from tqdm(items, title, leave=False, disable=None)


def synchronise(device: torch.device) -> None:
    """Waits for the device, so that a clock read now includes all its work so far."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Returns processor, device, threads, versions and commit: figures depend on them."""
    made = provenance()
    git = made["git"]
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "platform": platform.platform(),
        "python": made["versions"]["python"],
        "torch": torch.__version__,
        "dllm_var": made["versions"]["dllm-var"],
        "commit": None if git is None else git["commit"][:12] + ("+changes" if git["changed"] else ""),
    }


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
