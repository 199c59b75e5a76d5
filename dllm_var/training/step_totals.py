"""What one optimizer step adds up to: all ranks, all accumulated batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from dllm_var.model.placement import copies, local_part
from dllm_var.objectives import NoisedBatch
from dllm_var.training.strategies import is_sharded, loss_scale_in, owns_gradients

LOSS_SCALE = 2.0**-12  # keeps the gradients of summed losses in the range of 16-bit floats


class RowLosses(NamedTuple):
    """Losses of the rows of one batch, on this rank: numbers of the rows, summed losses and loss tokens, each [B]."""

    rows: Tensor
    loss_sums: Tensor
    tokens: Tensor


@dataclass
class StepResult:
    """One optimizer step over all ranks and accumulated batches.

    Args:
        loss: Summed loss over the normaliser, in nats.
        masked_accuracy: Share of loss tokens whose best guess is right.
        gradient_norm: Norm of the normalised gradients before clipping; null where they are out of reach.
        row_losses: Of the batches of this rank, in order.
    """

    loss: float
    masked_accuracy: float
    gradient_norm: float | None
    row_losses: list[RowLosses] = field(default_factory=list)

    def rows(self) -> list[list[float]]:
        """Gathers `[row, loss per token, loss tokens]` of every row of the step; every rank must call it."""
        mine = [
            [int(row), loss / max(tokens, 1), int(tokens)]
            for batch in self.row_losses
            for row, loss, tokens in zip(*(column.tolist() for column in batch), strict=True)
        ]
        if not (dist.is_available() and dist.is_initialized()):
            return mine
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, mine)
        return list({row[0]: row for part in parts for row in part}.values())  # tensor parallelism: some have the same


class StepTotals:
    """Adds up the batches of one optimizer step; nothing here waits for the device before the step is due.

    Args:
        device: Of the model.
    """

    def __init__(self, device: torch.device) -> None:
        self.exact = torch.float32 if device.type == "mps" else torch.float64  # counts beyond 2^24 need 64 bits
        self.loss_sum = torch.zeros((), dtype=torch.float32, device=device)
        self.normaliser, self.correct, self.scored = (
            torch.zeros((), dtype=torch.long, device=device) for _ in range(3)
        )
        self.row_losses: list[RowLosses] = []

    def add(
        self,
        trainer: L.Trainer,
        rows: Tensor,
        noised: NoisedBatch,
        loss_sum: Tensor,
        token_loss: Tensor,
        correct: Tensor,
    ) -> Tensor:
        """Adds a batch; returns what backward starts from.

        Args:
            trainer: Knows how the step is split over ranks and batches.
            rows: Numbers of its rows [B].
            noised: What the model saw and had to predict.
            loss_sum: Its weighted loss, not normalised.
            token_loss: Loss of each loss token [M].
            correct: Whether its best guess is right [M].
        """
        self.normaliser += noised.normaliser
        self.loss_sum += loss_sum.detach()
        self.correct += correct.sum()
        self.scored += correct.numel()
        self.row_losses.append(row_losses(rows, noised, token_loss.detach()))
        if not owns_gradients(trainer.strategy):
            return loss_sum * LOSS_SCALE  # `finish` undoes it
        normaliser = trainer.strategy.reduce(noised.normaliser.clone(), reduce_op="sum")
        return loss_sum * (trainer.world_size / normaliser.clamp_min(1))  # the engine will average over ranks

    def finish(self, trainer: L.Trainer, optimizer: Optimizer) -> StepResult:
        """Divides the gradients by the loss tokens of all ranks and batches; waits for the device once, for figures.

        Lightning has averaged the gradients over ranks and divided by the accumulation; both are undone.

        Args:
            trainer: Knows how the step was split.
            optimizer: Its parameters have the gradients.
        """
        strategy, ranks = trainer.strategy, trainer.world_size
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients: dict[int, list[Tensor]] = {}  # by the number of processes that have the same
        for gradient in (p.grad for p in parameters if p.grad is not None and not owns_gradients(strategy)):
            held_by = copies(gradient) if is_sharded(strategy) else ranks
            gradients.setdefault(held_by, []).append(local_part(gradient))
        squares = torch.zeros((), dtype=self.exact, device=self.loss_sum.device)
        for held_by, parts_held in gradients.items():
            norms = torch.stack(torch._foreach_norm(parts_held, 2, torch.float32))
            squares += norms.to(self.exact).square().sum() / held_by
        parts = (self.loss_sum, self.normaliser, self.correct, self.scored, squares)
        sums = strategy.reduce(torch.stack([part.to(self.exact) for part in parts]), reduce_op="sum")
        loss_sum, normaliser, correct, scored, squares = sums
        factor = ranks * trainer.accumulate_grad_batches / LOSS_SCALE / normaliser.clamp_min(1)
        for parts_held in gradients.values():
            torch._foreach_mul_(parts_held, factor.float())
        norm = squares.sqrt() * factor / loss_scale_in(optimizer, trainer)
        figures = (loss_sum / normaliser.clamp_min(1), correct / scored.clamp_min(1), norm)
        loss, accuracy, gradient_norm = torch.stack(figures).tolist()
        return StepResult(loss, accuracy, gradient_norm if gradients else None, self.row_losses)


def row_losses(rows: Tensor, noised: NoisedBatch, token_loss: Tensor) -> RowLosses:
    """Sums the losses [M] of a batch's loss tokens by row."""
    if noised.weights is not None:
        token_loss = token_loss * noised.at_loss(noised.weights)
    tokens = noised.loss_mask.sum(dim=1)
    row_of = torch.arange(len(rows), device=rows.device).repeat_interleave(tokens, output_size=len(token_loss))
    sums = torch.zeros(len(rows), dtype=torch.float32, device=rows.device).index_add_(0, row_of, token_loss.float())
    return RowLosses(rows, sums, tokens)
