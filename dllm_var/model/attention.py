"""Attention: rotary positions, which token sees which, and the kernel that computes it.

| a token sees | on CUDA | on the CPU |
|---|---|---|
| its whole row, or all of it to the left | SDPA | SDPA |
| its own document | the varlen kernel in 16 bits, else as below | SDPA for each document; short rows with a mask |
| what an `AttentionRule` says | flex_attention with a block mask | SDPA with a mask |

Decoding with a KV cache uses SDPA everywhere, with the mask of the cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm_var.model.config import LLAMA3_KEYS, TransformerConfig

# From this row length on, the CPU takes documents one by one. With a mask, a training step takes 1.1 (50M weights) to
# 1.4 times as long (3M) in rows of 1,024 with documents of 250 tokens, but 0.8 times in the quickstart's rows of 128.
LEAST_LENGTH = 256
WIDEST_HEAD, WIDTH_MULTIPLE = 256, 8  # head widths that the varlen kernel takes (FlashAttention 2)
QUERIES_COUNTED = 1024  # queries whose pairs are counted at a time
Sees = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (row, head, query, key) -> bool: flex_attention's mask_mod


class RotaryTable:
    """Cosines and sines of every position, computed once per device and grown on demand (RoFormer, 2104.09864)."""

    def __init__(self, config: TransformerConfig) -> None:
        assert config.head_dim is not None
        self.head_dim, self.llama3 = config.head_dim, config.rope_llama3
        self.theta = config.rope_theta * config.rope_scaling
        self.cos = self.sin = torch.empty(0)

    def __call__(self, position_ids: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Returns cos and signed sin, each [B, L, 1, head_dim], for `position_ids` [B, L], all below `length`."""
        if self.cos.size(0) < length or self.cos.device != position_ids.device:
            self._grow(max(length, 2 * self.cos.size(0)), position_ids.device)
        return self.cos[position_ids].unsqueeze(2), self.sin[position_ids].unsqueeze(2)

    def _grow(self, length: int, device: torch.device) -> None:
        with torch.inference_mode(False):  # the table outlives the request that first needs it
            exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=device) / self.head_dim
            periods = self.theta**exponents
            periods = periods if self.llama3 is None else llama3_periods(periods, self.llama3)
            angles = torch.arange(length, dtype=torch.float32, device=device)[:, None] / periods
            # Both halves of a head turn by the same angles (Llama's layout); the first half subtracts.
            self.cos = torch.cat((angles.cos(), angles.cos()), dim=-1)
            self.sin = torch.cat((-angles.sin(), angles.sin()), dim=-1)  # [length, head_dim]


def llama3_periods(periods: Tensor, settings: dict[str, float]) -> Tensor:
    """Returns the periods of Llama 3.1's rotary embedding [head_dim / 2], of which only the long ones are stretched.

    A period is the number of tokens in which a pair of dimensions turns by one radian. In the trained length, a period
    that turns `high_freq_factor` times or more stays, one that turns less than `low_freq_factor` times becomes `factor`
    times as long, and between the two the frequencies are interpolated (Llama 3.1's published code).
    """
    factor, low, high, trained = (settings[key] for key in LLAMA3_KEYS)
    turns = trained / (2 * math.pi * periods)
    share = ((turns - low) / (high - low)).clamp(0, 1)  # 1 where the frequency stays
    return 1 / (share / periods + (1 - share) / (factor * periods))


def rotate(x: Tensor, cos: Tensor, sin: Tensor, full_precision: bool) -> Tensor:
    """Turns heads [B, L, heads, head_dim] by their positions' angles, in float32 at least if `full_precision`.

    `cos` and `sin` [B, L, 1, head_dim] are a `RotaryTable`'s. The result has the type of `x`.
    """
    exact = x.to(torch.promote_types(x.dtype, cos.dtype)) if full_precision else x
    swapped = exact.roll(x.size(-1) // 2, dims=-1)
    return torch.addcmul(exact * cos.to(exact.dtype), swapped, sin.to(exact.dtype)).to(x.dtype)


class AttentionRule:
    """A function that says which token of a batch sees which, for patterns that no kernel knows.

    Args:
        sees: Called with numbers of row, head, query and key, as tensors that broadcast; it returns whether the query
            sees the key, the same for all heads. It may index tensors that it holds.
        tokens: The batch [B, L], of which only shape and device matter.
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


def document_rule(segment_ids: Tensor, causal: bool) -> AttentionRule:
    """Returns the rule with which a token sees its own segment [B, L], of it only its left if `causal`."""

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = segment_ids[row, query] == segment_ids[row, key]
        return same & (query >= key) if causal else same

    return AttentionRule(sees, segment_ids)


def partly_causal_rule(shown: Tensor, segment_ids: Tensor | None) -> AttentionRule:
    """Returns the rule with which a token sees its left, and of its right what is `shown` [B, L].

    With `segment_ids` [B, L] it sees only its own document.
    """

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (query >= key) | shown[row, key]
        return seen if segment_ids is None else seen & (segment_ids[row, query] == segment_ids[row, key])

    return AttentionRule(sees, shown)


@dataclass
class Documents:
    """Where the documents of a batch lie when its rows are laid end to end; a run of padding is a document, too.

    Args:
        ends: Where each document ends, from 0 on, int32 [documents + 1].
        longest: A length that no document exceeds.
        is_causal: Whether a token sees only its left.
    """

    ends: Tensor
    longest: int
    is_causal: bool


@dataclass
class Seen:
    """What the tokens of a forward see, in the form that a kernel takes; everything by default.

    Args:
        mask: Boolean mask for SDPA, broadcast to [B, heads, L, keys].
        is_causal: Whether a token sees only its left.
        documents: Where the documents lie that tokens see.
        block_mask: flex_attention's.
    """

    mask: Tensor | None = None
    is_causal: bool = False
    documents: Documents | None = None
    block_mask: Any = None

    @classmethod
    def by_rule(cls, rule: AttentionRule) -> Seen:
        """Returns what a rule lets tokens see; no [L, L] mask is made on CUDA."""
        return cls(block_mask=rule.block_mask()) if rule.device.type == "cuda" else cls(rule.mask)

    @classmethod
    def by_document(
        cls, segment_ids: Tensor, is_causal: bool, dtype: torch.dtype, head_dim: int, ends: Tensor | None = None
    ) -> Seen:
        """Returns what tokens see that see their own document.

        Args:
            segment_ids: Document of each token [B, L].
            is_causal: Whether a token sees only its left.
            dtype: Type that attention is computed in.
            head_dim: Width of a head.
            ends: What `document_ends` returns, where it is known; a GPU is waited for otherwise.
        """
        length, device = segment_ids.size(1), segment_ids.device
        if has_varlen(device, dtype, head_dim) or (device.type == "cpu" and length >= LEAST_LENGTH):
            ends = document_ends(segment_ids) if ends is None else ends
            return cls(documents=Documents(ends, length, is_causal))
        return cls.by_rule(document_rule(segment_ids, is_causal))


def document_ends(segment_ids: Tensor) -> Tensor:
    """Returns where documents end when the rows [B, L] are laid end to end, from 0 on: int32 [documents + 1]."""
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
    """Returns scaled dot-product attention [B, L, heads, D].

    Args:
        queries: [B, L, heads, D].
        keys: [B, keys, kv_heads, D], and so the values; with fewer heads than the queries, groups of these share one.
        seen: What each query sees.
    """
    if seen.documents is not None:
        return _attend_documents(queries, keys, values, seen.documents)
    grouped = queries.size(2) != keys.size(2)
    queries, keys, values = (x.transpose(1, 2) for x in (queries, keys, values))
    if seen.block_mask is None:
        settings: Any = {"attn_mask": seen.mask, "is_causal": seen.is_causal, "enable_gqa": grouped}
        return F.scaled_dot_product_attention(queries, keys, values, **settings).transpose(1, 2)
    from torch.nn.attention.flex_attention import flex_attention

    queries, keys = queries.to(values.dtype), keys.to(values.dtype)  # norms of heads leave them in float32
    mixed = compiled(flex_attention)(queries, keys, values, block_mask=seen.block_mask, enable_gqa=grouped)
    return mixed.transpose(1, 2)


@torch.compiler.disable
def _attend_documents(queries: Tensor, keys: Tensor, values: Tensor, documents: Documents) -> Tensor:
    """Returns attention within documents [B, L, heads, D]; arguments as of `attend`."""
    shape, heads = queries.shape, queries.size(2)
    queries, keys, values = (x.flatten(0, 1) for x in (queries, keys, values))  # [tokens, heads, D]
    if queries.device.type == "cpu":
        sizes = [end - start for start, end in pairwise(documents.ends.tolist())]
        split = (x.transpose(0, 1).split(sizes, dim=1) for x in (queries, keys, values))
        mixed = [
            F.scaled_dot_product_attention(
                q[None], k[None], v[None], is_causal=documents.is_causal, enable_gqa=heads != keys.size(1)
            )
            for q, k, v in zip(*split, strict=True)
        ]
        return torch.cat(mixed, dim=2).transpose(1, 2).reshape(shape)
    from torch.nn.attention.varlen import varlen_attn  # registers operators: no start of a command should wait for it

    if heads != keys.size(1):  # the kernel of torch 2.11 takes no groups
        keys, values = (x.repeat_interleave(heads // x.size(1), dim=1) for x in (keys, values))
    window = (-1, 0 if documents.is_causal else -1)
    ends, longest = documents.ends, documents.longest
    queries, keys = queries.to(values.dtype), keys.to(values.dtype)  # norms of heads leave them in float32
    mixed_on_device: Any = varlen_attn(queries, keys, values, ends, ends, longest, longest, window_size=window)
    return mixed_on_device.view(shape)


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function compiled, once for all its callers."""
    return torch.compile(function)
