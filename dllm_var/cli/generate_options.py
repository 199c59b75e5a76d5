"""The options of `generate`: what --help shows, and shortcuts into the sampler's own settings. Imports no torch."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from dllm_var.errors import UserError
from dllm_var.settings import SettingsParser, read_settings

DESCRIPTION = """Answers prompts with a trained checkpoint.

Prompts come from --prompt, from --prompts-file or, when neither is given, from standard input, one per line. The
sampler is the one the checkpoint remembers; every option of it can be changed. Answers are printed in the order of
their prompts, each as soon as it is there."""

EXAMPLES = """examples:
  python -m dllm_var generate --checkpoint checkpoints/cmudict --prompt keyboard --prompt lightning
  python -m dllm_var generate --checkpoint checkpoints/cmudict --prompts-file words.txt --json --output answers.jsonl
  python -m dllm_var generate --checkpoint checkpoints/cmudict --policy FixedSteps --policy.steps 4 --prompt keyboard
  python -m dllm_var generate --checkpoint checkpoints/cmudict --prompt keyboard --infill "K IY <gap:2> R D" --replay
  echo keyboard | python -m dllm_var generate --checkpoint checkpoints/cmudict --temperature 0.7 --seed 1

docs/generate.md explains them all."""

# Options that set an argument of the sampler's by the same name.
SHORTCUTS = ("block_length", "batch_size", "temperature", "top_k", "top_p", "seed")


def build_parser(command: str, sampler: dict[str, Any] | None) -> SettingsParser:
    """Returns the parser of the options.

    Args:
        command: Name to show.
        sampler: Default sampler: `class_path` and `init_args`; null for a parser that only shows help.
    """
    parser = SettingsParser(
        prog=f"python -m dllm_var {command}",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.usage = f"python -m dllm_var {command} --checkpoint PATH [--prompt TEXT ...] [options]"

    model = parser.add_argument_group("model")
    model.add_argument("--checkpoint", type=str, metavar="PATH", help="run folder, .ckpt file or exported folder")
    model.add_argument(
        "--rope-scaling",
        type=str,
        metavar="X",
        help="read contexts longer than trained on: factor on rope_theta (4), or trained and wanted length (4096:8192)",
    )

    prompts = parser.add_argument_group("prompts")
    prompts.add_argument("--prompt", action="append", type=str, metavar="TEXT", help="text to answer; repeatable")
    prompts.add_argument(
        "--prompts-file",
        type=str,
        metavar="FILE",
        help='one prompt per line; in a .jsonl file {"prompt": ...} or {"messages": [...]}; - is standard input',
    )
    prompts.add_argument("--chat", action="store_true", help="put prompts through the checkpoint's chat template")
    prompts.add_argument("--system", type=str, metavar="TEXT", help="system message of every prompt, with --chat")
    prompts.add_argument(
        "--infill",
        action="append",
        type=str,
        metavar="TEXT",
        help="fill the gaps of a text, written <gap:3> for three tokens; repeatable, each with its own --prompt",
    )

    decoding = parser.add_argument_group("decoding")
    decoding.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer in tokens")
    decoding.add_argument(
        "--stop", action="append", type=str, metavar="TEXT", help="end an answer before this text; repeatable"
    )
    decoding.add_argument(
        "--suppress",
        action="append",
        type=str,
        metavar="TOKEN",
        help="never produce this token, given by its text or as id:N; repeatable",
    )
    add_draw_options(decoding)

    add_sampler_options(parser, sampler)

    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="one JSON object per line: text, tokens, counts and times")
    output.add_argument(
        "--output", type=str, metavar="FILE", help="write answers there; the file appears when it is complete"
    )
    output.add_argument("--answers-only", action="store_true", help="print answers without their prompts")
    output.add_argument(
        "--stream", action="store_true", help="print text as blocks finish, as for a single prompt in a terminal"
    )
    output.add_argument("--no-stream", action="store_true", help="print answers whole")
    output.add_argument("--replay", action="store_true", help="show in which forward pass each token appeared")
    output.add_argument("--config", action="config", metavar="FILE", help="YAML file with any of these options")
    return parser


def add_draw_options(group: Any) -> None:
    """Adds the options that say how tokens are drawn and how many prompts are decoded at a time."""
    group.add_argument("--temperature", type=float, metavar="T", help="0: the most likely token; above: draw")
    group.add_argument("--top-k", type=int, metavar="K", help="draw among the K most likely tokens; all when 0")
    group.add_argument(
        "--top-p", type=float, metavar="P", help="draw among the most likely tokens that together have this probability"
    )
    group.add_argument("--seed", type=int, metavar="N", help="seed of the draws; a row's do not depend on its batch")
    group.add_argument("--batch-size", type=int, metavar="N", help="prompts decoded at a time")


def add_sampler_options(parser: SettingsParser, sampler: dict[str, Any] | None) -> None:
    """Adds --sampler, with all settings of its class, and the shortcuts into it; `sampler` as for `build_parser`."""
    how = parser.add_argument_group("sampler")
    how.add_argument("--block-length", type=int, metavar="N", help="tokens decoded together")
    how.add_argument(
        "--policy",
        type=str,
        metavar="NAME",
        help="which positions become tokens at each step: a class of dllm_var.sampling.policies; "
        "--policy.NAME VALUE sets one argument",
    )
    how.add_argument(
        "--threshold", type=float, metavar="P", help="commit tokens above this confidence (policy ConfidenceThreshold)"
    )
    sampler_help = (
        "class_path, or a YAML file with class_path and init_args, such as configs/sampler/*.yaml; "
        "--sampler.NAME VALUE sets one argument, --sampler.help NAME lists them"
    )
    if sampler is None:
        how.add_argument("--sampler", type=str, metavar="NAME", help=sampler_help)
    else:
        from dllm_var.sampling import Sampler

        parser.add_subclass_arguments(Sampler, "sampler", default=sampler, as_group=False, help=sampler_help)


def checkpoint_path(arguments: list[str], command: str = "generate") -> str:
    """Returns --checkpoint, which must be read first: the checkpoint knows the default sampler."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--checkpoint", nargs="?")
    path = first.parse_known_args(arguments)[0].checkpoint
    if path is None:
        raise UserError(f"{command} needs --checkpoint PATH: a run folder, a .ckpt file or an exported folder")
    return path


def spell_out(arguments: list[str]) -> list[str]:
    """Puts `--sampler FILE` and `--policy NAME` as the parser understands them.

    A file is replaced by what it says under `sampler`, under `vars.sampler` or at its top level. `--policy` becomes
    `--sampler.policy`, behind the sampler it belongs to.
    """
    result: list[str] = []
    policy: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        option, equals, value = argument.partition("=")
        if option == "--sampler" or option == "--policy" or option.startswith("--policy."):
            value = value if equals else next(rest, "")
            if not value:
                raise UserError(f"{option} needs a value")
            if option != "--sampler":
                value = _policy_path(value) if option == "--policy" else value
                policy.append(f"--sampler.{option.removeprefix('--')}={value}")
                continue
            if Path(value).suffix in (".yaml", ".yml", ".json"):
                settings = read_settings(Path(value))
                value = json.dumps(settings.get("sampler") or (settings.get("vars") or {}).get("sampler") or settings)
            argument = f"--sampler={value}"
        result.append(argument)
    return result + policy


def _policy_path(name: str) -> str:
    from dllm_var.sampling import policies

    if "." in name:  # a class of one's own
        return name
    known = [kind for kind in policies.__all__ if isinstance(getattr(policies, kind), type)]
    known = [kind for kind in known if issubclass(getattr(policies, kind), policies.UnmaskingPolicy)]
    known.remove("UnmaskingPolicy")
    if name not in known:
        raise UserError(f"--policy: there is no policy '{name}'; there are {', '.join(known)}")
    return f"dllm_var.sampling.policies.{name}"


def apply_shortcuts(options: Namespace, policy_was_chosen: bool) -> None:
    """Moves --temperature, --block-length, --threshold and the like into the sampler's own arguments.

    Raises:
        UserError: When the sampler has no such argument, or --threshold comes with another policy.
    """
    settings = options.sampler.init_args
    changes: dict[str, Any] = {name: options[name] for name in SHORTCUTS if options[name] is not None}
    if options.threshold is not None and "policy" not in settings:
        changes["threshold"] = options.threshold  # a sampler whose policy is its own
    elif options.threshold is not None:
        if policy_was_chosen:
            raise UserError("--threshold chooses the policy ConfidenceThreshold: leave out --policy, or --threshold")
        threshold = "dllm_var.sampling.ConfidenceThreshold"
        changes["policy"] = Namespace(class_path=threshold, init_args=Namespace(threshold=options.threshold))
    for name, value in changes.items():
        if name not in settings:
            option = name.replace("_", "-")
            kind = options.sampler.class_path.rsplit(".", 1)[-1]
            raise UserError(f"--{option} does not go with {kind}, which has no {name}")
        settings[name] = value


def check_combinations(options: Namespace) -> None:
    """Raises UserError for options that contradict each other."""
    for given, other, reason in (
        ("json", "stream", "JSON lines are written when an answer is complete"),
        ("json", "replay", "the JSON lines have commit_steps"),
        ("replay", "stream", "a replay needs the whole answer"),
        ("stream", "no_stream", "they are opposites"),
        ("infill", "stream", "gaps are filled in no particular order"),
        ("infill", "stop", "a text with gaps ends where it ends"),
        ("infill", "max_new_tokens", "gaps have their own lengths"),
        ("infill", "prompts_file", 'put "infill" beside "prompt" into the lines of a .jsonl file'),
    ):
        if options[given] and options[other]:
            first, second = given.replace("_", "-"), other.replace("_", "-")
            raise UserError(f"--{first} does not go with --{second}: {reason}")
    if options.system is not None and not options.chat:
        raise UserError("--system needs --chat: a system message is part of a conversation")
