"""Settings of a benchmark as its YAML file has them: `tasks` compare samplers, `trainings` compare ways to train."""
# mypy: disable-error-code="valid-type"
# jsonargparse makes the type PositiveInt when it is imported.

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from jsonargparse.typing import NonNegativeInt, PositiveInt
from omegaconf import OmegaConf

from dllm_var.checkpoints.pretrained import open_checkpoint
from dllm_var.errors import UserError
from dllm_var.settings import merged, overlay, read_settings

COUNTS = ("prompts", "single_prompts", "batched_prompts")
TrainingContender = Literal[
    "ours",
    "ours, compiled",
    "ours, compiled, full attention",
    "full logits, plain loop",
    "padded samples, plain loop",
    "padded samples, dllm's loss",
    "padded samples, Automodel's loss",
]
OURS, COMPILED, FULL, PLAIN_LOOP, PADDED_LOOP, DLLM_LOSS, AUTOMODEL_LOSS = CONTENDERS = get_args(TrainingContender)
BASELINES = {"over_padded": PADDED_LOOP, "over_dllm": DLLM_LOSS, "over_automodel": AUTOMODEL_LOSS}  # of ratios
BARS = {  # ratios of a task that can have a bar, and on which side of it they should be
    "over_fixed_length": "at least",
    "over_autoregressive": "at least",
    "batch_32_over_1": "at least",
    "sampler_overhead": "at most",
}
# Beginnings of the names of a training's bars.
TRAINING_BARS = ("tokens_per_second", *BASELINES, "peak_memory", "mfu")


@dataclass
class Entry:
    """One sampler with one setting.

    Args:
        name: Its name in the tables.
        sampler: `class_path` and `init_args`, a YAML file with them, or the name of one of configs/sampler/, which then
            has the block length and the longest answer of the task's checkpoint.
        arguments: Values put over the sampler's `init_args`.
        checkpoint: `diffusion` or `autoregressive` for the task's checkpoints, or the path of another one.
        role: A `candidate` may become the best setting, and so may the `default`, whose accuracy is the others'
            yardstick; ratios divide by `autoregressive` and `fixed_length`; a `reference` is never the best setting.
        prompts: Prompts scored, in place of the task's number; slow entries take few.
        single_prompts: Prompts timed one at a time, in place of the task's number.
        batched_prompts: Prompts timed in batches, in place of the task's number; 0 for none.
    """

    name: str
    sampler: str | dict[str, Any]
    arguments: dict[str, Any] = field(default_factory=dict)
    checkpoint: str = "diffusion"
    role: Literal["candidate", "default", "autoregressive", "fixed_length", "reference"] = "candidate"
    prompts: PositiveInt | None = None
    single_prompts: PositiveInt | None = None
    batched_prompts: NonNegativeInt | None = None


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
        bars: Names of ratios, with the values that those of the best setting should reach: `over_fixed_length`,
            `over_autoregressive`, `batch_32_over_1` at least, `sampler_overhead` at most.
    """

    name: str
    source: str | dict[str, Any]
    checkpoint: str
    autoregressive_checkpoint: str | None = None
    scorer: str | dict[str, Any] = "dllm_var.benchmarking.TokenErrorScorer"
    split: str = "test"
    selection_split: str = "validation"
    prompts: PositiveInt = 500
    selection_prompts: PositiveInt = 300
    single_prompts: PositiveInt = 48
    batched_prompts: PositiveInt = 96
    batch_size: PositiveInt = 32
    entries: list[Entry] = field(default_factory=list)
    sweeps: list[Sweep] = field(default_factory=list)
    bars: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for bar in self.bars:
            if bar not in BARS:
                raise UserError(f"task {self.name}: a bar is one of {', '.join(BARS)}, got '{bar}'")

    @property
    def parts(self) -> list[str]:
        return [part.name for part in (*self.entries, *self.sweeps)]

    def only(self, names: Sequence[str]) -> "Task":
        """Returns the task with nothing but the named entries and sweeps."""
        entries = [entry for entry in self.entries if entry.name in names]
        return replace(self, entries=entries, sweeps=[sweep for sweep in self.sweeps if sweep.name in names])

    def quick(self) -> "Task":
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
        contenders: Ways to train it; the first five when not given.
        objective: `class_path` and `init_args` of what ours trains on; the EOS schedule when None.
        precision: The Trainer's, of every contender; bf16-mixed on a GPU and 32-true on a CPU when None.
        activation_checkpointing: What ours computes again, as in `DiffusionLM`.
        prompt_tokens: Median length of a sample's prompt, which carries no loss.
        answer_tokens: Median length of its answer.
        bars: Names of ratios in the result, with the values they should reach: `mfu...` at least (of full attention
            where that takes part), `tokens_per_second_...` over the plain loop's at least, `over_padded_...`,
            `over_dllm_...` and `over_automodel_...` over those loops' at least, `peak_memory_...` over the plain
            loop's at most.
    """

    name: str
    vocab_size: int
    transformer: dict[str, Any] = field(default_factory=dict)
    context_length: PositiveInt = 1024
    batch_size: PositiveInt = 2
    steps: PositiveInt = 2
    contenders: list[TrainingContender] = field(default_factory=lambda: list(CONTENDERS[:5]))
    objective: dict[str, Any] | None = None
    precision: str | None = None
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    prompt_tokens: PositiveInt = 60
    answer_tokens: PositiveInt = 140
    bars: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for bar in self.bars:
            if not bar.startswith(TRAINING_BARS):
                raise UserError(f"training {self.name}: a bar begins with {', '.join(TRAINING_BARS)}, got '{bar}'")

    @property
    def parts(self) -> Sequence[str]:
        return self.contenders

    def only(self, names: Sequence[str]) -> "TrainingCase":
        """Returns the case with nothing but the named contenders."""
        return replace(self, contenders=[name for name in self.contenders if name in names])

    def quick(self) -> "TrainingCase":
        """Returns the case with a tiny model and nothing compiled."""
        tiny: dict[str, Any] = dict(hidden_size=32, num_layers=1, num_heads=2)
        few: dict[str, Any] = dict(context_length=64, batch_size=2, steps=1, prompt_tokens=6, answer_tokens=10)
        contenders: Any = dict.fromkeys(OURS if name in (COMPILED, FULL) else name for name in self.contenders)
        return replace(self, transformer=tiny, vocab_size=min(self.vocab_size, 512), contenders=list(contenders), **few)


@dataclass
class DecodingCase:
    """One shape with random weights, decoded in several ways.

    Args:
        name: Its name in the tables.
        transformer: Its shape, as `model.transformer` in a training config.
        vocab_size: Rows of embedding and output head.
        prompt_tokens: Tokens of each prompt.
        block_length: Tokens of a block.
        batch_size: Rows of a batch; one row is measured, too.
        limit: Tokens that are decoded.
    """

    name: str
    transformer: dict[str, Any] = field(default_factory=dict)
    vocab_size: PositiveInt = 126_464
    prompt_tokens: PositiveInt = 128
    block_length: PositiveInt = 32
    batch_size: PositiveInt = 16
    limit: PositiveInt = 64

    @property
    def parts(self) -> Sequence[str]:
        return [self.name]

    def only(self, names: Sequence[str]) -> "DecodingCase":
        """Returns the case, all of which is measured."""
        return self

    def quick(self) -> "DecodingCase":
        """Returns the case with a tiny model."""
        tiny: dict[str, Any] = dict(hidden_size=32, num_layers=1, num_heads=2)
        few: dict[str, Any] = dict(prompt_tokens=8, block_length=4, batch_size=2, limit=8)
        return replace(self, transformer=tiny, vocab_size=min(self.vocab_size, 512), **few)


Curves = dict[str, list[tuple[Any, str]]]  # of each sweep: its values, with the names of the settings that have them


def expand(task: Task) -> tuple[list[Entry], Curves]:
    """Returns the settings that a task measures, and the curves that they make.

    Settings are the entries, and the points of sweeps that are not entries, with all their values filled in.
    """
    settings = [_filled_in(entry, task) for entry in task.entries]
    curves: Curves = {}
    for sweep in task.sweeps:
        curve = curves.setdefault(sweep.name, [])
        for value in sweep.values:
            name = f"{sweep.name} {value:g}" if isinstance(value, float) else f"{sweep.name} {value}"
            point = _filled_in(sweep, task)
            changed = OmegaConf.create(point.sampler)
            OmegaConf.update(changed, sweep.over, value, merge=False)
            point.name, point.sampler = name, OmegaConf.to_container(changed)  # type: ignore[assignment]
            same = next((s for s in settings if (s.sampler, s.checkpoint) == (point.sampler, point.checkpoint)), None)
            if same is None:
                settings.append(point)
            curve.append((value, (same or point).name))
    where = f"task {task.name}"
    check_names([setting.name for setting in settings], where)
    for role in ("default", "autoregressive", "fixed_length"):
        names = [setting.name for setting in settings if setting.role == role]
        if len(names) > 1:
            raise UserError(f"{where}: '{names[0]}' and '{names[1]}' both have role {role}; only one can")
    if not settings:
        raise UserError(f"{where}: nothing to measure; give entries or sweeps")
    return settings, curves


def _filled_in(entry: Entry, task: Task) -> Entry:
    """Returns an entry, or a sweep as one, with the sampler's file read and the task's numbers of prompts."""
    sampler: Any = entry.sampler
    if isinstance(sampler, str) and sampler.isidentifier() and sampler.islower():
        sampler = overlay(sampler, open_checkpoint(task.checkpoint).meta.get("sampler"))
    if isinstance(sampler, str) and Path(sampler).suffix in (".yaml", ".yml", ".json"):
        sampler = read_settings(Path(sampler))
        sampler = sampler.get("sampler") or sampler
    if isinstance(sampler, str):
        sampler = {"class_path": sampler}
    if "class_path" not in sampler:
        raise UserError(f"task {task.name}, {entry.name}: the sampler has no class_path")
    sampler = merged({"init_args": {}, **sampler}, {"init_args": entry.arguments})
    values: dict[str, Any] = {f.name: getattr(entry, f.name) for f in fields(Entry)}
    counts = {name: getattr(task, name) for name in COUNTS if values[name] is None}
    return Entry(**{**values, **counts, "sampler": sampler, "arguments": {}})


def check_names(names: Sequence[str], where: str) -> None:
    """Raises UserError when two of the names are the same."""
    for number, name in enumerate(names):
        if name in names[:number]:
            raise UserError(f"{where}: two are called '{name}'; give each a name of its own")
