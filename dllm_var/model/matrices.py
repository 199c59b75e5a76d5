"""The matrices of a layer: fused ones for decoding, and ones with an adapter that acts at mask positions only."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AdaptedLinear(nn.Module):
    """A matrix with a low-rank adapter (LoRA) that adds to its products at mask positions only.

    Everywhere else it adds exact zeros: the product is that of the matrix alone. Weights have the names that peft gives
    them.
    """

    def __init__(self, base_layer: nn.Linear, r: int, scaling: float, dropout: float) -> None:
        super().__init__()
        self.base_layer, self.scaling, self.dropout = base_layer, scaling, nn.Dropout(dropout)
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        like: Any = {"bias": False, "device": base_layer.weight.device, "dtype": base_layer.weight.dtype}
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base_layer.in_features, r, **like)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(r, base_layer.out_features, **like)})

    def forward(self, x: Tensor, on_masks: Tensor) -> Tensor:
        return self.base_layer(x) + self.added(x, on_masks)

    def added(self, x: Tensor, on_masks: Tensor) -> Tensor:
        """Returns what the adapter adds: zeros where `on_masks` [..., 1] is False."""
        low = self.lora_A["default"](self.dropout(x)) * self.scaling
        return self.lora_B["default"](torch.where(on_masks, low, 0.0))


def project(matrix: nn.Module, x: Tensor, on_masks: Tensor | None) -> Tensor:
    """Multiplies `x` by a matrix; `on_masks` [..., 1] says where its adapter adds, if it is an `AdaptedLinear`."""
    return matrix(x, on_masks) if isinstance(matrix, AdaptedLinear) else matrix(x)


class Fused:
    """Matrices that read the same input, in one memory, so that decoding multiplies by all of them at once.

    The layers keep their weights, which become views of that memory. A CPU multiplies few tokens by a matrix up to 1.5
    times faster when it is stored by columns.
    """

    def __init__(self, *layers: nn.Linear | AdaptedLinear) -> None:
        bases = [layer.base_layer if isinstance(layer, AdaptedLinear) else layer for layer in layers]
        weight = torch.cat([base.weight.data for base in bases])
        self.layers, self.sizes = layers, [base.out_features for base in bases]
        self.weight = weight.t().contiguous().t() if weight.device.type == "cpu" else weight
        self.bias = None if bases[0].bias is None else torch.cat([base.bias.data for base in bases])
        start = 0
        for base in bases:
            own = slice(start, start := start + base.out_features)
            base.weight.data = self.weight[own]
            if self.bias is not None:
                base.bias.data = self.bias[own]

    def __call__(self, x: Tensor, on_masks: Tensor | None) -> Tensor:
        product = F.linear(x, self.weight, self.bias)
        if on_masks is not None:
            for layer, part in zip(self.layers, product.split(self.sizes, dim=-1), strict=True):
                if isinstance(layer, AdaptedLinear):
                    part += layer.added(x, on_masks)
        return product


def usable(fused: Fused | None, first: nn.Module) -> Fused | None:
    """Returns the fused matrices if no gradient is wanted and `first` still is the first of them, at its place."""
    if fused is None or torch.is_grad_enabled() or fused.layers[0] is not first:  # an adapter was put around it since
        return None
    weight: Any = getattr(first, "base_layer", first).weight
    return fused if weight.data_ptr() == fused.weight.data_ptr() else None  # else moved, as by `.to(device)`
