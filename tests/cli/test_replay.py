"""Recorded losses computed again: the same to the last bit, from a checkpoint some steps before."""

import json
import math
import re
from pathlib import Path

import pytest

from dllm_var.__main__ import main

CONFIGS = Path(__file__).parents[2] / "configs"
TOY = """
model:
  transformer: {hidden_size: 16, num_layers: 1, num_heads: 2}
  schedule: {warmup_steps: 0}
  loss_guard: {spike_factor: 1.0001, spike_window: 20} # nearly every other step, once there are 20
  optimizer: {init_args: {lr: 1.0e-4, adamw_lr: 1.0e-4}}
data: {context_length: 48, batch_size: 2}
trainer:
  accelerator: cpu
  devices: 1
  max_steps: 40
  accumulate_grad_batches: 2
  limit_val_batches: 1
  val_check_interval: 30
  callbacks:
    - class_path: dllm_var.callbacks.EmaWeights
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {every_n_train_steps: 15, save_top_k: -1}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with recorded losses, and checkpoints of the steps 15, 30 and (last.ckpt) 40."""
    folder = tmp_path_factory.mktemp("replay")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "toy.yaml").write_text(TOY)
        assert main(["fit", f"--config={CONFIGS / 'quickstart.yaml'}", "--config=toy.yaml"]) == 0
    return folder / "runs" / "quickstart" / "version_0"


def records(run):
    return [json.loads(line) for line in (run / "loss_guard.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("which", [0, -1])
def test_the_losses_are_the_recorded_ones(run, which, monkeypatch, capfd):
    monkeypatch.chdir(run)
    before = sorted(path.relative_to(run) for path in run.rglob("*"))
    record = records(run)[which]
    assert main(["replay", str(run), f"--step={record['step']}", "--rows=2"]) == 0
    out = capfd.readouterr().out
    began = max(step for step in (15, 30) if step < record["step"])
    assert f"step {record['step']} (spike), {record['step'] - began - 1} steps after" in out
    loss = f"{record['loss']:.6f}"
    assert f"loss {loss} recorded, {loss} replayed; row by row the same" in out
    worst = max(record["rows"], key=lambda row: row[1])
    assert re.search(rf"{worst[0]:,} +{worst[1]:.6f} +{worst[1]:.6f} +{worst[2]} +\S", out)
    assert sorted(path.relative_to(run) for path in run.rglob("*")) == before  # nothing is written


def test_a_loss_that_differs_in_its_last_bit_is_told(run, monkeypatch, capfd):
    """From an earlier checkpoint than need be: it trains up to the step all the same."""
    monkeypatch.chdir(run)
    record = next(record for record in records(run) if record["step"] > 30)
    record["rows"][0][1] = math.nextafter(record["rows"][0][1], math.inf)
    text = (run / "loss_guard.jsonl").read_text()
    (run / "loss_guard.jsonl").write_text(text + json.dumps(record) + "\n")
    first = next((run / "checkpoints").glob("*step=15*"))
    try:
        assert main(["replay", str(run), f"--step={record['step']}", f"--checkpoint={first}"]) == 0
    finally:
        (run / "loss_guard.jsonl").write_text(text)
    out = capfd.readouterr().out
    assert f"{record['step'] - 16} steps after" in out and "row by row NOT the same" in out
    assert f"loss {record['loss']:.6f} recorded, {record['loss']:.6f} replayed" in out


def test_what_cannot_be_replayed_is_said_in_one_line(run, tmp_path, capsys):
    steps = [record["step"] for record in records(run)]
    for arguments, words in (
        ([str(tmp_path)], "no loss of this run was out of the ordinary"),
        ([str(run), "--step=1"], f"has no step 1; it has {steps[0]}, "),
        ([str(run), f"--step={steps[0]}", f"--checkpoint={run / 'checkpoints' / 'last.ckpt'}"], "earlier"),
    ):
        assert main(["replay", *arguments]) == 2
        [line] = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        assert words in line
