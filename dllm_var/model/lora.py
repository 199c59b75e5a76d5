"""Low-rank adapters (LoRA, arXiv 2106.09685), trained beside frozen weights: peft's, or ones that act on masks only."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dllm_var.errors import UserError
from dllm_var.model.initialise import fill, named_generator
from dllm_var.model.matrices import AdaptedLinear
from dllm_var.model.transformer import Transformer

LAYER_MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DOWN, UP = ".lora_A.default.weight", ".lora_B.default.weight"  # as peft names A and B of the adapter "default"


@dataclass
class Lora:
    """Which matrices get an adapter, and how large: each computes x W + (alpha / r) x A B and only A, B are trained.

    Args:
        r: Rank of the adapters.
        alpha: Their weight is alpha / r.
        dropout: Share of their inputs that is dropped in training.
        targets: Names of the adapted matrices: `q_proj`, `k_proj`, `v_proj` and `o_proj` of the attention,
            `gate_proj`, `up_proj` and `down_proj` of the feed-forward layer, `lm_head`. Of a mixture of experts, what
            every token passes is adapted: dense layers and shared experts.
        on_masks_only: Adds the adapters at mask positions only (R-ISD, arXiv 2604.11035). The model must be causal, so
            that clean tokens see no mask: at each of them it computes exactly what it does without adapters. They are
            not merged into the weights.
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: list(LAYER_MATRICES))
    on_masks_only: bool = False

    def __post_init__(self) -> None:
        if self.r < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise UserError(
                f"model.lora needs r >= 1, alpha > 0 and dropout in [0, 1), got {self.r}, {self.alpha}, {self.dropout}"
            )
        known = (*LAYER_MATRICES, "lm_head")
        unknown = next((name for name in self.targets if name not in known), None)
        if unknown is not None or not self.targets:
            raise UserError(f"model.lora.targets: there is no {unknown!r}; choose among {', '.join(known)}")
        self.targets = sorted(set(self.targets))  # their order means nothing
        if self.on_masks_only and "lm_head" in self.targets:
            raise UserError(
                "model.lora.on_masks_only does not go with the target lm_head, which does not know where masks are: "
                "leave it out of model.lora.targets"
            )

    @property
    def scaling(self) -> float:
        """Weight of the adapters."""
        return self.alpha / self.r

    def peft_config(self) -> Any:
        """Returns the same settings as peft's `LoraConfig`; raises UserError when peft is not installed."""
        try:
            from peft import LoraConfig
        except ImportError as error:
            raise UserError('model.lora needs peft: pip install "dllm-var[lora]"') from error
        alpha: Any = self.alpha  # peft divides by r, whole or not
        return LoraConfig(r=self.r, lora_alpha=alpha, lora_dropout=self.dropout, target_modules=list(self.targets))


def add_adapters(transformer: Transformer, lora: Lora) -> None:
    """Gives a transformer adapters, in place: the matrix `x` becomes `x.base_layer`, and all else is frozen.

    On the meta device they have no values until `reset_adapters` draws them. Raises UserError when peft is needed and
    not installed, the head is to be adapted that is the embedding, too, or only experts are.
    """
    if "lm_head" in lora.targets and transformer.config.tie_embeddings:
        raise UserError("model.lora.targets: lm_head is tied to the embedding in this model: leave it out")
    matrices = {name.rpartition(".")[2] for name, part in transformer.named_modules() if isinstance(part, nn.Linear)}
    if matrices.isdisjoint(lora.targets):
        raise UserError(
            f"model.lora.targets: no matrix of this model is called {' or '.join(lora.targets)}, and experts get no "
            "adapters: name matrices of the attention, too"
        )
    on_meta = transformer.embedding.weight.is_meta
    if lora.on_masks_only:
        _adapt_masks(transformer, lora)
    else:
        config = lora.peft_config()
        from peft import inject_adapter_in_model

        inject_adapter_in_model(config, transformer, low_cpu_mem_usage=on_meta)  # it freezes the other weights
    if not on_meta:
        reset_adapters(transformer)


def _adapt_masks(transformer: Transformer, lora: Lora) -> None:
    transformer.requires_grad_(False)
    for part in list(transformer.layers.modules()):
        for name, matrix in list(part.named_children()):
            if name in lora.targets and isinstance(matrix, nn.Linear):
                setattr(part, name, AdaptedLinear(matrix, lora.r, lora.scaling, lora.dropout))
    transformer.adapts_masks = True


@torch.no_grad()
def reset_adapters(transformer: Transformer) -> None:
    """Draws the adapters anew, as peft does (A uniform, B zero), but keyed by the seed and their names.

    peft's own draws come from torch's generator, and so differ between a whole and a sharded model.
    """
    for name, parameter in transformer.named_parameters():
        if name.endswith(UP):
            parameter.zero_()
        elif name.endswith(DOWN):
            bound = parameter.shape[1] ** -0.5
            generator = named_generator(torch.initial_seed(), name)
            fill(parameter, torch.empty(parameter.shape, device="cpu").uniform_(-bound, bound, generator=generator))


def plain_name(name: str) -> str:
    """Returns what a weight is called in a transformer without adapters."""
    return name.replace(".base_layer.", ".")


def is_adapter(name: str) -> bool:
    """Whether a name of a state dict is that of an adapter's weight."""
    return name.endswith((DOWN, UP))
