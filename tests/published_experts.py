"""Tiny models of the published families with experts, written without our code, and what they compute written out."""

from __future__ import annotations

import json

import torch
import torch.nn.functional as F
from published import VOCABULARY
from safetensors.torch import save_file

LLADA2_CONFIG = dict(  # the keys of inclusionAI/LLaDA2.1-mini/config.json, and of dFactory's for LLaDA2.0-mini
    architectures=["LLaDA2MoeModelLM"],
    attention_dropout=0.0,
    auto_map={"AutoConfig": "configuration_llada2_moe.LLaDA2MoeConfig"},
    dtype="float32",
    embedding_dropout=0.0,
    first_k_dense_replace=1,
    head_dim=8,
    hidden_act="silu",
    hidden_size=32,
    initializer_range=0.02,
    intermediate_size=48,
    max_position_embeddings=128,
    max_window_layers=28,
    model_type="llada2_moe",
    moe_intermediate_size=16,
    moe_router_enable_expert_bias=True,
    n_group=4,
    norm_head=False,
    norm_softmax=False,
    norm_topk_prob=True,
    num_attention_heads=4,
    num_experts=16,
    num_experts_per_tok=4,
    num_hidden_layers=3,
    num_key_value_heads=2,
    num_shared_experts=1,
    output_dropout=0.0,
    output_router_logits=False,
    pad_token_id=3,
    partial_rotary_factor=0.5,
    rms_norm_eps=1e-6,
    rope_scaling=None,
    rope_theta=600000,
    rotary_dim=4,
    routed_scaling_factor=2.5,
    router_dtype="fp32",
    score_function="sigmoid",
    sliding_window=4096,
    tie_word_embeddings=False,
    topk_group=2,
    transformers_version="4.57.1",
    use_bias=False,
    use_cache=False,
    use_qk_norm=True,
    use_qkv_bias=False,
    use_rmsnorm=True,
    use_sliding_window=False,
    using_split_qkv_in_self_attention=False,
    vocab_size=VOCABULARY,
)
LLADA_MOE_CONFIG = dict(  # the keys of LLaDA-MoE's configuration class
    architectures=["LLaDAMoEModelLM"],
    attention_bias=False,
    attention_dropout=0.0,
    auto_map={"AutoConfig": "configuration_lladamoe.LLaDAConfig"},
    clip_qkv=None,
    dense_intermediate_size=48,
    eos_token_id=3,
    expert_intermediate_size=16,
    hidden_act="silu",
    hidden_size=32,
    initializer_range=0.02,
    max_position_embeddings=128,
    model_type="llada",
    moe_layer_freq=[1, 1, 1],
    moe_router_enable_expert_bias=False,
    moe_router_score_function="softmax",
    norm_topk_prob=None,
    num_attention_heads=4,
    num_experts=16,
    num_experts_per_tok=4,
    num_hidden_layers=3,
    num_key_value_heads=4,
    output_router_logits=False,
    pad_token_id=3,
    partial_rotary_factor=1,
    qk_layernorm=True,
    rms_norm_eps=1e-5,
    rope_scaling=None,
    rope_theta=50000,
    routed_scaling_factor=1,
    router_aux_loss_coef=0.01,
    router_num_group=None,
    router_topk_group=None,
    shared_expert_intermediate_size=None,
    tie_word_embeddings=False,
    torch_dtype="float32",
    transformers_version="4.53.2",
    use_cache=False,
    vocab_size=VOCABULARY,
)
# The sizes of LLaDA2.0-mini and 2.1-mini.
LLADA2_MINI = dict(
    LLADA2_CONFIG,
    **dict(hidden_size=2048, intermediate_size=5120, moe_intermediate_size=512, num_experts=256, vocab_size=157184),
    **dict(num_experts_per_tok=8, n_group=8, topk_group=4, head_dim=128, num_attention_heads=16, num_hidden_layers=20),
    **dict(num_key_value_heads=4, max_position_embeddings=32768, pad_token_id=156892, rotary_dim=64),
)


def write_llada2(folder, **changes) -> dict[str, torch.Tensor]:
    """Writes a random LLaDA2 checkpoint and returns its weights."""
    config = {**LLADA2_CONFIG, **changes}
    draw = Draw(config["vocab_size"], config["hidden_size"])
    wide, size = config["hidden_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    weights = {"model.word_embeddings.weight": draw(config["vocab_size"], wide)}
    for layer in range(config["num_hidden_layers"]):
        of = f"model.layers.{layer}."
        weights |= draw.norms(of, "input_layernorm", "post_attention_layernorm")
        weights |= draw.norms(of + "attention.", "query_layernorm", "key_layernorm", width=size)
        weights[of + "attention.query_key_value.weight"] = draw(queries + 2 * keys, wide)
        if config["use_qkv_bias"]:
            weights[of + "attention.query_key_value.bias"] = draw(queries + 2 * keys)
        weights[of + "attention.dense.weight"] = draw(wide, queries)
        if layer < config["first_k_dense_replace"]:
            weights |= draw.feed_forward(of + "mlp.", config["intermediate_size"])
            continue
        weights[of + "mlp.gate.weight"] = draw(config["num_experts"], wide)
        weights[of + "mlp.gate.expert_bias"] = draw(config["num_experts"])
        for expert in range(config["num_experts"]):
            weights |= draw.feed_forward(f"{of}mlp.experts.{expert}.", config["moe_intermediate_size"])
        if config["num_shared_experts"]:
            shared = config["moe_intermediate_size"] * config["num_shared_experts"]
            weights |= draw.feed_forward(of + "mlp.shared_experts.", shared)
    return _write(folder, config, draw, weights)


def write_llada_moe(folder, **changes) -> dict[str, torch.Tensor]:
    """Writes a random LLaDA-MoE checkpoint and returns its weights."""
    config = {**LLADA_MOE_CONFIG, **changes}
    draw = Draw(config["vocab_size"], config["hidden_size"])
    wide = config["hidden_size"]
    size = wide // config["num_attention_heads"]
    weights = {"model.embed_tokens.weight": draw(config["vocab_size"], wide)}
    for layer in range(config["num_hidden_layers"]):
        of = f"model.layers.{layer}."
        weights |= draw.norms(of, "input_layernorm", "post_attention_layernorm")
        weights |= draw.norms(of + "self_attn.", "q_norm", "k_norm", width=size)
        for part, rows in zip("qkvo", (wide, *[size * config["num_key_value_heads"]] * 2, wide), strict=True):
            weights[f"{of}self_attn.{part}_proj.weight"] = draw(rows, wide)
        weights[of + "mlp.gate.weight"] = draw(config["num_experts"], wide)
        for expert in range(config["num_experts"]):
            weights |= draw.feed_forward(f"{of}mlp.experts.{expert}.", config["expert_intermediate_size"])
    return _write(folder, config, draw, weights)


class Draw:
    """Draws weights of a model that is `width` wide."""

    def __init__(self, vocabulary: int, width: int) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.vocabulary, self.width = vocabulary, width

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator) * 0.2

    def norms(self, of: str, *names: str, width: int | None = None) -> dict[str, torch.Tensor]:
        return {f"{of}{name}.weight": 1 + self(width or self.width) for name in names}

    def feed_forward(self, of: str, inner: int) -> dict[str, torch.Tensor]:
        shapes = {"gate_proj": (inner, self.width), "up_proj": (inner, self.width), "down_proj": (self.width, inner)}
        return {f"{of}{name}.weight": self(*shape) for name, shape in shapes.items()}


def _write(folder, config, draw, weights) -> dict[str, torch.Tensor]:
    weights |= draw.norms("model.", "norm")
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = draw(draw.vocabulary, draw.width)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return weights


def llada2_logits(weights, ids: torch.Tensor, block: int | None = None, **changes) -> torch.Tensor:
    """What a LLaDA2 model computes for token ids [L], one token and expert at a time; logits [L, V].

    A token sees its own block of positions and all earlier ones; everything without blocks.
    """
    config = {**LLADA2_CONFIG, **changes}
    heads, groups, size = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    positions = torch.arange(len(ids))
    sees = torch.ones(len(ids), len(ids), dtype=torch.bool)
    if block is not None:
        sees = positions[:, None] // block >= positions[None] // block
    x = weights["model.word_embeddings.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        of = f"model.layers.{layer}."
        y = _normed(x, weights[of + "input_layernorm.weight"], config)
        joined = F.linear(
            y, weights[of + "attention.query_key_value.weight"], weights.get(of + "attention.query_key_value.bias")
        )
        q, k, v = joined.view(len(ids), -1, size).split((heads, groups, groups), dim=1)
        q, k = (
            _turned(_normed(part, weights[f"{of}attention.{name}_layernorm.weight"], config), config)
            for part, name in ((q, "query"), (k, "key"))
        )
        x = x + _attended(q, k, v, sees) @ weights[of + "attention.dense.weight"].T
        y = _normed(x, weights[of + "post_attention_layernorm.weight"], config)
        if layer < config["first_k_dense_replace"]:
            x = x + _fed(y, of + "mlp.", weights)
            continue
        mixed = []
        for token in y:
            scores = (weights[of + "mlp.gate.weight"] @ token).sigmoid()
            ranked = scores + weights[of + "mlp.gate.expert_bias"]
            per_group = config["num_experts"] // config["n_group"]
            best = [sum(sorted(group.tolist())[-2:]) for group in ranked.split(per_group)]
            open_groups = sorted(range(config["n_group"]), key=lambda group: -best[group])[: config["topk_group"]]
            candidates = [e for e in range(config["num_experts"]) if e // per_group in open_groups]
            chosen = sorted(candidates, key=lambda e: -ranked[e].item())[: config["num_experts_per_tok"]]
            total = sum(scores[e] for e in chosen) if len(chosen) > 1 else 1.0
            parts = [scores[e] / total * _fed(token, f"{of}mlp.experts.{e}.", weights) for e in chosen]
            mixed.append(config["routed_scaling_factor"] * sum(parts))
        x = x + torch.stack(mixed)
        if config["num_shared_experts"]:
            x = x + _fed(y, of + "mlp.shared_experts.", weights)
    return _normed(x, weights["model.norm.weight"], config) @ weights["lm_head.weight"].T


def llada2_generate(weights, prompt, blocks, mask, end, threshold=0.95, length=32, **changes) -> list[int]:
    """How LLaDA2's `generate` decodes a prompt to that many blocks, greedily; up to the terminator, or all.

    The prompt's unfinished block is decoded with the answer's first tokens. Every step reads all blocks so far; it
    commits what is above the threshold, at least one token.
    """
    ids = [*prompt, *[mask] * (blocks * length - len(prompt))]
    for block in range(len(prompt) // length, blocks):
        seen = range((block + 1) * length)
        while masked := [place for place in seen[block * length :] if ids[place] == mask]:
            logits = llada2_logits(weights, torch.tensor(ids[: len(seen)]), length, **changes)
            best = {place: logits[place].softmax(dim=0).max(dim=0) for place in masked}
            sure = [place for place in masked if best[place].values > threshold]
            for place in sure or [max(masked, key=lambda place: best[place].values.item())]:
                ids[place] = int(best[place].indices)
        if end in ids[len(prompt) : len(seen)]:
            return ids[len(prompt) : ids.index(end, len(prompt)) + 1]
    return ids[len(prompt) :]


def llada_moe_logits(weights, ids: torch.Tensor, **changes) -> torch.Tensor:
    """What a LLaDA-MoE model computes for token ids [L], one token and expert at a time; logits [L, V]."""
    config = {**LLADA_MOE_CONFIG, **changes}
    size = config["hidden_size"] // config["num_attention_heads"]
    sees = torch.ones(len(ids), len(ids), dtype=torch.bool)
    x = weights["model.embed_tokens.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        of = f"model.layers.{layer}."
        y = _normed(x, weights[of + "input_layernorm.weight"], config)
        q, k, v = ((y @ weights[f"{of}self_attn.{part}_proj.weight"].T).view(len(ids), -1, size) for part in "qkv")
        q, k = (
            _turned(_normed(part, weights[f"{of}self_attn.{name}_norm.weight"], config), config)
            for part, name in ((q, "q"), (k, "k"))
        )
        x = x + _attended(q, k, v, sees) @ weights[of + "self_attn.o_proj.weight"].T
        y = _normed(x, weights[of + "post_attention_layernorm.weight"], config)
        mixed = []
        for token in y:
            scores = (weights[of + "mlp.gate.weight"] @ token).softmax(dim=0)
            chosen = sorted(range(config["num_experts"]), key=lambda e: -scores[e].item())
            chosen = chosen[: config["num_experts_per_tok"]]
            mixed.append(sum(scores[e] * _fed(token, f"{of}mlp.experts.{e}.", weights) for e in chosen))
        x = x + torch.stack(mixed)
    return _normed(x, weights["model.norm.weight"], config) @ weights["lm_head.weight"].T


def _normed(x, weight, config):
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt()


def _turned(x, config):
    """Turns pair (i, i + w / 2) of the first w dimensions of [L, heads, size] at position p by p / theta^(2 i / w)."""
    half = int(x.size(-1) * config["partial_rotary_factor"]) // 2
    angles = torch.arange(len(x))[:, None, None] / config["rope_theta"] ** (torch.arange(half) / half)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = (a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin())
    return torch.cat((*turned, rest), dim=-1)


def _attended(q, k, v, sees):
    mixed = []
    for head in range(q.size(1)):
        group = head * k.size(1) // q.size(1)
        scores = q[:, head] @ k[:, group].T / q.size(-1) ** 0.5
        mixed.append(scores.masked_fill(~sees, -torch.inf).softmax(dim=-1) @ v[:, group])
    return torch.cat(mixed, dim=1)


def _fed(x, of, weights):
    gate, up, down = (weights[f"{of}{name}_proj.weight"] for name in ("gate", "up", "down"))
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T
