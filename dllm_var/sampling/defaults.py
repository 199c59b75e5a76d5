"""The sampler of a model that names none."""

from dllm_var.model.config import TransformerConfig
from dllm_var.sampling.autoregressive import AutoregressiveSampler
from dllm_var.sampling.base import Sampler
from dllm_var.sampling.block_diffusion import BlockDiffusionSampler


def default_sampler(config: TransformerConfig) -> Sampler:
    """Returns a sampler that reads as a model does: left to right, in the blocks of its text, or in blocks of 64."""
    if config.causal:
        return AutoregressiveSampler()
    return BlockDiffusionSampler(block_length=config.grid) if config.grid else BlockDiffusionSampler()
