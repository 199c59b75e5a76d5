"""The memory that `plan` foresees, held to what autograd keeps and to the ZeRO paper."""

from pathlib import Path

import pytest
import torch
import yaml

from dllm_var.cli.plan_memory import activation_bytes, device_memory, planned_strategy
from dllm_var.model import Transformer, TransformerConfig
from dllm_var.model.attention import Seen
from dllm_var.model.lora import Lora, add_adapters
from dllm_var.model.transformer import LayerContext

CONFIGS = Path(__file__).parent.parent.parent / "configs"
SMALL = dict(hidden_size=64, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=24, vocab_size=50)
LLADA = dict(hidden_size=4096, num_layers=32, num_heads=32, intermediate_size=12288, vocab_size=126464)


def on_meta(config):
    with torch.device("meta"):
        return Transformer(config)


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
    config = TransformerConfig(**SMALL, qk_norm=qk_norm).resolved()
    kept = kept_bytes(config, precision, 3, 32)
    assert activation_bytes(config, 3 * 32, precision) == pytest.approx(kept, rel=0.03)


@pytest.mark.parametrize("precision", ["32", "16-true", "16-mixed"])
def test_experts_keep_a_copy_of_each_token_they_get(precision):
    experts = dict(num_experts=8, experts_per_token=3, expert_intermediate_size=40, shared_experts=2)
    config = TransformerConfig(**SMALL, **experts, first_dense_layers=1, router="sigmoid", router_bias=True).resolved()
    kept = kept_bytes(config, precision, 3, 32)
    assert activation_bytes(config, 3 * 32, precision) == pytest.approx(kept, rel=0.05)


def test_recomputation_keeps_the_inputs_of_the_layers_and_one_layer():
    config = TransformerConfig(**SMALL).resolved()
    one = activation_bytes(TransformerConfig(**{**SMALL, "num_layers": 1}).resolved(), 2 * 16, "16-mixed")
    assert activation_bytes(config, 2 * 16, "16-mixed", recompute=True) == one + 3 * 2 * 16 * 64 * 4


def test_state_is_that_of_the_zero_paper():
    """ZeRO (arXiv 1910.02054, figure 1): with 16-bit weights and Adam 16 bytes a weight, 2 + 14 / N with stage 2."""
    model = on_meta(TransformerConfig(**LLADA))

    def state(strategy, devices, precision):
        memory = device_memory(model, strategy, devices, 8, precision)
        assert memory["total"] == sum(memory[part] for part in memory if part != "total")
        return memory["weights"] + memory["gradients"] + memory["optimizer"]

    weights = model.num_parameters
    assert state("zero2", 64, "16-mixed") == pytest.approx(weights * (2 + 14 / 64))
    assert state("fsdp2", 8, "32") == pytest.approx(weights * 16 / 8)
    assert state("ddp", 8, "32") == weights * 20  # and ddp's buckets


def test_adapters_have_no_state_but_their_own():
    pytest.importorskip("peft")
    model = on_meta(TransformerConfig(**SMALL))
    weights = model.num_parameters
    add_adapters(model, Lora(r=4, targets=["q_proj", "lm_head"]))
    trained = 4 * (3 * (64 + 4 * 24) + 64 + 50)
    memory = device_memory(model, "fsdp2", 1, 8, "16-true")
    parts = [memory[part] for part in ("weights", "gradients", "optimizer")]
    assert parts == [2 * (weights + trained), 2 * trained, 4 * trained]
    assert memory["gathered"] == 0  # one device has nothing to gather


def test_the_strategies_of_the_overlays_have_their_lines():
    expected = dict(
        ddp="ddp", fsdp="fsdp2", fsdp2="fsdp2", deepspeed_zero2="zero2", tensor_parallel=None, context_parallel=None
    )
    for name, line in expected.items():
        strategy = yaml.safe_load((CONFIGS / "strategy" / f"{name}.yaml").read_text())["trainer"]["strategy"]
        assert planned_strategy(strategy, 8) == line
        assert planned_strategy(strategy, 1) == ("one device" if line in ("ddp", "fsdp2") else None)
    assert (planned_strategy("auto", 8), planned_strategy(None, 1)) == ("ddp", "one device")
