"""Models that predict a token at the position left of it: the engine against a loop that has no cache object."""

import pytest
import torch
from slow_reference import forward
from tiny_models import ENDS, MASK, PROMPTS, random_model

from dllm_var.errors import UserError
from dllm_var.sampling import (
    BlockDiffusionSampler,
    ConfidenceThreshold,
    FixedLengthSampler,
    FixedSteps,
    FreeDaveSampler,
    WinoSampler,
)


def shifted_model(seed=0):
    return random_model(seed, token_shift=True, initializer_range=0.2)


@torch.no_grad()
def slow_generate(model, prompt, block_length, limit, threshold, kv_commit):
    """Block diffusion, one row: returns tokens, finish reason and number of forwards.

    The first token of a block is predicted at the token before it, as that came out of the forward that stored it.
    """
    keys, pending, start, nfe, answer = [], list(prompt), 0, 0, []
    left = None  # hidden state of the token left of the block
    while len(answer) < limit:
        width = min(block_length, limit - len(answer))
        block = [MASK] * width
        while MASK in block:
            tokens = pending + ([] if kv_commit == "alone" and pending else block)
            hidden, made = forward(model, tokens, range(start, start + len(tokens)), keys)
            nfe += 1
            if pending:
                keys = [*keys, [(k[:, :, : len(pending)], v[:, :, : len(pending)]) for k, v in made]]
                left, start = hidden[0, len(pending) - 1], start + len(pending)
                hidden, pending = hidden[:, len(pending) :], []
                if not hidden.size(1):
                    continue
            last_keys, last_hidden = made, hidden
            logits = model.lm_head(torch.cat((left[None], hidden[0, :-1]))).float()
            logits[:, MASK] = -torch.inf
            confidence, predicted = logits.softmax(-1).max(-1)
            masked = [j for j in range(width) if block[j] == MASK]
            chosen = [j for j in masked if confidence[j] > threshold] or [max(masked, key=lambda j: confidence[j])]
            for j in chosen:
                block[j] = int(predicted[j])
            for j in range(width):
                if block[j] == MASK:
                    break
                if block[j] in ENDS:
                    return answer + block[:j], "eos", nfe
        answer += block
        if kv_commit == "last_step":
            keys = [*keys, [(k[:, :, -width:], v[:, :, -width:]) for k, v in last_keys]]
            left, start = last_hidden[0, -1], start + width
        else:
            pending = block
    return answer, "length", nfe


@pytest.mark.parametrize("kv_commit", ["joint_next", "alone", "last_step"])
@pytest.mark.parametrize("seed", range(2))
def test_equals_a_loop_without_a_cache_object(seed, kv_commit):
    model = shifted_model(seed)
    sampler = BlockDiffusionSampler(
        ConfidenceThreshold(0.2), block_length=5, max_new_tokens=13, terminator_last=False, kv_commit=kv_commit
    )
    for prompt in PROMPTS[:5]:
        ours = sampler.generate(model, [prompt])[0]
        assert (ours.tokens, ours.finish_reason, ours.nfe) == slow_generate(model, prompt, 5, 13, 0.2, kv_commit)


def test_the_shift_matters_and_both_endings_occur():
    sampler = BlockDiffusionSampler(ConfidenceThreshold(0.2), block_length=5, max_new_tokens=13)
    shifted = [answer for seed in range(4) for answer in sampler.generate(shifted_model(seed), PROMPTS)]
    plain = [
        answer for seed in range(4) for answer in sampler.generate(random_model(seed, initializer_range=0.2), PROMPTS)
    ]
    assert {answer.finish_reason for answer in shifted} == {"eos", "length"}
    assert [answer.tokens for answer in shifted] != [answer.tokens for answer in plain]


@pytest.mark.parametrize(
    "sampler",
    [
        BlockDiffusionSampler(FixedSteps(3), block_length=6, max_new_tokens=20, batch_size=3),
        BlockDiffusionSampler(FixedSteps(3), block_length=6, max_new_tokens=20, batch_size=3, kv_commit="alone"),
        BlockDiffusionSampler(FixedSteps(3), block_length=6, max_new_tokens=20, batch_size=3, kv_commit="last_step"),
        BlockDiffusionSampler(FixedSteps(3), block_length=6, max_new_tokens=20, batch_size=3, grid="absolute"),
        *(
            FixedLengthSampler(FixedSteps(3), canvas_length=18, block_length=6, cache=cache)
            for cache in ("none", "prefix", "dual", "dkv", "free")
        ),
    ],
    ids=lambda sampler: f"{type(sampler).__name__}-{vars(sampler).get('kv_commit') or vars(sampler).get('cache')}",
)
def test_a_row_in_a_batch_equals_the_row_alone(sampler):
    model = shifted_model()
    for together, prompt in zip(sampler.generate(model, PROMPTS), PROMPTS, strict=True):
        alone = sampler.generate(model, [prompt])[0]
        assert (together.tokens, together.finish_reason, together.nfe) == (alone.tokens, alone.finish_reason, alone.nfe)


@torch.no_grad()
def test_the_first_token_of_a_document_is_not_predicted_from_another_one():
    model, plain = shifted_model(), random_model(0, initializer_range=0.2)
    tokens = torch.tensor([[5, 6, 7, 8, 9]])
    segments = torch.tensor([[0, 0, 1, 1, 1]])
    hidden, moved = (m.hidden_states(tokens, segment_ids=segments) for m in (plain, model))
    assert torch.equal(moved, hidden[:, [0, 0, 2, 2, 3]])
    assert torch.equal(model.hidden_states(tokens), plain.hidden_states(tokens)[:, [0, 0, 1, 2, 3]])


@pytest.mark.parametrize("sampler", [WinoSampler, FreeDaveSampler])
def test_samplers_that_decode_copies_of_a_block_refuse(sampler):
    with pytest.raises(UserError, match="token_shift"):
        sampler(block_length=6, max_new_tokens=12).generate(shifted_model(), PROMPTS[:1])
