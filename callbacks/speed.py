"""The speed of training, and its share of what the machine could do."""

import resource
import sys
import time
from collections import defaultdict
from typing import Any, Literal

import lightning as L
import torch
from torch.utils.benchmark import Timer

from dllm_var.errors import UserError


class SpeedMonitor(L.Callback):
    """Logs training speed every `trainer.log_every_n_steps` optimizer steps, over the steps since the last report.

    Time for validation, sampling and checkpoints is left out, and so is the first batch of a run (warm-up).
    Counts are summed over processes. Logs, and shows `tokens/s` on the progress bar:

    - `speed/tokens_per_second`, `speed/supervised_tokens_per_second`, `speed/samples_per_second`: of all devices.
    - `speed/step_seconds`: per optimizer step; `speed/data_wait_share`: share of it spent waiting for the next batch.
      On a GPU, which works on while the host waits, that is an upper limit of what faster data could save.
    - `speed/flops_per_second`: useful model FLOPs (forward and backward, nothing recomputed) per device.
    - `speed/mfu`: the same over the peak (model FLOPs utilisation, PaLM, arXiv 2204.02311, appendix B).
    - `speed/first_batch_seconds`: of the first batch of the run, compilation included.
    - `speed/peak_memory_gib`: most memory allocated on the GPU so far; on CPU the most resident memory of process 0.

    FLOPs are those of the tokens that the layers read and of the pairs of tokens that attend: of documents, the sum of
    their lengths squared; of block diffusion, what its mask shows; half of the square where attention is causal.

    The module must fill `last_step_stats` with `NoisedBatch.counts` in every training step.

    Args:
        peak_flops: Peak FLOP/s of one device: a number, `measure` (the fastest matrix product in a fifth of a second
            after the first batch), or None for no MFU.
    """

    def __init__(self, peak_flops: float | Literal["measure"] | None = "measure") -> None:
        if isinstance(peak_flops, float | int) and peak_flops <= 0:
            raise UserError(f"peak_flops is {peak_flops}: give FLOP/s above 0, 'measure' or null")
        self.peak_flops = peak_flops
        self._peak = peak_flops if isinstance(peak_flops, float | int) else None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Seconds and counts since the last report; counts on the device stay there.
        self._sums: defaultdict[str, Any] = defaultdict(float)
        self._step = trainer.global_step
        self._is_first = True  # no batch has been trained yet
        self._began, self._first_batch = time.perf_counter(), 0.0
        self._mark: float | None = None  # the time from which the next interval counts; None leaves that interval out

    def on_train_batch_start(self, *_: Any) -> None:
        self._sums["data_seconds"] += self._interval() or 0.0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        stepped, self._step = trainer.global_step != self._step, trainer.global_step
        report = stepped and self._step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        if report and pl_module.device.type == "cuda":
            torch.cuda.synchronize()  # within a window the host may run ahead; at its end all work must be done
        if self._is_first:
            self._is_first = False
            self._first_batch = time.perf_counter() - self._began
            if self.peak_flops == "measure":
                self._peak = measure_peak_flops(trainer.strategy.root_device, compute_dtype(str(trainer.precision)))
            self._mark = time.perf_counter()
            return
        if self._interval() is not None:
            counts: Any = pl_module.last_step_stats
            for name, count in {"steps": stepped, **counts}.items():
                self._sums[name] = self._sums[name] + count
        if report and self._sums["steps"]:
            self._report(trainer, pl_module)
            self._sums, self._mark = defaultdict(float), time.perf_counter()

    def on_validation_start(self, *_: Any) -> None:
        self._mark = None  # nothing tells where in the time up to the next batch the pause will end

    def on_save_checkpoint(self, *_: Any) -> None:
        self._mark = None

    def leave_out(self, seconds: float) -> None:
        """Does not count seconds that another callback has just taken."""
        if self._mark is not None:
            self._mark += seconds

    def _interval(self) -> float | None:
        """Adds up and returns the seconds since the last call; None for an interval that is left out."""
        now = time.perf_counter()
        seconds = None if self._mark is None else now - self._mark
        self._sums["seconds"] += seconds or 0.0
        self._mark = now
        return seconds

    def _report(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        seconds, transformer = self._sums["seconds"], pl_module.transformer
        names = ("tokens", "supervised_tokens", "samples", "read_tokens", "attended_pairs", "loss_tokens")
        counts = [float(self._sums[name]) for name in names]
        tokens, supervised_tokens, samples, read, pairs, scored = sum_over_processes(trainer, counts)
        flops = read * transformer.flops_per_token(pairs / read, scored / read)  # type: ignore[operator, union-attr]
        flops_per_second = flops / seconds / trainer.world_size
        figures = {
            "tokens_per_second": tokens / seconds,
            "supervised_tokens_per_second": supervised_tokens / seconds,
            "samples_per_second": samples / seconds,
            "step_seconds": seconds / self._sums["steps"],
            "data_wait_share": self._sums["data_seconds"] / seconds,
            "flops_per_second": flops_per_second,
            "first_batch_seconds": self._first_batch,
            "peak_memory_gib": peak_memory(pl_module.device) / 2**30,
        }
        if self._peak:
            figures["mfu"] = flops_per_second / self._peak
        pl_module.log_dict({f"speed/{name}": value for name, value in figures.items()})
        pl_module.log("tokens/s", figures["tokens_per_second"], prog_bar=True, logger=False)


def sum_over_processes(trainer: L.Trainer, counts: list[float]) -> list[float]:
    """Sums counts of data over processes; those that work on the same rows (tensor parallelism) count once."""
    if trainer.world_size == 1:
        return counts
    total = trainer.strategy.reduce(torch.tensor(counts, device=trainer.strategy.root_device), reduce_op="sum")
    readers = (trainer.distributed_sampler_kwargs or {}).get("num_replicas", trainer.world_size)
    return (total * readers / trainer.world_size).tolist()


def compute_dtype(precision: str) -> torch.dtype:
    """Returns the type matrix products are computed in under a Lightning precision such as `bf16-mixed`."""
    if "bf16" in precision:
        return torch.bfloat16
    return {"16": torch.float16, "64": torch.float64}.get(precision[:2], torch.float32)


def measure_peak_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """Returns the FLOP/s of the fastest of several large matrix products, which is what training could at best reach.

    The factors are random: a GPU draws less power, and so runs faster, on matrices of equal numbers.
    """
    size = 8192 if device.type == "cuda" else 1024
    generator = torch.Generator(device).manual_seed(0)
    factor = torch.randn(size, size, device=device, dtype=dtype, generator=generator)
    product = Timer("factor @ factor", globals={"factor": factor}, num_threads=torch.get_num_threads())
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        return 2 * size**3 / min(product.blocked_autorange(min_run_time=seconds).times)


def peak_memory(device: torch.device) -> int:
    """Returns the most memory in use so far in bytes: allocated on the GPU, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024  # Linux counts in KiB
