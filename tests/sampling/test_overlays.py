"""Every overlay in configs/sampler is a sampler that decodes, by the very command its users type."""

import json
from pathlib import Path

import pytest

from dllm_var.__main__ import main
from dllm_var.checkpoints.export import save_checkpoint_folder
from dllm_var.checkpoints.pretrained import load_checkpoint
from dllm_var.cli.decoding_options import spell_out
from dllm_var.errors import UserError

ROOT = Path(__file__).parent.parent.parent
OVERLAYS = sorted(path.stem for path in (ROOT / "configs" / "sampler").glob("*.yaml"))
SHORTER = {"fixed_length": ["--sampler.canvas_length=24"]}  # 256 forwards of 256 tokens are for the benchmark
AUTOREGRESSIVE = {"autoregressive", "diffuspec", "strided"}  # decode an autoregressive checkpoint


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The shipped model, and the same weights read causally: an autoregressive model, if a bad one."""
    diffusion = ROOT / "checkpoints" / "cmudict"
    transformer, tokenizer, _ = load_checkpoint(diffusion)
    transformer.config.causal = True
    causal = tmp_path_factory.mktemp("causal")
    save_checkpoint_folder(causal, transformer, tokenizer)
    return {"diffusion": diffusion, "autoregressive": causal}


@pytest.mark.parametrize("name", OVERLAYS)
def test_overlay_decodes(name, checkpoints, capsys):
    checkpoint = checkpoints["autoregressive" if name in AUTOREGRESSIVE else "diffusion"]
    second = {
        "guided": [f"--sampler.guide={checkpoints['autoregressive']}"],
        "diffuspec": [f"--sampler.drafter={checkpoints['diffusion']}"],
    }
    options = [*SHORTER.get(name, []), *second.get(name, [])]
    arguments = ["--sampler", name, *options, "--prompt", "keyboard", "--prompt", "ink", "--json"]
    assert main(["generate", "--checkpoint", str(checkpoint), *arguments]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["prompt"] for answer in answers] == ["keyboard", "ink"]
    if name not in AUTOREGRESSIVE:
        assert all(answer["finish_reason"] == "eos" and answer["tokens"] for answer in answers)


def test_a_file_says_the_same_as_its_name_and_others_are_named():
    file = ROOT / "configs" / "sampler" / "wino.yaml"
    assert spell_out(["--sampler", "wino"]) == spell_out([f"--sampler={file}"])
    own = {"init_args": {"block_length": 32, "max_new_tokens": "all"}}
    [named] = spell_out(["--sampler", "wino"], own)
    arguments = json.loads(named.removeprefix("--sampler="))["init_args"]
    assert (arguments["block_length"], arguments["max_new_tokens"]) == (32, 48)
    with pytest.raises(UserError, match=r"--sampler: there is no 'winno'; there are .*wino"):
        spell_out(["--sampler", "winno"])
