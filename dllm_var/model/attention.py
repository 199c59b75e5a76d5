"""Which token sees which, and the attention itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64  # tokens of short documents that share one call on the CPU
LEAST_LENGTH = 512  # shorter rows are faster with a mask


def segment_mask(segment_ids: Tensor) -> Tensor:
    """Returns the boolean mask [B, 1, L, L] with which a token sees exactly the tokens of its own segment."""
    return (segment_ids.unsqueeze(2) == segment_ids.unsqueeze(1)).unsqueeze(1)


def causal_mask(length: int, device: torch.device) -> Tensor:
    """Returns the boolean mask [L, L] with which a token sees itself and its left."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def partly_causal_mask(shown: Tensor, segment_ids: Tensor | None) -> Tensor:
    """Returns the mask [B, L, L] with which a token sees its left, and on its right what is shown.

    Args:
        shown: Which tokens are seen from their left, too [B, L], bool.
        segment_ids: Document of each token [B, L]; a token sees only its own document. Everything when null.
    """
    mask = causal_mask(shown.size(1), shown.device) | shown[:, None, :]
    return mask if segment_ids is None else mask & segment_mask(segment_ids)[:, 0]


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """Returns scaled dot-product attention [B, heads, L, D]; keys and values may have fewer heads (grouped queries)."""
    return F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, is_causal=is_causal, enable_gqa=queries.size(1) != keys.size(1)
    )


@dataclass
class Documents:
    """Where the documents of a batch lie when its rows are laid end to end; nothing here grows with the row squared.

    A document is a run of equal segment ids within a row, and so is what pads a row.

    Args:
        sizes: Tokens of each chunk of neighbouring documents; on the CPU.
        masks: Which of a chunk's tokens sees which [size, size]; null for one document.
        ends: Where each document ends, from 0 on, int32 [documents + 1]; on CUDA.
        longest: A length that no document exceeds.
        is_causal: Whether a token sees only its left.
    """

    sizes: list[int]
    masks: list[Tensor | None]
    ends: Tensor | None
    longest: int
    is_causal: bool


def find_documents(segment_ids: Tensor, dtype: torch.dtype, is_causal: bool) -> Documents | None:
    """Finds the documents of a batch, or returns null where a mask serves better.

    On CUDA they go to one varlen kernel, if the type is a 16-bit one; on the CPU, in long rows, chunk by chunk.

    Args:
        segment_ids: Document of each token [B, L].
        dtype: Type that attention is computed in.
        is_causal: Whether a token sees only its left.
    """
    rows, length = segment_ids.shape
    on_cuda = has_varlen(segment_ids.device, dtype)
    if not on_cuda and (segment_ids.device.type != "cpu" or length < LEAST_LENGTH):
        return None
    begins = torch.ones_like(segment_ids, dtype=torch.bool)
    begins[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    starts = begins.flatten().nonzero()[:, 0]
    if on_cuda:
        ends = F.pad(starts, (0, 1), value=rows * length).to(torch.int32)
        return Documents([], [], ends, length, is_causal)
    sizes, masks = [], []
    for chunk in chunks([*starts.tolist(), rows * length], length):
        sizes.append(chunk[-1] - chunk[0])
        mask = None
        if len(chunk) > 2:
            number = torch.repeat_interleave(torch.tensor([b - a for a, b in zip(chunk, chunk[1:], strict=False)]))
            mask = number[:, None] == number
            mask = mask & causal_mask(len(number), mask.device) if is_causal else mask
        masks.append(mask)
    return Documents(sizes, masks, None, max(sizes), is_causal)


def has_varlen(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has an attention kernel for documents laid end to end there."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16) or varlen_kernel() is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def varlen_kernel() -> Callable[..., Any] | None:
    """Returns torch's attention over documents laid end to end, null before torch 2.10; imported where it is used."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


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
        kernel = varlen_kernel()
        assert kernel is not None  # find_documents has looked
        mixed = kernel(
            queries.to(values.dtype),  # norms of heads leave them in float32
            keys.to(values.dtype),
            values,
            documents.ends,
            documents.ends,
            documents.longest,
            documents.longest,
            window_size=(-1, 0 if documents.is_causal else -1),
            enable_gqa=queries.size(1) != keys.size(1),
        )
        return mixed.view(shape)
    parts = []
    split = (x.split(documents.sizes) for x in (queries, keys, values))
    for q, k, v, mask in zip(*split, documents.masks, strict=True):
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # [1, heads, size, D]
        parts.append(attend(q, k, v, mask, documents.is_causal and mask is None)[0].transpose(0, 1))
    return torch.cat(parts).view(shape)
