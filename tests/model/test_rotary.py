"""Rotary positions slowed down for longer contexts: the paper's factors, and the angles that follow from them."""

import json

import pytest
import torch

from dllm_var.__main__ import main
from dllm_var.checkpoints.export import save_checkpoint_folder
from dllm_var.checkpoints.pretrained import load_checkpoint
from dllm_var.datamodules import CmudictSource
from dllm_var.errors import UserError
from dllm_var.model import Transformer, TransformerConfig
from dllm_var.model.rotary import ntk_scaling, read_rope_scaling
from dllm_var.text.tokenizer import Tokenizer


def tiny(**changes) -> Transformer:
    torch.manual_seed(0)
    settings = dict(hidden_size=32, num_layers=2, num_heads=2, vocab_size=50, initializer_range=0.2)
    return Transformer(TransformerConfig(**{**settings, **changes})).eval()


@pytest.mark.parametrize(
    ("theta", "trained", "factors"),
    [
        (500_000, 4096, {8192: 4, 16384: 14, 24576: 31, 32768: 55}),  # LLaDA
        (500_000, 8192, {16384: 4, 32768: 13}),  # Llama 3
        (1_000_000, 2048, {4096: 5}),  # Dream
    ],
)
def test_the_factors_are_those_of_longllada(theta, trained, factors):
    assert {target: ntk_scaling(trained, target, 128, theta) for target in factors} == factors
    assert ntk_scaling(trained, trained, 128, theta) == 1


def test_angles_equal_those_of_transformers_at_the_scaled_theta():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    model = tiny(rope_theta=10_000.0, rope_scaling=14.0)
    config = LlamaConfig(
        hidden_size=32,
        num_attention_heads=2,
        head_dim=16,
        rope_parameters={"rope_type": "default", "rope_theta": 140_000.0},
    )
    positions = torch.arange(300)[None]
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    ours_cos, ours_sin = model.rotary(positions, 300)
    torch.testing.assert_close(ours_cos[:, :, 0], cos)
    torch.testing.assert_close(ours_sin[:, :, 0, 8:], sin[:, :, 8:])
    torch.testing.assert_close(ours_sin[:, :, 0, :8], -sin[:, :, :8])  # the first half carries the sign


def test_scaling_a_loaded_model_is_the_same_as_building_it_scaled_and_can_be_undone():
    plain, built = tiny(), tiny(rope_scaling=4.0)
    tokens = torch.randint(0, 50, (1, 40))
    before = plain(tokens)
    plain.scale_rope(4)
    assert torch.equal(plain(tokens), built(tokens)) and not torch.allclose(plain(tokens), before)
    plain.scale_rope(1)
    assert torch.equal(plain(tokens), before)


@pytest.fixture
def folder(tmp_path):
    tokenizer = Tokenizer.from_pretrained(CmudictSource.default_tokenizer)
    ids = dict(mask_id=tokenizer.mask_id, terminator_ids=list(tokenizer.terminator_ids), pad_id=tokenizer.pad_id)
    model = tiny(vocab_size=tokenizer.vocab_size, **ids)
    model.scale_rope(4)
    return save_checkpoint_folder(tmp_path / "model", model, tokenizer)


def test_a_checkpoint_keeps_its_scaling_and_transformers_reads_the_scaled_theta(folder):
    model, _, _ = load_checkpoint(folder)
    assert model.config.rope_scaling == 4 and model.rotary.theta == 40_000
    config = json.loads((folder / "config.json").read_text())
    config["dllm_var"]["transformer"] = {}  # the family's own keys know of one theta alone
    (folder / "config.json").write_text(json.dumps(config))
    model, _, _ = load_checkpoint(folder)
    assert model.config.rope_scaling == 1 and model.rotary.theta == 40_000


def test_a_setting_is_a_factor_or_two_lengths():
    config = tiny(rope_theta=500_000.0).config
    assert read_rope_scaling("2.5", config) == 2.5
    assert read_rope_scaling("4096:8192", config) == ntk_scaling(4096, 8192, 16, 500_000)
    for wrong in ("", "two", "4096:", ":8", "4096:8192:3"):
        with pytest.raises(UserError, match="neither a factor"):
            read_rope_scaling(wrong, config)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: ntk_scaling(4096, 2048, 128, 10_000), "not below it"),
        (lambda: ntk_scaling(6, 2048, 128, 10_000), "at least 7 tokens"),
        (lambda: tiny().scale_rope(0), "rope_scaling must be a number above 0"),
        (lambda: tiny().scale_rope(float("nan")), "rope_scaling must be a number above 0"),
        (lambda: tiny(rope_theta=-1.0), "rope_theta must be a number above 0"),
    ],
)
def test_what_cannot_be_scaled_is_named(call, named):
    with pytest.raises(UserError, match=named):
        call()


def test_generate_scales_a_checkpoint(folder, capsys):
    """The scaled model's answer, and not the plain one's; both from the same folder."""

    def answer(*options):
        arguments = ["generate", "--checkpoint", str(folder), "--prompt", "uncharacteristically", "--json"]
        assert main([*arguments, "--max-new-tokens", "40", "--block-length", "8", *options]) == 0
        return json.loads(capsys.readouterr().out)["tokens"]

    from dllm_var.sampling import BlockDiffusionSampler

    expected = {}
    for scaling in (4, 1000):
        model, tokenizer, _ = load_checkpoint(folder)
        model.scale_rope(scaling)
        sampler = BlockDiffusionSampler(block_length=8, max_new_tokens=40)
        prompts = [tokenizer.encode("uncharacteristically")]
        expected[scaling] = sampler.generate(model, prompts)[0].tokens
    assert expected[4] != expected[1000]
    assert answer() == expected[4] and answer("--rope-scaling", "1000") == expected[1000]
    arguments = ["generate", "--checkpoint", str(folder), "--prompt", "cat"]
    assert main([*arguments, "--rope-scaling", "big"]) == 2
    assert "--rope-scaling big" in capsys.readouterr().err
