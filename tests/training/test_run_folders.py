"""Where runs go, that each has a folder of its own, and that one process at a time goes on in it."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import lightning as L
import pytest
import yaml
from jsonargparse import dict_to_namespace
from test_locks import another_process
from tiny_data import write_tiny

from dllm_var.__main__ import main
from dllm_var.checkpoints.run_checkpoint import step_of
from dllm_var.errors import UserError
from dllm_var.training.run_folders import RunFolders, default_logger

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return ["fit", "--config", write_tiny()]


def logger(kind, save_dir, name, version=None):
    arguments = {"save_dir": str(save_dir), "name": name, "version": version}
    return {"class_path": f"lightning.pytorch.loggers.{kind}", "init_args": arguments}


def settings(**trainer):
    return dict_to_namespace(trainer)


def runs(folder="runs/tiny"):
    return sorted(path.name for path in Path(folder).iterdir())


def error_line(capsys):
    lines = capsys.readouterr().err.strip().splitlines()
    assert not any("Traceback" in line for line in lines)
    return lines[-1]


@pytest.mark.parametrize("kind", ["TensorBoardLogger", "CSVLogger"])
def test_runs_that_start_together_have_folders_of_their_own(kind, tmp_path):
    (tmp_path / "runs" / "version_7").mkdir(parents=True)
    trainers = [settings(logger=logger(kind, tmp_path, "runs")) for _ in range(40)]
    with ExitStack() as held, ThreadPoolExecutor(20) as pool:
        folders = [RunFolders(trainer) for trainer in trainers]
        list(pool.map(lambda one: one.reserve(held), folders))
        taken = sorted(trainer.logger.init_args.version for trainer in trainers)
        assert taken == list(range(8, 48))
        folders[9].begun = True
    assert runs(tmp_path / "runs") == sorted(["version_7", f"version_{trainers[9].logger.init_args.version}"])


def test_loggers_of_one_run_have_one_number(tmp_path):
    (tmp_path / "b" / "version_2").mkdir(parents=True)
    trainer = settings(logger=[logger("CSVLogger", tmp_path, "a"), logger("TensorBoardLogger", tmp_path, "b")])
    explicit = settings(logger=logger("CSVLogger", tmp_path, "a", "job_7"))
    with ExitStack() as held:
        RunFolders(trainer).reserve(held)
        RunFolders(explicit).reserve(held)
        assert [one.init_args.version for one in trainer.logger] == [3, 3]
        assert (tmp_path / "a" / "version_3").is_dir() and explicit.logger.init_args.version == "job_7"


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "runs").touch()
    for save_dir, name in ((tmp_path / "runs", "x"), (tmp_path, "runs")):
        with ExitStack() as held, pytest.raises(UserError, match=r"folder .*version_0: .*trainer\.default_root_dir"):
            RunFolders(settings(logger=logger("CSVLogger", save_dir, name))).reserve(held)


def test_what_has_no_run_folder_locks_where_its_checkpoints_go(tmp_path):
    own = {"class_path": "x.ModelCheckpoint", "init_args": {"dirpath": str(tmp_path / "kept")}}
    root = str(tmp_path)
    for trainer, folder in (
        (settings(logger=False, default_root_dir=root), "checkpoints"),
        (settings(logger=logger("CSVLogger", tmp_path, "a", 3)), "a/version_3"),
        (settings(logger=logger("CSVLogger", tmp_path, "a", 4), callbacks=own), "kept"),
    ):
        with another_process(tmp_path / folder), ExitStack() as held, pytest.raises(UserError, match=folder):
            RunFolders(trainer).enter(None, held, trains=True)
    for off in ({"enable_checkpointing": False}, {"fast_dev_run": 1}):
        with another_process(tmp_path / "checkpoints"), ExitStack() as held:
            RunFolders(settings(logger=False, default_root_dir=root, **off)).enter(None, held, trains=True)


def test_the_default_logger_s_runs_are_below_default_root_dir(monkeypatch):
    monkeypatch.setenv("HOME", "/home/x")
    for root, save_dir, expected in (
        (None, "runs", "runs"),
        ("~/elsewhere", "runs", "/home/x/elsewhere/runs"),
        ("/elsewhere", "logs", "logs"),
        (None, "~/runs", "/home/x/runs"),
    ):
        trainer = settings(default_root_dir=root, logger=default_logger("tiny"))
        trainer.logger.init_args.save_dir = save_dir
        assert RunFolders(trainer).runs == [Path(expected, "tiny")]
        assert trainer.logger.init_args.save_dir == expected
    for remote in (
        {"default_root_dir": "s3://bucket"},
        {"logger": logger("CSVLogger", "s3://bucket", "a")},
        {"callbacks": [{"class_path": "x.ModelCheckpoint", "init_args": {"dirpath": "s3://bucket"}}]},
    ):
        with pytest.raises(UserError, match="'s3://bucket' is no folder of this machine"):
            RunFolders(settings(**remote))


def test_runs_go_and_are_found_where_default_root_dir_says(tiny, tmp_path):
    there = ["--trainer.default_root_dir=there"]
    last = Path("there/runs/tiny/version_0/checkpoints/last.ckpt")
    assert main([*tiny, *there]) == 0 and main([*tiny, *there, "--resume", "--trainer.max_steps=3"]) == 0
    assert step_of(last) == 3 and runs("there/runs/tiny") == ["version_0"] and not Path("runs").exists()
    assert main(["validate", *tiny[1:], *there, "--ckpt_path=last"]) == 0
    saved = yaml.safe_load((last.parent.parent / "config.yaml").read_text())["trainer"]
    assert (saved["default_root_dir"], saved["logger"]["init_args"]["save_dir"]) == ("there", "runs")
    assert runs("there/runs/tiny") == ["validate", "version_0"] and runs("there/runs/tiny/validate") == ["version_0"]


def test_a_run_under_way_is_neither_resumed_nor_touched(tiny, capsys):
    assert main(tiny) == 0
    run = Path("runs/tiny/version_0")
    (run / "checkpoints" / "last.ckpt.partial").touch()  # the other one writes
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with another_process(run) as other:
        for resume in ("--resume", "--trainer.logger.version=0"):
            assert main([*tiny, resume, "--trainer.max_steps=4"]) == 2
            line = error_line(capsys)
            assert f"{run} is in use by process {other.pid}" in line
        assert {path: path.read_bytes() for path in before} == before
        assert main(tiny) == 0  # a new one
    assert main([*tiny, f"--resume={run}", "--trainer.max_steps=4"]) == 0
    assert step_of(run / "checkpoints" / "last.ckpt") == 4
    assert not list(run.rglob("*.partial")) and runs() == ["version_0", "version_1"]


def test_a_checkpoint_that_a_killed_run_had_set_aside_is_found_and_put_back(tmp_path):
    folder = tmp_path / "a" / "version_0" / "checkpoints"
    aside = folder / "last.ckpt.previous"
    aside.mkdir(parents=True)
    (aside / "meta.pt").touch()
    trainer = settings(logger=logger("CSVLogger", tmp_path, "a"))
    folders = RunFolders(trainer)
    assert folders.to_resume("newest") == aside
    with ExitStack() as held:
        folders.lock(held)
    assert folders.to_resume("newest") == folder / "last.ckpt"


def test_what_measures_keeps_out_of_the_folders_of_training(tiny, capsys):
    sizes = ["--data.source.validation_size=2", "--data.source.test_size=2", "--sampler.max_new_tokens=2"]
    assert main([*tiny, *sizes]) == 0
    before = {path: path.stat().st_mtime_ns for path in Path("runs/tiny/version_0").rglob("*")}
    for command in ("predict", "predict", "test"):
        assert main([command, *tiny[1:], *sizes, "--ckpt_path=last"]) == 0
    assert runs() == ["predict", "test", "version_0"] and runs("runs/tiny/predict") == ["version_0", "version_1"]
    assert "runs/tiny/predict/version_1/answers.jsonl" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in Path("runs/tiny/version_0").rglob("*")} == before
    assert main([*tiny, *sizes]) == 0 and runs() == ["predict", "test", "version_0", "version_1"]


@pytest.mark.parametrize("change", ["--model.transformer.hidden_size=32", "--model.optimizer.lr=0.5"])
def test_a_refused_resume_leaves_the_settings_of_the_run_alone(change, tiny, capsys):
    assert main(tiny) == 0
    before = Path("runs/tiny/version_0/config.yaml").read_bytes()
    assert main([*tiny, "--resume", "--trainer.max_steps=4", change]) == 2
    line = error_line(capsys)
    assert "set it back" in line or "use the settings it was trained with" in line
    assert [path.read_bytes() for path in Path("runs").rglob("config*.yaml")] == [before]


class Fails(L.Callback):
    """Fails once the loggers have made their files."""

    def on_fit_start(self, trainer, pl_module):
        assert list(Path(trainer.log_dir).iterdir())
        raise UserError("not today: come back")


def test_a_run_that_fails_before_its_first_step_leaves_no_folder(tiny, capsys):
    assert main([*tiny, f"--trainer.callbacks+={__name__}.Fails"]) == 2
    assert error_line(capsys) == "error: not today: come back" and not runs()


def test_settings_that_fail_or_are_only_shown_leave_no_folder(tiny, capsys):
    assert main([*tiny, "--data.context_length=-1"]) == 2
    assert main([*tiny, "--print_config"]) == 0
    assert not list(Path("runs").rglob("version_*"))


@pytest.mark.slow
def test_two_processes_of_two_runs_started_together(tiny):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    two = ["--trainer.strategy=ddp", "--trainer.devices=2"]
    command = [sys.executable, "-m", "dllm_var", *tiny, *two]
    started = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], errors
    assert runs() == ["version_0", "version_1"]
    for run in runs():
        assert step_of(Path("runs/tiny") / run / "checkpoints" / "last.ckpt") == 2
