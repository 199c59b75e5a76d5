"""Multi-block diffusion against slow readings of one state at a time, and against what its sampler computes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_block_denoising import BLOCK, END, MASK, PAD, ROWS, SPECIAL, VOCABULARY, by_mask, make_batch, model, walk
from torch.nn import functional as F

from dllm_var.errors import UserError
from dllm_var.objectives import KeyedNoise, MultiBlockDiffusion
from dllm_var.objectives.block_diffusion import EvenBlockMasking, find_blocks
from dllm_var.sampling import MultiBlockSampler
from dllm_var.sampling.policies import UnmaskingPolicy
from dllm_var.sampling.policies.base import Decision

LENGTH = 34  # of a row
CASES = [(causal, weight, shift) for causal, weight in ((False, 0), (True, 0), (True, 0.5)) for shift in (False, True)]


def bound(blocks=3, block_length=BLOCK, **settings):
    return MultiBlockDiffusion(block_length, blocks, **settings).bind(SPECIAL)


def groups_of(objective, batch, noise):
    """Returns the sizes of the groups of every answer, as {(row, column of the answer's start): [size, ...]}."""
    blocks = find_blocks(batch, objective.block_length)
    group = objective.groups(batch, blocks, noise)
    sizes, supervised = {}, batch["supervised"]
    for i in range(len(supervised)):
        for j in range(supervised.size(1)):
            new = j == 0 or not supervised[i, j - 1] or batch["segment_ids"][i, j - 1] != batch["segment_ids"][i, j]
            if supervised[i, j] and new:
                answer = sizes.setdefault((i, j), [])
                seen = set()
            if supervised[i, j] and int(blocks.number[i, j]) not in seen:
                seen.add(int(blocks.number[i, j]))
                if group[i, j] == blocks.number[i, j]:
                    answer.append(0)
                answer[-1] += 1
    return sizes


@pytest.mark.parametrize(("causal", "weight", "shift"), CASES)
def test_packed_rows_give_the_logits_loss_and_gradients_of_one_group_at_a_time(causal, weight, shift):
    """A block's state is read as decoding meets it: clean text, the unfinished blocks left of it, and the block."""
    batch, transformer, noise = make_batch(), model(), KeyedNoise(4)
    objective = bound(causal_context=causal, autoregressive_weight=weight, token_shift=shift)
    noised = objective.corrupt(batch, noise)
    hidden = transformer.hidden_states(noised.input_ids, noised.position_ids, attention_rule=noised.attention_rule)
    logits = transformer.lm_head(hidden)
    scores = objective.score(transformer.lm_head, hidden[noised.loss_mask], noised)
    ours = scores.loss_sum / noised.normaliser
    ours.backward()
    gradients = [parameter.grad.clone() for parameter in transformer.parameters()]
    transformer.zero_grad()

    found = find_blocks(batch, BLOCK)
    index = {(i, int(found.start[i, n])): n for i, n in found.inside[..., 0].nonzero().tolist()}
    group = objective.groups(batch, found, noise)
    rates = objective.rates(batch, found._replace(group=group), noise)
    transformer.rotary(torch.zeros(1, 1, dtype=torch.long), 64)  # short rows have positions beyond their length
    sizes, total, normaliser = set(), torch.zeros(()), 0.0
    for i, _, sample in walk(batch):
        begin = sample[0][1][0]
        for number, (supervised, columns) in enumerate(sample):
            if not supervised:
                continue
            lead = number - int(found.number[i, columns[0]] - group[i, columns[0]])
            sizes.add(number - lead)
            text = [
                (int(batch["input_ids"][i, j]), j - begin, n) for n, (_, js) in enumerate(sample[:lead]) for j in js
            ]
            places = []
            for n in range(lead, number + 1):
                at = LENGTH + index[i, sample[n][1][0]] * BLOCK
                places = list(range(at, at + BLOCK))
                tokens = noised.input_ids[i, places].tolist()
                text += [(token, sample[n][1][0] - begin + k, n) for k, token in enumerate(tokens)]
            tokens, positions, block = (torch.tensor(values) for values in zip(*text, strict=True))
            seen = block[:, None] >= block[None, :]
            if causal:
                seen &= (block[:, None] >= lead) | torch.ones_like(seen).tril()
            alone = transformer.lm_head(
                transformer.hidden_states(tokens[None], positions[None], attention_rule=by_mask(seen))
            )[0]
            torch.testing.assert_close(logits[i, places], alone[-BLOCK:], atol=1e-4, rtol=0)
            rate = float(rates[i, index[i, columns[0]]])
            for k, j in enumerate(columns):
                target, place = batch["input_ids"][i, j], len(text) - BLOCK + k - shift
                at_text = shift and k == 0 and number == lead  # predicted at clean text, whatever is masked
                if place >= 0 and (at_text or int(tokens[place + shift]) == MASK):
                    probability = 1.0 if target == END or at_text else rate
                    total = total + F.cross_entropy(alone[place], target) / probability
                    normaliser += 1 / probability
        for j in range(begin + 1, columns[-1] + 1) if weight else ():  # as an autoregressive model reads it
            at_text = shift and group[i, j] != group[i, j - 1]  # counted above
            if batch["supervised"][i, j] and not at_text:
                nll = F.cross_entropy(
                    transformer.lm_head(left_to_right(transformer, batch, i, begin, j))[0, -1], batch["input_ids"][i, j]
                )
                total, normaliser = total + weight * nll, normaliser + 1
    assert {0, 1} <= sizes
    torch.testing.assert_close(ours, total / normaliser, atol=1e-4, rtol=1e-4)
    (total / normaliser).backward()
    for gradient, parameter in zip(gradients, transformer.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-4, rtol=1e-3)


def left_to_right(transformer, batch, i, begin, end):
    tokens = batch["input_ids"][i, begin:end]
    mask = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
    return transformer.hidden_states(tokens[None], torch.arange(len(tokens))[None], attention_rule=by_mask(mask))


class Dictation(UnmaskingPolicy):
    """Commits a given answer, in each forward some positions of each open block; keeps what it is shown."""

    def __init__(self, answer):
        self.answer, self.leading, self.seen = answer, 0, []

    def decide(self, view, state):
        open_blocks = view.changeable.any(dim=1).nonzero().flatten().tolist()
        self.seen.append((self.leading, view.masked[open_blocks].clone(), view.spread(view.scored_logits)[open_blocks]))
        commit, tokens = torch.zeros_like(view.masked), torch.full_like(view.tokens, PAD)
        for n in open_blocks:
            answer = self.answer[(self.leading + n) * BLOCK :][:BLOCK]
            tokens[n, : len(answer)] = torch.tensor(answer)
            left = view.masked[n].nonzero().flatten()
            commit[n, left[len(self.seen) % len(left) :][:2] if len(left) else left] = True
            commit[n, len(answer) :] = False
        done = [not (view.masked[n] & ~commit[n]).any() for n in open_blocks]
        self.leading += [*done, False].index(False)
        return Decision(commit=commit, tokens=tokens)


@pytest.mark.parametrize(("causal", "shift"), [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("kv_commit", ["joint_next", "alone"])
def test_the_sampler_computes_the_trained_conditionals(causal, shift, kv_commit):
    """Its logits, step by step, are those of a training row whose group is the open blocks."""
    transformer, prompt, answers = model(), 5, 4 * BLOCK + 2
    batch = make_batch([[[(False, prompt), (True, answers)]]], prompt + answers + 3)
    length, answer = batch["input_ids"].size(1), batch["input_ids"][0, prompt : prompt + answers].tolist()
    transformer.config.causal_context, transformer.config.token_shift = causal, shift
    objective = bound(causal_context=causal, token_shift=shift)
    policy = Dictation(answer)
    ahead = dict(open_at=0.0, settled_at=0.0, sees_ahead=False)
    sampler = MultiBlockSampler(
        policy, blocks=3, block_length=BLOCK, max_new_tokens=40, kv_commit=kv_commit, terminator_last=False, **ahead
    )
    written = sampler.generate(transformer, [batch["input_ids"][0, :prompt].tolist()])[0]
    assert written.tokens == answer[:-1] and written.finish_reason == "eos"
    assert max(len(masked) for _, masked, _ in policy.seen) == 3

    blocks, words, compared = find_blocks(batch, BLOCK), torch.arange(VOCABULARY) != MASK, 0
    for leading, masked, logits in policy.seen:
        window = torch.arange(leading, leading + len(masked))
        state = blocks.answer.clone()
        state[0, window] &= masked
        begin = int(blocks.start[0, leading])
        inside = (torch.arange(length) >= begin) & (torch.arange(length) < begin + len(masked) * BLOCK)
        group = torch.where(inside, blocks.number[0, begin], blocks.number)
        noised = objective.lay_out(
            batch, blocks._replace(group=group), state[:, None], torch.ones(state[:, None].shape)
        )
        with torch.no_grad():
            hidden = transformer.hidden_states(
                noised.input_ids, noised.position_ids, attention_rule=noised.attention_rule, shift=False
            )
            trained = transformer.lm_head(hidden)[0]
        places = length + torch.arange(leading * BLOCK, (leading + len(masked)) * BLOCK)
        if shift:  # each token at the position left of it
            places = torch.cat((torch.tensor([begin - 1]), places[:-1]))
        expected = trained[places].view(len(masked), BLOCK, VOCABULARY)
        torch.testing.assert_close(logits[masked][:, words], expected[masked][:, words], atol=1e-4, rtol=0)
        compared += int(masked.sum())
    assert compared > 30


ANSWERS = st.lists(st.lists(st.integers(1, 23), min_size=1, max_size=3), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(
    answers=ANSWERS,
    blocks=st.integers(2, 5),
    width=st.integers(1, 5),
    whole=st.sampled_from([0.0, 0.4]),
    seed=st.integers(0, 99),
)
def test_groups_rates_and_counts(answers, blocks, width, whole, seed):
    """Whatever the answers: groups of 2 to K blocks, rates that rise in a group, and counts that are exact."""
    batch = make_batch([[[(False, n % 3), (True, n)] for n in row] for row in answers], 80, seed)
    objective, noise = bound(blocks, width, t_min=0.1, t_max=0.8, whole_share=whole), KeyedNoise(seed)
    for (i, j), sizes in groups_of(objective, batch, noise).items():
        if blocks > 2 and sum(sizes) > 1:
            assert all(2 <= size <= blocks for size in sizes), (i, j, sizes)
        else:
            assert all(size == blocks for size in sizes[1:-1]) and max(sizes) <= blocks
    found = find_blocks(batch, width)
    found = found._replace(group=objective.groups(batch, found, noise))
    rate = objective.rates(batch, found, noise)
    noised = objective.corrupt(batch, noise)
    ends = objective.terminators(batch, found)
    shape, length = found.column.shape, batch["input_ids"].size(1)
    masked, weights = (values[:, length:].view(shape) for values in (noised.loss_mask, noised.weights))
    number, group = (values.gather(1, found.start) for values in (found.number, found.group))
    for i, n in found.inside[..., 0].nonzero().tolist():
        own = float(rate[i, n])
        assert 0.1 <= own <= 0.8 - 0.007 + 1e-6 or (whole and own == 1)
        if group[i, n] < number[i, n]:
            assert own >= float(rate[i, n - 1])
        free = found.answer[i, n] & ~ends[i, n]
        assert int(masked[i, n][free].sum()) == int(rate[i, n] * int(free.sum()))
        assert masked[i, n][ends[i, n]].all() and (weights[i, n][ends[i, n]] == 1).all()
        torch.testing.assert_close(weights[i, n][free], (1 / rate[i, n]).expand(int(free.sum())))
    torch.testing.assert_close(noised.normaliser, weights[masked].sum())


def test_sizes_are_drawn_evenly_and_every_block_may_lead():
    batch = make_batch([[[(False, 2), (True, 100)]]] * 300, 102)
    sizes = torch.tensor([size for row in groups_of(bound(4), batch, KeyedNoise(0)).values() for size in row[:-2]])
    shares = torch.bincount(sizes, minlength=5)[2:] / len(sizes)
    torch.testing.assert_close(shares, torch.full((3,), 1 / 3), atol=0.04, rtol=0)
    found = find_blocks(batch, BLOCK)
    for blocks in (2, 3):
        leads = bound(blocks).groups(batch, found, KeyedNoise(0)) == found.number
        assert leads.gather(1, found.start)[:, blocks - 1 : -1].float().mean(dim=0).min() > 0.2


def test_rates_are_a_chain_of_uniform_draws_and_positions_are_even():
    """With rates in (0, 1], 1 less the rate of a group's i-th block is a product of i + 1 uniform numbers."""
    batch = make_batch([[[(False, 2), (True, 16 * BLOCK)]]] * 300, 2 + 16 * BLOCK)
    batch["input_ids"][batch["input_ids"] == END] = 3  # it would always be masked
    objective, found = bound(4), find_blocks(batch, BLOCK)
    found = found._replace(group=objective.groups(batch, found, KeyedNoise(0)))
    rate = objective.rates(batch, found, KeyedNoise(0))
    place = (found.number - found.group).gather(1, found.start)
    for at in range(3):
        left = 1 - (rate[place == at] - 0.001) / (0.99 * 0.999)
        assert float(left.mean()) == pytest.approx(0.5 ** (at + 2), rel=0.1)
        assert float(left.square().mean()) == pytest.approx(3.0 ** -(at + 2), rel=0.2)
    masked = objective.corrupt(batch, KeyedNoise(0)).loss_mask[:, 2 + 16 * BLOCK :].reshape(-1, BLOCK)
    share = masked.float().mean(dim=0)
    assert (share - share.mean()).abs().max() < 0.03


def test_the_noise_of_a_row_does_not_depend_on_its_batch_and_the_seed_matters():
    objective, together = bound(whole_share=0.2), make_batch()
    noised = objective.corrupt(together, KeyedNoise(5))
    for i in range(len(ROWS)):
        single = {name: values[i : i + 1] for name, values in together.items()}
        alone = objective.corrupt(single, KeyedNoise(5))
        width = alone.input_ids.size(1)
        for name in ("input_ids", "loss_mask", "mask_rate"):
            assert torch.equal(getattr(alone, name)[0], getattr(noised, name)[i, :width])
        assert not noised.loss_mask[i, width:].any()
        real = alone.position_ids[0] >= 0
        assert torch.equal(
            alone.attention_rule.mask[0, 0][real], noised.attention_rule.mask[i, 0, :width, :width][real]
        )
    again, other = objective.corrupt(together, KeyedNoise(5)), objective.corrupt(together, KeyedNoise(6))
    assert torch.equal(again.input_ids, noised.input_ids) and not torch.equal(other.input_ids, noised.input_ids)
    wide = objective.corrupt(make_batch(length=50), KeyedNoise(5))
    torch.testing.assert_close(wide.normaliser, noised.normaliser)


def test_its_likelihood_is_that_of_single_blocks():
    likelihood = bound(causal_context=True, token_shift=True).likelihood()
    assert type(likelihood) is EvenBlockMasking and (likelihood.block_length, likelihood.kv_commit) == (BLOCK, "alone")
    assert likelihood.causal_context and likelihood.token_shift


def test_a_batch_without_supervision_has_no_loss():
    noised = bound().corrupt(make_batch([[[(False, 9)]]], 12), KeyedNoise(0))
    assert not noised.loss_mask.any() and float(noised.normaliser) == 0


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"blocks": 1}, "blocks >= 2"),
        ({"block_length": 0}, "MultiBlockDiffusion needs 1 <= start_length <= block_length"),
        ({"t_min": 0.0}, "MultiBlockDiffusion: mask rates"),
        ({"whole_share": 1.0}, "whole_share"),
        ({"autoregressive_weight": 0.5}, "needs causal_context"),
    ],
)
def test_bad_settings_are_named(wrong, says):
    with pytest.raises(UserError, match=says):
        MultiBlockDiffusion(**wrong)
