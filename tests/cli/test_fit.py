"""The command line as a user meets it, mostly in this process; real signals and processes are marked slow."""

import contextlib
import errno
import os
import shlex
import shutil
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
from tiny_data import write_tiny

from dllm_var import DiffusionLM, UserError
from dllm_var.__main__ import COMMANDS, SPINS, main
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
    run = [sys.executable, "-c", code]
    result = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert time.perf_counter() - start < 3
    assert result.stdout.splitlines()[-1] == "[]", result.stderr
    for command in COMMANDS:
        assert sum(line.split()[:1] == [command] for line in result.stdout.splitlines()) == 1


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, str(SPINS)), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_idle_threads_sleep_soon_unless_the_environment_says_otherwise(given, spins, monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    code = (
        "import os, sys\n"
        "from dllm_var import __main__ as program\n"
        "found = lambda name: print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules) or sys.exit()\n"
        "program.import_module = found\n"  # the command's module, before it imports torch
        "program.run(['fit'])\n"
    )
    run = [sys.executable, "-c", code]
    result = subprocess.run(run, cwd=ROOT, env={**os.environ, **given}, capture_output=True, text=True, check=True)
    assert result.stdout == f"{spins} False\n"


@pytest.mark.parametrize(("arguments", "shown"), [([], "generate"), (["-h"], "generate"), (["--version"], "dllm-var ")])
def test_help_and_version(arguments, shown, capsys):
    assert main(arguments) == 0
    assert shown in capsys.readouterr().out


@pytest.mark.parametrize("command", sorted({"validate", "test"} ^ set(COMMANDS)))  # these two are like predict
def test_every_command_has_help(command, capsys):
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"python -m dllm_var {command}" in text
    if command == "fit":
        assert text.count("  python -m dllm_var fit ") == 3
        inner = ("--model.objective ", "--data.context_length ", "--model.transformer.hidden_size ")
        places = [text.index(setting) for setting in (*inner, "--trainer.max_steps ")]
        assert max(places) == places[-1]


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ("--model.sed=1", ["model: DiffusionLM has no setting 'sed'; did you mean 'seed'?"]),
        (
            "--model.transformer.hiden_size=1",
            ["model.transformer: ", "no setting 'hiden_size'; did you mean 'hidden_size'?"],
        ),
        ("--model.optimizer=torch.optim.AdamW --model.optimizer.lrr=1", ["model.optimizer", "'lrr'", "'lr'"]),
        ("--model.attention=none", ["model.attention", "document", "full"]),
        ("--data.source.path=[1]", ["data.source.path"]),
        ("--model.objective=dllm_var.objectives.Nowhere", ["model.objective", "Nowhere"]),
        ("--trainer.callbacks+=Nowhere", ["trainer.callbacks", "Nowhere"]),
        ("--config nowhere.yaml", ["nowhere.yaml"]),
        ("--ckpt_path=nowhere.ckpt", ["ckpt_path", "nowhere.ckpt"]),
        ("--model.seed=${data.sed}", ["${data.sed} names no setting", "did you mean 'seed'"]),
        ("--model.seed=${vars.x}", ["${vars.x} names no setting"]),
        ("--vars.sampler.init_args.block_length=8", ["--vars.sampler.init_args", "whole value"]),
        ("--model.seed=${data.seed} --data.seed=${model.seed}", ["ecursive"]),
        ("--data.cache_dir=${oc.env:DLLM_VAR_NOT_THERE}", ["data.cache_dir", "DLLM_VAR_NOT_THERE"]),
        ("--model=3", ["model"]),
        ("--trainer=3", ["trainer"]),
        ("stray", ["stray"]),
        ("--ckpt_path=last", ["no checkpoint", "runs/tiny"]),
        ("--resume", ["no checkpoint", "runs/tiny"]),
        ("--resume --ckpt_path=x.ckpt", ["--ckpt_path=x.ckpt"]),
        ("--ckpt_path=.", ["ckpt_path", "no checkpoint in '.'"]),
        ("--trainer.callbacks+=dllm_var.callbacks.SamplingCallback --trainer.callbacks.sampler=x", ["sampler"]),
        ("model: [a\n", ["bad.yaml", "line 2"]),
        ("just words\n", ["bad.yaml", "no settings"]),
        ("modle: {seed: 1}\n", ["'modle.seed'", "'model.seed'"]),
        ("seed_everything: -1\n", ["seed_everything", "got -1"]),
        ("trainer: {gradient_clip_val: -1}\n", ["trainer.gradient_clip_val", "at least 0", "got -1"]),
        (f"model: {{objective: {OBJECTIVE % 'tmax: 1'}}}\n", ["model.objective: ", "'tmax'", "'t_max'"]),
        (f"trainer: {{callbacks: [{MONITOR % 'x: 1'}]}}\n", ["trainer.callbacks", "x"]),
    ],
)
def test_mistakes_in_arguments_and_files_are_told_in_one_line(changes, words, tiny, capsys):
    arguments = ["--config", write("bad.yaml", changes)] if changes.endswith("\n") else changes.split()
    text = complaint(capsys, "fit", "--config", tiny, *arguments)
    assert all(word in text for word in words), text
    assert len(text) < 300


def test_mistakes_of_commands(tiny, capsys):
    assert "no command 'fits'" in complaint(capsys, "fits")
    assert "--resume" in complaint(capsys, "validate", "--config", tiny, "--resume")
    stopping = "{class_path: lightning.pytorch.callbacks.EarlyStopping, init_args: {monitor: val_los}}"
    text = complaint(capsys, "fit", "--config", tiny, f"--trainer.callbacks+=[{stopping}]")
    assert "`val_los` which is not available" in text and "`val/loss`" in text
    own = [f"--data.source={HERE}.MistakenSource", "--data.source.path=p"]
    assert complaint(capsys, "fit", "--config", tiny, *own) == "error: data.source.path: nothing at p"


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
    references = ["--trainer.max_steps=${data.batch_size}", "--trainer.log_every_n_steps=${data.context_length}"]
    found = settings(capsys, *files, "--vars.rows=4", *references)
    assert found["model"]["init_args"]["seed"] == found["data"]["init_args"]["seed"] == 5
    assert found["data"]["init_args"]["batch_size"] == found["trainer"]["max_steps"] == 4


def test_a_value_may_be_a_whole_sampler(tiny, capsys):
    shared = write(
        "shared.yaml",
        f"vars: {{sampler: {SAMPLER % 'block_length: 8'}, n: 7}}\n"
        "trainer:\n  callbacks+:\n  - class_path: dllm_var.callbacks.SamplingCallback\n"
        "    init_args: {sampler: '${vars.sampler}', num_shown: '${vars.n}'}\n",
    )
    found = settings(capsys, "--config", tiny, "--config", shared, "--vars.n=3")
    *_, sampling = found["trainer"]["callbacks"]
    assert sampling["init_args"]["sampler"]["init_args"]["block_length"] == 8
    assert sampling["init_args"]["num_shown"] == 3


def test_classes_are_replaced_and_callbacks_appended(tiny, capsys):
    own = write("own.yaml", {"model": {"class_path": f"{HERE}.NamedModel", "init_args": {"note": "n"}}})
    more = write("more.yaml", "trainer: {callbacks+: [{class_path: dllm_var.callbacks.SpeedMonitor}]}\n")
    arguments = [f"--data={HERE}.NamedData", "--data.note=${model.note}", "--trainer.callbacks+=LearningRateMonitor"]
    arguments += ["--model.objective=dllm_var.objectives.EosSchedule", "--model.objective.t_max=0.5"]
    found = settings(capsys, "--config", tiny, "--config", own, "--config", more, *arguments)
    model, data = found["model"]["init_args"], found["data"]["init_args"]
    assert found["model"]["class_path"] == f"{HERE}.NamedModel" and found["data"]["class_path"] == f"{HERE}.NamedData"
    assert model["transformer"]["hidden_size"] == 16 and data["context_length"] == 16  # what came before stays
    assert data["note"] == "n" and model["objective"]["init_args"]["t_max"] == 0.5
    names = [callback["class_path"].rsplit(".", 1)[-1] for callback in found["trainer"]["callbacks"]]
    assert names == ["ModelCheckpoint", "SpeedMonitor", "LearningRateMonitor"]


def test_the_script_finds_modules_of_the_working_folder_as_python_m_does(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "of_my_own.py").write_text(
        "from dllm_var import DiffusionLM\n\nclass Model(DiffusionLM):\n    'A model.'\n"
    )
    monkeypatch.setattr(sys, "path", ["/usr/bin", *(path for path in sys.path if path)])
    monkeypatch.setattr(sys, "argv", ["dllm-var", "fit", "--model=of_my_own.Model", "--print_config"])
    assert main() == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["class_path"] == "of_my_own.Model"


def test_any_lightning_module_will_do(capsys):
    found = settings(capsys, f"--model={HERE}.PlainModel", "--model.width=3")
    assert found["model"]["init_args"] == {"width": 3}


RECIPES = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))
OVERLAYS = sorted({path.parent.name for path in (ROOT / "configs").glob("*/*.yaml")})


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_parses(recipe, capsys):
    settings(capsys, "--config", str(ROOT / "configs" / recipe))


@pytest.mark.parametrize("folder", OVERLAYS)
def test_overlays_parse_one_over_the_other(folder, capsys):
    files = [ROOT / "configs" / "quickstart.yaml", *sorted((ROOT / "configs" / folder).glob("*.yaml"))]
    settings(capsys, *(f"--config={path}" for path in files))


# -- runs --------------------------------------------------------------------------------------------------------------

RUN = Path("runs/tiny/version_0")
LAST = RUN / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a finished run of two steps."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["fit", "--config", write_tiny()]) == 0
    return folder


@pytest.fixture
def trained(finished, tmp_path, monkeypatch):
    """The config of a finished run, in a copy of its folder."""
    monkeypatch.chdir(shutil.copytree(finished, tmp_path / "copy"))
    return "tiny.yaml"


def steps_of(path):
    return torch.load(path, weights_only=True)["global_step"]


def test_fit_saves_settings_that_run_again(tiny):
    assert main(["fit", "--config", tiny, "--trainer.max_steps=${vars.steps}", "--vars.steps=1"]) == 0
    saved = (RUN / "config.yaml").read_text()
    assert yaml.safe_load(saved)["trainer"]["max_steps"] == 1
    assert "Unable to serialize" not in saved
    assert main(["fit", "--config", str(RUN / "config.yaml")]) == 0
    assert (RUN.parent / "version_1" / "config.yaml").read_text() == saved
    assert main(["fit", "--config", tiny, "--trainer.logger=false", "--trainer.max_steps=1"]) == 0
    assert not list(Path().glob("*config.yaml"))


def test_resume_continues_the_newest_run_that_has_a_checkpoint(trained):
    first = (RUN / "config.yaml").read_text()
    empty = RUN.parent / "version_7" / "checkpoints"
    empty.mkdir(parents=True)
    assert main(["fit", "--config", trained, "--resume", "--trainer.max_steps=5"]) == 0  # saves every 2, and the last
    assert steps_of(LAST) == 5 and len(list(LAST.parent.iterdir())) == 2
    assert not list(empty.iterdir()) and len(list(RUN.parent.iterdir())) == 2
    assert (RUN / "config.1.yaml").read_text() == first
    again = yaml.safe_load((RUN / "config.yaml").read_text())
    assert again["ckpt_path"] is None and again["trainer"]["logger"]["init_args"]["version"] is None
    assert again["trainer"]["max_steps"] == 5


def test_resume_follows_a_folder_of_one_s_own(tiny):
    assert main(["fit", "--config", tiny, "--trainer.callbacks.dirpath=kept"]) == 0
    arguments = {"dirpath": "kept", "save_last": True, "every_n_train_steps": 2}
    one = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": arguments}
    alone = ["--config", write("one.yaml", {"trainer": {"callbacks": one}})]  # a callback needs no list around it
    assert main(["fit", "--config", tiny, *alone, "--resume", "--trainer.max_steps=4"]) == 0
    assert steps_of("kept/last.ckpt") == 4


def test_a_checkpoint_or_its_run_goes_on_in_a_new_run_with_the_settings_given(trained):
    on = [f"--ckpt_path={RUN}", "--data.check_resume=false", "--trainer.max_steps=3", "--model.seed=2"]
    assert main(["fit", "--config", trained, *on]) == 0
    assert steps_of("runs/tiny/version_1/checkpoints/last.ckpt") == 3
    saved = yaml.safe_load(Path("runs/tiny/version_1/config.yaml").read_text())
    assert saved["model"]["init_args"]["seed"] == 2


def test_last_means_the_newest_run(trained, capsys):
    assert main(["fit", "--config", trained, "--ckpt_path=last", "--trainer.max_steps=4"]) == 0
    assert [path.name for path in RUN.parent.iterdir()] == ["version_0"]
    assert main(["validate", "--config", trained, "--ckpt_path=last"]) == 0
    assert "val/loss" in capsys.readouterr().out
    saved = yaml.safe_load(Path("runs/tiny/validate/version_0/config.yaml").read_text())
    assert saved["ckpt_path"] == str(LAST)
    for command in ("test", "predict"):
        line = complaint(capsys, command, "--config", trained, "--ckpt_path=last", "--data.source.test_size=0")
        assert "the test split of JsonlSource has no records" in line and "data.source.test_size" in line


def test_a_foreign_checkpoint_and_one_of_another_shape_are_told_in_one_line(trained, capsys):
    torch.save({"nothing": torch.zeros(3)}, "foreign.ckpt")
    assert "foreign.ckpt" in complaint(capsys, "validate", "--config", trained, "--ckpt_path=foreign.ckpt")
    wider = ["--model.transformer.hidden_size=32", f"--ckpt_path={LAST}"]
    assert "hidden_size=16" in complaint(capsys, "validate", "--config", trained, *wider)


def test_processes_on_a_cpu_are_announced_before_they_start(tiny, monkeypatch, capsys):
    monkeypatch.setattr(L.Trainer, "fit", lambda *args, **kwargs: None)
    for devices in (1, 8):
        assert main(["fit", "--config", tiny, f"--trainer.devices={devices}"]) == 0
        said = [line for line in capsys.readouterr().err.splitlines() if "processes on CPUs" in line]
        assert len(said) == (devices > 1)
    assert said[0].startswith("fit runs in 8 processes on CPUs") and "--trainer.devices=1" in said[0]


def test_the_line_to_try_works_when_pasted(tiny, capsys):
    summary = "{class_path: dllm_var.callbacks.RunSummary, init_args: {sampler: '${sampler}', split: validation}}"
    arguments = [f"--trainer.callbacks+=[{{class_path: dllm_var.callbacks.ExportWeights}}, {summary}]"]
    arguments += ["--trainer.default_root_dir=a folder"]
    assert main(["fit", "--config", tiny, *arguments, "--sampler.max_new_tokens=2"]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("try ")]
    label, *words = shlex.split(line)
    assert (label, words[:4]) == ("try", ["python", "-m", "dllm_var", "generate"])
    assert main(words[3:]) == 0
    assert " -> " in capsys.readouterr().out


def test_resume_command_drops_the_first_checkpoint():
    settings = ["--config", "a b.yaml", "--ckpt_path", "x.ckpt", "--ckpt_path=y.ckpt", "--trainer.max_steps=4"]
    expected = "python -m dllm_var fit --config 'a b.yaml' --trainer.max_steps=4 --resume"
    assert resume_command(settings) == expected


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
    try:
        deadline = time.monotonic() + 120
        while not LAST.exists():
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
    assert steps_of(LAST) > 0


def test_what_a_thread_cannot_write_is_told_in_one_line(monkeypatch, capsys):
    def write():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), b"events")

    monkeypatch.setattr(threading, "excepthook", tell_thread_failure)
    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    told = "warning: cannot write events: No space left on device; make room, or write to another disk\n"
    assert capsys.readouterr().err == told
