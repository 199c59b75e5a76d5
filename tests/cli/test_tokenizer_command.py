"""`tokenizer`: what it trains spells any text, and has what diffusion and conversations need."""

import json
import random
from pathlib import Path

import pytest
from byte_tokenizer import encode_chat

from dllm_var.__main__ import main
from dllm_var.datamodules import JsonlSource, PackedDataModule
from dllm_var.errors import UserError
from dllm_var.text.tokenizer import Tokenizer
from dllm_var.text.train_tokenizer import LEAST_VOCABULARY, SPECIAL_TOKENS

CHATS = [
    {"messages": [{"role": "user", "content": f"What is {n} plus 1?"}, {"role": "assistant", "content": f"{n + 1}!"}]}
    for n in range(40)
]
OTHERS = [
    {"prompt": "who are you", "response": "a model"},
    {"instruction": "add", "input": "1 and 2", "output": "3"},
    {"text": "what is it"},
]
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 12?"},
    {"role": "assistant", "content": "né <|end|\u200b> 12"},
]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DLLM_VAR_CACHE", str(tmp_path / "cache"))
    Path("chats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in CHATS + OTHERS))


def train(*options, output="made"):
    return main(["tokenizer", "--data", "chats.jsonl", "--output", output, *options])


def complaint(capsys):
    [line] = capsys.readouterr().err.strip().splitlines()
    return line


def test_it_trains_one_that_training_can_use(capsys):
    assert train("--vocab-size", "300") == 0
    shown = capsys.readouterr().out
    assert "read 43 records" in shown and "--data.tokenizer=made" in shown
    tokenizer = Tokenizer.from_pretrained("made")
    assert LEAST_VOCABULARY < tokenizer.vocab_size <= 300
    assert [tokenizer.id_to_token(index) for index in range(len(SPECIAL_TOKENS))] == SPECIAL_TOKENS
    assert len({tokenizer.mask_id, tokenizer.terminator_id, tokenizer.pad_id}) == 3
    assert len(tokenizer.encode("What is")) == 2 and len(tokenizer.encode("1234")) == 4  # learned; digits are single
    data = PackedDataModule(source=JsonlSource("chats.jsonl"), tokenizer="made", context_length=64)
    assert data.report()["unknown_tokens"] == data.report()["skipped"] == 0


def test_any_text_comes_back_from_its_tokens():
    assert train("--vocab-size", "280") == 0
    tokenizer, rng = Tokenizer.from_pretrained("made"), random.Random(0)
    for _ in range(200):
        text = "".join(chr(rng.choice([rng.randrange(32, 127), rng.randrange(0xE000)])) for _ in range(20))
        text = text.encode("utf-8", "ignore").decode()
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("<|end|>") != [tokenizer.terminator_id]  # what people write is text


def test_the_template_supervises_answers_and_their_terminators():
    assert train("--vocab-size", "280") == 0
    tokenizer = Tokenizer.from_pretrained("made")
    ids, supervised = encode_chat(tokenizer, CONVERSATION)
    prompt = tokenizer.encode_chat_prompt(CONVERSATION[:-1])
    assert ids[: len(prompt)] == prompt and not any(supervised[: len(prompt)])
    answer = [index for index, carries in zip(ids, supervised, strict=True) if carries]
    assert answer == [*tokenizer.encode(CONVERSATION[-1]["content"]), tokenizer.terminator_id]


def test_training_twice_gives_the_same_tokenizer():
    assert train("--vocab-size", "300") == train("--vocab-size", "300", output="again") == 0
    assert Path("made/tokenizer.json").read_bytes() == Path("again/tokenizer.json").read_bytes()


def test_columns_are_renamed(capsys):
    Path("chats.jsonl").write_text('{"question": "why", "answer": "because"}\n')
    assert train("--vocab-size", "280", "--columns", "{prompt: question, response: answer}") == 0
    assert "read 1 records of 10 characters" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "content", "message"),
    [
        ([], None, "error: tokenizer needs --vocab-size"),
        (["--vocab-size", "100"], None, f"error: --vocab-size is 100; it must be at least {LEAST_VOCABULARY}"),
        (["--vocab-size", "300", "--data", "none.jsonl"], None, "error: --data: no file 'none.jsonl'"),
        (["--vocab-size", "300"], "", "error: --data chats.jsonl has no records"),
        (["--vocab-size", "300"], '{"input_ids": [1, 2]}\n', "error: chats.jsonl:1 has token ids"),
        (["--vocab-size", "300"], '{"messages": 3}\n', "error: chats.jsonl:1 has a int as 'messages'"),
        (["--vocab-size", "300", "--output", "chats.jsonl"], None, "error: --output chats.jsonl exists"),
    ],
)
def test_mistakes_are_one_line(options, content, message, capsys):
    if content is not None:
        Path("chats.jsonl").write_text(content)
    assert train(*options) == 2
    assert complaint(capsys).startswith(message)
    assert not Path("made").exists()


def test_data_without_a_tokenizer_names_the_command():
    with pytest.raises(UserError, match=r"has none of its own.*python -m dllm_var tokenizer --data FILE\.jsonl"):
        PackedDataModule(source=JsonlSource("chats.jsonl"))
