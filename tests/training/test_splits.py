"""The same global batch gives the same loss, gradients, skips and averages, however it is split."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from splits import BAD_ROW, OBJECTIVES, Poisoned, fit

from dllm_var.callbacks import EmaWeights

TESTS = Path(__file__).parents[1]


def same(one, other):
    """Equal rows, and everything else up to the order in which floats are added."""
    assert [[row for row, *_ in step] for step in one["rows"]] == [[row for row, *_ in step] for step in other["rows"]]
    for first, second in zip(one["rows"], other["rows"], strict=True):
        torch.testing.assert_close(
            torch.tensor(first, dtype=torch.float64), torch.tensor(second, dtype=torch.float64), atol=1e-5, rtol=1e-5
        )
    assert one["losses"] == pytest.approx(other["losses"], rel=1e-6)
    for first, second in zip(one["weights"], other["weights"], strict=True):
        torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_accumulated_batches_of_any_size_are_one_batch(objective, tmp_path):
    whole = fit(tmp_path / "whole", objective=OBJECTIVES[objective]())
    assert [[row for row, *_ in step] for step in whole["rows"]] == [list(range(8)), list(range(8, 16))]
    for accumulate in (2, 4, 8):
        same(whole, fit(tmp_path / str(accumulate), accumulate=accumulate, objective=OBJECTIVES[objective]()))


def test_the_loss_is_the_mean_over_the_rows_tokens(tmp_path):
    result = fit(tmp_path)
    for loss, rows in zip(result["losses"], result["rows"], strict=True):
        assert loss == pytest.approx(sum(mean * n for _, mean, n in rows) / sum(n for *_, n in rows), rel=1e-6)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes make of it, and the checkpoint of two steps that one of their runs starts from."""
    folder = tmp_path_factory.mktemp("two")
    fit(folder / "start")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(TESTS / "splits.py"), str(folder), str(folder / "start" / "end.ckpt")]
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr[-3000:]
    return folder


def result(folder):
    return torch.load(folder / "result.pt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_processes_are_one(objective, two, tmp_path):
    whole = fit(tmp_path, objective=OBJECTIVES[objective]())
    for accumulate in (1, 2, 4):
        same(whole, result(two / f"{objective}{accumulate}"))


@pytest.mark.slow
def test_a_run_resumed_with_another_number_of_processes_goes_on_with_the_same_rows_and_noise(two, tmp_path):
    whole = fit(tmp_path / "whole", steps=4)
    rest = {name: values[2:] for name, values in whole.items() if name in ("losses", "rows", "weights")}
    same(rest, result(two / "resumed"))  # from one to two
    same(rest, fit(tmp_path / "rest", steps=4, checkpoint=two / "eos1" / "end.ckpt"))  # and from two to one


@pytest.mark.slow
def test_a_bad_row_of_one_process_is_skipped_by_both_and_found_once(two, tmp_path):
    found = result(two / "poisoned")
    assert torch.equal(found["weights"][0], found["weights"][1]) and torch.isfinite(found["final"]).all()
    assert not torch.equal(found["weights"][1], found["weights"][2])
    alone = fit(tmp_path, objective=Poisoned(), steps=3)
    assert [row for row, loss, _ in found["rows"][1] if math.isnan(loss)] == [BAD_ROW]
    assert [row for row, *_ in found["rows"][1]] == [row for row, *_ in alone["rows"][1]] == list(range(8, 16))


@pytest.mark.slow
def test_two_processes_average_as_one(two, tmp_path):
    alone = fit(tmp_path, steps=3, callbacks=[EmaWeights(0.5)], validate=2)
    found = result(two / "averaged")
    same(alone, found)
    torch.testing.assert_close(found["validated"][0], alone["validated"][0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found["final"], alone["final"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found["validated"][-1], found["final"])
    assert not torch.allclose(found["final"], found["weights"][-1])
