"""Measures the samplers of one task: all of them on the same prompts, in turn, in one process."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from dllm_var.benchmarking.instruments import ForwardClock, PeakMemory, shown, synchronise
from dllm_var.benchmarking.results import best_setting, near_default, task_result, with_role
from dllm_var.benchmarking.scorers import Scorer
from dllm_var.benchmarking.settings import Entry, Task, expand
from dllm_var.checkpoints.pretrained import load_checkpoint
from dllm_var.datamodules import Example, Source
from dllm_var.datamodules.encoding import RecordEncoder
from dllm_var.errors import UserError
from dllm_var.metrics import AnswerMetrics
from dllm_var.model.kv_cache import KVCache
from dllm_var.model.transformer import Transformer
from dllm_var.sampling import Generation, Request, Sampler
from dllm_var.sampling.auxiliary import AuxiliaryModel
from dllm_var.settings import build
from dllm_var.text.tokenizer import Tokenizer

T = TypeVar("T")
FINAL_ROUNDS = 3  # times the usual number, for the two settings whose ratio is the result
WIDTHS = (1, 2, 4, 8, 12, 16, 32, 64, 128, 256)  # tokens per forward at which the cost of a forward is measured
PREFIX = 64  # cached tokens before these
READING_SECONDS = 0.02  # one reading repeats a small forward until it takes this long
ENDINGS = ("ended_by_eos", "hit_limit", "length_exact", "premature", "overrun", "length_error")


@dataclass
class Run:
    """One decode of a list of prompts."""

    answers: list[Generation]
    seconds: list[float]  # of each call of `generate`
    forward_seconds: float  # the part of it inside transformers
    forward_calls: int

    @property
    def tokens(self) -> int:
        """Useful tokens: no prompt, no terminator, nothing behind it."""
        return sum(len(answer.tokens) for answer in self.answers)


@dataclass
class Contender:
    """A setting with its sampler and model, and its measurements so far."""

    setting: Entry
    sampler: Sampler
    model: Transformer
    scores: dict[str, float] = field(default_factory=dict)  # figures of its answers; empty until scored
    single: list[Run] = field(default_factory=list)  # one prompt at a time
    batched: list[Run] = field(default_factory=list)
    memory: dict[str, int | None] = field(default_factory=dict)  # peak bytes beyond the models, `single` and `batched`
    selection_scores: dict[str, float] = field(default_factory=dict)  # on the split that chooses the best setting
    selection_single: list[Run] = field(default_factory=list)

    @property
    def models(self) -> list[Transformer]:
        """The model, and the one that the sampler brings."""
        brought = [value for value in vars(self.sampler).values() if isinstance(value, AuxiliaryModel)]
        return [self.model, *(one.beside(self.model, Request()) for one in brought)]


@dataclass
class Effort:
    """Rounds of each timing, longest answer in tokens (None: the samplers' own), widths of measured forwards."""

    repeats: int = 3
    limit: int | None = None
    widths: Sequence[int] = WIDTHS


class TaskRun:
    """All measurements of one task; they are kept when an exception ends it.

    Args:
        task: What to measure.
        effort: How much to measure.
        device: Where the models go.

    Raises:
        UserError: When its source, scorer or a sampler cannot be built, a checkpoint cannot be loaded, or a split has
            no prompts.
    """

    def __init__(self, task: Task, effort: Effort, device: torch.device) -> None:
        self.task, self.effort, self.device = task, effort, device
        where = f"task {task.name}"
        settings, self.curves = expand(task)
        samplers = [build(Sampler, "sampler", one.sampler, f"{where}, {one.name}") for one in settings]
        self.source: Source = build(Source, "source", task.source, where)
        self.scorer: Scorer = build(Scorer, "scorer", task.scorer, where)
        self._loaded: dict[str, tuple[Transformer, Tokenizer]] = {}
        self.model, self.tokenizer = self._load(task.checkpoint)
        self.contenders = []
        for setting, sampler in zip(settings, samplers, strict=True):
            if hasattr(sampler, "batch_size"):
                sampler.batch_size = task.batch_size
            self.contenders.append(Contender(setting, sampler, self._model(setting)))
        most = max(getattr(s, count) for s in settings for count in ("prompts", "single_prompts", "batched_prompts"))
        self.examples = self._examples(task.split, most)
        self.selection_examples = self._examples(task.selection_split, task.selection_prompts)
        self.forward_costs: list[dict[str, float]] = []
        self.seconds = 0.0

    def run(self) -> None:
        """Takes all measurements."""
        began = time.perf_counter()
        gc.collect()
        gc.freeze()  # the models and examples stay; collecting before each run is then quick
        try:
            self._warm_up()
            self._score()
            for contender in self._rounds("speed", self.contenders, self.effort.repeats):
                self._time(contender)
            self._select()
            self._time_finalists()
            self.forward_costs = measure_forwards(self.model, self.effort.widths, 5 * self.effort.repeats)
        finally:
            gc.unfreeze()
            self.seconds = time.perf_counter() - began

    @property
    def has_begun(self) -> bool:
        """Whether there is anything to report."""
        return self.seconds > 0

    def result(self) -> dict[str, Any]:
        """Returns the measurements, complete or not, as plain data."""
        return task_result(self)

    def _warm_up(self) -> None:
        for contender in self.contenders:  # one token with every sampler, so that a mistake shows now
            try:
                contender.sampler.generate(contender.model, [self.examples[0].prompt_ids], max_new_tokens=1)
            except UserError as error:
                raise UserError(f"task {self.task.name}, {contender.setting.name}: {error}") from error
        for contender in self._each("warm-up", self.contenders):
            with PeakMemory(self.device) as memory:
                self._decode(contender, self.examples[:1])
            contender.memory["single"] = memory.bytes

    def _score(self) -> None:
        for contender in self._each("accuracy", self.contenders):
            examples = self.examples[: contender.setting.prompts]
            with PeakMemory(self.device) as memory:
                run = self._decode(contender, examples, one_by_one=False)
            contender.memory["batched"] = memory.bytes
            contender.scores = self.score(run.answers, examples)

    def _time(self, contender: Contender) -> None:
        setting = contender.setting
        contender.single.append(self._decode(contender, self.examples[: setting.single_prompts]))
        if setting.batched_prompts:
            examples = self.examples[: setting.batched_prompts]
            contender.batched.append(self._decode(contender, examples, one_by_one=False))

    def _select(self) -> None:
        """Scores the candidates on the other split, and times those whose accuracy is near the default's."""
        candidates = [contender for contender in self.contenders if contender.setting.role in ("candidate", "default")]
        default = with_role(candidates, "default")
        if default is None:
            return
        examples, split = self.selection_examples, self.task.selection_split
        for contender in self._each(f"accuracy, {split} split", candidates):
            run = self._decode(contender, examples, one_by_one=False)
            contender.selection_scores = self.score(run.answers, examples)
        timed = examples[: -(-self.task.single_prompts // 2)]
        for contender in self._rounds(f"speed, {split} split", near_default(candidates), self.effort.repeats):
            contender.selection_single.append(self._decode(contender, timed))

    def _time_finalists(self) -> None:
        """Times the best setting and the autoregressive twin more often, side by side.

        Their ratio is the benchmark's main result; on a machine with other work the rounds so far are too few.
        """
        best, twin = best_setting(self.contenders), with_role(self.contenders, "autoregressive")
        if best is not None and twin is not None:
            rounds = FINAL_ROUNDS * self.effort.repeats
            for contender in self._rounds("the best setting and its twin", [best, twin], rounds):
                self._time(contender)

    def score(self, answers: Sequence[Generation], examples: Sequence[Example]) -> dict[str, float]:
        """Returns the scorer's figures of some answers, how they end, and the forwards of all models per answer."""
        metrics = AnswerMetrics(sync_on_compute=False)
        metrics.update(answers, [example.references for example in examples])
        figures = metrics.compute()
        forwards = sum(answer.nfe + answer.auxiliary_nfe for answer in answers)
        return {
            **self.scorer.score(answers, examples, self.tokenizer),
            **{name: figures[name] for name in ENDINGS},
            "nfe": forwards / max(len(answers), 1),
            "tokens_per_forward": figures["tokens"] / max(forwards, 1),
            "prompts": len(answers),
        }

    def _decode(self, contender: Contender, examples: Sequence[Example], one_by_one: bool = True) -> Run:
        gc.collect()
        return decode(contender, [e.prompt_ids for e in examples], one_by_one, self.effort.limit, self.device)

    def _load(self, path: str) -> tuple[Transformer, Tokenizer]:
        if path not in self._loaded:
            self._loaded[path] = load_checkpoint(path, self.device)[:2]
        return self._loaded[path]

    def _model(self, setting: Entry) -> Transformer:
        named = {"diffusion": self.task.checkpoint, "autoregressive": self.task.autoregressive_checkpoint}
        path = named.get(setting.checkpoint, setting.checkpoint)
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
        table = RecordEncoder(self.tokenizer).encode(list(self.source.located_records(split)))
        examples = table.examples(self.tokenizer, count)
        if not examples:
            raise UserError(f"task {self.task.name}: the {split} split has no prompts with answers")
        return examples

    def _rounds(self, phase: str, contenders: Sequence[Contender], rounds: int) -> Iterator[Contender]:
        for number, order in enumerate(turns(contenders, rounds), 1):
            yield from self._each(f"{phase}, round {number} of {rounds}", order)

    def _each(self, phase: str, contenders: Sequence[Contender]) -> Iterator[Contender]:
        yield from shown(f"{self.task.name}: {phase}", contenders)


def decode(
    contender: Contender, prompts: list[list[int]], one_by_one: bool, limit: int | None, device: torch.device
) -> Run:
    """Decodes prompts of token ids and takes the time of each call of `generate`.

    The prompts go in one by one, or all in one call. `limit` is the longest answer (None: the sampler's).
    """
    answers: list[Generation] = []
    seconds: list[float] = []
    with ForwardClock(contender.models) as clock:
        for call in [[prompt] for prompt in prompts] if one_by_one else [prompts]:
            synchronise(device)
            began = time.perf_counter()
            answers += contender.sampler.generate(contender.model, call, max_new_tokens=limit)
            synchronise(device)
            seconds.append(time.perf_counter() - began)
    return Run(answers, seconds, clock.seconds, clock.calls)


def turns(items: Sequence[T], rounds: int) -> Iterator[list[T]]:
    """Yields the order of each round: every item once, beginning further on each time, so that none is always first."""
    for number in range(rounds):
        start = number * len(items) // rounds
        yield [*items[start:], *items[:start]]


@torch.inference_mode()
def measure_forwards(model: Transformer, widths: Sequence[int], rounds: int) -> list[dict[str, float]]:
    """Measures forwards (layers and head, batch 1) of several widths behind `PREFIX` cached tokens, in turn.

    Returns:
        For each width, one token included: `width`, `seconds` (median over rounds) and `relative` to one token's.
    """
    weight = model.embedding.weight
    widths = sorted({1, *widths})
    cache = KVCache(model.config, 1, PREFIX + widths[-1], weight.device, weight.dtype)
    tokens = torch.zeros(1, max(PREFIX, widths[-1]), dtype=torch.long, device=weight.device)
    cache.open(PREFIX)
    model.hidden_states(tokens[:, :PREFIX], cache=cache)
    cache.advance(torch.tensor([PREFIX]))

    def seconds(width: int, times: int) -> float:
        synchronise(weight.device)
        began = time.perf_counter()
        for _ in range(times):
            cache.open(width)
            model.lm_head(model.hidden_states(tokens[:, :width], cache=cache))
        synchronise(weight.device)
        return (time.perf_counter() - began) / times

    warm_up = {width: min(seconds(width, 1) for _ in range(3)) for width in widths}
    times = {width: max(1, round(READING_SECONDS / cost)) for width, cost in warm_up.items()}
    readings = [{width: seconds(width, times[width]) for width in widths} for _ in range(rounds)]
    medians = {width: statistics.median(reading[width] for reading in readings) for width in widths}
    return [{"width": width, "seconds": cost, "relative": cost / medians[1]} for width, cost in medians.items()]
