"""Context parallelism: processes that share rows train as one, with the patterns of attention that one has."""

from types import SimpleNamespace

import divided
import pytest
import torch
from test_tensor_parallel import assert_same_run, result

from dllm_var.errors import UserError
from dllm_var.model import TransformerConfig
from dllm_var.model.context_parallel import RowPart
from dllm_var.model.sharding import share_rows
from dllm_var.model.transformer import left_neighbours
from dllm_var.objectives import NoisedBatch
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


@pytest.mark.slow
def test_a_step_exchanges_as_many_numbers_as_the_formula_of_the_documentation_says(two):
    """The formula of docs/scaling.md, for the first process of two, whose part of 257 positions has one more."""
    config = TransformerConfig(**divided.SHAPE)
    heads = (config.num_heads + config.num_kv_heads) * config.head_dim
    positions = divided.GLOBAL_BATCH * (129 + 257 / 2) / 2  # on average of those it sends and those it gets
    assert sum(result(two / "rows2")["exchanged"]) == 4 * config.num_layers * positions * heads


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_token_is_scored_by_the_process_where_it_is_predicted(ranks):
    tokens = torch.arange(2 * 11).view(2, 11)
    segments = torch.tensor([[0] * 5 + [1] * 6, [0] * 6 + [1] * 5])
    noised = NoisedBatch(tokens, tokens, tokens % 3 > 0, torch.ones(2, 11), None, torch.tensor(14))
    predicted_at = left_neighbours(tokens, segments)
    parts = [RowPart(None, rank, ranks, 11) for rank in range(ranks)]
    scored = [noised.within(part, predicted_at) for part in parts]
    assert sum(own.loss_mask.int() for own in scored).equal(noised.loss_mask.int())
    assert sum(own.normaliser for own in scored) == noised.normaliser
    for part, own in zip(parts, scored, strict=True):
        hidden = tokens[:, part.columns].flatten()  # a hidden state for each position of the part
        place = predicted_at.flatten()[own.scored]
        assert hidden[part.place(place)].equal(place)


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
