"""The commands that run a Trainer: fit, validate, test, predict."""

from __future__ import annotations

import logging
import os
import re
import shlex
import signal
import sys
import threading
import warnings
from contextlib import ExitStack

from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf.errors import OmegaConfBaseException

from dllm_var.checkpoints.run_files import CannotSave
from dllm_var.cli.failures import from_checkpoint, from_files, from_outside, is_lost_contact
from dllm_var.cli.training import TrainingCLI
from dllm_var.errors import UserError
from dllm_var.training.interrupt import Interrupted, StopOnSignal
from dllm_var.training.ranks import is_launched_child


def main(command: str, arguments: list[str]) -> int:
    """Runs one Trainer command and returns its exit status: 0, or 128 and the number of the signal that stopped it.

    Args:
        command: `fit`, `validate`, `test` or `predict`.
        arguments: Settings: `--config FILE`, `--key=value`, and for `fit` also `--resume`.

    Raises:
        UserError: For a mistake in the settings, the data or a checkpoint, and when a process or a disk fails.
    """
    quieten()
    settings, resume = split_resume(command, arguments)
    stop = StopOnSignal()
    with ExitStack() as held:  # run folders, until all processes have ended
        try:
            status = run(command, settings, resume, stop, held)
        except BaseException as error:
            lost = stop.children.end(failed=True)
            if lost is not None and is_lost_contact(error.__cause__ or error):
                raise UserError(stop.children.explain(lost)) from error
            if is_launched_child() and isinstance(error, CannotSave):  # the first process says why
                return 1
            raise
        stop.children.end(failed=False)
    return status


def run(command: str, settings: list[str], resume: str | None, stop: StopOnSignal, held: ExitStack) -> int:
    """Runs one Trainer command; what ends it from outside becomes one line.

    Args:
        command: As for `main`.
        settings: Its arguments but `--resume`.
        resume: What `split_resume` found.
        stop: Listens to signals.
        held: Keeps the run's folders for it.
    """
    try:
        TrainingCLI(command, settings, resume, stop, held)
    except Interrupted as interrupted:
        if getattr(rank_zero_only, "rank", 0) == 0:
            after = "SLURM runs the job again" if interrupted.requeued else f"continue with: {resume_command(settings)}"
            print(f"\n{interrupted}; {after}", file=sys.stderr)
        return 0 if is_launched_child() else interrupted.status  # the first process speaks for all it has started
    except OmegaConfBaseException as error:  # a resolver such as ${oc.env:NAME}, or a reference that goes in a circle
        setting = ".".join(key for key in str(error.full_key).split(".")[1:] if key != "init_args")
        raise UserError(f"{setting}: {str(error.msg or error).splitlines()[0]}") from error
    except MisconfigurationException as error:
        raise UserError(" ".join(str(error).split())) from error
    except SIGTERMException:  # before our own handler was in place
        return 128 + signal.SIGTERM
    except SystemExit as stopped:
        if isinstance(stopped.__context__, KeyboardInterrupt):  # Lightning makes exit(1) of Ctrl-C outside of steps
            raise KeyboardInterrupt from None
        raise
    except Exception as error:
        message = None if isinstance(error, UserError) else from_outside(error) or from_checkpoint(error)
        if message is None:
            raise
        raise UserError("; ".join([message, *getattr(error, "__notes__", [])])) from error
    return 0


def split_resume(command: str, arguments: list[str]) -> tuple[list[str], str | None]:
    """Takes `--resume` out of the arguments.

    Returns:
        The other arguments, and `newest`, `auto` or a path; `auto` also where SLURM or torchrun has started it again.

    Raises:
        UserError: When the command has no such option.
    """
    settings: list[str] = []
    resume = None
    for argument in arguments:
        option, _, value = argument.partition("=")
        if option == "--resume":
            resume = value or "newest"
        else:
            settings.append(argument)
    if resume and command != "fit":
        raise UserError(f"--resume belongs to fit; {command} takes --ckpt_path FILE")
    restarts = (os.environ.get(name, "0") for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))
    if command == "fit" and resume is None and any(restart not in ("", "0") for restart in restarts):
        resume = "auto"
    return settings, resume


def resume_command(settings: list[str]) -> str:
    """Returns the command that goes on where `fit` with these settings stopped."""
    kept: list[str] = []
    for previous, argument in zip(["", *settings], settings, strict=False):
        if previous != "--ckpt_path" and argument.partition("=")[0] != "--ckpt_path":
            kept.append(argument)
    return shlex.join(["python", "-m", "dllm_var", "fit", *kept, "--resume"])


def tell_thread_failure(failure: threading.ExceptHookArgs) -> None:
    """Tells in one line what a thread could not write: TensorBoard's raises it again where the run next logs."""
    message = from_files(failure.exc_value)
    if message is None:
        threading.__excepthook__(failure)
    else:
        print(f"warning: {message}", file=sys.stderr)


def quieten() -> None:
    """Leaves out what Lightning prints that tells a user nothing about the run."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: not re.search("Tip: For seamless|TPU available", record.getMessage())
    )
    threading.excepthook = tell_thread_failure
    # Rows need no loader state: the data module goes on with the row after the last one trained.
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # the data is in memory
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")  # inside Lightning
