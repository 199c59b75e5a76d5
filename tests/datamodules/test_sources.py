import bz2
import gzip
import json
import lzma
import os
import shutil
import subprocess
import sys

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from dllm_var.datamodules import CmudictSource, DatasetSource, JsonlSource, ParquetSource, sources
from dllm_var.errors import UserError

RECORDS = [{"prompt": f"p{number}", "response": f"R{number}"} for number in range(100)]


def in_blocks(source, size, first=0, step=1):
    return dict(source.blocks("train", size, first, step))


def test_importing_sources_is_cheap():
    script = (
        "import sys; import dllm_var.datamodules, dllm_var.text.tokenizer;"
        "print([name for name in ('datasets', 'transformers', 'lightning', 'torch', 'pyarrow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_cmudict_splits_by_word():
    source = CmudictSource()
    everything = {}
    for split in source.splits:
        for record in source.records(split):
            everything.setdefault(record["prompt"], []).append((split, record["response"]))
    splits = {word: {split for split, _ in found} for word, found in everything.items()}
    assert len(everything) == 124_926
    assert all(len(found) == 1 for found in splits.values()), "a word is in one split"
    test = sorted(word for word, found in splits.items() if found == {"test"})
    assert len(test) == 2_000 == sum(found == {"validation"} for found in splits.values())
    # Fixed for good: figures are compared over releases on these very words.
    assert test[:3] == ["abandonments", "abbe", "abdicate"]
    answers = {word: [response for _, response in found] for word, found in everything.items()}
    assert answers["keyboard"] == ["K IY B AO R D"]
    assert answers["tomato"] == ["T AH M EY T OW", "T AH M AA T OW"]
    assert answers["aalborg"] == ["AO L B AO R G", "AA L B AO R G"], "comments are no phonemes"
    assert all(len(set(found)) == len(found) for found in answers.values()), "stress makes no other pronunciation"
    assert not any(mark in response for found in answers.values() for response in found for mark in "012#")


def test_jsonl_is_read_compressed_or_not(tmp_path):
    text = "".join(json.dumps(record) + "\n\n" for record in RECORDS).encode()
    for suffix, opener in (("", open), (".gz", gzip.open), (".xz", lzma.open), (".bz2", bz2.open)):
        with opener(tmp_path / f"data.jsonl{suffix}", "wb") as file:
            file.write(text)
        source = JsonlSource(str(tmp_path / f"data.jsonl{suffix}"), validation_size=0)
        assert list(source.records("train")) == RECORDS
        where, _ = list(source.located_records("train"))[2]
        assert where.endswith(f"data.jsonl{suffix}:5"), "blank lines count"


def test_paths_may_be_folders_patterns_and_lists(write_jsonl, tmp_path):
    write_jsonl(RECORDS[:50], "a.jsonl")
    write_jsonl(RECORDS[50:], "b.jsonl")
    (tmp_path / "notes.txt").write_text("no data")
    for path in (str(tmp_path), str(tmp_path / "*.jsonl"), [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]):
        assert list(JsonlSource(path, validation_size=0).records("train")) == RECORDS


def test_files_that_cannot_be_read_are_told(tmp_path):
    whole = gzip.compress(json.dumps(RECORDS).encode())
    for name, content in (("a.jsonl.gz", b"no gzip"), ("b.jsonl.gz", whole[:20]), ("c.jsonl.xz", b"no xz")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name} cannot be read"):
            list(JsonlSource(str(tmp_path / name), validation_size=0).records("train"))


@pytest.mark.parametrize(("size", "held_out"), [(0, 0), (7, 7), (0.1, 10), (None, 2)])
def test_a_missing_validation_split_is_carved_out(write_jsonl, size, held_out):
    source = JsonlSource(write_jsonl(RECORDS), validation_size=size, test_size=0)
    assert source.splits == (("train", "validation") if held_out else ("train",))
    validation = list(source.records("validation")) if held_out else []
    assert len(validation) == held_out
    rest = list(source.records("train"))
    assert sorted(map(str, validation + rest)) == sorted(map(str, RECORDS))
    assert list(source.records("train")) == rest


def test_a_test_split_is_carved_out_of_files_unless_it_is_declined(write_jsonl):
    path = write_jsonl(RECORDS)
    with_test, without = JsonlSource(path), JsonlSource(path, test_size=0)
    found = {split: list(with_test.records(split)) for split in with_test.splits}
    assert {split: len(records) for split, records in found.items()} == {"train": 96, "validation": 2, "test": 2}
    assert sorted(str(record) for records in found.values() for record in records) == sorted(map(str, RECORDS))
    assert found["validation"] == list(without.records("validation"))  # it does not move
    shuffled = JsonlSource(write_jsonl(RECORDS[::-1], "other.jsonl"))
    assert sorted(map(str, shuffled.records("test"))) == sorted(map(str, found["test"]))  # of the prompt alone
    assert DatasetSource("nowhere").test_size == 0  # a hub's data is left as it comes


@pytest.mark.parametrize(("count", "held_out"), [(1, (0, 0)), (2, (1, 0)), (3, (1, 1)), (60, (2, 2))])
def test_few_prompts_leave_some_for_training(write_jsonl, count, held_out):
    source = JsonlSource(write_jsonl(RECORDS[:count]))
    sizes = tuple(len(list(source.records(split))) for split in ("validation", "test"))
    assert sizes == held_out and len(list(source.records("train"))) == count - sum(held_out)


def test_the_same_prompt_never_stands_in_two_splits(write_jsonl):
    records = [{"prompt": f"p{number % 10}", "response": str(number)} for number in range(100)]
    source = JsonlSource(write_jsonl(records), validation_size=3, test_size=2)
    prompts = {split: {record["prompt"] for record in source.records(split)} for split in source.splits}
    assert {split: len(found) for split, found in prompts.items()} == {"train": 5, "validation": 3, "test": 2}
    assert sum(len(list(source.records(split))) for split in source.splits) == 100


def test_files_of_their_own_are_left_whole(write_jsonl):
    test_path = write_jsonl(RECORDS[80:], "test.jsonl")
    source = JsonlSource(write_jsonl(RECORDS[:80]), test_path=test_path, validation_size=5)
    assert list(source.records("test")) == RECORDS[80:]
    assert len(list(source.records("train"))) == 75


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"validation_size": -1}, "validation_size"),
        ({"test_size": 2.5}, "test_size"),
        ({"columns": {"question": "prompt"}}, "columns"),
        ({"validation_size": 60, "test_size": 40}, "take all of the 100 prompts"),
        ({"validation_path": "/nowhere/none.jsonl"}, r"validation_path: no file .*none\.jsonl"),
        ({"validation_path": ""}, "validation_path: no file ''"),
    ],
)
def test_settings_without_sense_are_refused(write_jsonl, arguments, message):
    with pytest.raises(UserError, match=message):
        list(JsonlSource(write_jsonl(RECORDS), **arguments).records("train"))


def test_columns_are_renamed(write_jsonl):
    path = write_jsonl([{"question": "q", "answer": "A", "prompt": "something else"}])
    source = JsonlSource(path, validation_size=0, columns={"prompt": "question", "response": "answer"})
    record = next(source.records("train"))
    assert (record["prompt"], record["response"]) == ("q", "A")


def test_the_fingerprint_follows_content_and_settings_but_not_the_place(write_jsonl, tmp_path, monkeypatch):
    monkeypatch.setattr("dllm_var.datamodules.sources.LARGE", 0)
    (tmp_path / "a").mkdir()
    write_jsonl(RECORDS, "a/data.jsonl")
    cache = tmp_path / "cache"

    def fingerprint(folder, **settings):
        source = JsonlSource(str(tmp_path / folder), **settings)
        source.cache_dir = cache
        return source.fingerprint()

    before = fingerprint("a")
    assert fingerprint("a", validation_size=5) != before
    (kept,) = (cache / "findings").iterdir()
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copy)
    assert fingerprint("b") == before and len(list((cache / "findings").iterdir())) == 2
    known = kept.read_text()
    kept.write_text('"kept"')
    assert "kept" in fingerprint("a"), "the file is not read again"
    kept.write_text(known[:9])  # damaged: found out again
    assert fingerprint("a") == before
    write_jsonl([*RECORDS[1:], RECORDS[0]], "a/data.jsonl")
    assert fingerprint("a") != before
    shutil.rmtree(cache)
    cache.write_text("no folder")
    assert fingerprint("b") == before


def test_what_is_no_file_is_told_at_once(tmp_path, write_jsonl):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    (tmp_path / "good").mkdir()
    write_jsonl(RECORDS, "good/data.jsonl")
    for link in ("x", "y"):
        (tmp_path / "good" / link).symlink_to(tmp_path)
    for path in ("pipe.jsonl", "*.jsonl", "gone.jsonl", "folder.jsonl", "none*.jsonl"):
        with pytest.raises(UserError, match=r"data\.source path: no file '.*jsonl'"):
            JsonlSource(str(tmp_path / path))
    with pytest.raises(UserError, match=r"data\.source path is an empty list"):
        JsonlSource([])
    assert len(JsonlSource(str(tmp_path / "good" / "**" / "*.jsonl")).own["train"]) == 1, "links lead back"


# -- several readers share a split -------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("sizes", [{"validation_size": 0}, {"validation_size": 10, "test_size": 5}])
def test_blocks_are_the_same_whoever_reads_them(tmp_path, suffix, sizes):
    opener = gzip.open if suffix else open
    for name, records in (("a", RECORDS[:37]), ("b", []), ("c", RECORDS[37:])):
        with opener(tmp_path / f"{name}.jsonl{suffix}", "wt") as file:
            file.write("\n \n".join(map(json.dumps, records)))
    source = JsonlSource(str(tmp_path), **sizes)
    whole = in_blocks(source, 9)
    assert [pair for chunk in whole.values() for pair in chunk] == list(source.located_records("train"))
    for readers, first in ((2, 0), (3, 5), (5, 1)):
        for reader in range(first, first + readers):
            own = {number: chunk for number, chunk in whole.items() if number in range(reader, 99, readers)}
            assert in_blocks(source, 9, reader, readers) == own


def test_a_reader_parses_no_lines_but_its_own(write_jsonl, monkeypatch):
    records = [{"prompt": str(number), "response": "R"} for number in range(20_000)]
    source = JsonlSource(write_jsonl(records), validation_size=0)
    parsed = []
    loads = json.loads
    monkeypatch.setattr(sources.json, "loads", lambda line: parsed.append(line) or loads(line))
    (block,) = source.blocks("train", 100, 199, 4)
    assert [record["prompt"] for _, record in block[1]] == [str(number) for number in range(19_900, 20_000)]
    assert len(parsed) == 100


def test_parquet(tmp_path):
    for name, records in (("a", RECORDS[:37]), ("b", RECORDS[37:])):
        table = pyarrow.Table.from_pylist([{**record, "score": 1} for record in records])
        parquet.write_table(table, tmp_path / f"{name}.parquet", row_group_size=10)
    source = ParquetSource(str(tmp_path), validation_size=0)
    assert list(source.records("train")) == RECORDS, "other columns are not read"
    assert list(source.located_records("train"))[38][0].endswith("b.parquet row 1")
    whole = in_blocks(source, 9)
    assert in_blocks(source, 9, 3, 4) == {number: whole[number] for number in (3, 7, 11)}
    (tmp_path / "b.parquet").write_text("none")
    with pytest.raises(UserError, match=r"b\.parquet cannot be read as Parquet"):
        list(source.records("train"))


def test_datasets_saved_to_disk(tmp_path):
    train = datasets.Dataset.from_list(RECORDS)
    train.save_to_disk(tmp_path / "one")
    assert len(list(DatasetSource(str(tmp_path / "one"), validation_size=10).records("train"))) == 90
    rows = in_blocks(DatasetSource(str(tmp_path / "one"), validation_size=0), 30, 1, 2)
    assert [record for chunk in rows.values() for _, record in chunk] == RECORDS[30:60] + RECORDS[90:]
    datasets.DatasetDict({"learn": train, "test": train.select(range(5))}).save_to_disk(tmp_path / "several")
    source = DatasetSource(str(tmp_path / "several"), train_split="learn", validation_size=0)
    assert source.splits == ("train", "test")
    assert list(source.records("test")) == RECORDS[:5]
    assert next(iter(source.located_records("test")))[0].endswith("several test row 0")
    assert DatasetSource(str(tmp_path / "several"), train_split="learn").fingerprint() != source.fingerprint()
    with pytest.raises(UserError, match="train_split to one of learn, test"):
        DatasetSource(str(tmp_path / "several")).fingerprint()
    with pytest.raises(UserError, match="no dataset"):
        DatasetSource(str(tmp_path / "nowhere")).fingerprint()


def test_datasets_are_streamed_by_shards(tmp_path):
    for shard in range(4):
        lines = [json.dumps(record) for record in RECORDS[25 * shard : 25 * shard + 25]]
        (tmp_path / f"train-{shard}.jsonl").write_text("\n".join(lines))
    source = DatasetSource(str(tmp_path), validation_size=0, streaming=True, columns={"text": "prompt"})
    expected = sorted(record["prompt"] for record in RECORDS)
    for readers in (1, 2, 3, 4):  # three cannot share four shards: each passes over the blocks of the others
        blocks = [list(source.blocks("train", 7, reader, readers)) for reader in range(readers)]
        assert sorted(record["text"] for own in blocks for _, chunk in own for _, record in chunk) == expected
        assert all(number % readers == reader for reader, own in enumerate(blocks) for number, _ in own)
        assert list(source.blocks("train", 7, 1 + readers, readers)) == blocks[1 % readers][1 + (readers == 1) :]
    with pytest.raises(UserError, match="none can be carved out of a stream: set validation_split"):
        list(DatasetSource(str(tmp_path), streaming=True).records("train"))
