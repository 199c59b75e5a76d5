import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm_var.datamodules.layout import count_rows, deal_half, draw_rows, lay_out
from dllm_var.datamodules.packing import VERSIONS

CAPACITY = 128


def canvas_lengths(samples, seed=0):
    """Prompt and answer in blocks of 12, as `data.canvas: 12` makes CMUdict's words: few lengths, six in a row."""
    generator = np.random.default_rng(seed)
    prompt = np.clip(np.rint(generator.normal(7.5, 2, samples)), 1, 20)
    return (prompt + 12 * generator.choice([1, 2], samples, p=[0.98, 0.02])).astype(int)


def laid_out(lengths, capacity=CAPACITY):
    size, row = lay_out(np.bincount(lengths, minlength=capacity + 1), capacity)
    return size.astype(int), row


@given(st.lists(st.integers(1, 48), max_size=120), st.integers(48, 60))
def test_every_sample_has_one_place_and_no_row_is_overfull(lengths, capacity):
    counts = np.bincount(np.array(lengths, dtype=int), minlength=capacity + 1)
    size, row = lay_out(counts, capacity)
    assert (np.bincount(size, minlength=capacity + 1) == counts).all()
    fill = np.bincount(row, size)
    assert (fill <= capacity).all()
    assert (fill > 0).all(), "rows are numbered without gaps"
    assert count_rows(counts, capacity) == len(fill)


@pytest.mark.parametrize("samples", [500, 5_000, 50_000])
def test_few_distinct_lengths_fill_rows(samples):
    lengths = canvas_lengths(samples)
    size, row = laid_out(lengths)
    assert size.sum() / (CAPACITY * (row.max() + 1)) > 0.985
    drawn = draw_rows(np.bincount(lengths, minlength=CAPACITY + 1), CAPACITY)
    assert drawn.rest.sum() < 0.05 * samples, "hardly a sample is left to best-fit"


def dependence(lengths, size, row):
    """Share of neighbours whose lengths would have to change to be as if drawn without regard to each other."""
    order = np.argsort(row * 2.0**32 + np.random.default_rng(0).permutation(len(row)))
    size, row = size[order], row[order]
    same = row[1:] == row[:-1]
    joint = np.zeros((CAPACITY + 1, CAPACITY + 1))
    np.add.at(joint, (size[:-1][same], size[1:][same]), 1 / same.sum())
    return np.abs(joint - joint.sum(1)[:, None] * joint.sum(0)).sum() / 2


def sorted_rows(lengths):
    """What best-fit alone comes to: samples of like length beside each other."""
    size = np.sort(lengths)
    return size, np.cumsum(size) // CAPACITY


def of_one_length(size, row):
    """Share of the rows that hold samples of one length only."""
    order = np.argsort(row, kind="stable")
    starts = np.searchsorted(row[order], np.arange(row.max() + 1))
    return (np.maximum.reduceat(size[order], starts) == np.minimum.reduceat(size[order], starts)).mean()


def test_a_sample_tells_little_about_its_neighbours():
    lengths = canvas_lengths(50_000)
    rows = laid_out(lengths)
    assert dependence(lengths, *rows) < 0.25
    assert of_one_length(*rows) < 0.02
    assert dependence(lengths, *sorted_rows(lengths)) > 0.6, "this is what would tell"
    # With lengths that need no choosing to fill a row, hardly more than the chance in a sample of this size.
    free = np.random.default_rng(0).integers(5, 30, 50_000)
    assert dependence(free, *laid_out(free)) < 0.1


@pytest.mark.parametrize(("pair", "most"), [((32, 30), 0.15), ((32, 21), 0.3), ((25, 26), 0.05), ((16, 17), 0.3)])
def test_rows_are_mixed_where_one_length_alone_would_fill_them_better(pair, most):
    rows = laid_out(np.repeat(pair, 2_000))
    assert of_one_length(*rows) < most
    assert rows[0].sum() / (CAPACITY * (rows[1].max() + 1)) > 0.9


def test_what_dealing_half_leaves_is_fitted_in():
    lengths = np.random.default_rng(0).integers(30, CAPACITY + 1, 5_000)  # mostly more than half a row
    counts = np.bincount(lengths, minlength=CAPACITY + 1)
    _, row = lay_out(counts, CAPACITY)
    assert lengths.sum() / (CAPACITY * (row.max() + 1)) > 0.92
    half = deal_half(counts, CAPACITY)
    assert (counts - half.rest)[CAPACITY // 4 + 1 :].sum() == 0


def test_a_version_of_the_plan_stands_for_its_rows():
    """Ranks, and runs that resume, must come to the same rows: whoever changes them raises `VERSIONS` and this hash."""
    counts = np.zeros(CAPACITY + 1, np.int64)
    counts[13:29] = [26, 265, 1699, 6720, 15044, 22752, 24180, 20118, 15148, 10405, 6071, 3170, 1474, 486, 245, 96]
    counts[40] = 900
    size, row = lay_out(counts, CAPACITY)
    digest = hashlib.sha256(size.astype("<i8").tobytes() + row.astype("<i8").tobytes()).hexdigest()
    assert (VERSIONS["best_fit"], digest[:16]) == (2, "8164c26c581a1155")
