"""How fast training is, and how much of that the machine could do."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric.utilities.throughput import get_available_flops

from dllm_var.errors import UserError

MEASURING_SECONDS = 0.2


@dataclass
class Window:
    """What happened on this process since speed was last reported, pauses left out."""

    seconds: float = 0.0
    data_seconds: float = 0.0
    steps: int = 0
    tokens: int = 0
    supervised_tokens: int | torch.Tensor = 0  # counts on the device stay there until the report
    samples: int | torch.Tensor = 0
    flops: float = 0.0  # of the matrices
    pairs: int | torch.Tensor = 0  # of tokens that attend


class SpeedMonitor(L.Callback):
    """Logs training speed every `trainer.log_every_n_steps` optimizer steps, over the steps since the last report.

    Time for validation, sampling and checkpoints is left out, and so is the first batch of a run (warm-up).
    Counts are summed over processes. Logs, and shows `tokens/s` on the progress bar:

    - `speed/tokens_per_second`, `speed/supervised_tokens_per_second`, `speed/samples_per_second`: of all devices.
    - `speed/step_seconds`: per optimizer step; `speed/data_wait_share`: share of it spent waiting for the next batch.
      On a GPU, which works on while the host waits, that is an upper limit of what faster data could save.
    - `speed/flops_per_second`: useful model FLOPs (forward and backward, nothing recomputed) per device.
    - `speed/mfu`: the same over the peak (model FLOPs utilisation, PaLM, arXiv 2204.02311, appendix B).
    - `speed/peak_memory_gib`: most memory allocated on the GPU so far; on CPU the most resident memory of process 0.

    FLOPs are those of the tokens that the layers read and of the pairs of tokens that attend: of documents, the sum of
    their lengths squared; of block diffusion, what its mask shows; half of the square where attention is causal.

    The module must fill `last_step_stats` in every training step (`tokens`, `read_tokens`, `attended_pairs`,
    `supervised_tokens`, `loss_tokens`, `samples`), and its `transformer` must have
    `flops_per_token(context_length, head_share)`.

    Args:
        peak_flops: Peak FLOP/s of one device: a number, `measure` (the fastest matrix product in a fifth of a second
            after the first batch), `datasheet` (known GPUs only), or null for no MFU.

    Raises:
        UserError: The number is not positive.
    """

    def __init__(self, peak_flops: float | Literal["measure", "datasheet"] | None = "measure") -> None:
        if isinstance(peak_flops, float | int) and peak_flops <= 0:
            raise UserError(f"peak_flops is {peak_flops}: give FLOP/s above 0, 'measure', 'datasheet' or null")
        self.peak_flops = peak_flops
        self._peak: float | None = None
        self._window = Window()
        self._restart()

    def _restart(self) -> None:
        self._step = 0
        self._mark = 0.0  # when the last interval ended
        self._paused = 0.0  # pauses of other callbacks up to then
        self._first = True  # no batch has been trained yet
        self._skip = False  # there was a pause of unknown length in the interval under way

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restart()
        self._step, self._window = trainer.global_step, Window()

    def _find_peak(self, trainer: L.Trainer) -> float | None:
        device, dtype = trainer.strategy.root_device, compute_dtype(str(trainer.precision))
        if self.peak_flops == "measure":
            return measure_peak_flops(device, dtype)
        if self.peak_flops == "datasheet":
            peak = get_available_flops(device, dtype)
            return None if peak is None else float(peak)
        return self.peak_flops

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        waited = self._interval(trainer)
        if waited is not None:
            self._window.seconds += waited
            self._window.data_seconds += waited

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped = trainer.global_step != self._step
        self._step = trainer.global_step
        report = stepped and self._step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        if report and pl_module.device.type == "cuda":
            torch.cuda.synchronize()  # within a window the host may run ahead; at its end all work must be done
        if self._first:  # its time does not count
            self._peak = self._find_peak(trainer)
        worked = self._interval(trainer)
        self._first = False
        if worked is not None:
            self._count(pl_module, worked, stepped)
        if report and self._window.steps:
            self._report(trainer, pl_module)
            self._window, self._mark = Window(), time.perf_counter()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._skip = True  # nothing tells where in the time up to the next batch the pause will end

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._skip = True

    def _interval(self, trainer: L.Trainer) -> float | None:
        """Seconds since the last call, less the `pause_seconds` of other callbacks; None where that is no use."""
        now = time.perf_counter()
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        paused = sum(getattr(callback, "pause_seconds", 0.0) for callback in callbacks)
        seconds = now - self._mark - (paused - self._paused)
        counts = not (self._first or self._skip)
        self._mark, self._paused, self._skip = now, paused, False
        return max(seconds, 0.0) if counts else None

    def _count(self, pl_module: L.LightningModule, seconds: float, stepped: bool) -> None:
        stats: Any = pl_module.last_step_stats
        transformer: Any = pl_module.transformer
        window, tokens = self._window, stats["tokens"]
        window.seconds += seconds
        window.steps += stepped
        window.tokens += tokens
        window.supervised_tokens = window.supervised_tokens + stats["supervised_tokens"]
        window.samples = window.samples + stats["samples"]
        # FLOPs per token are linear in the pairs per token: those of the pairs are added when the device has counted.
        read = stats["read_tokens"]
        window.flops += read * transformer.flops_per_token(0, stats["loss_tokens"] / max(read, 1))
        window.pairs = window.pairs + stats["attended_pairs"]

    def _report(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        window = self._window
        transformer: Any = pl_module.transformer
        per_pair = transformer.flops_per_token(1, 0.0) - transformer.flops_per_token(0, 0.0)
        flops_done = window.flops + per_pair * float(window.pairs)
        counts = [window.tokens, float(window.supervised_tokens), float(window.samples), flops_done]
        totals = sum_over_processes(trainer, counts)
        tokens, supervised_tokens, samples, flops = (total / window.seconds for total in totals)
        metrics = {
            "tokens_per_second": tokens,
            "supervised_tokens_per_second": supervised_tokens,
            "samples_per_second": samples,
            "step_seconds": window.seconds / window.steps,
            "data_wait_share": window.data_seconds / window.seconds,
            "flops_per_second": flops / trainer.world_size,
        }
        if self._peak:
            metrics["mfu"] = flops / trainer.world_size / self._peak
        memory = peak_memory(pl_module.device)
        if memory is not None:
            metrics["peak_memory_gib"] = memory / 2**30
        pl_module.log_dict({f"speed/{name}": value for name, value in metrics.items()})
        pl_module.log("tokens/s", tokens, prog_bar=True, logger=False)


def sum_over_processes(trainer: L.Trainer, counts: list[float]) -> list[float]:
    """Sum counts of data over processes; those that work on the same rows (tensor parallelism) count once."""
    if trainer.world_size == 1:
        return counts
    total = trainer.strategy.reduce(torch.tensor(counts, device=trainer.strategy.root_device), reduce_op="sum")
    shares = (trainer.distributed_sampler_kwargs or {}).get("num_replicas", trainer.world_size)
    return (total * shares / trainer.world_size).tolist()


def compute_dtype(precision: str) -> torch.dtype:
    """Type matrix products are computed in under a Lightning precision such as `bf16-mixed`."""
    if "bf16" in precision:
        return torch.bfloat16
    return {"16": torch.float16, "64": torch.float64}.get(precision[:2], torch.float32)


def measure_peak_flops(device: torch.device, dtype: torch.dtype, seconds: float = MEASURING_SECONDS) -> float:
    """FLOP/s of the fastest of several large matrix products, which is what training could at best reach.

    The factors are random: a GPU draws less power, and so runs faster, on matrices of equal numbers.

    Args:
        device: Where to measure.
        dtype: Type of the factors.
        seconds: How long to try, after one product to warm up.
    """
    size = 8192 if device.type == "cuda" else 1024
    generator = torch.Generator(device).manual_seed(0)
    factor = torch.randn(size, size, device=device, dtype=dtype, generator=generator)
    best, end = float("inf"), float("inf")
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        while time.perf_counter() < end:
            began = time.perf_counter()
            torch.mm(factor, factor)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            now = time.perf_counter()
            if end == float("inf"):
                end = now + seconds
            else:
                best = min(best, now - began)
    return 2 * size**3 / best


def peak_memory(device: torch.device) -> int | None:
    """Highest memory in use so far in bytes: allocated on the GPU, else resident; None where it cannot be told."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024  # Linux counts in KiB
