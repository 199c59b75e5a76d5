"""Blocks of adaptive length: the widths that a policy asks for, and nothing else, change what is decoded."""

import pytest
import torch
from slow_reference import forward as slow_forward
from test_block_diffusion import ENDS, MASK, PROMPTS, Scripted, random_model

from dllm_var.errors import UserError
from dllm_var.sampling import BlockDiffusionSampler, ConfidenceThreshold, FixedSteps
from dllm_var.sampling import policies as P
from dllm_var.sampling.block_length import BlockLengthPolicy, BlockStart, ConstantSteps, DelimiterLength
from dllm_var.sampling.config import sampler_from_config, sampler_to_config

POLICIES = [
    ConfidenceThreshold(0.3),
    FixedSteps(3),
    P.JointThreshold(0.3, 0.2, max_edit_steps=2),
    P.Saber(),
    P.CoherentCandidates(),
]


class Widths(BlockLengthPolicy):
    """Opens blocks as wide as a row's place in the answer says, cuts them at `cut_at`, and keeps what it was told."""

    def __init__(self, widths, cut_at=None):
        self.widths, self.cut_at, self.told = widths, cut_at, []

    def __call__(self, state):
        self.told.append(state)
        return self.widths[state.answer_length % len(self.widths)]

    def cut(self, view):
        return None if self.cut_at is None else torch.full_like(view.step, self.cut_at)


def decode(model, prompts=PROMPTS, policy=None, lengths=None, **settings):
    settings = {"block_length": 6, "max_new_tokens": 20, "batch_size": 3, **settings}
    return BlockDiffusionSampler(policy or ConfidenceThreshold(0.3), block_length_policy=lengths, **settings).generate(
        model, prompts
    )


def everything(answers):
    return [(a.tokens, a.finish_reason, a.nfe, a.commit_steps) for a in answers]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
@pytest.mark.parametrize("settings", [{}, {"kv_commit": "alone", "grid": "absolute", "terminator_last": False}])
def test_a_policy_that_always_wants_the_widest_changes_nothing(policy, settings):
    model = random_model(3)
    base = everything(decode(model, policy=policy, **settings))
    for lengths in (Widths([99], cut_at=6), DelimiterLength([1], threshold=1.0)):
        assert everything(decode(model, policy=policy, lengths=lengths, **settings)) == base


@pytest.mark.parametrize("policy", POLICIES[:3], ids=lambda policy: type(policy).__name__)
@pytest.mark.parametrize("wanted", [0, 4])
def test_a_constant_width_is_that_block_length(policy, wanted):
    model = random_model(2)
    base = decode(model, policy=policy, block_length=max(1, wanted))
    ours = decode(model, policy=policy, lengths=Widths([wanted]))
    assert [(a.tokens, a.finish_reason) for a in ours] == [(a.tokens, a.finish_reason) for a in base]


def test_blocks_are_as_wide_as_asked_for_and_the_policy_is_told_how_they_went():
    script, sure = [7] * 20, [0.99, 0.5, 0.5, 0.99] * 5  # steps: the doubtful ones of a block, at least one
    lengths = Widths([5, 1, 1, 1, 1, 3, 1, 1, 9, 1, 1, 1, 1, 1, 2])
    sampler = BlockDiffusionSampler(
        ConfidenceThreshold(0.9), block_length=6, max_new_tokens=17, block_length_policy=lengths
    )
    pieces = []
    [answer] = sampler.generate(
        Scripted([0, 0, *script], [0.5, 0.5, *sure]), [[5, 6]], on_block=lambda _, tokens: pieces.append(len(tokens))
    )
    assert pieces == [5, 8, 14, 16, 17]  # 5, 3, 6 (9 asked for), 2, and what the limit leaves
    widths, steps = [5, 3, 6, 2], [1 + 2, 1 + 2, 1 + 3, 1 + 1]
    assert answer.nfe == sum(steps) + 1
    expected = [BlockStart(0, 17, 6)]
    expected += [BlockStart(done, 17, 6, w, s) for done, w, s in zip(pieces, widths, steps, strict=False)]
    assert lengths.told == expected
    assert expected[1].tokens_per_step == 5 / 3 and expected[0].tokens_per_step == 0


def slow_cut(model, prompt, opened, cut_at, limit, threshold):
    """One row, its keys and window in plain sight: every block is predicted `opened` wide once, then `cut_at` wide."""
    row, keys, frozen = list(prompt), [], 0
    nfe, answer = 0, []
    while len(answer) < limit:
        wide, width = min(opened, limit - len(answer)), min(cut_at, limit - len(answer))
        block = [MASK] * width
        while MASK in block:
            behind = [] if nfe and frozen == len(row) else [MASK] * (wide - width)
            window = row[frozen:] + block + behind
            hidden, made = slow_forward(model, window, range(frozen, frozen + len(window)), keys)
            nfe, pending = nfe + 1, len(row) - frozen
            keys.append([(k[:, :, :pending], v[:, :, :pending]) for k, v in made])
            frozen = len(row)
            logits = model.lm_head(hidden)[0, pending : pending + width].float()
            logits[:, MASK] = -torch.inf
            confidence, predicted = logits.softmax(-1).max(-1)
            masked = [j for j in range(width) if block[j] == MASK]
            wanted = [j for j in masked if confidence[j] > threshold] or [max(masked, key=lambda j: confidence[j])]
            for j in wanted:
                block[j] = int(predicted[j])
            known = block[: block.index(MASK)] if MASK in block else block
            end = next((j for j, token in enumerate(known) if token in ENDS), None)
            if end is not None:
                return answer + block[:end], "eos", nfe
        row, answer = row + block, answer + block
    return answer, "length", nfe


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("cut_at", [1, 4])
def test_a_cut_block_equals_the_slow_version(seed, cut_at):
    model = random_model(seed)
    settings = dict(policy=ConfidenceThreshold(0.25), max_new_tokens=17, terminator_last=False)
    for ours, prompt in zip(decode(model, lengths=Widths([6], cut_at=cut_at), **settings), PROMPTS, strict=True):
        with torch.no_grad():
            slow = slow_cut(model, prompt, 6, cut_at, 17, 0.25)
        assert (ours.tokens, ours.finish_reason, ours.nfe) == slow


def test_a_block_ends_at_its_most_confident_delimiter():
    """11 and 12 delimit. A block of 6 has both or, unsure or absent, none: then it is 4 wide."""
    script = [7, 11, 7, 12, 7, 7, 11, 7, 7, 7, 7, 7, 7, 7, 7, 7]
    sure = [0.9, 0.4, 0.9, 0.6, 0.9, 0.9, 0.2, *[0.9] * 9]
    pieces = []
    lengths = DelimiterLength([11, 12], threshold=0.3, length=4)
    BlockDiffusionSampler(
        ConfidenceThreshold(0.8), block_length=6, max_new_tokens=16, block_length_policy=lengths
    ).generate(
        Scripted([0, 0, *script], [0.5, 0.5, *sure]), [[5, 6]], on_block=lambda _, tokens: pieces.append(len(tokens))
    )
    assert pieces == [4, 8, 12, 16]
    lengths, pieces = DelimiterLength([11], threshold=0.1, length=5), []
    BlockDiffusionSampler(
        ConfidenceThreshold(0.8), block_length=6, max_new_tokens=16, block_length_policy=lengths
    ).generate(
        Scripted([0, 0, *script], [0.5, 0.5, *sure]), [[5, 6]], on_block=lambda _, tokens: pieces.append(len(tokens))
    )
    assert pieces == [2, 7, 12, 16]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
@pytest.mark.parametrize("lengths", [ConstantSteps(2, 2), DelimiterLength([7, 8, 9], 0.1), Widths([5, 2, 6, 3], 4)])
def test_a_row_in_a_batch_equals_the_row_alone(policy, lengths):
    model = random_model(1)
    together = decode(model, policy=policy, lengths=lengths)
    alone = [decode(model, [prompt], policy=policy, lengths=lengths)[0] for prompt in PROMPTS]
    assert everything(together) == everything(alone)


def test_constant_steps_follows_the_pace():
    policy = ConstantSteps(steps=4, min_length=3)
    assert policy(BlockStart(0, 100, 32)) == 32  # nothing is known yet
    assert policy(BlockStart(32, 100, 32, last_length=32, last_steps=8)) == 16
    assert policy(BlockStart(32, 100, 32, last_length=6, last_steps=2)) == 12
    assert policy(BlockStart(32, 100, 32, last_length=8, last_steps=16)) == 3  # the narrowest


def test_settings():
    for wrong in (dict(steps=0), dict(min_length=0)):
        with pytest.raises(UserError, match="ConstantSteps"):
            ConstantSteps(**wrong)
    for wrong in (dict(delimiters=[]), dict(delimiters=[1], threshold=2), dict(delimiters=[1], length=0)):
        with pytest.raises(UserError, match="DelimiterLength"):
            DelimiterLength(**wrong)


@pytest.mark.parametrize("lengths", [ConstantSteps(3, 2), DelimiterLength([5, 6], 0.2, 9)])
def test_a_checkpoint_remembers_the_policy(lengths):
    config = sampler_to_config(BlockDiffusionSampler(block_length_policy=lengths))
    assert config["init_args"]["block_length_policy"]["class_path"] == f"dllm_var.sampling.{type(lengths).__name__}"
    assert sampler_to_config(sampler_from_config(config)) == config
