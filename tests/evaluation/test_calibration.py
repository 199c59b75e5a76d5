"""Quantised for the inputs that a checkpoint has: what they are, and what is lost on others of their kind."""

import json

import pytest
import torch
from byte_tokenizer import write_byte_tokenizer

from dllm_var.__main__ import main
from dllm_var.checkpoints.export import save_checkpoint_folder
from dllm_var.checkpoints.pretrained import load_checkpoint
from dllm_var.evaluation.calibration import inputs_of
from dllm_var.evaluation.likelihood import Likelihood
from dllm_var.model import Transformer, TransformerConfig
from dllm_var.model.gptq import gptq
from dllm_var.model.quantised import KINDS
from dllm_var.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_pretrained(write_byte_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    special = dict(mask_id=tokenizer.mask_id, terminator_ids=list(tokenizer.terminator_ids), pad_id=tokenizer.pad_id)
    sizes = dict(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=64)
    config = TransformerConfig(**sizes, initializer_range=0.3, vocab_size=tokenizer.vocab_size, **special)
    return save_checkpoint_folder(tmp_path_factory.mktemp("model"), Transformer(config).eval(), tokenizer)


@pytest.fixture
def records(tmp_path):
    lines = [{"prompt": f"{n} and {n} is ", "response": str(2 * n)} for n in range(1000, 1080)]
    (tmp_path / "records.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path / "records.jsonl"


def export(base, output, *options):
    return main(["export", "--checkpoint", str(base), "--format", "llama", "--output", str(output), *options])


@torch.no_grad()
def test_first_layer_is_rounded_for_rows_with_hidden_tokens(base, records, tmp_path):
    assert export(base, tmp_path / "out", "--quantize", "int4", "--calibrate", str(records)) == 0
    model, tokenizer, _ = load_checkpoint(base)
    model.train().eval()
    lines = [json.loads(line) for line in records.read_text().splitlines()[:64]]
    encoded = ((tokenizer.encode(line["prompt"]), tokenizer.encode(line["response"])) for line in lines)
    pairs = [(prompt, [*answer, tokenizer.terminator_id]) for prompt, answer in encoded]
    seen = []
    first = model.layers[0]
    first.register_forward_pre_hook(lambda _, inputs: seen.append(first.input_layernorm(inputs[0]).flatten(0, -2)))
    masks = []
    model.embedding.register_forward_pre_hook(lambda _, inputs: masks.append(inputs[0].eq(tokenizer.mask_id).sum()))
    sums = inputs_of(first, lambda: Likelihood(draws=4, block_length=64, canvas=64)(model, pairs, decode=False))
    assert sum(masks) > 64 * 4
    x = torch.cat(seen)
    torch.testing.assert_close(sums[first.self_attn.v_proj], x.t() @ x, rtol=1e-4, atol=1e-2)
    found = load_checkpoint(tmp_path / "out")[0].layers[0].self_attn.v_proj
    weight, scale = gptq(first.self_attn.v_proj.weight, sums[first.self_attn.v_proj], KINDS["int4"])
    assert torch.equal(found.weight, weight) and torch.equal(found.scale, scale)


@torch.no_grad()
def test_less_is_lost_than_by_plain_rounding(base, records, tmp_path):
    assert export(base, tmp_path / "out", "--quantize", "int4", "--calibrate", str(records)) == 0
    plain, tokenizer, _ = load_checkpoint(base)
    ids = torch.tensor([tokenizer.encode(f"{n} and {n} is ") + [tokenizer.mask_id] * 32 for n in range(2000, 2032)])
    rounded, calibrated = load_checkpoint(base, quantize="int4")[0], load_checkpoint(tmp_path / "out")[0]
    lost, lost_by_rounding = ((one(ids) - plain(ids)).square().mean() for one in (calibrated, rounded))
    assert lost < 0.7 * lost_by_rounding


def test_what_cannot_be_calibrated_is_named(base, records, tmp_path, capsys):
    assert export(base, tmp_path / "int8", "--quantize", "int8") == 0
    for given, options in ((base, []), (tmp_path / "int8", ["--quantize", "int8"])):
        assert export(given, tmp_path / "out", "--calibrate", str(records), *options) == 2
        assert "--calibrate needs --quantize, a checkpoint whose weights are not" in capsys.readouterr().err
