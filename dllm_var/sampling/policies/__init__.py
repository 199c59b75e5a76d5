"""Unmasking policies: which positions of the block become tokens at each denoising step."""

from dllm_var.sampling.policies.base import BlockView, Decision, State, UnmaskingPolicy, top_n
from dllm_var.sampling.policies.confidence_threshold import ConfidenceThreshold
from dllm_var.sampling.policies.fixed_steps import FixedSteps

__all__ = ["BlockView", "ConfidenceThreshold", "Decision", "FixedSteps", "State", "UnmaskingPolicy", "top_n"]
