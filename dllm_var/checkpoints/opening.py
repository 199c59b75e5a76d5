"""Finds a checkpoint and says what is in it; its weights are read one at a time, when they are asked for."""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dllm_var.checkpoints.adapters import ADAPTER_CONFIG, MergedWeights, load_adapter
from dllm_var.checkpoints.archive import UnusableCheckpoint, unreadable
from dllm_var.checkpoints.family_config import EXTRAS, family_of, read_config, read_settings
from dllm_var.checkpoints.identity import check_format
from dllm_var.checkpoints.run_checkpoint import check, newest_checkpoint, newest_usable, read_state, step_of
from dllm_var.checkpoints.safetensors_files import SafetensorsFolder
from dllm_var.checkpoints.sharded import is_sharded, read_weights
from dllm_var.errors import UserError
from dllm_var.files import read_object
from dllm_var.model.config import SIZES, TransformerConfig
from dllm_var.model.lora import Lora
from dllm_var.model.transformer import Transformer
from dllm_var.text.tokenizer import Tokenizer
from dllm_var.text.tokenizer_files import TOKENIZER_FILES, download, is_hub_name

CONFIG, EXPORT_FOLDER = "config.json", "model"
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MODEL_FILES = ["*.safetensors", "*.safetensors.index.json", *TOKENIZER_FILES]
_PREFIX = "transformer."


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    Args:
        place: The folder or file.
        config: Shape of its transformer, resolved.
        weights: Its weights under our names; nothing is read before it is asked for.
        load_tokenizer: Reads its tokenizer; one without a mask token gets one.
        meta: What else it remembers (`sampler`, `step`, ...).
        published: Whether others wrote it, so that it says nothing about how we are to read it.
        rows: Tokens that its embedding has, when the config, an adapter's, has more.
    """

    place: Path
    config: TransformerConfig
    weights: Mapping[str, Tensor]
    load_tokenizer: Callable[[], Tokenizer]
    meta: dict[str, Any]
    published: bool = False
    rows: int | None = None

    def weight(self, name: str, shape: list[int]) -> Tensor:
        """Reads one weight; embedding and head of a published model get rows for tokens that it does not have.

        New rows are the mean of the existing ones.

        Raises:
            UserError: When it has another shape, or values that are NaN or infinite.
        """
        value = self.weights[name]
        if value.dtype not in FLOATING or value.layout is not torch.strided or value.is_meta:
            raise UserError(f"{self.place}: weight {name} is no plain tensor of floating-point numbers")
        more = shape[0] - (self.rows or self.config.vocab_size or 0)
        if self.published and more > 0 and name in ("model.embed_tokens.weight", "lm_head.weight"):
            mean = value.float().mean(dim=0, keepdim=True).to(value.dtype)
            value = torch.cat((value, mean.expand(more, -1)))
        if list(value.shape) != shape:
            raise UserError(f"{self.place}: weight {name} has shape {list(value.shape)}, the config says {shape}")
        if not all(bound.isfinite() for bound in value.aminmax()):  # one pass; both are NaN when any value is
            raise UserError(
                f"{self.place}: weight {name} has values that are NaN or infinite: the run that wrote it had diverged, "
                "or the file is damaged; take an earlier checkpoint"
            )
        return value


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Looks at a checkpoint without reading its weights; never executes pickled code.

    Args:
        path: A run folder, a Lightning `.ckpt`, a model folder of a family that we know, or the name of one on the hub.
            The folder of an adapter means the model it was trained on with the adapter merged in.

    Raises:
        UserError: When there is none, or it is damaged, or holds something that is not fully understood.
    """
    return _open(locate_checkpoint(path), ())


def _open(place: Path, adapters: tuple[Path, ...]) -> Checkpoint:
    """Opens what stands at a place; `adapters` are those that lead there."""
    if (place / ADAPTER_CONFIG).is_file():
        return _open_adapter(place, adapters)
    return _open_lightning(place) if place.is_file() or is_sharded(place) else _open_folder(place)


def locate_checkpoint(path: str | Path) -> Path:
    """Returns the model folder or the `.ckpt` file that `path` means; the newest when a run has several."""
    place = Path(path).expanduser()
    if not place.exists():
        if "/" in str(path) and is_hub_name(path):
            return download(str(path), "checkpoint", MODEL_FILES)
        raise UserError(f"no checkpoint at {place}: give a run folder, a .ckpt file, a model folder or a hub name")
    if place.is_file() or is_sharded(place) or any((place / name).is_file() for name in (CONFIG, ADAPTER_CONFIG)):
        return place
    export = place / EXPORT_FOLDER
    newest = newest_checkpoint(place / "checkpoints") or newest_checkpoint(place)
    if (export / CONFIG).is_file() and (newest is None or not _goes_beyond(newest, export / CONFIG)):
        return export
    if newest is None:
        raise UserError(f"no checkpoint in {place}: neither {EXPORT_FOLDER}/{CONFIG} nor a .ckpt file is there")
    return newest


def _goes_beyond(checkpoint: Path, export: Path) -> bool:
    """Whether a checkpoint holds a later step than an export; by the time of writing where a step cannot be read."""
    exported, step = None, step_of(checkpoint)
    with suppress(UserError):  # told when it is read
        exported = (read_object(export).get(EXTRAS) or {}).get("step")
    if isinstance(exported, int) and step is not None:
        return step > exported
    return checkpoint.stat().st_mtime_ns > export.stat().st_mtime_ns


def _open_folder(folder: Path) -> Checkpoint:
    config, meta = _read_folder_config(folder)
    files = SafetensorsFolder(folder)
    family = family_of(read_object(folder / CONFIG), folder / CONFIG)
    shapes = _check_sizes(config, len(files), files.size, folder / CONFIG)
    files.rename({name: family.theirs(name) for name in (*shapes, "lm_head.weight") if family.renamed})
    _check_names(files, shapes, config, folder)
    return Checkpoint(folder, config, files, partial(Tokenizer.from_pretrained, folder), meta or {}, meta is None)


def _read_folder_config(folder: Path) -> tuple[TransformerConfig, dict[str, Any] | None]:
    """Returns the settings of a folder and what it remembers, None when others wrote it."""
    values = read_object(folder / CONFIG)
    config, ours = read_config(values, folder / CONFIG), values.get(EXTRAS)
    return config, None if ours is None else {name: value for name, value in ours.items() if name != "transformer"}


def _open_adapter(folder: Path, above: tuple[Path, ...]) -> Checkpoint:
    adapters, lora, path = load_adapter(folder)
    if folder.resolve() in above:
        raise UserError(f"{folder} names itself as the model that it adapts: set base_model_name_or_path")
    base = _open(locate_checkpoint(path), (*above, folder.resolve()))
    weights = MergedWeights(ChainMap(adapters, base.weights), lora.scaling)  # type: ignore[arg-type]
    if not (folder / CONFIG).is_file():  # peft's own
        return replace(base, place=folder, weights=weights)
    config, meta = _read_folder_config(folder)
    different = [name for name in SIZES if getattr(config, name) != getattr(base.config, name)]
    rows, known = config.vocab_size or 0, base.config.vocab_size or 0
    if different == ["vocab_size"] and known <= rows <= 2 * known:  # tokens that the base has not, such as a mask
        different = []
    if different:
        raise UserError(f"{folder / CONFIG} has another {different[0]} than {path}, which the adapter was trained on")
    tokenizer = partial(Tokenizer.from_pretrained, folder)
    return Checkpoint(folder, config, weights, tokenizer, meta or {}, base.published, base.config.vocab_size)


def _open_lightning(file: Path) -> Checkpoint:
    try:
        check(file)
        checkpoint = read_state(file)
        if file.is_dir():
            checkpoint["state_dict"] = read_weights(file)
    except Exception as error:  # torch raises many kinds
        reason = error if isinstance(error, UnusableCheckpoint) else unreadable(file, error)
        other = newest_usable(file.parent, {file})
        raise UnusableCheckpoint(f"{reason}; the newest good one is {other}" if other else str(reason)) from error
    ours = checkpoint.get("dllm_var") if isinstance(checkpoint, dict) else None
    if not isinstance(ours, dict):
        raise UserError(f"{file} was not written by dllm_var: it has no 'dllm_var' entry")
    check_format(ours, file)
    state = checkpoint.get("state_dict")
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{file} holds no weights: its 'state_dict' is not a dictionary of tensors")
    weights: Mapping[str, Tensor] = {
        name.removeprefix(_PREFIX): value for name, value in state.items() if str(name).startswith(_PREFIX)
    }
    config = read_settings(ours.get("transformer"), file)
    parts = [part for part in file.rglob("*") if part.is_file()] if file.is_dir() else [file]
    shapes = _check_sizes(config, len(weights), sum(part.stat().st_size for part in parts), file)
    if (lora := ours.get("lora")) is not None:
        try:
            weights = MergedWeights(weights, Lora(**lora).scaling)
        except TypeError as error:
            raise UserError(f"{file} has adapters without their settings: its 'lora' is damaged: {error}") from error
    _check_names(weights, shapes, config, file)
    meta = {key: value for key, value in ours.items() if key not in ("transformer", "tokenizer", "lora")}
    return Checkpoint(file, config, weights, lambda: _own_tokenizer(ours.get("tokenizer"), file), meta)


def _own_tokenizer(values: Any, place: Path) -> Tokenizer:
    try:
        return Tokenizer.from_dict(values)
    except Exception as error:  # the Rust side raises a bare Exception
        reason = " ".join(str(error).split())
        raise UserError(f"{place} holds a tokenizer that cannot be read: {type(error).__name__}: {reason}") from error


def _check_sizes(config: TransformerConfig, tensors: int, size: int, place: Path) -> dict[str, list[int]]:
    """Compares a config with the weights it stands beside, before anything of its size is made.

    Args:
        config: Resolved.
        tensors: Number of weights that are stored.
        size: Bytes they take.
        place: Of the config, for messages.

    Returns:
        Names and shapes of its model's weights.

    Raises:
        UserError: When its model cannot be in so many bytes.
    """
    beside = (
        f"and beside it are {tensors:,} tensors of {size:,} bytes in all: config and weights do not belong together"
    )
    for name in SIZES:
        if (getattr(config, name) or 0) > (tensors if name == "num_layers" else size):
            raise UserError(f"{place} has {name}={getattr(config, name)}, {beside}")
    shapes = weight_shapes(config)
    needed = sum(map(math.prod, shapes.values()))
    if needed > size:  # a number takes a byte at least
        raise UserError(f"{place} describes a model of {needed:,} weights, {beside}")
    return shapes


def _check_names(
    weights: Mapping[str, Tensor], shapes: dict[str, list[int]], config: TransformerConfig, place: Path
) -> None:
    """Raises UserError when weights are missing, or there are some that a model of the config has no use for."""
    names = {name for name in weights if not name.endswith(".rotary_emb.inv_freq")}
    missing, unknown = sorted(shapes.keys() - names), names - shapes.keys()
    if missing:
        raise UserError(f"{place} lacks {len(missing)} weights of its config, such as {missing[0]}")
    if config.tie_embeddings and "lm_head.weight" in unknown:
        if not torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"]):
            raise UserError(f"{place} ties lm_head.weight to the embedding, but holds another lm_head.weight")
        unknown.remove("lm_head.weight")
    if unknown:
        raise UserError(f"{place} has {len(unknown)} weights that its config does not name, such as {min(unknown)}")


def weight_shapes(config: TransformerConfig) -> dict[str, list[int]]:
    """Returns names and shapes of a transformer's distinct weights, in order; a tied head is none."""
    try:
        with torch.device("meta"):
            weights = Transformer(config).state_dict()
    except RuntimeError as error:  # a matrix with more numbers than an address can count
        raise UserError(f"no model has transformer settings so large: {str(error).splitlines()[0]}") from error
    if config.tie_embeddings:
        del weights["lm_head.weight"]
    return {name: list(weight.shape) for name, weight in weights.items()}
