"""Instruments of the benchmarks: clocks for decoding and training, a gauge of peak memory, the machine's name."""

import ctypes
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.benchmark import Timer
from tqdm import tqdm

from dllm_var.checkpoints.config_json import write_config
from dllm_var.checkpoints.families import LLAMA
from dllm_var.checkpoints.run_checkpoint import provenance
from dllm_var.errors import UserError
from dllm_var.model.config import TransformerConfig
from dllm_var.model.transformer import Transformer

T = TypeVar("T")
PHASES = ("data", "forward", "head_and_loss", "backward", "optimizer")  # of a training step


def now(device: torch.device) -> Any:
    """Returns the time; on CUDA an event, at which the device will have come so far."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: Any, end: Any) -> float:
    """Returns the seconds between two results of `now`; the device must have come that far."""
    return end - start if isinstance(end, float) else start.elapsed_time(end) / 1000


class ForwardClock:
    """Adds up the time that transformers spend in layers and output head; on CUDA by events, which wait for nothing."""

    def __init__(self, models: Sequence[Transformer]) -> None:
        self._device = models[0].embedding.weight.device
        self._timed = [pair for m in models for pair in ((m, "hidden_states"), (m.lm_head, "forward"))]
        self._marks: list[tuple[Any, Any]] = []  # before and after each call

    def __enter__(self) -> "ForwardClock":
        for owner, name in self._timed:
            setattr(owner, name, self._marked(getattr(owner, name)))
        return self

    def __exit__(self, *_: Any) -> None:
        for owner, name in self._timed:  # the object's attributes hid the methods of its class
            delattr(owner, name)

    @property
    def seconds(self) -> float:
        """Time spent so far; on CUDA this waits for the device."""
        synchronise(self._device)
        return sum(seconds_between(start, end) for start, end in self._marks)

    def _marked(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = now(self._device)
            result = function(*args, **kwargs)
            self._marks.append((start, now(self._device)))
            return result

        return call


class StepClock:
    """Cuts the time of training into phases without a gap; on CUDA by events, so that no mark waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.restart()

    def restart(self) -> None:
        """Forgets all steps; the time from now to the first mark belongs to the first step."""
        self._ended: list[tuple[list[tuple[str, Any]], dict[str, int | Tensor]]] = []
        self._marks: list[tuple[str, Any]] = []
        self._began = now(self.device)

    def mark(self, phase: str) -> None:
        """Charges a phase with the time since the last mark."""
        self._marks.append((phase, now(self.device)))

    def end_step(self, segment_ids: Tensor, counts: dict[str, int | Tensor]) -> None:
        """Ends the last phase and the step; its batch has `segment_ids` [B, L] and `counts` of `NoisedBatch`."""
        self.mark("optimizer")
        names = {"loss_tokens": "loss_tokens", "read": "read_tokens", "pairs": "attended_pairs"}
        work = {name: counts[counted] for name, counted in names.items()}
        self._ended.append((self._marks, {"tokens": (segment_ids >= 0).sum(), **work}))
        self._marks = []

    @property
    def steps(self) -> list[dict[str, float]]:
        """Seconds of each phase and counts of each step; this waits for the device."""
        synchronise(self.device)
        found, last = [], self._began
        for marks, counts in self._ended:
            seconds = dict.fromkeys(PHASES, 0.0)
            for phase, moment in marks:
                seconds[phase] += seconds_between(last, moment)
                last = moment
            found.append({**seconds, **{name: int(count) for name, count in counts.items()}})
        return found


class PeakMemory:
    """Measures the `bytes` that a block of code holds at its peak, beyond those held when it began.

    On CUDA these are torch's allocations, on Linux the process's resident memory; None on other systems.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None

    def __enter__(self) -> "PeakMemory":
        self._before: int | None = None
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
            return self
        with suppress(OSError, AttributeError, TypeError):  # raised where the C library is not glibc
            ctypes.CDLL(None).malloc_trim(0)  # the C allocator returns its free memory
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets the old peak
            self._before = _resident("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            cuda = self.device.type == "cuda"
            peak = torch.cuda.max_memory_allocated(self.device) if cuda else _resident("VmHWM")
            self.bytes = max(0, peak - self._before)


def _resident(field: str) -> int:
    """Returns a line of /proc/self/status in bytes."""
    found: Any = re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())
    return 1024 * int(found[1])


def shown(title: str, items: Sequence[T]) -> Iterator[T]:
    """Yields the items; standard error shows a bar that moves on a terminal, and the title alone elsewhere."""
    if not sys.stderr.isatty():
        print(title, file=sys.stderr, flush=True)
    yield from tqdm(items, title, leave=False, disable=None)


def synchronise(device: torch.device) -> None:
    """Waits for the device, so that a clock read now includes all its work so far."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bandwidth(device: torch.device, numbers: int) -> float:
    """Returns the bytes per second that are read and written when so many 16-bit numbers are copied."""
    source = torch.zeros(numbers, device=device, dtype=torch.bfloat16)
    copy = Timer("target.copy_(source)", globals={"source": source, "target": torch.empty_like(source)})
    return 2 * source.nbytes / copy.blocked_autorange(min_run_time=0.2).median


@torch.no_grad()
def random_model(config: TransformerConfig, device: torch.device, dtype: torch.dtype) -> Transformer:
    """Builds a model whose weights are drawn where they are; gigabytes take a CPU minutes."""
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
    model.to_empty(device=device).tie_weights()
    for parameter in model.parameters():
        parameter.fill_(1) if parameter.dim() == 1 else parameter.normal_(std=0.02)
    return model


def llama_config(shape: TransformerConfig, dtype: str) -> Any:
    """Returns transformers' configuration of a Llama of this shape; raises UserError without transformers."""
    try:
        from transformers import LlamaConfig
    except ImportError as error:
        raise UserError('this baseline needs transformers: pip install "dllm-var[transformers]"') from error
    return LlamaConfig(**write_config(LLAMA, shape.resolved(), dtype))


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Returns processor, device, threads, versions and commit, on which figures depend."""
    versions, git = provenance()["versions"], provenance()["git"]
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return {
        "cpu": model[1] if model else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "platform": platform.platform(),
        "python": versions["python"],
        "torch": torch.__version__,
        "dllm_var": versions["dllm-var"],
        "commit": None if git is None else git["commit"][:12] + ("+changes" if git["changed"] else ""),
    }
