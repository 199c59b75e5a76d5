"""The memory of each device in training: what `plan` foresees, and what a run needs that does not fit."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any

from torch import Tensor

from dllm_var.model.config import TransformerConfig
from dllm_var.model.quantised import QuantisedLinear
from dllm_var.model.transformer import Transformer

LOGITS_BYTES = 2 * 512 * 2**20  # of the head on CUDA, a chunk at a time: logits in 32 bits, and their gradient
ONE_DEVICE = "one device"  # Lightning's strategy without others
MOST_DEVICES = 64  # that are suggested


def activation_bytes(config: TransformerConfig, tokens: int, precision: str, recompute: bool = False) -> int:
    """Returns the bytes that autograd keeps of the layers between forward and backward; attention's matrix never.

    The layers read `tokens` of a batch. `precision` is `32`, `16-mixed` (autocast: weights and residual stream have 32
    bits) or `16-true`. With `recompute`, the input of each layer is kept, and all of one layer at a time.
    """
    sizes: Any = config  # none of them is None
    hidden, heads, kv_heads = sizes.hidden_size, sizes.num_heads, sizes.num_kv_heads
    queries_keys, width = (heads + kv_heads) * sizes.head_dim, 4 if precision == "32" else 2
    before_norms = queries_keys if sizes.qk_norm and precision == "32" else 0
    kept = width * (2 * queries_keys + before_norms + 2 * hidden)
    kept += 4 * heads  # the logarithms of attention's sums
    kept += 16 * hidden + 8  # norms: the input and the normalised one, in 32 bits
    if sizes.qk_norm:
        kept += (4 if width == 4 else 8) * queries_keys + 4 * (heads + kv_heads)
    layers = [
        kept + _feed_forward_bytes(sizes, config.has_experts(number), width) for number in range(sizes.num_layers)
    ]
    if not recompute:
        return tokens * sum(layers)
    residual = 2 if precision == "16-true" else 4
    return tokens * (max(layers) + residual * hidden * sizes.num_layers)


def _feed_forward_bytes(sizes: Any, experts: bool, width: int) -> int:
    """Returns the bytes that are kept of a token's way through a feed-forward layer, or through its experts.

    An expert gets a copy of the token, and its output is kept for the gradient of its weight.
    """
    if not experts:
        return width * 4 * sizes.intermediate_size
    inner, chosen = sizes.expert_intermediate_size, sizes.experts_per_token
    routed = chosen * (width * (2 * sizes.hidden_size + 4 * inner) + 28)  # and its number, places and weight
    router = 4 * sizes.num_experts + (4 * sizes.hidden_size if width == 2 else 0)  # in 32 bits
    return routed + router + width * 4 * inner * sizes.shared_experts


def device_memory(
    model: Transformer, strategy: str, devices: int, tokens: int, precision: str, recompute: bool = False
) -> dict[str, float]:
    """Returns the bytes on each device at the peak of a step with AdamW, without the allocator's waste and CUDA's own.

    `gathered` is what FSDP2 holds whole (a layer and the next one; embedding and head as long as a step lasts), and
    autocast's 16-bit copies; `gradients` includes the buckets in which ddp sends them; `optimizer` has the moments, and
    the 32-bit weights that DeepSpeed keeps beside 16-bit ones; `activations` includes a chunk of logits. `zero2`
    (DeepSpeed) shards gradients and optimizer state. The model is on the meta device and has its adapters.
    """
    held, trained = model.num_parameters, sum(p.numel() for p in model.parameters() if p.requires_grad)
    quantised = [module for module in model.modules() if isinstance(module, QuantisedLinear)]
    layers = [sum(p.numel() for p in layer.parameters()) for layer in model.layers]
    matrices = [sum(map(copied, layer.named_parameters())) for layer in model.layers]
    width = 2 if precision == "16-true" else 4
    # Autocast multiplies by 16-bit copies, which autograd keeps: of all layers, or of the one that is computed again.
    gathered = 2.0 * (max(matrices) if recompute else sum(matrices)) if precision == "16-mixed" else 0
    if quantised:  # the numbers of one matrix at a time, as halves of bytes, bytes and in the type of the products
        gathered += (2 + (4 if precision == "32" else 2)) * max(one.in_features * one.out_features for one in quantised)
    held_bytes = sum(p.numel() * (width if p.is_floating_point() else 1) for p in model.parameters())
    weights, gradients, optimizer = float(held_bytes), float(width * trained), 2.0 * width * trained
    if strategy == "ddp":
        gradients *= 2
    elif strategy == ONE_DEVICE:
        pass
    elif strategy == "fsdp2":
        gathered += width * (held - sum(layers) + 2 * max(layers)) if devices > 1 else 0
        weights, gradients, optimizer = weights / devices, gradients / devices, optimizer / devices
    else:
        width, master = (4, 0) if precision == "32" else (2, 4)
        weights, gathered = width * held, 0
        gradients, optimizer = width * trained / devices, (8 + master) * trained / devices
    parts = {"weights": weights, "gathered": gathered, "gradients": gradients, "optimizer": optimizer}
    parts["activations"] = activation_bytes(model.config, tokens, precision, recompute) + LOGITS_BYTES
    return {**parts, "total": sum(parts.values())}


def copied(named: tuple[str, Tensor]) -> int:
    """Returns how many numbers of a weight autocast copies into 16 bits: those of matrices, but for integers."""
    name, weight = named
    plain = weight.dim() > 1 and weight.is_floating_point() and not name.endswith(".scale")
    return weight.numel() if plain else 0


def planned_strategy(strategy: Any, devices: int) -> str | None:
    """Returns which strategy of the plan a Trainer's setting is, a name or a `class_path`; None when it is none."""
    name = strategy.get("class_path") if isinstance(strategy, dict) else strategy
    name = str(name or "auto").rpartition(".")[2].lower()
    known = {"auto": "ddp", "ddp": "ddp", "fsdp": "fsdp2", "modelparallel": "fsdp2", "deepspeed": "zero2"}
    planned = next((planned for beginning, planned in known.items() if name.startswith(beginning)), None)
    return planned if devices > 1 or planned is None else None if planned == "zero2" else ONE_DEVICE


@dataclass(frozen=True)
class Placed:
    """What decides the memory of a device, besides the model and its rows' length."""

    strategy: str  # `ddp`, `fsdp2`, `zero2` or ONE_DEVICE
    recompute: bool
    rows: int  # of a batch on one device
    devices: int
    adapters: str = ""  # `lora` or `qlora` for those of the config of this name


def what_fits(
    run: Placed, needed: Callable[[Placed], float], memory: float, accumulated: int, adaptable: Iterable[str]
) -> str | None:
    """Returns the arguments with which a run fits in the memory; None when none of those tried is enough.

    `needed` gives the bytes of a device, `accumulated` the batches of a step. What costs time alone is tried first,
    then the adapters that the model is `adaptable` with, then more devices.
    """
    devices = [run.devices << n for n in range(MOST_DEVICES) if n == 0 or run.devices << n <= MOST_DEVICES]
    rows = [run.rows // n for n in range(1, run.rows + 1) if run.rows % n == 0]
    strategies = [run.strategy] if run.strategy in ("fsdp2", "zero2") else [run.strategy, "fsdp2"]
    adapted = ["", *adaptable]
    recomputed = [run.recompute] if run.recompute else [False, True]
    for n, adapters, fewer, recompute, strategy in product(devices, adapted, rows, recomputed, strategies):
        spread = "ddp" if strategy == ONE_DEVICE and n > 1 else strategy
        if adapters == "qlora" and spread not in ("ddp", ONE_DEVICE):  # quantised matrices are not sharded
            continue
        if needed(Placed(spread, recompute, fewer, n, adapters)) > memory:
            continue
        changes = {
            "--trainer.strategy=dllm_var.training.strategies.FSDP2": strategy != run.strategy,
            "--model.activation_checkpointing=full": recompute != run.recompute,
            f"--data.batch_size={fewer}": fewer != run.rows,
            f"--trainer.accumulate_grad_batches={accumulated * run.rows // fewer}": fewer != run.rows,
            f"--config configs/{adapters}.yaml": adapters != run.adapters,
            f"--devices {n}": n != run.devices,
        }
        return " ".join(argument for argument, changed in changes.items() if changed)
    return None
