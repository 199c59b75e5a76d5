"""`plan` on the recipes for published models: their real shapes, no weights, no data, no network."""

import json
from pathlib import Path

import pytest

from dllm_var.__main__ import main
from dllm_var.cli.plan import tokens_read
from dllm_var.objectives import Autoregressive, BlockDiffusion, EosSchedule

CONFIGS = Path(__file__).parent.parent.parent / "configs"


def plan(capsys, *names, arguments=()):
    configs = [argument for name in names for argument in ("--config", str(CONFIGS / f"{name}.yaml"))]
    assert main(["plan", *configs, "--devices", "8", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("recipe", "billions", "tokens"),
    [
        ("llada_8b_sft", 8.0156, 8 * 2 * 4 * 8192),  # as the model cards have them
        ("dream_7b_sft", 7.6156, 8 * 4 * 2 * 4096),
        ("qwen3_to_diffusion", 1.7206, 8 * 8 * 2 * 2048),
    ],
)
def test_recipes_at_their_real_size(recipe, billions, tokens, capsys):
    result = plan(capsys, recipe)
    assert result["parameters"]["total"] == pytest.approx(billions * 1e9, rel=1e-4)
    assert result["step"]["tokens"] == tokens
    assert result["step"]["precision"] == "16-mixed"
    assert result["memory"]["fsdp2, recomputed"]["total"] < 80e9 < result["memory"]["ddp"]["total"]
    matrices = result["parameters"]["blocks"] * result["step"]["read"] / result["step"]["context_length"]
    assert 1.1 < result["step"]["flops"] / (6 * matrices * tokens) < 1.5  # and head and attention
    assert result["tokens_per_second"] == pytest.approx(tokens / result["step"]["seconds"])


def test_options_and_settings(capsys):
    result = plan(capsys, "cmudict", arguments=["--mfu", "0.8", "--device-tflops", "0.1", "--data.batch_size=32"])
    assert result["step"]["tokens"] == 8 * 32 * 128
    assert result["step"]["seconds"] == pytest.approx(result["step"]["flops"] / (8 * 0.1e12 * 0.8))
    assert result["parameters"]["total"] == 1_798_080  # the vocabulary is the source's tokenizer's
    adapters = plan(capsys, "llada_8b_sft", "lora")
    assert adapters["parameters"]["trained"] == 16 * 32 * (4 * (4096 + 4096) + 3 * (4096 + 12288))


def test_the_table(capsys):
    arguments = ["--config", str(CONFIGS / "cmudict.yaml"), "--devices", "1", "--device-memory", "0.1"]
    assert main(["plan", *arguments]) == 0
    out = capsys.readouterr().out
    assert "parameters   1,798,080" in out and "devices 1 x batches 1 x rows 16 x 128 tokens = 2,048 tokens" in out
    assert out.count("over 0.1 GB") >= 1 and "fsdp2, recomputed" in out


def test_what_objectives_read():
    assert tokens_read(Autoregressive(), 64, 0.5) == (1, 0.5)
    read, scored = tokens_read(EosSchedule(), 512, 0.5)
    assert read == 1 and 0.15 < scored < 0.35
    read, scored = tokens_read(BlockDiffusion(8, kv_commit="alone", complementary=True), 512, 0.5)
    assert read == 2 and 0.5 <= scored < 0.55  # every answer token once, and each terminator twice


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--mfu", "0"], "mfu: 0 does not conform to restriction v>0 and v<=1"),
        (["--devices", "0"], "devices: 0 does not conform"),
        (["--data.batch_sise=3"], "batch_sise"),
        ([], "give plan --devices N"),
    ],
)
def test_mistakes(arguments, says, capsys):
    settings = ["--trainer.devices=auto", "--config", str(CONFIGS / "cmudict.yaml"), "--trainer.devices=auto"]
    assert main(["plan", *settings, *arguments]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert says in line
