"""The command line as a user meets it, mostly in this process; real signals and processes are marked slow."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from tiny_data import write_tiny

from dllm_var import DiffusionLM, UserError
from dllm_var.__main__ import COMMANDS, main
from dllm_var.cli.fit import resume_command, tell_thread_failure
from dllm_var.datamodules import CmudictSource, PackedDataModule

ROOT = Path(__file__).parent.parent.parent
HERE = __name__  # where this file's classes are found by class_path

SAMPLER = "{class_path: dllm_var.sampling.BlockDiffusionSampler, init_args: {%s}}"
OBJECTIVE = "{class_path: dllm_var.objectives.EosSchedule, init_args: {%s}}"
MONITOR = "{class_path: dllm_var.callbacks.SpeedMonitor, init_args: {%s}}"


class PlainModel(L.LightningModule):
    """No relative of DiffusionLM.

    Args:
        width: Any number.
    """

    def __init__(self, width: int = 2) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, width)


class NamedModel(DiffusionLM):
    """A DiffusionLM with one more setting."""

    def __init__(self, note: str = "", **kwargs) -> None:
        super().__init__(**kwargs)
        self.note = note


class NamedData(PackedDataModule):
    """A PackedDataModule with one more setting."""

    def __init__(self, note: str = "", **kwargs) -> None:
        super().__init__(**kwargs)
        self.note = note


class MistakenSource(CmudictSource):
    """Raises what a user can mend."""

    def __init__(self, path: str = "here") -> None:
        raise UserError(f"data.source.path: nothing at {path}")


class BrokenSource(CmudictSource):
    """Has a bug."""

    def __init__(self) -> None:
        raise KeyError("bug")


class PressCtrlC(Callback):
    """Sends this process the signal of Ctrl-C in the middle of a step.

    Args:
        step: The step, from 1.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if trainer.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A config of a model that trains in a blink, in a working folder of its own."""
    monkeypatch.chdir(tmp_path)
    return write_tiny()


def write(name, content):
    Path(name).write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return name


def settings(capsys, *arguments, command="fit"):
    """Returns the settings that --print_config shows."""
    assert main([command, *arguments, "--print_config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def complaint(capsys, *arguments):
    """Runs a command that must fail for the user's mistake, and returns the one line it says."""
    assert main(list(arguments)) == 2
    text = capsys.readouterr().err.strip().splitlines()[-1]
    assert text.startswith("error: ")
    return text


def in_new_process(code, *arguments, **kwargs):
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, **kwargs
    )


# -- help --------------------------------------------------------------------------------------------------------------


def test_help_is_quick_and_imports_nothing_heavy():
    code = (
        "import runpy, sys, atexit\n"
        "heavy = 'torch lightning transformers datasets jsonargparse numpy'.split()\n"
        "atexit.register(lambda: print([name for name in heavy if name in sys.modules]))\n"
        "sys.argv = ['dllm_var', '--help']\n"
        "runpy.run_module('dllm_var', run_name='__main__')\n"
    )
    start = time.perf_counter()
    result = in_new_process(code)
    assert time.perf_counter() - start < 3
    assert result.stdout.splitlines()[-1] == "[]", result.stderr
    for command in COMMANDS:
        assert sum(line.split()[:1] == [command] for line in result.stdout.splitlines()) == 1


@pytest.mark.parametrize(("arguments", "shown"), [([], "generate"), (["-h"], "generate"), (["--version"], "dllm-var ")])
def test_help_and_version(arguments, shown, capsys):
    assert main(arguments) == 0
    assert shown in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"python -m dllm_var {command}" in text
    if command == "fit":
        assert "--model.objective" in text and "--data.context_length" in text and "--trainer.max_steps" in text


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--model.sed=1"], ["model.sed", "did you mean 'model.seed'"]),
        (["--model.transformer.hiden_size=1"], ["model.transformer.hiden_size", "hidden_size"]),
        (["--trainer.max_step=1"], ["trainer.max_step", "trainer.max_steps"]),
        (["--data.batch_size=many"], ["data.batch_size", "int", "many"]),
        (["--trainer.max_steps=many"], ["trainer.max_steps", "int", "many"]),
        (["--model.attention=none"], ["model.attention", "document", "full"]),
        (["--data.source.path=[1]"], ["data.source.path"]),
        (["--model.objective=Nowhere"], ["model.objective", "Nowhere"]),
        (["--model.objective=dllm_var.objectives.Nowhere"], ["model.objective", "Nowhere"]),
        (["--trainer.callbacks+=Nowhere"], ["trainer.callbacks", "Nowhere"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["--config=nowhere.yaml"], ["nowhere.yaml"]),
        (["--ckpt_path=nowhere.ckpt"], ["ckpt_path", "nowhere.ckpt"]),
        (["--model.seed=${data.sed}"], ["${data.sed} names no setting", "did you mean 'seed'"]),
        (["--model.seed=${vars.x}"], ["${vars.x} names no setting"]),
        (["--vars.x=a: {"], ["--vars.x", "not YAML"]),
        (["--model.seed=${data.seed}", "--data.seed=${model.seed}"], ["ecursive"]),
        (["--data.cache_dir=${oc.env:DLLM_VAR_NOT_THERE}"], ["data.cache_dir", "DLLM_VAR_NOT_THERE"]),
        (["--model=3"], ["model"]),
        (["--trainer=3"], ["trainer"]),
        (["stray"], ["stray"]),
        (["--ckpt_path=last"], ["no checkpoint", "runs/tiny"]),
        (["--ckpt_path=best"], ["ckpt_path", "best"]),
        (["--ckpt_path=."], ["ckpt_path", "no checkpoint in '.'"]),
        (["--trainer.strategy=somehow"], ["trainer", "strategy", "somehow"]),
        (["--trainer.accelerator=cuda"], ["CUDA"]),
        (
            ["--trainer.callbacks+=dllm_var.callbacks.SamplingCallback", "--trainer.callbacks.sampler=x"],
            ["sampler"],
        ),
    ],
)
def test_mistakes_are_told_in_one_line(changes, words, tiny, capsys):
    text = complaint(capsys, "fit", "--config", tiny, *changes)
    assert all(word in text for word in words), text
    assert len(text) < 300


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("model: [a\n", ["bad.yaml", "line 2"]),
        ("just words\n", ["bad.yaml", "no settings"]),
        ("\x00", ["bad.yaml"]),
        ("modle: {seed: 1}\n", ["modle"]),
        ("model: {sed: 1}\n", ["model.sed", "'model.seed'"]),
        ("seed_everything: -1\n", ["seed_everything", "got -1"]),
        ("trainer: {gradient_clip_val: -1}\n", ["trainer.gradient_clip_val", "at least 0", "got -1"]),
        ("trainer: {accumulate_grad_batches: 0}\n", ["trainer.accumulate_grad_batches", "at least 1", "got 0"]),
        (f"model: {{objective: {OBJECTIVE % 'tmax: 1'}}}\n", ["model.objective.tmax", "'model.objective.t_max'"]),
        ("data: {batch_size: [1]}\n", ["data.batch_size", "int"]),
        (f"trainer: {{callbacks: [{MONITOR % 'x: 1'}]}}\n", ["trainer.callbacks", "x"]),
    ],
)
def test_mistakes_in_files_are_told_in_one_line(content, words, tiny, capsys):
    text = complaint(capsys, "fit", "--config", tiny, "--config", write("bad.yaml", content))
    assert all(word in text for word in words), text


def test_unknown_command(capsys):
    assert "no command 'fits'" in complaint(capsys, "fits")


def test_mistake_found_by_a_constructor(tiny, capsys):
    text = complaint(capsys, "fit", "--config", tiny, f"--data.source={HERE}.MistakenSource", "--data.source.path=p")
    assert text == "error: data.source.path: nothing at p"


def test_bug_keeps_its_traceback(tiny):
    with pytest.raises(Exception, match="bug"):
        main(["fit", "--config", tiny, f"--data.source={HERE}.BrokenSource"])


# -- settings ----------------------------------------------------------------------------------------------------------


def test_references_across_files_and_command_line(tiny, capsys):
    first = write(
        "a.yaml", "model: {seed: '${vars.seed}'}\ndata: {seed: '${model.seed}', batch_size: '${vars.rows}'}\n"
    )
    second = write("b.yaml", "vars: {seed: 5, rows: 3}\n")
    files = ["--config", tiny, "--config", first, "--config", second]
    found = settings(capsys, *files, "--vars.rows=4", "--trainer.max_steps=${data.batch_size}")
    assert found["model"]["init_args"]["seed"] == found["data"]["init_args"]["seed"] == 5
    assert found["data"]["init_args"]["batch_size"] == found["trainer"]["max_steps"] == 4


def test_a_default_can_be_referred_to(capsys):
    found = settings(capsys, "--model.seed=${data.context_length}")
    assert found["model"]["init_args"]["seed"] == found["data"]["init_args"]["context_length"]


def test_sections_can_be_shared_by_reference(tiny, capsys):
    shared = write(
        "shared.yaml",
        f"vars: {{sampler: {SAMPLER % 'block_length: 8'}}}\n"
        "trainer:\n  callbacks+:\n  - class_path: dllm_var.callbacks.SamplingCallback\n"
        "    init_args: {sampler: '${vars.sampler}'}\n",
    )
    found = settings(capsys, "--config", tiny, "--config", shared, "--vars.sampler.init_args.block_length=4")
    *_, sampling = found["trainer"]["callbacks"]
    assert sampling["init_args"]["sampler"]["init_args"]["block_length"] == 4


def test_vars_are_merged_value_by_value(capsys):
    first = ["--vars.a.b=1", "--vars.a.c", "[2, x]"]
    assert settings(capsys, *first, "--vars.a.b=${vars.n}", "--vars.n=7")["vars"] == {
        "a": {"b": 7, "c": [2, "x"]},
        "n": 7,
    }


def test_callbacks_can_be_appended(tiny, capsys):
    more = write("more.yaml", "trainer: {callbacks+: [{class_path: dllm_var.callbacks.SpeedMonitor}]}\n")
    found = settings(capsys, "--config", tiny, "--config", more, "--trainer.callbacks+=LearningRateMonitor")
    names = [callback["class_path"].rsplit(".", 1)[-1] for callback in found["trainer"]["callbacks"]]
    assert names == ["ModelCheckpoint", "SpeedMonitor", "LearningRateMonitor"]


def test_default_classes_are_replaceable(tiny, capsys):
    own = write("own.yaml", {"model": {"class_path": f"{HERE}.NamedModel", "init_args": {"note": "n"}}})
    found = settings(capsys, "--config", tiny, "--config", own, f"--data={HERE}.NamedData", "--data.note=${model.note}")
    assert found["model"]["class_path"] == f"{HERE}.NamedModel"
    assert found["model"]["init_args"]["transformer"]["hidden_size"] == 16  # what came before stays
    assert found["data"]["class_path"] == f"{HERE}.NamedData"
    assert found["data"]["init_args"]["note"] == "n"
    assert found["data"]["init_args"]["context_length"] == 16


def test_any_lightning_module_will_do(capsys):
    found = settings(capsys, f"--model={HERE}.PlainModel", "--model.width=3")
    assert found["model"]["init_args"] == {"width": 3}


def test_objective_is_replaceable(tiny, capsys):
    found = settings(
        capsys, "--config", tiny, "--model.objective=dllm_var.objectives.EosSchedule", "--model.objective.t_max=0.5"
    )
    assert found["model"]["init_args"]["objective"]["init_args"]["t_max"] == 0.5


CONFIGS = sorted(path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_config_parses(config, capsys):
    base = ["--config", str(ROOT / "configs" / "quickstart.yaml")] if config.parent.name != "configs" else []
    settings(capsys, *base, "--config", str(ROOT / config))


# -- runs --------------------------------------------------------------------------------------------------------------


def test_fit_saves_settings_that_run_again(tiny, capsys):
    assert main(["fit", "--config", tiny, "--trainer.max_steps=${vars.steps}", "--vars.steps=1"]) == 0
    run = Path("runs/tiny/version_0")
    saved = (run / "config.yaml").read_text()
    assert yaml.safe_load(saved)["trainer"]["max_steps"] == 1
    assert "Unable to serialize" not in saved
    assert "max_steps: 1" in text_in_tensorboard(run)["config"]

    assert main(["fit", "--config", str(run / "config.yaml")]) == 0
    assert (run.parent / "version_1" / "config.yaml").read_text() == saved


def text_in_tensorboard(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run))
    events.Reload()
    return {
        tag.split("/")[0]: events.Tensors(tag)[0].tensor_proto.string_val[0].decode()
        for tag in events.Tags()["tensors"]
    }


def test_without_a_logger_no_settings_are_left_behind(tiny):
    for _ in range(2):
        assert main(["fit", "--config", tiny, "--trainer.logger=false", "--trainer.max_steps=1"]) == 0
    assert not list(Path().glob("*config.yaml"))


def steps_of(path):
    return torch.load(path, weights_only=True)["global_step"]


def test_resume_continues_the_newest_run(tiny, capsys):
    assert main(["fit", "--config", tiny]) == 0
    run = Path("runs/tiny/version_0")
    first = (run / "config.yaml").read_text()
    assert main(["fit", "--config", tiny, "--resume", "--trainer.max_steps=4"]) == 0
    assert [path.name for path in run.parent.iterdir()] == ["version_0"]
    assert steps_of(run / "checkpoints" / "last.ckpt") == 4
    assert (run / "config.1.yaml").read_text() == first
    again = yaml.safe_load((run / "config.yaml").read_text())
    assert again["ckpt_path"] is None and again["trainer"]["logger"]["init_args"]["version"] is None
    assert again["trainer"]["max_steps"] == 4


def test_the_last_step_is_never_lost(tiny):
    assert main(["fit", "--config", tiny, "--trainer.max_steps=3"]) == 0  # saves every 2
    last = Path("runs/tiny/version_0/checkpoints/last.ckpt")
    assert steps_of(last) == 3
    assert main(["fit", "--config", tiny, "--resume", "--trainer.max_steps=5"]) == 0
    assert steps_of(last) == 5
    assert len(list(last.parent.iterdir())) == 2

    never = ["--trainer.val_check_interval=100", "--trainer.check_val_every_n_epoch=null"]
    plain = ["--trainer.callbacks=null", "--trainer.max_steps=1", *never]
    assert main(["fit", "--config", tiny, *plain]) == 0
    assert steps_of("runs/tiny/version_1/checkpoints/last.ckpt") == 1
    assert main(["fit", "--config", tiny, *plain, "--trainer.enable_checkpointing=false"]) == 0
    assert not list(Path("runs/tiny/version_2").rglob("*.ckpt"))


def test_resume_skips_runs_without_a_checkpoint(tiny):
    assert main(["fit", "--config", tiny]) == 0
    Path("runs/tiny/version_7/checkpoints").mkdir(parents=True)
    assert main(["fit", "--config", tiny, "--resume", "--trainer.max_steps=3"]) == 0
    assert not list(Path("runs/tiny/version_7/checkpoints").iterdir())


def test_resume_follows_a_folder_of_one_s_own(tiny):
    own = ["--trainer.callbacks.dirpath=kept"]
    assert main(["fit", "--config", tiny, *own]) == 0
    arguments = {"dirpath": "kept", "save_last": True, "every_n_train_steps": 2}
    one = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": arguments}
    alone = ["--config", write("one.yaml", {"trainer": {"callbacks": one}})]  # a callback needs no list around it
    assert main(["fit", "--config", tiny, *alone, "--resume", "--trainer.max_steps=4"]) == 0
    assert steps_of("kept/last.ckpt") == 4


def test_resume_without_a_checkpoint_names_the_folder(tiny, capsys):
    assert "runs/tiny" in complaint(capsys, "fit", "--config", tiny, "--resume")


def test_resume_is_for_fit_and_finds_its_own_file(tiny, capsys):
    assert "--resume" in complaint(capsys, "validate", "--config", tiny, "--resume")
    Path("x.ckpt").touch()
    assert "--ckpt_path=x.ckpt" in complaint(capsys, "fit", "--config", tiny, "--resume", "--ckpt_path=x.ckpt")


def test_a_checkpoint_does_not_change_the_settings(tiny):
    assert main(["fit", "--config", tiny, "--model.seed=1"]) == 0
    last = "runs/tiny/version_0/checkpoints/last.ckpt"
    on = [f"--ckpt_path={last}", "--data.check_resume=false", "--trainer.max_steps=3"]
    assert main(["fit", "--config", tiny, "--model.seed=2", *on]) == 0
    saved = yaml.safe_load(Path("runs/tiny/version_1/config.yaml").read_text())
    assert saved["model"]["init_args"]["seed"] == 2


def test_validate_and_test_a_checkpoint(tiny, capsys):
    assert main(["fit", "--config", tiny]) == 0
    last = "runs/tiny/version_0/checkpoints/last.ckpt"
    assert main(["validate", "--config", tiny, f"--ckpt_path={last}"]) == 0
    assert "val/loss" in capsys.readouterr().out


def test_last_means_the_newest_run(tiny):
    assert main(["fit", "--config", tiny]) == 0
    assert main(["fit", "--config", tiny, "--ckpt_path=last", "--trainer.max_steps=4"]) == 0
    assert [path.name for path in Path("runs/tiny").iterdir()] == ["version_0"]
    assert main(["validate", "--config", tiny, "--ckpt_path=last"]) == 0
    saved = yaml.safe_load(Path("runs/tiny/version_1/config.yaml").read_text())
    assert saved["ckpt_path"] == "runs/tiny/version_0/checkpoints/last.ckpt"


def test_a_run_folder_stands_for_its_newest_checkpoint(tiny):
    assert main(["fit", "--config", tiny]) == 0
    assert main(["fit", "--config", tiny, "--ckpt_path=runs/tiny/version_0", "--trainer.max_steps=4"]) == 0
    assert steps_of("runs/tiny/version_1/checkpoints/last.ckpt") == 4


def test_resume_command_drops_the_first_checkpoint():
    settings = ["--config", "a b.yaml", "--ckpt_path", "x.ckpt", "--ckpt_path=y.ckpt", "--trainer.max_steps=4"]
    expected = "python -m dllm_var fit --config 'a b.yaml' --trainer.max_steps=4 --resume"
    assert resume_command(settings) == expected


def test_ctrl_c_saves_the_finished_step_and_tells_how_to_go_on(tiny, capsys):
    before = signal.getsignal(signal.SIGINT)
    pressed = write(
        "c.yaml", {"trainer": {"callbacks+": [{"class_path": f"{HERE}.PressCtrlC", "init_args": {"step": 3}}]}}
    )
    assert main(["fit", "--config", tiny, "--config", pressed, "--trainer.max_steps=9"]) == 130
    assert signal.getsignal(signal.SIGINT) is before
    last = Path("runs/tiny/version_0/checkpoints/last.ckpt")
    assert steps_of(last) == 3
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert str(last) in line and "step 3" in line and line.endswith("--resume")

    assert main(["fit", "--config", tiny, "--resume", "--trainer.max_steps=6"]) == 0
    assert steps_of(last) == 6
    assert len(list(last.parent.iterdir())) == 2  # the newest and last.ckpt, nothing left over from the stop


@pytest.mark.slow
@pytest.mark.parametrize(
    ("times", "options"),
    [(1, []), (2, []), (1, ["--trainer.devices=2", "--trainer.strategy=ddp"])],
    ids=["once", "twice", "two ranks"],
)
def test_ctrl_c_in_processes_of_its_own(times, options, tiny):
    arguments = ["fit", "--config", tiny, "--trainer.max_steps=1000000", "--trainer.limit_val_batches=0", *options]
    process = subprocess.Popen(
        [sys.executable, "-m", "dllm_var", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    last = Path("runs/tiny/version_0/checkpoints/last.ckpt")
    try:
        deadline = time.monotonic() + 120
        while not last.exists():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        for _ in range(times):
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the job
        _, errors = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert steps_of(last) > 0


def test_a_launcher_variable_that_is_no_number_is_named(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "x")
    assert main(["fit"]) == 2
    assert capsys.readouterr().err.startswith("error: the environment variable LOCAL_RANK must be a number, got 'x'")


def test_what_a_thread_cannot_write_is_told_in_one_line(monkeypatch, capsys):
    def write():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), b"events")

    monkeypatch.setattr(threading, "excepthook", tell_thread_failure)
    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    told = "warning: cannot write events: No space left on device; make room, or write to another disk\n"
    assert capsys.readouterr().err == told
