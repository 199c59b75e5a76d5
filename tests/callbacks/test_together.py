"""All callbacks in one small run on real data, model and sampler."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from dllm_var.__main__ import main
from dllm_var.callbacks import ExportWeights, ProgressBar, RunSummary, SamplingCallback, SpeedMonitor
from dllm_var.checkpoints.pretrained import load_checkpoint
from dllm_var.datamodules import JsonlSource, PackedDataModule
from dllm_var.datamodules.cmudict import CmudictSource
from dllm_var.metrics import AnswerMetrics
from dllm_var.sampling import BlockDiffusionSampler
from dllm_var.text.tokenizer import Tokenizer
from dllm_var.text.train_tokenizer import train_tokenizer

SOUNDS = {"a": "AA", "b": "B", "d": "D", "e": "EH", "k": "K"}


@pytest.fixture
def spelling(tmp_path: Path) -> PackedDataModule:
    """Words of five letters that each sound one way: 100 to learn from, 25 to be asked."""
    words = [a + b + c for a in SOUNDS for b in SOUNDS for c in SOUNDS]
    for name, part in (("train", words[:100]), ("test", words[100:])):
        records = [{"prompt": word, "response": " ".join(SOUNDS[x] for x in word)} for word in part]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    test = str(tmp_path / "test.jsonl")
    source = JsonlSource(path=str(tmp_path / "train.jsonl"), validation_path=test, test_path=test)
    return PackedDataModule(
        source, CmudictSource().default_tokenizer, batch_size=4, context_length=32, packing="best_fit", overhang=4
    )


def test_the_exported_weights_score_what_the_summary_says(
    fit: Any, spelling: PackedDataModule, tmp_path: Path, capsys: Any
) -> None:
    sampler = BlockDiffusionSampler(block_length=4, max_new_tokens=8)
    callbacks = [
        ProgressBar(plain_every_n_steps=10),
        SpeedMonitor(),
        SamplingCallback(sampler, every_n_steps=20, num_examples=5),
        ExportWeights(),
        RunSummary(sampler, token_error_name="per"),
        ModelCheckpoint(save_last=True),
    ]
    settings = {"max_steps": 40, "val_check_interval": 3, "limit_val_batches": 1, "log_every_n_steps": 10}
    logger = TensorBoardLogger(tmp_path, name="run")
    fit(*callbacks, data=spelling, logger=logger, enable_checkpointing=True, enable_progress_bar=True, **settings)

    summary = json.loads((Path(logger.log_dir) / "summary.json").read_text())
    transformer, tokenizer, _ = load_checkpoint(logger.log_dir)
    examples = spelling.held_out("test")
    answers = sampler.generate(transformer, [example.prompt for example in examples], tokenizer=tokenizer)
    metrics = AnswerMetrics()
    metrics.update(answers, [example.references for example in examples])
    assert metrics.compute()["token_error_rate"] == summary["per"]
    assert metrics.compute()["tokens_per_forward"] == summary["tokens_per_forward"]
    assert summary["answers"] == len(examples) == 25
    out = capsys.readouterr().out
    assert "step 40/40  loss" in out
    assert "validation: loss" in out
    assert "step 20, 5 answers:" in out


def test_a_run_on_conversations_ends_with_a_command_that_works(fit: Any, tmp_path: Path, capsys: Any) -> None:
    turns = [("user", "{}?"), ("assistant", "it is {}."), ("user", "-{}"), ("assistant", "not {}.")]
    chats = [
        [{"role": role, "content": text.format(number)} for role, text in turns[:length]]
        for number in range(60)
        for length in (2, 4)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    train_tokenizer((turn["content"] for chat in chats for turn in chat), 300).save(tmp_path / "tokenizer")
    source = JsonlSource(str(tmp_path / "chats.jsonl"))
    data = PackedDataModule(source, str(tmp_path / "tokenizer"), 2, context_length=64, packing="best_fit")
    sampler = BlockDiffusionSampler(block_length=4, max_new_tokens=8)
    callbacks = [ExportWeights(), RunSummary(sampler), SamplingCallback(sampler), ModelCheckpoint(save_last=True)]
    logger = TensorBoardLogger(tmp_path, name="run")
    fit(*callbacks, data=data, logger=logger, enable_checkpointing=True, max_steps=1)
    run = Path(logger.log_dir)
    for place in (run / "model", run / "checkpoints" / "last.ckpt"):
        assert load_checkpoint(place)[2]["chat"] is True

    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("try ")]
    words = shlex.split(line)[4:]
    assert main([*words, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    [asked] = [example for example in data.held_out("test") if example.prompt == answer["prompt"]]
    assert answer["prompt_tokens"] == len(asked.prompt_ids)
    assert asked.prompt.endswith("?")  # of one turn: that of several cannot be given as a text


def test_a_template_that_refuses_the_prompt_does_not_lose_the_summary(spelling: PackedDataModule) -> None:
    refusing = Tokenizer(spelling.tokenizer.backend, spelling.tokenizer.special, "{{ raise_exception('no') }}")
    data = SimpleNamespace(chats=True, held_out=spelling.held_out)
    trainer: Any = SimpleNamespace(datamodule=data)
    summary = RunSummary(BlockDiffusionSampler())
    assert summary._prompt_to_try(trainer, SimpleNamespace(tokenizer=refusing)) is None  # type: ignore[arg-type]
