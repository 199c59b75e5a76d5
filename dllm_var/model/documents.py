"""Attention within the documents of packed rows, with nothing that grows with the row squared."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import groupby, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dllm_var.model.attention import attend, causal_mask, segment_mask

CHUNK = 64  # tokens of short documents that the CPU takes together
SHORT = 512  # tokens up to which `ShortChunks` is faster there than SDPA's kernel
LEAST_LENGTH = 256  # shorter rows are faster with a mask
WIDEST_HEAD, WIDTH_MULTIPLE = 256, 8  # head widths that the CUDA kernel takes (FlashAttention 2)


@dataclass
class Chunk:
    """Neighbouring documents that the CPU takes together.

    Args:
        size: Tokens.
        mask: Added to the scores, so that a token sees what it may [size, size]; None when that is everything.
    """

    size: int
    mask: Tensor | None


@dataclass
class Documents:
    """Where the documents of a batch lie when its rows are laid end to end.

    A document is a run of equal segment ids within a row, and so is what pads a row.

    Args:
        runs: Chunks that follow each other, and whether `ShortChunks` takes them; on the CPU.
        ends: Where each document ends, from 0 on, int32 [documents + 1]; on CUDA.
        longest: A length that no document exceeds.
        is_causal: Whether a token sees only its left.
    """

    runs: list[tuple[bool, list[Chunk]]]
    ends: Tensor | None
    longest: int
    is_causal: bool


def document_ends(segment_ids: Tensor) -> Tensor:
    """Returns where documents end when the rows [B, L] are laid end to end, from 0 on: int32 [documents + 1]."""
    begins = torch.ones_like(segment_ids, dtype=torch.bool)
    begins[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    starts = begins.flatten().nonzero()[:, 0]
    return F.pad(starts, (0, 1), value=segment_ids.numel()).to(torch.int32)


def find_documents(
    segment_ids: Tensor, dtype: torch.dtype, is_causal: bool, head_dim: int, ends: Tensor | None = None
) -> Documents | None:
    """Finds the documents of a batch, or returns None where a mask serves better.

    On CUDA one kernel attends within all documents, if it takes the type and the heads; the CPU, in long rows, goes
    chunk by chunk.

    Args:
        segment_ids: Document of each token [B, L].
        dtype: Type that attention is computed in.
        is_causal: Whether a token sees only its left.
        head_dim: Width of a head.
        ends: What `document_ends` returns, where it is known; the device is waited for otherwise.
    """
    length = segment_ids.size(1)
    on_cuda = has_varlen(segment_ids.device, dtype, head_dim)
    if not on_cuda and (segment_ids.device.type != "cpu" or length < LEAST_LENGTH):
        return None
    ends = document_ends(segment_ids) if ends is None else ends
    if on_cuda:
        return Documents([], ends, length, is_causal)
    products = dtype in (torch.float32, torch.float64)  # what is rounded when in 16-bit types is SDPA's to decide
    found = []
    for edges in chunks(ends.tolist(), length):
        size = edges[-1] - edges[0]
        short = products and size <= SHORT
        masked = len(edges) > 2 or (is_causal and short)
        found.append((short, Chunk(size, _mask(edges, dtype, is_causal) if masked else None)))
    runs = [(short, [chunk for _, chunk in run]) for short, run in groupby(found, key=lambda pair: pair[0])]
    return Documents(runs, None, length, is_causal)


def _mask(edges: list[int], dtype: torch.dtype, is_causal: bool) -> Tensor:
    """Returns the mask of a chunk, given where its documents start and end."""
    number = torch.repeat_interleave(torch.tensor([end - start for start, end in pairwise(edges)]))
    seen = segment_mask(number[None])[0, 0]
    if is_causal:
        seen &= causal_mask(len(number), seen.device)
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, -torch.inf)


def has_varlen(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Returns whether torch has an attention kernel there for documents that are laid end to end."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    takes_heads = head_dim <= WIDEST_HEAD and head_dim % WIDTH_MULTIPLE == 0
    return takes_heads and torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def takes_groups(kernel: Callable[..., Any]) -> bool:
    """Returns whether a varlen kernel takes fewer key than query heads: torch's does from 2.12 on."""
    return "enable_gqa" in inspect.signature(kernel).parameters


def chunks(edges: list[int], length: int) -> list[list[int]]:
    """Groups neighbouring documents of a row, at most `CHUNK` tokens of them; a longer one is by itself.

    Args:
        edges: Where each document starts, and where the last one ends.
        length: Tokens in a row.

    Returns:
        The edges of the documents in each chunk.
    """
    grouped = [edges[:2]]
    for start, end in zip(edges[1:-1], edges[2:], strict=True):
        if start % length == 0 or end - grouped[-1][0] > CHUNK:
            grouped.append([start, end])
        else:
            grouped[-1].append(end)
    return grouped


@torch.compiler.disable
def attend_documents(queries: Tensor, keys: Tensor, values: Tensor, documents: Documents) -> Tensor:
    """Returns attention within documents [B, L, heads, D].

    Args:
        queries: [B, L, heads, D].
        keys: [B, L, kv_heads, D], and so the values.
        documents: Where they lie.
    """
    shape = queries.shape
    queries, keys, values = (x.flatten(0, 1) for x in (queries, keys, values))
    if documents.ends is not None:
        return _attend_varlen(queries, keys, values, documents.ends, documents).view(shape)
    parts: list[Tensor] = []
    sizes = [sum(chunk.size for chunk in run) for _, run in documents.runs]
    whole = len(sizes) == 1  # as in most batches: nothing to take apart, and for the gradients to copy together
    split = ((x,) if whole else x.split(sizes) for x in (queries, keys, values))
    for (short, run), q, k, v in zip(documents.runs, *split, strict=True):
        if short and q.size(1) == k.size(1):
            parts.append(ShortChunks.apply(q, k, v, run))
            continue
        for chunk, *qkv in _heads_of_each(run, q, k, v):
            q, k, v = (x.unsqueeze(0) for x in qkv)
            causal = documents.is_causal and chunk.mask is None
            parts.append(attend(q, k, v, chunk.mask, causal)[0].transpose(0, 1))
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(shape)


def _attend_varlen(queries: Tensor, keys: Tensor, values: Tensor, ends: Tensor, documents: Documents) -> Tensor:
    """Returns attention within documents [tokens, heads, D] from torch's varlen kernel."""
    from torch.nn.attention.varlen import varlen_attn  # registers operators: no start of a command should wait for it

    groups: dict[str, Any] = {}
    if queries.size(1) != keys.size(1):
        if takes_groups(varlen_attn):
            groups["enable_gqa"] = True
        else:
            keys, values = (x.repeat_interleave(queries.size(1) // x.size(1), dim=1) for x in (keys, values))
    mixed: Any = varlen_attn(
        queries.to(values.dtype),  # norms of heads leave them in float32
        keys.to(values.dtype),
        values,
        ends,
        ends,
        documents.longest,
        documents.longest,
        window_size=(-1, 0 if documents.is_causal else -1),
        **groups,
    )
    assert isinstance(mixed, Tensor)  # no further results were asked for
    return mixed
    return mixed


class ShortChunks(torch.autograd.Function):
    """Attention within chunks as plain matrix products [tokens, heads, D], whose probabilities are kept.

    SDPA's kernel for the CPU computes the scores again for the gradients, and threads share those by heads alone.

    Args of `apply`:
        queries: [tokens, heads, D], and so keys and values.
        run: The chunks, which lie one after the other.
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, run: list[Chunk]) -> Tensor:
        mixed, kept = torch.empty_like(queries), []
        for chunk, q, k, v, out in _heads_of_each(run, queries, keys, values, mixed):
            mask = q.new_empty(1) if chunk.mask is None else chunk.mask
            scores = torch.baddbmm(mask, q, k.mT, beta=int(chunk.mask is not None), alpha=q.size(-1) ** -0.5)
            kept.append(scores.softmax(dim=-1))
            torch.bmm(kept[-1], v, out=out)
        ctx.save_for_backward(queries, keys, values, *kept)
        ctx.run = run
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, *kept = ctx.saved_tensors
        found = [torch.empty_like(x) for x in (queries, keys, values)]
        each = _heads_of_each(ctx.run, queries, keys, values, gradient, *found)
        for probabilities, (_, q, k, v, upstream, to_q, to_k, to_v) in zip(kept, each, strict=True):
            torch.bmm(probabilities.mT, upstream, out=to_v)
            of_scores = torch._softmax_backward_data(torch.bmm(upstream, v.mT), probabilities, -1, q.dtype)
            torch.baddbmm(to_q, of_scores, k, beta=0, alpha=q.size(-1) ** -0.5, out=to_q)
            torch.baddbmm(to_k, of_scores.mT, q, beta=0, alpha=q.size(-1) ** -0.5, out=to_k)
        return *found, None


def _heads_of_each(run: list[Chunk], *tensors: Tensor) -> Iterator[Any]:
    """Goes through the chunks of a run: each with its part [heads, size, D] of every tensor [tokens, heads, D]."""
    sizes = [chunk.size for chunk in run]
    return zip(run, *(x.transpose(0, 1).split(sizes, dim=1) for x in tensors), strict=True)
