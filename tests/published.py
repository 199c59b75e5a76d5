"""Tiny models of the published families, built without our code, and what they compute written out."""

from __future__ import annotations

import json

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

VOCABULARY = 60
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    rope_theta=10_000.0,
)
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
LLADA_CONFIG = dict(  # the keys of GSAI-ML/LLaDA-8B-Base/config.json
    activation_type="silu",
    alibi=False,
    alibi_bias_max=8.0,
    architectures=["LLaDAModelLM"],
    attention_dropout=0.0,
    attention_layer_norm=False,
    attention_layer_norm_with_affine=True,
    auto_map={"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM"},
    bias_for_layer_norm=False,
    block_group_size=1,
    block_type="llama",
    d_model=32,
    embedding_dropout=0.0,
    embedding_size=VOCABULARY,
    eos_token_id=3,
    flash_attention=False,
    include_bias=False,
    include_qkv_bias=False,
    init_cutoff_factor=None,
    init_device="meta",
    init_fn="mitchell",
    init_std=0.02,
    input_emb_norm=False,
    layer_norm_type="rms",
    layer_norm_with_affine=True,
    mask_token_id=VOCABULARY - 1,
    max_sequence_length=4096,
    mlp_hidden_size=48,
    mlp_ratio=4,
    model_type="llada",
    multi_query_attention=None,
    n_heads=4,
    n_kv_heads=2,
    n_layers=2,
    pad_token_id=3,
    precision="amp_bf16",
    residual_dropout=0.0,
    rms_norm_eps=1e-5,
    rope=True,
    rope_full_precision=True,
    rope_theta=500_000.0,
    scale_logits=False,
    transformers_version="4.46.3",
    use_cache=False,
    vocab_size=VOCABULARY,
    weight_tying=False,
)
DREAM_CONFIG = dict(  # the keys of Dream-org/Dream-v0-Base-7B/config.json
    architectures=["DreamModel"],
    attention_dropout=0.0,
    auto_map={"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
    bos_token_id=3,
    eos_token_id=3,
    hidden_act="silu",
    initializer_range=0.02,
    mask_token_id=VOCABULARY - 1,
    max_window_layers=28,
    model_type="Dream",
    pad_token_id=3,
    rms_norm_eps=1e-6,
    rope_scaling=None,
    sliding_window=None,
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
    transformers_version="4.46.2",
    use_cache=True,
    use_mrope=False,
    use_sliding_window=False,
    **SIZES,
)
SDAR_CONFIG = dict(  # the keys of training/model/SDAR-4B-Chat/config.json in JetAstra/SDAR
    architectures=["SDARForCausalLM"],
    attention_bias=False,
    attention_dropout=0.0,
    attn_implementation="flex_attention",
    auto_map={"AutoConfig": "configuration_sdar.SDARConfig", "AutoModel": "modeling_sdar.SDARModel"},
    block_size=4,
    bos_token_id=3,
    debug=False,
    eos_token_id=3,
    ep_size=1,
    fuse_cross_entropy=True,
    head_dim=16,
    hidden_act="silu",
    initializer_range=0.02,
    mask_token_id=VOCABULARY - 1,
    max_window_layers=2,
    micro_forward=False,
    model_type="sdar",
    rms_norm_eps=1e-6,
    rope_scaling=None,
    skip_checkpoint=False,
    sliding_window=None,
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
    transformers_version="4.52.4",
    use_cache=False,
    use_deepep=False,
    use_sliding_window=False,
    **SIZES,
)
SDAR_MOE_CONFIG = dict(  # the keys of SDAR and those by which engines and Qwen3-MoE describe experts
    SDAR_CONFIG,
    **dict(architectures=["SDARMoeForCausalLM"], model_type="sdar_moe", decoder_sparse_step=1, mlp_only_layers=[]),
    **dict(moe_intermediate_size=16, norm_topk_prob=True, num_experts=8, num_experts_per_tok=2),
)
FAST_DLLM_V2_CONFIG = dict(  # the keys of Efficient-Large-Model/Fast_dLLM_v2_7B/config.json
    architectures=["Fast_dLLM_QwenForCausalLM"],
    attention_dropout=0.0,
    auto_map={"AutoConfig": "configuration.Fast_dLLM_QwenConfig", "AutoModel": "modeling.Fast_dLLM_QwenModel"},
    bd_size=32,
    bos_token_id=3,
    conplemenrary_mask=True,
    eos_token_id=3,
    hidden_act="silu",
    initializer_range=0.02,
    layer_types=["full_attention", "full_attention"],
    max_window_layers=28,
    model_type="Fast_dLLM_Qwen",
    pad_token_id=3,
    rms_norm_eps=1e-6,
    rope_scaling=None,
    sliding_window=None,
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
    transformers_version="4.53.1",
    use_cache=True,
    use_sliding_window=False,
    **SIZES,
)
QWEN3_1_7B = dict(  # the keys of Qwen/Qwen3-1.7B-Base/config.json
    architectures=["Qwen3ForCausalLM"],
    attention_bias=False,
    attention_dropout=0.0,
    bos_token_id=151643,
    eos_token_id=151643,
    head_dim=128,
    hidden_act="silu",
    hidden_size=2048,
    initializer_range=0.02,
    intermediate_size=6144,
    max_position_embeddings=32768,
    max_window_layers=28,
    model_type="qwen3",
    num_attention_heads=16,
    num_hidden_layers=28,
    num_key_value_heads=8,
    rms_norm_eps=1e-6,
    rope_scaling=None,
    rope_theta=1000000,
    sliding_window=None,
    tie_word_embeddings=True,
    torch_dtype="bfloat16",
    transformers_version="4.51.0",
    use_cache=True,
    use_sliding_window=False,
    vocab_size=151936,
)
# What the config.json of published models says, where it is not as above.
REAL_SIZES = {
    "GSAI-ML/LLaDA-8B-Base": dict(
        LLADA_CONFIG,
        **dict(d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32, mlp_hidden_size=12288),
        **dict(embedding_size=126464, vocab_size=126464, mask_token_id=126336),
    ),
    "Dream-org/Dream-v0-Base-7B": dict(
        DREAM_CONFIG,
        **dict(hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4),
        **dict(intermediate_size=18944, vocab_size=152064, rope_theta=1e6, mask_token_id=151666),
    ),
    "Qwen/Qwen3-1.7B-Base": dict(QWEN3_1_7B),
    "Qwen/Qwen3-8B-Base": dict(
        QWEN3_1_7B,
        **dict(hidden_size=4096, num_hidden_layers=36, num_attention_heads=32, intermediate_size=12288),
        tie_word_embeddings=False,
    ),
}


def transformers_model(kind: str, **changes):
    """Returns a random model of transformers' own class, norms and biases included."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        **{**SIZES, "initializer_range": 0.15, "eos_token_id": 3, **changes}
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def write_llada(folder, **changes) -> dict[str, torch.Tensor]:
    """Writes a random LLaDA checkpoint and returns its weights."""
    config = {**LLADA_CONFIG, **changes}
    generator = torch.Generator().manual_seed(0)

    def random(*shape, around=0.0):
        return around + torch.randn(*shape, generator=generator) * (0.2 if around else 0.3)

    width, inner = config["d_model"], config["mlp_hidden_size"]
    keys = width // config["n_heads"] * (config["n_kv_heads"] or config["n_heads"])
    weights = {"model.transformer.wte.weight": random(VOCABULARY, width)}
    for layer in range(config["n_layers"]):
        of = {
            "attn_norm.weight": random(width, around=1.0),
            "q_proj.weight": random(width, width),
            "k_proj.weight": random(keys, width),
            "v_proj.weight": random(keys, width),
            "attn_out.weight": random(width, width),
            "ff_norm.weight": random(width, around=1.0),
            "ff_proj.weight": random(inner, width),
            "up_proj.weight": random(inner, width),
            "ff_out.weight": random(width, inner),
        }
        if config["include_qkv_bias"]:
            of |= {"q_proj.bias": random(width), "k_proj.bias": random(keys), "v_proj.bias": random(keys)}
        weights |= {f"model.transformer.blocks.{layer}.{name}": value for name, value in of.items()}
    weights["model.transformer.ln_f.weight"] = random(width, around=1.0)
    if not config["weight_tying"]:
        weights["model.transformer.ff_out.weight"] = random(VOCABULARY, width)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return weights


def llada_logits(weights: dict[str, torch.Tensor], ids: torch.Tensor, **changes) -> torch.Tensor:
    """What a LLaDA model computes for token ids [L], one head and one position at a time; logits [L, V]."""
    config = {**LLADA_CONFIG, **changes}
    heads, groups = config["n_heads"], config["n_kv_heads"] or config["n_heads"]
    size = config["d_model"] // heads

    def normed(x, name):
        return weights[name] * x / (x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt()

    def turned(x):  # [L, size]: pair (i, i + size / 2) of position p turns by p / theta^(2 i / size)
        half = size // 2
        angles = torch.arange(len(x))[:, None] / config["rope_theta"] ** (torch.arange(half) / half)
        a, b = x[:, :half], x[:, half:]
        return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), dim=1)

    x = weights["model.transformer.wte.weight"][ids]
    for layer in range(config["n_layers"]):
        of = f"model.transformer.blocks.{layer}."
        y = normed(x, of + "attn_norm.weight")
        q, k, v = (F.linear(y, weights[f"{of}{p}_proj.weight"], weights.get(f"{of}{p}_proj.bias")) for p in "qkv")
        mixed = []
        for head in range(heads):
            group = head * groups // heads
            query = turned(q[:, head * size : (head + 1) * size])
            key = turned(k[:, group * size : (group + 1) * size])
            seen = (query @ key.T / size**0.5).softmax(dim=-1)  # every position sees every other
            mixed.append(seen @ v[:, group * size : (group + 1) * size])
        x = x + torch.cat(mixed, dim=1) @ weights[of + "attn_out.weight"].T
        y = normed(x, of + "ff_norm.weight")
        gated = F.silu(y @ weights[of + "ff_proj.weight"].T) * (y @ weights[of + "up_proj.weight"].T)
        x = x + gated @ weights[of + "ff_out.weight"].T
    head = weights["model.transformer.wte.weight" if config["weight_tying"] else "model.transformer.ff_out.weight"]
    return normed(x, "model.transformer.ln_f.weight") @ head.T


def write_dream(folder):
    """Writes a random Dream checkpoint and returns a function from ids [B, L] to the logits its head computes.

    Dream's layers are Qwen2's, read in both directions: transformers' class does that when told so.
    """
    model = transformers_model("Qwen2", rms_norm_eps=DREAM_CONFIG["rms_norm_eps"])
    model.config.is_causal = False
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(DREAM_CONFIG))

    def logits(ids):
        with torch.no_grad():
            return model(ids, use_cache=False).logits

    return logits


def write_block_causal(folder, config):
    """Writes a random SDAR or Fast-dLLM v2 checkpoint and returns a function from ids [B, L] to what its head computes.

    Their layers are those of Qwen3, Qwen3-MoE and Qwen2: transformers' classes do that when they are told which tokens
    see which.
    """
    kind, key = {
        "sdar": ("Qwen3", "block_size"),
        "sdar_moe": ("Qwen3Moe", "block_size"),
        "Fast_dLLM_Qwen": ("Qwen2", "bd_size"),
    }[config["model_type"]]
    names = {"vocab_size", "rms_norm_eps", "tie_word_embeddings", "head_dim", "num_experts", "num_experts_per_tok"}
    names |= {"moe_intermediate_size", "norm_topk_prob"}
    model = transformers_model(kind, **{name: config[name] for name in names & config.keys()})
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))

    def logits(ids):
        block = torch.arange(ids.size(1)) // config[key]
        hidden = torch.zeros(len(block), len(block)).masked_fill(block[:, None] < block, -torch.inf)
        with torch.no_grad():
            return model(ids, attention_mask=hidden.expand(len(ids), 1, -1, -1), use_cache=False).logits

    return logits


def likeliest(logits, row, mask):
    """What each position of a row predicts, and with which probability; never the mask."""
    values = logits(torch.tensor([row]))[0].index_fill(-1, torch.tensor(mask), -torch.inf)
    confidence, tokens = values.softmax(-1).max(-1)
    return tokens.tolist(), confidence.tolist()


def sdar_generate(logits, prompt, blocks, length, mask, ends, threshold=None, steps=None):
    """SDAR's generate.py read plainly and greedily: its dynamic rule with a `threshold`, its static one without.

    Every forward reads the row anew. The prompt and the answer together fill this number of blocks. Where fewer masks
    are left than are due, the release also overwrites given tokens; here it does not.
    """
    row, steps = list(prompt), steps or length
    for _ in range(blocks - len(prompt) // length):
        row += [mask] * (length - len(row) % length)
        for step in range(length):
            masked = [place for place, token in enumerate(row) if token == mask]
            if not masked:
                break
            tokens, confidence = likeliest(logits, row, mask)
            due = length // steps + (step < length % steps)
            best = sorted(masked, key=lambda place: -confidence[place])[:due]
            sure = [place for place in masked if threshold is not None and confidence[place] > threshold]
            for place in sure if len(sure) >= due else best:
                row[place] = tokens[place]
        if set(ends) & set(row[len(prompt) :]):
            break
    return cut(row[len(prompt) :], ends)


def fast_dllm_v2_generate(logits, prompt, blocks, length, part, mask, ends, threshold):
    """Fast-dLLM v2's generate read plainly and greedily, without a cache of parts.

    The head at each position predicts the next token, and the one behind a finished block is taken at once. A prompt of
    exactly one block is lost in the release; here it is not.
    """
    row = list(prompt)
    for _ in range(blocks - len(prompt) // length):
        if len(row) % length == 0:
            row.append(likeliest(logits, row, mask)[0][-1])
        row += [mask] * (-len(row) % length)
        for start in range(len(row) - length, len(row), part):
            while mask in row[start : start + part]:
                tokens, confidence = likeliest(logits, row, mask)
                masked = [place for place in range(start, start + part) if row[place] == mask]
                sure = [place for place in masked if confidence[place - 1] > threshold]
                for place in sure or [max(masked, key=lambda place: confidence[place - 1])]:
                    row[place] = tokens[place - 1]
        if set(ends) & set(row[len(prompt) :]):
            break
    return cut(row[len(prompt) :], ends)


def cut(answer, ends):
    """An answer without its first terminator and what is behind it."""
    return answer[: next((place for place, token in enumerate(answer) if token in ends), len(answer))]
