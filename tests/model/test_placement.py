"""Which part of a weight a process holds, and what cannot be divided."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.tensor import Replicate, Shard

from dllm_var.errors import UserError
from dllm_var.model import Transformer, TransformerConfig
from dllm_var.model.build import build_transformer
from dllm_var.model.lora import Lora
from dllm_var.model.placement import copies, fill, gathered, part_held, sections, share
from dllm_var.model.tensor_parallel import divide

CONFIG = TransformerConfig(hidden_size=24, num_heads=4, num_kv_heads=2, head_dim=6, vocab_size=11).resolved()


def held(shape, placements, groups, ranks, sections):
    """The part of every process of a mesh [groups, ranks], row by row of it."""
    for group in range(groups):
        for rank in range(ranks):
            place = (group, rank)
            mesh = SimpleNamespace(
                ndim=2,
                size=(groups, ranks).__getitem__,
                get_local_rank=place.__getitem__,
                mesh_dim_names=("data_parallel", "tensor_parallel"),
            )
            weight = SimpleNamespace(shape=shape, dim=lambda: len(shape), device_mesh=mesh, placements=placements)
            yield place, part_held(weight, sections)


@given(st.integers(1, 40), st.integers(1, 8))
def test_shares_are_those_of_torchs_chunk(size, ranks):
    chunks = torch.arange(size).chunk(ranks)
    for rank in range(ranks):
        expected = chunks[rank].tolist() if rank < len(chunks) else []
        assert list(share(size, ranks, rank)) == expected


@given(st.integers(1, 4), st.sampled_from([1, 2, 4]), st.lists(st.integers(1, 5), max_size=3), st.integers(4, 30))
def test_every_row_is_held_once_and_matrices_that_are_stored_as_one_are_divided_each_by_itself(
    groups, ranks, parts, rows
):
    parts = [size * ranks for size in parts]
    rows = sum(parts) or rows
    owner = {}
    for (_, rank), part in held((rows, 3), (Shard(0), Shard(0)), groups, ranks, parts):
        assert list(part.columns) == [0, 1, 2]
        for row in (row for run in part.rows for row in run):
            assert owner.setdefault(row, rank) == rank and len(owner) > 0
            owner[row] = rank
    assert sorted(owner) == list(range(rows))
    start = 0
    for size in parts:  # equal shares of each, in order
        assert [owner[row] for row in range(start, start + size)] == sorted(list(range(ranks)) * (size // ranks))
        start += size


def test_rows_of_fsdp2_and_columns_of_tensor_parallelism_make_tiles():
    parts = dict(held((6, 4), (Shard(0), Shard(1)), 2, 2, []))
    assert [(part.rows, part.columns) for part in parts.values()] == [
        ([range(0, 3)], range(0, 2)),
        ([range(0, 3)], range(2, 4)),
        ([range(3, 6)], range(0, 2)),
        ([range(3, 6)], range(2, 4)),
    ]
    for part in dict(held((6,), (Shard(0), Replicate()), 2, 2, [])).values():  # a norm's weight
        assert len(part.rows) == 1 and len(part.rows[0]) == 3


def test_sections_are_what_the_transformer_stores_as_one():
    transformer = Transformer(CONFIG)
    for name, weight in transformer.named_parameters():
        parts = sections(name, transformer.config)
        assert bool(parts) == ("qkv" in name or "gate_up" in name)
        assert not parts or sum(parts) == weight.shape[0]
    assert sections("blocks.0.attention.qkv.bias", transformer.config) == [24, 12, 12]


def test_a_weight_that_is_not_sharded_is_filled_and_gathered_as_it_is():
    weight = nn.Parameter(torch.zeros(3, 2))
    fill(weight, torch.ones(3, 2, dtype=torch.float64), [])
    assert torch.equal(weight, torch.ones(3, 2)) and gathered(weight, []) is weight and copies(weight) == 1


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
    with torch.device("meta"):
        transformer = Transformer(TransformerConfig(**{**CONFIG.to_dict(), **changes}))
    with pytest.raises(UserError, match=f"tensor_parallel_size {ranks} .*{named}.*fsdp2.yaml"):
        divide(transformer, SimpleNamespace(size=lambda: ranks))


def test_adapters_and_tensor_parallelism_are_refused_together():
    mesh = {"tensor_parallel": SimpleNamespace(size=lambda: 2)}
    with pytest.raises(UserError, match=r"model\.lora does not go with tensor parallelism: .*fsdp2.yaml"):
        build_transformer(CONFIG, Lora(), mesh=mesh)
