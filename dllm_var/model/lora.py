"""Low-rank adapters (LoRA, arXiv 2106.09685) through peft: trained beside frozen weights, merged or kept apart."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dllm_var.checkpoints.safetensors_files import save_tensors
from dllm_var.errors import UserError
from dllm_var.files import read_object, write_text
from dllm_var.model.initialise import named_generator
from dllm_var.model.placement import fill
from dllm_var.model.transformer import Transformer

ADAPTER_FOLDER = "adapter"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_DOWN, _UP, _BASE = ".lora_A.default.weight", ".lora_B.default.weight", ".base_layer."
_PEFT_PREFIX = "base_model.model."


@dataclass
class Lora:
    """Which matrices get an adapter, and how large: each computes x W + (alpha / r) x A B and only A, B are trained.

    Args:
        r: Rank of the adapters.
        alpha: Their weight is alpha / r.
        dropout: Share of their inputs that is dropped in training.
        targets: Names of the adapted matrices: `qkv` and `out` of the attention, `gate_up` and `down` of the
            feed-forward layer, `lm_head`.

    Raises:
        UserError: When a number is out of range or there is no such matrix.
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: ["qkv", "out", "gate_up", "down"])

    def __post_init__(self) -> None:
        if self.r < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise UserError(
                f"model.lora needs r >= 1, alpha > 0 and dropout in [0, 1), got {self.r}, {self.alpha}, {self.dropout}"
            )
        known = ("qkv", "out", "gate_up", "down", "lm_head")
        unknown = next((name for name in self.targets if name not in known), None)
        if unknown is not None or not self.targets:
            raise UserError(f"model.lora.targets: there is no {unknown!r}; choose among {', '.join(known)}")

    @property
    def scaling(self) -> float:
        """Weight of the adapters."""
        return self.alpha / self.r


def add_adapters(transformer: Transformer, lora: Lora) -> None:
    """Gives a transformer adapters, whose product is zero at first, and freezes all else.

    Args:
        transformer: Changed in place: the matrix `x` becomes `x.base_layer`. It may be on the meta device.
        lora: Which, and how large.

    Raises:
        UserError: When peft is not installed, or the head is to be adapted that is the embedding, too.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError('model.lora needs peft: pip install "dllm-var[lora]"') from error
    if "lm_head" in lora.targets and transformer.config.tie_embeddings:
        raise UserError("model.lora.targets: lm_head is tied to the embedding in this model: leave it out")
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft divides by r, whole or not
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
        bias="none",
    )
    on_meta = transformer.embedding.weight.is_meta
    inject_adapter_in_model(config, transformer, low_cpu_mem_usage=on_meta)
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_(name.endswith((_DOWN, _UP)))
    if not on_meta:
        reset_adapters(transformer)


@torch.no_grad()
def reset_adapters(transformer: Transformer) -> None:
    """Draws the adapters anew, peft's way (A uniform, B zero), keyed like all weights by the seed and their names."""
    for name, parameter in transformer.named_parameters():
        if name.endswith(_UP):
            parameter.zero_()
        elif name.endswith(_DOWN):
            bound = parameter.shape[1] ** -0.5
            generator = named_generator(torch.initial_seed(), name)
            values = torch.empty(parameter.shape, device="cpu").uniform_(-bound, bound, generator=generator)
            fill(parameter, values, [])


def plain_name(name: str) -> str:
    """Returns what a weight is called in a transformer without adapters."""
    return name.replace(_BASE, ".")


def is_adapter(name: str) -> bool:
    """Whether a name of a state dict is that of an adapter's weight."""
    return name.endswith((_DOWN, _UP))


class MergedWeights(Mapping[str, Tensor]):
    """Weights with adapters as those of a transformer without: W + (alpha / r) B A, merged when one is asked for.

    Args:
        weights: The base weights under plain names or with `base_layer`, and the adapters.
        scaling: Weight of the adapters.

    Raises:
        UserError: When an adapter is of a matrix that is not among them, or half of it is missing.
    """

    def __init__(self, weights: Mapping[str, Tensor], scaling: float) -> None:
        self._weights, self._scaling = weights, scaling
        self._base = {plain_name(name): name for name in weights if not is_adapter(name)}
        stems = [{name.removesuffix(end) for name in weights if name.endswith(end)} for end in (_UP, _DOWN)]
        stray = stems[0] ^ stems[1] or {stem for stem in stems[0] if f"{stem}.weight" not in self._base}
        if stray:
            raise UserError(f"the adapter of {min(stray)} belongs to no matrix of the model, or is one half of a pair")

    def __getitem__(self, name: str) -> Tensor:
        base = self._weights[self._base[name]]
        stem = name.removesuffix(".weight")
        if not name.endswith(".weight") or stem + _UP not in self._weights:
            return base
        up, down = (self._weights[stem + end].float() for end in (_UP, _DOWN))
        if [*up.shape[:1], *down.shape[1:]] != list(base.shape) or up.shape[1:] != down.shape[:1]:
            shapes = f"{list(down.shape)} and {list(up.shape)}"
            raise UserError(f"the adapter of {name} has the shapes {shapes}, the weight itself {list(base.shape)}")
        return (base.float() + self._scaling * (up @ down)).to(base.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)


def save_adapter(folder: Path, weights: Mapping[str, Tensor], lora: Lora, base: str) -> None:
    """Writes the adapters as peft does, without the base weights.

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
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": list(lora.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "task_type": None,
    }
    write_text(folder / ADAPTER_CONFIG, json.dumps(config, indent=2) + "\n")


def load_adapter(folder: Path) -> tuple[dict[str, Tensor], Lora, str]:
    """Reads what `save_adapter` wrote.

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


def lora_settings(lora: Lora | None) -> dict[str, Any] | None:
    """Returns the settings as plain types, for checkpoints."""
    return None if lora is None else asdict(lora)
