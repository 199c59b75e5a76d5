"""A sampler's second model: a guide or a drafter, read from its own checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch

from dllm_var.checkpoints.pretrained import load_checkpoint
from dllm_var.errors import UserError
from dllm_var.model.transformer import Transformer
from dllm_var.sampling.base import Request
from dllm_var.text.tokenizer import Tokenizer

SHARED = ("vocab_size", "mask_id", "terminator_ids")  # what two models must agree on to exchange tokens


@dataclass
class AuxiliaryModel:
    """Loads a checkpoint when it is first needed, once, and sees to it that it speaks the main model's language.

    Args:
        setting: The sampler's argument that names it, for messages.
        path: A run folder, `.ckpt` file or exported folder; see `load_checkpoint`, which never runs code from it.
        causal: Whether it must be autoregressive, or else must not be.
    """

    setting: str
    path: str
    causal: bool
    _same: Tokenizer | None = field(default=None, repr=False)  # the last one found to be the same

    @cached_property
    def _loaded(self) -> tuple[Transformer, Tokenizer]:
        with torch.inference_mode(False):  # the weights outlive the request that first needs them
            transformer, tokenizer, _ = load_checkpoint(self.path)
        return transformer, tokenizer

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer."""
        return self._loaded[1]

    def beside(self, model: Transformer, request: Request) -> Transformer:
        """Returns the model, on the device and in the type of the main `model`, whose `request` knows its tokenizer.

        Raises:
            UserError: When it cannot be loaded, is of the wrong kind, or has another tokenizer or vocabulary.
        """
        transformer, tokenizer = self._loaded
        name, other = f"sampler.{self.setting} {self.path}", request.tokenizer
        if transformer.config.causal != self.causal:
            kinds = ("bidirectional", "autoregressive") if self.causal else ("autoregressive", "bidirectional")
            raise UserError(f"{name} is {kinds[0]}: give a checkpoint that is {kinds[1]}")
        if other is not None and other is not self._same:
            # Not by fingerprint: a chat template or a name of a token is no matter between two models.
            if other.special != tokenizer.special or other.backend.to_str() != tokenizer.backend.to_str():
                raise UserError(f"{name} has another tokenizer than the model: give a checkpoint trained with the same")
            self._same = other
        for setting in SHARED:
            ours, theirs = getattr(transformer.config, setting), getattr(model.config, setting)
            if ours != theirs:
                raise UserError(
                    f"{name} has {setting} {ours}, the model {theirs}: give a checkpoint trained with its tokenizer"
                )
        weight, its_weight = model.embedding.weight, transformer.embedding.weight
        if (weight.device, weight.dtype) != (its_weight.device, its_weight.dtype):
            with torch.inference_mode(False):
                transformer.to(weight.device, weight.dtype)
        return transformer
