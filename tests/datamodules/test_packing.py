import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm_var.datamodules.packing import SIZES, VERSIONS, best_fit, count_rows, make_plan

CONTEXT = 24
PACKINGS = ("concat", "best_fit")


def lengths_and_context():
    return st.integers(2, 64).flatmap(
        lambda context: st.tuples(st.lists(st.integers(1, context), min_size=1, max_size=80), st.just(context))
    )


def all_spans(plan):
    return plan.spans(np.arange(plan.rows))


@pytest.mark.parametrize("packing", PACKINGS)
@given(lengths_and_context(), st.integers(0, 3))
def test_every_position_stands_in_exactly_one_place(packing, case, seed):
    lengths, context = np.array(case[0]), case[1]
    plan = make_plan(packing, lengths, context, np.random.default_rng(seed))
    assert plan.rows == count_rows(packing, lengths, context)
    spans = all_spans(plan)
    assert (spans.length > 0).all()
    placed = np.zeros((plan.rows, context), dtype=int)
    seen = [np.zeros(length, dtype=int) for length in lengths]
    columns = np.cumsum(spans.length) - spans.length
    columns -= columns[np.searchsorted(spans.row, spans.row)]
    for sample, start, length, row, column in zip(
        spans.sample, spans.start, spans.length, spans.row, columns, strict=True
    ):
        seen[sample][start : start + length] += 1
        placed[row, column : column + length] += 1
        assert column + length <= context
    assert all((count == 1).all() for count in seen)
    assert placed.max() == 1
    assert (np.diff(placed, axis=1) <= 0).all(), "padding is at the end of a row"


@pytest.mark.parametrize("packing", PACKINGS)
def test_no_samples_are_no_rows(packing):
    nothing = np.empty(0, dtype=np.int32)
    assert make_plan(packing, nothing, CONTEXT, np.random.default_rng(0)).rows == 0
    assert count_rows(packing, nothing, CONTEXT) == 0


@given(lengths_and_context(), st.integers(0, 3))
def test_best_fit_cuts_no_sample_and_concat_fills_all_rows_but_the_last(case, seed):
    lengths, context = np.array(case[0]), case[1]
    plan = make_plan("best_fit", lengths, context, np.random.default_rng(seed))
    spans = all_spans(plan)
    assert sorted(spans.sample) == list(range(len(lengths)))
    assert (spans.length == lengths[spans.sample]).all()
    assert plan.rows <= 2 * lengths.sum() / context + 2, "on average rows are at least half full, even of few samples"
    spans = all_spans(make_plan("concat", lengths, context, np.random.default_rng(seed)))
    assert (np.bincount(spans.row, spans.length)[:-1] == context).all()


@pytest.mark.parametrize("packing", PACKINGS)
def test_any_rows_in_any_order_are_the_same_rows(packing):
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, CONTEXT, 300)
    plan = make_plan(packing, lengths, CONTEXT, generator)
    whole = all_spans(plan)
    rows = generator.permutation(plan.rows)[:20]
    some = plan.spans(rows)
    for place, row in enumerate(rows):
        for name in ("sample", "start", "length"):
            assert (getattr(some, name)[some.row == place] == getattr(whole, name)[whole.row == row]).all()


@pytest.mark.parametrize(("context", "median"), [(512, 120), (1024, 250), (2048, 400), (8192, 700)])
def test_rows_of_real_lengths_are_full(context, median):
    lengths = np.random.default_rng(0).lognormal(np.log(median), 0.8, 30_000)
    lengths = np.clip(lengths, 8, context).astype(int)
    for packing in PACKINGS:
        assert lengths.sum() / (count_rows(packing, lengths, context) * context) >= 0.99


def test_each_sample_goes_into_the_fullest_row_with_room():
    """The histogram gives the number of rows that best-fit-decreasing gives sample by sample."""
    generator = np.random.default_rng(0)
    for _ in range(20):
        lengths = generator.integers(1, 41, generator.integers(1, 300))
        rooms = []
        for length in sorted(lengths.tolist(), reverse=True):
            fitting = [room for room in rooms if room >= length]
            if fitting:
                rooms.remove(min(fitting))
            rooms.append((min(fitting) if fitting else 40) - length)
        patterns = best_fit(np.bincount(lengths, minlength=41), 40)
        assert sorted(40 - sum(sizes) for sizes, rows in patterns for _ in range(rows)) == sorted(rooms)


def test_no_place_in_a_row_is_for_long_or_short_samples():
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.normal(15, 4, 20_000), 4, 60).astype(int)
    spans = all_spans(make_plan("best_fit", lengths, 128, generator))
    ends = np.flatnonzero(np.diff(spans.row, append=-1))
    first, last = (lengths[spans.sample[at]].mean() for at in (np.append(0, ends[:-1] + 1), ends))
    assert abs(first / last - 1) < 0.05


def test_long_contexts_are_packed_on_coarser_sizes():
    generator = np.random.default_rng(0)
    context = 10 * SIZES + 3
    lengths = np.append(np.clip(generator.lognormal(8, 1.5, 20_000), 1, context).astype(int), [context, context - 1])
    plan = make_plan("best_fit", lengths, context, generator)
    spans = all_spans(plan)
    assert (np.bincount(spans.row, spans.length) <= context).all()
    assert lengths.sum() / (plan.rows * context) >= 0.99


@pytest.mark.parametrize(("packing", "digest"), [("concat", "a7e3498526c973e6"), ("best_fit", "662aeb266073a5bc")])
def test_a_version_of_the_plan_stands_for_its_rows(packing, digest):
    """Ranks, and runs that resume, must come to the same rows: whoever changes them raises `VERSIONS` and this hash."""
    lengths = np.random.default_rng(0).integers(1, 60, 5_000)
    spans = all_spans(make_plan(packing, lengths, 128, np.random.default_rng(1)))
    found = hashlib.sha256(np.stack([spans.sample, spans.start, spans.length, spans.row]).astype("<i8").tobytes())
    assert (VERSIONS[packing], found.hexdigest()[:16]) == ({"concat": 1, "best_fit": 3}[packing], digest)
