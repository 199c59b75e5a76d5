"""Families of published checkpoints: one table each of their settings and names of weights, read in both directions.

The facts are those of the published `config.json` and safetensors files and of the classes that read them: LLaDA
(arXiv 2502.09992), Dream (2508.15487), and Llama, Qwen2 and Qwen3 as transformers has them. Our weights have the names
that transformers gives them. What is not fully understood is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from dllm_var.errors import UserError
from dllm_var.files import fits
from dllm_var.model.config import TransformerConfig

EXTRAS = "dllm_var"  # the entry of config.json with what the family has no keys for
REQUIRED: Any = object()  # in place of a default: the key must be there
ROPE_KEYS = frozenset({"rope_theta", "rope_scaling", "rope_parameters"})
# Keys of any config.json that do not change what the model computes.
DESCRIPTIVE = frozenset(
    {"model_type", "architectures", "auto_map", "transformers_version", "transformers.js_config"}
    | {"torch_dtype", "dtype", "use_cache", "tokenizer_class", "dllm_var"}
    | {"bos_token_id", "eos_token_id", "unk_token_id", "sep_token_id", "cls_token_id", "decoder_start_token_id"}
    | {"output_attentions", "output_hidden_states", "return_dict", "torchscript", "chunk_size_feed_forward"}
    | {"is_encoder_decoder", "is_decoder", "id2label", "label2id", "problem_type", "attn_implementation"}
)


class Key:
    """Keys of `config.json` for one of our settings: the first that is not None counts, and all are written."""

    def __init__(self, *names: str, default: Any = REQUIRED) -> None:
        self.names, self.default = names, default  # the default is what it means when none of them is there


@dataclass(frozen=True)
class Family:
    """One family of checkpoints."""

    model_type: str  # how `config.json` names it
    architecture: str  # the class that `config.json` names
    settings: dict[str, Key] = field(default_factory=dict)  # by our names
    implied: dict[str, Any] = field(default_factory=dict)  # our settings that every model of the family has
    # Keys, and the values under which the model computes what ours does. The first one is written.
    fixed: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    required: frozenset[str] = frozenset()  # keys of `fixed` whose absence means something else
    ignored: frozenset[str] = frozenset()  # its own keys that do not change what the model computes
    renamed: dict[str, str] = field(default_factory=dict)  # parts of our weights' names and its own, where they differ
    causal: bool = True  # its models read left to right
    transformers_rope: bool = True  # `rope_theta` with `rope_scaling`, or `rope_parameters`, as transformers has them
    remote_code: tuple[str, str, str] | None = None  # a hub repository with its classes of config and model

    @property
    def name(self) -> str:
        """The family's name in lower case, for `--format`."""
        return self.model_type.lower()

    @property
    def known_keys(self) -> set[str]:
        """All keys that its `config.json` may have."""
        own = {name for of_setting in self.settings.values() for name in of_setting.names}
        return own | DESCRIPTIVE | self.ignored | set(self.fixed) | (ROPE_KEYS if self.transformers_rope else set())

    def theirs(self, ours: str) -> str:
        """Returns the name under which the family keeps one of our weights."""
        for part, its_part in self.renamed.items():
            ours = ours.replace(part, its_part)
        return ours


# -- the table ---------------------------------------------------------------------------------------------------------

_SETTINGS = {
    "vocab_size": Key("vocab_size"),
    "hidden_size": Key("hidden_size"),
    "num_layers": Key("num_hidden_layers"),
    "num_heads": Key("num_attention_heads"),
    "num_kv_heads": Key("num_key_value_heads"),
    "head_dim": Key("head_dim", default=None),
    "intermediate_size": Key("intermediate_size"),
    "norm_eps": Key("rms_norm_eps", default=1e-6),
    "tie_embeddings": Key("tie_word_embeddings", default=False),
    "initializer_range": Key("initializer_range", default=0.02),
    "context_length": Key("max_position_embeddings", default=None),
    "mask_id": Key("mask_token_id", default=None),
    "pad_id": Key("pad_token_id", default=None),
}
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (0.0,),
    "partial_rotary_factor": (None, 1.0),
}
_QWEN_FIXED = {**_FIXED, "use_sliding_window": (False,), "layer_types": ("full_attention", None)}
_UNUSED = frozenset({"pretraining_tp", "is_causal"})
_QWEN_UNUSED = _UNUSED | {"max_window_layers", "sliding_window"}

LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    settings={**_SETTINGS, "num_kv_heads": Key("num_key_value_heads", default=None)},
    implied={"qkv_bias": False, "qk_norm": False, "rope_full_precision": False},
    fixed={
        **_FIXED,
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "rope_interleaved": (None, False),
        "is_llama_config": (None, True),
    },
    ignored=_UNUSED,
)
QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    settings=_SETTINGS,
    implied={"qkv_bias": True, "qk_norm": False, "rope_full_precision": False},
    fixed={**_QWEN_FIXED, "attention_bias": (None, True), "use_mrope": (None, False)},
    ignored=_QWEN_UNUSED,
)
QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    settings={**_SETTINGS, "head_dim": Key("head_dim", default=128)},
    implied={"qkv_bias": False, "qk_norm": True, "rope_full_precision": False},
    fixed={**_QWEN_FIXED, "attention_bias": (False,)},
    ignored=_QWEN_UNUSED,
)
DREAM = Family(
    "Dream",
    "DreamModel",
    settings={name: its_key for name, its_key in _SETTINGS.items() if name != "head_dim"},
    implied={"qkv_bias": True, "qk_norm": False, "token_shift": True, "rope_full_precision": False},
    fixed={**_FIXED, "use_sliding_window": (False,), "use_mrope": (False, None)},
    ignored=_QWEN_UNUSED,
    causal=False,
    remote_code=("Dream-org/Dream-v0-Base-7B", "configuration_dream.DreamConfig", "modeling_dream.DreamModel"),
)
_OFF = ("alibi", "attention_layer_norm", "include_bias", "input_emb_norm", "scale_logits")
_DROPOUTS = ("attention_dropout", "embedding_dropout", "residual_dropout")
LLADA = Family(
    "llada",
    "LLaDAModelLM",
    settings={
        "vocab_size": Key("embedding_size", "vocab_size"),
        "hidden_size": Key("d_model"),
        "num_layers": Key("n_layers"),
        "num_heads": Key("n_heads"),
        "num_kv_heads": Key("n_kv_heads", default=None),
        "intermediate_size": Key("mlp_hidden_size"),
        "norm_eps": Key("rms_norm_eps"),
        "qkv_bias": Key("include_qkv_bias", default=False),
        "tie_embeddings": Key("weight_tying"),
        "rope_theta": Key("rope_theta"),
        "rope_full_precision": Key("rope_full_precision", default=True),
        "initializer_range": Key("init_std", default=0.02),
        "context_length": Key("max_sequence_length", default=None),
        "mask_id": Key("mask_token_id"),
        "pad_id": Key("pad_token_id", default=None),
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
        **dict.fromkeys(_OFF, (False,)),
        **dict.fromkeys(_DROPOUTS, (0.0,)),
    },
    required=frozenset({"activation_type", "block_type", "layer_norm_type", "rope"}),
    ignored=frozenset(
        {"alibi_bias_max", "attention_layer_norm_with_affine", "flash_attention", "mlp_ratio", "precision"}
        | {"init_cutoff_factor", "init_device", "init_fn"}
    ),
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
    transformers_rope=False,
    remote_code=("GSAI-ML/LLaDA-8B-Base", "configuration_llada.LLaDAConfig", "modeling_llada.LLaDAModelLM"),
)
# A model that no published family has, such as one with biases and norms of heads; transformers does not open it.
OTHER = Family("dllm_var", "Transformer", transformers_rope=False)

FAMILIES = {family.model_type: family for family in (LLADA, DREAM, LLAMA, QWEN2, QWEN3, OTHER)}
FORMATS = {family.name: family for family in FAMILIES.values() if family is not OTHER}


def family_of(values: dict[str, Any], file: Path) -> Family:
    """Returns the family of the values of a `config.json`; raises UserError when it is none of ours."""
    family = FAMILIES.get(str(values.get("model_type")))
    if family is None:
        known = ", ".join(name for name in FAMILIES if name != OTHER.model_type)
        raise UserError(f"{file} is of model_type {values.get('model_type')!r}; dense models of {known} can be loaded")
    return family


# -- config.json in ----------------------------------------------------------------------------------------------------


def read_config(values: dict[str, Any], file: Path) -> TransformerConfig:
    """Returns our settings of the values of a `config.json`; our entry in it comes before the family's keys.

    Raises:
        UserError: When a key is missing, unknown, or has a value under which the model would compute something else.
    """
    family = family_of(values, file)
    if family is OTHER and "transformer" in values:
        raise UserError(
            f"{file} was written before weights had their published names: export it as --format llama, qwen2 or "
            "qwen3 with the version that wrote it"
        )
    kinds = get_type_hints(TransformerConfig)
    ours: dict[str, Any] = dict(family.implied)
    for name, its_key in family.settings.items():
        ours[name] = _read_key(family, its_key, values, kinds[name], file)
    if family.transformers_rope:
        ours |= _read_rope(values, file)
    _check_fixed(family, values, file)
    unknown = sorted(name for name in values if name not in family.known_keys and not name.startswith("_"))
    if unknown:
        raise UserError(
            f"{file} has {unknown[0]}={values[unknown[0]]!r}, which is not known of {family.model_type} models: "
            "delete the entry if it does not change what the model computes"
        )
    ends = values.get("eos_token_id")
    ours["terminator_ids"] = list(ends) if isinstance(ends, list) else None if ends is None else [ends]
    extras = values.get(EXTRAS) or {}
    if not isinstance(extras, dict) or not isinstance(extras.get("transformer", {}), dict):
        raise UserError(f"{file} has {EXTRAS}={extras!r}, where settings by name are expected")
    # Earlier exports have some of our settings beside the others, without `transformer`.
    more = extras.get("transformer", {name: value for name, value in extras.items() if name in kinds})
    ours["causal"] = family.causal and values.get("is_causal", True) is not False and not more.get("causal_context")
    return read_settings({**ours, **more}, file)


def read_settings(values: Any, place: Path) -> TransformerConfig:
    """Returns the resolved settings that `TransformerConfig.to_dict` wrote into a checkpoint.

    Raises:
        UserError: When a setting is unknown, of another type, not a finite number, or does not fit the others.
    """
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


def _read_key(family: Family, its_key: Key, values: dict[str, Any], kind: Any, file: Path) -> Any:
    given = {name: values[name] for name in its_key.names if values.get(name) is not None}
    for name, value in given.items():
        _check_kind(name, value, kind, file)
    if not given and its_key.default is REQUIRED:
        raise UserError(f"{file} has no {its_key.names[0]}, which a {family.model_type} checkpoint must name")
    return next(iter(given.values()), its_key.default)


def _check_fixed(family: Family, values: dict[str, Any], file: Path) -> None:
    for name, allowed in family.fixed.items():
        if name not in values and name in family.required:
            raise UserError(f"{file} has no {name}, which a {family.model_type} checkpoint must name")
        given = values.get(name, allowed[0])
        for value in given if isinstance(given, list) else [given]:
            if value not in allowed:
                known = " or ".join(repr(one) for one in allowed if one is not None)
                raise UserError(f"{file} has {name}={value!r}; only {known} is known here")


def _read_rope(values: dict[str, Any], file: Path) -> dict[str, Any]:
    """Returns our rotary settings; transformers 4 has rope_theta and rope_scaling, transformers 5 rope_parameters."""
    rope = {**(values.get("rope_scaling") or {}), **(values.get("rope_parameters") or {})}
    if rope.get("partial_rotary_factor") == 1.0:  # all of each head turns, as it does here
        del rope["partial_rotary_factor"]
    theta = rope.pop("rope_theta", None) or values.get("rope_theta") or 10_000.0  # transformers' default
    old_name = rope.pop("type", "default")
    kind = rope.pop("rope_type", old_name)
    if kind not in ("default", "llama3") or (kind == "default" and rope):
        raise UserError(
            f"{file} turns queries and keys by rope_type={kind!r} with {rope}; only plain rotary positions and llama3 "
            "are known"
        )
    return {"rope_theta": theta, "rope_llama3": rope if kind == "llama3" else None}


# -- config.json out ---------------------------------------------------------------------------------------------------


def natural_family(config: TransformerConfig) -> Family:
    """Returns the family as which transformers opens a model, or `OTHER` when it has none such."""
    return next((family for family in (LLAMA, QWEN2, QWEN3) if _inexpressible(family, config) is None), OTHER)


def write_config(family: Family, config: TransformerConfig, dtype: str) -> dict[str, Any]:
    """Returns the `config.json` of a family for our resolved settings, and weights of a type such as `bfloat16`.

    Our entry in it has what the family's keys do not say.

    Raises:
        UserError: When the family has no such models; says why.
    """
    values: dict[str, Any] = {"model_type": family.model_type, "architectures": [family.architecture]}
    ours = config.to_dict()
    if family is OTHER:
        return {**values, "torch_dtype": dtype, EXTRAS: {"transformer": ours}}
    reason = _inexpressible(family, config)
    if reason is not None:
        raise UserError(f"--format {family.name} cannot hold this model: {reason}")
    if family.remote_code is not None:
        repository, configuration, model = family.remote_code
        modules = {"AutoConfig": configuration, "AutoModel": model, "AutoModelForCausalLM": model}
        values["auto_map"] = {name: f"{repository}--{module}" for name, module in modules.items()}
    for name, its_key in family.settings.items():
        if ours[name] is not None:
            values |= dict.fromkeys(its_key.names, ours[name])
    values |= {name: allowed[0] for name, allowed in family.fixed.items() if allowed[0] is not None}
    if "layer_types" in family.fixed:
        values["layer_types"] = ["full_attention"] * config.num_layers
    values["rope_theta"] = config.rope_theta * config.rope_scaling
    ends = config.terminator_ids or []
    values["eos_token_id"] = next(iter(ends), None)
    reads_left = config.causal or config.causal_context  # a causal context is read so until a block is denoised
    if family.transformers_rope:
        llama3: dict[str, Any] = dict(config.rope_llama3 or {})
        if llama3:
            llama3["original_max_position_embeddings"] = int(llama3["original_max_position_embeddings"])
        values["rope_scaling"] = {"rope_type": "llama3", **llama3} if llama3 else None
        values["is_causal"] = reads_left  # read by transformers 5; other engines ignore it
        values["eos_token_id"] = ends if len(ends) > 1 else values["eos_token_id"]
    values |= {"torch_dtype": dtype, "use_cache": reads_left}
    said = read_config(values, Path("config.json")).to_dict()
    return {**values, EXTRAS: {"transformer": {name: ours[name] for name in ours if ours[name] != said[name]}}}


def _inexpressible(family: Family, config: TransformerConfig) -> str | None:
    """Returns why a family has no such model, or None when it has."""
    for name, value in family.implied.items():
        if getattr(config, name) != value:
            return f"its models have {name}={value}, this one {getattr(config, name)}"
    width = config.num_heads * (config.head_dim or 0)
    if "head_dim" not in family.settings and width != config.hidden_size:
        return f"its heads share hidden_size {config.hidden_size} evenly, this one's take {width}"
    if not family.causal and (config.causal or config.causal_context):
        return f"its models read in both directions, this one {'' if config.causal else 'its context '}left to right"
    if config.mask_id is None and not family.causal:
        return "its models have a mask token, this one none"
    return None
