import itertools
import pickle
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_var.datamodules.rows import SECTION, HeldOutSampler, PackedRows, RowSampler

CONTEXT = 32
POLICIES = ("concat", "best_fit")


@pytest.fixture(scope="module")
def table(build_table):
    generator = np.random.default_rng(0)
    return build_table([(int(a), int(b)) for a, b in generator.integers(1, 12, (60, 2))])


@pytest.fixture(scope="module")
def make_rows(table, tokenizer):
    def make(packing="best_fit", overhang=0, **kwargs):
        return PackedRows(table, tokenizer.special, CONTEXT, packing, overhang=overhang, stretch=2, **kwargs)

    return make


def pieces(batch):
    """Token ids and supervision of every segment of a batch, in order, and where each stands."""
    for row in range(len(batch["row"])):
        segments = batch["segment_ids"][row]
        for segment in range(int(segments.max()) + 1):
            at = torch.nonzero(segments == segment)[:, 0]
            assert (at.diff() == 1).all()
            assert batch["position_ids"][row, at].tolist() == list(range(len(at)))
            yield batch["input_ids"][row, at].tolist(), batch["supervised"][row, at].tolist()


def stored(table):
    return [
        (table.ids(sample), table.supervised[table.offsets[sample] : table.offsets[sample + 1]].tolist())
        for sample in range(len(table))
    ]


@pytest.mark.parametrize("packing", POLICIES)
@pytest.mark.parametrize("overhang", [0, 5])
@pytest.mark.parametrize("section", [SECTION, 8])
def test_an_epoch_holds_every_token_once_with_its_supervision(make_rows, table, tokenizer, packing, overhang, section):
    rows = make_rows(packing, overhang, section=section)
    for epoch in (0, 3):
        batch = rows.__getitems__(list(range(rows.first_row(epoch), rows.first_row(epoch + 1))))
        keep = (batch["segment_ids"] >= 0) & (batch["input_ids"] != tokenizer.mask_id)
        seen = sorted(zip(batch["input_ids"][keep].tolist(), batch["supervised"][keep].tolist(), strict=True))
        assert seen == sorted(pair for sample in stored(table) for pair in zip(*sample, strict=True))
        padding = batch["segment_ids"] == -1
        assert (batch["input_ids"][padding] == tokenizer.pad_id).all()
        assert not batch["supervised"][padding].any()
        list(pieces(batch))


@pytest.mark.parametrize("overhang", [0, 5])
def test_segments_are_whole_samples_that_end_with_a_supervised_terminator(make_rows, table, tokenizer, overhang):
    rows = make_rows("best_fit", overhang)
    batch = rows.__getitems__(range(len(rows)))
    found, hanging = [], []
    for ids, supervised in pieces(batch):
        length = len(ids) - ids.count(tokenizer.mask_id)
        assert all(index == tokenizer.mask_id for index in ids[length:])
        assert not any(supervised[length:])
        assert ids[length - 1] == tokenizer.terminator_id
        assert supervised[length - 1]
        found.append((ids[:length], supervised[:length]))
        hanging.append(len(ids) - length)
    assert sorted(found) == sorted(stored(table))
    assert set(hanging) == set(range(overhang + 1)), "overhang takes every length up to the largest"


def test_overhang_and_order_are_drawn_anew_for_each_epoch_and_seed(make_rows):
    def content(rows, epoch):
        return rows.__getitems__(range(rows.first_row(epoch), rows.first_row(epoch) + 10))["input_ids"]

    rows = make_rows(overhang=4)
    assert not torch.equal(content(rows, 0), content(rows, 1))
    assert not torch.equal(content(rows, 0), content(make_rows(overhang=4, seed=(1,)), 0))
    assert torch.equal(content(rows, 0), content(make_rows(overhang=4), 0))


@pytest.mark.parametrize("packing", POLICIES)
@pytest.mark.parametrize("section", [SECTION, 20])
def test_a_row_depends_on_nothing_but_its_number(make_rows, packing, section):
    make_rows = partial(make_rows, packing, 5, section=section)
    rows = make_rows()
    numbers = np.random.default_rng(1).integers(0, 20 * len(rows), 30).tolist()
    together = rows.__getitems__(numbers)
    for place, number in enumerate(numbers):
        for alone in (make_rows()[number], pickle.loads(pickle.dumps(rows))[number]):
            assert all(torch.equal(alone[name], together[name][place]) for name in together)


@given(st.integers(0, 2_000))
@pytest.mark.parametrize(("overhang", "section"), [(0, SECTION), (5, SECTION), (5, 20)])
def test_rows_are_numbered_on_over_the_epochs(make_rows, overhang, section, number):
    rows = make_rows("concat", overhang, section=section)
    epoch, place, inside = rows.locate(number)
    before = sum(rows.packed(epoch, earlier)[1].rows for earlier in range(place))
    assert rows.first_row(epoch) + before + inside == number
    assert 0 <= inside < rows.packed(epoch, place)[1].rows


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 9))
def test_sections_share_the_samples(table, tokenizer, samples, section, stretch):
    lengths = np.random.default_rng(samples).integers(1, 2 * CONTEXT, samples)
    ends = np.concatenate([[0], np.cumsum(lengths)])
    table = replace(table, offsets=ends, answer_start=np.zeros(samples, np.int64))
    rows = PackedRows(table, tokenizer.special, CONTEXT, section=section, stretch=stretch)
    parts = [rows.samples(number).index for number in range(rows.sections)]
    kept = np.concatenate(parts)
    assert sorted(kept) == np.flatnonzero(lengths <= CONTEXT).tolist()
    assert max(map(len, parts)) <= section + stretch
    counts = {"samples": len(kept), "tokens": lengths[kept].sum(), "dropped": samples - len(kept), "truncated": 0}
    if len(kept):
        report = rows.report()
        assert {name: report[name] for name in counts} == counts


def test_sections_with_nothing_left_in_them_are_passed_over(table, tokenizer):
    lengths = np.where(np.arange(len(table)) // 10 % 2, 2 * CONTEXT, 5)
    table = replace(table, offsets=np.concatenate([[0], np.cumsum(lengths)]))
    rows = PackedRows(table, tokenizer.special, CONTEXT, "best_fit", section=10, stretch=10)
    assert [len(rows.samples(number).index) for number in range(rows.sections)] == [10, 0] * 3
    assert [rows.locate(row)[1] for row in range(len(rows))] == [0, 0, 2, 2, 4, 4]
    assert rows.locate(len(rows)) == (1, 0, 0)


def test_answers_are_padded_with_supervised_terminators(make_rows, table, tokenizer):
    rows = make_rows(eos_padding=10, overhang=3)
    batch = rows.__getitems__(range(len(rows)))
    answers = sorted(
        len(ids) - 1 - int(start) for (ids, _), start in zip(stored(table), table.answer_start, strict=True)
    )
    found = []
    for ids, supervised in pieces(batch):
        answer = [index for index, flag in zip(ids, supervised, strict=True) if flag]
        found.append(next(place for place, index in enumerate(answer) if index == tokenizer.terminator_id))
        assert set(answer[found[-1] :]) == {tokenizer.terminator_id}
        room = CONTEXT - supervised.index(True)
        assert len(answer) == max(min(10, room), found[-1] + 1)
    assert sorted(found) == answers


@pytest.mark.parametrize("cut", [True, False])
def test_a_canvas_ends_samples_with_whole_blocks(make_rows, table, tokenizer, cut):
    block = 4
    whole = {tuple(ids): int(start) for (ids, _), start in zip(stored(table), table.answer_start, strict=True)}
    rows = make_rows(canvas=block, cut=cut)
    blocks_seen = set()
    batch = rows.__getitems__(range(len(rows)))
    for ids, supervised in pieces(batch):
        shown = [index for index in ids if index != tokenizer.mask_id]
        (start,) = {start for sample, start in whole.items() if sample[: len(shown)] == tuple(shown)} or {None}
        answer = len(ids) - start
        assert answer % block == 0 or len(ids) == CONTEXT
        assert sum(supervised) == len(shown) - start
        blocks_seen.add((answer // block, shown[-1] == tokenizer.terminator_id))
        assert cut or shown[-1] == tokenizer.terminator_id
    assert not cut or {(1, True), (1, False), (2, True), (2, False)} <= blocks_seen


@given(st.integers(1, 200), st.integers(1, 7), st.integers(1, 5), st.integers(0, 50))
def test_ranks_share_the_stream_evenly(rows, batch_size, ranks, begin):
    samplers = [RowSampler(rows, batch_size, ranks, rank, begin) for rank in range(ranks)]
    dealt = []
    for sampler in samplers:
        dealt.append(list(sampler))
        assert len(dealt[-1]) == len(sampler)
        assert len(sampler) % batch_size == 0
    assert len({len(numbers) for numbers in dealt}) == 1
    assert sorted(itertools.chain(*dealt)) == list(range(begin, begin + len(samplers[0]) * ranks))
    assert rows <= len(samplers[0]) * ranks < rows + batch_size * ranks
    # A global batch is the same rows however many ranks share it.
    alone = RowSampler(rows, batch_size * ranks, next_row=begin)
    together = [
        numbers[place : place + batch_size] for place in range(0, len(dealt[0]), batch_size) for numbers in dealt
    ]
    assert list(alone) == list(itertools.chain(*together))
    # Every rank agrees on the next row, whichever batch was the last one trained.
    for place in range(0, len(dealt[0]), batch_size):
        for sampler, numbers in zip(samplers, dealt, strict=True):
            sampler.trained(numbers[place])
        assert {sampler.next_row for sampler in samplers} == {begin + (place + batch_size) * ranks}


@settings(max_examples=5)
@given(st.integers(1, 20_000), st.integers(1, 4096))
def test_thousands_of_ranks_get_each_held_out_row_once_and_equally_many(rows, ranks):
    held_out = [list(HeldOutSampler(range(rows), ranks, rank)) for rank in range(ranks)]
    assert {len(numbers) for numbers in held_out} == {-(-rows // ranks)}
    assert sorted(row for numbers in held_out for row in numbers if row >= 0) == list(range(rows))


def test_row_minus_one_is_padding(make_rows, tokenizer):
    batch = make_rows().__getitems__([-1, 3])
    assert batch["row"].tolist() == [-1, 3]
    assert (batch["input_ids"][0] == tokenizer.pad_id).all()
    assert (batch["segment_ids"][0] == -1).all()
    assert not batch["supervised"][0].any()
