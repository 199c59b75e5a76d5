"""Options of the commands that decode with a checkpoint: the model, the sampler and its settings."""

from __future__ import annotations

import json
from collections.abc import Callable
from inspect import isabstract
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import Namespace

from dllm_var.errors import UserError
from dllm_var.settings import SettingsParser, given, overlay, read_settings

if TYPE_CHECKING:
    import torch

    from dllm_var.checkpoints.checkpoint import Checkpoint
    from dllm_var.model.transformer import Transformer
    from dllm_var.sampling import Sampler
    from dllm_var.text.tokenizer import Tokenizer


def read_options(
    command: str, arguments: list[str], builder: Callable[[str, dict[str, Any] | None], SettingsParser]
) -> tuple[Namespace, Sampler, Checkpoint]:
    """Returns the options of a command that decodes, the sampler, and the checkpoint; no weight is read yet.

    With --help it shows the options and exits.
    """
    if {"-h", "--help"} & set(arguments):
        builder(command, None).print_help()
        raise SystemExit(0)
    from dllm_var.checkpoints.pretrained import open_checkpoint
    from dllm_var.sampling.base import sampler_from_config
    from dllm_var.sampling.configurable import sampler_to_config
    from dllm_var.sampling.defaults import default_sampler

    default: dict[str, Any] | None = {"class_path": "dllm_var.sampling.BlockDiffusionSampler"}
    if given(arguments, "--sampler.help"):
        builder(command, default).parse_args(spell_out(arguments))  # shows and exits
    paths = given(arguments, "--checkpoint")  # read first: the checkpoint knows the default sampler
    if not paths:
        raise UserError(f"{command} needs --checkpoint PATH: a run folder, a .ckpt file or an exported folder")
    checkpoint = open_checkpoint(paths[-1])
    own = checkpoint.meta.get("sampler")
    spelled = spell_out(arguments, own)
    if not given(spelled, "--sampler") and own is not None:
        # The parser imports what its values name: it gets what our own object says of itself, not the checkpoint's text
        default = sampler_to_config(sampler_from_config(own))
    else:
        default = sampler_to_config(default_sampler(checkpoint.config))
    parser = builder(command, default)
    options = parser.parse_args(spelled)
    return options, parser.instantiate(options).sampler, checkpoint


def load_model(options: Namespace, checkpoint: Checkpoint) -> tuple[Transformer, Tokenizer]:
    """Returns the model, where and in the type that the options say, and its tokenizer."""
    from dllm_var.checkpoints.pretrained import load_checkpoint

    model, tokenizer, _ = load_checkpoint(checkpoint, *device_and_dtype(options), options.quantize)
    if options.get("rope_scaling") is not None:
        from dllm_var.model.rotary import read_rope_scaling

        model.scale_rope(read_rope_scaling(options.rope_scaling, model.config))
    return model, tokenizer


def device_and_dtype(options: Namespace) -> tuple[torch.device, torch.dtype | None]:
    """Returns the device that `--device` names, else a GPU when there is one, and the type of `--dtype`."""
    import torch

    here = ["cpu"]
    if accelerator := torch.accelerator.current_accelerator(check_available=True):
        here += [accelerator.type, *(f"{accelerator.type}:{n}" for n in range(torch.accelerator.device_count()))]
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in here:
        raise UserError(f"--device {device} is not here: this machine has {', '.join(here)}")
    return torch.device(device), getattr(torch, options.dtype) if options.dtype else None


def add_model_options(parser: SettingsParser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument("--checkpoint", type=str, metavar="PATH", help="run folder, .ckpt file or exported folder")
    add_device_options(model)
    add_quantize_option(model)
    rope = "read longer contexts: a factor on rope_theta (4), or trained and wanted length (4096:8192)"
    model.add_argument("--rope-scaling", type=str, metavar="X", help=rope)


def add_device_options(group: Any) -> None:
    """Adds --device and --dtype to a parser or a group of its options."""
    device = "where to compute: cpu, cuda, cuda:1, mps; a CUDA GPU when there is one"
    group.add_argument("--device", type=str, metavar="NAME", help=device)
    dtype = "type of the weights and of the computation; the checkpoint's when not given"
    group.add_argument("--dtype", type=Literal["float32", "bfloat16", "float16"], help=dtype)


def add_quantize_option(group: Any) -> None:
    """Adds --quantize to a parser or a group of its options."""
    quantize = "keep the layers' matrices in 8 or 4 bits; as the checkpoint has them when not given"
    group.add_argument("--quantize", type=Literal["int8", "int4"], help=quantize)


def add_chat_options(group: Any) -> None:
    """Adds --chat and --no-chat, for `settle_chat`."""
    chat = "put prompts through the checkpoint's chat template, as is done where it was trained on conversations"
    group.add_argument("--chat", action="store_true", help=chat)
    group.add_argument("--no-chat", action="store_true", help="give prompts to any checkpoint as they are")


def settle_chat(options: Namespace, checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    """Sets `options.chat` for a checkpoint that was trained on conversations, unless --no-chat is given."""
    if options.chat and options.no_chat:
        raise UserError("--chat does not go with --no-chat: leave one of them out")
    if options.chat and tokenizer.chat_template is None:
        raise UserError("--chat: the checkpoint's tokenizer has no chat template; leave out --chat")
    if checkpoint.meta.get("chat") is True and tokenizer.chat_template is not None and not options.no_chat:
        options.chat = True


def add_decoding_options(parser: SettingsParser, sampler: dict[str, Any] | None) -> None:
    """Adds how answers are decoded, and what they may be."""
    decoding = parser.add_argument_group("decoding")
    repeatable: dict[str, Any] = {"action": "append", "type": str}
    decoding.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer in tokens")
    decoding.add_argument("--stop", **repeatable, metavar="TEXT", help="end an answer before this text; repeatable")
    decoding.add_argument("--suppress", **repeatable, metavar="TOKEN", help="text or id:N never produced; repeatable")
    add_sampler_options(parser, sampler)


# Short names of settings of the sampler: the setting, a letter for its value, help.
SHORTCUTS = {
    "--policy": ("policy", "NAME", "which positions become tokens at each step; --policy.NAME VALUE sets an argument"),
    "--threshold": ("policy.threshold", "P", "commit tokens above this confidence (policy ConfidenceThreshold)"),
    "--block-length": ("block_length", "N", "tokens decoded together"),
    "--batch-size": ("batch_size", "N", "prompts decoded at a time"),
    "--temperature": ("temperature", "T", "0: the most likely token; above: draw"),
    "--top-k": ("top_k", "K", "draw among the K most likely tokens; all when 0"),
    "--top-p": ("top_p", "P", "draw among the most likely tokens that together have this probability"),
    "--seed": ("seed", "N", "seed of the draws; a row's do not depend on its batch"),
}


def add_sampler_options(parser: SettingsParser, sampler: dict[str, Any] | None) -> None:
    """Adds --sampler with all settings of its class; only help, without a `sampler`, lists the short names too."""
    about = "an overlay of configs/sampler/ by its name, such as wino, a YAML file, or a class; --sampler.NAME VALUE "
    about += "sets one argument of it, --sampler.help NAME lists them"
    if sampler is not None:
        from dllm_var.sampling import Sampler

        parser.add_subclass_arguments(Sampler, "sampler", default=sampler, as_group=False, help=about)
        return
    group = parser.add_argument_group("sampler")
    group.add_argument("--sampler", type=str, metavar="NAME", help=about)
    for option, (_, metavar, text) in SHORTCUTS.items():
        group.add_argument(option, type=str, metavar=metavar, help=text)


def spell_out(arguments: list[str], own: Any = None) -> list[str]:
    """Puts `--sampler FILE` and short names of its settings as the parser understands them, classes before arguments.

    A file is replaced by what it says under `sampler`, under `vars.sampler` or at its top level; the name of an overlay
    that ships by its sampler, with the block length and the longest answer of the checkpoint's `own`.
    """
    result: list[str] = []
    settings: list[str] = []  # they follow their sampler
    rest = iter(arguments)
    for argument in rest:
        option, equals, value = argument.partition("=")
        if option != "--sampler" and option not in SHORTCUTS and not option.startswith("--policy."):
            result.append(argument)
            continue
        value = value if equals else next(rest, "")
        if not value:
            raise UserError(f"{option} needs a value")
        if option == "--sampler":
            if value.isidentifier() and value.islower():
                value = json.dumps(overlay(value, own))
            elif Path(value).suffix in (".yaml", ".yml", ".json"):
                file = read_settings(Path(value))
                value = json.dumps(file.get("sampler") or (file.get("vars") or {}).get("sampler") or file)
            result.append(f"--sampler={value}")
            continue
        if option == "--threshold":
            if given(arguments, "--policy", "--sampler.policy"):
                raise UserError("--threshold chooses the policy ConfidenceThreshold: leave out --policy or --threshold")
            settings.append("--sampler.policy=ConfidenceThreshold")
        if option == "--policy" and "." not in value:
            from dllm_var.sampling import policies

            named = {name: getattr(policies, name) for name in policies.__all__}
            known = [name for name, one in named.items() if hasattr(one, "decide") and not isabstract(one)]
            if value not in known:
                raise UserError(f"--policy: there is no policy '{value}'; there are {', '.join(known)}")
        name = SHORTCUTS[option][0] if option in SHORTCUTS else option.removeprefix("--")
        settings.append(f"--sampler.{name}={value}")
    return result + sorted(settings, key=lambda setting: setting.partition("=")[0].count("."))
