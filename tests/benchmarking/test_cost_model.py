"""The cost model, held to the real transformer: its weights, torch's FLOP counter, what autograd keeps."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dllm_var.benchmarking.cost_model import (
    Shape,
    activation_bytes,
    adapter_parameters,
    count_parameters,
    device_memory,
    forward_flops,
    training_flops,
)
from dllm_var.model import Transformer, TransformerConfig
from dllm_var.model.attention import Seen
from dllm_var.model.transformer import LayerContext

SMALL = dict(hidden_size=64, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=24, vocab_size=50)
SHAPES = {
    "small": dict(hidden_size=64, num_layers=3, num_heads=4, vocab_size=50),
    "grouped": SMALL,
    "LLaDA-8B": dict(hidden_size=4096, num_layers=32, num_heads=32, intermediate_size=12288, vocab_size=126464),
    "Dream-7B": dict(
        hidden_size=3584, num_layers=28, num_heads=28, num_kv_heads=4, intermediate_size=18944, vocab_size=152064,
        qkv_bias=True,
    ),
    "Qwen3-1.7B": dict(
        hidden_size=2048, num_layers=28, num_heads=16, num_kv_heads=8, head_dim=128, intermediate_size=6144,
        vocab_size=151936, qk_norm=True, tie_embeddings=True,
    ),
}  # fmt: skip


def on_meta(config):
    with torch.device("meta"):
        return Transformer(config)


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_those_of_the_transformer(name):
    config = TransformerConfig(**SHAPES[name])
    counted, model = count_parameters(config), on_meta(config)
    assert counted.total == model.num_parameters
    assert counted.block == sum(p.numel() for p in model.layers[0].parameters())
    assert counted.embedding == model.embedding.weight.numel()
    assert Shape(config).block_matrices == sum(p.numel() for p in model.layers[0].parameters() if p.dim() == 2)


@pytest.mark.parametrize("rank_targets", [(4, ["q_proj", "v_proj", "o_proj", "gate_proj"]), (2, ["k_proj", "lm_head"])])
def test_adapters_are_those_of_peft(rank_targets):
    pytest.importorskip("peft")
    from dllm_var.model.lora import Lora, add_adapters

    rank, targets = rank_targets
    config = TransformerConfig(**SMALL)
    model = on_meta(config)
    add_adapters(model, Lora(r=rank, targets=targets))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert adapter_parameters(config, rank, targets) == trained


@pytest.mark.parametrize("name", ["small", "grouped"])
def test_flops_are_those_torch_counts(name):
    config = TransformerConfig(**SHAPES[name])
    model = on_meta(config)
    tokens = torch.zeros(2, 40, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        hidden = model.hidden_states(tokens, asked=torch.zeros(14, dtype=torch.long, device="meta"))
        loss = model.lm_head(hidden).sum()
        forward = counter.get_total_flops()
        loss.backward()
    assert forward == 2 * forward_flops(config, 40, 7)
    whole = 2 * training_flops(config, 40, 7)
    assert counter.get_total_flops() == pytest.approx(whole, rel=0.02)  # the first layer's input needs no gradient


def test_frozen_weights_save_a_third_and_causal_attention_half_its_pairs():
    config = TransformerConfig(**SMALL)
    assert training_flops(config, 40, 7, trained_share=0) == 2 * forward_flops(config, 40, 7)
    causal = TransformerConfig(**SMALL, causal=True)
    pairs = forward_flops(config, 40, 7) - forward_flops(causal, 40, 7)
    assert pairs == 3 * 4 * 40 * 40 * 96 / 2


def kept_bytes(config, precision, rows, length):
    """Bytes that autograd keeps of the blocks: distinct storages that grow with the tokens, no weights or tables."""
    sizes = {}
    for tokens in (length, 2 * length):
        model = Transformer(config).to(torch.bfloat16 if precision == "16-true" else torch.float32)
        weights = {p.untyped_storage()._cdata for p in model.parameters()}
        cos, sin = model.rotary(torch.zeros(1, tokens, dtype=torch.long), tokens)
        tables = cos[:, :, 0].numel() * cos.element_size()
        seen = {}

        def pack(tensor, weights=weights, seen=seen):
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                seen[storage._cdata] = (storage.nbytes(), tensor)  # holding it keeps its address its own
            return tensor

        x = torch.randn(rows, tokens, config.hidden_size, dtype=model.model.norm.weight.dtype, requires_grad=True)
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=precision == "16-mixed"),
        ):
            context = LayerContext(cos, sin, Seen())
            for block in model.layers:
                x = block(x, context, 0)
        # The rotary table is one row's, in 32 bits and, for each layer, in 16: not what rows cost.
        shared = [n for n, tensor in seen.values() if tensor.shape in (cos.shape, sin.shape)]
        sizes[tokens] = sum(n for n, _ in seen.values()) - sum(shared)
        assert shared and tables
    return sizes[2 * length] - sizes[length]  # what does not grow with the tokens, such as copies of weights, is gone


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("precision", ["32", "16-true", "16-mixed"])
def test_activations_are_what_autograd_keeps(precision, qk_norm):
    config = TransformerConfig(**SMALL, qk_norm=qk_norm)
    assert activation_bytes(config, 3, 32, precision) == pytest.approx(kept_bytes(config, precision, 3, 32), rel=0.03)


def test_recomputation_keeps_the_inputs_of_the_blocks_and_one_block():
    config = TransformerConfig(**SMALL)
    one = activation_bytes(TransformerConfig(**{**SMALL, "num_layers": 1}), 2, 16, "16-mixed")
    assert activation_bytes(config, 2, 16, "16-mixed", recompute=True) == one + 3 * 2 * 16 * 64 * 4


def test_state_is_that_of_the_zero_paper():
    """ZeRO (arXiv 1910.02054, figure 1): with 16-bit weights and Adam 16 bytes a weight, 2 + 14 / N with stage 2."""
    config = TransformerConfig(**SHAPES["LLaDA-8B"])
    weights = count_parameters(config).total
    memory = device_memory(config, "zero2", 64, 1, 8, "16-mixed")
    assert memory.weights + memory.gradients + memory.optimizer == pytest.approx(weights * (2 + 14 / 64))
    memory = device_memory(config, "fsdp2", 8, 1, 8, "32")
    assert memory.weights + memory.gradients + memory.optimizer == pytest.approx(weights * 16 / 8)
    memory = device_memory(config, "ddp", 8, 1, 8, "32")
    assert memory.weights + memory.gradients + memory.optimizer == weights * 20  # and ddp's buckets
    assert memory.total == sum(vars(memory).values())


def test_adapters_have_no_state_but_their_own():
    config = TransformerConfig(**SHAPES["LLaDA-8B"])
    weights = count_parameters(config).total
    memory = device_memory(config, "fsdp2", 1, 1, 8, "16-true", held=weights + 1000, trained=1000)
    assert (memory.weights, memory.gradients, memory.optimizer) == (2 * (weights + 1000), 2000, 4000)
    assert memory.gathered == 0  # one device has nothing to gather
