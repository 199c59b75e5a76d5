"""The one thread that owns the model. Answers enter and leave its engines between two forwards."""

from __future__ import annotations

import logging
import threading
import traceback
from collections import deque
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import fields
from itertools import count
from typing import Any

import torch

from dllm_var.errors import UserError
from dllm_var.model.transformer import Transformer
from dllm_var.sampling.base import Sampler, special_ids
from dllm_var.sampling.engine import Engine, EngineSampler
from dllm_var.sampling.guards import NotFinite, finite_logits, lacks_memory, without_training_modes
from dllm_var.sampling.infilling import gap_filler, settings_of
from dllm_var.serving.jobs import Job, Jobs
from dllm_var.serving.metrics import Metrics
from dllm_var.text.tokenizer import Tokenizer

LOG = logging.getLogger("dllm_var.serving")


OWN = "default"  # name of the sampler that answers when none is named


class Busy(Exception):
    """The queue is full."""


class Stopped(Exception):
    """The server is shutting down, or its decoding thread has died."""


class Failed(Exception):
    """An answer could not be decoded, for a reason that is not the client's."""


class Decoder(threading.Thread):
    """Decodes jobs in the order in which they come, many at a time.

    A running engine takes jobs that draw as its others do. For other jobs there are further engines, which take a
    forward each in turn; a job for which there may be no further one waits, and no later job passes it.

    Args:
        context: Tokens that a prompt and its answer may have together.
        max_queue: Jobs that may wait.
        max_engines: Engines at a time; each has caches of `batch_size` x `context` tokens when all its rows are in use.
        others: Further samplers that a job may have, by name.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        sampler: Sampler,
        context: int,
        max_queue: int,
        max_engines: int,
        metrics: Metrics,
        others: Mapping[str, EngineSampler] | None = None,
    ) -> None:
        super().__init__(name="decoder", daemon=True)
        if not isinstance(sampler, EngineSampler):
            raise UserError(f"serve cannot use {type(sampler).__name__}: it decodes with a subclass of EngineSampler")
        sampler.check_model(model)
        self.model, self.tokenizer, self.sampler, self.metrics = model, tokenizer, sampler, metrics
        self.context, self.max_queue, self.max_engines = context, max_queue, max_engines
        self.samplers: dict[str, EngineSampler] = {OWN: sampler, **(others or {})}
        self.engines: dict[Any, Engine[Any]] = {}
        self.queue: deque[Job] = deque()
        self.changed = threading.Condition()  # guards the queue; held for a moment only
        self.closing = False
        self.indices = count()
        metrics.queue_length.set_function(lambda: len(self.queue))
        metrics.rows.set_function(lambda: sum(len(wanted(engine).jobs) for engine in [*self.engines.values()]))

    # -- from any thread -----------------------------------------------------------------------------------------------

    def submit(self, jobs: Sequence[Job]) -> None:
        """Adds jobs to the queue, all or none; raises Busy or Stopped."""
        with self.changed:
            if self.closing or not self.is_alive():
                raise Stopped
            if len(self.queue) + len(jobs) > self.max_queue:
                raise Busy
            self.queue.extend(jobs)
            self.changed.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Drops jobs before the next forward; those that are done are no matter."""
        with self.changed:
            for job in jobs:
                job.gone = True
            self.changed.notify()

    def close(self) -> None:
        """Lets the thread finish what it has, and waits for its end."""
        with self.changed:
            self.closing = True
            self.changed.notify()
        if self.is_alive():
            self.join()

    # -- the thread ----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        try:
            with (
                torch.inference_mode(),
                without_training_modes(self.model),
                finite_logits(self.model) as self.check,
            ):
                while self._wait():
                    self._admit()
                    for key in [*self.engines]:
                        self._step(key)
        except BaseException as error:
            log_failure("the decoding thread has died", error)
            with self.changed:
                self.closing = True
                left = [*self.queue, *(job for engine in self.engines.values() for job in wanted(engine).jobs.values())]
                self.queue.clear()
            for job in left:
                job.tell(Stopped())

    def _wait(self) -> bool:
        """Waits for something to do; returns whether there is."""
        with self.changed:
            while not (self.engines or self.queue or self.closing):
                self.changed.wait()
            return bool(self.engines or self.queue)

    def _admit(self) -> None:
        """Drops what nobody waits for, and moves jobs from the queue to engines."""
        for engine in self.engines.values():
            for index, job in [*wanted(engine).jobs.items()]:
                if job.gone:
                    del wanted(engine).jobs[index]
                    engine.leave(index)
        while True:
            with self.changed:
                for job in [job for job in self.queue if job.gone]:
                    self.queue.remove(job)
                next_one = self._next()
                if next_one is None:
                    return
                self.queue.remove(next_one)
            self._enter(next_one)

    def _next(self) -> Job | None:
        for job in self.queue:
            engine = self.engines.get(self._key(job))
            if engine is None:
                return job if len(self.engines) < self.max_engines else None
            if len(engine.active) + len(engine.waiting) < job.sampler.batch_size:
                return job
        return None

    def _key(self, job: Job) -> Any:
        """Returns what jobs of one engine have in common."""
        if job.gap is not None:
            return job  # no other has its engine
        return job.group, id(job.sampler), job.drawing, None if job.sampler.engine.has_limits else job.limit

    def _enter(self, job: Job) -> None:
        key = self._key(job)
        try:
            if key not in self.engines:
                self.engines[key] = self._engine(job)
        except Exception as error:
            job.tell(failure(error))
            return
        engine, index = self.engines[key], next(self.indices) if job.gap is None else 0
        job.begin(self.tokenizer, self.metrics, self.check)
        wanted(engine).jobs[index] = job
        wanted(engine).entered += 1
        if job.gap is None:
            engine.enter(index, job.prompt, job.key, job.limit)

    def _engine(self, job: Job) -> Engine[Any]:
        """Returns a new engine for a job and for others like it; one that fills a gap has its job from the start."""
        sampler = copy(job.sampler)
        for name, value in job.drawing._asdict().items():
            setattr(sampler, name, value)
        if job.gap is None:
            # Where rows have limits of their own, all engines shall be alike: captured steps are found again.
            limit = None if sampler.engine.has_limits else job.limit
            shared = Jobs(max_new_tokens=limit, tokenizer=self.tokenizer, context=self.context)
            return sampler.engine(sampler, self.model, [], shared)
        filler = gap_filler([job.gap], **settings_of(sampler))
        engine = filler.engine(filler, self.model, [job.prompt], Jobs(suppressed=special_ids(self.model)[1]))
        engine.keys[0] = job.key
        return engine

    def _step(self, key: Any) -> None:
        """Takes the rows of an engine one forward further, and ends the engine when it has none."""
        engine = self.engines[key]
        told = wanted(engine)
        try:
            if told.jobs:
                told.records = any(job.records for job in told.jobs.values())
                told.log_probabilities = any(job.request.log_probabilities for job in told.jobs.values())
                engine.fit_rows()
                engine.advance()
                self.check()  # now, while it is known whose forward it was
                self.metrics.steps.inc()
            for index in told.over:
                engine.leave(index)
            told.over.clear()
            if not told.jobs:
                engine.close()
        except Exception as error:
            self._divide(told, self._reason(error))
            told.jobs.clear()
        if not told.jobs:
            del self.engines[key]

    def _reason(self, error: Exception) -> Exception:
        """Returns an error, or that of predictions that were not numbers: whatever was raised came of it."""
        try:
            self.check()
        except NotFinite as reason:
            assert self.model.not_finite is not None
            self.model.not_finite.zero_()  # the next answers may be numbers
            return reason
        return error

    def _divide(self, told: Jobs, error: Exception) -> None:
        """Tells the job of a failed engine; of several, each half is decoded anew, to find whose fault it was.

        So a request that fails takes nobody with it. A job that has had neighbours is decoded once more alone.
        """
        jobs = [*told.jobs.values()]
        if len(jobs) == told.entered == 1:
            jobs[0].tell(failure(error))
        if len(jobs) == told.entered == 1 or not jobs:
            return
        LOG.warning("%d answers failed together (%s): decoding each half again", len(jobs), type(error).__name__)
        for part in jobs[::2], jobs[1::2]:
            group = next(self.indices) + 1
            for job in part:
                job.group = group
        with self.changed:
            self.queue.extendleft(jobs)


def can_draw(sampler: EngineSampler) -> bool:
    """Whether a sampler has a temperature above 0."""
    return next(one.init for one in fields(sampler) if one.name == "temperature")


def wanted(engine: Engine[Any]) -> Jobs:
    """Returns the jobs of an engine of this file."""
    assert isinstance(engine.request, Jobs)
    return engine.request


def failure(error: Exception) -> Exception:
    """Returns what the client is told of an error."""
    if isinstance(error, UserError):
        return Failed(str(error))
    if lacks_memory(error):
        return Failed("not enough memory: start the server with a smaller --max-tokens or --batch-size")
    log_failure("decoding failed", error)
    return Failed("decoding failed; the server's log says where")


def log_failure(what: str, error: BaseException) -> None:
    """Logs where an error was raised, without its message: it may hold text of a prompt."""
    LOG.error("%s: %s\n%s", what, type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
