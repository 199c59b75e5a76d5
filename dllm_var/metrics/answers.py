"""Scores of generated answers against references: what is wrong in them, and whether they ended where they should."""

from collections.abc import Sequence
from typing import Any

import torch
from rapidfuzz.distance import Levenshtein
from torchmetrics import Metric

from dllm_var.sampling import Generation

PER_ANSWER = (  # figures that are a count over the number of answers
    "answer_error_rate", "ended_by_eos", "length_exact", "premature", "overrun", "hit_limit", "length_error",
)  # fmt: skip
COUNTS = (*PER_ANSWER, "answers", "edits", "reference_tokens", "tokens", "forwards", "drafted", "accepted")


class AnswerMetrics(Metric):
    """Error and termination rates of generated answers, each scored against the nearest of its references.

    Everything is a sum of counts, so several processes add up exactly. `compute()` gives plain floats, the rates as
    shares in [0, 1] (0 without any answer):

    - `token_error_rate`: edits (insert, delete, replace) over reference tokens; above 1 when answers run on.
    - `answer_error_rate`: share of answers that equal none of their references.
    - `ended_by_eos`, `hit_limit`: share that stopped at a terminator, and at the length limit.
    - `length_exact`, `premature` (ended by a terminator, too short), `overrun` (too long): shares.
    - `length_error`: mean absolute difference in length, in tokens.
    - `tokens_per_forward`: useful tokens (up to, excluding, the terminator) over forward passes, both summed over rows.
    - `tokens`, `answers`: totals.
    - `introspective_acceptance`: share of drafted tokens that the model confirmed; absent where nothing was drafted.

    `kwargs` are torchmetrics', for example `sync_on_compute=False` where only one process measures.
    """

    full_state_update = False
    counts: torch.Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("counts", default=torch.zeros(len(COUNTS), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, generations: Sequence[Generation], references: Sequence[Sequence[Sequence[int]]]) -> None:
        """Adds answers, one for each prompt, and for each of them its acceptable answers as token ids, at least one.

        References have no terminator. Raises ValueError when the two differ in number, or an answer has no reference.
        """
        rows = []
        for generation, answers in zip(generations, references, strict=True):
            reference, edits = nearest_reference(generation.tokens, answers)
            difference = len(generation.tokens) - len(reference)
            ended = generation.finish_reason == "eos"
            counts = {
                "answer_error_rate": edits > 0,
                "ended_by_eos": ended,
                "length_exact": difference == 0,
                "premature": ended and difference < 0,
                "overrun": difference > 0,
                "hit_limit": generation.finish_reason == "length",
                "length_error": abs(difference),
                "answers": 1,
                "edits": edits,
                "reference_tokens": len(reference),
                "tokens": len(generation.tokens),
                "forwards": generation.nfe,
                "drafted": generation.drafted,
                "accepted": generation.accepted,
            }
            rows.append([int(counts[name]) for name in COUNTS])
        self.counts += torch.tensor(rows, dtype=torch.long).view(-1, len(COUNTS)).sum(0).to(self.counts.device)

    def compute(self) -> dict[str, float]:
        total = dict(zip(COUNTS, self.counts.tolist(), strict=True))
        accepted = {"introspective_acceptance": total["accepted"] / total["drafted"]} if total["drafted"] else {}
        return {
            "token_error_rate": total["edits"] / max(total["reference_tokens"], 1),
            **{name: total[name] / max(total["answers"], 1) for name in PER_ANSWER},
            "tokens_per_forward": total["tokens"] / max(total["forwards"], 1),
            "tokens": float(total["tokens"]),
            "answers": float(total["answers"]),
            **accepted,
        }


def nearest_reference(answer: Sequence[int], references: Sequence[Sequence[int]]) -> tuple[Sequence[int], int]:
    """Returns the reference with the fewest edits from the answer (ties: closest in length, then the first) and the
    number of insertions, deletions and replacements; raises ValueError when there is no reference.
    """
    if not references:
        raise ValueError("an answer needs at least one reference to be scored against")
    scored = [(Levenshtein.distance(answer, reference), abs(len(answer) - len(reference))) for reference in references]
    best = min(range(len(references)), key=scored.__getitem__)
    return references[best], scored[best][0]
