"""The replay of an answer, in plain text, in colour and in narrow terminals."""

import re
from pathlib import Path

import pytest
from byte_tokenizer import write_byte_tokenizer

from dllm_var.cli.answers import replay
from dllm_var.sampling import Generation
from dllm_var.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def cmudict():
    return Tokenizer.from_pretrained(Path(__file__).parent.parent.parent / "checkpoints" / "cmudict")


def answer(tokenizer, text, steps):
    return Generation(tokenizer.encode(text), "eos", 9, 0.0, 3, text, steps)


def test_numbers_stand_below_their_tokens(cmudict):
    text = replay(answer(cmudict, "K IY B AO R D", [1, 10, 3, 3, 1, 0]), cmudict)
    assert text.splitlines() == [
        "  token       K IY B AO R D",
        "  forward     1 10 3 3  1",
        "  forward 1:  K _ _ _ R D",
        "  forward 3:  K _ B AO R D",
        "  forward 10: K IY B AO R D",
    ]


def test_colours_say_the_same(cmudict):
    generation = answer(cmudict, "K IY B AO R D", [1, 10, 3, 3, 1, 0])
    coloured, plain = (replay(generation, cmudict, colour=colour) for colour in (True, False))
    bare = re.sub(r"\033\[[\d;]*m", "", coloured).splitlines()
    assert bare[:2] == ["  forward     1 3 10", "              K IY B AO R D"]
    assert bare[2:] == plain.splitlines()[2:]
    [legend, tokens, *_] = coloured.splitlines()
    colour_of = dict(re.findall(r"\033\[([\d;]+)m(\w+)", legend))
    assert len(colour_of) == 3 and len(set(colour_of.values())) == 3
    by_token = [(name, colour) for colour, name in re.findall(r"\033\[([\d;]+)m(\w+)", tokens)]
    step_of = {step: colour for colour, step in colour_of.items()}
    assert by_token == [
        (name, step_of[step]) for name, step in (("K", "1"), ("IY", "10"), ("B", "3"), ("AO", "3"), ("R", "1"))
    ]


@pytest.mark.parametrize("width", [24, 30, 47])
@pytest.mark.parametrize("colour", [False, True])
def test_lines_fit_and_show_every_new_token(width, colour, cmudict):
    steps = [block * 3 + step for block in range(8) for step in (2, 1, 1, 3)]
    words = ["K", "IY", "B", "AO"] * 8
    text = replay(answer(cmudict, " ".join(words), steps), cmudict, width, colour)
    lines = re.sub(r"\033\[[\d;]*m", "", text).splitlines()
    listing = [line for line in lines if re.match(r"  forward \d+:", line)]
    head = [line for line in lines if not re.match(r"  forward", line)]
    assert all(len(line) <= width for line in [*listing, *head])
    assert " ".join(head).replace("token", "").split() == words
    assert len(listing) == 24
    for line in listing:
        step = int(re.search(r"\d+", line)[0])
        new = words[steps.index(step)]
        assert new in line.split(":")[1].split() and ("…" in line) == (width < 70)


def test_tokens_are_shown_on_one_line(cmudict, tmp_path):
    def shown(tokenizer, tokens):
        answer = Generation(tokens, "eos", 9, 0.0, 1, "", [1] * len(tokens))
        return replay(answer, tokenizer).splitlines()[0].split()[1:]

    assert shown(cmudict, [cmudict.pad_id]) == ["<pad>"]
    tokenizer = Tokenizer.from_pretrained(write_byte_tokenizer(tmp_path))
    assert shown(tokenizer, [tokenizer.encode(letter)[0] for letter in "a \n\t"]) == ["a", "␣", r"\n", r"\t"]


def test_an_empty_answer_and_one_that_was_not_recorded(cmudict):
    assert replay(answer(cmudict, "", []), cmudict).split() == []
    assert "does not record" in replay(answer(cmudict, "K", None), cmudict)
