"""Block diffusion on the grid of a text: against rows of BD3-LM, noisy beside clean, and plain block-causal rows."""

import pytest
import torch
from torch.nn import functional as F

from dllm_var.errors import UserError
from dllm_var.objectives import BlockDiffusion, KeyedNoise
from dllm_var.objectives.block_diffusion import find_blocks
from dllm_var.objectives.cross_entropy import head_loss
from tests.objectives.test_block_denoising import BLOCK, END, MASK, ROWS, SPECIAL, bound, by_mask, make_batch, model

LENGTH = 34


def block_causal(**changes):
    transformer = model()
    transformer.config.block_causal, transformer.config.block_length = True, BLOCK
    for name, value in changes.items():
        setattr(transformer.config, name, value)
    return transformer


def packed(transformer, objective, batch):
    noised = objective.corrupt(batch, KeyedNoise(3))
    hidden = transformer.hidden_states(
        noised.input_ids, noised.position_ids, attention_rule=noised.attention_rule, shift=False
    )
    return noised, hidden


def samples(batch):
    """Yields row and columns of every sample."""
    for i, segments in enumerate(batch["segment_ids"]):
        for segment in range(int(segments.max()) + 1):
            yield i, (segments == segment).nonzero().flatten().tolist()


def copies(noised, batch, of_each):
    """Yields (row, first supervised column, where the copy is) of every copy of every block."""
    blocks = find_blocks(batch, BLOCK, on_grid=True)
    rows, most = blocks.start.shape
    for i in range(rows):
        for n in range(most):
            for c in range(of_each if bool(blocks.inside[i, n, 0]) else 0):
                begin = LENGTH + (c * most + n) * BLOCK
                yield i, int(blocks.start[i, n]), slice(begin, begin + BLOCK)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("complementary", [False, True])
def test_a_copy_is_read_as_the_text_that_ends_with_its_block(shift, complementary):
    batch, transformer = make_batch(ROWS, LENGTH), block_causal(token_shift=shift)
    objective = bound(block_causal=True, token_shift=shift, complementary=complementary)
    noised, hidden = packed(transformer, objective, batch)
    loss, _ = head_loss(transformer.lm_head, hidden[noised.loss_mask], noised.targets[noised.loss_mask])
    loss.sum().backward()
    gradients = [parameter.grad.clone() for parameter in transformer.parameters()]
    transformer.zero_grad()

    logits, texts = transformer.lm_head(hidden), {i: [] for i in range(len(ROWS))}
    for i, columns in samples(batch):
        tokens = batch["input_ids"][i, columns]
        plain = transformer.lm_head(transformer.hidden_states(tokens[None], shift=False))[0]
        torch.testing.assert_close(logits[i, columns], plain, atol=1e-5, rtol=1e-5)
        texts[i].append(columns)
    total, scored, seen = torch.zeros(()), 0, 0
    for i, start, here in copies(noised, batch, 1 + complementary):
        columns = next(columns for columns in texts[i] if start in columns)
        begin = columns[0] + (start - columns[0]) // BLOCK * BLOCK
        read = torch.cat((batch["input_ids"][i, columns[0] : begin], noised.input_ids[i, here]))
        plain = transformer.lm_head(transformer.hidden_states(read[None], shift=False))[0]
        torch.testing.assert_close(logits[i, here], plain[-BLOCK:], atol=1e-5, rtol=1e-5)
        supervised = [begin + k for k in range(BLOCK) if start <= begin + k <= columns[-1]]
        supervised = [column for column in supervised if bool(batch["supervised"][i, start : column + 1].all())]
        for k, column in enumerate(range(begin, begin + BLOCK)):
            token = int(noised.input_ids[i, here][k])
            if column < start:
                assert token == int(batch["input_ids"][i, column])  # the end of what is before the answer is shown
            elif column not in supervised:
                assert token == MASK  # what is behind it is not
            elif token == MASK and not (shift and k == 0):
                target = batch["input_ids"][i, column]
                total, scored = total + F.cross_entropy(plain[len(plain) - BLOCK + k - shift], target), scored + 1
        seen += 1
        first_copy = here.start < LENGTH + find_blocks(batch, BLOCK, on_grid=True).start.size(1) * BLOCK
        if shift and begin == start and begin > columns[0] and first_copy:  # its first token, once for all copies
            clean = transformer.lm_head(
                transformer.hidden_states(batch["input_ids"][i, columns[0] : begin][None], shift=False)
            )
            total, scored = total + F.cross_entropy(clean[0, -1], batch["input_ids"][i, start]), scored + 1
    assert seen > 10 and scored == int(noised.normaliser) == int(noised.loss_mask.sum())
    total.backward()
    torch.testing.assert_close(loss.sum(), total, atol=1e-4, rtol=1e-4)
    for gradient, parameter in zip(gradients, transformer.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prompt", range(1, 9))
def test_logits_are_those_of_noisy_beside_clean(prompt):
    """BD3-LM, SDAR, LLaDA2: the whole text is copied, and masks hide tokens of the answer in the copy alone."""
    batch, transformer = make_batch([[[(False, prompt), (True, 9)]]], LENGTH), block_causal()
    noised, hidden = packed(transformer, bound(block_causal=True), batch)
    ours, length = transformer.lm_head(hidden)[0], prompt + 9
    tokens = batch["input_ids"][0, :length].tolist()
    noisy = tokens + [MASK] * (-length % BLOCK)
    for _, start, here in copies(noised, batch, 1):
        begin = start // BLOCK * BLOCK
        noisy[begin : begin + BLOCK] = noised.input_ids[0, here].tolist()
    both = [("noisy", k // BLOCK) for k in range(len(noisy))] + [("clean", k // BLOCK) for k in range(length)]
    sees = torch.tensor(
        [
            [
                (block == other and half == its) if its == "noisy" else other < block + (half == "clean")
                for its, other in both
            ]
            for half, block in both
        ]
    )
    positions = torch.tensor([[*range(len(noisy)), *range(length)]])
    read = transformer.hidden_states(torch.tensor([noisy + tokens]), positions, attention_rule=by_mask(sees))
    theirs = transformer.lm_head(read)[0]
    for _, start, here in copies(noised, batch, 1):
        begin = start // BLOCK * BLOCK
        torch.testing.assert_close(ours[here], theirs[begin : begin + BLOCK], atol=1e-5, rtol=1e-5)


def test_terminators_are_always_masked_and_scored():
    batch = make_batch(ROWS, LENGTH)
    noised = bound(block_causal=True, t_min=0.01, t_max=0.01).corrupt(batch, KeyedNoise(0))
    ends = int((batch["supervised"] & (batch["input_ids"] == END)).sum())
    assert int((noised.targets[noised.loss_mask] == END).sum()) == ends


def test_blocks_grow_on_the_grid():
    """While blocks grow, rows are read in blocks of their own length; the model keeps that of the end."""
    objective = BlockDiffusion(8, block_causal=True, start_length=2, growth_rows=100).bind(SPECIAL)
    batch, transformer = make_batch(ROWS, LENGTH), block_causal()
    _, hidden = packed(transformer, objective, batch)
    transformer.config.block_length = 2
    plain = transformer.hidden_states(batch["input_ids"], batch["position_ids"], batch["segment_ids"])
    torch.testing.assert_close(hidden[:, :LENGTH], plain, atol=1e-5, rtol=1e-5)
    assert objective.grid == 8


def test_the_likelihood_has_the_same_blocks():
    objective = bound(block_causal=True)
    assert objective.likelihood().grid == BLOCK
    noised = objective.likelihood().corrupt(make_batch(ROWS, LENGTH), KeyedNoise(0))
    plain = objective.corrupt(make_batch(ROWS, LENGTH), KeyedNoise(0))
    assert torch.equal(noised.attention_rule.mask, plain.attention_rule.mask)


def test_refuses_a_causal_context():
    with pytest.raises(UserError, match="block_causal or causal_context, not both"):
        BlockDiffusion(4, block_causal=True, causal_context=True)
