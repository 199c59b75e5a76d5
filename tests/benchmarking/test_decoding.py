"""The benchmark of one device: its dry run at toy size, and the loop that it compares with."""

import json
import signal
from pathlib import Path

import pytest
import torch
import yaml

from dllm_var.__main__ import main
from dllm_var.benchmarking.decoding import DecodingRun, released_loop
from dllm_var.benchmarking.instruments import random_model
from dllm_var.benchmarking.settings import DecodingCase
from dllm_var.model import TransformerConfig
from dllm_var.sampling import BlockDiffusionSampler, ConfidenceThreshold

ROOT = Path(__file__).parent.parent.parent
CPU = torch.device("cpu")


@pytest.mark.parametrize("spread", [0.02, 3.0])  # one token at a time, and several
def test_the_released_loop_takes_the_forwards_of_our_sampler(spread):
    shape = TransformerConfig(
        hidden_size=32, num_layers=2, num_heads=2, vocab_size=50, mask_id=0, terminator_ids=[1], pad_id=2
    )
    torch.manual_seed(0)
    model = random_model(shape, CPU, torch.float32)
    with torch.no_grad():
        model.lm_head.weight.mul_(spread / 0.02)
    prompt = [5, 9, 3, 7, 7]
    sampler = BlockDiffusionSampler(ConfidenceThreshold(0.9), block_length=4, terminator_last=False)
    answer = sampler.generate(model, [prompt], suppress=[1], max_new_tokens=16)[0]
    forwards = released_loop(model, prompt, 4, 16)
    assert forwards == answer.nfe and (forwards == 16) == (spread < 1)


@pytest.mark.slow
def test_a_dry_run_measures_every_way_and_writes_the_table(tmp_path, capsys):
    output = tmp_path / "gpu.json"
    arguments = ["--config", str(ROOT / "benchmarks" / "gpu.yaml"), "--output", str(output), "--quick"]
    assert main(["benchmark", *arguments, "--only", "8.0B", "1.1B, block diffusion"]) == 0
    result, text = json.loads(output.read_text()), output.with_suffix(".md").read_text()
    decoded, trained = result["decodings"][0], result["trainings"][0]
    ways = {way["name"]: way["milliseconds"] for way in decoded["ways"]}
    assert {"bare forward", "block diffusion", "block diffusion, batch", "autoregressive", "released loop"} <= set(ways)
    assert "transformers' generate" in ways and all(value > 0 for value in ways.values())
    assert text.startswith("# Measured on cpu") and "| block diffusion, batch" in text
    assert trained["planned"]["memory"] > 0 and "`plan` says" in text
    assert trained["contenders"][0]["read_per_token"] > 1.5 and trained["contenders"][0]["warm_up_seconds"] > 0
    assert result["ratios"]["bars"]["over_released_loop (8.0B)"]["passed"] is None  # a quick run is not judged


def test_what_has_no_memory_is_said_and_the_next_is_measured(monkeypatch):
    def full(self):
        raise torch.OutOfMemoryError("CUDA out of\nmemory")

    full.__name__ = "_diffusion"
    monkeypatch.setattr(DecodingRun, "_diffusion", full)
    run = DecodingRun(DecodingCase("tiny").quick(), CPU)
    run.run()
    assert run.result()["failed"] == {"diffusion": "CUDA out of memory"} and "autoregressive" in run.milliseconds


def test_the_time_limit_writes_what_has_been_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(signal, "alarm", lambda seconds: seconds and signal.raise_signal(signal.SIGALRM))
    config, output = tmp_path / "gpu.yaml", tmp_path / "gpu.json"
    config.write_text(yaml.safe_dump({"minutes": 6, "decodings": [{"name": "tiny"}]}))
    assert main(["benchmark", "--config", str(config), "--output", str(output)]) == 0
    assert json.loads(output.read_text())["partial"] is True
