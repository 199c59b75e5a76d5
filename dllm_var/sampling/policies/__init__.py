"""Unmasking policies: which positions of the block become tokens at each denoising step."""

from dllm_var.sampling.policies.base import BlockView, ConfidenceThreshold, Decision, State, UnmaskingPolicy, top_n
from dllm_var.sampling.policies.confidence import (
    CoherentCandidates,
    ConfidenceFactor,
    EntropyBounded,
    EntropyThreshold,
)
from dllm_var.sampling.policies.remasking import (
    JointThreshold,
    RunningConfidenceRemasking,
    Saber,
)
from dllm_var.sampling.policies.scheduled import FirstHitting, FixedSteps, Prophet, SchED, Sequential

__all__ = [
    "BlockView",
    "CoherentCandidates",
    "ConfidenceFactor",
    "ConfidenceThreshold",
    "Decision",
    "EntropyBounded",
    "EntropyThreshold",
    "FirstHitting",
    "FixedSteps",
    "JointThreshold",
    "Prophet",
    "RunningConfidenceRemasking",
    "Saber",
    "SchED",
    "Sequential",
    "State",
    "UnmaskingPolicy",
    "top_n",
]
