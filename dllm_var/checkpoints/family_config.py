"""`config.json` of published checkpoints, in and out; what is not fully understood is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_type_hints

from dllm_var.checkpoints.families import DESCRIPTIVE, FAMILIES, LLAMA, OTHER, QWEN2, QWEN3, Family
from dllm_var.errors import UserError
from dllm_var.files import fits
from dllm_var.model.config import LLAMA3_KEYS, TransformerConfig

EXTRAS = "dllm_var"  # the entry of config.json with what the family has no keys for
ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters")
DEFAULT_THETA = 10_000.0  # transformers', where config.json names none


def family_of(values: dict[str, Any], file: Path) -> Family:
    """Returns the family of a `config.json`; raises UserError naming the model type when it is none of ours."""
    family = FAMILIES.get(str(values.get("model_type")))
    if family is None:
        known = ", ".join(name for name in FAMILIES if name != OTHER.model_type)
        raise UserError(f"{file} is of model_type {values.get('model_type')!r}; dense models of {known} can be loaded")
    return family


def natural_family(config: TransformerConfig) -> Family:
    """Returns the family as which transformers opens a model, or `OTHER` when it has none such."""
    return next((family for family in (LLAMA, QWEN2, QWEN3) if inexpressible(family, config) is None), OTHER)


def read_settings(values: Any, place: Path) -> TransformerConfig:
    """Returns the transformer's settings that a checkpoint holds, resolved.

    Args:
        values: What `TransformerConfig.to_dict` wrote; any content of a checkpoint.
        place: Where it stands, for messages.

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


def read_config(values: dict[str, Any], file: Path) -> TransformerConfig:
    """Returns our settings of a `config.json`; what our entry in it says comes before the family's keys.

    Args:
        values: Its content.
        file: Where it stands, for messages.

    Raises:
        UserError: When a key is missing, unknown, or has a value under which the model would compute something else.
    """
    family = family_of(values, file)
    if family is OTHER and "transformer" in values:
        raise UserError(
            f"{file} was written before weights had their published names: export it as --format llama, qwen2 or "
            "qwen3 with the version that wrote it"
        )
    ours: dict[str, Any] = dict(family.implied)
    kinds = get_type_hints(TransformerConfig)
    for name, keys in family.settings.items():
        ours[name] = _read_setting(family, values, keys, kinds[name], file)
    ours |= _read_rope(family, values, file)
    _check_fixed(family, values, file)
    known = {*DESCRIPTIVE, *family.ignored, *family.fixed, *_rope_keys(family), *_flat(family)}
    unknown = sorted(key for key in set(values) - known if not key.startswith("_"))  # _name_or_path: bookkeeping
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


def write_config(family: Family, config: TransformerConfig, dtype: str) -> dict[str, Any]:
    """Returns the `config.json` of a family for our settings; our entry has what the family's keys do not say.

    Args:
        family: The family.
        config: Our settings, resolved.
        dtype: Type of the weights, such as `bfloat16`.

    Raises:
        UserError: When the family has no such models; says why.
    """
    values: dict[str, Any] = {"model_type": family.model_type, "architectures": [family.architecture]}
    ours = config.to_dict()
    if family is OTHER:
        return {**values, "torch_dtype": dtype, EXTRAS: {"transformer": ours}}
    reason = inexpressible(family, config)
    if reason is not None:
        raise UserError(f"--format {family.name} cannot hold this model: {reason}")
    if family.remote_code is not None:
        repository, configuration, model = family.remote_code
        modules = {"AutoConfig": configuration, "AutoModel": model, "AutoModelForCausalLM": model}
        values["auto_map"] = {name: f"{repository}--{module}" for name, module in modules.items()}
    for name, keys in family.settings.items():
        if ours[name] is not None:
            values |= dict.fromkeys((keys,) if isinstance(keys, str) else keys, ours[name])
    values |= {key: allowed[0] for key, allowed in family.fixed.items() if allowed[0] is not None}
    if "layer_types" in family.fixed:
        values["layer_types"] = ["full_attention"] * config.num_layers
    values["rope_theta"] = config.rope_theta * config.rope_scaling
    if family.rope == "nested":
        llama3: dict[str, Any] = dict(config.rope_llama3 or {})
        if llama3:
            llama3["original_max_position_embeddings"] = int(llama3["original_max_position_embeddings"])
        values["rope_scaling"] = {"rope_type": "llama3", **llama3} if llama3 else None
        # Read by transformers 5; other engines ignore it. A causal context is read so until a block is denoised.
        values["is_causal"] = config.causal or config.causal_context
    ends = config.terminator_ids or []
    values["eos_token_id"] = ends if family.rope == "nested" and len(ends) > 1 else next(iter(ends), None)
    values |= {"torch_dtype": dtype, "use_cache": config.causal or config.causal_context}
    said = read_config(values, Path("config.json")).to_dict()
    return {**values, EXTRAS: {"transformer": {name: ours[name] for name in ours if ours[name] != said[name]}}}


def inexpressible(family: Family, config: TransformerConfig) -> str | None:
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


def _read_setting(family: Family, values: dict[str, Any], keys: str | tuple[str, ...], kind: Any, file: Path) -> Any:
    keys = (keys,) if isinstance(keys, str) else keys
    given = {key: values[key] for key in keys if values.get(key) is not None}
    for key, value in given.items():
        _check_kind(key, value, kind, file)
    if not given and keys[0] not in family.defaults:
        raise UserError(f"{file} has no {keys[0]}, which a {family.model_type} checkpoint must name")
    return next(iter(given.values())) if given else family.defaults[keys[0]]


def _check_kind(key: str, value: Any, kind: Any, place: Path) -> None:
    if not fits(value, kind):
        expected = kind.__name__ if isinstance(kind, type) else kind
        raise UserError(f"{place} has {key}={value!r}, where {expected} is expected")


def _check_fixed(family: Family, values: dict[str, Any], file: Path) -> None:
    for key, allowed in family.fixed.items():
        if key not in values:
            if key in family.required:
                raise UserError(f"{file} has no {key}, which a {family.model_type} checkpoint must name")
            continue
        given = values[key] if isinstance(values[key], list) else [values[key]]
        wrong = [value for value in given if value not in allowed]
        if wrong:
            known = " or ".join(repr(value) for value in allowed if value is not None)
            raise UserError(f"{file} has {key}={wrong[0]!r}; only {known} is known here")


def _rope_keys(family: Family) -> tuple[str, ...]:
    return {"nested": ROPE_KEYS, "flat": ROPE_KEYS[:1]}.get(family.rope, ())


def _flat(family: Family) -> list[str]:
    return [key for keys in family.settings.values() for key in ((keys,) if isinstance(keys, str) else keys)]


def _read_rope(family: Family, values: dict[str, Any], file: Path) -> dict[str, Any]:
    """Returns our rotary settings; transformers 4 has rope_theta and rope_scaling, transformers 5 rope_parameters."""
    if family.rope != "nested":
        keys = _rope_keys(family)
        return {key: float(_read_setting(family, values, key, float, file)) for key in keys}
    rope: dict[str, Any] = {"rope_theta": values.get("rope_theta") or DEFAULT_THETA}
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(values.get(key) or {}, dict):
            raise UserError(f"{file} has {key}={values[key]!r}, where settings by name are expected")
        rope |= values.get(key) or {}
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    if rope.get("partial_rotary_factor") == 1.0:  # all of each head turns, as it does here
        del rope["partial_rotary_factor"]
    expected = {"default": (), "llama3": LLAMA3_KEYS}.get(str(kind))
    if expected is None:
        raise UserError(f"{file} scales its rotary positions by rope_type={kind!r}; only default and llama3 are known")
    missing, unknown = sorted(set(expected) - set(rope)), sorted(set(rope) - set(expected))
    if missing or unknown:
        problem = f"no {missing[0]}" if missing else f"{unknown[0]}={rope[unknown[0]]!r}, which is not known"
        raise UserError(f"{file}: the rotary settings (rope_type={kind!r}) have {problem}")
    for key, value in {"rope_theta": theta, **rope}.items():
        _check_kind(key, value, float, file)
    return {"rope_theta": float(theta), "rope_llama3": rope or None}
