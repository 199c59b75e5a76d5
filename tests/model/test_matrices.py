"""Adapters on masks only, against a slow forward: masks have the merged weights, all other tokens those of the base."""

import copy

import pytest
import torch

from dllm_var.model import Transformer, TransformerConfig
from dllm_var.model.lora import LAYER_MATRICES, Lora, add_adapters, is_adapter
from dllm_var.model.rotary import rotate
from dllm_var.module import can_compile

MASK = 1
SHAPE = dict(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, qkv_bias=True, qk_norm=True, vocab_size=50)
TOKENS = torch.randint(4, 50, (2, 20), generator=torch.Generator().manual_seed(0))
TOKENS[:, [6, 7, 8, 17, 18, 19]] = MASK
SEGMENTS = (torch.arange(20) > 8).long().expand(2, -1)  # masks end each of two documents
POSITIONS = torch.cat((torch.arange(9), torch.arange(11))).expand(2, -1)
ASKED = torch.tensor([3, 6, 7, 16, 19, 20, 27, 38, 39])


def models(targets=LAYER_MATRICES):
    """The base model, and the same with adapters that do something."""
    torch.manual_seed(0)
    base = Transformer(TransformerConfig(**SHAPE, mask_id=MASK, causal=True, initializer_range=0.2))
    adapted = copy.deepcopy(base)
    add_adapters(adapted, Lora(r=3, alpha=6.0, targets=list(targets), on_masks_only=True))
    for name, parameter in adapted.named_parameters():
        if is_adapter(name):
            torch.nn.init.normal_(parameter, std=0.2)
    return base, adapted


def slow(adapted, tokens, segments, positions):
    """Hidden states [L, hidden] of one row, token by token in explicit products."""

    def multiply(matrix, token, x):
        base = getattr(matrix, "base_layer", matrix)
        weight = base.weight
        if token == MASK and matrix is not base:
            weight = weight + 2.0 * matrix.lora_B["default"].weight @ matrix.lora_A["default"].weight
        return weight @ x + (0.0 if base.bias is None else base.bias)

    def each(matrix, xs):
        return torch.stack([multiply(matrix, token, x) for token, x in zip(tokens.tolist(), xs, strict=True)])

    length = len(tokens)
    order = torch.arange(length)
    sees = (order <= order[:, None]) & (segments == segments[:, None])
    cos, sin = adapted.rotary(positions[None], length)
    x = adapted.embedding(tokens)
    for layer in adapted.layers:
        attention, mlp, normed = layer.self_attn, layer.mlp, layer.input_layernorm(x)
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = (each(matrix, normed).view(1, length, -1, attention.head_dim) for matrix in projections)
        q, k = (rotate(part, cos, sin, False)[0] for part in (attention.q_norm(q), attention.k_norm(k)))
        k, v = (part.repeat_interleave(2, dim=1) for part in (k, v[0]))
        scores = torch.einsum("qhd,khd->hqk", q, k) / attention.head_dim**0.5
        weights = scores.masked_fill(~sees, -torch.inf).softmax(dim=-1)
        x = x + each(attention.o_proj, torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
        normed = layer.post_attention_layernorm(x)
        gated = torch.nn.functional.silu(each(mlp.gate_proj, normed)) * each(mlp.up_proj, normed)
        x = x + each(mlp.down_proj, gated)
    return adapted.model.norm(x)


def slow_rows(adapted, segments, positions):
    return torch.stack([slow(adapted, *row) for row in zip(TOKENS, segments, positions, strict=True)])


@pytest.mark.parametrize("asked", [None, ASKED])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("targets", [LAYER_MATRICES, ("k_proj", "up_proj", "down_proj")])
def test_masks_have_the_merged_weights_and_other_tokens_exactly_the_base(documents, asked, targets):
    base, adapted = models(targets)
    segments, positions = torch.zeros_like(TOKENS), torch.arange(20).expand(2, -1)
    read = [TOKENS]
    if documents:
        read, segments, positions = [TOKENS, POSITIONS, SEGMENTS], SEGMENTS, POSITIONS
    found, plain = adapted.hidden_states(*read, asked=asked), base.hidden_states(*read, asked=asked)
    wanted, tokens = slow_rows(adapted, segments, positions), TOKENS
    if asked is not None:
        wanted, tokens = wanted.flatten(0, 1)[asked], TOKENS.flatten()[asked]
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)
    sees_masks = segments == 0 if documents else torch.arange(20).expand(2, -1) < 6  # of the first document, none does
    clean = (TOKENS != MASK) & (sees_masks | torch.tensor(documents))
    clean = clean if asked is None else clean.flatten()[asked]
    assert torch.equal(found[clean], plain[clean]) and clean.sum() >= 2
    masks = tokens == MASK
    assert (found[masks] - plain[masks]).abs().max() > 0.1


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("targets", [LAYER_MATRICES, ("q_proj", "v_proj", "gate_proj")])
@pytest.mark.parametrize("lengths", [[20, 20], [20, 4]])  # the second is packed
@torch.no_grad()
def test_decoding_with_a_cache(lengths, targets, fused):
    base, adapted = models(targets)
    wanted = slow_rows(adapted, torch.zeros_like(TOKENS), torch.arange(20).expand(2, -1))
    found = []
    for model in (base, adapted):
        if fused:
            model.fuse_projections()
        cache, windows = model.new_cache(2, 24), torch.tensor(lengths)
        cache.open(4)
        model.hidden_states(TOKENS[:, :4], cache=cache)
        cache.advance(torch.tensor([4, 4]))
        cache.open(16, windows=(windows - 4).clamp_min(1))
        assert (cache.packed is not None) == (lengths[1] == 4)
        found.append(model.hidden_states(TOKENS[:, 4:], cache=cache))
    plain, ours = found
    for row, length in enumerate(lengths):
        width = max(length - 4, 1)
        torch.testing.assert_close(ours[row, :width], wanted[row, 4 : 4 + width], atol=2e-5, rtol=1e-4)
    assert torch.equal(ours[:, :2], plain[:, :2])  # clean tokens before the first mask
    assert (ours[0, 2:] - plain[0, 2:]).abs().max() > 0.1


@torch.no_grad()
def test_fused_adapters_are_those_of_the_layers():
    """They follow the layers' weights; matrices that got adapters after they were fused are multiplied one by one."""
    base, adapted = models()
    kept = adapted(TOKENS)
    adapted.fuse_projections()
    torch.testing.assert_close(adapted(TOKENS), kept, atol=2e-5, rtol=1e-4)
    adapted.layers[0].self_attn.q_proj.lora_B["default"].weight.mul_(-3.0)
    fused = adapted(TOKENS)
    for layer in adapted.layers:
        layer.self_attn.fused = layer.mlp.fused = None
    apart = adapted(TOKENS)
    torch.testing.assert_close(fused, apart, atol=2e-5, rtol=1e-4)
    assert (fused - kept).abs().max() > 0.1
    base.fuse_projections()
    add_adapters(base, Lora(r=3, alpha=6.0, on_masks_only=True))
    base.load_state_dict(adapted.state_dict())
    torch.testing.assert_close(base(TOKENS), apart, atol=2e-5, rtol=1e-4)


def test_an_adapter_of_any_of_the_fused_matrices_counts():
    model = models()[0].eval()
    model.fuse_projections()
    add_adapters(model, Lora(r=3, targets=["v_proj", "up_proj"], on_masks_only=True))
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            parameter.data.fill_(0.3)
    with_gradients = model(TOKENS)  # not by the fused matrices
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), with_gradients, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_adapters_that_are_put_in_the_place_of_others_count():
    model, wanted = models()[1], models()[1]
    others = {name: -2.0 * value for name, value in wanted.state_dict().items() if is_adapter(name)}
    wanted.load_state_dict(others, strict=False)
    model.fuse_projections()
    model.load_state_dict(others, strict=False, assign=True)
    torch.testing.assert_close(model(TOKENS), wanted(TOKENS), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("adapted", [False, True])
def test_weights_laid_out_for_decoding_are_trained_as_others_are(adapted):
    """A fused optimizer takes each weight for one piece of memory."""
    states = []
    for laid_out in (False, True):
        model = models()[adapted]
        if laid_out:
            model.fuse_projections()
        optimizer = torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], lr=0.1, fused=True)
        loss(model, TOKENS, None).backward()
        optimizer.step()
        states.append(model.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, msg=name)


def loss(model, tokens, asked):
    hidden = model.hidden_states(tokens, asked=asked)
    return (hidden * torch.linspace(-1, 1, 32)).sin().sum()


@pytest.mark.parametrize("asked", [None, ASKED])
@pytest.mark.parametrize("policy", ["none", "full", "selective"])
def test_gradients_are_those_of_the_slow_forward(policy, asked):
    """Two forwards come before one backward, which must compute each again with its own masks."""
    _, adapted = models()
    other = TOKENS.roll(3, dims=1)
    rows = torch.arange(20)
    total = 0.0
    for tokens in (TOKENS, other):
        wanted = torch.stack([slow(adapted, row, torch.zeros(20), rows) for row in tokens])
        wanted = wanted if asked is None else wanted.flatten(0, 1)[asked]
        total = total + (wanted * torch.linspace(-1, 1, 32)).sin().sum()
    total.backward()
    reference = {name: p.grad for name, p in adapted.named_parameters()}
    adapted.zero_grad()
    adapted.recompute_activations(policy)
    (loss(adapted, TOKENS, asked) + loss(adapted, other, asked)).backward()
    for name, parameter in adapted.named_parameters():
        if is_adapter(name):
            assert reference[name].abs().max() > 1e-3
            torch.testing.assert_close(parameter.grad, reference[name], atol=1e-4, rtol=1e-3, msg=name)
        else:
            assert parameter.grad is None and not parameter.requires_grad, name


@pytest.mark.slow
@pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="needs a C++ compiler")
def test_compiled_gradients_are_the_same():
    _, adapted = models()
    adapted.recompute_activations("selective")
    grads = []
    for compiled in (False, True):
        adapted.zero_grad()
        if compiled:
            adapted.compile_layers()
        for asked in (None, ASKED):
            loss(adapted, TOKENS, asked).backward()
        grads.append({name: p.grad.clone() for name, p in adapted.named_parameters() if is_adapter(name)})
    for name, eager in grads[0].items():
        torch.testing.assert_close(grads[1][name], eager, atol=1e-4, rtol=1e-3, msg=name)
