"""Nothing in a checkpoint chooses code, whatever command loads it: what it names is never imported."""

import json
import sys

import pytest
import torch

from dllm_var.__main__ import main
from dllm_var.checkpoints.export import save_checkpoint_folder
from dllm_var.checkpoints.run_checkpoint import identity
from dllm_var.cli import evaluate
from dllm_var.cli.decoding_options import read_options
from dllm_var.errors import UserError
from tests.sampling.tiny_models import TOKENIZER, random_model

SAMPLER = "dllm_var.sampling.BlockDiffusionSampler"
TRAP = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
from dllm_var.sampling import UnmaskingPolicy
class Policy(UnmaskingPolicy):
    def decide(self, view, state): ...
"""
NAMES = {
    "a class as text": {"class_path": SAMPLER, "init_args": {"policy": "planted.Policy"}},
    "a class by its parts": {"class_path": SAMPLER, "init_args": {"policy": {"class_path": "planted.Policy"}}},
    "a file": {"class_path": SAMPLER, "init_args": {"policy": "planted.yaml"}},
    "arguments beside": {
        "class_path": SAMPLER,
        "init_args": {},
        "dict_kwargs": {"policy": {"class_path": "planted.Policy"}},
    },
    "itself": {"class_path": "planted.Policy", "init_args": {}},
    "all as a file": "planted.yaml",
}


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A module and a settings file that leave a mark when anything of them is used, where they would be found."""
    (tmp_path / "planted.py").write_text(TRAP)
    (tmp_path / "planted.yaml").write_text("class_path: planted.Policy\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "ran"
    sys.modules.pop("planted", None)


def lone_file(path, sampler):
    """Writes a checkpoint as a training run does, whose sampler is as given."""
    model = random_model()
    entry = {**identity(model.config, TOKENIZER, None, None), "sampler": sampler}
    state = {f"transformer.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state, "dllm_var": entry, "hyper_parameters": {"sampler": sampler}}, path)
    return path


@pytest.mark.parametrize("named", NAMES)
def test_a_sampler_that_names_code_is_one_line_and_runs_nothing(named, trap, tmp_path, capsys):
    folder = save_checkpoint_folder(tmp_path / "model", random_model(), TOKENIZER, {"sampler": NAMES[named]})
    file = lone_file(tmp_path / "lone.ckpt", NAMES[named])
    for command in (
        ["generate", "--checkpoint", str(folder), "--prompt", "w5"],
        ["generate", "--checkpoint", str(file), "--prompt", "w5"],
        ["export", "--checkpoint", str(folder), "--format", "llada", "--output", "out", "--block-length", "4"],
        ["export", "--checkpoint", str(file), "--format", "llada", "--output", "out", "--threshold", "0.4"],
    ):
        assert main(command) == 2, command
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and "sampler" in line, (command, line)
    for place in (folder, file):
        with pytest.raises(UserError, match="sampler"):
            read_options("evaluate", ["--checkpoint", str(place), "--tasks", "x"], evaluate.build_parser)
    assert not trap.exists() and "planted" not in sys.modules


def test_a_class_of_the_users_own_is_used_when_the_command_line_names_it(trap, tmp_path, capsys):
    folder = save_checkpoint_folder(tmp_path / "model", random_model(), TOKENIZER, {"sampler": NAMES["a file"]})
    ours = ["--sampler", SAMPLER, "--policy", "planted.Policy"]
    assert main(["generate", "--checkpoint", str(folder), "--prompt", "w5", *ours]) == 2  # it decides nothing
    assert "the policy Policy must return a Decision, got NoneType" in capsys.readouterr().err
    assert trap.exists()


def test_export_copies_what_it_does_not_understand(trap, tmp_path, capsys):
    folder = save_checkpoint_folder(tmp_path / "model", random_model(), TOKENIZER, {"sampler": NAMES["itself"]})
    assert main(["export", "--checkpoint", str(folder), "--format", "llada", "--output", "out"]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dllm_var"]["sampler"] == NAMES["itself"]
    assert not trap.exists()
