"""An answer of thousands of tokens: memory in proportion to its length, work in proportion to the blocks."""

import pytest
import torch
from tiny_models import ENDS, PROMPTS, random_model

from dllm_var.benchmarking.instruments import PeakMemory
from dllm_var.sampling import AutoregressiveSampler, BlockDiffusionSampler, ConfidenceThreshold, MultiBlockSampler

BLOCK = 64
THRESHOLD = ConfidenceThreshold(0.0)  # a step for each block
SAMPLERS = [
    BlockDiffusionSampler(THRESHOLD, block_length=BLOCK),
    MultiBlockSampler(THRESHOLD, block_length=BLOCK),
    AutoregressiveSampler(),
]


def decode(model, sampler, length, seen):
    """Returns the answers' lengths and the peak memory; adds to `seen` how many tokens each forward read."""
    forward = model.hidden_states

    def counted(tokens, *args, **kwargs):
        seen.append(tokens.numel())
        return forward(tokens, *args, **kwargs)

    model.hidden_states = counted
    with PeakMemory(torch.device("cpu")) as memory:
        answers = sampler.generate(model, PROMPTS[:2], max_new_tokens=length, suppress=ENDS)
    del model.hidden_states
    assert [answer.finish_reason for answer in answers] == ["length"] * 2
    return [len(answer.tokens) for answer in answers], memory.bytes


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: f"{type(s).__name__}-{getattr(s, 'kv_commit', '')}")
def test_thousands_of_tokens_cost_linear_memory_and_linear_forwards(sampler):
    causal = isinstance(sampler, AutoregressiveSampler)
    short, long = (100, 400) if causal else (500, 4000)
    model = random_model(num_layers=1, causal=causal)
    decode(model, sampler, 100, [])  # what the first call allocates for good
    used, read = {}, {}
    for length in (short, long):
        seen: list[int] = []
        lengths, used[length] = decode(model, sampler, length, seen)
        assert lengths == [length, length]
        read[length] = sum(seen)
    assert read[long] <= 1.1 * long / short * read[short]
    if used[long] is not None:  # a full mask or a copy of the cache per block would be hundreds of megabytes
        assert used[long] - used[short] < 30e6
