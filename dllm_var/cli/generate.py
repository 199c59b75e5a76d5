"""Answers prompts with a trained checkpoint. Needs torch, not Lightning, and for --help neither."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from dllm_var.cli.answers import AnswerPrinter, count, is_coloured, summary
from dllm_var.cli.prompts import Prompt, read_prompts, token_ids
from dllm_var.errors import UserError
from dllm_var.files import open_output
from dllm_var.settings import SettingsParser, given, read_settings

if TYPE_CHECKING:
    from dllm_var.model.transformer import Transformer
    from dllm_var.sampling import Sampler
    from dllm_var.text.tokenizer import Tokenizer

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
# What torch says when there is not enough memory.
NO_MEMORY = ("can't allocate memory", "out of memory", "Storage size calculation overflowed")


def main(command: str, arguments: list[str]) -> int:
    """Runs `generate`.

    Args:
        command: `generate`.
        arguments: Its options, as `--help` lists them.

    Returns:
        0, or 130 after Ctrl-C; the answers finished by then have been written.

    Raises:
        UserError: For a bad checkpoint, prompt or setting.
    """
    if {"-h", "--help"} & set(arguments):
        build_parser(command, None).print_help()
        return 0
    options, sampler, model, tokenizer = load(command, arguments, build_parser, check_combinations)
    if options.rope_scaling is not None:
        from dllm_var.model.rope_scaling import read_rope_scaling

        model.scale_rope(read_rope_scaling(options.rope_scaling, model.config))
    prompts = read_prompts(options, tokenizer)
    suppress = token_ids(options.suppress or [], tokenizer)
    file = None if options.output in (None, "-") else open_output("--output", options.output)
    out = sys.stdout if file is None else file.stream
    printer = AnswerPrinter(out, prompts, tokenizer, options)
    began = time.perf_counter()
    try:
        decode(options, sampler, model, tokenizer, prompts, suppress, printer)
        out.flush()
        if file is not None:
            file.complete()
    except KeyboardInterrupt:
        printer.interrupt()
        partial = None if file is None else file.abandon()
        where = f", in {partial}" if partial else ""
        print(f"interrupted: {len(printer.done)} of {count(len(prompts), 'answer')} finished{where}", file=sys.stderr)
        return 130
    except BaseException as error:
        if file is not None:
            file.abandon()
        if isinstance(error, OSError):
            error.filename = error.filename or ("standard output" if file is None else options.output)
        if isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY):
            raise UserError("not enough memory for these answers: lower --max-new-tokens or the batch size") from error
        raise
    finally:
        printer.close()
    line = summary(printer.done, time.perf_counter() - began)
    print(f"\033[2m{line}\033[0m" if is_coloured(sys.stderr) else line, file=sys.stderr)
    return 0


def decode(
    options: Namespace,
    sampler: Sampler,
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: list[Prompt],
    suppress: list[int],
    printer: AnswerPrinter,
) -> None:
    """Decodes the prompts, or fills their gaps, and has every answer printed."""
    if prompts[0].infill is None:
        sampler.generate(
            model,
            [prompt.ids for prompt in prompts],
            tokenizer=tokenizer,
            max_new_tokens=options.max_new_tokens,
            stop=options.stop or [],
            suppress=suppress,
            on_block=printer.on_block if printer.streams else None,
            on_answer=printer.on_answer,
        )
        return
    from dllm_var.sampling.infilling import infill

    settings: dict[str, Any] = {
        name: getattr(sampler, name)
        for name in ("policy", "batch_size", "temperature", "top_k", "top_p", "seed")
        if name in options.sampler.init_args  # a sampler with a policy of its own does not lend it
    }
    infill(
        model,
        [prompt.infill_ids or [] for prompt in prompts],
        prompts=[prompt.ids for prompt in prompts],
        # What the sampler would show behind the answer: masks to the end of its block, or of its canvas.
        block_length=getattr(sampler, "block_length", None) or getattr(sampler, "canvas_length", None),
        tokenizer=tokenizer,
        suppress=suppress,
        on_answer=printer.on_answer,
        **settings,
    )


def load(
    command: str,
    arguments: list[str],
    builder: Callable[[str, dict[str, Any] | None], SettingsParser],
    check: Callable[[Namespace], None],
) -> tuple[Namespace, Sampler, Transformer, Tokenizer]:
    """Reads the options of a command that decodes, and loads the checkpoint and the sampler that they name.

    Args:
        command: Its name.
        arguments: Its options, `--checkpoint` among them.
        builder: Makes its parser from its name and the default sampler.
        check: Raises UserError for options that contradict each other.
    """
    import torch  # not before --help has been answered

    from dllm_var.checkpoints.pretrained import load_checkpoint
    from dllm_var.sampling.config import sampler_from_config, sampler_to_config

    spelled = spell_out(arguments)
    if given(arguments, "--sampler.help"):
        builder(command, {"class_path": default_sampler(False)}).parse_args(spelled)  # shows and exits
    paths = given(arguments, "--checkpoint")  # read first: the checkpoint knows the default sampler
    if not paths:
        raise UserError(f"{command} needs --checkpoint PATH: a run folder, a .ckpt file or an exported folder")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer, meta = load_checkpoint(paths[-1], device)
    default: dict[str, Any] | None = {"class_path": default_sampler(model.config.causal)}
    if not given(spelled, "--sampler") and meta.get("sampler") is not None:
        # The parser imports what its values name: it gets what our own object says of itself, not the checkpoint's text
        default = sampler_to_config(sampler_from_config(meta["sampler"]))
    parser = builder(command, default)
    options = parser.parse_args(spelled)
    check(options)
    apply_shortcuts(options, bool(given(spelled, "--sampler.policy")))
    return options, parser.instantiate(options).sampler, model, tokenizer


def default_sampler(causal: bool) -> str:
    """Returns the class path of the sampler of a checkpoint that remembers none."""
    return f"dllm_var.sampling.{'AutoregressiveSampler' if causal else 'BlockDiffusionSampler'}"


# -- options -----------------------------------------------------------------------------------------------------------


def build_parser(command: str, sampler: dict[str, Any] | None) -> SettingsParser:
    """Returns the parser of the options; `sampler` is the default one, None for a parser that only shows help."""
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


def spell_out(arguments: list[str]) -> list[str]:
    """Puts `--sampler FILE` and `--policy NAME` as the parser understands them.

    A file is replaced by what it says under `sampler`, under `vars.sampler` or at its top level. `--policy` becomes
    `--sampler.policy`, behind the sampler it belongs to.

    Raises:
        UserError: For a missing value, a file that cannot be read, or a policy that does not exist.
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
    known = [kind for kind in policies.__all__ if hasattr(getattr(policies, kind), "decide")]
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
    for option, other, reason in (
        ("json", "stream", "JSON lines are written when an answer is complete"),
        ("json", "replay", "the JSON lines have commit_steps"),
        ("replay", "stream", "a replay needs the whole answer"),
        ("stream", "no_stream", "they are opposites"),
        ("infill", "stream", "gaps are filled in no particular order"),
        ("infill", "stop", "a text with gaps ends where it ends"),
        ("infill", "max_new_tokens", "gaps have their own lengths"),
        ("infill", "prompts_file", 'put "infill" beside "prompt" into the lines of a .jsonl file'),
    ):
        if options[option] and options[other]:
            pair = f"--{option} does not go with --{other}".replace("_", "-")
            raise UserError(f"{pair}: {reason}")
    if options.system is not None and not options.chat:
        raise UserError("--system needs --chat: a system message is part of a conversation")
