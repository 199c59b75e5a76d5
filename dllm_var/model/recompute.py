"""Activation checkpointing: what the backward pass computes again, to save memory (arXiv 1604.06174)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Recompute = Literal["none", "full", "selective"]

aten = torch.ops.aten
# Matrix products and attention are what a forward costs; norms, rotations and activations are cheap, and most of what
# is kept. Not in it: attention within short documents on the CPU, whose probabilities are larger than its result.
EXPENSIVE = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten._scaled_mm.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
}


def keep_the_expensive(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """The selective policy: keeps the results of `EXPENSIVE` operations and computes the rest again."""
    varlen = str(operation).startswith("torch_attn._varlen_attn")
    return CheckpointPolicy.MUST_SAVE if operation in EXPENSIVE or varlen else CheckpointPolicy.PREFER_RECOMPUTE


def recomputed(policy: Recompute, function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function whose activations are not kept but computed again in the backward pass.

    Args:
        policy: `full` keeps the arguments alone, at the price of a second forward; `selective` also the results of
            matrix products and attention.
        function: What to call.
        args: Its arguments.
    """
    if policy == "full":
        return checkpoint(function, *args, use_reentrant=False)
    contexts = partial(create_selective_checkpoint_contexts, keep_the_expensive)
    return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)
