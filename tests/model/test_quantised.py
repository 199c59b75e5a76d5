"""Matrices of integers: against torchao's rounding, and against plain matrices of the numbers that they stand for."""

import copy
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from dllm_var.errors import UserError
from dllm_var.model import Transformer, TransformerConfig
from dllm_var.model.quantised import CHUNK, KINDS, QuantisedLinear, dequantise, quantise, quantise_layers
from dllm_var.sampling import AutoregressiveSampler, BlockDiffusionSampler, ConfidenceThreshold

SHAPE = dict(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=64, vocab_size=50)
SHAPE |= dict(mask_id=1, terminator_ids=[2])
IDS = torch.randint(3, 50, (2, 12), generator=torch.Generator().manual_seed(0))


def random_matrix(rows, columns, dtype=torch.float32):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).mul(0.1).to(dtype)


def quantised(linear, kind):
    """A linear layer's matrix as integers."""
    layer = QuantisedLinear(linear, KINDS[kind])
    layer.weight.data, layer.scale.data = quantise(linear.weight, KINDS[kind])
    return layer


def models(kind, **changes):
    """A model of integers, and a plain one that has the numbers which they stand for."""
    torch.manual_seed(0)
    plain = Transformer(TransformerConfig(**{**SHAPE, "initializer_range": 0.2, **changes})).eval()
    integers = copy.deepcopy(plain)
    quantise_layers(integers, KINDS[kind])
    for name, module in integers.named_modules():
        if isinstance(module, QuantisedLinear):
            matrix = plain.get_submodule(name).weight
            module.weight.data, module.scale.data = quantise(matrix, KINDS[kind])
            matrix.data = dequantise(module.weight, module.scale, matrix.dtype)
    return integers, plain


@pytest.mark.skipif(find_spec("torchao") is None, reason="pip install torchao")
@pytest.mark.parametrize("kind", KINDS)
def test_rounding_is_that_of_torchao(kind):
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    linear = nn.Linear(96, 40, bias=False)
    linear.weight.data[3] = 0
    linear.weight.data[4, 5] = -4.0  # far from the others
    ours = quantise(linear.weight, KINDS[kind])
    theirs = copy.deepcopy(linear)
    four_bits = IntxWeightOnlyConfig(torch.int4, PerGroup(KINDS["int4"].group))
    quantize_(theirs, Int8WeightOnlyConfig(version=2) if kind == "int8" else four_bits)
    assert torch.equal(dequantise(*ours, torch.float32), theirs.weight.dequantize())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_are_within_half_a_step_and_take_a_byte_or_half_of_one(kind, dtype):
    matrix = random_matrix(24, 64, dtype)
    weight, scale = quantise(matrix, KINDS[kind])
    numbers = dequantise(weight, scale, torch.float32)
    steps = scale.float().repeat_interleave(64 // scale.size(1), dim=1)
    # The largest of a group lies half a step beyond the last integer; scales of 16 bits are rounded themselves.
    assert ((numbers - matrix.float()).abs() <= steps * (0.5 if dtype == torch.float32 else 0.8) + 1e-7).all()
    assert weight.nbytes == matrix.numel() * (1 if kind == "int8" else 0.5) and scale.dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_products_and_gradients_are_those_of_the_plain_matrix(kind):
    plain = nn.Linear(64, CHUNK + 24)
    layer = quantised(plain, kind)
    plain.weight.data = dequantise(layer.weight, layer.scale, torch.float32)
    x = torch.randn(3, 5, 64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    target = torch.randn(3, 5, CHUNK + 24)
    for layer_of, given in ((layer, ours), (plain, theirs)):
        (layer_of(given) * target).sum().backward()
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(layer(x), layer(ours).detach())


def test_the_backward_pass_keeps_no_plain_matrix():
    kept = []
    layer = quantised(nn.Linear(64, 48, bias=False), "int4")
    x = torch.randn(5, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(x)
    assert kept and all(tensor.is_floating_point() is (tensor.shape == (48, 2)) for tensor in kept)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", [{}, dict(qkv_bias=True, qk_norm=True, token_shift=True), dict(causal=True)])
@torch.no_grad()
def test_a_model_decodes_as_the_plain_one_does(kind, changes):
    integers, plain = models(kind, **changes)
    integers.fuse_projections()
    plain.fuse_projections()
    torch.testing.assert_close(integers(IDS), plain(IDS), rtol=1e-5, atol=1e-5)
    sampler = (
        AutoregressiveSampler(max_new_tokens=9)
        if changes.get("causal")
        else BlockDiffusionSampler(ConfidenceThreshold(0.5), block_length=4, max_new_tokens=9)
    )
    expected, found = (sampler.generate(model, IDS.tolist()) for model in (plain, integers))
    assert [answer.tokens for answer in found] == [answer.tokens for answer in expected]
    assert len({token for answer in found for token in answer.tokens}) > 3


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_flops_are_counted_as_those_of_the_plain_model(kind):
    integers, plain = models(kind)
    assert integers.num_parameters == plain.num_parameters
    assert integers.flops_per_token(10, 0.5) == plain.flops_per_token(10, 0.5)
    assert not any(parameter.requires_grad for parameter in integers.layers[0].mlp.parameters())
    embedding = integers.embedding.weight
    assert embedding.requires_grad and isinstance(integers.lm_head, nn.Linear) and embedding.dtype == torch.float32
    assert integers.to(torch.bfloat16).layers[0].mlp.up_proj.weight.dtype in (torch.int8, torch.uint8)


@pytest.mark.parametrize(("kind", "columns"), [("int4", 48), ("int8", 30)])
def test_rows_that_cannot_be_divided_are_named(kind, columns):
    with pytest.raises(UserError, match=rf"{kind} needs rows of a multiple .* some of {columns}"):
        quantise(random_matrix(8, columns), KINDS[kind])


@pytest.mark.slow
def test_quantising_imports_no_torchao():
    code = "import sys, dllm_var.checkpoints.pretrained; assert not any('torchao' in name for name in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ})
