"""The commands that run a Trainer: fit, validate, test, predict."""

from __future__ import annotations

import logging
import shlex
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from omegaconf.errors import OmegaConfBaseException

from dllm_var import DiffusionLM, __version__
from dllm_var.datamodules import PackedDataModule
from dllm_var.errors import UserError
from dllm_var.interrupt import Interrupted, StopOnInterrupt
from dllm_var.runs import SaveConfig, continue_newest, default_logger
from dllm_var.settings import SettingsParser

DEFAULTS = {"model": DiffusionLM, "data": PackedDataModule}
BASES = {"model": L.LightningModule, "data": L.LightningDataModule}


def main(command: str, arguments: list[str]) -> int:
    """Runs one Trainer command.

    Args:
        command: `fit`, `validate`, `test` or `predict`.
        arguments: Settings: `--config FILE`, `--key=value`, and for `fit` also `--resume`.

    Raises:
        UserError: For a mistake in the settings, the data or a checkpoint.
    """
    quieten()
    resume = "--resume" in arguments
    if resume and command != "fit":
        raise UserError(f"--resume belongs to fit; {command} takes --ckpt_path FILE")
    settings = [argument for argument in arguments if argument != "--resume"]
    try:
        TrainingCLI(command, settings, resume)
    except Interrupted as interrupted:
        print(f"\n{interrupted}; continue with: {resume_command(settings)}", file=sys.stderr)
        return 130
    except OmegaConfBaseException as error:  # a resolver such as ${oc.env:NAME}, or a reference that goes in a circle
        setting = ".".join(key for key in str(error.full_key).split(".")[1:] if key != "init_args")
        raise UserError(f"{setting}: {str(error.msg or error).splitlines()[0]}") from error
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning turns Ctrl-C outside the training loop into exit(1)
            raise KeyboardInterrupt from None
        return int(stop.code or 0)
    return 0


def resume_command(settings: list[str]) -> str:
    return shlex.join(["python", "-m", "dllm_var", "fit", *settings, "--resume"])


class TrainingCLI(LightningCLI):
    """LightningCLI with default classes, references across files, readable errors and one folder per run."""

    def __init__(self, command: str, settings: list[str], resume: bool) -> None:
        self.command, self.resume = command, resume
        self.run_name = first_config(settings)
        super().__init__(
            L.LightningModule,
            L.LightningDataModule,
            save_config_callback=SaveConfig,
            trainer_defaults={"callbacks": [StopOnInterrupt()]},
            seed_everything_default=0,
            parser_kwargs={"parser_mode": "omegaconf+"},  # resolved once, after all merging
            parser_class=SettingsParser,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            args=[command, *settings],
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        kwargs.setdefault("dump_header", [f"dllm_var=={__version__} lightning=={L.__version__}"])
        return super().init_parser(**kwargs)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({"trainer.logger": default_logger(self.run_name)})
        for key, base in BASES.items():
            default = {"class_path": f"{DEFAULTS[key].__module__}.{DEFAULTS[key].__name__}"}
            parser.add_subclass_arguments(base, key, as_group=False, default=default, fail_untyped=False)
        assert isinstance(parser, SettingsParser)
        parser.default_classes = dict(DEFAULTS)
        resume = " [--resume]" if self.command == "fit" else ""
        parser.usage = f"python -m dllm_var {self.command}{resume} [--config FILE ...] [--key=value ...]"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--vars", type=dict[str, Any], default={}, help="Free values, to be used elsewhere as ${vars.NAME} (default: {})"
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)
        settings = self.config[self.command]
        for section in ("trainer", "model", "data"):
            if not isinstance(settings.get(section), Namespace):
                raise UserError(f"{section}: expected settings by name, got {settings.get(section)!r}")
        path = settings.get("ckpt_path")
        if self.resume and path is not None:
            raise UserError(f"--resume finds the newest checkpoint itself: leave out --ckpt_path={path}")
        if self.resume:
            settings.ckpt_path = str(continue_newest(settings.trainer))
        elif path is not None and not is_named(str(path)) and not Path(path).exists():
            raise UserError(f"ckpt_path: there is no file or folder '{path}'")

    def _parse_ckpt_path(self) -> None:
        """Keeps the configuration as given; LightningCLI would let the checkpoint's hyper-parameters override it."""


def is_named(path: str) -> bool:
    """Whether Lightning looks the checkpoint up by a word of its own or at a URL."""
    return path in ("best", "last", "hpc", "registry") or path.startswith("registry:") or "://" in path


def first_config(settings: list[str]) -> str:
    """Returns the stem of the first configuration file, which names the run."""
    for argument, following in zip(settings, [*settings[1:], ""], strict=False):
        option, _, value = argument.partition("=")
        if option in ("--config", "-c") and Path(value or following).suffix in (".yaml", ".yml", ".json"):
            return Path(value or following).stem
    return "default"


def quieten() -> None:
    """Leaves out what Lightning prints that tells a user nothing about the run."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "litlogger" not in record.getMessage().lower()
    )
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # the data is in memory
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")  # inside Lightning
