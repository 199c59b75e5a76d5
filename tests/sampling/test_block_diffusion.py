"""The engine against the slow reference, and what it promises about rows, ends and counts."""

from dataclasses import dataclass
from functools import partial

import pytest
import tiny_models
import torch
from slow_reference import generate as slow_generate
from tiny_models import ENDS, MASK, PROMPTS, VOCABULARY

from dllm_var.errors import UserError
from dllm_var.model import Transformer
from dllm_var.sampling import BlockDiffusionSampler, ConfidenceThreshold, Decision, FixedSteps
from dllm_var.sampling import policies as P
from dllm_var.sampling.base import sampler_from_config
from dllm_var.sampling.configurable import sampler_to_config

random_model = partial(tiny_models.random_model, initializer_range=0.2)


@pytest.mark.parametrize("kv_commit", ["joint_next", "alone", "last_step"])
@pytest.mark.parametrize(("terminator_last", "causal_context"), [(False, False), (True, False), (True, True)])
def test_equals_the_slow_reference(kv_commit, terminator_last, causal_context):
    model = random_model(1, causal_context=causal_context)
    sampler = BlockDiffusionSampler(
        ConfidenceThreshold(0.2),
        block_length=5,
        max_new_tokens=13,
        terminator_last=terminator_last,
        kv_commit=kv_commit,
    )
    for prompt in PROMPTS[:4]:
        ours = sampler.generate(model, [prompt])[0]
        slow = slow_generate(model, prompt, 5, 13, lambda c: c > 0.2, terminator_last, kv_commit)
        assert (ours.tokens, ours.finish_reason, ours.nfe) == slow


@pytest.mark.parametrize("policy", [ConfidenceThreshold(0.3), FixedSteps(2, "random")])
@pytest.mark.parametrize(
    ("settings", "causal_context"),
    [
        ({}, True),
        ({"kv_commit": "alone"}, False),
        ({"kv_commit": "last_step"}, True),
        ({"grid": "absolute", "terminator_last": False}, False),
    ],
)
def test_a_row_in_a_batch_equals_the_row_alone(policy, settings, causal_context):
    """Seven prompts through three places: rows leave, others take their place, and nobody notices."""
    model = random_model(causal_context=causal_context)
    sampler = BlockDiffusionSampler(policy, block_length=6, max_new_tokens=20, batch_size=3, **settings)
    for together, prompt in zip(sampler.generate(model, PROMPTS), PROMPTS, strict=True):
        alone = sampler.generate(model, [prompt])[0]
        for name in ("tokens", "finish_reason", "nfe", "commit_steps", "prompt_length"):
            assert getattr(together, name) == getattr(alone, name)


def test_some_rows_end_themselves_and_some_do_not():
    """The comparisons above would prove little if every row ran into the limit."""
    reasons = [
        answer.finish_reason
        for seed in range(3)
        for answer in BlockDiffusionSampler(ConfidenceThreshold(0.2), block_length=5, max_new_tokens=13).generate(
            random_model(seed), PROMPTS
        )
    ]
    assert {"eos", "length"} == set(reasons)


class ScriptedHead(torch.nn.Module):
    """Predicts `script[p]` with probability `sure[p]` at row position p, which it reads from the hidden state."""

    def __init__(self, script, sure):
        super().__init__()
        self.script, self.sure = script, sure

    def forward(self, hidden):
        logits = torch.zeros(hidden.size(0), VOCABULARY)
        for i, position in enumerate(hidden[:, 0].long().tolist()):
            p = self.sure[position]
            logits[i, self.script[position]] = torch.tensor(p * (VOCABULARY - 2) / (1 - p)).log()
            logits[i, MASK] = 100.0  # the mask is the favourite everywhere and must never win
        return logits


class Scripted(Transformer):
    """A transformer that follows a script instead of its weights."""

    def __init__(self, script, sure):
        super().__init__(random_model().config)
        self.lm_head = ScriptedHead(script, sure)

    def hidden_states(self, input_ids, position_ids=None, segment_ids=None, cache=None):
        hidden = super().hidden_states(input_ids, position_ids, segment_ids, cache)
        hidden[..., 0] = cache.positions
        return hidden


def scripted(script, sure, **settings):
    """Decodes a prompt of two tokens whose answer is scripted, in blocks of 4 with threshold 0.9."""
    defaults = dict(policy=ConfidenceThreshold(0.9), block_length=4, max_new_tokens=len(script))
    sampler = BlockDiffusionSampler(**{**defaults, **settings})
    return sampler.generate(Scripted([0, 0, *script], [0.5, 0.5, *sure]), [[5, 6]])[0]


def test_a_sure_terminator_waits_for_what_is_left_of_it():
    answer = scripted([7, 8, 3, 9], [0.5, 0.6, 0.99, 0.99])
    assert (answer.tokens, answer.finish_reason) == ([7, 8], "eos")
    assert answer.nfe == 3 and answer.commit_steps == [2, 1]  # 8, then 7, then the terminator; 9 never


def test_without_terminator_last_the_row_ends_once_the_left_is_filled():
    answer = scripted([7, 8, 3, 9], [0.5, 0.6, 0.99, 0.99], terminator_last=False)
    assert (answer.tokens, answer.finish_reason, answer.nfe) == ([7, 8], "eos", 3)


def test_nothing_is_computed_once_the_terminator_has_everything_left_of_it():
    """The positions right of the terminator are unsure: filling them would take two more steps."""
    answer = scripted([7, 3, 9, 9], [0.99, 0.99, 0.2, 0.2])
    assert (answer.tokens, answer.nfe) == ([7], 1)


def test_the_mask_token_is_never_committed_and_the_last_block_may_be_partial():
    answer = scripted([7] * 10, [0.99] * 10)
    assert (answer.tokens, answer.finish_reason, answer.nfe) == ([7] * 10, "length", 3)  # 4 + 4 + 2 tokens


def test_every_step_commits_something():
    answer = scripted([7] * 8, [0.3] * 8)
    assert answer.nfe == 8 and len(answer.tokens) == 8  # one token per step, the prefill being a step too


def test_blocks_are_streamed_as_they_are_finished():
    seen = []
    sampler = BlockDiffusionSampler(ConfidenceThreshold(0.3), block_length=4, max_new_tokens=11)
    answers = sampler.generate(random_model(), PROMPTS[:3], on_block=lambda index, tokens: seen.append((index, tokens)))
    for index, answer in enumerate(answers):
        pieces = [tokens for row, tokens in seen if row == index]
        assert pieces[-1] == answer.tokens
        assert all(longer[: len(shorter)] == shorter for shorter, longer in zip(pieces, pieces[1:], strict=False))


def test_a_policy_may_remask_edit_and_finish():
    """Commits everything, takes the first position back once, and ends the row at its second step."""

    class Hesitant(P.UnmaskingPolicy):
        scores_committed = True

        def initial_state(self, block_length):
            return {"asked": torch.zeros(1)}

        def decide(self, view, state):
            state["asked"] += 1
            first = torch.zeros_like(view.masked)
            first[:, 0] = (view.step == 0) & (state["asked"][:, 0] == 1)
            return Decision(commit=view.masked & ~first, remask=first, finish_row=view.step == 1)

    answer = scripted([7, 8, 9, 10], [0.99] * 4, policy=Hesitant(), max_new_tokens=8)
    assert (answer.tokens, answer.nfe) == ([7, 8, 9, 10], 2)


def test_a_row_that_a_policy_finishes_early_ends_before_its_first_mask():
    class Hasty(P.UnmaskingPolicy):
        def initial_state(self, block_length):
            return {}

        def decide(self, view, state):
            commit = view.masked.clone()
            commit[:, 2] = False
            return Decision(commit=commit, finish_row=torch.ones_like(view.step, dtype=torch.bool))

    answer = scripted([7, 8, 9, 10], [0.99] * 4, policy=Hasty())
    assert (answer.tokens, answer.nfe, answer.commit_steps) == ([7, 8], 1, [1, 1])


def test_generate_restores_training_mode_and_needs_no_gradient():
    model = random_model().train()
    BlockDiffusionSampler(max_new_tokens=4).generate(model, [[5]])
    assert model.training


@pytest.mark.parametrize(
    ("prompts", "named"), [([[]], "prompt 0 is empty"), ([[5], [99]], "token id 99"), (["text"], "tokenizer")]
)
def test_bad_prompts_are_named(prompts, named):
    with pytest.raises(UserError, match=named):
        BlockDiffusionSampler().generate(random_model(), prompts)


def test_a_causal_model_is_refused():
    with pytest.raises(UserError, match="autoregressive"):
        BlockDiffusionSampler().generate(random_model(causal=True), [[5]])


def test_no_prompts_give_no_answers():
    assert BlockDiffusionSampler().generate(random_model(), []) == []


ALL_POLICIES = [
    P.CoherentCandidates(warmup_steps=1),
    P.ConfidenceFactor(),
    P.EntropyBounded(),
    P.EntropyThreshold(),
    P.FirstHitting(),
    P.JointThreshold(0.3, 0.2),
    P.Prophet(high=2.0, middle=1.0, low=0.5),
    P.RunningConfidenceRemasking(3),
    P.Saber(),
    P.SchED(high=2.0, low=0.5),
    P.Sequential(2),
]


@pytest.mark.parametrize("policy", ALL_POLICIES, ids=lambda policy: type(policy).__name__)
def test_every_policy_decodes_a_batch_as_single_rows(policy):
    model, terminator_last = random_model(3), ALL_POLICIES.index(policy) % 2 == 0
    settings = dict(block_length=6, max_new_tokens=15, batch_size=3, terminator_last=terminator_last)
    sampler, prompts = BlockDiffusionSampler(policy, **settings), PROMPTS[:5]
    for together, prompt in zip(sampler.generate(model, prompts), prompts, strict=True):
        alone = sampler.generate(model, [prompt])[0]
        assert (together.tokens, together.finish_reason, together.nfe) == (alone.tokens, alone.finish_reason, alone.nfe)
        assert MASK not in together.tokens and not set(ENDS) & set(together.tokens)
        assert together.finish_reason == "eos" or len(together.tokens) == 15


@pytest.mark.parametrize("policy", ALL_POLICIES, ids=lambda policy: type(policy).__name__)
def test_every_policy_is_remembered_by_a_checkpoint(policy):
    config = sampler_to_config(BlockDiffusionSampler(policy))
    again = sampler_from_config(config)
    assert sampler_to_config(again) == config and type(again.policy) is type(policy)


def test_a_checkpoint_names_classes_by_their_public_path():
    config = sampler_to_config(BlockDiffusionSampler(P.Saber()))
    assert config["class_path"] == "dllm_var.sampling.BlockDiffusionSampler"
    assert config["init_args"]["policy"]["class_path"] == "dllm_var.sampling.policies.Saber"


def test_a_policy_that_remasks_for_ever_is_stopped():
    class Sisyphus(P.UnmaskingPolicy):
        def initial_state(self, block_length):
            return {}

        def decide(self, view, state):
            return Decision(commit=torch.zeros_like(view.masked), remask=view.changeable)

    answer = scripted([7] * 4, [0.99] * 4, policy=Sisyphus())
    assert answer.tokens == [7] * 4


class OwnPolicy:
    def __init__(self, order=None, **others):
        self.order, self.others = order, others


class ListPolicy(ConfidenceThreshold):
    def __init__(self, thresholds=(0.5, 0.9)):
        self.thresholds = thresholds


def test_what_cannot_be_described_in_full_is_not_remembered():
    described = sampler_to_config(BlockDiffusionSampler(ListPolicy()))
    assert described["init_args"]["policy"]["init_args"] == {"thresholds": [0.5, 0.9]}
    for policy in (OwnPolicy(), ListPolicy({"first": 0.5}), ListPolicy(torch.ones(2))):
        assert sampler_to_config(BlockDiffusionSampler(policy)) is None


def test_a_terminator_that_waits_does_not_make_saber_go_in_circles():
    """What the engine holds back, Saber counts as committed; for each such token it would mask another one again."""
    longest = 0
    for seed in range(8):
        answers = BlockDiffusionSampler(P.Saber(), block_length=12, max_new_tokens=12).generate(
            random_model(seed, initializer_range=0.4), PROMPTS
        )
        longest = max(longest, *(answer.nfe for answer in answers))
    assert longest <= 2 * 12


def test_mixed_precision_training_does_not_reach_the_sampler():
    model, sampler = random_model(), BlockDiffusionSampler(block_length=5, max_new_tokens=10, batch_size=3)
    expected = [answer.tokens for answer in sampler.generate(model, PROMPTS)]
    with torch.autocast("cpu", torch.bfloat16):
        assert [answer.tokens for answer in sampler.generate(model, PROMPTS)] == expected


def test_nothing_is_left_behind_a_terminator_that_is_edited_away():
    class Doubts(P.UnmaskingPolicy):
        """Ends the first block at its second position, and takes that back one step later."""

        def decide(self, view, state):
            assert (view.masked == view.changeable)[view.step == 0].all()  # every block begins as masks
            ends = view.progress == 0
            first, second = ends & (view.step == 0), ends & (view.step == 1)
            edit = view.changeable & ~view.masked & second[:, None]
            tokens = torch.where(first[:, None] & (torch.arange(4) == 1), ENDS[0], view.predicted)
            return Decision(commit=view.masked, tokens=tokens, edit=edit, keep_open=first)

        scores_committed = True

    sampler = BlockDiffusionSampler(Doubts(), block_length=4, max_new_tokens=8)
    [answer] = sampler.generate(Scripted([0, 0, *[7] * 8], [0.9] * 10), [[5, 6]])
    assert (answer.tokens, answer.commit_steps) == ([7] * 8, [2, 2, 3, 3, 3, 3, 4, 4])


@dataclass(eq=False)
class TwoDraws(BlockDiffusionSampler):
    """Decodes twice with the same request, as one that chooses among answers does."""

    def decode(self, model, prompts, request):
        first, second = (
            BlockDiffusionSampler(temperature=1.0, seed=seed, block_length=6, max_new_tokens=12) for seed in (1, 2)
        )
        self.found = [sampler.decode(model, prompts, request) for sampler in (first, second)]
        return self.found[1]


def test_a_sampler_may_decode_twice_with_one_request():
    sampler = TwoDraws()
    sampler.generate(random_model(), PROMPTS)
    first, second = ([answer.tokens for answer in answers] for answers in sampler.found)
    assert first != second
