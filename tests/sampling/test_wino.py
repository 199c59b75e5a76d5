"""WINO against a slow loop with the shadow's attention written out, and the bounds that make it end."""

import pytest
import torch
from slow_reference import forward, prefix_keys
from test_block_diffusion import ENDS, MASK, PROMPTS, random_model

from dllm_var.errors import UserError
from dllm_var.sampling import WinoSampler
from dllm_var.sampling.base import sampler_from_config
from dllm_var.sampling.configurable import sampler_to_config
from dllm_var.sampling.policies import BlockView
from dllm_var.sampling.policies.remasking import RevokableThreshold


def slowly(model, prompt, block_length, limit, threshold, shadow_threshold):
    """Tokens, finish reason, forwards and positions taken back, of one row."""
    finished, nfe, taken_back = [list(prompt)], 0, 0
    while True:
        decoded = sum(map(len, finished[1:]))
        width = min(block_length, limit - decoded)
        block, committed_last = [MASK] * width, 0
        while MASK in block:
            nfe += 1
            confidence, predicted, shadow = predict(model, finished, block, block_length, limit, len(prompt))
            masked = [j for j in range(width) if block[j] == MASK]
            most = min(max(int(len(masked) * 0.7), 5), 20)
            best_first = sorted(masked, key=lambda j: -confidence[j])
            sure = [j for j in best_first if confidence[j] > threshold][:most] or best_first[:1]
            back = []
            if len(sure) > 1:
                doubtful = [j for j in range(width) if block[j] != MASK and shadow[j] < shadow_threshold]
                back = sorted(doubtful, key=lambda j: shadow[j])[: max(committed_last - 1, 0)]
            for j in sure:
                block[j] = predicted[j]
            for j in back:
                block[j] = MASK
            committed_last, taken_back = len(sure), taken_back + len(back)
            for j in range(width):
                if block[j] == MASK:
                    break
                if block[j] in ENDS:
                    return [t for segment in finished[1:] for t in segment] + block[:j], "eos", nfe, taken_back
        finished.append(block)
        if decoded + width >= limit:
            return [t for segment in finished[1:] for t in segment], "length", nfe, taken_back


def predict(model, finished, block, block_length, limit, prompt_length):
    """What the block predicts, and for each committed token the probability its twin in the shadow gives it."""
    width, start = len(block), sum(map(len, finished))
    keys = prefix_keys(model, finished, block_length, limit, prompt_length)
    places = [*range(width), *range(width)]
    sees = [
        [j < width if i < width else j >= width or places[i] != places[j] for j in range(2 * width)]
        for i in range(2 * width)
    ]
    tokens = block + [MASK] * width
    hidden, _ = forward(model, tokens, [start + place for place in places], keys, sees)
    logits = model.lm_head(hidden)[0].float()
    logits[:, MASK] = -torch.inf
    probabilities = logits.softmax(-1)
    confidence, predicted = probabilities[:width].max(-1)
    shadow = [float(probabilities[width + j, token]) for j, token in enumerate(block)]
    return confidence.tolist(), predicted.tolist(), shadow


@pytest.mark.parametrize("thresholds", [(0.2, 0.3), (0.15, 0.9), (0.25, 0.5)])
@pytest.mark.parametrize("causal_context", [False, True])
def test_equals_the_slow_loop(thresholds, causal_context):
    taken_back, reasons = 0, set()
    for seed in range(4):
        model = random_model(seed, causal_context=causal_context)
        sampler = WinoSampler(
            threshold=thresholds[0],
            shadow_threshold=thresholds[1],
            block_length=7,
            max_new_tokens=17,
            terminator_last=False,
        )
        answers = sampler.generate(model, PROMPTS[:4])
        for prompt, answer in zip(PROMPTS, answers, strict=False):
            with torch.no_grad():
                *expected, back = slowly(model, prompt, 7, 17, *thresholds)
            assert [answer.tokens, answer.finish_reason, answer.nfe] == expected
            taken_back += back
            reasons.add(answer.finish_reason)
    assert taken_back > 10 and reasons == {"eos", "length"}


@pytest.mark.parametrize("terminator_last", [False, True])
@pytest.mark.parametrize("kv_commit", ["joint_next", "alone"])
def test_a_row_in_a_batch_equals_the_row_alone(terminator_last, kv_commit):
    model = random_model(1)
    settings = dict(block_length=6, max_new_tokens=20, terminator_last=terminator_last, kv_commit=kv_commit)
    sampler = WinoSampler(threshold=0.2, shadow_threshold=0.4, batch_size=3, **settings)
    for together, prompt in zip(sampler.generate(model, PROMPTS), PROMPTS, strict=True):
        alone = sampler.generate(model, [prompt])[0]
        for name in ("tokens", "finish_reason", "nfe", "commit_steps"):
            assert getattr(together, name) == getattr(alone, name)
        assert MASK not in together.tokens


@pytest.mark.parametrize("terminator_last", [False, True])
def test_doubting_everything_it_still_ends(terminator_last):
    """A step takes back fewer than the one before committed, so it takes no more steps than there are positions.

    A terminator that has to wait can leave a step empty, but only after one that committed two.
    """
    for seed in range(6):
        sampler = WinoSampler(
            threshold=0.0, shadow_threshold=1.0, block_length=8, max_new_tokens=24, terminator_last=terminator_last
        )
        for answer in sampler.generate(random_model(seed), PROMPTS):
            blocks = len(answer.tokens) // 8 + 1
            assert answer.nfe <= blocks * 8 * (1 + terminator_last)
            assert MASK not in answer.tokens


def block_view(confidence, shadow, tokens):
    """One row: confidences of masked positions and of what is committed, `tokens` with None where masked."""
    masked = torch.tensor([[token is None for token in tokens]])
    probability = torch.tensor(
        [c if token is None else s for c, s, token in zip(confidence, shadow, tokens, strict=True)]
    )
    chosen = torch.tensor([6 if token is None else token for token in tokens])
    logits = ((1 - probability) / (MASK - 1)).log()[:, None].repeat(1, MASK + 1)
    logits[:, MASK] = -torch.inf
    logits[torch.arange(len(tokens)), chosen] = probability.log()
    return BlockView(
        scored_logits=logits,
        scored=torch.arange(len(tokens)),
        tokens=torch.where(masked, MASK, chosen),
        masked=masked,
        changeable=torch.ones_like(masked),
        step=torch.tensor([1]),
        progress=torch.tensor([0.0]),
        key=torch.tensor([0]),
    )


def test_a_hand_made_case():
    policy = RevokableThreshold(0.6, 0.9)
    state = {"masked": torch.tensor([[True, True, True, True, True, True, True]])}
    tokens = [7, 8, 9, 10, None, None, None]  # four were committed by the last step
    view = block_view([0, 0, 0, 0, 0.7, 0.65, 0.5], [0.95, 0.5, 0.2, 0.89, 0, 0, 0], tokens)
    decision = policy.decide(view, state)
    assert decision.commit.tolist() == [[False] * 4 + [True, True, False]]
    assert decision.remask.tolist() == [[False, True, True, True] + [False] * 3]
    # Had the last step committed three, two would be taken back: the least confident.
    state = {"masked": torch.tensor([[False, True, True, True, True, True, True]])}
    assert policy.decide(view, state).remask.tolist() == [[False, True, True] + [False] * 4]
    # A step that commits one position takes nothing back.
    view = block_view([0, 0, 0, 0, 0.7, 0.5, 0.5], [0.95, 0.5, 0.2, 0.89, 0, 0, 0], tokens)
    assert not policy.decide(view, {"masked": torch.ones(1, 7, dtype=torch.bool)}).remask.any()


def test_at_most_seven_tenths_of_a_long_block_are_committed_at_once():
    policy = RevokableThreshold(0.6, 0.9)
    for masked, most in ((4, 4), (6, 5), (20, 14), (40, 20)):
        view = block_view([0.99] * masked, [0] * masked, [None] * masked)
        assert int(policy.decide(view, {"masked": torch.ones(1, masked, dtype=torch.bool)}).commit.sum()) == most


def test_settings():
    with pytest.raises(UserError, match="shadow_threshold"):
        WinoSampler(shadow_threshold=1.5)
    config = sampler_to_config(WinoSampler(threshold=0.5, shadow_threshold=0.8, block_length=4))
    assert config["class_path"] == "dllm_var.sampling.WinoSampler"
    assert sampler_to_config(sampler_from_config(config)) == config
