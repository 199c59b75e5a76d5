"""Which part of a weight this process holds, when processes share it (FSDP2, tensor parallelism or both)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from dllm_var.model.config import TransformerConfig

TENSOR_PARALLEL, DATA_PARALLEL = "tensor_parallel", "data_parallel"  # dimensions of Lightning's device mesh


def local_part(tensor: Tensor) -> Tensor:
    """Returns this process's part of a sharded tensor, which shares its memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sections(name: str, config: TransformerConfig) -> list[int]:
    """Returns how many rows each of the matrices has that are stored as one; none when it is a single one.

    Under tensor parallelism each of them is divided by itself: a process then holds some heads' queries, keys and
    values.

    Args:
        name: Of the weight.
        config: The transformer's, resolved.
    """
    assert config.num_kv_heads is not None and config.head_dim is not None and config.intermediate_size is not None
    if name.endswith(("attention.qkv.weight", "attention.qkv.bias")):
        keys = config.num_kv_heads * config.head_dim
        return [config.num_heads * config.head_dim, keys, keys]
    return [config.intermediate_size] * 2 if name.endswith("mlp.gate_up.weight") else []


def copies(tensor: Tensor) -> int:
    """Returns how many processes hold the same part of a sharded tensor; 1 of any other."""
    if not isinstance(tensor, DTensor):
        return 1
    mesh = tensor.device_mesh
    return math.prod(mesh.size(dim) for dim in range(mesh.ndim) if not hasattr(tensor.placements[dim], "dim"))


class Part(NamedTuple):
    """Rows of a weight, one run of them after the other, and columns (of a vector: all) that a process holds."""

    rows: list[range]
    columns: range


def share(size: int, ranks: int, rank: int) -> range:
    """Returns the rank's share when so many are dealt in runs as even as torch.chunk's; empty when none is left."""
    each = -(-size // ranks)
    return range(min(rank * each, size), min((rank + 1) * each, size))


def part_held(weight: DTensor, sections: list[int]) -> Part:
    """Returns which part of a weight this process holds.

    Args:
        weight: Divided by tensor parallelism first, then by FSDP2; or by one of them.
        sections: See there.
    """
    mesh, names = weight.device_mesh, weight.device_mesh.mesh_dim_names or ()
    rows, columns = [range(weight.shape[0])], range(weight.shape[1] if weight.dim() > 1 else 1)
    for dim in reversed(range(mesh.ndim)):  # the last one divides first
        ranks, rank = mesh.size(dim), mesh.get_local_rank(dim)
        along = getattr(weight.placements[dim], "dim", None)  # of Shard, and of the one that FSDP2 makes of two
        if along is None:
            continue
        if along == 1:
            share_of = share(len(columns), ranks, rank)
            columns = columns[share_of.start : share_of.stop]
        elif sections and names and names[dim] == TENSOR_PARALLEL:
            starts = [sum(sections[:index]) for index in range(len(sections))]
            shares = [share(size, ranks, rank) for size in sections]
            rows = [range(s + part.start, s + part.stop) for s, part in zip(starts, shares, strict=True)]
        else:
            rows = _cut(rows, share(sum(map(len, rows)), ranks, rank))
    return Part(rows, columns)


def _cut(runs: list[range], wanted: range) -> list[range]:
    """Returns the wanted ones of the numbers in `runs`, counted through all of them."""
    cut, passed = [], 0
    for run in runs:
        some = run[max(wanted.start - passed, 0) : max(wanted.stop - passed, 0)]
        cut += [some] if some else []
        passed += len(run)
    return cut


def pieces(weight: DTensor, sections: list[int]) -> list[tuple[Tensor, tuple[int, ...]]]:
    """Returns views of this process's part of a weight, one for each run of rows, and where each begins in the whole.

    Args:
        weight: Sharded.
        sections: See there.
    """
    part, local = part_held(weight, sections), local_part(weight)
    assert local.shape[0] == sum(map(len, part.rows)), "a weight is divided otherwise than was thought"
    views = local.split([len(run) for run in part.rows]) if part.rows else []
    offsets = [(run.start, part.columns.start)[: local.dim()] for run in part.rows]
    return list(zip(views, offsets, strict=True))


def _place(whole: Tensor, view: Tensor, offset: tuple[int, ...]) -> Tensor:
    """Returns where a piece lies in the whole."""
    for dim, start in enumerate(offset):
        whole = whole.narrow(dim, start, view.shape[dim])
    return whole


@torch.no_grad()
def fill(weight: Tensor, values: Tensor, sections: list[int]) -> None:
    """Copies values into a weight, or into the part of a sharded one that is here; no process has to send any.

    Args:
        weight: The parameter.
        values: All of it, the same on every process.
        sections: See there.
    """
    if not isinstance(weight, DTensor):
        weight.copy_(values)
        return
    for view, offset in pieces(weight, sections):
        view.copy_(_place(values, view, offset))


@torch.no_grad()
def gathered(weight: Tensor, sections: list[int]) -> Tensor:
    """Returns the whole of a weight, on every process; all of them must ask.

    Args:
        weight: Sharded or not.
        sections: See there.
    """
    if not isinstance(weight, DTensor):
        return weight
    mesh: DeviceMesh = weight.device_mesh
    whole = torch.zeros(weight.shape, dtype=weight.dtype, device=local_part(weight).device)
    for view, offset in pieces(weight, sections):
        _place(whole, view, offset).copy_(view)
    for dim in range(mesh.ndim):
        if hasattr(weight.placements[dim], "dim"):  # along the others all have the same
            dist.all_reduce(whole, group=mesh.get_group(dim))
    return whole


class VocabularySlice(NamedTuple):
    """The tokens that this process has logits of, and the processes that have the others (Megatron-LM, 1909.08053).

    Args:
        first: Number of the first of them.
        ranks: How many processes share the vocabulary.
        group: These processes; null when this one has all of it.
    """

    first: int = 0
    ranks: int = 1
    group: dist.ProcessGroup | None = None

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
