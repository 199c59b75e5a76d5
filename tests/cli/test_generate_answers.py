"""Answers as they are printed: streams that equal the whole text, the order of the prompts, replays in any width."""

import contextlib
import io
import re
import sys
from pathlib import Path

import pytest
from byte_tokenizer import write_byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import Namespace
from rich.cells import cell_len
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel

from dllm_var.__main__ import main
from dllm_var.cli.generate import AnswerPrinter, Prompt
from dllm_var.cli.infill_and_replay import replay
from dllm_var.sampling import Generation
from dllm_var.sampling.stopping import StopStrings
from dllm_var.text.tokenizer import SpecialTokens, Tokenizer

CHECKPOINT = str(Path(__file__).parent.parent.parent / "checkpoints" / "cmudict")


class Terminal(io.StringIO):
    """A terminal that remembers what was written, in pieces."""

    def __init__(self):
        super().__init__()
        self.pieces = []

    def isatty(self):
        return True

    def write(self, text):
        self.pieces += [text] if text else []
        return super().write(text)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = write_byte_tokenizer(tmp_path_factory.mktemp("bytes"))
    return {"bytes": Tokenizer.from_pretrained(folder), "words": Tokenizer.from_pretrained(CHECKPOINT)}


def printer(out, texts, tokenizer=None, stop=None):
    options = dict.fromkeys(("json", "replay", "answers_only", "no_stream"))
    prompts = [Prompt(text, [1]) for text in texts]
    return AnswerPrinter(out, prompts, tokenizer, Namespace(**options, stop=stop, stream=tokenizer is not None))


def answer(text, tokens=()):
    return Generation(list(tokens), "eos", 1, 0.0, 1, text)


# -- streams -----------------------------------------------------------------------------------------------------------


def streamed(tokenizer, tokens, ends, strings=None):
    """Returns the text as it was when each part of the tokens had been told, the last one being the whole."""
    out = io.StringIO()
    ours = printer(out, "p", tokenizer, strings)
    texts = []
    for end in sorted(ends):
        ours.on_block(0, tokens[:end])
        texts.append(out.getvalue().removeprefix("p -> "))
    cut = StopStrings(strings, tokenizer).cut(tokens) if strings else None
    whole = tokenizer.decode(tokens) if cut is None else cut[1]
    ours.on_answer(0, answer(whole, tokens))
    return [*texts, out.getvalue().removeprefix("p -> ").removesuffix("\n")], whole


@pytest.mark.parametrize("kind", ["bytes", "words"])
@settings(max_examples=100, deadline=None)
@given(st.data())
def test_what_was_shown_is_the_beginning_of_the_whole(kind, tokenizers, data):
    tokenizer = tokenizers[kind]
    if kind == "bytes":
        text = data.draw(st.text("a é€😀\n", max_size=12))
        tokens = tokenizer.encode(text)
        tokens = tokens[: data.draw(st.integers(0, len(tokens)))]  # it may well end in the middle of a character
    else:
        tokens = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=12))
    ends = data.draw(st.lists(st.integers(0, len(tokens)), max_size=6))
    strings = data.draw(st.lists(st.text("aé \nTK", min_size=1, max_size=3), max_size=2))
    texts, whole = streamed(tokenizer, tokens, ends, strings)
    assert texts[-1] == whole
    assert all(whole.startswith(text) for text in texts)


def test_nothing_is_held_back_longer_than_it_must(tokenizers):
    tokens = tokenizers["bytes"].encode("né €")
    texts, _ = streamed(tokenizers["bytes"], tokens, range(1, len(tokens) + 1))
    assert texts == ["n", "n", "né", "né ", "né ", "né ", "né €", "né €"]
    tokens = tokenizers["words"].encode("K AE T S")
    texts, _ = streamed(tokenizers["words"], tokens, [1, 2, 4], ["T X"])
    assert texts == ["K", "K AE", "K AE T S", "K AE T S"]


def test_a_text_that_changes_after_all_is_shown_anew(tokenizers):
    out = io.StringIO()
    ours = printer(out, "p", tokenizers["words"])
    ours.on_block(0, tokenizers["words"].encode("K AE"))
    ours.on_answer(0, answer("K IY"))
    assert out.getvalue() == "p -> K AE\np -> K IY\n"


def test_an_interrupted_line_ends_and_answers_that_wait_are_printed(tokenizers):
    out = io.StringIO()
    with contextlib.suppress(KeyboardInterrupt), printer(out, "a", tokenizers["words"]) as ours:
        ours.on_block(0, tokenizers["words"].encode("K AE"))
        raise KeyboardInterrupt
    assert out.getvalue() == "a -> K AE\n"
    with contextlib.suppress(KeyboardInterrupt), printer(out, "abc") as ours:
        ours.on_answer(2, answer("third"))
        raise KeyboardInterrupt
    assert out.getvalue() == "a -> K AE\nc -> third\n"


def test_answers_wait_for_those_before_them():
    out = io.StringIO()
    ours = printer(out, "abcd")
    expected = {2: "", 0: "a -> 0\n", 1: "a -> 0\nb -> 1\nc -> 2\n", 3: "a -> 0\nb -> 1\nc -> 2\nd -> 3\n"}
    for index, text in expected.items():
        ours.on_answer(index, answer(str(index)))
        assert out.getvalue() == text


# -- terminals ---------------------------------------------------------------------------------------------------------


def in_terminal(monkeypatch, *arguments, errors=None):
    """Runs `generate` in a terminal and returns the pieces that it writes."""
    terminal = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        patch.setattr(sys, "stderr", errors or io.StringIO())
        assert main(["generate", "--checkpoint", CHECKPOINT, *arguments]) == 0
    return terminal.pieces


def test_a_single_prompt_is_streamed_in_a_terminal(monkeypatch):
    options = ["--prompt=keyboard", "--block-length=2"]
    pieces = in_terminal(monkeypatch, *options)
    assert pieces[0].startswith("keyboard -> ") and len(pieces) > 3, "block by block"
    assert in_terminal(monkeypatch, *options, "--no-stream") == ["".join(pieces)]
    [line] = in_terminal(monkeypatch, *options, "--json")
    assert line[0] == "{"


def test_several_prompts_get_a_progress_bar_when_the_answers_go_elsewhere(monkeypatch, capsys):
    bar = Terminal()
    words = ["--prompt=cat", "--prompt=dog"]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", bar)
        assert main(["generate", "--checkpoint", CHECKPOINT, *words]) == 0
    assert capsys.readouterr().out == "cat -> K AE T\ndog -> D AA G\n"
    assert "answers/s]" in bar.getvalue() and "/2 [" in bar.getvalue()  # the last count may come too soon to be shown
    summary = Terminal()
    assert "".join(in_terminal(monkeypatch, *words, errors=summary)) == "cat -> K AE T\ndog -> D AA G\n"
    assert summary.getvalue().startswith("2 answers, 6 tokens in ")


def test_colour_is_for_terminals_whose_user_wants_it(monkeypatch):
    options = ["--prompt=cat", "--replay"]
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\033[38;5;" in "".join(in_terminal(monkeypatch, *options))
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in "".join(in_terminal(monkeypatch, *options))


# -- replays -----------------------------------------------------------------------------------------------------------


def recorded(tokenizer, text, steps):
    return Generation(tokenizer.encode(text), "eos", 9, 0.0, 3, text, steps)


def bare(text):
    return re.sub(r"\033\[[\d;]*m", "", text).splitlines()


def test_numbers_or_colours_tell_the_forward_of_each_token(tokenizers):
    tokenizer = tokenizers["words"]
    generation = recorded(tokenizer, "K IY B AO R D", [1, 10, 3, 3, 1, 0])
    plain = replay(generation, tokenizer, 100)
    assert plain.splitlines() == [
        "  token       K IY B AO R D",
        "  forward     1 10 3 3  1",
        "  forward 1:  K _ _ _ R D",
        "  forward 3:  K _ B AO R D",
        "  forward 10: K IY B AO R D",
    ]
    coloured = replay(generation, tokenizer, 100, colour=True)
    assert bare(coloured) == plain.splitlines()
    [tokens, numbers, *_] = (re.findall(r"\033\[([\d;]+)m(\w+)", line) for line in coloured.splitlines())
    assert [colour for colour, _ in tokens] == [colour for colour, _ in numbers]
    assert [name for _, name in tokens] == ["K", "IY", "B", "AO", "R"] and len(dict(tokens)) == 3


@pytest.mark.parametrize("width", [24, 47])
@pytest.mark.parametrize("colour", [False, True])
def test_lines_fit_and_show_every_new_token(width, colour, tokenizers):
    steps = [block * 3 + step for block in range(8) for step in (2, 1, 1, 3)]
    words = ["K", "IY", "B", "AO"] * 8
    lines = bare(replay(recorded(tokenizers["words"], " ".join(words), steps), tokenizers["words"], width, colour))
    listing = [line for line in lines if re.match(r"  forward \d+:", line)]
    head = [line for line in lines if not re.match(r"  forward", line)]
    assert all(len(line) <= width for line in [*listing, *head])
    assert " ".join(head).replace("token", "").split() == words
    assert len(listing) == 24
    for line in listing:
        new = words[steps.index(int(re.search(r"\d+", line)[0]))]
        assert new in line.split(":")[1].split() and "…" in line


def test_a_chinese_character_is_two_columns_wide():
    words = {"\u65e5\u672c": 0, "a": 1, "<mask>": 2, "<end>": 3}
    tokenizer = Tokenizer(Backend(WordLevel(words, unk_token="a")), SpecialTokens(2, (3,), 3))
    generation = Generation([0, 1] * 6, "eos", 1, 0.0, 1, "", [1] * 12)
    lines = replay(generation, tokenizer, 30).splitlines()
    assert lines[:2] == ["  token      \u65e5\u672c a \u65e5\u672c a", "  forward    1    1 1    1"]
    assert max(map(cell_len, lines)) <= 30


def test_tokens_are_shown_on_one_line(tokenizers):
    def shown(tokenizer, tokens):
        answer = Generation(tokens, "eos", 9, 0.0, 1, "", [1] * len(tokens))
        return replay(answer, tokenizer, 100).splitlines()[0].split()[1:]

    words, letters = tokenizers["words"], tokenizers["bytes"]
    assert shown(words, [words.pad_id]) == ["<pad>"]
    assert shown(letters, [letters.encode(letter)[0] for letter in "a \n\t"]) == ["a", "␣", r"\n", r"\t"]
    assert "does not record" in replay(recorded(words, "K", None), words, 100)
