"""A Llama-family transformer that reads in both directions, or causally for the autoregressive twin."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dllm_var.errors import UserError
from dllm_var.model.attention import AttentionRule, Documents, Seen, attend, block_causal_rule
from dllm_var.model.attention_kernels import kernels_for
from dllm_var.model.config import TransformerConfig
from dllm_var.model.context_parallel import RowPart
from dllm_var.model.experts import ExpertLayer, Experts, Router
from dllm_var.model.feed_forward import SwiGLU
from dllm_var.model.initialise import initialise
from dllm_var.model.kv_cache import KVCache
from dllm_var.model.matrices import Fused, autocast_dtype, by_columns, project, usable
from dllm_var.model.quantised import QuantisedLinear
from dllm_var.model.rotary import RotaryTable, rotate

Recompute = Literal["none", "full", "selective"]

# What selective recomputation keeps, by parts of the operators' names: results of matrix products and attention, which
# are what a forward costs. Norms, rotations and activations are cheap, and most of what would be kept.
EXPENSIVE = ("mm.default", "attention", "attn")


def in_matrices(module: nn.Module) -> int:
    """Returns the number of weights of a module's matrices, adapters included, by which one token is multiplied."""
    chosen = sum(part.active_parameters for part in module.modules() if isinstance(part, Experts))
    routers = sum(part.weight.numel() for part in module.modules() if isinstance(part, Router))
    matrices = (part for part in module.modules() if isinstance(part, nn.Linear))
    return chosen + routers + sum(matrix.in_features * matrix.out_features for matrix in matrices)


def left_neighbours(input_ids: Tensor, segment_ids: Tensor | None) -> Tensor:
    """Returns each token's left neighbour [B, L], counted through the flattened batch; a segment's first has itself."""
    own = torch.arange(input_ids.numel(), device=input_ids.device).view(input_ids.shape)
    first = torch.ones_like(own, dtype=torch.bool)
    first[:, 1:] = False if segment_ids is None else segment_ids[:, 1:] != segment_ids[:, :-1]
    return torch.where(first, own, own - 1)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        assert config.num_kv_heads is not None and config.head_dim is not None
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        hidden, heads, kv_heads = config.hidden_size, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(hidden, heads, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden, kv_heads, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden, kv_heads, bias=config.qkv_bias)
        self.o_proj = nn.Linear(heads, hidden, bias=False)
        self.rope_full_precision = config.rope_full_precision
        self.q_norm = nn.RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.fused: Fused | None = None

    def forward(self, x: Tensor, context: "LayerContext", layer: int) -> Tensor:
        x, on_masks = x.to(autocast_dtype(x)), context.on_masks
        if (fused := usable(self.fused, self.q_proj, self.k_proj, self.v_proj)) is not None:
            queries_keys, values = fused(x, on_masks).split(
                (self.q_proj.out_features + self.k_proj.out_features, self.v_proj.out_features), dim=-1
            )
        else:
            queries_keys = torch.cat((project(self.q_proj, x, on_masks), project(self.k_proj, x, on_masks)), dim=-1)
            values = project(self.v_proj, x, on_masks)
        queries_keys, values = (part.unflatten(-1, (-1, self.head_dim)) for part in (queries_keys, values))
        heads = (self.num_heads, self.num_kv_heads)
        if self.q_norm is not None and self.k_norm is not None:
            queries, keys = queries_keys.split(heads, dim=2)
            queries_keys = torch.cat((self.q_norm(queries), self.k_norm(keys)), dim=2)
        queries, keys = rotate(queries_keys, context.cos, context.sin, self.rope_full_precision).split(heads, dim=2)
        cache = context.cache
        if cache is not None:
            queries, (keys, values) = cache.pad(queries), cache.write(layer, keys, values)
        if context.part is not None:
            queries, keys, values = context.part.to_heads(queries, keys, values)
        mixed = attend(queries, keys, values, context.seen)
        mixed = (mixed if context.part is None else context.part.to_positions(mixed)).flatten(2)
        mixed = context.asked_of(mixed) if cache is None else cache.pack(mixed)
        return project(self.o_proj, mixed, context.on_asked_masks)


@dataclass
class LayerContext:
    """What the layers of one forward share: rotary angles, what each token sees, and the cache.

    `on_masks` [B, L, 1] says which tokens are masks, in a model with adapters that act on them only. The last layer has
    a context of its own when only some positions are `asked` for. With a `part`, the layers read only that of each row.
    """

    cos: Tensor
    sin: Tensor
    seen: Seen
    cache: KVCache | None = None
    asked: Tensor | None = None
    on_masks: Tensor | None = None
    part: RowPart | None = None

    @property
    def on_asked_masks(self) -> Tensor | None:
        """Which of the positions that are asked for are masks."""
        return None if self.on_masks is None else self.asked_of(self.on_masks)

    def asked_of(self, x: Tensor) -> Tensor:
        """Returns [M, hidden] at the positions that are asked for, all of `x` [B, L, hidden] when all are."""
        return x if self.asked is None else x.flatten(0, 1).index_select(0, self.asked)


def kept_in_memory(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Returns whether selective recomputation keeps the results of an operator."""
    expensive = any(part in str(operator) for part in EXPENSIVE)
    return CheckpointPolicy.MUST_SAVE if expensive else CheckpointPolicy.PREFER_RECOMPUTE


class Layer(nn.Module):
    """One pre-norm transformer layer, the one of that number; it has experts where the config says so."""

    def __init__(self, config: TransformerConfig, number: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        dense, inner = not config.has_experts(number), config.intermediate_size or 0
        self.mlp: nn.Module = SwiGLU(config.hidden_size, inner) if dense else ExpertLayer(config)
        self.recompute: Recompute = "none"

    def forward(self, x: Tensor, context: LayerContext, layer: int) -> Tensor:
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self._compute(x, context, layer)
        how: dict[str, Any] = {}
        if self.recompute == "selective":
            how["context_fn"] = partial(create_selective_checkpoint_contexts, kept_in_memory)
        return checkpoint(self._compute, x, context, layer, use_reentrant=False, **how)

    def _compute(self, x: Tensor, context: LayerContext, layer: int) -> Tensor:
        x = context.asked_of(x) + self.self_attn(self.input_layernorm(x), context, layer)
        return x + self.mlp(self.post_attention_layernorm(x), context.on_asked_masks)


class Decoder(nn.Module):
    """Everything below the output head; it stands apart so that weights have the names that transformers gives them."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        assert config.vocab_size is not None
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, number) for number in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_eps)


class Transformer(nn.Module):
    """Token ids [B, L] to logits [B, L, V]; with a cache, the ids are each row's next tokens.

    Raises UserError when `config.vocab_size` is missing or the sizes do not fit each other.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config = config.resolved()
        if config.vocab_size is None:
            raise UserError("transformer.vocab_size is not set: it comes from the tokenizer, or set it yourself")
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rotary = RotaryTable(config)
        self.compiled = self.adapts_masks = False
        self.not_finite: Tensor | None = None  # NaN when a logit of the last decoding was NaN or infinite, else 0
        self.tie_weights()
        if not self.embedding.weight.is_meta:
            self.reset_parameters()

    @property
    def embedding(self) -> nn.Embedding:
        """The input embedding."""
        return self.model.embed_tokens

    @property
    def layers(self) -> nn.ModuleList:
        """The layers, from the input to the output."""
        return self.model.layers

    def tie_weights(self) -> None:
        """Makes the head share the embedding when the config says so (again after materialising from meta)."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.embedding.weight

    def fuse_projections(self) -> None:
        """Lays out the weights for decoding: without gradients, q, k and v are one product, gate and up another.

        Quantised ones stay as they are: they are turned into numbers a part at a time.
        """
        if any(isinstance(module, QuantisedLinear) for module in self.layers.modules()):
            return
        parts: Iterable[Any] = self.layers.modules()
        for part in parts:
            if isinstance(part, Attention):
                part.fused, last = Fused(part.q_proj, part.k_proj, part.v_proj), part.o_proj
            elif isinstance(part, SwiGLU):
                part.fused, last = Fused(part.gate_proj, part.up_proj), part.down_proj
            else:
                continue
            weight = getattr(last, "base_layer", last).weight
            weight.data = by_columns(weight.data)

    def train(self, mode: bool = True) -> "Transformer":
        """Sets the mode; for training every weight gets memory of its own again, as fused optimizers need it."""
        parts: Iterable[Any] = self.modules() if mode else ()
        for part in parts:
            if getattr(part, "fused", None) is not None:
                part.fused = None
                for weight in part.parameters():
                    weight.data = weight.data.contiguous()
        return super().train(mode)

    def compile_layers(self) -> None:
        """Compiles the layers with torch.compile: one compilation serves all, and the state dict's keys stay."""
        self.compiled = True
        # Layers of all models share one cache: with and without gradients, a mask, positions that are asked for.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        for layer in self.layers:
            layer.compile()

    def recompute_activations(self, policy: Recompute) -> None:
        """Chooses what the backward pass computes again: `full` layers, or with `selective` all but `EXPENSIVE`."""
        for layer in self.layers:
            layer.recompute = policy  # type: ignore[assignment]

    def scale_rope(self, scaling: float) -> None:
        """Reads beyond the trained length from now on: multiplies the trained `rope_theta` by `scaling` (1 undoes it).

        LongLLaDA (arXiv 2506.14429, section 4): no training, one factor; `dllm_var.model.rotary` computes it. It is
        saved with the model as `rope_scaling`. Raises UserError when it is not above 0.
        """
        self.config = config = replace(self.config, rope_scaling=float(scaling)).resolved()
        self.rotary = RotaryTable(config)

    def reset_parameters(self) -> None:
        """Draws every weight anew, from the seed that torch was given and each weight's name."""
        initialise(self, self.config, torch.initial_seed())

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Returns logits [B, L, V]; see `hidden_states` for the arguments."""
        return self.lm_head(self.hidden_states(input_ids, position_ids, segment_ids, cache))

    def hidden_states(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        cache: KVCache | None = None,
        attention_rule: AttentionRule | None = None,
        documents: Documents | None = None,
        asked: Tensor | None = None,
        shift: bool = True,
        part: RowPart | None = None,
    ) -> Tensor:
        """Returns the normalised last hidden states [B, L, hidden], so that the head may run on a few of them.

        The head on position i predicts token i, or token i + 1 in a causal model. A model with `token_shift` is trained
        to predict token i at position i - 1: its hidden states are moved right by one, so that position i has what the
        layers made of i - 1, and the first position of a segment keeps its own.

        Args:
            input_ids: Token ids [B, L].
            position_ids: Rotary positions [B, L], below L; 0, 1, ... when None. Not used with a cache.
            segment_ids: Document of each token [B, L]; a token sees only its own document. Everything when None.
            cache: Keys and values of earlier tokens, opened for this forward with `cache.open`; gets this forward's.
            attention_rule: Which token sees which; not with a cache. `segment_ids` then only say where the token shift
                begins anew.
            documents: Those of `segment_ids`, when they were found on the host, so that a GPU need not be waited for.
            asked: Positions to return [M], counted through the flattened batch, when not all are: only those
                [M, hidden] are computed after the last layer's attention. Not with a cache.
            shift: False leaves the hidden states where they are, although the model has `token_shift`: for rows whose
                order is not that of the text, as in block diffusion, whose targets are moved instead.
            part: The part of each row that this process computes, when others compute the rest. `asked`, which it then
                needs, are positions whose hidden states come from that part. All arguments are of whole rows.
        """
        rows, length = input_ids.shape
        causal = self.config.causal
        moved = self.config.token_shift and not causal and shift
        returned = asked
        if cache is not None:
            assert segment_ids is None and asked is None, "a cache holds one document per row, and all its positions"
            positions, reach, seen = cache.pack(cache.positions), cache.reach, Seen(cache.mask(causal))
            input_ids = cache.pack(input_ids)
        else:
            if position_ids is None:
                position_ids = torch.arange(length, device=input_ids.device).unsqueeze(0)
            positions, reach = position_ids, length
            if self.config.grid is not None and attention_rule is None:
                attention_rule = block_causal_rule(input_ids, self.config.grid, position_ids, segment_ids)
            seen = self._seen(length, causal, segment_ids, attention_rule, documents, 1 if part is None else part.ranks)
            if moved:
                left = left_neighbours(input_ids, segment_ids).flatten()
                asked = left if asked is None else left[asked]
            if part is not None:
                assert asked is not None, "a part of the rows has no hidden states of the whole"
                input_ids, positions, asked = input_ids[:, part.columns], positions[:, part.columns], part.place(asked)
        if self.compiled:  # other numbers at each step must not compile the layer again
            for counted in (asked, None if seen.documents is None else seen.documents.ends):
                if counted is not None:
                    torch._dynamo.maybe_mark_dynamic(counted, 0)
        on_masks = None
        if self.adapts_masks:
            on_masks = input_ids.eq(self.config.mask_id).unsqueeze(-1)  # type: ignore[arg-type]
        context = LayerContext(*self.rotary(positions, reach), seen, cache, on_masks=on_masks, part=part)
        x = self.embedding(input_ids)
        for number, layer in enumerate(self.layers):
            if asked is not None and number == self.config.num_layers - 1:
                context = replace(context, asked=asked)
            x = layer(x, context, number if cache is not None else 0)  # one number, or each layer is compiled anew
        x = self.model.norm(x)
        if cache is not None:
            x = cache.pad(x)
            return cache.shift(x) if moved else x
        return x.view(rows, length, -1) if moved and returned is None else x

    def _seen(
        self,
        length: int,
        causal: bool,
        segment_ids: Tensor | None,
        rule: AttentionRule | None,
        documents: Documents | None,
        ranks: int,
    ) -> Seen:
        """Returns what tokens see in a forward of rows of this length without a cache; `ranks` share the heads."""
        if rule is not None:
            return Seen.by_rule(rule)
        assert self.config.head_dim is not None
        weight, dtype = self.embedding.weight, autocast_dtype(self.embedding.weight)
        if segment_ids is None:
            kernels = None
            if weight.is_cuda and dtype.itemsize == 2 and torch.is_grad_enabled():
                attention: Any = self.layers[0].self_attn
                kv_heads = attention.num_kv_heads // math.gcd(ranks, attention.num_kv_heads)
                sizes = (length, attention.num_heads // ranks, kv_heads, self.config.head_dim)
                kernels = kernels_for(sizes, causal, dtype, weight.device)
            return Seen(is_causal=causal, kernels=kernels)
        return Seen.by_document(segment_ids, causal, dtype, self.config.head_dim, documents)

    def new_cache(self, rows: int, capacity: int) -> KVCache:
        """Returns an empty cache for this process's heads, of `capacity` tokens per row, windows included."""
        weight, heads = self.embedding.weight, self.layers[0].self_attn.num_kv_heads  # type: ignore[union-attr]
        return KVCache(self.config, rows, capacity, weight.device, weight.dtype, num_kv_heads=heads)  # type: ignore[arg-type]

    @property
    def num_parameters(self) -> int:
        """Number of distinct weights; of a quantised matrix as many as it stands for."""
        stored = [module for module in self.modules() if isinstance(module, QuantisedLinear)]
        more = sum(one.in_features * one.out_features - one.weight.numel() - one.scale.numel() for one in stored)
        return sum(parameter.numel() for parameter in self.parameters()) + more

    @property
    def active_parameters(self) -> int:
        """Number of weights that one token passes: of the experts, only those that are chosen for it."""
        stacks = [part for part in self.modules() if isinstance(part, Experts)]
        return self.num_parameters - sum(stack.num_parameters - stack.active_parameters for stack in stacks)

    def flops_per_token(self, context_length: int, head_share: float = 1.0) -> float:
        """Returns forward plus backward FLOPs per token: 6 per matrix weight and 12 L d per layer of attention.

        Of experts, those count that are chosen for a token. Each token attends to `context_length` others. The output
        head, and what comes after the last layer's attention, run on the share `head_share` of the tokens.
        """
        config = self.config
        assert config.head_dim is not None
        last: Any = self.layers[-1]
        after_attention = in_matrices(last.self_attn.o_proj) + in_matrices(last.mlp)
        in_layers = in_matrices(self.layers) - after_attention * (1 - head_share)
        head = self.lm_head.weight.numel() * head_share
        attention = config.num_layers * 12 * context_length * config.num_heads * config.head_dim
        return 6 * (in_layers + head) + attention / (2 if config.causal else 1)
