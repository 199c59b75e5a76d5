"""Initial weights, each keyed by the seed and its name, so that sharded and whole models start from the same ones."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor


@torch.no_grad()
def initialise(module: nn.Module, std: float, num_layers: int, seed: int) -> None:
    """Draws every weight anew, one at a time: normal with `std`, residual outputs scaled down by depth (GPT-2).

    Args:
        module: The transformer; parameters may be sharded.
        std: Standard deviation of matrices.
        num_layers: Number of layers, for the residual outputs.
        seed: Seed of all weights.
    """
    for name, parameter in module.named_parameters():
        values = torch.zeros(parameter.shape)
        if parameter.dim() >= 2:
            residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            values.normal_(std=std / math.sqrt(2 * num_layers) if residual else std, generator=generator)
        elif not name.endswith("bias"):
            values.fill_(1.0)
        parameter.copy_(placed_like(values, parameter))


def placed_like(values: Tensor, parameter: Tensor) -> Tensor:
    """Places values as the parameter is placed."""
    values = values.to(device=parameter.device, dtype=parameter.dtype)
    if not isinstance(parameter, DTensor):
        return values
    # Every rank has drawn the same values: no rank has to send them.
    return distribute_tensor(values, parameter.device_mesh, parameter.placements, src_data_rank=None)


def local_part(tensor: Tensor) -> Tensor:
    """Returns this process's part of a sharded tensor, which shares its memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


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
