"""Where the time of a training step goes."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from dllm_var.benchmarking.instruments import synchronise

PHASES = ("data", "forward", "head_and_loss", "backward", "optimizer")


@dataclass
class Step:
    """One optimizer step.

    Args:
        seconds: Time in each phase; they add up to the step.
        tokens: Tokens of samples in its batch, padding left out.
        positions: Positions in its batch, padding included.
        loss_tokens: Positions with a loss.
        pairs: Pairs of tokens, padding left out, of which one attends to the other.
    """

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    tokens: int = 0
    positions: int = 0
    loss_tokens: int = 0
    pairs: int = 0


class StepClock:
    """Cuts the time of training into phases without a gap: each mark ends one and begins the next.

    Each mark waits for the device, so that a phase is charged with its own work.

    Args:
        device: Where the model is.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.restart()

    def restart(self) -> None:
        """Forgets all steps; the time until the next one begins is charged to its data."""
        self.steps: list[Step] = []
        self._step = Step()
        self._last = time.perf_counter()

    def mark(self, phase: str) -> None:
        """Charges a phase with the time since the last mark."""
        synchronise(self.device)
        now = time.perf_counter()
        self._step.seconds[phase] += now - self._last
        self._last = now

    def count(self, tokens: int, positions: int, loss_tokens: int, pairs: int) -> None:
        """Notes what the step under way trains on; see `Step`."""
        step = self._step
        step.tokens, step.positions, step.loss_tokens, step.pairs = tokens, positions, loss_tokens, pairs

    def end_step(self) -> None:
        """Ends the last phase, `optimizer`, and with it the step."""
        self.mark("optimizer")
        self.steps.append(self._step)
        self._step = Step()
