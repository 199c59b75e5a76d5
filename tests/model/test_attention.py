"""Each way to attend within documents, or as a rule says, against a dense mask."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from dllm_var.model import Transformer, TransformerConfig
from dllm_var.model.attention import LEAST_LENGTH, Documents, Seen, attend, attend_by_group, document_rule, has_varlen

PADDING = -1


def rows(sizes, length):
    """Segment ids of rows with documents of the given sizes; the rest is padding."""
    result = torch.full((len(sizes), length), PADDING)
    for row, lengths in zip(result, sizes, strict=True):
        row[: sum(lengths)] = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.long))
    return result


SEGMENTS = {
    "short rows": rows([[3, 2, 4, 11], [20], [1, 1, 1, 9, 2]], 24),
    "long rows": rows([[3, 200, 40, 11], [260], [1, 1, 1, 9, 200]], LEAST_LENGTH + 4),
    "the same id on both sides of a row's end": torch.zeros(3, LEAST_LENGTH, dtype=torch.long),
}


def mask_of(segments, causal):
    """Which token sees which [B, L, L], by the definition."""
    mask = segments[:, :, None] == segments[:, None]
    return mask.tril() if causal else mask


def heads(segments, kv_heads=2):
    generator = torch.Generator().manual_seed(0)
    shape = (*segments.shape, 4 + 2 * kv_heads, 8)
    return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)


def dense(qkv, mask):
    queries, keys, values = (x.transpose(1, 2) for x in qkv.split((4, *[(qkv.size(2) - 4) // 2] * 2), dim=2))
    return F.scaled_dot_product_attention(queries, keys, values, mask[:, None], enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("name", SEGMENTS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_documents_give_what_the_mask_gives_forward_and_backward(name, causal, kv_heads):
    segments = SEGMENTS[name]
    qkv = heads(segments, kv_heads)
    upstream = torch.randn(*segments.shape, 4, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = dense(qkv, mask_of(segments, causal))
    seen = Seen.by_document(segments, causal, torch.float64, 8)
    assert (seen.documents is None) == (name == "short rows")
    ours = attend(*qkv.split((4, kv_heads, kv_heads), dim=2), seen)
    torch.testing.assert_close(ours, expected)
    gradients = [torch.autograd.grad((x * upstream).sum(), qkv)[0] for x in (ours, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("own", [True, False], ids=["queries see different keys", "and the same"])
def test_queries_that_share_keys_may_be_one_longer_row(own):
    generator = torch.Generator().manual_seed(0)
    queries, keys, values = (torch.randn(3, n, m, 8, generator=generator) for n, m in ((6, 5), (2, 7), (2, 7)))
    mask = torch.rand(3, 1, 5 if own else 1, 7, generator=generator) < 0.6
    mask[..., 0] = True
    expected = F.scaled_dot_product_attention(queries, *(x.repeat_interleave(3, dim=1) for x in (keys, values)), mask)
    torch.testing.assert_close(attend_by_group(queries, keys, values, mask), expected)


SHOWN = torch.rand(3, LEAST_LENGTH + 4, generator=torch.Generator().manual_seed(2)) < 0.3
RULES = {
    "documents": lambda segments: document_rule(segments, False),
    "causal documents": lambda segments: document_rule(segments, True),
    "partly causal": lambda segments: document_rule(torch.zeros_like(segments), True, SHOWN),
    "partly causal documents": lambda segments: document_rule(segments, True, SHOWN),
}


@pytest.mark.parametrize("name", RULES)
def test_a_rule_gives_flex_attention_what_its_mask_says(name):
    """A GPU gets compiled functions of the same rule; these are torch's own, which run anywhere, forward only."""
    segments = SEGMENTS["long rows"]
    rule = RULES[name](segments)
    partly = torch.ones_like(rule.mask[:, 0]).tril() | SHOWN[:, None]
    expected = {
        "documents": mask_of(segments, False),
        "causal documents": mask_of(segments, True),
        "partly causal": partly,
        "partly causal documents": mask_of(segments, False) & partly,
    }[name]
    assert torch.equal(rule.mask[:, 0], expected)
    assert torch.equal(rule.of_queries(torch.tensor([5, 100])), expected[:, [5, 100]])
    assert rule.pairs() == rule.estimated_pairs() == expected.sum()
    assert rule.estimated_pairs(40) == pytest.approx(int(expected.sum()), rel=0.15)
    assert torch.equal(rule.to(torch.device("cpu")).mask, rule.mask)
    length = segments.size(1)
    blocks = create_block_mask(rule.sees, len(segments), None, length, length, device="cpu")
    qkv = heads(segments).detach()
    queries, keys, values = (x.transpose(1, 2) for x in qkv.split((4, 2, 2), dim=2))
    mixed = flex_attention(queries, keys, values, block_mask=blocks, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(mixed, dense(qkv, expected))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["short rows", "long rows"])
def test_the_transformer_reads_documents_as_their_rule_says(causal, name):
    torch.manual_seed(0)
    shape = dict(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, vocab_size=50, initializer_range=0.2)
    model, segments = Transformer(TransformerConfig(**shape, causal=causal)).double(), SEGMENTS[name]
    tokens = torch.randint(0, 50, segments.shape)
    by_rule = model.hidden_states(tokens, attention_rule=document_rule(segments, causal))
    torch.testing.assert_close(model.hidden_states(tokens, segment_ids=segments), by_rule)


def test_16_bit_types_are_rounded_once():
    segments = SEGMENTS["long rows"]
    qkv = heads(segments).detach().float()
    with torch.autocast("cpu", torch.bfloat16):
        seen = Seen.by_document(segments, False, torch.bfloat16, 8)
        mixed = attend(*qkv.split((4, 2, 2), dim=2), seen)
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.float(), dense(qkv, mask_of(segments, False)), atol=0.02, rtol=0.02)


def test_the_varlen_kernel_takes_the_arguments_it_gets():
    """Its operator has a stand-in for devices without values, which checks shapes."""
    seen = Seen(None, True, Documents(torch.zeros(9, dtype=torch.int32, device="meta"), 24))
    queries, keys, values = torch.empty(3, 24, 8, 8, device="meta", dtype=torch.bfloat16).split((4, 2, 2), dim=2)
    assert attend(queries.float(), keys, values, seen).shape == queries.shape


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
def test_heads_and_types_that_the_varlen_kernel_does_not_take_are_known(dtype, head_dim, takes, monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    assert has_varlen(torch.device("cuda"), dtype, head_dim) is takes
    assert not has_varlen(torch.device("cpu"), dtype, head_dim)
