"""What a benchmark of samplers is told to do, read from its config."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dllm_var.cli.settings import SettingsParser, merged, read_settings
from dllm_var.errors import UserError

Role = Literal["candidate", "default", "autoregressive", "fixed_length", "reference"]


@dataclass
class Entry:
    """One sampler with one setting.

    Args:
        name: What the tables call it.
        sampler: `class_path` and `init_args`, or a YAML file with them, such as configs/sampler/threshold.yaml.
        arguments: Put over the sampler's `init_args`, value by value.
        checkpoint: `diffusion` or `autoregressive` for the task's own ones, or the path of another.
        role: `candidate` may be chosen as the best setting; `default` too, and the others' accuracy is compared with
            it; `autoregressive` and `fixed_length` are what speeds are divided by; `reference` is only reported.
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
        name: What tables and plots call it; each point is called `name value`.
        sampler: As an entry's.
        over: Path of the value that changes, such as `init_args.policy.init_args.threshold`.
        values: The values. Where a point is an entry, too, that entry's measurement stands for it.
        arguments: Put over the sampler's `init_args`, value by value.
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
        name: What the tables call it.
        source: Class of a `dllm_var.datamodules.Source`, with `init_args` where it needs them.
        checkpoint: The diffusion model.
        autoregressive_checkpoint: Its autoregressive twin, with the same tokenizer.
        scorer: Class of a `dllm_var.benchmarking.Scorer`.
        split: Split that figures are taken on.
        selection_split: Split that the best setting is chosen on.
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


@dataclass
class Point:
    """Where a setting stands on a sweep's curve."""

    sweep: str
    value: Any


@dataclass
class Setting:
    """An entry or one point of a sweep, with nothing left open.

    Args:
        name: What the tables call it.
        sampler: `class_path` and `init_args`.
        checkpoint: `diffusion`, `autoregressive` or a path.
        role: As an entry's.
        prompts: Prompts scored.
        single_prompts: Prompts timed one at a time.
        batched_prompts: Prompts timed in batches.
        points: Where it stands on the sweeps' curves.
    """

    name: str
    sampler: dict[str, Any]
    checkpoint: str
    role: Role
    prompts: int
    single_prompts: int
    batched_prompts: int
    points: list[Point] = field(default_factory=list)


def read_task(values: dict[str, Any]) -> Task:
    """Returns a task from checked plain values; the samplers in it stay descriptions."""
    entries = [Entry(**entry) for entry in values["entries"]]
    sweeps = [Sweep(**sweep) for sweep in values["sweeps"]]
    return Task(**{**values, "entries": entries, "sweeps": sweeps})


def expand(task: Task) -> list[Setting]:
    """Returns what a task measures: its entries, and the points of its sweeps that are not entries already.

    Raises:
        UserError: For a number below 1, two settings of one name, or a sweep over what its sampler has not.
    """
    where = f"task {task.name}"
    for name in ("prompts", "selection_prompts", "single_prompts", "batched_prompts", "batch_size"):
        if getattr(task, name) < 1:
            raise UserError(f"{where}: {name} must be at least 1, got {getattr(task, name)}")
    settings: list[Setting] = []
    for entry in task.entries:
        numbers = {}
        for name, lowest in (("prompts", 1), ("single_prompts", 1), ("batched_prompts", 0)):
            value = getattr(entry, name)
            numbers[name] = getattr(task, name) if value is None else value
            if numbers[name] < lowest:
                raise UserError(f"{where}, entry {entry.name}: {name} must be at least {lowest}, got {value}")
        settings.append(Setting(entry.name, _sampler_settings(entry), entry.checkpoint, entry.role, **numbers))
    numbers = {name: getattr(task, name) for name in ("prompts", "single_prompts", "batched_prompts")}
    for sweep in task.sweeps:
        base = _sampler_settings(sweep)
        for value in sweep.values:
            sampler = _with_value(base, sweep.over, value, f"{where}, sweep {sweep.name}")
            point = Point(sweep.name, value)
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


def build(kind: type, name: str, config: str | dict[str, Any], where: str) -> Any:
    """Builds an object of a class, or of a subclass, from its `class_path` and `init_args`.

    Args:
        kind: The class.
        name: What the setting is called in messages, such as `sampler`.
        config: A class path, or a dictionary with it.
        where: Which part of the benchmark this is, for messages.

    Raises:
        UserError: When there is no such class, or it does not take these arguments.
    """
    parser = SettingsParser()
    parser.add_subclass_arguments(kind, name, as_group=False, required=True)
    try:
        return parser.instantiate(parser.parse_object({name: config}))[name]
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__
        if cause is None:
            raise
        raise UserError(f"{where}: {cause}") from error


def _sampler_settings(entry: Entry | Sweep) -> dict[str, Any]:
    """Returns `class_path` and `init_args` of an entry, with its arguments put over them."""
    settings: Any = entry.sampler
    if isinstance(settings, str):
        if Path(settings).suffix in (".yaml", ".yml", ".json"):
            settings = read_settings(Path(settings))
            settings = settings.get("sampler") or settings
        else:
            settings = {"class_path": settings}
    if isinstance(settings, str):
        settings = {"class_path": settings}
    if "class_path" not in settings:
        raise UserError(f"{entry.name}: the sampler has no class_path")
    return {"init_args": {}, **merged(settings, {"init_args": entry.arguments} if entry.arguments else {})}


def _with_value(settings: dict[str, Any], path: str, value: Any, where: str) -> dict[str, Any]:
    """Returns the settings with the value at a path like `init_args.policy.init_args.threshold` replaced."""
    result = copy.deepcopy(settings)
    node: Any = result
    *parents, last = path.split(".")
    for key in parents:
        node = node.get(key) if isinstance(node, dict) else None
    if not isinstance(node, dict):
        raise UserError(f"{where}: over '{path}' leads nowhere in its sampler; spell out what it goes through")
    node[last] = value
    return result
