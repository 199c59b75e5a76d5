"""Measures training: models and vocabularies that a config lists, our training against baselines, in turn."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dllm_var.benchmarking.settings import check_names
from dllm_var.benchmarking.training_settings import TrainingCase, smaller
from dllm_var.cli import measuring
from dllm_var.cli.settings import SettingsParser
from dllm_var.errors import UserError
from dllm_var.files import write_text

DESCRIPTION = """Measures training, side by side on one machine: a config with `trainings` lists models to train.

Writes FILE.json (--output) with every figure and FILE.md with the tables. Ctrl-C and SIGTERM write what has been
measured so far.
"""
QUICK_ROUNDS = 2


def main(command: str, arguments: list[str]) -> int:
    """Runs `benchmark` on a config with `trainings`; returns its exit status: 0, 130 after Ctrl-C, 143 after SIGTERM.

    Args:
        command: `benchmark`.
        arguments: Its options, as `--help` lists them.

    Raises:
        UserError: For a bad config or output file.
    """
    options = build_parser(command).parse_args(arguments)
    output = measuring.check_output(options.output)
    cases = chosen_cases(options)
    device = measuring.prepare_device(options.threads)
    rounds = QUICK_ROUNDS if options.quick else options.repeats
    progress = measuring.Progress()
    from dllm_var.benchmarking.training import TrainingRun, top_ratios  # imports Lightning

    with tempfile.TemporaryDirectory() as cache, quiet("lightning.pytorch"):
        runs = [TrainingRun(case, rounds, device, Path(cache), progress.show) for case in cases]
        result, status = measuring.measure("training", runs, rounds, options.quick, device, progress)
    from dllm_var.benchmarking.training_report import markdown_report, text_report

    result["trainings"] = [run.result() for run in runs if run.peaks]
    if options.quick:  # next to nothing is trained: no verdict
        for bar in (bar for training in result["trainings"] for bar in training["bars"].values()):
            bar["passed"] = None
    result["ratios"] = top_ratios(result["trainings"])
    write_text(output, json.dumps(result, indent=1) + "\n")
    write_text(output.with_suffix(".md"), markdown_report(result))
    print(text_report(result))
    measuring.say(f"wrote {output} and {output.with_suffix('.md')}")
    return status


@contextmanager
def quiet(name: str) -> Iterator[None]:
    """Lets a logger say warnings alone; its level is put back after."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def build_parser(command: str) -> SettingsParser:
    """Returns the parser of the options.

    Args:
        command: Name to show.
    """
    parser = SettingsParser(prog=f"python -m dllm_var {command}", description=DESCRIPTION)
    parser.usage = f"python -m dllm_var {command} --config benchmarks/training.yaml --output FILE.json [options]"
    parser.add_argument("--config", action="config", help="YAML file that lists what to measure; it has its comments")
    parser.add_argument("--trainings", type=list[TrainingCase], default=[], help="what to measure")
    measuring.add_options(parser)
    return parser


def chosen_cases(options: Any) -> list[TrainingCase]:
    """Returns the cases to run: what --only names of them, made small by --quick."""
    measuring.check_counts(options)
    cases = [TrainingCase(**case.as_dict()) for case in options.trainings]
    if not cases:
        raise UserError("nothing to measure: the list of trainings is empty")
    check_names([case.name for case in cases], "trainings")
    if options.only is not None:
        named = [case for case in cases if case.name in options.only]
        unknown = set(options.only) - {case.name for case in cases} - {c for case in cases for c in case.contenders}
        if unknown:
            names = "; ".join(case.name for case in cases)
            raise UserError(f"--only: nothing is called '{sorted(unknown)[0]}'; there are {names}")
        cases = named or cases
        for case in cases:
            case.contenders = [name for name in case.contenders if name in options.only] or case.contenders
    return smaller(cases) if options.quick else cases
