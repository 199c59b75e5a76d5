"""How a transformer is divided among processes: FSDP2, tensor parallelism (arXiv 1909.08053), or both at once."""

import math
from typing import Any, NamedTuple

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

from dllm_var.errors import UserError
from dllm_var.model.config import TransformerConfig
from dllm_var.model.experts import refuse_experts
from dllm_var.model.transformer import Transformer

TENSOR_PARALLEL, DATA_PARALLEL = "tensor_parallel", "data_parallel"  # dimensions of Lightning's device mesh

# The first matrices of a layer are divided by their outputs and the last by its inputs. In between, each process has
# its own heads or features; an all-reduce then adds up what all of them contribute to the residual stream.
PLAN = {
    **{f"model.layers.*.self_attn.{name}_proj": ColwiseParallel() for name in "qkv"},
    "model.layers.*.self_attn.o_proj": RowwiseParallel(),
    "model.layers.*.mlp.gate_proj": ColwiseParallel(),
    "model.layers.*.mlp.up_proj": ColwiseParallel(),
    "model.layers.*.mlp.down_proj": RowwiseParallel(),
    "lm_head": ColwiseParallel(output_layouts=Replicate()),  # whole logits for those who call it; the loss does not
}
QK_NORM_PLAN = {
    f"model.layers.*.self_attn.{name}_norm": SequenceParallel(sequence_dim=2, use_local_output=True) for name in "qk"
}  # heads


def tensor_parallel(transformer: Transformer, mesh: DeviceMesh) -> None:
    """Divides each layer and the vocabulary among the processes of a one-dimensional mesh, in place.

    Hidden states stay whole. Raises UserError when the size of the mesh does not divide the heads or the features, or
    the model has experts.
    """
    config, ranks = transformer.config, mesh.size()
    refuse_experts(config, "trainer.strategy: tensor_parallel_size above 1")
    sizes = ("num_kv_heads", "num_heads", "intermediate_size")
    wrong = [f"does not divide model.transformer.{n} {getattr(config, n)}" for n in sizes if getattr(config, n) % ranks]
    if (ranks - 1) * -(-config.vocab_size // ranks) >= config.vocab_size:  # type: ignore[operator]
        wrong.append(f"leaves a process without any of the {config.vocab_size} tokens")
    if wrong:
        raise UserError(
            f"trainer.strategy: tensor_parallel_size {ranks} {wrong[0]}: choose a smaller one that fits, or take "
            "configs/strategy/fsdp2.yaml"
        )
    plan = {**PLAN, **(QK_NORM_PLAN if config.qk_norm else {})}
    parallelize_module(transformer, mesh, plan, src_data_rank=None)
    transformer.model.embed_tokens = SharedEmbedding(transformer.embedding, mesh)
    transformer.tie_weights()
    for layer in transformer.layers:
        # What these return stays a DTensor, so that q, k and v add up their gradients before processes exchange them.
        replicate(layer.input_layernorm, mesh)  # type: ignore[arg-type]
        replicate(layer.post_attention_layernorm, mesh)  # type: ignore[arg-type]
        attention: Any = layer.self_attn
        attention.num_heads, attention.num_kv_heads = attention.num_heads // ranks, attention.num_kv_heads // ranks
    replicate(transformer.model.norm, mesh, local_output=True)


def replicate(norm: nn.Module, mesh: DeviceMesh, local_output: bool = False) -> None:
    """Gives every process of a group the same weight of a norm, as a DTensor like all others, and the same input."""

    def enter(_: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
        return DTensor.from_local(inputs[0], mesh, [Replicate()], run_check=False)

    def leave(_: nn.Module, output: Any, mesh: DeviceMesh) -> Any:
        return output.to_local().clone() if local_output else output  # FSDP2 warns of views that it returns

    weight = distribute_tensor(norm.weight, mesh, [Replicate()], src_data_rank=None)  # type: ignore[arg-type]
    norm.weight = nn.Parameter(weight)
    distribute_module(norm, mesh, None, enter, leave)


class SharedEmbedding(nn.Embedding):
    """The embedding of some of the vocabulary's tokens; the sum over the processes is that of all.

    Torch's RowwiseParallel does the same, but makes gradients of the whole vocabulary on every process.
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


def share_rows(config: TransformerConfig, mesh: DeviceMesh) -> tuple[dist.ProcessGroup, DeviceMesh]:
    """Returns the group that shares rows with this process, and a mesh on which all processes shard the weights.

    Raises UserError when the size of a group does not divide the heads.
    """
    group, heads = mesh[TENSOR_PARALLEL], config.resolved().num_heads
    if heads % group.size():
        raise UserError(
            f"trainer.strategy: context_parallel_size {group.size()} does not divide model.transformer.num_heads "
            f"{heads}: choose a smaller one that does, or take configs/strategy/fsdp2.yaml"
        )
    names = (DATA_PARALLEL, TENSOR_PARALLEL)
    return group.get_group(), init_device_mesh(mesh.device_type, (mesh.size(), 1), mesh_dim_names=names)


def shard(transformer: Transformer, mesh: DeviceMesh) -> None:
    """Shards each layer, and the rest with the root, over a one-dimensional mesh (FSDP2, torch's fully_shard)."""
    for part in (*transformer.layers, transformer):
        fully_shard(part, mesh=mesh)
    register_fsdp_forward_method(transformer, "hidden_states")
    # The head is used after hidden_states, and a layer is soon gathered again: keep what has been gathered.
    transformer.set_reshard_after_forward(False, recurse=False)  # type: ignore[operator]


def local_part(tensor: Tensor) -> Tensor:
    """Returns this process's part of a sharded tensor, which shares its memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def copies(tensor: Tensor) -> int:
    """Returns how many processes hold the same part of a sharded tensor; 1 of any other."""
    if not isinstance(tensor, DTensor):
        return 1
    mesh = tensor.device_mesh
    return math.prod(mesh.size(dim) for dim, placed in enumerate(tensor.placements) if placed.is_replicate())


class VocabularySlice(NamedTuple):
    """The tokens that this process has logits of, and the processes that have the others."""

    first: int = 0
    ranks: int = 1  # how many processes share the vocabulary
    group: dist.ProcessGroup | None = None  # these processes; None when this one has all of it

    def find(self, targets: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Returns where the targets stand among the `size` tokens that are here (anywhere if not) and which do."""
        place = targets - self.first
        here = (place >= 0) & (place < size)
        return place.clamp(0, size - 1), here

    def reduced(self, values: Tensor, operation: Any = dist.ReduceOp.SUM) -> Tensor:
        """Returns what the values of all processes come to, in place."""
        if self.group is not None and values.numel():
            dist.all_reduce(values, operation, group=self.group)
        return values


def vocabulary_slice(weight: Tensor) -> tuple[Tensor, VocabularySlice]:
    """Returns the rows of head or embedding [V, hidden] that are here, differentiable, and which tokens they are."""
    if not isinstance(weight, DTensor):
        return weight, VocabularySlice()
    mesh = weight.device_mesh
    each = -(-weight.size(0) // mesh.size())
    return weight.to_local(), VocabularySlice(mesh.get_local_rank() * each, mesh.size(), mesh.get_group())
