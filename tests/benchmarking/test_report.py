"""Tables, findings and plots of the results that ship."""

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from dllm_var.benchmarking.plot import draw_task, frontier
from dllm_var.benchmarking.report import report
from dllm_var.benchmarking.results import against_bar
from dllm_var.benchmarking.settings import BARS

RESULTS = Path(__file__).parent.parent.parent / "benchmarks" / "results"


def shipped(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def samplers():
    """The first task of the run of all samplers, alone."""
    result = shipped("samplers")
    return {**result, "tasks": result["tasks"][:1]}


def cells(text, name):
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith(f"| {name} ")]
    return [[cell.strip() for cell in row[1:]] for row in rows]


def test_samplers_have_their_figures_and_verdicts():
    text = report("Samplers", samplers(), ["plot.png"])
    [answers, speed] = cells(text, "decaying threshold 0.5 \\*".replace("\\", ""))
    assert answers == ["88.7%", "55.8%", "100.0%", "5.4%", "6.6%", "0.13", "0.0%", "-", "500"]
    expected = ["88.7%", "1.2", "5.48", "2,379", "2.6", "34%", "0.8", "3.59", "6.81", "10,319", "0.6", "34.0", "1.74"]
    assert speed == expected
    assert cells(text, "fixed length")[1][-4:] == ["-", "-", "44.2", "-"]  # scored in batches, not timed
    for sentence in (
        "Intel(R) Xeon(R) Processor, 2 cores, 2 threads, device cpu, torch 2.13.0+cpu, commit ca8a34357b27",
        "useful tokens/s over fixed-length diffusion: 47.18x (>= 30.10x: pass)",
        "useful tokens/s, batch 1: 2.41x by strided 8, trust 0.7, 93.5% (93.1%)",
        "batched throughput over batch 1: 4.31x (>= 6.00x: FAIL)",
        "time outside the model's forwards: 34% (<= 20%: FAIL)",
        "decaying threshold: AUP 473.3 (accuracy at tokens/forward: 0.5: 88.7% at 5.48;",
        "![accuracy and speed](plot.png)",
    ):
        assert sentence in text
    assert "not for comparison" not in text
    assert "partial and quick run" in report("", {**samplers(), "partial": True, "quick": True})


def test_trainings_have_their_figures_and_verdicts():
    text = report("Training", shipped("training"))
    ours = cells(text, "ours, compiled *")[3]
    assert ours == ["955", "2.81", "-", "51%", "2,145", "1.5", "181.2", "1,456.4", "375.2", "158.9", "1,718", "-"]
    assert "- tokens_per_second_126k of ours, compiled over full logits, plain loop: 2.81x (>= 2.00x: pass)" in text
    assert "- mfu: 68% (>= 60%: pass)" in text


def test_tables_are_whole():
    result = samplers()
    result["tasks"][0]["settings"][1]["name"] = "with | a bar"
    tables = [block.splitlines() for block in report("", result).split("\n\n") if block.startswith("|")]
    assert len(tables) == 3
    for table in tables:
        assert len({line.count("|") for line in table}) == 1 and len(set(map(len, table))) == 1


def test_a_task_with_nothing_measured_yet_has_a_report_and_a_plot():
    pytest.importorskip("matplotlib")
    result = samplers()
    task = result["tasks"][0]
    bars = {name: against_bar(None, 6.0, side) for name, side in BARS.items()}
    task.update(
        ratios={},
        at_equal_accuracy={},
        bars=bars,
        per_forward=[],
        settings=[{"name": "not yet", "single": {}, "batched": {}}],
    )
    task["curves"] = [{"name": "threshold", "points": [], "best_accuracy": None, "aup": None}]
    text = report("", result)
    assert "threshold: not measured" in text and "batched throughput over batch 1: - (>= 6.00x: not measured)" in text
    assert [set(row) for row in cells(text, "not yet")] == [{"-"}, {"-"}]
    draw_task(task)


def labels(figure):
    """The names that a picture shows, with the places that they take, in pixels."""
    return [(text.get_text(), text.get_window_extent()) for text in figure.axes[0].texts if text.get_text()]


def test_a_picture_names_what_no_other_setting_beats_and_no_label_hides_another():
    pytest.importorskip("matplotlib")
    [task] = samplers()["tasks"]
    figure = draw_task(task)
    [axis] = figure.axes
    found = dict(labels(figure))
    assert {"autoregressive (the twin)", "fixed length", task["chosen"], task["default"], "diffuspec"} <= set(found)
    assert "strided 8, trust 0.7: 2.4x the twin" in found and len(found) <= 12
    assert "joint threshold (69%)" in axis.get_title()  # far below the others
    assert not [pair for pair in combinations(found.values(), 2) if pair[0].overlaps(pair[1])]
    frame = axis.get_window_extent()
    assert all(frame.contains(*place.min) and frame.contains(*place.max) for place in found.values())
    colours = {tuple(colour[:3]) for points in axis.collections for colour in points.get_facecolor()}
    assert 3 < len(colours) <= 8


def test_the_frontier_is_what_no_other_setting_beats_in_both():
    settings = samplers()["tasks"][0]["settings"]
    place = {one["name"]: (one["single"]["tokens_per_second"], one["accuracy"]) for one in settings}
    unbeaten = [a for a in place if not any(b != a and min(np.subtract(place[b], place[a])) >= 0 for b in place)]
    assert [one["name"] for one in frontier(settings)] == sorted(unbeaten, key=place.get)


def test_few_settings_are_all_named_and_the_best_at_equal_accuracy_has_its_ratio():
    pytest.importorskip("matplotlib")
    [task] = shipped("gsm_symbolic")["tasks"]
    names = {name for name, _ in labels(draw_task(task))}
    assert names == {
        "autoregressive (the twin)", "strided 8", "strided 8, everywhere", "threshold 0.9", "diffuspec: 1.8x the twin"
    }  # fmt: skip


def test_a_picture_needs_no_twin_and_no_best_setting():
    pytest.importorskip("matplotlib")
    [task] = shipped("gsm_symbolic")["tasks"]
    one = next(setting for setting in task["settings"] if setting["role"] == "default")
    task |= {"settings": [one], "autoregressive_checkpoint": None, "chosen": None, "at_equal_accuracy": {}}
    assert [name for name, _ in labels(draw_task(task))] == ["threshold 0.9"]
