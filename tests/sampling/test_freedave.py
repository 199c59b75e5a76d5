"""FreeDave decodes what its base sampler decodes, draw for draw, in fewer forwards."""

import math

import pytest
from test_block_diffusion import PROMPTS, Scripted, random_model

from dllm_var.errors import UserError
from dllm_var.sampling import BlockDiffusionSampler, ConfidenceThreshold, FixedSteps, FreeDaveSampler
from dllm_var.sampling import policies as P
from dllm_var.sampling.base import sampler_from_config
from dllm_var.sampling.configurable import sampler_to_config

ONE_PER_STEP = FixedSteps(steps=1 << 30)
EVERY_POLICY = [
    ONE_PER_STEP,
    FixedSteps(3),
    FixedSteps(2, "margin"),
    FixedSteps(99, "random"),
    ConfidenceThreshold(0.2),
    ConfidenceThreshold(0.4),
    P.CoherentCandidates(warmup_steps=1),
    P.ConfidenceFactor(),
    P.EntropyBounded(),
    P.FirstHitting(),
    P.JointThreshold(0.3, 0.2),
    P.Prophet(high=2.0, middle=1.0, low=0.5),
    P.RunningConfidenceRemasking(3),
    P.Saber(),
    P.SchED(high=2.0, low=0.5),
    P.Sequential(2),
]


def both(policy, model, drafts=4, **settings):
    """The answers of the base sampler and of FreeDave."""
    base = BlockDiffusionSampler(policy, **settings).generate(model, PROMPTS[:5])
    return base, FreeDaveSampler(policy, drafts=drafts, **settings).generate(model, PROMPTS[:5])


def assert_same_text(base, ours):
    for theirs, mine in zip(base, ours, strict=True):
        assert (mine.tokens, mine.finish_reason) == (theirs.tokens, theirs.finish_reason)
        assert mine.nfe <= theirs.nfe


@pytest.mark.parametrize("number", range(len(EVERY_POLICY)), ids=lambda n: type(EVERY_POLICY[n]).__name__)
def test_every_policy_decodes_the_same_text(number):
    """In turn as the paper has it, and with every other choice made differently."""
    settings = dict(block_length=6, max_new_tokens=15, batch_size=3)
    settings |= dict(kv_commit="alone", terminator_last=True) if number % 2 else dict(terminator_last=False)
    model = random_model(3, causal_context=number % 2 == 1)
    assert_same_text(*both(EVERY_POLICY[number], model, **settings))


@pytest.mark.parametrize(
    ("block_length", "per_step", "grid"), [(1, 1, "prompt"), (4, 2, "absolute"), (9, 3, "prompt"), (20, 2, "absolute")]
)
def test_every_shape_of_static_steps_decodes_the_same_text(block_length, per_step, grid):
    policy = FixedSteps(math.ceil(block_length / per_step))
    for drafts in (2, 5):
        settings = dict(block_length=block_length, max_new_tokens=17, batch_size=4, grid=grid)
        assert_same_text(*both(policy, random_model(1), drafts, **settings))


@pytest.mark.parametrize("policy", [ONE_PER_STEP, ConfidenceThreshold(0.3)])
def test_draws_are_the_same(policy):
    settings = dict(block_length=6, max_new_tokens=15, batch_size=3, temperature=0.8, top_k=5)
    for seed in range(2):
        assert_same_text(*both(policy, random_model(seed), seed=seed, **settings))


def test_it_takes_fewer_forwards():
    """Even where predictions change all the time, as a random model's do."""
    for policy in (ONE_PER_STEP, ConfidenceThreshold(0.4)):
        base, ours = both(policy, random_model(4), block_length=8, max_new_tokens=24)
        assert sum(answer.nfe for answer in ours) < 0.8 * sum(answer.nfe for answer in base)


@pytest.mark.parametrize(("drafts", "block_length"), [(1, 4), (2, 3), (4, 8)])
def test_a_model_that_never_changes_its_mind_is_taken_at_its_word(drafts, block_length):
    """The first forward of a block gives one step; each further one as many steps as there are drafts."""
    script, sure = [0, 0, *[7, 8, 9, 10] * 4], [0.5, 0.5, *[0.9, 0.5, 0.8, 0.6] * 4]
    sampler = FreeDaveSampler(drafts=drafts, block_length=block_length, max_new_tokens=16)
    [answer] = sampler.generate(Scripted(script, sure), [[5, 6]])
    widths = [min(block_length, 16 - start) for start in range(0, 16, block_length)]
    assert answer.tokens == script[2:]
    assert answer.nfe == sum(1 + math.ceil((width - 1) / drafts) for width in widths)
    assert max(answer.commit_steps) == answer.nfe


@pytest.mark.parametrize("policy", [ONE_PER_STEP, ConfidenceThreshold(0.3)])
@pytest.mark.parametrize("kv_commit", ["joint_next", "alone"])
def test_a_row_in_a_batch_equals_the_row_alone(policy, kv_commit):
    model = random_model(2)
    sampler = FreeDaveSampler(policy, block_length=6, max_new_tokens=20, batch_size=3, kv_commit=kv_commit)
    for together, prompt in zip(sampler.generate(model, PROMPTS), PROMPTS, strict=True):
        alone = sampler.generate(model, [prompt])[0]
        for name in ("tokens", "finish_reason", "nfe", "commit_steps"):
            assert getattr(together, name) == getattr(alone, name)


def test_settings():
    with pytest.raises(UserError, match="drafts"):
        FreeDaveSampler(drafts=0)
    config = sampler_to_config(FreeDaveSampler(drafts=3))
    assert config["class_path"] == "dllm_var.sampling.FreeDaveSampler"
    assert sampler_to_config(sampler_from_config(config)) == config
