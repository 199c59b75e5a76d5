"""Accuracy under parallelism against its closed form."""

import math

import pytest

from dllm_var.benchmarking.results import aup


def test_without_loss_it_is_the_plain_area():
    assert aup([1, 2, 5], [80, 80, 80]) == pytest.approx(5 * 80)
    assert aup([2.5], [60]) == pytest.approx(150)  # one point is a rectangle


def test_lost_accuracy_is_weighted():
    weight = math.exp(-3 * (1 - 76 / 80))
    assert aup([1, 3], [80, 76]) == pytest.approx(1 * 80 + 2 * (80 + 76 * weight) / 2)


def test_the_weight_is_against_the_best_of_the_task():
    low, high = 76 * math.exp(-3 * (1 - 76 / 95)), 80 * math.exp(-3 * (1 - 80 / 95))
    assert aup([1, 3], [80, 76], best_accuracy=95) == pytest.approx(80 + 2 * (low + high) / 2)
    assert aup([1, 3], [80, 80], best_accuracy=70) == pytest.approx(3 * 80)  # never above 1


def test_points_too_far_below_the_first_do_not_count():
    assert aup([1, 2, 9], [80, 80, 74.9]) == pytest.approx(aup([1, 2], [80, 80]))
    assert aup([1, 2, 9], [80, 80, 75]) > aup([1, 2], [80, 80])
    assert aup([1, 2, 3], [80, 70, 80]) == pytest.approx(3 * 80)  # left out in the middle, too


def test_order_does_not_matter():
    assert aup([4, 1, 2], [77, 80, 79]) == aup([1, 2, 4], [80, 79, 77])
