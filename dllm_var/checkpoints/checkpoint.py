"""What a checkpoint holds: its settings, its tokenizer, and its weights, each read when it is asked for."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dllm_var.checkpoints.quantised import read_numbers, scale_of
from dllm_var.checkpoints.weight_layout import FLOATING
from dllm_var.errors import UserError
from dllm_var.model.build import outline
from dllm_var.model.config import TransformerConfig
from dllm_var.model.lora import Lora, plain_name
from dllm_var.model.quantised import KINDS, Integers, QuantizeName, quantise
from dllm_var.text.tokenizer import Tokenizer

Readers = dict[str, Callable[[], Tensor]]  # of weights by name; each weight is read when its reader is called


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
    lora: Lora | None = None  # adapters on masks only, which are among the weights; all others are merged into them
    quantised: Integers | None = None  # how `weights` has the matrices of the layers

    @property
    def dtype(self) -> torch.dtype:
        return self.weight("model.norm.weight", [self.config.hidden_size]).dtype

    def weight(self, name: str, shape: list[int]) -> Tensor:
        """Reads one weight; raises UserError when it has another shape, or values that are NaN or infinite.

        Embedding and head of a published model get rows for tokens that it does not have: the mean of the others.
        """
        return self._checked(name, read_numbers(self.weights, name), shape)

    def stored_as(self, quantize: QuantizeName | None) -> Integers | None:
        """Returns how a model of this checkpoint keeps the matrices of its layers, None for as they are."""
        if quantize is None or self.quantised is None:
            return self.quantised if quantize is None else KINDS[quantize]
        if KINDS[quantize].bits != self.quantised.bits:
            raise UserError(
                f"{self.place} has weights of {self.quantised.bits} bits already: leave out the setting quantize "
                f"{quantize}, or start from the checkpoint that they were made of"
            )
        return self.quantised

    def integers(self, name: str, shape: list[int], integers: Integers, like: Tensor) -> tuple[Tensor, Tensor]:
        """Reads a matrix as integers and scales of the type of `like`; one that is not quantised is rounded there."""
        if self.quantised is None:
            return quantise(self.weight(name, shape).to(like), integers)
        weight, scale = self.weights[name](), self.weights[scale_of(name)]()
        packed, scales = integers.shapes(*shape)
        if list(weight.shape) != packed:
            raise UserError(f"{self.place}: weight {name} has shape {list(weight.shape)}, the config says {packed}")
        return weight, self._checked(scale_of(name), scale, scales).to(like.dtype)

    def _checked(self, name: str, value: Tensor, shape: list[int]) -> Tensor:
        if value.dtype not in FLOATING:
            raise UserError(f"{self.place}: weight {name} is of type {value.dtype}, which cannot be computed with")
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


def decoding_config(checkpoint: Checkpoint, tokenizer: Tokenizer) -> TransformerConfig:
    """Returns a checkpoint's settings with its tokenizer's ids, and rows for tokens that a published model lacks."""
    config, place = checkpoint.config, checkpoint.place
    ids: dict[str, Any] = {"mask_id": tokenizer.mask_id, "pad_id": tokenizer.pad_id}
    ids["terminator_ids"] = list(tokenizer.terminator_ids)
    if checkpoint.published:
        return replace(config, vocab_size=max(config.vocab_size or 0, tokenizer.vocab_size), **ids)
    for name, value in ids.items():
        known = getattr(config, name)
        if known not in (None, value):
            raise UserError(
                f"{place} has {name}={known} in its config, and its tokenizer says {value}: the tokenizer is not the "
                "one it was trained with"
            )
    return config


def weight_shapes(
    config: TransformerConfig, lora: Lora | None = None, integers: Integers | None = None
) -> dict[str, list[int]]:
    """Returns names and shapes of the distinct weights of a transformer, adapters included; a tied head is none."""
    weights = outline(config, lora, integers).state_dict()
    if config.tie_embeddings:
        del weights["lm_head.weight"]
    return {plain_name(name): list(weight.shape) for name, weight in weights.items()}
