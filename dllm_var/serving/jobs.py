"""Jobs: answers that are asked for, and how what is decoded of them gets back to whoever asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

from dllm_var.sampling.base import Generation, Request
from dllm_var.sampling.engine import EngineSampler
from dllm_var.sampling.recording import RecordedStep
from dllm_var.sampling.stopping import StopStrings, settled_text
from dllm_var.serving.metrics import Metrics
from dllm_var.text.tokenizer import Tokenizer


class Part(NamedTuple):
    """How far a streamed answer is."""

    text: str  # what is new of it
    tokens: list[int]  # all so far, also those whose text is held back
    log_probabilities: list[float] | None  # of the tokens, if they are wanted


Told = Part | RecordedStep | Generation | Exception  # what a job's owner gets to know


class Drawing(NamedTuple):
    """How tokens are drawn. Answers share an engine, and so a batch, when they draw in the same way."""

    temperature: float
    top_k: int
    top_p: float
    seed: int


@dataclass(eq=False)
class Job:
    """One answer that is asked for.

    `tell` is called in the decoding thread, with each new part when the job `streams`, with each step when it
    `records`, and at the end with the answer or with what went wrong.
    """

    prompt: list[int]
    limit: int  # tokens of the longest answer
    key: int  # number of its draws
    sampler: EngineSampler
    drawing: Drawing
    tell: Callable[[Told], None]
    stop: StopStrings | None = None
    gap: range | None = None  # where in the prompt masks stand for the answer, when text follows it
    streams: bool = False
    records: bool = False  # whether each step is told, too
    log_probabilities: bool = False  # whether those of the tokens are wanted
    known: list[float] | None = None  # those of the answer so far
    group: int = 0  # after a failure, the number of those that it is decoded with
    heard: int = 0  # steps that were told
    shown: str = ""  # what was told of the text
    gone: bool = False  # nobody waits for it any more
    request: Request = field(default_factory=Request)

    def begin(self, tokenizer: Tokenizer, metrics: Metrics, check: Callable[[], None]) -> None:
        """Prepares a job for its engine: from then on what its `request` learns of the answer is told."""
        numbers = count(1)

        def on_block(_: int, tokens: list[int]) -> None:
            text = settled_text(tokens, tokenizer, self.stop)
            if len(text) > len(self.shown) and text.startswith(self.shown):
                self.tell(Part(text[len(self.shown) :], tokens, self.known))
                self.shown = text

        def on_step(_: int, step: RecordedStep) -> None:
            number = next(numbers)
            if number > self.heard:  # after a failure the answer begins again
                self.heard = number
                self.tell(step)

        def on_answer(_: int, answer: Generation) -> None:
            metrics.count(answer)
            self.tell(answer)

        self.request = Request(
            tokenizer=tokenizer,
            stop=self.stop,
            on_block=on_block if self.streams else None,
            on_answer=on_answer,
            on_step=on_step,
            check=check,
            log_probabilities=self.log_probabilities or self.records,
            records=self.records,
        )


@dataclass
class Jobs(Request):
    """Takes what an engine says of its rows to the jobs they belong to; nobody hears of rows without one."""

    jobs: dict[int, Job] = field(default_factory=dict)
    entered: int = 0  # jobs so far
    over: list[int] = field(default_factory=list)  # rows that have ended, for the engine to forget

    @property
    def follows(self) -> bool:
        return any(job.request.follows for job in self.jobs.values())

    def advanced(self, index: int, tokens: list[int], log_probabilities: list[float] | None) -> bool:
        job = self.jobs.get(index)
        if job is None:
            return False
        job.known = log_probabilities
        return job.request.advanced(0, tokens, log_probabilities)

    def wants_steps(self, index: int) -> bool:
        return self.records and index in self.jobs and self.jobs[index].records

    def stepped(self, index: int, *what: Any) -> None:
        self.jobs[index].request.stepped(0, *what)

    def finished(self, index: int, answer: Generation) -> None:
        job = self.jobs.get(index)
        if job is not None:
            job.request.finished(0, answer)
            del self.jobs[index]
        self.over.append(index)
