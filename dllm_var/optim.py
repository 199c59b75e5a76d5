"""Learning-rate schedules and parameter groups."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from dllm_var.errors import UserError


@dataclass
class Schedule:
    """Learning rate over the run, as a share of the optimizer's own.

    Args:
        kind: Shape after the warm-up: `cosine` or `linear` down to `final`, `constant`, or `wsd` (constant, then linear
            down over the last `decay_share` of the steps).
        warmup_steps: Steps of linear warm-up.
        final: Share of the learning rate at the last step.
        decay_share: Share of the steps in which `wsd` decays.
    """

    kind: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup_steps: int = 50
    final: float = 0.0
    decay_share: float = 0.2

    def __post_init__(self) -> None:
        if self.warmup_steps < 0 or not 0 <= self.final <= 1 or not 0 < self.decay_share <= 1:
            raise UserError(
                "model.schedule needs warmup_steps >= 0, final in [0, 1] and decay_share in (0, 1], got "
                f"{self.warmup_steps}, {self.final}, {self.decay_share}"
            )

    def share(self, step: int, total_steps: int) -> float:
        """Returns the share of the learning rate that step number `step` (from 0) of `total_steps` uses."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        progress = min(1.0, (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps))
        if self.kind == "constant":
            return 1.0
        if self.kind == "wsd":
            return self.final + (1 - self.final) * min(1.0, (1 - progress) / self.decay_share)
        fall = progress if self.kind == "linear" else (1 - math.cos(math.pi * progress)) / 2
        return 1 - (1 - self.final) * fall

    def scheduler(self, optimizer: Optimizer, total_steps: int) -> LambdaLR:
        """Returns the scheduler, to be stepped after every optimizer step."""
        return LambdaLR(optimizer, lambda step: self.share(step, total_steps))


def parameter_groups(module: nn.Module) -> list[dict[str, object]]:
    """Returns two groups: weight matrices, which decay, and norms, biases and embeddings, which do not."""
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    trained = [p for p in module.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() >= 2 and id(p) not in embeddings]
    rest: Iterable[nn.Parameter] = [p for p in trained if p.dim() < 2 or id(p) in embeddings]
    return [{"params": matrices}, {"params": list(rest), "weight_decay": 0.0}]
