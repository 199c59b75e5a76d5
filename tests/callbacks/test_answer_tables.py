"""Answers as they are shown: what is wrong in them stands out, with colour and without."""

from __future__ import annotations

import pytest

from dllm_var.callbacks.answer_tables import AnswerRow, answer_table, mark, markdown_table, plain_text
from dllm_var.datamodules.cmudict import CmudictSource
from dllm_var.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    name = CmudictSource().default_tokenizer
    assert name is not None
    return Tokenizer.from_pretrained(name)


@pytest.mark.parametrize(
    ("answer", "reference", "shown"),
    [
        ("K IY B AO R D", "K IY B AO R D", "K IY B AO R D"),
        ("K IY P AO R D", "K IY B AO R D", "K IY [P] AO R D"),
        ("K IY P UH R D", "K IY B AO R D", "K IY [P UH] R D"),
        ("K B AO R D", "K IY B AO R D", "K [-] B AO R D"),
        ("IY B AO R", "K IY B AO R D", "[-] IY B AO R [-]"),
        ("K IY B AO R D S", "K IY B AO R D", "K IY B AO R D [S]"),
        ("", "K IY", "[-]"),
        ("K IY", "", "[K IY]"),
        ("", "", ""),
        ("K IY", None, "K IY"),
        ("", None, ""),
    ],
)
def test_wrong_and_missing_tokens_are_bracketed(
    tokenizer: Tokenizer, answer: str, reference: str | None, shown: str
) -> None:
    expected = None if reference is None else tokenizer.encode(reference)
    pieces = mark(tokenizer, tokenizer.encode(answer), expected)
    assert plain_text(pieces) == shown


def test_a_special_token_in_an_answer_is_visible(tokenizer: Tokenizer) -> None:
    answer = [*tokenizer.encode("K"), tokenizer.pad_id]
    assert (
        plain_text(mark(tokenizer, answer, tokenizer.encode("K"))) == f"K [{tokenizer.id_to_token(tokenizer.pad_id)}]"
    )


def test_colour_on_a_terminal_only(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = mark(tokenizer, tokenizer.encode("K AO"), tokenizer.encode("K IY"))
    rows = [AnswerRow("key", pieces, "K IY", "eos", 2)]
    plain = answer_table(rows)
    assert "K [AO]" in plain
    assert "\x1b" not in plain
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = answer_table(rows)
    assert "\x1b[" in coloured
    assert "[AO]" not in coloured


def test_markdown_keeps_its_columns_whatever_the_text_holds(tokenizer: Tokenizer) -> None:
    row = AnswerRow("a|b\n*c*", mark(tokenizer, tokenizer.encode("K"), None), "", "length", 3)
    line = markdown_table([row]).splitlines()[-1]
    assert line.replace("\\|", "").count("|") == 6
    assert "<br>" in line
    assert "\\*c\\*" in line
