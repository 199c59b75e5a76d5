"""Every recipe trains: two steps of it, and of each overlay on it, at toy size on its own data."""

import json
from pathlib import Path

import pytest
import yaml

from dllm_var.__main__ import main

CONFIGS = Path(__file__).parent.parent / "configs"
RECIPES = ["quickstart", "cmudict", "cmudict_autoregressive", "cmudict_strided"]
TOY = [
    *("--model.transformer.hidden_size=16", "--model.transformer.num_layers=1", "--model.transformer.num_heads=2"),
    *("--trainer.max_steps=2", "--trainer.limit_val_batches=2", "--trainer.val_check_interval=2"),
    *("--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.log_every_n_steps=1", "--data.batch_size=2"),
    *("--sampler.max_new_tokens=6", "--model.init_from=null"),
]


def fit(folder, *names):
    configs = [argument for name in names for argument in ("--config", str(CONFIGS / f"{name}.yaml"))]
    assert main(["fit", *configs, *TOY]) == 0
    [summary] = Path(folder).glob("runs/*/version_0/summary.json")
    return json.loads(summary.read_text())


@pytest.mark.parametrize(
    "names",
    [
        *[[recipe] for recipe in RECIPES],
        ["cmudict", "paper"],
        ["quickstart", "sampler/fixed_steps"],
        ["quickstart", "sampler/threshold"],
        ["quickstart", "strategy/ddp"],
    ],
    ids="+".join,
)
def test_recipe_trains_two_steps_and_writes_its_summary(names, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dllm_var.callbacks.summary.held_out_prompts", first_prompts)
    summary = fit(tmp_path, *names)
    assert summary["steps"] == 2
    for name in (
        "per",
        "wer",
        "ended_by_eos",
        "length_exact",
        "tokens_per_forward",
        "tokens_per_second",
        "train_seconds",
    ):
        assert summary[name] >= 0
    [weights] = tmp_path.glob("runs/*/version_0/model")
    assert main(["generate", "--checkpoint", str(weights), "--prompt", "keyboard", "--max-new-tokens", "4"]) == 0
    assert capfd.readouterr().out.splitlines()[-1].startswith("keyboard -> ")


def first_prompts(trainer, split, n):
    """Two thousand words take an untrained model longer than everything else in this test."""
    from dllm_var.callbacks.decoding import held_out_prompts

    return held_out_prompts(trainer, split, min(n or 20, 20))


def test_the_shipped_block_model_is_what_its_recipe_says():
    recipe = yaml.safe_load((CONFIGS / "gsm_symbolic.yaml").read_text())
    benchmark = yaml.safe_load((CONFIGS.parent / "benchmarks" / "gsm_symbolic.yaml").read_text())["tasks"][0]
    shipped = json.loads((CONFIGS.parent / "checkpoints" / "gsm_symbolic" / "config.json").read_text())["dllm_var"]
    objective = recipe["model"]["objective"]["init_args"]
    assert shipped["step"] == recipe["trainer"]["max_steps"]
    for name in ("causal_context", "token_shift"):
        assert shipped["transformer"][name] == objective[name]
    decoded = [recipe["sampler"]["init_args"], shipped["sampler"]["init_args"]]
    decoded += [entry["arguments"] for entry in benchmark["entries"] if "block_length" in entry["arguments"]]
    assert len(decoded) > 4 and {arguments["block_length"] for arguments in decoded} == {objective["block_length"]}
