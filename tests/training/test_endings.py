"""How runs end and go on: signals, full disks, exceptions, damaged checkpoints, other data; bit for bit."""

import errno
import json
import os
import random
import signal
import time
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from tiny_data import data_settings, write_words

from dllm_var.__main__ import main
from dllm_var.checkpoints import run_files as files
from dllm_var.checkpoints.run_files import read_file
from dllm_var.training import interrupt

ROOT = Path(__file__).parent.parent.parent
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


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A config of a model that trains in a blink, in a working folder of its own."""
    monkeypatch.chdir(tmp_path)
    write_words("words.jsonl", WORDS)
    checkpoints = {"save_last": True, "every_n_train_steps": 2, "monitor": "step", "mode": "max", "save_top_k": 2}
    config = {
        "model": {
            "transformer": {"hidden_size": 16, "num_layers": 1, "num_heads": 2},
            "schedule": {"warmup_steps": 2},
        },
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


def event(what, step=0, where="step"):
    arguments = {"what": what, "step": step, "where": where}
    added = [{"class_path": f"{HERE}.Event", "init_args": arguments}]
    Path("event.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks+": added}}))
    return ["--config", "event.yaml"]


def notes():
    text = Path("notes.jsonl").read_text()
    Path("notes.jsonl").unlink()
    return [json.loads(line) for line in text.splitlines()]


def error_line(capsys):
    lines = capsys.readouterr().err.strip().splitlines()
    assert not any("Traceback" in line for line in lines)
    assert lines[-1].startswith("error: ")
    return lines[-1]


def state(path=LAST):
    """What must be the same however often a run was interrupted."""
    checkpoint = read_file(Path(path))
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


# -- signals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "status", "step"), [("SIGTERM", 143, 4), ("SIGINT", 130, 5)])  # 5 ends an epoch
def test_a_run_stopped_in_a_step_goes_on_bit_for_bit(name, status, step, tiny, capsys):
    assert main(tiny) == 0
    whole, expected = notes(), state()
    before = {number: signal.getsignal(number) for number in interrupt.SIGNALS}
    assert main([*tiny, *event(name, step), "--trainer.logger.version=1"]) == status
    assert {number: signal.getsignal(number) for number in interrupt.SIGNALS} == before
    last = Path("runs/tiny/version_1/checkpoints/last.ckpt")
    assert state(last)["global_step"] == step
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"stopped at step {step}" in line and str(last) in line and line.endswith("--resume")
    assert main([*tiny, "--resume", "--trainer.logger.version=1"]) == 0
    assert notes() == whole  # rows, draws of all generators, losses, validation, the end; nothing twice
    assert same(state(last), expected)


@pytest.mark.parametrize(
    "background",
    [
        ["--config", str(ROOT / "configs" / "background_checkpoints.yaml")],
        ["--trainer.plugins=lightning.pytorch.plugins.io.AsyncCheckpointIO"],
    ],
    ids=["ours", "lightning's"],
)
def test_a_run_that_saves_in_the_background_goes_on_bit_for_bit(background, tiny, monkeypatch):
    assert main(tiny) == 0
    expected, kept = state(), sorted(path.name for path in LAST.parent.iterdir())
    write = files._write_sealed
    monkeypatch.setattr(files, "_write_sealed", lambda *arguments: (time.sleep(0.1), write(*arguments)))  # some steps
    last = Path("runs/tiny/version_1/checkpoints/last.ckpt")
    assert main([*tiny, *background, *event("SIGTERM", 5)]) == 143
    assert state(last)["global_step"] == 5  # written before the run said so
    assert main([*tiny, *background, "--resume"]) == 0
    assert same(state(last), expected) and sorted(path.name for path in last.parent.iterdir()) == kept


@pytest.mark.slow
@pytest.mark.parametrize("validation", ["every 3 steps", "at the end of epochs"])
def test_any_step_and_any_validation_is_one_to_go_on_from(validation, tiny):
    if validation != "every 3 steps":
        tiny += ["--trainer.val_check_interval=1.0", "--trainer.check_val_every_n_epoch=1"]
    tiny += ["--trainer.max_steps=12"]
    assert main(tiny) == 0
    whole, expected = notes(), state()
    for number, (step, where) in enumerate([(s, w) for s in (1, 3, 5, 6, 10) for w in ("step", "validation")], 1):
        version = f"--trainer.logger.version={number}"
        if main([*tiny, *event("SIGTERM", step, where), version]) == 0:  # no validation at this step
            assert notes() == whole
            continue
        assert main([*tiny, "--resume", version]) == 0
        assert notes() == whole, (step, where)
        assert same(state(f"runs/tiny/version_{number}/checkpoints/last.ckpt"), expected), (step, where)


def test_validation_that_was_cut_short_is_done_again_as_a_whole(tiny):
    assert main(tiny) == 0
    whole, expected = notes(), state()
    assert main([*tiny, *event("SIGTERM", 3, "validation")]) == 143
    last = Path("runs/tiny/version_1/checkpoints/last.ckpt")
    assert state(last)["global_step"] == 3
    assert main([*tiny, "--resume"]) == 0
    assert notes() == whole
    assert same(state(last), expected)


def test_a_checkpoint_before_validation_leads_to_it(tiny):
    assert main(tiny) == 0
    whole = notes()
    killed = event("error", 6, "validation")  # the checkpoint of step 6 is written before validation
    with pytest.raises(KeyError):
        main([*tiny, *killed])
    assert main([*tiny, "--resume"]) == 0
    assert notes() == whole


def test_sigterm_after_the_last_step_does_not_wait(tiny, capsys):
    assert main([*tiny, *event("SIGTERM", where="end")]) == 143
    assert state()["global_step"] == 7
    assert "after the last step" in capsys.readouterr().err
    first = notes()
    assert main([*tiny, "--resume"]) == 0
    assert notes() == [["end", 7]] and first[-1] == ["end", 7]  # it ends once more, without a step
    assert state()["global_step"] == 7


def test_sigusr1_saves_and_goes_on(tiny, capsys):
    assert main([*tiny, *event("SIGUSR1", 5), "--trainer.max_steps=5"]) == 0
    out = capsys.readouterr().out
    assert f"saved {LAST} at step 5" in out.replace(str(Path.cwd()) + "/", "")


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A SLURM job whose scontrol writes down what it is asked."""
    folder = tmp_path / "bin"
    folder.mkdir()
    command = folder / "scontrol"
    command.write_text('#!/bin/sh\necho "$@" >> scontrol.txt\n[ ! -e refuse ] || { echo no >&2; exit 1; }\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    return Path("scontrol.txt")


def test_in_slurm_sigusr1_requeues_and_the_same_command_goes_on(tiny, slurm, capsys, monkeypatch):
    assert main([*tiny, *event("SIGUSR1", 4)]) == 128 + signal.SIGUSR1
    assert slurm.read_text() == "requeue 77\n"
    assert "SLURM runs the job again" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert main(tiny) == 0
    assert state()["global_step"] == 7 and [path.name for path in Path("runs/tiny").iterdir()] == ["version_0"]


def test_requeue_of_an_array_job_and_what_refuses(slurm, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "70")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert interrupt.requeue() and slurm.read_text() == "requeue 70_3\n"
    Path("refuse").touch()
    assert not interrupt.requeue()
    assert "cannot requeue job 70_3: no" in capsys.readouterr().out
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not interrupt.requeue()
    assert "scontrol is not on this node" in capsys.readouterr().out


# -- failures ----------------------------------------------------------------------------------------------------------


def test_a_full_disk(tiny, capsys, monkeypatch):
    write, saves = files._write_sealed, []

    def full(checkpoint, file):
        saves.append(checkpoint["global_step"])
        if len(saves) == 4:  # step 2 and last, step 4, and now last
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(checkpoint, file)

    with monkeypatch.context() as patch:
        patch.setattr(files, "_write_sealed", full)
        assert main(tiny) == 2
    line = error_line(capsys)
    assert "No space left on device" in line and "step=4.ckpt is whole" in line and "--resume" in line
    assert sorted(path.name for path in LAST.parent.iterdir()) == [
        "epoch=0-step=2.ckpt",
        "epoch=0-step=4.ckpt",
        "last.ckpt",
    ]
    assert state()["global_step"] == 2 and saves == [2, 2, 4, 4]


def test_an_exception_in_a_callback_leaves_the_last_step(tiny):
    with pytest.raises(KeyError, match="a bug") as caught:
        main([*tiny, *event("error", 3, "validation")])
    assert state()["global_step"] == 3  # between two steps: nothing is lost
    if hasattr(caught.value, "__notes__"):
        assert "go on with --resume" in caught.value.__notes__[0] and "last.ckpt" in caught.value.__notes__[0]
    with pytest.raises(KeyError):
        main([*tiny, *event("error", 6), "--trainer.logger.version=1"])
    assert state("runs/tiny/version_1/checkpoints/last.ckpt")["global_step"] == 4  # in the midst of step 6


def test_leftovers_of_a_kill_are_cleared(tiny):
    assert main([*tiny, "--trainer.max_steps=2"]) == 0
    kept = {"dirpath": "kept", "every_n_train_steps": 100}
    more = [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": kept}]
    Path("more.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks+": more}}))
    Path("kept").mkdir()
    for leftover in (LAST.parent / ".last.ckpt.new", LAST.parent / "..last.ckpt.new.new", Path("kept/.a.ckpt.saving")):
        leftover.write_bytes(b"half")
    assert main([*tiny, "--config", "more.yaml", f"--resume={LAST}", "--trainer.max_steps=3"]) == 0
    assert not [path for folder in (LAST.parent, Path("kept")) for path in folder.glob(".*")]


# -- damaged checkpoints -----------------------------------------------------------------------------------------------


def test_a_damaged_newest_checkpoint_is_named_and_another_offered(tiny, capsys):
    assert main(tiny) == 0
    whole, expected = notes(), state()
    content = bytearray(LAST.read_bytes())
    content[len(content) // 2] ^= 16
    LAST.write_bytes(content)
    assert main([*tiny, "--resume"]) == 2
    line = error_line(capsys)
    assert f"{LAST} is damaged" in line
    option = line.split()[-1]
    assert option.startswith("--resume=") and option.endswith("step=6.ckpt")
    assert main([*tiny, option]) == 0
    assert [path.name for path in Path("runs/tiny").iterdir()] == ["version_0"]
    assert same(state(), expected)
    assert notes() == whole[-4:]  # with the validation of step 6, which its checkpoint precedes
    for command in ("fit", "validate"):
        LAST.write_bytes(content[:1000])
        assert main([command, *tiny[1:], f"--ckpt_path={LAST}"]) == 2
        line = error_line(capsys)
        assert "cut short" in line and "--ckpt_path=" in line
    assert main([*tiny, "--weights_only=false", f"--ckpt_path={LAST}"]) == 2
    assert "weights_only" in error_line(capsys)


def test_what_is_no_checkpoint_of_ours(tiny, capsys):
    Path("kept").mkdir()
    torch.save({"state_dict": {}, "global_step": 1}, "kept/last.ckpt")
    own = ["--trainer.callbacks.dirpath=kept", "--trainer.callbacks=lightning.pytorch.callbacks.ModelCheckpoint"]
    assert main([*tiny, *own[1:], own[0], "--resume"]) == 2
    assert "kept/last.ckpt is not a checkpoint of a training run" in error_line(capsys)
    torch.save({"pytorch-lightning_version": "2.6.6", "state_dict": {}, "global_step": 1}, "kept/last.ckpt")
    assert main([*tiny, *own[1:], own[0], "--resume"]) == 2
    assert "was not written by dllm_var" in error_line(capsys)
    Path("kept/last.ckpt").write_text("notes")
    assert main([*tiny, *own[1:], own[0], "--resume"]) == 2
    assert "kept/last.ckpt is not a checkpoint" in error_line(capsys)


# -- what a checkpoint is of -------------------------------------------------------------------------------------------


def test_a_checkpoint_records_what_made_it(tiny):
    assert main([*tiny, "--trainer.max_steps=1"]) == 0
    checkpoint = read_file(LAST)
    record = checkpoint["dllm_var"]
    assert record["format"] == files.FORMAT
    assert record["versions"]["torch"] == torch.__version__ and record["versions"]["lightning"] == L.__version__
    if (ROOT / ".git").exists():
        assert len(record["git"]["commit"]) == 40 and isinstance(record["git"]["changed"], bool)
    assert yaml.safe_load(checkpoint["config"])["data"]["init_args"]["context_length"] == 16
    assert checkpoint["PackedDataModule"]["identity"]["packing"] == "concat"


def test_other_data_is_refused_unless_told_to(tiny, capsys):
    assert main([*tiny, "--trainer.max_steps=2"]) == 0
    changed = [*tiny, "--resume", "--trainer.max_steps=3"]
    assert main([*changed, "--data.context_length=18"]) == 2
    line = error_line(capsys)
    assert "data.context_length: 16 -> 18" in line and "--data.check_resume=false" in line
    write_words("words.jsonl", [*WORDS, ("new", "N UW")])
    assert main(changed) == 2
    assert "data.source has other records" in error_line(capsys)
    assert main(["validate", *tiny[1:], f"--ckpt_path={LAST}"]) == 0  # measuring is not resuming
    assert main([*changed, "--data.check_resume=false"]) == 0
    assert state()["global_step"] == 3


def test_another_tokenizer_is_refused(tiny, capsys, tmp_path):
    import shutil

    assert main([*tiny, "--trainer.max_steps=2"]) == 0
    shutil.copytree(ROOT / "datamodules" / "data" / "cmudict", "tokenizer", ignore=shutil.ignore_patterns("*.xz"))
    path = Path("tokenizer/tokenizer.json")
    path.write_text(path.read_text().replace('"AA"', '"QQ"'))
    assert main([*tiny, "--resume", "--data.tokenizer=tokenizer"]) == 2
    assert "another tokenizer" in error_line(capsys)


def test_resume_auto_starts_what_has_not_begun(tiny, capsys):
    assert main([*tiny, "--resume"]) == 2
    assert "--resume=auto" in error_line(capsys)
    assert main([*tiny, "--resume=auto", "--trainer.max_steps=1"]) == 0
    assert main([*tiny, "--resume=auto", "--trainer.max_steps=2"]) == 0
    assert [path.name for path in Path("runs/tiny").iterdir()] == ["version_0"]
    assert main([*tiny, "--resume=runs/tiny/version_0", "--trainer.max_steps=3"]) == 0
    assert state()["global_step"] == 3
    assert main([*tiny, "--resume=nowhere"]) == 2
    assert "nowhere" in error_line(capsys)


def test_checkpoints_are_kept_without_being_asked_for(tiny, monkeypatch):
    monkeypatch.setattr("dllm_var.training.runs.SAVE_EVERY", 2)
    assert main([*tiny, "--trainer.callbacks=null"]) == 0
    names = sorted(path.name for path in LAST.parent.iterdir())
    best = [name for name in names if name.startswith("best")]
    kept = [name.split("-")[-1] for name in names if name.startswith("epoch")]
    assert kept == ["step=4.ckpt", "step=6.ckpt"] and len(best) == 1 and len(names) == 4 and names[-1] == "last.ckpt"
    assert state()["global_step"] == 7
    assert main([*tiny, "--trainer.callbacks=null", "--trainer.enable_checkpointing=false"]) == 0
    assert not list(Path("runs/tiny/version_1").rglob("*.ckpt"))
