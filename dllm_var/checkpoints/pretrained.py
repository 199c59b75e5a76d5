"""Weights in and out: a model folder of safetensors, JSON and tokenizer files, or a Lightning checkpoint."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dllm_var.checkpoints.family_config import EXTRAS, natural_family, write_config
from dllm_var.checkpoints.opening import (
    CONFIG,
    EXPORT_FOLDER,
    FLOATING,
    Checkpoint,
    locate_checkpoint,
    open_checkpoint,
    weight_shapes,
)
from dllm_var.checkpoints.safetensors_files import WEIGHTS, save_tensors
from dllm_var.errors import UserError
from dllm_var.files import write_text
from dllm_var.model.config import TransformerConfig
from dllm_var.model.initialise import fill
from dllm_var.model.lora import plain_name
from dllm_var.model.transformer import Transformer
from dllm_var.text.tokenizer import Tokenizer

__all__ = [
    "EXPORT_FOLDER",
    "load_checkpoint",
    "load_pretrained",
    "locate_checkpoint",
    "open_checkpoint",
    "save_checkpoint_folder",
    "save_settings",
    "start_from",
    "starting_config",
]

# Settings in which a run may differ from the checkpoint it starts from, and those that tokenizer and objective decide.
ADJUSTABLE = {"rope_theta", "rope_scaling", "rope_full_precision", "norm_eps"}
ADJUSTABLE |= {"initializer_range", "token_shift", "context_length"}
SET_BY_OTHERS = {"vocab_size", "mask_id", "terminator_ids", "pad_id", "causal", "causal_context"}


def save_checkpoint_folder(
    path: str | Path,
    transformer: Transformer,
    tokenizer: Tokenizer,
    meta: dict[str, Any] | None = None,
    state: dict[str, Tensor] | None = None,
) -> Path:
    """Writes `config.json`, `model.safetensors` and the tokenizer: a folder that transformers opens, too, where it has
    such a model.

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
    save_tensors(weights, folder / WEIGHTS)
    save_settings(folder, transformer, tokenizer, meta)  # last: it makes the folder a checkpoint
    return folder


def save_settings(
    folder: Path, transformer: Transformer, tokenizer: Tokenizer, meta: dict[str, Any] | None = None
) -> None:
    """Writes `config.json`, with `meta` in it, and the tokenizer of a folder of weights or of adapters."""
    tokenizer.save(folder)
    config, dtype = transformer.config, str(transformer.embedding.weight.dtype).removeprefix("torch.")
    values = write_config(natural_family(config), config, dtype)
    values[EXTRAS] |= meta or {}
    write_text(folder / CONFIG, json.dumps(values, indent=2) + "\n")


def load_checkpoint(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[Transformer, Tokenizer, dict[str, Any]]:
    """Loads a checkpoint to decode with; never executes pickled code.

    Args:
        path: `runs/quickstart/version_0`, `.../checkpoints/last.ckpt`, a folder with `config.json` (our own or that of
            a published model, see docs/checkpoints.md), or a published model's name on the hub.
        device: Where the weights go.
        dtype: Converts the weights; as stored when None.

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
    return _load(
        checkpoint, replace(checkpoint.config, causal=causal or (checkpoint.config.causal and not checkpoint.published))
    )


def decoding_config(checkpoint: Checkpoint, tokenizer: Tokenizer) -> TransformerConfig:
    """Returns a checkpoint's settings with its tokenizer's ids, and rows for tokens that a published model lacks.

    Raises:
        UserError: When the tokenizer is not the one that the model was trained with.
    """
    if not checkpoint.published:
        ids = {"mask_id": tokenizer.mask_id, "pad_id": tokenizer.pad_id}
        for name, value in {**ids, "terminator_ids": list(tokenizer.terminator_ids)}.items():
            known = getattr(checkpoint.config, name)
            if known not in (None, value):
                raise UserError(
                    f"{checkpoint.place} has {name}={known} in its config, and its tokenizer says {value}: the "
                    "tokenizer is not the one it was trained with"
                )
        return checkpoint.config
    rows = tokenizer.vocab_size - (checkpoint.config.vocab_size or 0)
    if rows > len(tokenizer.backend.get_vocab(with_added_tokens=True)):
        raise UserError(
            f"{checkpoint.place}: its tokenizer has ids up to {tokenizer.vocab_size:,} for far fewer tokens"
        )
    return replace(
        checkpoint.config,
        vocab_size=max(checkpoint.config.vocab_size or 0, tokenizer.vocab_size),
        mask_id=tokenizer.mask_id,
        terminator_ids=list(tokenizer.terminator_ids),
        pad_id=tokenizer.pad_id,
    )


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
        moved = next((token for token, index in theirs.items() if vocabulary.get(token, index) != index), None)
        if moved is not None or len(theirs.keys() - vocabulary.keys()) > 1:  # one may be the mask we give it
            raise UserError(f"model.init_from {path} has another tokenizer than data.tokenizer: set both to the same")
    _copy_weights(transformer, checkpoint)


def _adjusted(stored: TransformerConfig, settings: TransformerConfig, path: str | Path) -> TransformerConfig:
    changes: dict[str, Any] = {}
    for field in fields(TransformerConfig):
        name, value = field.name, getattr(settings, field.name)
        if value is None or name in SET_BY_OTHERS:
            continue
        if name in ADJUSTABLE:
            changes[name] = value
        elif value != getattr(stored, name):
            raise UserError(
                f"model.init_from {path} has transformer.{name}={getattr(stored, name)}, the settings say {value}: "
                "leave it out"
            )
    rows = max(settings.vocab_size or 0, stored.vocab_size or 0)
    return replace(stored, vocab_size=rows, **changes).resolved()


def _load(
    checkpoint: Checkpoint,
    config: TransformerConfig,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> Transformer:
    """Builds a transformer without weights, fills it one weight at a time and lays them out for decoding."""
    with torch.device("meta"):
        transformer = Transformer(config)
    kind = dtype or checkpoint.weights["model.norm.weight"].dtype
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
