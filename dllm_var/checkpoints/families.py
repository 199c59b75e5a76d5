"""Families of published checkpoints: one table each of their settings and names of weights, read in both directions.

The facts are those of the published `config.json` and safetensors files and of the classes that read them: LLaDA
(arXiv 2502.09992), LLaDA-MoE (2509.24389), LLaDA2 (2512.15745), Dream (2508.15487), SDAR (2510.06303), Fast-dLLM v2
(2509.26328), and Llama, Qwen2 and Qwen3 as transformers has them. Our weights have the names that transformers gives
them. What is not fully understood is refused by name.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from dllm_var.errors import UserError
from dllm_var.files import fits
from dllm_var.model.config import TransformerConfig

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
    sampler: dict[str, Any] | None = None  # how its release decodes, where that is not our default

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
# A model that no published family has, such as one with biases and norms of heads; transformers does not open it.
OTHER = Family("dllm_var", "Transformer")

FORMATS = {family.model_type.lower(): family for family in (LLADA, DREAM, LLAMA, QWEN2, QWEN3, SDAR)}
FORMATS |= {"fast_dllm_v2": FAST_DLLM_V2, "llada2": LLADA2, "llada_moe": LLADA_MOE}
# What keeps models of other types from being read.
UNREADABLE = {
    "nemotron_labs_diffusion": "its positions are turned by YaRN and its queries scaled with their position",
    "sdar_moe": "its experts are not those of LLaDA2 or LLaDA-MoE",
}


def family_of(values: dict[str, Any], file: Path) -> Family:
    """Returns the family of the values of a `config.json`; raises UserError when it is none of ours."""
    families = [family for family in (*FORMATS.values(), OTHER) if values.get("model_type") == family.model_type]
    if not families:
        known = ", ".join(dict.fromkeys(family.model_type for family in FORMATS.values()))
        reason = UNREADABLE.get(str(values.get("model_type")))
        if reason is not None:
            raise UserError(f"{file} is of model_type {values['model_type']!r}, which cannot be loaded yet: {reason}")
        raise UserError(f"{file} is of model_type {values.get('model_type')!r}; models of {known} can be loaded")
    alike = (family for family in families if ("num_experts" in family.settings) == ("num_experts" in values))
    return next(alike, families[0])


def read_config(values: dict[str, Any], file: Path) -> TransformerConfig:
    """Returns our settings of the values of a `config.json`; our entry in it comes before the family's keys.

    Raises UserError for a key that is missing or unknown, or under which the model would compute something else.
    """
    family = family_of(values, file)
    extras = values.get(EXTRAS) or {}
    if not isinstance(extras, dict) or not isinstance(extras.get("transformer", {}), dict):
        raise UserError(f"{file} has {EXTRAS}={extras!r}, where settings by name are expected")
    more = extras.get("transformer", {})
    if family is OTHER:
        return read_settings(more, file)
    kinds = get_type_hints(TransformerConfig)
    known_keys = DESCRIPTIVE | {key for key, _ in family.settings.values()} | set(family.fixed) | set(family.described)
    ours: dict[str, Any] = dict(family.implied)
    for name, (key, default) in family.settings.items():
        value = values.get(key)
        ours[name] = default if value is None else value
        if ours[name] is REQUIRED:
            raise UserError(f"{file} has no {key}, which a {family.model_type} checkpoint must name")
        if value is not None:
            _check_kind(key, value, kinds[name], file)
    if "rope_theta" not in family.settings:
        known_keys |= ROPE_KEYS
        ours |= _read_rope(values, file)
    for key, allowed in family.fixed.items():
        given = values.get(key)
        if given is None and all(allowed):
            raise UserError(f"{file} has no {key}, which a {family.model_type} checkpoint must name")
        for value in given if isinstance(given, list) else [given]:
            if value is not None and value not in allowed:
                known = " or ".join(repr(one) for one in allowed if one is not None)
                raise UserError(f"{file} has {key}={value!r}; only {known} is known here")
    unknown = sorted(key for key in values if key not in known_keys and not key.startswith("_"))
    if unknown:
        raise UserError(
            f"{file} has {unknown[0]}={values[unknown[0]]!r}, which is not known of {family.model_type} models: "
            "delete the entry if it does not change what the model computes"
        )
    ends = values.get("eos_token_id")
    ours["terminator_ids"] = ends if ends is None or isinstance(ends, list) else [ends]
    ours["causal"] = family.causal and values.get("is_causal", True) is not False and not more.get("causal_context")
    return read_settings({**ours, **more}, file)


def read_settings(values: Any, place: Path) -> TransformerConfig:
    """Returns the resolved settings that `TransformerConfig.to_dict` wrote into a checkpoint, each of them checked."""
    kinds = get_type_hints(TransformerConfig)
    if not isinstance(values, dict) or not set(values) <= set(kinds):
        unknown = sorted(map(str, set(values) - set(kinds))) if isinstance(values, dict) else values
        raise UserError(f"{place} has transformer settings this version does not know: {unknown}")
    for name, value in values.items():
        _check_kind(name, value, kinds[name], place)
    try:
        return TransformerConfig(**values).resolved()
    except UserError as error:
        raise UserError(f"{place}: {error}") from error


def _check_kind(name: str, value: Any, kind: Any, place: Path) -> None:
    if not fits(value, kind):
        expected = kind.__name__ if isinstance(kind, type) else kind
        raise UserError(f"{place} has {name}={value!r}, where {expected} is expected")


def _read_rope(values: dict[str, Any], file: Path) -> dict[str, Any]:
    """Returns our rotary settings; transformers 4 has rope_theta and rope_scaling, transformers 5 rope_parameters."""
    given = [values.get(name) or {} for name in ("rope_scaling", "rope_parameters")]
    if not all(isinstance(part, dict) for part in given):
        raise UserError(f"{file} has rope_scaling or rope_parameters that are no settings by name")
    rope = {**given[0], **given[1]}
    if rope.get("partial_rotary_factor") == values.get("partial_rotary_factor", 1.0):  # read as a key of its own
        del rope["partial_rotary_factor"]
    theta = rope.pop("rope_theta", None) or values.get("rope_theta") or 10_000.0  # transformers' default
    kind = rope.pop("rope_type", "default")
    if kind not in ("default", "llama3") or (kind == "default" and rope):
        raise UserError(
            f"{file} turns queries and keys by rope_type={kind!r} with {rope}; only plain rotary positions and llama3 "
            "are known"
        )
    return {"rope_theta": theta, "rope_llama3": rope if kind == "llama3" else None}


def released_sampler(family: Family, config: TransformerConfig) -> dict[str, Any] | None:
    """Returns how the release of a family decodes a model, as checkpoints describe samplers; None for our default."""
    if family.sampler is None:
        return None
    arguments = {"block_length": config.block_length, **family.sampler}
    arguments["block_length"] = min(arguments["block_length"], config.block_length or math.inf)
    return {"class_path": "dllm_var.sampling.BlockDiffusionSampler", "init_args": arguments}


def natural_family(config: TransformerConfig) -> Family:
    """Returns the family as which transformers opens a model, or `OTHER` when it has none such."""
    return next((family for family in (LLAMA, QWEN2, QWEN3) if _inexpressible(family, config) is None), OTHER)


def write_config(family: Family, config: TransformerConfig, dtype: str) -> dict[str, Any]:
    """Returns the `config.json` of a family for our resolved settings, and weights of a type such as `bfloat16`.

    Our entry in it has what the family's keys do not say.
    """
    values: dict[str, Any] = {"model_type": family.model_type, "architectures": [family.architecture]}
    ours = config.to_dict()
    if family is OTHER:
        return {**values, "torch_dtype": dtype, EXTRAS: {"transformer": ours}}
    reason = _inexpressible(family, config)
    if reason is not None:
        name = next(name for name, known in FORMATS.items() if known is family)
        raise UserError(f"--format {name} cannot hold this model: {reason}")
    values |= family.described
    values |= {key: ours[name] for name, (key, _) in family.settings.items() if ours[name] is not None}
    values |= {key: allowed[0] for key, allowed in family.fixed.items() if allowed[0] is not None}
    if "moe_layer_freq" in family.fixed:
        values["moe_layer_freq"] = [1] * config.num_layers  # each has experts
    values |= {"vocab_size": config.vocab_size, "rope_theta": config.rope_theta * config.rope_scaling}
    ends = config.terminator_ids or []
    reads_left = config.causal or config.causal_context  # a causal context is read so until a block is denoised
    if family.remote_code is not None:
        repository, configuration, model = family.remote_code
        modules = {"AutoConfig": configuration, "AutoModel": model, "AutoModelForCausalLM": model}
        values["auto_map"] = {name: f"{repository}--{module}" for name, module in modules.items()}
    if "rope_theta" in family.settings:
        ends = ends[:1]  # its class has room for one
    else:
        llama3: dict[str, Any] = dict(config.rope_llama3 or {})
        if llama3:
            llama3["original_max_position_embeddings"] = int(llama3["original_max_position_embeddings"])
        values["rope_scaling"] = {"rope_type": "llama3", **llama3} if llama3 else None
        values["is_causal"] = reads_left  # read by transformers 5; other engines ignore it
    values["eos_token_id"] = ends if len(ends) > 1 else next(iter(ends), None)
    values |= {"torch_dtype": dtype, "use_cache": reads_left}
    said = read_config(values, Path("config.json")).to_dict()
    return {**values, EXTRAS: {"transformer": {name: ours[name] for name in ours if ours[name] != said[name]}}}


def _inexpressible(family: Family, config: TransformerConfig) -> str | None:
    """Returns why a family has no such model, or None when it has."""
    for name, value in family.implied.items():
        if getattr(config, name) != value:
            return f"its models have {name}={value}, this one {getattr(config, name)}"
    if config.num_experts is not None and "num_experts" not in family.settings:
        return f"its models have no experts, this one {config.num_experts}"
    if config.partial_rotary_factor != 1 and "partial_rotary_factor" not in family.settings:
        return f"all of a head turns with the position, here a share of {config.partial_rotary_factor}"
    for name, (_, default) in family.settings.items():
        if default is REQUIRED and getattr(config, name) is None and name != "mask_id":
            return f"its models have {name}, this one none"
    width = config.num_heads * (config.head_dim or 0)
    if "head_dim" not in family.settings and width != config.hidden_size:
        return f"its heads share hidden_size {config.hidden_size} evenly, this one's take {width}"
    if not family.causal and (config.causal or config.causal_context):
        return f"its models read in both directions, this one {'' if config.causal else 'its context '}left to right"
    if config.block_causal and "block_length" not in family.settings:
        return f"its models read all of a text, this one blocks of {config.block_length} from left to right"
    if config.mask_id is None and not family.causal:
        return "its models have a mask token, this one none"
    return None
