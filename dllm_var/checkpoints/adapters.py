"""Adapters (LoRA) in files: their settings, and the weights of a model with its adapters merged in."""

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

from torch import Tensor

from dllm_var.errors import UserError
from dllm_var.files import fits, read_object
from dllm_var.model.lora import DOWN, UP, Lora, is_adapter, plain_name

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_FOLDER = "adapter"  # of a run, and of a model whose adapters cannot be merged
PEFT_PREFIX = "base_model.model."  # of the weights' names
# The `peft_type` of adapters that act on masks only. It is not one of peft's, which would add them everywhere.
ON_MASKS = "LORA_ON_MASKS"
MORE_THAN_LORA = ("use_dora", "use_rslora", "alpha_pattern", "rank_pattern")


def read_lora(values: Any, place: str | Path) -> Lora | None:
    """Returns the settings of adapters that `asdict` made plain, None for None; earlier versions had fewer of them."""
    kinds = get_type_hints(Lora)
    if values is None:
        return None
    if not isinstance(values, dict) or not all(name in kinds and fits(values[name], kinds[name]) for name in values):
        raise UserError(f"{place} has settings of adapters that this version does not know: {values}")
    return Lora(**values)


def read_adapter_settings(folder: Path) -> tuple[Lora, str]:
    """Returns the settings of a plain LoRA adapter, peft's or one on masks only, and the checkpoint it belongs to.

    Targets are read of the latter kind alone.
    """
    config = read_object(folder / ADAPTER_CONFIG)
    kind, targets = config.get("peft_type"), config.get("target_modules")
    if kind not in ("LORA", ON_MASKS) or any(config.get(name) for name in MORE_THAN_LORA):
        raise UserError(f"cannot read the adapter {folder}: it is no plain LoRA adapter")
    r, alpha, base = config.get("r", 0), config.get("lora_alpha"), config.get("base_model_name_or_path", "")
    if alpha is None or not (fits(r, int) and fits(alpha, float) and fits(base, str) and r > 0):
        raise UserError(f"cannot read the adapter {folder}: it needs r, lora_alpha and base_model_name_or_path")
    values = {"r": r, "alpha": alpha}
    if kind == ON_MASKS:
        values |= {"targets": targets, "on_masks_only": True}
    lora = read_lora(values, folder / ADAPTER_CONFIG)
    assert lora is not None
    return lora, base


def named_as_in_model(name: str) -> str:
    """Returns what peft calls in a model the weight of an adapter that has the given name in a file or a model."""
    return re.sub(r"\.(lora_[AB])\.weight$", r".\1.default.weight", name).removeprefix(PEFT_PREFIX)


def merge_adapters(weights: Mapping[str, Callable[[], Tensor]], scaling: float) -> dict[str, Callable[[], Tensor]]:
    """Returns readers of the weights of a transformer without adapters: W + scaling B A, computed when one is read.

    The given readers are of base weights, under plain names or with `base_layer`, and of adapters as peft names them in
    a model or in a file.
    """
    weights = {named_as_in_model(name): read for name, read in weights.items()}
    merged = {plain_name(name): read for name, read in weights.items() if not is_adapter(name)}
    ups, downs = ({name.removesuffix(end) for name in weights if name.endswith(end)} for end in (UP, DOWN))
    stray = ups ^ downs or {stem for stem in ups if f"{stem}.weight" not in merged}
    if stray:
        raise UserError(f"the adapter of {min(stray)} belongs to no matrix of the model, or is one half of a pair")

    def read(stem: str, read_base: Callable[[], Tensor]) -> Tensor:
        base, up, down = read_base(), weights[stem + UP]().float(), weights[stem + DOWN]().float()
        if [*up.shape[:1], *down.shape[1:]] != list(base.shape) or up.shape[1:] != down.shape[:1]:
            shapes = f"{list(down.shape)} and {list(up.shape)}"
            raise UserError(f"the adapter of {stem} has the shapes {shapes}, the weight itself {list(base.shape)}")
        return (base.float() + scaling * (up @ down)).to(base.dtype)

    return merged | {f"{stem}.weight": partial(read, stem, merged[f"{stem}.weight"]) for stem in ups}
