"""Weights: safetensors and adapters as peft has them, read a tensor at a time, and compared with a config."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dllm_var.errors import UserError
from dllm_var.files import fits, read_object, write_atomically
from dllm_var.model.config import SIZES, TransformerConfig
from dllm_var.model.lora import DOWN, UP, Lora, is_adapter, plain_name
from dllm_var.model.transformer import Transformer

Reader = Callable[[], Tensor]
Readers = dict[str, Reader]  # of tensors by name, each read when its reader is called
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth")
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MORE_THAN_LORA = ("use_dora", "use_rslora", "alpha_pattern", "rank_pattern")
_PEFT_PREFIX = "base_model.model."


def held(weights: Mapping[str, Tensor]) -> Readers:
    """Returns readers of tensors that are in memory."""
    return {name: value.detach for name, value in weights.items()}


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Writes a safetensors file that is there whole or not at all.

    Raises:
        UserError: When it cannot be written.
    """
    try:
        with write_atomically(file) as unfinished:
            plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
            save_file(plain, unfinished, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {file}: {error}") from error


def open_safetensors(folder: Path) -> tuple[Readers, int]:
    """Opens `model.safetensors`, or the shards that its index lists; a model never has to fit into memory twice.

    Returns:
        Readers of the tensors, and the bytes that the files take.

    Raises:
        UserError: When weights are missing, damaged, or pickled, which would run whatever code is in them.
    """
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
    named = {name: set(file.keys()) for name, file in files.items()}
    lost = next((name for name, file in file_of.items() if name not in named[file]), None)
    if lost is not None:
        raise UserError(f"{folder / file_of[lost]} lacks {lost}, which {INDEX} promises: fetch it again")
    size = sum((folder / name).stat().st_size for name in files)
    return {name: partial(files[file].get_tensor, name) for name, file in file_of.items()}, size


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


# -- weights and config ------------------------------------------------------------------------------------------------


def weight_shapes(config: TransformerConfig) -> dict[str, list[int]]:
    """Returns names and shapes of a transformer's distinct weights, in order; a tied head is none."""
    with torch.device("meta"):
        weights = Transformer(config).state_dict()
    if config.tie_embeddings:
        del weights["lm_head.weight"]
    return {name: list(weight.shape) for name, weight in weights.items()}


def weights_of(
    config: TransformerConfig, weights: Readers, size: int, place: Path, theirs: Callable[[str], str] = str
) -> Readers:
    """Returns the weights of a model under our names; nothing of its size is made before they are known to fit.

    Args:
        config: Its settings, resolved.
        weights: All that are beside the config.
        size: Bytes that they take on the disk.
        place: Where they are, for messages.
        theirs: Gives the name that one of our weights has there.

    Raises:
        UserError: When weights are missing, or there are some that a model of the config has no use for.
    """
    beside = f"and beside it are {len(weights):,} tensors of {size:,} bytes: config and weights do not belong together"
    for name in SIZES:
        if (getattr(config, name) or 0) > (len(weights) if name == "num_layers" else size):
            raise UserError(f"{place} has {name}={getattr(config, name)}, {beside}")
    shapes = weight_shapes(config)
    needed = sum(map(math.prod, shapes.values()))
    if needed > size:  # a number takes a byte at least
        raise UserError(f"{place} describes a model of {needed:,} weights, {beside}")
    ours = {theirs(name): name for name in (*shapes, "lm_head.weight")}
    weights = {
        ours.get(name, name): read for name, read in weights.items() if not name.endswith(".rotary_emb.inv_freq")
    }
    missing = sorted(shapes.keys() - weights.keys())
    if missing:
        raise UserError(f"{place} lacks {len(missing)} weights of its config, such as {missing[0]}")
    head = weights.pop("lm_head.weight", None) if config.tie_embeddings else None
    if head is not None and not torch.equal(head(), weights["model.embed_tokens.weight"]()):
        raise UserError(f"{place} ties lm_head.weight to the embedding, but holds another lm_head.weight")
    unknown = weights.keys() - shapes.keys()
    if unknown:
        raise UserError(f"{place} has {len(unknown)} weights that its config does not name, such as {min(unknown)}")
    return weights


# -- adapters ----------------------------------------------------------------------------------------------------------


def merge_adapters(weights: Readers, scaling: float) -> Readers:
    """Returns weights as those of a transformer without adapters: W + (alpha / r) B A, merged when one is asked for.

    Args:
        weights: The base weights under plain names or with `base_layer`, and the adapters.
        scaling: alpha / r.

    Raises:
        UserError: When an adapter is of a matrix that is not among them, or half of it is missing.
    """
    base = {plain_name(name): read for name, read in weights.items() if not is_adapter(name)}
    ups, downs = ({name.removesuffix(end) for name in weights if name.endswith(end)} for end in (UP, DOWN))
    stray = ups ^ downs or {stem for stem in ups if f"{stem}.weight" not in base}
    if stray:
        raise UserError(f"the adapter of {min(stray)} belongs to no matrix of the model, or is one half of a pair")
    for stem in ups:
        base[f"{stem}.weight"] = partial(
            _merged, stem, base[f"{stem}.weight"], weights[stem + UP], weights[stem + DOWN], scaling
        )
    return base


def _merged(stem: str, read_base: Reader, read_up: Reader, read_down: Reader, scaling: float) -> Tensor:
    base, up, down = read_base(), read_up().float(), read_down().float()
    if [*up.shape[:1], *down.shape[1:]] != list(base.shape) or up.shape[1:] != down.shape[:1]:
        shapes = f"{list(down.shape)} and {list(up.shape)}"
        raise UserError(f"the adapter of {stem} has the shapes {shapes}, the weight itself {list(base.shape)}")
    return (base.float() + scaling * (up @ down)).to(base.dtype)


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
    config.target_modules = sorted(config.target_modules)  # peft's set would be written in another order each time
    config.save_pretrained(str(folder))


def open_adapter(folder: Path) -> tuple[Readers, float, str]:
    """Opens what `save_adapter` or peft wrote.

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
    return {name: partial(file.get_tensor, its_name) for name, its_name in named.items()}, alpha / r, base
