"""The command `plan`: says what a training run will cost, from its config alone."""

import json
import math
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from jsonargparse.typing import PositiveFloat, PositiveInt, restricted_number_type

from dllm_var.checkpoints.starting_from import planned_config
from dllm_var.cli.fit import quieten
from dllm_var.cli.plan_memory import MOST_DEVICES, ONE_DEVICE, Placed, device_memory, planned_strategy, what_fits
from dllm_var.cli.trainer_settings import build_reader, check_settings, run_name
from dllm_var.errors import UserError
from dllm_var.model.build import outline
from dllm_var.model.config import TransformerConfig
from dllm_var.model.lora import Lora
from dllm_var.model.quantised import KINDS
from dllm_var.model.transformer import Transformer
from dllm_var.objectives import EosSchedule, KeyedNoise, Objective
from dllm_var.settings import build
from dllm_var.text.tokenizer import SpecialTokens, Tokenizer

DESCRIPTION = """Says what a training run will cost, from its config alone: parameters, tokens and FLOPs of a step, its
time at a given MFU, the memory of each device under ddp, fsdp2 and zero2, and whether the run fits. Of model.init_from
it reads config.json (of a model on the hub it downloads this file), and neither weights nor data."""
EXAMPLES = """examples:
  python -m dllm_var plan --config configs/llada_8b_sft.yaml --devices 8
  python -m dllm_var plan --config configs/qwen3_to_diffusion.yaml --model.init_from=Qwen/Qwen3-8B-Base --devices 8 \\
    --device-memory 48GB
  python -m dllm_var plan --config configs/cmudict.yaml --devices 1 --device-tflops 0.1 --mfu 0.5

MFU leaves out what is computed again. docs/finetune.md says what the figures hold."""
DEVICE_MEMORY = 80.0  # GB, of an H100
NODE = 8  # devices of a node, where this machine has none
MFU = 0.4  # model FLOPs over peak FLOPs, when nothing better is known
SAMPLE_LENGTH = 1024  # tokens of the rows on which an objective shows what it makes of them
ASSUMED = ("device_tflops", "device_memory", "mfu", "supervised_share")
Share = restricted_number_type("Share", float, [(">", 0), ("<=", 1)])


def main(command: str, arguments: list[str]) -> int:
    """Runs `plan` with its own options and the settings of `fit`, and returns its exit status."""
    parser = build_reader(command, arguments, "[options]", DESCRIPTION, EXAMPLES)
    add = parser.add_argument_group("plan").add_argument
    devices = f"devices in all; what trainer says when not given, or {NODE} a node"
    add("--devices", type=PositiveInt, metavar="N", help=devices)
    add("--mfu", type=Share, default=MFU, metavar="X", help=f"model FLOPs over peak FLOPs ({MFU})")
    peak = "peak of one device (989: an H100 in bf16)"
    add("--device-tflops", type=PositiveFloat, default=989.0, metavar="X", help=peak)
    memory = "memory of one device, such as 24GB (that of the GPU of this machine, or 80GB)"
    add("--device-memory", type=gigabytes, default=None, metavar="GB", help=memory)
    add("--supervised-share", type=Share, default=0.5, metavar="X", help="share of tokens that are answers (0.5)")
    add("--json", action="store_true", help="print JSON")
    if {"-h", "--help"} & set(arguments):
        print(parser.format_help())
        return 0
    quieten()
    settings = parser.parse_resolved(arguments)
    check_settings(settings, run_name(arguments))
    settings.device_memory = settings.device_memory or present_memory() or DEVICE_MEMORY
    result = plan(settings.as_dict())
    print(json.dumps(result, indent=2) if settings.json else report(result))
    return 0


def plan(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns all figures as plain values; `settings` has those of `fit` and the options of `plan`."""
    model, data, trainer = settings["model"]["init_args"], settings["data"]["init_args"], settings["trainer"]
    for section, name in (("model", "transformer"), ("data", "batch_size"), ("data", "context_length")):
        if name not in settings[section]["init_args"]:
            raise UserError(f"plan needs {section}.{name}, which {settings[section]['class_path']} has not")
    described = model.get("objective")
    objective = EosSchedule() if described is None else build(Objective, "objective", described, "model")
    devices, rows, length = settings["devices"] or all_devices(trainer), data["batch_size"], data["context_length"]
    if min(rows, length) < 1:
        raise UserError(f"data.batch_size and data.context_length must be at least 1, got {rows} and {length}")
    accumulated = trainer.get("accumulate_grad_batches") or 1
    per_token = tokens_read(objective, min(length, SAMPLE_LENGTH), settings["supervised_share"])
    read, scored = (round(share * length) for share in per_token)
    tokens = devices * accumulated * rows * length
    bits = str(trainer.get("precision") or "32")
    precision = "32" if bits.startswith("32") else "16-true" if bits.endswith("true") else "16-mixed"

    config, shape_from = read_config(model, data, objective)
    transformer = outline(config)
    embedding, head = transformer.embedding.weight, transformer.lm_head.weight
    parameters = {
        "embedding": embedding.numel(),
        "block": sum(p.numel() for p in transformer.layers[-1].parameters()),
        "blocks": sum(p.numel() for p in transformer.layers.parameters()),
        "head": 0 if head is embedding else head.numel(),
        "norm": transformer.model.norm.weight.numel(),
        "total": transformer.num_parameters,
        "active": transformer.active_parameters,  # that one token passes: of experts, those chosen for it
    }
    flops_per_row = read * transformer.flops_per_token(read, scored / read)
    if model.get("lora") or model.get("quantize"):
        integers = KINDS[model["quantize"]] if model.get("quantize") else None
        transformer = outline(config, Lora(**model["lora"]) if model.get("lora") else None, integers)
    parameters["trained"] = sum(p.numel() for p in transformer.parameters() if p.requires_grad)
    # Of the FLOPs a third is the forward pass, and a third makes gradients of weights, which only trained ones have.
    done = (2 + min(1.0, parameters["trained"] / parameters["total"])) / 3
    flops = flops_per_row * done * devices * accumulated * rows
    seconds = flops / (devices * settings["device_tflops"] * 1e12 * settings["mfu"])

    def place(run: Placed, model: Transformer = transformer) -> dict[str, float]:
        return device_memory(model, run.strategy, run.devices, run.rows * read, precision, run.recompute)

    several = ("ddp",) if model.get("quantize") else ("ddp", "fsdp2", "zero2")  # quantised matrices are not sharded
    placed = {
        strategy + ", recomputed" * again: Placed(strategy, again, rows, devices)
        for strategy in (several if devices > 1 else (ONE_DEVICE,))
        for again in (False, True)
    }
    memory = {name: place(run) for name, run in placed.items()}
    strategy = planned_strategy(trainer.get("strategy"), devices)
    own = strategy and strategy + ", recomputed" * (model.get("activation_checkpointing") == "full")
    own = own if own in memory else None
    room, remedy = settings["device_memory"] * 1e9, None
    fits = memory[own]["total"] <= room if own else None
    if own and not fits:
        adapted = adapted_models(config) if model.get("init_from") and not model.get("quantize") else {}
        if model.get("lora"):
            adapted.pop("lora", None)

        def needed(run: Placed) -> float:
            return place(run, adapted.get(run.adapters, transformer))["total"]

        remedy = what_fits(placed[own], needed, room, accumulated, adapted)
    steps = trainer.get("max_steps") or -1
    return {
        "model": {
            "from": shape_from,
            **{name: getattr(config, name) for name in ("num_layers", "hidden_size", "num_heads", "vocab_size")},
        },
        "parameters": parameters,
        "step": {
            "devices": devices,
            "rows": rows,  # of a batch on one device
            "accumulated": accumulated,
            "context_length": length,
            "read": read,  # tokens that the layers read of a row: more where the objective adds masked copies
            "scored": scored,  # positions of a row on which the head runs
            "precision": precision,
            "tokens": tokens,
            "flops": flops,
            "seconds": seconds,
        },
        "tokens_per_second": tokens / seconds,
        "run": {"steps": steps, "hours": steps * seconds / 3600, "tokens": steps * tokens} if steps > 0 else None,
        "assumed": {name: settings[name] for name in ASSUMED},
        "memory": memory,
        "this_config": {"strategy": own, "fits": fits, "remedy": remedy},
    }


def read_config(model: dict[str, Any], data: dict[str, Any], objective: Objective) -> tuple[TransformerConfig, str]:
    """Returns the shape of the model and what says it: `model.init_from`, or the settings alone."""
    config, path = TransformerConfig(**(model["transformer"] or {})), model.get("init_from")
    said_by = str(path) if path else "as the settings say"
    if path:
        config = planned_config(config, path)
    if config.vocab_size is None:
        name = data.get("tokenizer")
        if name is None:
            source = (data.get("source") or {}).get("class_path", "dllm_var.datamodules.CmudictSource")
            module, _, kind = source.rpartition(".")
            name = getattr(getattr(import_module(module), kind), "default_tokenizer", None)
        if name is None:
            raise UserError("the vocabulary's size is not known: set model.transformer.vocab_size or data.tokenizer")
        tokenizer = Tokenizer.from_pretrained(name, data.get("mask_token"), data.get("terminators"))
        config = replace(config, vocab_size=tokenizer.vocab_size)
    return replace(config, causal=objective.causal).resolved(), said_by


def adapted_models(config: TransformerConfig) -> dict[str, Transformer]:
    """Returns models with the adapters that configs/lora.yaml and configs/qlora.yaml give them; none without peft."""
    models = {}
    for name in ("lora", "qlora") if find_spec("peft") is not None else ():
        with suppress(UserError):  # its rows cannot be divided into groups
            models[name] = outline(config, Lora(), KINDS["int4"] if name == "qlora" else None)
    return models


def gigabytes(text: str) -> float:
    """Reads a memory size such as `24` or `24GB`; raises UserError for anything else."""
    number = str(text).upper().removesuffix("GB")
    with suppress(ValueError):
        if 0 < float(number) < math.inf:
            return float(number)
    raise UserError(f"--device-memory takes GB, such as 24 or 24GB, not {text!r}")


def present_memory() -> float | None:
    """Returns the memory of the first GPU of this machine in GB; None without one."""
    return torch.cuda.get_device_properties(0).total_memory / 1e9 if torch.cuda.is_available() else None


def all_devices(trainer: dict[str, Any]) -> int:
    """Returns the devices of all nodes that the Trainer's settings name; for all GPUs those of this machine, or 8."""
    devices: Any = trainer.get("devices")
    devices = len(devices) if isinstance(devices, list) else devices
    if devices in ("auto", "-1", -1):
        devices = 1 if trainer.get("accelerator") == "cpu" else torch.cuda.device_count() or NODE
    if not str(devices).isdigit() or int(devices) < 1:
        raise UserError(f"trainer.devices {devices} says no number: give plan --devices N")
    return int(devices) * int(trainer.get("num_nodes") or 1)


def tokens_read(objective: Objective, length: int, supervised_share: float) -> tuple[float, float]:
    """Returns how many tokens the layers read and the head scores, per token of eight rows that the objective masks."""
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
    parameters, step, assumed, run = (result[part] for part in ("parameters", "step", "assumed", "run"))
    model, config = result["model"], result["this_config"]
    fewer = [name for name in ("active", "trained") if parameters[name] != parameters["total"]]
    parts = "".join(f"; {name} {parameters[name]:,}" for name in fewer)
    lines = [
        f"model        {model['from']}: {model['num_layers']} layers of width {model['hidden_size']:,}, "
        f"{model['num_heads']} heads, {model['vocab_size']:,} tokens in the vocabulary",
        f"parameters   {parameters['total']:,}: embedding {parameters['embedding']:,}, "
        f"blocks {parameters['blocks']:,}, head {parameters['head']:,}, norm {parameters['norm']:,}{parts}",
        f"step         devices {step['devices']} x batches {step['accumulated']} x rows {step['rows']} x "
        f"{step['context_length']:,} tokens = {step['tokens']:,} tokens",
        f"row          {step['read']:,} tokens read, {step['scored']:,} scored "
        f"({assumed['supervised_share']:.0%} of the tokens being answers)",
        f"compute      {step['flops'] / 1e15:,.3g} PFLOP a step; at {assumed['mfu']:.0%} of "
        f"{assumed['device_tflops']:g} TFLOP/s: {step['seconds']:,.3g} s a step, "
        f"{result['tokens_per_second']:,.0f} tokens/s",
    ]
    if run is not None:
        lines.append(f"run          {run['steps']:,} steps, {run['tokens']:,} tokens, {run['hours']:,.3g} hours")
    width = max(map(len, result["memory"])) + 2
    names = "".join(f"{name:>13}" for name in next(iter(result["memory"].values())))
    lines += ["", f"{'GiB per device':<{width}}{names}"]
    for name, memory in result["memory"].items():
        cells = "".join(f"{part / 2**30:>13.2f}" for part in memory.values())
        over = "" if memory["total"] <= assumed["device_memory"] * 1e9 else f"  over {assumed['device_memory']:g} GB"
        lines.append(f"{name:<{width}}{cells}{over}{'  <- this config' if name == config['strategy'] else ''}")
    return "\n".join([*lines, "", verdict(result)])


def verdict(result: dict[str, Any]) -> str:
    """Returns whether the run of the config fits, and what to try where it does not."""
    config, room = result["this_config"], result["assumed"]["device_memory"] * 1e9
    if config["fits"] is None:
        return "this config's trainer.strategy is none of the table's: compare its memory yourself"
    needed = result["memory"][config["strategy"]]["total"] / 2**30
    compared = f"{needed:.2f} of the {room / 2**30:.2f} GiB of a device of {room / 1e9:g} GB"
    if config["fits"]:
        closely = "just " if needed * 2**30 > 0.9 * room else ""
        return f"this config {closely}fits: {compared}, without the allocator's waste and CUDA's own memory (some GiB)"
    too_large = f"a shorter data.context_length or a smaller model ({MOST_DEVICES} such devices are not enough)"
    remedy = config["remedy"] or too_large
    return f"this config does not fit: {compared}; try {remedy}"
