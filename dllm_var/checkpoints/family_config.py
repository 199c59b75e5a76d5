"""`config.json` of published checkpoints, in and out; what is not fully understood is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_type_hints

from dllm_var.checkpoints.families import DESCRIPTIVE, LAYOUTS, Layout
from dllm_var.errors import UserError
from dllm_var.files import fits
from dllm_var.model.config import LLAMA3_KEYS, TransformerConfig, described

EXTRAS = "dllm_var"  # the entry of config.json with what the family has no key for
ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters")
DEFAULT_THETA = 10_000.0  # transformers', where config.json names none


def layout_of(values: dict[str, Any], file: Path) -> Layout:
    """Returns the family of a `config.json`; raises UserError naming the model type when it is none of ours."""
    layout = LAYOUTS.get(str(values.get("model_type")))
    if layout is None:
        raise UserError(
            f"{file} is of model_type {values.get('model_type')!r}; dense models of {', '.join(LAYOUTS)} can be loaded"
        )
    return layout


def read_config(values: dict[str, Any], file: Path) -> TransformerConfig:
    """Returns our settings of a published `config.json`.

    Args:
        values: Its content.
        file: Where it stands, for messages.

    Raises:
        UserError: When a key is missing, unknown, or has a value under which the model would compute something else.
    """
    layout = layout_of(values, file)
    ours: dict[str, Any] = dict(layout.implied)
    kinds = get_type_hints(TransformerConfig)
    for name, keys in layout.settings.items():
        ours[name] = _read_setting(layout, values, keys, kinds[name], file)
    ours |= _read_rope(layout, values, file)
    _check_fixed(layout, values, file)
    known = {*DESCRIPTIVE, *layout.ignored, *layout.fixed, *_rope_keys(layout), *_flat(layout)}
    unknown = sorted(key for key in set(values) - known if not key.startswith("_"))  # _name_or_path: bookkeeping
    if unknown:
        raise UserError(
            f"{file} has {unknown[0]}={values[unknown[0]]!r}, which is not known of {layout.model_type} models: "
            "delete the entry if it does not change what the model computes"
        )
    extras = values.get(EXTRAS) or {}
    if not isinstance(extras, dict):
        raise UserError(f"{file} has {EXTRAS}={extras!r}, where settings by name are expected")
    ours["causal_context"] = bool(extras.get("causal_context"))
    ours["causal"] = layout.causal and values.get("is_causal", True) is not False and not ours["causal_context"]
    ours["token_shift"] = bool(ours.get("token_shift") or extras.get("token_shift"))
    theta: Any = extras.get("rope_theta")
    scaling: Any = extras.get("rope_scaling")
    if fits(theta, float) and fits(scaling, float) and theta * scaling == ours["rope_theta"]:
        ours |= {"rope_theta": theta, "rope_scaling": scaling}
    ends = extras.get("terminator_ids", values.get("eos_token_id"))
    ours["terminator_ids"] = list(ends) if isinstance(ends, list) else None if ends is None else [ends]
    return TransformerConfig.from_dict(ours, file)


def write_config(layout: Layout, config: TransformerConfig, dtype: str) -> dict[str, Any]:
    """Returns the `config.json` of a family for our settings.

    Args:
        layout: The family.
        config: Our settings, resolved.
        dtype: Type of the weights, such as `bfloat16`.

    Raises:
        UserError: When the family has no such models; says why.
    """
    reason = inexpressible(layout, config)
    if reason is not None:
        raise UserError(f"--format {layout.name} cannot hold this model: {reason}")
    values: dict[str, Any] = {"model_type": layout.model_type, "architectures": [layout.architecture]}
    if layout.remote_code is not None:
        repository, configuration, model = layout.remote_code
        modules = {"AutoConfig": configuration, "AutoModel": model, "AutoModelForCausalLM": model}
        values["auto_map"] = {name: f"{repository}--{module}" for name, module in modules.items()}
    for name, keys in layout.settings.items():
        if (value := getattr(config, name)) is not None:
            values |= dict.fromkeys((keys,) if isinstance(keys, str) else keys, value)
    values |= {key: allowed[0] for key, allowed in layout.fixed.items() if allowed[0] is not None}
    if "layer_types" in layout.fixed:
        values["layer_types"] = ["full_attention"] * config.num_layers
    values["rope_theta"] = config.rope_theta * config.rope_scaling
    if layout.rope == "nested":
        llama3: dict[str, Any] = dict(config.rope_llama3 or {})
        if llama3:
            llama3["original_max_position_embeddings"] = int(llama3["original_max_position_embeddings"])
        values["rope_scaling"] = {"rope_type": "llama3", **llama3} if llama3 else None
        # Read by transformers 5; other engines ignore it. A causal context is read so until a block is denoised.
        values["is_causal"] = config.causal or config.causal_context
    ends = config.terminator_ids or []
    values["eos_token_id"] = ends if layout.rope == "nested" and len(ends) > 1 else next(iter(ends), None)
    values |= {"torch_dtype": dtype, "use_cache": config.causal or config.causal_context}
    values[EXTRAS] = {
        "token_shift": config.token_shift,
        "causal_context": config.causal_context,
        "terminator_ids": config.terminator_ids,
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling,
    }
    return values


def inexpressible(layout: Layout, config: TransformerConfig) -> str | None:
    """Returns why a family has no such model, null when it has."""
    for name, value in layout.implied.items():
        if getattr(config, name) != value:
            return f"its models have {name}={value}, this one {getattr(config, name)}"
    width = config.num_heads * (config.head_dim or 0)
    if "head_dim" not in layout.settings and width != config.hidden_size:
        return f"its heads share hidden_size {config.hidden_size} evenly, this one's take {width}"
    if not layout.causal and (config.causal or config.causal_context):
        return f"its models read in both directions, this one {'' if config.causal else 'its context '}left to right"
    if config.mask_id is None and not layout.causal:
        return "its models have a mask token, this one none"
    return None


def _read_setting(layout: Layout, values: dict[str, Any], keys: str | tuple[str, ...], kind: Any, file: Path) -> Any:
    keys = (keys,) if isinstance(keys, str) else keys
    given = {key: values[key] for key in keys if values.get(key) is not None}
    for key, value in given.items():
        _check_kind(key, value, kind, file)
    if not given and keys[0] not in layout.defaults:
        raise UserError(f"{file} has no {keys[0]}, which a {layout.model_type} checkpoint must name")
    return next(iter(given.values())) if given else layout.defaults[keys[0]]


def _check_kind(key: str, value: Any, kind: Any, file: Path) -> None:
    if not fits(value, kind):
        raise UserError(f"{file} has {key}={value!r}, where {described(kind)} is expected")


def _check_fixed(layout: Layout, values: dict[str, Any], file: Path) -> None:
    for key, allowed in layout.fixed.items():
        if key not in values:
            if key in layout.required:
                raise UserError(f"{file} has no {key}, which a {layout.model_type} checkpoint must name")
            continue
        given = values[key] if isinstance(values[key], list) else [values[key]]
        wrong = [value for value in given if value not in allowed]
        if wrong:
            known = " or ".join(repr(value) for value in allowed if value is not None)
            raise UserError(f"{file} has {key}={wrong[0]!r}; only {known} is known here")


def _rope_keys(layout: Layout) -> tuple[str, ...]:
    return ROPE_KEYS if layout.rope == "nested" else ROPE_KEYS[:1]


def _flat(layout: Layout) -> list[str]:
    return [key for keys in layout.settings.values() for key in ((keys,) if isinstance(keys, str) else keys)]


def _read_rope(layout: Layout, values: dict[str, Any], file: Path) -> dict[str, Any]:
    """Returns our rotary settings; transformers 4 has rope_theta and rope_scaling, transformers 5 rope_parameters."""
    if layout.rope == "flat":
        return {"rope_theta": float(_read_setting(layout, values, "rope_theta", float, file))}
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
