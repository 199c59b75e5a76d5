"""Records of decoding: what each forward did to an answer, and a replay of it for `dllm_var.view`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dllm_var.sampling.base import Generation, Sampler
    from dllm_var.text.tokenizer import Tokenizer

Change = tuple[int, int | None, float | None]


@dataclass
class RecordedStep:
    """What a forward did to an answer."""

    forward: int  # its number, counted from 1
    length: int  # tokens and masks of the answer that are in sight
    starts: list[int]  # places in the answer where blocks begin that had not begun before
    changes: list[Change]  # place, token id (None where it was masked again), log-probability if it is known

    def as_json(self, tokenizer: Tokenizer | None) -> dict[str, Any]:
        """Returns the step as the page takes it: with texts and probabilities."""
        changes = [
            (place, None if token is None else piece(token, tokenizer), None if known is None else math.exp(known))
            for place, token, known in self.changes
        ]
        return {"forward": self.forward, "length": self.length, "starts": self.starts, "changes": changes}


@dataclass
class Recording:
    """The steps of one answer, from what its row holds after each forward."""

    steps: list[RecordedStep] = field(default_factory=list)
    _tokens: dict[int, int] = field(default_factory=dict)  # by their places
    _starts: set[int] = field(default_factory=set)

    def add(
        self,
        forward: int,
        tokens: Sequence[int | None],
        log_probabilities: Sequence[float] | None,
        starts: Sequence[int] = (),
    ) -> RecordedStep | None:
        """Adds the answer as a forward left it, with None for masks; returns what is new, None if nothing is."""
        changes: list[Change] = []
        for place, token in enumerate(tokens):
            if token != self._tokens.get(place):
                known = None if token is None or log_probabilities is None else log_probabilities[place]
                changes.append((place, token, known))
        last = self.steps[-1] if self.steps else None
        if last is not None and not changes and (last.forward, last.length) == (forward, len(tokens)):
            return None  # a row that is done waits for its group
        self._tokens = {place: token for place, token in enumerate(tokens) if token is not None}
        new = [place for place in starts if place not in self._starts]
        self._starts.update(new)
        self.steps.append(RecordedStep(forward, len(tokens), new, changes))
        return self.steps[-1]


def steps_of(answer: Generation) -> list[RecordedStep]:
    """Returns what each forward did to an answer: as recorded, or else as far as its commit steps tell."""
    if answer.steps is not None or answer.commit_steps is None:
        return answer.steps or []
    known: Sequence[float | None] = answer.log_probabilities or [None] * len(answer.tokens)
    steps = [RecordedStep(forward, len(answer.tokens), [], []) for forward in range(1, answer.nfe + 1)]
    for place, (token, forward, log_p) in enumerate(zip(answer.tokens, answer.commit_steps, known, strict=True)):
        if forward:
            steps[forward - 1].changes.append((place, token, log_p))
    return steps


def replay_of(answer: Generation, prompt: str | None = None, label: str = "") -> dict[str, Any]:
    """Returns an answer as `dllm_var.view.page` shows it.

    Args:
        prompt: The prompt's text; the decoded prompt when None.
        label: How the answer was decoded.
    """
    tokenizer = answer.tokenizer
    if prompt is None:
        prompt = "" if tokenizer is None or answer.prompt is None else tokenizer.decode(answer.prompt)
    steps = [step.as_json(tokenizer) for step in steps_of(answer)]
    decided = answer.commit_steps or [int(bool(steps))] * len(answer.tokens)  # nothing known: all tokens from the start
    known = enumerate(zip(answer.tokens, decided, strict=True))
    given = {place: piece(token, tokenizer) for place, (token, forward) in known if not forward}
    for step in steps:  # the first of a recording brings what no forward has decided
        step["changes"] = [change for change in step["changes"] if change[0] not in given]
    return {
        "prompt": prompt,
        "label": label,
        "length": len(answer.tokens),
        "given": [*given.items()],
        "steps": steps,
        **summary_of(answer),
    }


def label_of(sampler: Sampler) -> str:
    """Returns the names of a sampler's class and of its policy's, if it has one."""
    policy = getattr(sampler, "policy", None)
    return ", ".join(type(part).__name__ for part in (sampler, policy) if part is not None)


def summary_of(answer: Generation) -> dict[str, Any]:
    """Returns what an answer took, as the page takes it."""
    return {
        "text": answer.text,
        "tokens": answer.new_tokens,
        "forwards": answer.nfe,
        "auxiliary": answer.auxiliary_nfe,
        "seconds": answer.seconds,
        "finish": answer.finish_reason,
    }


def piece(token: int, tokenizer: Tokenizer | None) -> str:
    """Returns one token on one line, its number without a tokenizer."""
    return str(token) if tokenizer is None else tokenizer.shown(token)
