"""Says what a training run will cost, from its config alone: no weights are read and no data."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from typing import Any

import torch

from dllm_var.benchmarking.cost_model import (
    STRATEGIES,
    Memory,
    Precision,
    adapter_parameters,
    count_parameters,
    device_memory,
    step_seconds,
    training_flops,
)
from dllm_var.checkpoints.pretrained import starting_config
from dllm_var.cli.fit import quieten
from dllm_var.cli.trainer_settings import build_parser, check_settings, run_name
from dllm_var.errors import UserError
from dllm_var.model.config import TransformerConfig
from dllm_var.objectives import EosSchedule, KeyedNoise, Objective
from dllm_var.settings import SettingsParser, build
from dllm_var.text.tokenizer import SpecialTokens, Tokenizer

DESCRIPTION = """Says what a training run will cost, from its config alone: parameters, tokens and FLOPs of a step, its
time at a given MFU, and the memory of each device under ddp, fsdp2 and zero2. Reads neither weights nor data."""
EXAMPLES = """examples:
  python -m dllm_var plan --config configs/llada_8b_sft.yaml --devices 8
  python -m dllm_var plan --config configs/cmudict.yaml --devices 1 --device-tflops 0.1 --mfu 0.5

MFU leaves out what is computed again. docs/finetune.md says what the figures hold."""
SAMPLE_LENGTH = 1024  # tokens of the rows on which an objective shows what it makes of them
GIB = 2**30


@dataclass(frozen=True)
class Step:
    """One optimizer step."""

    devices: int
    rows: int  # of a batch on one device
    accumulated: int  # batches
    context_length: int  # tokens of a row
    read: int  # tokens that the layers read of a row: more where the objective adds masked copies
    scored: int  # positions of a row on which the head runs
    precision: Precision

    @property
    def rows_in_all(self) -> int:
        """Rows of all devices and batches."""
        return self.devices * self.rows * self.accumulated

    @property
    def tokens(self) -> int:
        """Tokens of the data in one step."""
        return self.rows_in_all * self.context_length


def main(command: str, arguments: list[str]) -> int:
    """Runs `plan` and returns its exit status.

    Args:
        command: `plan`.
        arguments: Its options, as `--help` lists them, and settings of `fit`.

    Raises:
        UserError: For a mistake in the settings, or when they do not say the model's vocabulary.
    """
    parser = build_parser(command, arguments, trainer_command="fit")
    add_options(parser)
    if {"-h", "--help"} & set(arguments):
        print(parser.format_help())
        return 0
    quieten()
    settings = parser.parse_resolved(arguments)
    check_settings(settings, run_name(arguments))
    for name in ("devices", "device_tflops", "device_memory"):
        value = settings[name]
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} must be a number above 0, got {value:g}")
    for name in ("mfu", "supervised_share"):
        if not 0 < settings[name] <= 1:
            raise UserError(f"--{name.replace('_', '-')} must be in (0, 1], got {settings[name]:g}")
    result = plan(settings.as_dict())
    print(json.dumps(result, indent=2) if settings.json else report(result))
    return 0


def add_options(parser: SettingsParser) -> None:
    """Adds the options of `plan` to the settings of `fit`."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.usage = "python -m dllm_var plan --config FILE ... [options] [--key=value ...]"
    options = parser.add_argument_group("plan")
    options.add_argument("--devices", type=int, metavar="N", help="devices in all; what trainer says when not given")
    options.add_argument("--mfu", type=float, default=0.4, metavar="X", help="model FLOPs over peak FLOPs (0.4)")
    options.add_argument(
        "--device-tflops", type=float, default=989.0, metavar="X", help="peak of one device (989: an H100 in bf16)"
    )
    options.add_argument("--device-memory", type=float, default=80.0, metavar="GB", help="memory of one device (80)")
    options.add_argument(
        "--supervised-share", type=float, default=0.5, metavar="X", help="share of tokens that are answers (0.5)"
    )
    options.add_argument("--json", action="store_true", help="print JSON")


def plan(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns all figures as plain values; `settings` has those of `fit` and the options of `plan`."""
    model, data, trainer = (settings[name] for name in ("model", "data", "trainer"))
    model, data = model["init_args"], data["init_args"]
    for section, values, names in (("model", model, ["transformer"]), ("data", data, ["batch_size", "context_length"])):
        missing = next((name for name in names if name not in values), None)
        if missing is not None:
            raise UserError(f"plan needs {section}.{missing}, which {settings[section]['class_path']} has not")
    objective = read_objective(model)
    config = read_config(model, data, objective)
    step = read_step(data, trainer, objective, settings)
    parameters = count_parameters(config)
    lora = model.get("lora")
    trained = adapter_parameters(config, lora["r"], lora["targets"]) if lora else parameters.total
    flops = training_flops(config, step.read, step.scored, min(1.0, trained / parameters.total)) * step.rows_in_all
    seconds = step_seconds(flops, step.devices, settings["device_tflops"] * 1e12, settings["mfu"])
    # With adapters, the frozen weights lie in memory beside them.
    held = parameters.total + (trained if lora else 0)
    memory = {
        f"{strategy}{', recomputed' if again else ''}": device_memory(
            config, strategy, step.devices, step.rows, step.read, step.precision, held, trained, again
        )
        for strategy in STRATEGIES
        for again in (False, True)
    }
    steps = trainer.get("max_steps") or -1
    return {
        "parameters": {**asdict(parameters), "total": parameters.total, "trained": trained},
        "step": {**asdict(step), "tokens": step.tokens, "flops": flops, "seconds": seconds},
        "tokens_per_second": step.tokens / seconds,
        "run": {"steps": steps, "hours": steps * seconds / 3600, "tokens": steps * step.tokens} if steps > 0 else None,
        "assumed": {name: settings[name] for name in ("mfu", "device_tflops", "device_memory", "supervised_share")},
        "memory": {name: {**asdict(value), "total": value.total} for name, value in memory.items()},
    }


def read_objective(model: dict[str, Any]) -> Objective:
    """Returns the objective of a model's settings."""
    described = model.get("objective")
    return EosSchedule() if described is None else build(Objective, "objective", described, "model")


def read_config(model: dict[str, Any], data: dict[str, Any], objective: Objective) -> TransformerConfig:
    """Returns the shape of the model; where the settings leave it open, a checkpoint's and a tokenizer's.

    Raises:
        UserError: When neither says how large the vocabulary is.
    """
    config = TransformerConfig(**model["transformer"])
    if model.get("init_from") and config.vocab_size is None:
        config = starting_config(config, model["init_from"])
    if config.vocab_size is None:
        config = replace(config, vocab_size=vocabulary(data))
    return replace(config, causal=objective.causal).resolved()


def vocabulary(data: dict[str, Any]) -> int:
    """Returns the size of the vocabulary of the data's tokenizer."""
    name = data.get("tokenizer")
    if name is None:
        path = (data.get("source") or {}).get("class_path", "dllm_var.datamodules.CmudictSource")
        module, _, kind = path.rpartition(".")
        name = getattr(getattr(import_module(module), kind), "default_tokenizer", None)
    if name is None:
        raise UserError("the size of the vocabulary is not known: set model.transformer.vocab_size or data.tokenizer")
    return Tokenizer.from_pretrained(name, data.get("mask_token"), data.get("terminators")).vocab_size


def read_step(data: dict[str, Any], trainer: dict[str, Any], objective: Objective, options: dict[str, Any]) -> Step:
    """Returns what one step takes; what the objective reads and scores is counted on rows made for that."""
    devices: Any = options["devices"]
    if devices is None:
        devices = trainer.get("devices")
        devices = len(devices) if isinstance(devices, list) else devices
        if not str(devices).lstrip("-").isdigit() or int(devices) < 1:
            raise UserError(f"trainer.devices {devices} says no number: give plan --devices N")
        devices = int(devices) * int(trainer.get("num_nodes") or 1)
    for name in ("batch_size", "context_length"):
        if data[name] < 1:
            raise UserError(f"data.{name} must be at least 1, got {data[name]}")
    length = data["context_length"]
    read, scored = tokens_read(objective, min(length, SAMPLE_LENGTH), options["supervised_share"])
    precision = str(trainer.get("precision") or "32")
    kind: Precision = "32" if precision.startswith("32") else "16-true" if precision.endswith("true") else "16-mixed"
    return Step(
        devices,
        data["batch_size"],
        trainer.get("accumulate_grad_batches") or 1,
        length,
        round(read * length),
        round(scored * length),
        kind,
    )


def tokens_read(objective: Objective, length: int, supervised_share: float) -> tuple[float, float]:
    """Returns how many tokens the layers read and the head scores, per token of a row.

    Args:
        objective: It corrupts eight rows of one sample each.
        length: Of a row.
        supervised_share: Share of the answer.
    """
    rows = 8
    answer = max(1, round(length * supervised_share))
    batch = {
        "input_ids": torch.full((rows, length), 3),
        "supervised": (torch.arange(length) >= length - answer).repeat(rows, 1),
        "segment_ids": torch.zeros(rows, length, dtype=torch.long),
        "position_ids": torch.arange(length).repeat(rows, 1),
        "row": torch.arange(rows),
    }
    batch["input_ids"][:, -1] = 1
    noised = objective.bind(SpecialTokens(0, (1,), 2)).corrupt(batch, KeyedNoise(0))
    return noised.input_ids.size(1) / length, float(noised.loss_mask.sum()) / rows / length


def report(result: dict[str, Any]) -> str:
    """Returns the figures as a table for people."""
    parameters, step, assumed = result["parameters"], result["step"], result["assumed"]
    trained = "" if parameters["trained"] == parameters["total"] else f"; trained {parameters['trained']:,}"
    lines = [
        f"parameters   {parameters['total']:,}: embedding {parameters['embedding']:,}, "
        f"blocks {parameters['blocks']:,}, head {parameters['head']:,}, norm {parameters['norm']:,}{trained}",
        f"step         devices {step['devices']} x batches {step['accumulated']} x rows {step['rows']} x "
        f"{step['context_length']:,} tokens = {step['tokens']:,} tokens",
        f"row          {step['read']:,} tokens read, {step['scored']:,} scored "
        f"({assumed['supervised_share']:.0%} of the tokens being answers)",
        f"compute      {step['flops'] / 1e15:,.3g} PFLOP a step; at {assumed['mfu']:.0%} of "
        f"{assumed['device_tflops']:g} TFLOP/s: {step['seconds']:,.3g} s a step, "
        f"{result['tokens_per_second']:,.0f} tokens/s",
    ]
    if result["run"] is not None:
        run = result["run"]
        lines.append(f"run          {run['steps']:,} steps, {run['tokens']:,} tokens, {run['hours']:,.3g} hours")
    names = list(Memory.__dataclass_fields__)
    width = max(map(len, result["memory"])) + 2
    lines += ["", f"{'GiB per device':<{width}}" + "".join(f"{name:>13}" for name in (*names, "total"))]
    for name, memory in result["memory"].items():
        cells = "".join(f"{memory[part] / GIB:>13.2f}" for part in (*names, "total"))
        fits = "" if memory["total"] <= assumed["device_memory"] * 1e9 else f"  over {assumed['device_memory']:g} GB"
        lines.append(f"{name:<{width}}{cells}{fits}")
    return "\n".join(lines)
