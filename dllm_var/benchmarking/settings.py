"""Settings of a benchmark as its YAML file has them: `tasks` compare samplers, `trainings` compare ways to train."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from dllm_var.errors import UserError

Role = Literal["candidate", "default", "autoregressive", "fixed_length", "reference"]
COUNTS = ("prompts", "single_prompts", "batched_prompts")

# Contenders of a training benchmark.
OURS, COMPILED, FULL = "ours", "ours, compiled", "ours, compiled, full attention"
PLAIN_LOOP, PADDED = "full logits, plain loop", "full logits, padded, Trainer"
CONTENDERS = (OURS, COMPILED, FULL, PLAIN_LOOP, PADDED)
BARS = ("tokens_per_second", "peak_memory", "mfu")  # beginnings of the names of a training's bars


@dataclass
class Entry:
    """One sampler with one setting.

    Args:
        name: Its name in the tables.
        sampler: `class_path` and `init_args`, or a YAML file with them, such as configs/sampler/threshold.yaml.
        arguments: Values put over the sampler's `init_args`.
        checkpoint: `diffusion` or `autoregressive` for the task's checkpoints, or the path of another one.
        role: A `candidate` may become the best setting, and so may the `default`, whose accuracy is the others'
            yardstick; ratios divide by `autoregressive` and `fixed_length`; a `reference` is only reported.
        prompts: Prompts scored, in place of the task's number; slow entries take few.
        single_prompts: Prompts timed one at a time, in place of the task's number.
        batched_prompts: Prompts timed in batches, in place of the task's number; 0 for none.
    """

    name: str
    sampler: str | dict[str, Any]
    arguments: dict[str, Any] = field(default_factory=dict)
    checkpoint: str = "diffusion"
    role: Role = "candidate"
    prompts: int | None = None
    single_prompts: int | None = None
    batched_prompts: int | None = None


@dataclass
class Sweep:
    """One sampler with several values of one of its arguments: a curve of accuracy against tokens per forward.

    Args:
        name: Its name in tables and plots; each point is called `name value`.
        sampler: As an entry's.
        over: Path of the argument, such as `init_args.policy.init_args.threshold`.
        values: Its values. A point that equals an entry is measured once.
        arguments: Values put over the sampler's `init_args`.
        checkpoint: As an entry's.
        role: `candidate` or `reference`, as an entry's.
    """

    name: str
    sampler: str | dict[str, Any]
    over: str
    values: list[Any]
    arguments: dict[str, Any] = field(default_factory=dict)
    checkpoint: str = "diffusion"
    role: Literal["candidate", "reference"] = "candidate"


@dataclass
class Task:
    """Held-out prompts, the models that answer them, and the samplers to compare.

    Args:
        name: Its name in the tables.
        source: Class of a `dllm_var.datamodules.Source`, with `init_args` where it needs them.
        checkpoint: The diffusion model.
        autoregressive_checkpoint: Its autoregressive twin, with the same tokenizer.
        scorer: Class of a `dllm_var.benchmarking.Scorer`.
        split: Split of the reported figures.
        selection_split: Split on which the best setting is chosen.
        prompts: Prompts scored, in batches.
        selection_prompts: Prompts that choose the best setting.
        single_prompts: Prompts timed one at a time.
        batched_prompts: Prompts timed in batches.
        batch_size: Rows of a batch.
        entries: Samplers.
        sweeps: Samplers with several values of one argument.
    """

    name: str
    source: str | dict[str, Any]
    checkpoint: str
    autoregressive_checkpoint: str | None = None
    scorer: str | dict[str, Any] = "dllm_var.benchmarking.TokenErrorScorer"
    split: str = "test"
    selection_split: str = "validation"
    prompts: int = 500
    selection_prompts: int = 300
    single_prompts: int = 48
    batched_prompts: int = 96
    batch_size: int = 32
    entries: list[Entry] = field(default_factory=list)
    sweeps: list[Sweep] = field(default_factory=list)

    @property
    def parts(self) -> list[Entry | Sweep]:
        """Its entries and sweeps."""
        return [*self.entries, *self.sweeps]


@dataclass
class Setting:
    """An entry, or one point of a sweep, with all its values filled in; `points` are pairs of sweep name and value."""

    name: str
    sampler: dict[str, Any]
    checkpoint: str
    role: Role
    prompts: int
    single_prompts: int
    batched_prompts: int
    points: list[tuple[str, Any]] = field(default_factory=list)


@dataclass
class TrainingCase:
    """One model on one vocabulary, trained by several contenders.

    Args:
        name: Its name in the tables.
        vocab_size: Rows of embedding and output head.
        transformer: Its shape, as `model.transformer` in a training config.
        context_length: Tokens in a row.
        batch_size: Rows in a batch.
        steps: Optimizer steps timed in each round, after one to warm up.
        contenders: Names out of `CONTENDERS`.
        prompt_tokens: Median length of a sample's prompt, which carries no loss.
        answer_tokens: Median length of its answer.
        bars: Names of ratios in the result, with the values they should reach: `mfu` at least (of full attention where
            that takes part), `tokens_per_second_...` over the plain loop's at least, `peak_memory_...` over the plain
            loop's at most.

    Raises:
        UserError: For a number below 1, an unknown contender or an unknown bar.
    """

    name: str
    vocab_size: int
    transformer: dict[str, Any] = field(default_factory=dict)
    context_length: int = 1024
    batch_size: int = 2
    steps: int = 2
    contenders: list[str] = field(default_factory=lambda: list(CONTENDERS))
    prompt_tokens: int = 60
    answer_tokens: int = 140
    bars: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context_length", "batch_size", "steps", "prompt_tokens", "answer_tokens"):
            _check_number(f"training {self.name}", name, getattr(self, name))
        for contender in self.contenders:
            if contender not in CONTENDERS:
                raise UserError(f"training {self.name}: no contender '{contender}'; there are {'; '.join(CONTENDERS)}")
        for bar in self.bars:
            if not bar.startswith(BARS):
                raise UserError(f"training {self.name}: a bar begins with {', '.join(BARS)}, got '{bar}'")

    @property
    def ours(self) -> str | None:
        """The contender that the ratios are about: the compiled one where it takes part."""
        return next((name for name in (COMPILED, OURS) if name in self.contenders), None)


def expand(task: Task) -> list[Setting]:
    """Returns the settings that a task measures: its entries, and the points of its sweeps that are not entries.

    Each entry's and sweep's `sampler` must be `class_path` and `init_args`, its `arguments` already in them.

    Raises:
        UserError: For a number below 1, two settings of one name, or a sweep over an argument that does not exist.
    """
    where = f"task {task.name}"
    for name in (*COUNTS, "selection_prompts", "batch_size"):
        _check_number(where, name, getattr(task, name))
    numbers = {name: getattr(task, name) for name in COUNTS}
    settings: list[Setting] = []
    for entry in task.entries:
        own = {name: getattr(entry, name) for name in COUNTS if getattr(entry, name) is not None}
        for name, value in own.items():
            _check_number(f"{where}, entry {entry.name}", name, value, 0 if name == "batched_prompts" else 1)
        described: Any = entry.sampler
        settings.append(Setting(entry.name, described, entry.checkpoint, entry.role, **{**numbers, **own}))
    for sweep in task.sweeps:
        base: Any = sweep.sampler
        for value in sweep.values:
            sampler = _with_value(base, sweep.over, value, f"{where}, sweep {sweep.name}")
            point = (sweep.name, value)
            same = [s for s in settings if s.sampler == sampler and s.checkpoint == sweep.checkpoint]
            if same:
                same[0].points.append(point)
            else:
                name = f"{sweep.name} {value:g}" if isinstance(value, float) else f"{sweep.name} {value}"
                settings.append(Setting(name, sampler, sweep.checkpoint, sweep.role, **numbers, points=[point]))
    check_names([setting.name for setting in settings], where)
    for role in ("default", "autoregressive", "fixed_length"):
        names = [setting.name for setting in settings if setting.role == role]
        if len(names) > 1:
            raise UserError(f"{where}: '{names[0]}' and '{names[1]}' both have role {role}; only one can")
    if not settings:
        raise UserError(f"{where}: nothing to measure; give entries or sweeps")
    return settings


def check_names(names: Iterable[str], where: str) -> None:
    """Raises UserError when two of the names are the same."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise UserError(f"{where}: two are called '{name}'; give each a name of its own")
        seen.add(name)


def _check_number(where: str, name: str, value: int, lowest: int = 1) -> None:
    if value < lowest:
        raise UserError(f"{where}: {name} must be at least {lowest}, got {value}")


def _with_value(sampler: dict[str, Any], path: str, value: Any, where: str) -> dict[str, Any]:
    """Returns the sampler with the value at a path like `init_args.policy.init_args.threshold` replaced."""
    result = copy.deepcopy(sampler)
    node: Any = result
    *parents, last = path.split(".")
    for key in parents:
        node = node.get(key) if isinstance(node, dict) else None
    if not isinstance(node, dict):
        raise UserError(f"{where}: over '{path}' leads nowhere in its sampler; spell out what it goes through")
    node[last] = value
    return result
