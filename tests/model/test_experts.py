"""A layer of experts: equal to a loop over tokens, also its gradients, and only those that are chosen are computed."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from published_experts import LLADA2_MINI
from torch._dynamo.testing import CompileCounter

from dllm_var.checkpoints.config_json import read_config
from dllm_var.errors import UserError
from dllm_var.model import Transformer, TransformerConfig
from dllm_var.model.float8 import Float8, use_float8
from dllm_var.model.lora import Lora, add_adapters, is_adapter
from dllm_var.model.sharding import shard, tensor_parallel
from dllm_var.module import can_compile
from dllm_var.training.optim import AdamW, Muon, orthogonalise, parameter_groups

SHAPE = dict(hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, vocab_size=50, initializer_range=0.2)
EXPERTS = dict(num_experts=8, experts_per_token=2, expert_intermediate_size=16, first_dense_layers=1)
SIGMOID = dict(router="sigmoid", router_bias=True, router_normalise=True, router_scale=2.5, expert_groups=4)
SIGMOID |= dict(groups_per_token=2, shared_experts=1)
IDS = torch.randint(0, 50, (3, 20), generator=torch.Generator().manual_seed(0))


def built(**changes):
    torch.manual_seed(0)
    return Transformer(TransformerConfig(**{**SHAPE, **EXPERTS, **changes}))


def one_by_one(layer, x):
    """What a layer of experts makes of tokens [N, hidden], one token and expert at a time."""
    numbers, weights = layer.gate(x)
    rows = []
    for token, chosen, shares in zip(x, numbers.tolist(), weights, strict=True):
        row = torch.zeros_like(token) if layer.shared_experts is None else layer.shared_experts(token)
        for number, share in zip(chosen, shares, strict=True):
            gate, up = (getattr(layer.experts, f"{name}_proj")[number] @ token for name in ("gate", "up"))
            row = row + share * (layer.experts.down_proj[number] @ (F.silu(gate) * up))
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("changes", [{}, SIGMOID, {"experts_per_token": 1}, {"experts_per_token": 8}])
@pytest.mark.parametrize("tokens", [1, 30])
def test_a_layer_and_its_gradients_are_those_of_a_loop(changes, tokens):
    layer = built(**changes).layers[1].mlp
    inputs = [torch.randn(tokens, 32, generator=torch.Generator().manual_seed(1), requires_grad=True) for _ in "ab"]
    parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    results = [function(x) for function, x in zip((layer, lambda x: one_by_one(layer, x)), inputs, strict=True)]
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)
    gradients = [
        torch.autograd.grad(result.sin().sum(), [x, *parameters]) for result, x in zip(results, inputs, strict=True)
    ]
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("changes", [{}, SIGMOID])
@torch.no_grad()
def test_a_row_does_not_depend_on_the_others(changes):
    model = built(**changes)
    whole = model(IDS)
    for row, ids in enumerate(IDS):
        torch.testing.assert_close(model(ids[None])[0], whole[row], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_an_expert_that_nobody_chose_is_not_computed():
    layer = built().layers[1].mlp
    x = torch.randn(3, 32)
    idle = next(number for number in range(8) if number not in layer.gate(x)[0])
    expected = layer(x)
    layer.experts.gate_proj[idle] = layer.experts.down_proj[idle] = torch.nan
    assert torch.equal(layer(x), expected)


def test_training_moves_experts_and_router_but_not_the_bias_of_the_choice():
    model = built(**SIGMOID)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    assert before["model.layers.1.mlp.gate.expert_bias"].eq(0).all()
    for optimizer in (AdamW(parameter_groups(model), lr=0.01), Muon(parameter_groups(model), lr=0.01)):
        model(IDS).square().mean().backward()
        optimizer.step()
    still = {name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])}
    assert still == {f"model.layers.{layer}.mlp.gate.expert_bias" for layer in (1, 2)}


def test_muon_takes_each_expert_as_a_matrix():
    stacks = torch.randn(2, 4, 24, 16)
    apart = torch.stack([orthogonalise(stack) for stack in stacks])
    torch.testing.assert_close(orthogonalise(stacks), apart)


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_recomputation_gives_the_same_gradients(policy):
    gradients = []
    for chosen in ("none", policy):
        model = built(**SIGMOID)
        model.recompute_activations(chosen)
        model(IDS).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    assert all(torch.equal(ours, kept) for ours, kept in zip(*gradients, strict=True))


def test_a_compiled_layer_is_one_graph_in_16_bits():
    torch._dynamo.reset()
    counter = CompileCounter()
    layer = built(**SIGMOID).layers[1].mlp.to(torch.bfloat16)
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    compiled(torch.randn(2, 20, 32, dtype=torch.bfloat16)).sum().backward()
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="needs a C++ compiler")
def test_compiled_gradients_are_the_same():
    layer, gradients = built(**SIGMOID).layers[1].mlp, []
    parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    x = torch.randn(30, 32, generator=torch.Generator().manual_seed(1))
    for function in (layer, torch.compile(layer)):
        gradients.append(torch.autograd.grad(function(x).sin().sum(), parameters))
    for eager, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, eager, atol=1e-5, rtol=1e-4)


def test_adapters_are_on_what_every_token_passes():
    model = built(**SIGMOID)
    add_adapters(model, Lora(r=2))
    adapted = {name.partition(".lora_")[0] for name, _ in model.named_parameters() if is_adapter(name)}
    attention = {f"{layer}.self_attn.{part}_proj" for layer in range(3) for part in "qkvo"}
    dense = ("0.mlp", "1.mlp.shared_experts", "2.mlp.shared_experts")
    passed = attention | {f"{of}.{name}_proj" for of in dense for name in ("gate", "up", "down")}
    assert adapted == {f"model.layers.{name}" for name in passed}
    model(IDS).sum().backward()
    assert all((parameter.grad is not None) == is_adapter(name) for name, parameter in model.named_parameters())


def test_what_does_not_work_with_experts_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"model.lora.targets: no matrix .* gate_proj"):
        add_adapters(built(first_dense_layers=0), Lora(targets=["gate_proj"]))
    with pytest.raises(UserError, match=r"model.float8 does not work with a mixture of 8 experts"):
        use_float8(built(), Float8(emulate=True))
    with pytest.raises(UserError, match="tensor_parallel_size above 1 does not work with a mixture of 8 experts"):
        tensor_parallel(built(), SimpleNamespace(size=lambda: 2))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(num_experts=None), "experts_per_token needs transformer.num_experts"),
        (dict(experts_per_token=None), "num_experts needs transformer.experts_per_token"),
        (dict(expert_intermediate_size=None), "num_experts needs transformer.expert_intermediate_size"),
        (dict(num_experts=0), "num_experts must be at least 1"),
        (dict(experts_per_token=9), "experts_per_token 9 is more than the 8 experts"),
        (dict(expert_groups=3), "num_experts 8 must be a multiple of expert_groups 3"),
        (dict(expert_groups=8), "with two experts or more in a group"),
        (dict(shared_experts=-1), "shared_experts must be at least 0"),
        (dict(hidden_size=36, head_dim=8), "hidden_size 36 must be a multiple of 8"),
        (dict(router_scale=0.0), "router_scale must be a number above 0"),
    ],
)
def test_settings_that_contradict_each_other_are_named(changes, named):
    with pytest.raises(UserError, match=named):
        TransformerConfig(**{**SHAPE, **EXPERTS, **changes}).resolved()


def test_a_token_passes_14_of_the_163_hundred_million_weights_of_llada2_mini(tmp_path):
    with torch.device("meta"):
        model = Transformer(read_config(LLADA2_MINI, tmp_path / "config.json"))
    assert (model.num_parameters, model.active_parameters) == (16_255_643_392, 1_432_973_056)
    config = model.config
    attention = config.num_layers * 12 * 1000 * config.num_heads * config.head_dim
    vectors = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    embedding = model.embedding.weight.numel()
    assert model.flops_per_token(1000) == 6 * (model.active_parameters - vectors - embedding) + attention


def _sharded(rank, folder, expected):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = built(**SIGMOID)
    shard(model, dist.init_device_mesh("cpu", (2,)))
    model(IDS).square().mean().backward()
    found = [p.grad.full_tensor() for p in model.parameters() if p.requires_grad]
    for ours, whole in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, whole, atol=1e-6, rtol=1e-5)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_with_sharded_experts_compute_the_same_gradients(tmp_path):
    model = built(**SIGMOID)
    model(IDS).square().mean().backward()
    expected = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    mp.spawn(_sharded, (str(tmp_path), expected), nprocs=2)
