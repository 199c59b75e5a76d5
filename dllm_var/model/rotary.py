"""Rotary positions (RoFormer, arXiv 2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_var.model.rope_scaling import llama3_periods


class RotaryTable:
    """Cosines and sines of every position, computed once per device and grown on demand (RoFormer, 2104.09864)."""

    def __init__(self, head_dim: int, theta: float, llama3: dict[str, float] | None = None) -> None:
        self.head_dim, self.theta, self.llama3 = head_dim, theta, llama3
        self.cos = self.sin = torch.empty(0)

    def __call__(self, position_ids: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Returns cos and signed sin, each [B, L, 1, head_dim], for `position_ids` [B, L], all below `length`."""
        if self.cos.size(0) < length or self.cos.device != position_ids.device:
            self._grow(max(length, 2 * self.cos.size(0)), position_ids.device)
        return self.cos[position_ids].unsqueeze(2), self.sin[position_ids].unsqueeze(2)

    def _grow(self, length: int, device: torch.device) -> None:
        with torch.inference_mode(False):  # the table outlives the request that first needs it
            exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=device) / self.head_dim
            periods = self.theta**exponents
            periods = periods if self.llama3 is None else llama3_periods(periods, self.llama3)
            angles = torch.arange(length, dtype=torch.float32, device=device)[:, None] / periods
            # Both halves of a head turn by the same angles (Llama's layout); the first half subtracts.
            self.cos = torch.cat((angles.cos(), angles.cos()), dim=-1)
            self.sin = torch.cat((-angles.sin(), angles.sin()), dim=-1)  # [length, head_dim]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, full_precision: bool = False) -> Tensor:
    """Turns each head by its position's angle and returns it in its own type.

    Args:
        x: Heads [B, L, heads, head_dim].
        cos: Of the angles [B, L, 1, head_dim], float32.
        sin: Of the angles, with the rotation's signs.
        full_precision: Computes in float32 at least, in place of the type of `x`.
    """
    exact = x.to(torch.promote_types(x.dtype, cos.dtype)) if full_precision else x
    swapped = exact.roll(x.size(-1) // 2, dims=-1)
    return torch.addcmul(exact * cos.to(exact.dtype), swapped, sin.to(exact.dtype)).to(x.dtype)
