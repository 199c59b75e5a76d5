"""Answers as they are printed: streams that equal the whole text, the order of the prompts, files that are whole."""

import io
import sys
from pathlib import Path

import pytest
from byte_tokenizer import write_byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import Namespace
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from dllm_var.__main__ import main
from dllm_var.cli.answers import AnswerPrinter, TextStream, is_coloured
from dllm_var.cli.prompts import Prompt
from dllm_var.sampling import Generation
from dllm_var.sampling.stopping import StopStrings
from dllm_var.text.tokenizer import SpecialTokens, Tokenizer

CHECKPOINT = str(Path(__file__).parent.parent.parent / "checkpoints" / "cmudict")


class Terminal(io.StringIO):
    """A terminal that remembers."""

    def isatty(self):
        return True


# -- streams -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Of bytes; of words with blanks between them; of sentence pieces with bytes for what they lack."""
    pieces = {"▁the": 0, "▁a": 1, "b": 2, "é": 3, "<pad>": 4, "<mask>": 5, "<eos>": 6}
    pieces |= {f"<0x{byte:02X}>": len(pieces) + i for i, byte in enumerate("é€😀".encode())}
    backend = Backend(models.BPE(pieces, [], byte_fallback=True, unk_token="<pad>"))
    backend.add_special_tokens([AddedToken(name, special=True) for name in ("<pad>", "<mask>", "<eos>")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return {
        "bytes": Tokenizer.from_pretrained(write_byte_tokenizer(tmp_path_factory.mktemp("bytes"))),
        "words": Tokenizer.from_pretrained(CHECKPOINT),
        "pieces": Tokenizer(backend, SpecialTokens(5, (6,), 4)),
    }


def streamed(tokenizer, tokens, ends, stop=None):
    """Returns the text as it was when each part of the tokens had been told, the last one being the whole."""
    stream = TextStream(tokenizer, stop)
    texts = [""]
    for end in sorted(ends):
        texts.append(texts[-1] + stream.feed(tokens[:end]))
    cut = None if stop is None else stop.cut(tokens)
    whole = tokenizer.decode(tokens) if cut is None else cut[1]
    return [*texts, texts[-1] + stream.end(whole)], whole


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
    stop = StopStrings(strings, tokenizer) if strings else None
    texts, whole = streamed(tokenizer, tokens, ends, stop)
    assert texts[-1] == whole
    assert all(whole.startswith(text) for text in texts)


def test_nothing_is_held_back_longer_than_it_must(tokenizers):
    tokens = tokenizers["bytes"].encode("né €")
    texts, _ = streamed(tokenizers["bytes"], tokens, range(1, len(tokens) + 1))
    assert texts == ["", "n", "n", "né", "né ", "né ", "né ", "né €", "né €"]
    tokens = tokenizers["words"].encode("K AE T S")
    texts, _ = streamed(tokenizers["words"], tokens, [1, 2, 4], StopStrings(["T X"], tokenizers["words"]))
    assert texts == ["", "K", "K AE", "K AE T S", "K AE T S"]


def test_a_character_of_several_tokens_waits_for_its_last(tokenizers):
    tokens = [0, 9, 10, 11, 1, 2, 0]  # the bytes of the euro sign stand at 9 to 11
    texts, whole = streamed(tokenizers["pieces"], tokens, range(len(tokens) + 1))
    assert whole == "the€ ab the" and texts[2:5] == ["the", "the", "the"] and texts[-1] == whole


def test_a_text_that_changes_after_all_is_shown_anew(tokenizers):
    """This decoder takes back a character when a broken one follows it."""
    texts, whole = streamed(tokenizers["pieces"], [0, 7, 8, 9], [1, 3, 4])
    assert texts[2] == "theé" and whole == "the\ufffd\ufffd\ufffd"
    assert texts[-1] == "theé\nthe\ufffd\ufffd\ufffd"


# -- order -------------------------------------------------------------------------------------------------------------


def answer(text, reason="eos"):
    return Generation(list(range(len(text))), reason, 1, 0.0, 1, text)


def printer(out, texts, tokenizer=None):
    options = dict.fromkeys(("json", "replay", "answers_only", "no_stream", "stop"))
    prompts = [Prompt(text, [1]) for text in texts]
    return AnswerPrinter(out, prompts, tokenizer, Namespace(**options, stream=tokenizer is not None))


def test_answers_wait_for_those_before_them():
    out = io.StringIO()
    ours = printer(out, "abcd")
    for index, expected in (
        (2, ""),
        (0, "a -> 0\n"),
        (1, "a -> 0\nb -> 1\nc -> 2\n"),
        (3, "a -> 0\nb -> 1\nc -> 2\nd -> 3\n"),
    ):
        ours.on_answer(index, answer(str(index)))
        assert out.getvalue() == expected


def test_streams_take_turns(tokenizers):
    """The second prompt's blocks come first; it shows what it has once it is its turn."""
    tokenizer, out = tokenizers["bytes"], io.StringIO()
    ours = printer(out, "ab", tokenizer)
    tokens = [tokenizer.encode("first"), tokenizer.encode("second")]
    ours.on_block(1, tokens[1][:3])
    ours.on_block(0, tokens[0][:2])
    assert out.getvalue() == "a -> fi"
    ours.on_block(1, tokens[1][:4])
    ours.on_answer(0, answer("first"))
    assert out.getvalue() == "a -> first\nb -> seco"
    ours.on_answer(1, answer("second"))
    assert out.getvalue() == "a -> first\nb -> second\n"


def test_an_interrupted_line_ends(tokenizers):
    tokenizer, out = tokenizers["bytes"], io.StringIO()
    ours = printer(out, "abc", tokenizer)
    ours.on_block(0, tokenizer.encode("first"))
    ours.on_answer(2, answer("third"))
    ours.interrupt()
    assert out.getvalue() == "a -> first\nc -> third\n"


# -- terminals ---------------------------------------------------------------------------------------------------------


def lines_of(monkeypatch, *arguments, errors=None):
    """Runs `generate` in a terminal and returns what that shows."""
    terminal = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        patch.setattr(sys, "stderr", errors or io.StringIO())
        assert main(["generate", "--checkpoint", CHECKPOINT, *arguments]) == 0
    return terminal.getvalue()


def test_a_single_prompt_is_streamed_in_a_terminal(monkeypatch):
    pieces = []
    monkeypatch.setattr(Terminal, "write", lambda self, text: pieces.append(text) or io.StringIO.write(self, text))
    options = ["--prompt=keyboard", "--block-length=2"]
    streamed = lines_of(monkeypatch, *options)
    shown = [piece for piece in pieces if piece]
    assert shown[0] == "keyboard -> " and len(shown) > 3, "block by block"
    del pieces[:]
    assert lines_of(monkeypatch, *options, "--no-stream") == streamed == "".join(shown)
    assert [piece for piece in pieces if piece] == [streamed]
    assert lines_of(monkeypatch, *options, "--json")[0] == "{"


def test_several_prompts_can_be_streamed_too(monkeypatch, capsys):
    options = [*(f"--prompt={word}" for word in ("keyboard", "cat", "lightning")), "--block-length=2"]
    whole = lines_of(monkeypatch, *options)
    assert main(["generate", "--checkpoint", CHECKPOINT, *options, "--stream"]) == 0
    assert capsys.readouterr().out == whole
    assert lines_of(monkeypatch, *options, "--stream", "--stop=T") == lines_of(monkeypatch, *options, "--stop=T")


def test_several_prompts_get_a_progress_bar(monkeypatch):
    bar = Terminal()
    shown = lines_of(monkeypatch, "--prompt=cat", "--prompt=dog", errors=bar)
    assert shown == "cat -> K AE T\ndog -> D AA G\n"
    assert "/2 [" in bar.getvalue() and "answers" in bar.getvalue()
    one = Terminal()
    lines_of(monkeypatch, "--prompt=cat", errors=one)
    assert "/1 [" not in one.getvalue() and one.getvalue().startswith("\033[2m1 answer")


def test_colour_is_for_terminals_whose_user_wants_it(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert is_coloured(Terminal()) and not is_coloured(io.StringIO())
    assert "\033[38;5;" in lines_of(monkeypatch, "--prompt=cat", "--replay")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not is_coloured(Terminal())
    assert "\033" not in lines_of(monkeypatch, "--prompt=cat", "--replay")
