import io
import json

import pytest
from byte_tokenizer import CHAT_TEMPLATE, MARKED_TEMPLATE, encode_chat, write_byte_tokenizer

from dllm_var.datamodules import CmudictSource
from dllm_var.errors import UserError
from dllm_var.text.tokenizer import Tokenizer

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "né?"},
    {"role": "assistant", "content": " yes \n"},
]


@pytest.fixture
def cmudict():
    return Tokenizer.from_pretrained(CmudictSource.default_tokenizer)


def test_letters_and_phonemes(cmudict):
    assert cmudict.vocab_size == 4 + 27 + 39
    assert [cmudict.id_to_token(i) for i in cmudict.encode("o'clock")] == list("o'clock")
    assert len(cmudict.encode("keyboard")) == 8
    assert len(cmudict.encode(" K IY  B AO R D ")) == 6
    assert cmudict.decode(cmudict.encode("K IY B AO R D")) == "K IY B AO R D"
    assert cmudict.decode(cmudict.encode("keyboard")) == "keyboard"
    assert cmudict.decode([*cmudict.encode("K IY"), cmudict.terminator_id, cmudict.pad_id]) == "K IY"
    assert cmudict.encode("é") == [cmudict.unknown_id]
    assert cmudict.encode_batch(["key", "K IY"]) == [cmudict.encode("key"), cmudict.encode("K IY")]


def test_round_trips_keep_everything(tmp_path):
    folder = write_byte_tokenizer(tmp_path / "a", MARKED_TEMPLATE, bos_token="<|im_start|>")
    original = Tokenizer.from_pretrained(folder, terminators=["<|im_end|>", "<|endoftext|>"])
    state = original.to_dict()
    assert all(isinstance(value, (str, int, list, dict)) for value in state.values())
    original.save(tmp_path / "b")
    for copy in (Tokenizer.from_dict(state), Tokenizer.from_pretrained(tmp_path / "b")):
        assert copy.special == original.special
        assert encode_chat(copy, CONVERSATION) == encode_chat(original, CONVERSATION)
        assert copy.encode("naïve <|im_end|>", True) == original.encode("naïve <|im_end|>", True)
        assert copy.id_to_token(copy.mask_id) == "<|mask|>"
    assert Tokenizer.from_dict(state).fingerprint == original.fingerprint
    assert Tokenizer.from_pretrained(folder).fingerprint != original.fingerprint


@pytest.mark.parametrize("first", [0, 1, 20])
def test_the_texts_of_tokens_are_together_their_text(first, cmudict, tmp_path):
    """Also where a character has several tokens, and where blanks are put between tokens."""
    for tokenizer, text in (
        (Tokenizer.from_pretrained(write_byte_tokenizer(tmp_path)), "a 🙂 and\n日本, " * 9),
        (cmudict, "K IY B AO R D " * 9),
    ):
        ids = tokenizer.encode(text)
        texts = tokenizer.token_texts(ids, first)
        assert len(texts) == len(ids) - first and len({*texts}) > 4
        assert tokenizer.decode(ids[:first]).rstrip("\ufffd") + "".join(texts) == tokenizer.decode(ids)


def test_special_tokens_are_found_where_models_keep_them(tmp_path):
    folder = write_byte_tokenizer(tmp_path, mask_token=None, pad_token=None, eos_token={"content": "<|endoftext|>"})
    (folder / "config.json").write_text(json.dumps({"mask_token_id": 257, "eos_token_id": 258}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [258, 260]}))
    special = Tokenizer.from_pretrained(folder).special
    assert (special.mask_id, special.terminator_ids, special.pad_id) == (257, (258, 260), 258)
    given = Tokenizer.from_pretrained(folder, mask_token="<|pad|>", terminators=["<|im_end|>"], pad_token="<|mask|>")
    assert (given.mask_id, given.terminator_ids, given.pad_id) == (256, (260,), 257)


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        ({"eos_token": None}, {}, "terminators"),
        ({}, {"mask_token": "<none>"}, "mask_token '<none>' is not in the vocabulary"),
        ({}, {"mask_token": "<|im_end|>"}, "same token"),
        ({"terminators": [7]}, {}, "terminators 7 is not in the vocabulary"),
        ({"terminators": "<|end|>"}, {}, r"terminators '<\|end\|>' is not in the vocabulary"),
    ],
)
def test_wrong_special_tokens_are_told_in_one_line(tmp_path, config, arguments, message):
    folder = write_byte_tokenizer(tmp_path, **config)
    with pytest.raises(UserError, match=message) as error:
        Tokenizer.from_pretrained(folder, **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "name", "index"), [(None, "<|mask|>", 257), ("<x>", "<x>", 261), ("<|pad|>", "<|pad|>", 256)]
)
def test_a_tokenizer_without_a_mask_token_gets_one_and_keeps_every_other_id(given, name, index, tmp_path):
    folder = write_byte_tokenizer(tmp_path, mask_token=None)
    tokenizer = Tokenizer.from_pretrained(folder, mask_token=given)
    assert (tokenizer.id_to_token(tokenizer.mask_id), tokenizer.mask_id) == (name, index)
    other = Tokenizer.from_pretrained(folder, mask_token="<|mask|>")
    assert tokenizer.encode("né<|im_end|>", True) == other.encode("né<|im_end|>", True)
    assert tokenizer.encode(name, True) == [index] and tokenizer.decode([index]) == ""
    tokenizer.save(tmp_path / "saved")
    assert Tokenizer.from_pretrained(tmp_path / "saved").special == tokenizer.special


def test_missing_and_broken_tokenizers_are_told_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="does not exist"):
        Tokenizer.from_pretrained(tmp_path / "nowhere")
    folder = write_byte_tokenizer(tmp_path / "a")
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        Tokenizer.from_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read"):
        Tokenizer.from_pretrained(folder)


def spelled(tokenizer, ids, supervised, value):
    return tokenizer.backend.decode(
        [index for index, flag in zip(ids, supervised, strict=True) if flag == value], skip_special_tokens=False
    )


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, MARKED_TEMPLATE])
def test_loss_is_on_assistant_turns_with_their_terminators(tmp_path, template):
    tokenizer = Tokenizer.from_pretrained(write_byte_tokenizer(tmp_path, template))
    ids, supervised = encode_chat(tokenizer, CONVERSATION)
    assert spelled(tokenizer, ids, supervised, True) == "2<|im_end|> yes \n<|im_end|>"
    assert ids[-1] == tokenizer.terminator_id
    prompt = tokenizer.encode_chat_prompt(CONVERSATION[:4])
    assert ids[: len(prompt)] == prompt, "training must see the ids that generation starts from"
    assert prompt == tokenizer.encode(tokenizer.render(CONVERSATION[:4], add_generation_prompt=True), True)


def test_turns_follow_each_other_without_a_template(cmudict):
    messages = [{"role": "user", "content": "key"}, {"role": "assistant", "content": "K IY"}]
    assert encode_chat(cmudict, messages) == (cmudict.encode("key") + cmudict.encode("K IY"), [False] * 3 + [True] * 2)
    again = [*messages, messages[0]]
    expected = [*cmudict.encode("key"), *cmudict.encode("K IY"), cmudict.terminator_id, *cmudict.encode("key")]
    assert cmudict.encode_chat_prompt(again) == expected


@pytest.mark.parametrize(
    ("template", "arguments", "message"),
    [
        (CHAT_TEMPLATE, {"terminators": ["<|endoftext|>"]}, "data.terminators"),
        (CHAT_TEMPLATE.replace("<|im_start|>assistant\n", "<|im_start|>model\n"), {}, "differently"),
    ],
)
def test_templates_that_would_train_something_else_are_refused(tmp_path, template, arguments, message):
    tokenizer = Tokenizer.from_pretrained(write_byte_tokenizer(tmp_path, template), **arguments)
    with pytest.raises(UserError, match=message):
        encode_chat(tokenizer, CONVERSATION)


def test_dreams_tokenizer_is_read_without_its_code(tmp_path):
    """Its folder has Qwen2's files, no tokenizer.json, and names a class that comes as code beside them."""
    pytest.importorskip("transformers")
    write_byte_tokenizer(tmp_path / "bytes")
    vocabulary = json.loads((tmp_path / "bytes" / "tokenizer.json").read_text())["model"]["vocab"]
    letters = {token: index for token, index in vocabulary.items() if index < 256}
    folder = tmp_path / "dream"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(letters))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {
        str(256 + at): {"content": name, "special": True} for at, name in enumerate(["<|endoftext|>", "<|mask|>"])
    }
    config = {
        "tokenizer_class": "DreamTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
    }
    config |= {"eos_token": "<|endoftext|>", "mask_token": "<|mask|>", "added_tokens_decoder": special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "tokenization_dream.py").write_text("raise RuntimeError('this code must not run')")
    tokenizer = Tokenizer.from_pretrained(folder)
    assert (tokenizer.mask_id, tokenizer.terminator_ids) == (257, (256,))
    assert tokenizer.encode("né?<|endoftext|>", True) == [
        *Tokenizer.from_pretrained(tmp_path / "bytes").encode("né?"),
        256,
    ]


CODE = """
from pathlib import Path
Path({mark!r}).touch()
from transformers import PreTrainedTokenizerFast as Mine
"""


@pytest.mark.parametrize("place", ["tokenizer_config.json", "config.json"])
def test_a_tokenizer_that_is_code_is_refused_without_a_question(place, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    (tmp_path / "mine.py").write_text(CODE.format(mark=str(tmp_path / "ran")))
    (tmp_path / "config.json").write_text('{"model_type": "mine"}')
    names = {"AutoTokenizer": ["mine.Mine", "mine.Mine"], "AutoConfig": "mine.Mine"}
    (tmp_path / place).write_text(json.dumps({"model_type": "mine", "auto_map": names}))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    with pytest.raises(UserError, match="code of its own") as caught:
        Tokenizer.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value) and not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", {"chat_template": 5}),
        ("tokenizer_config.json", {"chat_template": [{"name": 3}]}),
        ("generation_config.json", {"eos_token_id": [True]}),
        ("config.json", {"mask_token_id": {"a": 1}}),
        ("config.json", [1.5]),
    ],
)
def test_settings_of_the_wrong_type_are_named(file, content, tmp_path):
    write_byte_tokenizer(tmp_path, CHAT_TEMPLATE)
    path = tmp_path / file
    there = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**there, **content} if isinstance(content, dict) else content))
    if file == "tokenizer_config.json":
        (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(UserError):
        Tokenizer.from_pretrained(tmp_path)


def test_a_saved_tokenizer_does_not_choose_what_its_template_is_given(cmudict):
    for changes in ({"named_tokens": {"messages": "x"}}, {"named_tokens": {"eos_token": 3}}, {"mask_id": 1.0}):
        with pytest.raises(UserError):
            Tokenizer.from_dict({**cmudict.to_dict(), **changes})
