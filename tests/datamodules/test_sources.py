import bz2
import gzip
import json
import lzma
import os
import shutil
import subprocess
import sys

import pytest

from dllm_var.datamodules import BadRecord, CmudictSource, DatasetSource, JsonlSource, ParquetSource, sources
from dllm_var.errors import UserError

RECORDS = [{"prompt": f"p{number}", "response": f"R{number}"} for number in range(100)]


def test_importing_sources_is_cheap():
    script = (
        "import sys; import dllm_var.datamodules, dllm_var.text.tokenizer;"
        "print([name for name in ('datasets', 'transformers', 'lightning', 'torch', 'pyarrow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_cmudict_splits_by_word():
    source = CmudictSource()
    by_split = {split: list(source.records(split)) for split in source.splits}
    words = {split: {record["prompt"] for record in records} for split, records in by_split.items()}
    assert len(words["validation"]) == len(words["test"]) == 2_000
    assert sum(map(len, words.values())) == 124_926
    assert (
        not words["train"] & words["validation"] | words["train"] & words["test"] | words["validation"] & words["test"]
    )
    for records in by_split.values():
        pairs = [(record["prompt"], record["response"]) for record in records]
        assert len(set(pairs)) == len(pairs), "pronunciations that differ in stress alone are one"
    everything = {}
    for records in by_split.values():
        for record in records:
            everything.setdefault(record["prompt"], []).append(record["response"])
    assert everything["keyboard"] == ["K IY B AO R D"]
    assert everything["tomato"] == ["T AH M EY T OW", "T AH M AA T OW"]
    assert everything["aalborg"] == ["AO L B AO R G", "AA L B AO R G"], "comments are no phonemes"
    assert not any(digit in phones for all_phones in everything.values() for phones in all_phones for digit in "012#")
    # Fixed for good: figures are compared over releases on these very words.
    assert sorted(words["test"])[:3] == ["abandonments", "abbe", "abdicate"]


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


def test_lines_that_are_no_json_are_told_with_their_place(write_jsonl):
    path = write_jsonl([json.dumps(RECORDS[0]), '{"prompt": ', "[1]", json.dumps(RECORDS[1])])
    found = list(JsonlSource(path, validation_size=0).located_records("train"))
    assert found[1][0] == f"{path}:2"
    assert isinstance(found[1][1], BadRecord)
    assert "valid JSON" in found[1][1].reason


def test_files_that_cannot_be_read_are_told(tmp_path):
    whole = gzip.compress(json.dumps(RECORDS).encode())
    for name, content in (("a.jsonl.gz", b"no gzip"), ("b.jsonl.gz", whole[:20]), ("c.jsonl.xz", b"no xz")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name} cannot be read"):
            list(JsonlSource(str(tmp_path / name), validation_size=0).records("train"))


def test_missing_files_are_told_at_once(tmp_path):
    with pytest.raises(UserError, match=r"validation_path: no file .*none\.jsonl"):
        JsonlSource(__file__, validation_path=str(tmp_path / "none.jsonl"))


@pytest.mark.parametrize(("size", "held_out"), [(0, 0), (7, 7), (0.1, 10), (None, 2)])
def test_a_missing_validation_split_is_carved_out(write_jsonl, size, held_out):
    source = JsonlSource(write_jsonl(RECORDS), validation_size=size)
    assert source.splits == (("train", "validation") if held_out else ("train",))
    validation = list(source.records("validation")) if held_out else []
    assert len(validation) == held_out
    rest = list(source.records("train"))
    assert sorted(map(str, validation + rest)) == sorted(map(str, RECORDS))
    assert list(source.records("train")) == rest


def test_the_same_prompt_never_stands_in_two_splits(write_jsonl):
    records = [{"prompt": f"p{number % 10}", "response": str(number)} for number in range(100)]
    source = JsonlSource(write_jsonl(records), validation_size=3, test_size=2)
    prompts = {split: {record["prompt"] for record in source.records(split)} for split in source.splits}
    assert {split: len(found) for split, found in prompts.items()} == {"train": 5, "validation": 3, "test": 2}
    assert sum(len(list(source.records(split))) for split in source.splits) == 100


def test_files_of_their_own_are_left_whole(write_jsonl):
    source = JsonlSource(
        write_jsonl(RECORDS[:80]), test_path=write_jsonl(RECORDS[80:], "test.jsonl"), validation_size=5
    )
    assert list(source.records("test")) == RECORDS[80:]
    assert len(list(source.records("train"))) == 75


@pytest.mark.parametrize("sizes", [{"validation_size": 100}, {"validation_size": 60, "test_size": 40}])
def test_nothing_left_for_training_is_an_error(write_jsonl, sizes):
    with pytest.raises(UserError, match="take all of the 100 prompts"):
        list(JsonlSource(write_jsonl(RECORDS), **sizes).records("train"))


@pytest.mark.parametrize(
    "arguments", [{"validation_size": -1}, {"test_size": 2.5}, {"columns": {"question": "prompt"}}]
)
def test_settings_without_sense_are_refused(write_jsonl, arguments):
    with pytest.raises(UserError, match=next(iter(arguments))):
        JsonlSource(write_jsonl(RECORDS), **arguments)


def test_columns_are_renamed(write_jsonl):
    path = write_jsonl([{"question": "q", "answer": "A", "prompt": "something else"}])
    source = JsonlSource(path, validation_size=0, columns={"prompt": "question", "response": "answer"})
    record = next(source.records("train"))
    assert (record["prompt"], record["response"]) == ("q", "A")


def test_the_fingerprint_follows_content_and_settings(write_jsonl):
    path = write_jsonl(RECORDS)
    before = JsonlSource(path).fingerprint()
    assert JsonlSource(path).fingerprint() == before
    assert JsonlSource(path, validation_size=5).fingerprint() != before
    write_jsonl([*RECORDS[:-1], {"prompt": "p99", "response": "S99"}])
    assert JsonlSource(path).fingerprint() != before


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    messages = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "B"}]] * 3
    table = pyarrow.table({"messages": messages, "score": [1, 2, 3]})
    parquet.write_table(table, tmp_path / "data.parquet", row_group_size=2)
    source = ParquetSource(str(tmp_path), validation_size=0)
    assert [record["messages"] for record in source.records("train")] == messages
    assert [where.rpartition(" row ")[2] for where, _ in source.located_records("train")] == ["0", "1", "2"]
    (tmp_path / "data.parquet").write_text("none")
    with pytest.raises(UserError, match="no Parquet file"):
        list(ParquetSource(str(tmp_path), validation_size=0).records("train"))


def test_datasets_saved_to_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    train = datasets.Dataset.from_list(RECORDS)
    train.save_to_disk(tmp_path / "one")
    source = DatasetSource(str(tmp_path / "one"), validation_size=10)
    assert len(list(source.records("train"))) == 90
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
    rows = DatasetSource(str(tmp_path / "one"), validation_size=0)
    assert [[record["prompt"] for _, record in chunk] for _, chunk in rows.blocks("train", 30, 1, 2)] == [
        [f"p{number}" for number in range(30, 60)],
        [f"p{number}" for number in range(90, 100)],
    ]


def test_datasets_are_streamed_by_shards(tmp_path):
    pytest.importorskip("datasets")
    for shard in range(4):
        lines = [json.dumps(record) for record in RECORDS[25 * shard : 25 * shard + 25]]
        (tmp_path / f"train-{shard}.jsonl").write_text("\n".join(lines))
    source = DatasetSource(str(tmp_path), validation_size=0, streaming=True)
    for readers in (1, 2, 3, 4):  # three cannot share four shards: each passes over the blocks of the others
        blocks = [list(source.blocks("train", 7, reader, readers)) for reader in range(readers)]
        assert sorted(str(record) for own in blocks for _, chunk in own for _, record in chunk) == sorted(
            map(str, RECORDS)
        )
        assert all(number % readers == reader for reader, own in enumerate(blocks) for number, _ in own)
        assert list(source.blocks("train", 7, 1 + readers, readers)) == blocks[1 % readers][1 + (readers == 1) :]
    with pytest.raises(UserError, match="none can be carved out of a stream: set validation_split"):
        list(DatasetSource(str(tmp_path), streaming=True).records("train"))


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("sizes", [{"validation_size": 0}, {"validation_size": 10, "test_size": 5}])
def test_blocks_are_the_same_whoever_reads_them(tmp_path, suffix, sizes, monkeypatch):
    monkeypatch.setattr("dllm_var.datamodules.sources.STRIDE", 8)
    opener = gzip.open if suffix else open
    for name, records in (("a", RECORDS[:37]), ("b", []), ("c", RECORDS[37:])):
        with opener(tmp_path / f"{name}.jsonl{suffix}", "wt") as file:
            file.write("\n \n".join(map(json.dumps, records)))
    source = JsonlSource(str(tmp_path), **sizes)
    located = list(source.located_records("train"))
    whole = dict(source.blocks("train", 9))
    assert [pair for chunk in whole.values() for pair in chunk] == located
    for readers, first in ((2, 0), (3, 5), (5, 1)):
        for reader in range(first, first + readers):
            assert dict(source.blocks("train", 9, reader, readers)) == {
                number: chunk
                for number, chunk in whole.items()
                if number >= reader and (number - reader) % readers == 0
            }


def test_a_reader_parses_its_own_lines_and_reads_no_others(write_jsonl, monkeypatch):
    source = JsonlSource(
        write_jsonl([{"prompt": str(number), "response": "R"} for number in range(50_000)]), validation_size=0
    )
    source.fingerprint()
    parsed = []
    loads = json.loads
    monkeypatch.setattr(sources.json, "loads", lambda line: parsed.append(line) or loads(line))
    (block,) = source.blocks("train", 100, 499, 4)
    assert [record["prompt"] for _, record in block[1]] == [str(number) for number in range(49_900, 50_000)]
    assert len(parsed) == 100


def test_parquet_is_read_from_the_middle(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for name, records in (("a", RECORDS[:37]), ("b", RECORDS[37:])):
        parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / f"{name}.parquet", row_group_size=10)
    source = ParquetSource(str(tmp_path), validation_size=0)
    whole = dict(source.blocks("train", 9))
    assert [record for chunk in whole.values() for _, record in chunk] == RECORDS
    assert dict(source.blocks("train", 9, 3, 4)) == {number: whole[number] for number in (3, 7, 11)}


def test_data_may_be_moved(write_jsonl, tmp_path, monkeypatch):
    monkeypatch.setattr("dllm_var.datamodules.sources.LARGE", 0)
    (tmp_path / "a").mkdir()
    write_jsonl(RECORDS, "a/data.jsonl")
    cache = tmp_path / "cache"

    def fingerprint(folder):
        source = JsonlSource(str(tmp_path / folder))
        source.cache_dir = cache
        return source.fingerprint()

    before = fingerprint("a")
    (kept,) = (cache / "files").iterdir()
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copy)
    assert fingerprint("b") == before and len(list((cache / "files").iterdir())) == 2
    kept.write_text(kept.read_text().replace("1", "2"))  # damaged: found out again
    assert fingerprint("a") == before
    with monkeypatch.context() as patched:
        patched.setattr("dllm_var.datamodules.sources._read", None)
        assert fingerprint("a") == before, "from the cache"
    write_jsonl([*RECORDS[1:], RECORDS[0]], "a/data.jsonl")
    assert fingerprint("a") != before
    shutil.rmtree(cache)
    cache.write_text("no folder")
    assert fingerprint("b") == before


def test_what_is_no_regular_file_is_told_at_once(tmp_path, write_jsonl):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    (tmp_path / "good").mkdir()
    write_jsonl(RECORDS, "good/data.jsonl")
    for link in ("x", "y"):
        (tmp_path / "good" / link).symlink_to(tmp_path)
    for path, message in (
        ("pipe.jsonl", "no regular file"),
        ("*.jsonl", "no regular file"),
        ("loop", "broken link"),
        ("gone.jsonl", "broken link"),
        ("x" * 300, "cannot be read: File name too long"),
        ("a\0b", "no file|null"),
        ("folder.jsonl", "no file"),
        ("none*.jsonl", "no file"),
    ):
        with pytest.raises(UserError, match=f"data.source path: .*({message})") as error:
            JsonlSource(str(tmp_path / path))
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"data\.source path: no file ''"):
        JsonlSource("")
    with pytest.raises(UserError, match="~nobody_here"):
        JsonlSource("~nobody_here/data.jsonl")
    assert len(JsonlSource(str(tmp_path / "good" / "**" / "*.jsonl")).files["train"]) == 1, "links lead back"
