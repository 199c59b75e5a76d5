"""`config.json` of model folders: read as our settings by the tables of the families, and written.

What is not fully understood is refused by name.
"""

import math
from pathlib import Path
from typing import Any, get_type_hints

from dllm_var.checkpoints.families import (
    A2D,
    DESCRIPTIVE,
    EXTRAS,
    FORMATS,
    LLAMA,
    OTHER,
    QWEN2,
    QWEN3,
    REQUIRED,
    ROPE_KEYS,
    UNREADABLE,
    Family,
)
from dllm_var.errors import UserError
from dllm_var.files import fits
from dllm_var.model.config import TransformerConfig


def family_of(values: dict[str, Any], file: Path) -> Family:
    """Returns the family of the values of a `config.json`; raises UserError when it is none of ours."""
    families = [one for one in (*FORMATS.values(), *A2D, OTHER) if values.get("model_type") == one.model_type]
    if not families:
        known = ", ".join(dict.fromkeys(family.model_type for family in (*FORMATS.values(), *A2D)))
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
    own, classes = values.get("auto_map") or {}, values.get("architectures")
    if family.remote_code is None and classes != [family.architecture] and any("AutoModel" in str(key) for key in own):
        raise UserError(
            f"{file} has architectures={classes}, code of its own, which may compute something else than "
            f"{family.architecture}: delete the entry auto_map if it does not"
        )
    kinds = get_type_hints(TransformerConfig)
    known_keys = DESCRIPTIVE | {key for key, _ in family.settings.values()} | set(family.fixed) | set(family.described)
    ours: dict[str, Any] = dict(family.implied)
    for name, (key, default) in family.settings.items():
        value = values.get(key)
        ours[name] = default if value is None else value
        if ours[name] is REQUIRED:
            remedy = f": {family.no_block_length}" if name == "block_length" else ""
            raise UserError(f"{file} has no {key}, which a {family.model_type} checkpoint must name{remedy}")
        if value is not None:
            _check_kind(key, value, kinds[name], file)
    if family in A2D:
        ours["block_causal"], ours["block_length"] = ours["block_length"] != 0, ours["block_length"] or None
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
        rope.pop("partial_rotary_factor", None)
    thetas = (rope.pop("rope_theta", None), values.get("rope_theta"), 10_000.0)  # transformers' default
    theta = next(one for one in thetas if one is not None)
    kind = rope.pop("rope_type", "default")
    if kind not in ("default", "llama3") or (kind == "default" and rope):
        raise UserError(
            f"{file} turns queries and keys by rope_type={kind!r} with {rope}; only plain rotary positions and llama3 "
            "are known"
        )
    return {"rope_theta": theta, "rope_llama3": rope if kind == "llama3" else None}


def released_sampler(family: Family, config: TransformerConfig) -> dict[str, Any] | None:
    """Returns how the release of a family decodes a model, as checkpoints describe samplers; None for our default."""
    if family.sampler is None or config.grid is None:
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
    if config.num_experts is None and family.settings.get("num_experts", (None, None))[1] is REQUIRED:
        return "its models are mixtures of experts, this one has none"
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
