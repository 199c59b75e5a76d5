"""Weights as safetensors: folders of a model, read a tensor at a time, and of adapters, as peft has them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dllm_var.errors import UserError
from dllm_var.files import fits, read_object, write_atomically
from dllm_var.model.lora import DOWN, UP, Lora, is_adapter, plain_name

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth")
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MORE_THAN_LORA = ("use_dora", "use_rslora", "alpha_pattern", "rank_pattern")
_PEFT_PREFIX = "base_model.model."


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Writes a safetensors file that is there whole or not at all.

    Raises:
        UserError: When it cannot be written.
    """
    try:
        with write_atomically(file) as partial:
            plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
            save_file(plain, partial, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {file}: {error}") from error


class SafetensorsFolder(Mapping[str, Tensor]):
    """The tensors of `model.safetensors`, or of the shards its index lists; each is read when it is asked for.

    A model therefore never has to fit into memory twice.

    Raises:
        UserError: When weights are missing, damaged, or pickled, which would run whatever code is in them.
    """

    def __init__(self, folder: Path) -> None:
        if (folder / INDEX).is_file():
            file_of = _read_index(folder / INDEX)
        elif (folder / WEIGHTS).is_file() or not any(next(folder.glob(kind), None) for kind in PICKLED):
            file_of = dict.fromkeys(_open(folder / WEIGHTS).keys(), WEIGHTS)
        else:
            raise UserError(
                f"{folder} has pickled weights only, and a pickle can run code: convert them with transformers, "
                "from_pretrained(...).save_pretrained(..., safe_serialization=True)"
            )
        files = {name: _open(folder / name) for name in sorted(set(file_of.values()))}
        self._place = {name: (files[file], name) for name, file in file_of.items()}  # and their names in the files
        self.size = sum((folder / name).stat().st_size for name in files)  # bytes
        held = {name: set(file.keys()) for name, file in files.items()}
        lost = next((name for name, file in file_of.items() if name not in held[file]), None)
        if lost is not None:
            raise UserError(f"{folder / file_of[lost]} lacks {lost}, which {INDEX} promises: fetch it again")

    def rename(self, names: dict[str, str]) -> None:
        """Gives tensors other names; `names` has the names in the files by the new ones."""
        for new, old in names.items():
            if old in self._place:
                self._place[new] = self._place.pop(old)

    def __getitem__(self, name: str) -> Tensor:
        file, its_name = self._place[name]
        return file.get_tensor(its_name)

    def __contains__(self, name: object) -> bool:
        return name in self._place  # the inherited one would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._place)

    def __len__(self) -> int:
        return len(self._place)


def _open(file: Path) -> Any:
    if not file.is_file():  # a pipe would be waited for
        raise UserError(f"cannot read {file}: there is no such file")
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {file}: {error}") from error


def _read_index(file: Path) -> dict[str, str]:
    names: Any = read_object(file).get("weight_map")
    if not fits(names, dict[str, str]):
        raise UserError(f"cannot read {file}: its weight_map does not name a file for each weight")
    outside = next((name for name in names.values() if Path(name).name != name), None)
    if outside is not None:
        raise UserError(f"{file} names {outside!r}, which is no file beside it")
    return names


# -- adapters ----------------------------------------------------------------------------------------------------------


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
        ups, downs = ({name.removesuffix(end) for name in weights if name.endswith(end)} for end in (UP, DOWN))
        stray = ups ^ downs or {stem for stem in ups if f"{stem}.weight" not in self._base}
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
    adapters = {_PEFT_PREFIX + name.replace(".default.", "."): weights[name] for name in weights if is_adapter(name)}
    save_tensors(adapters, folder / ADAPTER_WEIGHTS)
    config = lora.peft_config()
    config.base_model_name_or_path, config.inference_mode = base, True
    config.save_pretrained(str(folder))


def load_adapter(folder: Path) -> tuple[dict[str, Tensor], float, str]:
    """Reads what `save_adapter` or peft wrote.

    Returns:
        The adapters under the names that they have in a transformer, alpha / r, and the checkpoint they belong to.

    Raises:
        UserError: When it is damaged, or an adapter of another kind.
    """
    config = read_object(folder / ADAPTER_CONFIG)
    if config.get("peft_type") != "LORA" or any(config.get(name) for name in MORE_THAN_LORA):
        raise UserError(f"cannot read the adapter {folder}: it is no plain LoRA adapter")
    r, alpha, base = config.get("r", 0), config.get("lora_alpha"), config.get("base_model_name_or_path", "")
    if alpha is None or not (fits(r, int) and fits(alpha, float) and fits(base, str) and r > 0):
        raise UserError(f"cannot read the adapter {folder}: it needs r, lora_alpha and base_model_name_or_path")
    file = _open(folder / ADAPTER_WEIGHTS)
    names = file.keys()
    named = {re.sub(r"\.(lora_[AB])\.", r".\1.default.", name.removeprefix(_PEFT_PREFIX)): name for name in names}
    return {name: file.get_tensor(its_name) for name, its_name in named.items()}, alpha / r, base
