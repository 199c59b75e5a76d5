"""Memory that training takes on each device, from the shape of the transformer, before any of it is run."""

from __future__ import annotations

from typing import Any

from dllm_var.model.config import TransformerConfig
from dllm_var.model.transformer import Transformer

STRATEGIES = ("ddp", "fsdp2", "zero2")
LOGITS_BYTES = 2 * 512 * 2**20  # of the head on CUDA, a chunk at a time: logits in 32 bits, and their gradient


def activation_bytes(config: TransformerConfig, tokens: int, precision: str, recompute: bool = False) -> int:
    """Returns the bytes that autograd keeps of the layers between forward and backward; attention's matrix never.

    Args:
        config: The transformer, resolved.
        tokens: Tokens of a batch that the layers read.
        precision: `32`, `16-mixed` (autocast: weights and residual stream have 32 bits), or `16-true`.
        recompute: Keeps the input of each layer, and all of one layer at a time.
    """
    sizes: Any = config  # none of them is None
    hidden, heads, kv_heads = sizes.hidden_size, sizes.num_heads, sizes.num_kv_heads
    queries_keys, width = (heads + kv_heads) * sizes.head_dim, 4 if precision == "32" else 2
    before_norms = queries_keys if sizes.qk_norm and precision == "32" else 0
    kept = width * (2 * queries_keys + before_norms + 4 * sizes.intermediate_size + 2 * hidden)
    kept += 4 * heads  # the logarithms of attention's sums
    kept += 16 * hidden + 8  # norms: the input and the normalised one, in 32 bits
    if sizes.qk_norm:
        kept += (4 if width == 4 else 8) * queries_keys + 4 * (heads + kv_heads)
    if not recompute:
        return tokens * kept * sizes.num_layers
    residual = 2 if precision == "16-true" else 4
    return tokens * (kept + residual * hidden * sizes.num_layers)


def device_memory(
    model: Transformer, strategy: str, devices: int, tokens: int, precision: str, recompute: bool = False
) -> dict[str, float]:
    """Returns the bytes on each device at the peak of a step with AdamW, without the allocator's waste and CUDA's own.

    `weights` is this device's part of them; `gathered` is what FSDP2 holds whole, and autocast's 16-bit copies;
    `gradients` includes the buckets in which ddp sends them; `optimizer` has the moments, and the 32-bit weights that
    DeepSpeed keeps beside 16-bit ones; `activations` includes a chunk of logits; `total` is all of it.

    Args:
        model: The transformer, on the meta device, with its adapters; weights without `requires_grad` are not trained.
        strategy: `ddp`: everything on each device; `fsdp2`: everything sharded, a layer and the next one gathered, and
            embedding and head as long as a step lasts; `zero2` (DeepSpeed): gradients and optimizer state sharded.
        devices: How many.
        tokens: As for `activation_bytes`, like `precision` and `recompute`.
    """
    held, trained = model.num_parameters, sum(p.numel() for p in model.parameters() if p.requires_grad)
    layers, in_layer = len(model.layers), list(model.layers[0].parameters())
    layer, matrices = sum(p.numel() for p in in_layer), sum(p.numel() for p in in_layer if p.dim() == 2)
    width = 2 if precision == "16-true" else 4
    # Autocast multiplies by 16-bit copies, which autograd keeps: of all layers, or of the one that is computed again.
    gathered = 2.0 * matrices * (1 if recompute else layers) if precision == "16-mixed" else 0
    weights, gradients, optimizer = float(width * held), float(width * trained), 2.0 * width * trained
    if strategy == "ddp":
        gradients *= 2
    elif strategy == "fsdp2":
        gathered += width * (held - layers * layer + 2 * layer) if devices > 1 else 0
        weights, gradients, optimizer = weights / devices, gradients / devices, optimizer / devices
    else:
        width, master = (4, 0) if precision == "32" else (2, 4)
        weights, gathered = width * held, 0
        gradients, optimizer = width * trained / devices, (8 + master) * trained / devices
    parts = {"weights": weights, "gathered": gathered, "gradients": gradients, "optimizer": optimizer}
    parts["activations"] = activation_bytes(model.config, tokens, precision, recompute) + LOGITS_BYTES
    return {**parts, "total": sum(parts.values())}
