"""AnswerMetrics against an obvious slow version."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_var.metrics import AnswerMetrics, nearest_reference

tokens = st.lists(st.integers(0, 4), max_size=9)


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    finish_reason: str = "eos"
    nfe: int = 1
    drafted: int = 0
    accepted: int = 0


def slow_distance(a: list[int], b: list[int]) -> int:
    """The textbook table: entry [i][j] is the distance of the first i and the first j tokens."""
    table = [[i + j for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i, x in enumerate(a, 1):
        for j, y in enumerate(b, 1):
            table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1, table[i - 1][j - 1] + (x != y))
    return table[-1][-1]


@settings(deadline=None)
@given(tokens, st.lists(tokens, min_size=1, max_size=4))
def test_nearest_reference_prefers_few_edits_then_like_length(answer: list[int], references: list[list[int]]) -> None:
    reference, edits = nearest_reference(answer, references)
    ranks = [(slow_distance(answer, r), abs(len(r) - len(answer))) for r in references]
    assert (edits, abs(len(reference) - len(answer))) == min(ranks)
    assert reference == references[ranks.index(min(ranks))]


answers = st.lists(
    st.tuples(
        st.builds(Answer, tokens, st.sampled_from(["eos", "length"]), st.integers(1, 9)),
        st.lists(tokens, min_size=1, max_size=3),
    ),
    min_size=1,
    max_size=6,
)


@settings(deadline=None, max_examples=30)
@given(answers)
def test_rates_are_what_counting_by_hand_gives(pairs: list[tuple[Answer, list[list[int]]]]) -> None:
    metric = AnswerMetrics()
    for answer, references in pairs:  # one by one, so that accumulation is covered as well
        metric.update([answer], [references])
    result = metric.compute()

    n = len(pairs)
    nearest = [min(r, key=lambda x: (slow_distance(a.tokens, x), abs(len(a.tokens) - len(x)))) for a, r in pairs]
    shift = [len(a.tokens) - len(r) for (a, _), r in zip(pairs, nearest, strict=True)]
    edits = sum(slow_distance(a.tokens, r) for (a, _), r in zip(pairs, nearest, strict=True))
    assert result["token_error_rate"] == pytest.approx(edits / max(1, sum(map(len, nearest))))
    assert result["answer_error_rate"] == pytest.approx(sum(a.tokens not in r for a, r in pairs) / n)
    assert result["ended_by_eos"] == pytest.approx(sum(a.finish_reason == "eos" for a, _ in pairs) / n)
    assert result["hit_limit"] == pytest.approx(sum(a.finish_reason == "length" for a, _ in pairs) / n)
    assert result["length_exact"] == pytest.approx(sum(s == 0 for s in shift) / n)
    assert result["overrun"] == pytest.approx(sum(s > 0 for s in shift) / n)
    short = [s < 0 and a.finish_reason == "eos" for (a, _), s in zip(pairs, shift, strict=True)]
    assert result["premature"] == pytest.approx(sum(short) / n)
    assert result["length_error"] == pytest.approx(sum(map(abs, shift)) / n)
    total = sum(len(a.tokens) for a, _ in pairs)
    assert (result["tokens"], result["answers"]) == (total, n)
    assert result["tokens_per_forward"] == pytest.approx(total / sum(a.nfe for a, _ in pairs))


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_empty_answers_and_references_and_none_at_all() -> None:
    metric = AnswerMetrics()
    metric.update([Answer([]), Answer([1, 2])], [[[]], [[]]])
    result = metric.compute()
    assert result["token_error_rate"] == 2.0  # two wrong tokens, no reference token to divide by
    assert result["answer_error_rate"] == result["length_exact"] == result["overrun"] == 0.5
    metric.reset()
    assert all(value == 0 for value in metric.compute().values())


def test_acceptance_is_that_of_all_drafted_tokens_and_absent_without_drafts() -> None:
    metric = AnswerMetrics()
    metric.update([Answer([1]), Answer([2])], [[[1]], [[1]]])
    assert "introspective_acceptance" not in metric.compute()
    metric.update([Answer([1], drafted=9, accepted=3), Answer([2], drafted=1, accepted=1)], [[[1]], [[1]]])
    assert metric.compute()["introspective_acceptance"] == pytest.approx(0.4)


def test_an_answer_without_reference_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one reference"):
        AnswerMetrics().update([Answer([1])], [[]])
    with pytest.raises(ValueError, match="argument 2 is longer"):
        AnswerMetrics().update([Answer([1])], [[[1]], [[1]]])


def test_processes_add_up() -> None:
    """Metrics of parts whose counts are summed are the metrics of the whole."""
    answers = [Answer([1, 2], "eos", 3), Answer([1], "length", 2), Answer([4, 4, 4], "eos", 5)]
    references = [[[1, 2]], [[1, 2], [3]], [[4]]]
    first, second, whole = AnswerMetrics(), AnswerMetrics(), AnswerMetrics()
    first.update(answers[:1], references[:1])
    second.update(answers[1:], references[1:])
    whole.update(answers, references)
    first.counts += second.counts
    assert first.compute() == whole.compute()
