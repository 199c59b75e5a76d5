"""Opens checkpoints: published models by folder or hub name, folders of ours, runs, their checkpoints, and adapters.

Its weights are read one at a time, when they are asked for. No code that comes with a checkpoint is run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dllm_var.checkpoints.archive import is_sharded, read_state, read_weights
from dllm_var.checkpoints.families import EXTRAS, family_of, read_config, read_settings
from dllm_var.checkpoints.run_checkpoint import check_or_offer, newest_checkpoint, read_identity, step_of
from dllm_var.checkpoints.weights import (
    ADAPTER_CONFIG,
    Readers,
    held,
    merge_adapters,
    open_adapter,
    open_safetensors,
    weight_shapes,
    weights_of,
)
from dllm_var.errors import UserError, one_line
from dllm_var.files import read_object
from dllm_var.model.config import SIZES, TransformerConfig
from dllm_var.model.initialise import fill
from dllm_var.model.lora import Lora, plain_name
from dllm_var.model.transformer import Transformer
from dllm_var.text.tokenizer import Tokenizer
from dllm_var.text.tokenizer_files import TOKENIZER_FILES, download, is_hub_name

CONFIG, EXPORT_FOLDER = "config.json", "model"
PREFIX = "transformer."  # of the weights' names in a checkpoint of a run
MODEL_FILES = ["*.safetensors", "*.safetensors.index.json", *TOKENIZER_FILES]
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Settings in which a run may differ from the checkpoint it starts from, and those that tokenizer and objective decide.
ADJUSTABLE = {"rope_theta", "rope_scaling", "rope_full_precision", "norm_eps"}
ADJUSTABLE |= {"initializer_range", "token_shift", "context_length"}
SET_BY_OTHERS = {"vocab_size", "mask_id", "terminator_ids", "pad_id", "causal", "causal_context"}

# -- models ------------------------------------------------------------------------------------------------------------


def load_checkpoint(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[Transformer, Tokenizer, dict[str, Any]]:
    """Loads a checkpoint to decode with.

    Args:
        path: `runs/quickstart/version_0`, `.../checkpoints/last.ckpt`, a folder with `config.json` (our own or that of
            a published model, see docs/checkpoints.md), or a published model's name on the hub.
        device: Where the weights go.
        dtype: Converts the weights; None leaves their type.

    Returns:
        The transformer in eval mode, its tokenizer, and what else the checkpoint remembers (`sampler`, ...). A
        published model without a mask token gets one, and a row for it if none is free.

    Raises:
        UserError: When there is no checkpoint, or it is damaged, or holds something that is not fully understood.
    """
    checkpoint = open_checkpoint(path)
    tokenizer = checkpoint.load_tokenizer()
    return _load(checkpoint, decoding_config(checkpoint, tokenizer), device, dtype), tokenizer, checkpoint.meta


def load_pretrained(path: str | Path, causal: bool = False) -> Transformer:
    """Loads a checkpoint as a bare model from token ids [B, L] to logits [B, L, V].

    Args:
        path: As for `load_checkpoint`; of a published model, the tokenizer is not needed.
        causal: Reads left to right, as published Llama and Qwen models were trained to; one of our own checkpoints
            that was trained causally always does.
    """
    checkpoint = open_checkpoint(path)
    causal = causal or (checkpoint.config.causal and not checkpoint.published)
    return _load(checkpoint, replace(checkpoint.config, causal=causal))


def _load(
    checkpoint: Checkpoint,
    config: TransformerConfig,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> Transformer:
    """Builds a transformer without weights, fills it one weight at a time and lays them out for decoding."""
    with torch.device("meta"):
        transformer = Transformer(config)
    kind = dtype or checkpoint.dtype
    if kind not in FLOATING:
        raise UserError(f"{checkpoint.place} has weights of type {kind}, which cannot be computed with: convert them")
    transformer.to(kind)
    transformer.to_empty(device=device)
    transformer.tie_weights()
    _copy_weights(transformer, checkpoint)
    transformer.fuse_projections()
    return transformer.eval()


@torch.no_grad()
def _copy_weights(transformer: Transformer, checkpoint: Checkpoint) -> None:
    """Fills the transformer's weights, which may be sharded, one at a time."""
    own = {plain_name(name): value for name, value in transformer.state_dict().items()}  # adapters are not loaded
    for name in weight_shapes(transformer.config):
        fill(own[name], checkpoint.weight(name, list(own[name].shape)))


def decoding_config(checkpoint: Checkpoint, tokenizer: Tokenizer) -> TransformerConfig:
    """Returns a checkpoint's settings with its tokenizer's ids, and rows for tokens that a published model lacks.

    Raises:
        UserError: When the tokenizer is not the one that the model was trained with.
    """
    config, place = checkpoint.config, checkpoint.place
    ids: dict[str, Any] = {"mask_id": tokenizer.mask_id, "pad_id": tokenizer.pad_id}
    ids["terminator_ids"] = list(tokenizer.terminator_ids)
    if checkpoint.published:
        rows = max(config.vocab_size or 0, tokenizer.vocab_size)
        if rows > (config.vocab_size or 0) + len(tokenizer.backend.get_vocab(with_added_tokens=True)):
            raise UserError(f"{place}: its tokenizer has ids up to {tokenizer.vocab_size:,} for far fewer tokens")
        return replace(config, vocab_size=rows, **ids)
    for name, value in ids.items():
        known = getattr(config, name)
        if known not in (None, value):
            raise UserError(
                f"{place} has {name}={known} in its config, and its tokenizer says {value}: the tokenizer is not the "
                "one it was trained with"
            )
    return config


# -- the beginning of another run --------------------------------------------------------------------------------------


def starting_config(settings: TransformerConfig, path: str | Path) -> TransformerConfig:
    """Returns the shape of a model that starts from a checkpoint: the checkpoint's, with the settings' adjustments.

    Args:
        settings: The user's; what is None comes from the checkpoint.
        path: As for `load_checkpoint`.

    Raises:
        UserError: When a setting contradicts the checkpoint.
    """
    return _adjusted(open_checkpoint(path).config, settings, path)


def start_from(transformer: Transformer, tokenizer: Tokenizer, path: str | Path) -> None:
    """Copies a checkpoint's weights into a transformer, sharded or not, to go on training them as another run.

    Args:
        transformer: Of the shape that `starting_config` gives.
        tokenizer: The run's: the checkpoint's own, or a published model's with further tokens, such as a mask.
        path: As for `load_checkpoint`.

    Raises:
        UserError: When shape or tokenizer are not the checkpoint's.
    """
    checkpoint = open_checkpoint(path)
    _adjusted(checkpoint.config, transformer.config, path)
    if not checkpoint.published:
        if checkpoint.load_tokenizer().fingerprint != tokenizer.fingerprint:
            raise UserError(f"model.init_from {path} was trained with another tokenizer than data.tokenizer")
    elif (checkpoint.place / "tokenizer.json").is_file():
        vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
        theirs = checkpoint.load_tokenizer().backend.get_vocab(with_added_tokens=True)
        moved = any(vocabulary.get(token, index) != index for token, index in theirs.items())
        if moved or len(theirs.keys() - vocabulary.keys()) > 1:  # one may be the mask we give it
            raise UserError(f"model.init_from {path} has another tokenizer than data.tokenizer: set both to the same")
    _copy_weights(transformer, checkpoint)


def _adjusted(saved: TransformerConfig, settings: TransformerConfig, path: str | Path) -> TransformerConfig:
    given = {field.name: getattr(settings, field.name) for field in fields(settings)}
    given = {name: value for name, value in given.items() if value is not None and name not in SET_BY_OTHERS}
    for name, value in given.items():
        if name not in ADJUSTABLE and value != getattr(saved, name):
            raise UserError(
                f"model.init_from {path} has transformer.{name}={getattr(saved, name)}, the settings say {value}: "
                "leave it out"
            )
    return replace(saved, **{**given, "vocab_size": max(settings.vocab_size or 0, saved.vocab_size or 0)}).resolved()


# -- opening -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds; nothing of its weights is read before it is asked for."""

    place: Path  # the folder or file
    config: TransformerConfig  # resolved
    weights: Readers  # under our names
    load_tokenizer: Callable[[], Tokenizer]  # one without a mask token gets one
    meta: dict[str, Any]  # what else it remembers (`sampler`, `step`, ...)
    published: bool = False  # others wrote it, so that it says nothing about how we are to read it
    rows: int | None = None  # tokens that its embedding has, when the config, an adapter's, has more

    @property
    def dtype(self) -> torch.dtype:
        """Type of its weights."""
        return self.weights["model.norm.weight"]().dtype

    def weight(self, name: str, shape: list[int]) -> Tensor:
        """Reads one weight; embedding and head of a published model get rows for tokens that it does not have.

        New rows are the mean of the existing ones.

        Raises:
            UserError: When it has another shape, or values that are NaN or infinite.
        """
        value = self.weights[name]()
        if value.dtype not in FLOATING:
            raise UserError(f"{self.place}: weight {name} has no floating-point numbers, but {value.dtype}")
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


def open_checkpoint(path: str | Path, adapters: tuple[Path, ...] = ()) -> Checkpoint:
    """Looks at what `load_checkpoint` takes without reading its weights.

    The folder of an adapter means the model that it was trained on with the adapter merged in; `adapters` are those
    that name `path` as the model they adapt.

    Raises:
        UserError: When there is none, or it is damaged, or holds something that is not fully understood.
    """
    place = locate_checkpoint(path)
    if (place / ADAPTER_CONFIG).is_file():
        return _open_adapter(place, adapters)
    return _open_run_checkpoint(place) if place.is_file() or is_sharded(place) else _open_folder(place)


def locate_checkpoint(path: str | Path) -> Path:
    """Returns the model folder or the `.ckpt` that `path` means; the newest when a run has several."""
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
    exported, step = (read_object(export).get(EXTRAS) or {}).get("step"), step_of(checkpoint)
    if isinstance(exported, int) and step is not None:
        return step > exported
    return checkpoint.stat().st_mtime_ns > export.stat().st_mtime_ns


def _open_folder(folder: Path) -> Checkpoint:
    values = read_object(folder / CONFIG)
    config, extras = read_config(values, folder / CONFIG), values.get(EXTRAS)
    weights, size = open_safetensors(folder)
    weights = weights_of(config, weights, size, folder, family_of(values, folder / CONFIG).theirs)
    tokenizer = partial(Tokenizer.from_pretrained, folder)
    return Checkpoint(folder, config, weights, tokenizer, _meta(extras), extras is None)


def _meta(ours: dict[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (ours or {}).items() if name not in ("transformer", "tokenizer", "lora")}


def _open_adapter(folder: Path, above: tuple[Path, ...]) -> Checkpoint:
    own, scaling, path = open_adapter(folder)
    if folder.resolve() in above:
        raise UserError(f"{folder} names itself as the model that it adapts: set base_model_name_or_path")
    base = open_checkpoint(path, (*above, folder.resolve()))
    weights = merge_adapters({**base.weights, **own}, scaling)
    if not (folder / CONFIG).is_file():  # peft's own
        return replace(base, place=folder, weights=weights)
    values = read_object(folder / CONFIG)
    config = read_config(values, folder / CONFIG)
    rows, known = config.vocab_size or 0, base.config.vocab_size or 0
    more = "vocab_size" if known <= rows <= 2 * known else None  # tokens that the base has not, such as a mask
    for name in SIZES:
        if getattr(config, name) != getattr(base.config, name) and name != more:
            raise UserError(f"{folder / CONFIG} has another {name} than {path}, which the adapter was trained on")
    tokenizer = partial(Tokenizer.from_pretrained, folder)
    return Checkpoint(folder, config, weights, tokenizer, _meta(values.get(EXTRAS)), base.published, known)


def _open_run_checkpoint(path: Path) -> Checkpoint:
    check_or_offer(path)
    checkpoint = read_state(path)
    if path.is_dir():
        checkpoint["state_dict"] = read_weights(path)
    ours, state = read_identity(checkpoint, path), checkpoint.get("state_dict")
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} holds no weights: its 'state_dict' is not a dictionary of tensors")
    own = [name for name in state if name.startswith(PREFIX)]
    weights = held({name.removeprefix(PREFIX): state[name] for name in own})
    config = read_settings(ours.get("transformer"), path)
    if ours.get("lora") is not None:
        weights = merge_adapters(weights, Lora(**ours["lora"]).scaling)
    parts = [part for part in path.rglob("*") if part.is_file()] if path.is_dir() else [path]
    weights = weights_of(config, weights, sum(part.stat().st_size for part in parts), path)
    return Checkpoint(path, config, weights, lambda: _tokenizer_of(ours.get("tokenizer"), path), _meta(ours))


def _tokenizer_of(values: Any, path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_dict(values)
    except Exception as error:  # the Rust side raises a bare Exception
        reason = one_line(error)
        raise UserError(f"{path} holds a tokenizer that cannot be read: {type(error).__name__}: {reason}") from error
