"""Where a command computes and in what type: one pair of options for all commands that decode."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dllm_var import UserError
from dllm_var.cli import chat, evaluate, generate, serve
from dllm_var.cli.benchmark import build_parser
from dllm_var.cli.decoding_options import device_and_dtype, load_model, read_options

CHECKPOINT = str(Path(__file__).parent.parent.parent / "checkpoints" / "cmudict")


@pytest.fixture
def two_gpus(monkeypatch):
    """What torch says on a machine with two of them."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.parametrize(
    ("named", "device"),
    [(None, "cuda"), ("cpu", "cpu"), ("cuda", "cuda"), ("cuda:1", "cuda:1"), ("cuda:2", None), ("gpu", None)],
)
def test_a_device_is_one_of_those_here(named, device, two_gpus):
    options = SimpleNamespace(device=named, dtype=None)
    if device is not None:
        assert device_and_dtype(options) == (torch.device(device), None)
        return
    with pytest.raises(UserError, match=f"--device {named} is not here: this machine has cpu, cuda, cuda:0, cuda:1"):
        device_and_dtype(options)


@pytest.mark.parametrize("module", [generate, chat, serve, evaluate])
def test_the_weights_are_of_the_type(module):
    arguments = ["--checkpoint", CHECKPOINT, "--device=cpu", "--dtype=bfloat16"]
    options, _, checkpoint = read_options("command", arguments, module.build_parser)
    model, _ = load_model(options, checkpoint)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("module", [generate, chat, serve, evaluate])
def test_another_type_is_named_with_those_there_are(module):
    with pytest.raises(UserError, match="dtype: expected float32, bfloat16, float16, got half"):
        read_options("command", ["--checkpoint", CHECKPOINT, "--dtype=half"], module.build_parser)


def test_benchmark_has_them_too():
    options = build_parser("benchmark").parse_args(["--device=cpu", "--dtype=float16"])
    assert device_and_dtype(options) == (torch.device("cpu"), torch.float16)
