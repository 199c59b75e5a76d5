"""Attention within documents against a dense mask, forward and backward."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_var.model import Transformer, TransformerConfig, documents
from dllm_var.model.attention import attend, causal_mask, segment_mask
from dllm_var.model.documents import attend_documents, chunks, find_documents

PADDING = -1


@pytest.fixture(autouse=True)
def _short_rows_too(monkeypatch):
    monkeypatch.setattr(documents, "LEAST_LENGTH", 1)
    monkeypatch.setattr(documents, "CHUNK", 8)


def rows(sizes, length):
    """Segment ids of rows with documents of the given sizes; the rest is padding."""
    result = torch.full((len(sizes), length), PADDING)
    for row, lengths in zip(result, sizes, strict=True):
        row[: sum(lengths)] = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.long))
    return result


SEGMENTS = {
    "short and long, padded": rows([[3, 2, 4, 11], [20], [1, 1, 1, 9, 2]], 24),
    "one document a row": rows([[16], [16]], 16),
    "the same id on both sides of a row's end": torch.zeros(3, 5, dtype=torch.long),
    "nothing but padding": rows([[], [4]], 10),
}


@pytest.mark.parametrize("name", SEGMENTS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("short", [0, 8, 512])
def test_equals_the_dense_mask_forward_and_backward(name, causal, kv_heads, short, monkeypatch):
    """By products alone, by SDPA alone, and where long documents interrupt the products."""
    monkeypatch.setattr(documents, "SHORT", short)
    segments = SEGMENTS[name]
    generator = torch.Generator().manual_seed(0)
    shape = (*segments.shape, 4 + 2 * kv_heads, 8)
    qkv = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(*segments.shape, 4, 8, generator=generator, dtype=torch.float64)
    queries, keys, values = qkv.split((4, kv_heads, kv_heads), dim=2)
    mask = segment_mask(segments)
    mask = mask & causal_mask(segments.size(1), mask.device) if causal else mask
    dense = attend(*(x.transpose(1, 2) for x in (queries, keys, values)), mask, False).transpose(1, 2)
    (expected,) = torch.autograd.grad((dense * upstream).sum(), qkv, retain_graph=True)
    ours = attend_documents(queries, keys, values, find_documents(segments, torch.float64, causal, 8))
    (gradient,) = torch.autograd.grad((ours * upstream).sum(), qkv)
    torch.testing.assert_close(ours, dense)
    torch.testing.assert_close(gradient, expected)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=12), st.integers(1, 3))
@settings(max_examples=50, deadline=None)
def test_chunks_hold_each_document_whole_and_none_crosses_a_row(sizes, repeats):
    length = sum(sizes)
    edges = [0]
    for size in sizes * repeats:
        edges.append(edges[-1] + size)
    grouped = chunks(edges, length)
    assert [edge for group in grouped for edge in group[1:]] == edges[1:]
    for group in grouped:
        assert group[0] // length == (group[-1] - 1) // length
        assert group[-1] - group[0] <= documents.CHUNK or len(group) == 2


@pytest.mark.parametrize("causal", [False, True])
def test_the_transformer_takes_it_for_documents_and_nothing_else(causal, monkeypatch):
    torch.manual_seed(0)
    config = TransformerConfig(
        hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, vocab_size=50, initializer_range=0.2, causal=causal
    )
    model = Transformer(config).double()
    segments = SEGMENTS["short and long, padded"]
    tokens = torch.randint(0, 50, segments.shape)
    ours = model(tokens, None, segments)
    ours.square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    given_mask = model.hidden_states(tokens, attention_mask=segment_mask(segments)[:, 0])
    torch.testing.assert_close(model.lm_head(given_mask), ours)
    monkeypatch.setattr(documents, "LEAST_LENGTH", 25)
    monkeypatch.setattr("dllm_var.model.transformer.attend_documents", None)
    dense = model(tokens, None, segments)
    dense.square().sum().backward()
    torch.testing.assert_close(ours, dense)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def test_memory_does_not_grow_with_the_row_squared():
    found = find_documents(rows([[100] * 80], 8192), torch.float32, False, 8)
    ((_, run),) = found.runs
    assert sum(chunk.size for chunk in run) == 8192 and max(chunk.size for chunk in run) <= 192
    assert sum(chunk.mask.numel() for chunk in run if chunk.mask is not None) < 8192 * 256


def test_what_is_kept_for_the_gradients_grows_with_short_documents_alone():
    """Sixteen documents of 512 tokens keep their probabilities, one of 8,192 does not."""

    def kept(sizes):
        shape, total = (1, 8192, 2, 16), []
        queries, keys, values = (torch.randn(shape, requires_grad=True) for _ in range(3))
        found = find_documents(rows([sizes], 8192), torch.float32, False, 8)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: total.append(x.numel()), lambda x: x):
            attend_documents(queries, keys, values, found)
        return sum(total) / queries.numel()

    assert kept([512] * 16) == pytest.approx(3 + 512 / 16)
    assert kept([8192]) < 5


def test_16_bit_types_are_left_to_sdpa():
    segments = SEGMENTS["short and long, padded"]
    qkv = torch.randn(3, 24, 12, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = find_documents(segments, torch.bfloat16, False, 8)
        mixed = attend_documents(*qkv.split(4, dim=2), found)
    assert not any(short for short, _ in found.runs) and mixed.dtype == torch.bfloat16
    exact = attend_documents(*qkv.split(4, dim=2), find_documents(segments, torch.float32, False, 8))
    torch.testing.assert_close(mixed.float(), exact, atol=0.02, rtol=0.02)


def by_document(q, k, v, ends_q, ends_k, longest_q, longest_k, window_size):
    """What torch's varlen kernel computes, document by document."""
    assert torch.equal(ends_q, ends_k) and ends_q.dtype == torch.int32 and longest_q == longest_k == 24
    assert q.dtype == k.dtype == v.dtype
    parts = []
    for start, end in pairwise(ends_q.tolist()):
        part = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))
        parts.append(attend(*part, None, window_size == (-1, 0))[0].transpose(0, 1))
    return torch.cat(parts)


def varlen_of_2_11(q, k, v, ends_q, ends_k, longest_q, longest_k, *, scale=None, window_size=(-1, -1)):
    assert q.size(1) == k.size(1) == v.size(1)
    return by_document(q, k, v, ends_q, ends_k, longest_q, longest_k, window_size)


def varlen_of_2_12(
    q, k, v, ends_q, ends_k, longest_q, longest_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    assert enable_gqa or q.size(1) == k.size(1) == v.size(1)
    return by_document(q, k, v, ends_q, ends_k, longest_q, longest_k, window_size)


@pytest.mark.parametrize("kernel", [varlen_of_2_11, varlen_of_2_12])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_the_varlen_kernel_of_each_torch_computes_what_the_mask_does(kernel, kv_heads, causal, monkeypatch):
    """No CUDA here: stand-ins with the signatures of torch 2.11 and 2.12."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    monkeypatch.setattr(documents, "has_varlen", lambda *_: True)
    segments = SEGMENTS["short and long, padded"]
    found = find_documents(segments, torch.bfloat16, causal, 8)
    assert found.ends is not None and not found.runs
    assert found.ends.tolist()[:6] == [0, 3, 5, 9, 20, 24] and found.ends[-1] == 72
    qkv = torch.randn(3, 24, 4 + 2 * kv_heads, 8, requires_grad=True)
    queries, keys, values = qkv.split((4, kv_heads, kv_heads), dim=2)
    mixed = attend_documents(queries, keys, values, found)
    mask = segment_mask(segments) & causal_mask(24, segments.device) if causal else segment_mask(segments)
    dense = attend(*(x.transpose(1, 2) for x in (queries, keys, values)), mask, False).transpose(1, 2)
    torch.testing.assert_close(mixed, dense)
    (expected,) = torch.autograd.grad(dense.square().sum(), qkv, retain_graph=True)
    (gradient,) = torch.autograd.grad(mixed.square().sum(), qkv)
    torch.testing.assert_close(gradient, expected)


def test_the_installed_varlen_kernel_takes_the_arguments_it_gets():
    """Its operator has a stand-in for devices without values, which checks shapes."""
    found = documents.Documents([], torch.zeros(9, dtype=torch.int32, device="meta"), 24, True)
    queries, keys, values = torch.empty(3, 24, 8, 8, device="meta", dtype=torch.bfloat16).split((4, 2, 2), dim=2)
    assert attend_documents(queries.float(), keys, values, found).shape == queries.shape


@pytest.mark.parametrize(
    ("dtype", "head_dim", "takes"),
    [
        (torch.bfloat16, 64, True),
        (torch.float16, 256, True),
        (torch.float32, 64, False),
        (torch.bfloat16, 20, False),
        (torch.bfloat16, 264, False),
    ],
)
def test_heads_and_types_that_the_varlen_kernel_does_not_take_get_a_mask(dtype, head_dim, takes, monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    assert documents.has_varlen(torch.device("cuda"), dtype, head_dim) is takes
    assert not documents.has_varlen(torch.device("cpu"), dtype, head_dim)
