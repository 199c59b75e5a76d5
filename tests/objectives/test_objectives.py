"""Objectives against slow loops, and the guarantees of keyed noise."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dllm_var.errors import UserError
from dllm_var.objectives import Autoregressive, EosSchedule, KeyedNoise, Mdlm
from dllm_var.objectives.base import EvenMasking
from dllm_var.objectives.cross_entropy import head_loss, summed_cross_entropy
from dllm_var.text.tokenizer import SpecialTokens

MASK, END, OTHER_END, PAD = 0, 1, 2, 3
SPECIAL = SpecialTokens(mask_id=MASK, terminator_ids=(END, OTHER_END), pad_id=PAD)


def make_batch(rows=4, length=64, seed=0, first_row=0):
    """Rows of samples `3 prompt | 4 response | terminator | 2 overhang`; the second prompt token is a terminator."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(4, 30, (rows, length), generator=generator)
    position = torch.arange(length).expand(rows, -1) % 10
    tokens[position == 1] = END
    tokens[position == 7] = OTHER_END
    tokens[position >= 8] = MASK
    return {
        "input_ids": tokens,
        "supervised": (position >= 3) & (position <= 7),
        "segment_ids": torch.arange(length).expand(rows, -1) // 10,
        "position_ids": position.clone(),
        "row": torch.arange(first_row, first_row + rows),
    }


@pytest.mark.parametrize("rate_per", ["row", "segment"])
def test_eos_schedule_equals_a_slow_loop(rate_per):
    batch, noise = make_batch(), KeyedNoise(7)
    noised = EosSchedule(0.2, 0.6, rate_per).bind(SPECIAL).corrupt(batch, noise)
    coins = noise.uniform(batch["row"], 64, stream=2)
    rates = noise.uniform(batch["row"], 64 if rate_per == "segment" else 1, stream=1)
    for i in range(4):
        for j in range(64):
            token = int(batch["input_ids"][i, j])
            start = j - int(batch["position_ids"][i, j])
            rate = 0.2 + 0.4 * rates[i, start if rate_per == "segment" else 0]
            hidden = bool(batch["supervised"][i, j]) and (token in (END, OTHER_END) or bool(coins[i, j] < rate))
            assert bool(noised.loss_mask[i, j]) == hidden
            assert int(noised.input_ids[i, j]) == (MASK if hidden else token)
            assert float(noised.mask_rate[i, j]) == pytest.approx(float(rate))
    assert int(noised.normaliser) == int(noised.loss_mask.sum())


def test_mask_rate_is_the_share_of_masked_tokens():
    batch = make_batch(rows=400, length=200)
    ordinary = batch["supervised"] & (batch["position_ids"] != 7)
    noised = EosSchedule(0.3, 0.3).bind(SPECIAL).corrupt(batch, KeyedNoise(0))
    assert noised.loss_mask[ordinary].float().mean() == pytest.approx(0.3, abs=0.01)
    noised = EosSchedule(0.3, 0.3, mask_terminators=False).bind(SPECIAL).corrupt(batch, KeyedNoise(0))
    assert noised.loss_mask[batch["supervised"]].float().mean() == pytest.approx(0.3, abs=0.01)


def test_mdlm_weights_make_the_expected_loss_independent_of_the_rate():
    batch = make_batch(rows=600, length=200)
    objective = Mdlm().bind(SPECIAL)
    noised = objective.corrupt(batch, KeyedNoise(3))
    # With a loss of 1 per token, sum of 1/t over masked tokens estimates the number of supervised tokens.
    ratio = noised.at_loss(noised.weights).sum() / noised.normaliser
    assert float(ratio) == pytest.approx(1.0, abs=0.1)
    assert noised.mask_rate.min() >= objective.eps


def test_mdlm_over_samples_is_the_loss_of_lladas_finetuning():
    """Their batch is padded, one sample a row; ours has them packed, with a sample that has no answer, and padding."""
    spans = [[(4, 30), (2, 6)], [(3, 9), (5, 0)]]  # prompt and answer of each sample of two rows
    length = 45
    batch = {name: torch.zeros(2, length, dtype=torch.long) for name in ("input_ids", "position_ids")}
    batch |= {"segment_ids": torch.full((2, length), -1), "supervised": torch.zeros(2, length, dtype=torch.bool)}
    batch["row"] = torch.arange(2)
    samples = []  # row and columns of each answer
    for i, row in enumerate(spans):
        at = 0
        for j, (prompt, answer) in enumerate(row):
            end = at + prompt + answer
            batch["segment_ids"][i, at:end] = j
            batch["position_ids"][i, at:end] = torch.arange(end - at)
            batch["supervised"][i, at + prompt : end] = True
            samples += [(i, slice(at + prompt, end))] if answer else []
            at = end
    objective = Mdlm(mean_over="samples").bind(SPECIAL)
    noised = objective.corrupt(batch, KeyedNoise(1))
    cost = torch.rand(2, length)  # the cross-entropy of each position
    ours = (cost[noised.loss_mask] * noised.at_loss(noised.weights)).sum() / noised.normaliser

    width = max(columns.stop - columns.start for _, columns in samples)
    theirs = torch.zeros(len(samples), width)  # token_loss / p_mask / answer_lengths, where masked
    for sample, (i, columns) in enumerate(samples):
        answer_length = columns.stop - columns.start
        losses = cost[i, columns] / noised.mask_rate[i, columns] / answer_length
        theirs[sample, :answer_length] = losses * noised.loss_mask[i, columns]
    torch.testing.assert_close(ours, theirs.sum() / len(samples))
    assert int(noised.normaliser) == 3
    per_token = Mdlm().bind(SPECIAL).corrupt(batch, KeyedNoise(1))
    assert int(per_token.normaliser) == 45 and torch.equal(per_token.loss_mask, noised.loss_mask)


def test_even_masking_covers_all_rates_evenly():
    batch = make_batch(rows=100)
    noised = EvenMasking().bind(SPECIAL).corrupt(batch, KeyedNoise(0))
    counts = torch.histc(noised.mask_rate[:, 0], bins=10, min=0, max=1)
    assert counts.min() >= 8 and counts.max() <= 12


def test_autoregressive_predicts_the_next_supervised_token_of_the_same_segment():
    batch = make_batch(length=63)  # the last sample of the row is cut
    noised = Autoregressive().bind(SPECIAL).corrupt(batch, KeyedNoise(0))
    for i in range(4):
        for j in range(63):
            inside = j + 1 < 63 and bool(batch["segment_ids"][i, j] == batch["segment_ids"][i, j + 1])
            scored = inside and bool(batch["supervised"][i, j + 1])
            assert bool(noised.loss_mask[i, j]) == scored
            if scored:
                assert noised.targets[i, j] == batch["input_ids"][i, j + 1]


@given(st.integers(0, 2**40), st.integers(0, 2**31), st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_noise_of_a_row_does_not_depend_on_its_batch(row, seed, others):
    noise = KeyedNoise(seed)
    alone = noise.uniform(torch.tensor([row]), 50, stream=1)
    together = noise.uniform(torch.tensor([*range(others), row]), 80, stream=1)
    assert torch.equal(alone[0], together[-1, :50])


def test_noise_is_uniform_and_uncorrelated():
    noise = KeyedNoise(0)
    numbers = noise.uniform(torch.arange(2000), 500, stream=2).double()
    assert numbers.min() >= 0 and numbers.max() < 1
    histogram = torch.histc(numbers, bins=100, min=0, max=1) / numbers.numel()
    assert (histogram - 0.01).abs().max() < 5e-4  # five standard deviations of a million uniform numbers
    centred = numbers - 0.5
    for other in (
        centred.roll(1, 0),  # neighbouring rows
        centred.roll(1, 1),  # neighbouring positions
        KeyedNoise(1).uniform(torch.arange(2000), 500, stream=2).double() - 0.5,  # neighbouring seeds
        noise.uniform(torch.arange(2000), 500, stream=3).double() - 0.5,  # neighbouring streams
    ):
        assert float((centred * other).mean().abs()) * 12 < 5e-3


def test_exponential_noise_is_fine_where_races_are_won():
    numbers = KeyedNoise(2).exponential(torch.arange(4000), 1000, stream=5)
    assert numbers.min() > 0
    histogram = torch.histc(torch.exp(-numbers.double()), bins=100, min=0, max=1) / numbers.numel()
    assert (histogram - 0.01).abs().max() < 2.5e-4  # five standard deviations of four million
    for small in (1e-2, 1e-4, 1e-5):
        few = numbers[numbers < small]
        assert abs(len(few) - small * 4e6) < 5 * (small * 4e6) ** 0.5
        assert len(few.unique()) > 0.99 * len(few)  # 24 bits of uniform noise have 1,677 values below 1e-4
    other = KeyedNoise(2).exponential(torch.tensor([17]), 10, stream=5)
    assert torch.equal(other[0], numbers[17, :10])


def test_chunked_head_gives_the_loss_and_gradients_of_the_whole():
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 40, bias=False)
    hidden, targets = torch.randn(23, 16, requires_grad=True), torch.randint(0, 40, (23,))
    results = []
    for limit in (10**9, 40 * 5, 1):
        head.weight.grad = hidden.grad = None
        loss, guesses = head_loss(head, hidden, targets, logits_per_chunk=limit)
        (loss * torch.linspace(0, 1, 23)).sum().backward()
        results.append((loss, guesses, head.weight.grad.clone(), hidden.grad.clone()))
    reference = torch.nn.functional.cross_entropy(hidden @ head.weight.T, targets, reduction="none")
    for result in results:
        torch.testing.assert_close(result[0], reference)
        for ours, whole in zip(result, results[0], strict=True):
            torch.testing.assert_close(ours, whole)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("limit", [10**9, 40 * 5, 1])
def test_summed_cross_entropy_gives_the_gradients_of_the_naive_one(limit, weighted):
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 40, bias=False, dtype=torch.float64)
    hidden = torch.randn(23, 16, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 40, (23,))
    weights = torch.linspace(0, 3, 23, dtype=torch.float64) if weighted else None
    scores = summed_cross_entropy(head, hidden, targets, weights, logits_per_chunk=limit)
    (scores.loss_sum * 0.25).backward()
    ours = head.weight.grad.clone(), hidden.grad.clone()
    head.weight.grad = hidden.grad = None
    logits = hidden @ head.weight.T
    reference = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    (0.25 * (reference * (1 if weights is None else weights)).sum()).backward()
    torch.testing.assert_close(scores.token_loss, reference.detach())
    assert torch.equal(scores.correct, logits.argmax(-1) == targets) and not scores.token_loss.requires_grad
    for mine, theirs in zip(ours, (head.weight.grad, hidden.grad), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    with pytest.raises(RuntimeError, match="second time"):
        scores.loss_sum.backward()


@pytest.mark.parametrize("limit", [10**9, 12 * 2])
def test_of_equal_logits_the_first_is_the_prediction_as_in_decoding(limit):
    head = torch.nn.Linear(3, 12, bias=False)
    with torch.no_grad():
        head.weight.zero_()  # all twelve logits are equal
        head.weight[4, 0] = head.weight[9, 0] = 1.0  # two of them, where hidden is not zero
    hidden = torch.tensor([[0.0, 0, 0]] * 3 + [[1.0, 0, 0]] * 3)
    targets = torch.tensor([0, 5, 11, 4, 9, 0])
    for gradients in (True, False):  # training and validation
        with torch.set_grad_enabled(gradients):
            scores = summed_cross_entropy(head, hidden, targets, logits_per_chunk=limit)
        assert scores.correct.tolist() == [True, False, False, True, False, False]
    assert torch.equal(head_loss(head, hidden, targets, logits_per_chunk=limit)[1] == targets, scores.correct)


@pytest.mark.parametrize("frozen", ["head", "hidden"])
def test_summed_cross_entropy_without_one_of_its_gradients(frozen):
    torch.manual_seed(0)
    head, targets = torch.nn.Linear(8, 20, bias=False), torch.randint(0, 20, (7,))
    head.weight.requires_grad_(frozen != "head")
    hidden = torch.randn(7, 8, requires_grad=frozen != "hidden")
    loss = torch.nn.functional.cross_entropy(head(hidden), targets, reduction="sum")
    left = hidden if frozen == "head" else head.weight
    (expected,) = torch.autograd.grad(loss, left)
    summed_cross_entropy(head, hidden, targets).loss_sum.backward()
    torch.testing.assert_close(left.grad, expected)
    assert (head.weight if frozen == "head" else hidden).grad is None


def test_gradients_are_made_only_where_they_are_asked_for():
    """Validation has logits to compute, and nothing else."""
    head, targets = torch.nn.Linear(8, 20, bias=False), torch.randint(0, 20, (7,))
    hidden = torch.randn(7, 8, requires_grad=True)
    products = {}
    for trains in (True, False):
        with torch.set_grad_enabled(trains), FlopCounterMode(display=False) as counter:
            summed_cross_entropy(head, hidden, targets, logits_per_chunk=60)
        products[trains] = counter.get_total_flops() / (2 * 7 * 20 * 8)
    assert products[False] == 1 < products[True]


def test_summed_cross_entropy_of_large_logits_and_in_bfloat16():
    torch.manual_seed(0)
    head, targets = torch.nn.Linear(64, 300, bias=False), torch.randint(0, 300, (50,))
    far = torch.full((2, 64), 1e4)
    assert torch.isfinite(summed_cross_entropy(head, far, targets[:2]).token_loss).all()
    hidden = torch.randn(50, 64, requires_grad=True)
    expected = torch.autograd.grad(summed_cross_entropy(head, hidden, targets).loss_sum, (hidden, head.weight))
    with torch.autocast("cpu", torch.bfloat16):
        scores = summed_cross_entropy(head, hidden, targets, logits_per_chunk=300 * 8)
    assert scores.token_loss.dtype == torch.float32
    for mine, exact in zip(torch.autograd.grad(scores.loss_sum, (hidden, head.weight)), expected, strict=True):
        assert mine.dtype == torch.float32 and float((mine - exact).norm() / exact.norm()) < 0.02


def test_16_bit_weights_get_the_gradient_of_float32_from_many_chunks_without_all_logits():
    """Added up in 16 bits, the 64 chunks come to an error of 0.8 %."""

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            made = operation(*args, **(kwargs or {}))
            for tensor in made if isinstance(made, tuple | list) else [made]:
                if isinstance(tensor, torch.Tensor):
                    self.numbers = max(self.numbers, tensor.numel())
            return made

    torch.manual_seed(0)
    head = torch.nn.Linear(16, 1000, bias=False, dtype=torch.bfloat16)
    hidden, targets = torch.randn(512, 16, dtype=torch.bfloat16, requires_grad=True), torch.randint(0, 30, (512,))
    weight, states = head.weight.detach().float().requires_grad_(), hidden.detach().float().requires_grad_()
    reference = torch.nn.functional.cross_entropy(states @ weight.T, targets, reduction="sum")
    expected = torch.autograd.grad(reference, (weight, states))
    with Largest() as largest:
        scores = summed_cross_entropy(head, hidden, targets, logits_per_chunk=8 * 1000)
        found = torch.autograd.grad(scores.loss_sum, (head.weight, hidden))
    assert largest.numbers <= 1000 * 16
    torch.testing.assert_close(scores.loss_sum.detach(), reference.detach(), rtol=1e-3, atol=0)
    for mine, exact in zip(found, expected, strict=True):
        assert mine.dtype == torch.bfloat16 and float((mine.float() - exact).norm() / exact.norm()) < 0.005


def test_no_scored_position_gives_an_empty_loss():
    head = torch.nn.Linear(4, 5, bias=False)
    loss, guesses = head_loss(head, torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))
    assert loss.shape == guesses.shape == (0,)
    scores = summed_cross_entropy(head, torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))
    scores.loss_sum.backward()
    assert scores.token_loss.shape == (0,) and float(scores.loss_sum.detach()) == 0 and not head.weight.grad.any()


def test_bad_settings_are_named():
    with pytest.raises(UserError, match="mask rates"):
        EosSchedule(0.9, 0.1)
    with pytest.raises(UserError, match="mask rates"):
        Mdlm(eps=0.0)
    with pytest.raises(UserError, match="bind"):
        EosSchedule().corrupt(make_batch(), KeyedNoise(0))


def test_certainty_adds_the_mean_entropy_of_the_right_predictions_of_each_row():
    """dParallel's loss of each row by itself: mean cross-entropy + weight x mean entropy where the guess is right."""
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 30, bias=False)
    objective = EosSchedule(0.5, 0.9, certainty=2.0, certainty_temperature=0.5).bind(SPECIAL)
    noised = objective.corrupt(make_batch(), KeyedNoise(0))
    targets = noised.targets[noised.loss_mask]
    hidden = 2 * torch.randn(len(targets), 8)
    right = torch.rand(len(targets)) < 0.4
    hidden[right] = 4 * head.weight.detach()[targets[right]]
    first = int(noised.loss_mask[0].sum())
    hidden[:first] = -hidden[:first].abs()  # nothing in the first row is right
    head.weight.data[targets[:first]] = head.weight.data[targets[:first]].abs()
    hidden.requires_grad_()
    scores = objective.score(head, hidden, noised)
    (ours,) = torch.autograd.grad(scores.loss_sum / noised.normaliser, hidden)

    logits, expected, at, rights = head(hidden), 0.0, 0, []
    for masked in noised.loss_mask.sum(dim=1).tolist():
        row, wanted = logits[at : at + masked], targets[at : at + masked]
        p = (row / 0.5).softmax(-1)
        entropy = -(p * p.log()).sum(-1)[row.argmax(-1) == wanted]
        loss = torch.nn.functional.cross_entropy(row, wanted) + 2.0 * (entropy.mean() if len(entropy) else 0.0)
        expected, at = expected + masked * loss, at + masked
        rights.append(len(entropy) / masked)
    assert rights[0] == 0 and all(0 < share < 1 for share in rights[1:])
    torch.testing.assert_close(scores.loss_sum, expected)
    torch.testing.assert_close(ours, torch.autograd.grad(expected / noised.normaliser, hidden)[0])
    torch.testing.assert_close(scores.token_loss.sum(), expected.detach())
    assert torch.equal(scores.correct, logits.argmax(-1) == targets)
    with pytest.raises(UserError, match="certainty_temperature"):
        EosSchedule(certainty_temperature=0.0)
