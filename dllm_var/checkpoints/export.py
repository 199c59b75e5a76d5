"""Model folders: a trained model as config, safetensors and tokenizer, in a form that transformers and others open."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dllm_var.checkpoints.families import EXTRAS, Family, natural_family, write_config
from dllm_var.checkpoints.pretrained import CONFIG, Checkpoint, decoding_config
from dllm_var.checkpoints.weights import INDEX, WEIGHTS, save_tensors, weight_shapes
from dllm_var.errors import UserError
from dllm_var.files import write_atomically, write_text
from dllm_var.model.config import TransformerConfig
from dllm_var.model.transformer import Transformer
from dllm_var.text.tokenizer import Tokenizer

SHARD_BYTES = 2 * 1024**3


def save_checkpoint_folder(
    path: str | Path,
    transformer: Transformer,
    tokenizer: Tokenizer,
    meta: dict[str, Any] | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> Path:
    """Writes a model as a folder, which transformers opens, too, where it has such a model.

    Args:
        path: The folder, made when missing.
        transformer: The model.
        tokenizer: Its tokenizer.
        meta: Plain data to keep beside the weights, such as `{"sampler": {...}}`.
        state: Weights to save in place of the transformer's own (gathered from a sharded strategy).
    """
    folder, weights = Path(path), dict(state or transformer.state_dict())
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


def export_checkpoint(
    checkpoint: Checkpoint,
    family: Family,
    output: Path,
    decoding: dict[str, Any],
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> TransformerConfig:
    """Writes a checkpoint as a model of a published family, a shard at a time; the folder appears when it is complete.

    Args:
        checkpoint: The checkpoint.
        family: The family.
        output: The folder, which must not exist yet.
        decoding: How the model is meant to be decoded (`block_length`, `threshold`), kept beside the weights.
        dtype: Converts the weights; None leaves their type.
        shard_bytes: Size of one weights file.

    Returns:
        The settings of the model that was written.

    Raises:
        UserError: When the folder exists, or the family has no such model.
    """
    from huggingface_hub import split_torch_state_dict_into_shards  # slow to import

    if output.exists():
        raise UserError(f"--output {output} exists: give a folder that does not")
    tokenizer = checkpoint.load_tokenizer()
    config = decoding_config(checkpoint, tokenizer)
    kind = dtype or checkpoint.dtype
    values = write_config(family, config, str(kind).removeprefix("torch."))
    values[EXTRAS] = {**checkpoint.meta, **values[EXTRAS], **decoding}
    ids = {"eos_token_id": list(tokenizer.terminator_ids), "pad_token_id": tokenizer.pad_id}
    settings = {CONFIG: values, "generation_config.json": {**ids, "mask_token_id": tokenizer.mask_id, **decoding}}
    shapes = weight_shapes(config)
    names = {family.theirs(name): name for name in shapes}
    outline = {theirs: torch.empty(shapes[ours], dtype=kind, device="meta") for theirs, ours in names.items()}
    shards = split_torch_state_dict_into_shards(outline, max_shard_size=shard_bytes)
    if shards.is_sharded:
        settings[INDEX] = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
    with write_atomically(output) as partial:
        for file, held in shards.filename_to_tensors.items():
            shard = {theirs: checkpoint.weight(names[theirs], shapes[names[theirs]]) for theirs in held}
            if dtype is not None:
                shard = {theirs: value.to(dtype) for theirs, value in shard.items()}
            save_tensors(shard, partial / file)
        tokenizer.save(partial)
        for file, content in settings.items():
            (partial / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return config
