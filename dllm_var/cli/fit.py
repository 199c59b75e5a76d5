"""The commands that run a Trainer: fit, validate, test, predict."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
import threading
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.plugins.io import AsyncCheckpointIO, CheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf.errors import OmegaConfBaseException

from dllm_var import DiffusionLM
from dllm_var.callbacks import AnswerWriter
from dllm_var.checkpoints.archive import CannotSave
from dllm_var.checkpoints.checkpoint_io import BackgroundFiles, CheckedFiles
from dllm_var.checkpoints.run_checkpoint import check_or_offer
from dllm_var.cli.trainer_settings import build_parser, check_settings, full_help, run_name
from dllm_var.errors import UserError, in_one_line, one_line
from dllm_var.model.float8 import Float8, check_float8
from dllm_var.settings import load_yaml
from dllm_var.training.interrupt import Interrupted, SaveAtEnd, StopOnSignal
from dllm_var.training.ranks import is_first, is_launched_child
from dllm_var.training.resume import ExactResume, ResumableFitLoop, check_changes
from dllm_var.training.run_folders import (
    NothingToResume,
    checkpoint_at,
    continue_from,
    continue_newest,
    lock,
    place_runs,
    reserve,
)
from dllm_var.training.trainer import SaveConfig, Trainer, default_checkpoints

_RESUMED = "DLLM_VAR_RESUMED"  # the checkpoint that the first process goes on from, for those it starts


def main(command: str, arguments: list[str]) -> int:
    """Runs `fit`, `validate`, `test` or `predict`.

    Returns:
        The exit status: 0, or 128 and the number of the signal that stopped it.

    Raises:
        UserError: For a mistake in the settings, the data or a checkpoint, and when a process or a disk fails.
    """
    if {"-h", "--help"} & set(arguments):
        print(full_help(build_parser(command, arguments)))
        return 0
    quieten()
    arguments, resume = split_resume(command, arguments)
    try:
        with ExitStack() as held:
            TrainerCLI(command, arguments, resume, held).run_command()
    except CannotSave:
        if is_launched_child():  # the first process says why
            return 1
        raise
    except Interrupted as interrupted:
        if getattr(rank_zero_only, "rank", 0) == 0:
            after = (
                "SLURM runs the job again" if interrupted.requeued else f"continue with: {resume_command(arguments)}"
            )
            print(f"\n{interrupted}; {after}", file=sys.stderr)
        return 0 if is_launched_child() else interrupted.status  # the first process speaks for all it has started
    except OmegaConfBaseException as error:  # a resolver such as ${oc.env:NAME}, or a reference that goes in a circle
        setting = ".".join(key for key in str(error.full_key).split(".")[1:] if key != "init_args")
        raise UserError(f"{setting}: {str(error.msg or error).splitlines()[0]}") from error
    except MisconfigurationException as error:
        raise UserError(one_line(error)) from error
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
    return 0


def failure(error: Exception) -> str | None:
    """Returns a line for an error that only says that another process is gone; None for any other."""
    text = one_line(error)
    if isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in text.lower() and "onnect" in text
    ):
        return "lost contact with another process of this run"
    if isinstance(error, RuntimeError) and text.startswith("DataLoader worker (pid"):
        return f"{text.rstrip('. ')}; too little memory is the usual cause: lower data.num_workers"
    return None


class TrainerCLI(LightningCLI):
    """LightningCLI for one command: reads the settings, gives the run its folder, builds model, data and Trainer.

    `resume` is what `--resume` says: `newest`, `auto` or a path; None without it. `held` keeps the locks of folders.
    """

    def __init__(self, command: str, arguments: list[str], resume: str | None, held: ExitStack) -> None:
        self.command, self.arguments, self.resume, self.held = command, arguments, resume, held
        stop = StopOnSignal()
        self.save_at_end = SaveAtEnd(stop)
        super().__init__(
            L.LightningModule,
            L.LightningDataModule,
            save_config_callback=SaveConfig,
            trainer_class=Trainer,
            trainer_defaults={"callbacks": [self.save_at_end, AnswerWriter(), ExactResume(), stop]},
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            args=arguments,
            run=False,
        )

    def setup_parser(self, *args: Any) -> None:
        self.parser = build_parser(self.command, self.arguments)

    def parse_arguments(self, parser: Any, args: Any) -> None:
        self.config = parser.parse_resolved(args)
        check_settings(self.config, run_name(args))
        self.resume = find_checkpoint(self.command, self.config, self.resume)

    def before_instantiate_classes(self) -> None:
        """Keeps the settings as they were given, for the run folder and checkpoints, then adds the run's folder."""
        self.text = self.parser.dump(self.config, skip_none=False, skip_validation=True)
        self.config_dump = load_yaml(self.text)
        self.save_config_kwargs = {"text": self.text}
        place_run(self.command, self.config, self.resume, self.held)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        is_ours = isinstance(self.model, DiffusionLM)
        if is_ours:
            self.model.sampler = self.config_init.sampler  # what predict decodes with
        self.trainer_defaults["callbacks"] += default_checkpoints(self.config_init.trainer, best=is_ours)
        plugins = with_checked_files(self.config_init.trainer.get("plugins"))
        try:
            trainer = super().instantiate_trainer(plugins=plugins, **kwargs)
        except (TypeError, ValueError) as error:
            raise UserError(f"trainer: {one_line(error)}") from error
        ResumableFitLoop.take_over(trainer)
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        callbacks.sort(key=lambda callback: callback is not self.save_at_end)
        return trainer

    def run_command(self) -> None:
        """Lets the Trainer work; before `fit` reads any data, what this machine or a resumed run lacks is said."""
        checkpoint = self.config.get("ckpt_path")
        if self.command == "fit":
            float8 = getattr(self.model, "float8", None)
            if isinstance(float8, Float8):
                check_float8(float8, self.trainer.strategy.root_device, self.trainer.precision)
            if checkpoint is not None and Path(checkpoint).exists():
                check_changes(Path(checkpoint), self.text, self.trainer, self.datamodule)
        options = {name: self.config[name] for name in ("verbose", "return_predictions") if name in self.config}
        method = getattr(self.trainer, self.command)
        options["weights_only"] = True  # a checkpoint is data, never code to run
        method(self.model, datamodule=self.datamodule, ckpt_path=checkpoint, **options)


def with_checked_files(plugins: Any) -> list[Any]:
    """Returns the Trainer's plugins with one of ours for checkpoints, also in place of Lightning's asynchronous one."""
    plugins = list(plugins) if isinstance(plugins, list | tuple) else [plugins] if plugins else []
    for number, plugin in enumerate(plugins):
        if isinstance(plugin, AsyncCheckpointIO) and isinstance(plugin.checkpoint_io, CheckedFiles | None):
            plugins[number] = BackgroundFiles()  # Lightning's removes old checkpoints before the new one is whole
    if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
        plugins.append(CheckedFiles())
    return plugins


# -- before a run ------------------------------------------------------------------------------------------------------


def split_resume(command: str, arguments: list[str]) -> tuple[list[str], str | None]:
    """Returns the arguments without `--resume`, and what that says: `newest`, `auto` or a path; None without it.

    It is `auto` also where SLURM or torchrun has started the process again.
    """
    given = [argument for argument in arguments if argument.partition("=")[0] == "--resume"]
    others = [argument for argument in arguments if argument not in given]
    if given and command != "fit":
        raise UserError(f"--resume belongs to fit; {command} takes --ckpt_path FILE")
    restarts = (os.environ.get(name, "0") for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))
    if given:
        return others, given[-1].partition("=")[2] or "newest"
    return others, "auto" if command == "fit" and any(restart not in ("", "0") for restart in restarts) else None


def resume_command(arguments: list[str]) -> str:
    """Returns the command that goes on where `fit` with these arguments stopped."""
    kept: list[str] = []
    for previous, argument in zip(["", *arguments], arguments, strict=False):
        if previous != "--ckpt_path" and argument.partition("=")[0] != "--ckpt_path":
            kept.append(argument)
    return shlex.join(["python", "-m", "dllm_var", "fit", *kept, "--resume"])


def find_checkpoint(command: str, settings: Namespace, resume: str | None) -> str | None:
    """Puts the checkpoint that `--ckpt_path` means into the settings, and returns what `--resume` means."""
    path = settings.get("ckpt_path")
    if resume and path not in (None, "last"):
        raise UserError(f"--resume finds the newest checkpoint itself: leave out --ckpt_path={path}")
    if path == "last" and command == "fit":  # Lightning would look in the new run's folder
        settings.ckpt_path = None
        return resume or "newest"
    if path == "last":
        placed = settings.trainer.clone()
        place_runs(placed)
        settings.ckpt_path = str(continue_newest(placed))
        check_or_offer(Path(settings.ckpt_path), "--ckpt_path=")
    elif path is not None:
        settings.ckpt_path = str(checkpoint_at(str(path)))
    elif command != "fit":
        raise UserError(f"{command} needs --ckpt_path FILE, or --ckpt_path last for the newest run")
    return resume


def place_run(command: str, settings: Namespace, resume: str | None, held: ExitStack) -> None:
    """Finds or makes the run's folder, locks it, and puts folder and checkpoint into the settings."""
    trainer = settings.trainer
    place_runs(trainer)
    checkpoint = to_resume(resume, trainer) if resume else None
    if is_first() and not trainer.get("fast_dev_run"):
        reserve(trainer, held)
        if command == "fit":
            lock(trainer, held)
            if checkpoint is not None:  # until now another run may have written there
                checkpoint = to_resume(resume, trainer)
    if resume:
        settings.ckpt_path = None if checkpoint is None else str(checkpoint)
        os.environ[_RESUMED] = settings.ckpt_path or ""
        if checkpoint is not None and is_first():
            check_or_offer(checkpoint, "--resume=")
        warnings.filterwarnings("ignore", message=".*exists and is not empty.*")  # it goes on there


def to_resume(resume: str | None, trainer_settings: Any) -> Path | None:
    """Finds the checkpoint that `--resume` means and points the loggers at its run; None when a run is to start."""
    resume = (os.environ[_RESUMED] or None) if is_launched_child() else resume
    try:
        if resume in ("newest", "auto"):
            return continue_newest(trainer_settings)
        return None if resume is None else continue_from(resume, trainer_settings)
    except NothingToResume:
        if resume == "auto":
            return None
        raise


def quieten() -> None:
    """Leaves out what Lightning prints that tells a user nothing about the run."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: not record.getMessage().startswith(("💡 Tip:", "Tip:", "TPU available"))
    )
    threading.excepthook = tell_thread_failure
    # Rows need no loader state: the data module goes on with the row after the last one trained.
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # the data is in memory
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")  # inside Lightning


def tell_thread_failure(failed: threading.ExceptHookArgs) -> None:
    """Tells in one line what a thread could not write: TensorBoard's raises it again where the run next logs."""
    message = in_one_line(failed.exc_value)
    if message is None:
        threading.__excepthook__(failed)
    else:
        print(f"warning: {message}", file=sys.stderr)
