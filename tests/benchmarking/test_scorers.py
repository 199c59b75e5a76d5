"""What counts as a right answer."""

import re
from decimal import Decimal
from pathlib import Path

import pytest

from dllm_var.benchmarking import FinalNumberScorer, TokenErrorScorer
from dllm_var.datamodules import Example
from dllm_var.sampling import Generation


class Characters:
    """A tokenizer whose tokens are characters."""

    def decode(self, ids):
        return "".join(map(chr, ids))


def answers(*texts):
    return [Generation([ord(c) for c in text], "eos", 1, 0.0, prompt_length=1) for text in texts]


def examples(*references):
    return [Example("?", [1], [[ord(c) for c in text] for text in texts]) for texts in references]


def test_token_errors_against_the_nearest_reference():
    scores = TokenErrorScorer().score(answers("abcd", "xy"), examples(["abcd"], ["xyz", "zzzzzz"]), Characters())
    assert scores == {
        "accuracy": pytest.approx(1 - 1 / 7),
        "exact_match": 0.5,
        "token_error_rate": pytest.approx(1 / 7),
    }


def test_accuracy_of_runaway_answers_is_not_below_zero():
    scores = TokenErrorScorer().score(answers("a" * 30), examples(["b"]), Characters())
    assert scores["accuracy"] == 0 and scores["token_error_rate"] == 30


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 + 4 = 7\n#### 7", "7"),
        ("#### 1,200", "1200"),
        ("#### -3.50 dollars", "-3.5"),
        ("#### $18", "18"),
        ("#### .5", "0.5"),
        ("#### 1\nno: #### 2", "2"),
        ("the answer is 7", None),
        ("#### none", None),
        ("####", None),
        ("", None),
    ],
)
def test_final_number(text, number):
    assert FinalNumberScorer().final_number(text) == (None if number is None else Decimal(number))


def test_final_number_decides_and_not_the_way_there():
    right = ["2*3=6 #### 6", "6 #### 6.0", "6 #### 7", "6"]
    scores = FinalNumberScorer().score(answers(*right), examples(*[["2*3=6 #### 6"]] * 4), Characters())
    assert scores == {"accuracy": 0.5, "exact_match": 0.25}
    marked = FinalNumberScorer(marker="answer:")
    assert marked.score(answers("answer: 4"), examples(["so answer: 4"]), Characters())["accuracy"] == 1


def test_the_scorer_of_the_documentation():
    text = (Path(__file__).parent.parent.parent / "docs" / "benchmark.md").read_text(encoding="utf-8")
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], names)
    assert names["SameLength"]().score(answers("ab", "c"), examples(["xy"], ["xyz", "xy"]), None) == {"accuracy": 0.5}
