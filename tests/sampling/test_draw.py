"""Drawing tokens: the right distribution, and the same draws whatever the batch."""

import pytest
import torch

from dllm_var.errors import UserError
from dllm_var.model import Transformer, TransformerConfig
from dllm_var.sampling import BlockDiffusionSampler, ConfidenceThreshold
from dllm_var.sampling.draw import Draw, keep_likely, request_keys


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_from_the_tempered_distribution(temperature):
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -torch.inf])
    tokens = Draw(temperature)(logits.expand(40_000, -1), torch.arange(40_000))
    share = torch.bincount(tokens, minlength=5) / 40_000
    torch.testing.assert_close(share, (logits / temperature).softmax(-1), atol=0.01, rtol=0)


def test_temperature_zero_draws_nothing():
    assert Draw()(torch.zeros(2, 3), torch.arange(2)) is None


def test_top_k_and_top_p_keep_the_likely_tokens():
    logits = torch.tensor([[0.1, 0.4, 0.3, 0.2]]).log()
    assert keep_likely(logits, 1.0, 2, 1.0).isfinite().tolist() == [[False, True, True, False]]
    assert keep_likely(logits, 1.0, 0, 0.65).isfinite().tolist() == [[False, True, True, False]]
    assert keep_likely(logits, 1.0, 0, 0.71).isfinite().tolist() == [[False, True, True, True]]
    assert keep_likely(logits, 1.0, 0, 0.01).isfinite().tolist() == [[False, True, False, False]]
    # A low temperature sharpens the distribution before the nucleus is cut.
    assert keep_likely(logits, 0.1, 0, 0.9).isfinite().tolist() == [[False, True, False, False]]


def model():
    torch.manual_seed(0)
    config = TransformerConfig(hidden_size=32, num_layers=2, num_heads=2, vocab_size=20, mask_id=19, terminator_ids=[3])
    config.initializer_range = 0.2
    return Transformer(config).eval()


def test_a_row_s_draws_do_not_depend_on_its_batch_but_on_the_seed():
    prompts = [[5, 6], [7], [8, 9, 10], [11, 12]]
    settings = dict(policy=ConfidenceThreshold(0.5), block_length=4, max_new_tokens=10, temperature=1.0)
    sampler = BlockDiffusionSampler(**settings, batch_size=2)
    together = [answer.tokens for answer in sampler.generate(model(), prompts)]
    assert together == [sampler.generate(model(), [prompt])[0].tokens for prompt in prompts]
    assert together != [a.tokens for a in BlockDiffusionSampler(**settings, seed=1).generate(model(), prompts)]
    assert together != [
        a.tokens for a in BlockDiffusionSampler(**{**settings, "temperature": 0.0}).generate(model(), prompts)
    ]


def test_the_same_prompt_twice_gets_two_samples():
    sampler = BlockDiffusionSampler(ConfidenceThreshold(0.5), block_length=4, max_new_tokens=10, temperature=1.0)
    first, second = sampler.generate(model(), [[5, 6], [5, 6]])
    assert first.tokens != second.tokens
    assert len(set(request_keys([[1], [1], [2], [1]]))) == 4


@pytest.mark.parametrize("settings", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}])
def test_settings_out_of_range_are_named(settings):
    with pytest.raises(UserError, match="temperature"):
        BlockDiffusionSampler(**settings)
