"""Adaptive block length: how wide the next block is, from how the last one went."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from dllm_var.sampling.base import Configurable


@dataclass(frozen=True)
class BlockStart:
    """A row at the place where its next block begins.

    Args:
        answer_length: Tokens of the answer so far.
        limit: Longest answer, in tokens.
        block_length: The widest block allowed.
        last_length: Width of the row's last block, 0 at its first one.
        last_steps: Denoising steps that one took.
    """

    answer_length: int
    limit: int
    block_length: int
    last_length: int = 0
    last_steps: int = 0


class BlockLengthPolicy(Configurable, ABC):
    """Decides how wide each block is; the engine keeps it between 1 and the widest block allowed."""

    @abstractmethod
    def __call__(self, state: BlockStart) -> int:
        """Returns the width at which a row's next block opens."""


@dataclass(eq=False)
class ConstantSteps(BlockLengthPolicy):
    """Makes a block as wide as the last one's tokens per step would fill in a given number of steps.

    Where the text is easy blocks grow, and where it is hard no forward computes masks that would wait for long.

    Args:
        steps: Denoising steps that a block should take.
        min_length: Narrowest block.
    """

    steps: int = 4
    min_length: int = 4

    def __post_init__(self) -> None:
        self.check_range(1, math.inf, "steps", "min_length")

    def __call__(self, state: BlockStart) -> int:
        if not state.last_steps:
            return state.block_length
        return max(self.min_length, round(self.steps * state.last_length / state.last_steps))
