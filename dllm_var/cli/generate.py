"""Answers prompts with a trained checkpoint. Needs torch, not Lightning, and for --help neither."""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from dllm_var.cli.generate_options import (
    apply_shortcuts,
    build_parser,
    check_combinations,
    checkpoint_path,
    spell_out,
)
from dllm_var.cli.generate_output import AnswerPrinter, Output, TextStream, count, is_coloured, summary
from dllm_var.cli.generate_prompts import Prompt, read_prompts, token_ids
from dllm_var.cli.generate_replay import PLAIN_WIDTH, replay
from dllm_var.errors import UserError

_NO_MEMORY = re.compile("can't allocate memory|out of memory|Storage size calculation overflowed")

if TYPE_CHECKING:
    from dllm_var.model.transformer import Transformer
    from dllm_var.sampling import Generation, Sampler
    from dllm_var.settings import SettingsParser
    from dllm_var.text.tokenizer import Tokenizer


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
    if any(argument in ("-h", "--help") for argument in arguments):
        build_parser(command, None).print_help()
        return 0
    options, sampler, model, tokenizer = prepare(command, arguments)
    prompts = read_prompts(options, tokenizer)
    suppress = token_ids(options.suppress or [], tokenizer)
    output = Output(options.output)
    printer = make_printer(options, output, prompts, tokenizer)
    began = time.perf_counter()
    try:
        decode(options, sampler, model, tokenizer, prompts, suppress, printer)
        output.complete()
    except KeyboardInterrupt:
        close(printer)
        printer.interrupt()
        partial = output.abandon()
        where = f", in {partial}" if partial else ""
        print(f"interrupted: {len(printer.done)} of {count(len(prompts), 'answer')} finished{where}", file=sys.stderr)
        return 130
    except BaseException as error:
        close(printer)
        output.abandon()
        if isinstance(error, OSError):
            error.filename = error.filename or output.name
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error))):
            raise UserError("not enough memory for these answers: lower --max-new-tokens or the batch size") from error
        raise
    close(printer)
    line = summary(printer.done, time.perf_counter() - began)
    print(f"\033[2m{line}\033[0m" if is_coloured(sys.stderr) else line, file=sys.stderr)
    return 0


def prepare(command: str, arguments: list[str]) -> tuple[Namespace, Sampler, Transformer, Tokenizer]:
    """Reads the options and loads what they name."""
    options, sampler, model, tokenizer = load(command, arguments, build_parser, check_combinations)
    if options.rope_scaling is not None:
        from dllm_var.model.rope_scaling import read_rope_scaling

        model.scale_rope(read_rope_scaling(options.rope_scaling, model.config))
    return options, sampler, model, tokenizer


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
    if any(argument.partition("=")[0] == "--sampler.help" for argument in arguments):
        builder(command, {"class_path": default_sampler(False)}).parse_args(spelled)  # shows and exits
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer, meta = load_checkpoint(checkpoint_path(arguments, command), device)
    chosen = any(argument.startswith("--sampler=") for argument in spelled)
    default: dict[str, Any] | None = {"class_path": default_sampler(model.config.causal)}
    if not chosen and meta.get("sampler") is not None:
        # The parser imports what its values name: it gets what our own object says of itself, not the checkpoint's text
        default = sampler_to_config(sampler_from_config(meta["sampler"]))
    parser = builder(command, default)
    options = parser.parse_args(spelled)
    check(options)
    apply_shortcuts(options, any(argument.startswith("--sampler.policy=") for argument in spelled))
    return options, parser.instantiate(options).sampler, model, tokenizer


def default_sampler(causal: bool) -> str:
    """Returns the class path of the sampler of a checkpoint that remembers none."""
    return f"dllm_var.sampling.{'AutoregressiveSampler' if causal else 'BlockDiffusionSampler'}"


def make_printer(options: Namespace, output: Output, prompts: list[Prompt], tokenizer: Tokenizer) -> AnswerPrinter:
    """Returns what prints the answers as the options say."""
    out = output.stream
    in_terminal = out.isatty()
    wants_stream = options.stream or (
        in_terminal and len(prompts) == 1 and not (options.no_stream or options.json or options.replay)
    )
    new_stream: Callable[[], TextStream] | None = None
    if wants_stream and prompts[0].infill is None:
        from dllm_var.sampling.stopping import StopStrings

        stop = StopStrings(options.stop, tokenizer) if options.stop else None

        def new_stream() -> TextStream:
            return TextStream(tokenizer, stop)

    def prefix(prompt: Prompt) -> str:
        return "" if options.answers_only else f"{prompt.text or prompt.infill} -> "

    def show(prompt: Prompt, answer: Generation) -> str:
        if options.json:
            return answer.as_json(prompt.text, **({} if prompt.infill is None else {"infill": prompt.infill}))
        text = f"{prefix(prompt)}{answer.text}"
        if not options.replay:
            return text
        width = shutil.get_terminal_size((PLAIN_WIDTH, 24)).columns if in_terminal else PLAIN_WIDTH
        return f"{text}\n{replay(answer, tokenizer, width, is_coloured(out))}"

    progress = None
    if len(prompts) > 1 and sys.stderr.isatty() and new_stream is None:
        from tqdm import tqdm

        progress = tqdm(total=len(prompts), unit=" answers", file=sys.stderr, dynamic_ncols=True, leave=False)
    return AnswerPrinter(out, prompts, show, prefix, new_stream, progress)


def close(printer: AnswerPrinter) -> None:
    """Takes the progress bar away."""
    if printer.progress is not None:
        printer.progress.close()
        printer.progress = None


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
            on_block=printer.on_block if printer.new_stream is not None else None,
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
