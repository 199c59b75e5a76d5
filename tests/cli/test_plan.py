"""`plan` on the recipes for published models: their real config.json alone, no weights, no data, no network."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from published import REAL_SIZES
from published_experts import LLADA2_MINI

from dllm_var.__main__ import main
from dllm_var.cli.plan import tokens_read
from dllm_var.objectives import Autoregressive, BlockDiffusion, EosSchedule

CONFIGS = Path(__file__).parent.parent.parent / "configs"


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


def write_config(folder, name):
    """A folder of a published model with its config.json and nothing else."""
    folder.mkdir(exist_ok=True)
    sizes = {**REAL_SIZES, "inclusionAI/LLaDA2.0-mini": LLADA2_MINI}
    (folder / "config.json").write_text(json.dumps(sizes[name]))
    return str(folder)


def plan(capsys, *names, arguments=()):
    configs = [argument for name in names for argument in ("--config", str(CONFIGS / f"{name}.yaml"))]
    assert main(["plan", *configs, "--devices", "8", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_weights_in_memory_are_all_experts_and_the_report_tells_them_from_those_a_token_passes(tmp_path, capsys):
    model = f"--model.init_from={write_config(tmp_path, 'inclusionAI/LLaDA2.0-mini')}"
    result = plan(capsys, "llada2_mini_sft", arguments=[model])
    assert result["parameters"]["active"] == pytest.approx(1.433e9, rel=1e-3)
    assert result["memory"]["zero2"]["weights"] == 2 * result["parameters"]["total"]
    assert main(["plan", "--config", str(CONFIGS / "llada2_mini_sft.yaml"), "--devices", "8", model]) == 0
    assert "; active 1,432,973,056; trained 16,255,638,528\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("recipe", "model", "billions", "tokens"),
    [
        ("llada_8b_sft", "GSAI-ML/LLaDA-8B-Base", 8.0156, 8 * 2 * 4 * 8192),  # as the model cards have them
        ("dream_7b_sft", "Dream-org/Dream-v0-Base-7B", 7.6156, 8 * 4 * 2 * 4096),
        ("llada2_mini_sft", "inclusionAI/LLaDA2.0-mini", 16.2556, 8 * 1 * 1 * 2048),
        ("qwen3_to_diffusion", "Qwen/Qwen3-1.7B-Base", 1.7206, 8 * 8 * 2 * 2048),
        ("qwen3_to_diffusion", "Qwen/Qwen3-8B-Base", 8.1907, 8 * 8 * 2 * 2048),
    ],
)
def test_recipes_at_the_size_of_the_model_that_is_named(recipe, model, billions, tokens, tmp_path, capsys):
    result = plan(capsys, recipe, arguments=[f"--model.init_from={write_config(tmp_path, model)}"])
    assert result["parameters"]["total"] == pytest.approx(billions * 1e9, rel=1e-4)
    assert result["step"]["tokens"] == tokens
    assert result["step"]["precision"] == "16-mixed"
    assert result["memory"]["fsdp2, recomputed"]["total"] < 80e9 < result["memory"]["ddp"]["total"]
    assert result["this_config"] == {"strategy": "fsdp2, recomputed", "fits": True, "remedy": None}
    blocks = result["parameters"]["blocks"] - result["parameters"]["total"] + result["parameters"]["active"]
    matrices = blocks * result["step"]["read"] / result["step"]["context_length"]
    assert 1.1 < result["step"]["flops"] / (6 * matrices * tokens) < 1.5  # and head and attention
    assert result["tokens_per_second"] == pytest.approx(tokens / result["step"]["seconds"])


def test_options_and_settings(tmp_path, capsys):
    result = plan(capsys, "cmudict", arguments=["--mfu", "0.8", "--device-tflops", "0.1", "--data.batch_size=32"])
    assert result["step"]["tokens"] == 8 * 32 * 128
    assert result["step"]["seconds"] == pytest.approx(result["step"]["flops"] / (8 * 0.1e12 * 0.8))
    assert result["parameters"]["total"] == 1_798_080  # the vocabulary is the source's tokenizer's
    llada = f"--model.init_from={write_config(tmp_path, 'GSAI-ML/LLaDA-8B-Base')}"
    adapters = plan(capsys, "llada_8b_sft", "lora", arguments=[llada])
    assert adapters["parameters"]["trained"] == 16 * 32 * (4 * (4096 + 4096) + 3 * (4096 + 12288))


def test_the_table_marks_the_line_of_the_config(capsys):
    arguments = ["--config", str(CONFIGS / "cmudict_strided.yaml"), "--trainer.devices=2", "--device-memory", "1.2GB"]
    assert main(["plan", *arguments]) == 0
    out = capsys.readouterr().out
    assert "model        checkpoints/cmudict_autoregressive: 4 layers" in out and "parameters   1,798,080" in out
    assert "devices 2 x batches 1 x rows 16 x 128 tokens = 4,096 tokens" in out
    [own] = [line for line in out.splitlines() if line.endswith("<- this config")]
    assert own.startswith("ddp ") and "over 1.2 GB" in own
    assert out.splitlines()[-1].startswith("this config does not fit: ")
    assert main(["plan", *arguments, "--devices", "1", "--device-memory", "8"]) == 0
    out = capsys.readouterr().out
    assert [line.split("  ")[0] for line in out.splitlines()[-4:-2]] == ["one device", "one device, recomputed"]
    assert out.splitlines()[-1].startswith("this config fits: ")
    assert main(["plan", *arguments, "--trainer.devices=auto", "--trainer.accelerator=gpu"]) == 0
    assert f"step         devices {torch.cuda.device_count() or 8} x" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "memory", "devices", "settings", "remedy"),
    [
        ("Qwen/Qwen3-1.7B-Base", 24, 8, ["--trainer.strategy=ddp"], "FSDP2"),
        ("Qwen/Qwen3-1.7B-Base", 80, 8, ["--model.activation_checkpointing=none"], "activation_checkpointing=full"),
        slow("Qwen/Qwen3-1.7B-Base", 24, 1, ["--trainer.strategy=auto"], "configs/lora.yaml"),
        slow("Qwen/Qwen3-8B-Base", 24, 8, [], "accumulate_grad_batches=8 --config configs/lora.yaml"),
        slow("Qwen/Qwen3-8B-Base", 24, 1, ["--trainer.strategy=auto"], "configs/qlora.yaml"),
        slow("Qwen/Qwen3-8B-Base", 4, 8, [], None),
    ],
)
def test_what_does_not_fit_fits_with_what_is_suggested(
    model, memory, devices, settings, remedy, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("peft")
    monkeypatch.chdir(CONFIGS.parent)
    asked = [f"--model.init_from={write_config(tmp_path, model)}", "--devices", str(devices), *settings]
    asked += ["--device-memory", str(memory)]
    before = plan(capsys, "qwen3_to_diffusion", arguments=asked)
    assert before["this_config"]["fits"] is False
    if remedy is None:
        assert before["this_config"]["remedy"] is None
        return
    assert remedy in before["this_config"]["remedy"]
    after = plan(capsys, "qwen3_to_diffusion", arguments=[*asked, *shlex.split(before["this_config"]["remedy"])])
    assert after["this_config"]["fits"]
    assert after["step"]["tokens"] // after["step"]["devices"] == before["step"]["tokens"] // before["step"]["devices"]


def test_llada_8b_above_4_bits_fits_on_a_card_of_24_gb(tmp_path, capsys):
    pytest.importorskip("peft")
    asked = [f"--model.init_from={write_config(tmp_path, 'GSAI-ML/LLaDA-8B-Base')}", "--device-memory", "24"]
    names = ["llada_8b_sft", "strategy/one_gpu"]
    one = [*asked, "--devices", "1"]
    plain, quantised = (plan(capsys, *names, overlay, arguments=one) for overlay in ("lora", "qlora"))
    assert not plain["this_config"]["fits"] and quantised["this_config"]["fits"]
    assert plain["parameters"] == quantised["parameters"]
    saved = [plain["memory"][name]["weights"] - quantised["memory"][name]["weights"] for name in plain["memory"]]
    per_weight = 4 - 0.5 - 4 / 32  # bytes: 32 bits less 4, and a scale for 32 weights
    assert saved == [pytest.approx(per_weight * 32 * (4 * 4096**2 + 3 * 4096 * 12288))] * 2
    spread = plan(capsys, *names, "qlora", arguments=[*asked, "--devices", "2"])
    assert list(spread["memory"]) == ["ddp", "ddp, recomputed"]


@pytest.mark.parametrize(
    ("names", "model", "devices", "settings", "strategy"),
    [
        (["llada_8b_sft", "lora", "strategy/one_gpu"], "GSAI-ML/LLaDA-8B-Base", 1, [], "one device"),
        (
            ["llada_8b_sft", "lora", "float8", "strategy/one_gpu"],
            "GSAI-ML/LLaDA-8B-Base",
            1,
            ["--trainer.precision=bf16-true"],
            "one device",
        ),
        (["qwen3_to_diffusion", "strategy/one_gpu"], "Qwen/Qwen3-1.7B-Base", 1, [], "one device"),
        (["llada_8b_sft"], "GSAI-ML/LLaDA-8B-Base", 8, [], "fsdp2"),
        (
            ["llada_8b_sft", "strategy/deepspeed_zero2"],
            "GSAI-ML/LLaDA-8B-Base",
            8,
            ["--data.batch_size=8", "--trainer.accumulate_grad_batches=1", "--data.context_length=2048"],
            "zero2",
        ),
    ],
)
def test_overlays_for_cards_of_80_gb_compose_and_fit(names, model, devices, settings, strategy, tmp_path, capsys):
    pytest.importorskip("peft")
    asked = [f"--model.init_from={write_config(tmp_path, model)}", "--devices", str(devices), *settings]
    result = plan(capsys, *names, arguments=[*asked, "--device-memory", "80"])
    assert result["this_config"] == {"strategy": f"{strategy}, recomputed", "fits": True, "remedy": None}
    assert (result["parameters"]["trained"] < result["parameters"]["total"] / 50) == ("lora" in names)
    from dllm_var.cli.trainer_settings import build_parser

    configs = [argument for name in names for argument in ("--config", str(CONFIGS / f"{name}.yaml"))]
    fit = build_parser("fit", configs).parse_resolved([*configs, asked[0], *settings])
    model = fit["model"]["init_args"]
    assert model["compile"] == (devices == 1) and bool(model["float8"]) == ("float8" in names)


def test_a_model_on_a_hub_that_cannot_be_reached(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    recipe = ["--config", str(CONFIGS / "qwen3_to_diffusion.yaml"), "--devices", "8"]
    assert main(["plan", *recipe, "--model.init_from=nobody/Qwen3-9B"]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert "checkpoint nobody/Qwen3-9B" in line and "hf download nobody/Qwen3-9B config.json --local-dir DIR" in line
    named = f"--model.init_from={write_config(tmp_path, 'Qwen/Qwen3-8B-Base')}"
    assert main(["plan", *recipe, named, "--model.transformer.hidden_size=64"]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert "transformer.hidden_size=4096, the settings say 64: leave it out" in line


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
        (["--trainer.devices=some"], "give plan --devices N"),
        (["--devices=8", "--device-memory=lots"], "--device-memory takes GB, such as 24 or 24GB, not 'lots'"),
    ],
)
def test_mistakes(arguments, says, capsys):
    settings = ["--config", str(CONFIGS / "cmudict.yaml"), "--trainer.devices=auto", "--trainer.accelerator=auto"]
    assert main(["plan", *settings, *arguments]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert says in line
