"""How runs end and go on: signals, full disks, exceptions, damaged checkpoints, other data; bit for bit."""

import errno
import os
import shutil
import signal
import time
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from tiny_data import write_words
from tiny_run import LAST, WORDS, added, error_line, event, kept, notes, same, state, tiny, whole  # noqa: F401 - fixtures

from dllm_var.__main__ import main
from dllm_var.training import interrupt

ROOT = Path(__file__).parent.parent.parent
SAVER = "lightning.pytorch.callbacks.ModelCheckpoint"


# -- signals -----------------------------------------------------------------------------------------------------------


def test_a_run_stopped_in_a_step_goes_on_bit_for_bit(tiny, whole, capsys):  # noqa: F811
    before = {number: signal.getsignal(number) for number in interrupt.SIGNALS}
    assert main([*tiny, *event("SIGINT", 4)]) == 130
    assert {number: signal.getsignal(number) for number in interrupt.SIGNALS} == before
    assert state()["global_step"] == 4
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "stopped at step 4" in line and str(LAST) in line and line.endswith("--resume")
    assert main([*tiny, "--resume"]) == 0
    assert notes() == whole[0]  # rows, draws of all generators, losses, validation, the end; nothing twice
    assert same(state(), whole[1])


def test_a_run_that_saves_in_the_background_goes_on_bit_for_bit(tiny, whole, monkeypatch):  # noqa: F811
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda *arguments: (time.sleep(0.1), save(*arguments)))  # some steps
    lightnings = "--trainer.plugins=lightning.pytorch.plugins.io.AsyncCheckpointIO"
    assert main([*tiny, lightnings, *event("SIGTERM", 5)]) == 143  # the end of an epoch
    assert state()["global_step"] == 5  # written before the run said so
    ours = ["--config", str(ROOT / "configs" / "background_checkpoints.yaml")]
    assert main([*tiny, *ours, "--resume"]) == 0
    assert same(state(), whole[1]) and kept() == whole[2]


@pytest.mark.slow
@pytest.mark.parametrize("validation", ["every 3 steps", "at the end of epochs"])
def test_any_step_and_any_validation_is_one_to_go_on_from(validation, tiny):  # noqa: F811
    if validation != "every 3 steps":
        tiny += ["--trainer.val_check_interval=1.0", "--trainer.check_val_every_n_epoch=1"]
    tiny += ["--trainer.max_steps=8"]
    assert main(tiny) == 0
    expected = notes(), state()
    for number, (step, where) in enumerate([(s, w) for s in (1, 3, 5, 6) for w in ("step", "validation")], 1):
        version = f"--trainer.logger.version={number}"
        if main([*tiny, *event("SIGTERM", step, where), version]) == 0:  # no validation at this step
            assert notes() == expected[0]
            continue
        assert main([*tiny, "--resume", version]) == 0
        assert notes() == expected[0], (step, where)
        assert same(state(f"runs/tiny/version_{number}/checkpoints/last.ckpt"), expected[1]), (step, where)


@pytest.mark.slow
def test_validation_that_was_cut_short_is_done_again_as_a_whole(tiny, whole):  # noqa: F811
    assert main([*tiny, *event("SIGTERM", 3, "validation")]) == 143
    assert state()["global_step"] == 3
    with pytest.raises(KeyError):  # the checkpoint of step 6 is written before validation
        main([*tiny, *event("error", 6, "validation"), "--resume"])
    assert main([*tiny, "--resume"]) == 0
    assert notes() == whole[0]
    assert same(state(), whole[1])


def test_sigterm_after_the_last_step_does_not_wait(tiny, capsys):  # noqa: F811
    assert main([*tiny, *event("SIGTERM", where="end")]) == 143
    assert "after the last step" in capsys.readouterr().err
    assert state()["global_step"] == 7 and notes()[-1] == ["end", 7]
    assert main([*tiny, "--resume"]) == 0
    assert notes() == [["end", 7]]  # it ends once more, without a step


def test_sigusr1_saves_and_goes_on(tiny, capsys):  # noqa: F811
    assert main([*tiny, *event("SIGUSR1", 5), "--trainer.max_steps=5"]) == 0
    assert f"saved {LAST} at step 5" in capsys.readouterr().out.replace(str(Path.cwd()) + "/", "")


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


def test_in_slurm_sigusr1_requeues_and_the_same_command_goes_on(tiny, slurm, capsys, monkeypatch):  # noqa: F811
    assert main([*tiny, *event("SIGUSR1", 4)]) == 128 + signal.SIGUSR1
    assert slurm.read_text() == "requeue 77\n"
    assert "SLURM runs the job again" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert main([*tiny, "--trainer.max_steps=5"]) == 0
    assert state()["global_step"] == 5 and [path.name for path in Path("runs/tiny").iterdir()] == ["version_0"]


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
    assert "'scontrol'" in capsys.readouterr().out


# -- failures ----------------------------------------------------------------------------------------------------------


def test_a_full_disk(tiny, capsys, monkeypatch):  # noqa: F811
    save, saves = torch.save, []

    def full(checkpoint, file):
        saves.append(checkpoint["global_step"])
        if len(saves) == 4:  # step 2 and last, step 4, and now last
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(checkpoint, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        assert main(tiny) == 2
    line = error_line(capsys)
    assert "No space left on device" in line and "step=4.ckpt is whole" in line and "--resume" in line
    assert kept() == ["epoch=0-step=2.ckpt", "epoch=0-step=4.ckpt", "last.ckpt"]
    assert state()["global_step"] == 2 and saves == [2, 2, 4, 4]


def test_an_exception_in_a_callback_leaves_the_last_step(tiny):  # noqa: F811
    with pytest.raises(KeyError, match="a bug") as caught:
        main([*tiny, *event("error", 3, "validation")])
    assert state()["global_step"] == 3  # between two steps: nothing is lost
    if hasattr(caught.value, "__notes__"):
        assert "go on with --resume" in caught.value.__notes__[0] and "last.ckpt" in caught.value.__notes__[0]
    with pytest.raises(KeyError):
        main([*tiny, *event("error", 6), "--resume"])
    assert state()["global_step"] == 4  # in the midst of step 6


def test_a_checkpoint_saved_in_the_midst_of_a_batch_trains_the_batch_again(tiny, whole):  # noqa: F811
    saver = added(("lightning.pytorch.callbacks.OnExceptionCheckpoint", {"dirpath": "failed"}))
    with pytest.raises(KeyError):
        main([*tiny, *saver, *event("error", 5)])
    before = notes()
    assert main([*tiny, "--resume=failed/on_exception.ckpt"]) == 0
    assert before[:-1] + notes() == whole[0]
    assert same(state("runs/tiny/version_1/checkpoints/last.ckpt"), whole[1])


def test_leftovers_of_a_kill_are_cleared(tiny):  # noqa: F811
    assert main([*tiny, "--trainer.max_steps=2"]) == 0
    more = {"class_path": SAVER, "init_args": {"dirpath": "kept", "every_n_train_steps": 100}}
    Path("more.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks+": [more]}}))
    Path("kept").mkdir()
    for leftover in (LAST.with_name("last.ckpt.partial"), Path("kept/a.ckpt.saving")):
        leftover.write_bytes(b"half")
    LAST.rename(LAST.with_name("last.ckpt.previous"))  # it was being replaced
    assert main([*tiny, "--config", "more.yaml", "--resume", "--trainer.max_steps=3"]) == 0
    assert kept() == ["epoch=0-step=2.ckpt", "last.ckpt"] and not list(Path("kept").iterdir())
    assert state()["global_step"] == 3


# -- checkpoints that do not do ----------------------------------------------------------------------------------------


def test_a_damaged_newest_checkpoint_is_named_and_another_offered(tiny, whole, capsys):  # noqa: F811
    assert main(tiny) == 0
    notes()
    content = LAST.read_bytes()
    weights = max(state()["state_dict"].values(), key=torch.numel).numpy().tobytes()
    place = content.index(weights) + len(weights) // 2
    LAST.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
    assert main([*tiny, "--resume"]) == 2
    line = error_line(capsys)
    assert f"{LAST} is damaged" in line and "checksum" in line
    option = line.split()[-1]
    assert option.startswith("--resume=") and option.endswith("step=6.ckpt")
    assert main([*tiny, option]) == 0
    assert [path.name for path in Path("runs/tiny").iterdir()] == ["version_0"]
    assert same(state(), whole[1])
    assert notes() == whole[0][-4:]  # with the validation of step 6, which its checkpoint precedes
    LAST.write_bytes(content[:1000])
    assert main(["validate", *tiny[1:], f"--ckpt_path={LAST}"]) == 2
    line = error_line(capsys)
    assert "cut short" in line and "--ckpt_path=" in line


def test_what_is_no_checkpoint_of_ours(tiny, capsys):  # noqa: F811
    Path("kept").mkdir()
    own = [f"--trainer.callbacks={SAVER}", "--trainer.callbacks.dirpath=kept", "--resume"]
    torch.save({"state_dict": {}, "global_step": 1}, "kept/last.ckpt")
    assert main([*tiny, *own]) == 2
    assert "kept/last.ckpt is not a checkpoint of a training run" in error_line(capsys)
    Path("kept/last.ckpt").write_text("notes")
    assert main([*tiny, *own]) == 2
    assert "kept/last.ckpt is not a checkpoint" in error_line(capsys)


@pytest.mark.slow
def test_a_checkpoint_records_what_made_it_and_other_data_is_refused(tiny, capsys):  # noqa: F811
    assert main([*tiny, "--trainer.max_steps=2"]) == 0
    checkpoint = torch.load(LAST, weights_only=True)
    record = checkpoint["dllm_var"]
    assert record["versions"]["torch"] == torch.__version__ and record["versions"]["lightning"] == L.__version__
    if (ROOT / ".git").exists():
        assert len(record["git"]["commit"]) == 40 and isinstance(record["git"]["changed"], bool)
    assert yaml.safe_load(checkpoint["config"])["data"]["init_args"]["context_length"] == 16
    changed = [*tiny, "--resume", "--trainer.max_steps=3"]
    shutil.copytree(ROOT / "datamodules" / "data" / "cmudict", "tokenizer", ignore=shutil.ignore_patterns("*.xz"))
    path = Path("tokenizer/tokenizer.json")
    path.write_text(path.read_text().replace('"AA"', '"QQ"'))
    assert main([*changed, "--data.tokenizer=tokenizer"]) == 2
    assert "another tokenizer" in error_line(capsys)
    write_words("words.jsonl", [*WORDS, ("new", "N UW")])
    assert main(changed) == 2
    assert "data.source has other records" in error_line(capsys)
    assert main(["validate", *tiny[1:], f"--ckpt_path={LAST}"]) == 0  # measuring is not resuming
    assert main([*changed, "--data.check_resume=false"]) == 0
    assert state()["global_step"] == 3


def test_resume_auto_starts_what_has_not_begun(tiny, capsys):  # noqa: F811
    assert main([*tiny, "--resume"]) == 2
    assert "--resume=auto" in error_line(capsys)
    assert main([*tiny, "--resume=auto", "--trainer.max_steps=1"]) == 0
    assert main([*tiny, "--resume=auto", "--trainer.max_steps=2"]) == 0
    assert [path.name for path in Path("runs/tiny").iterdir()] == ["version_0"]
    assert state()["global_step"] == 2
    assert main([*tiny, "--resume=nowhere"]) == 2
    assert "nowhere" in error_line(capsys)


def test_checkpoints_are_kept_without_being_asked_for(tiny, monkeypatch):  # noqa: F811
    monkeypatch.setattr("dllm_var.training.trainer.SAVE_EVERY", 2)
    assert main([*tiny, "--trainer.callbacks=null"]) == 0
    best, *others = kept()
    assert best.startswith("best") and others == ["epoch=0-step=4.ckpt", "epoch=1-step=6.ckpt", "last.ckpt"]
    assert state()["global_step"] == 7
    assert main([*tiny, "--trainer.callbacks=null", "--trainer.enable_checkpointing=false"]) == 0
    assert not list(Path("runs/tiny/version_1").rglob("*.ckpt"))
