"""python -m dllm_var: finds the command and runs it. Nothing heavy is imported here, so that --help is quick."""

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from dllm_var import __version__
from dllm_var.errors import UserError, in_one_line
from dllm_var.training.ranks import enter

# command: (module, what it does); main(command, arguments) of the module runs it and returns the exit status
COMMANDS = {
    "fit": ("dllm_var.cli.fit", "train a model; --resume continues the newest run of the same config"),
    "validate": ("dllm_var.cli.fit", "measure a checkpoint on the validation split (--ckpt_path FILE)"),
    "test": ("dllm_var.cli.fit", "measure a checkpoint on the test split (--ckpt_path FILE)"),
    "predict": ("dllm_var.cli.fit", "answer the test split's prompts, into answers.jsonl (--ckpt_path FILE)"),
    "generate": ("dllm_var.cli.generate", "answer prompts with a trained checkpoint"),
    "tokenizer": ("dllm_var.cli.tokenizer", "train a tokenizer on your own data (--data FILE.jsonl)"),
    "inspect": ("dllm_var.cli.inspect", "show what becomes of the data before training on it (--config FILE)"),
    "chat": ("dllm_var.cli.chat", "talk with a checkpoint that was trained on conversations"),
    "serve": ("dllm_var.cli.serve", "answer requests over HTTP, as OpenAI's API (--checkpoint PATH)"),
    "plan": ("dllm_var.cli.plan", "say what a training run will cost: parameters, memory, time per step"),
    "evaluate": ("dllm_var.cli.evaluate", "measure a checkpoint on standard tasks (--tasks NAME ...)"),
    "export": ("dllm_var.cli.export", "write a checkpoint as a folder that transformers and others open"),
    "plot": ("dllm_var.cli.plot", "draw the training curves of runs as a PNG (RUN ...)"),
    "benchmark": ("dllm_var.cli.benchmark", "measure samplers side by side (--config benchmarks/samplers.yaml)"),
}

# Rounds of busy waiting before an idle thread of torch's sleeps, some 40 microseconds; libgomp's own 300,000 are 4 ms.
# When other programs need the cores, what is waited for cannot run meanwhile, and every operation waits so long.
SPINS = 3000


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
    """Runs what follows `python -m dllm_var`; returns 0, 2 for a mistake the user can mend, or 130 after Ctrl-C."""
    if arguments is None and not getattr(sys.flags, "safe_path", False) and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does: the script dllm-var finds the same modules of the user's
    try:
        status = run(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as in `| head`
        drop_output()
        return 0
    except Exception as error:
        message = in_one_line(error)
        if message is None:  # a bug keeps its traceback
            raise
        print(f"error: {message}", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:  # standard output is what cannot be written
            drop_output()
        return 2


def run(arguments: list[str]) -> int:
    """Runs one command and returns its exit status."""
    command, *rest = arguments or ["--help"]
    if command in ("-h", "--help", "help", "--version"):
        print(f"dllm-var {__version__}" if command == "--version" else overview())
        return 0
    if command not in COMMANDS:
        raise UserError(f"no command '{command}'; commands are: {', '.join(COMMANDS)}")
    enter()  # before anything heavy is imported: a launcher that dies meanwhile leaves no process behind
    if "OMP_WAIT_POLICY" not in os.environ:  # read on Linux when torch is imported
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
    try:
        return import_module(COMMANDS[command][0]).main(command, rest)
    except SystemExit as stop:  # the parser, after --help or --print_config
        return int(stop.code or 0)


def drop_output() -> None:
    """Sends what is still to be printed nowhere: its reader is gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
