"""GPTQ: against its definition, column by column with an inverse of its own each, and against plain rounding."""

import pytest
import torch

from dllm_var.model.gptq import BLOCK, DAMPING, gptq
from dllm_var.model.quantised import KINDS, dequantise, quantise


def correlated(columns, rows=400):
    """Inputs [rows, in] of which many are alike, one column far larger and one never used."""
    noise = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 12, generator=noise) @ torch.randn(12, columns, generator=noise)
    x += 0.3 * torch.randn(rows, columns, generator=noise)
    x[:, 7] *= 20
    x[:, 9] = 0
    return x


def by_definition(matrix, products, scale, most):
    """Whole numbers: after each column the best change of all that are left (OBQ, arXiv 2208.11580, equation 3)."""
    products = products.double() + DAMPING * products.diagonal().mean() * torch.eye(len(products))
    order = products.diagonal().argsort(descending=True).tolist()
    rest, steps = matrix.double().clone(), scale.double().repeat_interleave(matrix.size(1) // scale.size(1), dim=1)
    whole = torch.zeros_like(rest)
    for number, column in enumerate(order):
        left = order[number:]
        inverse = torch.linalg.inv(products[left][:, left])
        whole[:, column] = (rest[:, column] / steps[:, column]).round().clamp(-most, most - 1)
        error = rest[:, column] - whole[:, column] * steps[:, column]
        rest[:, left] -= error[:, None] / inverse[0, 0] * inverse[0]
    return (whole * steps).float()


@pytest.mark.parametrize("kind", KINDS)
def test_columns_are_rounded_as_defined(kind):
    columns = BLOCK + 32
    matrix, x = torch.randn(6, columns, generator=torch.Generator().manual_seed(1)), correlated(columns)
    weight, scale = gptq(matrix, x.t() @ x, KINDS[kind])
    expected = by_definition(matrix, x.t() @ x, scale, 128 if kind == "int8" else 8)
    found = dequantise(weight, scale, torch.float32)
    assert torch.equal(scale, quantise(matrix, KINDS[kind])[1])
    assert (found - expected).abs().gt(1e-5).float().mean() < 0.01  # a few lie between two whole numbers


@pytest.mark.parametrize("kind", KINDS)
def test_products_change_less_than_by_plain_rounding(kind):
    matrix, x = torch.randn(48, 64, generator=torch.Generator().manual_seed(1)), correlated(64)
    calibrated, plain = (
        dequantise(*rounded, torch.float32)
        for rounded in (gptq(matrix, x[:300].t() @ x[:300], KINDS[kind]), quantise(matrix, KINDS[kind]))
    )
    lost, lost_by_rounding = ((x[300:] @ (one - matrix).t()).square().mean() for one in (calibrated, plain))
    assert lost < 0.5 * lost_by_rounding
    unknown = gptq(matrix, torch.zeros(64, 64), KINDS[kind])  # no inputs: plain rounding
    assert torch.equal(dequantise(*unknown, torch.float32), plain)
