"""Weights in and out: a folder of safetensors, JSON and tokenizer files, or a Lightning checkpoint."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dllm_var.errors import UserError
from dllm_var.model.config import TransformerConfig
from dllm_var.model.initialise import placed_like
from dllm_var.model.transformer import Transformer
from dllm_var.tokenization import Tokenizer

CONFIG, WEIGHTS, EXPORT_FOLDER = "config.json", "model.safetensors", "model"
MODEL_TYPE = "dllm_var"
_PREFIX = "transformer."


def save_checkpoint_folder(
    path: str | Path,
    transformer: Transformer,
    tokenizer: Tokenizer,
    meta: dict[str, Any] | None = None,
    state: dict[str, Tensor] | None = None,
) -> Path:
    """Writes `config.json`, `model.safetensors` and the tokenizer, each under a temporary name first.

    Args:
        path: The folder, made when missing.
        transformer: The model.
        tokenizer: Its tokenizer.
        meta: Plain data to keep beside the weights, such as `{"sampler": {...}}`.
        state: Weights to save in place of the transformer's own (gathered from a sharded strategy).
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().cpu().contiguous() for name, value in (state or transformer.state_dict()).items()}
    if transformer.config.tie_embeddings:
        weights.pop("lm_head.weight", None)
    temporary = folder / f".{WEIGHTS}.tmp"
    save_file(weights, temporary, metadata={"format": "pt"})
    os.replace(temporary, folder / WEIGHTS)
    tokenizer.save(folder)
    config = {"model_type": MODEL_TYPE, "transformer": transformer.config.to_dict(), **(meta or {})}
    temporary = folder / f".{CONFIG}.tmp"
    temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, folder / CONFIG)
    return folder


def load_checkpoint(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[Transformer, Tokenizer, dict[str, Any]]:
    """Loads a run folder, a Lightning `.ckpt` or an exported folder; never executes pickled code.

    Args:
        path: `runs/quickstart/version_0`, `.../checkpoints/last.ckpt` or a folder with `config.json`.
        device: Where the weights go.
        dtype: Converts the weights; as stored when null.

    Returns:
        The transformer in eval mode, its tokenizer, and what else the checkpoint remembers (`sampler`, ...).

    Raises:
        UserError: When there is no checkpoint, or it is damaged, or it is not one of ours.
    """
    place = locate_checkpoint(path)
    parts = _read_lightning(place) if place.is_file() else _read_folder(place)
    config, weights, tokenizer, meta = parts
    with torch.device("meta"):
        transformer = Transformer(config)
    transformer.to_empty(device=device)
    transformer.tie_weights()
    _copy_weights(transformer, weights, place)
    if dtype is not None:
        transformer.to(dtype)
    if torch.device(device).type == "cpu":
        _lay_out_for_few_tokens(transformer)
    return transformer.eval(), tokenizer, meta


def load_pretrained(path: str | Path, causal: bool = False) -> Transformer:
    """Loads a checkpoint as a bare model from token ids [B, L] to logits [B, L, V].

    Args:
        path: As for `load_checkpoint`.
        causal: Reads left to right; a checkpoint that was trained causally always does.
    """
    transformer, _, _ = load_checkpoint(path)
    transformer.config.causal = transformer.config.causal or causal
    return transformer


def start_from(transformer: Transformer, tokenizer: Tokenizer, path: str | Path) -> None:
    """Copies a checkpoint's weights into a transformer, sharded or not, to go on training them as another run.

    Args:
        transformer: Of the same shape as the checkpoint's.
        tokenizer: The run's, which must be the checkpoint's.
        path: As for `load_checkpoint`.

    Raises:
        UserError: When shape or tokenizer are not the checkpoint's.
    """
    place = locate_checkpoint(path)
    config, weights, saved, _ = _read_lightning(place) if place.is_file() else _read_folder(place)
    ours, theirs = asdict(transformer.config), asdict(config.resolved())
    for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "intermediate_size"):
        if ours[name] != theirs[name]:
            raise UserError(
                f"model.init_from {path} has transformer.{name}={theirs[name]}, the settings say {ours[name]}: "
                "make them the same"
            )
    if saved.fingerprint != tokenizer.fingerprint:
        raise UserError(f"model.init_from {path} was trained with another tokenizer than data.tokenizer")
    with torch.no_grad():
        _copy_weights(transformer, weights, place)


def locate_checkpoint(path: str | Path) -> Path:
    """Returns the exported folder or the `.ckpt` file that `path` means; the newest when a run has several."""
    place = Path(path)
    if not place.exists():
        raise UserError(f"no checkpoint at {place}: give a run folder, a .ckpt file or an exported folder")
    if place.is_file() or (place / CONFIG).is_file():
        return place
    if (place / EXPORT_FOLDER / CONFIG).is_file():
        return place / EXPORT_FOLDER
    found = [file for pattern in ("*.ckpt", "checkpoints/*.ckpt") for file in place.glob(pattern)]
    if not found:
        raise UserError(f"no checkpoint in {place}: neither {EXPORT_FOLDER}/{CONFIG} nor a .ckpt file is there")
    return max(found, key=lambda file: file.stat().st_mtime)


def _lay_out_for_few_tokens(transformer: Transformer) -> None:
    """Stores each block's matrices by columns: a CPU then multiplies a few tokens by them up to 1.5 times faster."""
    for module in transformer.blocks.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = module.weight.data.t().contiguous().t()


Parts = tuple[TransformerConfig, dict[str, Tensor], Tokenizer, dict[str, Any]]


def _read_folder(folder: Path) -> Parts:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"cannot read {folder / CONFIG}: {error}") from error
    if not isinstance(config, dict) or config.get("model_type") != MODEL_TYPE:
        kind = config.get("model_type") if isinstance(config, dict) else type(config).__name__
        raise UserError(f"{folder / CONFIG} is of model_type {kind!r}, not {MODEL_TYPE!r}")
    try:
        weights = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {folder / WEIGHTS}: {error}") from error
    meta = {key: value for key, value in config.items() if key not in ("model_type", "transformer")}
    return _config(config.get("transformer"), folder), weights, Tokenizer.from_pretrained(str(folder)), meta


def _read_lightning(file: Path) -> Parts:
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"cannot read the checkpoint {file}: {reason}; try an earlier one") from error
    ours = checkpoint.get("dllm_var") if isinstance(checkpoint, dict) else None
    if not isinstance(ours, dict):
        raise UserError(f"{file} was not written by dllm_var: it has no 'dllm_var' entry")
    weights = {
        name.removeprefix(_PREFIX): value
        for name, value in checkpoint["state_dict"].items()
        if name.startswith(_PREFIX)
    }
    meta = {key: value for key, value in ours.items() if key not in ("transformer", "tokenizer")}
    return _config(ours.get("transformer"), file), weights, Tokenizer.from_dict(ours["tokenizer"]), meta


def _config(values: Any, place: Path) -> TransformerConfig:
    """Checks the names, so that a checkpoint of another version is named and not misread."""
    known = {field.name for field in fields(TransformerConfig)}
    if not isinstance(values, dict) or not set(values) <= known:
        unknown = sorted(set(values) - known) if isinstance(values, dict) else values
        raise UserError(f"{place} has transformer settings this version does not know: {unknown}")
    return TransformerConfig(**values)


def _copy_weights(transformer: Transformer, weights: dict[str, Tensor], place: Path) -> None:
    if transformer.config.tie_embeddings:
        weights = {name: value for name, value in weights.items() if name != "lm_head.weight"}
    expected = dict(transformer.state_dict())
    if transformer.config.tie_embeddings:
        expected.pop("lm_head.weight")
    missing, unknown = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or unknown:
        raise UserError(f"{place} does not fit its own config: missing {missing[:3]}, unknown {unknown[:3]}")
    for name, value in weights.items():
        if value.shape != expected[name].shape:
            raise UserError(
                f"{place}: weight {name} has shape {list(value.shape)}, the config says {list(expected[name].shape)}"
            )
        expected[name].copy_(placed_like(value, expected[name]))
