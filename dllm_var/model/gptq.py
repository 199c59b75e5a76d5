"""Rounding a matrix so that its products on given inputs change least (GPTQ, arXiv 2210.17323)."""

import torch
from torch import Tensor

from dllm_var.model.quantised import Integers, packed, quantise

BLOCK = 128  # columns whose errors are brought to the columns behind them together
DAMPING = 0.01  # of the mean of the diagonal, which is added to it


@torch.no_grad()
def gptq(matrix: Tensor, inputs: Tensor, integers: Integers) -> tuple[Tensor, Tensor]:
    """Returns what `quantise` does for a matrix [out, in], whose scales stay, but rounded for the inputs it has.

    `inputs` [in, in] is the sum of x x^T over inputs x. Columns are rounded one by one, those with the largest inputs
    first, and what each loses is made up for by the columns that are not rounded yet.
    """
    columns, most = matrix.size(1), 2 ** (integers.bits - 1)
    _, scale = quantise(matrix, integers)
    products = inputs.float().clone()
    products.diagonal().add_(DAMPING * products.diagonal().mean() + torch.finfo(torch.float32).eps)
    order = products.diagonal().argsort(descending=True)
    rest = matrix.float()[:, order]
    steps = scale.float().repeat_interleave(columns // scale.size(1), dim=1)[:, order]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(products[order][:, order]))
    inverse = torch.linalg.cholesky(inverse, upper=True)
    whole = torch.empty_like(rest)
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        errors = rest.new_empty(len(rest), end - start)
        for column in range(start, end):
            whole[:, column] = (rest[:, column] * (1 / steps[:, column])).round().clamp(-most, most - 1)
            error = (rest[:, column] - whole[:, column] * steps[:, column]) / inverse[column, column]
            rest[:, column + 1 : end] -= error[:, None] * inverse[column, column + 1 : end]
            errors[:, column - start] = error
        rest[:, end:] -= errors @ inverse[start:end, end:]
    return packed(whole[:, order.argsort()], integers), scale
