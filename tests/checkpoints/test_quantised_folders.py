"""Quantised model folders: equal to rounding while loading, opened by transformers, and what is refused."""

import json
from importlib.util import find_spec

import pytest
import torch
from byte_tokenizer import write_byte_tokenizer
from safetensors.torch import load_file, save_file

from dllm_var.__main__ import main
from dllm_var.checkpoints.export import export_checkpoint, save_checkpoint_folder
from dllm_var.checkpoints.families import FORMATS
from dllm_var.checkpoints.pretrained import INDEX, WEIGHTS, load_checkpoint, load_pretrained, open_checkpoint
from dllm_var.errors import UserError
from dllm_var.model import Transformer, TransformerConfig
from dllm_var.model.quantised import QuantisedLinear, dequantise
from dllm_var.text.tokenizer import Tokenizer

KINDS = ("int8", "int4")
IDS = torch.randint(0, 256, (2, 30), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a small model in 32 bits."""
    torch.manual_seed(0)
    folder = write_byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    tokenizer = Tokenizer.from_pretrained(folder, terminators=["<|endoftext|>"])
    special = dict(mask_id=tokenizer.mask_id, terminator_ids=list(tokenizer.terminator_ids), pad_id=tokenizer.pad_id)
    sizes = dict(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=64)
    config = TransformerConfig(**sizes, initializer_range=0.2, vocab_size=tokenizer.vocab_size, **special)
    return save_checkpoint_folder(tmp_path_factory.mktemp("model"), Transformer(config).eval(), tokenizer)


def export(folder, output, *options):
    return main(["export", "--checkpoint", str(folder), "--output", str(output), *options])


def bits_of(model):
    return {module.integers.bits for module in model.modules() if isinstance(module, QuantisedLinear)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "llada"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.no_grad()
def test_a_folder_gives_what_rounding_while_loading_gives(trained, kind, family, dtype, tmp_path):
    assert export(trained, tmp_path / "out", "--format", family, "--quantize", kind, "--dtype", dtype) == 0
    rounded, _, _ = load_checkpoint(trained, dtype=getattr(torch, dtype), quantize=kind)
    loaded, _, _ = load_checkpoint(tmp_path / "out")
    assert bits_of(rounded) == bits_of(loaded) == {int(kind[-1])}
    assert torch.equal(rounded(IDS), loaded(IDS)) and loaded(IDS).dtype == getattr(torch, dtype)
    assert torch.equal(load_pretrained(tmp_path / "out")(IDS), loaded(IDS))
    # Written again, it stays as it is, bit for bit.
    assert export(tmp_path / "out", tmp_path / "again", "--format", family) == 0
    first, second = (load_file(tmp_path / name / WEIGHTS) for name in ("out", "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@torch.no_grad()
def test_shards_hold_the_same_as_one_file(trained, tmp_path):
    for name, most in (("whole", 2**40), ("shards", 2**14)):
        export_checkpoint(open_checkpoint(trained), FORMATS["llama"], tmp_path / name, {}, None, "int4", most)
    index = json.loads((tmp_path / "shards" / INDEX).read_text())
    files = set(index["weight_map"].values())
    parts = {name: tensor for file in files for name, tensor in load_file(tmp_path / "shards" / file).items()}
    whole = load_file(tmp_path / "whole" / WEIGHTS)
    assert len(files) > 2 and parts.keys() == whole.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert torch.equal(*(load_pretrained(tmp_path / name)(IDS) for name in ("whole", "shards")))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_numbers_of_a_folder_are_read_where_plain_weights_are_needed(trained, kind, tmp_path):
    export(trained, tmp_path / "out", "--format", "llama", "--quantize", kind)
    model, checkpoint = load_pretrained(tmp_path / "out"), open_checkpoint(tmp_path / "out")
    for name, module in model.named_modules():
        if isinstance(module, QuantisedLinear):
            numbers = checkpoint.weight(f"{name}.weight", [module.out_features, module.in_features])
            assert torch.equal(numbers, dequantise(module.weight, module.scale, torch.float32))


@pytest.mark.skipif(find_spec("compressed_tensors") is None, reason="pip install compressed-tensors")
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_the_same_numbers(trained, kind, tmp_path):
    from transformers import AutoModelForCausalLM

    export(trained, tmp_path / "out", "--format", "llama", "--quantize", kind)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    theirs(IDS)  # it unpacks the weights at the latest now
    ours = load_pretrained(tmp_path / "out")
    for name, module in ours.named_modules():
        if isinstance(module, QuantisedLinear):
            numbers = dequantise(module.weight, module.scale, torch.float32)
            torch.testing.assert_close(theirs.get_submodule(name).weight, numbers, rtol=1e-6, atol=0)
    assert torch.equal(theirs.lm_head.weight, ours.lm_head.weight)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantization_config that is not known"),
        ("symmetric", "quantization_config that is not known"),
        ("num_bits", "quantization_config that is not known"),
        ("group_size", "weight .*scale has shape|some of 32"),
        ("weight", r"weight .* has shape \[32, 8\], the config says \[32, 16\]"),
        ("scale", "NaN or infinite"),
        (
            "number",
            r"q_proj.weight_packed is of type torch.int32 and shape \[\], where a matrix",
        ),
        ("floats", r"weight .*q_proj.weight_packed is of type torch.float32"),
        ("both", r"hold model.layers.1.self_attn.q_proj.weight twice"),
    ],
)
def test_what_is_not_understood_or_damaged_is_named(trained, change, says, tmp_path):
    export(trained, tmp_path / "out", "--format", "llama", "--quantize", "int4")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    stem, weights = (
        "model.layers.1.self_attn.q_proj",
        config["quantization_config"]["config_groups"]["group_0"]["weights"],
    )
    if isinstance(change, dict):
        config["quantization_config"] = change
    elif change in weights:
        weights[change] = {"symmetric": False, "num_bits": 3, "group_size": 64}[change]
    elif change == "weight":
        tensors[f"{stem}.weight_packed"] = tensors[f"{stem}.weight_packed"][:, :2].clone()
    elif change == "number":
        tensors[f"{stem}.weight_packed"] = torch.tensor(1, dtype=torch.int32)
    elif change == "floats":
        tensors[f"{stem}.weight_packed"] = torch.ones(32, 4)
    elif change == "both":
        tensors[f"{stem}.weight"] = torch.ones(32, 32)
    else:
        tensors[f"{stem}.weight_scale"][0] = torch.nan
    save_file(tensors, tmp_path / "out" / WEIGHTS)
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=says):
        load_checkpoint(tmp_path / "out")


def test_a_checkpoint_of_other_bits_is_not_rounded_again(trained, tmp_path, capsys):
    export(trained, tmp_path / "out", "--format", "llama", "--quantize", "int8")
    asked = ["generate", "--checkpoint", str(tmp_path / "out"), "--prompt", "a", "--max-new-tokens", "4"]
    answers = []
    for options in (["--quantize", "int8"], []):
        capsys.readouterr()
        assert main([*asked, *options]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    assert main([*asked, "--quantize", "int4"]) == 2
    assert "has weights of 8 bits already: leave out" in capsys.readouterr().err
