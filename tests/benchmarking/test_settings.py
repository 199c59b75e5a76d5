"""From a config to the settings that are measured, and the messages about a bad one."""

import pytest

from dllm_var.benchmarking.settings import Entry, Sweep, Task, TrainingCase, expand
from dllm_var.errors import UserError
from dllm_var.sampling import Sampler
from dllm_var.settings import build

THRESHOLD = {
    "class_path": "dllm_var.sampling.BlockDiffusionSampler",
    "init_args": {
        "policy": {"class_path": "dllm_var.sampling.ConfidenceThreshold", "init_args": {"threshold": 0.9}},
        "block_length": 4,
    },
}
OVER = "init_args.policy.init_args.threshold"


def task(entries=(), sweeps=(), **settings):
    return Task("t", "a.Source", "c", entries=list(entries), sweeps=list(sweeps), **settings)


def test_a_point_that_is_an_entry_is_measured_once():
    entry, sweep = (
        Entry("default", THRESHOLD, role="default"),
        Sweep("threshold", THRESHOLD, over=OVER, values=[0.5, 0.9]),
    )
    settings, curves = expand(task([entry], [sweep]))
    assert [(s.name, s.role) for s in settings] == [("default", "default"), ("threshold 0.5", "candidate")]
    assert curves == {"threshold": [(0.5, "threshold 0.5"), (0.9, "default")]}
    assert settings[1].sampler["init_args"]["policy"]["init_args"] == {"threshold": 0.5}
    assert settings[0].sampler == THRESHOLD


def test_numbers_of_prompts_are_the_tasks_unless_the_entry_has_its_own():
    entries = [Entry("a", THRESHOLD), Entry("b", THRESHOLD, prompts=3, batched_prompts=0)]
    one, other = expand(task(entries, prompts=70))[0]
    assert (one.prompts, one.single_prompts, one.batched_prompts) == (70, 48, 96)
    assert (other.prompts, other.single_prompts, other.batched_prompts) == (3, 48, 0)


def test_an_overlay_with_arguments_over_it(tmp_path):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(
        "sampler:\n  class_path: dllm_var.sampling.FixedLengthSampler\n  init_args: {canvas_length: 9}\n"
    )
    [setting], _ = expand(task([Entry("a", str(overlay), arguments={"cache": "dual"})]))
    sampler = build(Sampler, "sampler", setting.sampler, "here")
    assert (type(sampler).__name__, sampler.canvas_length, sampler.cache) == ("FixedLengthSampler", 9, "dual")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(entries=[Entry("a", THRESHOLD), Entry("a", THRESHOLD)]), "task t: two are called 'a'"),
        (dict(), "task t: nothing to measure"),
        (dict(bars={"speed": 2.0}), "task t: a bar is one of over_fixed_length"),
        (dict(entries=[Entry("a", {"init_args": {}})]), "task t, a: the sampler has no class_path"),
        (
            dict(entries=[Entry("a", THRESHOLD, role="default"), Entry("b", THRESHOLD, role="default")]),
            "task t: 'a' and 'b' both have role default",
        ),
    ],
)
def test_mistakes_of_a_task_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        expand(task(**settings))


def test_a_bar_of_a_training_must_be_a_ratio():
    with pytest.raises(UserError, match="training a: a bar begins with tokens_per_second"):
        TrainingCase("a", 9, bars={"speed": 1.0})


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({**THRESHOLD, "init_args": {"block_lenght": 3}}, "block_lenght.*block_length"),
        ({**THRESHOLD, "init_args": {"block_length": 0}}, "task t, a: sampler.block_length must be at least 1, got 0"),
        ({"class_path": "dllm_var.sampling.NoSampler"}, "NoSampler"),
        ({**THRESHOLD, "init_args": {"nothing": {"x": 1}}}, "BlockDiffusionSampler has no setting 'nothing.x'"),
    ],
)
def test_samplers_that_cannot_be_built_are_named(described, message):
    with pytest.raises(UserError, match=message) as error:
        build(Sampler, "sampler", described, "task t, a")
    assert str(error.value).startswith("task t, a: ") and "\n" not in str(error.value)


def test_a_value_of_a_sweep_takes_the_whole_place_of_the_former_one():
    policy = {"class_path": "FixedSteps", "init_args": {"steps": 2}}
    sweep = Sweep(name="s", sampler=THRESHOLD, over="init_args.policy", values=[policy])
    [point], _ = expand(task(sweeps=[sweep]))
    assert point.sampler["init_args"]["policy"] == policy
