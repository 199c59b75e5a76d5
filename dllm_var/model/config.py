"""The shape of the transformer."""

import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from dllm_var.errors import UserError

SIZES = (
    *("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size", "vocab_size"),
    *("num_experts", "experts_per_token", "expert_intermediate_size"),
)
EXPERT_MULTIPLE = 8  # of the sides of experts' matrices, which grouped products of 16-bit numbers ask for
LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def _default(value: Any) -> Any:
    """Returns a field that is None until `resolved` sets it: told apart from one that was set to the same value."""
    return field(default=None, metadata={"default": value})


@dataclass
class TransformerConfig:
    """Shape of the transformer; what the tokenizer decides is filled in from it when training starts.

    A setting that is None was not given: `resolved` sets its default, `model.init_from` that of the checkpoint.

    Args:
        hidden_size: Width of the residual stream; 256 by default.
        num_layers: Number of transformer blocks; 4 by default.
        num_heads: Number of query heads; 4 by default.
        num_kv_heads: Number of key/value heads, fewer than `num_heads` for grouped-query attention; all when None.
        head_dim: Width of one head; `hidden_size // num_heads` when None.
        intermediate_size: Width of the SwiGLU layer; 8/3 of `hidden_size`, rounded up to a multiple of 64, when None.
        rope_theta: Base of the rotary frequencies; 10,000 by default.
        rope_scaling: Factor on `rope_theta`, to read beyond the trained length: see `dllm_var.model.rotary`; 1 by
            default.
        rope_llama3: How Llama 3.1 and later slow their low frequencies down: `factor`, `low_freq_factor`,
            `high_freq_factor` and `original_max_position_embeddings`; not at all when None.
        rope_full_precision: Turns queries and keys in 32 bits also where the model computes in 16, as LLaDA does and
            Llama, Qwen and Dream do not; false by default.
        partial_rotary_factor: Share of each head's dimensions, the first ones, that turn with the position; 1 by
            default.
        norm_eps: Epsilon of every RMSNorm; 1e-6 by default.
        qkv_bias: Adds a bias to the query, key and value projections (Qwen2, Dream).
        qk_norm: Normalises each query and key head (Qwen3).
        num_experts: Number of experts of a layer, each a SwiGLU layer of which a token passes `experts_per_token`; a
            dense model when None.
        experts_per_token: Experts that a router chooses for each token.
        expert_intermediate_size: Width of one expert.
        shared_experts: Width of the SwiGLU layer beside the experts that every token passes, in experts; none by
            default.
        first_dense_layers: Layers from the first on that have no experts; none by default.
        router: Whether scores of experts are a softmax over all of them (the default) or a sigmoid of each.
        router_normalise: Makes the weights of a token's experts sum to 1, before `router_scale`; false by default.
        router_scale: Factor on the weights of experts; 1 by default.
        router_bias: Adds a bias to the scores for the choice of experts alone; gradients do not train it.
        expert_groups: Experts are in that many groups of equal size; 1 by default.
        groups_per_token: Groups from which a token's experts are chosen; 1 by default.
        token_shift: Predicts each token at the position left of it, as causal models do and Dream still does.
        tie_embeddings: Shares the input embedding with the output head.
        initializer_range: Standard deviation of the initial weights; 0.02 by default.
        context_length: Longest context in training, for those who serve the model; not enforced. What the checkpoint or
            the data has when None.
        vocab_size: Number of token ids; taken from the tokenizer when None.
        mask_id: Id of the mask token; taken from the tokenizer when None.
        terminator_ids: Ids that end an answer; taken from the tokenizer when None.
        pad_id: Id that fills unused positions; taken from the tokenizer when None.
        causal: Each position sees only its left; set by the objective.
        causal_context: Of prompt and finished blocks each position sees only its left; set by the objective.
        block_causal: Each position sees its own block and those before it, in blocks of `block_length` tokens that are
            counted from the beginning of the text, prompt included (SDAR, LLaDA2, Fast-dLLM v2); set by the objective.
        block_length: Tokens of such a block.
    """

    hidden_size: int = _default(256)
    num_layers: int = _default(4)
    num_heads: int = _default(4)
    num_kv_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    rope_theta: float = _default(10000.0)
    rope_scaling: float = _default(1.0)
    rope_llama3: dict[str, float] | None = None
    rope_full_precision: bool = _default(False)
    partial_rotary_factor: float = _default(1.0)
    norm_eps: float = _default(1e-6)
    qkv_bias: bool = _default(False)
    qk_norm: bool = _default(False)
    num_experts: int | None = None
    experts_per_token: int | None = None
    expert_intermediate_size: int | None = None
    shared_experts: int = _default(0)
    first_dense_layers: int = _default(0)
    router: Literal["softmax", "sigmoid"] = _default("softmax")
    router_normalise: bool = _default(False)
    router_scale: float = _default(1.0)
    router_bias: bool = _default(False)
    expert_groups: int = _default(1)
    groups_per_token: int = _default(1)
    token_shift: bool = _default(False)
    tie_embeddings: bool = _default(False)
    initializer_range: float = _default(0.02)
    context_length: int | None = None
    vocab_size: int | None = None
    mask_id: int | None = None
    terminator_ids: list[int] | None = None
    pad_id: int | None = None
    causal: bool = False
    causal_context: bool = False
    block_causal: bool = False
    block_length: int | None = None

    @property
    def grid(self) -> int | None:
        """Length of the blocks of a block-causal model; None for others."""
        return self.block_length if self.block_causal else None

    def resolved(self) -> "TransformerConfig":
        """Returns a copy with the defaults and derived sizes filled in; raises UserError when sizes do not fit."""
        left_out = [each for each in fields(self) if "default" in each.metadata and getattr(self, each.name) is None]
        filled = replace(self, **{each.name: each.metadata["default"] for each in left_out})
        for name in SIZES:
            if (size := getattr(filled, name)) is not None and size < 1:
                raise UserError(f"transformer.{name} must be at least 1, got {size}")
        hidden_size, num_heads, head_dim = filled.hidden_size, filled.num_heads, filled.head_dim
        if head_dim is None:
            if hidden_size % num_heads:
                raise UserError(
                    f"transformer.hidden_size {hidden_size} is not a multiple of num_heads {num_heads}: "
                    "change one of them or set head_dim"
                )
            head_dim = hidden_size // num_heads
        if head_dim % 2:
            raise UserError(f"transformer.head_dim {head_dim} must be even for rotary positions")
        turned = filled.partial_rotary_factor * head_dim
        if not 0 < turned <= head_dim or turned % 2:
            raise UserError(
                f"transformer.partial_rotary_factor {filled.partial_rotary_factor} must make an even number of the "
                f"{head_dim} dimensions of a head turn"
            )
        for name in ("rope_theta", "rope_scaling", "norm_eps", "router_scale"):
            if not 0 < getattr(filled, name) < math.inf:
                raise UserError(f"transformer.{name} must be a number above 0, got {getattr(filled, name)}")
        llama3 = dict.fromkeys(LLAMA3_KEYS, 1.0) if filled.rope_llama3 is None else filled.rope_llama3
        if set(llama3) != set(LLAMA3_KEYS) or not all(0 < value < math.inf for value in llama3.values()):
            raise UserError(f"transformer.rope_llama3 needs {', '.join(LLAMA3_KEYS)}, all above 0; it is {llama3}")
        for token in (filled.mask_id, *(filled.terminator_ids or [])):
            if token is not None and filled.vocab_size is not None and not 0 <= token < filled.vocab_size:
                raise UserError(f"mask or terminator has id {token}, outside the vocabulary of {filled.vocab_size}")
        _check_experts(filled)
        if filled.block_causal and (filled.block_length or 0) < 1:
            raise UserError(f"transformer.block_causal needs block_length of at least 1, got {filled.block_length}")
        if filled.block_causal and (filled.causal or filled.causal_context):
            raise UserError("transformer.block_causal does not go with causal or causal_context: set one of them")
        num_kv_heads = filled.num_kv_heads or num_heads
        if num_heads % num_kv_heads:
            raise UserError(f"transformer.num_heads {num_heads} must be a multiple of num_kv_heads {num_kv_heads}")
        return replace(
            filled,
            head_dim=head_dim,
            num_kv_heads=num_kv_heads,
            intermediate_size=filled.intermediate_size or 64 * math.ceil(hidden_size * 8 / 3 / 64),
            terminator_ids=None if filled.terminator_ids is None else [int(token) for token in filled.terminator_ids],
        )

    @property
    def rotary_dim(self) -> int:
        """Number of dimensions of a head that turn with the position."""
        assert self.head_dim is not None
        return int(self.partial_rotary_factor * self.head_dim)

    def has_experts(self, layer: int) -> bool:
        """Whether the layer of that number has experts."""
        return self.num_experts is not None and layer >= self.first_dense_layers

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain types, for checkpoints and JSON."""
        return asdict(self)


def _check_experts(config: TransformerConfig) -> None:
    """Raises UserError when the settings of experts contradict each other."""
    needed = ("experts_per_token", "expert_intermediate_size")
    if config.num_experts is None:
        given = [name for name in (*needed, "shared_experts", "first_dense_layers") if getattr(config, name)]
        if given:
            raise UserError(f"transformer.{given[0]} needs transformer.num_experts")
        return
    missing = [name for name in needed if getattr(config, name) is None]
    if missing:
        raise UserError(f"transformer.num_experts needs transformer.{missing[0]}")
    for name in ("hidden_size", "expert_intermediate_size"):
        if getattr(config, name) % EXPERT_MULTIPLE:
            raise UserError(f"transformer.{name} {getattr(config, name)} must be a multiple of {EXPERT_MULTIPLE}")
    for name, least in (("shared_experts", 0), ("first_dense_layers", 0), ("groups_per_token", 1)):
        if getattr(config, name) < least:
            raise UserError(f"transformer.{name} must be at least {least}, got {getattr(config, name)}")
    experts, groups, chosen = config.num_experts, config.expert_groups, config.groups_per_token
    if groups < chosen or experts % groups or (groups > 1 and experts < 2 * groups):
        raise UserError(
            f"transformer.num_experts {experts} must be a multiple of expert_groups {groups}, with two experts or more "
            f"in a group and groups_per_token at most expert_groups, got {chosen}"
        )
    if config.experts_per_token > experts // groups * chosen:  # type: ignore[operator]
        raise UserError(
            f"transformer.experts_per_token {config.experts_per_token} is more than the {experts // groups * chosen} "
            "experts that a token may choose from"
        )
