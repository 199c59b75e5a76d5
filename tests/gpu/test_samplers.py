"""Every overlay in configs/sampler decodes the same tokens on the GPU as on the CPU, and captured as not captured."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from dllm_var.checkpoints.pretrained import load_checkpoint
from dllm_var.sampling import Sampler, captured
from dllm_var.settings import build, read_settings

ROOT = Path(__file__).parents[2]
OVERLAYS = sorted(path.stem for path in (ROOT / "configs" / "sampler").glob("*.yaml"))
CAUSAL = {"autoregressive", "diffuspec", "strided"}  # decode an autoregressive checkpoint
WORDS = ("keyboard", "ink", "strengths", "ox")


@pytest.fixture(scope="module")
def models(device: torch.device) -> dict[str, Any]:
    """Both shipped models on both devices, in float32."""
    names = ("cmudict", "cmudict_autoregressive")
    return {name: [load_checkpoint(ROOT / "checkpoints" / name, on)[:2] for on in ("cpu", device)] for name in names}


@pytest.mark.parametrize("name", OVERLAYS)
def test_tokens_and_forwards_are_those_of_the_cpu(name: str, models: dict[str, Any], monkeypatch: Any) -> None:
    monkeypatch.chdir(ROOT)  # overlays name checkpoints as seen from there
    settings: Any = read_settings(Path("configs") / "sampler" / f"{name}.yaml")
    found = []
    for model, tokenizer in models["cmudict_autoregressive" if name in CAUSAL else "cmudict"]:
        sampler = build(Sampler, "sampler", settings["sampler"], name)
        limit = 24 if name == "fixed_length" else None  # one forward per token of its canvas
        if limit is not None:
            sampler.canvas_length = limit
        answers = sampler.generate(model, WORDS, tokenizer=tokenizer, max_new_tokens=limit)
        found.append([(answer.tokens, answer.finish_reason, answer.nfe) for answer in answers])
    assert found[0] == found[1]
    assert any(tokens for tokens, _, _ in found[0])


@pytest.mark.parametrize("name", ["threshold", "autoregressive", "strided"])
def test_captured_steps_give_the_tokens_of_eager_ones(name: str, models: dict[str, Any], monkeypatch: Any) -> None:
    monkeypatch.chdir(ROOT)
    settings: Any = read_settings(Path("configs") / "sampler" / f"{name}.yaml")
    model, tokenizer = models["cmudict_autoregressive" if name in CAUSAL else "cmudict"][1]
    for dtype in (torch.float32, torch.bfloat16):
        transformer, found = copy.deepcopy(model).to(dtype), []
        for captures in (captured.CAPTURES, {}):
            monkeypatch.setattr(captured, "CAPTURES", captures)
            sampler = build(Sampler, "sampler", settings["sampler"], name)
            for _ in range(2):  # the second call replays from its start
                answers = sampler.generate(transformer, WORDS, tokenizer=tokenizer)
                found.append([(answer.tokens, answer.finish_reason, answer.nfe) for answer in answers])
        assert found[0] == found[1] == found[2] == found[3]
