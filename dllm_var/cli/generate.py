"""Answers prompts with a trained checkpoint. Needs torch, not Lightning, and for --help neither."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from dllm_var.cli.prompts_and_answers import AnswerPrinter, count, is_coloured, read_prompts, summary, token_ids
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


def main(command: str, arguments: list[str]) -> int:
    """Runs `generate`.

    Returns:
        0, or 130 after Ctrl-C; the answers finished by then have been written.

    Raises:
        UserError: For a bad checkpoint, prompt or setting.
    """
    if {"-h", "--help"} & set(arguments):
        build_parser(command, None).print_help()
        return 0
    options, sampler, model, tokenizer = load(command, arguments, build_parser)
    check_combinations(options)
    if options.rope_scaling is not None:
        from dllm_var.model.rope_scaling import read_rope_scaling

        model.scale_rope(read_rope_scaling(options.rope_scaling, model.config))
    prompts = read_prompts(options, tokenizer)
    if options.stream and len(prompts) > 1:
        raise UserError("--stream goes with a single prompt: the answers of several would mix")
    suppress = token_ids(options.suppress or [], tokenizer)
    file = None if options.output in (None, "-") else open_output("--output", options.output)
    out = sys.stdout if file is None else file.stream
    printer = AnswerPrinter(out, prompts, tokenizer, options)
    began = time.perf_counter()
    try:
        decode(sampler, model, suppress, printer)
        out.flush()
        if file is not None:
            file.complete()
    except KeyboardInterrupt:
        printer.interrupt()
        partial = None if file is None else file.abandon()
        where = f", in {partial}" if partial else ""
        print(f"interrupted: {len(printer.done)} of {count(len(prompts), 'answer')} finished{where}", file=sys.stderr)
        return 130
    except OSError as error:
        error.filename = error.filename or ("standard output" if file is None else options.output)
        raise
    except (MemoryError, RuntimeError) as error:
        import torch

        lacks_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not lacks_memory and "can't allocate memory" not in str(error):  # torch has no class for it on a CPU
            raise
        raise UserError("not enough memory for these answers: lower --max-new-tokens or the batch size") from error
    finally:
        printer.progress.close()
        if file is not None:
            file.abandon()
    line = summary(printer.done, time.perf_counter() - began)
    print(f"\033[2m{line}\033[0m" if is_coloured(sys.stderr) else line, file=sys.stderr)
    return 0


def decode(sampler: Sampler, model: Transformer, suppress: list[int], printer: AnswerPrinter) -> None:
    """Decodes the prompts of a printer, or fills their gaps, and has every answer printed."""
    prompts, options = printer.prompts, printer.options
    shared: dict[str, Any] = dict(tokenizer=printer.tokenizer, suppress=suppress, on_answer=printer.on_answer)
    if prompts[0].infill is None:
        sampler.generate(
            model,
            [prompt.ids for prompt in prompts],
            max_new_tokens=options.max_new_tokens,
            stop=options.stop or [],
            on_block=printer.on_block if printer.streams else None,
            **shared,
        )
        return
    from dllm_var.sampling.infilling import infill

    for name in ("policy", "batch_size", "temperature", "top_k", "top_p", "seed"):
        if name in options.sampler.init_args:  # a sampler with a policy of its own does not lend it
            shared[name] = getattr(sampler, name)
    infill(
        model,
        [prompt.infill_ids or [] for prompt in prompts],
        prompts=[prompt.ids for prompt in prompts],
        # What the sampler would show behind the answer: masks to the end of its block, or of its canvas.
        block_length=getattr(sampler, "block_length", None) or getattr(sampler, "canvas_length", None),
        **shared,
    )


def load(
    command: str, arguments: list[str], builder: Callable[[str, dict[str, Any] | None], SettingsParser]
) -> tuple[Namespace, Sampler, Transformer, Tokenizer]:
    """Reads the options of a command that decodes, and loads the checkpoint and the sampler that they name.

    `builder` makes the command's parser from its name and the default sampler.
    """
    import torch  # not before --help has been answered

    from dllm_var.checkpoints.pretrained import load_checkpoint
    from dllm_var.sampling.base import sampler_from_config, sampler_to_config

    spelled = spell_out(arguments)
    default: dict[str, Any] | None = {"class_path": "dllm_var.sampling.BlockDiffusionSampler"}
    if given(arguments, "--sampler.help"):
        builder(command, default).parse_args(spelled)  # shows and exits
    paths = given(arguments, "--checkpoint")  # read first: the checkpoint knows the default sampler
    if not paths:
        raise UserError(f"{command} needs --checkpoint PATH: a run folder, a .ckpt file or an exported folder")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer, meta = load_checkpoint(paths[-1], device)
    if not given(spelled, "--sampler") and meta.get("sampler") is not None:
        # The parser imports what its values name: it gets what our own object says of itself, not the checkpoint's text
        default = sampler_to_config(sampler_from_config(meta["sampler"]))
    elif model.config.causal:
        default = {"class_path": "dllm_var.sampling.AutoregressiveSampler"}
    parser = builder(command, default)
    options = parser.parse_args(spelled)
    return options, parser.instantiate(options).sampler, model, tokenizer


# -- options -----------------------------------------------------------------------------------------------------------


def build_parser(command: str, sampler: dict[str, Any] | None) -> SettingsParser:
    """Returns the parser of the options; `sampler` is the default one, None for a parser that only shows help."""
    usage = "--checkpoint PATH [--prompt TEXT ...] [options]"
    parser = SettingsParser.of_command(command, usage, DESCRIPTION, EXAMPLES)
    model = parser.add_argument_group("model")
    model.add_argument("--checkpoint", type=str, metavar="PATH", help="run folder, .ckpt file or exported folder")
    rope = "read longer contexts: a factor on rope_theta (4), or trained and wanted length (4096:8192)"
    model.add_argument("--rope-scaling", type=str, metavar="X", help=rope)

    prompts = parser.add_argument_group("prompts")
    repeatable: dict[str, Any] = {"action": "append", "type": str}
    prompts.add_argument("--prompt", **repeatable, metavar="TEXT", help="text to answer; repeatable")
    lines = 'one prompt per line; in a .jsonl file {"prompt": ...} or {"messages": [...]}; - is standard input'
    prompts.add_argument("--prompts-file", type=str, metavar="FILE", help=lines)
    prompts.add_argument("--chat", action="store_true", help="put prompts through the checkpoint's chat template")
    prompts.add_argument("--system", type=str, metavar="TEXT", help="system message of every prompt, with --chat")
    gaps = "fill the gaps of a text, written <gap:3> for three tokens; repeatable, each with its own --prompt"
    prompts.add_argument("--infill", **repeatable, metavar="TEXT", help=gaps)

    decoding = parser.add_argument_group("decoding")
    decoding.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer in tokens")
    decoding.add_argument("--stop", **repeatable, metavar="TEXT", help="end an answer before this text; repeatable")
    never = "never produce this token, given by its text or as id:N; repeatable"
    decoding.add_argument("--suppress", **repeatable, metavar="TOKEN", help=never)
    add_sampler_options(parser, sampler)

    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="one JSON object per line: text, tokens, counts and times")
    output.add_argument("--output", type=str, metavar="FILE", help="write answers there; it appears when complete")
    output.add_argument("--answers-only", action="store_true", help="print answers without their prompts")
    output.add_argument("--stream", action="store_true", help="print a single answer block by block, as in a terminal")
    output.add_argument("--no-stream", action="store_true", help="print answers whole")
    output.add_argument("--replay", action="store_true", help="show in which forward pass each token appeared")
    output.add_argument(
        "--config", action="config", metavar="FILE", help="YAML file of options, under their full names"
    )
    return parser


# Short names of settings of the sampler: the setting, a letter for its value, help.
SHORTCUTS = {
    "--policy": ("policy", "NAME", "which positions become tokens at each step; --policy.NAME VALUE sets an argument"),
    "--threshold": ("policy", "P", "commit tokens above this confidence (policy ConfidenceThreshold)"),
    "--block-length": ("block_length", "N", "tokens decoded together"),
    "--batch-size": ("batch_size", "N", "prompts decoded at a time"),
    "--temperature": ("temperature", "T", "0: the most likely token; above: draw"),
    "--top-k": ("top_k", "K", "draw among the K most likely tokens; all when 0"),
    "--top-p": ("top_p", "P", "draw among the most likely tokens that together have this probability"),
    "--seed": ("seed", "N", "seed of the draws; a row's do not depend on its batch"),
}


def add_sampler_options(parser: SettingsParser, sampler: dict[str, Any] | None) -> None:
    """Adds --sampler with all settings of its class; only help, without a `sampler`, lists the short names too."""
    about = (
        "class_path, or a YAML file with class_path and init_args, such as configs/sampler/*.yaml; "
        "--sampler.NAME VALUE sets one argument, --sampler.help NAME lists them"
    )
    if sampler is not None:
        from dllm_var.sampling import Sampler

        parser.add_subclass_arguments(Sampler, "sampler", default=sampler, as_group=False, help=about)
        names = parser.names
        parser.names = lambda: [*names(), *(option.removeprefix("--") for option in SHORTCUTS)]
        return
    group = parser.add_argument_group("sampler")
    group.add_argument("--sampler", type=str, metavar="NAME", help=about)
    for option, (_, metavar, text) in SHORTCUTS.items():
        group.add_argument(option, type=str, metavar=metavar, help=text)


def spell_out(arguments: list[str]) -> list[str]:
    """Puts `--sampler FILE` and short names of its settings as the parser understands them.

    A file is replaced by what it says under `sampler`, under `vars.sampler` or at its top level. Settings of the
    sampler follow it: `--policy NAME` becomes `--sampler.policy=dllm_var.sampling.policies.NAME`.

    Raises:
        UserError: For a missing value, a file that cannot be read, or a policy that does not exist.
    """
    result: list[str] = []
    settings: list[str] = []
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
            if Path(value).suffix in (".yaml", ".yml", ".json"):
                file = read_settings(Path(value))
                value = json.dumps(file.get("sampler") or (file.get("vars") or {}).get("sampler") or file)
            result.append(f"--sampler={value}")
        elif option == "--threshold":
            if given(arguments, "--policy", "--sampler.policy"):
                raise UserError(
                    "--threshold chooses the policy ConfidenceThreshold: leave out --policy, or --threshold"
                )
            settings += [
                "--sampler.policy=dllm_var.sampling.ConfidenceThreshold",
                f"--sampler.policy.threshold={value}",
            ]
        elif option.startswith("--policy."):
            settings.append(f"--sampler.{option.removeprefix('--')}={value}")
        else:
            settings.append(f"--sampler.{SHORTCUTS[option][0]}={policy_path(value) if option == '--policy' else value}")
    return result + settings


def policy_path(name: str) -> str:
    """Returns the class path of a policy of this package, or of a class of one's own."""
    from dllm_var.sampling import policies

    if "." in name:
        return name
    known = [kind for kind in policies.__all__ if hasattr(getattr(policies, kind), "decide")]
    if name not in known:
        raise UserError(f"--policy: there is no policy '{name}'; there are {', '.join(known)}")
    return f"dllm_var.sampling.policies.{name}"


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
