"""Takes the figures of one task: every sampler on the same prompts, in turn, in one process."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from dllm_var.benchmarking.contenders import Contender, Run
from dllm_var.benchmarking.forward_cost import WIDTHS, ForwardCost, measure_forwards
from dllm_var.benchmarking.instruments import ForwardClock, PeakMemory, synchronise
from dllm_var.benchmarking.ratios import TOLERANCE, choose, with_role
from dllm_var.benchmarking.scorers import Scorer
from dllm_var.benchmarking.settings import Setting, Task, build, expand
from dllm_var.checkpoints.pretrained import load_checkpoint
from dllm_var.datamodules import Example, Source
from dllm_var.datamodules.encoding import RecordEncoder
from dllm_var.datamodules.held_out import held_out_examples
from dllm_var.errors import UserError
from dllm_var.metrics import AnswerMetrics
from dllm_var.model.transformer import Transformer
from dllm_var.sampling import Generation, Sampler
from dllm_var.text.tokenizer import Tokenizer

T = TypeVar("T")
Say = Callable[[str, str, str], None]  # task, phase, item
FINAL_ROUNDS = 3  # times the usual number, for the two settings whose ratio is asked for


@dataclass
class Effort:
    """How much is measured, whatever the task.

    Args:
        repeats: Rounds of each timing.
        limit: Longest answer in tokens, when samplers' own limits are too long for a smoke test.
        widths: Tokens per forward at which a forward's cost is measured.
    """

    repeats: int = 3
    limit: int | None = None
    widths: Sequence[int] = WIDTHS


class TaskRun:
    """All measurements of one task; what is there stays there when it is interrupted.

    Args:
        task: What to measure.
        effort: How much.
        device: Where the models go.
        say: Told what is going on.

    Raises:
        UserError: When a checkpoint, source, scorer or sampler of the task cannot be built, or decodes nothing.
    """

    def __init__(self, task: Task, effort: Effort, device: torch.device, say: Say) -> None:
        self.task, self.effort, self.device, self.say = task, effort, device, say
        where = f"task {task.name}"
        self.scorer: Scorer = build(Scorer, "scorer", task.scorer, where)
        self.source: Source = build(Source, "source", task.source, where)
        settings = expand(task)
        samplers = [build(Sampler, "sampler", s.sampler, f"{where}, {s.name}") for s in settings]
        self._loaded: dict[str, tuple[Transformer, Tokenizer]] = {}
        self.model, self.tokenizer = self._load(task.checkpoint)
        self.contenders = [
            Contender(setting, sampler, self._model(setting))
            for setting, sampler in zip(settings, samplers, strict=True)
        ]
        most = max(max(c.setting.prompts, c.setting.single_prompts, c.setting.batched_prompts) for c in self.contenders)
        self.examples = self._examples(task.split, most)
        self.selection_examples = self._examples(task.selection_split, task.selection_prompts)
        self.forward_costs: list[ForwardCost] = []
        self.seconds = 0.0

    def run(self) -> None:
        """Takes all measurements."""
        began = time.perf_counter()
        gc.collect()
        gc.freeze()  # what is loaded stays; collecting before each run then takes no time
        try:
            self._check()
            self._warm_up()
            self._score()
            self._time()
            self._select()
            self._time_finalists()
            self.say(self.task.name, "cost of a forward", "")
            self.forward_costs = measure_forwards(self.model, self.effort.widths, 5 * self.effort.repeats)
        finally:
            gc.unfreeze()
            self.seconds = time.perf_counter() - began

    def _check(self) -> None:
        """Decodes one token with every sampler, so that a mistake shows now and not in minutes."""
        for contender in self._each("check", self.contenders):
            try:
                contender.sampler.generate(contender.model, [self.examples[0].prompt_ids], max_new_tokens=1)
            except UserError as error:
                raise UserError(f"task {self.task.name}, {contender.setting.name}: {error}") from error

    def _warm_up(self) -> None:
        for contender in self._each("warm-up", self.contenders):
            with PeakMemory(self.device) as memory:
                self._decode(contender, self.examples[:1])
            contender.memory["single"] = memory.bytes

    def _score(self) -> None:
        """Scores every contender; those that score no more prompts than they time are scored by `_time`."""
        scored_here = [c for c in self.contenders if c.setting.prompts > c.setting.single_prompts]
        for contender in self._each("accuracy", scored_here):
            examples = self.examples[: contender.setting.prompts]
            with PeakMemory(self.device) as memory:
                run = self._decode(contender, examples, self.task.batch_size)
            contender.memory["batched"] = memory.bytes
            contender.scores = self.score(run.answers, examples)

    def _time(self) -> None:
        for number, order in enumerate(turns(self.contenders, self.effort.repeats), 1):
            for contender in self._each(f"one prompt at a time, round {number} of {self.effort.repeats}", order):
                run = self._decode(contender, self.examples[: contender.setting.single_prompts])
                contender.single.append(run)
                if not contender.scores:
                    count = contender.setting.prompts
                    contender.scores = self.score(run.answers[:count], self.examples[:count])
        in_batches = [contender for contender in self.contenders if contender.setting.batched_prompts]
        for number, order in enumerate(turns(in_batches, self.effort.repeats), 1):
            for contender in self._each(f"in batches, round {number} of {self.effort.repeats}", order):
                examples = self.examples[: contender.setting.batched_prompts]
                contender.batched.append(self._decode(contender, examples, self.task.batch_size))

    def _select(self) -> None:
        """Scores the candidates on the other split, and times those whose accuracy is near the default's."""
        candidates = [contender for contender in self.contenders if contender.setting.role in ("candidate", "default")]
        default = next((contender for contender in candidates if contender.setting.role == "default"), None)
        if default is None:
            return
        examples = self.selection_examples
        for contender in self._each(f"accuracy, {self.task.selection_split} split", candidates):
            run = self._decode(contender, examples, self.task.batch_size)
            contender.selection_scores = self.score(run.answers, examples)
        bar = default.selection_scores["accuracy"] - TOLERANCE
        near = [contender for contender in candidates if contender.selection_scores["accuracy"] >= bar]
        timed = examples[: -(-self.task.single_prompts // 2)]
        for number, order in enumerate(turns(near, self.effort.repeats), 1):
            for contender in self._each(f"{self.task.selection_split} split, round {number}", order):
                contender.selection_single.append(self._decode(contender, timed))

    def _time_finalists(self) -> None:
        """Times the chosen setting and the autoregressive twin once more, by turns and side by side.

        Their ratio is what the benchmark is for; on a machine that is not idle the rounds so far are too few to tell.
        """
        chosen, twin = choose(self.contenders), with_role(self.contenders, "autoregressive")
        if chosen is None or twin is None:
            return
        rounds = FINAL_ROUNDS * self.effort.repeats
        for number, order in enumerate(turns([chosen, twin], rounds), 1):
            for contender in self._each(f"the best setting and its twin, round {number} of {rounds}", order):
                contender.single.append(self._decode(contender, self.examples[: contender.setting.single_prompts]))
                if contender.batched:
                    examples = self.examples[: contender.setting.batched_prompts]
                    contender.batched.append(self._decode(contender, examples, self.task.batch_size))

    def score(self, answers: Sequence[Generation], examples: Sequence[Example]) -> dict[str, float]:
        """Returns the scorer's figures of some answers, how they end, and the forwards of all models they took."""
        metrics = AnswerMetrics(sync_on_compute=False)
        metrics.update(answers, [example.references for example in examples])
        ends = metrics.compute()
        forwards = sum(answer.nfe + answer.auxiliary_nfe for answer in answers)
        names = ("ended_by_eos", "hit_limit", "length_exact", "premature", "overrun", "length_error")
        return {
            **self.scorer.score(answers, examples, self.tokenizer),
            **{name: ends[name] for name in names},
            "nfe": forwards / max(len(answers), 1),
            "auxiliary_nfe": sum(answer.auxiliary_nfe for answer in answers) / max(len(answers), 1),
            "tokens_per_forward": ends["tokens"] / max(forwards, 1),
            "prompts": len(answers),
        }

    def _decode(self, contender: Contender, examples: Sequence[Example], batch_size: int = 1) -> Run:
        gc.collect()
        return decode(contender, [e.prompt_ids for e in examples], batch_size, self.effort.limit, self.device)

    def _load(self, path: str) -> tuple[Transformer, Tokenizer]:
        if path not in self._loaded:
            self._loaded[path] = load_checkpoint(path, self.device)[:2]
        return self._loaded[path]

    def _model(self, setting: Setting) -> Transformer:
        path: str | None = setting.checkpoint
        if path == "diffusion":
            path = self.task.checkpoint
        elif path == "autoregressive":
            path = self.task.autoregressive_checkpoint
        if path is None:
            raise UserError(f"task {self.task.name}: autoregressive_checkpoint is not set, but {setting.name} wants it")
        model, tokenizer = self._load(path)
        if tokenizer.fingerprint != self.tokenizer.fingerprint:
            raise UserError(f"task {self.task.name}: {path} has another tokenizer than {self.task.checkpoint}")
        return model

    def _examples(self, split: str, count: int) -> list[Example]:
        if split not in self.source.splits:
            has = ", ".join(self.source.splits)
            raise UserError(f"task {self.task.name}: {type(self.source).__name__} has no split {split}; it has {has}")
        table = RecordEncoder(self.tokenizer).encode(list(self.source.located_records(split)), 0)
        examples = held_out_examples(table, self.tokenizer, count)
        if not examples:
            raise UserError(f"task {self.task.name}: the {split} split has no prompts with answers")
        return examples

    def _each(self, phase: str, contenders: Sequence[Contender]) -> Iterator[Contender]:
        for number, contender in enumerate(contenders, 1):
            self.say(self.task.name, phase, f"{number}/{len(contenders)} {contender.setting.name}")
            yield contender


def decode(
    contender: Contender, prompts: list[list[int]], batch_size: int, limit: int | None, device: torch.device
) -> Run:
    """Decodes prompts and takes the time: one call each at batch 1, else one call if the sampler makes batches itself.

    Args:
        contender: The sampler and its model.
        prompts: Token ids.
        batch_size: Rows decoded at a time.
        limit: Longest answer; the sampler's own when null.
        device: Where the model is.
    """
    sampler: Any = contender.sampler
    own = getattr(sampler, "batch_size", None)
    whole = batch_size > 1 and isinstance(own, int)
    calls = [prompts] if whole else [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]
    answers: list[Generation] = []
    seconds: list[float] = []
    try:
        if whole:
            sampler.batch_size = batch_size
        with ForwardClock(contender.models) as clock:
            for call in calls:
                synchronise(device)
                began = time.perf_counter()
                answers += sampler.generate(contender.model, call, max_new_tokens=limit)
                synchronise(device)
                seconds.append(time.perf_counter() - began)
    finally:
        if whole:
            sampler.batch_size = own
    return Run(answers, seconds, clock.seconds, clock.calls)


def turns(items: Sequence[T], repeats: int) -> Iterator[list[T]]:
    """Yields the order of each round: every item once, beginning further on each time, so that none is always first."""
    for number in range(repeats):
        start = number * len(items) // repeats
        yield [*items[start:], *items[:start]]
