"""python -m dllm_var: finds the command and hands over; imports nothing heavy itself, so that --help is quick."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from dllm_var import __version__
from dllm_var.cli.failures import from_files
from dllm_var.errors import UserError
from dllm_var.training.ranks import enter

# command: (module, what it does). A module's main(command, arguments) runs the command and returns the exit status.
COMMANDS = {
    "fit": ("dllm_var.cli.fit", "train a model; --resume continues the newest run of the same config"),
    "validate": ("dllm_var.cli.fit", "measure a checkpoint on the validation split (--ckpt_path FILE)"),
    "test": ("dllm_var.cli.fit", "measure a checkpoint on the test split (--ckpt_path FILE)"),
    "predict": ("dllm_var.cli.fit", "answer the test split's prompts, into answers.jsonl (--ckpt_path FILE)"),
    "generate": ("dllm_var.cli.generate", "answer prompts with a trained checkpoint"),
    "plan": ("dllm_var.cli.plan", "say what a training run will cost: parameters, memory, time per step"),
    "evaluate": ("dllm_var.cli.evaluate", "measure a checkpoint on standard tasks (--tasks NAME ...)"),
    "export": ("dllm_var.cli.export", "write a checkpoint as a folder that transformers and others open"),
    "benchmark": ("dllm_var.cli.benchmark", "measure samplers side by side (--config benchmarks/samplers.yaml)"),
}


def overview() -> str:
    """Returns what `python -m dllm_var --help` shows."""
    width = max(map(len, COMMANDS)) + 2
    commands = "\n".join(f"  {name:<{width}}{summary}" for name, (_, summary) in COMMANDS.items())
    return f"""usage: python -m dllm_var COMMAND [--config FILE ...] [--key=value ...]

Variable-length diffusion language models: training, sampling, measuring.

commands:
{commands}

options:
  {"--help":<{width}}show this text; after a command, its settings
  {"--version":<{width}}show the version

example: python -m dllm_var fit --config configs/quickstart.yaml --trainer.max_steps=500"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0, 2 for a mistake the user can mend, 130 after Ctrl-C.

    Args:
        arguments: What follows `python -m dllm_var`; the command line when None.
    """
    open_streams()
    try:
        status = run(list(sys.argv[1:] if arguments is None else arguments), is_process=arguments is None)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as in `| head`
        silence()
        return 0
    except Exception as error:  # a bug keeps its traceback
        message = mistake(error) or from_files(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:  # it is what cannot be written
            silence()
        return 2


def run(arguments: list[str], is_process: bool) -> int:
    """Runs one command and returns its exit status; `is_process` says that nothing else runs in this process."""
    command, *rest = arguments or ["--help"]
    if command in ("-h", "--help", "help", "--version"):
        print(f"dllm-var {__version__}" if command == "--version" else overview())
        return 0
    if command not in COMMANDS:
        raise UserError(f"no command '{command}'; commands are: {', '.join(COMMANDS)}")
    enter()
    module = import_module(COMMANDS[command][0])
    if is_process:  # what the imports have made stays; collections, of settings too, need not look at it
        gc.freeze()
    try:
        return module.main(command, rest)
    except SystemExit as stop:  # the parser, after --help or --print_config
        return int(stop.code or 0)


def open_streams() -> None:
    """Opens standard streams that are closed: a file of ours would take their place and get what is printed."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


def silence() -> None:
    """Drops what is still to be printed, which nothing can take."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def mistake(error: BaseException | None) -> str | None:
    """Returns the one-line message of the UserError that an exception is or was raised from, None for anything else."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__  # the settings parser wraps what a constructor raises
    if error is None:
        return None
    text = str(error).strip()
    if "Traceback (most recent call last)" in text:  # from a loader's worker process
        text = text.splitlines()[-1].split("UserError: ", 1)[-1]
    return text


if __name__ == "__main__":
    sys.exit(main())
