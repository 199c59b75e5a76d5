"""Each policy against an obvious slow version on random logits, and the property that defines it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_reference import SlowCoherentCandidates, SlowEarlyExit, SlowEntropyBounded, SlowEntropyThreshold, SlowSaber
from tiny_models import random_model

from dllm_var.errors import UserError
from dllm_var.sampling import BlockDiffusionSampler, FixedLengthSampler
from dllm_var.sampling import policies as P
from dllm_var.sampling.freedave import FreeDaveSampler
from dllm_var.sampling.multi_block import MultiBlockSampler
from dllm_var.sampling.policies.base import commit as choose_commits

VOCABULARY = 7


def make_view(seed=0, rows=3, width=8, masked=0.6, scores_committed=False, step=0, scale=3.0, logits=None, tokens=None):
    """A block with random logits, some positions masked (token 0), some committed."""
    generator = torch.Generator().manual_seed(seed)
    is_masked = torch.rand(rows, width, generator=generator) < masked
    is_masked[:, 0] |= ~is_masked.any(dim=1)
    if logits is None:
        logits = scale * torch.randn(rows, width, VOCABULARY, generator=generator)
    logits = logits.clone()
    logits[..., 0] = -torch.inf
    if tokens is None:
        tokens = torch.randint(1, VOCABULARY, (rows, width), generator=generator)
    return view_of(logits, torch.where(is_masked, 0, tokens), scores_committed, step), logits


def view_of(logits, tokens, scores_committed=False, step=0):
    """The view of blocks `tokens` [R, K] with their logits [R, K, V]."""
    masked, rows = tokens == 0, len(tokens)
    scored = torch.ones_like(masked) if scores_committed else masked
    return P.BlockView(
        scored_logits=logits[scored],
        scored=scored.flatten().nonzero().squeeze(1),
        tokens=tokens,
        masked=masked,
        changeable=torch.ones_like(masked),
        step=torch.full((rows,), step),
        progress=torch.zeros(rows),
        key=torch.arange(rows) * 1000 + step,
    )


def state_of(policy, rows=3, width=8):
    return {name: value.repeat(rows, *[1] * value.dim()) for name, value in policy.initial_state(width).items()}


def confidences(logits):
    return logits[..., 1:].softmax(-1).max(-1).values  # token 0 is the mask


seeds = pytest.mark.parametrize("seed", range(3))


@seeds
def test_view_spreads_what_it_computes_at_scored_positions(seed):
    view, logits = make_view(seed)
    probabilities = logits.softmax(-1)
    top = probabilities.topk(2, -1).values
    entropy = -(probabilities * probabilities.clamp_min(1e-30).log()).sum(-1)
    for ours, expected in (
        (view.confidence, top[..., 0]),
        (view.predicted, logits.argmax(-1)),
        (view.entropy, entropy),
        (view.probability_margin, top[..., 0] - top[..., 1]),
        (view.logit_margin, logits.topk(2, -1).values.diff(dim=-1).neg().squeeze(-1)),
    ):
        torch.testing.assert_close(ours, torch.where(view.masked, expected, 0), atol=1e-5, rtol=1e-4)


@seeds
def test_factor_commits_the_longest_run(seed):
    view, logits = make_view(seed, scale=6)
    commit = P.ConfidenceFactor(1.5).decide(view, {}).commit
    for row in range(3):
        positions = [j for j in range(8) if view.masked[row, j]]
        positions.sort(key=lambda j: -float(confidences(logits)[row, j]))
        count = 0
        while count < len(positions):
            if float(confidences(logits)[row, positions[count]]) < 1 - 1.5 / (count + 2):
                break
            count += 1
        assert set(positions[: max(1, count)]) == set(commit[row].nonzero().flatten().tolist())


@seeds
@pytest.mark.parametrize("score", ["confidence", "margin", "entropy", "random"])
def test_fixed_steps_commits_the_best_due(seed, score):
    view, _ = make_view(seed, step=1, masked=1.0)
    commit = P.FixedSteps(3, score).decide(view, {}).commit
    assert commit.sum(dim=1).tolist() == [3, 3, 3]  # 8 positions in 3 steps: 3, 3, 2
    if score == "entropy":
        assert (view.entropy[commit].max() <= view.entropy[~commit].max()) and commit[0, view.entropy[0].argmin()]
    if score == "margin":
        assert commit[0, view.probability_margin[0].argmax()]


def test_random_order_differs_between_requests_and_steps():
    first, _ = make_view(0, masked=1.0)
    second, _ = make_view(0, masked=1.0, step=1)
    policy = P.FixedSteps(8, "random")
    a, b = policy.decide(first, {}).commit, policy.decide(second, {}).commit
    assert not torch.equal(a, b) and not (a[0] == a).all()


@given(st.integers(1, 20), st.integers(1, 25))
@settings(max_examples=15, deadline=None)
def test_the_schedule_adds_up(width, steps):
    """The first steps take one more than the others; masking again follows the same schedule."""
    logits = 3 * torch.randn(1, width, VOCABULARY, generator=torch.Generator().manual_seed(width))
    for policy in (P.FixedSteps(steps), P.RunningConfidenceRemasking(steps)):
        history, _ = play(policy, lambda step: logits, width)
        left = [sum(masked) for masked in history] + [0]
        due = [before - after for before, after in zip(left, left[1:], strict=False)]
        assert due == [len(range(step, width, steps)) for step in range(min(steps, width))]


@seeds
def test_sequential_takes_the_leftmost(seed):
    view, _ = make_view(seed)
    commit = P.Sequential(2).decide(view, {}).commit
    for row in range(3):
        assert commit[row].nonzero().flatten().tolist() == view.masked[row].nonzero().flatten().tolist()[:2]


def test_first_hitting_takes_one_masked_position_each_equally_often():
    counts = torch.zeros(8)
    for step in range(200):
        view, _ = make_view(0, masked=1.0, step=step)
        commit = P.FirstHitting().decide(view, {}).commit
        assert commit.sum(dim=1).tolist() == [1, 1, 1]
        counts += commit.sum(dim=0)
    assert counts.min() > 45 and counts.max() < 105  # 75 on average, standard deviation 8


def play(policy, logits_of_step, width=8, steps=40):
    """Runs a policy on one row until its block is closed; returns the masked positions before each step."""
    state = state_of(policy, 1, width)
    tokens = torch.zeros(1, width, dtype=torch.long)
    history = []
    for step in range(steps):
        masked = tokens == 0
        history.append(masked[0].tolist())
        logits = logits_of_step(step).clone()
        logits[..., 0] = -torch.inf
        decision = policy.decide(view_of(logits, tokens, policy.scores_committed, step), state)
        commit = decision.commit & masked
        if decision.finish_block is not None and decision.finish_block[0]:
            commit = masked
        predicted = logits.argmax(-1)
        tokens = torch.where(commit, predicted, tokens)
        if decision.edit is not None:
            tokens = torch.where(decision.edit & ~masked, predicted, tokens)
        if decision.remask is not None:
            tokens = torch.where(decision.remask & ~commit, 0, tokens)
        if not (tokens == 0).any() and (decision.keep_open is None or not decision.keep_open[0]):
            break
    return history, tokens[0].tolist()


def random_logits(seed):
    return lambda step: 3 * torch.randn(1, 8, VOCABULARY, generator=torch.Generator().manual_seed(100 * seed + step))


@seeds
def test_rcr_keeps_the_most_confident_and_follows_the_schedule(seed):
    policy, logits = P.RunningConfidenceRemasking(3), random_logits(seed)
    history, _ = play(policy, logits)
    assert [sum(masked) for masked in history] == [8, 5, 2]
    recorded = confidences(logits(0))[0]  # worked by hand: after step 0 the best 3 of 8 stay
    expected = set(recorded.argsort(descending=True)[:3].tolist())
    assert {j for j in range(8) if not history[1][j]} == expected
    recorded = torch.where(torch.tensor(history[1]), confidences(logits(1))[0], recorded)
    assert {j for j in range(8) if not history[2][j]} == set(recorded.argsort(descending=True)[:6].tolist())


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(
    ("policy", "slow"),
    [
        (P.EntropyThreshold(0.3), lambda: SlowEntropyThreshold(0.3)),
        (P.EntropyBounded(0.6), lambda: SlowEntropyBounded(0.6)),
        (P.CoherentCandidates(1, 3), lambda: SlowCoherentCandidates(1, 3)),
        (P.CoherentCandidates(2, 2), lambda: SlowCoherentCandidates(2, 2)),
        (P.Saber(2), lambda: SlowSaber(2)),
        (P.Saber(5), lambda: SlowSaber(5)),
        (P.Prophet(), lambda: SlowEarlyExit(lambda t: 7.5 if t < 0.33 else 5.0 if t < 0.67 else 2.5)),
        (P.SchED(), lambda: SlowEarlyExit(lambda t: 2.5 + 5 * (1 + math.cos(math.pi * t)) / 2, calm=True)),
        (P.SchED(shape="linear"), lambda: SlowEarlyExit(lambda t: 7.5 - 5 * t, calm=True)),
        (
            P.SchED(low=0.0, shape="exponential", rate=2.0),
            lambda: SlowEarlyExit(lambda t: 7.5 * math.exp(-2 * t), calm=True),
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, P.UnmaskingPolicy) else "",
)
def test_several_rows_against_one_slow_version_each(policy, slow, seed):
    """Logits that change a little from step to step, until all rows are full; once in a block of 40 positions."""
    rows, width = 4, 40 if seed == 2 else 12
    generator = torch.Generator().manual_seed(seed)
    lasting = 4 * torch.randn(rows, width, VOCABULARY, generator=generator)
    state, slows = state_of(policy, rows, width), [slow() for _ in range(rows)]
    tokens = torch.zeros(rows, width, dtype=torch.long)
    for step in range(100):
        logits = lasting + torch.randn(rows, width, VOCABULARY, generator=generator)
        logits[..., 0] = -torch.inf
        view = view_of(logits, tokens, policy.scores_committed, step)
        after, _, _ = choose_commits(view, policy.decide(view, state), 0, (VOCABULARY,), False)
        for row in range(rows):
            block = tokens[row].tolist()
            if 0 in block:
                slows[row].step(block, logits[row])
            assert after[row].tolist() == block
        tokens = after
        if not (tokens == 0).any():
            return
    raise AssertionError("some row is never full")


def test_the_paper_s_example_of_an_entropy_bound():
    """Four positions of 0.2 nats, gamma 0.35: two of them, whose sum without the largest is 0.2, and not three."""
    view, _ = make_view(masked=1.0, rows=1, width=4)
    view.__dict__["entropy"] = torch.full((1, 4), 0.2)
    assert P.EntropyBounded(0.35).decide(view, {}).commit.tolist() == [[True, True, False, False]]


@seeds
@pytest.mark.parametrize(
    ("policy", "score"),
    [
        (P.ConfidenceThreshold(1.0), lambda p: p.max()),
        (P.EntropyThreshold(0.0), lambda p: (p * p.clamp_min(1e-30).log()).sum()),
        (P.EntropyBounded(0.0), lambda p: (p * p.clamp_min(1e-30).log()).sum()),
        (P.CoherentCandidates(1), lambda p: (p * p.clamp_min(1e-30).log()).sum()),
        (P.FixedSteps(8, "margin"), lambda p: p.topk(2).values.diff().neg()),
        (P.Prophet(P.FixedSteps(8, "entropy"), 99, 99, 99), lambda p: (p * p.clamp_min(1e-30).log()).sum()),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, P.UnmaskingPolicy) else "",
)
def test_a_row_gets_a_commit_by_the_policy_s_own_score(policy, score, seed):
    """Also where the best position is a terminator (token 1) that must wait: then left of the first predicted one."""
    view, logits = make_view(seed, rows=6)
    _, left, _ = choose_commits(view, policy.decide(view, state_of(policy, 6)), 0, (1,), terminator_last=True)
    for row in range(6):
        masks = view.masked[row].nonzero().flatten().tolist()
        scores = {j: float(score(logits[row, j].softmax(-1))) for j in masks}
        ends = [j for j in masks if int(logits[row, j].argmax()) == 1]
        decided = not isinstance(policy, P.ConfidenceThreshold | P.EntropyThreshold)  # these two decide nothing here
        best = max(masks, key=scores.get)
        if not (decided and (best not in ends or best == masks[0])):
            best = max((j for j in masks if j == masks[0] or not ends or j < ends[0]), key=scores.get)
        assert (view.masked[row] & ~left[row]).nonzero().flatten().tolist() == [best]


def test_joint_threshold_edits_until_calm_and_not_for_ever():
    def changing(until):
        def logits(step):
            values = torch.full((1, 8, VOCABULARY), 0.0)
            values[..., 3 if step >= until else 1 + step % 2] = 9.0
            return values

        return logits

    history, tokens = play(P.JointThreshold(), changing(3))
    assert tokens == [3] * 8 and len(history) == 5  # filled at 0, edited at 1, 2, 3; calm at 4
    history, _ = play(P.JointThreshold(max_edit_steps=4), changing(99))
    assert len(history) == 5


def test_joint_threshold_keeps_what_it_is_not_sure_to_replace():
    values = torch.zeros(1, 8, VOCABULARY)
    values[..., 2] = 1.0  # predicted everywhere, with a confidence below both thresholds
    view, _ = make_view(1, rows=1, scores_committed=True, logits=values, tokens=torch.full((1, 8), 4))
    decision = P.JointThreshold().decide(view, state_of(P.JointThreshold(), 1))
    assert not decision.commit.any() and not decision.edit.any()


@seeds
def test_a_decaying_threshold_falls_with_each_rows_own_step(seed):
    view, logits = make_view(seed)
    view.step = torch.tensor([0, 1, 3])
    commit = P.ConfidenceThreshold(0.9, decay=0.5).decide(view, {}).commit
    for row, bar in enumerate((0.9, 0.45, 0.1125)):
        expected = [bool(view.masked[row, at]) and float(confidences(logits)[row, at]) > bar for at in range(8)]
        assert commit[row].tolist() == expected


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: P.ConfidenceThreshold(1.5), "ConfidenceThreshold.threshold"),
        (lambda: P.ConfidenceThreshold(0.9, decay=1.1), "ConfidenceThreshold.decay"),
        (lambda: P.ConfidenceFactor(0), "ConfidenceFactor.factor"),
        (lambda: P.EntropyThreshold(-1), "EntropyThreshold.threshold"),
        (lambda: P.EntropyBounded(-1), "EntropyBounded.gamma"),
        (lambda: P.FixedSteps(0), "FixedSteps.steps"),
        (lambda: P.Sequential(0), "Sequential.count"),
        (lambda: P.RunningConfidenceRemasking(0), "RunningConfidenceRemasking.steps"),
        (lambda: P.Saber(0), "Saber.count"),
        (lambda: P.CoherentCandidates(0), "CoherentCandidates"),
        (lambda: P.JointThreshold(2.0), "JointThreshold"),
        (lambda: P.SchED(low=8.0), "SchED"),
        (lambda: P.SchED(low=-1.0), "SchED"),
        (lambda: P.SchED(shape="exponential", rate=0.0), "SchED"),
    ],
)
def test_settings_out_of_range_are_named(make, named):
    with pytest.raises(UserError, match=named):
        make()


@pytest.mark.parametrize(
    ("decided", "says"),
    [
        (lambda view: view.masked, "must return a Decision, got Tensor: change its method decide"),
        (lambda view: P.Decision(view.masked[:, 0]), r"Decision.commit must be \[., 4\] of torch.bool, got \[.\]"),
        (lambda view: P.Decision(view.confidence), r"Decision.commit must be .* got \[., 4\] of torch.float32"),
        (lambda view: P.Decision(view.masked, view.tokens[:, 1:]), r"Decision.tokens must be .* got \[., 3\]"),
        (
            lambda view: P.Decision(view.masked, finish_row=view.masked),
            r"Decision.finish_row must be \[.\] of",
        ),
    ],
)
@pytest.mark.parametrize("sampler", [BlockDiffusionSampler, FixedLengthSampler, FreeDaveSampler, MultiBlockSampler])
def test_a_decision_of_another_shape_is_told_in_one_line(decided, says, sampler):
    class Own(P.UnmaskingPolicy):
        def decide(self, view, state):
            return decided(view)

    limits = dict(canvas_length=8) if sampler is FixedLengthSampler else dict(max_new_tokens=8)
    with pytest.raises(UserError, match=f"the policy Own:? {says}"):
        sampler(Own(), block_length=4, **limits).generate(random_model(), [[5, 6], [7]])
