"""Objectives: they choose the masked tokens and the loss."""

from dllm_var.objectives.autoregressive import Autoregressive
from dllm_var.objectives.base import KeyedNoise, NoisedBatch, Objective
from dllm_var.objectives.block_diffusion import BlockDiffusion
from dllm_var.objectives.masking import EosSchedule, Mdlm
from dllm_var.objectives.multi_block import MultiBlockDiffusion
from dllm_var.objectives.strided import IntrospectiveStride

__all__ = [
    "Autoregressive",
    "BlockDiffusion",
    "EosSchedule",
    "IntrospectiveStride",
    "KeyedNoise",
    "Mdlm",
    "MultiBlockDiffusion",
    "NoisedBatch",
    "Objective",
]
