"""The command `evaluate`: measures a checkpoint on tasks of lm-evaluation-harness."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jsonargparse import Namespace

from dllm_var.checkpoints.run_checkpoint import provenance
from dllm_var.cli.decoding_options import (
    add_chat_options,
    add_device_options,
    add_quantize_option,
    add_sampler_options,
    load_model,
    read_options,
    settle_chat,
)
from dllm_var.errors import UserError, one_line
from dllm_var.evaluation import TASKS
from dllm_var.files import open_output
from dllm_var.settings import SettingsParser, suggestion

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from dllm_var.evaluation.lm import EvaluatedModel

DESCRIPTION = """Measures a checkpoint on tasks of lm-evaluation-harness: those that ship (cmudict, gsm_symbolic), YAML
files of your own, and its standard ones by name, whose data comes from the Hugging Face hub.

Answers are decoded by the checkpoint's sampler; likelihoods are exact for causal checkpoints and Monte-Carlo bounds for
diffusion models. Needs pip install "dllm-var[evaluate]"."""

EXAMPLES = """examples:
  python -m dllm_var evaluate --checkpoint checkpoints/cmudict --tasks cmudict --output cmudict.json
  python -m dllm_var evaluate --checkpoint checkpoints/cmudict --tasks cmudict --sampler factor
  python -m dllm_var evaluate --checkpoint RUN --tasks gsm8k arc_easy --limit 100 --mc-draws 128

docs/evaluate.md explains estimators and figures."""


def main(command: str, arguments: list[str]) -> int:
    """Runs `evaluate` and returns its exit status; raises UserError for a mistake, or without lm-eval."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # the harness's bars are for terminals
    options, sampler, checkpoint = read_options(command, arguments, build_parser)
    if find_spec("lm_eval") is None:
        raise UserError('evaluate needs lm-evaluation-harness: pip install "dllm-var[evaluate]"')
    if not options.tasks:
        raise UserError("evaluate needs --tasks NAME ..., such as cmudict")
    if options.limit is not None and not 0 < options.limit < math.inf:
        raise UserError(f"--limit must be a number above 0, got {options.limit:g}")
    if options.num_fewshot is not None and options.num_fewshot < 0:
        raise UserError(f"--num-fewshot must be at least 0, got {options.num_fewshot}")
    if options.output is None and options.samples:
        raise UserError("--samples needs --output FILE.json: that is where the answers go")
    model, tokenizer = load_model(options, checkpoint)
    settle_chat(options, checkpoint, tokenizer)
    from dllm_var.evaluation.likelihood import Likelihood
    from dllm_var.evaluation.lm import EvaluatedModel
    from dllm_var.sampling.configurable import sampler_to_config

    block_length = options.mc_block_length
    if block_length is None:
        block_length = getattr(sampler, "block_length", 0) if model.config.causal_context else 0
    likelihood = Likelihood(options.mc_draws, options.mc_batch_size, options.mc_seed, options.mc_canvas, block_length)
    evaluated = EvaluatedModel(model, tokenizer, sampler, likelihood, options.max_new_tokens)
    with nullcontext() if options.output is None else open_output(options.output) as file:  # before the work
        result = evaluate(evaluated, options)
        bound = {"estimator": "Monte-Carlo bound", **vars(likelihood)}
        result["dllm_var"] = {
            **provenance(),
            "checkpoint": options.checkpoint,
            "parameters": model.num_parameters,
            "chat": options.chat,
            "sampler": sampler_to_config(sampler),
            "likelihood": {"estimator": "exact"} if model.config.causal else bound,
            "decoding": {task: decoded.figures() for task, decoded in evaluated.decoded.items()},
        }
        print(report(result))
        if file is not None:
            from lm_eval.utils import handle_non_serializable

            json.dump(result, file, indent=2, default=handle_non_serializable, ensure_ascii=False)
            file.write("\n")
    return 0


def build_parser(command: str, sampler: dict[str, Any] | None) -> SettingsParser:
    """Returns the parser of the options; `sampler` is the default one, None for a parser that only shows help."""
    usage = "--checkpoint PATH --tasks NAME ... [options]"
    parser = SettingsParser.of_command(command, usage, DESCRIPTION, EXAMPLES)
    what = parser.add_argument_group("what to measure")
    what.add_argument("--checkpoint", type=str, metavar="PATH", help="run folder, .ckpt file or model folder")
    add_device_options(what)
    add_quantize_option(what)
    what.add_argument("--tasks", nargs="+", type=str, metavar="NAME", help="names of tasks, or YAML files of tasks")
    what.add_argument("--include-path", type=str, metavar="FOLDER", help="folder with YAML files of further tasks")
    what.add_argument("--limit", type=float, metavar="N", help="documents per task; below 1 the share of them")
    what.add_argument("--num-fewshot", type=int, metavar="N", help="worked examples before each question")
    add_chat_options(what)
    longest = "longest answer; the task's when not given"
    what.add_argument("--max-new-tokens", type=int, metavar="N", help=longest)
    add_sampler_options(parser, sampler)

    scoring = parser.add_argument_group("likelihoods of diffusion models")
    scoring.add_argument("--mc-draws", type=int, default=128, metavar="N", help="draws per answer (128)")
    scoring.add_argument("--mc-batch-size", type=int, default=32, metavar="N", help="rows per forward (32)")
    scoring.add_argument("--mc-seed", type=int, default=0, metavar="N", help="seed of the draws (0)")
    canvas = "show masks behind an answer up to a multiple of N tokens, as block samplers do; none when 0 (LLaDA)"
    scoring.add_argument("--mc-canvas", type=int, default=0, metavar="N", help=canvas)
    blocks = (
        "score blocks of N tokens, each given those before it; whole answers when 0 (LLaDA); when not given, the "
        "sampler's for a checkpoint that reads finished blocks from left to right, else 0"
    )
    scoring.add_argument("--mc-block-length", type=int, metavar="N", help=blocks)

    output = parser.add_argument_group("output")
    output.add_argument("--output", type=str, metavar="FILE", help="JSON file for lm-eval's results and our figures")
    output.add_argument("--samples", action="store_true", help="keep every document's answer in that file")
    output.add_argument("--config", action="config", metavar="FILE", help="YAML file with options of this list")
    return parser


def evaluate(evaluated: EvaluatedModel, options: Namespace) -> dict[str, Any]:
    """Runs the harness and returns its results; raises UserError when a task's data cannot be loaded."""
    for name in ("lm_eval", "httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from lm_eval import evaluator

    # The harness asks git about the current folder, which complains aloud where that is no repository.
    evaluator.get_git_commit_hash = lambda: (provenance()["git"] or {}).get("commit")
    try:
        return evaluator.simple_evaluate(
            model=evaluated,
            tasks=options.tasks,
            task_manager=find_tasks(options.tasks, options.include_path),
            limit=options.limit if options.limit is None or options.limit < 1 else int(options.limit),
            num_fewshot=options.num_fewshot,
            apply_chat_template=options.chat,
            fewshot_as_multiturn=options.chat,
            log_samples=options.samples,
            bootstrap_iters=1000,
        )
    except (OSError, ImportError) as error:  # no hub, no such data set, a metric's package
        raise UserError(f"--tasks {' '.join(options.tasks)}: {one_line(error)[:300]}") from error


def find_tasks(tasks: Sequence[str], include_path: str | None) -> TaskManager:
    """Returns what loads the tasks: names, or YAML files; lm-eval's own tasks are indexed only when one is wanted."""
    from lm_eval.tasks import TaskManager

    if include_path is not None and not Path(include_path).is_dir():
        raise UserError(f"--include-path: there is no folder '{include_path}'")
    folders: list[str | Path] = [TASKS, *([] if include_path is None else [include_path])]
    manager = TaskManager(include_path=folders, include_defaults=False)
    files = [task for task in tasks if Path(task).suffix in (".yaml", ".yml")]
    for file in files:
        if not Path(file).is_file():
            raise UserError(f"--tasks: there is no file '{file}'")
        try:
            manager.load([file])
        except (ValueError, TypeError, KeyError, yaml.YAMLError) as error:
            raise UserError(f"--tasks: {file} is no task of lm-eval: {one_line(error)[:300]}") from error
    names = [task for task in tasks if task not in files]
    if any(name not in manager.task_index for name in names):
        manager = TaskManager(include_path=folders, include_defaults=True)
    for name in names:
        if name not in manager.task_index:
            raise UserError(f"--tasks: there is no task '{name}'{suggestion(name, manager.all_tasks)}")
    return manager


def report(result: dict[str, Any]) -> str:
    """Returns lm-eval's tables, and below them a line about each task's answers."""
    from lm_eval.utils import make_table

    tables = [make_table(result).rstrip()]
    if "groups" in result:
        tables.append(make_table(result, "groups").rstrip())
    for task, figures in result["dllm_var"]["decoding"].items():
        tables.append(
            f"{task}: {figures['answers']:,} answers, {figures['ended_by_eos']:.1%} ended by eos, "
            f"{figures['ended_by_stop']:.1%} by a stop string, {figures['hit_limit']:.1%} hit the limit; "
            f"{figures['nfe']:.2f} forwards/answer, {figures['tokens_per_forward']:.2f} tokens/forward, "
            f"{figures['useful_tokens_per_second']:,.0f} useful tokens/s"
        )
    return "\n".join(tables)
