"""`python -m dllm_var benchmark`, from a config to its files."""

import json
import signal
import sys
from pathlib import Path

import pytest
import yaml

from dllm_var.__main__ import main
from dllm_var.benchmarking.settings import expand
from dllm_var.cli.benchmark import build_parser, read_tasks, wanted
from dllm_var.errors import UserError
from dllm_var.sampling import BlockDiffusionSampler

ROOT = Path(__file__).parent.parent.parent


def benchmark(config, output, *options):
    return main(["benchmark", "--config", config, "--output", str(output), *options])


def tasks_of(config):
    return read_tasks(build_parser("benchmark").parse_args(["--config", config]))


def test_quick_run_writes_json_markdown_and_plot(tiny_task, write_config, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    output = tmp_path / "out" / "result.json"
    assert benchmark(write_config(tiny_task), output, "--quick") == 0
    shown = capsys.readouterr()
    assert "threshold 0.9" in shown.out and "quick run: not for comparison" in shown.out
    assert f"wrote {output}" in shown.err
    result = json.loads(output.read_text())
    assert (result["kind"], result["quick"], result["partial"], result["repeats"]) == ("samplers", True, False, 1)
    assert {"cpu", "threads", "torch", "commit"} <= set(result["machine"])
    ratios = {"over_fixed_length", "over_autoregressive", "batch_32_over_1", "sampler_overhead"}
    assert ratios <= set(result["ratios"]) and all(result["ratios"][name] is not None for name in ratios)
    assert not result["ratios"]["tasks"]["tiny"]["bars"] and "useful tokens/s over" in shown.out
    assert not {"pass", "FAIL", "not judged"} & set(shown.out.replace(")", " ").split())  # the config asks for no bar
    for name in ("over_autoregressive", "over_autoregressive_batched", "forwards_over_autoregressive"):
        assert set(result["ratios"][f"{name}_at_equal_accuracy"]) == {"tiny"}
        assert result["ratios"]["tasks"]["tiny"]["at_equal_accuracy"][name] in {
            s["name"] for s in result["tasks"][0]["settings"]
        }
    assert "![accuracy and speed](result_tiny.png)" in output.with_suffix(".md").read_text()
    assert (output.parent / "result_tiny.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_rest_is_written(tiny_task, write_config, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    output = tmp_path / "result.json"
    assert benchmark(write_config(tiny_task), output, "--quick", "--only", "autoregressive") == 0
    assert 'no plots: they need matplotlib: pip install "dllm-var[plots]"' in capsys.readouterr().err
    assert json.loads(output.read_text())["partial"] is False
    assert ".png" not in output.with_suffix(".md").read_text() and not list(tmp_path.glob("*.png"))


class Interrupting(BlockDiffusionSampler):
    """Sends a signal to its own process the third time it decodes: it has been warmed up and scored then."""

    number, calls = signal.SIGINT, 0

    def decode(self, *args):
        self.calls += 1
        if self.calls == 4:
            signal.raise_signal(Interrupting.number)
        return super().decode(*args)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_what_is_measured(number, status, tiny_task, write_config, tmp_path, capsys):
    Interrupting.number = number
    interrupting = {"class_path": f"{__name__}.Interrupting", "init_args": {"block_length": 4, "max_new_tokens": 8}}
    entries = [tiny_task["entries"][0], {"name": "interrupting", "role": "default", "sampler": interrupting}]
    output = tmp_path / "result.json"
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    config = write_config({**tiny_task, "entries": entries, "sweeps": []})
    assert benchmark(config, output, "--quick") == status
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    shown = capsys.readouterr()
    assert "interrupted: writing what has been measured" in shown.err and "partial and quick run" in shown.out
    result = json.loads(output.read_text())
    assert result["partial"] is True
    settings = {setting["name"]: setting for setting in result["tasks"][0]["settings"]}
    assert "accuracy" in settings["interrupting"] and settings["interrupting"]["single"] == {}
    assert settings["autoregressive"]["single"]["tokens_per_second"] >= 0


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({"tasks": []}, ["--output", "x.txt"], "--output must end in .json, got 'x.txt'"),
        ({"tasks": []}, [], "benchmark needs --config FILE"),
        ({"tasks": []}, ["--output", "x.json", "--repeats", "0"], "repeats: 0 does not conform to restriction v>0"),
        ({"tasks": []}, ["--output", "x.json"], "must list either tasks or trainings to measure"),
        (
            {"tasks": [{"name": "a", "source": "S", "checkpoint": "c", "prompts": 0}]},
            ["--output", "x.json"],
            "tasks.prompts: 0 does not conform",
        ),
        ({"trainings": [{"name": "a", "vocab_size": 0}]}, ["--output", "x.json"], "vocab_size must be at least 1"),
        (
            {"trainings": [{"name": "a", "vocab_size": 9, "contenders": ["theirs"]}]},
            ["--output", "x.json"],
            "full logits, plain loop",
        ),
        ({"tasks": [{"name": "a"}]}, ["--output", "x.json"], "source"),
        ({"tasks": [{"nam": "a"}]}, ["--output", "x.json"], "tasks"),
    ],
)
def test_mistakes_take_one_line(config, options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text(yaml.safe_dump(config))
    assert main(["benchmark", "--config", "bad.yaml", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_only_takes_entries_sweeps_and_tasks(tiny_task, write_config):
    tasks = tasks_of(write_config(tiny_task, {**tiny_task, "name": "other"}))

    def names(*chosen):
        return [(task.name, task.parts) for task in wanted(tasks, chosen, quick=False)]

    assert names("tiny") == [("tiny", ["autoregressive", "fixed length", "threshold 0.9", "threshold"])]
    assert names("threshold") == [("tiny", ["threshold"]), ("other", ["threshold"])]
    assert names("other", "autoregressive") == [("other", ["autoregressive"])]
    with pytest.raises(UserError, match="--only: nothing is called 'a'; there are tiny; other; autoregressive"):
        names("a")


@pytest.mark.parametrize(
    ("name", "baselines"),
    [
        ("samplers", {"autoregressive", "fixed_length"}),
        ("claim", {"autoregressive", "fixed_length"}),
        ("gsm_symbolic", {"autoregressive"}),  # nothing is trained for a canvas of this length
    ],
)
def test_the_shipped_configs_are_whole(name, baselines, monkeypatch):
    monkeypatch.chdir(ROOT)
    for task in tasks_of(f"benchmarks/{name}.yaml"):
        settings = expand(task)[0]
        assert {"default", *baselines} <= {setting.role for setting in settings}, "ratios need them"
        for setting in settings:
            assert setting.checkpoint in ("diffusion", "autoregressive") or Path(setting.checkpoint).is_dir()
            if setting.role == "fixed_length":  # LLaDA: one token per step, a model that was trained for it
                assert "policy" not in setting.sampler["init_args"] and setting.checkpoint != "diffusion"
