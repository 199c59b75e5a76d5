"""A sampler's second model: a guide or a drafter, read from its own checkpoint."""

from dataclasses import dataclass, field
from functools import cached_property

import torch

from dllm_var.checkpoints.pretrained import load_checkpoint
from dllm_var.errors import UserError
from dllm_var.model.transformer import Transformer
from dllm_var.sampling.base import Request
from dllm_var.text.tokenizer import Tokenizer


@dataclass
class AuxiliaryModel:
    """A checkpoint that is loaded when it is first needed, once, and must have the main model's tokens."""

    setting: str  # the sampler's argument that names it
    path: str  # a run folder, `.ckpt` file or exported folder
    causal: bool  # whether it must be autoregressive; otherwise it must not be
    same: Tokenizer | None = field(init=False, default=None)  # the last one found to be the same

    @cached_property
    def loaded(self) -> tuple[Transformer, Tokenizer]:
        with torch.inference_mode(False):  # the weights outlive the request that first needs them
            transformer, tokenizer, _ = load_checkpoint(self.path)
        return transformer, tokenizer

    def beside(self, model: Transformer, request: Request) -> Transformer:
        """Returns it, on the device and in the type of the main `model`; raises UserError when the two do not fit."""
        transformer, tokenizer = self.loaded
        name, other = f"sampler.{self.setting} {self.path}", request.tokenizer
        if transformer.config.causal != self.causal:
            kinds = ("bidirectional", "autoregressive") if self.causal else ("autoregressive", "bidirectional")
            raise UserError(f"{name} is {kinds[0]}: give a checkpoint that is {kinds[1]}")
        if other is not None and other is not self.same:
            # Not by fingerprint: a chat template or a name of a token is no matter between two models.
            if other.special != tokenizer.special or other.backend.to_str() != tokenizer.backend.to_str():
                raise UserError(f"{name} has another tokenizer than the model: give a checkpoint trained with the same")
            self.same = other
        for entry in ("vocab_size", "mask_id", "terminator_ids"):
            its, ours = getattr(transformer.config, entry), getattr(model.config, entry)
            if its != ours:
                raise UserError(f"{name} has {entry} {its}, the model {ours}: give a checkpoint with the same")
        weight = model.embedding.weight
        with torch.inference_mode(False):
            return transformer.to(weight.device, weight.dtype)
