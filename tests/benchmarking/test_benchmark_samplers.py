"""Clocks, gauges and the order of turns."""

import json
import sys
import time

import pytest
import torch

from dllm_var.benchmarking.instruments import ForwardClock, PeakMemory
from dllm_var.benchmarking.results import task_result
from dllm_var.benchmarking.samplers import Contender, Effort, decode, measure_forwards, turns
from dllm_var.benchmarking.settings import Setting
from dllm_var.checkpoints.pretrained import load_checkpoint
from dllm_var.cli.benchmark import build_parser, chosen_tasks, task_run
from dllm_var.errors import UserError
from dllm_var.sampling import BlockDiffusionSampler, DiffuSpecSampler, GuidedSampler, Sampler

CPU = torch.device("cpu")


def test_every_round_has_everyone_once_and_begins_elsewhere():
    assert list(turns("abcdef", 3)) == [list("abcdef"), list("cdefab"), list("efabcd")]
    assert [order[0] for order in turns("abcd", 4)] == list("abcd")
    assert all(sorted(order) == list("abc") for order in turns("abc", 7))
    assert list(turns("", 2)) == [[], []]


@pytest.fixture
def built(write_config):
    """Builds the run of a task from its config."""

    def build_run(task, effort=None, show=lambda *_: None):
        options = build_parser("benchmark").parse_args(["--config", write_config(task)])
        return task_run(chosen_tasks(options)[0], effort or Effort(), CPU, show)

    return build_run


@pytest.fixture
def model(tiny_task):
    return load_checkpoint(tiny_task["checkpoint"])[0]


def contender_of(model, **arguments):
    sampler = BlockDiffusionSampler(block_length=4, max_new_tokens=8, **arguments)
    return Contender(Setting("a", {}, "diffusion", "candidate", 1, 1, 1), sampler, model)


PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14]]


def test_one_at_a_time_every_forward_is_counted(model):
    run = decode(contender_of(model), PROMPTS, 1, None, CPU)
    assert len(run.seconds) == 4
    assert run.forward_calls == sum(answer.nfe for answer in run.answers) > 4
    assert 0 < run.forward_seconds < sum(run.seconds)


@pytest.mark.parametrize("name", ["guided", "diffuspec"])
def test_forwards_of_a_second_model_are_counted_too(name, tiny_task):
    paths = {kind: tiny_task[key] for kind, key in (("guide", "autoregressive_checkpoint"), ("drafter", "checkpoint"))}
    if name == "guided":
        sampler: Sampler = GuidedSampler(paths["guide"], block_length=4, max_new_tokens=8)
        main_model = load_checkpoint(paths["drafter"])[0]
    else:
        sampler = DiffuSpecSampler(paths["drafter"], shortest_draft=2, longest_draft=4, max_new_tokens=8)
        main_model = load_checkpoint(paths["guide"])[0]
    subject = Contender(Setting(name, {}, "diffusion", "candidate", 1, 1, 1), sampler, main_model)
    run = decode(subject, PROMPTS, 1, None, CPU)
    assert len(subject.models) == 2
    assert run.forward_calls == sum(answer.nfe + answer.auxiliary_nfe for answer in run.answers)


def test_batches_give_the_same_answers_with_fewer_forwards(model):
    subject = contender_of(model, batch_size=3)
    one_by_one, batched = decode(subject, PROMPTS, 1, None, CPU), decode(subject, PROMPTS, 4, None, CPU)
    assert [a.tokens for a in batched.answers] == [a.tokens for a in one_by_one.answers]
    assert len(batched.seconds) == 1 and batched.forward_calls < one_by_one.forward_calls
    assert subject.sampler.batch_size == 3


def test_the_clock_sees_what_happens_inside_forwards_and_leaves_no_trace(model, monkeypatch):
    plain = type(model).hidden_states

    def slow(self, *args, **kwargs):
        time.sleep(0.02)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "hidden_states", slow)
    run = decode(contender_of(model), PROMPTS[:1], 1, 4, CPU)
    assert run.forward_seconds >= 0.02 * run.forward_calls
    assert "hidden_states" not in vars(model) and "forward" not in vars(model.lm_head)


def test_the_clock_watches_several_models(model, tiny_task):
    other = load_checkpoint(tiny_task["autoregressive_checkpoint"])[0]
    with torch.inference_mode(), ForwardClock([model, other]) as clock:
        model(torch.tensor([[5, 6]]))
        other(torch.tensor([[5, 6]]))
    assert clock.calls == 2


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


def test_a_whole_task(tiny_task, built):
    said = []
    run = built(tiny_task, Effort(repeats=2, widths=(2,)), lambda *told: said.append(told))
    run.run()
    result = json.loads(json.dumps(task_result(run)))
    settings = {setting["name"]: setting for setting in result["settings"]}
    assert list(settings) == ["autoregressive", "fixed length", "threshold 0.9", "threshold 0"]
    finalists = {"autoregressive", result["chosen"]}  # timed three times as often again
    assert [len(c.single) for c in run.contenders] == [8 if name in finalists else 2 for name in settings]
    batched = [0 if name == "fixed length" else 8 if name in finalists else 2 for name in settings]
    assert [len(c.batched) for c in run.contenders] == batched
    assert {s["prompts"] for s in settings.values()} == {6, 2}
    assert settings["fixed length"]["nfe"] == 8 and settings["fixed length"]["batched"] == {}
    assert settings["threshold 0"]["nfe"] <= settings["threshold 0.9"]["nfe"]
    assert settings["threshold 0"]["selection"].keys() <= {"accuracy", "tokens_per_second"}
    assert settings["autoregressive"]["selection"] == {}
    assert result["chosen"] in settings and result["ratios"]["over_autoregressive"] > 0
    [curve] = result["curves"]
    assert [point["value"] for point in curve["points"]] == [0.0, 0.9] and curve["aup"] >= 0
    assert [cost["width"] for cost in result["per_forward"]] == [1, 2]
    # In turn: the second round begins further on, and no setting has its rounds one after the other.
    rounds = [item.split(" ", 1)[1] for _, phase, item in said if phase.startswith("one prompt at a time")]
    names = list(settings)
    assert rounds == names + names[2:] + names[:2]


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
    entries = [{**tiny_task["entries"][0], "checkpoint": "diffusion"}]
    run = built({**tiny_task, "entries": entries})
    with pytest.raises(UserError, match="task tiny, autoregressive: this checkpoint is bidirectional"):
        run.run()
