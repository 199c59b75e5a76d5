"""Objectives: they choose the masked tokens and the loss."""

from dllm_var.objectives.autoregressive import Autoregressive
from dllm_var.objectives.base import KeyedNoise, NoisedBatch, Objective
from dllm_var.objectives.block_diffusion import BlockDiffusion
from dllm_var.objectives.masking import EosSchedule, Mdlm

__all__ = ["Autoregressive", "BlockDiffusion", "EosSchedule", "KeyedNoise", "Mdlm", "NoisedBatch", "Objective"]
