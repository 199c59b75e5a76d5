"""Introspective strides against slow readings of one stride at a time, and against the autoregressive objective."""

import pytest
import torch
from test_block_denoising import END, MASK, ROWS, SPECIAL, make_batch
from test_block_denoising import model as bidirectional
from torch.nn import functional as F

from dllm_var.errors import UserError
from dllm_var.objectives import Autoregressive, IntrospectiveStride, KeyedNoise
from dllm_var.objectives.cross_entropy import head_loss

LENGTH = 34  # of a row


def model():
    transformer = bidirectional()
    transformer.config.causal = True
    return transformer


def bound(*arguments, **settings):
    return IntrospectiveStride(*arguments, **settings).bind(SPECIAL)


@pytest.mark.parametrize(("stride", "share"), [(2, 1.0), (4, 1.0), (9, 1.0), (4, 0.5)])
def test_packed_rows_give_the_logits_and_gradients_of_one_stride_at_a_time(stride, share):
    batch, transformer = make_batch(), model()
    noised = bound(stride, share).corrupt(batch, KeyedNoise(3))
    hidden = transformer.hidden_states(noised.input_ids, noised.position_ids, attention_rule=noised.attention_rule)
    logits = transformer.lm_head(hidden)
    loss, _ = head_loss(transformer.lm_head, hidden[noised.loss_mask], noised.targets[noised.loss_mask])
    loss.sum().backward()
    ours = [parameter.grad.clone() for parameter in transformer.parameters()]
    transformer.zero_grad()

    textless = {1: 8}  # the one sample without a prompt: its row and where it starts
    slow_loss, depths = torch.zeros(()), set()
    for row, mask in enumerate(noised.attention_rule.mask[:, 0]):
        for place in noised.loss_mask[row].nonzero().flatten().tolist():
            seen = mask[place].nonzero().flatten()
            assert int(seen[-1]) == place  # nothing stands right of it in the packed row
            text = seen[seen < LENGTH]
            segment = batch["segment_ids"][row, text] if len(text) else None
            assert segment is None or (segment == segment[0]).all()
            before = int(text[-1]) if len(text) else textless[row] - 1
            column = before + len(seen) - len(text)
            if place >= LENGTH:
                depths.add(len(seen) - len(text))
                assert (noised.input_ids[row, seen[seen >= LENGTH]] == MASK).all()
            # Alone: the text up to there, then as many masks, read by the causal model as it is.
            alone = transformer(noised.input_ids[None, row, seen])[0, -1]
            torch.testing.assert_close(logits[row, place], alone, atol=1e-4, rtol=0)
            target = batch["input_ids"][row, column + 1]
            assert int(noised.targets[row, place]) == int(target)
            slow_loss = slow_loss + F.cross_entropy(alone, target)
    assert {1} < depths <= set(range(1, stride)) or depths == {1} == set(range(1, stride))
    slow_loss.backward()
    for gradient, parameter in zip(ours, transformer.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-3, rtol=1e-3)


def test_the_clean_copy_is_read_and_scored_as_by_the_autoregressive_objective():
    batch, transformer = make_batch(), model()
    noised = bound(4).corrupt(batch, KeyedNoise(1))
    plain = Autoregressive().bind(SPECIAL).corrupt(batch, KeyedNoise(1))
    assert torch.equal(noised.loss_mask[:, :LENGTH], plain.loss_mask)
    assert torch.equal(noised.targets[:, :LENGTH][plain.loss_mask], plain.targets[plain.loss_mask])
    hidden = transformer.hidden_states(noised.input_ids, noised.position_ids, attention_rule=noised.attention_rule)
    twin = transformer.hidden_states(plain.input_ids, batch["position_ids"], batch["segment_ids"])
    torch.testing.assert_close(hidden[:, :LENGTH][plain.loss_mask], twin[plain.loss_mask], atol=1e-5, rtol=0)


def test_every_token_but_the_first_of_a_prompted_answer_is_drafted_once():
    batch = make_batch()
    noised = bound(5).corrupt(batch, KeyedNoise(0))
    starts = sum(span[0] for row in ROWS for sample in row for span in sample)
    tokens = int(batch["supervised"].sum())
    assert int(noised.loss_mask[:, LENGTH:].sum()) == tokens - starts
    drafted = noised.targets[:, LENGTH:][noised.loss_mask[:, LENGTH:]]
    assert int((drafted == END).sum()) == sum(length > 1 for row in ROWS for sample in row for s, length in sample if s)
    assert int(noised.normaliser) == int(noised.loss_mask.sum())


def depths(noised, clean):
    """Returns how many masks each scored mask sees, itself included."""
    seen = noised.attention_rule.mask[:, 0, clean:, clean:].sum(dim=-1)
    return seen[noised.loss_mask[:, clean:]]


def test_half_of_the_answers_begin_with_a_whole_stride_and_tokens_are_drafted_from_every_distance():
    batch = make_batch([[[(True, 33)]]] * 400, 33)
    noised = bound(5).corrupt(batch, KeyedNoise(0))
    by_token = depths(noised, 33).view(400, 32)  # all but the first, of each answer
    assert (by_token[:, :4] == torch.arange(1, 5)).all(dim=1).float().mean() == pytest.approx(0.5 + 0.5 / 4, abs=0.05)
    cut = by_token[(by_token[:, :4] != torch.arange(1, 5)).any(dim=1)]
    for token in range(4, 32):  # behind the first stride
        assert (torch.bincount(cut[:, token], minlength=5)[1:] > 0).sum() >= 3
    assert set(cut[:, 10].tolist()) | set(by_token[:, 10].tolist()) == {1, 2, 3, 4}


def test_a_share_of_the_strides_is_read_and_whole_ones():
    batch = make_batch([[[(False, 2), (True, 31)]]] * 400, 33)
    whole, some = (bound(5, share).corrupt(batch, KeyedNoise(0)) for share in (1.0, 0.25))
    assert depths(some, 33).numel() / depths(whole, 33).numel() == pytest.approx(0.25, abs=0.03)
    assert some.input_ids.size(1) < whole.input_ids.size(1)
    counts, all_counts = (torch.bincount(depths(noised, 33), minlength=5)[1:].float() for noised in (some, whole))
    torch.testing.assert_close(counts / counts.sum(), all_counts / all_counts.sum(), atol=0.03, rtol=0)  # none is cut


def test_the_stride_grows_with_the_row_s_number():
    rows = torch.tensor([0, 85, 86, 250, 514, 515, 10_000])
    assert bound(8, growth_rows=600).strides(rows).tolist() == [2, 2, 3, 4, 7, 8, 8]
    assert bound(8).strides(rows).tolist() == [8] * 7
    early, late = (make_batch([[[(True, 33)]]] * 4, 33, first_row=first) for first in (0, 600))
    assert depths(bound(8, growth_rows=600).corrupt(early, KeyedNoise(0)), 33).max() == 1
    assert depths(bound(8, growth_rows=600).corrupt(late, KeyedNoise(0)), 33).max() == 7
    assert depths(bound(8, growth_rows=600).grown().corrupt(early, KeyedNoise(0)), 33).max() == 7  # in validation


def test_the_noise_of_a_row_does_not_depend_on_its_batch_and_the_seed_matters():
    together, objective = make_batch(), bound(4, 0.6)
    noised = objective.corrupt(together, KeyedNoise(5))
    for row in range(len(ROWS)):
        single = {name: values[row : row + 1] for name, values in together.items()}
        alone = objective.corrupt(single, KeyedNoise(5))
        width = alone.input_ids.size(1)
        assert torch.equal(alone.loss_mask[0], noised.loss_mask[row, :width])
        assert not noised.loss_mask[row, width:].any()
        assert torch.equal(alone.attention_rule.mask[0, 0], noised.attention_rule.mask[row, 0, :width, :width])
    other = objective.corrupt(together, KeyedNoise(6))
    assert other.loss_mask.shape != noised.loss_mask.shape or not torch.equal(other.loss_mask, noised.loss_mask)


def test_the_weight_of_the_clean_copy():
    batch = make_batch()
    masks_alone = bound(4, clean_weight=0.0).corrupt(batch, KeyedNoise(0))
    assert not masks_alone.loss_mask[:, :LENGTH].any() and masks_alone.weights is None
    light = bound(4, clean_weight=0.2).corrupt(batch, KeyedNoise(0))
    weights = light.weights[light.loss_mask]
    clean = light.loss_mask[:, :LENGTH].sum()
    assert (weights == 0.2).sum() == clean and (weights == 1).sum() == light.loss_mask.sum() - clean


def test_its_likelihood_is_the_exact_one_of_the_text():
    batch = make_batch()
    exact = bound(4).likelihood().corrupt(batch, KeyedNoise(0))
    plain = Autoregressive().bind(SPECIAL).corrupt(batch, KeyedNoise(0))
    assert torch.equal(exact.loss_mask, plain.loss_mask) and torch.equal(exact.input_ids, plain.input_ids)


@pytest.mark.parametrize("settings", [{"stride": 1}, {"share": 0.0}, {"growth_rows": -1}, {"clean_weight": -0.1}])
def test_impossible_settings_are_named(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        IntrospectiveStride(**settings)


def test_rows_without_an_answer_have_no_masks():
    batch = make_batch([[[(False, 20)]], [[(False, 5)]]])
    noised = bound(4).corrupt(batch, KeyedNoise(0))
    assert noised.input_ids.shape == batch["input_ids"].shape and not noised.loss_mask.any()
