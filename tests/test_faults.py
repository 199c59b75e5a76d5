"""Some of the faults of benchmarks/faults.py: malformed inputs of each kind, large plans, runs killed and resumed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)


@pytest.mark.parametrize(
    ("kind", "numbers"),
    [("jsonl", 40), ("parquet", 20), ("prompt", 8), pytest.param("config", 40, marks=pytest.mark.slow)],
)
def test_malformed_inputs_are_refused_with_a_named_cause_or_used_whole(kind, numbers, tmp_path):
    from malformed_inputs import attempt

    outcomes = [attempt(kind, number, tmp_path / "work") for number in range(numbers)]
    assert [outcome for outcome in outcomes if not outcome.good] == []
    assert any(outcome.result == "refused" for outcome in outcomes)


@pytest.mark.slow
def test_malformed_checkpoints_are_refused_with_a_named_cause(tmp_path):
    from malformed_inputs import attempt

    outcomes = [attempt("checkpoint", number, tmp_path / "work") for number in range(60)]
    assert [outcome for outcome in outcomes if not outcome.good] == []
    assert {outcome.result for outcome in outcomes} == {"refused", "used"}


def test_what_is_lost_on_the_way_would_be_seen(tmp_path, monkeypatch):
    """The fuzzer's own test: data that silently loses a record is not taken for whole."""
    import malformed_data
    from malformed_inputs import attempt

    class Losing(malformed_data.JsonlSource):
        def read_file(self, file):
            return (located for number, located in enumerate(super().read_file(file)) if number != 1)

    monkeypatch.setattr(malformed_data, "JsonlSource", Losing)
    assert "partial" in {attempt("jsonl", number, tmp_path / "work").result for number in range(40)}


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_an_epoch_for_1024_ranks_is_planned_in_sections(packing, tmp_path):
    from shard_plans import make_table, measure

    result = measure(make_table(tmp_path, 50_000, 50), packing, 1_024, 2)
    assert (result["samples"], result["sections"]) == (2_500_000, 2)
    assert result["tokens"] / (8_192 * result["rows"]) > 0.97
    assert result["batches_per_rank"] == -(-result["rows"] // (1_024 * 4))


@pytest.mark.slow
@pytest.mark.parametrize("parts", [("kills", "ranks"), ("accumulation",)], ids="+".join)
def test_killed_runs_end_with_the_same_weights(parts, tmp_path):
    options = [option for part in parts for option in ("--only", part)]
    run = subprocess.run(
        [sys.executable, "faults.py", "--quick", *options, "--output", str(tmp_path)],
        cwd=BENCHMARKS,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    one, two = json.loads((tmp_path / "faults.json").read_text())["kills"].values()
    assert one["kills"] >= (6 if "kills" in parts else 2) and two["kills"] >= 2
    assert sum(one["phases"].values()) == one["kills"]


def test_resuming_after_the_last_step_does_the_export_that_was_missed(tmp_path):
    from malformed_models import in_this_process
    from short_run import recipe

    settings = recipe(tmp_path, absolute=True)
    logger = {"save_dir": str(tmp_path), "name": "runs"}
    settings["trainer"]["logger"] = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": logger}
    settings["trainer"] |= {"max_steps": 3, "limit_val_batches": 0}
    (tmp_path / "recipe.yaml").write_text(json.dumps(settings))
    arguments = ["fit", "--config", str(tmp_path / "recipe.yaml")]
    in_this_process(arguments)
    run = tmp_path / "runs" / "version_0"
    weights = (run / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(run / "model")
    (run / "summary.json").unlink()
    in_this_process([*arguments, "--resume"])
    assert (run / "model" / "model.safetensors").read_bytes() == weights
    assert json.loads((run / "summary.json").read_text())["steps"] == 3


def test_a_checkpoint_that_could_run_code_is_not_offered(tmp_path):
    import torch

    from dllm_var.checkpointing.choose import newest_usable
    from dllm_var.checkpointing.files import write_file

    write_file({"a": 1}, tmp_path / "good.ckpt")
    torch.save({"a": 1}, tmp_path / "plain.ckpt")
    torch.save({"a": Path("x")}, tmp_path / "objects.ckpt")
    for age, name in enumerate(("objects", "plain", "good")):
        os.utime(tmp_path / f"{name}.ckpt", (1_000 - age, 1_000 - age))
    assert newest_usable(tmp_path) == tmp_path / "plain.ckpt"
