"""A run of seven steps that trains in a blink, events that cut it short, and what must be the same however it went."""

import json
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from tiny_data import data_settings, write_words

from dllm_var.__main__ import main

HERE = __name__  # where this file's classes are found by class_path
WORDS = [(a + b + a, "K AE T S IY"[: 2 + 3 * (i % 4)].strip()) for i, a in enumerate("bcdfghk") for b in "aeiou"]
LAST = Path("runs/tiny/version_0/checkpoints/last.ckpt")


class Event(Callback):
    """Does something to the process at one moment of a run.

    Args:
        what: Name of a signal, or `error`.
        step: The step, from 1.
        where: `step` (in its midst), `validation` or `end`.
    """

    def __init__(self, what: str, step: int, where: str = "step") -> None:
        self.what, self.step, self.where = what, step, where

    def happen(self) -> None:
        if self.what == "error":
            raise KeyError("a bug")
        os.kill(os.getpid(), getattr(signal, self.what))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if self.where == "step" and trainer.global_step + 1 == self.step:
            self.happen()

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
        if self.where == "validation" and trainer.global_step == self.step and batch_idx == 1:
            self.happen()

    def on_train_end(self, trainer, pl_module) -> None:
        if self.where == "end":
            self.happen()
            raise AssertionError("the signal came too late")


class Notes(Callback):
    """Writes down what a run sees: rows, random numbers, losses, validation; one line each, as they come."""

    def note(self, *what) -> None:
        with open("notes.jsonl", "a") as file:
            file.write(json.dumps(what) + "\n")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        draws = [random.random(), float(np.random.rand()), float(torch.rand(()))]  # noqa: NPY002
        self.note("rows", trainer.global_step, batch["row"].tolist(), draws)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.note("loss", trainer.global_step, float(trainer.callback_metrics.get("train/loss", 0)))

    def on_validation_end(self, trainer, pl_module) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        self.note("validation", trainer.global_step, metrics)

    def on_train_end(self, trainer, pl_module) -> None:
        self.note("end", trainer.global_step)


def write_run():
    """Writes words and a config into the working folder; returns the arguments of `fit`."""
    write_words("words.jsonl", WORDS)
    checkpoints = {"save_last": True, "every_n_train_steps": 2, "monitor": "step", "mode": "max", "save_top_k": 2}
    config = {
        "model": {"transformer": {"hidden_size": 16, "num_layers": 1, "num_heads": 2}, "schedule": {"warmup_steps": 2}},
        "data": data_settings(12),
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 7,
            "limit_val_batches": 2,
            "val_check_interval": 3,
            "check_val_every_n_epoch": None,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [
                {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": checkpoints},
                {"class_path": f"{HERE}.Notes"},
            ],
        },
    }
    Path("tiny.yaml").write_text(yaml.safe_dump(config))
    return ["fit", "--config", "tiny.yaml"]


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Arguments of `fit`, in a working folder of its own."""
    monkeypatch.chdir(tmp_path)
    return write_run()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Notes, state and checkpoints of a run that was left alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("whole"))
        assert main(write_run()) == 0
        return notes(), state(), kept()


def added(*callbacks, name="added.yaml"):
    """Returns arguments that add callbacks, given as class paths and arguments."""
    content = {"trainer": {"callbacks+": [{"class_path": path, "init_args": args} for path, args in callbacks]}}
    Path(name).write_text(yaml.safe_dump(content))
    return ["--config", name]


def event(what, step=0, where="step"):
    return added((f"{HERE}.Event", {"what": what, "step": step, "where": where}), name="event.yaml")


def notes():
    """Returns what was noted since the last time."""
    text = Path("notes.jsonl").read_text()
    Path("notes.jsonl").unlink()
    return [json.loads(line) for line in text.splitlines()]


def kept(last=LAST):
    return sorted(path.name for path in last.parent.iterdir())


def error_line(capsys):
    lines = capsys.readouterr().err.strip().splitlines()
    assert not any("Traceback" in line for line in lines)
    assert lines[-1].startswith("error: ")
    return lines[-1]


def state(path=LAST):
    """Returns what must be the same however often a run was interrupted."""
    checkpoint = torch.load(path, weights_only=True)
    loops = checkpoint["loops"]["fit_loop"]
    kept = {name: checkpoint[name] for name in ("global_step", "state_dict", "optimizer_states", "lr_schedulers")}
    return {**kept, "data": checkpoint["PackedDataModule"], "batches": loops["epoch_loop.batch_progress"]["total"]}


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
