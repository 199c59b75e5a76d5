"""Initial weights, each keyed by the seed and its name, so that sharded and whole models start from the same ones.

All are drawn on the CPU: a seed then gives the same weights on every device and under every default device.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from dllm_var.model.config import TransformerConfig
from dllm_var.model.placement import fill, sections


@torch.no_grad()
def initialise(module: nn.Module, config: TransformerConfig, seed: int) -> None:
    """Draws every weight anew, one at a time: normal, residual outputs scaled down by depth (GPT-2).

    Args:
        module: The transformer; parameters may be sharded.
        config: Its shape, with the standard deviation of matrices.
        seed: Seed of all weights.
    """
    for name, parameter in module.named_parameters():
        values = torch.zeros(parameter.shape, device="cpu")
        if parameter.dim() >= 2:
            residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
            std = config.initializer_range / (math.sqrt(2 * config.num_layers) if residual else 1)
            values.normal_(std=std, generator=named_generator(seed, name))
        elif not name.endswith("bias"):
            values.fill_(1.0)
        fill(parameter, values, sections(name, config))


def named_generator(seed: int, name: str) -> torch.Generator:
    """Returns the CPU generator that a weight's initial values come from; the seed and the weight's name decide it."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def shard(transformer: nn.Module, mesh: DeviceMesh) -> None:
    """Shards each block, and the rest with the root, over a mesh (FSDP2, torch's fully_shard).

    Args:
        transformer: The transformer, on the meta device or a real one.
        mesh: One-dimensional mesh of the data-parallel processes.
    """
    for part in (*transformer.blocks, transformer):  # type: ignore[misc]
        fully_shard(part, mesh=mesh)
    register_fsdp_forward_method(transformer, "hidden_states")
    # The head is used after hidden_states, and a block is soon gathered again: keep what has been gathered.
    transformer.set_reshard_after_forward(False, recurse=False)  # type: ignore[operator]
