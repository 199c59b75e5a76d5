"""Writes a checkpoint as a model folder that transformers and other engines open."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import Namespace

from dllm_var.cli.decoding_options import add_quantize_option
from dllm_var.errors import UserError
from dllm_var.files import fits
from dllm_var.settings import SettingsParser

if TYPE_CHECKING:
    from dllm_var.checkpoints.checkpoint import Checkpoint

DESCRIPTION = """Writes a checkpoint as the folder of a published model family: config, safetensors, tokenizer, chat
template, mask token, terminators, and how to decode it. docs/checkpoints.md says which engine serves which format."""
# Engines that take an id of their own for the mask, whatever a folder says.
ASSUMED_MASKS = dict.fromkeys(("sdar", "sdar_moe"), ("SGLang and LMDeploy take", 151669))
ASSUMED_MASKS |= {"llada2": ("SGLang takes", 156895)}
EXAMPLES = """examples:
  python -m dllm_var export --checkpoint runs/llada_8b_sft/version_0 --format llada --output llada-var --dtype bfloat16
  python -m dllm_var export --checkpoint checkpoints/cmudict --format llama --output cmudict-llama
  python -m dllm_var export --checkpoint GSAI-ML/LLaDA-8B-Instruct --format llada --quantize int4 --output llada-int4"""


def main(command: str, arguments: list[str]) -> int:
    """Runs `export`; raises UserError for a bad checkpoint or option, or a model that the format cannot hold."""
    options = build_parser(command).parse_args(arguments)
    for name in ("checkpoint", "format", "output"):
        if options[name] is None:
            raise UserError(f"export needs --{name}; python -m dllm_var export --help lists its options")
    import torch  # not before --help has been answered

    from dllm_var.checkpoints.export import export_checkpoint
    from dllm_var.checkpoints.families import FORMATS
    from dllm_var.checkpoints.pretrained import open_checkpoint

    if options.format not in FORMATS:
        raise UserError(f"--format {options.format} is unknown; there are {', '.join(FORMATS)}")
    checkpoint = open_checkpoint(options.checkpoint)
    sampler, decoding = decoding_settings(checkpoint, options.block_length, options.threshold)
    checkpoint = replace(checkpoint, meta={**checkpoint.meta, "sampler": sampler})
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    family, output = FORMATS[options.format], Path(options.output)
    if options.calibrate is not None:
        checkpoint = calibrate(checkpoint, options, int(decoding.get("block_length", 0)))
    config = export_checkpoint(checkpoint, family, output, decoding, dtype, options.quantize)
    print(
        f"{options.output}: {options.format}, {config.num_layers} layers of width {config.hidden_size}, "
        f"mask {config.mask_id}, terminators {', '.join(map(str, config.terminator_ids or []))}"
        + "".join(f", {name.replace('_', ' ')} {value}" for name, value in decoding.items())
    )
    engines, assumed = ASSUMED_MASKS.get(options.format, ("", config.mask_id))
    if assumed != config.mask_id:
        print(f"{engines} {assumed} for the mask: use an engine that is told {config.mask_id}")
    return 0


def build_parser(command: str) -> SettingsParser:
    usage = "--checkpoint PATH --format NAME --output FOLDER [options]"
    parser = SettingsParser.of_command(command, usage, DESCRIPTION, EXAMPLES)
    parser.add_argument("--checkpoint", type=str, metavar="PATH", help="run folder, .ckpt file or model folder")
    parser.add_argument("--format", type=str, metavar="NAME", help="model family, such as llada, dream or qwen3")
    parser.add_argument("--output", type=str, metavar="FOLDER", help="where to; must not exist yet")
    dtypes = Literal["float32", "bfloat16", "float16"]
    parser.add_argument("--dtype", type=dtypes, help="type of the weights; as they are when not given")
    add_quantize_option(parser)
    calibrate = "round (GPTQ) for the inputs that the first 64 records of a JSONL file give, hidden as in decoding"
    parser.add_argument("--calibrate", type=str, metavar="FILE", help=calibrate)
    parser.add_argument("--block-length", type=int, metavar="N", help="tokens decoded together; else the sampler's")
    confidence = "confidence from which tokens are committed; else the sampler's"
    parser.add_argument("--threshold", type=float, metavar="P", help=confidence)
    return parser


def calibrate(checkpoint: Checkpoint, options: Namespace, block_length: int) -> Checkpoint:
    """Returns the checkpoint quantised for the inputs that its matrices have on the records of `--calibrate`."""
    import torch

    from dllm_var.datamodules import JsonlSource
    from dllm_var.datamodules.table import RecordEncoder
    from dllm_var.evaluation.calibration import RECORDS, calibrated
    from dllm_var.evaluation.likelihood import Likelihood

    if options.quantize is None or checkpoint.quantised is not None or Path(options.output).exists():
        raise UserError(
            "--calibrate needs --quantize, a checkpoint whose weights are not quantised yet, and an --output that does "
            "not exist"
        )
    source = JsonlSource(options.calibrate)
    encoder = RecordEncoder(checkpoint.load_tokenizer(), bool(checkpoint.meta.get("chat")))
    table = encoder.encode(list(islice(source.located_records("train"), RECORDS)))
    samples = ((table.ids(n), max(1, int(table.answer_start[n]))) for n in range(len(table)))
    pairs = [(ids[:start], ids[start:]) for ids, start in samples]
    likelihood = Likelihood(draws=4, block_length=block_length, canvas=block_length)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return calibrated(checkpoint, pairs, likelihood, options.quantize, device)


def decoding_settings(checkpoint: Checkpoint, block_length: int | None, threshold: float | None) -> tuple[Any, Any]:
    """Returns the sampler to remember, and what other engines must know of it: `block_length` and `threshold`.

    Engines read a block-causal model in the blocks of its own, also where the sampler decodes a part at a time.
    """
    from dllm_var.sampling.base import sampler_from_config
    from dllm_var.sampling.configurable import sampler_to_config
    from dllm_var.sampling.defaults import default_sampler

    sampler = checkpoint.meta.get("sampler")
    if sampler is None and not checkpoint.config.causal:
        sampler = sampler_to_config(default_sampler(checkpoint.config))
    if block_length is not None or threshold is not None:
        if sampler is None:
            raise UserError("--block-length and --threshold do not go with this model, which reads left to right")
        changed: Any = sampler_from_config(sampler)
        policy = getattr(changed, "policy", None)
        for owner, name, value in ((changed, "block_length", block_length), (policy, "threshold", threshold)):
            if value is not None and not hasattr(owner, name):
                raise UserError(f"--{name.replace('_', '-')} does not go with {sampler['class_path']}")
            if value is not None:
                setattr(owner, name, value)
        sampler = sampler_to_config(changed)
        sampler_from_config(sampler)  # checks the ranges
    settings = _arguments(sampler)
    places = {"block_length": settings, "threshold": _arguments(settings.get("policy"))}
    decoding = {name: place[name] for name, place in places.items() if fits(place.get(name), float)}
    return sampler, {**decoding, **({"block_length": checkpoint.config.grid} if checkpoint.config.grid else {})}


def _arguments(described: Any) -> dict[str, Any]:
    """Returns the arguments in a checkpoint's description of a sampler or policy; none when it is not one."""
    arguments = described.get("init_args") if isinstance(described, dict) else None
    return arguments if isinstance(arguments, dict) else {}
