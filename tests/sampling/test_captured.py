"""Steps of constant shape: captured once, and replayed with other numbers in the same memory.

No GPU is needed to see that: here a step is captured as the list of tensor operations that it ran (torch.fx). A replay
runs them again, so that whatever came from the host while it was captured is as it was then, as in a CUDA graph, and
an operation that waits for a number raises.
"""

from functools import partial

import pytest
import torch
from tiny_models import PROMPTS
from tiny_models import random_model as bigger_model
from torch.fx.experimental.proxy_tensor import make_fx

from dllm_var.errors import UserError
from dllm_var.sampling import (
    AutoregressiveSampler,
    BlockDiffusionSampler,
    ConstantSteps,
    StridedSampler,
    WinoSampler,
    captured,
    policies,
)
from dllm_var.sampling.base import Request

FIELDS = ("tokens", "finish_reason", "nfe", "commit_steps", "drafted", "accepted")
BASE = policies.UnmaskingPolicy
POLICIES = [kind for kind in vars(policies).values() if isinstance(kind, type) and issubclass(kind, BASE)]
POLICIES.remove(BASE)


@pytest.fixture
def counts(monkeypatch):
    """Lets steps be captured on the CPU; counts captures and replays."""
    counts = {"captures": 0, "replays": 0}

    def capture(function, numbers):
        counts["captures"] += 1
        found = []

        def remembered(given):
            found.append(function(given))
            return found[-1]

        graph = make_fx(remembered)(numbers)  # which ran it once

        def replay():
            counts["replays"] += 1
            return found.pop() if found else graph(numbers)

        return replay

    monkeypatch.setitem(captured.CAPTURES, "cpu", capture)
    monkeypatch.setattr(captured, "EAGER_USES", 1)
    return counts


def answers_of(sampler, model, **wishes):
    return [[getattr(answer, name) for name in FIELDS] for answer in sampler.generate(model, PROMPTS[:3], **wishes)]


def check(sampler, model, counts, monkeypatch, **wishes):
    """Compares answers with those of steps that are not captured, twice: a second call replays from its start."""
    found = [answers_of(sampler, model, **wishes) for _ in range(2)]
    assert counts["replays"] > counts["captures"] > 0
    before = dict(counts)
    monkeypatch.delitem(captured.CAPTURES, "cpu")
    expected = answers_of(sampler, model, **wishes)
    assert found == [expected, expected]
    assert counts == before


random_model = partial(bigger_model, num_layers=1)
blocks = partial(BlockDiffusionSampler, block_length=4, max_new_tokens=14, batch_size=2)


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.__name__)
def test_every_policy(policy, counts, monkeypatch):
    check(blocks(policy()), random_model(), counts, monkeypatch)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"kv_commit": "alone"}, marks=pytest.mark.slow),
        pytest.param({"kv_commit": "last_step"}, marks=pytest.mark.slow),
        pytest.param({"grid": "absolute"}, marks=pytest.mark.slow),
        pytest.param({"terminator_last": False}, marks=pytest.mark.slow),
        pytest.param({"block_length_policy": ConstantSteps(2, min_length=1)}, marks=pytest.mark.slow),
        pytest.param({"temperature": 1.0, "top_k": 5, "top_p": 0.8}, marks=pytest.mark.slow),
        {"batch_size": 1},
        pytest.param({"batch_size": 3}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_settings_of_block_diffusion(settings, counts, monkeypatch):
    check(blocks(**settings), random_model(1), counts, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"token_shift": True}, {"causal_context": True}, {"qk_norm": True}], ids=str)
def test_kinds_of_model(changes, counts, monkeypatch):
    check(blocks(), random_model(2, **changes), counts, monkeypatch)


@pytest.mark.parametrize("on_device", [True, False])
def test_experts_are_captured_where_their_products_need_nothing_from_the_host(on_device, counts, monkeypatch):
    """On the CPU they do not either: a replay with other tokens, which choose other experts, gives the same answers."""
    experts = dict(num_experts=8, experts_per_token=2, expert_intermediate_size=16, shared_experts=1)
    model = random_model(2, router="sigmoid", router_bias=True, expert_groups=4, groups_per_token=2, **experts)
    if on_device:
        monkeypatch.setattr(captured, "keeps_the_host_out", lambda weight: True)
        check(blocks(), model, counts, monkeypatch)
    else:
        assert not captured.can_capture(model)


@pytest.mark.parametrize(
    ("settings", "shift"),
    [
        ({"block_length": 2}, True),
        *(
            pytest.param(settings, shift, marks=pytest.mark.slow)
            for settings, shift in (
                ({}, False),
                ({}, True),
                ({"block_length": 2}, False),
                ({"kv_commit": "alone"}, False),
            )
        ),
    ],
    ids=str,
)
def test_block_causal_models(settings, shift, counts, monkeypatch):
    model = random_model(2, block_causal=True, block_length=4, token_shift=shift)
    check(blocks(**settings), model, counts, monkeypatch)


@pytest.mark.parametrize(
    "sampler",
    [
        AutoregressiveSampler(max_new_tokens=17, batch_size=2),
        AutoregressiveSampler(max_new_tokens=17, batch_size=3, temperature=0.9),
        StridedSampler(4, max_new_tokens=17, batch_size=2),
        StridedSampler(4, max_new_tokens=17, batch_size=3, least_chance=0.3, trust=0.5),
        pytest.param(
            StridedSampler(4, max_new_tokens=17, batch_size=2, temperature=0.8, top_k=6), marks=pytest.mark.slow
        ),
    ],
    ids=lambda sampler: type(sampler).__name__,
)
def test_causal_samplers(sampler, counts, monkeypatch):
    few = [token for token in range(20) if token not in (3, 6, 7, 8)]  # leaves so few that drafts are often right
    left_out = few if isinstance(sampler, StridedSampler) else [3, 4]  # no terminators
    check(sampler, random_model(3, causal=True), counts, monkeypatch, suppress=left_out)


@pytest.mark.parametrize(
    "sampler",
    [
        AutoregressiveSampler(),
        pytest.param(blocks(), marks=pytest.mark.slow),
        pytest.param(StridedSampler(4), marks=pytest.mark.slow),
    ],
    ids=lambda sampler: type(sampler).__name__,
)
def test_log_probabilities_and_recorded_steps(sampler, counts, monkeypatch):
    model, wishes = random_model(3, causal=sampler.causal), dict(max_new_tokens=8, suppress=[3, 4])

    def known(**asked):
        return [answer.log_probabilities for answer in sampler.generate(model, PROMPTS[:1], **wishes, **asked)]

    def recorded():
        [answer] = sampler.generate(model, PROMPTS[:1], record=True, **wishes)
        return [(one.forward, one.length, one.starts, [change[:2] for change in one.changes]) for one in answer.steps]

    assert known() == [None] and counts["replays"] > 0
    found, steps = [known(log_probabilities=True) for _ in range(2)][-1], recorded()
    monkeypatch.delitem(captured.CAPTURES, "cpu")
    assert steps == recorded()
    for captured_values, eager_values in zip(found, known(log_probabilities=True), strict=True):
        assert captured_values == pytest.approx(eager_values, abs=1e-4)


@pytest.mark.slow
def test_other_settings_or_weights_have_captures_of_their_own(counts, monkeypatch):
    model, sampler = random_model(), blocks(policies.ConfidenceThreshold(0.9))
    answers_of(sampler, model)
    first = counts["captures"]
    sampler.policy.threshold = 0.2  # is baked into the step
    changed = [answers_of(sampler, model) for _ in range(3)][-1]
    assert counts["captures"] > first
    with torch.no_grad():
        model.lm_head.weight.neg_()  # in place: the captured step reads them where they are
    first = counts["captures"]
    negated = answers_of(sampler, model)
    assert counts["captures"] == first and negated != changed
    model.lm_head.weight.data = model.lm_head.weight.data.neg()  # moved
    moved = [answers_of(sampler, model) for _ in range(3)][-1]
    assert counts["captures"] > first and moved == changed
    monkeypatch.delitem(captured.CAPTURES, "cpu")
    assert moved == answers_of(sampler, model)


class Reading(policies.ConfidenceThreshold):
    """A policy of a user's own, which waits for a number."""

    def decide(self, view, state):
        decision = super().decide(view, state)
        decision.commit &= view.confidence > view.confidence.min().item() / 2
        return decision


class Willing(Reading):
    can_be_captured = True


@pytest.mark.filterwarnings("ignore:.*cannot be captured")
@pytest.mark.parametrize("policy", [Reading, Willing])
def test_what_cannot_be_captured_decodes_all_the_same(policy, counts, monkeypatch):
    sampler, model = blocks(policy(0.3)), random_model()
    if policy is Willing:
        with pytest.warns(UserWarning, match="cannot be captured"):
            found = answers_of(sampler, model)
    else:
        found = answers_of(sampler, model)
    assert counts["replays"] == 0
    monkeypatch.delitem(captured.CAPTURES, "cpu")
    assert found == answers_of(sampler, model)


def test_samplers_with_steps_of_their_own_are_not_captured(counts):
    answers_of(WinoSampler(block_length=4, max_new_tokens=17), random_model())
    assert counts == {"captures": 0, "replays": 0}


@pytest.mark.slow
def test_arenas_are_few_and_go_with_training(counts):
    model = random_model()
    for length in (2, 3, 4):
        answers_of(BlockDiffusionSampler(block_length=length, max_new_tokens=5), model)
    assert len(captured._ARENAS[model]) == captured.ARENAS_KEPT
    answers_of(blocks(), model.train())
    assert model not in captured._ARENAS


@pytest.mark.slow
def test_a_replay_notices_numbers_that_are_not_finite(counts):
    model, sampler = random_model(), blocks()
    answers_of(sampler, model)
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    with pytest.raises(UserError, match="not numbers"):
        answers_of(sampler, model)
    with torch.no_grad():
        model.lm_head.weight[5] = 0.0
    answers_of(sampler, model)


@pytest.mark.slow
def test_prompts_enter_an_engine_whose_steps_are_captured(counts):
    sampler = BlockDiffusionSampler(policies.FixedSteps(4), block_length=4, batch_size=3, max_new_tokens=12)
    limits, model, told = [12, 5, 9], bigger_model(), {}
    expected = [
        sampler.generate(model, [prompt], max_new_tokens=n)[0] for prompt, n in zip(PROMPTS, limits, strict=False)
    ]
    before = counts["replays"]
    request = Request(context=64, on_answer=lambda index, answer: told.setdefault(index, answer))
    with torch.inference_mode():
        engine = sampler.engine(sampler, model, [], request)
        assert len(engine.rows) == 3  # memory of constant shape has all of them from the start
        for index, limit in enumerate(limits):
            engine.enter(index, PROMPTS[index], 0, limit)
            engine.fit_rows()
            engine.advance()
        while engine.active:
            engine.fit_rows()
            engine.advance()
    assert counts["replays"] > before
    for index, answer in enumerate(expected):
        assert [getattr(told[index], name) for name in FIELDS] == [getattr(answer, name) for name in FIELDS]
