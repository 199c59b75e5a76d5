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

# From this row length on, the CPU takes documents one by one. With a mask, a training step takes 1.1 (50M weights) to
# 1.4 times as long (3M) in rows of 1,024 with documents of 250 tokens, but 0.8 times in the quickstart's rows of 128.
LEAST_LENGTH = 256
WIDEST_HEAD, WIDTH_MULTIPLE = 256, 8  # head widths that the varlen kernel takes (FlashAttention 2)
QUERIES_COUNTED = 1024  # queries whose pairs are counted at a time
Sees = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (row, head, query, key) -> bool: flex_attention's mask_mod


class AttentionRule:
    """A function that says which token of a batch [B, L] sees which, for patterns that no kernel knows.

    `sees` is called with numbers of row, head, query and key, as tensors that broadcast; it returns whether the query
    sees the key, the same for all heads. It may index tensors that it holds. Of `tokens` only shape and device matter.
    """

    def __init__(self, sees: Sees, tokens: Tensor) -> None:
        self.sees, self.shape, self.device = sees, tokens.shape, tokens.device

    @cached_property
    def mask(self) -> Tensor:
        """The rule as a boolean mask [B, 1, L, L], for the CPU."""
        return self.of_queries(0, self.shape[1]).unsqueeze(1)

    def block_mask(self) -> Any:
        """Returns flex_attention's `BlockMask` [B, 1, L, L]: which tiles of 128 x 128 tokens have anything to see.

        It is made by a compiled function, as torch's own would hold all L x L pairs in memory.
        """
        from torch.nn.attention.flex_attention import create_block_mask

        rows, length = self.shape
        return compiled(create_block_mask)(self.sees, rows, None, length, length, device=self.device)

    def pairs(self) -> Tensor:
        """Returns how many pairs of tokens attend; on a GPU without making the whole mask."""
        if self.device.type == "cpu":
            return self.mask.sum()
        starts = range(0, self.shape[1], QUERIES_COUNTED)
        return torch.stack([self.of_queries(at, at + QUERIES_COUNTED).sum() for at in starts]).sum()

    def of_queries(self, start: int, end: int) -> Tensor:
        """Returns what the queries from `start` to `end` see [B, queries, L]."""
        row, place = (torch.arange(size, device=self.device) for size in self.shape)
        row = row[:, None, None]
        return self.sees(row, torch.zeros_like(row), place[start:end, None], place).expand(len(row), -1, -1)


def document_rule(segment_ids: Tensor, causal: bool, shown: Tensor | None = None) -> AttentionRule:
    """Returns the rule with which a token sees its own segment [B, L].

    If `causal`, it sees only the left of it, and of the right those tokens that are `shown` [B, L].
    """

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = segment_ids[row, query] == segment_ids[row, key]
        if not causal:
            return same
        return same & (query >= key) if shown is None else same & ((query >= key) | shown[row, key])

    return AttentionRule(sees, segment_ids)


@dataclass
class Seen:
    """What the tokens of a forward see, in the form that a kernel takes; everything by default."""

    mask: Tensor | None = None  # boolean mask for SDPA, broadcast to [B, heads, L, keys]
    is_causal: bool = False  # whether a token sees only its left
    document_ends: Tensor | None = None  # what `document_ends` returns, when a token sees its own document
    longest: int = 0  # a length that no document exceeds
    block_mask: Any = None  # flex_attention's

    @classmethod
    def by_rule(cls, rule: AttentionRule) -> "Seen":
        """Returns what a rule lets tokens see; no [L, L] mask is made on CUDA."""
        return cls(block_mask=rule.block_mask()) if rule.device.type == "cuda" else cls(rule.mask)

    @classmethod
    def by_document(cls, segment_ids: Tensor, is_causal: bool, dtype: torch.dtype, head_dim: int) -> "Seen":
        """Returns what tokens see that see their own document [B, L], for attention that is computed in `dtype`.

        The varlen kernel waits for the GPU to count the documents. A training step has just waited for its loss
        positions then, and the queue is empty.
        """
        length, device = segment_ids.size(1), segment_ids.device
        if has_varlen(device, dtype, head_dim) or (device.type == "cpu" and length >= LEAST_LENGTH):
            return cls(is_causal=is_causal, document_ends=document_ends(segment_ids), longest=length)
        return cls.by_rule(document_rule(segment_ids, is_causal))


def document_ends(segment_ids: Tensor) -> Tensor:
    """Returns where documents end when the rows [B, L] are laid end to end, from 0 on: int32 [documents + 1].

    A run of padding is a document, too.
    """
    begins = torch.ones_like(segment_ids, dtype=torch.bool)
    begins[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    starts = begins.flatten().nonzero()[:, 0]
    return F.pad(starts, (0, 1), value=segment_ids.numel()).to(torch.int32)


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
    if seen.document_ends is not None:
        return _attend_documents(queries, keys, values, seen, seen.document_ends)
    grouped = queries.size(2) != keys.size(2)
    queries, keys, values = (x.transpose(1, 2) for x in (queries, keys, values))
    if seen.block_mask is None and grouped and seen.mask is not None and queries.is_cuda:
        return attend_by_group(queries, keys, values, seen.mask).transpose(1, 2)
    if seen.block_mask is None:
        settings: Any = {"attn_mask": seen.mask, "is_causal": seen.is_causal, "enable_gqa": grouped}
        return F.scaled_dot_product_attention(queries, keys, values, **settings).transpose(1, 2)
    from torch.nn.attention.flex_attention import flex_attention

    queries, keys = queries.to(values.dtype), keys.to(values.dtype)  # norms of heads leave them in float32
    mixed = compiled(flex_attention)(queries, keys, values, block_mask=seen.block_mask, enable_gqa=grouped)
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
def _attend_documents(queries: Tensor, keys: Tensor, values: Tensor, seen: Seen, ends: Tensor) -> Tensor:
    shape, heads = queries.shape, queries.size(2)
    queries, keys, values = (x.flatten(0, 1) for x in (queries, keys, values))  # [tokens, heads, D]
    if queries.device.type == "cpu":
        sizes = [end - start for start, end in pairwise(ends.tolist())]
        split = (x.transpose(0, 1).split(sizes, dim=1) for x in (queries, keys, values))
        settings: Any = {"is_causal": seen.is_causal, "enable_gqa": heads != keys.size(1)}
        mixed = [
            F.scaled_dot_product_attention(q[None], k[None], v[None], **settings)
            for q, k, v in zip(*split, strict=True)
        ]
        return torch.cat(mixed, dim=2).transpose(1, 2).reshape(shape)
    from torch.nn.attention.varlen import varlen_attn  # registers operators: no start of a command should wait for it

    if heads != keys.size(1):  # the kernel of torch 2.11 takes no groups
        keys, values = (x.repeat_interleave(heads // x.size(1), dim=1) for x in (keys, values))
    window = (-1, 0 if seen.is_causal else -1)
    queries, keys = queries.to(values.dtype), keys.to(values.dtype)  # norms of heads leave them in float32
    found: Any = varlen_attn(queries, keys, values, ends, ends, seen.longest, seen.longest, window_size=window)
    return found.view(shape)


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function compiled, once for all its callers."""
    return torch.compile(function)
