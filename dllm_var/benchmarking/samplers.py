"""Measures the samplers of one task: all of them on the same prompts, in turn, in one process."""

import gc
import time
from collections.abc import Iterator, Sequence
from functools import cache, partial
from statistics import median
from typing import Any

import torch
from torch.utils.benchmark import Timer

from dllm_var.benchmarking.instruments import ForwardClock, PeakMemory, shown, synchronise
from dllm_var.benchmarking.results import (
    Contender,
    Decoding,
    at_equal_accuracy,
    best_setting,
    equal_to_twin,
    near_default,
    task_result,
    with_role,
)
from dllm_var.benchmarking.scorers import Scorer
from dllm_var.benchmarking.settings import COUNTS, Task, expand
from dllm_var.checkpoints.pretrained import load_checkpoint
from dllm_var.datamodules import Example, Source
from dllm_var.datamodules.table import RecordEncoder
from dllm_var.errors import UserError
from dllm_var.metrics import AnswerMetrics
from dllm_var.model.kv_cache import KVCache
from dllm_var.model.transformer import Transformer
from dllm_var.sampling import Generation, Sampler
from dllm_var.settings import build

FINAL_ROUNDS = 3  # times the usual number, for the settings whose ratios are the results
WIDTHS = (1, 2, 4, 8, 12, 16, 32, 64, 128, 256)  # tokens per forward at which the cost of a forward is measured
PREFIX = 64  # cached tokens before these
READING_SECONDS = 0.02  # one reading repeats a small forward until it takes this long
ENDINGS = ("ended_by_eos", "hit_limit", "length_exact", "premature", "overrun", "length_error")


class TaskRun:
    """All measurements of one task; an exception that ends it leaves them.

    Each timing has `repeats` rounds. The models are of `dtype`, their own when None; `limit` is the longest answer in
    tokens, the samplers' own when None.
    """

    def __init__(
        self,
        task: Task,
        repeats: int,
        device: torch.device,
        dtype: torch.dtype | None = None,
        limit: int | None = None,
        widths: Sequence[int] = WIDTHS,
    ) -> None:
        self.task, self.repeats, self.device, self.limit, self.widths = task, repeats, device, limit, widths
        where = f"task {task.name}"
        settings, self.curves = expand(task)
        samplers = [build(Sampler, "sampler", one.sampler, f"{where}, {one.name}") for one in settings]
        self.source: Source = build(Source, "source", task.source, where)
        self.scorer: Scorer = build(Scorer, "scorer", task.scorer, where)
        load = cache(lambda path: load_checkpoint(path, device, dtype)[:2])
        self.model, self.tokenizer = load(task.checkpoint)
        paths = {"diffusion": task.checkpoint, "autoregressive": task.autoregressive_checkpoint}
        self.contenders = []
        for setting, sampler in zip(settings, samplers, strict=True):
            path = paths.get(setting.checkpoint, setting.checkpoint)
            if path is None:
                raise UserError(f"{where}: autoregressive_checkpoint is not set, but {setting.name} wants it")
            model, tokenizer = load(path)
            if tokenizer.fingerprint != self.tokenizer.fingerprint:
                raise UserError(f"{where}: {path} has another tokenizer than {task.checkpoint}")
            if hasattr(sampler, "batch_size"):
                sampler.batch_size = task.batch_size
            self.contenders.append(Contender(setting, sampler, model))
        self.examples = self._examples(task.split, max(getattr(s, count) for s in settings for count in COUNTS))
        self.selection_examples = self._examples(task.selection_split, task.selection_prompts)
        self.forward_costs: list[dict[str, float]] = []
        self.seconds = 0.0

    def _examples(self, split: str, count: int) -> list[Example]:
        if split not in self.source.splits:
            has = ", ".join(self.source.splits)
            raise UserError(f"task {self.task.name}: {type(self.source).__name__} has no split {split}; it has {has}")
        table = RecordEncoder(self.tokenizer).encode(list(self.source.located_records(split)))
        examples = table.examples(self.tokenizer, count)
        if not examples:
            raise UserError(f"task {self.task.name}: the {split} split has no prompts with answers")
        return examples

    def run(self) -> None:
        began = time.perf_counter()
        gc.collect()
        gc.freeze()  # the models and examples stay; collecting before each decode is then quick
        try:
            self._warm_up()
            self._score()
            for contender in self.in_turn("speed", self.contenders, self.repeats):
                self._time(contender)
            self._select()
            # The main results are ratios of the best settings and the twin. These are timed more often, side by side:
            # on a machine with other work the rounds so far are too few.
            finalists = self.finalists()
            for contender in self.in_turn("the best settings and the twin", finalists, FINAL_ROUNDS * self.repeats):
                self._time(contender)
            self.forward_costs = measure_forwards(self.model, self.widths, 5 * self.repeats)
        finally:
            gc.unfreeze()
            self.seconds = time.perf_counter() - began

    def _warm_up(self) -> None:
        for contender in self.contenders:  # one token with every sampler, so that a mistake shows now
            try:
                contender.sampler.generate(contender.model, [self.examples[0].prompt_ids], max_new_tokens=1)
            except UserError as error:
                raise UserError(f"task {self.task.name}, {contender.setting.name}: {error}") from error
        for contender in self.in_turn("warm-up", self.contenders):
            with PeakMemory(self.device) as memory:
                decode(contender, self.examples[:1], self.limit)
            contender.memory["single"] = memory.bytes

    def _score(self) -> None:
        for contender in self.in_turn("accuracy", self.contenders):
            examples = self.examples[: contender.setting.prompts]
            with PeakMemory(self.device) as memory:
                run = decode(contender, examples, self.limit, one_by_one=False)
            contender.memory["batched"] = memory.bytes
            contender.scores = self.score(run, examples)

    def _time(self, contender: Contender) -> None:
        setting = contender.setting
        contender.single.append(decode(contender, self.examples[: setting.single_prompts], self.limit))
        if setting.batched_prompts:
            examples = self.examples[: setting.batched_prompts]
            contender.batched.append(decode(contender, examples, self.limit, one_by_one=False))

    def _select(self) -> None:
        """Scores the settings to choose from on the other split, and times those whose accuracy is near enough."""
        equal = equal_to_twin(self.contenders)
        roles = () if with_role(self.contenders, "default") is None else ("candidate", "default")
        candidates = [one for one in self.contenders if one in equal or one.setting.role in roles]
        examples, split = self.selection_examples, self.task.selection_split
        for contender in self.in_turn(f"accuracy, {split} split", candidates):
            run = decode(contender, examples, self.limit, one_by_one=False)
            contender.selection_scores = self.score(run, examples)
            contender.selection_batched.append(run)
        near = [*near_default(candidates), *equal]
        timed = examples[: -(-self.task.single_prompts // 2)]
        close = [contender for contender in candidates if contender in near]
        for contender in self.in_turn(f"speed, {split} split", close, self.repeats):
            contender.selection_single.append(decode(contender, timed, self.limit))

    def finalists(self) -> list[Contender]:
        """Returns the twin, the best setting and the best ones of the twin's accuracy; none where there is no ratio."""
        twin = with_role(self.contenders, "autoregressive")
        if twin is None:
            return []
        equal = [contender for contender, _ in at_equal_accuracy(self.contenders).values()]
        main = [best_setting(self.contenders), *equal, twin]
        found = [contender for contender in self.contenders if contender in main]
        return found if len(found) > 1 else []

    def score(self, run: Decoding, examples: Sequence[Example]) -> dict[str, float]:
        """Returns the scorer's figures of a run's answers, how they end, and the forwards of all models per answer."""
        metrics = AnswerMetrics(sync_on_compute=False)
        metrics.update(run.answers, [example.references for example in examples])
        figures, forwards = metrics.compute(), sum(run.forwards)
        return {
            **self.scorer.score(run.answers, examples, self.tokenizer),
            **{name: figures[name] for name in (*ENDINGS, "introspective_acceptance") if name in figures},
            "nfe": forwards / max(len(run.answers), 1),
            "tokens_per_forward": run.tokens / max(forwards, 1),
            "prompts": len(run.answers),
        }

    def in_turn(self, phase: str, contenders: Sequence[Contender], rounds: int = 1) -> Iterator[Contender]:
        """Yields every contender once in each round; a round begins further on than the one before."""
        for number in range(rounds if contenders else 0):
            start = number * len(contenders) // rounds
            title = f"{self.task.name}: {phase}, round {number + 1} of {rounds}"
            yield from shown(title, [*contenders[start:], *contenders[:start]])

    def result(self) -> dict[str, Any]:
        """Returns the measurements, complete or not, as plain data."""
        return task_result(self)


def decode(contender: Contender, examples: Sequence[Example], limit: int | None, one_by_one: bool = True) -> Decoding:
    """Decodes prompts one by one, or all in one call, and takes the time of each call of `generate`."""
    gc.collect()
    prompts = [example.prompt_ids for example in examples]
    device = contender.model.embedding.weight.device
    answers: list[Generation] = []
    seconds: list[float] = []
    with ForwardClock(contender.models) as clock:
        for call in [[prompt] for prompt in prompts] if one_by_one else [prompts]:
            synchronise(device)
            began = time.perf_counter()
            answers += contender.sampler.generate(contender.model, call, max_new_tokens=limit)
            synchronise(device)
            seconds.append(time.perf_counter() - began)
    return Decoding(answers, seconds, clock.seconds)


@torch.inference_mode()
def measure_forwards(model: Transformer, widths: Sequence[int], rounds: int) -> list[dict[str, float]]:
    """Returns median seconds of forwards (layers and head, batch 1) of several widths behind `PREFIX` cached tokens."""
    weight, widths = model.embedding.weight, sorted({1, *widths})
    kv_cache = KVCache(model.config, 1, PREFIX + widths[-1], weight.device, weight.dtype)
    tokens = torch.zeros(1, max(PREFIX, widths[-1]), dtype=torch.long, device=weight.device)

    def forward(width: int) -> None:
        kv_cache.open(width)
        model.lm_head(model.hidden_states(tokens[:, :width], cache=kv_cache))

    forward(PREFIX)
    kv_cache.advance(torch.tensor([PREFIX]))
    threads = torch.get_num_threads()
    calls = {width: Timer("call()", globals={"call": partial(forward, width)}, num_threads=threads) for width in widths}
    readings: dict[int, list[float]] = {width: [] for width in widths}
    for _ in range(rounds):
        for width, call in calls.items():
            readings[width].append(call.blocked_autorange(min_run_time=READING_SECONDS).median)
    medians = {width: median(seconds) for width, seconds in readings.items()}
    return [{"width": width, "seconds": cost, "relative": cost / medians[1]} for width, cost in medians.items()]
