"""Adapter folders as peft has them, and weights with adapters merged into them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from dllm_var.checkpoints.safetensors_files import save_tensors
from dllm_var.errors import UserError
from dllm_var.files import read_object, write_text
from dllm_var.model.lora import DOWN, UP, Lora, is_adapter, plain_name

ADAPTER_FOLDER = "adapter"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."


class MergedWeights(Mapping[str, Tensor]):
    """Weights with adapters as those of a transformer without: W + (alpha / r) B A, merged when one is asked for.

    Args:
        weights: The base weights under plain names or with `base_layer`, and the adapters.
        scaling: alpha / r.

    Raises:
        UserError: When an adapter is of a matrix that is not among them, or half of it is missing.
    """

    def __init__(self, weights: Mapping[str, Tensor], scaling: float) -> None:
        self._weights, self._scaling = weights, scaling
        self._base = {plain_name(name): name for name in weights if not is_adapter(name)}
        stems = [{name.removesuffix(end) for name in weights if name.endswith(end)} for end in (UP, DOWN)]
        stray = stems[0] ^ stems[1] or {stem for stem in stems[0] if f"{stem}.weight" not in self._base}
        if stray:
            raise UserError(f"the adapter of {min(stray)} belongs to no matrix of the model, or is one half of a pair")

    def __getitem__(self, name: str) -> Tensor:
        base = self._weights[self._base[name]]
        stem = name.removesuffix(".weight")
        if not name.endswith(".weight") or stem + UP not in self._weights:
            return base
        up, down = (self._weights[stem + end].float() for end in (UP, DOWN))
        if [*up.shape[:1], *down.shape[1:]] != list(base.shape) or up.shape[1:] != down.shape[:1]:
            shapes = f"{list(down.shape)} and {list(up.shape)}"
            raise UserError(f"the adapter of {name} has the shapes {shapes}, the weight itself {list(base.shape)}")
        return (base.float() + self._scaling * (up @ down)).to(base.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)


def save_adapter(folder: Path, weights: Mapping[str, Tensor], lora: Lora, base: str) -> None:
    """Writes the adapters of a state dict as peft does, without the base weights.

    Args:
        folder: Made when missing.
        weights: A state dict with adapters.
        lora: Their settings.
        base: The checkpoint they were trained on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    adapters = {
        _PEFT_PREFIX + name.replace(".default.", "."): value.detach().cpu().contiguous()
        for name, value in weights.items()
        if is_adapter(name)
    }
    save_tensors(adapters, folder / ADAPTER_WEIGHTS)
    config = lora.peft_config()
    config.base_model_name_or_path, config.inference_mode = base, True
    content = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    write_text(folder / ADAPTER_CONFIG, json.dumps(content, indent=2) + "\n")


def load_adapter(folder: Path) -> tuple[dict[str, Tensor], Lora, str]:
    """Reads what `save_adapter` or peft wrote.

    Returns:
        The adapters under the names they have in a transformer, their settings, and the checkpoint they belong to.

    Raises:
        UserError: When it is damaged, or an adapter of another kind.
    """
    try:
        config = read_object(folder / ADAPTER_CONFIG)
        if not (folder / ADAPTER_WEIGHTS).is_file():  # a pipe would be waited for
            raise ValueError(f"there is no file {ADAPTER_WEIGHTS}")
        weights = load_file(folder / ADAPTER_WEIGHTS)
        if config["peft_type"] != "LORA" or config.get("use_dora") or config.get("use_rslora"):
            raise ValueError("it is no plain LoRA adapter")
        lora = Lora(config["r"], config["lora_alpha"], config["lora_dropout"], config["target_modules"])
    except UserError:
        raise
    except Exception as error:  # a missing file, broken JSON, safetensors' own errors
        raise UserError(f"cannot read the adapter {folder}: {str(error).splitlines()[0]}") from error
    named = {
        re.sub(r"\.(lora_[AB])\.", r".\1.default.", name.removeprefix(_PEFT_PREFIX)): value
        for name, value in weights.items()
    }
    return named, lora, str(config["base_model_name_or_path"])
