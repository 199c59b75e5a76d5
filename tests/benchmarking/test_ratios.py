"""The rule that chooses the best setting, and the ratios, against figures worked by hand."""

import pytest
from by_hand import contender, run

from dllm_var.benchmarking.ratios import against_bars, choose, credited, overhead, ratios, speed


def names(*settings):
    return [contender(name, role, selection=selection) for name, role, selection in settings]


def test_the_fastest_within_a_point_of_the_default_is_chosen():
    settings = names(
        ("autoregressive", "autoregressive", (0.99, 999)),
        ("fixed", "reference", (0.99, 999)),
        ("default", "default", (0.90, 100)),
        ("within", "candidate", (0.8901, 150)),
        ("slower", "candidate", (0.95, 120)),
        ("beyond", "candidate", (0.8899, 400)),
    )
    assert choose(settings).setting.name == "within"


def test_the_measured_split_has_no_say():
    settings = names(("default", "default", (0.9, 100)), ("other", "candidate", (0.9, 90)))
    settings[0].scores, settings[1].scores = {"accuracy": 0.1}, {"accuracy": 1.0}
    settings[1].single = [run([500], [1], [0.1])]
    assert choose(settings).setting.name == "default"


def test_without_selection_the_default_stands():
    assert choose(names(("default", "default", None), ("other", "candidate", None))).setting.name == "default"
    assert choose(names(("other", "candidate", (0.9, 90)))) is None


def test_ratios_by_hand():
    ours = contender(
        "ours",
        "default",
        single=[run([6, 6, 6, 6], [2, 2, 2, 2], [0.1, 0.1, 0.1, 0.1], forward_share=0.75)],
        batched=[run([6, 6, 6, 6], [2, 2, 2, 2], [0.05], per_call=False)],
    )
    twin = contender("ar", "autoregressive", single=[run([6, 6, 6, 6], [7, 7, 7, 7], [0.2, 0.2, 0.2, 0.2])])
    fixed = contender("fixed", "fixed_length", single=[run([3, 3], [256, 256], [5.0, 5.0])])
    found = ratios(ours, [ours, twin, fixed], answer_lengths=[3, 3, 3, 3])
    assert found == {
        "over_fixed_length": pytest.approx((12 / 0.2) / (6 / 10)),  # on the two prompts both have
        "over_autoregressive": pytest.approx(2),
        "batch_32_over_1": pytest.approx((24 / 0.05) / (24 / 0.4)),
        "sampler_overhead": pytest.approx(0.25),
        "forwards_over_fixed_length": pytest.approx((12 / 4) / (6 / 512)),
        "forwards_over_autoregressive": pytest.approx((24 / 8) / (24 / 28)),
    }


def test_rounds_are_compared_in_pairs_and_the_median_counts():
    ours = contender("ours", "default", single=[run([10], [1], [s]) for s in (1.0, 2.0, 4.0)])
    twin = contender("ar", "autoregressive", single=[run([10], [10], [s]) for s in (2.0, 6.0, 20.0)])
    assert ratios(ours, [ours, twin], [10])["over_autoregressive"] == pytest.approx(3)  # of 2, 3 and 5


def test_a_fixed_length_baseline_that_answers_nothing_is_credited_with_the_reference():
    ours = contender("ours", "default", single=[run([6], [2], [0.1])])
    fixed = contender("fixed", "fixed_length", single=[run([0], [256], [6.0])])
    found = ratios(ours, [ours, fixed], answer_lengths=[6])
    assert found["over_fixed_length"] == pytest.approx(60)
    assert "answers with 0.0 tokens where the references have 6.0" in credited([ours, fixed], [6])
    longer = contender("fixed", "fixed_length", single=[run([12], [256], [6.0])])
    assert ratios(ours, [ours, longer], [6])["over_fixed_length"] == pytest.approx(30)  # its own tokens, right or wrong
    assert credited([ours, longer], [6]) is None


def test_what_was_not_measured_has_no_ratio():
    ours = contender("ours", "default", single=[run([6], [2], [0.1])])
    found = ratios(ours, [ours], [6])
    assert found["sampler_overhead"] is not None
    assert [name for name, value in found.items() if value is None] == [
        "over_fixed_length",
        "over_autoregressive",
        "batch_32_over_1",
        "forwards_over_fixed_length",
        "forwards_over_autoregressive",
    ]


def test_bars():
    values = {"over_fixed_length": 30.1, "over_autoregressive": 2.39, "batch_32_over_1": None, "sampler_overhead": 0.2}
    bars = against_bars(values)
    assert {name: bar["passed"] for name, bar in bars.items()} == {
        "over_fixed_length": True,
        "over_autoregressive": False,
        "batch_32_over_1": None,
        "sampler_overhead": True,
    }
    assert against_bars({"sampler_overhead": 0.21})["sampler_overhead"]["passed"] is False


def test_speed_and_overhead_are_medians_of_rounds():
    runs = [run([10], [1], [s], forward_share=f) for s, f in ((1.0, 0.5), (2.0, 0.9), (5.0, 0.8))]
    assert speed(runs) == 5
    assert overhead(runs) == pytest.approx(0.2)
