"""Block-causal models: decoded as one plain row is, which every forward reads whole under a mask made by loops."""

import pytest
import torch

from dllm_var.errors import UserError
from dllm_var.evaluation.likelihood import Likelihood
from dllm_var.model import TransformerConfig
from dllm_var.sampling import (
    BlockDiffusionSampler,
    FixedLengthSampler,
    FreeDaveSampler,
    GuidedSampler,
    MultiBlockSampler,
    WinoSampler,
)
from dllm_var.sampling.block_diffusion import ConstantSteps
from dllm_var.sampling.infilling import infill
from dllm_var.sampling.policies import ConfidenceThreshold, FixedSteps, Sequential
from tests.sampling.slow_reference import forward
from tests.sampling.tiny_models import ENDS, MASK, random_model, save, shapes_of

GRID, LIMIT = 4, 11
PROMPTS = [torch.randint(5, 19, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in range(1, 10)]


def model(seed=0, grid=GRID, **changes):
    return random_model(seed, block_causal=True, block_length=grid, **changes)


def read(transformer, tokens):
    """Returns the logits [L, V] of a row, each place seeing its own block of the grid and those before."""
    grid = transformer.config.block_length
    sees = [[key // grid <= query // grid for key in range(len(tokens))] for query in range(len(tokens))]
    with torch.no_grad():
        hidden, _ = forward(transformer, tokens, range(len(tokens)), [], sees)
        logits = transformer.lm_head(hidden)[0].float()
    return torch.cat((logits[:1], logits[:-1])) if transformer.config.token_shift else logits


def decode(transformer, prompt, threshold, sub_block=GRID, limit=LIMIT, guide=None, banned=()):
    """Returns the answer, its finish reason and the number of forwards that predicted something.

    With a guide, what stands is the masks up to the first one where the guide expects another token than is proposed.
    """
    grid, row, steps = transformer.config.block_length, list(prompt), 0
    while len(row) < len(prompt) + limit:
        begin, end = len(row), len(prompt) + limit
        end = min(end, *(begin // length * length + length for length in (sub_block, grid)))
        if transformer.config.token_shift and begin % grid == 0:
            end = begin + 1  # what the last token of the block before predicts
        row += [MASK] * (end - begin)
        while MASK in row:
            steps += 1
            logits = read(transformer, row + [MASK] * (-len(row) % grid))
            logits[:, [MASK, *banned]] = -torch.inf
            confidence, predicted = logits.softmax(-1).max(-1)
            masked = [place for place in range(begin, end) if row[place] == MASK]
            sure = [place for place in masked if confidence[place] > threshold]
            if guide is not None:
                proposal = [int(predicted[place]) if place in masked else row[place] for place in range(end)]
                with torch.no_grad():
                    expected = guide(torch.tensor([proposal]))[0]
                expected[:, [MASK, *banned]] = -torch.inf
                others = [place for place in masked if int(expected[place - 1].argmax()) != proposal[place]]
                sure = [place for place in masked if place < min(others, default=end)] or masked[:1]
            for place in sure or [max(masked, key=lambda place: (float(confidence[place]), -place))]:
                row[place] = int(predicted[place])
            for place in range(begin, end):
                if row[place] == MASK:
                    break
                if row[place] in ENDS:
                    return row[len(prompt) : place], "eos", steps
    return row[len(prompt) :], "length", steps


def answers(sampler, transformer, prompts=PROMPTS):
    return [(each.tokens, each.finish_reason, each.nfe) for each in sampler.generate(transformer, prompts)]


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("sub_block", [4, 2, 3])  # one of 3 never reaches over the end of its block
@pytest.mark.parametrize("kv_commit", ["joint_next", "alone"])
def test_decodes_prompts_of_any_length_as_a_row_that_is_read_whole(kv_commit, sub_block, shift):
    transformer, settings = model(token_shift=shift), dict(block_length=sub_block, max_new_tokens=LIMIT)
    sampler = BlockDiffusionSampler(
        ConfidenceThreshold(0.3), terminator_last=False, kv_commit=kv_commit, batch_size=5, **settings
    )
    expected = [decode(transformer, prompt, 0.3, sub_block) for prompt in PROMPTS]
    assert len({reason for _, reason, _ in expected}) == 2
    together = answers(sampler, transformer)
    assert [found[:2] for found in together] == [one[:2] for one in expected]
    alone = [answers(sampler, transformer, [prompt])[0] for prompt in PROMPTS]
    assert [found[:2] for found in alone] == [one[:2] for one in expected]
    if kv_commit == "joint_next":  # what is finished is stored on the way: no forward of its own, not even the prompt's
        assert [found[2] for found in alone] == [one[2] for one in expected]


def test_a_terminator_in_the_prompt_does_not_end_the_answer():
    """Chat templates end a user's turn with the token that ends an answer."""
    transformer, prompt = model(), [7, 8, 9, 10, 11, ENDS[0]]
    sampler = BlockDiffusionSampler(ConfidenceThreshold(0.3), block_length=GRID, max_new_tokens=LIMIT)
    sampler.terminator_last = False
    assert answers(sampler, transformer, [prompt])[0][:2] == decode(transformer, prompt, 0.3)[:2]


@pytest.mark.parametrize(
    "other",
    [
        FreeDaveSampler(ConfidenceThreshold(0.3), drafts=3, block_length=GRID, max_new_tokens=LIMIT),
        FreeDaveSampler(ConfidenceThreshold(0.3), drafts=3, block_length=3, max_new_tokens=LIMIT),
        MultiBlockSampler(ConfidenceThreshold(0.3), blocks=1, block_length=GRID, max_new_tokens=LIMIT),
        BlockDiffusionSampler(ConfidenceThreshold(0.3), grid="absolute", block_length=GRID, max_new_tokens=LIMIT),
    ],
    ids=["freedave", "freedave in sub-blocks", "one block of several", "absolute"],
)
def test_samplers_that_decode_the_same_text_still_do(other):
    plain = BlockDiffusionSampler(ConfidenceThreshold(0.3), block_length=other.block_length, max_new_tokens=LIMIT)
    expected, found = answers(plain, model()), answers(other, model())
    assert [each[:2] for each in found] == [each[:2] for each in expected]
    if isinstance(other, FreeDaveSampler):
        assert sum(each[2] for each in found) < sum(each[2] for each in expected)


@pytest.mark.parametrize("sub_block", [4, 2])
def test_a_guide_decides_what_stands(sub_block, tmp_path):
    """It reads the text from left to right, and proposals behind what is finished of a block."""
    transformer, guide = model(4), random_model(14, causal=True, num_layers=1)
    few = [token for token in range(MASK) if token not in (3, 6, 7, 8)]  # leaves so few that the two often agree
    sampler = GuidedSampler(save(guide, tmp_path), block_length=sub_block, max_new_tokens=LIMIT, batch_size=4)
    expected = [decode(transformer, prompt, 1.0, sub_block, guide=guide, banned=few) for prompt in PROMPTS]
    found = sampler.generate(transformer, PROMPTS, suppress=few)
    assert [(each.tokens, each.finish_reason) for each in found] == [one[:2] for one in expected]
    assert any(steps < len(tokens) for tokens, _, steps in expected)


@pytest.mark.parametrize(
    "sampler",
    [
        MultiBlockSampler(ConfidenceThreshold(0.2), blocks=3, block_length=GRID, max_new_tokens=LIMIT),
        WinoSampler(threshold=0.2, shadow_threshold=0.3, block_length=GRID, max_new_tokens=LIMIT),
        BlockDiffusionSampler(
            ConfidenceThreshold(0.2), block_length=3, block_length_policy=ConstantSteps(2, 1), max_new_tokens=LIMIT
        ),
        BlockDiffusionSampler(FixedSteps(steps=2), block_length=2, temperature=1.0, max_new_tokens=LIMIT),
        FixedLengthSampler(canvas_length=12, block_length=4),
    ],
    ids=["several blocks", "wino", "adaptive", "drawn", "canvas"],
)
def test_rows_decode_together_as_alone(sampler):
    transformer = model(1)
    alone = [sampler.generate(transformer, [prompt])[0].tokens for prompt in PROMPTS]
    assert [each.tokens for each in sampler.generate(transformer, PROMPTS)] == alone
    assert len({tuple(tokens) for tokens in alone}) > 3


def test_several_open_blocks_do_not_see_ahead():
    """The leading block is predicted as if no other were open, so its most likely tokens stay the same."""
    settings = dict(block_length=GRID, max_new_tokens=LIMIT)
    plain = BlockDiffusionSampler(Sequential(), **settings)
    ahead = MultiBlockSampler(Sequential(), blocks=3, open_at=0.0, settled_at=1.0, ahead_threshold=1.0, **settings)
    assert answers(ahead, model(2)) == answers(plain, model(2))


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_no_block_of_several_opens_behind_the_limit(limit):
    """The limit may end at the grid, where the next block of a shifted model begins with one token of its own."""
    ahead = MultiBlockSampler(Sequential(), blocks=3, open_at=0.0, block_length=GRID, max_new_tokens=limit)
    found = ahead.generate(model(token_shift=True), PROMPTS, suppress=ENDS, record=True)
    assert {(answer.new_tokens, max(step.length for step in answer.steps)) for answer in found} == {(limit, limit)}


def test_reads_the_window_only():
    """A prompt of 10 tokens on a grid of 4: 8 with the first block, whose other 2 are read at each of its steps."""
    transformer = model()
    shapes = shapes_of(transformer)
    BlockDiffusionSampler(Sequential(), block_length=GRID, max_new_tokens=6).generate(
        transformer, [PROMPTS[0] * 10], suppress=ENDS
    )
    assert shapes == [(1, 12), (1, 4), (1, 8), *[(1, 4)] * 3]


def test_a_whole_row_and_a_cache_give_the_same_logits():
    transformer, tokens = model(), torch.tensor([PROMPTS[-1] * 2])
    cache = transformer.new_cache(1, 18)
    pieces = []
    for width in (8, 8, 2):
        cache.open(width)
        pieces.append(transformer(tokens[:, sum(piece.size(1) for piece in pieces) :][:, :width], cache=cache))
        cache.advance(torch.tensor([width]))
    torch.testing.assert_close(torch.cat(pieces, 1), transformer(tokens), rtol=0, atol=1e-5)
    torch.testing.assert_close(transformer(tokens)[0, :, :MASK], read(transformer, tokens[0].tolist())[:, :MASK])


def test_likelihood_is_the_bound_of_each_block_behind_those_before():
    transformer, row = model(), [7, 8, 9, 10, 11, 12]
    total = read(transformer, [7, 8, 9, MASK]).log_softmax(-1)[3, 10].double()
    for hidden, weight in (((4,), 0.5), ((5,), 0.5), ((4, 5), 0.5)):  # 1 / (hidden * choices of so many)
        shown = [MASK if place in hidden else token for place, token in enumerate(row)]
        found = read(transformer, shown).log_softmax(-1)
        total += weight * sum(found[place, row[place]] for place in hidden).double()
    (score,) = Likelihood(draws=8)(transformer, [(row[:3], row[3:])], decode=False)
    assert score.log_likelihood == pytest.approx(float(total), abs=1e-5)


def test_gaps_are_filled_from_what_their_block_sees():
    """Text behind a gap's block changes nothing, text in its block does."""
    transformer, text = model(3), [7, MASK, 9, 10, 11, 12, 13, 14]
    (filled,) = infill(transformer, [text])
    (later,) = infill(transformer, [[*text[:4], 5, 6, 7, 8]])
    assert filled.gaps == later.gaps
    fills = {tuple(infill(transformer, [[7, MASK, token, 10]])[0].gaps[0]) for token in range(5, 19)}
    assert len(fills) > 1


def test_refuses_blocks_longer_than_the_models():
    with pytest.raises(UserError, match=r"sampler.block_length 8 is longer than the blocks of 4 .* set it to 4"):
        BlockDiffusionSampler(block_length=8).generate(model(), PROMPTS[:1])


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (dict(block_causal=True), "block_causal needs block_length of at least 1, got None"),
        (dict(block_causal=True, block_length=0), "block_causal needs block_length of at least 1, got 0"),
        (dict(block_causal=True, block_length=4, causal=True), "does not go with causal"),
    ],
)
def test_the_grid_must_be_complete(settings, reason):
    with pytest.raises(UserError, match=reason):
        TransformerConfig(**settings).resolved()
