"""Adaptive block length: how wide the next block is, from how the last one went or from what is predicted for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_var.errors import UserError
from dllm_var.objectives.base import is_one_of
from dllm_var.sampling.policies.base import BlockView


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

    @property
    def tokens_per_step(self) -> float:
        """What a step of the last block gave, 0 before the first."""
        return self.last_length / max(self.last_steps, 1)


class BlockLengthPolicy(ABC):
    """Decides how wide each block is; the engine keeps it between 1 and the widest block allowed."""

    @abstractmethod
    def __call__(self, state: BlockStart) -> int:
        """Returns the width at which a row's next block opens."""

    def cut(self, view: BlockView) -> Tensor | None:
        """Returns the width of each block [R] once its first prediction is known; None when it stays as it is.

        Only rows at their block's first step follow it. Nothing is committed behind the cut: the next block is there.
        """
        return None


class ConstantSteps(BlockLengthPolicy):
    """Makes a block as wide as the last one's tokens per step would fill in a given number of steps.

    Where the text is easy blocks grow, and where it is hard no forward computes masks that would wait for long.

    Args:
        steps: Denoising steps that a block should take.
        min_length: Narrowest block.

    Raises:
        UserError: When either is below 1.
    """

    def __init__(self, steps: int = 4, min_length: int = 4) -> None:
        if steps < 1 or min_length < 1:
            raise UserError(f"ConstantSteps needs steps and min_length of at least 1, got {steps} and {min_length}")
        self.steps, self.min_length = steps, min_length

    def __call__(self, state: BlockStart) -> int:
        if not state.last_steps:
            return state.block_length
        return max(self.min_length, round(self.steps * state.tokens_per_step))


class DelimiterLength(BlockLengthPolicy):
    """Ends a block at the most confident delimiter of its first prediction (AdaBlock-dLLM 2509.26432, section 4).

    A block opens at the sampler's block length, which is the window searched. If the delimiter predicted with most
    confidence reaches the threshold, the block ends there; otherwise it gets its usual length.

    Args:
        delimiters: Token ids that end a semantic step, such as the newline's (the paper), or a comma's and a period's.
        threshold: Confidence that a delimiter must reach, in [0, 1]; the paper has 0.3.
        length: Usual length, without a delimiter; the sampler's block length when None.

    Raises:
        UserError: Without delimiters, for a threshold outside [0, 1] or a length below 1.
    """

    def __init__(self, delimiters: Sequence[int], threshold: float = 0.3, length: int | None = None) -> None:
        if not delimiters:
            raise UserError("DelimiterLength.delimiters is empty: name the token ids at which blocks end")
        if not 0 <= threshold <= 1 or (length is not None and length < 1):
            raise UserError(f"DelimiterLength needs threshold in [0, 1] and length >= 1, got {threshold} and {length}")
        self.delimiters, self.threshold, self.length = list(delimiters), threshold, length

    def __call__(self, state: BlockStart) -> int:
        return state.block_length

    def cut(self, view: BlockView) -> Tensor:
        found = is_one_of(view.predicted, tuple(self.delimiters)) & view.masked
        best = torch.where(found, view.confidence, -1.0).max(dim=1)
        usual = view.tokens.size(1) if self.length is None else self.length
        return torch.where(best.values >= self.threshold, best.indices + 1, usual)
