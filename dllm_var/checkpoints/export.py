"""Checkpoints out: the folder of a published family, which transformers and other engines open."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dllm_var.checkpoints.families import Family
from dllm_var.checkpoints.family_config import EXTRAS, write_config
from dllm_var.checkpoints.opening import CONFIG, Checkpoint, weight_shapes
from dllm_var.checkpoints.pretrained import decoding_config
from dllm_var.checkpoints.safetensors_files import write_safetensors
from dllm_var.errors import UserError
from dllm_var.files import write_atomically
from dllm_var.model.config import TransformerConfig

SHARD_BYTES = 2 * 1024**3
GENERATION_CONFIG = "generation_config.json"


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
        dtype: Converts the weights; as stored when None.
        shard_bytes: Size of one weights file.

    Returns:
        The settings of the model that was written.

    Raises:
        UserError: When the folder exists, or the family has no such model.
    """
    if output.exists():
        raise UserError(f"--output {output} exists: give a folder that does not")
    tokenizer = checkpoint.load_tokenizer()
    config = decoding_config(checkpoint, tokenizer)
    kind = dtype or checkpoint.weights["model.norm.weight"].dtype
    values = write_config(family, config, str(kind).removeprefix("torch."))
    values[EXTRAS] = {**checkpoint.meta, **values[EXTRAS], **decoding}
    generation = {
        "eos_token_id": list(tokenizer.terminator_ids),
        "pad_token_id": tokenizer.pad_id,
        "mask_token_id": tokenizer.mask_id,
        **decoding,
    }
    with write_atomically(output) as partial:
        partial.mkdir()
        write_safetensors(partial, _their_weights(checkpoint, family, config, dtype), shard_bytes)
        tokenizer.save(partial)
        for name, content in ((CONFIG, values), (GENERATION_CONFIG, generation)):
            (partial / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return config


def _their_weights(
    checkpoint: Checkpoint, family: Family, config: TransformerConfig, dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    """Yields the family's weights, one after the other."""
    for name, shape in weight_shapes(config).items():
        value = checkpoint.weight(name, shape)
        yield family.theirs(name), value if dtype is None else value.to(dtype)
