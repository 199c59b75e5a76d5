"""Context parallelism: processes that share rows train as one, with the patterns of attention that one has."""

from types import SimpleNamespace

import divided
import pytest
import torch
from test_tensor_parallel import assert_same_run, result

from dllm_var.errors import UserError
from dllm_var.model import TransformerConfig
from dllm_var.model.sharding import share_rows
from dllm_var.training.strategies import ContextParallel


@pytest.mark.slow
@pytest.mark.parametrize("name", divided.SHARED_ROWS)
def test_two_processes_that_share_rows_train_as_one(name, alone, two):
    """Odd lengths, one head of keys, token shift, causal rows, `[clean | copies]`, a loss of whole rows."""
    ours, expected = result(two / f"{name}2"), result(alone / name)
    assert_same_run(ours, expected, "adamw")
    assert ours["counts"] == expected["counts"]  # the speed report does not count rows twice


@pytest.mark.slow
def test_two_groups_of_two_have_different_rows(alone, four):
    assert_same_run(result(four / "rows4"), result(alone / "rows"), "adamw")


@pytest.mark.slow
@pytest.mark.parametrize("run", ["rows_resumed", "rows_resumed_fsdp2"])
def test_a_checkpoint_goes_on_with_and_without_shared_rows(run, alone, two):
    assert_same_run(result(two / run), result(alone / "rows"), "adamw", first=divided.SAVED_AT)


@pytest.mark.slow
def test_no_process_has_whole_rows_but_in_attention(alone, two):
    """Of all tensors of a step, those as long as a row hold token ids, or some of the heads."""
    config = divided.SHAPE
    length, width = 257, config["hidden_size"]
    assert (divided.GLOBAL_BATCH, length, width) in result(alone / "rows")["shapes"]
    assert (divided.GLOBAL_BATCH, length, width) not in result(two / "rows2")["shapes"]
    assert (divided.GLOBAL_BATCH, 129, width) in result(two / "rows2")["shapes"]


@pytest.mark.parametrize(("size", "processes"), [(2, 3), (1, 2)])
def test_groups_must_fill_a_node(size, processes):
    strategy = ContextParallel(size)
    strategy.parallel_devices = [torch.device("cpu")] * processes
    with pytest.raises(UserError, match=f"context_parallel_size {size} must .* divide the {processes} processes"):
        strategy.setup_environment()


def test_heads_that_do_not_divide_are_named_with_a_remedy():
    mesh = {"tensor_parallel": SimpleNamespace(size=lambda: 3)}
    with pytest.raises(UserError, match=r"context_parallel_size 3 .*num_heads 4: .*fsdp2\.yaml"):
        share_rows(TransformerConfig(num_heads=4), mesh)
