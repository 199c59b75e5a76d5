"""WINO: commit generously, and take back what a second look does not confirm (arXiv 2507.18578)."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from dllm_var.sampling.block_diffusion import BlockDiffusionSampler, BlockLengthPolicy, CopyEngine
from dllm_var.sampling.engine import Row
from dllm_var.sampling.policies.base import UnmaskingPolicy
from dllm_var.sampling.policies.remasking import RevokableThreshold


class WinoEngine(CopyEngine[Row]):
    """Blocks with shadows: masks at the same places, which see all but their own twin.

    A shadow's prediction for a committed position is what the model would put there without having been told. The
    block and what is left of it do not see the shadow. A block without a committed token has none.
    """

    def copies(self, row: Row, width: int) -> int:
        return int(row.left < width)

    def sees(self, copy: Tensor, positions: Tensor) -> Tensor:
        shadow = copy > 0
        by_shadow = shadow[:, None] | (positions[:, :, None] != positions[:, None])
        return torch.where(shadow[:, :, None], by_shadow, ~shadow[:, None])

    def places(self, places: Tensor, committed: Tensor, window: Tensor) -> Tensor:
        """Lets the policy see committed positions as their shadows predict them."""
        return places + window[:, None] * committed


@dataclass(eq=False)
class WinoSampler(BlockDiffusionSampler):
    """Block diffusion that revokes: wide in, narrow out (WINO, 2507.18578).

    Every forward after a block's first is two blocks wide: the block, and a shadow that tests what is committed.

    Args:
        threshold: Confidence above which a masked position is committed.
        shadow_threshold: Confidence below which a committed token is masked again.
    """

    engine = WinoEngine

    policy: UnmaskingPolicy | None = field(init=False, default=None)
    block_length_policy: BlockLengthPolicy | None = field(init=False, default=None)
    threshold: float = field(default=0.6, kw_only=True)
    shadow_threshold: float = field(default=0.9, kw_only=True)
    kv_commit: Literal["joint_next", "alone"] = field(default="joint_next", kw_only=True)

    def __post_init__(self) -> None:
        self.policy = RevokableThreshold(self.threshold, self.shadow_threshold)
        super().__post_init__()
