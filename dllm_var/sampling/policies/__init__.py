"""Unmasking policies: which positions of the block become tokens at each denoising step."""

from dllm_var.sampling.policies.base import BlockView, ConfidenceThreshold, Decision, State, UnmaskingPolicy, top_n
from dllm_var.sampling.policies.committing import (
    ONE_AT_A_TIME,
    CoherentCandidates,
    ConfidenceFactor,
    EntropyBounded,
    EntropyThreshold,
    FirstHitting,
    FixedSteps,
    Prophet,
    SchED,
    Sequential,
)
from dllm_var.sampling.policies.remasking import JointThreshold, RunningConfidenceRemasking, Saber

__all__ = [
    "ONE_AT_A_TIME",
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
