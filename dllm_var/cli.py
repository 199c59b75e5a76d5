"""The commands that run a Trainer: fit, validate, test, predict."""

from __future__ import annotations

import logging
import re
import shlex
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf.errors import OmegaConfBaseException

from dllm_var import DiffusionLM, __version__
from dllm_var.callbacks import AnswerWriter
from dllm_var.datamodules import PackedDataModule
from dllm_var.errors import UserError
from dllm_var.interrupt import Interrupted, StopOnInterrupt
from dllm_var.runs import SaveAtEnd, SaveConfig, checkpoint_at, continue_newest, default_logger
from dllm_var.sampling import Sampler
from dllm_var.settings import SettingsParser, merged, qualify_references, read_settings, split_vars

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
        if getattr(rank_zero_only, "rank", 0) == 0:
            print(f"\n{interrupted}; continue with: {resume_command(settings)}", file=sys.stderr)
        return 130
    except OmegaConfBaseException as error:  # a resolver such as ${oc.env:NAME}, or a reference that goes in a circle
        setting = ".".join(key for key in str(error.full_key).split(".")[1:] if key != "init_args")
        raise UserError(f"{setting}: {str(error.msg or error).splitlines()[0]}") from error
    except MisconfigurationException as error:
        raise UserError(" ".join(str(error).split())) from error
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning makes exit(1) of Ctrl-C outside training steps
            raise KeyboardInterrupt from None
        raise
    return 0


def resume_command(settings: list[str]) -> str:
    """Returns the command that goes on where `fit` with these settings stopped."""
    kept: list[str] = []
    for previous, argument in zip(["", *settings], settings, strict=False):
        if previous != "--ckpt_path" and argument.partition("=")[0] != "--ckpt_path":
            kept.append(argument)
    return shlex.join(["python", "-m", "dllm_var", "fit", *kept, "--resume"])


class TrainerParser(SettingsParser, LightningArgumentParser):
    """Reads the settings of one Trainer command, or hands over to the parsers of all of them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.default_classes: dict[str, type] = {}

    def parse_args(self, args: Any = None, *rest: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]
        if not hasattr(self, "subcommand"):
            return super().parse_args(args, *rest, **kwargs)
        others, values = split_vars(args)
        config = super().parse_args(others, *rest, **kwargs)
        if values:
            config.vars = merged(config.vars, values)
        qualify_references(config, self.subcommand)  # all files and arguments are merged now, nothing is resolved yet
        return config

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """Adds the settings of the default classes, which the class-path options alone would not show."""
        text = super().format_help(*args, **kwargs)
        if not self.default_classes:
            return text
        inner = LightningArgumentParser(description="", usage="", add_help=False)
        for key, default in self.default_classes.items():
            inner.add_class_arguments(default, key, sub_configs=True, fail_untyped=False)
        return text + inner.format_help().split("\n", 1)[1]


class TrainingCLI(LightningCLI):
    """LightningCLI with default classes, references across files, readable errors and one folder per run."""

    def __init__(self, command: str, settings: list[str], resume: bool) -> None:
        self.command, self.resume = command, resume
        configs = config_files(settings)
        self.run_name = configs[0].stem if configs else "default"
        super().__init__(
            L.LightningModule,
            L.LightningDataModule,
            save_config_callback=SaveConfig,
            trainer_defaults={"callbacks": [StopOnInterrupt(), SaveAtEnd(), AnswerWriter()]},
            seed_everything_default=0,
            parser_kwargs={"parser_mode": "omegaconf+"},  # resolved once, after all merging
            parser_class=TrainerParser,
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
        assert isinstance(parser, TrainerParser)
        parser.default_classes = dict(DEFAULTS)
        resume = " [--resume]" if self.command == "fit" else ""
        parser.usage = f"python -m dllm_var {self.command}{resume} [--config FILE ...] [--key=value ...]"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_subclass_arguments(
            Sampler,
            "sampler",
            as_group=False,
            default={"class_path": "dllm_var.sampling.BlockDiffusionSampler"},
            help="How prompts are decoded; callbacks refer to it as ${sampler}.",
        )
        parser.add_argument(
            "--vars",
            type=dict[str, Any],
            default={},
            help="Free values, to be used elsewhere as ${vars.NAME} (default: {})",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)
        settings = self.config[self.command]
        for section in ("trainer", "model", "data"):
            if not isinstance(settings.get(section), Namespace):
                raise UserError(f"{section}: expected settings by name, got {settings.get(section)!r}")
        if settings.get("weights_only") is None:
            settings.weights_only = True  # a checkpoint is data, never code to run
        path = settings.get("ckpt_path")
        if self.resume and path not in (None, "last"):
            raise UserError(f"--resume finds the newest checkpoint itself: leave out --ckpt_path={path}")
        if path == "last" and self.command == "fit":  # Lightning would look in the new run's folder
            self.resume, settings.ckpt_path = True, None
        elif path == "last":
            settings.ckpt_path = str(continue_newest(settings.trainer.clone()))
        elif path is not None:
            settings.ckpt_path = str(checkpoint_at(str(path)))
        elif self.command != "fit":
            raise UserError(f"{self.command} needs --ckpt_path FILE, or --ckpt_path last for the newest run")

    def before_instantiate_classes(self) -> None:
        self.as_written = self.config
        if self.resume:
            self.config = self.config.clone()
            settings = self.config[self.command]
            settings.ckpt_path = str(continue_newest(settings.trainer))

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        self.config = self.as_written  # what is saved starts a new run when it is used again
        try:
            return super().instantiate_trainer(**kwargs)
        except ValueError as error:
            raise UserError(f"trainer: {' '.join(str(error).split())}") from error

    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        if isinstance(self.model, DiffusionLM):
            self.model.sampler = self._get(self.config_init, "sampler")  # what predict decodes with

    def _parse_ckpt_path(self) -> None:
        """Keeps the configuration as given; LightningCLI would let the checkpoint's hyper-parameters override it."""


def config_files(settings: list[str]) -> list[Path]:
    """Returns the configuration files among the arguments, after a look at each: the parser would not name the file.

    Raises:
        UserError: When a file is missing or is not YAML; names the file and the line.
    """
    paths = []
    for argument, following in zip(settings, [*settings[1:], ""], strict=False):
        option, equals, value = argument.partition("=")
        if option in ("--config", "-c"):
            paths.append(Path(value if equals else following))
            read_settings(paths[-1])
    return paths


def quieten() -> None:
    """Leaves out what Lightning prints that tells a user nothing about the run."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: not re.search("Tip: For seamless|TPU available", record.getMessage())
    )
    # Rows need no loader state: the data module goes on with the row after the last one trained.
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # the data is in memory
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")  # inside Lightning
