"""The parser of the Trainer commands: default classes, references across files, one folder per run, --resume."""

from __future__ import annotations

import os
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import Namespace, dict_to_namespace
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.io import AsyncCheckpointIO, CheckpointIO

from dllm_var import DiffusionLM, __version__
from dllm_var.callbacks import AnswerWriter
from dllm_var.checkpoints.background import BackgroundFiles
from dllm_var.checkpoints.choose import check_or_offer
from dllm_var.cli.settings import SettingsParser, config_files, load_yaml, merged, qualify_references, split_vars
from dllm_var.datamodules import PackedDataModule
from dllm_var.errors import UserError
from dllm_var.model.float8 import Float8, check_float8
from dllm_var.sampling import Sampler
from dllm_var.training.changed_settings import check_changes
from dllm_var.training.checkpointing import CheckedFiles, Trainer
from dllm_var.training.exact_resume import ExactResume, ResumableFitLoop
from dllm_var.training.interrupt import SaveAtEnd, StopOnSignal
from dllm_var.training.ranks import is_first, is_launched_child
from dllm_var.training.run_folders import (
    NothingToResume,
    checkpoint_at,
    continue_from,
    continue_newest,
    lock,
    place_runs,
    reserve,
)
from dllm_var.training.runs import SaveConfig, default_checkpoints, default_logger
from dllm_var.training.strategies import check_strategy

_RESUMED = "DLLM_VAR_RESUMED"  # the checkpoint that the first process goes on from, for those it starts
DEFAULTS = {"model": DiffusionLM, "data": PackedDataModule}
BASES = {"model": L.LightningModule, "data": L.LightningDataModule}


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

    def __init__(
        self, command: str, settings: list[str], resume: str | None, stop: StopOnSignal, held: ExitStack
    ) -> None:
        self.command, self.resume, self.held = command, resume, held
        self.save_at_end = SaveAtEnd(stop)
        configs = config_files(settings)
        self.run_name = configs[0].stem if configs else "default"
        super().__init__(
            L.LightningModule,
            L.LightningDataModule,
            save_config_callback=SaveConfig,
            trainer_class=Trainer,
            trainer_defaults={"callbacks": [self.save_at_end, AnswerWriter(), ExactResume(), stop]},
            seed_everything_default=0,
            parser_kwargs={"parser_mode": "omegaconf+"},  # resolved once, after all merging
            parser_class=TrainerParser,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            args=[command, *settings],
        )

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        """Builds the parser of the command that is asked for, and not those of the others."""
        skipped = LightningCLI.subcommands()[self.command]
        self.subcommands = lambda: {self.command: skipped}  # type: ignore[method-assign]
        super()._add_subcommands(parser, **kwargs)

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
        resume = " [--resume[=auto|PATH]]" if self.command == "fit" else ""
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
        if settings.trainer.get("logger") is True:
            settings.trainer.logger = dict_to_namespace(default_logger(self.run_name))
        seed = settings.get("seed_everything")
        if isinstance(seed, int) and not 0 <= seed < 2**32:
            raise UserError(f"seed_everything must be from 0 to {2**32 - 1}, got {seed}")
        clip = settings.trainer.get("gradient_clip_val")
        if isinstance(clip, int | float) and not clip >= 0:
            raise UserError(f"trainer.gradient_clip_val must be at least 0, got {clip}")
        accumulated = settings.trainer.get("accumulate_grad_batches")
        if isinstance(accumulated, int) and accumulated < 1:
            raise UserError(f"trainer.accumulate_grad_batches must be at least 1, got {accumulated}")
        check_strategy(settings.trainer.get("strategy"))
        if settings.get("weights_only") is False:
            raise UserError("weights_only=false would run code that a checkpoint may hold: leave it out")
        settings.weights_only = True  # a checkpoint is data, never code to run
        path = settings.get("ckpt_path")
        if self.resume and path not in (None, "last"):
            raise UserError(f"--resume finds the newest checkpoint itself: leave out --ckpt_path={path}")
        if path == "last" and self.command == "fit":  # Lightning would look in the new run's folder
            self.resume, settings.ckpt_path = self.resume or "newest", None
        elif path == "last":
            placed = settings.trainer.clone()
            place_runs(placed)
            settings.ckpt_path = str(continue_newest(placed))
            check_or_offer(Path(settings.ckpt_path), "--ckpt_path")
        elif path is not None:
            settings.ckpt_path = str(checkpoint_at(str(path)))
        elif self.command != "fit":
            raise UserError(f"{self.command} needs --ckpt_path FILE, or --ckpt_path last for the newest run")

    def before_instantiate_classes(self) -> None:
        self.as_written = self.config
        self.config = self.config.clone()
        settings = self.config[self.command]
        trainer = settings.trainer
        self.trainer_defaults["callbacks"] += default_checkpoints(settings)
        place_runs(trainer)
        checkpoint = self.to_resume(trainer) if self.resume else None
        if is_first() and not trainer.get("fast_dev_run"):
            reserve(trainer, self.held)
            if self.command == "fit":
                lock(trainer, self.held)
                if checkpoint is not None:  # until now another run may have written there
                    checkpoint = self.to_resume(trainer)
        if self.resume:
            settings.ckpt_path = None if checkpoint is None else str(checkpoint)
            os.environ[_RESUMED] = settings.ckpt_path or ""
            if checkpoint is not None and not is_launched_child():  # the first process has looked
                check_or_offer(checkpoint, "--resume")
            warnings.filterwarnings("ignore", message=".*exists and is not empty.*")  # it goes on there

    def to_resume(self, trainer_settings: Any) -> Path | None:
        """Finds the checkpoint that `--resume` means and points the loggers at its run; None when a run is to start."""
        resume = (os.environ[_RESUMED] or None) if is_launched_child() else self.resume
        try:
            if resume in ("newest", "auto"):
                return continue_newest(trainer_settings)
            return None if resume is None else continue_from(resume, trainer_settings)
        except NothingToResume:
            if resume == "auto":
                return None
            raise

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        self.config = self.as_written  # what is saved starts a new run when it is used again
        self._dump_config()
        self.save_config_kwargs = {"text": self.config_text}
        plugins = self._get(self.config_init, "trainer.plugins") or []
        plugins = list(plugins) if isinstance(plugins, (list, tuple)) else [plugins]
        for number, plugin in enumerate(plugins):
            if isinstance(plugin, AsyncCheckpointIO) and isinstance(plugin.checkpoint_io, CheckedFiles | None):
                plugins[number] = BackgroundFiles()  # Lightning's removes old checkpoints before the new one is whole
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(CheckedFiles())
        try:
            trainer = super().instantiate_trainer(plugins=plugins, **kwargs)
        except (TypeError, ValueError) as error:
            raise UserError(f"trainer: {' '.join(str(error).split())}") from error
        ResumableFitLoop.take_over(trainer)
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        callbacks.sort(key=lambda callback: callback is not self.save_at_end)
        return trainer

    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        if isinstance(self.model, DiffusionLM):
            self.model.sampler = self._get(self.config_init, "sampler")  # what predict decodes with

    def before_fit(self) -> None:
        """Says before any data is read what this machine lacks, and what changed since the checkpoint to go on from."""
        float8 = getattr(self.model, "float8", None)
        if isinstance(float8, Float8):
            check_float8(float8, self.trainer.strategy.root_device, self.trainer.precision)
        path = self._get(self.config_init, "ckpt_path")
        if path is not None and Path(path).exists():
            check_changes(Path(path), self.config_text, self.trainer, self.datamodule)

    def _dump_config(self) -> None:
        """As LightningCLI's, for modules that save hyper-parameters; once for them and the run folder (it is slow)."""
        if not hasattr(self, "config_dump"):
            settings = self.as_written[self.command]
            self.config_text = self._parser(self.command).dump(settings, skip_none=False, skip_validation=True)
            self.config_dump = load_yaml(self.config_text)

    def _parse_ckpt_path(self) -> None:
        """Keeps the configuration as given; LightningCLI would let the checkpoint's hyper-parameters override it."""
