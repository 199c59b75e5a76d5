"""Some of the cases of benchmarks/bad_inputs.py, in this process: the cheapest of each kind."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dllm_var.__main__ import main

ROOT = Path(__file__).parent.parent
CASES = (
    "generate --checkpoint .ckpt a folder",
    "generate --checkpoint .ckpt unreadable",
    "generate --checkpoint too long a name",
    "generate --prompts-file .jsonl deeply nested",
    "generate --prompts-file .txt not UTF-8",
    "generate --sampler .yaml a pipe",
    "generate --output a loop of links",
    "generate --output a full device",
    "generate of a run whose model/config.json is deeply nested",
    "generate of a run whose model/model.safetensors is a pipe",
    "generate of a run whose model/tokenizer_config.json is unreadable",
    "export --output below a file",
    "export --block-length=-1",
    "benchmark --config .yaml unreadable",
    "benchmark --output a folder",
    "plan --config .yaml broken",
    "plan --mfu=nan",
)


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with what the commands need: the shipped model in place of a run's."""
    folder = tmp_path_factory.mktemp("bad")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        from bad_inputs import LAST, RUN, write_inputs

        write_inputs(folder)
        shutil.copytree(ROOT / "checkpoints" / "cmudict", folder / RUN / "model")
        (folder / RUN / "config.yaml").write_text("{}")
        (folder / LAST).parent.mkdir()
    return folder


@pytest.mark.parametrize("name", CASES)
def test_bad_inputs_are_refused_in_one_line_that_names_them(name, base, tmp_path, monkeypatch, capfd):
    from bad_inputs import all_cases, judge

    case = next(case for case in all_cases(0) if case.name == name)
    folder = shutil.copytree(base, tmp_path / "work", symlinks=True)
    case.prepare(folder)
    monkeypatch.chdir(folder)
    status = main(case.arguments)
    shown = capfd.readouterr()
    assert judge(case, status, shown.out + shown.err, folder)[0] == "refused", shown.err


@pytest.mark.slow
def test_damage_at_random_places_is_refused_or_does_no_harm():
    names = ("fit, damaged", "resume, damaged", "generate, damaged")
    command = [sys.executable, "bad_inputs.py", "--random", "2", *names]
    run = subprocess.run(command, cwd=ROOT / "benchmarks", capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
