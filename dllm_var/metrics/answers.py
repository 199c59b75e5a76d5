"""Scores of generated answers against references: what is wrong in them, and whether they ended where they should."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torchmetrics import Metric

if TYPE_CHECKING:
    from dllm_var.sampling import Generation

COUNTS = (
    "answers",
    "wrong",
    "edits",
    "reference_tokens",
    "ended",
    "limited",
    "length_exact",
    "premature",
    "overrun",
    "length_difference",
    "tokens",
    "forwards",
)


class AnswerMetrics(Metric):
    """Error and termination rates of generated answers, each scored against the nearest of its references.

    The nearest reference is the one with the fewest edits and, among those, the one closest in length. Everything is a
    sum of counts, so several processes add up exactly. `compute()` gives plain floats, the rates as shares in [0, 1]:

    - `token_error_rate`: edits (insert, delete, replace) over reference tokens; above 1 when answers run on.
    - `answer_error_rate`: share of answers that equal none of their references.
    - `ended_by_eos`, `hit_limit`: share that stopped at a terminator, and at the length limit.
    - `length_exact`, `premature` (ended by a terminator, too short), `overrun` (too long): shares.
    - `length_error`: mean absolute difference in length, in tokens.
    - `tokens_per_forward`: useful tokens (up to, excluding, the terminator) over forward passes, both summed over rows.
    - `tokens`, `answers`: totals.

    Args:
        kwargs: Passed on to torchmetrics, for example `sync_on_compute=False` where only one process measures.
    """

    full_state_update = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in COUNTS:
            self.add_state(name, default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, generations: Sequence[Generation], references: Sequence[Sequence[Sequence[int]]]) -> None:
        """Add answers.

        Args:
            generations: One per prompt; `tokens`, `finish_reason` and `nfe` are read.
            references: For each generation its acceptable answers as token ids, without terminator; at least one.

        Raises:
            ValueError: The two differ in number, or an answer has no reference.
        """
        if len(generations) != len(references):
            raise ValueError(f"{len(generations)} generations but references for {len(references)}")
        counts = dict.fromkeys(COUNTS, 0)
        for generation, answers in zip(generations, references, strict=True):
            reference, edits = nearest_reference(generation.tokens, answers)
            difference = len(generation.tokens) - len(reference)
            ended = generation.finish_reason == "eos"
            counts["answers"] += 1
            counts["wrong"] += edits > 0
            counts["edits"] += edits
            counts["reference_tokens"] += len(reference)
            counts["ended"] += ended
            counts["limited"] += generation.finish_reason == "length"
            counts["length_exact"] += difference == 0
            counts["premature"] += ended and difference < 0
            counts["overrun"] += difference > 0
            counts["length_difference"] += abs(difference)
            counts["tokens"] += len(generation.tokens)
            counts["forwards"] += generation.nfe
        for name, count in counts.items():
            getattr(self, name).add_(int(count))

    def compute(self) -> dict[str, float]:
        """Give the rates over all answers so far; without any answer every rate is 0."""
        total = {name: int(getattr(self, name)) for name in COUNTS}
        answers = max(total["answers"], 1)
        return {
            "token_error_rate": total["edits"] / max(total["reference_tokens"], 1),
            "answer_error_rate": total["wrong"] / answers,
            "ended_by_eos": total["ended"] / answers,
            "length_exact": total["length_exact"] / answers,
            "premature": total["premature"] / answers,
            "overrun": total["overrun"] / answers,
            "hit_limit": total["limited"] / answers,
            "length_error": total["length_difference"] / answers,
            "tokens_per_forward": total["tokens"] / max(total["forwards"], 1),
            "tokens": float(total["tokens"]),
            "answers": float(total["answers"]),
        }


def nearest_reference(answer: Sequence[int], references: Sequence[Sequence[int]]) -> tuple[Sequence[int], int]:
    """Give the reference with the fewest edits from the answer (ties: closest in length, then the first) and the edits.

    Raises:
        ValueError: There is no reference.
    """
    if not references:
        raise ValueError("an answer needs at least one reference to be scored against")
    scored = [(edit_distance(answer, reference), abs(len(answer) - len(reference))) for reference in references]
    best = min(range(len(references)), key=scored.__getitem__)
    return references[best], scored[best][0]


def edit_distance(answer: Sequence[int], reference: Sequence[int]) -> int:
    """Levenshtein distance of two token sequences: insertions, deletions and replacements cost 1 each.

    Exact for any length, whereas torchmetrics' `edit_distance` searches a beam and takes strings only.
    """
    if not reference:
        return len(answer)
    *_, (_, _, distance) = _distance_columns(answer, reference)
    return distance


def align(answer: Sequence[int], reference: Sequence[int]) -> list[tuple[int | None, int | None]]:
    """Pair the positions of an answer with those of a reference along one shortest edit path.

    Returns:
        Pairs (position in answer, position in reference) from left to right; None stands where one has no counterpart.
    """
    columns = list(_distance_columns(answer, reference))
    row, column = len(answer), len(reference)
    pairs: list[tuple[int | None, int | None]] = []
    while row and column:
        up, _, _ = columns[column - 1]
        if up >> (row - 1) & 1:  # the distance rises with this token of the answer: it is one too many
            row -= 1
            pairs.append((row, None))
        elif column > 1 and columns[column - 2][1] >> (row - 1) & 1:  # a token of the reference is missing
            column -= 1
            pairs.append((None, column))
        else:
            row, column = row - 1, column - 1
            pairs.append((row, column))
    pairs += [(position, None) for position in reversed(range(row))]
    pairs += [(None, position) for position in reversed(range(column))]
    return pairs[::-1]


def _distance_columns(answer: Sequence[int], reference: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Yield, per reference token, where the distance table rises and falls down its column, and its last entry.

    Bit i of the two integers says whether the entry of answer token i is one more, or one less, than that above it
    (bit-parallel recurrence of Myers 1999 in the form of Hyyrö 2003; Python's integers have any width).
    """
    occurs: dict[int, int] = {}
    for position, token in enumerate(answer):
        occurs[token] = occurs.get(token, 0) | 1 << position
    every = (1 << len(answer)) - 1
    last = 1 << len(answer) >> 1
    rises, falls, distance = every, 0, len(answer)
    for token in reference:
        equal = occurs.get(token, 0)
        vertical = equal | falls
        horizontal = (((equal & rises) + rises) ^ rises) | equal
        right_rises = falls | (every & ~(horizontal | rises))
        right_falls = rises & horizontal
        distance += bool(right_rises & last) - bool(right_falls & last) if answer else 1
        right_rises = right_rises << 1 | 1
        right_falls <<= 1
        rises = (right_falls | ~(vertical | right_rises)) & every
        falls = right_rises & vertical & every
        yield rises, falls, distance
