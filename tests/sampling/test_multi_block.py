"""Multi-block decoding against a slow version, and what it promises about the leading block and about ends."""

from dataclasses import dataclass

import pytest
import torch
from slow_reference import forward as slow_forward
from test_block_diffusion import ALL_POLICIES, ENDS, MASK, PROMPTS, Scripted, random_model
from tiny_models import lookup_model

from dllm_var.errors import UserError
from dllm_var.sampling import (
    BlockDiffusionSampler,
    ConfidenceThreshold,
    Decision,
    FixedSteps,
    MultiBlockSampler,
    UnmaskingPolicy,
)
from dllm_var.sampling import policies as P
from dllm_var.sampling.base import sampler_from_config
from dllm_var.sampling.configurable import sampler_to_config

POLICIES = [ConfidenceThreshold(0.3), FixedSteps(3), FixedSteps(2, "random"), *ALL_POLICIES]
POLICIES = [P.JointThreshold(0.3, 0.2, 3) if isinstance(p, P.JointThreshold) else p for p in POLICIES]
SETTINGS = [
    {},
    {"kv_commit": "alone", "grid": "absolute"},
    {"terminator_last": False, "temperature": 0.7},
    {"kv_commit": "last_step"},
]
EACH = [(policy, SETTINGS[n % 4]) for n, policy in enumerate(POLICIES)] + [(POLICIES[0], SETTINGS[1])]
LEFT_ALONE = [(POLICIES[0], {"sees_ahead": False, **SETTINGS[n]}) for n in (0, 1)]
EAGER = dict(open_at=0.0, settled_at=0.5, ahead_threshold=0.2)


def everything(answers):
    return [(a.tokens, a.finish_reason, a.nfe, a.commit_steps) for a in answers]


def share(block):
    return 1 - block.count(MASK) / len(block)


def slow_multi_block(model, prompt, settings, threshold, ahead):
    """One row; blocks are lists of tokens, and all that is kept is computed again from them at each step."""
    limit, block_length, terminator_last = (settings[n] for n in ("max_new_tokens", "block_length", "terminator_last"))
    open_at, settled_at, blocks = (settings[name] for name in ("open_at", "settled_at", "blocks"))
    row, window, keys, frozen, nfe = list(prompt), [[MASK] * min(block_length, limit)], [], 0, 0
    while True:
        flat = [token for block in window for token in block]
        hidden, made = slow_forward(model, row[frozen:] + flat, range(frozen, len(row) + len(flat)), keys)
        nfe, pending, frozen = nfe + 1, len(row) - frozen, len(row)
        keys.append([(k[:, :, :pending], v[:, :, :pending]) for k, v in made])
        logits = model.lm_head(hidden)[0, pending:].float()
        logits[:, MASK] = -torch.inf
        confidence, predicted = (values.tolist() for values in logits.softmax(-1).max(-1))
        owner = [n for n, block in enumerate(window) for _ in block]
        masked = [g for g, token in enumerate(flat) if token == MASK]
        ends = [g for g in masked if predicted[g] in ENDS]
        ahead_of = [n > 0 and share(window[n - 1]) < settled_at for n in range(len(window))]
        sure = [g for g in masked if confidence[g] > (max(threshold, ahead) if ahead_of[owner[g]] else threshold)]

        leading = [g for g in masked if owner[g] == 0]
        wanted = [g for g in sure if owner[g] == 0]
        if terminator_last:
            first = min((g for g in wanted if g in ends), default=len(flat))
            plain = [g for g in wanted if g < first]
            wanted = plain + [g for g in wanted if g == first and all(m in plain for m in leading if m < g)]
        if leading and not wanted:
            fit = [g for g in leading if not terminator_last or g < min(ends, default=len(flat)) or g == leading[0]]
            wanted = [max(fit, key=lambda g: (confidence[g], -g))]
        for g in sure:
            if owner[g] > 0 and not any(end < g for end in ends):
                left_open = [m for m in masked if m < g and m not in wanted]
                if not (terminator_last and g in ends and left_open):
                    wanted.append(g)

        in_sight = bool(ends) or any(token in ENDS for token in flat)
        for g in wanted:
            flat[g] = predicted[g]
        known = flat[: flat.index(MASK)] if MASK in flat else flat
        end = next((g for g, token in enumerate(known) if token in ENDS), None)
        if end is not None:
            return row[len(prompt) :] + known[:end], "eos", nfe
        window = [[token for g, token in enumerate(flat) if owner[g] == n] for n in range(len(window))]
        while window and MASK not in window[0]:
            row += window.pop(0)
        if len(row) - len(prompt) == limit:
            return row[len(prompt) :], "length", nfe

        def open_one(window=window, row=row):
            room = limit - (len(row) - len(prompt)) - sum(map(len, window))
            window.extend([[MASK] * min(block_length, room)] if room else [])

        if not window:
            open_one()
        if len(window) < blocks and share(window[-1]) >= open_at and not in_sight:
            open_one()


@pytest.mark.parametrize(("seed", "terminator_last"), [(0, False), (1, True), (2, True)])
@pytest.mark.parametrize(
    ("blocks", "open_at", "settled_at", "ahead"), [(2, 0.2, 0.6, 0.3), (3, 0.0, 1.0, 0.2), (2, 0.5, 0.0, 0.9)]
)
def test_equals_the_slow_version(seed, terminator_last, blocks, open_at, settled_at, ahead):
    model = random_model(seed)
    settings = dict(blocks=blocks, open_at=open_at, settled_at=settled_at, block_length=4, max_new_tokens=14)
    settings["terminator_last"] = terminator_last
    sampler = MultiBlockSampler(ConfidenceThreshold(0.2), ahead_threshold=ahead, batch_size=3, **settings)
    for ours, prompt in zip(sampler.generate(model, PROMPTS[:5]), PROMPTS, strict=False):
        with torch.no_grad():
            slow = slow_multi_block(model, prompt, settings, 0.2, ahead)
        assert (ours.tokens, ours.finish_reason, ours.nfe) == slow


@pytest.mark.parametrize(("policy", "settings"), EACH, ids=lambda value: type(value).__name__)
def test_with_one_block_it_is_the_base_sampler(policy, settings):
    model = random_model(3)
    settings = dict(block_length=6, max_new_tokens=15, batch_size=3, **settings)
    base = BlockDiffusionSampler(policy, **settings).generate(model, PROMPTS[:5])
    ours = MultiBlockSampler(policy, blocks=1, **EAGER, **settings).generate(model, PROMPTS[:5])
    assert everything(ours) == everything(base)


@pytest.mark.parametrize(("policy", "settings"), EACH + LEFT_ALONE, ids=lambda value: type(value).__name__)
def test_a_row_in_a_batch_equals_the_row_alone(policy, settings):
    model = random_model(1)
    settings = dict(blocks=3, block_length=4, max_new_tokens=14, batch_size=3, **EAGER, **settings)
    sampler = MultiBlockSampler(policy, **settings)
    together = sampler.generate(model, PROMPTS[:5])
    assert everything(together) == everything([sampler.generate(model, [prompt])[0] for prompt in PROMPTS[:5]])
    for answer in together:
        assert MASK not in answer.tokens and not set(ENDS) & set(answer.tokens)
        assert answer.finish_reason == "eos" or len(answer.tokens) == 14


@pytest.mark.parametrize("causal", [False, True])
def test_a_block_that_does_not_see_ahead_is_remembered_alike_beside_others_and_alone(causal):
    model = random_model(2)
    model.config.causal_context = causal
    settings = dict(blocks=3, block_length=4, max_new_tokens=14, sees_ahead=False, **EAGER)
    joint, alone = (
        MultiBlockSampler(ConfidenceThreshold(0.3), kv_commit=kind, **settings).generate(model, PROMPTS[:5])
        for kind in ("joint_next", "alone")
    )
    assert [answer.tokens for answer in joint] == [answer.tokens for answer in alone]
    assert all(ours.nfe < theirs.nfe for ours, theirs in zip(joint, alone, strict=True))


def scripted(script, sure, **settings):
    defaults = dict(policy=ConfidenceThreshold(0.9), block_length=4, max_new_tokens=len(script), open_at=0.0)
    pieces = []
    [answer] = MultiBlockSampler(**{**defaults, **settings}).generate(
        Scripted([0, 0, *script], [0.5, 0.5, *sure]), [[5, 6]], on_block=lambda _, tokens: pieces.append(len(tokens))
    )
    return answer, pieces


def test_two_blocks_are_decoded_in_the_time_of_the_slower():
    """Each block has one sure position and three that are filled one by one while it leads."""
    answer, pieces = scripted([7] * 8, [0.99, 0.5, 0.5, 0.5, 0.99, 0.99, 0.5, 0.99])
    assert answer.commit_steps == [1, 2, 3, 4, 2, 2, 5, 2] and pieces == [4, 8]


def test_all_open_blocks_may_be_finished_at_once():
    answer, pieces = scripted([7] * 12, [0.5, 0.99, 0.99, 0.99, *[0.99] * 8], blocks=3)
    assert answer.commit_steps == [2, 1, 1, 1, *[2] * 4, *[3] * 4] and pieces == [8, 12]
    assert answer.tokens == [7] * 12 and answer.nfe == 3


def test_a_block_behind_needs_more_confidence_until_the_one_left_of_it_is_settled():
    settings = dict(policy=ConfidenceThreshold(0.6), ahead_threshold=0.95, settled_at=0.75)
    answer, _ = scripted([7] * 8, [0.5, 0.52, 0.54, 0.56, 0.97, 0.9, 0.9, 0.9], **settings)
    assert answer.commit_steps == [4, 3, 2, 1, 2, 4, 4, 4]


def test_the_next_block_opens_when_the_last_is_decoded_far_enough():
    """Half of a block is sure; the other half is filled one by one."""
    sure = [0.99, 0.99, 0.5, 0.5] * 2
    assert scripted([7] * 8, sure, open_at=0.5)[0].commit_steps == [1, 1, 2, 3, 2, 2, 4, 5]
    assert scripted([7] * 8, sure, open_at=0.75)[0].commit_steps == [1, 1, 2, 3, 3, 3, 4, 5]
    assert scripted([7] * 8, sure, open_at=1.0)[0].commit_steps == [1, 1, 2, 3, 4, 4, 5, 6]


def test_nothing_is_decoded_right_of_a_terminator_in_sight():
    """The leading block expects a terminator, if not a sure one: what is behind it waits, and no block opens."""
    answer, _ = scripted([7, 7, 7, 3, 8, 8, 8, 8], [0.5, 0.5, 0.5, 0.4, *[0.99] * 4])
    assert (answer.tokens, answer.finish_reason, answer.nfe) == ([7, 7, 7], "eos", 4)


def test_a_terminator_ahead_waits_for_all_left_of_it():
    answer, _ = scripted([7] * 5 + [3, 9, 9], [0.5, 0.99, 0.99, 0.5, 0.5, 0.99, 0.99, 0.99])
    assert (answer.tokens, answer.finish_reason) == ([7] * 5, "eos")
    assert answer.commit_steps == [2, 1, 1, 3, 4] and answer.nfe == 5
    unsorted, _ = scripted([7] * 5 + [3, 9, 9], [0.5, 0.99, 0.99, 0.5, 0.99, 0.99, 0.99, 0.99], terminator_last=False)
    assert (unsorted.tokens, unsorted.finish_reason, unsorted.nfe) == ([7] * 5, "eos", 3)


def test_a_policy_may_end_a_row_whose_window_has_blocks_of_any_width():
    """The first block ends at a multiple of 4: two positions behind the prompt of two."""

    class Ends(P.UnmaskingPolicy):
        def decide(self, view, state):
            return Decision(commit=view.masked, finish_row=view.step == 1)

    class Waits(Ends):
        def decide(self, view, state):
            behind = view.tokens.eq(MASK) & (view.step[:, None] < 2)
            return Decision(commit=view.masked & ~behind, finish_row=view.step == 1)

    answer, _ = scripted([7] * 14, [0.99] * 14, policy=Ends(), grid="absolute")
    assert answer.tokens == [7] * 14  # every block is finished at its first step
    answer, _ = scripted([7] * 14, [0.99] * 14, policy=Waits(), grid="absolute", blocks=1)
    assert answer.tokens == [7, 7]
    answer, _ = scripted([7] * 14, [0.99] * 14, policy=Waits(), grid="absolute")
    assert answer.tokens == [7, 7]


def test_every_block_has_a_memory_and_a_count_of_steps_of_its_own():
    class Counts(P.UnmaskingPolicy):
        seen = 0

        def initial_state(self, block_length):
            return {"asked": torch.zeros(1, dtype=torch.long)}

        def decide(self, view, state):
            here = view.changeable.any(dim=1)
            assert state["asked"][here, 0].equal(view.step[here])
            self.seen += int((view.step[here] > 0).sum())
            state["asked"] += 1
            return Decision(commit=view.masked & (view.confidence > 0.3))

    policy = Counts()
    MultiBlockSampler(policy, blocks=3, block_length=4, max_new_tokens=16, batch_size=3, **EAGER).generate(
        random_model(1), PROMPTS
    )
    assert policy.seen > 20


def test_blocks_draw_apart():
    """Two blocks are drawn in the same forward from the same probabilities."""
    model = lookup_model({}, tuple(range(5, 19)))
    sampler = MultiBlockSampler(
        ConfidenceThreshold(0.0), ahead_threshold=0.0, open_at=0.0, block_length=6, max_new_tokens=18, temperature=1.0
    )
    [answer] = sampler.generate(model, [[5, 6]], suppress=ENDS)
    assert answer.commit_steps == [1] * 6 + [2] * 12
    assert answer.tokens[6:12] != answer.tokens[12:]


def test_a_terminator_ahead_is_not_committed_while_it_may_yet_change():
    """Until one position is left in the leading block, the model expects the answer to end ahead of it."""
    model = Scripted([0, 0, *[7] * 4, 7, 3, 7, 7], [0.5, 0.5, *[0.5] * 4, *[0.99] * 4])
    original = model.hidden_states

    def changing(tokens, *others, **named):
        if tokens.size(1) == 8 and tokens[0, :4].eq(MASK).sum() == 1:
            model.lm_head.script[7] = 8
        return original(tokens, *others, **named)

    model.hidden_states = changing
    sampler = MultiBlockSampler(ConfidenceThreshold(0.9), open_at=0.0, block_length=4, max_new_tokens=8)
    [answer] = sampler.generate(model, [[5, 6]])
    assert answer.tokens == [7] * 5 + [8, 7, 7]


def test_settings():
    for name, value in (("blocks", 0), ("open_at", 1.5), ("settled_at", -1), ("ahead_threshold", 2)):
        with pytest.raises(UserError, match=name):
            MultiBlockSampler(**{name: value})
    config = sampler_to_config(MultiBlockSampler(blocks=3, open_at=0.3))
    assert config["class_path"] == "dllm_var.sampling.MultiBlockSampler"
    assert sampler_to_config(sampler_from_config(config)) == config


@dataclass(eq=False)
class EditsAnEndAway(UnmaskingPolicy):
    """Fills a block at once, with a terminator and tokens behind it, and overwrites the terminator a step later."""

    def decide(self, view, state):
        tokens = torch.full_like(view.tokens, 5)
        tokens[view.step == 0, 2] = ENDS[0]
        tokens[view.step == 0, 3:] = 7
        edit = (view.tokens == ENDS[0]) & (view.step == 1)[:, None]
        return Decision(commit=view.masked, tokens=tokens, edit=edit, keep_open=view.step < 4)


def test_nothing_is_left_behind_a_terminator_that_was_edited_away():
    settings = dict(block_length=6, max_new_tokens=18, terminator_last=False)
    sampler = MultiBlockSampler(EditsAnEndAway(), blocks=2, open_at=0.0, **settings)
    for answer in sampler.generate(random_model(), PROMPTS):
        assert len(answer.tokens) == len(answer.commit_steps) and min(answer.commit_steps) > 0
