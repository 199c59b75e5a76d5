import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from jsonargparse import ArgumentParser

from dllm_var.datamodules import StreamingDataModule
from dllm_var.datamodules.streaming import Position, RowStream
from dllm_var.errors import UserError

RECORDS = [{"input_ids": [4 + number % 60] * (1 + number % 11), "prompt_length": 0} for number in range(100)]
SETTINGS = {"context_length": 24, "batch_size": 2, "packing": "best_fit", "overhang": 3, "block_records": 9}


class Recorder(L.LightningModule):
    """Keeps the batches it was given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []

    def training_step(self, batch, index):
        assert set(batch) == {"input_ids", "supervised", "segment_ids", "position_ids", "row"}
        self.seen.append([batch["row"].tolist(), batch["input_ids"].tolist()])
        return self.weight.sum() * batch["supervised"].sum()

    def validation_step(self, batch, index):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(folder, source, steps, checkpoint=None, trainer=None, **settings):
    """What training sees in so many steps, and the checkpoint it leaves behind."""
    model, data = Recorder(), StreamingDataModule(source=source, **{**SETTINGS, **settings})
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    fit = L.Trainer(default_root_dir=folder, accelerator="cpu", max_steps=steps, **quiet, **(trainer or {"devices": 1}))
    fit.fit(model, datamodule=data, ckpt_path=checkpoint)
    path = str(Path(folder) / f"{steps}.ckpt")
    fit.save_checkpoint(path)
    return model.seen, path


@pytest.fixture
def source(list_source):
    return list_source(RECORDS)


@pytest.mark.parametrize("readers", [1, 3])
@pytest.mark.parametrize("packing", ["best_fit", "concat"])
def test_readers_share_each_pass_over_the_source(source, tokenizer, readers, packing):
    data = StreamingDataModule(source=source, **{**SETTINGS, "batch_size": 1, "packing": packing})
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


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [5, 12])
def test_a_resumed_training_sees_the_very_next_rows(tmp_path, source, workers, stop):
    whole, _ = run(tmp_path, source, 30, num_workers=workers)
    before, checkpoint = run(tmp_path, source, stop, num_workers=workers)
    after, _ = run(tmp_path, source, 30, checkpoint, num_workers=workers)
    assert before == whole[:stop]
    assert after == whole[stop:]
    assert len({row for rows, _ in whole for row in rows}) == 30 * SETTINGS["batch_size"]


def test_epochs_cut_short_go_on_where_they_stopped(tmp_path, source):
    whole, _ = run(tmp_path, source, 12)
    short, _ = run(tmp_path, source, 12, trainer={"devices": 1, "limit_train_batches": 5})
    assert short == whole


def test_another_number_of_readers_goes_on_after_the_last_block(tmp_path, source):
    before, checkpoint = run(tmp_path, source, 5)
    with pytest.warns(UserWarning, match="number of ranks or workers differs"):
        after, _ = run(tmp_path, source, 15, checkpoint, num_workers=2)
    seen, later = ({row for rows, _ in part for row in rows} for part in (before, after))
    assert not seen & later
    with pytest.raises(UserError, match=r"data\.block_records was 9"):
        run(tmp_path, source, 15, checkpoint, block_records=10)


def test_held_out_splits_are_as_usual(list_source):
    data = StreamingDataModule(source=list_source(RECORDS, validation=RECORDS[:20]), **SETTINGS)
    data.prepare_data()
    assert sum(len(batch["row"]) for batch in data.val_dataloader()) == len(data.rows("validation"))
    assert data.report("validation")["samples"] == 20
    assert "9 records at a time" in data.summary()


def test_mistakes_are_told_in_one_line(list_source):
    with pytest.raises(UserError, match=r"data\.block_records is 0"):
        StreamingDataModule(source=list_source(RECORDS), block_records=0)
    data = StreamingDataModule(source=list_source(RECORDS[:5]), **SETTINGS)
    with pytest.raises(UserError, match=r"too few usable records for 2 readers.*data\.block_records"):
        list(itertools.islice(RowStream(data, 1, 2, [(0, Position())]), 3))
    data = StreamingDataModule(source=list_source([RECORDS[0], {"text": ""}]), **SETTINGS)
    with pytest.raises(UserError, match="train record 1 has an empty 'text'"):
        list(itertools.islice(RowStream(data, 0, 1, [(0, Position())]), 3))
    data = StreamingDataModule(source=list_source([{"input_ids": [4] * 99}]), **SETTINGS, on_too_long="error")
    with pytest.raises(UserError, match="train record 0 has 100 tokens"):
        list(itertools.islice(RowStream(data, 0, 1, [(0, Position())]), 3))


def test_settings_come_from_a_config():
    parser = ArgumentParser()
    parser.add_subclass_arguments(L.LightningDataModule, "data")
    arguments = {"block_records": 7, "overhang": 2, "source": {"class_path": "dllm_var.datamodules.CmudictSource"}}
    config = {"class_path": "dllm_var.datamodules.StreamingDataModule", "init_args": arguments}
    data = parser.instantiate(parser.parse_object({"data": config})).data
    assert (data.block_records, data.overhang) == (7, 2)


SCRIPT = """
import json, sys
from conftest import ListSource
from test_streaming import RECORDS, run

if __name__ == "__main__":
    two = {"devices": 2, "strategy": "ddp"}
    source = ListSource(RECORDS)
    seen = [run(sys.argv[1], source, int(steps), checkpoint or None, two)[0]
            for steps, checkpoint in (("8", ""), ("3", ""), ("8", sys.argv[1] + "/3.ckpt"))]
    import torch.distributed as dist
    with open(f"{sys.argv[1]}/rank{dist.get_rank()}.json", "w") as file:  # two processes on one stdout would mix
        json.dump(seen, file)
"""


@pytest.mark.slow
def test_two_processes_resume_exactly(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent), str(here.parent.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "script.py", str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    by_rank = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    for whole, before, after in by_rank:
        assert before + after == whole
    assert by_rank[0][0] != by_rank[1][0]
