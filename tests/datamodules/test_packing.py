import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm_var.datamodules.packing import COUNTS, PLANS, SIZES, plan_best_fit, plan_concat

CONTEXT = 24


def lengths_and_context():
    return st.integers(2, 64).flatmap(
        lambda context: st.tuples(st.lists(st.integers(1, context), min_size=1, max_size=80), st.just(context))
    )


def all_spans(plan):
    return plan.spans(np.arange(plan.rows))


@pytest.mark.parametrize("policy", PLANS)
@given(lengths_and_context(), st.integers(0, 3))
def test_every_position_stands_in_exactly_one_place(policy, case, seed):
    lengths, context = np.array(case[0]), case[1]
    plan = PLANS[policy](lengths, context, np.random.default_rng(seed))
    assert plan.rows == COUNTS[policy](lengths, context)
    spans = all_spans(plan)
    assert (spans.length > 0).all()
    placed = np.zeros((plan.rows, context), dtype=int)
    seen = [np.zeros(length, dtype=int) for length in lengths]
    for sample, start, length, row, column in zip(
        spans.sample, spans.start, spans.length, spans.row, spans.column, strict=True
    ):
        seen[sample][start : start + length] += 1
        placed[row, column : column + length] += 1
        assert column + length <= context
    assert all((count == 1).all() for count in seen)
    assert placed.max() == 1
    assert (np.diff(placed, axis=1) <= 0).all(), "padding is at the end of a row"


@pytest.mark.parametrize("policy", PLANS)
def test_no_samples_are_no_rows(policy):
    nothing = np.empty(0, dtype=np.int32)
    assert PLANS[policy](nothing, CONTEXT, np.random.default_rng(0)).rows == COUNTS[policy](nothing, CONTEXT) == 0


@given(lengths_and_context(), st.integers(0, 3))
def test_best_fit_cuts_no_sample(case, seed):
    lengths, context = np.array(case[0]), case[1]
    plan = plan_best_fit(lengths, context, np.random.default_rng(seed))
    spans = all_spans(plan)
    assert sorted(spans.sample) == list(range(len(lengths)))
    assert (spans.length == lengths[spans.sample]).all()
    assert plan.cut == 0
    assert plan.rows <= 2 * lengths.sum() / context + 2, "on average rows are at least half full, even of few samples"


@given(lengths_and_context(), st.integers(0, 3))
def test_concat_fills_every_row_but_the_last(case, seed):
    lengths, context = np.array(case[0]), case[1]
    plan = plan_concat(lengths, context, np.random.default_rng(seed))
    spans = all_spans(plan)
    fill = np.bincount(spans.row, spans.length)
    assert (fill[:-1] == context).all()
    rows_of_sample = [len(set(spans.row[spans.sample == sample])) for sample in range(len(lengths))]
    assert plan.cut == sum(rows > 1 for rows in rows_of_sample)


@pytest.mark.parametrize("policy", PLANS)
def test_any_rows_in_any_order_are_the_same_rows(policy):
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, CONTEXT, 300)
    plan = PLANS[policy](lengths, CONTEXT, generator)
    whole = all_spans(plan)
    rows = generator.permutation(plan.rows)[:20]
    some = plan.spans(rows)
    for place, row in enumerate(rows):
        for name in ("sample", "start", "length", "column"):
            assert (getattr(some, name)[some.row == place] == getattr(whole, name)[whole.row == row]).all()


@pytest.mark.parametrize("policy", PLANS)
def test_the_generator_decides_the_order(policy):
    lengths = np.random.default_rng(0).integers(1, CONTEXT, 300)
    first, again, other = (all_spans(PLANS[policy](lengths, CONTEXT, np.random.default_rng(s))) for s in (1, 1, 2))
    assert (first.sample == again.sample).all()
    assert len(other.sample) != len(first.sample) or (first.sample != other.sample).any()


@pytest.mark.parametrize(
    ("policy", "context", "least"),
    [
        (policy, context, least)
        for policy, least in (("concat", 0.99), ("best_fit", 0.99))
        for context in (128, 512, 1024)
    ],
)
def test_rows_are_full(policy, context, least):
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.normal(15, 4, 30_000), 4, 60).astype(int) + generator.integers(0, 9, 30_000)
    assert lengths.sum() / (COUNTS[policy](lengths, context) * context) >= least


def test_best_fit_mixes_lengths_within_a_row():
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.normal(15, 4, 20_000), 4, 60).astype(int)
    spans = all_spans(plan_best_fit(lengths, 128, generator))
    within = [lengths[spans.sample[spans.row == row]].std() for row in range(200)]
    assert np.mean(within) > 0.85 * lengths.std()
    place = np.arange(len(spans.row)) - np.searchsorted(spans.row, spans.row)
    means = np.array([lengths[spans.sample[place == at]].mean() for at in range(6)])
    assert np.abs(means / lengths.mean() - 1).max() < 0.03, "no place in a row is for long or short samples"


def test_long_contexts_are_packed_on_coarser_sizes():
    generator = np.random.default_rng(0)
    context = 10 * SIZES + 3
    lengths = np.append(np.clip(generator.lognormal(8, 1.5, 20_000), 1, context).astype(int), [context, context - 1])
    start = time.perf_counter()
    plan = plan_best_fit(lengths, context, generator)
    assert time.perf_counter() - start < 5
    spans = all_spans(plan)
    assert (spans.column + spans.length <= context).all()
    assert lengths.sum() / (plan.rows * context) >= 0.99
