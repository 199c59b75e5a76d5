"""What whoever takes part in a training benchmark has in common, and what must be the same for all."""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import nn

from dllm_var.benchmarking.training_clock import Step, StepClock
from dllm_var.benchmarking.training_settings import TrainingCase

LEARNING_RATE, BETAS, WEIGHT_DECAY, CLIP = 1e-4, (0.9, 0.95), 0.1, 1.0  # the same for all


class Contender(ABC):
    """Something that trains a case's model on its samples; kept over the rounds, optimizer state is not.

    Args:
        case: What to train.
        device: Where.
        cache: Folder for tokenized data.
    """

    def __init__(self, case: TrainingCase, device: torch.device, cache: Path) -> None:
        self.case, self.device, self.cache = case, device, cache
        self.clock = StepClock(device)
        self.mixed = device.type == "cuda"  # bf16-mixed there, float32 on the CPU

    @abstractmethod
    def train(self, steps: int) -> None:
        """Trains for that many optimizer steps, from the data's first row, with a new optimizer; marks the clock."""

    def run(self, steps: int) -> list[Step]:
        """Trains for one step to warm up and then for `steps`, which it returns."""
        self.clock.restart()
        self.train(steps + 1)
        gc.collect()
        return self.clock.steps[1:]

    @property
    @abstractmethod
    def model(self) -> nn.Module:
        """The model that is trained."""
