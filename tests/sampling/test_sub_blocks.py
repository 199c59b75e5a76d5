"""Sub-blocks with a cache of their block, against one row that is read with keys kept by hand."""

import pytest
import torch

from dllm_var.errors import UserError
from dllm_var.sampling import BlockDiffusionSampler, ConfidenceThreshold, SubBlockSampler
from tests.sampling.slow_reference import forward
from tests.sampling.tiny_models import ENDS, MASK, random_model, shapes_of

GRID, LIMIT = 6, 14
PROMPTS = [torch.randint(5, 19, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in range(1, 10)]


def model(seed=0, **changes):
    return random_model(seed, block_causal=True, block_length=GRID, **changes)


def decode(transformer, prompt, threshold, sub_block):
    """Returns the answer, its finish reason and the number of forwards."""
    row, steps, shift = list(prompt), 0, transformer.config.token_shift
    while len(row) < len(prompt) + LIMIT:
        begin = len(row)
        end = min(len(prompt) + LIMIT, *(begin // length * length + length for length in (sub_block, GRID)))
        if shift and begin % GRID == 0:
            end = begin + 1  # what the last token of the block before predicts
        row += [MASK] * (end - begin)
        padded = row + [MASK] * (-len(row) % GRID)
        places = range(len(padded))
        sees = [[key // GRID <= query // GRID for key in places] for query in places]
        first = max(begin // sub_block * sub_block, begin // GRID * GRID)  # of the sub-block
        others = [place for place in places if not first <= place < end]
        kept = None
        while MASK in row:
            steps += 1
            if kept is None or row[first] == MASK:
                whole, keys = forward(transformer, row + padded[len(row) :], places, [], sees)
                kept = [[(key[:, :, others], value[:, :, others]) for key, value in keys]]
                read = whole[0, first:end]
            else:
                read = forward(transformer, row[first:end], range(first, end), kept)[0][0]
            if shift:
                read = torch.cat((whole[0, max(first - 1, 0)][None], read[:-1]))
            hidden = read[begin - first :]
            logits = transformer.lm_head(hidden)
            logits[:, MASK] = -torch.inf
            confidence, predicted = logits.softmax(-1).max(-1)
            masked = [place for place in range(begin, end) if row[place] == MASK]
            sure = [place for place in masked if confidence[place - begin] > threshold]
            for place in sure or [max(masked, key=lambda place: (float(confidence[place - begin]), -place))]:
                row[place] = int(predicted[place - begin])
            for place in range(begin, end):
                if row[place] == MASK:
                    break
                if row[place] in ENDS:
                    return row[len(prompt) : place], "eos", steps
    return row[len(prompt) :], "length", steps


def sampler(kind=SubBlockSampler, sub_block=3, **settings):
    policy = ConfidenceThreshold(0.3)
    return kind(policy, block_length=sub_block, max_new_tokens=LIMIT, terminator_last=False, **settings)


@torch.no_grad()
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("sub_block", [3, 2, 4])  # of 4: the second one of a block is shorter
def test_decodes_as_a_row_whose_keys_are_kept_by_hand(sub_block, shift):
    transformer = model(token_shift=shift)
    expected = [decode(transformer, prompt, 0.3, sub_block) for prompt in PROMPTS]
    assert any(len(tokens) > GRID for tokens, _, _ in expected)
    alone = [sampler(sub_block=sub_block).generate(transformer, [prompt])[0] for prompt in PROMPTS]
    assert [(each.tokens, each.finish_reason, each.nfe) for each in alone] == expected
    for settings in (dict(batch_size=4), dict(kv_commit="alone")):
        together = sampler(sub_block=sub_block, **settings).generate(transformer, PROMPTS)
        assert [each.tokens for each in together] == [tokens for tokens, _, _ in expected]


def test_what_is_read_once_makes_a_difference():
    """Otherwise the test above would hold for a sampler that reads everything."""
    cached, whole = (sampler(kind).generate(model(), PROMPTS) for kind in (SubBlockSampler, BlockDiffusionSampler))
    assert [each.tokens for each in cached] != [each.tokens for each in whole]


def test_a_sub_block_as_long_as_the_block_is_the_block():
    prompts = [PROMPTS[5], PROMPTS[5][::-1], PROMPTS[5] * 2]  # whole blocks: nothing is beside the sub-block
    cached, whole = (
        sampler(kind, GRID).generate(model(), prompts) for kind in (SubBlockSampler, BlockDiffusionSampler)
    )
    assert [each.tokens for each in cached] == [each.tokens for each in whole]


def test_a_sub_block_is_read_alone_once_its_first_token_is_known():
    transformer = model()
    shapes = shapes_of(transformer)
    one_by_one = SubBlockSampler(ConfidenceThreshold(1.0), block_length=3, max_new_tokens=6)
    one_by_one.generate(transformer, [PROMPTS[5]], suppress=ENDS)  # of as many tokens as a block
    assert shapes[0] == (1, 12) and shapes.count((1, 3)) > 1
    [answer] = one_by_one.generate(transformer, [PROMPTS[5]], suppress=ENDS)
    known, expected = {0: answer.commit_steps[0], 3: answer.commit_steps[3]}, [(1, 12)]
    for step in range(2, 7):  # until a sub-block's first token is known, all of the block is read
        expected.append((1, 3) if known[3 * (step > 3)] < step else (1, 6))
    assert shapes[:6] == expected


def test_other_models_are_refused():
    with pytest.raises(UserError, match="SubBlockSampler needs a block-causal model"):
        sampler().generate(random_model(), PROMPTS[:1])
