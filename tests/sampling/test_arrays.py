"""What runs in numpy on CPU tensors runs in torch on other devices; both give the same answers."""

import pytest
import torch
from test_block_diffusion import PROMPTS, random_model

from dllm_var.sampling import (
    BlockDiffusionSampler,
    ConfidenceThreshold,
    DelimiterLength,
    FixedLengthSampler,
    FixedSteps,
    MultiBlockSampler,
    arrays,
    block_length,
    block_run,
    commit,
    multi_block,
    scoring,
)
from dllm_var.sampling import policies as P

POLICIES = [
    ConfidenceThreshold(0.3),
    P.EntropyThreshold(1.0),
    FixedSteps(3),
    P.Saber(),
    P.RunningConfidenceRemasking(steps=4),
    P.JointThreshold(0.3),
]


@pytest.fixture
def as_on_another_device(monkeypatch):
    """Makes CPU tensors go the way of a GPU's."""
    for module in (block_run, commit, multi_block, scoring):
        monkeypatch.setattr(module, "arrays", lambda *values: (torch, *values))
    for module in (block_run, multi_block):
        monkeypatch.setattr(module, "there", lambda device, *values: (torch, *map(torch.from_numpy, values)))
    stacked = lambda *values: tuple(torch.stack([value.long() for value in values]).numpy())  # noqa: E731
    for module in (block_run, block_length, multi_block):
        monkeypatch.setattr(module, "on_host", stacked)


def answers(sampler):
    return [(a.tokens, a.finish_reason, a.nfe, a.commit_steps) for a in sampler.generate(random_model(), PROMPTS)]


def samplers(policy):
    for terminator_last in (True, False):
        yield BlockDiffusionSampler(policy, 6, 20, 3, terminator_last=terminator_last)
    yield BlockDiffusionSampler(policy, 6, 20, 3, kv_commit="alone", grid="absolute")
    yield BlockDiffusionSampler(policy, 6, 20, 3, block_length_policy=DelimiterLength([7, 8, 9], 0.1))
    eager = dict(open_at=0.0, settled_at=0.5, ahead_threshold=0.2)
    yield MultiBlockSampler(policy, 3, block_length=4, max_new_tokens=14, batch_size=3, **eager)
    yield FixedLengthSampler(policy, canvas_length=20, block_length=6, cache="dual")


@pytest.fixture(params=POLICIES, ids=lambda policy: type(policy).__name__)
def on_cpu(request):
    return request.param, [answers(sampler) for sampler in samplers(request.param)]


def test_both_array_libraries_decode_the_same(on_cpu, as_on_another_device):
    policy, expected = on_cpu
    assert [answers(sampler) for sampler in samplers(policy)] == expected


def test_cpu_tensors_become_arrays_without_a_copy_and_others_stay():
    tensor = torch.zeros(3)
    xp, array = arrays.arrays(tensor)
    array[0] = 1
    assert xp.__name__ == "numpy" and tensor[0] == 1
    meta = torch.zeros(3, device="meta")
    assert arrays.arrays(meta) == (torch, meta)
