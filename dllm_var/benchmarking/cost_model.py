"""Cost of training before any of it is run: parameters, FLOPs, bytes on each device, seconds per step.

Closed forms of our transformer, whose `vocab_size` must be set. Tests compare parameters with its own, FLOPs with
torch's counter, activations with the tensors that autograd keeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from dllm_var.model.config import TransformerConfig

Strategy = Literal["ddp", "fsdp2", "zero2"]
Precision = Literal["32", "16-mixed", "16-true"]
STRATEGIES: tuple[Strategy, ...] = ("ddp", "fsdp2", "zero2")
LOGITS_BYTES = 2 * 512 * 2**20  # of the head on CUDA, a chunk at a time: logits in 32 bits, and their gradient


class Shape:
    """A transformer's sizes, and the widths that follow from them."""

    def __init__(self, config: TransformerConfig) -> None:
        full: Any = config.resolved()  # none of its sizes is None
        self.config = full
        self.hidden, self.layers, self.vocabulary = full.hidden_size, full.num_layers, full.vocab_size
        self.queries, self.keys = full.num_heads * full.head_dim, full.num_kv_heads * full.head_dim
        self.feed_forward = full.intermediate_size
        self.after_attention = self.hidden * (self.queries + 3 * self.feed_forward)  # weights of one block
        self.block_matrices = self.hidden * (self.queries + 2 * self.keys) + self.after_attention


@dataclass(frozen=True)
class Parameters:
    """Numbers of weights: of the embedding, one block, all blocks, the head (0 if tied) and the last norm."""

    embedding: int
    block: int
    blocks: int
    head: int
    norm: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.embedding + self.blocks + self.head + self.norm


def count_parameters(config: TransformerConfig) -> Parameters:
    """Returns the numbers of weights of a transformer."""
    shape = Shape(config)
    vectors = 2 * shape.hidden + (shape.queries + 2 * shape.keys) * shape.config.qkv_bias
    vectors += 2 * shape.config.head_dim * shape.config.qk_norm
    block, embedding = shape.block_matrices + vectors, shape.vocabulary * shape.hidden
    return Parameters(embedding, block, shape.layers * block, 0 if config.tie_embeddings else embedding, shape.hidden)


def adapter_parameters(config: TransformerConfig, rank: int, targets: list[str]) -> int:
    """Returns the number of weights of low-rank adapters (`model.lora`): rank x (inputs + outputs) of each matrix."""
    shape = Shape(config)
    outputs = {"q_proj": shape.queries, "k_proj": shape.keys, "v_proj": shape.keys, "o_proj": shape.queries}
    outputs |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), shape.feed_forward)
    in_blocks = sum(shape.hidden + outputs[target] for target in targets if target in outputs) * shape.layers
    return rank * (in_blocks + (shape.hidden + shape.vocabulary) * ("lm_head" in targets))


def forward_flops(config: TransformerConfig, length: int, scored: int) -> float:
    """Returns the FLOPs of one row's forward: 2 per weight and token, 4 per attending pair of tokens and head entry.

    The layers read `length` tokens; the head, and what comes after the last layer's attention, run on `scored` of them.
    A causal transformer attends to half of the pairs.
    """
    shape = Shape(config)
    pairs = length * length / (2 if config.causal else 1)
    in_layers = 2 * length * shape.block_matrices + 4 * pairs * shape.queries
    at_the_end = 2 * scored * shape.vocabulary * shape.hidden - 2 * (length - scored) * shape.after_attention
    return shape.layers * in_layers + at_the_end


def training_flops(config: TransformerConfig, length: int, scored: int, trained_share: float = 1.0) -> float:
    """Returns the FLOPs of one row's forward and backward; as in MFU, recomputed activations do not count.

    Weights outside `trained_share` get no gradients but pass them on, which is half of their backward.
    """
    return forward_flops(config, length, scored) * (2 + trained_share)


def activation_bytes(
    config: TransformerConfig, rows: int, length: int, precision: Precision, recompute: bool = False
) -> float:
    """Returns the bytes that autograd keeps of the blocks between forward and backward, attention's matrix never.

    Args:
        config: The transformer.
        rows: Rows of a batch.
        length: Tokens the layers read of each.
        precision: 32 bits, 16 with weights and residual stream in 32 (autocast), or all in 16.
        recompute: Keeps the input of each block only, and all of one block at a time.
    """
    shape, width = Shape(config), 4 if precision == "32" else 2
    queries_keys, heads = shape.queries + shape.keys, shape.config.num_heads
    before_norms = queries_keys if config.qk_norm and precision == "32" else 0
    kept = width * (2 * queries_keys + before_norms + 4 * shape.feed_forward + 2 * shape.hidden)
    kept += 4 * heads  # the logarithms of attention's sums
    kept += 16 * shape.hidden + 8  # norms: the input and the normalised one, in 32 bits
    if config.qk_norm:
        kept += (4 if width == 4 else 8) * queries_keys + 4 * (heads + shape.config.num_kv_heads)
    if not recompute:
        return rows * length * kept * shape.layers
    residual = 2 if precision == "16-true" else 4
    return rows * length * (kept + residual * shape.hidden * shape.layers)


@dataclass(frozen=True)
class Memory:
    """Bytes on each device at the peak of a step, without the allocator's waste and the CUDA context."""

    weights: float  # where they are sharded, this device's part
    gathered: float  # what a sharded strategy brings together for the forward, and 16-bit copies of weights
    gradients: float  # with the buckets in which ddp sends them
    optimizer: float  # moments, and the 32-bit weights that DeepSpeed keeps beside 16-bit ones
    activations: float  # with the head's logits

    @property
    def total(self) -> float:
        """All of them."""
        return self.weights + self.gathered + self.gradients + self.optimizer + self.activations


def device_memory(
    config: TransformerConfig,
    strategy: Strategy,
    devices: int,
    rows: int,
    length: int,
    precision: Precision,
    held: int | None = None,
    trained: int | None = None,
    recompute: bool = False,
) -> Memory:
    """Returns the memory of each device in a training step with AdamW.

    Args:
        config: The transformer.
        strategy: `ddp`: everything on each device; `fsdp2`: everything sharded, a block and the next one gathered, and
            embedding and head as long as a step lasts; `zero2` (DeepSpeed): gradients and optimizer state sharded.
        devices: How many.
        rows: Rows of a batch.
        length: Tokens the layers read of each.
        precision: As for `activation_bytes`; DeepSpeed's 16 bits have 32-bit weights beside the optimizer state.
        held: Number of weights, adapters included; the transformer's own when None.
        trained: Number of weights that are trained; all when None.
        recompute: Whether blocks are computed again in the backward pass.
    """
    parameters, shape = count_parameters(config), Shape(config)
    total = parameters.total if held is None else held
    trained = total if trained is None else trained
    width = 2 if precision == "16-true" else 4
    activations = activation_bytes(config, rows, length, precision, recompute) + LOGITS_BYTES
    # Autocast multiplies by 16-bit copies, which autograd keeps: of all blocks, or of the one that is computed again.
    copies = shape.block_matrices * (1 if recompute else shape.layers) * 2 if precision == "16-mixed" else 0
    if strategy == "ddp":
        return Memory(width * total, copies, 2 * width * trained, 2 * width * trained, activations)
    if strategy == "fsdp2":
        around = 0 if devices == 1 else width * (parameters.embedding + parameters.head + 2 * parameters.block)
        weights, gradients = width * total / devices, width * trained / devices
        return Memory(weights, around + copies, gradients, 2 * gradients, activations)
    width, master = (4, 0) if precision == "32" else (2, 4)
    return Memory(width * total, 0, width * trained / devices, (8 + master) * trained / devices, activations)


def step_seconds(flops: float, devices: int, device_flops: float, mfu: float) -> float:
    """Returns the time of a step of `flops` in all on devices that reach a share `mfu` of `device_flops` per second."""
    return flops / (devices * device_flops * mfu)
