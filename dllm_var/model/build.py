"""Builds a transformer with all that changes its layers: adapters, 8-bit products, quantised matrices, shards."""

import torch
from torch.distributed.device_mesh import DeviceMesh

from dllm_var.errors import UserError
from dllm_var.model.config import TransformerConfig
from dllm_var.model.float8 import Float8, use_float8
from dllm_var.model.lora import Lora, add_adapters, reset_adapters
from dllm_var.model.quantised import Integers, quantise_layers
from dllm_var.model.sharding import DATA_PARALLEL, TENSOR_PARALLEL, shard, tensor_parallel
from dllm_var.model.transformer import Transformer


def outline(
    config: TransformerConfig,
    lora: Lora | None = None,
    integers: Integers | None = None,
    float8: Float8 | None = None,
) -> Transformer:
    """Returns a transformer without memory for its weights, with 8-bit products, quantised matrices and adapters."""
    with torch.device("meta"):
        transformer = Transformer(config)
    if float8 is not None:
        use_float8(transformer, float8)
    if integers is not None:
        quantise_layers(transformer, integers)
    if lora is not None:
        add_adapters(transformer, lora)
    return transformer


def build_transformer(
    config: TransformerConfig,
    lora: Lora | None = None,
    draw: bool = True,
    mesh: DeviceMesh | None = None,
    device: torch.device | None = None,
    float8: Float8 | None = None,
    integers: Integers | None = None,
) -> Transformer:
    """Builds a transformer with adapters, 8-bit products and quantised matrices as asked.

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
    if mesh is not None and integers is not None:
        raise UserError(
            "model.quantize does not go with sharded weights: take configs/strategy/ddp.yaml, or one_gpu.yaml, or "
            "leave it out"
        )
    transformer = outline(config, lora, integers, float8)
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
