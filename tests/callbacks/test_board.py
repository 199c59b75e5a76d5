"""What TensorBoard shows of answers: tables that say what the cells say, and a picture of the order of tokens."""

import markdown
import numpy as np
import pytest

from dllm_var.callbacks.board import EARLY_TO_LATE, markdown_table, replay_picture
from dllm_var.datamodules import CmudictSource
from dllm_var.sampling import Generation
from dllm_var.text.tokenizer import Tokenizer


@pytest.mark.parametrize("cell", ["a | b", "<b>x</b>", "[K] *and* _so_", "a\\b", "# 1. - `x`", "5 < 6 & 7", "&lt;"])
def test_a_cell_of_a_table_reads_as_it_is(cell: str) -> None:
    page = markdown.markdown(markdown_table([{"answer": cell, "end": "eos"}]), extensions=["tables"])
    shown = page.split("<td>")[1].split("</td>")[0]
    assert shown.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&") == cell
    assert page.count("<td>") == 2


def test_the_picture_colours_tokens_by_their_forward_pass_and_wraps_long_answers() -> None:
    tokenizer = Tokenizer.from_pretrained(str(CmudictSource().default_tokenizer))
    tokens = tokenizer.encode("K IY B AO R D")

    def shades(steps: list[int] | None, times: int = 1) -> tuple[set, int]:
        answer = Generation(tokens * times, "eos", nfe=3, seconds=0.1, prompt_length=8, commit_steps=steps)
        picture = replay_picture("keyboard", answer, tokenizer)
        return {tuple(pixel) for pixel in np.unique(picture.reshape(-1, 3), axis=0)}, picture.shape[0]

    early, middle, late = EARLY_TO_LATE
    found, height = shades([1, 1, 2, 3, 3, 3])
    assert {early, middle, late} <= found
    assert {early} == {early, middle, late} & shades([1] * 6)[0]
    assert not {early, middle, late} & shades(None)[0]  # a sampler that does not record it
    high = shades([1] * 60, times=10)[1]
    assert shades([1] * 6_000, times=1_000)[1] == shades([1] * 1_200, times=200)[1] > high > height
