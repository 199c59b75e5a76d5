"""Families of published checkpoints: one table each of their settings and names of weights, read in both directions.

The facts are those of the published `config.json` and safetensors files and of the classes that read them: LLaDA
(arXiv 2502.09992), LLaDA-MoE (2509.24389), LLaDA2 (2512.15745), Dream (2508.15487), SDAR (2510.06303), Fast-dLLM v2
(2509.26328), dllm's (2602.22661), and Llama, Qwen2 and Qwen3 as transformers has them. Our weights have the names that
transformers gives them. What is not fully understood is refused by name.
"""

from dataclasses import dataclass, field, replace
from typing import Any

EXTRAS = "dllm_var"  # the entry of config.json with what the family has no keys for
REQUIRED: Any = object()  # in place of a default: the key must be there
ROPE_KEYS = {"rope_theta", "rope_scaling", "rope_parameters"}  # as transformers has them
# Keys of any config.json that do not change what the model computes.
DESCRIPTIVE = {"model_type", "architectures", "auto_map", "transformers_version", "transformers.js_config", EXTRAS}
DESCRIPTIVE |= {"torch_dtype", "dtype", "use_cache", "tokenizer_class", "vocab_size", "is_causal", "pretraining_tp"}
DESCRIPTIVE |= {"bos_token_id", "eos_token_id", "unk_token_id", "sep_token_id", "cls_token_id"}
DESCRIPTIVE |= {"decoder_start_token_id", "is_encoder_decoder", "is_decoder", "id2label", "label2id", "problem_type"}
DESCRIPTIVE |= {"output_attentions", "output_hidden_states", "return_dict", "torchscript", "attn_implementation"}
DESCRIPTIVE |= {"chunk_size_feed_forward", "max_window_layers", "sliding_window"}  # the window of models that use it
DESCRIPTIVE |= {"alibi_bias_max", "attention_layer_norm_with_affine", "flash_attention", "mlp_ratio", "precision"}
DESCRIPTIVE |= {"init_cutoff_factor", "init_device", "init_fn"}
DESCRIPTIVE |= {"quantization_config"}  # read where the weights are
DESCRIPTIVE |= {"output_router_logits", "router_aux_loss_coef", "router_num_group", "router_topk_group", "rotary_dim"}


@dataclass(frozen=True)
class Family:
    """One family of checkpoints."""

    model_type: str  # how `config.json` names it
    architecture: str  # the class that `config.json` names
    # By our names: its key of `config.json`, and what it means when the key is not there.
    settings: dict[str, tuple[str, Any]] = field(default_factory=dict)
    implied: dict[str, Any] = field(default_factory=dict)  # our settings that every model of the family has
    # Keys, and the values under which the model computes what ours does; the first is written. A key may be left out
    # if one of its values is None, False or 0.
    fixed: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    # Parts of our weights' names and its own, where they differ. Several of ours under one of its names are one weight
    # there, joined in our order.
    renamed: dict[str, str] = field(default_factory=dict)
    causal: bool = True  # its models read left to right
    remote_code: tuple[str, str, str] | None = None  # a hub repository with its classes of config and model
    # Keys that change nothing of what is computed, with the values that are written for programs which ask for them.
    described: dict[str, Any] = field(default_factory=dict)
    sampler: dict[str, Any] | None = None  # how its release decodes in blocks, where that is not our default
    no_block_length: str = ""  # what to do where a published file does not say it

    def theirs(self, ours: str) -> str:
        """Returns the name under which the family keeps one of our weights."""
        for part, its_part in self.renamed.items():
            ours = ours.replace(part, its_part)
        return ours


_SETTINGS = {
    "vocab_size": ("vocab_size", REQUIRED),
    "hidden_size": ("hidden_size", REQUIRED),
    "num_layers": ("num_hidden_layers", REQUIRED),
    "num_heads": ("num_attention_heads", REQUIRED),
    "num_kv_heads": ("num_key_value_heads", REQUIRED),
    "intermediate_size": ("intermediate_size", REQUIRED),
    "norm_eps": ("rms_norm_eps", 1e-6),
    "tie_embeddings": ("tie_word_embeddings", False),
    "initializer_range": ("initializer_range", 0.02),
    "context_length": ("max_position_embeddings", None),
    "mask_id": ("mask_token_id", None),
    "pad_id": ("pad_token_id", None),
}
_FIXED = {"hidden_act": ("silu",), "attention_dropout": (0.0,), "partial_rotary_factor": (None, 1.0)}
_QWEN_FIXED = {**_FIXED, "use_sliding_window": (False,), "layer_types": (None, "full_attention")}

LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    settings={**_SETTINGS, "num_kv_heads": ("num_key_value_heads", None), "head_dim": ("head_dim", None)},
    implied={"qkv_bias": False, "qk_norm": False, "rope_full_precision": False},
    fixed={
        **_FIXED,
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "rope_interleaved": (None, False),
        "is_llama_config": (None, True),
    },
)
QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    settings={**_SETTINGS, "head_dim": ("head_dim", None)},
    implied={"qkv_bias": True, "qk_norm": False, "rope_full_precision": False},
    fixed={**_QWEN_FIXED, "attention_bias": (None, True), "use_mrope": (None, False)},
)
QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    settings={**_SETTINGS, "head_dim": ("head_dim", 128)},
    implied={"qkv_bias": False, "qk_norm": True, "rope_full_precision": False},
    fixed={**_QWEN_FIXED, "attention_bias": (False,)},
)
DREAM = Family(
    "Dream",
    "DreamModel",
    settings=_SETTINGS,
    implied={"qkv_bias": True, "qk_norm": False, "token_shift": True, "rope_full_precision": False},
    fixed={**_FIXED, "use_sliding_window": (False,), "use_mrope": (False, None)},
    causal=False,
    remote_code=("Dream-org/Dream-v0-Base-7B", "configuration_dream.DreamConfig", "modeling_dream.DreamModel"),
)
LLADA = Family(
    "llada",
    "LLaDAModelLM",
    settings={
        "vocab_size": ("embedding_size", REQUIRED),
        "hidden_size": ("d_model", REQUIRED),
        "num_layers": ("n_layers", REQUIRED),
        "num_heads": ("n_heads", REQUIRED),
        "num_kv_heads": ("n_kv_heads", None),
        "intermediate_size": ("mlp_hidden_size", REQUIRED),
        "norm_eps": ("rms_norm_eps", REQUIRED),
        "qkv_bias": ("include_qkv_bias", False),
        "tie_embeddings": ("weight_tying", REQUIRED),
        "rope_theta": ("rope_theta", REQUIRED),
        "rope_full_precision": ("rope_full_precision", True),
        "initializer_range": ("init_std", 0.02),
        "context_length": ("max_sequence_length", None),
        "mask_id": ("mask_token_id", REQUIRED),
        "pad_id": ("pad_token_id", None),
    },
    implied={"qk_norm": False, "token_shift": False, "rope_llama3": None},
    fixed={
        "activation_type": ("silu",),
        "block_type": ("llama",),
        "block_group_size": (1,),
        "layer_norm_type": ("rms",),
        "layer_norm_with_affine": (True,),
        "rope": (True,),
        "bias_for_layer_norm": (False, None),
        "multi_query_attention": (None, False),
        **dict.fromkeys(("alibi", "attention_layer_norm", "include_bias"), (False,)),
        **dict.fromkeys(("input_emb_norm", "scale_logits"), (False,)),
        **dict.fromkeys(("attention_dropout", "embedding_dropout", "residual_dropout"), (0.0,)),
    },
    renamed={
        "model.embed_tokens": "model.transformer.wte",
        "model.layers.": "model.transformer.blocks.",
        "model.norm": "model.transformer.ln_f",
        "lm_head": "model.transformer.ff_out",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ff_norm",
        "self_attn.o_proj": "attn_out",
        "self_attn.": "",
        "mlp.gate_proj": "ff_proj",
        "mlp.down_proj": "ff_out",
        "mlp.": "",
    },
    causal=False,
    remote_code=("GSAI-ML/LLaDA-8B-Base", "configuration_llada.LLaDAConfig", "modeling_llada.LLaDAModelLM"),
)


def _by_threshold(threshold: float, **settings: Any) -> dict[str, Any]:
    """Returns the arguments of a block sampler that commits what is above a threshold, terminators too."""
    policy = {"class_path": "dllm_var.sampling.policies.ConfidenceThreshold", "init_args": {"threshold": threshold}}
    return {"policy": policy, "terminator_last": False, **settings}


_EXPERT_SETTINGS = {
    **_SETTINGS,
    "num_experts": ("num_experts", REQUIRED),
    "experts_per_token": ("num_experts_per_tok", REQUIRED),
    "norm_eps": ("rms_norm_eps", 1e-5),
}
_NO_DROPOUT = dict.fromkeys(("attention_dropout", "embedding_dropout", "output_dropout"), (0.0,))
LLADA2 = Family(
    "llada2_moe",
    "LLaDA2MoeModelLM",
    settings={
        **_EXPERT_SETTINGS,
        "head_dim": ("head_dim", None),
        "partial_rotary_factor": ("partial_rotary_factor", 0.5),
        "qkv_bias": ("use_qkv_bias", False),
        "qk_norm": ("use_qk_norm", True),
        "expert_intermediate_size": ("moe_intermediate_size", REQUIRED),
        "shared_experts": ("num_shared_experts", 0),
        "first_dense_layers": ("first_k_dense_replace", 0),
        "router_scale": ("routed_scaling_factor", 2.5),
        "expert_groups": ("n_group", 8),
        "groups_per_token": ("topk_group", 4),
        "block_length": ("block_length", 32),  # an argument of its `generate`; no published config.json names it
    },
    implied={
        **{"block_causal": True, "rope_full_precision": False, "token_shift": False},
        **{"router": "sigmoid", "router_bias": True, "router_normalise": True},
    },
    fixed={
        "hidden_act": ("silu",),
        **_NO_DROPOUT,
        "score_function": ("sigmoid", None),
        "moe_router_enable_expert_bias": (True, None),
        "norm_topk_prob": (True, None),
        "router_dtype": ("fp32", None),
        "use_rmsnorm": (True, None),
        **dict.fromkeys(("use_bias", "norm_head", "norm_softmax", "use_sliding_window"), (False,)),
        "using_split_qkv_in_self_attention": (False,),
    },
    renamed={
        "model.embed_tokens": "model.word_embeddings",
        **{f"self_attn.{name}_proj": "attention.query_key_value" for name in "qkv"},
        "self_attn.q_norm": "attention.query_layernorm",
        "self_attn.k_norm": "attention.key_layernorm",
        "self_attn.o_proj": "attention.dense",
    },
    causal=False,
    remote_code=(
        "inclusionAI/LLaDA2.0-mini",
        "configuration_llada2_moe.LLaDA2MoeConfig",
        "modeling_llada2_moe.LLaDA2MoeModelLM",
    ),
    described={"max_position_embeddings": 16384},
    sampler=_by_threshold(0.95),  # the defaults of its `generate`
)
LLADA_MOE = Family(  # its config.json has the model_type of LLaDA
    "llada",
    "LLaDAMoEModelLM",
    settings={
        **_EXPERT_SETTINGS,
        "num_kv_heads": ("num_key_value_heads", None),
        "intermediate_size": ("dense_intermediate_size", None),
        "partial_rotary_factor": ("partial_rotary_factor", 1.0),
        "qk_norm": ("qk_layernorm", False),
        "expert_intermediate_size": ("expert_intermediate_size", REQUIRED),
    },
    implied={
        **{"qkv_bias": False, "rope_full_precision": False, "token_shift": False, "first_dense_layers": 0},
        **{"shared_experts": 0, "router": "softmax", "router_bias": False, "router_normalise": False},
        **{"router_scale": 1.0, "expert_groups": 1, "groups_per_token": 1},
    },
    fixed={
        "hidden_act": ("silu",),
        "moe_layer_freq": (1,),
        "moe_router_score_function": ("softmax", None),
        "routed_scaling_factor": (1.0, None),
        **dict.fromkeys(("attention_bias", "moe_router_enable_expert_bias"), (False,)),
        "norm_topk_prob": (None, False),
        "attention_dropout": (0.0,),
        **dict.fromkeys(("clip_qkv", "shared_expert_intermediate_size"), (None,)),
    },
    causal=False,
    remote_code=(
        "inclusionAI/LLaDA-MoE-7B-A1B-Base",
        "configuration_lladamoe.LLaDAConfig",
        "modeling_lladamoe.LLaDAMoEModelLM",
    ),
)
SDAR = Family(  # the layers of Qwen3
    "sdar",
    "SDARForCausalLM",
    settings={**QWEN3.settings, "block_length": ("block_size", REQUIRED)},
    implied={**QWEN3.implied, "block_causal": True, "token_shift": False},
    fixed=QWEN3.fixed,
    causal=False,
    remote_code=("JetLM/SDAR-1.7B-Chat", "configuration_sdar.SDARConfig", "modeling_sdar.SDARForCausalLM"),
    described={
        **{"bos_token_id": None, "sliding_window": None, "max_position_embeddings": 32768, "debug": False},
        **{"ep_size": 1, "fuse_cross_entropy": False, "micro_forward": False, "skip_checkpoint": False},
        **{"use_deepep": False},
    },
    sampler=_by_threshold(0.85),  # `low_confidence_dynamic` of its generate.py
    no_block_length="add it, 4 for SDAR-*-Chat, 16, 32 or 64 where the name says so",
)
SDAR_MOE = Family(  # the layers of Qwen3-MoE
    "sdar_moe",
    "SDARMoeForCausalLM",
    settings={
        **SDAR.settings,
        "num_experts": ("num_experts", REQUIRED),
        "experts_per_token": ("num_experts_per_tok", REQUIRED),
        "expert_intermediate_size": ("moe_intermediate_size", REQUIRED),
    },
    implied={
        **{**SDAR.implied, "first_dense_layers": 0, "shared_experts": 0, "router": "softmax", "router_bias": False},
        **{"router_normalise": True, "router_scale": 1.0, "expert_groups": 1, "groups_per_token": 1},
    },
    fixed={**SDAR.fixed, "norm_topk_prob": (True,), "decoder_sparse_step": (1,), "mlp_only_layers": (None,)},
    causal=False,
    remote_code=(
        "JetLM/SDAR-30B-A3B-Chat",
        "configuration_sdar_moe.SDARMoeConfig",
        "modeling_sdar_moe.SDARMoeForCausalLM",
    ),
    described={**SDAR.described, "mlp_only_layers": []},
    sampler=SDAR.sampler,
    no_block_length=SDAR.no_block_length,
)
FAST_DLLM_V2 = Family(  # the layers of Qwen2
    "Fast_dLLM_Qwen",
    "Fast_dLLM_QwenForCausalLM",
    settings={**QWEN2.settings, "block_length": ("bd_size", 32)},
    implied={**QWEN2.implied, "block_causal": True, "token_shift": True},
    fixed=QWEN2.fixed,
    causal=False,
    remote_code=(
        "Efficient-Large-Model/Fast_dLLM_v2_7B",
        "configuration.Fast_dLLM_QwenConfig",
        "modeling.Fast_dLLM_QwenForCausalLM",
    ),
    described={"bos_token_id": None, "sliding_window": None, "conplemenrary_mask": True},  # as the release spells it
    sampler=_by_threshold(0.9, block_length=8),  # sub-blocks, as on its model card
)


def _by_dllm(layers: Family, architecture: str) -> Family:
    """Returns the family of models that dllm made of autoregressive ones: with MDLM or BD3LM, which no key tells."""
    return replace(
        layers,
        model_type=f"a2d-{layers.model_type}",
        architecture=architecture,
        settings={**layers.settings, "block_length": ("block_size", REQUIRED)},
        implied={**layers.implied, "token_shift": False},
        causal=False,
        sampler={},
        no_block_length="add it, 0 for a model of MDLM, the length of its blocks for one of BD3LM (32 for -bd3lm-v0.1)",
    )


A2D = (
    _by_dllm(LLAMA, "A2DLlamaLMHeadModel"),
    _by_dllm(QWEN2, "A2DQwen2LMHeadModel"),
    _by_dllm(QWEN3, "A2DQwen3LMHeadModel"),
)
# A model that no published family has, such as one with biases and norms of heads; transformers does not open it.
OTHER = Family("dllm_var", "Transformer")

FORMATS = {family.model_type.lower(): family for family in (LLADA, DREAM, LLAMA, QWEN2, QWEN3, SDAR, SDAR_MOE)}
FORMATS |= {"fast_dllm_v2": FAST_DLLM_V2, "llada2": LLADA2, "llada_moe": LLADA_MOE}
# What keeps models of other types from being read.
UNREADABLE = {
    "nemotron_labs_diffusion": "its positions are turned by YaRN and its queries scaled with their position",
}
