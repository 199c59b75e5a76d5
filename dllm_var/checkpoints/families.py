"""Families of published checkpoints: their names of settings and weights, one table each, read in both directions.

The facts are those of the published `config.json` and safetensors files and of the classes that read them: LLaDA
(arXiv 2502.09992), Dream (2508.15487), and Llama, Qwen2 and Qwen3 as transformers has them. Our weights have the names
that transformers gives them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# Keys of any config.json that do not change what the model computes.
DESCRIPTIVE = frozenset(
    {"model_type", "architectures", "auto_map", "transformers_version", "transformers.js_config"}
    | {"torch_dtype", "dtype", "use_cache", "tokenizer_class", "dllm_var"}
    | {"bos_token_id", "eos_token_id", "unk_token_id", "sep_token_id", "cls_token_id", "decoder_start_token_id"}
    | {"output_attentions", "output_hidden_states", "return_dict", "torchscript", "chunk_size_feed_forward"}
    | {"is_encoder_decoder", "is_decoder", "id2label", "label2id", "problem_type", "attn_implementation"}
)


@dataclass(frozen=True)
class Family:
    """One family of checkpoints.

    Args:
        model_type: How `config.json` names it.
        architecture: The class that `config.json` names.
        settings: Our settings and its keys; what an absent key means is in `defaults`. Of several keys the first that
            is not None counts, and all are written.
        fixed: Keys, and the values under which the model computes what ours does. The first is what is written.
        renamed: Parts of our weights' names and the family's, where they differ.
        defaults: What it means when a key of `settings` is absent; keys that are not here must be there.
        required: Keys of `fixed` that must be there, since their absence means something else.
        implied: Our settings that every model of the family has.
        ignored: Its own keys that do not change what the model computes.
        causal: Whether its models read left to right.
        rope: Keys of the rotary embedding: `nested` in a dict of their own (transformers), or `flat`.
        remote_code: Hub repository whose code transformers needs to open it, and the modules in it.
    """

    model_type: str
    architecture: str
    settings: dict[str, str | tuple[str, ...]]
    fixed: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    required: frozenset[str] = frozenset()
    implied: dict[str, Any] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    causal: bool = True
    rope: str = "nested"
    remote_code: tuple[str, str, str] | None = None

    @property
    def name(self) -> str:
        """The family's name in lower case, for `--format`."""
        return self.model_type.lower()

    def theirs(self, ours: str) -> str:
        """Returns the name under which the family keeps one of our weights."""
        for part, its_part in self.renamed.items():
            ours = ours.replace(part, its_part)
        return ours


_TRANSFORMERS_SETTINGS: dict[str, str | tuple[str, ...]] = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "initializer_range": "initializer_range",
    "context_length": "max_position_embeddings",
    "mask_id": "mask_token_id",
    "pad_id": "pad_token_id",
}
_TRANSFORMERS_DEFAULTS: dict[str, Any] = {
    "head_dim": None,
    "max_position_embeddings": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "mask_token_id": None,
    "pad_token_id": None,
}
_TRANSFORMERS_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (0.0,),
    "partial_rotary_factor": (None, 1.0),
}
_UNUSED = frozenset({"pretraining_tp", "is_causal"})
_FULL_ATTENTION = {"use_sliding_window": (False,), "layer_types": ("full_attention", None)}
_WINDOW_UNUSED = frozenset({"max_window_layers", "sliding_window"})

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    settings=_TRANSFORMERS_SETTINGS,
    defaults={**_TRANSFORMERS_DEFAULTS, "num_key_value_heads": None},
    fixed={
        **_TRANSFORMERS_FIXED,
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "rope_interleaved": (None, False),
        "is_llama_config": (None, True),
    },
    implied={"qkv_bias": False, "qk_norm": False, "rope_full_precision": False},
    ignored=_UNUSED,
)
QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    settings=_TRANSFORMERS_SETTINGS,
    defaults=_TRANSFORMERS_DEFAULTS,
    fixed={**_TRANSFORMERS_FIXED, **_FULL_ATTENTION, "attention_bias": (None, True), "use_mrope": (None, False)},
    implied={"qkv_bias": True, "qk_norm": False, "rope_full_precision": False},
    ignored=_UNUSED | _WINDOW_UNUSED,
)
QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    settings=_TRANSFORMERS_SETTINGS,
    defaults={**_TRANSFORMERS_DEFAULTS, "head_dim": 128},
    fixed={**_TRANSFORMERS_FIXED, **_FULL_ATTENTION, "attention_bias": (False,)},
    implied={"qkv_bias": False, "qk_norm": True, "rope_full_precision": False},
    ignored=_UNUSED | _WINDOW_UNUSED,
)
DREAM = Family(
    model_type="Dream",
    architecture="DreamModel",
    settings={ours: theirs for ours, theirs in _TRANSFORMERS_SETTINGS.items() if ours != "head_dim"},
    defaults=_TRANSFORMERS_DEFAULTS,
    fixed={**_TRANSFORMERS_FIXED, "use_sliding_window": (False,), "use_mrope": (False, None)},
    implied={"qkv_bias": True, "qk_norm": False, "token_shift": True, "rope_full_precision": False},
    ignored=_UNUSED | _WINDOW_UNUSED,
    causal=False,
    remote_code=("Dream-org/Dream-v0-Base-7B", "configuration_dream.DreamConfig", "modeling_dream.DreamModel"),
)
LLADA = Family(
    model_type="llada",
    architecture="LLaDAModelLM",
    settings={
        "vocab_size": ("embedding_size", "vocab_size"),
        "hidden_size": "d_model",
        "num_layers": "n_layers",
        "num_heads": "n_heads",
        "num_kv_heads": "n_kv_heads",
        "intermediate_size": "mlp_hidden_size",
        "norm_eps": "rms_norm_eps",
        "qkv_bias": "include_qkv_bias",
        "tie_embeddings": "weight_tying",
        "rope_full_precision": "rope_full_precision",
        "initializer_range": "init_std",
        "context_length": "max_sequence_length",
        "mask_id": "mask_token_id",
        "pad_id": "pad_token_id",
    },
    defaults={
        "n_kv_heads": None,
        "include_qkv_bias": False,
        "init_std": 0.02,
        "rope_full_precision": True,
        "max_sequence_length": None,
        "pad_token_id": None,
    },
    fixed={
        "activation_type": ("silu",),
        "alibi": (False,),
        "attention_dropout": (0.0,),
        "attention_layer_norm": (False,),
        "bias_for_layer_norm": (False, None),
        "block_group_size": (1,),
        "block_type": ("llama",),
        "embedding_dropout": (0.0,),
        "include_bias": (False,),
        "input_emb_norm": (False,),
        "layer_norm_type": ("rms",),
        "layer_norm_with_affine": (True,),
        "multi_query_attention": (None, False),
        "residual_dropout": (0.0,),
        "rope": (True,),
        "scale_logits": (False,),
    },
    required=frozenset({"activation_type", "block_type", "layer_norm_type", "rope"}),
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
    implied={"qk_norm": False, "token_shift": False, "rope_llama3": None},
    ignored=frozenset(
        {"alibi_bias_max", "attention_layer_norm_with_affine", "flash_attention", "mlp_ratio", "precision"}
        | {"init_cutoff_factor", "init_device", "init_fn"}
    ),
    causal=False,
    rope="flat",
    remote_code=("GSAI-ML/LLaDA-8B-Base", "configuration_llada.LLaDAConfig", "modeling_llada.LLaDAModelLM"),
)
# A model that no published family has, such as one with biases and norms of heads; transformers does not open it.
OTHER = Family(model_type="dllm_var", architecture="Transformer", settings={}, rope="none")

FAMILIES = {family.model_type: family for family in (LLADA, DREAM, LLAMA, QWEN2, QWEN3, OTHER)}
FORMATS = {family.name: family for family in FAMILIES.values() if family is not OTHER}
