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

from dllm_var.datamodules import CmudictSource, JsonlSource, PackedDataModule
from dllm_var.errors import UserError

WORDS = [{"prompt": "a" * (1 + n % 9), "response": " ".join(["K"] * (1 + n % 7))} for n in range(200)]


@pytest.fixture
def make(list_source):
    def make(records=WORDS, splits=None, **kwargs):
        settings = {"context_length": 32, "batch_size": 4, **kwargs}
        return PackedDataModule(list_source(records, **(splits or {})), **settings)

    return make


def test_cmudict_is_the_default():
    data = PackedDataModule(context_length=128, packing="best_fit", overhang=8)
    data.prepare_data()
    report = data.report()
    assert report["samples"] == 129_371
    assert report["utilisation"] > 0.96
    assert (report["cut"], report["dropped"], report["skipped"], report["unknown_tokens"]) == (0, 0, 0, 0)
    assert PackedDataModule(context_length=128).report()["utilisation"] > 0.99
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].shape == (32, 128)
    assert data.tokenizer.id_to_token(data.tokenizer.terminator_id) == "<eos>"


def test_held_out_examples_are_fixed_and_gather_all_answers():
    data = PackedDataModule(CmudictSource(), seed=3)
    examples = data.held_out("test")
    assert len(examples) == 2_000
    assert data.held_out("test", 7) == examples[:7] == PackedDataModule(CmudictSource(), seed=4).held_out("test", 7)
    assert sum(len(example.references) for example in examples) > 2_000
    for example in examples[:20]:
        assert data.tokenizer.encode(example.prompt) == example.prompt_ids
        assert not any(data.tokenizer.terminator_id in reference for reference in example.references)
    assert {example.prompt for example in examples} == {record["prompt"] for record in data.source.records("test")}


def test_conversations_are_held_out_up_to_their_last_answer(make):
    turns = [("user", "ab"), ("assistant", "K"), ("user", "c"), ("assistant", "IY K")]
    data = make(splits={"validation": [{"messages": [{"role": role, "content": text} for role, text in turns]}]})
    (example,) = data.held_out("validation")
    spell = data.tokenizer.encode
    assert example.prompt_ids == [*spell("ab"), *spell("K"), data.tokenizer.terminator_id, *spell("c")]
    assert example.references == [spell("IY K")]


def test_samples_without_a_prompt_are_not_held_out_examples(make):
    data = make(splits={"validation": [{"text": "K IY"}, {"prompt": "", "response": "K"}, WORDS[0]]})
    assert [example.prompt for example in data.held_out("validation")] == ["a"]


def test_held_out_splits_must_exist(make):
    with pytest.raises(UserError, match="no split test"):
        make().held_out("test")
    data = make()
    assert data.val_dataloader() == data.test_dataloader() == []
    assert make(splits={"validation": []}).val_dataloader() == []


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_run_on_without_loss_or_repetition(make, workers):
    data = make(num_workers=workers, overhang=3)
    loader = data.train_dataloader()
    rows = []
    for _ in range(3):
        batches = list(loader)
        loader.sampler.trained(int(batches[-1]["row"][0]))  # what the Trainer's hook does with every batch
        assert len(batches) == len(loader)
        rows += [row for batch in batches for row in batch["row"].tolist()]
        for batch in batches[:3]:
            again = data.rows("train").__getitems__(batch["row"].tolist())
            assert all(torch.equal(batch[name], again[name]) for name in again)
    assert rows == list(range(len(rows)))
    assert len(loader) * 4 >= len(data.rows("train"))


def test_validation_rows_do_not_depend_on_the_training_seed(make):
    splits = {"validation": WORDS[:50]}
    first, second = (list(make(splits=splits, seed=seed, overhang=3).val_dataloader()) for seed in (0, 1))
    assert all(torch.equal(a[name], b[name]) for a, b in zip(first, second, strict=True) for name in a)
    rows = [row for batch in first for row in batch["row"].tolist()]
    assert rows == list(range(len(rows)))


LONG = [
    {"input_ids": [4] * 3 + [50] * 10, "prompt_length": 3},
    {"input_ids": [4] * 5 + [50] * 40, "prompt_length": 5},
    {"input_ids": [4] * 40 + [50] * 5, "prompt_length": 40},
    {"messages": [{"role": role, "content": text} for role, text in (
        ("user", "ab"), ("assistant", "K K"), ("user", "c" * 40), ("assistant", "K"))]},
    {"messages": [{"role": role, "content": text} for role, text in (
        ("user", "ab"), ("assistant", "K " * 40), ("user", "c"), ("assistant", "K"))]},
]  # fmt: skip


def segments(data):
    batch = data.rows("train").__getitems__(range(len(data.rows("train"))))
    found = []
    for row, segment in itertools.product(range(len(batch["row"])), range(32)):
        at = batch["segment_ids"][row] == segment
        if at.any():
            found.append((batch["input_ids"][row, at].tolist(), int(batch["supervised"][row, at].sum())))
    return sorted(found)


def test_samples_longer_than_a_row_are_dropped_and_counted(make, recwarn):
    data = make(LONG, packing="best_fit")
    report = data.report()
    assert (report["samples"], report["dropped"], report["truncated"]) == (1, 4, 0)
    assert "4 too long and dropped" in data.summary()


def test_truncated_samples_keep_their_terminator_and_an_answer(make):
    data = make(LONG, packing="best_fit", on_too_long="truncate", overhang=2)
    report = data.report()
    assert (report["samples"], report["dropped"], report["truncated"]) == (4, 1, 3)
    end, letters, k = data.tokenizer.terminator_id, data.tokenizer.encode("ab"), data.tokenizer.encode("K")
    mask = data.tokenizer.mask_id
    bare = sorted(([index for index in ids if index != mask], supervised) for ids, supervised in segments(data))
    assert bare == sorted(
        [
            ([4] * 3 + [50] * 10 + [end], 11),
            ([4] * 5 + [50] * 26 + [end], 27),  # cut before the terminator
            ([*letters, *k, *k, end], 3),  # the second answer does not fit, the first does
            ([*letters, *(k * 29), end], 30),  # the first one does not fit either: cut
        ]
    )


@pytest.mark.parametrize("context", range(4, 24))
def test_truncation_never_leaves_a_false_or_missing_end(make, context):
    turns = [
        ("user", "abc"),
        ("assistant", "K K"),
        ("user", "de"),
        ("assistant", "IY"),
        ("user", "f"),
        ("assistant", "L L"),
    ]
    data = make(
        [{"messages": [{"role": role, "content": text} for role, text in turns]}, {"input_ids": [4]}],
        context_length=context,
        packing="best_fit",
        on_too_long="truncate",
        canvas=2,
    )
    whole, ends = data.table("train").ids(0), data.tokenizer.terminator_ids
    flags = data.table("train").supervised[: len(whole)].tolist()
    samples = data.rows("train").sections[0]
    if 0 not in samples.index:
        assert context <= 4, "nothing but the prompt fits"
        return
    body, added, start = int(samples.body[0]), int(samples.ends[0]), int(samples.answer_start[0])
    assert body + added <= context
    assert flags[start]
    assert not flags[start - 1]
    assert all(flags[start:body])
    assert added == (whole[body - 1] not in ends), "one end, the sample's own or an added one"
    data.rows("train").__getitems__(range(len(data.rows("train"))))


def test_long_samples_may_be_an_error_with_their_place(write_jsonl):
    source = JsonlSource(write_jsonl([LONG[0], LONG[1]]), validation_size=0)
    data = PackedDataModule(source, CmudictSource.default_tokenizer, context_length=32, on_too_long="error")
    with pytest.raises(UserError, match=r"data\.jsonl:2 has 46 tokens, more than data\.context_length=32"):
        data.rows("train")


def test_long_samples_may_be_cut_over_rows(make):
    data = make(LONG, on_too_long="cut")
    report = data.report()
    assert (report["samples"], report["dropped"]) == (5, 0)
    assert report["cut"] >= 4
    assert report["tokens"] == data.table("train").offsets[-1]


def test_skipped_records_are_counted_and_shown(make):
    with pytest.raises(UserError, match="ListSource train record 1 lacks"):
        make([WORDS[0], {"prompt": "a"}]).rows("train")
    data = make([WORDS[0], {"prompt": "a"}], on_bad_record="skip")
    assert data.report()["skipped"] == 1
    assert "1 bad records skipped, the first: ListSource train record 1 lacks the field 'response'" in data.summary()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "data.batch_size is 0"),
        ({"context_length": 1}, "data.context_length is 1"),
        ({"context_length": 48_000_000_000}, "data.context_length is 48000000000; it must be below"),
        ({"overhang": -1}, "data.overhang is -1"),
        ({"canvas": None}, "data.canvas is None; it must be at least 0"),
        ({"overhang": 32}, "less than data.context_length, 32"),
        ({"eos_padding": 99}, "data.eos_padding is 99"),
        ({"packing": "best_fit", "on_too_long": "cut"}, "data.packing=concat"),
        ({"tokenizer": "./nowhere"}, "nowhere does not exist"),
        ({"chat": True}, "no chat template"),
        ({"records": []}, "no records that can be used"),
        ({"records": LONG[1:3]}, r"all 2 samples .* raise it \(the shortest has 46 tokens\)"),
    ],
)
def test_mistakes_are_told_in_one_line(make, settings, message):
    with pytest.raises(UserError, match=message) as error:
        make(**settings).rows("train")
    assert "\n" not in str(error.value)


def test_a_source_without_tokenizer_asks_for_one(write_jsonl):
    with pytest.raises(UserError, match=r"data\.tokenizer is not set, and JsonlSource has none"):
        PackedDataModule(JsonlSource(write_jsonl(WORDS)))


def test_settings_come_from_a_config(write_jsonl):
    parser = ArgumentParser()
    parser.add_class_arguments(PackedDataModule, "data")
    arguments = {"path": write_jsonl(WORDS), "validation_size": 3}
    source = {"class_path": "dllm_var.datamodules.JsonlSource", "init_args": arguments}
    settings = {"source": source, "tokenizer": CmudictSource.default_tokenizer, "context_length": 64}
    data = parser.instantiate(parser.parse_object({"data": settings})).data
    assert isinstance(data.source, JsonlSource)
    assert data.rows("train").context_length == 64
    assert len(data.source.files["train"]) == 1


class Recorder(L.LightningModule):
    """Keeps which rows it was given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = {"train": [], "validation": [], "test": []}

    def record(self, split, batch):
        rows = self.all_gather(batch["row"]).flatten().tolist()
        self.seen[split].append(rows)
        return self.weight.sum() * batch["supervised"].sum()

    def training_step(self, batch, index):
        return self.record("train", batch)

    def validation_step(self, batch, index):
        self.record("validation", batch)

    def test_step(self, batch, index):
        self.record("test", batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(tmp_path, **kwargs):
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return L.Trainer(default_root_dir=tmp_path, accelerator="cpu", **quiet, **kwargs)


def run(tmp_path, data, **kwargs):
    model = Recorder()
    fit = trainer(tmp_path, max_epochs=3, num_sanity_val_steps=0, **kwargs)
    fit.fit(model, datamodule=data)
    fit.test(model, datamodule=data)
    return model.seen


def check(seen, data, ranks):
    train = [row for rows in seen["train"] for row in rows]
    assert train == list(range(len(train)))
    per_epoch = -(-len(data.rows("train")) // (data.batch_size * ranks))
    assert len(seen["train"]) == 3 * per_epoch
    for split, times in (("validation", 3), ("test", 1)):
        rows = [row for step in seen[split] for row in step if row >= 0]
        assert sorted(rows) == sorted(list(range(len(data.rows(split)))) * times)


@pytest.fixture
def split_data(make):
    splits = {"validation": WORDS[:43], "test": WORDS[:31]}
    return make(splits=splits, overhang=3, packing="best_fit")


def test_under_a_trainer(tmp_path, split_data):
    check(run(tmp_path, split_data, devices=1), split_data, 1)


SCRIPT = """
import json, sys
from conftest import ListSource
from dllm_var.datamodules import PackedDataModule
from test_packed import WORDS, run

if __name__ == "__main__":
    source = ListSource(WORDS, validation=WORDS[:43], test=WORDS[:31])
    data = PackedDataModule(source, context_length=32, batch_size=4, overhang=3, packing="best_fit")
    seen = run(sys.argv[1], data, devices=2, strategy="ddp")
    if data.trainer.global_rank == 0:
        print(json.dumps(seen))
"""


@pytest.mark.slow
def test_under_a_trainer_with_two_processes(tmp_path, split_data):
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
    assert done.stderr.count("data: 200 samples") == 1, "the summary is shown once"
    check(json.loads(done.stdout.strip().splitlines()[-1]), split_data, 2)
