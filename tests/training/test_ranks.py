"""Two processes that train together: they stop together, fail together, and go on bit for bit."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from tiny_data import data_settings, write_words

from dllm_var.checkpoints.archive import check, read_state
from dllm_var.checkpoints.pretrained import load_checkpoint
from dllm_var.checkpoints.run_checkpoint import newest_checkpoint
from dllm_var.cli.fit import failure
from dllm_var.errors import UserError

ROOT = Path(__file__).parent.parent.parent
LAST = Path("runs/tiny/version_0/checkpoints/last.ckpt")
WAIT = 300  # seconds, on a busy machine


class Event(Callback):
    """Raises, or sends a signal to its own process, at one step of one rank.

    Args:
        what: Name of a signal, or `error`.
        step: The step, from 1.
        rank: The rank.
    """

    def __init__(self, what: str, step: int, rank: int = 1) -> None:
        self.what, self.step, self.rank = what, step, rank

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if (trainer.global_step + 1, trainer.global_rank) == (self.step, self.rank):
            if self.what == "error":
                raise KeyError("a bug")
            os.kill(os.getpid(), getattr(signal, self.what))


class Rows(Callback):
    """Writes down what each step was trained on, and its loss."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        rows = trainer.strategy.all_gather(batch["row"]).flatten().tolist()
        if trainer.is_global_zero:
            with open("rows.jsonl", "a") as file:
                file.write(
                    json.dumps([trainer.global_step, rows, float(trainer.callback_metrics["train/loss"])]) + "\n"
                )


def recipe(**trainer):
    words = [(a + b + a, "K AE T") for a in "bcdfghklmnprst" for b in "aeiou"]
    write_words("words.jsonl", words)
    checkpoints = {"save_last": True, "every_n_train_steps": 2, "monitor": "step", "mode": "max", "save_top_k": 2}
    config = {
        "model": {"transformer": {"hidden_size": 16, "num_layers": 2, "num_heads": 2}, "schedule": {"warmup_steps": 2}},
        "data": data_settings(4),
        "trainer": {
            "accelerator": "cpu",
            "devices": 2,
            "strategy": "ddp",
            "limit_val_batches": 0,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [
                {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": checkpoints},
                {"class_path": "test_ranks.Rows"},
            ],
            **trainer,
        },
    }
    Path("tiny.yaml").write_text(yaml.safe_dump(config))
    return ["fit", "--config", "tiny.yaml"]


def event(**arguments):
    added = [{"class_path": "test_ranks.Event", "init_args": arguments}]
    Path("event.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks+": added}}))
    return ["--config", "event.yaml"]


@contextlib.contextmanager
def started(arguments):
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{Path(__file__).parent}",
        "OMP_NUM_THREADS": "1",
    }
    with open("output.txt", "w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "dllm_var", *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run(arguments):
    """Runs to the end; returns the status and what was printed."""
    with started(arguments) as process:
        status = process.wait(WAIT)
        deadline = time.monotonic() + 15
        while members(process.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not members(process.pid), "a process is left over"
        return status, Path("output.txt").read_text()


def members(group):
    """Process ids of a session that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == group and fields[0] != "Z":
                found.append(int(stat.parent.name))
    return found


def until(condition, process):
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None, Path("output.txt").read_text()
        time.sleep(0.05)


def rows():
    lines = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    Path("rows.jsonl").unlink()
    return lines


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")


@pytest.mark.slow
@needs_proc
def test_whatever_befalls_one_of_two_both_end_and_a_checkpoint_is_left(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = recipe(max_steps=1_000_000)

    status, output = run([*command, *event(what="SIGTERM", step=3, rank=1)])  # the signal goes to one alone
    assert status == 143, output
    assert "Traceback" not in output and "stopped at step 3" in output
    assert torch.load(LAST, weights_only=True)["global_step"] == 3

    status, output = run([*command, "--resume", *event(what="error", step=6, rank=1)])
    assert status in (2, -signal.SIGKILL), output  # whichever comes first: a lost connection, or Lightning's watch
    assert "KeyError: 'a bug'" in output and ("lost contact" in output or "terminated with code" in output)
    assert torch.load(newest_checkpoint(LAST.parent), weights_only=True)["global_step"] == 4

    status, output = run([*command, "--resume", *event(what="SIGKILL", step=6, rank=1)])
    assert status in (2, -signal.SIGKILL), output
    assert "Traceback" not in output, output
    assert "lost contact" in output or "terminated with code -9" in output

    status, output = run([*command, "--resume", *event(what="SIGKILL", step=6, rank=0)])  # `run` sees both gone
    assert status == -signal.SIGKILL
    assert torch.load(newest_checkpoint(LAST.parent), weights_only=True)["global_step"] == 4


@pytest.mark.slow
@needs_proc
def test_a_child_that_still_imports_ends_with_the_first_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with started(recipe(max_steps=1_000_000)) as process:
        until(lambda: len(members(process.pid)) > 1, process)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        deadline = time.monotonic() + 15
        while members(process.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not members(process.pid)


@pytest.mark.slow
@needs_proc
def test_a_data_loading_process_that_is_killed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = recipe(max_steps=1_000_000, devices=1, strategy="auto")
    with started([*command, "--data.num_workers=1"]) as process:
        until(LAST.exists, process)
        worker = next(pid for pid in members(process.pid) if pid != process.pid)
        os.kill(worker, signal.SIGKILL)
        assert process.wait(WAIT) == 2
    output = Path("output.txt").read_text()
    assert "Traceback" not in output, output
    assert "DataLoader worker" in output and "data.num_workers" in output
    check(newest_checkpoint(LAST.parent))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_go_on_bit_for_bit(strategy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {"max_steps": 7}
    if strategy == "fsdp2":
        settings["strategy"] = {"class_path": "dllm_var.training.strategies.FSDP2"}
    command = recipe(**settings)
    command += ["--trainer.callbacks+=dllm_var.callbacks.ExportWeights"]
    weights = "runs/tiny/version_{}/model/model.safetensors"

    assert run(command)[0] == 0
    whole, expected = rows(), Path(weights.format(0)).read_bytes()
    status, output = run([*command, *event(what="SIGTERM", step=3, rank=0), "--data.num_workers=1"])
    assert status == 143, output
    last = LAST.parent.parent.parent / "version_1" / "checkpoints" / "last.ckpt"
    check(last)
    assert last.is_dir() == (strategy == "fsdp2")
    stopped = read_state(last) if last.is_dir() else torch.load(last, weights_only=True)
    assert stopped["global_step"] == 3
    status, output = run([*command, "--resume"])
    assert status == 0, output
    assert rows() == whole
    assert Path(weights.format(1)).read_bytes() == expected
    assert not [path for path in last.parent.iterdir() if path.name.startswith(".")]

    if strategy == "fsdp2":
        exported, _, _ = load_checkpoint(last.parent.parent / "model")
        together, _, _ = load_checkpoint(last)  # in one process
        for ours, theirs in zip(together.parameters(), exported.parameters(), strict=True):
            assert torch.equal(ours, theirs)
        shard = next(path for path in last.iterdir() if path.suffix == ".distcp")
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
        with pytest.raises(UserError, match=shard.name):
            check(last)


def test_a_child_whose_launcher_is_gone_before_it_begins_ends_at_once():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LOCAL_RANK": "1", "DLLM_VAR_LAUNCHER": "1"}
    environment.pop("RANK", None)
    child = [sys.executable, "-m", "dllm_var", "fit", "--config", "nowhere.yaml"]  # which would be told with status 2
    assert subprocess.run(child, env=environment, timeout=WAIT, check=False).returncode == 1


def test_errors_that_only_say_that_a_process_is_gone():
    gloo = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:43501"
    for error in (RuntimeError(gloo), torch.distributed.DistNetworkError("The client socket has failed")):
        assert "lost contact" in failure(error)
    assert "lower data.num_workers" in failure(
        RuntimeError("DataLoader worker (pid 4711) is killed by signal: Killed. ")
    )
    assert failure(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is failure(KeyError("peer")) is None
