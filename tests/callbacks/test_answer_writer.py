"""`predict` writes what `generate` would say."""

import json
from pathlib import Path

from dllm_var.__main__ import main

CONFIG = str(Path(__file__).parent.parent.parent / "configs" / "quickstart.yaml")
TOY = [
    *("--model.transformer.hidden_size=16", "--model.transformer.num_layers=1", "--model.transformer.num_heads=2"),
    *("--sampler.max_new_tokens=3", "--data.batch_size=16"),
]
CALLBACKS = "--trainer.callbacks=[{class_path: SamplingCallback, init_args: {sampler: '${sampler}', num_examples: 2}}]"


def test_predict_writes_every_test_prompt_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["--config", CONFIG, *TOY, CALLBACKS.replace("SamplingCallback", "dllm_var.callbacks.SamplingCallback")]
    steps = ["--trainer.max_steps=1", "--trainer.limit_val_batches=0"]
    assert main(["fit", *arguments, *steps]) == 0
    assert main(["predict", *arguments, "--ckpt_path", "last", "--trainer.limit_predict_batches=3"]) == 0
    [path] = Path("runs").glob("*/*/answers.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({line["prompt"] for line in lines}) == len(lines) == 48
    assert all(len(line["tokens"]) <= 3 for line in lines)
    prompt = lines[0]["prompt"].replace(" ", "")
    capsys.readouterr()
    [checkpoint] = Path("runs").glob("*/version_0/checkpoints")
    assert main(["generate", "--checkpoint", str(checkpoint), "--prompt", prompt, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == lines[0]["tokens"]


def test_measuring_without_a_checkpoint_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["validate", "--config", CONFIG]) == 2
    assert "validate needs --ckpt_path" in capsys.readouterr().err
