"""Tensor parallelism: heads, feed-forward layers and the vocabulary divided among processes (arXiv 1909.08053)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from dllm_var.errors import UserError
from dllm_var.model.placement import share, vocabulary_slice
from dllm_var.model.transformer import Attention, RMSNorm, Transformer

# Of each layer, what comes first is divided by its outputs and what comes last by its inputs: in between, each process
# has its own heads or features, and an all-reduce makes one sum of what all of them add to the residual stream.
PLAN = {
    "blocks.*.attention.qkv": ColwiseParallel(),
    "blocks.*.attention.out": RowwiseParallel(),
    "blocks.*.mlp.gate_up": ColwiseParallel(),
    "blocks.*.mlp.down": RowwiseParallel(),
    "lm_head": ColwiseParallel(output_layouts=Replicate()),  # whole logits for whoever calls it; the loss does not
}


class SharedEmbedding(nn.Embedding):
    """The embedding of some of the vocabulary's tokens; the sum over the processes is that of all.

    Torch's RowwiseParallel does the same, but makes gradients of the whole vocabulary on every process.

    Args:
        whole: The embedding, the same on every process.
        mesh: One-dimensional mesh of those that share it.
    """

    def __init__(self, whole: nn.Embedding, mesh: DeviceMesh) -> None:
        rows = distribute_tensor(whole.weight, mesh, [Shard(0)], src_data_rank=None)
        super().__init__(whole.num_embeddings, whole.embedding_dim, _weight=rows)

    def forward(self, input_ids: Tensor) -> Tensor:
        weight: Any = self.weight
        rows, tokens = vocabulary_slice(weight)
        place, here = tokens.find(input_ids, len(rows))
        vectors = F.embedding(place, rows).masked_fill(~here.unsqueeze(-1), 0.0)
        summed = DTensor.from_local(vectors, weight.device_mesh, [Partial()], run_check=False)
        return summed.redistribute(placements=[Replicate()]).to_local()


def divide(transformer: Transformer, mesh: DeviceMesh) -> None:
    """Divides a transformer among the processes of a tensor-parallel group, in place.

    Its hidden states stay whole on each of them. Matrices that are stored as one are divided each by itself:
    `dllm_var.model.placement` says which rows of a weight a process has.

    Args:
        transformer: On the meta device, or any other with the same weights everywhere.
        mesh: One-dimensional mesh of the group.

    Raises:
        UserError: When the group's size does not divide the heads or the features; names them.
    """
    config, ranks = transformer.config, mesh.size()
    for name in ("num_kv_heads", "num_heads", "intermediate_size"):
        if getattr(config, name) % ranks:
            raise UserError(
                f"trainer.strategy: tensor_parallel_size {ranks} does not divide model.transformer.{name} "
                f"{getattr(config, name)}: set it to a number that does, or take configs/strategy/fsdp2.yaml"
            )
    assert config.vocab_size is not None
    if not share(config.vocab_size, ranks, ranks - 1):
        raise UserError(
            f"trainer.strategy: tensor_parallel_size {ranks} leaves a process without any of the {config.vocab_size} "
            "tokens: lower it, or take configs/strategy/fsdp2.yaml"
        )
    parallelize_module(transformer, mesh, dict(PLAN), src_data_rank=None)
    transformer.embedding = SharedEmbedding(transformer.embedding, mesh)
    transformer.tie_weights()
    for module in transformer.modules():
        if isinstance(module, RMSNorm):  # whole everywhere, so that optimizers meet one kind of parameter
            weight = distribute_tensor(module.weight, mesh, [Replicate()], src_data_rank=None)
            module.weight = nn.Parameter(weight)
        elif isinstance(module, Attention):
            module.num_heads, module.num_kv_heads = module.num_heads // ranks, module.num_kv_heads // ranks
            for norm in (module.q_norm, module.k_norm):
                if norm is not None:  # it sees some of the heads: gradients add up
                    norm.gradient = [Partial()]
