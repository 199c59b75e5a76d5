"""Matrices in 8 or 4 bits: integers with a scale for each row, or for each group of a row's weights.

Weights are rounded to the nearest; embedding, head and norms stay. A product takes the numbers that the integers stand
for, in the type of its input, and its backward pass makes them again instead of keeping them.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dllm_var.errors import UserError
from dllm_var.model.experts import refuse_experts

QuantizeName = Literal["int8", "int4"]
# Rows that a CPU turns into numbers at a time: they stay in its cache. At 4096 x 4096 and 32 tokens it takes half the
# time of a whole matrix.
CHUNK = 256


@dataclass(frozen=True)
class Integers:
    """How matrices are stored: `bits` is 8 or 4; as many weights of a row as `group` share a scale, all when None."""

    bits: int
    group: int | None = None

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    def shapes(self, out_features: int, in_features: int) -> tuple[list[int], list[int]]:
        """Returns the shapes of a matrix's integers and scales; raises UserError when its rows cannot be divided."""
        group = self.group or in_features
        if in_features % group or in_features % (32 // self.bits):
            raise UserError(
                f"{self.name} needs rows of a multiple of {self.group or 32 // self.bits} weights, and this model has "
                f"some of {in_features}: leave the setting quantize out" + ", or try int8" * (self.bits == 4)
            )
        return [out_features, in_features * self.bits // 8], [out_features, in_features // group]


KINDS = {"int8": Integers(8), "int4": Integers(4, 32)}


class QuantisedLinear(nn.Linear):
    """A frozen matrix of integers, in place of a linear layer; it has no values before they are loaded.

    `weight` is int8 [out, in], or uint8 [out, in / 2] with two weights in a byte, the first in its lower half, and
    `scale` [out, groups] has the type of the weights they stand for.
    """

    def __init__(self, like: nn.Linear, integers: Integers) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = like.in_features, like.out_features, like.bias
        self.integers = integers
        shapes = integers.shapes(self.out_features, self.in_features)
        kinds = (torch.uint8 if integers.bits == 4 else torch.int8, like.weight.dtype)
        self.weight, self.scale = (
            nn.Parameter(torch.empty(shape, dtype=kind, device=like.weight.device), requires_grad=False)
            for shape, kind in zip(shapes, kinds, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        product = (_Product.apply if torch.is_grad_enabled() else multiply)(x, self.weight, self.scale)
        return product if self.bias is None else product + self.bias


class _Product(torch.autograd.Function):
    """x W^T whose backward pass computes W from the integers again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return multiply(x, weight, scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        weight, scale = ctx.saved_tensors
        return gradient @ dequantise(weight, scale, gradient.dtype), None, None


def multiply(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Returns x [..., in] times the transpose of the matrix [out, in] of integers."""
    rows = CHUNK if weight.device.type == "cpu" else len(weight)
    chunks = zip(weight.split(rows), scale.split(rows), strict=True)
    products = [F.linear(x, dequantise(part, scales, x.dtype)) for part, scales in chunks]
    return products[0] if len(products) == 1 else torch.cat(products, dim=-1)


def dequantise(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the numbers [out, in] that the integers of a matrix stand for."""
    if weight.dtype == torch.uint8:  # each half's sign is its highest bit
        weight = torch.stack(((weight << 4).view(torch.int8) >> 4, weight.view(torch.int8) >> 4), dim=-1).flatten(-2)
    numbers = weight.to(dtype).unflatten(-1, (scale.size(1), -1))
    return numbers.mul_(scale.to(dtype).unsqueeze(-1)).flatten(-2)


@torch.no_grad()
def quantise(matrix: Tensor, integers: Integers) -> tuple[Tensor, Tensor]:
    """Returns the integers and scales of a matrix [out, in], as `QuantisedLinear` has them."""
    _, (_, groups) = integers.shapes(*matrix.shape)
    numbers = matrix.float().unflatten(-1, (groups, -1))
    most = 2 ** (integers.bits - 1)
    scale = numbers.abs().amax(dim=-1) / (most - 0.5)
    scale = scale.clamp_min(torch.finfo(torch.float32).eps).to(matrix.dtype)
    whole = (numbers * (1 / scale.float()).unsqueeze(-1)).round_().clamp_(-most, most - 1).flatten(-2)
    return packed(whole, integers), scale


def packed(whole: Tensor, integers: Integers) -> Tensor:
    """Returns whole numbers [out, in] as `QuantisedLinear` has them."""
    whole = whole.to(torch.int8)
    if integers.bits == 8:
        return whole
    halves = whole.view(torch.uint8).unflatten(-1, (-1, 2))
    return halves[..., 0] & 15 | halves[..., 1] << 4


def quantise_layers(transformer: Any, integers: Integers) -> None:
    """Puts matrices of integers, without values, in place of all linear layers in a transformer's layers.

    Raises UserError for a mixture of experts, whose stacked matrices are no linear layers.
    """
    refuse_experts(transformer.config, f"the setting quantize {integers.name}")
    for part in list(transformer.layers.modules()):
        for name, matrix in list(part.named_children()):
            if isinstance(matrix, nn.Linear):
                setattr(part, name, QuantisedLinear(matrix, integers))
