"""The training benchmark: what it adds up, what its baselines are, and one small run to its files."""

import json
import signal
from pathlib import Path

import pytest
import torch
import yaml

from dllm_var.__main__ import main
from dllm_var.benchmarking.contenders import PaddedLoop, bidirectional_llama, build_contender
from dllm_var.benchmarking.instruments import PHASES, StepClock
from dllm_var.benchmarking.settings import (
    AUTOMODEL_LOSS,
    DLLM_LOSS,
    FULL,
    OURS,
    PADDED_LOOP,
    PLAIN_LOOP,
    TrainingCase,
)
from dllm_var.benchmarking.training import add_up, bars, medians, over, training_ratios
from dllm_var.model import Transformer, TransformerConfig

ROOT = Path(__file__).parent.parent.parent
CPU = torch.device("cpu")
SHAPE = {"hidden_size": 32, "num_layers": 2, "num_heads": 2}


def test_a_steps_phases_and_counts():
    clock = StepClock(CPU)
    segments = torch.tensor([[0, 0, 1, 1, 1, -1], [0, 0, 0, 0, 0, 0]])
    for phase in ("data", "forward", "head_and_loss", "backward"):
        clock.mark(phase)
    clock.end_step(segments, {"loss_tokens": 5, "read_tokens": 12, "attended_pairs": 49})
    clock.end_step(segments, {"loss_tokens": torch.tensor(5), "read_tokens": 12, "attended_pairs": 66})
    figures = add_up(clock.steps)
    phases = figures["phase_seconds"]
    assert set(phases) == set(PHASES) and all(seconds > 0 for seconds in phases.values())
    assert figures["step_seconds"] == pytest.approx(sum(phases.values()))
    assert figures["tokens_per_second"] == pytest.approx(11 / figures["step_seconds"])
    assert figures["loss_share"] == pytest.approx(5 / 11)
    assert figures["pairs_per_token"] == pytest.approx((49 + 66) / 22)
    assert figures["read_per_token"] == pytest.approx(24 / 22)


def figures(tokens_per_second, memory):
    phases = dict.fromkeys(PHASES, 0.1)
    return {"tokens_per_second": tokens_per_second, "peak_memory_bytes": memory, "phase_seconds": phases}


def test_ratios_are_medians_of_those_within_a_round():
    ours = [figures(20.0, 50), figures(90.0, 50), figures(30.0, 50)]
    base = [figures(10.0, 100), figures(30.0, 100), figures(30.0, 100)]  # the machine was faster in the second round
    assert over(ours, base) == {"tokens_per_second": 2.0, "peak_memory": 0.5}
    assert over(ours, []) == {"tokens_per_second": None, "peak_memory": None}
    assert medians(ours)["tokens_per_second"] == 30.0 and medians(ours)["phase_seconds"]["data"] == 0.1


def test_bars_pass_fail_or_were_not_measured():
    asked = {"tokens_per_second_126k": 2.0, "peak_memory_126k": 0.4, "mfu": 0.6}
    contenders = [{"name": OURS, "mfu": 0.3}, {"name": FULL, "mfu": 0.65}]
    found = bars(asked, OURS, contenders, {OURS: {"tokens_per_second": 2.5, "peak_memory": 0.5}})
    passed = {name: bar["passed"] for name, bar in found.items()}
    assert passed == {"tokens_per_second_126k": True, "peak_memory_126k": False, "mfu": True}
    top = training_ratios([{"bars": found}])
    assert (top["tokens_per_second_126k"], top["mfu"]) == (2.5, 0.65) and set(top["bars"]) == set(passed)
    assert bars(asked, OURS, contenders, {})["tokens_per_second_126k"]["passed"] is None


def test_the_baseline_has_our_shape_and_reads_both_ways():
    shape = TransformerConfig(**SHAPE, vocab_size=300)
    llama = bidirectional_llama(shape)
    assert sum(p.numel() for p in llama.parameters()) == Transformer(shape).num_parameters
    tokens = torch.zeros(2, 4, dtype=torch.long)
    tokens[1, -1] = 1
    with torch.no_grad():
        logits = llama(input_ids=tokens).logits
    assert not torch.allclose(logits[0, 0], logits[1, 0], rtol=0, atol=1e-9)


def test_padded_batches_have_whole_samples_of_similar_lengths_that_see_themselves_alone(tmp_path):
    case = TrainingCase("padded", 300, SHAPE, 256, 2, 20, [PADDED_LOOP], prompt_tokens=10, answer_tokens=20)
    loop = PaddedLoop(PADDED_LOOP, case, CPU, tmp_path)
    table, batches = loop.data().table("train"), loop.batches()
    first = [next(batches) for _ in range(20)]
    seen = [row for batch in first for row in batch["row"].tolist()]
    assert len(set(seen)) == len(seen)
    used = torch.stack([(batch["segment_ids"] >= 0).float().mean() for batch in first])
    assert used.mean() > 0.9  # 0.5 without grouping
    batch = next(batch for batch in first if not (batch["segment_ids"] >= 0).all())
    for row, tokens, present in zip(batch["row"], batch["input_ids"], batch["segment_ids"] >= 0, strict=True):
        start, end = table.offsets[int(row)], table.offsets[int(row) + 1]
        assert tokens[present].tolist() == table.tokens[start:end].tolist()
    counted = []
    loop.clock.end_step = lambda segments, counts: counted.append(int(counts["attended_pairs"]))
    loop.batches = lambda: iter([batch])
    logits = []
    loop.model.register_forward_hook(lambda model, args, output: logits.append(output.logits.detach()))
    loop.train(1)
    lengths = (batch["segment_ids"] >= 0).sum(dim=1)
    assert counted == [int(lengths.square().sum())]
    loop.model.load_state_dict(bidirectional_llama(loop.shape).state_dict())
    row = int(lengths.argmin())
    noised = loop.objective.corrupt(batch, loop.noise)
    alone = loop.model(input_ids=noised.input_ids[row, None, : lengths[row]]).logits
    padded = loop.model(input_ids=noised.input_ids, attention_mask=(batch["segment_ids"] >= 0).long()).logits
    torch.testing.assert_close(padded[row, : lengths[row]], alone[0])


@pytest.mark.parametrize("name", [DLLM_LOSS, AUTOMODEL_LOSS])
def test_the_losses_of_peers_are_that_of_our_objective(name, tmp_path):
    case = TrainingCase("peers", 300, SHAPE, 128, 2, 1, [name], prompt_tokens=10, answer_tokens=20)
    loop = build_contender(name, case, CPU, tmp_path)
    noised = loop.objective.corrupt(next(loop.batches()), loop.noise)
    head, hidden = torch.nn.Linear(32, 300, bias=False), torch.randn(*noised.targets.shape, 32)
    ours = loop.objective.score(head, hidden.flatten(0, 1)[noised.scored], noised).loss_sum / noised.normaliser
    torch.testing.assert_close(loop.loss(head(hidden), noised), ours)
    assert noised.loss_mask.any() and noised.weights.max() > 1


def run_quick(tmp_path, **settings):
    config, output = tmp_path / "training.yaml", tmp_path / "out" / "result.json"
    config.write_text(yaml.safe_dump({"trainings": [{"name": "tiny", "vocab_size": 300, **settings}]}))
    status = main(["benchmark", "--config", str(config), "--output", str(output), "--quick"])
    return status, json.loads(output.read_text()), output.with_suffix(".md").read_text()


@pytest.mark.slow
def test_quick_run_writes_its_files(tmp_path):
    status, result, text = run_quick(tmp_path, bars={"mfu": 0.6, "tokens_per_second_256": 1.3})
    assert status == 0 and "quick run: not for comparison" in text and "not judged" in text
    assert (result["kind"], result["quick"], result["partial"], result["repeats"]) == ("training", True, False, 2)
    assert result["ratios"]["mfu"] > 0 and result["ratios"]["tokens_per_second_256"] > 0
    names = {contender["name"]: contender for contender in result["trainings"][0]["contenders"]}
    assert set(names) == {OURS, PLAIN_LOOP, PADDED_LOOP}
    assert names[OURS]["pairs_per_token"] < 40 and names[PLAIN_LOOP]["pairs_per_token"] == 64
    assert names[OURS]["loss_share"] == pytest.approx(names[PLAIN_LOOP]["loss_share"])  # the same rows and noise
    for contender in names.values():
        assert all(seconds > 0 for seconds in contender["phase_seconds"].values())
        assert sum(contender["phase_seconds"].values()) == pytest.approx(contender["step_seconds"], rel=0.5)
    assert f"| {PLAIN_LOOP} " in text


@pytest.mark.parametrize(
    ("step", "number", "status"),
    [(1, signal.SIGTERM, 143), (4, signal.SIGINT, 130)],
    ids=["warm-up", "second round"],
)
def test_a_signal_within_fit_saves_what_is_measured(step, number, status, tmp_path, monkeypatch):
    steps, mark = [], StepClock.mark  # one to warm up; a round has two

    def interrupted(self, phase):
        mark(self, phase)
        if phase == "data":
            steps.append(phase)
            if len(steps) == step:
                signal.raise_signal(number)

    monkeypatch.setattr(StepClock, "mark", interrupted)
    found, result, text = run_quick(tmp_path, contenders=[OURS], bars={"mfu": 0.6})
    assert (found, result["partial"]) == (status, True) and "partial and quick run" in text
    contenders = result["trainings"][0]["contenders"]
    assert [len(ours["rounds"]) for ours in contenders] == ([] if step == 1 else [1])
