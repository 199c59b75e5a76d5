"""RunSummary and ExportWeights: what is left in the run folder, and on the screen."""

from __future__ import annotations

import json
import shlex
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dllm_var.callbacks import ExportWeights, RunSummary, SamplingCallback
from dllm_var.checkpoints.pretrained import load_checkpoint
from dllm_var.errors import UserError


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "csv" / "version_0" / "summary.json").read_text())


def test_summary_has_the_figures_of_the_split(fit: Any, spy: Any, tmp_path: Path, capsys: Any) -> None:
    names = {"token_error_name": "per", "answer_error_name": "wer"}
    board = TensorBoardLogger(tmp_path, name="board")
    _, model = fit(RunSummary(spy, **names), logger=[CSVLogger(tmp_path, name="csv"), board])
    summary = read(tmp_path)
    # Twelve words of one, two and three letters in turn; the spy leaves out one token of each.
    assert summary["per"] == pytest.approx(12 / 24)
    assert summary["wer"] == 1.0
    assert (summary["answers"], summary["tokens"], summary["split"]) == (12, 12, "test")
    assert summary["ended_by_eos"] == summary["premature"] == 1.0
    assert summary["length_exact"] == 0.0
    assert summary["tokens_per_forward"] == pytest.approx(0.5)
    assert summary["tokens_per_second"] == pytest.approx(12 / summary["decode_seconds"])
    assert summary["steps"] == 6
    assert summary["parameters"] == sum(p.numel() for p in model.transformer.parameters())
    assert summary["train_seconds"] > 0
    assert (summary["checkpoint"], summary["weights"]) == (None, None)
    out = capsys.readouterr().out
    for line in ("test split            12 prompts", "phoneme error rate    50.0%", "word error rate       100.0%"):
        assert line in out
    assert "generate" not in out  # there is nothing to generate from
    metrics = (tmp_path / "csv" / "version_0" / "metrics.csv").read_text()
    assert "test/per" in metrics
    events = EventAccumulator(board.log_dir)
    events.Reload()
    assert not [tag for tag in events.Tags()["scalars"] if tag.startswith("test/")]  # a chart with one point each
    text = events.Tensors("summary/text_summary")[0].tensor_proto.string_val[0].decode()
    assert r"| word error rate | 100\.0% |" in text.splitlines()


def test_names_the_weights_and_a_command_that_loads_them(
    fit: Any, real_sampler: Any, tmp_path: Path, capsys: Any
) -> None:
    saving = ModelCheckpoint(save_last=True)
    callbacks = [SamplingCallback(real_sampler), ExportWeights(), RunSummary(real_sampler, prompt="it's"), saving]
    logger = CSVLogger(tmp_path, name="csv")
    _, model = fit(*callbacks, logger=logger, enable_checkpointing=True)
    summary, out = read(tmp_path), capsys.readouterr().out
    assert Path(summary["checkpoint"]).name == "last.ckpt"
    assert Path(summary["checkpoint"]).is_file()
    line = next(line for line in out.splitlines() if line.startswith("try "))
    command = shlex.split(line)[1:]
    assert command[:5] == ["python", "-m", "dllm_var", "generate", "--checkpoint"]
    assert command[5:] == [summary["weights"], "--prompt", "it's"]
    transformer, tokenizer, meta = load_checkpoint(summary["weights"])
    for name, weight in model.transformer.state_dict().items():
        assert torch.equal(transformer.state_dict()[name], weight), name
    assert tokenizer.fingerprint == model.tokenizer.fingerprint
    assert meta["step"] == 6
    assert meta["sampler"]["init_args"]["block_length"] == 4


def test_chats_of_several_turns_are_to_be_tried_in_a_chat(
    fit: Any, data: Any, spy: Any, tmp_path: Path, capsys: Any
) -> None:
    held_out = data.held_out

    def after_a_turn(split: str, count: int | None = None) -> list[Any]:
        examples = held_out(split, count)
        return [replace(one, prompt_ids=[*one.prompt_ids, data.tokenizer.terminator_id]) for one in examples]

    data.chats, data.held_out = True, after_a_turn
    fit(ExportWeights(), RunSummary(spy), logger=CSVLogger(tmp_path, name="csv"))
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert command == ["try", "python", "-m", "dllm_var", "chat", "--checkpoint", read(tmp_path)["weights"]]


def test_without_a_logger_it_prints_but_writes_nothing(fit: Any, spy: Any, tmp_path: Path, capsys: Any) -> None:
    fit(ExportWeights(), RunSummary(spy, num_examples=3))
    assert "3 prompts" in capsys.readouterr().out
    assert list(tmp_path.rglob("*")) == []


def test_a_run_stopped_by_the_clock_is_summed_up(fit: Any, spy: Any, tmp_path: Path) -> None:
    fit(
        RunSummary(spy), max_steps=-1, max_epochs=10**6, max_time={"seconds": 1}, logger=CSVLogger(tmp_path, name="csv")
    )
    summary = read(tmp_path)
    assert 0.9 < summary["train_seconds"] < 20
    assert summary["steps"] > 0


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_run_that_breaks_off_is_not(fit: Any, spy: Any, tmp_path: Path, capsys: Any, error: Any) -> None:
    class BreakOff(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise error("enough")

    with pytest.raises((RuntimeError, SystemExit)):
        fit(BreakOff(), ExportWeights(), RunSummary(spy), logger=CSVLogger(tmp_path, name="csv"))
    assert not list(tmp_path.rglob("summary.json"))
    assert "prompts" not in capsys.readouterr().out


def test_a_fast_dev_run_and_a_run_without_steps_are_not_summed_up(fit: Any, spy: Any, tmp_path: Path) -> None:
    fit(ExportWeights(), RunSummary(spy), fast_dev_run=True)
    fit(ExportWeights(), RunSummary(spy), max_steps=0, logger=CSVLogger(tmp_path, name="csv"))
    assert spy.steps == []
    assert not list(tmp_path.rglob("summary.json"))


def test_mistakes_show_before_training(fit: Any, spy: Any, data: Any) -> None:
    started: list[int] = []

    class Watch(L.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            started.append(1)

    with pytest.raises(UserError, match="split 'nowhere' has no examples"):
        fit(Watch(), RunSummary(spy, split="nowhere"))

    def refuse(model: Any) -> None:
        raise UserError("this sampler does not fit the model")

    spy.disturb = refuse
    with pytest.raises(UserError, match="does not fit"):
        fit(Watch(), RunSummary(spy))
    assert started == []


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint", "ignore:Be aware that when using `ckpt_path`")
def test_training_time_adds_up_over_resumes_without_the_final_evaluation(
    fit: Any, spy: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    class Tick(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            now[0] += 1.0

    def slow_decoding(model: Any) -> None:
        now[0] += 50.0

    spy.disturb = slow_decoding
    saving = ModelCheckpoint(tmp_path, filename="four", every_n_train_steps=4)
    fit(Tick(), RunSummary(spy), saving, enable_checkpointing=True, max_steps=4)
    settings = {"logger": CSVLogger(tmp_path, name="csv"), "ckpt_path": str(tmp_path / "four.ckpt")}
    fit(Tick(), RunSummary(spy), max_steps=6, **settings)
    summary = read(tmp_path)
    assert summary["train_seconds"] == pytest.approx(6.0)
    assert summary["decode_seconds"] == pytest.approx(50.0)
