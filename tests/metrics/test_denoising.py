"""DenoisingMetrics against loops over tokens."""

from __future__ import annotations

import math

import pytest
import torch

from dllm_var.metrics import DenoisingMetrics


def random_tokens(m: int, seed: int) -> dict:
    g = torch.Generator().manual_seed(seed)
    rate = torch.rand(m, generator=g)
    terminator = torch.rand(m, generator=g) < 0.2
    return {
        "token_loss": torch.rand(m, generator=g) * 5,
        "correct": torch.rand(m, generator=g) < 0.5,
        "mask_rate": rate,
        "is_terminator": terminator,
        "weight": torch.where(terminator, 1.0, 1 / rate),
        "supervised_tokens": 2 * m,
    }


def test_against_a_loop_over_uneven_batches() -> None:
    batches = [random_tokens(m, seed=m) for m in (7, 1, 30)]
    metric = DenoisingMetrics()
    for batch in batches:
        metric.update(**batch)
    result = {name: float(value) for name, value in metric.compute().items()}

    tokens = [
        (float(loss), bool(hit), float(t), bool(end), float(w))
        for b in batches
        for loss, hit, t, end, w in zip(
            b["token_loss"], b["correct"], b["mask_rate"], b["is_terminator"], b["weight"], strict=True
        )
    ]
    ends = [hit for _, hit, _, end, _ in tokens if end]
    nelbo = sum(loss * w for loss, _, _, _, w in tokens) / (2 * 38)
    expected = {
        "loss": sum(loss for loss, *_ in tokens) / 38,
        "masked_accuracy": sum(hit for _, hit, *_ in tokens) / 38,
        "terminator_recall": sum(ends) / len(ends),
        "nelbo": nelbo,
        "perplexity_bound": math.exp(nelbo),
    }
    for k, middle in enumerate(("0.1", "0.3", "0.5", "0.7", "0.9")):
        inside = [loss for loss, _, t, _, _ in tokens if k / 5 <= t < (k + 1) / 5]
        expected[f"loss_t={middle}"] = sum(inside) / len(inside)
    assert result == pytest.approx(expected, rel=1e-5)


def test_mask_rate_one_belongs_to_the_last_bucket() -> None:
    metric = DenoisingMetrics()
    yes, no = torch.tensor([True]), torch.tensor([False])
    metric.update(torch.tensor([2.0]), yes, torch.tensor([1.0]), no, torch.ones(1), 1)
    assert {name for name in metric.compute() if name.startswith("loss_t")} == {"loss_t=0.9"}


def test_without_mask_rates_it_is_the_plain_likelihood() -> None:
    metric = DenoisingMetrics()
    loss = torch.tensor([1.0, 2.0, 3.0])
    metric.update(loss, torch.tensor([True, False, True]), None, torch.tensor([False, False, True]), torch.ones(3), 3)
    result = metric.compute()
    assert float(result["nelbo"]) == float(result["loss"]) == 2.0
    assert float(result["perplexity_bound"]) == pytest.approx(math.exp(2))
    assert float(result["terminator_recall"]) == 1.0
    assert not [name for name in result if name.startswith("loss_t")]


def test_a_batch_without_loss_tokens_is_harmless() -> None:
    metric = DenoisingMetrics()
    none = torch.zeros(0)
    metric.update(none, none.bool(), none, none.bool(), none, 4)
    assert float(metric.compute()["loss"]) == 0.0
    assert "terminator_recall" not in metric.compute()


def test_the_bound_is_the_expectation_over_mask_rates() -> None:
    """With loss(t) = t for every masked token, the bound is the mean of t over [0, 1], whatever is masked when."""
    metric, g = DenoisingMetrics(), torch.Generator().manual_seed(0)
    for t in torch.linspace(0.005, 0.995, 100):
        masked = int((torch.rand(2000, generator=g) < t).sum())
        rate = t.expand(masked)
        flags = torch.zeros(masked, dtype=torch.bool)
        metric.update(rate, flags, rate, flags, 1 / rate, 2000)
    assert float(metric.compute()["nelbo"]) == pytest.approx(0.5, abs=0.01)


def test_a_model_in_bfloat16_adds_up_in_float32():
    """Lightning's -true precisions move the module, metrics and all; 0.1 a thousand times is 32 in bfloat16."""
    module = torch.nn.Module()
    module.metric = DenoisingMetrics()
    metric = module.to(torch.bfloat16).metric
    one = torch.ones(1)
    for _ in range(1000):
        metric.update(0.1 * one, one.bool(), 0.5 * one, one.bool(), one, 1)
    assert float(metric.loss_sum) == pytest.approx(100, rel=1e-4)
    assert float(metric.compute()["loss_t=0.5"]) == pytest.approx(0.1, rel=1e-4)
    metric.reset()
    assert metric.loss_sum.dtype == torch.float32
