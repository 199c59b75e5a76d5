"""Sampled answers in TensorBoard: a table with marks, their lengths, and an answer in the order its tokens came."""

import html
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from PIL import Image, ImageDraw, ImageFont

from dllm_var.sampling import Generation
from dllm_var.text.tokenizer import Tokenizer

WIDTH, MARGIN, HEIGHT = 900, 12, 44  # of the picture, around it, and of a line of tokens, in pixels
SHOWN = 1000  # tokens in the picture at most: it is drawn in the midst of training
EARLY_TO_LATE = ((255, 238, 170), (245, 140, 95), (90, 70, 165))  # colours of the first, middle and last forward pass


def boards(loggers: Sequence[Logger]) -> list[Any]:
    """Returns the writers of the TensorBoard loggers among a run's loggers."""
    return [logger.experiment for logger in loggers if isinstance(logger, TensorBoardLogger)]


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns rows as a Markdown table with the first row's names as its header; cells are shown as they are."""
    header = list(rows[0])
    lines = [header, ["---"] * len(header), *([_cell(str(row[name])) for name in header] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    """Returns a text that Markdown and HTML leave as it is, on one line."""
    plain = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_{}\[\]()#+\-.!|])", r"\\\1", plain)


def replay_picture(prompt: str, answer: Generation, tokenizer: Tokenizer) -> npt.NDArray[np.uint8]:
    """Draws an answer [height, width, 3]: a token's colour and number are the forward pass that committed it.

    An answer of a sampler that does not record `commit_steps` has neither. No more than `SHOWN` tokens are drawn.
    """
    steps = (answer.commit_steps or [0] * len(answer.tokens))[:SHOWN]
    names = [tokenizer.shown(token) for token in answer.tokens[:SHOWN]]
    large, small = ImageFont.load_default(size=15), ImageFont.load_default(size=11)
    x, y, places = MARGIN, MARGIN + 30, []
    for name in names:
        width = int(max(large.getlength(name), 14)) + 12
        if x + width > WIDTH - MARGIN and x > MARGIN:
            x, y = MARGIN, y + HEIGHT
        places.append((x, y, x + width, y + HEIGHT - 6))
        x += width + 4
    picture = Image.new("RGB", (WIDTH, y + HEIGHT + MARGIN), "white")
    draw = ImageDraw.Draw(picture)
    title = f"{' '.join(prompt.split())[:70]}: {answer.nfe} forward passes, ended by {answer.finish_reason}"
    if answer.new_tokens > SHOWN:
        title += f"; the first {SHOWN:,} of {answer.new_tokens:,} tokens"
    draw.text((MARGIN, MARGIN), title, fill="black", font=large)
    for name, step, place in zip(names, steps, places, strict=True):
        colour = _colour((step - 1) / max(max(steps) - 1, 1)) if step else (235, 235, 235)
        ink = "black" if sum(colour) > 420 else "white"
        draw.rounded_rectangle(place, 5, fill=colour)
        draw.text(((place[0] + place[2]) / 2, place[1] + 12), name, fill=ink, font=large, anchor="mm")
        draw.text(((place[0] + place[2]) / 2, place[1] + 28), str(step or ""), fill=ink, font=small, anchor="mm")
    return np.asarray(picture)


def _colour(share: float) -> tuple[int, ...]:
    """Returns the colour at a share of the way from the first to the last forward pass."""
    return tuple(int(np.interp(share, (0, 0.5, 1), levels)) for levels in zip(*EARLY_TO_LATE, strict=True))
