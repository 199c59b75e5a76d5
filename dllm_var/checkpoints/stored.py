"""Finds a checkpoint and says what is in it; its weights are read one at a time, when they are asked for."""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dllm_var.checkpoints.choose import check, is_sharded, newest_checkpoint, newest_usable, step_of, written_at
from dllm_var.checkpoints.families import Layout
from dllm_var.checkpoints.family_config import EXTRAS, layout_of, read_config
from dllm_var.checkpoints.run_files import UnusableCheckpoint, unreadable
from dllm_var.checkpoints.safetensors_files import SafetensorsFolder
from dllm_var.checkpoints.shards import read_trainer_state, read_weights
from dllm_var.errors import UserError
from dllm_var.files import read_object
from dllm_var.model.config import SIZES, TransformerConfig
from dllm_var.model.lora import ADAPTER_CONFIG, Lora, MergedWeights, load_adapter
from dllm_var.model.transformer import Transformer
from dllm_var.text.hub import MODEL_FILES, download, is_hub_name
from dllm_var.text.tokenizer import Tokenizer

CONFIG, EXPORT_FOLDER = "config.json", "model"
MODEL_TYPE = "dllm_var"
_PREFIX = "transformer."


@dataclass(frozen=True)
class StoredModel:
    """What a checkpoint holds.

    Args:
        place: The folder or file.
        config: Shape of its transformer, resolved.
        weights: Its weights under our names; nothing is read before it is asked for.
        load_tokenizer: Reads its tokenizer; one without a mask token gets one.
        meta: What else it remembers (`sampler`, `step`, ...).
        published: Whether others wrote it, so that it says nothing about how we are to read it.
    """

    place: Path
    config: TransformerConfig
    weights: Mapping[str, Tensor]
    load_tokenizer: Callable[[], Tokenizer]
    meta: dict[str, Any]
    published: bool = False


def open_checkpoint(path: str | Path) -> StoredModel:
    """Looks at a checkpoint without reading its weights; never executes pickled code.

    Args:
        path: A run folder, a Lightning `.ckpt`, an exported folder, a folder of a published model (`LAYOUTS`), or the
            name of one on the hub. The folder of an adapter is the model it was trained on with the adapter merged in.

    Raises:
        UserError: When there is none, or it is damaged, or holds something that is not fully understood.
    """
    return _open(locate_checkpoint(path), ())


def _open(place: Path, adapters: tuple[Path, ...]) -> StoredModel:
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
        exported = read_object(export).get("step")
    if isinstance(exported, int) and step is not None:
        return step > exported
    return written_at(checkpoint) > written_at(export)


def _open_folder(folder: Path) -> StoredModel:
    file = folder / CONFIG
    values = read_object(file)

    def load_tokenizer() -> Tokenizer:
        return Tokenizer.from_pretrained(folder)

    if values.get("model_type") == MODEL_TYPE:
        meta = {key: value for key, value in values.items() if key not in ("model_type", "transformer")}
        config, files = TransformerConfig.from_dict(values.get("transformer"), file), SafetensorsFolder(folder)
        check_sizes(config, len(files), files.size, file)
        return StoredModel(folder, config, files, load_tokenizer, meta)
    config, files = read_config(values, file), SafetensorsFolder(folder)
    check_sizes(config, len(files), files.size, file)
    weights = FamilyWeights(layout_of(values, file), config, files)
    extras = values.get(EXTRAS)
    return StoredModel(folder, config, weights, load_tokenizer, dict(extras or {}), published=extras is None)


def _open_adapter(folder: Path, above: tuple[Path, ...]) -> StoredModel:
    adapters, lora, path = load_adapter(folder)
    if folder.resolve() in above:
        raise UserError(f"{folder} names itself as the model that it adapts: set base_model_name_or_path")
    base = _open(locate_checkpoint(path), (*above, folder.resolve()))
    weights = MergedWeights(ChainMap(adapters, base.weights), lora.scaling)  # type: ignore[arg-type]
    if not (folder / CONFIG).is_file():  # peft's own
        return replace(base, place=folder, weights=weights)
    values = read_object(folder / CONFIG)
    meta = {key: value for key, value in values.items() if key not in ("model_type", "transformer")}
    config = TransformerConfig.from_dict(values.get("transformer"), folder / CONFIG)
    different = [name for name in SIZES if getattr(config, name) != getattr(base.config, name)]
    rows, known = config.vocab_size or 0, base.config.vocab_size or 0
    if different == ["vocab_size"] and known <= rows <= 2 * known:  # tokens that the base has not, such as a mask
        different = []
    if different:
        raise UserError(f"{folder / CONFIG} has another {different[0]} than {path}, which the adapter was trained on")
    return StoredModel(folder, config, weights, lambda: Tokenizer.from_pretrained(folder), meta, base.published)


def _open_lightning(file: Path) -> StoredModel:
    try:
        check(file)
        checkpoint = _read(file)
        if file.is_dir():
            checkpoint["state_dict"] = read_weights(file)
    except Exception as error:  # torch raises many kinds
        reason = error if isinstance(error, UnusableCheckpoint) else unreadable(file, error)
        other = newest_usable(file.parent, {file})
        raise UnusableCheckpoint(f"{reason}; the newest good one is {other}" if other else str(reason)) from error
    ours = checkpoint.get("dllm_var") if isinstance(checkpoint, dict) else None
    if not isinstance(ours, dict):
        raise UserError(f"{file} was not written by dllm_var: it has no 'dllm_var' entry")
    state = checkpoint.get("state_dict")
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{file} holds no weights: its 'state_dict' is not a dictionary of tensors")
    weights: Mapping[str, Tensor] = {
        name.removeprefix(_PREFIX): value for name, value in state.items() if str(name).startswith(_PREFIX)
    }
    meta = {key: value for key, value in ours.items() if key not in ("transformer", "tokenizer", "lora")}
    config = TransformerConfig.from_dict(ours.get("transformer"), file)
    parts = [part for part in file.rglob("*") if part.is_file()] if file.is_dir() else [file]
    check_sizes(config, len(weights), sum(part.stat().st_size for part in parts), file)
    if (lora := ours.get("lora")) is not None:
        try:
            weights = MergedWeights(weights, Lora(**lora).scaling)
        except TypeError as error:
            raise UserError(f"{file} has adapters without their settings: its 'lora' is damaged: {error}") from error
    return StoredModel(file, config, weights, lambda: _own_tokenizer(ours.get("tokenizer"), file), meta)


def _read(place: Path) -> Any:
    """Reads a Lightning checkpoint, but for the weights where it is in parts."""
    if place.is_dir():
        return read_trainer_state(place)
    return torch.load(place, map_location="cpu", weights_only=True, mmap=True)


def _own_tokenizer(values: Any, place: Path) -> Tokenizer:
    try:
        return Tokenizer.from_dict(values)
    except Exception as error:  # the Rust side raises a bare Exception
        reason = " ".join(str(error).split())
        raise UserError(f"{place} holds a tokenizer that cannot be read: {type(error).__name__}: {reason}") from error


def check_sizes(config: TransformerConfig, tensors: int, size: int, place: Path) -> None:
    """Compares a config with the weights it stands beside, before anything of its size is made.

    Args:
        config: Resolved.
        tensors: Number of weights that are stored.
        size: Bytes they take.
        place: Of the config, for messages.

    Raises:
        UserError: When its model cannot be in so many bytes.
    """
    beside = (
        f"and beside it are {tensors:,} tensors of {size:,} bytes in all: config and weights do not belong together"
    )
    for name in SIZES:
        if (getattr(config, name) or 0) > (tensors if name == "num_layers" else size):
            raise UserError(f"{place} has {name}={getattr(config, name)}, {beside}")
    if config.vocab_size is None:
        return  # said when the model is built
    needed = sum(map(math.prod, weight_shapes(config).values()))
    if needed > size:  # a number takes a byte at least
        raise UserError(f"{place} describes a model of {needed:,} weights, {beside}")


class FamilyWeights(Mapping[str, Tensor]):
    """A published checkpoint's weights under our names; what ours holds in one is put together when it is read.

    Args:
        layout: The family.
        config: Our settings of the model.
        files: Its weights under their names.

    Raises:
        UserError: When weights are missing, or there are some that our model has no use for.
    """

    def __init__(self, layout: Layout, config: TransformerConfig, files: SafetensorsFolder) -> None:
        self._files = files
        self._shapes = weight_shapes(config)
        self._theirs = {name: layout.theirs(name) for name in self._shapes}
        wanted = {name for names in self._theirs.values() for name in names}
        surplus = {name for name in files if not name.endswith(".rotary_emb.inv_freq")} - wanted
        (head,) = layout.theirs("lm_head.weight")
        if config.tie_embeddings and head in surplus:
            if not torch.equal(files[head], self["embedding.weight"]):
                raise UserError(f"{files.folder} ties {head} to the embedding, but holds another {head}")
            surplus.remove(head)
        missing, unknown = sorted(wanted - files.keys()), sorted(surplus)
        if missing:
            raise UserError(f"{files.folder} lacks {len(missing)} weights of its config, such as {missing[0]}")
        if unknown:
            raise UserError(
                f"{files.folder} has {len(unknown)} weights that a {layout.model_type} model of its config has not, "
                f"such as {unknown[0]}"
            )

    def __getitem__(self, name: str) -> Tensor:
        parts = [self._files[theirs] for theirs in self._theirs[name]]
        height, *rest = self._shapes[name]
        shapes = [list(part.shape) for part in parts]
        if sum(shape[0] for shape in shapes) != height or any(shape[1:] != rest for shape in shapes):
            raise UserError(
                f"{self._files.folder}: {' and '.join(self._theirs[name])} have the shapes {shapes}, the config says "
                f"{[height, *rest]} in all"
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def __contains__(self, name: object) -> bool:
        return name in self._theirs  # the inherited one would read the tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._theirs)

    def __len__(self) -> int:
        return len(self._theirs)


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
