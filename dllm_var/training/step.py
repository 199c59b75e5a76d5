"""One optimizer step: sums the losses of its batches, divides and clips its gradients, and guards the update."""

import math
from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer

from dllm_var.errors import UserError
from dllm_var.model.sharding import copies, local_part
from dllm_var.objectives.base import NoisedBatch
from dllm_var.objectives.cross_entropy import Scores
from dllm_var.training.strategies import owns_gradients, shards_parameters

LOSS_SCALE = 2.0**-12  # keeps the gradients of summed losses in the range of 16-bit floats
LEAST_HISTORY = 20  # losses before a median says anything


class TooManySkipped(UserError):
    """Training stops because too many updates were skipped; every process raises it between the same two steps."""


@dataclass
class LossGuard:
    """Limits beyond which a step is reported or training stops.

    With torch's fused AdamW, the default, a GPU skips a harmful update by itself. The reports then come every
    `trainer.log_every_n_steps`, when the figures of the steps are read.

    Args:
        max_skipped: Training stops when it has skipped this many updates since its first step.
        spike_factor: A loss of this many times the running median is reported, and trained on; None reports none.
        spike_window: Number of steps of the median.
    """

    max_skipped: int = 20
    spike_factor: float | None = 3.0
    spike_window: int = 100

    def __post_init__(self) -> None:
        factor = math.inf if self.spike_factor is None else self.spike_factor
        if self.max_skipped < 1 or not factor > 1 or self.spike_window < LEAST_HISTORY:
            raise UserError(
                f"model.loss_guard needs max_skipped >= 1, spike_factor > 1 and spike_window >= {LEAST_HISTORY}, got "
                f"{self.max_skipped}, {self.spike_factor} and {self.spike_window}"
            )


@dataclass
class StepResult:
    """Figures of one optimizer step, over all ranks and accumulated batches."""

    loss: float  # summed loss over the normaliser, in nats
    masked_accuracy: float  # share of loss tokens whose most likely token is the right one
    gradient_norm: float | None  # of the divided gradients before clipping; None where DeepSpeed keeps them to itself
    batches: list[tuple[Tensor, Tensor, Tensor]]  # this rank's row numbers [B], loss mask [B, L], token losses [M]
    step: int  # its number, from 1 on
    skipped: bool = False  # whether the update is skipped

    def rows(self) -> list[tuple[int, float, int]]:
        """Gathers (row, loss per token, loss tokens) of every row of the step; every rank must call it."""
        mine = {}
        for rows, loss_mask, token_loss in self.batches:
            counted, first = loss_mask.sum(dim=1).tolist(), loss_mask.int().argmax(dim=1).tolist()
            for row, place, losses in zip(rows.tolist(), first, token_loss.split(counted), strict=True):
                mine[row, place, len(losses)] = float(losses.sum())
        parts: list[Any] = [mine]
        if dist.is_available() and dist.is_initialized():
            parts *= dist.get_world_size()
            dist.all_gather_object(parts, mine)
        sums: dict[int, tuple[float, int]] = {}
        # Under tensor parallelism, ranks have the same tokens of a row; under context parallelism, different ones.
        for (row, _, count), loss in {key: loss for part in parts for key, loss in part.items()}.items():
            loss_sum, tokens = sums.get(row, (0.0, 0))
            sums[row] = loss_sum + loss, tokens + count
        return [(row, loss_sum / max(tokens, 1), tokens) for row, (loss_sum, tokens) in sums.items()]


class OptimizerStep:
    """Makes one update of several batches, the same however its rows are split over ranks and accumulated batches.

    An update whose loss or gradient is not finite is skipped on every rank; an overflow that 16-bit training expects,
    while its loss scale comes down, is left to the scaler. `add` only sums. `finish` leaves the figures of a step on
    the device, where a fused optimizer looks whether it shall skip; they are read together when they are logged. Other
    optimizers must be told by the host, which then waits for the device in each step.
    """

    def __init__(self, guard: LossGuard) -> None:
        self.guard, self.skipped = guard, 0
        self.last: StepResult | None = None  # of the steps that have been read
        self._unread: list[tuple[Tensor, StepResult]] = []  # loss, accuracy and norm [3], and where they will stand
        self._losses: deque[float] = deque(maxlen=guard.spike_window)
        self._sums: list[Tensor] = []  # summed loss, normaliser, right predictions, loss tokens
        self._batches: list[tuple[Tensor, Tensor, Tensor]] = []

    def begin(self, trainer: L.Trainer) -> None:
        """Forgets the batches of a run that was broken off; raises UserError where DeepSpeed would accumulate them."""
        self._sums, self._batches, self._unread = [], [], []
        if owns_gradients(trainer.strategy) and trainer.accumulate_grad_batches > 1:
            raise UserError(
                "trainer.accumulate_grad_batches must be 1 with DeepSpeed, which cannot weigh batches by their loss "
                "tokens: raise data.batch_size, or use configs/strategy/fsdp2.yaml"
            )

    def add(self, trainer: L.Trainer, rows: Tensor, noised: NoisedBatch, scores: Scores) -> Tensor:
        """Adds a batch's sums, with the numbers `rows` [B] of its rows; returns the scaled loss for `backward()`."""
        loss_sum, token_loss, correct = scores
        scored = torch.full_like(noised.normaliser, correct.numel())
        sums = [loss_sum.detach(), noised.normaliser, correct.sum(), scored]
        self._sums = [a + b for a, b in zip(self._sums, sums, strict=True)] if self._sums else sums
        self._batches.append((rows, noised.loss_mask, noised.weighted(token_loss).detach().float()))
        if not owns_gradients(trainer.strategy):
            return loss_sum * LOSS_SCALE  # `_divide` undoes it
        normaliser = trainer.strategy.reduce(noised.normaliser.clone(), reduce_op="sum")
        return loss_sum * (trainer.world_size / normaliser.clamp_min(1))  # DeepSpeed will average over ranks

    def finish(self, trainer: L.Trainer, optimizer: Optimizer) -> None:
        """Divides and clips the gradients just before the optimizer's step, or makes that step do nothing."""
        gradients: dict[int, list[Tensor]] = {}  # this process's parts, by the number of processes that hold the same
        if not owns_gradients(trainer.strategy):
            for gradient in _gradients(optimizer):
                held_by = copies(gradient) if shards_parameters(trainer.strategy) else trainer.world_size
                gradients.setdefault(held_by, []).append(local_part(gradient))
        parts = [part for parts in gradients.values() for part in parts]
        limit = trainer.gradient_clip_val if trainer.gradient_clip_algorithm != "value" else None
        by_norm = bool(limit and parts) and not isinstance(trainer.strategy.model, FullyShardedDataParallel)
        figures = self._divide(gradients, limit if by_norm else None, trainer, optimizer)
        result = StepResult(math.nan, math.nan, None, self._batches, trainer.global_step + 1)
        self._unread.append((figures if parts else figures[:2], result))
        self._batches = []
        if _skips_by_itself(optimizer, trainer):
            optimizer.found_inf = (~figures.isfinite().all()).float()  # type: ignore[attr-defined]  # as GradScaler does
        else:
            self.read(trainer)
            if result.skipped:
                _skip_update(optimizer, trainer)
                return
        if not by_norm:
            _clip(limit, trainer, optimizer)

    def _divide(
        self, gradients: dict[int, list[Tensor]], limit: float | None, trainer: L.Trainer, optimizer: Optimizer
    ) -> Tensor:
        """Divides the gradients by the loss tokens of all ranks and batches, and clips their norm to `limit`.

        Lightning has averaged the gradients over ranks and divided them by the accumulation; both are undone. Returns
        loss, accuracy and gradient norm before clipping [3], on the device.
        """
        device = self._sums[0].device
        exact = torch.float32 if device.type == "mps" else torch.float64  # counts beyond 2^24 need 64 bits
        squares = torch.zeros((), dtype=exact, device=device)
        for held_by, parts in gradients.items():
            norms = torch.stack(torch._foreach_norm(parts, 2, torch.float32))
            squares += norms.to(exact).square().sum() / held_by
        sums = torch.stack([part.to(exact) for part in (*self._sums, squares)])
        self._sums = []
        loss_sum, normaliser, correct, scored, squares = trainer.strategy.reduce(sums, reduce_op="sum")
        factor = trainer.world_size * trainer.accumulate_grad_batches / LOSS_SCALE / normaliser.clamp_min(1)
        scaler = _scaler_in_step(optimizer, trainer)
        norm = squares.sqrt() * factor / (1.0 if scaler is None else scaler.scale(torch.ones((), device=device)))
        if limit is not None:
            factor = factor * (limit / (norm + 1e-6)).clamp_max(1)
        for parts in gradients.values():
            torch._foreach_mul_(parts, factor.float())
        return torch.stack((loss_sum / normaliser.clamp_min(1), correct / scored.clamp_min(1), norm))

    def read(self, trainer: L.Trainer) -> None:
        """Reads the figures of all steps since it was last called, for which it waits once; every rank must call it."""
        if not self._unread:
            return
        figures = torch.stack([figures for figures, _ in self._unread]).tolist()
        for (loss, accuracy, *norm), (_, result) in zip(figures, self._unread, strict=True):
            result.loss, result.masked_accuracy, result.gradient_norm = loss, accuracy, norm[0] if norm else None
            result.skipped = self._must_skip(result, trainer)
            self.last = result
        self._unread = []

    def _must_skip(self, result: StepResult, trainer: L.Trainer) -> bool:
        """Decides, the same on every rank, whether the update would do harm; says so, and when the loss jumps."""
        usual = median(self._losses) if len(self._losses) >= LEAST_HISTORY else math.inf
        loss, norm = result.loss, result.gradient_norm
        wrong = "loss" if not math.isfinite(loss) else "gradient" if norm and not math.isfinite(norm) else None
        if wrong != "loss":
            self._losses.append(loss)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if wrong == "gradient" and scaler is not None and scaler.get_scale() > 1:
            return False  # the scaler skips the update itself, and lowers its scale
        if wrong is not None:
            self.skipped += 1
            message = f"the {wrong} is not finite, update skipped ({self.skipped} of {self.guard.max_skipped})"
        elif loss > (self.guard.spike_factor or math.inf) * usual:
            message = f"loss {loss:.4g}, the median is {usual:.4g}"
        else:
            return False
        rows = sorted(result.rows(), key=lambda row: -row[1] if math.isfinite(row[1]) else -math.inf)
        worst = ", ".join(f"row {row} {row_loss:.4g}" for row, row_loss, _ in rows[:3])
        rank_zero_info(f"step {result.step}: {message}; highest losses per token: {worst}")
        return wrong is not None

    def check_skipped(self) -> None:
        """Raises TooManySkipped once as many updates were skipped as `max_skipped` allows."""
        if self.skipped >= self.guard.max_skipped:
            raise TooManySkipped(
                f"{self.skipped} updates skipped because loss or gradients were not finite: lower the learning rate, "
                "mend the rows named above, or raise model.loss_guard.max_skipped"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "losses": list(self._losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped = state["skipped"]
        self._losses = deque(state["losses"], maxlen=self.guard.spike_window)


def _gradients(optimizer: Optimizer) -> list[Tensor]:
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def _is_fused(optimizer: Optimizer) -> bool:
    """Whether an optimizer is a fused one of torch, which looks at `grad_scale` and `found_inf` in its step."""
    kinds = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)
    return isinstance(optimizer, kinds) and bool(optimizer.defaults.get("fused"))


def _skips_by_itself(optimizer: Optimizer, trainer: L.Trainer) -> bool:
    """Whether an optimizer skips its step when its `found_inf` on the device says so."""
    by_scaler = getattr(trainer.precision_plugin, "scaler", None) is not None
    elsewhere = owns_gradients(trainer.strategy) or shards_parameters(trainer.strategy)
    return _is_fused(optimizer) and not by_scaler and not elsewhere


def _scaler_in_step(optimizer: Optimizer, trainer: L.Trainer) -> Any:
    """Returns the loss scaler of 16-bit training if the optimizer, a fused one of torch, divides by its scale itself.

    The gradients then still have the scale just before the optimizer's step.
    """
    return getattr(trainer.precision_plugin, "scaler", None) if _is_fused(optimizer) else None


def _clip(limit: float | None, trainer: L.Trainer, optimizer: Optimizer) -> None:
    """Clips what `finish` has not clipped by its norm: FSDP1's gradients, and by value as Lightning does."""
    wrapped = trainer.strategy.model
    if limit and isinstance(wrapped, FullyShardedDataParallel):
        wrapped.clip_grad_norm_(limit)  # Lightning refuses to
    else:
        trainer.lightning_module.clip_gradients(optimizer, trainer.gradient_clip_val, trainer.gradient_clip_algorithm)


def _skip_update(optimizer: Optimizer, trainer: L.Trainer) -> None:
    """Makes the optimizer's coming step do nothing, not even decay weights."""
    if owns_gradients(trainer.strategy):
        raise UserError(
            f"the loss is not finite at step {trainer.global_step + 1}, and DeepSpeed cannot skip an update: go "
            "on from the newest checkpoint with a lower learning rate, or with configs/strategy/fsdp2.yaml"
        )
    if _scaler_in_step(optimizer, trainer) is None:
        optimizer.zero_grad()  # torch's optimizers pass over parameters without a gradient
    else:
        for gradient in _gradients(optimizer):  # the scaler looks for such numbers in the step, and must find some
            local_part(gradient).fill_(float("nan"))
