"""The settings of the commands that run a Trainer: their parser, references between settings, and first checks."""

import argparse
import re
from typing import Any

import lightning as L
from jsonargparse import Namespace, dict_to_namespace
from lightning.pytorch.cli import LightningArgumentParser

from dllm_var import DiffusionLM, __version__
from dllm_var.datamodules import PackedDataModule
from dllm_var.errors import UserError
from dllm_var.model.config import TransformerConfig
from dllm_var.sampling import Sampler
from dllm_var.settings import SettingsParser, config_files, suggestion
from dllm_var.training.run_folders import default_logger
from dllm_var.training.trainer import Trainer

# The base class of each section, and the class that it is of by default.
CLASSES = {"model": (L.LightningModule, DiffusionLM), "data": (L.LightningDataModule, PackedDataModule)}
EXAMPLES = """examples:
  python -m dllm_var fit --config configs/quickstart.yaml --trainer.max_steps=500
  python -m dllm_var fit --config configs/qwen3_to_diffusion.yaml --model.init_from=FOLDER --trainer.devices=8
  python -m dllm_var fit --resume --config configs/quickstart.yaml

Settings of other classes: --model.objective.help=CLASS, --data.source.help=CLASS, --sampler.help=CLASS.
"""
PASSED: set[str | int] = {"model", "train_dataloaders", "val_dataloaders", "dataloaders", "datamodule"}  # not settings
MEANT = {  # names that other programs have for our settings
    "gpus": "trainer.devices",
    "epochs": "trainer.max_epochs",
    "checkpoint": "ckpt_path",
    "output": "trainer.default_root_dir",
}
BESIDES = {  # what is often given to a setting, and where it belongs
    "model": "; a checkpoint to start from is model.init_from",
    **dict.fromkeys(("data", "data.source"), "; a file of records is data.source.path"),
}
_REFERENCE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_.\[\]]*)\}")


class TrainerParser(SettingsParser, LightningArgumentParser):
    """Reads the settings of one command in which `${data.context_length}` stands for another setting."""

    # Without a command it is a parser inside this one, of one class's arguments.
    def __init__(self, command: str = "", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.command, self.meant, self.besides = command, MEANT, BESIDES

    def parse_args(self, args: Any = None, *rest: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]
        for argument in args or []:  # the parser would replace the whole value by this part
            if argument.startswith("--vars.") and argument.partition("=")[0].count(".") > 1:
                raise UserError(f"{argument}: --vars.NAME takes a whole value; change a part of it in a --config file")
        config = super().parse_args(args, *rest, **kwargs)
        if self.command:  # all files and arguments are merged now, and nothing is resolved yet
            qualify_references(config, config.as_dict(), self.command)
        return config

    def parse_resolved(self, arguments: list[str]) -> Namespace:
        """Returns the settings with all references resolved, once all files and arguments have been merged."""
        outer = SettingsParser(prog="python -m dllm_var", parser_mode="omegaconf+")
        outer.names, outer.meant, outer.besides = self.names, self.meant, self.besides
        outer.add_subcommands().add_subcommand(self.command, self)
        return outer.parse_args([self.command, *arguments])[self.command]


def build_parser(command: str, arguments: list[str], trainer_command: str | None = None) -> TrainerParser:
    """Returns the parser of a command, with the arguments of the Trainer's method of its name or `trainer_command`."""
    prog = f"python -m dllm_var {command}"
    versions = f"dllm_var=={__version__} lightning=={L.__version__}"
    parser = TrainerParser(command, description=None, prog=prog, dump_header=[versions])
    resume = " [--resume[=auto|PATH]]" if command == "fit" else ""
    parser.usage = f"{prog}{resume} [--config FILE ...] [--key=value ...]"
    parser.add_argument("-c", "--config", action="config", help="YAML file of settings; later files win")
    parser.add_argument(
        "--seed_everything", type=bool | int, default=0, help="Seed of all random generators; true for a random one"
    )
    parser.add_class_arguments(Trainer, "trainer", fail_untyped=False, instantiate=False, sub_configs=True)
    parser.set_defaults({"trainer.logger": default_logger(run_name(arguments))})
    for key, (base, kind) in CLASSES.items():
        default = {"class_path": f"{kind.__module__}.{kind.__name__}"}
        parser.add_subclass_arguments(base, key, as_group=False, default=default, fail_untyped=False)
    sampler = {"class_path": "dllm_var.sampling.BlockDiffusionSampler"}
    decoding = "How prompts are decoded; callbacks refer to it as ${sampler}."
    parser.add_subclass_arguments(Sampler, "sampler", as_group=False, default=sampler, help=decoding)
    free = "Free values, to be used elsewhere as ${vars.NAME} (default: {})"
    parser.add_argument("--vars", type=dict[str, Any], default={}, help=free)
    method = trainer_command or command
    parser.add_method_arguments(Trainer, method, skip=PASSED & set(getattr(Trainer, method).__annotations__))
    return parser


def build_reader(command: str, arguments: list[str], usage: str, description: str, examples: str) -> TrainerParser:
    """Returns the parser of a command that reads the settings of `fit`, and options of its own, which --help shows."""
    if {"-h", "--help"} & set(arguments):
        parser = TrainerParser(command)
        parser.add_argument("-c", "--config", action="config", help="YAML file of settings; later files win")
        examples += "\n\nIt takes all settings of fit, too: python -m dllm_var fit --help"
    else:
        parser = build_parser(command, arguments, trainer_command="fit")
    parser.description, parser.epilog = description, examples
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.usage = f"python -m dllm_var {command} --config FILE ... {usage} [--key=value ...]"
    return parser


def run_name(arguments: list[str]) -> str:
    """Returns the name of a run: that of its first config."""
    configs = config_files(arguments)
    return configs[0].stem if configs else "default"


def full_help(command: str, arguments: list[str]) -> str:
    """Returns --help: examples, the settings of the default model and data, then all others, the Trainer's last."""
    parser = build_parser(command, arguments)
    inner = SettingsParser(description="", usage="", add_help=False)
    for key, (_, default) in CLASSES.items():
        inner.add_class_arguments(default, key, sub_configs=True, fail_untyped=False, skip={"transformer"})
    inner.add_class_arguments(TransformerConfig, "model.transformer")
    first, last = (shown.format_help().split("\n", 1)[1] for shown in (inner, parser))
    return f"usage: {parser.usage}\n\n{EXAMPLES if command == 'fit' else ''}{first}{last}"


def check_settings(settings: Namespace, name: str) -> None:
    """Puts the default logger where `trainer.logger=true` asks for it, and refuses values that make no sense."""
    for section in ("trainer", "model", "data"):
        if not isinstance(settings.get(section), Namespace):
            raise UserError(f"{section}: expected settings by name, got {settings.get(section)!r}")
    trainer = settings.trainer
    if trainer.get("logger") is True:
        trainer.logger = dict_to_namespace(default_logger(name))
    seed = settings.get("seed_everything")
    if isinstance(seed, int) and not 0 <= seed < 2**32:
        raise UserError(f"seed_everything must be from 0 to {2**32 - 1}, got {seed}")
    ones = ("accumulate_grad_batches", "check_val_every_n_epoch", "log_every_n_steps")
    for setting, least in {"gradient_clip_val": 0, **dict.fromkeys(ones, 1)}.items():
        value = trainer.get(setting)
        if isinstance(value, int | float) and not value >= least:
            raise UserError(f"trainer.{setting} must be at least {least}, got {value}")
    if settings.get("weights_only") is False:
        raise UserError("weights_only=false would run code that a checkpoint may hold: leave it out")


def qualify_references(node: Any, settings: dict[str, Any], command: str) -> Any:
    """Rewrites each `${a.b}` in a part of the settings into the full path of the value, for OmegaConf to resolve.

    Users write `${data.context_length}`; the value is kept under the command's name and in the `init_args` of a class.
    """
    if isinstance(node, str):
        return _REFERENCE.sub(lambda match: f"${{{command}.{_full_path(settings, match[1])}}}", node)
    values = vars(node) if isinstance(node, Namespace) else node
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in list(items):
        node[key] = qualify_references(value, settings, command)
    return node


def _full_path(node: Any, reference: str) -> str:
    path: list[str] = []
    for word in reference.split("."):
        name = word.partition("[")[0]
        if isinstance(node, dict):  # OmegaConf finds its way in a list by itself
            if "class_path" in node and name not in node:
                path.append("init_args")
                node = node.get("init_args") or {}
            if name not in node:
                raise UserError(f"${{{reference}}} names no setting{suggestion(name, list(node))}")
            node = node[name]
        path.append(word)
    return ".".join(path)


def canvas_warning(data: Any, sampler: Any) -> str | None:
    """Returns what is wrong when answers are shown in training with other blocks than the sampler decodes."""
    canvas, block_length = getattr(data, "canvas", 0), getattr(sampler, "block_length", None)
    if not canvas or not isinstance(block_length, int) or canvas == block_length:
        return None
    return (
        f"data.canvas is {canvas}, and the sampler decodes blocks of {block_length}: answers will end at other places "
        f"than in training; set data.canvas={block_length}"
    )
