"""Runs killed and resumed as benchmarks/faults.py does it, and large plans as benchmarks/shard_plans.py makes them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dllm_var.__main__ import main

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)


def test_an_epoch_for_1024_ranks_is_planned_in_sections(tmp_path):
    from shard_plans import measure

    result = measure(tmp_path, 50_000, 50, "concat", 1_024, steps=2)
    assert (result["samples"], result["sections"]) == (2_500_000, 2)
    assert result["tokens"] / (8_192 * result["rows"]) > 0.97
    assert result["batches_per_rank"] == -(-result["rows"] // (1_024 * 4))


@pytest.mark.slow
def test_killed_runs_end_with_the_same_weights(tmp_path):
    run = subprocess.run(
        [
            sys.executable,
            "faults.py",
            "--kills",
            "6",
            "--only",
            "kills",
            "ranks",
            "--output",
            str(tmp_path / "faults.json"),
        ],
        cwd=BENCHMARKS,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    one, two = json.loads((tmp_path / "faults.json").read_text())["kills"].values()
    assert sum(one["kills"].values()) >= 6 and sum(two["kills"].values()) >= 2


def losses(run):
    events = EventAccumulator(str(run)).Reload()
    return {event.step: event.value for event in events.Scalars("train/loss")}


@pytest.mark.slow
def test_a_run_goes_on_the_same_from_each_of_its_checkpoints(tmp_path, monkeypatch):
    """Also from those saved while batches are accumulated, while validation is due, and while a save waits for it."""
    from faults import THREE_BATCHES
    from short_runs import fingerprint, recipe

    def fit(folder, *more):
        settings = recipe(folder)
        settings["trainer"]["callbacks"][-1]["init_args"]["save_top_k"] = -1
        (folder / "recipe.yaml").write_text(json.dumps(settings))
        monkeypatch.chdir(folder)  # the best checkpoints are remembered with their folder
        assert main(["fit", "--config", "recipe.yaml", *THREE_BATCHES, *more]) == 0
        return fingerprint(folder)

    run = Path("runs/recipe/version_0")
    expected = fit(tmp_path / "whole")
    figures = losses(run)
    checkpoints = sorted((tmp_path / "whole" / run).glob("checkpoints/step=*.ckpt"))
    assert len(checkpoints) > 5
    for checkpoint in checkpoints:
        folder = tmp_path / checkpoint.stem
        (folder / run / "checkpoints").mkdir(parents=True)
        shutil.copy(checkpoint, folder / run / "checkpoints")
        assert fit(folder, "--resume") == expected
        assert losses(run).items() <= figures.items()


@pytest.mark.slow
def test_resuming_after_the_last_step_does_the_export_that_was_missed(tmp_path):
    from short_runs import recipe

    settings = recipe(tmp_path, absolute=True)
    logger = {"save_dir": str(tmp_path), "name": "runs"}
    settings["trainer"]["logger"] = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": logger}
    settings["trainer"] |= {"max_steps": 3, "limit_val_batches": 0}
    (tmp_path / "recipe.yaml").write_text(json.dumps(settings))
    arguments = ["fit", "--config", str(tmp_path / "recipe.yaml")]
    assert main(arguments) == 0
    run = tmp_path / "runs" / "version_0"
    weights = (run / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(run / "model")
    (run / "summary.json").unlink()
    assert main([*arguments, "--resume"]) == 0
    assert (run / "model" / "model.safetensors").read_bytes() == weights
    assert json.loads((run / "summary.json").read_text())["steps"] == 3


def test_a_checkpoint_that_could_run_code_is_not_offered(tmp_path):
    import torch

    from dllm_var.checkpoints.archive import write_archive
    from dllm_var.checkpoints.run_checkpoint import newest_usable

    write_archive({"a": 1}, tmp_path / "good.ckpt")
    torch.save({"a": 1}, tmp_path / "plain.ckpt")
    torch.save({"a": Path("x")}, tmp_path / "objects.ckpt")
    for age, name in enumerate(("objects", "plain", "good")):
        os.utime(tmp_path / f"{name}.ckpt", (1_000 - age, 1_000 - age))
    assert newest_usable(tmp_path) == tmp_path / "plain.ckpt"
