"""The fixed canvas against a slow loop, its caches against what they stand for."""

import pytest
import torch

from dllm_var.errors import UserError
from dllm_var.model import Transformer, TransformerConfig
from dllm_var.sampling import ConfidenceThreshold, FixedLengthSampler, FixedSteps
from dllm_var.sampling.policies import Saber

MASK, ENDS = 19, {3, 4}
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [16, 17]]


def random_model(seed=0, **changes):
    torch.manual_seed(seed)
    settings = dict(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, vocab_size=20, mask_id=MASK)
    settings |= dict(terminator_ids=sorted(ENDS), pad_id=0, initializer_range=0.2)
    return Transformer(TransformerConfig(**{**settings, **changes})).eval()


def slowly(model, prompt, length, block, threshold):
    """One row, whole forwards, Python loops; commits what is above the threshold, or the best."""
    row, nfe = [*prompt, *[MASK] * length], 0
    for start in range(len(prompt), len(row), block):
        places = range(start, min(start + block, len(row)))
        while any(row[j] == MASK for j in places):
            nfe += 1
            with torch.no_grad():
                logits = model(torch.tensor([row]))[0]
            logits[:, MASK] = -torch.inf
            confidence, best = logits.softmax(-1).max(-1)
            masked = [j for j in places if row[j] == MASK]
            chosen = [j for j in masked if confidence[j] > threshold] or [
                max(masked, key=lambda j: float(confidence[j]))
            ]
            for j in chosen:
                row[j] = int(best[j])
    answer = row[len(prompt) :]
    end = next((i for i, token in enumerate(answer) if token in ENDS), length)
    return answer[:end], "eos" if end < length else "length", nfe


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("block", [4, 6, 14])
def test_without_a_cache_it_is_the_slow_loop(seed, block):
    model = random_model(seed)
    sampler = FixedLengthSampler(ConfidenceThreshold(0.25), canvas_length=14, block_length=block)
    for answer, prompt in zip(sampler.generate(model, PROMPTS), PROMPTS, strict=True):
        assert (answer.tokens, answer.finish_reason, answer.nfe) == slowly(model, prompt, 14, block, 0.25)


def test_one_token_per_step_takes_as_many_forwards_as_the_canvas_is_long():
    answers = FixedLengthSampler(canvas_length=9).generate(random_model(), PROMPTS)
    assert [answer.nfe for answer in answers] == [9] * 4


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("policy", [ConfidenceThreshold(0.25), FixedSteps(3), Saber()])
def test_a_cached_batch_equals_single_rows(cache, policy):
    model = random_model(1)
    sampler = FixedLengthSampler(policy, canvas_length=14, block_length=5, cache=cache)
    for together, prompt in zip(sampler.generate(model, PROMPTS), PROMPTS, strict=True):
        alone = sampler.generate(model, [prompt])[0]
        assert (together.tokens, together.finish_reason, together.nfe) == (alone.tokens, alone.finish_reason, alone.nfe)


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_caches_change_nothing_while_every_block_takes_one_step(cache):
    """With one step per block every forward is a refresh: the cached keys are never used."""
    model = random_model(2)
    plain = FixedLengthSampler(ConfidenceThreshold(0.0), canvas_length=12, block_length=4).generate(model, PROMPTS)
    cached = FixedLengthSampler(ConfidenceThreshold(0.0), 12, 4, cache).generate(model, PROMPTS)
    assert [a.tokens for a in plain] == [a.tokens for a in cached] and {a.nfe for a in cached} == {3}


def test_the_caches_hold_the_keys_of_the_block_s_first_step():
    """One layer: keys depend on tokens and places alone, so a stale key is one of a token that has changed since.

    The prompt and later masks do not change within a block. So with one layer both caches are exact.
    """
    model = random_model(3, num_layers=1)
    plain = FixedLengthSampler(FixedSteps(4), 12, 4).generate(model, PROMPTS)
    for cache in ("prefix", "dual"):
        assert [a.tokens for a in FixedLengthSampler(FixedSteps(4), 12, 4, cache).generate(model, PROMPTS)] == [
            a.tokens for a in plain
        ]


def test_deeper_models_differ_with_a_cache():
    """Otherwise the two tests above would not prove that a cache is used at all."""
    model, settings = random_model(3, num_layers=3), dict(canvas_length=24, block_length=12)
    plain = FixedLengthSampler(FixedSteps(6), **settings).generate(model, PROMPTS)
    dual = FixedLengthSampler(FixedSteps(6), **settings, cache="dual").generate(model, PROMPTS)
    assert [a.tokens for a in plain] != [a.tokens for a in dual]


def test_bad_settings_are_named():
    with pytest.raises(UserError, match="canvas_length"):
        FixedLengthSampler(canvas_length=0)
    with pytest.raises(UserError, match="autoregressive"):
        FixedLengthSampler().generate(random_model(causal=True), [[5]])
