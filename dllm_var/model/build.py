"""Builds the transformer of a run, on whatever devices its strategy has for it."""

from __future__ import annotations

import os
import shutil

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.distributed.device_mesh import DeviceMesh

from dllm_var.errors import UserError
from dllm_var.model.config import TransformerConfig
from dllm_var.model.float8 import Float8, use_float8
from dllm_var.model.lora import Lora, add_adapters, reset_adapters
from dllm_var.model.sharding import DATA_PARALLEL, TENSOR_PARALLEL, shard, tensor_parallel
from dllm_var.model.transformer import Transformer


def build_transformer(
    config: TransformerConfig,
    lora: Lora | None = None,
    draw: bool = True,
    mesh: DeviceMesh | None = None,
    device: torch.device | None = None,
    float8: Float8 | None = None,
) -> Transformer:
    """Builds a transformer with adapters and 8-bit products as asked; raises UserError for what does not go together.

    Over Lightning's mesh of `data_parallel` and `tensor_parallel` processes it is sharded before any weight exists, so
    that it never exists as a whole. With `draw` false its weights hold whatever the memory held, to be filled. They go
    to torch's default device when `device` is None.
    """
    divided = mesh is not None and mesh[TENSOR_PARALLEL].size() > 1
    if divided and (lora is not None or float8 is not None):
        raise UserError(
            f"model.{'float8' if lora is None else 'lora'} does not go with tensor parallelism: take "
            "configs/strategy/fsdp2.yaml, which shards the weights"
        )
    with torch.device("meta"):
        transformer = Transformer(config)
    if float8 is not None:
        use_float8(transformer, float8)
    if lora is not None:
        add_adapters(transformer, lora)
    if mesh is not None and divided:
        tensor_parallel(transformer, mesh[TENSOR_PARALLEL])
    if mesh is not None:
        shard(transformer, mesh[DATA_PARALLEL])
    transformer.to_empty(device=torch.get_default_device() if device is None else device)
    transformer.tie_weights()
    if draw:
        transformer.reset_parameters()
    if lora is not None:
        reset_adapters(transformer)
    return transformer


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile has what it needs, on a CPU a C++ compiler; warns otherwise."""
    if device.type != "cpu" or any(map(shutil.which, (os.environ.get("CXX", ""), "g++", "c++", "clang++", "cl"))):
        return True
    rank_zero_warn("model.compile is set, but there is no C++ compiler (g++, clang++): training without it, slower")
    return False
