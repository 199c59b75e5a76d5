"""The command `chat`: a conversation in the terminal, answered as `generate` answers a single prompt."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from itertools import groupby
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace
from rich.console import Console
from rich.live import Live
from rich.text import Text

from dllm_var.cli.decoding_options import add_decoding_options, add_model_options, load_model, read_options
from dllm_var.cli.generate import token_ids
from dllm_var.errors import UserError
from dllm_var.settings import SettingsParser

if TYPE_CHECKING:
    from dllm_var.model.transformer import Transformer
    from dllm_var.sampling import Sampler
    from dllm_var.sampling.recording import RecordedStep
    from dllm_var.text.tokenizer import Tokenizer

DESCRIPTION = """A conversation with a checkpoint that was trained on conversations. A terminal shows every answer being
denoised. Each line is a message; /reset forgets the conversation, and Ctrl-D or Ctrl-C ends it."""

EXAMPLES = """examples:
  python -m dllm_var chat --checkpoint runs/chat/version_0
  python -m dllm_var chat --checkpoint runs/chat/version_0 --system "Be brief." --temperature 0.7 --seed 1"""

RESET = "/reset"


def main(command: str, arguments: list[str]) -> int:
    """Runs `chat`; returns 0 when its input ends, 130 after Ctrl-C."""
    options, sampler, checkpoint = read_options(command, arguments, build_parser)
    model, tokenizer = load_model(options, checkpoint)
    if tokenizer.chat_template is None:
        raise UserError(f"{command} needs a tokenizer with a chat template, which {options.checkpoint} has not")
    try:
        converse(sampler, model, tokenizer, options)
    except KeyboardInterrupt:
        print("ended", file=sys.stderr)
        return 130
    return 0


def converse(sampler: Sampler, model: Transformer, tokenizer: Tokenizer, options: Namespace) -> None:
    """Answers lines of standard input until they end; each is read together with all turns before it."""
    from dllm_var.text.prompts import encode_prompt

    wishes: dict[str, Any] = dict(max_new_tokens=options.max_new_tokens, stop=options.stop or [])
    wishes["suppress"] = token_ids(options.suppress or [], tokenizer)
    start = [] if options.system is None else [{"role": "system", "content": options.system}]
    tokenizer.encode_chat_prompt([*start, user("hello")])  # a template may refuse a system message
    longest = model.config.context_length
    turns = list(start)
    for text in lines():
        if text == RESET:
            turns = list(start)
            continue
        asked = [*turns, user(text)]
        try:
            encode_prompt(text, tokenizer)
            prompt = tokenizer.encode_chat_prompt(asked)
        except UserError as error:  # a character that the vocabulary has not
            print(f"error: {error}", file=sys.stderr)
            continue
        with Denoising(tokenizer) if sys.stdout.isatty() else nullcontext() as shown:
            on_step = None if shown is None else shown.on_step
            [answer] = sampler.generate(model, [prompt], tokenizer=tokenizer, on_step=on_step, **wishes)
        print(answer.text, flush=True)
        turns = [*asked, {"role": "assistant", "content": answer.text}]
        if longest is not None and len(prompt) + answer.new_tokens > longest:
            print(f"this is longer than the {longest:,} tokens of training: {RESET} begins anew", file=sys.stderr)


class Denoising:
    """An answer in the terminal while it is denoised: a box for each mask, and bold what the last forward decided.

    Nothing of it is left, unless the decoding was interrupted.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.tokens: dict[int, int] = {}  # by their places
        self.live = Live(console=Console(file=sys.stdout), auto_refresh=False, transient=True)

    def __enter__(self) -> Denoising:
        self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self.live.transient = kind is None
        self.live.stop()

    def on_step(self, index: int, step: RecordedStep) -> None:
        """Shows the answer as a forward has left it."""
        changes = {place: token for place, token, _ in step.changes}
        tokens = {**self.tokens, **changes}.items()
        self.tokens = {place: token for place, token in tokens if token is not None and place < step.length}
        shown = Text()
        for (known, new), found in groupby(range(step.length), lambda place: (place in self.tokens, place in changes)):
            places = [*found]
            if known:
                text = self.tokenizer.decode([self.tokens[place] for place in places])
                shown.append(text, "bold" if new else "")
            else:
                shown.append("░" * len(places), "dim")
        # What does not fit the screen is above it.
        lines = shown.wrap(self.live.console, self.live.console.width)[1 - self.live.console.height :]
        self.live.update(Text("\n").join(lines), refresh=True)


def user(text: str) -> dict[str, Any]:
    """Returns a turn of the user."""
    return {"role": "user", "content": text}


def lines() -> Iterator[str]:
    """Yields the lines of standard input that are not empty; a terminal shows where to write, a file only answers."""
    in_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if in_terminal:
        with suppress(ImportError):  # Windows has none
            import readline  # noqa: F401  (arrow keys edit the line)
        print(f"{RESET} forgets the conversation, Ctrl-D ends it", file=sys.stderr)
    while True:
        try:
            text = input("> " if in_terminal else "").strip()
        except (EOFError, KeyboardInterrupt) as end:
            if in_terminal:
                print()  # behind "> "
            if isinstance(end, KeyboardInterrupt):
                raise
            return
        if text:
            yield text


def build_parser(command: str, sampler: dict[str, Any] | None) -> SettingsParser:
    """Returns the parser of the options; `sampler` is the default one, None for a parser that only shows help."""
    parser = SettingsParser.of_command(command, "--checkpoint PATH [options]", DESCRIPTION, EXAMPLES)
    add_model_options(parser)
    parser.add_argument("--system", type=str, metavar="TEXT", help="system message of the conversation")
    add_decoding_options(parser, sampler)
    parser.add_argument("--config", action="config", metavar="FILE", help="YAML file of options by their full names")
    return parser
