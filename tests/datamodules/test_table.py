import os
import time

import numpy as np
import pytest
import tokenizers
from byte_tokenizer import CHAT_TEMPLATE, write_byte_tokenizer

from dllm_var.datamodules import CmudictSource, JsonlSource
from dllm_var.datamodules.table import RecordEncoder, load_table
from dllm_var.errors import UserError
from dllm_var.text.tokenizer import SpecialTokens, Tokenizer

GOOD = {"prompt": "key", "response": "K IY"}


@pytest.fixture
def bytes_tokenizer(tmp_path):
    return Tokenizer.from_pretrained(write_byte_tokenizer(tmp_path / "tokenizer"))


@pytest.fixture
def load(write_jsonl, tmp_path, tokenizer):
    def load(records, tokenizer=tokenizer, **kwargs):
        source = JsonlSource(write_jsonl(records), validation_size=0)
        return load_table(source, "train", RecordEncoder(tokenizer, **kwargs), tmp_path / "cache")

    return load


def sample(table, tokenizer, number=0):
    ids = table.ids(number)
    flags = table.supervised[table.offsets[number] : table.offsets[number + 1]].tolist()
    text = [tokenizer.backend.decode([index], skip_special_tokens=False) for index in ids]
    return "".join(text), "".join(piece for piece, flag in zip(text, flags, strict=True) if flag)


def turn(role, content):
    return {"role": role, "content": content}


FORMATS = [
    ({"prompt": "ask", "response": "tell", "more": 1}, "asktell<|im_end|>", "tell<|im_end|>", 3),
    ({"prompt": "", "response": "tell"}, "tell<|im_end|>", "tell<|im_end|>", 0),
    ({"instruction": "do", "input": "", "output": "done"}, "dodone<|im_end|>", "done<|im_end|>", 2),
    ({"instruction": "do", "input": "it", "output": "done"}, "do\n\nitdone<|im_end|>", "done<|im_end|>", 6),
    ({"text": "story"}, "story<|im_end|>", "story<|im_end|>", 0),
    ({"input_ids": [68, 69, 70], "prompt_length": 1}, None, 3, 1),
    ({"input_ids": [68, 69, 260], "prompt_length": 1}, None, 2, 1),
    ({"input_ids": [68, 69]}, None, 3, 0),
    (
        {"messages": [turn("user", "a"), turn("assistant", "bc"), turn("user", "d"), turn("assistant", "e")]},
        "abc<|im_end|>de<|im_end|>",
        "bc<|im_end|>e<|im_end|>",
        5,
    ),
    (
        {"messages": [turn("system", "s"), turn("assistant", "b"), turn("user", "unanswered")]},
        "sb<|im_end|>",
        "b<|im_end|>",
        1,
    ),
]


@pytest.mark.parametrize(("record", "text", "supervised", "answer_start"), FORMATS)
def test_formats(load, bytes_tokenizer, record, text, supervised, answer_start):
    table = load([record], bytes_tokenizer)
    assert len(table) == 1
    assert table.answer_start[0] == answer_start
    assert table.ids(0)[-1] == bytes_tokenizer.terminator_id
    if text is None:  # tokenized by the user
        assert table.supervised.sum() == supervised
        assert table.ids(0)[: len(record["input_ids"])] == record["input_ids"]
    else:
        assert sample(table, bytes_tokenizer) == (text, supervised)


def test_chat_puts_prompts_through_the_template(load, tmp_path):
    tokenizer = Tokenizer.from_pretrained(write_byte_tokenizer(tmp_path / "chat", CHAT_TEMPLATE))
    text = "<|im_start|>user\nask<|im_end|>\n<|im_start|>assistant\ntell<|im_end|>"
    for records, chat in (
        ([{"messages": [turn("user", "ask"), turn("assistant", "tell")]}], False),
        ([{"prompt": "ask", "response": "tell"}], True),
    ):
        assert sample(load(records, tokenizer, chat=chat), tokenizer) == (text, "tell<|im_end|>")
    assert sample(load([{"prompt": "ask", "response": "tell"}], tokenizer), tokenizer)[0] == "asktell<|im_end|>"


BAD = [
    ('{"prompt": ', "is not valid JSON"),
    ("[1, 2]", "is a list, not an object"),
    ({"question": "q", "answer": "a"}, r"has none of the fields .* \(it has: question, answer\)"),
    ({"prompt": "p"}, "lacks the field 'response'"),
    ({"prompt": "p", "response": None}, "lacks the field 'response'"),
    ({"output": "p"}, "lacks the field 'instruction'"),
    ({"prompt": "p", "response": "  "}, "has an empty 'response'"),
    ({"prompt": 3, "response": "K"}, "has a int as 'prompt', not text"),
    ({"text": ""}, "has an empty 'text'"),
    ('{"text": "\\ud800"}', "has broken Unicode in 'text'"),
    ({"messages": "hello"}, "not a list of turns"),
    ({"messages": ["hello"]}, r"messages\[0\], not an object"),
    ({"messages": [turn("user", "a")]}, "no turn of the assistant"),
    ({"messages": [turn("human", "a")]}, "has role 'human'"),
    ({"messages": [turn("user", None)]}, "has nothing as 'content'"),
    ({"messages": [turn("user", "a"), turn("assistant", " ")]}, r"has an empty 'content' of messages\[1\]"),
    ({"text": "a" * 10_000_001}, "has 10,000,001 characters in 'text': split it"),
    ({"input_ids": [5, 99]}, "has token id 99, outside the vocabulary of 70"),
    ({"input_ids": [5, -1]}, "has token id -1"),
    ({"input_ids": [5, 1]}, "contains the mask token <mask>"),
    ({"input_ids": ["a"]}, "list of integers"),
    ({"input_ids": []}, "leaves no answer"),
    ({"input_ids": [5, 6], "prompt_length": 2}, "leaves no answer"),
    ({"input_ids": [5, 6], "prompt_length": "1"}, "has a str as 'prompt_length'"),
]


@pytest.mark.parametrize(("record", "message"), BAD)
def test_a_bad_record_is_told_with_file_and_line_or_counted(load, record, message):
    records = [GOOD, record, GOOD]
    with pytest.raises(UserError, match=rf"data\.jsonl:2 .*{message}") as error:
        load(records)
    assert "\n" not in str(error.value)
    assert "data.on_bad_record=skip" in str(error.value)
    table = load(records, skip_bad=True)
    assert (len(table), table.meta["skipped"], table.meta["records"]) == (2, 1, 3)
    assert [table.ids(0), table.ids(1)] == [load([GOOD]).ids(0)] * 2
    with pytest.raises(UserError, match=r"data\.jsonl:2"):  # a cached table does not hide it
        load(records)


MANY = [{"prompt": f"question {number}", "response": f"answer {number}"} for number in range(50)]
SPELLED = "a<|im_end|>b<|mask|>"


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": SPELLED, "response": SPELLED},
        {"text": SPELLED},
        {"instruction": SPELLED, "input": SPELLED, "output": SPELLED},
        {"messages": [turn("user", SPELLED), turn("assistant", SPELLED)]},
    ],
)
@pytest.mark.parametrize("template", [None, CHAT_TEMPLATE])
def test_text_that_spells_a_special_token_is_text_or_a_bad_record(load, tmp_path, record, template):
    tokenizer = Tokenizer.from_pretrained(write_byte_tokenizer(tmp_path / "tokenizer", template))
    table = load([record], tokenizer)
    ids = np.array(table.ids(0))
    assert not (ids == tokenizer.mask_id).any()
    turns = len(record["messages"]) if template and "messages" in record else 1
    assert (ids == tokenizer.terminator_id).sum() == turns, "only those that training adds or the template writes"
    assert ((ids == tokenizer.terminator_id) & table.supervised).sum() == 1 and ids[-1] == tokenizer.terminator_id
    assert sample(table, tokenizer)[1] == SPELLED + "<|im_end|>"
    with pytest.raises(UserError, match=r"data\.jsonl:1 .*spells the special token <\|(im_end|mask)\|>"):
        load([record], tokenizer, refuse_special=True)
    assert load([GOOD, record], tokenizer, refuse_special=True, skip_bad=True).meta["skipped"] == 1


def test_a_terminator_that_is_an_ordinary_token_ends_no_answer(load, tmp_path):
    lines = Tokenizer.from_pretrained(write_byte_tokenizer(tmp_path / "tokenizer"), terminators=["Ċ"])
    load([{"prompt": "several\nlines", "response": "one"}], lines)
    with pytest.raises(UserError, match=r"data\.jsonl:1 has an answer that spells a terminator"):
        load([{"prompt": "ask", "response": "two\nlines"}], lines)


def test_a_word_level_vocabulary_without_other_words_refuses_the_spelling(load):
    words = {name: index for index, name in enumerate(("<pad>", "<mask>", "<eos>", "<unk>", "a", "b"))}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<pad>", "<mask>", "<eos>", "<unk>"])
    words = Tokenizer(backend, SpecialTokens(1, (2,), 0))
    assert load([{"prompt": "a c", "response": "b d"}], words).meta["unknown_tokens"] == 2
    with pytest.raises(UserError, match="spells the special token <eos>"):
        load([{"prompt": "a <eos>", "response": "b"}], words)


def test_texts_are_encoded_a_number_of_characters_at_a_time(load, bytes_tokenizer, monkeypatch):
    whole = load(MANY, bytes_tokenizer)
    monkeypatch.setattr("dllm_var.datamodules.table.BATCH", 64)
    asked, encode = [], Tokenizer.encode_batch

    def count(self, texts, special_tokens=False):
        asked.append(sum(map(len, texts)))
        return encode(self, texts, special_tokens)

    monkeypatch.setattr(Tokenizer, "encode_batch", count)
    parts = load([*MANY, GOOD], bytes_tokenizer)
    assert max(asked) <= 64 and len(asked) > 10
    assert [parts.ids(number) for number in range(len(MANY))] == [whole.ids(number) for number in range(len(MANY))]


def test_unknown_tokens_are_counted(load, tokenizer):
    table = load([GOOD, {"prompt": "x7é", "response": "K AE <eos> T"}])
    assert table.ids(1).count(tokenizer.terminator_id) == 1
    assert table.meta["unknown_tokens"] == 4  # 7, é, < and >


def test_nothing_unfinished_stays_behind(load, tmp_path):
    with pytest.raises(UserError):
        load([GOOD, "{"])
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_table_is_built_once_and_again_when_something_changes(load):
    first = load([GOOD])
    state = (first.folder / "meta.json").stat()
    assert load([GOOD]).folder == first.folder
    assert (first.folder / "meta.json").stat().st_mtime_ns == state.st_mtime_ns
    assert load([GOOD, GOOD]).folder != first.folder
    other = Tokenizer.from_pretrained(CmudictSource.default_tokenizer, terminators=["<unk>"])
    assert load([GOOD], other).folder != first.folder


def test_a_cache_that_cannot_be_written_is_told(load, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"data\.cache_dir"):
        load([GOOD])


def test_two_may_build_the_same_table_at_once(write_jsonl, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("dllm_var.datamodules.table.CHUNK", 8)
    tables = []

    class Overtaken(JsonlSource):
        """While its first table is half written, another process builds the same one."""

        def located_records(self, split):
            for number, located in enumerate(super().located_records(split)):
                if number == 10 and not tables:
                    tables.append(None)
                    tables[0] = build()
                yield located

    def build():
        source = Overtaken(write_jsonl([GOOD] * 20), validation_size=0)
        return load_table(source, "train", RecordEncoder(tokenizer), tmp_path / "cache")

    tables.append(build())
    assert [len(table) for table in tables] == [20, 20]
    assert [tables[0].folder] == [tables[1].folder] == list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.bin", "meta.json"])
@pytest.mark.parametrize("damage", ["shorter", "longer", "gone", "changed"])
def test_a_damaged_table_is_told(load, name, damage):
    file = load([GOOD] * 3).folder / name
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    elif damage == "changed":
        at = content.index(b'"tokens": ') + 10 if name == "meta.json" else len(content) // 2
        file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    else:
        file.write_bytes(content[:-8] if damage == "shorter" else content + bytes(8))
    with pytest.raises(UserError, match=rf"damaged .*: delete {file.parent} to make it anew"):
        load([GOOD] * 3)


def test_many_chunks_are_one_table(load, tokenizer, monkeypatch):
    monkeypatch.setattr("dllm_var.datamodules.table.CHUNK", 32)
    records = [{"input_ids": [4 + number % 60] * (1 + number % 7)} for number in range(100)]
    table = load(records)
    assert [table.ids(number)[:-1] for number in range(len(table))] == [record["input_ids"] for record in records]
    assert table.meta["records"] == 100


class Unreadable(JsonlSource):
    def records(self, split):
        raise PermissionError(13, "Permission denied", "/corpus/x.txt")

    def located_records(self, split):
        yield from self.records(split)


def test_a_source_that_cannot_be_read_is_not_taken_for_the_cache(tmp_path, write_jsonl):
    source = Unreadable(write_jsonl([{"prompt": "a", "response": "b"}]))
    with pytest.raises(UserError, match=r"train split of Unreadable cannot be read: .*/corpus/x\.txt"):
        load_table(source, "train", RecordEncoder(Tokenizer.from_pretrained(CmudictSource.default_tokenizer)), tmp_path)


def test_what_a_killed_process_left_is_removed_a_day_later(tmp_path, write_jsonl):
    encoder = RecordEncoder(Tokenizer.from_pretrained(CmudictSource.default_tokenizer))
    for name, age in (("old", 90_000), ("young", 60)):
        (tmp_path / f"{name}.partial").mkdir()
        tokens = tmp_path / f"{name}.partial" / "tokens.bin"
        tokens.write_bytes(b"")
        os.utime(tokens, (time.time() - age,) * 2)
    load_table(JsonlSource(write_jsonl([{"prompt": "a", "response": "K"}])), "train", encoder, tmp_path)
    assert [path.name for path in tmp_path.glob("*.partial")] == ["young.partial"]
