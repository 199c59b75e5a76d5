"""The commands that run a Trainer: fit, validate, test, predict."""

import logging
import os
import shlex
import signal
import sys
import threading
import traceback
import warnings
from contextlib import ExitStack
from pathlib import Path

import lightning as L
import torch
from jsonargparse import Namespace
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins.io import AsyncCheckpointIO, CheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

from dllm_var import DiffusionLM
from dllm_var.callbacks import AnswerWriter, ExportWeights, RunSummary
from dllm_var.callbacks.summary import shown_path
from dllm_var.checkpoints.archive import CannotSave
from dllm_var.checkpoints.checkpoint_io import BackgroundFiles, CheckedFiles
from dllm_var.checkpoints.run_checkpoint import check_or_offer
from dllm_var.cli.trainer_settings import build_parser, canvas_warning, check_settings, full_help, run_name
from dllm_var.errors import UserError, in_one_line, one_line, warn
from dllm_var.model.float8 import Float8, check_float8
from dllm_var.training.interrupt import Interrupted, SaveAtEnd, StopOnSignal
from dllm_var.training.ranks import is_first, is_launched_child
from dllm_var.training.resume import ExactResume, ResumableFitLoop, check_changes
from dllm_var.training.run_folders import RunFolders, checkpoint_at, listed
from dllm_var.training.strategies import check_strategy
from dllm_var.training.trainer import SaveConfig, Trainer, default_checkpoints

FEWER_WORKERS = "too little memory is the usual cause: lower data.num_workers"


def main(command: str, arguments: list[str]) -> int:
    """Runs `fit`, `validate`, `test` or `predict`; returns 0, or 128 and the number of the signal that stopped it."""
    if {"-h", "--help"} & set(arguments):
        print(full_help(command, arguments))
        return 0
    quieten()
    arguments, resume = split_resume(command, arguments)
    try:
        with ExitStack() as held:
            run(command, arguments, resume, held)
    except CannotSave:
        if is_launched_child():  # the first process says why
            return 1
        raise
    except Interrupted as interrupted:
        if is_first():
            goes_on = f"continue with: {resume_command(arguments)}"
            goes_on = "SLURM runs the job again" if interrupted.requeued else goes_on
            print(f"\n{interrupted}; {goes_on}", file=sys.stderr)
        leave_group()
        return 0 if is_launched_child() else interrupted.status  # the first process speaks for all it has started
    except SIGTERMException:  # before our own handler was in place
        return 128 + signal.SIGTERM
    except SystemExit as stopped:
        if isinstance(stopped.__context__, KeyboardInterrupt):  # Lightning makes exit(1) of Ctrl-C outside of steps
            raise KeyboardInterrupt from None
        raise
    except Exception as error:
        message = None if in_one_line(error) else failure(error)
        if message is None:
            raise
        raise UserError("; ".join([message, *getattr(error, "__notes__", [])])) from error
    leave_group()
    return 0


def leave_group() -> None:
    """Leaves the process group, if there is one: gloo's threads may abort a process that exits with them."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run(command: str, arguments: list[str], resume: str | None, held: ExitStack) -> None:
    """Reads the settings, takes the run's folder until `held` ends, builds model, data and Trainer, and runs them."""
    parser = build_parser(command, arguments)
    settings = parser.parse_resolved(arguments)
    check_settings(settings, run_name(arguments))
    check_strategy(settings.trainer.get("strategy"))
    resume = read_ckpt_path(command, settings, resume)
    if settings.seed_everything is not False:
        chosen = None if settings.seed_everything is True else settings.seed_everything
        settings.seed_everything = L.seed_everything(chosen, workers=True)
    text = parser.dump(settings, skip_none=False, skip_validation=True)  # as it was given, without the run's folder
    folders = RunFolders(settings.trainer, command)
    checkpoint = folders.enter(resume, held, trains=command == "fit")
    path = settings.get("ckpt_path") if resume is None else checkpoint and str(checkpoint)
    built = parser.instantiate(settings)
    if isinstance(built.model, DiffusionLM):
        built.model.sampler = built.sampler  # what predict decodes with
    trainer = build_trainer(built, text, folders)
    if trainer.world_size > 1 and isinstance(trainer.accelerator, CPUAccelerator) and is_first():
        shared_by = getattr(trainer.strategy, "group_size", 1)
        readers = "process" if shared_by == 1 else f"group of {shared_by} processes"
        print(
            f"{command} runs in {trainer.world_size} processes on CPUs, and this machine has {os.cpu_count()} cores; "
            f"each {readers} has its own batches; --trainer.devices=1 runs in one process",
            file=sys.stderr,
        )
    if command == "fit":  # before any data is read
        mismatch = canvas_warning(built.data, built.sampler)
        if mismatch and is_first():
            warn(mismatch)
        float8 = getattr(built.model, "float8", None)
        if isinstance(float8, Float8):
            check_float8(float8, trainer.strategy.root_device, trainer.precision)
        if path is not None:
            check_changes(Path(path), text, trainer, built.data)
    options = {name: settings[name] for name in ("verbose", "return_predictions") if name in settings}
    options["weights_only"] = True  # a checkpoint is data, never code to run
    getattr(trainer, command)(built.model, datamodule=built.data, ckpt_path=path, **options)
    callbacks = listed(built.trainer.callbacks)
    exported = shown_path(callback.path for callback in callbacks if isinstance(callback, ExportWeights))
    if command == "fit" and exported and is_first() and not any(isinstance(one, RunSummary) for one in callbacks):
        print(f"\nweights  {exported}\ntry      python -m dllm_var generate --checkpoint {exported} --prompt TEXT")


def build_trainer(built: Namespace, text: str, folders: RunFolders) -> Trainer:
    """Returns the Trainer of the built settings, with what each run has besides: exact resume, signals, checkpoints."""
    stop = StopOnSignal()
    callbacks = [
        SaveAtEnd(stop),  # before other callbacks
        *listed(built.trainer.callbacks),
        AnswerWriter(),
        ExactResume(),
        stop,
        *default_checkpoints(built.trainer, best=isinstance(built.model, DiffusionLM)),
        SaveConfig(text, folders),
    ]
    plugins = listed(built.trainer.plugins)
    for number, plugin in enumerate(plugins):
        if isinstance(plugin, AsyncCheckpointIO) and isinstance(plugin.checkpoint_io, CheckedFiles | None):
            plugins[number] = BackgroundFiles()  # Lightning's removes old checkpoints before the new one is whole
    if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
        plugins.append(CheckedFiles())
    wanted, found = built.trainer.get("accelerator"), torch.accelerator.current_accelerator(check_available=True)
    if wanted in ("gpu", "cuda", "mps") and (found is None or wanted not in ("gpu", found.type)):
        here = "only CPUs" if found is None else found.type
        raise UserError(f"trainer.accelerator={wanted} is not here: this machine has {here}, which auto takes")
    try:
        trainer = Trainer(**{**built.trainer, "callbacks": callbacks, "plugins": plugins})
    except (TypeError, ValueError, MisconfigurationException) as error:
        raise UserError(f"trainer: {one_line(error)}") from error
    trainer.fit_loop = ResumableFitLoop(trainer)
    return trainer


def failure(error: Exception) -> str | None:
    """Returns the line that says all about an error: a wrong setting, or another process that is gone; None else."""
    text = one_line(error)
    if isinstance(error, OmegaConfBaseException):  # a resolver such as ${oc.env:NAME}, or a reference to itself
        setting = ".".join(key for key in str(error.full_key).split(".")[1:] if key != "init_args")
        hint = "; a reference is written ${section.name}" if isinstance(error, GrammarParseError) else ""
        return f"{setting}: {str(error.msg or error).splitlines()[0]}{hint}"
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    by_lightning = "".join(modules[-1:]).startswith("lightning.")
    if isinstance(error, MisconfigurationException) or (isinstance(error, ValueError | RuntimeError) and by_lightning):
        return f"trainer: {text}"
    if isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in text.lower() and "onnect" in text
    ):
        return "lost contact with another process of this run"
    one: BaseException | None = error
    while one is not None:  # a loader's process may be missed first, and its end told while a checkpoint is saved
        text = one_line(one)
        if isinstance(one, RuntimeError) and text.startswith("DataLoader worker (pid"):
            return f"{text.rstrip('. ')}; {FEWER_WORKERS}"
        one = one.__cause__ or one.__context__
    if isinstance(error, ConnectionError | EOFError) and "torch.utils.data.dataloader" in modules:
        return f"a DataLoader worker is gone; {FEWER_WORKERS}"
    return None


def split_resume(command: str, arguments: list[str]) -> tuple[list[str], str | None]:
    """Returns the arguments without `--resume`, and what that says: `newest`, `auto` or a path; None without it.

    It is `auto` also where SLURM or torchrun has started the process again.
    """
    given = [argument for argument in arguments if argument.partition("=")[0] == "--resume"]
    for option, value in zip(arguments, arguments[1:], strict=False):
        if option == "--resume" and not value.startswith("-"):
            raise UserError(f"--resume takes its value behind '=': --resume={value}")
    if given and command != "fit":
        raise UserError(f"--resume belongs to fit; {command} takes --ckpt_path FILE")
    if given:
        others = [argument for argument in arguments if argument not in given]
        return others, given[-1].partition("=")[2] or "newest"
    restarts = (os.environ.get(name) or "0" for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))
    return arguments, "auto" if command == "fit" and any(restart != "0" for restart in restarts) else None


def resume_command(arguments: list[str]) -> str:
    """Returns the command that goes on where `fit` with these arguments stopped."""
    pairs = zip(["", *arguments], arguments, strict=False)
    kept = [word for previous, word in pairs if "--ckpt_path" not in (previous, word.partition("=")[0])]
    return shlex.join(["python", "-m", "dllm_var", "fit", *kept, "--resume"])


def read_ckpt_path(command: str, settings: Namespace, resume: str | None) -> str | None:
    """Puts the checkpoint that `--ckpt_path` means into the settings, and returns what `--resume` means."""
    path = settings.get("ckpt_path")
    if resume and path not in (None, "last"):
        raise UserError(f"--resume finds the newest checkpoint itself: leave out --ckpt_path={path}")
    if command == "fit" and path == "last":  # Lightning would look in the new run's folder
        settings.ckpt_path = None
        return resume or "newest"
    if command != "fit" and path is None:
        raise UserError(f"{command} needs --ckpt_path FILE, or --ckpt_path last for the newest run")
    if path is not None:
        newest = RunFolders(settings.trainer.clone()).newest() if path == "last" else None
        found = newest or checkpoint_at(str(path), "--ckpt_path")
        check_or_offer(found, "--ckpt_path=")
        settings.ckpt_path = str(found)
    return resume


def quieten() -> None:
    """Leaves out what Lightning prints that tells a user nothing about the run."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: not record.getMessage().startswith(("💡 Tip:", "Tip:", "TPU available"))
    )
    threading.excepthook = tell_thread_failure
    # Rows need no loader state: the data module goes on with the row after the last one trained.
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # the data is in memory
    warnings.filterwarnings("ignore", message=".*The dirpath has changed.*")  # of a new run from a checkpoint
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")  # inside Lightning


def tell_thread_failure(failed: threading.ExceptHookArgs) -> None:
    """Tells in one line what a thread could not write: TensorBoard's raises it again where the run next logs."""
    message = in_one_line(failed.exc_value)
    if message is None:
        threading.__excepthook__(failed)
    else:
        print(f"warning: {message}", file=sys.stderr)
