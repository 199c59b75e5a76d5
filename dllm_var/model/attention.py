"""Attention: which token sees which, and the kernel that computes it.

| a token sees | on CUDA | on the CPU |
|---|---|---|
| its whole row, or all of it to the left | SDPA | SDPA |
| its own document | the varlen kernel in 16 bits, else as below | SDPA for each document; short rows with a mask |
| what an `AttentionRule` says | flex_attention with a block mask | SDPA with a mask |

Decoding with a KV cache uses SDPA everywhere, with the mask of the cache.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from torch.torch_version import TorchVersion

# From this row length on, the CPU takes documents one by one. With a mask, a training step takes 1.1 (50M weights) to
# 1.4 times as long (3M) in rows of 1,024 with documents of 250 tokens, but 0.8 times in the quickstart's rows of 128.
LEAST_LENGTH = 256
WIDEST_HEAD, WIDTH_MULTIPLE = 256, 8  # head widths that the varlen kernel takes (FlashAttention 2)
QUERIES_COUNTED = 1024  # of a row, whose pairs are counted on a GPU
TAKES_GROUPS = TorchVersion(torch.__version__) >= "2.12"  # whether the varlen kernel takes groups of heads
LEAST_LONGEST = 128  # queries in a tile of the varlen kernel


class AttentionRule:
    """A function that says which token of a batch [B, L] sees which, for patterns that no kernel knows.

    `function` is called with the tensors `held`, and with numbers of row, head, query and key, as tensors that
    broadcast. It returns whether the query sees the key, the same for all heads. Of `tokens` only shape and device
    matter, which is also the device of `held`.
    """

    def __init__(self, function: Callable[..., Tensor], tokens: Tensor, *held: Tensor) -> None:
        self.function, self.shape, self.device, self.held = function, tokens.shape, tokens.device, held

        def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return function(*held, row, head, query, key)

        self.sees = sees  # flex_attention's mask_mod

    def to(self, device: torch.device) -> "AttentionRule":
        """Returns the same rule on another device."""
        tokens = torch.empty(1, device=device).expand(self.shape)
        return AttentionRule(self.function, tokens, *(send(tensor, device) for tensor in self.held))

    @cached_property
    def mask(self) -> Tensor:
        """The rule as a boolean mask [B, 1, L, L], for the CPU."""
        return self.of_queries(torch.arange(self.shape[1], device=self.device)).unsqueeze(1)

    def block_mask(self) -> Any:
        """Returns flex_attention's `BlockMask` [B, 1, L, L]: which tiles of 128 x 128 tokens have anything to see.

        It is made by a compiled function, as torch's own would hold all L x L pairs in memory.
        """
        from torch.nn.attention.flex_attention import create_block_mask

        rows, length = self.shape
        return compiled(create_block_mask)(self.sees, rows, None, length, length, device=self.device)

    def pairs(self) -> Tensor:
        """Returns how many pairs of tokens attend; on a GPU an estimate from evenly spaced queries of long rows."""
        return self.mask.sum() if self.device.type == "cpu" else self.estimated_pairs()

    def estimated_pairs(self, queries: int = QUERIES_COUNTED) -> Tensor:
        """Returns how many pairs attend if others see as many keys as some evenly spaced queries of each row do."""
        length = self.shape[1]
        counted = min(length, queries)
        places = torch.arange(counted, device=self.device) * length // counted
        return self.of_queries(places).sum() * length // counted

    def of_queries(self, queries: Tensor) -> Tensor:
        """Returns what the queries at the given places [Q] see [B, Q, L]."""
        row, place = (torch.arange(size, device=self.device) for size in self.shape)
        row = row[:, None, None]
        return self.sees(row, torch.zeros_like(row), queries[:, None], place).expand(len(row), -1, -1)


def document_rule(segment_ids: Tensor, causal: bool, shown: Tensor | None = None) -> AttentionRule:
    """Returns the rule with which a token sees its own segment [B, L].

    If `causal`, it sees only the left of it, and of the right those tokens that are `shown` [B, L].
    """

    def sees(segment: Tensor, shown: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = segment[row, query] == segment[row, key]
        return same & ((query >= key) | shown[row, key]) if causal else same

    return AttentionRule(
        sees, segment_ids, segment_ids, torch.zeros_like(segment_ids).bool() if shown is None else shown
    )


def block_causal_rule(tokens: Tensor, grid: int, position_ids: Tensor, segment_ids: Tensor | None) -> AttentionRule:
    """Returns the rule with which a token sees, of its own segment [B, L], its block and those before it.

    Blocks of `grid` tokens are counted by the positions [B, L] or [1, L].
    """
    block = (position_ids // grid).expand(tokens.shape)

    def sees(block: Tensor, segment: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (block[row, key] <= block[row, query]) & (segment[row, query] == segment[row, key])

    return AttentionRule(sees, tokens, block, torch.zeros_like(tokens) if segment_ids is None else segment_ids)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a tensor on a device; a GPU takes it from pinned memory, without being waited for."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@dataclass
class Documents:
    """The documents of a batch whose rows are laid end to end, as the varlen kernel takes them.

    The kernel's work grows with the number of documents times the length that none exceeds.
    """

    ends: Tensor  # where documents end, from 0 on: int32 [documents + 1]
    longest: int  # a length that no document exceeds

    @classmethod
    def of(cls, segment_ids: Tensor) -> "Documents":
        """Finds the documents of rows [B, L]; a run of padding is one, too. A GPU is waited for to count them.

        The longest is rounded up to a power of two, so that few numbers are compiled for.
        """
        begins = torch.ones_like(segment_ids, dtype=torch.bool)
        begins[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
        starts = begins.flatten().nonzero()[:, 0]
        ends = F.pad(starts, (0, 1), value=segment_ids.numel()).to(torch.int32)
        longest = segment_ids.size(1)  # on a GPU, rather than wait a second time
        if ends.device.type == "cpu":
            longest = 1 << (int(ends.diff().max()) - 1).bit_length()
        return cls(ends, max(longest, LEAST_LONGEST))

    def to(self, device: torch.device) -> "Documents":
        """Returns the same documents on another device."""
        return Documents(send(self.ends, device), self.longest)


@dataclass
class Seen:
    """What the tokens of a forward see, in the form that a kernel takes; everything by default."""

    mask: Tensor | None = None  # boolean mask for SDPA, broadcast to [B, heads, L, keys]
    is_causal: bool = False  # whether a token sees only its left
    documents: Documents | None = None  # for kernels that take them, when a token sees its own document
    block_mask: Any = None  # flex_attention's
    kernels: tuple[Any, ...] | None = None  # of SDPA, the best first; torch's own choice when None

    @classmethod
    def by_rule(cls, rule: AttentionRule) -> "Seen":
        """Returns what a rule lets tokens see; no [L, L] mask is made on CUDA."""
        return cls(block_mask=rule.block_mask()) if rule.device.type == "cuda" else cls(rule.mask)

    @classmethod
    def by_document(
        cls,
        segment_ids: Tensor,
        is_causal: bool,
        dtype: torch.dtype,
        head_dim: int,
        documents: Documents | None = None,
    ) -> "Seen":
        """Returns what tokens see that see their own document [B, L], for attention that is computed in `dtype`.

        Without the same `documents`, found on the host, a GPU with the varlen kernel is waited for to count them.
        """
        length, device = segment_ids.size(1), segment_ids.device
        if has_varlen(device, dtype, head_dim) or (device.type == "cpu" and length >= LEAST_LENGTH):
            return cls(is_causal=is_causal, documents=documents or Documents.of(segment_ids))
        return cls.by_rule(document_rule(segment_ids, is_causal))


def has_varlen(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Returns whether torch has an attention kernel there for documents that are laid end to end."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    takes_heads = head_dim <= WIDEST_HEAD and head_dim % WIDTH_MULTIPLE == 0
    return takes_heads and torch.cuda.get_device_capability(device) >= (8, 0)


def attend(queries: Tensor, keys: Tensor, values: Tensor, seen: Seen) -> Tensor:
    """Returns scaled dot-product attention of queries [B, L, heads, D] to keys and values [B, keys, kv_heads, D].

    With fewer heads of keys than of queries, groups of queries share one.
    """
    if seen.documents is not None:
        attend_documents = _one_by_one if queries.device.type == "cpu" else _end_to_end
        return attend_documents(queries, keys, values, seen.is_causal, seen.documents)
    grouped = queries.size(2) != keys.size(2)
    queries, keys, values = (x.transpose(1, 2) for x in (queries, keys, values))
    if seen.block_mask is None and grouped and seen.mask is not None and queries.is_cuda:
        return attend_by_group(queries, keys, values, seen.mask).transpose(1, 2)
    if seen.block_mask is None:
        if grouped and queries.is_cuda and values.dtype == torch.float32:  # no kernel there takes groups
            keys, values = (x.repeat_interleave(queries.size(1) // x.size(1), dim=1) for x in (keys, values))
            grouped = False
        settings: Any = {"attn_mask": seen.mask, "is_causal": seen.is_causal, "enable_gqa": grouped}
        if seen.kernels is None:
            return F.scaled_dot_product_attention(queries, keys, values, **settings).transpose(1, 2)
        with sdpa_kernel(list(seen.kernels), set_priority=True):
            return F.scaled_dot_product_attention(queries, keys, values, **settings).transpose(1, 2)
    from torch.nn.attention.flex_attention import flex_attention

    queries, keys = queries.to(values.dtype), keys.to(values.dtype)  # norms of heads leave them in float32
    flex: Any = flex_attention if torch.compiler.is_compiling() else compiled(flex_attention)
    mixed = flex(queries, keys, values, block_mask=seen.block_mask, enable_gqa=grouped)
    return mixed.transpose(1, 2)


def attend_by_group(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Returns attention under a mask [B, 1, 1 or L, keys], all of [B, heads, L, D], with fewer heads of keys.

    The queries that share a head of keys become one longer row of queries: no kernel that takes masks on a GPU takes
    groups in every version of torch, and what falls back to products of whole matrices is slow.
    """
    rows, heads, length, width = queries.shape
    group = heads // keys.size(1)
    if mask.size(2) > 1:
        mask = mask.repeat(1, 1, group, 1)
    mixed = F.scaled_dot_product_attention(queries.reshape(rows, -1, group * length, width), keys, values, mask)
    return mixed.view(rows, heads, length, width)


@torch.compiler.disable
def _one_by_one(queries: Tensor, keys: Tensor, values: Tensor, is_causal: bool, documents: Documents) -> Tensor:
    """Attends within one document after the other."""
    shape = queries.shape
    settings: Any = {"is_causal": is_causal, "enable_gqa": queries.size(2) != keys.size(2)}
    sizes = [end - start for start, end in pairwise(documents.ends.tolist())]
    split = (x.flatten(0, 1).transpose(0, 1).split(sizes, dim=1) for x in (queries, keys, values))
    mixed = [
        F.scaled_dot_product_attention(q[None], k[None], v[None], **settings) for q, k, v in zip(*split, strict=True)
    ]
    return torch.cat(mixed, dim=2).transpose(1, 2).reshape(shape)


def _end_to_end(queries: Tensor, keys: Tensor, values: Tensor, is_causal: bool, documents: Documents) -> Tensor:
    """Attends within all documents at once, by torch's varlen kernel; a compiled layer has it inside its graph."""
    from torch.nn.attention.varlen import varlen_attn  # registers operators: no start of a command should wait for it

    shape, heads = queries.shape, queries.size(2)
    queries, keys, values = (x.flatten(0, 1) for x in (queries, keys, values))  # [tokens, heads, D]
    settings: Any = {"window_size": (-1, 0 if is_causal else -1)}
    if heads != keys.size(1) and TAKES_GROUPS:
        settings["enable_gqa"] = True
    elif heads != keys.size(1):
        keys, values = (x.repeat_interleave(heads // x.size(1), dim=1) for x in (keys, values))
    queries, keys = queries.to(values.dtype), keys.to(values.dtype)  # norms of heads leave them in float32
    ends, longest = documents.ends, documents.longest
    found: Any = varlen_attn(queries, keys, values, ends, ends, longest, longest, **settings)
    return found.view(shape)


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function compiled, once for all its callers."""
    return torch.compile(function)
