"""The transformer against transformers' own models, and its cache against no cache."""

from dataclasses import replace

import pytest
import torch

from dllm_var.errors import UserError
from dllm_var.model import KVCache, Transformer, TransformerConfig
from dllm_var.model.attention import Seen
from dllm_var.model.transformer import LayerContext

TINY = dict(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, vocab_size=50, initializer_range=0.2)


def tiny(**changes) -> Transformer:
    torch.manual_seed(0)
    return Transformer(TransformerConfig(**{**TINY, **changes})).eval()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_causal_logits_equal_transformers(family):
    import transformers

    ours = tiny(causal=True, qkv_bias=family == "qwen2", qk_norm=family == "qwen3", rope_theta=5000.0)
    for parameter in ours.parameters():  # norms and biases must matter too
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    common = dict(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=ours.config.intermediate_size,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        tie_word_embeddings=False,
    )
    name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    config = getattr(transformers, f"{name}Config")(**common)
    theirs = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    theirs.load_state_dict(ours.state_dict())  # the names are the same
    tokens = torch.randint(0, 50, (3, 17))
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
def test_a_segment_does_not_see_the_others(causal):
    model = tiny(causal=causal)
    first, second = torch.randint(0, 50, (1, 6)), torch.randint(0, 50, (1, 9))
    segments = torch.tensor([[0] * 6 + [1] * 9])
    positions = torch.tensor([[*range(6), *range(9)]])
    together = model(torch.cat((first, second), 1), positions, segments)
    torch.testing.assert_close(together, torch.cat((model(first), model(second)), 1), atol=1e-5, rtol=1e-4)


def test_full_attention_sees_both_ways_and_causal_only_left():
    tokens = torch.randint(0, 50, (1, 8))
    changed = tokens.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 50
    assert not torch.allclose(tiny()(tokens)[:, 0], tiny()(changed)[:, 0])
    causal = tiny(causal=True)
    torch.testing.assert_close(causal(tokens)[:, :-1], causal(changed)[:, :-1])


def test_causal_cache_equals_no_cache_with_rows_of_different_lengths():
    model = tiny(causal=True)
    rows = [torch.randint(0, 50, (n,)) for n in (3, 7, 5)]
    cache = KVCache(model.config, 3, 16, "cpu", torch.float32)
    prefix = torch.tensor([2, 5, 1])
    padded = torch.zeros(3, 5, dtype=torch.long)
    for i, row in enumerate(rows):
        padded[i, : prefix[i]] = row[: prefix[i]]
    cache.open(5, prefix)
    model.hidden_states(padded, cache=cache)
    cache.advance(prefix)
    rest = torch.tensor([len(row) for row in rows]) - prefix
    window = torch.zeros(3, int(rest.max()), dtype=torch.long)
    for i, row in enumerate(rows):
        window[i, : rest[i]] = row[prefix[i] :]
    cache.open(int(rest.max()), rest)
    hidden = model.hidden_states(window, cache=cache)
    for i, row in enumerate(rows):
        expected = model.hidden_states(row[None])[0, prefix[i] :]
        torch.testing.assert_close(hidden[i, : rest[i]], expected, atol=1e-5, rtol=1e-4)


def test_bidirectional_window_sees_the_frozen_tokens_and_itself():
    """What block diffusion relies on: frozen keys stay, a window can be written again and again at the same place."""
    model = tiny()
    prompt, block = torch.randint(0, 50, (1, 4)), torch.randint(0, 50, (1, 3))
    cache = KVCache(model.config, 1, 16, "cpu", torch.float32)
    cache.open(4)
    model.hidden_states(prompt, cache=cache)
    cache.advance(torch.tensor([4]))
    for _ in range(2):  # the second time must not see the first
        cache.open(3)
        again = model.hidden_states(block, cache=cache)
    # The obvious way: the prompt's keys do not depend on the block, the block sees everything.
    mask = torch.ones(7, 7, dtype=torch.bool)
    mask[:4, 4:] = False
    tokens = torch.cat((prompt, block), 1)
    cos, sin = model.rotary(torch.arange(7)[None], 7)
    context = LayerContext(cos, sin, Seen(mask))
    x = model.embedding(tokens)
    for i, layer in enumerate(model.layers):
        x = layer(x, context, i)
    torch.testing.assert_close(again, model.model.norm(x)[:, 4:], atol=1e-5, rtol=1e-4)


def test_tied_head_shares_the_embedding():
    model = tiny(tie_embeddings=True)
    assert model.lm_head.weight is model.embedding.weight
    assert model.num_parameters == tiny().num_parameters - 50 * 32


def test_meta_model_materialises_with_every_weight_drawn():
    with torch.device("meta"):
        model = Transformer(TransformerConfig(**TINY))
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    model.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert model(torch.zeros(1, 3, dtype=torch.long)).isfinite().all()


@pytest.mark.parametrize("asked", [128, 32])
def test_flops_per_token_match_the_counter(asked):
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = Transformer(TransformerConfig(**TINY))
        tokens = torch.zeros(2, 64, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            hidden = model.hidden_states(tokens, torch.zeros_like(tokens), asked=torch.zeros(asked, dtype=torch.long))
            model.lm_head(hidden).sum().backward()
    expected = model.flops_per_token(64, asked / 128)
    assert counter.get_total_flops() / tokens.numel() == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(
    ("length", "layers", "shift", "recompute"),  # documents with a mask, and one by one
    [
        (12, 1, False, "none"),
        (12, 2, True, "none"),
        (264, 2, False, "none"),
        (264, 1, True, "none"),
        (12, 2, True, "full"),
        (264, 2, True, "selective"),
    ],
)
def test_asked_positions_are_those_of_all_and_so_are_their_gradients(length, layers, shift, recompute):
    model = Transformer(TransformerConfig(**{**TINY, "num_layers": layers, "token_shift": shift})).double()
    model.recompute_activations(recompute)
    torch.manual_seed(0)
    tokens = torch.randint(0, TINY["vocab_size"], (3, length))
    segments = torch.arange(length).expand(3, -1) // 5
    mask = torch.rand(3, length) < 0.4
    weights = torch.randn(int(mask.sum()), TINY["hidden_size"], dtype=torch.float64)
    gradients = []
    for asked in (None, mask.flatten().nonzero()[:, 0]):
        model.zero_grad()
        hidden = model.hidden_states(tokens, segment_ids=segments, asked=asked)
        hidden = hidden[mask] if asked is None else hidden
        (hidden * weights).sum().backward()
        gradients.append([hidden.detach()] + [p.grad for p in model.parameters() if p.grad is not None])
    for all_of_them, only in zip(*gradients, strict=True):
        torch.testing.assert_close(only, all_of_them, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (dict(hidden_size=30, num_heads=4), "hidden_size 30"),
        (dict(num_heads=4, num_kv_heads=3), "num_kv_heads 3"),
        (dict(head_dim=7), "head_dim 7"),
        (dict(num_heads=0), "num_heads must be at least 1"),
        (dict(num_kv_heads=-1), "num_kv_heads must be at least 1"),
    ],
)
def test_impossible_shapes_are_named(settings, named):
    with pytest.raises(UserError, match=named):
        TransformerConfig(**{**TINY, **settings}).resolved()


def test_sizes_left_out_follow_from_the_others_not_from_the_defaults():
    """A config file overrides fields of a default instance; what is derived must not be derived from that one."""
    config = replace(TransformerConfig(), hidden_size=128, num_heads=4).resolved()
    assert (config.head_dim, config.num_kv_heads, config.intermediate_size) == (32, 4, 384)


def test_missing_vocabulary_is_named():
    with pytest.raises(UserError, match="vocab_size"):
        Transformer(TransformerConfig(hidden_size=32))
