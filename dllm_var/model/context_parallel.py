"""Context parallelism: processes share rows, each with some of the positions (Ulysses, arXiv 2309.14509).

Between two exchanges around attention, a process has all positions of some heads: every pattern and kernel of
`dllm_var.model.attention` works as in one process. Torch's own context parallelism has ring attention for CUDA without
masks, and gathers keys for flex_attention in rows that 128 positions per process divide.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class RowPart:
    """The positions of this process, neighbours of each other, in rows of `length` that a group of processes shares."""

    group: dist.ProcessGroup
    rank: int
    ranks: int
    length: int

    @classmethod
    def of(cls, group: dist.ProcessGroup, length: int) -> "RowPart":
        """Returns this process's part of rows of a length; the first processes have one position more than the last."""
        return cls(group, dist.get_rank(group), dist.get_world_size(group), length)

    @property
    def lengths(self) -> list[int]:
        """How many positions each process has."""
        each, more = divmod(self.length, self.ranks)
        return [each + (rank < more) for rank in range(self.ranks)]

    @property
    def columns(self) -> slice:
        """The positions of this process."""
        start = sum(self.lengths[: self.rank])
        return slice(start, start + self.lengths[self.rank])

    def place(self, positions: Tensor) -> Tensor:
        """Returns where positions of this part stand in it, all counted through flattened batches of rows."""
        row, column = positions // self.length, positions % self.length
        return row * self.lengths[self.rank] + column - self.columns.start

    def to_heads(self, queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        """Exchanges all heads of some positions [B, part, heads, D] for some heads of all positions [B, L, some, D].

        With too few heads of keys for all processes, several get the same.
        """
        copies = self.ranks // math.gcd(self.ranks, keys.size(2))
        if copies > 1:
            keys, values = (x.repeat_interleave(copies, dim=2) for x in (keys, values))
        sent = [x.to(values.dtype).unflatten(2, (self.ranks, -1)) for x in (queries, keys, values)]
        heads = [x.size(3) for x in sent]
        own = self.lengths[self.rank]
        parts = torch.cat(sent, dim=3).movedim(2, 0).transpose(1, 2).flatten(0, 1)  # [ranks * part, B, heads, D]
        whole = _AllToAll.apply(parts, [own] * self.ranks, self.lengths, self.group)
        return whole.transpose(0, 1).split(heads, dim=2)

    def to_positions(self, mixed: Tensor) -> Tensor:
        """Exchanges some heads of all positions [B, L, some, D] for all heads of some positions [B, part, heads, D]."""
        own = self.lengths[self.rank]
        parts = _AllToAll.apply(mixed.transpose(0, 1), self.lengths, [own] * self.ranks, self.group)
        return parts.unflatten(0, (self.ranks, own)).movedim(0, 2).transpose(0, 1).flatten(2, 3)


class _AllToAll(torch.autograd.Function):
    """Sends `sent[i]` entries along the first dimension to process i, and gets `received[i]` from it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.settings = received, sent, group
        found = x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(found, x.contiguous(), received, sent, group)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _AllToAll.apply(grad, *ctx.settings), None, None, None
