"""`predict` writes what `generate` would say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dllm_var.__main__ import main

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "quickstart.yaml")
TOY = [
    *("--model.transformer.hidden_size=16", "--model.transformer.num_layers=1", "--model.transformer.num_heads=2"),
    *("--sampler.max_new_tokens=3", "--data.batch_size=16"),
]
CALLBACKS = "--trainer.callbacks=[{class_path: SamplingCallback, init_args: {sampler: '${sampler}', num_examples: 2}}]"


@pytest.mark.slow
def test_predict_writes_every_test_prompt_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["--config", CONFIG, *TOY, CALLBACKS.replace("SamplingCallback", "dllm_var.callbacks.SamplingCallback")]
    steps = ["--trainer.max_steps=1", "--trainer.limit_val_batches=0"]
    assert main(["fit", *arguments, *steps]) == 0
    assert main(["predict", *arguments]) == 2
    assert "predict needs --ckpt_path" in capsys.readouterr().err
    assert main(["predict", *arguments, "--ckpt_path", "last", "--trainer.limit_predict_batches=3"]) == 0
    [path] = Path("runs").glob("*/predict/*/answers.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({line["prompt"] for line in lines}) == len(lines) == 48
    assert all(len(line["tokens"]) <= 3 for line in lines)
    prompt = lines[0]["prompt"].replace(" ", "")
    capsys.readouterr()
    [checkpoint] = Path("runs").glob("*/version_0/checkpoints")
    assert main(["generate", "--checkpoint", str(checkpoint), "--prompt", prompt, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == lines[0]["tokens"]


PREDICT = """
import sys
from pathlib import Path
import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from dllm_var import DiffusionLM
from dllm_var.callbacks import AnswerWriter
from dllm_var.datamodules import CmudictSource, JsonlSource, PackedDataModule
from dllm_var.model.config import TransformerConfig
from dllm_var.sampling import BlockDiffusionSampler
from dllm_var.training.strategies import FSDP2

torch.set_num_threads(1)
folder, strategy, devices = sys.argv[1], sys.argv[2], int(sys.argv[3])
for prompts in (5, 1):
    torch.manual_seed(0)
    model = DiffusionLM(TransformerConfig(num_layers=2, hidden_size=16, num_heads=2, intermediate_size=32))
    model.sampler = BlockDiffusionSampler(block_length=4, max_new_tokens=9)
    source = JsonlSource(path=f"{folder}/5.jsonl", test_path=f"{folder}/{prompts}.jsonl")
    data = PackedDataModule(source, CmudictSource.default_tokenizer, batch_size=2, context_length=32)
    L.Trainer(
        strategy=FSDP2() if strategy == "fsdp2" else strategy, devices=devices, accelerator="cpu",
        logger=CSVLogger(folder, name=f"{strategy}{prompts}", version=""), enable_progress_bar=False,
        callbacks=[AnswerWriter()],
    ).predict(model, data)
"""


@pytest.mark.slow
def test_two_processes_answer_each_prompt_once_and_in_order(tmp_path):
    """Five prompts of unequal lengths, and one; under FSDP2 each process decodes those of both, and keeps its own."""
    words = ["a", "bb", "ccccccc", "ddd", "eeeeeeeeeee"]
    for count in (5, 1):
        records = [json.dumps({"prompt": word, "response": "K"}) + "\n" for word in words[:count]]
        (tmp_path / f"{count}.jsonl").write_text("".join(records))
    (tmp_path / "predict.py").write_text(PREDICT)

    def answers(strategy, devices):
        command = [sys.executable, str(tmp_path / "predict.py"), str(tmp_path), strategy, devices]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr[-3000:]
        for count in (5, 1):
            folder = tmp_path / f"{strategy}{count}"
            assert [path.name for path in folder.glob("answers*")] == ["answers.jsonl"]
            yield [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]

    alone = list(answers("auto", "1"))
    for strategy in ("ddp", "fsdp2"):
        for expected, together in zip(alone, answers(strategy, "2"), strict=True):
            assert sorted(line["prompt"].replace(" ", "") for line in together) == words[: len(expected)]
            assert [(line["prompt"], line["tokens"]) for line in together] == [
                (line["prompt"], line["tokens"]) for line in expected
            ]
