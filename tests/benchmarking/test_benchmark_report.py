"""Tables, Markdown and plots from one fixed result."""

import builtins
import copy

import pytest

from dllm_var.benchmarking.plots import plot_task
from dllm_var.benchmarking.ratios import against_bars
from dllm_var.benchmarking.report import markdown_report, text_report
from dllm_var.errors import UserError

ANSWERS = {
    "accuracy": 0.898,
    "exact_match": 0.6,
    "ended_by_eos": 1.0,
    "premature": 0.05,
    "overrun": 0.03,
    "length_error": 0.1,
    "hit_limit": 0.0,
    "prompts": 500,
    "nfe": 2.4,
    "tokens_per_forward": 2.61,
}
TIMING = {"tokens_per_second": 1234.5, "seconds_per_request": 0.0051, "sampler_overhead": 0.155}
RATIOS = {
    "over_fixed_length": 300.0,
    "over_autoregressive": 2.1,
    "batch_32_over_1": None,
    "sampler_overhead": 0.155,
    "forwards_over_fixed_length": 250.0,
    "forwards_over_autoregressive": 3.04,
}
MEASURED = {
    "name": "threshold_0.7",
    "role": "candidate",
    **ANSWERS,
    "single": TIMING,
    "batched": {**TIMING, "tokens_per_second": 9876.5},
    "peak_memory_bytes": {"single": 3 * 2**20, "batched": None},
    "over_autoregressive": 2.1,
    "forwards_over_autoregressive": 3.04,
}
POINT = {
    "value": 0.7,
    "setting": "threshold_0.7",
    "accuracy": 0.898,
    "tokens_per_forward": 2.61,
    "tokens_per_second": 9,
}
RESULT = {
    "command": "python -m dllm_var benchmark --config a.yaml --output b.json",
    "date": "2026-01-01 00:00:00",
    "machine": {"cpu": "a CPU", "cores": 2, "threads": 1, "device": "cpu", "torch": "2.13.0", "commit": "abc"},
    "repeats": 3,
    "seconds": 300.0,
    "quick": False,
    "partial": False,
    "tasks": [
        {
            "name": "words",
            "checkpoint": "checkpoints/words",
            "parameters": 1_798_080,
            "split": "test",
            "batch_size": 32,
            "chosen": "threshold_0.7",
            "default": "default",
            "rule": "the fastest",
            "accuracy_over_default": -0.0042,
            "ratios": RATIOS,
            "default_ratios": {**RATIOS, "over_autoregressive": 1.5},
            "credit": "'fixed' answers with nothing",
            "bars": against_bars(RATIOS),
            "settings": [MEASURED, {"name": "not yet", "role": "candidate", "single": {}, "batched": {}}],
            "curves": [{"name": "threshold", "over": "x", "points": [POINT], "best_accuracy": 0.9, "aup": 234.4}],
            "per_forward": [
                {"width": 1, "seconds": 0.002, "relative": 1.0},
                {"width": 16, "seconds": 0.003, "relative": 1.5},
            ],
        }
    ],
}


@pytest.fixture
def result():
    return copy.deepcopy(RESULT)


def test_text_has_the_figures_and_the_verdicts(result):
    text = text_report(result)
    [answers, speed] = [line.split() for line in text.splitlines() if "threshold_0.7 *" in line]
    assert answers[2:] == ["89.8%", "60.0%", "100.0%", "5.0%", "3.0%", "0.10", "0.0%", "500"]
    assert speed[2:] == ["89.8%", "2.4", "2.61", "1,234", "5.1", "16%", "3.0", "2.10", "3.04", "9,876", "5.1", "-"]
    assert "useful tokens/s over fixed-length diffusion: 300.00x (>= 30.10x: pass)" in text
    assert "useful tokens/s over the autoregressive twin: 2.10x (>= 2.40x: FAIL)" in text
    assert "batched throughput over batch 1: - (>= 6.00x: not measured)" in text
    assert "time outside the model's forwards: 16% (<= 20%: pass)" in text
    assert "250.00x over fixed-length diffusion, 3.04x over the autoregressive twin" in text
    assert "threshold: AUP 234.4 (accuracy at tokens/forward: 0.7: 89.8% at 2.61)" in text
    assert "a CPU, 2 cores, 1 threads, device cpu, torch 2.13.0, commit abc" in text
    assert "'fixed' answers with nothing." in text
    assert "its accuracy on the test split: -0.4 points against default" in text
    assert "with default: 300.00x" in " ".join(text.split())
    assert "not for comparison" not in text


def test_what_was_not_measured_is_a_dash(result):
    lines = [line.split() for line in text_report(result).splitlines() if line.split()[:2] == ["not", "yet"]]
    assert [set(line[2:]) for line in lines] == [{"-"}, {"-"}]


def test_a_partial_or_quick_run_says_so(result):
    assert text_report({**result, "partial": True}).startswith("partial run: not for comparison")
    assert "partial and quick run" in markdown_report({**result, "partial": True, "quick": True}, {})


def test_markdown_tables_are_whole(result):
    text = markdown_report(result, {"words": "b_words.png"})
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 3
    for table in tables:
        assert len({line.replace("\\|", "").count("|") for line in table}) == 1
    assert "| threshold\\_0.7 \\* | 89.8% |" in text
    assert "![accuracy and speed of words](b_words.png)" in text
    assert "over the autoregressive twin: 2.10x (\\>= 2.40x: FAIL)" in text


def test_plot_is_a_picture(result, tmp_path):
    pytest.importorskip("matplotlib")
    plot_task(result["tasks"][0], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_task_with_nothing_measured_yet_has_a_report_and_a_plot(result, tmp_path):
    pytest.importorskip("matplotlib")
    task = result["tasks"][0]
    task.update(ratios={}, default_ratios={}, bars=against_bars({}), credit=None, per_forward=[])
    task["settings"] = task["settings"][1:]
    task["curves"] = [{"name": "threshold", "over": "x", "points": [], "best_accuracy": None, "aup": None}]
    assert "threshold: not measured" in text_report(result) and "not measured" in markdown_report(result, {})
    plot_task(task, tmp_path / "plot.png")


def test_without_matplotlib_the_extra_is_named(result, tmp_path, monkeypatch):
    forget_matplotlib(monkeypatch)
    with pytest.raises(UserError, match=r'pip install "dllm-var\[plots\]"'):
        plot_task(result["tasks"][0], tmp_path / "plot.png")


def forget_matplotlib(monkeypatch):
    """Makes importing matplotlib fail as if it were not installed."""
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
