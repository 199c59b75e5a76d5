"""Layers are compiled once for all layers, numbers of scored positions and documents, and without a graph break."""

import re

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._inductor.utils import run_and_get_code

from dllm_var.datamodules import PackedDataModule
from dllm_var.model import Transformer, TransformerConfig
from dllm_var.model.attention import Documents, Seen, compiled
from dllm_var.objectives import BlockDiffusion, KeyedNoise

SHAPE = dict(hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, vocab_size=50)


@pytest.fixture
def counted(monkeypatch):
    """Counts graphs instead of compiling kernels; a graph break is an error."""
    torch._dynamo.reset()
    compiled.cache_clear()
    counter = CompileCounter()
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: compile_(function, backend=counter, fullgraph=True))
    yield counter
    compiled.cache_clear()
    torch._dynamo.reset()


def steps(model, batches, device="cpu"):
    """Runs forwards and backwards, each with other documents and another number of scored positions."""
    for lengths, scored in batches:
        segments = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).view(2, -1)
        hidden = model.hidden_states(
            torch.zeros(segments.shape, dtype=torch.long, device=device),
            segment_ids=segments.to(device),
            documents=Documents.of(segments).to(torch.device(device)),
            asked=torch.arange(scored, device=device),
        )
        assert hidden.shape == (scored, 32)
        hidden.sum().backward()


BATCHES = [([300, 212, 100, 412], 40), ([512, 512], 77), ([100, 412, 300, 100, 112], 1000), ([280, 232] * 2, 2)]
SHORTER = [([256] * 4, 40), ([100] * 10 + [24], 77)]  # the longest is rounded up to 256, and to 128


def test_documents_are_in_the_compiled_layer_on_a_gpu(counted, monkeypatch):
    """Shown on a device without values, for which the varlen kernel's operator has a stand-in."""
    monkeypatch.setattr("dllm_var.model.attention.has_varlen", lambda *_: True)
    with torch.device("meta"):
        model = Transformer(TransformerConfig(**SHAPE)).to(torch.bfloat16)
    model.compile_layers()
    steps(model, BATCHES[:1], "meta")
    assert counted.frame_count == 2  # all layers but the last one, and the last one
    steps(model, BATCHES[1:], "meta")
    assert counted.frame_count == 2
    steps(model, SHORTER, "meta")
    assert counted.frame_count == 4  # the kernel takes the longest as a number, which then may be any


@pytest.mark.parametrize("attention", ["full", "document"])
def test_other_numbers_do_not_compile_again(attention, counted):
    model = Transformer(TransformerConfig(**SHAPE))
    model.compile_layers()
    for scored in (40, 77, 1000, 2, 3):
        segments = (torch.arange(2 * 64).view(2, -1) // scored) if attention == "document" else None
        tokens = torch.zeros(2, 64, dtype=torch.long)
        model.hidden_states(tokens, segment_ids=segments, asked=torch.arange(min(scored, 128))).sum().backward()
    assert counted.frame_count == 2


@pytest.mark.slow
def test_block_diffusion_is_one_compilation_whatever_the_blocks(counted, monkeypatch):
    """flex_attention inside the compiled layer, without gradients, which it does not have on a CPU."""
    data = PackedDataModule(batch_size=2, context_length=64, packing="best_fit")
    objective = BlockDiffusion(block_length=4).bind(data.tokenizer.special)
    rows, noise = data.rows("train"), KeyedNoise(0)
    model = Transformer(TransformerConfig(**{**SHAPE, "vocab_size": data.tokenizer.vocab_size}))
    batches = [objective.corrupt(rows.__getitems__(range(at, at + 2)), noise) for at in range(0, 8, 2)]
    assert len({noised.input_ids.size(1) for noised in batches}) > 2

    def read(noised):
        with torch.no_grad():
            return model.hidden_states(
                noised.input_ids,
                noised.position_ids,
                attention_rule=noised.attention_rule,
                asked=noised.scored,
                shift=False,
            )

    dense = [read(noised) for noised in batches]
    assert counted.frame_count == 0
    monkeypatch.setattr(Seen, "by_rule", classmethod(lambda cls, rule: cls(block_mask=rule.block_mask())))
    model.compile_layers()
    counts = []
    for noised, expected in zip(batches, dense, strict=True):
        torch.testing.assert_close(read(noised), expected)
        counts.append(counted.frame_count)
    assert counts[1] == counts[-1]


@pytest.mark.slow
def test_the_tiles_of_a_rule_are_found_without_a_matrix_of_all_pairs():
    """By the code that is compiled: the largest tensor that it makes has a number for each tile."""
    torch._dynamo.reset()
    data = PackedDataModule(batch_size=1, context_length=512, packing="best_fit")
    noised = (
        BlockDiffusion(block_length=8)
        .bind(data.tokenizer.special)
        .corrupt(data.rows("train").__getitems__([0]), KeyedNoise(0))
    )
    rule, length = noised.attention_rule, noised.input_ids.size(1)
    compiled.cache_clear()
    _, sources = run_and_get_code(rule.block_mask)
    tiles = -(-length // 128)
    made = [shape for source in sources for shape in re.findall(r"empty_strided_cpu\(\(([\d, ]*)\)", source)]
    sizes = [int(torch.tensor([int(size) for size in shape.split(",") if size.strip()]).prod()) for shape in made]
    assert sizes and max(sizes) <= tiles * (tiles + 1) < length**2 / 1000
