"""Samplers: from prompts to answers that end themselves."""

from dllm_var.sampling.autoregressive import AutoregressiveSampler
from dllm_var.sampling.base import Generation, Request, Sampler
from dllm_var.sampling.block_diffusion import BlockDiffusionSampler, BlockLengthPolicy, BlockStart, ConstantSteps
from dllm_var.sampling.diffuspec import DiffuSpecSampler
from dllm_var.sampling.fixed_length import FixedLengthSampler
from dllm_var.sampling.freedave import FreeDaveSampler
from dllm_var.sampling.guided import GuidedSampler
from dllm_var.sampling.multi_block import MultiBlockSampler
from dllm_var.sampling.policies import BlockView, ConfidenceThreshold, Decision, FixedSteps, UnmaskingPolicy
from dllm_var.sampling.strided import StridedSampler
from dllm_var.sampling.sub_blocks import SubBlockSampler
from dllm_var.sampling.wino import WinoSampler

__all__ = [
    "AutoregressiveSampler",
    "BlockDiffusionSampler",
    "BlockLengthPolicy",
    "BlockStart",
    "BlockView",
    "ConfidenceThreshold",
    "ConstantSteps",
    "Decision",
    "DiffuSpecSampler",
    "FixedLengthSampler",
    "FixedSteps",
    "FreeDaveSampler",
    "Generation",
    "GuidedSampler",
    "MultiBlockSampler",
    "Request",
    "Sampler",
    "StridedSampler",
    "SubBlockSampler",
    "UnmaskingPolicy",
    "WinoSampler",
]
