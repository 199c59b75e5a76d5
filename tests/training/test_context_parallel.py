"""Context parallelism: processes that share rows train as one, with the patterns of attention that one has."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import divided
import pytest
import torch
from test_tensor_parallel import assert_same_run, result

from dllm_var.errors import UserError
from dllm_var.model import TransformerConfig
from dllm_var.model.sharding import share_rows
from dllm_var.training.strategies import ContextParallel

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    for name in divided.ROWS:
        divided.fit(folder / name, name, rows=True)
    return folder


def on_processes(folder, count):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "divided.py"), "rows", str(folder), str(count)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    assert run.returncode == 0, run.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return on_processes(tmp_path_factory.mktemp("two"), 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", divided.ROWS)
def test_two_processes_that_share_rows_train_as_one(name, alone, two):
    assert_same_run(result(two / f"{name}2"), result(alone / name), "adamw")
