"""How much to slow the rotary positions down so that a model reads beyond the length it was trained on."""

from __future__ import annotations

import math

from dllm_var.errors import UserError
from dllm_var.model.config import TransformerConfig


def critical_dimension(trained_length: int, head_dim: int, theta: float) -> int:
    """Returns how many of a head's dimensions turn through a whole period within the trained length, in tokens.

    The others have only seen a part of theirs, which is why they fail beyond it (arXiv 2310.05209, section 3; used by
    LongLLaDA, arXiv 2506.14429, section 4). `theta` is the base of the rotary frequencies.

    Raises:
        UserError: When the length is within the first period, so that no dimension has turned, or `theta` is not
            above 1.
    """
    if trained_length <= 2 * math.pi or theta <= 1:
        raise UserError(
            f"rope scaling needs a trained length of at least 7 tokens and rope_theta above 1, got {trained_length} "
            f"and {theta:g}"
        )
    return 2 * math.ceil(head_dim / 2 * math.log(trained_length / (2 * math.pi), theta))


def ntk_scaling(trained_length: int, target_length: int, head_dim: int, theta: float) -> int:
    """Returns the factor on `theta` with which the critical dimension's period reaches the target length, in tokens.

    LongLLaDA (arXiv 2506.14429, section 4): `(target / 2 pi) ^ (head_dim / critical dimension) / theta`, rounded up:
    4 and 14 for two and four times the 4,096 tokens of LLaDA.

    Raises:
        UserError: When the target is below the trained length, or that is too short.
    """
    if target_length < trained_length:
        raise UserError(f"rope scaling reads longer contexts: {target_length} is below the trained {trained_length}")
    dimension = critical_dimension(trained_length, head_dim, theta)
    return max(1, math.ceil((target_length / (2 * math.pi)) ** (head_dim / dimension) / theta))


def read_rope_scaling(setting: str, config: TransformerConfig) -> float:
    """Returns the factor that a setting means for a model: `4`, or `4096:8192` for trained and wanted length.

    Raises:
        UserError: When it is neither.
    """
    trained, colon, target = setting.partition(":")
    assert config.head_dim is not None
    try:
        if colon:
            return float(ntk_scaling(int(trained), int(target), config.head_dim, config.rope_theta))
        return float(trained)
    except ValueError as error:
        raise UserError(
            f"--rope-scaling {setting} is neither a factor (4) nor trained and wanted length (4096:8192)"
        ) from error
