"""The training benchmark: what it adds up, what its baselines are, and one small run to its files."""

import json
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml

from dllm_var.__main__ import main
from dllm_var.benchmarking.instruments import PHASES, StepClock
from dllm_var.benchmarking.settings import COMPILED, FULL, OURS, PADDED, PLAIN_LOOP, TrainingCase
from dllm_var.benchmarking.trainers import LightningMarks, PaddedTrainer, bidirectional_llama
from dllm_var.benchmarking.training import add_up, bars, medians, over, training_ratios
from dllm_var.cli.benchmark import build_parser, chosen_cases
from dllm_var.model import Transformer, TransformerConfig
from dllm_var.objectives import KeyedNoise

ROOT = Path(__file__).parent.parent.parent
SHAPE = {"hidden_size": 32, "num_layers": 2, "num_heads": 2}


def case(**changes):
    defaults = dict(name="tiny", vocab_size=300, transformer=SHAPE, context_length=64, prompt_tokens=6)
    return TrainingCase(**{**defaults, "answer_tokens": 10, "steps": 1, **changes})


def test_phases_add_up_to_the_step(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = StepClock(torch.device("cpu"))
    for phase, seconds in (("data", 1.0), ("forward", 2.0), ("head_and_loss", 3.0), ("backward", 4.0)):
        now[0] += seconds
        clock.mark(phase)
    clock.count(tokens=75, positions=100, loss_tokens=30, pairs=750)
    now[0] += 5.0
    clock.end_step()
    figures = add_up(clock.steps)
    assert figures["step_seconds"] == pytest.approx(15.0) and figures["tokens_per_second"] == pytest.approx(75 / 15)
    assert figures["phase_seconds"] == pytest.approx(
        {"data": 1.0, "forward": 2.0, "head_and_loss": 3.0, "backward": 4.0, "optimizer": 5.0}
    )
    assert (figures["padding_share"], figures["loss_share"]) == (pytest.approx(0.25), pytest.approx(0.4))
    assert figures["pairs_per_token"] == 10


def figures(tokens_per_second, memory):
    phases = dict.fromkeys(PHASES, 0.1)
    return {"tokens_per_second": tokens_per_second, "peak_memory_bytes": memory, "phase_seconds": phases}


def test_ratios_are_medians_of_those_within_a_round():
    ours = [figures(20.0, 50), figures(90.0, 50), figures(30.0, 50)]
    base = [figures(10.0, 100), figures(30.0, 100), figures(30.0, 100)]  # the machine was faster in the second round
    contenders = [{"name": COMPILED, "rounds": ours}, {"name": PLAIN_LOOP, "rounds": base}]
    ratios = over(contenders, PLAIN_LOOP)
    assert ratios[COMPILED] == {"tokens_per_second": 2.0, "peak_memory": 0.5}
    assert ratios[PLAIN_LOOP] == {"tokens_per_second": 1.0, "peak_memory": 1.0}
    assert over(contenders[:1], PLAIN_LOOP) == {}
    assert medians(ours)["tokens_per_second"] == 30.0 and medians(ours)["phase_seconds"]["data"] == 0.1


def test_bars_pass_fail_or_were_not_measured():
    asked = case(bars={"tokens_per_second_126k": 2.0, "peak_memory_126k": 0.4, "mfu": 0.6})
    result = {
        "ours": OURS,
        "contenders": [{"name": OURS, "mfu": 0.3}, {"name": FULL, "mfu": 0.65}],
        "over_plain_loop": {OURS: {"tokens_per_second": 2.5, "peak_memory": 0.5}},
    }
    result["bars"] = bars(asked, result)
    passed = {name: bar["passed"] for name, bar in result["bars"].items()}
    assert passed == {"tokens_per_second_126k": True, "peak_memory_126k": False, "mfu": True}
    top = training_ratios([result])
    assert (top["tokens_per_second_126k"], top["mfu"]) == (2.5, 0.65) and set(top["bars"]) == set(passed)
    result["over_plain_loop"] = {}
    assert bars(asked, result)["tokens_per_second_126k"]["passed"] is None


def test_the_baseline_has_our_shape_and_reads_both_ways():
    shape = TransformerConfig(**SHAPE, vocab_size=300)
    llama = bidirectional_llama(shape)
    assert sum(p.numel() for p in llama.parameters()) == Transformer(shape).num_parameters
    tokens = torch.zeros(2, 4, dtype=torch.long)
    tokens[1, -1] = 1
    with torch.no_grad():
        logits = llama(input_ids=tokens).logits
    assert not torch.allclose(logits[0, 0], logits[1, 0], rtol=0, atol=1e-9)


def test_padded_samples_are_the_packed_ones_masked_at_the_same_rates(tmp_path):
    padded = PaddedTrainer(case(), torch.device("cpu"), tmp_path)
    table = padded.data.table("train")
    batch = padded.collate(list(range(len(table))))
    real, loss = batch["attention_mask"].bool(), batch["labels"] >= 0
    assert int(real.sum()) == len(table.tokens) and not (loss & ~real).any()
    rows = padded.data.rows("train")
    packed = rows.__getitems__(range(len(rows)))
    noised = padded.objective.corrupt(packed, KeyedNoise(0))
    here, there = (
        float(x) for x in (loss.sum() / real.sum(), noised.loss_mask.sum() / packed["segment_ids"].ge(0).sum())
    )
    assert here == pytest.approx(there, abs=0.06)
    assert (batch["input_ids"][loss] == padded.data.tokenizer.mask_id).all()


def test_quick_run_writes_its_files(tmp_path, capsys):
    config, output = tmp_path / "training.yaml", tmp_path / "out" / "result.json"
    cases = [{"name": "tiny", "vocab_size": 300, "bars": {"mfu": 0.6, "tokens_per_second_256": 1.3}}]
    config.write_text(yaml.safe_dump({"trainings": cases}))
    assert main(["benchmark", "--config", str(config), "--output", str(output), "--quick"]) == 0
    shown = capsys.readouterr()
    assert "quick run: not for comparison" in shown.out and "not judged" in shown.out
    result = json.loads(output.read_text())
    assert (result["kind"], result["quick"], result["partial"], result["repeats"]) == ("training", True, False, 2)
    assert result["ratios"]["mfu"] > 0 and result["ratios"]["tokens_per_second_256"] > 0
    names = {contender["name"]: contender for contender in result["trainings"][0]["contenders"]}
    assert set(names) == {OURS, PLAIN_LOOP, PADDED}
    assert names[OURS]["padding_share"] == 0 and names[PADDED]["padding_share"] > 0.1
    assert names[OURS]["pairs_per_token"] < 40 and names[PLAIN_LOOP]["pairs_per_token"] == 64
    assert names[OURS]["loss_share"] == pytest.approx(names[PLAIN_LOOP]["loss_share"])  # the same rows and noise
    for contender in names.values():
        assert all(seconds > 0 for seconds in contender["phase_seconds"].values())
        assert sum(contender["phase_seconds"].values()) == pytest.approx(contender["step_seconds"], rel=0.5)
    assert f"| {PLAIN_LOOP} " in output.with_suffix(".md").read_text()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_within_fit_saves_what_is_measured(number, status, tmp_path, capsys, monkeypatch):
    """In the second round, when Lightning's own handlers are in place."""
    rounds, begin = [], LightningMarks.on_train_batch_start

    def interrupted(self, trainer, module, batch, batch_idx):
        begin(self, trainer, module, batch, batch_idx)
        rounds.append(batch_idx == 0)
        if sum(rounds) == 3:  # the warm-up is the first
            signal.raise_signal(number)

    monkeypatch.setattr(LightningMarks, "on_train_batch_start", interrupted)
    config, output = tmp_path / "training.yaml", tmp_path / "result.json"
    cases = [{"name": "tiny", "vocab_size": 300, "contenders": [OURS], "bars": {"mfu": 0.6}}]
    config.write_text(yaml.safe_dump({"trainings": cases}))
    assert main(["benchmark", "--config", str(config), "--output", str(output), "--quick"]) == status
    result = json.loads(output.read_text())
    assert result["partial"] is True
    [ours] = result["trainings"][0]["contenders"]
    assert len(ours["rounds"]) == 1 and ours["tokens_per_second"] > 0
    assert "partial and quick run" in capsys.readouterr().out + output.with_suffix(".md").read_text()


def test_a_signal_before_the_first_round_leaves_files_without_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(LightningMarks, "on_before_backward", lambda *_: signal.raise_signal(signal.SIGTERM))
    config, output = tmp_path / "training.yaml", tmp_path / "result.json"
    config.write_text(yaml.safe_dump({"trainings": [{"name": "tiny", "vocab_size": 300, "contenders": [OURS]}]}))
    assert main(["benchmark", "--config", str(config), "--output", str(output), "--quick"]) == 143
    result = json.loads(output.read_text())
    assert (result["partial"], result["trainings"]) == (True, [])
    assert "partial and quick run" in output.with_suffix(".md").read_text()


def test_the_shipped_config_asks_for_every_ratio():
    options = build_parser("benchmark").parse_args(["--config", str(ROOT / "benchmarks/training.yaml")])
    cases = chosen_cases(options)
    asked = {name: value for one in cases for name, value in one.bars.items()}
    assert asked == {"tokens_per_second_256": 1.3, "tokens_per_second_126k": 2.0, "peak_memory_126k": 0.5, "mfu": 0.6}
    for one in cases:
        assert {COMPILED, FULL, PLAIN_LOOP} <= set(one.contenders) and one.context_length == 1024
    mfu = next(one for one in cases if "mfu" in one.bars)
    with torch.device("meta"):
        parameters = Transformer(TransformerConfig(**mfu.transformer, vocab_size=mfu.vocab_size)).num_parameters
    assert 45e6 < parameters < 55e6
