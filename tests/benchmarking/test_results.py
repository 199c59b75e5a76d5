"""The best setting, and the ratios, against figures worked out by hand."""

import pytest

from dllm_var.benchmarking.results import CHOSEN_BY, Contender, Decoding, at_equal_accuracy, best_setting, ratios
from dllm_var.benchmarking.settings import Entry
from dllm_var.sampling import Generation


def run(tokens, nfe, seconds, forward_share=0.9, per_call=True):
    """A run whose prompts have the given answer lengths, forwards and seconds."""
    answers = [
        Generation(list(range(length)), "eos", forwards, 0.5, prompt_length=3)
        for length, forwards in zip(tokens, nfe, strict=True)
    ]
    return Decoding(answers, list(seconds) if per_call else [sum(seconds)], forward_share * sum(seconds))


def contender(name, role="candidate", single=(), batched=(), selection=None, accuracy=None, prompts=100):
    """A measured setting; `selection` is accuracy and tokens/s on the selection split, there the same in batches."""
    result = Contender(Entry(name, {}, role=role), None, None, single=list(single), batched=list(batched))
    if accuracy is not None:
        result.scores = {"accuracy": accuracy, "prompts": prompts}
    if selection is not None:
        result.selection_scores = {"accuracy": selection[0], "tokens_per_forward": selection[1]}
        result.selection_single = result.selection_batched = [run([60], [1], [60 / selection[1]])]
    return result


def test_the_fastest_within_a_point_of_the_default_is_the_best():
    settings = [
        contender("autoregressive", "autoregressive", selection=(0.99, 999)),
        contender("fixed", "reference", selection=(0.99, 999)),
        contender("default", "default", selection=(0.90, 100), accuracy=1.0),
        contender("within", "candidate", selection=(0.8901, 150), accuracy=0.1),  # the measured split has no say
        contender("slower", "candidate", selection=(0.95, 120)),
        contender("beyond", "candidate", selection=(0.8899, 400)),
    ]
    assert best_setting(settings).setting.name == "within"
    unmeasured = [contender("default", "default"), contender("other")]
    assert best_setting(unmeasured).setting.name == "default"
    assert best_setting([contender("other", selection=(0.9, 90))]) is None


def test_ratios_by_hand():
    ours = contender(
        "ours",
        "default",
        single=[run([6, 6, 6, 6], [2, 2, 2, 2], [0.1, 0.1, 0.1, 0.1], forward_share=0.75)],
        batched=[run([6, 6, 6, 6], [2, 2, 2, 2], [0.05], per_call=False)],
    )
    twin = contender(
        "ar",
        "autoregressive",
        single=[run([6, 6, 6, 6], [7, 7, 7, 7], [0.2, 0.2, 0.2, 0.2])],
        batched=[run([6, 6, 6, 6], [7, 7, 7, 7], [0.15], per_call=False)],
    )
    fixed = contender("fixed", "fixed_length", single=[run([3, 3], [256, 256], [5.0, 5.0])])
    assert ratios(ours, [ours, twin, fixed]) == {
        "over_fixed_length": pytest.approx((12 / 0.2) / (6 / 10)),  # on the two prompts both have
        "over_autoregressive": pytest.approx(2),
        "over_autoregressive_batched": pytest.approx(3),
        "batch_32_over_1": pytest.approx((24 / 0.05) / (24 / 0.4)),
        "sampler_overhead": pytest.approx(0.25),
        "forwards_over_fixed_length": pytest.approx((12 / 4) / (6 / 512)),
        "forwards_over_autoregressive": pytest.approx((24 / 8) / (24 / 28)),
    }
    alone = ratios(ours, [ours])
    assert [name for name, value in alone.items() if value is not None] == ["batch_32_over_1", "sampler_overhead"]


def test_rounds_are_compared_in_pairs_and_the_median_counts():
    ours = contender("ours", "default", single=[run([10], [1], [s]) for s in (1.0, 2.0, 4.0)])
    twin = contender("ar", "autoregressive", single=[run([10], [10], [s]) for s in (2.0, 6.0, 20.0)])
    assert ratios(ours, [ours, twin])["over_autoregressive"] == pytest.approx(3)  # of 2, 3 and 5


def test_a_baseline_that_answers_nothing_has_no_ratio():
    ours = contender("ours", "default", single=[run([6], [2], [0.1])])
    fixed = contender("fixed", "fixed_length", single=[run([0], [256], [6.0])])
    assert ratios(ours, [ours, fixed])["over_fixed_length"] is None


def fast(name, speed, accuracy=0.93, selection_speed=None, batched=None, nfe=10, **more):
    """A setting that takes `nfe` forwards for ten tokens, with its tokens/s on both splits."""
    selection = (0.93, speed if selection_speed is None else selection_speed)
    rounds = [run([10], [nfe], [10 / speed])]
    many = rounds if batched is None else [run([10], [nfe], [10 / batched])]
    return contender(name, single=rounds, batched=many, selection=selection, accuracy=accuracy, **more)


def named(settings):
    """The settings at equal accuracy by their ratios to the twin."""
    found = at_equal_accuracy(settings)
    return {name: (one.setting.name, pytest.approx(value)) for name, (one, value) in found.items()}


def test_at_equal_accuracy_the_fastest_counts_that_answers_as_well_as_the_twin():
    twin = fast("ar", 1, role="autoregressive")
    settings = [
        twin,
        fast("worse", 9, accuracy=0.9249),
        fast("few prompts", 9, accuracy=1.0, prompts=2),
        fast("as good", 2.5, accuracy=0.925, nfe=4),  # half a point is the limit
        fast("slower", 1.5, role="reference", nfe=5),
    ]
    assert named(settings) == {
        "over_autoregressive": ("as good", 2.5),
        "over_autoregressive_batched": ("as good", 2.5),
        "forwards_over_autoregressive": ("as good", 2.5),
    }
    assert at_equal_accuracy(settings[1:]) == {}  # there is no twin


def test_at_equal_accuracy_the_other_split_chooses_and_each_ratio_has_its_own_setting():
    twin = fast("ar", 1, role="autoregressive")
    lucky, steady = fast("lucky", 5, selection_speed=2), fast("steady", 4, selection_speed=3, batched=2)
    wide = fast("wide", 1.1, nfe=2)
    wide.selection_scores["tokens_per_forward"] = 5
    assert named([twin, lucky, steady, wide]) == {
        "over_autoregressive": ("steady", 4),
        "over_autoregressive_batched": ("steady", 2),
        "forwards_over_autoregressive": ("wide", 5),
    }


def test_at_equal_accuracy_the_twin_itself_is_the_least():
    twin = fast("ar", 1, role="autoregressive")
    by_itself = dict.fromkeys(CHOSEN_BY, ("ar", 1))
    assert named([twin]) == by_itself
    assert named([twin, fast("worse", 9, accuracy=0.5)]) == by_itself
    assert named([twin, fast("slower after all", 0.9, selection_speed=9, nfe=20)]) == by_itself
    assert named([contender("not measured yet", "autoregressive")]) == {}


def test_in_batches_only_the_same_prompts_are_compared():
    twin = contender("ar", "autoregressive", batched=[run([10, 10], [1, 1], [1.0], per_call=False)])
    ours = contender("ours", batched=[run([10], [1], [0.1], per_call=False)])
    assert ratios(ours, [ours, twin])["over_autoregressive_batched"] is None
