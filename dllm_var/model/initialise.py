"""Initial weights, each keyed by the seed and its name, so that sharded and whole models start from the same ones.

All are drawn on the CPU: a seed then gives the same weights on every device and under every default device.
"""

import hashlib
import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from dllm_var.model.config import TransformerConfig

# Weights by the names that their draws are keyed by: those of one name are drawn as one matrix, one above the other.
DRAWN_AS = {
    "model.embed_tokens": "embedding",
    "model.layers": "blocks",
    **{f"self_attn.{part}_proj": "attention.qkv" for part in "qkv"},
    "self_attn.o_proj": "attention.out",
    "mlp.gate_proj": "mlp.gate_up",
    "mlp.up_proj": "mlp.gate_up",
    "mlp.down_proj": "mlp.down",
}


@torch.no_grad()
def initialise(module: nn.Module, config: TransformerConfig, seed: int) -> None:
    """Draws every weight anew: normal, and those that write to the residual stream scaled down by depth (GPT-2)."""
    together: dict[str, list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        key = name
        for ours, drawn_as in DRAWN_AS.items():
            key = key.replace(ours, drawn_as)
        together.setdefault(key if parameter.dim() > 1 else name, []).append(parameter)
    for key, parameters in together.items():
        sizes = [parameter.shape[0] for parameter in parameters]
        values = torch.zeros((sum(sizes), *parameters[0].shape[1:]), device="cpu")
        if values.dim() > 1:
            residual = key.endswith(("attention.out.weight", "mlp.down.weight", "down_proj", "down_proj.weight"))
            std = config.initializer_range / (math.sqrt(2 * config.num_layers) if residual else 1)
            values.normal_(std=std, generator=named_generator(seed, key))
        elif not key.endswith("bias"):
            values.fill_(1.0)
        for parameter, part in zip(parameters, values.split(sizes), strict=True):
            fill(parameter, part)


def named_generator(seed: int, name: str) -> torch.Generator:
    """Returns the CPU generator that a weight's initial values come from; the seed and the weight's name decide it."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@torch.no_grad()
def fill(weight: Tensor, values: Tensor) -> None:
    """Copies values, the same on every process, into a weight; into a sharded one this process's part of them."""
    if isinstance(weight, DTensor):
        placed = distribute_tensor(values, weight.device_mesh, weight.placements, src_data_rank=None)
        weight.to_local().copy_(placed.to_local())
    else:
        weight.copy_(values)
