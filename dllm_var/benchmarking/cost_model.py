"""What training costs, before any of it is run: parameters, FLOPs, bytes on each device, seconds per step.

Closed forms of our transformer, held to the real one by tests: parameters to its own, FLOPs to torch's counter,
activations to what autograd keeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dllm_var.model.config import TransformerConfig

Strategy = Literal["ddp", "fsdp2", "zero2"]
Precision = Literal["32", "16-mixed", "16-true"]
STRATEGIES: tuple[Strategy, ...] = ("ddp", "fsdp2", "zero2")
LOGITS_BYTES = 2 * 512 * 2**20  # of the head on CUDA, a chunk at a time: logits in 32 bits, and their gradient


@dataclass(frozen=True)
class Parameters:
    """Numbers of weights.

    Args:
        embedding: Of the input embedding.
        block: Of one block.
        blocks: Of all blocks.
        head: Of the output head; 0 when it is the embedding.
        norm: Of the last normalisation.
    """

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
    """Returns the numbers of weights of a transformer whose `vocab_size` is set."""
    config = config.resolved()
    assert config.vocab_size is not None and config.head_dim is not None and config.num_kv_heads is not None
    qkv = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    vectors = 2 * config.hidden_size + qkv * config.qkv_bias + 2 * config.head_dim * config.qk_norm
    block = block_matrices(config) + vectors
    embedding = config.vocab_size * config.hidden_size
    return Parameters(
        embedding, block, config.num_layers * block, 0 if config.tie_embeddings else embedding, config.hidden_size
    )


def block_matrices(config: TransformerConfig) -> int:
    """Returns the number of weights in the matrices of one block."""
    config = config.resolved()
    assert config.head_dim is not None and config.num_kv_heads is not None and config.intermediate_size is not None
    qkv = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    out = config.num_heads * config.head_dim
    return config.hidden_size * (qkv + out + 3 * config.intermediate_size)


def adapter_parameters(config: TransformerConfig, rank: int, targets: list[str]) -> int:
    """Returns the number of weights of low-rank adapters (`model.lora`): rank x (inputs + outputs) of each matrix."""
    config = config.resolved()
    assert config.head_dim is not None and config.num_kv_heads is not None and config.intermediate_size is not None
    assert config.vocab_size is not None
    hidden, heads = config.hidden_size, config.num_heads * config.head_dim
    sizes = {
        "qkv": hidden + heads + 2 * config.num_kv_heads * config.head_dim,
        "out": heads + hidden,
        "gate_up": hidden + 2 * config.intermediate_size,
        "down": config.intermediate_size + hidden,
    }
    in_blocks = sum(sizes[target] for target in targets if target in sizes) * config.num_layers
    return rank * (in_blocks + (hidden + config.vocab_size) * ("lm_head" in targets))


def forward_flops(config: TransformerConfig, length: int, scored: int) -> float:
    """Returns the FLOPs of one row's forward: 2 per weight and token, and 4 per pair of tokens and head entry.

    Args:
        config: The transformer; a causal one attends to half of the pairs.
        length: Tokens the layers read.
        scored: Positions on which the head runs, and what comes after the last layer's attention.
    """
    config = config.resolved()
    assert config.head_dim is not None and config.vocab_size is not None and config.intermediate_size is not None
    pairs = length * length / (2 if config.causal else 1)
    attention = 4 * pairs * config.num_heads * config.head_dim
    matrices = 2 * length * block_matrices(config)
    after_attention = config.hidden_size * (config.num_heads * config.head_dim + 3 * config.intermediate_size)
    at_the_end = 2 * scored * config.vocab_size * config.hidden_size - 2 * (length - scored) * after_attention
    return config.num_layers * (matrices + attention) + at_the_end


def training_flops(config: TransformerConfig, length: int, scored: int, trained_share: float = 1.0) -> float:
    """Returns the FLOPs of one row's forward and backward; recomputed activations are not counted, as in MFU.

    Args:
        config: The transformer.
        length: Tokens the layers read.
        scored: As for `forward_flops`.
        trained_share: Share of the weights that get gradients: the others pass them on, which is half of backward.
    """
    return forward_flops(config, length, scored) * (2 + trained_share)


def activation_bytes(
    config: TransformerConfig, rows: int, length: int, precision: Precision, recompute: bool = False
) -> float:
    """Returns what autograd keeps of the blocks between forward and backward, attention's own matrix never.

    Args:
        config: The transformer.
        rows: Rows of a batch.
        length: Tokens the layers read of each.
        precision: 32 bits, 16 with weights and residual stream in 32 (autocast), or all in 16.
        recompute: Keeps the input of each block only, and all of one block at a time.
    """
    config = config.resolved()
    assert config.head_dim is not None and config.num_kv_heads is not None and config.intermediate_size is not None
    width = 4 if precision == "32" else 2
    queries_keys = (config.num_heads + config.num_kv_heads) * config.head_dim
    kept = width * (3 * queries_keys + 4 * config.intermediate_size + 2 * config.hidden_size)
    kept += 4 * config.num_heads  # the logarithms of attention's sums
    kept += 16 * config.hidden_size + 8  # norms: the input and the normalised one, in 32 bits
    if config.qk_norm:
        kept += (4 if width == 4 else 8) * queries_keys + 4 * (config.num_heads + config.num_kv_heads)
    tokens = rows * length
    if not recompute:
        return tokens * kept * config.num_layers
    residual = 2 if precision == "16-true" else 4
    return tokens * (kept + residual * config.hidden_size * config.num_layers)


@dataclass(frozen=True)
class Memory:
    """Bytes on each device at the peak of a step, without the allocator's waste and the CUDA context.

    Args:
        weights: Parameters, where sharded this device's part.
        gathered: Parameters that a sharded strategy brings together for the forward, and 16-bit copies of weights.
        gradients: Gradients, and the buckets in which ddp sends them.
        optimizer: Moments, and the 32-bit weights that DeepSpeed keeps beside 16-bit ones.
        activations: What autograd keeps, and the head's logits.
    """

    weights: float
    gathered: float
    gradients: float
    optimizer: float
    activations: float

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
    """Returns what a training step with AdamW needs on each device.

    Args:
        config: The transformer.
        strategy: `ddp`: everything on each device; `fsdp2`: everything sharded, a block and the next one gathered, and
            embedding and head as long as a step lasts; `zero2` (DeepSpeed): gradients and optimizer state sharded.
        devices: How many.
        rows: Rows of a batch.
        length: Tokens the layers read of each.
        precision: As for `activation_bytes`; DeepSpeed's 16 bits have 32-bit weights beside the optimizer state.
        held: Number of weights, adapters included; the transformer's own when null.
        trained: Number of weights that are trained; all when null.
        recompute: Whether blocks are computed again in the backward pass.
    """
    parameters = count_parameters(config)
    total = parameters.total if held is None else held
    trained = total if trained is None else trained
    width = 2 if precision == "16-true" else 4
    activations = activation_bytes(config, rows, length, precision, recompute) + LOGITS_BYTES
    # Autocast multiplies by 16-bit copies, which autograd keeps: of all blocks, or of the one that is computed again.
    copies = block_matrices(config) * (1 if recompute else config.num_layers) * 2 if precision == "16-mixed" else 0
    if strategy == "ddp":
        return Memory(width * total, copies, 2 * width * trained, 2 * width * trained, activations)
    if strategy == "fsdp2":
        around = 0 if devices == 1 else width * (parameters.embedding + parameters.head + 2 * parameters.block)
        shares = (width * total / devices, width * trained / devices, 2 * width * trained / devices)
        return Memory(shares[0], around + copies, shares[1], shares[2], activations)
    width = 4 if precision == "32" else 2
    master = 0 if precision == "32" else 4
    return Memory(width * total, 0, width * trained / devices, (8 + master) * trained / devices, activations)


def step_seconds(flops: float, devices: int, device_flops: float, mfu: float) -> float:
    """Returns the time of a step of `flops` in all on devices that reach a share `mfu` of `device_flops` per second."""
    return flops / (devices * device_flops * mfu)
