"""The settings of the commands that run a Trainer: their parser, and what is checked before anything is built."""

from __future__ import annotations

from typing import Any

import lightning as L
from jsonargparse import Namespace, dict_to_namespace
from lightning.pytorch.cli import LightningArgumentParser

from dllm_var import DiffusionLM, __version__
from dllm_var.datamodules import PackedDataModule
from dllm_var.errors import UserError
from dllm_var.sampling import Sampler
from dllm_var.settings import ReferringParser, SettingsParser, config_files
from dllm_var.training.run_folders import default_logger
from dllm_var.training.strategies import check_strategy
from dllm_var.training.trainer import Trainer

DEFAULTS = {"model": DiffusionLM, "data": PackedDataModule}
BASES = {"model": L.LightningModule, "data": L.LightningDataModule}
PASSED = ("model", "train_dataloaders", "val_dataloaders", "dataloaders", "datamodule")  # no settings of the commands


class TrainerParser(ReferringParser, LightningArgumentParser):
    """The parser that LightningCLI builds from, with the mistakes and references of `ReferringParser`."""


def build_parser(command: str, arguments: list[str], trainer_command: str | None = None) -> TrainerParser:
    """Returns the parser of a command that runs a Trainer.

    Args:
        command: Its name.
        arguments: What follows it; the first `--config` names the run.
        trainer_command: The Trainer's method whose arguments are settings, too; the command itself when None.
    """
    parser = TrainerParser(
        command,
        description=None,
        prog=f"python -m dllm_var {command}",
        dump_header=[f"dllm_var=={__version__} lightning=={L.__version__}"],
    )
    resume = " [--resume[=auto|PATH]]" if command == "fit" else ""
    parser.usage = f"python -m dllm_var {command}{resume} [--config FILE ...] [--key=value ...]"
    parser.add_argument("-c", "--config", action="config", help="YAML file of settings; later files win")
    parser.add_argument(
        "--seed_everything", type=bool | int, default=0, help="Seed of all random generators; true for a random one"
    )
    parser.add_class_arguments(Trainer, "trainer", fail_untyped=False, instantiate=False, sub_configs=True)
    parser.set_defaults({"trainer.logger": default_logger(run_name(arguments))})
    for key, base in BASES.items():
        default = {"class_path": f"{DEFAULTS[key].__module__}.{DEFAULTS[key].__name__}"}
        parser.add_subclass_arguments(base, key, as_group=False, default=default, fail_untyped=False)
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
    method = trainer_command or command
    skipped: set[str | int] = {name for name in PASSED if name in getattr(Trainer, method).__annotations__}
    parser.add_method_arguments(Trainer, method, skip=skipped)
    return parser


def run_name(arguments: list[str]) -> str:
    """Returns the name of a run: that of its first config."""
    configs = config_files(arguments)
    return configs[0].stem if configs else "default"


def full_help(parser: TrainerParser) -> str:
    """Returns --help with the settings of the default classes, which a parser of class paths does not show."""
    inner = SettingsParser(description="", usage="", add_help=False)
    for key, default in DEFAULTS.items():
        inner.add_class_arguments(default, key, sub_configs=True, fail_untyped=False)
    return parser.format_help() + inner.format_help().split("\n", 1)[1]


def check_settings(settings: Namespace, name: str) -> None:
    """Puts the default logger where `trainer.logger=true` asks for it, and refuses values that make no sense.

    Raises:
        UserError: Names the setting.
    """
    for section in ("trainer", "model", "data"):
        if not isinstance(settings.get(section), Namespace):
            raise UserError(f"{section}: expected settings by name, got {settings.get(section)!r}")
    trainer = settings.trainer
    if trainer.get("logger") is True:
        trainer.logger = dict_to_namespace(default_logger(name))
    seed = settings.get("seed_everything")
    if isinstance(seed, int) and not 0 <= seed < 2**32:
        raise UserError(f"seed_everything must be from 0 to {2**32 - 1}, got {seed}")
    for setting, least in (("gradient_clip_val", 0), ("accumulate_grad_batches", 1)):
        value = trainer.get(setting)
        if isinstance(value, int | float) and not value >= least:
            raise UserError(f"trainer.{setting} must be at least {least}, got {value}")
    check_strategy(trainer.get("strategy"))
    if settings.get("weights_only") is False:
        raise UserError("weights_only=false would run code that a checkpoint may hold: leave it out")
    settings.weights_only = True  # a checkpoint is data, never code to run
