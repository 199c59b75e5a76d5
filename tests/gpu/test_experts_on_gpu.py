"""Experts on the GPU: what the CPU computes, forward and backward; and captured decoding where the device allows it."""

from typing import Any

import pytest
import torch

from dllm_var.model import Transformer, TransformerConfig
from dllm_var.model.experts import keeps_the_host_out
from dllm_var.sampling import BlockDiffusionSampler, captured

IDS = torch.randint(0, 60, (3, 40), generator=torch.Generator().manual_seed(0))
SHAPE = dict(hidden_size=64, num_layers=3, num_heads=4, vocab_size=60, initializer_range=0.1, mask_id=59, pad_id=0)
SHAPE |= dict(num_experts=16, experts_per_token=4, expert_intermediate_size=32, shared_experts=1, first_dense_layers=1)
SHAPE |= dict(router="sigmoid", router_bias=True, router_normalise=True, expert_groups=4, groups_per_token=2)


def built(device: torch.device, **changes: Any) -> Transformer:
    torch.manual_seed(0)
    settings: Any = {**SHAPE, "terminator_ids": [3], **changes}
    return Transformer(TransformerConfig(**settings)).to(device)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_and_gradients_are_those_of_the_cpu(dtype: torch.dtype, compiled: bool, device: torch.device) -> None:
    """All experts are chosen in 16 bits, where rounding would else choose others."""
    chosen: dict[str, Any] = {"experts_per_token": 16, "groups_per_token": 4} if dtype == torch.bfloat16 else {}
    found = []
    for on, kind in ((torch.device("cpu"), torch.float32), (device, dtype)):
        model = built(on, **chosen)
        if compiled and on == device:
            model.compile_layers()
        with torch.autocast(on.type, torch.bfloat16, enabled=kind == torch.bfloat16):
            logits = model(IDS.to(on))
        logits.float().square().mean().backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        found.append([tensor.float().cpu() for tensor in (logits, *gradients)])
    for cpu, gpu in zip(*found, strict=True):
        error = (cpu - gpu).norm() / cpu.norm()
        assert error < (0.03 if dtype == torch.bfloat16 else 1e-4)


def test_captured_steps_give_the_tokens_of_eager_ones(device: torch.device, monkeypatch: Any) -> None:
    model = built(device).to(torch.bfloat16).eval()
    assert captured.can_capture(model) == (device.type == "cuda" and keeps_the_host_out(model.embedding.weight))
    sampler, found = BlockDiffusionSampler(block_length=8, max_new_tokens=24), []
    for captures in (captured.CAPTURES, {}):
        monkeypatch.setattr(captured, "CAPTURES", captures)
        for _ in range(2):  # the second call replays from its start
            answers = sampler.generate(model, [row[:9].tolist() for row in IDS])
            found.append([(answer.tokens, answer.finish_reason, answer.nfe) for answer in answers])
    assert found[0] == found[1] == found[2] == found[3]
