"""Block diffusion against slow readings of one block at a time, and against what its sampler computes."""

import pytest
import torch
from torch.nn import functional as F

from dllm_var import DiffusionLM
from dllm_var.errors import UserError
from dllm_var.model import Transformer, TransformerConfig
from dllm_var.model.attention import AttentionRule
from dllm_var.objectives import Autoregressive, BlockDiffusion, KeyedNoise
from dllm_var.objectives.block_diffusion import find_blocks
from dllm_var.objectives.cross_entropy import head_loss
from dllm_var.sampling import BlockDiffusionSampler
from dllm_var.sampling.policies import UnmaskingPolicy
from dllm_var.sampling.policies.base import Decision
from dllm_var.text.tokenizer import SpecialTokens

MASK, END, PAD, VOCABULARY = 0, 1, 2, 30
SPECIAL = SpecialTokens(mask_id=MASK, terminator_ids=(END,), pad_id=PAD)
BLOCK = 4
# Rows of samples, a sample being spans (supervised or not, length); a supervised span ends with a terminator.
ROWS = [
    [[(False, 3), (True, 6)], [(False, 5), (True, 4), (False, 2), (True, 9)]],  # the second has two turns
    [[(False, 7), (True, 1)], [(True, 5)], [(False, 2), (True, 8)]],  # the second is text without prompt
    [[(False, 20)], [(False, 4), (True, 3)]],
]
MODES = ["alone", "joint_next"]
CONTEXTS = [("alone", False), ("joint_next", False), ("joint_next", True)]  # kv_commit, causal_context


def model(seed=0):
    torch.manual_seed(seed)
    shape = TransformerConfig(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, vocab_size=VOCABULARY)
    shape.mask_id, shape.terminator_ids, shape.pad_id, shape.initializer_range = MASK, [END], PAD, 0.3
    return Transformer(shape).eval()


def make_batch(rows=ROWS, length=34, seed=0, first_row=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (len(rows), length)
    batch = {
        "input_ids": torch.full(shape, PAD),
        "supervised": torch.zeros(shape, dtype=torch.bool),
        "segment_ids": torch.full(shape, -1),
        "position_ids": torch.zeros(shape, dtype=torch.long),
        "row": torch.arange(first_row, first_row + len(rows)),
    }
    for i, samples in enumerate(rows):
        at = 0
        for segment, spans in enumerate(samples):
            begin = at
            for supervised, width in spans:
                here = slice(at, at + width)
                batch["input_ids"][i, here] = torch.randint(3, VOCABULARY, (width,), generator=generator)
                batch["supervised"][i, here] = supervised
                if supervised:
                    batch["input_ids"][i, at + width - 1] = END
                at += width
            batch["segment_ids"][i, begin:at] = segment
            batch["position_ids"][i, begin:at] = torch.arange(at - begin)
    return batch


def bound(**settings):
    return BlockDiffusion(BLOCK, **settings).bind(SPECIAL)


def by_mask(mask):
    """The rule that a mask [L, L] spells out."""
    return AttentionRule(lambda row, head, query, key: mask[query, key], mask[None, 0])


def walk(batch):
    """Yields row, segment and blocks (supervised, columns) of every sample, in order."""
    for i in range(len(batch["row"])):
        for segment in range(int(batch["segment_ids"][i].max()) + 1):
            blocks = []
            for j in (batch["segment_ids"][i] == segment).nonzero().flatten().tolist():
                supervised = bool(batch["supervised"][i, j])
                full = supervised and blocks and len(blocks[-1][1]) == BLOCK
                if not blocks or blocks[-1][0] != supervised or full:
                    blocks.append((supervised, []))
                blocks[-1][1].append(j)
            yield i, segment, blocks


def copies_of(noised, batch):
    """Returns {(row, first column of a block): slices of its copies} for a noised batch."""
    length, blocks = batch["input_ids"].size(1), find_blocks(batch, BLOCK)
    per_copy = blocks.start.size(1) * BLOCK
    copies = (noised.input_ids.size(1) - length) // per_copy if per_copy else 0
    return {
        (i, int(blocks.start[i, n])): [
            slice(length + c * per_copy + n * BLOCK, length + c * per_copy + (n + 1) * BLOCK) for c in range(copies)
        ]
        for i in range(blocks.start.size(0))
        for n in range(blocks.start.size(1))
        if blocks.inside[i, n, 0]
    }


def read_alone(transformer, batch, i, blocks, number, tokens, joint, causal):
    """Returns the logits of the clean token before block `number` of a sample (if there is any) and of the block.

    The block has the given tokens; all is read as one short row with a mask made by loops.
    Clean blocks before it are read as a cache holds them: each from itself and those before, and with `joint` from the
    masks of the next one, if that is supervised; or each of their tokens from its left, with `causal`.
    """
    begin = blocks[0][1][0]
    row, positions, role = [], [], []  # role: (block, "clean" / "masks" / "noisy")
    for b, (_, columns) in enumerate(blocks[:number]):
        row += [int(batch["input_ids"][i, j]) for j in columns]
        positions += [j - begin for j in columns]
        role += [(b, "clean")] * len(columns)
        if joint and blocks[b + 1][0]:
            row += [MASK] * BLOCK
            positions += [blocks[b + 1][1][0] - begin + k for k in range(BLOCK)]
            role += [(b + 1, "masks")] * BLOCK
    row += tokens
    positions += [blocks[number][1][0] - begin + k for k in range(BLOCK)]
    role += [(number, "noisy")] * BLOCK
    seen = torch.zeros(len(row), len(row), dtype=torch.bool)
    for q, (block, kind) in enumerate(role):
        for k, (other, its_kind) in enumerate(role):
            if its_kind == "clean":
                seen[q, k] = (k <= q if causal else other <= block) if kind == "clean" else other < block
            elif causal and its_kind == "masks":
                seen[q, k] = q == k  # nobody else sees them
            elif its_kind == "masks" and kind == "clean":
                seen[q, k] = other == block + 1
            else:
                seen[q, k] = (other, its_kind) == (block, kind)
    # Position ids may exceed a short row's length, which only sizes the rotary table.
    transformer.rotary(torch.zeros(1, 1, dtype=torch.long), 64)
    hidden = transformer.hidden_states(
        torch.tensor([row]), position_ids=torch.tensor([positions]), attention_rule=by_mask(seen)
    )
    before = max((place for place, (_, kind) in enumerate(role) if kind == "clean"), default=0)
    return transformer.lm_head(hidden)[0, [before, *range(len(row) - BLOCK, len(row))]]


@pytest.mark.parametrize(("mode", "causal"), CONTEXTS)
@pytest.mark.parametrize(("complementary", "shift"), [(False, False), (True, False), (True, True)])
def test_packed_rows_give_the_logits_and_gradients_of_one_block_at_a_time(mode, causal, complementary, shift):
    batch, transformer = make_batch(), model()
    settings = dict(kv_commit=mode, causal_context=causal, complementary=complementary, token_shift=shift)
    objective = bound(t_min=0.3, t_max=0.8, **settings)
    noised = objective.corrupt(batch, KeyedNoise(3))
    hidden = transformer.hidden_states(
        noised.input_ids, position_ids=noised.position_ids, attention_rule=noised.attention_rule
    )
    logits = transformer.lm_head(hidden)
    loss, _ = head_loss(transformer.lm_head, hidden[noised.loss_mask], noised.targets[noised.loss_mask])
    loss.sum().backward()
    ours = [parameter.grad.clone() for parameter in transformer.parameters()]
    transformer.zero_grad()

    where, slow_loss, compared, scored = copies_of(noised, batch), torch.zeros(()), 0, 0
    for i, _, blocks in walk(batch):
        for number, (supervised, columns) in enumerate(blocks):
            if not supervised:
                continue
            for here in where[i, columns[0]]:
                tokens = noised.input_ids[i, here].tolist()
                expected = read_alone(transformer, batch, i, blocks, number, tokens, mode == "joint_next", causal)
                torch.testing.assert_close(logits[i, here], expected[1:], atol=1e-4, rtol=0)
                if shift and number:
                    torch.testing.assert_close(logits[i, columns[0] - 1], expected[0], atol=1e-4, rtol=0)
                for k, column in enumerate(columns):
                    if tokens[k] == MASK and not (shift and k == 0):
                        target = batch["input_ids"][i, column]
                        slow_loss, scored = slow_loss + F.cross_entropy(expected[k + 1 - shift], target), scored + 1
                compared += 1
            if shift and number:  # the first token of a block, once for all copies
                slow_loss = slow_loss + F.cross_entropy(expected[0], batch["input_ids"][i, columns[0]])
                scored += 1
    assert compared == sum(map(len, where.values())) > 10 and scored == int(noised.normaliser)
    slow_loss.backward()
    for gradient, parameter in zip(ours, transformer.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-4, rtol=1e-4)


def test_the_autoregressive_loss_is_that_of_the_causal_twin():
    """With causal context, clean tokens are read and scored as by `Autoregressive`; masked ones are scored too."""
    batch, transformer = make_batch(), model()
    plain = bound(causal_context=True).corrupt(batch, KeyedNoise(3))
    objective = bound(causal_context=True, autoregressive_weight=0.5)
    noised = objective.corrupt(batch, KeyedNoise(3))
    assert torch.equal(noised.input_ids, plain.input_ids) and torch.equal(
        noised.attention_rule.mask, plain.attention_rule.mask
    )
    hidden = transformer.hidden_states(noised.input_ids, noised.position_ids, None, None, noised.attention_rule)
    loss, _ = head_loss(transformer.lm_head, hidden[noised.loss_mask], noised.targets[noised.loss_mask])
    masked, _ = head_loss(transformer.lm_head, hidden[plain.loss_mask], plain.targets[plain.loss_mask])

    twin = model()
    twin.config.causal = True
    causal = Autoregressive().bind(SPECIAL).corrupt(batch, KeyedNoise(0))
    logits = twin(causal.input_ids, batch["position_ids"], batch["segment_ids"])
    next_tokens = F.cross_entropy(logits[causal.loss_mask], causal.targets[causal.loss_mask], reduction="sum")
    torch.testing.assert_close((loss * noised.at_loss(noised.weights)).sum(), masked.sum() + 0.5 * next_tokens)
    assert int(noised.normaliser) == int(plain.loss_mask.sum() + causal.loss_mask.sum())


def test_whole_blocks_are_as_frequent_as_asked_for():
    batch = make_batch([[[(True, 33)]]] * 400, 33)
    noised = bound(kv_commit="alone", t_max=0.5, whole_share=0.3).corrupt(batch, KeyedNoise(0))
    rates = noised.mask_rate[:, 33:].view(400, -1, BLOCK)[:, :, 0]
    assert (rates == 1).float().mean() == pytest.approx(0.3, abs=0.03)
    assert rates[rates < 1].min() < 0.12 and 0.48 < rates[rates < 1].max() <= 0.5


class Dictation(UnmaskingPolicy):
    """Commits a given answer: in each block first the offsets `early`, then the rest; keeps the logits it is shown."""

    def __init__(self, answer, early):
        self.answer, self.early, self.block, self.seen = answer, early, -1, []

    def decide(self, view, state):
        first = int(view.step[0]) == 0
        self.block += first
        tokens = self.answer[self.block * BLOCK : (self.block + 1) * BLOCK]
        self.seen.append((self.block, first, view.spread(view.scored_logits)[0], view.masked[0].clone()))
        padded = torch.tensor([[*tokens, *[PAD] * (BLOCK - len(tokens))]])
        offsets = torch.arange(BLOCK)
        due = torch.isin(offsets, torch.tensor(self.early)) & (offsets < len(tokens) - 1) if first else None
        if due is None or not due.any():
            due = offsets < len(tokens)
        return Decision(commit=due[None] & view.masked, tokens=padded)


@pytest.mark.parametrize(("mode", "causal"), [(mode, causal) for mode in MODES for causal in (False, True)])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("answer_length", [5, 8])  # the last block is begun, or full
def test_the_sampler_computes_the_trained_conditionals(mode, causal, shift, answer_length):
    """Its logits, step by step, are those of the training row with the same tokens masked."""
    transformer, early = model(), [0, 2]
    prompt, row = 5, [[[(False, 5), (True, answer_length)]]]
    batch = make_batch(row, prompt + answer_length + 3)
    answer = batch["input_ids"][0, prompt : prompt + answer_length].tolist()
    transformer.config.causal_context, transformer.config.token_shift = causal, shift
    objective = bound(kv_commit=mode, causal_context=causal, token_shift=shift)
    blocks = find_blocks(batch, BLOCK)
    shown = torch.isin(torch.arange(BLOCK), torch.tensor(early)) & (blocks.column != prompt + answer_length - 1)
    masked = torch.stack([blocks.answer, blocks.answer & ~shown], dim=1)
    noised = objective.lay_out(batch, blocks, masked, torch.ones(masked.shape))
    with torch.no_grad():
        hidden = transformer.hidden_states(
            noised.input_ids, position_ids=noised.position_ids, attention_rule=noised.attention_rule, shift=False
        )
        logits = transformer.lm_head(hidden)[0]
    trained = logits[batch["input_ids"].size(1) :].view(2, -1, BLOCK, VOCABULARY)
    if shift:  # each token at the position left of it
        first = logits[blocks.start[0] - 1].expand(2, -1, -1)
        trained = torch.cat((first[:, :, None], trained[:, :, :-1]), dim=2)

    policy = Dictation(answer, early)
    sampler = BlockDiffusionSampler(
        policy, block_length=BLOCK, max_new_tokens=40, kv_commit=mode, terminator_last=False
    )
    written = sampler.generate(transformer, [batch["input_ids"][0, :prompt].tolist()])[0]
    assert written.tokens == answer[:-1] and written.finish_reason == "eos"
    assert len(policy.seen) > len(answer) / BLOCK
    words = torch.arange(VOCABULARY) != MASK  # the sampler never predicts that
    for block, first, logits, masked in policy.seen:
        expected = trained[0 if first else 1, block]
        torch.testing.assert_close(logits[masked][:, words], expected[masked][:, words], atol=1e-4, rtol=0)


@pytest.mark.parametrize("mode", MODES)
def test_the_noise_of_a_row_does_not_depend_on_its_batch_and_the_seed_matters(mode):
    objective = bound(kv_commit=mode, complementary=True, right_heavy=0.5)
    together, wide = make_batch(), make_batch(length=50)
    noised = objective.corrupt(together, KeyedNoise(5))
    where = copies_of(noised, together)
    for i in range(len(ROWS)):
        single = {name: values[i : i + 1] for name, values in together.items()}
        alone = objective.corrupt(single, KeyedNoise(5))
        for (_, column), slices in copies_of(alone, single).items():
            for ours, theirs in zip(slices, where[i, column], strict=True):
                assert torch.equal(alone.input_ids[0, ours], noised.input_ids[i, theirs])
                assert torch.equal(alone.mask_rate[0, ours], noised.mask_rate[i, theirs])
    again, other = objective.corrupt(together, KeyedNoise(5)), objective.corrupt(together, KeyedNoise(6))
    assert torch.equal(again.input_ids, noised.input_ids) and not torch.equal(other.input_ids, noised.input_ids)
    assert objective.corrupt(wide, KeyedNoise(5)).loss_mask.sum() == noised.loss_mask.sum()


@pytest.mark.parametrize("mode", MODES)
def test_what_is_masked_and_scored(mode):
    batch = make_batch()
    length = batch["input_ids"].size(1)
    noised = bound(kv_commit=mode, complementary=True, t_min=0.5, t_max=0.5).corrupt(batch, KeyedNoise(0))
    assert torch.equal(noised.input_ids[:, :length], batch["input_ids"]) and not noised.loss_mask[:, :length].any()
    copies = 3 if mode == "joint_next" else 2
    scored = {}
    for (i, column), slices in copies_of(noised, batch).items():
        assert len(slices) == copies
        for here in slices:
            for k in range(BLOCK):
                j = column + k
                same = j < length and batch["segment_ids"][i, j] == batch["segment_ids"][i, column]
                answer = bool(same and batch["supervised"][i, column : j + 1].all())
                token, loss = int(noised.input_ids[i, here][k]), bool(noised.loss_mask[i, here][k])
                assert token == MASK if loss or not answer else token == int(batch["input_ids"][i, j])
                assert int(noised.position_ids[i, here][k]) == int(batch["position_ids"][i, column]) + k
                if answer:
                    assert int(noised.targets[i, here][k]) == int(batch["input_ids"][i, j])
                    scored.setdefault((i, j), []).append(loss)
                else:
                    assert not loss
    assert set(scored) == {tuple(place) for place in batch["supervised"].nonzero().tolist()}
    for (i, j), losses in scored.items():
        if batch["input_ids"][i, j] == END:
            assert all(losses)
        else:
            assert losses[:-2] == [True] * (copies - 2) and losses[-1] != losses[-2]
    assert int(noised.normaliser) == int(noised.loss_mask.sum())


def test_right_heavy_masks_as_many_but_further_right():
    batch = make_batch([[[(True, 33)]]] * 400, 33)
    batch["input_ids"][batch["input_ids"] == END] = 3  # it would always be masked
    masked = {}
    for weight in (0.0, 1.0):
        objective = bound(kv_commit="alone", t_min=0.5, t_max=0.5, right_heavy=weight)
        masked[weight] = objective.corrupt(batch, KeyedNoise(0)).loss_mask[:, 33:].view(400, -1, BLOCK)[:, :8]
    assert torch.equal(masked[0.0].sum(-1), masked[1.0].sum(-1))
    assert masked[0.0].float().mean((0, 1)).sub(0.5).abs().max() < 0.03
    share = masked[1.0].float().mean((0, 1))
    assert (share.diff() > 0.05).all()


@pytest.mark.parametrize("right_heavy", [0.0, 1.0])
def test_an_exact_count_masks_the_rounded_share_of_every_block(right_heavy):
    batch = make_batch([[[(False, 2), (True, 4 * BLOCK + 2)]]] * 200, 4 * BLOCK + 4)
    batch["input_ids"][batch["input_ids"] == END] = 3  # it would always be masked
    settings = dict(kv_commit="alone", t_min=0.3, t_max=0.9, right_heavy=right_heavy)
    noised = bound(exact_count=True, **settings).corrupt(batch, KeyedNoise(0))
    rate, masked = (values[:, 4 * BLOCK + 4 :].view(200, 5, BLOCK) for values in (noised.mask_rate, noised.loss_mask))
    for block in range(5):
        answers = BLOCK if block < 4 else 2
        assert masked[:, block].sum(-1).tolist() == [round(float(t) * answers) for t in rate[:, block, 0]]
    share = masked[:, :4].float().mean((0, 1))
    assert (share.diff() > 0.02).all() if right_heavy else (share - share.mean()).abs().max() < 0.06


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shift", [False, True])
def test_the_likelihood_weights_count_every_supervised_token_once(mode, shift):
    batch = make_batch([[[(False, 3), (True, 30)]]] * 300, 33)
    likelihood = bound(kv_commit=mode, certainty=1.0, token_shift=shift).likelihood()
    noised = likelihood.corrupt(batch, KeyedNoise(0))
    assert float(noised.at_loss(noised.weights).sum() / noised.normaliser) == pytest.approx(1.0, abs=0.05)
    rates = noised.mask_rate[:, 33:][noised.loss_mask[:, 33:]]
    assert rates.min() < 0.1 and rates.max() > 0.98


def test_the_block_length_grows_with_the_row_s_number():
    rows = torch.tensor([0, 74, 75, 300, 599, 600, 10_000])
    assert BlockDiffusion(8, growth_rows=600).block_lengths(rows).tolist() == [1, 1, 2, 5, 8, 8, 8]
    assert BlockDiffusion(32, start_length=16, growth_rows=1700).block_lengths(rows).tolist()[:3] == [16, 16, 16]
    batch, grown = make_batch(first_row=600), bound(growth_rows=600)
    for ours, plain in (
        (grown.corrupt(batch, KeyedNoise(0)), bound().corrupt(batch, KeyedNoise(0))),
        (grown.grown().corrupt(make_batch(), KeyedNoise(0)), bound().corrupt(make_batch(), KeyedNoise(0))),
        (
            grown.likelihood().corrupt(make_batch(), KeyedNoise(0)),
            bound().likelihood().corrupt(make_batch(), KeyedNoise(0)),
        ),
    ):
        assert torch.equal(ours.input_ids, plain.input_ids) and torch.equal(ours.mask_rate, plain.mask_rate)
        assert torch.equal(ours.attention_rule.mask, plain.attention_rule.mask)


@pytest.mark.parametrize(("mode", "causal"), CONTEXTS)
@pytest.mark.parametrize("shift", [False, True])
def test_rows_of_one_batch_may_have_blocks_of_other_lengths(mode, causal, shift):
    """Each is read and scored as in a batch of its own, whose blocks have that length throughout."""
    batch, transformer = make_batch(first_row=1), model()
    settings = dict(kv_commit=mode, causal_context=causal, token_shift=shift, right_heavy=0.5)
    growing = bound(growth_rows=4, **settings)
    assert growing.block_lengths(batch["row"]).tolist() == [2, 3, 4]

    def read(batch, objective):
        noised = objective.corrupt(batch, KeyedNoise(3))
        return noised, transformer.hidden_states(
            noised.input_ids, noised.position_ids, None, None, noised.attention_rule
        )

    together, hidden = read(batch, growing)
    for i, length in enumerate((2, 3, 4)):
        single = {name: values[i : i + 1] for name, values in batch.items()}
        alone, expected = read(single, BlockDiffusion(length, **settings).bind(SPECIAL))
        scored = together.loss_mask[i]
        assert torch.equal(together.targets[i][scored], alone.targets[alone.loss_mask])
        torch.testing.assert_close(hidden[i][scored], expected[alone.loss_mask], atol=1e-4, rtol=0)


def test_a_batch_without_supervision_has_no_loss():
    batch = make_batch([[[(False, 9)]]], 12)
    noised = bound().corrupt(batch, KeyedNoise(0))
    assert torch.equal(noised.input_ids, batch["input_ids"]) and not noised.loss_mask.any()
    hidden = model().hidden_states(
        noised.input_ids, position_ids=noised.position_ids, attention_rule=noised.attention_rule
    )
    assert torch.isfinite(hidden).all()


def test_bad_settings_are_named():
    with pytest.raises(UserError, match="block_length"):
        BlockDiffusion(0)
    with pytest.raises(UserError, match="mask rates"):
        BlockDiffusion(4, t_min=0.5, t_max=0.2)
    with pytest.raises(UserError, match="BlockDiffusion needs certainty"):
        BlockDiffusion(4, certainty=-1.0)
    with pytest.raises(UserError, match="whole_share"):
        BlockDiffusion(4, whole_share=1.0)
    for wrong in ({"start_length": 0}, {"start_length": 5}, {"growth_rows": -1}):
        with pytest.raises(UserError, match="1 <= start_length <= block_length, growth_rows"):
            BlockDiffusion(4, **wrong)
    with pytest.raises(UserError, match="needs causal_context"):
        BlockDiffusion(4, autoregressive_weight=0.5)
    with pytest.raises(UserError, match=r"model\.attention full"):
        DiffusionLM(objective=BlockDiffusion(4), attention="full")
