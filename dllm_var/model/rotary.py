"""Rotary positions (RoFormer, arXiv 2104.09864), and how to slow them down to read beyond the trained length."""

import math

import torch
from torch import Tensor

from dllm_var.errors import UserError
from dllm_var.model.config import LLAMA3_KEYS, TransformerConfig


class RotaryTable:
    """Cosines and sines of every position, computed once per device and grown on demand."""

    def __init__(self, config: TransformerConfig) -> None:
        self.turned, self.llama3 = config.rotary_dim, config.rope_llama3
        self.theta = config.rope_theta * config.rope_scaling
        self.cos = self.sin = torch.empty(0)

    def __call__(self, position_ids: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Returns cos and signed sin, each [B, L, 1, rotary_dim], for `position_ids` [B, L], all below `length`."""
        self.reserve(length, position_ids.device)
        return self.cos[position_ids].unsqueeze(2), self.sin[position_ids].unsqueeze(2)

    def reserve(self, length: int, device: torch.device) -> None:
        """Makes sure that the angles of all positions below `length` are there."""
        if self.cos.size(0) < length or self.cos.device != device:
            self._grow(max(length, 2 * self.cos.size(0)), device)

    def _grow(self, length: int, device: torch.device) -> None:
        with torch.inference_mode(False):  # the table outlives the request that first needs it
            exponents = torch.arange(0, self.turned, 2, dtype=torch.float32, device=device) / self.turned
            periods = self.theta**exponents
            periods = periods if self.llama3 is None else llama3_periods(periods, self.llama3)
            angles = torch.arange(length, dtype=torch.float32, device=device)[:, None] / periods
            # Both halves of a head turn by the same angles (Llama's layout); the first half subtracts.
            self.cos = torch.cat((angles.cos(), angles.cos()), dim=-1)
            self.sin = torch.cat((-angles.sin(), angles.sin()), dim=-1)  # [length, rotary_dim]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, full_precision: bool) -> Tensor:
    """Turns heads [B, L, heads, head_dim] by the angles of a `RotaryTable`, in float32 at least if `full_precision`.

    Where the table is narrower than a head, only the first dimensions turn.
    """
    if (turned := cos.size(-1)) < x.size(-1):
        return torch.cat((rotate(x[..., :turned], cos, sin, full_precision), x[..., turned:]), dim=-1)
    exact = x.to(torch.promote_types(x.dtype, cos.dtype)) if full_precision else x
    swapped = exact.roll(x.size(-1) // 2, dims=-1)
    return torch.addcmul(exact * cos.to(exact.dtype), swapped, sin.to(exact.dtype)).to(x.dtype)


def llama3_periods(periods: Tensor, settings: dict[str, float]) -> Tensor:
    """Returns the periods of Llama 3.1's rotary embedding [head_dim / 2], of which only the long ones are stretched.

    A period is the number of tokens in which a pair of dimensions turns by one radian. In the trained length, a period
    that turns `high_freq_factor` times or more stays, one that turns less than `low_freq_factor` times becomes `factor`
    times as long, and between the two the frequencies are interpolated (Llama 3.1's published code).
    """
    factor, low, high, trained = (settings[key] for key in LLAMA3_KEYS)
    turns = trained / (2 * math.pi * periods)
    share = ((turns - low) / (high - low)).clamp(0, 1)  # 1 where the frequency stays
    return 1 / (share / periods + (1 - share) / (factor * periods))


def ntk_scaling(trained_length: int, target_length: int, head_dim: int, theta: float) -> int:
    """Returns the factor on `rope_theta` with which a model reads `target_length` tokens without more training.

    LongLLaDA (arXiv 2506.14429, section 4): the critical dimension is the number of a head's dimensions that turn
    through a whole period within the trained length (arXiv 2310.05209, section 3). The factor makes its period reach
    the target: `(target / 2 pi) ^ (head_dim / critical dimension) / theta`, rounded up; 4 and 14 for two and four times
    the 4,096 tokens of LLaDA. Raises UserError when the lengths allow no such factor.
    """
    if not 2 * math.pi < trained_length <= target_length or theta <= 1:
        raise UserError(
            "rope scaling needs a trained length of at least 7 tokens, a wanted length that is not below it, and "
            f"rope_theta above 1, got {trained_length}, {target_length} and {theta:g}"
        )
    critical_dimension = 2 * math.ceil(head_dim / 2 * math.log(trained_length / (2 * math.pi), theta))
    return max(1, math.ceil((target_length / (2 * math.pi)) ** (head_dim / critical_dimension) / theta))


def read_rope_scaling(setting: str, config: TransformerConfig) -> float:
    """Returns the factor that `--rope-scaling` means: `4`, or `4096:8192` for trained and wanted length."""
    trained, colon, target = setting.partition(":")
    try:
        if colon:
            return float(ntk_scaling(int(trained), int(target), config.rotary_dim, config.rope_theta))
        return float(trained)
    except ValueError as error:
        raise UserError(
            f"--rope-scaling {setting} is neither a factor (4) nor trained and wanted length (4096:8192)"
        ) from error
