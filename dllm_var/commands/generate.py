"""Answers prompts with a trained checkpoint. Needs torch, not Lightning, and so starts quickly."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace

from dllm_var.errors import UserError
from dllm_var.model.checkpoints import load_checkpoint
from dllm_var.model.rope_scaling import read_rope_scaling
from dllm_var.sampling import AutoregressiveSampler, BlockDiffusionSampler, ConfidenceThreshold, Generation, Sampler
from dllm_var.sampling.config import check_own
from dllm_var.settings import SettingsParser, read_settings
from dllm_var.tokenization import Tokenizer

DESCRIPTION = """Answers prompts with a trained checkpoint.

Prompts come from --prompt, --prompts-file or, when neither is given, standard input (one per line). The sampler is the
one the checkpoint remembers, unless --sampler says otherwise.
"""


def main(command: str, arguments: list[str]) -> int:
    """Runs `generate`.

    Args:
        command: `generate`.
        arguments: Its options, as `--help` lists them.

    Raises:
        UserError: For a bad checkpoint, prompt or setting.
    """
    wants_help = any(argument in ("-h", "--help") for argument in arguments)
    path = None if wants_help else checkpoint_path(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    transformer, tokenizer, meta = load_checkpoint(path, device) if path else (None, None, {})
    causal = transformer is not None and transformer.config.causal
    chosen = any(argument.partition("=")[0] == "--sampler" for argument in arguments)
    remembered = None if chosen else meta.get("sampler")
    check_own(remembered)
    parser = build_parser(command, remembered or {"class_path": class_path(default_sampler(causal))})
    options = parser.parse_args(inline_sampler(arguments))
    apply_shortcuts(options)
    sampler: Sampler = parser.instantiate(options).sampler
    assert transformer is not None and tokenizer is not None
    if options.rope_scaling is not None:
        transformer.scale_rope(read_rope_scaling(options.rope_scaling, transformer.config))

    prompts = read_prompts(options)
    check_characters(prompts, tokenizer)
    start = time.perf_counter()
    answers = sampler.generate(transformer, prompts, tokenizer=tokenizer)
    seconds = time.perf_counter() - start
    for prompt, answer in zip(prompts, answers, strict=True):
        print(answer.as_json(prompt) if options.json else f"{prompt} -> {answer.text}")
    sys.stdout.flush()
    summarise(answers, seconds)
    return 0


def default_sampler(causal: bool) -> type[Sampler]:
    """Returns the sampler of a checkpoint that remembers none."""
    return AutoregressiveSampler if causal else BlockDiffusionSampler


def class_path(cls: type) -> str:
    """Returns the name by which settings know a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def checkpoint_path(arguments: list[str]) -> str:
    """Returns --checkpoint, which must be read first: the checkpoint knows the default sampler."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--checkpoint", nargs="?")
    path = first.parse_known_args(arguments)[0].checkpoint
    if path is None:
        raise UserError("generate needs --checkpoint PATH: a run folder, a .ckpt file or an exported folder")
    return path


def build_parser(command: str, sampler: dict[str, Any]) -> SettingsParser:
    """Returns the parser of the options.

    Args:
        command: Name to show.
        sampler: Default sampler: `class_path` and `init_args`.
    """
    parser = SettingsParser(prog=f"python -m dllm_var {command}", description=DESCRIPTION)
    parser.usage = f"python -m dllm_var {command} --checkpoint PATH --prompt TEXT [options]"
    parser.add_argument(
        "--config", action="config", help="YAML file with any of these options, such as configs/sampler/*.yaml"
    )
    parser.add_argument("--checkpoint", type=str, help="run folder, .ckpt file or exported folder")
    parser.add_argument("--prompt", action="append", type=str, help="text to answer; may be given several times")
    parser.add_argument("--prompts-file", type=str, help="file with one prompt per line")
    parser.add_argument("--json", action="store_true", help="one JSON object per answer and line")
    parser.add_argument("--max-new-tokens", type=int, help="longest answer in tokens (the sampler's max_new_tokens)")
    parser.add_argument("--block-length", type=int, help="tokens decoded together (the sampler's block_length)")
    parser.add_argument(
        "--threshold", type=float, help="commit tokens above this confidence (policy ConfidenceThreshold)"
    )
    parser.add_argument(
        "--rope-scaling",
        type=str,
        help="read contexts longer than trained on: factor on rope_theta (4), or trained and wanted length (4096:8192)",
    )
    parser.add_subclass_arguments(
        Sampler,
        "sampler",
        default=sampler,
        as_group=False,
        help="class_path, or a YAML file with class_path and init_args; --sampler.NAME=VALUE sets one argument",
    )
    return parser


def inline_sampler(arguments: list[str]) -> list[str]:
    """Replaces `--sampler FILE` by what the file says, under `sampler`, under `vars.sampler` or at its top level."""
    result = list(arguments)
    for index, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option != "--sampler" or not (equals or arguments[index + 1 :]):
            continue
        place = index if equals else index + 1
        name = value if equals else arguments[place]
        if Path(name).suffix not in (".yaml", ".yml", ".json"):
            continue
        settings = read_settings(Path(name))
        settings = settings.get("sampler") or (settings.get("vars") or {}).get("sampler") or settings
        result[place] = ("--sampler=" if equals else "") + json.dumps(settings)
    return result


def apply_shortcuts(options: Namespace) -> None:
    """Moves --max-new-tokens, --block-length and --threshold into the sampler's own arguments."""
    settings = options.sampler.init_args
    name = options.sampler.class_path.rsplit(".", 1)[-1]
    shortcuts: dict[str, Any] = {
        "max_new_tokens": options.max_new_tokens,
        "block_length": options.block_length,
        "policy": None
        if options.threshold is None
        else Namespace(class_path=class_path(ConfidenceThreshold), init_args=Namespace(threshold=options.threshold)),
    }
    for key, value in shortcuts.items():
        if value is None:
            continue
        if key not in settings:
            option = "threshold" if key == "policy" else key.replace("_", "-")
            raise UserError(f"--{option} does not go with {name}, which has no {key}")
        settings[key] = value


def read_prompts(options: Namespace) -> list[str]:
    """Returns the prompts of --prompt, --prompts-file or standard input."""
    prompts = list(options.prompt or [])
    if any(not prompt.strip() for prompt in prompts):
        raise UserError("--prompt is empty: give at least one token")
    if options.prompts_file is not None:
        try:
            text = Path(options.prompts_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise UserError(f"--prompts-file: cannot read '{options.prompts_file}': {reason}") from error
        prompts += lines(text.splitlines(), options.prompts_file)
    elif not prompts and not sys.stdin.isatty():
        prompts = lines(sys.stdin.read().splitlines(), "standard input")
    if not prompts:
        raise UserError("no prompts: give --prompt TEXT, --prompts-file FILE or lines on standard input")
    return prompts


def lines(content: Iterable[str], where: str) -> list[str]:
    """Returns one prompt per line; raises UserError for an empty one, with its line number."""
    prompts = [line.strip() for line in content]
    if "" in prompts:
        raise UserError(f"{where}, line {prompts.index('') + 1}: the prompt is empty; give at least one token")
    return prompts


def check_characters(prompts: list[str], tokenizer: Tokenizer) -> None:
    """Raises UserError for a prompt with text that the vocabulary cannot spell."""
    if tokenizer.unknown_id is None:
        return
    for prompt in prompts:
        encoding = tokenizer.backend.encode(prompt, add_special_tokens=False)
        spans = [
            span for index, span in zip(encoding.ids, encoding.offsets, strict=True) if index == tokenizer.unknown_id
        ]
        if spans:
            unknown = prompt[spans[0][0] : spans[0][1]]
            raise UserError(f"prompt '{prompt}': the checkpoint's vocabulary has nothing for '{unknown}'")


def summarise(answers: list[Generation], seconds: float) -> None:
    """Prints one dim line to standard error: what it took."""
    tokens, forwards = sum(len(answer.tokens) for answer in answers), sum(answer.nfe for answer in answers)
    cut = sum(answer.finish_reason == "length" for answer in answers)
    text = (
        f"{count(len(answers), 'answer')}, {count(tokens, 'token')} in {count(forwards, 'forward')} "
        f"({tokens / max(forwards, 1):.2f} tokens/forward), {seconds:.2f} s "
        f"({tokens / max(seconds, 1e-9):.0f} tokens/s)"
    )
    if cut:
        text += f"; {cut} reached the length limit"
    dim = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    print(f"\033[2m{text}\033[0m" if dim else text, file=sys.stderr)


def count(number: int, noun: str) -> str:
    """Returns `1 token`, `2 tokens`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
