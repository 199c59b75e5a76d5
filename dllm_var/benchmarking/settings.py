"""Settings of a benchmark as its YAML file has them: `tasks` compare samplers, `trainings` compare ways to train."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from dllm_var.errors import UserError
from dllm_var.settings import merged, read_settings

COUNTS = ("prompts", "single_prompts", "batched_prompts")

# Contenders of a training benchmark.
OURS, COMPILED, FULL = "ours", "ours, compiled", "ours, compiled, full attention"
PLAIN_LOOP, PADDED = "full logits, plain loop", "full logits, padded"
CONTENDERS = (OURS, COMPILED, FULL, PLAIN_LOOP, PADDED)
TRAINING_BARS = ("tokens_per_second", "peak_memory", "mfu")  # beginnings of the names of a training's bars


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
    role: Literal["candidate", "default", "autoregressive", "fixed_length", "reference"] = "candidate"
    prompts: int | None = None
    single_prompts: int | None = None
    batched_prompts: int | None = None


@dataclass(kw_only=True)
class Sweep(Entry):
    """An entry with several values of one argument: a curve of accuracy against tokens per forward.

    Args:
        over: Path of the argument, such as `init_args.policy.init_args.threshold`.
        values: Its values. Each point is called `name value`; one that equals an entry is measured once.
    """

    over: str
    values: list[Any]


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
    def parts(self) -> list[str]:
        """The names of its entries and sweeps."""
        return [part.name for part in (*self.entries, *self.sweeps)]

    def only(self, names: Iterable[str]) -> Task:
        """Returns the task with nothing but the named entries and sweeps."""
        entries = [entry for entry in self.entries if entry.name in names]
        return replace(self, entries=entries, sweeps=[sweep for sweep in self.sweeps if sweep.name in names])

    def quick(self) -> Task:
        """Returns the task with so few prompts that it takes seconds."""
        no_counts: dict[str, Any] = dict.fromkeys(COUNTS)
        entries = [replace(entry, **no_counts) for entry in self.entries]
        sweeps = [replace(sweep, **no_counts) for sweep in self.sweeps]
        few: dict[str, Any] = dict(prompts=4, selection_prompts=4, single_prompts=1, batched_prompts=4, batch_size=4)
        return replace(self, entries=entries, sweeps=sweeps, **few)


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
            if not bar.startswith(TRAINING_BARS):
                raise UserError(f"training {self.name}: a bar begins with {', '.join(TRAINING_BARS)}, got '{bar}'")

    @property
    def parts(self) -> list[str]:
        """The names of its contenders."""
        return self.contenders

    def only(self, names: Iterable[str]) -> TrainingCase:
        """Returns the case with nothing but the named contenders."""
        return replace(self, contenders=[name for name in self.contenders if name in names])

    def quick(self) -> TrainingCase:
        """Returns the case with a tiny model and nothing compiled."""
        tiny: dict[str, Any] = dict(hidden_size=32, num_layers=1, num_heads=2)
        few: dict[str, Any] = dict(context_length=64, batch_size=2, steps=1, prompt_tokens=6, answer_tokens=10)
        contenders = [name for name in self.contenders if name not in (COMPILED, FULL)]
        return replace(self, transformer=tiny, vocab_size=min(self.vocab_size, 512), contenders=contenders, **few)


Curves = dict[str, list[tuple[Any, str]]]  # of each sweep: its values, with the names of the settings that have them


def expand(task: Task) -> tuple[list[Entry], Curves]:
    """Returns the settings that a task measures, with all their values filled in, and the curves that they make.

    Settings are the entries, and the points of sweeps that are not entries. Their samplers are `class_path` and
    `init_args`.

    Raises:
        UserError: For a number below 1, two settings of one name or role, a sampler's file that cannot be read, or a
            sweep over an argument that does not exist.
    """
    where = f"task {task.name}"
    for name in (*COUNTS, "selection_prompts", "batch_size"):
        _check_number(where, name, getattr(task, name))
    settings = [_filled_in(entry, task) for entry in task.entries]
    curves: Curves = {}
    for sweep in task.sweeps:
        base, curve = _filled_in(sweep, task), curves.setdefault(sweep.name, [])
        for value in sweep.values:
            name = f"{sweep.name} {value:g}" if isinstance(value, float) else f"{sweep.name} {value}"
            sampler = _with_value(base.sampler, sweep.over, value, f"{where}, sweep {sweep.name}")
            counts = {count: getattr(base, count) for count in COUNTS}
            point = Entry(name, sampler, {}, sweep.checkpoint, sweep.role, **counts)
            same = [s for s in settings if (s.sampler, s.checkpoint) == (point.sampler, point.checkpoint)]
            if not same:
                settings.append(point)
            curve.append((value, (same or [point])[0].name))
    check_names([setting.name for setting in settings], where)
    for role in ("default", "autoregressive", "fixed_length"):
        names = [setting.name for setting in settings if setting.role == role]
        if len(names) > 1:
            raise UserError(f"{where}: '{names[0]}' and '{names[1]}' both have role {role}; only one can")
    if not settings:
        raise UserError(f"{where}: nothing to measure; give entries or sweeps")
    return settings, curves


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


def _filled_in(entry: Entry, task: Task) -> Entry:
    """Returns the entry with its sampler's file read, its arguments put over it, and the task's numbers of prompts."""
    sampler: Any = entry.sampler
    if isinstance(sampler, str) and Path(sampler).suffix in (".yaml", ".yml", ".json"):
        sampler = read_settings(Path(sampler))
        sampler = sampler.get("sampler") or sampler
    if isinstance(sampler, str):
        sampler = {"class_path": sampler}
    where = f"task {task.name}, {entry.name}"
    if "class_path" not in sampler:
        raise UserError(f"{where}: the sampler has no class_path")
    sampler = {"init_args": {}, **merged(sampler, {"init_args": entry.arguments} if entry.arguments else {})}
    counts: dict[str, Any] = {}
    for name in COUNTS:
        own = getattr(entry, name)
        counts[name] = getattr(task, name) if own is None else own
        _check_number(where, name, counts[name], 0 if name == "batched_prompts" else 1)
    return replace(entry, sampler=sampler, arguments={}, **counts)


def _with_value(sampler: Any, path: str, value: Any, where: str) -> dict[str, Any]:
    """Returns the sampler with the value at a path like `init_args.policy.init_args.threshold` replaced."""
    result = copy.deepcopy(sampler)
    node = result
    *parents, last = path.split(".")
    for key in parents:
        node = node.get(key) if isinstance(node, dict) else None
    if not isinstance(node, dict):
        raise UserError(f"{where}: over '{path}' leads nowhere in its sampler; spell out what it goes through")
    node[last] = value
    return result
