"""Tables, findings and plots from one fixed result."""

import copy
import sys

import pytest

from dllm_var.benchmarking.report import plot_task, report
from dllm_var.benchmarking.results import BARS, against_bar
from dllm_var.errors import UserError

ANSWERS = dict(accuracy=0.898, exact_match=0.6, ended_by_eos=1.0, premature=0.05, overrun=0.03, length_error=0.1)
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
    **ANSWERS,
    **dict(hit_limit=0.0, prompts=500, nfe=2.4, tokens_per_forward=2.61),
    "single": TIMING,
    "batched": {**TIMING, "tokens_per_second": 9876.5},
    "peak_memory_bytes": {"single": 3 * 2**20, "batched": None},
    "over_autoregressive": 2.1,
    "forwards_over_autoregressive": 3.04,
}
POINT = dict(value=0.7, setting="threshold_0.7", accuracy=0.898, tokens_per_forward=2.61, tokens_per_second=9)
TASK = {
    **dict(name="words", checkpoint="checkpoints/words", parameters=1_798_080, split="test", batch_size=32),
    **dict(chosen="threshold_0.7", default="default", rule="the fastest", accuracy_over_default=-0.0042),
    "ratios": RATIOS,
    "over_autoregressive_at_equal_accuracy": 1.5,
    "default_ratios": {**RATIOS, "over_autoregressive": 1.5},
    "credit": "'fixed' answers with nothing",
    "bars": {name: against_bar(RATIOS[name], *bar) for name, bar in BARS.items()},
    "settings": [MEASURED, {"name": "not yet", "single": {}, "batched": {}}],
    "curves": [{"name": "threshold", "points": [POINT], "best_accuracy": 0.9, "aup": 234.4}],
    "per_forward": [dict(width=1, seconds=0.002, relative=1.0), dict(width=16, seconds=0.003, relative=1.5)],
}
RESULT = {
    "command": "python -m dllm_var benchmark --config a.yaml --output b.json",
    "date": "2026-01-01 00:00:00",
    "machine": {"cpu": "a CPU", "cores": 2, "threads": 1, "device": "cpu", "torch": "2.13.0", "commit": "abc"},
    **dict(repeats=3, seconds=300.0, quick=False, partial=False, tasks=[TASK]),
}


@pytest.fixture
def result():
    return copy.deepcopy(RESULT)


def cells(text, name):
    return [line.strip("|").replace("|", " ").split() for line in text.splitlines() if line.startswith(f"| {name}")]


def test_it_has_the_figures_and_the_verdicts(result):
    text = report("Samplers", result, ["b_words.png"])
    [answers, speed] = cells(text, "threshold_0.7 *")
    assert answers[2:] == ["89.8%", "60.0%", "100.0%", "5.0%", "3.0%", "0.10", "0.0%", "500"]
    assert speed[2:] == ["89.8%", "2.4", "2.61", "1,234", "5.1", "16%", "3.0", "2.10", "3.04", "9,876", "5.1", "-"]
    assert [set(line[2:]) for line in cells(text, "not yet")] == [{"-"}, {"-"}]  # nothing was measured
    for sentence in (
        "useful tokens/s over fixed-length diffusion: 300.00x (>= 30.10x: pass)",
        "useful tokens/s over the autoregressive twin: 2.10x (>= 2.40x: FAIL)",
        "batched throughput over batch 1: - (>= 6.00x: not measured)",
        "time outside the model's forwards: 16% (<= 20%: pass)",
        "250.00x over fixed-length diffusion, 3.04x over the autoregressive twin",
        "the fastest setting of its accuracy: 1.50x",
        "threshold: AUP 234.4 (accuracy at tokens/forward: 0.7: 89.8% at 2.61)",
        "a CPU, 2 cores, 1 threads, device cpu, torch 2.13.0, commit abc",
        "'fixed' answers with nothing.",
        "its accuracy on the test split: -0.4 points against default",
        "with default: 300.00x",
        "![accuracy and speed](b_words.png)",
    ):
        assert sentence in text
    assert "not for comparison" not in text
    assert "partial and quick run: not for comparison" in report("", {**result, "partial": True, "quick": True})


def test_tables_are_whole(result):
    result["tasks"][0]["settings"][1]["name"] = "not | yet"
    tables = [block.splitlines() for block in report("", result).split("\n\n") if block.startswith("|")]
    assert len(tables) == 3
    for table in tables:
        assert len({line.count("|") for line in table}) == 1 and len(set(map(len, table))) == 1


def test_a_task_with_nothing_measured_yet_has_a_report_and_a_plot(result, tmp_path):
    pytest.importorskip("matplotlib")
    task = result["tasks"][0]
    plot_task(task, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    bars = {name: against_bar(None, *bar) for name, bar in BARS.items()}
    task.update(ratios={}, default_ratios={}, bars=bars, credit=None, per_forward=[], settings=task["settings"][1:])
    task["curves"] = [{"name": "threshold", "over": "x", "points": [], "best_accuracy": None, "aup": None}]
    assert "threshold: not measured" in report("", result)
    plot_task(task, tmp_path / "plot.png")


def test_without_matplotlib_the_extra_is_named(result, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r'pip install "dllm-var\[plots\]"'):
        plot_task(result["tasks"][0], tmp_path / "plot.png")
