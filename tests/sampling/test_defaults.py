"""The sampler of a model that names none decodes it."""

import pytest
from tiny_models import PROMPTS, random_model

from dllm_var.sampling import AutoregressiveSampler, BlockDiffusionSampler
from dllm_var.sampling.defaults import default_sampler


@pytest.mark.parametrize(
    ("changes", "kind", "block_length"),
    [
        ({}, BlockDiffusionSampler, 64),
        ({"causal": True}, AutoregressiveSampler, None),
        ({"block_causal": True, "block_length": 4}, BlockDiffusionSampler, 4),
        ({"block_causal": False, "block_length": 4}, BlockDiffusionSampler, 64),
    ],
)
def test_it_reads_as_the_model_does(changes, kind, block_length):
    model = random_model(num_layers=1, **changes)
    sampler = default_sampler(model.config)
    assert type(sampler) is kind and getattr(sampler, "block_length", None) == block_length
    assert [answer.tokens for answer in sampler.generate(model, PROMPTS[:2], max_new_tokens=6)]
