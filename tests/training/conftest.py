"""Runs of divided.py: in one process, and in two and four that share layers or rows."""

import os
import subprocess
import sys
from pathlib import Path

import divided
import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="session")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    for name in (*divided.RUNS, *divided.SHARED_ROWS):
        divided.fit(folder / name, name)
    return folder


def on_processes(folder, count):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "divided.py"), str(folder), str(count)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    assert run.returncode == 0, run.stderr[-3000:]
    return folder


@pytest.fixture(scope="session")
def two(tmp_path_factory):
    return on_processes(tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(scope="session")
def four(tmp_path_factory):
    return on_processes(tmp_path_factory.mktemp("four"), 4)
