"""The command `plan`: says what a training run will cost, from its config alone."""

import json
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from jsonargparse.typing import PositiveFloat, PositiveInt, restricted_number_type

from dllm_var.checkpoints.starting_from import starting_config
from dllm_var.cli.fit import quieten
from dllm_var.cli.trainer_settings import build_reader, check_settings, run_name
from dllm_var.errors import UserError
from dllm_var.model.config import TransformerConfig
from dllm_var.model.lora import Lora, add_adapters
from dllm_var.model.transformer import Transformer
from dllm_var.objectives import EosSchedule, KeyedNoise, Objective
from dllm_var.settings import build
from dllm_var.text.tokenizer import SpecialTokens, Tokenizer

DESCRIPTION = """Says what a training run will cost, from its config alone: parameters, tokens and FLOPs of a step, its
time at a given MFU, and the memory of each device under ddp, fsdp2 and zero2. Reads neither weights nor data."""
EXAMPLES = """examples:
  python -m dllm_var plan --config configs/llada_8b_sft.yaml --devices 8
  python -m dllm_var plan --config configs/cmudict.yaml --devices 1 --device-tflops 0.1 --mfu 0.5

MFU leaves out what is computed again. docs/finetune.md says what the figures hold."""
LOGITS_BYTES = 2 * 512 * 2**20  # of the head on CUDA, a chunk at a time: logits in 32 bits, and their gradient
SAMPLE_LENGTH = 1024  # tokens of the rows on which an objective shows what it makes of them
ASSUMED = ("device_tflops", "device_memory", "mfu", "supervised_share")
Share = restricted_number_type("Share", float, [(">", 0), ("<=", 1)])


def main(command: str, arguments: list[str]) -> int:
    """Runs `plan` with its own options and the settings of `fit`, and returns its exit status."""
    parser = build_reader(command, arguments, "[options]", DESCRIPTION, EXAMPLES)
    add = parser.add_argument_group("plan").add_argument
    add("--devices", type=PositiveInt, metavar="N", help="devices in all; what trainer says when not given")
    add("--mfu", type=Share, default=0.4, metavar="X", help="model FLOPs over peak FLOPs (0.4)")
    peak = "peak of one device (989: an H100 in bf16)"
    add("--device-tflops", type=PositiveFloat, default=989.0, metavar="X", help=peak)
    add("--device-memory", type=PositiveFloat, default=80.0, metavar="GB", help="memory of one device (80)")
    add("--supervised-share", type=Share, default=0.5, metavar="X", help="share of tokens that are answers (0.5)")
    add("--json", action="store_true", help="print JSON")
    if {"-h", "--help"} & set(arguments):
        print(parser.format_help())
        return 0
    quieten()
    settings = parser.parse_resolved(arguments)
    check_settings(settings, run_name(arguments))
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

    with torch.device("meta"):
        transformer = Transformer(read_config(model, data, objective))
    embedding, head = transformer.embedding.weight, transformer.lm_head.weight
    parameters = {
        "embedding": embedding.numel(),
        "block": sum(p.numel() for p in transformer.layers[0].parameters()),
        "blocks": sum(p.numel() for p in transformer.layers.parameters()),
        "head": 0 if head is embedding else head.numel(),
        "norm": transformer.model.norm.weight.numel(),
        "total": transformer.num_parameters,
    }
    flops_per_row = read * transformer.flops_per_token(read, scored / read)
    if model.get("lora"):
        add_adapters(transformer, Lora(**model["lora"]))
    parameters["trained"] = sum(p.numel() for p in transformer.parameters() if p.requires_grad)
    # Of the FLOPs a third is the forward pass, and a third makes gradients of weights, which only trained ones have.
    done = (2 + min(1.0, parameters["trained"] / parameters["total"])) / 3
    flops = flops_per_row * done * devices * accumulated * rows
    seconds = flops / (devices * settings["device_tflops"] * 1e12 * settings["mfu"])
    memory = {}
    for strategy in ("ddp", "fsdp2", "zero2"):
        for name, again in ((strategy, False), (f"{strategy}, recomputed", True)):
            memory[name] = device_memory(transformer, strategy, devices, rows * read, precision, again)
    steps = trainer.get("max_steps") or -1
    return {
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
    }


def read_config(model: dict[str, Any], data: dict[str, Any], objective: Objective) -> TransformerConfig:
    """Returns the shape of the model; where the settings leave it open, a checkpoint's and a tokenizer's."""
    config = TransformerConfig(**model["transformer"])
    if model.get("init_from") and config.vocab_size is None:
        lora = Lora(**model["lora"]) if model.get("lora") else None
        config = starting_config(config, model["init_from"], lora)
    if config.vocab_size is None:
        name = data.get("tokenizer")
        if name is None:
            path = (data.get("source") or {}).get("class_path", "dllm_var.datamodules.CmudictSource")
            module, _, kind = path.rpartition(".")
            name = getattr(getattr(import_module(module), kind), "default_tokenizer", None)
        if name is None:
            raise UserError("the vocabulary's size is not known: set model.transformer.vocab_size or data.tokenizer")
        tokenizer = Tokenizer.from_pretrained(name, data.get("mask_token"), data.get("terminators"))
        config = replace(config, vocab_size=tokenizer.vocab_size)
    return replace(config, causal=objective.causal)


def all_devices(trainer: dict[str, Any]) -> int:
    """Returns the devices of all nodes that the Trainer's settings name."""
    devices: Any = trainer.get("devices")
    devices = len(devices) if isinstance(devices, list) else devices
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


def activation_bytes(config: TransformerConfig, tokens: int, precision: str, recompute: bool = False) -> int:
    """Returns the bytes that autograd keeps of the layers between forward and backward; attention's matrix never.

    The layers read `tokens` of a batch. `precision` is `32`, `16-mixed` (autocast: weights and residual stream have 32
    bits) or `16-true`. With `recompute`, the input of each layer is kept, and all of one layer at a time.
    """
    sizes: Any = config  # none of them is None
    hidden, heads, kv_heads = sizes.hidden_size, sizes.num_heads, sizes.num_kv_heads
    queries_keys, width = (heads + kv_heads) * sizes.head_dim, 4 if precision == "32" else 2
    before_norms = queries_keys if sizes.qk_norm and precision == "32" else 0
    kept = width * (2 * queries_keys + before_norms + 4 * sizes.intermediate_size + 2 * hidden)
    kept += 4 * heads  # the logarithms of attention's sums
    kept += 16 * hidden + 8  # norms: the input and the normalised one, in 32 bits
    if sizes.qk_norm:
        kept += (4 if width == 4 else 8) * queries_keys + 4 * (heads + kv_heads)
    if not recompute:
        return tokens * kept * sizes.num_layers
    residual = 2 if precision == "16-true" else 4
    return tokens * (kept + residual * hidden * sizes.num_layers)


def device_memory(
    model: Transformer, strategy: str, devices: int, tokens: int, precision: str, recompute: bool = False
) -> dict[str, float]:
    """Returns the bytes on each device at the peak of a step with AdamW, without the allocator's waste and CUDA's own.

    `gathered` is what FSDP2 holds whole (a layer and the next one; embedding and head as long as a step lasts), and
    autocast's 16-bit copies; `gradients` includes the buckets in which ddp sends them; `optimizer` has the moments, and
    the 32-bit weights that DeepSpeed keeps beside 16-bit ones; `activations` includes a chunk of logits. `zero2`
    (DeepSpeed) shards gradients and optimizer state. The model is on the meta device and has its adapters.
    """
    held, trained = model.num_parameters, sum(p.numel() for p in model.parameters() if p.requires_grad)
    layers, in_layer = len(model.layers), list(model.layers[0].parameters())
    layer, matrices = sum(p.numel() for p in in_layer), sum(p.numel() for p in in_layer if p.dim() == 2)
    width = 2 if precision == "16-true" else 4
    # Autocast multiplies by 16-bit copies, which autograd keeps: of all layers, or of the one that is computed again.
    gathered = 2.0 * matrices * (1 if recompute else layers) if precision == "16-mixed" else 0
    weights, gradients, optimizer = float(width * held), float(width * trained), 2.0 * width * trained
    if strategy == "ddp":
        gradients *= 2
    elif strategy == "fsdp2":
        gathered += width * (held - layers * layer + 2 * layer) if devices > 1 else 0
        weights, gradients, optimizer = weights / devices, gradients / devices, optimizer / devices
    else:
        width, master = (4, 0) if precision == "32" else (2, 4)
        weights, gathered = width * held, 0
        gradients, optimizer = width * trained / devices, (8 + master) * trained / devices
    parts = {"weights": weights, "gathered": gathered, "gradients": gradients, "optimizer": optimizer}
    parts["activations"] = activation_bytes(model.config, tokens, precision, recompute) + LOGITS_BYTES
    return {**parts, "total": sum(parts.values())}


def report(result: dict[str, Any]) -> str:
    """Returns the figures as a table for people."""
    parameters, step, assumed, run = (result[part] for part in ("parameters", "step", "assumed", "run"))
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
    if run is not None:
        lines.append(f"run          {run['steps']:,} steps, {run['tokens']:,} tokens, {run['hours']:,.3g} hours")
    width = max(map(len, result["memory"])) + 2
    names = "".join(f"{name:>13}" for name in result["memory"]["ddp"])
    lines += ["", f"{'GiB per device':<{width}}{names}"]
    for name, memory in result["memory"].items():
        cells = "".join(f"{part / 2**30:>13.2f}" for part in memory.values())
        fits = "" if memory["total"] <= assumed["device_memory"] * 1e9 else f"  over {assumed['device_memory']:g} GB"
        lines.append(f"{name:<{width}}{cells}{fits}")
    return "\n".join(lines)
