"""Clocks, gauges and the order of turns, and one whole task."""

import json
import shutil
import sys
import time

import pytest
import torch

from dllm_var.benchmarking.instruments import PeakMemory, describe_machine
from dllm_var.benchmarking.report import report
from dllm_var.benchmarking.results import CHOSEN_BY, Contender
from dllm_var.benchmarking.samplers import TaskRun, decode, measure_forwards
from dllm_var.benchmarking.settings import Entry
from dllm_var.checkpoints.pretrained import load_checkpoint
from dllm_var.cli.benchmark import build_parser, read_tasks
from dllm_var.datamodules import Example
from dllm_var.errors import UserError
from dllm_var.sampling import BlockDiffusionSampler, DiffuSpecSampler, GuidedSampler

CPU = torch.device("cpu")
MACHINE = {"machine": describe_machine(CPU), "date": "", "repeats": 1, "seconds": 1, "command": ""}
EXAMPLES = [Example("?", ids, [[1]]) for ids in ([5, 6, 7], [8, 9], [10, 11, 12, 13], [14])]


@pytest.fixture
def built(write_config):
    """Builds the run of a task from its config."""

    def build_run(task, repeats=1, **smaller):
        [read] = read_tasks(build_parser("benchmark").parse_args(["--config", write_config(task)]))
        return TaskRun(read, repeats, CPU, **smaller)

    return build_run


@pytest.fixture
def model(tiny_task):
    return load_checkpoint(tiny_task["checkpoint"])[0]


def contender_of(model, sampler=None):
    return Contender(
        Entry("a", {}), sampler or BlockDiffusionSampler(block_length=4, max_new_tokens=8, batch_size=3), model
    )


@pytest.mark.parametrize("name", ["one model", "guided", "diffuspec"])
def test_the_clock_sees_every_forward_of_all_models_and_leaves_no_trace(name, tiny_task, model):
    paths = {kind: tiny_task[key] for kind, key in (("guide", "autoregressive_checkpoint"), ("drafter", "checkpoint"))}
    subject = contender_of(model)
    if name == "guided":
        subject.sampler = GuidedSampler(paths["guide"], block_length=4, max_new_tokens=8)
    elif name == "diffuspec":
        sampler = DiffuSpecSampler(paths["drafter"], shortest_draft=2, longest_draft=4, max_new_tokens=8)
        subject = contender_of(load_checkpoint(paths["guide"])[0], sampler)
    models = subject.models
    slow = [each.layers[0].register_forward_hook(lambda *_: time.sleep(0.02)) for each in models]
    run = decode(subject, EXAMPLES, limit=4)
    for hook in slow:
        hook.remove()
    assert len(run.seconds) == 4 and sum(run.forwards) > 4
    assert 0.02 * sum(run.forwards) <= run.forward_seconds < sum(run.seconds)
    assert all("hidden_states" not in vars(each) and "forward" not in vars(each.lm_head) for each in models)


def test_one_call_gives_the_same_answers(model):
    subject = contender_of(model)
    one_by_one, together = (decode(subject, EXAMPLES, None, alone) for alone in (True, False))
    assert [a.tokens for a in together.answers] == [a.tokens for a in one_by_one.answers]
    assert (len(together.seconds), len(one_by_one.seconds)) == (1, 4)


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_peak_memory_is_what_was_held_at_once():
    with PeakMemory(CPU) as memory:
        for _ in range(3):
            block = torch.ones(10 * 2**20)  # 40 MiB, let go before the next
            del block
    assert 39 * 2**20 < memory.bytes < 60 * 2**20
    with PeakMemory(CPU) as memory:
        pass
    assert memory.bytes < 2 * 2**20  # what was held before does not count


def test_a_forward_costs_more_when_it_is_wider(model):
    costs = measure_forwards(model, widths=(256,), rounds=3)
    assert [cost["width"] for cost in costs] == [1, 256]
    assert costs[0]["relative"] == 1 and costs[1]["relative"] > 1


def test_a_whole_task(tiny_task, built, capsys):
    run = built(tiny_task, 2, widths=(2,))
    run.run()
    result = json.loads(json.dumps(run.result()))
    settings = {setting["name"]: setting for setting in result["settings"]}
    assert list(settings) == ["autoregressive", "fixed length", "threshold 0.9", "threshold 0"]
    assert result["at_equal_accuracy"].keys() == CHOSEN_BY.keys()
    finalists = {"autoregressive", result["chosen"], *result["at_equal_accuracy"].values()}  # timed three times again
    assert [len(c.single) for c in run.contenders] == [8 if name in finalists else 2 for name in settings]
    batched = [0 if name == "fixed length" else 8 if name in finalists else 2 for name in settings]
    assert [len(c.batched) for c in run.contenders] == batched
    assert {s["prompts"] for s in settings.values()} == {6, 2}
    assert settings["fixed length"]["nfe"] == 8 and settings["fixed length"]["batched"] == {}
    assert settings["threshold 0"]["nfe"] <= settings["threshold 0.9"]["nfe"]
    assert set(settings["fixed length"]["selection"].values()) == {None}  # scored on fewer prompts, it cannot be chosen
    assert settings["autoregressive"]["selection"]["tokens_per_second"] > 0
    assert result["chosen"] in settings and result["ratios"]["over_autoregressive"] > 0
    [curve] = result["curves"]
    assert [point["value"] for point in curve["points"]] == [0.0, 0.9] and curve["aup"] >= 0
    assert [cost["width"] for cost in result["per_forward"]] == [1, 2]
    assert "tiny: speed, round 2 of 2" in capsys.readouterr().err


def test_a_third_checkpoint_is_loaded_once_and_may_be_swept(tiny_task, built, tmp_path):
    third, twin = str(tmp_path / "third"), tiny_task["autoregressive_checkpoint"]
    shutil.copytree(twin, third)
    arguments = {"drafter": tiny_task["checkpoint"], "shortest_draft": 1, "max_new_tokens": 8}
    drafting = {"class_path": "dllm_var.sampling.DiffuSpecSampler", "init_args": arguments}
    plain = {"name": "third", "checkpoint": third, "sampler": "dllm_var.sampling.AutoregressiveSampler"}
    sweep = {"name": "drafts of", "checkpoint": third, "sampler": drafting, "over": "init_args.longest_draft"}
    entries = [tiny_task["entries"][0], {**plain, "arguments": {"max_new_tokens": 8}}]
    run = built({**tiny_task, "entries": entries, "sweeps": [{**sweep, "values": [1, 3]}]}, widths=(1,))
    models = {contender.setting.name: contender.model for contender in run.contenders}
    assert models["third"] is models["drafts of 1"] is models["drafts of 3"] is not models["autoregressive"]
    assert models["third"].config.causal and not run.model.config.causal
    run.run()
    result = json.loads(json.dumps(run.result()))
    accuracies = {setting["name"]: setting["accuracy"] for setting in result["settings"]}
    assert len(set(accuracies.values())) == 1  # the same weights, and drafts that change no answer
    acceptance = {
        s["name"]: s["introspective_acceptance"] for s in result["settings"] if "introspective_acceptance" in s
    }
    assert set(acceptance) == {"drafts of 1", "drafts of 3"} and all(0 <= share <= 1 for share in acceptance.values())
    assert result["over_autoregressive_at_equal_accuracy"] >= 1  # also where no setting is the default
    text = report("", {**MACHINE, "tasks": [result]})
    assert "third, drafts of 1, drafts of 3" in text and "over the autoregressive twin at equal accuracy" in text


def test_every_round_has_everyone_once_and_begins_elsewhere(tiny_task, built):
    run = built(tiny_task)
    assert "".join(run.in_turn("", "abcdef", 3)) == "abcdef" + "cdefab" + "efabcd"
    assert not list(run.in_turn("", "", 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(split="dev"), "task tiny: JsonlSource has no split dev; it has train, validation, test"),
        (dict(checkpoint="nowhere"), "no checkpoint at nowhere"),
        (dict(autoregressive_checkpoint=None), "autoregressive_checkpoint is not set, but autoregressive wants it"),
        (dict(scorer="dllm_var.benchmarking.Nothing"), "task tiny: scorer.*Nothing"),
    ],
)
def test_mistakes_show_before_anything_is_measured(tiny_task, built, change, message):
    with pytest.raises(UserError, match=message):
        built({**tiny_task, **change})


def test_a_sampler_that_does_not_fit_its_model_is_named(tiny_task, built):
    run = built({**tiny_task, "entries": [{**tiny_task["entries"][0], "checkpoint": "diffusion"}]})
    with pytest.raises(UserError, match="task tiny, autoregressive: this checkpoint is bidirectional"):
        run.run()
