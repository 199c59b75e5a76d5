"""The command `serve`: mistakes in one line, and a process that a signal ends after its last answer."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from dllm_var.__main__ import main

ROOT = Path(__file__).parent.parent.parent
TWIN = "dllm_var.sampling.AutoregressiveSampler"
CHECKPOINT = str(ROOT / "checkpoints" / "cmudict")


def complaint(capsys, *arguments):
    assert main(["serve", *arguments]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "1"], "serve needs --checkpoint PATH"),
        (["--checkpoint", CHECKPOINT, "--max-tokens", "1"], "--max-tokens must be at least 2, got 1"),
        (["--checkpoint", CHECKPOINT, "--timeout", "0"], "--timeout must be above 0, got 0.0"),
        (["--checkpoint", CHECKPOINT, "--max-queue", "0"], "--max-queue must be at least 1, got 0"),
        (["--checkpoint", CHECKPOINT, "--max-que", "1"], "there is no setting 'max-que'"),
        (["--checkpoint", CHECKPOINT, "--port", "70000"], "cannot listen at --host 127.0.0.1 --port 70000"),
        (
            ["--checkpoint", CHECKPOINT, "--host", "no.such.host.example"],
            "cannot listen at --host no.such.host.example",
        ),
        (
            ["--checkpoint", CHECKPOINT, "--sampler", "dllm_var.sampling.AutoregressiveSampler", "--port", "0"],
            "is bidirectional",
        ),
    ],
)
def test_mistakes(arguments, message, capsys):
    assert message in complaint(capsys, *arguments)


def test_a_port_in_use_and_a_missing_package(capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert "choose another" in complaint(capsys, "--checkpoint", CHECKPOINT, "--port", port)
    monkeypatch.setattr("dllm_var.cli.serve.find_spec", lambda name: None)
    assert 'pip install "dllm-var[serve]"' in complaint(capsys, "--checkpoint", CHECKPOINT)


def test_help_names_every_option(capsys):
    assert main(["serve", "--help"]) == 0
    shown = capsys.readouterr().out
    for option in ("host", "port", "name", "max-tokens", "max-queue", "max-engines", "max-body", "timeout", "sampler"):
        assert f"--{option}" in shown


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_after_its_answers(number, tmp_path):
    command = [
        sys.executable,
        "-m",
        "dllm_var",
        "serve",
        "--checkpoint",
        CHECKPOINT,
        "--port",
        "0",
        "--batch-size",
        "2",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DLLM_VAR_API_KEY": "secret"}
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        line = process.stdout.readline()
        assert line.startswith("serving cmudict at http://127.0.0.1:") and line.endswith(
            ": BlockDiffusionSampler, 2 rows\n"
        )
        url = line.split(" at ")[1].partition("/v1")[0]
        assert httpx.get(url + "/v1/models").status_code == 401
        replies = []

        def ask():
            body = {"model": "cmudict", "prompt": ["secretword"] * 30}
            headers = {"authorization": "Bearer secret"}
            replies.append(httpx.post(url + "/v1/completions", json=body, headers=headers, timeout=60))

        thread = threading.Thread(target=ask)
        thread.start()
        while "dllm_var_rows 2.0" not in httpx.get(url + "/metrics", timeout=60).text:
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait(60) == 0
        thread.join()
    finally:
        process.kill()
    [reply] = replies
    assert reply.status_code == 200 and len(reply.json()["choices"]) == 30
    written = process.stdout.read() + (tmp_path / "log").read_text()
    assert "POST /v1/completions" in written and "secretword" not in written and "Traceback" not in written
