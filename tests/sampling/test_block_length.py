"""Blocks of adaptive length: the widths that a policy asks for, and nothing else, change what is decoded."""

import pytest
from test_block_diffusion import PROMPTS, Scripted, random_model

from dllm_var.errors import UserError
from dllm_var.sampling import (
    BlockDiffusionSampler,
    BlockLengthPolicy,
    BlockStart,
    ConfidenceThreshold,
    ConstantSteps,
    FixedSteps,
)
from dllm_var.sampling import policies as P
from dllm_var.sampling.base import sampler_from_config
from dllm_var.sampling.configurable import sampler_to_config

POLICIES = [ConfidenceThreshold(0.3), FixedSteps(3), P.JointThreshold(0.3, 0.2, max_edit_steps=2), P.Saber()]


class Widths(BlockLengthPolicy):
    """Opens blocks as wide as a row's place in the answer says, and keeps what it was told."""

    def __init__(self, widths):
        self.widths, self.told = widths, []

    def __call__(self, state):
        self.told.append(state)
        return self.widths[state.answer_length % len(self.widths)]


def decode(model, prompts=PROMPTS, policy=None, lengths=None, **settings):
    settings = {"block_length": 6, "max_new_tokens": 20, "batch_size": 3, **settings}
    return BlockDiffusionSampler(policy, block_length_policy=lengths, **settings).generate(model, prompts)


def everything(answers):
    return [(a.tokens, a.finish_reason, a.nfe, a.commit_steps) for a in answers]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
@pytest.mark.parametrize("wanted", [0, 4, 99])
def test_a_constant_width_is_that_block_length(policy, wanted):
    model, settings = random_model(2), dict(kv_commit="alone", terminator_last=False)
    base = decode(model, policy=policy, block_length=max(1, min(wanted, 6)), **settings)
    ours = decode(model, policy=policy, lengths=Widths([wanted]), **settings)
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


@pytest.mark.parametrize("policy", POLICIES[1:3], ids=lambda policy: type(policy).__name__)
@pytest.mark.parametrize("lengths", [ConstantSteps(2, 2), Widths([5, 2, 6, 3])])
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
    for wrong in (dict(steps=0), dict(min_length=0)):
        with pytest.raises(UserError, match="ConstantSteps"):
            ConstantSteps(**wrong)
    config = sampler_to_config(BlockDiffusionSampler(block_length_policy=policy))
    assert config["init_args"]["block_length_policy"]["class_path"] == "dllm_var.sampling.ConstantSteps"
    assert sampler_to_config(sampler_from_config(config)) == config
