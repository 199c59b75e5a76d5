"""Checkpoints out: the folder of a published family, which transformers and other engines open."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dllm_var.checkpoints.families import Layout
from dllm_var.checkpoints.family_config import EXTRAS, write_config
from dllm_var.checkpoints.pretrained import check_finite, decoding_config, with_rows
from dllm_var.checkpoints.safetensors_files import write_safetensors
from dllm_var.checkpoints.stored import CONFIG, StoredModel, weight_shapes
from dllm_var.errors import UserError
from dllm_var.files import write_atomically
from dllm_var.model.config import TransformerConfig

SHARD_BYTES = 2 * 1024**3
GENERATION_CONFIG = "generation_config.json"


def export_checkpoint(
    stored: StoredModel,
    layout: Layout,
    output: Path,
    decoding: dict[str, Any],
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> TransformerConfig:
    """Writes a checkpoint as a model of a published family, a shard at a time; the folder appears when it is complete.

    Args:
        stored: The checkpoint.
        layout: The family.
        output: The folder, which must not exist yet.
        decoding: How the model is meant to be decoded (`block_length`, `threshold`), kept beside the weights.
        dtype: Converts the weights; as stored when null.
        shard_bytes: Size of one weights file.

    Returns:
        The settings of the model that was written.

    Raises:
        UserError: When the folder exists, or the family has no such model.
    """
    if output.exists():
        raise UserError(f"--output {output} exists: give a folder that does not")
    tokenizer = stored.load_tokenizer()
    config = decoding_config(stored, tokenizer)
    kind = dtype or stored.weights["norm.weight"].dtype
    values = write_config(layout, config, str(kind).removeprefix("torch."))
    values[EXTRAS] = {**stored.meta, **values[EXTRAS], **decoding}
    generation = {
        "eos_token_id": list(tokenizer.terminator_ids),
        "pad_token_id": tokenizer.pad_id,
        "mask_token_id": tokenizer.mask_id,
        **decoding,
    }
    with write_atomically(output) as partial:
        partial.mkdir()
        write_safetensors(partial, _their_weights(stored, layout, config, dtype), shard_bytes)
        tokenizer.save(partial)
        for name, content in ((CONFIG, values), (GENERATION_CONFIG, generation)):
            (partial / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return config


def _their_weights(
    stored: StoredModel, layout: Layout, config: TransformerConfig, dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    """Yields the family's weights, one after the other."""
    assert config.head_dim is not None and config.num_kv_heads is not None and config.vocab_size is not None
    assert config.intermediate_size is not None
    keys = config.num_kv_heads * config.head_dim
    heights = {
        "qkv": [config.num_heads * config.head_dim, keys, keys],
        "gate_up": [config.intermediate_size, config.intermediate_size],
    }
    for name in weight_shapes(config):
        value = with_rows(stored.weights[name], name, config.vocab_size) if stored.published else stored.weights[name]
        value = value if dtype is None else value.to(dtype)
        check_finite(value, name, stored.place)
        theirs = layout.theirs(name)
        parts = value.split(heights[name.split(".")[-2]]) if len(theirs) > 1 else (value,)
        yield from zip(theirs, parts, strict=True)
