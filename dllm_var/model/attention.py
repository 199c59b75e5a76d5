"""Attention, and the masks that say which token sees which."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
        segment_ids: Document of each token [B, L]; a token sees only its own document. Everything when None.
    """
    mask = causal_mask(shown.size(1), shown.device) | shown[:, None, :]
    return mask if segment_ids is None else mask & segment_mask(segment_ids)[:, 0]


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """Returns scaled dot-product attention [B, heads, L, D]; keys and values may have fewer heads (grouped queries)."""
    return F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, is_causal=is_causal, enable_gqa=queries.size(1) != keys.size(1)
    )
