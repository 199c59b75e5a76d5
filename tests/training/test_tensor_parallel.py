"""Tensor parallelism: the same losses, weights, answers and checkpoints as one process, and nothing whole on any."""

from types import SimpleNamespace

import divided
import pytest
import torch
from safetensors.torch import load_file

from dllm_var.checkpoints.archive import read_weights
from dllm_var.errors import UserError
from dllm_var.model import Transformer, TransformerConfig
from dllm_var.model.build import build_transformer
from dllm_var.model.lora import Lora
from dllm_var.model.sharding import tensor_parallel
from dllm_var.training.strategies import TensorParallel

CLOSE = {"adamw": dict(atol=1e-4, rtol=1e-3)}  # AdamW moves weights whose gradient is next to nothing by its sign


def result(folder):
    return torch.load(folder / "result.pt", weights_only=True)


def assert_same_run(ours, expected, name, first=0):
    for figure in ("losses", "norms", "accuracies"):
        assert ours[figure] == pytest.approx(expected[figure][first:], rel=1e-5, abs=1e-7), figure
    for rows, theirs in zip(ours["rows"], expected["rows"][first:], strict=True):  # each row once, not once a process
        assert torch.tensor(rows) == pytest.approx(torch.tensor(theirs), rel=1e-4)
    for weights, theirs in zip(ours["weights"], expected["weights"][first:], strict=True):
        for weight in theirs:
            close = CLOSE.get(name, dict(atol=1e-5, rtol=1e-4))
            torch.testing.assert_close(weights[weight], theirs[weight], **close, msg=lambda m, w=weight: f"{w}: {m}")
    assert ours["validated"] == pytest.approx(expected["validated"], rel=1e-4)
    assert ours["answers"] == expected["answers"]


@pytest.mark.slow
@pytest.mark.parametrize("name", divided.RUNS)
def test_two_processes_that_share_each_layer_train_as_one(name, alone, two):
    """Grouped heads, norms of heads, tied and uneven vocabularies, recomputation, Muon, token shift, clipping."""
    expected, ours = result(alone / name), result(two / f"{name}2")
    assert_same_run(ours, expected, name)
    one, other = (load_file(run / "model" / "model.safetensors") for run in (alone / name, two / f"{name}2"))
    assert one.keys() == other.keys()
    for weight, value in one.items():
        torch.testing.assert_close(other[weight], value, **CLOSE.get(name, dict(atol=1e-5, rtol=1e-4)))


@pytest.mark.slow
def test_four_processes_as_two_groups_of_two_train_as_one(alone, four):
    """With FSDP2 over the groups, and accumulated batches."""
    for name in ("adamw", "muon"):
        assert_same_run(result(four / f"{name}4"), result(alone / name), name)


@pytest.mark.slow
@pytest.mark.parametrize("run", ["adamw_resumed", "adamw_resumed_fsdp2"])
def test_a_checkpoint_goes_on_under_tensor_parallelism_and_under_fsdp2(run, alone, two):
    assert_same_run(result(two / run), result(alone / "adamw"), "adamw", first=divided.SAVED_AT)


@pytest.mark.slow
def test_a_checkpoint_holds_the_weights_of_one_process(two):
    saved = read_weights(two / "adamw2" / f"step={divided.SAVED_AT}.ckpt")
    expected = result(two / "adamw2")["weights"][divided.SAVED_AT - 1]
    assert {name.removeprefix("transformer.") for name in saved} == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(saved[f"transformer.{name}"], weight), name


@pytest.mark.slow
def test_nothing_of_the_whole_vocabularys_size_is_on_any_process_in_a_step(alone, two):
    vocabulary, features = divided.RUNS["adamw"]["shape"]["vocab_size"], divided.SHAPE["intermediate_size"]
    whole, shared = result(alone / "adamw"), result(two / "adamw2")
    assert {vocabulary, features} <= set(whole["sizes"])
    assert not {vocabulary, features} & set(shared["sizes"])
    assert {-(-vocabulary // 2), features // 2} <= set(shared["sizes"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_sends_as_many_bytes_as_the_formula_of_the_documentation_says(name, two):
    """The formula of docs/scaling.md, for a group of two, 32-bit hidden states and whole layers recomputed."""
    ours = result(two / f"{name}2")
    config = TransformerConfig(**divided.SHAPE)
    everywhere, scored = 4 * config.num_layers - 2, 4
    if "activation_checkpointing" in divided.RUNS[name]:
        everywhere, scored = 5 * config.num_layers - 3, 5
    hidden_states = (ours["tokens"] * everywhere + ours["scored"] * scored) * config.hidden_size
    expected = 2 * (hidden_states * 4 + 4 * ours["scored"] * 4) / 2
    norms = 2 * config.num_layers * config.hidden_size  # gradients of norms, which the formula leaves out
    norms += 2 * config.num_layers * config.head_dim if name == "adamw" else 0
    sent = 4 * (sum(ours["reduced"]) - norms)  # a ring of two sends 2 / 2 of it
    assert sent == expected


@pytest.mark.parametrize(("size", "processes"), [(2, 3), (4, 2), (1, 2)])
def test_groups_must_fill_a_node(size, processes):
    strategy = TensorParallel(size)
    strategy.parallel_devices = [torch.device("cpu")] * processes
    with pytest.raises(UserError, match=f"tensor_parallel_size {size} must .* divide the {processes} processes"):
        strategy.setup_environment()


@pytest.mark.parametrize(
    ("changes", "ranks", "named"),
    [
        ({}, 4, "num_kv_heads 2"),
        ({"num_heads": 6, "num_kv_heads": 6}, 4, "num_kv_heads 6"),
        ({"intermediate_size": 33}, 2, "intermediate_size 33"),
        ({"num_heads": 8, "num_kv_heads": 8, "intermediate_size": 64}, 8, "11 tokens"),
    ],
)
def test_what_does_not_divide_is_named_with_a_remedy(changes, ranks, named):
    shape = dict(hidden_size=24, num_heads=4, num_kv_heads=2, head_dim=6, vocab_size=11)
    with torch.device("meta"):
        transformer = Transformer(TransformerConfig(**{**shape, **changes}))
    with pytest.raises(UserError, match=f"tensor_parallel_size {ranks} .*{named}.*fsdp2.yaml"):
        tensor_parallel(transformer, SimpleNamespace(size=lambda: ranks))


def test_adapters_and_tensor_parallelism_are_refused_together():
    mesh = {"tensor_parallel": SimpleNamespace(size=lambda: 2)}
    with pytest.raises(UserError, match=r"model\.lora does not go with tensor parallelism: .*fsdp2.yaml"):
        build_transformer(TransformerConfig(vocab_size=11), Lora(), mesh=mesh)
