"""A Llama-family transformer that reads in both directions, or causally for the autoregressive twin."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement

from dllm_var.errors import UserError
from dllm_var.model.attention import attend, causal_mask, segment_mask
from dllm_var.model.config import TransformerConfig
from dllm_var.model.documents import Documents, attend_documents, find_documents
from dllm_var.model.initialise import initialise
from dllm_var.model.kv_cache import KVCache
from dllm_var.model.recompute import Recompute, recomputed
from dllm_var.model.rotary import RotaryTable, rotate


def moved_right(hidden: Tensor, segment_ids: Tensor | None) -> Tensor:
    """Gives each position of `hidden` [B, L, hidden] its left neighbour's; the first of a segment keeps its own."""
    left = torch.cat((hidden[:, :1], hidden[:, :-1]), dim=1)
    if segment_ids is None:
        return left
    inside = segment_ids == torch.cat((segment_ids[:, :1], segment_ids[:, :-1]), dim=1)
    return torch.where(inside.unsqueeze(2), left, hidden)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a learned scale (1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.gradient: list[Placement] | None = None  # how it is placed under tensor parallelism; as the weight is

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.weight
        if isinstance(weight, DTensor):
            weight = weight.to_local(grad_placements=self.gradient)
        return F.rms_norm(x, weight.shape, weight, self.eps)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions; queries, keys and values come from one projection."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        assert config.num_kv_heads is not None and config.head_dim is not None
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.qkv = nn.Linear(
            config.hidden_size, (self.num_heads + 2 * self.num_kv_heads) * self.head_dim, bias=config.qkv_bias
        )
        self.out = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=False)
        self.rope_full_precision = config.rope_full_precision
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, context: LayerContext, layer: int) -> Tensor:
        batch, length, _ = x.shape
        qkv = self.qkv(x).view(batch, length, -1, self.head_dim)
        queries_keys, values = qkv.split((self.num_heads + self.num_kv_heads, self.num_kv_heads), dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            queries, keys = queries_keys.split((self.num_heads, self.num_kv_heads), dim=2)
            queries_keys = torch.cat((self.q_norm(queries), self.k_norm(keys)), dim=2)
        queries_keys = rotate(queries_keys, context.cos, context.sin, self.rope_full_precision)
        queries, keys = queries_keys.split((self.num_heads, self.num_kv_heads), dim=2)
        if context.documents is not None:
            return self.out(context.asked_of(attend_documents(queries, keys, values, context.documents).flatten(2)))
        cache = context.cache
        if cache is None:
            keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        else:
            queries, (keys, values) = cache.pad(queries), cache.write(layer, keys, values)
        # queries [B, heads, L, D]; keys and values [B, kv_heads, reach, D]
        mixed = attend(queries.transpose(1, 2), keys, values, context.mask, context.is_causal)
        mixed = mixed.transpose(1, 2).flatten(2)
        return self.out(context.asked_of(mixed) if cache is None else cache.pack(mixed))


class SwiGLU(nn.Module):
    """The gated feed-forward layer of Llama (2002.05202), gate and up in one projection."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        assert config.intermediate_size is not None
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


@dataclass
class LayerContext:
    """What the layers of one forward share: rotary angles, attention mask or where documents lie, and cache.

    The last layer has one of its own when only some positions are `asked` for.
    """

    cos: Tensor
    sin: Tensor
    mask: Tensor | None
    is_causal: bool
    cache: KVCache | None
    documents: Documents | None = None
    asked: Tensor | None = None

    def asked_of(self, x: Tensor) -> Tensor:
        """Returns [M, hidden] at the positions that are asked for, all of `x` [B, L, hidden] when all are."""
        return x if self.asked is None else x.flatten(0, 1).index_select(0, self.asked)


class Block(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLU(config)
        self.recompute: Recompute = "none"

    def forward(self, x: Tensor, context: LayerContext, layer: int) -> Tensor:
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self._layers(x, context, layer)
        return recomputed(self.recompute, self._layers, x, context, layer)

    def _layers(self, x: Tensor, context: LayerContext, layer: int) -> Tensor:
        x = context.asked_of(x) + self.attention(self.attention_norm(x), context, layer)
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """Token ids [B, L] to logits [B, L, V]; with a cache, the ids are each row's next tokens.

    Args:
        config: The shape; `vocab_size` must be set.

    Raises:
        UserError: When `config.vocab_size` is missing or the sizes do not fit each other.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise UserError("transformer.vocab_size is not set: it comes from the tokenizer, or set it yourself")
        self.config = config = config.resolved()
        assert config.vocab_size is not None and config.head_dim is not None
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rotary = RotaryTable(config.head_dim, config.rope_theta * config.rope_scaling, config.rope_llama3)
        self.compiled = False
        self.tie_weights()
        if not self.embedding.weight.is_meta:
            self.reset_parameters()

    def tie_weights(self) -> None:
        """Makes the head share the embedding when the config says so (again after materialising from meta)."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.embedding.weight

    def compile_blocks(self) -> None:
        """Compiles the layers with torch.compile: one compilation serves all, and the state dict's keys stay."""
        self.compiled = True
        # Layers of all models share one cache: with and without gradients, a mask, positions that are asked for.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        for block in self.blocks:
            block.compile()

    def recompute_activations(self, policy: Recompute) -> None:
        """Chooses what the backward pass computes again instead of keeping it; see `dllm_var.model.recompute`."""
        for block in self.blocks:
            block.recompute = policy  # type: ignore[assignment]

    def scale_rope(self, scaling: float) -> None:
        """Reads beyond the trained length from now on: multiplies the trained `rope_theta` by `scaling` (1 undoes it).

        LongLLaDA (arXiv 2506.14429, section 4): no training, one factor; `dllm_var.model.rope_scaling` computes it.

        Args:
            scaling: The factor, lambda in the paper; saved with the model as `rope_scaling`.

        Raises:
            UserError: When it is not above 0.
        """
        self.config = config = replace(self.config, rope_scaling=float(scaling)).resolved()
        assert config.head_dim is not None
        self.rotary = RotaryTable(config.head_dim, config.rope_theta * config.rope_scaling, config.rope_llama3)

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
        attention_mask: Tensor | None = None,
        asked: Tensor | None = None,
        document_ends: Tensor | None = None,
        shift: bool = True,
    ) -> Tensor:
        """Returns the normalised last hidden states [B, L, hidden], so that the head may run on a few of them.

        When it is known which, only those [M, hidden] are computed: no other position needs what comes after the last
        layer's attention.

        The head on position i predicts token i, or token i + 1 in a causal model. With `token_shift`, the hidden states
        are moved right by one for that: position i has what the layers made of i - 1.

        Args:
            input_ids: Token ids [B, L].
            position_ids: Rotary positions [B, L], below L; 0, 1, ... when null. Not used with a cache.
            segment_ids: Document of each token [B, L]; a token sees only its own document. Everything when null.
            cache: Keys and values of earlier tokens, opened for this forward with `cache.open`; gets this forward's.
            attention_mask: Which token sees which [B, L, L], bool; not with a cache. `segment_ids` then only say where
                the token shift begins anew.
            asked: Positions to return [M], counted through the flattened batch; all when null. Not with a cache.
            document_ends: What `dllm_var.model.documents.document_ends` finds in `segment_ids`, where it is known.
            shift: False leaves the hidden states where they are, although the model has `token_shift`: for rows whose
                order is not that of the text, as in block diffusion, whose targets are moved instead.
        """
        length = input_ids.size(1)
        causal, head_dim = self.config.causal, self.config.head_dim
        assert head_dim is not None
        mask, documents = None, None
        if cache is not None:
            assert segment_ids is None and asked is None, "a cache holds one document per row, and all its positions"
            positions, mask, reach = cache.pack(cache.positions), cache.mask(causal), cache.reach
            input_ids = cache.pack(input_ids)
            context_causal = False
        else:
            if position_ids is None:
                position_ids = torch.arange(length, device=input_ids.device).unsqueeze(0)
            positions, reach = position_ids, length
            if attention_mask is not None:
                mask = attention_mask.unsqueeze(1)
            elif segment_ids is not None:
                documents = find_documents(segment_ids, self._attention_dtype(), causal, head_dim, document_ends)
                mask = None if documents is not None else segment_mask(segment_ids)
            if causal and mask is not None:
                mask = mask & causal_mask(length, input_ids.device)
            context_causal = causal and mask is None
        cos, sin = self.rotary(positions, reach)
        moved = self.config.token_shift and not causal and shift
        if asked is not None and moved:  # they get what is made of the positions left of them
            everywhere = torch.arange(input_ids.numel(), device=input_ids.device).view(*input_ids.shape, 1)
            asked = moved_right(everywhere, segment_ids).flatten()[asked]
        if asked is not None and self.compiled:  # another number at each step must not compile the layer again
            torch._dynamo.maybe_mark_dynamic(asked, 0)
        context = LayerContext(cos, sin, mask, context_causal, cache, documents)
        x = self.embedding(input_ids)
        for layer, block in enumerate(self.blocks):
            if asked is not None and layer == self.config.num_layers - 1:
                context = replace(context, asked=asked)
            x = block(x, context, layer if cache is not None else 0)  # one number, or each layer is compiled anew
        x = self.norm(x)
        if cache is not None:
            x = cache.pad(x)
            return cache.shift(x) if moved else x
        return moved_right(x, segment_ids) if moved and asked is None else x

    def new_cache(self, rows: int, capacity: int) -> KVCache:
        """Returns an empty cache for this process's heads; arguments as of `KVCache`."""
        weight, heads = self.embedding.weight, self.blocks[0].attention.num_kv_heads  # type: ignore[union-attr]
        return KVCache(self.config, rows, capacity, weight.device, weight.dtype, num_kv_heads=heads)  # type: ignore[arg-type]

    def _attention_dtype(self) -> torch.dtype:
        kind = self.embedding.weight.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.embedding.weight.dtype

    @property
    def num_parameters(self) -> int:
        """Number of distinct weights."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self, context_length: int, head_share: float = 1.0) -> float:
        """Returns forward plus backward FLOPs per token: 6 per matrix weight and 12 L d per layer of attention.

        Args:
            context_length: Tokens each token attends to.
            head_share: Share of the tokens that are asked for: on which the output head runs, and what comes after the
                last layer's attention.
        """
        config = self.config
        assert config.head_dim is not None
        in_blocks = sum(p.numel() for p in self.blocks.parameters() if p.dim() == 2)
        last: Any = self.blocks[-1]
        after_attention = [*last.attention.out.parameters(), *last.mlp.parameters()]
        in_blocks -= sum(p.numel() for p in after_attention if p.dim() == 2) * (1 - head_share)
        head = self.lm_head.weight.numel() * head_share
        attention = config.num_layers * 12 * context_length * config.num_heads * config.head_dim
        return 6 * (in_blocks + head) + attention / (2 if config.causal else 1)
