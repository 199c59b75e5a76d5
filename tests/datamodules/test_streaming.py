import itertools

import lightning.pytorch as L
import pytest
from jsonargparse import ArgumentParser
from recorded_runs import ListSource, Recorder, make_trainer

from dllm_var.datamodules import StreamingDataModule
from dllm_var.datamodules.streaming import Position, RowStream
from dllm_var.errors import UserError

RECORDS = [{"input_ids": [4 + number % 60] * (1 + number % 11), "prompt_length": 0} for number in range(100)]
SETTINGS = {"context_length": 24, "batch_size": 2, "packing": "best_fit", "overhang": 3, "block_records": 9}


def make(records=RECORDS, splits=None, **settings):
    return StreamingDataModule(source=ListSource(records, **(splits or {})), **{**SETTINGS, **settings})


def train(folder, source, steps, checkpoint=None, trainer=None, **settings):
    """What training sees in so many steps, and the checkpoint it leaves behind."""
    model, data = Recorder(), StreamingDataModule(source=source, **{**SETTINGS, **settings})
    fit = make_trainer(folder, max_steps=steps, **(trainer or {"devices": 1}))
    fit.fit(model, datamodule=data, ckpt_path=checkpoint)
    path = f"{folder}/{steps}.ckpt"
    fit.save_checkpoint(path)
    return [list(pair) for pair in zip(model.seen["train"], model.tokens, strict=True)], path


def row_numbers(seen):
    return [row for rows, _ in seen for row in rows]


@pytest.mark.parametrize("readers", [1, 3])
@pytest.mark.parametrize("packing", ["best_fit", "concat"])
def test_readers_share_each_pass_over_the_source(tokenizer, readers, packing):
    data = make(batch_size=1, packing=packing)
    tokens, rows = {0: [], 1: []}, []
    for rank in range(readers):
        for batch in RowStream(data, rank, readers, [(0, Position())]):
            epoch = int(batch["stream_position"][1])
            if epoch > 1:
                break
            rows += batch["row"].tolist()
            keep = (batch["segment_ids"] >= 0) & (batch["input_ids"] != tokenizer.mask_id)
            tokens[epoch] += batch["input_ids"][keep].tolist()
    expected = sorted(itertools.chain(*([*record["input_ids"], tokenizer.terminator_id] for record in RECORDS)))
    assert sorted(tokens[0]) == sorted(tokens[1]) == expected
    assert len(set(rows)) == len(rows)


@pytest.mark.parametrize(("workers", "stop"), [(0, 5), (0, 12), (2, 7)])
def test_a_resumed_training_sees_the_very_next_rows(tmp_path, workers, stop):
    source = ListSource(RECORDS)
    whole, _ = train(tmp_path, source, 30, num_workers=workers)
    before, checkpoint = train(tmp_path, source, stop, num_workers=workers)
    after, _ = train(tmp_path, source, 30, checkpoint, num_workers=workers)
    assert before == whole[:stop]
    assert after == whole[stop:]
    assert len(set(row_numbers(whole))) == 30 * SETTINGS["batch_size"]
    if not workers:  # epochs cut short go on where they stopped
        assert train(tmp_path, source, 12, trainer={"devices": 1, "limit_train_batches": 5})[0] == whole[:12]


def test_another_number_of_readers_goes_on_after_the_last_block(tmp_path):
    source = ListSource(RECORDS)
    before, checkpoint = train(tmp_path, source, 5)
    with pytest.warns(UserWarning, match="number of ranks or workers differs"):
        after, _ = train(tmp_path, source, 15, checkpoint, num_workers=2)
    assert not set(row_numbers(before)) & set(row_numbers(after))
    with pytest.raises(UserError, match=r"data\.block_records has another value \(10 instead of 9\)"):
        train(tmp_path, source, 15, checkpoint, block_records=10)


def test_held_out_splits_are_as_usual():
    data = make(splits={"validation": RECORDS[:20]})
    data.prepare_data()
    assert sum(len(batch["row"]) for batch in data.val_dataloader()) == len(data.rows("validation"))
    assert data.report("validation")["samples"] == 20
    assert "9 records at a time" in data.summary()


@pytest.mark.parametrize(
    ("records", "ranks", "message"),
    [
        (RECORDS[:5], 2, r"too few usable records for 2 readers.*data\.block_records"),
        ([RECORDS[0], {"text": ""}], 1, "train record 1 has an empty 'text'"),
    ],
)
def test_mistakes_are_told_in_one_line(records, ranks, message):
    with pytest.raises(UserError, match=message):
        list(itertools.islice(RowStream(make(records), ranks - 1, ranks, [(0, Position())]), 3))


def test_settings_come_from_a_config():
    parser = ArgumentParser()
    parser.add_subclass_arguments(L.LightningDataModule, "data")
    arguments = {"block_records": 7, "overhang": 2, "source": {"class_path": "dllm_var.datamodules.CmudictSource"}}
    config = {"class_path": "dllm_var.datamodules.StreamingDataModule", "init_args": arguments}
    data = parser.instantiate(parser.parse_object({"data": config})).data
    assert (data.block_records, data.overhang) == (7, 2)
    with pytest.raises(UserError, match=r"data\.block_records is 0"):
        make(block_records=0)
