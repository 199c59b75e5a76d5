"""The command `generate`: answers prompts with a checkpoint. Needs torch, not Lightning, and for --help neither."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from jsonargparse import Namespace

from dllm_var.cli.decoding_options import (
    add_chat_options,
    add_decoding_options,
    add_model_options,
    load_model,
    read_options,
    settle_chat,
)
from dllm_var.cli.infill_and_replay import replay, split_gaps, width_and_colour
from dllm_var.errors import UserError
from dllm_var.files import open_output, parse_json
from dllm_var.settings import SettingsParser

if TYPE_CHECKING:
    from dllm_var.model.transformer import Transformer
    from dllm_var.sampling import Generation, Sampler
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

IN_TERMINAL = "-"  # value of --replay without a file
CONFLICTS = [("stream", "json"), ("stream", "replay"), ("stream", "no_stream"), ("json", "replay")]
CONFLICTS += [("infill", "prompts_file")]


def main(command: str, arguments: list[str]) -> int:
    """Runs `generate`; returns 0, or 130 after Ctrl-C, when the answers finished by then have been written."""
    options, sampler, checkpoint = read_options(command, arguments, build_parser)
    from dllm_var.sampling.guards import lacks_memory

    page = None
    if options.replay not in (None, IN_TERMINAL):
        page, options.replay = options.replay, None
        if not page.endswith((".html", ".htm")):
            raise UserError(f"--replay {page}: the name of the page must end in .html; without a name, it is printed")
    for option, other in CONFLICTS:
        if options[option] and options[other]:
            raise UserError(f"--{option} does not go with --{other.replace('_', '-')}: leave one of them out")
    model, tokenizer = load_model(options, checkpoint)
    settle_chat(options, checkpoint, tokenizer)
    prompts = read_prompts(options, tokenizer)
    if options.stream and len(prompts) > 1:
        raise UserError("--stream goes with a single prompt: the answers of several would mix")
    unusable = next((name for name in ("stop", "max_new_tokens", "stream") if options[name]), None)
    if prompts[0].infill is not None and unusable:
        raise UserError(f"a text with gaps does not go with --{unusable.replace('_', '-')}: leave it out")
    suppress = token_ids(options.suppress or [], tokenizer)
    output = nullcontext(sys.stdout) if options.output in (None, "-") else open_output(options.output)
    began, printer = time.perf_counter(), None
    try:
        with (
            nullcontext() if page is None else open_output(page) as shown,
            output as file,
            AnswerPrinter(file, prompts, tokenizer, options) as printer,
        ):
            decode(sampler, model, suppress, printer, record=page is not None)
            if shown is not None:
                shown.write(replay_page(printer, sampler))
    except KeyboardInterrupt:
        if printer is None:
            raise  # before the first answer
        where = f", in {file.name}" if file is not sys.stdout and Path(file.name).exists() else ""
        print(f"interrupted: {len(printer.done)} of {len(prompts):,} answers finished{where}", file=sys.stderr)
        return 130
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        raise UserError("not enough memory for these answers: lower --max-new-tokens or the batch size") from error
    print(summary([*printer.done.values()], time.perf_counter() - began), file=sys.stderr)
    return 0


def decode(
    sampler: Sampler, model: Transformer, suppress: list[int], printer: AnswerPrinter, record: bool = False
) -> None:
    """Decodes the prompts of a printer, or fills their gaps, and has every answer printed."""
    prompts, options = printer.prompts, printer.options
    ids = [prompt.ids for prompt in prompts]
    shared: dict[str, Any] = dict(tokenizer=printer.tokenizer, suppress=suppress, on_answer=printer.on_answer)
    shared["record"] = record
    if prompts[0].infill is None:
        on_block = printer.on_block if printer.streams else None
        limits = dict(max_new_tokens=options.max_new_tokens, stop=options.stop or [])
        sampler.generate(model, ids, on_block=on_block, **limits, **shared)
        return
    from dllm_var.sampling.infilling import block_length_of, infill, settings_of

    shared |= {"block_length": block_length_of(sampler), **settings_of(sampler)}
    infill(model, [prompt.infill_ids for prompt in prompts], prompts=ids, **shared)


# -- options -----------------------------------------------------------------------------------------------------------


def build_parser(command: str, sampler: dict[str, Any] | None) -> SettingsParser:
    """Returns the parser of the options; `sampler` is the default one, None for a parser that only shows help."""
    usage = "--checkpoint PATH [--prompt TEXT ...] [options]"
    parser = SettingsParser.of_command(command, usage, DESCRIPTION, EXAMPLES)
    add_model_options(parser)

    prompts = parser.add_argument_group("prompts")
    repeatable: dict[str, Any] = {"action": "append", "type": str}
    prompts.add_argument("--prompt", **repeatable, metavar="TEXT", help="text to answer; repeatable")
    lines = 'one prompt per line; in a .jsonl file {"prompt": ...} or {"messages": [...]}; - is standard input'
    prompts.add_argument("--prompts-file", type=str, metavar="FILE", help=lines)
    add_chat_options(prompts)
    prompts.add_argument("--system", type=str, metavar="TEXT", help="system message of every prompt, with --chat")
    gaps = "text whose gaps are filled, such as <gap:3> for three tokens; repeatable, with a --prompt for each"
    prompts.add_argument("--infill", **repeatable, metavar="TEXT", help=gaps)

    add_decoding_options(parser, sampler)

    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="one JSON object per line: text, tokens, counts and times")
    output.add_argument("--output", type=str, metavar="FILE", help="write answers there; it appears when complete")
    output.add_argument("--answers-only", action="store_true", help="print answers without their prompts")
    output.add_argument("--stream", action="store_true", help="print a single answer block by block, as in a terminal")
    output.add_argument("--no-stream", action="store_true", help="print answers whole")
    replay_help = "show in which forward pass each token appeared: below the answers, or on a page, FILE.html"
    output.add_argument("--replay", nargs="?", const=IN_TERMINAL, type=str, metavar="FILE", help=replay_help)
    output.add_argument("--config", action="config", metavar="FILE", help="YAML file of options by their full names")
    return parser


# -- prompts -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """One thing to decode."""

    text: str  # as it is shown: what the user wrote, or said last
    ids: list[int]  # what the model reads before the answer
    infill: str | None = None  # the answer with gaps, as it was written
    infill_ids: Sequence[int] = ()  # its token ids, the mask id wherever a token is wanted


def read_prompts(options: Namespace, tokenizer: Tokenizer) -> list[Prompt]:
    """Returns the prompts of the options, in order; raises UserError, which names the place of a prompt it refuses."""
    if options.system is not None and not options.chat:
        raise UserError("--system needs --chat: a system message is part of a conversation")
    prompts: list[Prompt] = []
    for place, record in _records(options):
        try:
            prompts.append(_prompt(record, tokenizer, options.chat, options.system))
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
    if not prompts:
        raise UserError("no prompts: give --prompt TEXT, --prompts-file FILE or lines on standard input")
    if len({prompt.infill is None for prompt in prompts}) > 1:
        raise UserError("some prompts have an infill text and some have none: decode them in two runs")
    return prompts


def _records(options: Namespace) -> Iterator[tuple[str, Any]]:
    """Yields the place of each prompt, for messages, and the prompt as a line of a .jsonl file has it."""
    prompts, infills, name = options.prompt or [], options.infill or [], options.prompts_file
    if infills and prompts and len(prompts) != len(infills):
        raise UserError(f"{len(prompts)} --prompt and {len(infills)} --infill: give one for each infill text, or none")
    for prompt, infill in zip_longest(prompts, infills):
        yield "--prompt" if infill is None else "--infill", {"prompt": prompt, "infill": infill}
    if name is None and (prompts or infills or sys.stdin.isatty()):
        return
    source = "standard input" if name in (None, "-") else name
    try:
        text = Path(name).read_text(encoding="utf-8-sig") if source == name else sys.stdin.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"cannot read the prompts of {source}: {reason}") from error
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else [], start=1):
        place = f"{source}, line {number}"
        if not source.endswith(".jsonl"):
            yield place, {"prompt": line.strip()}
        elif line.strip():
            yield place, parse_json(line, place)


def _prompt(record: Any, tokenizer: Tokenizer, chat: bool, system: str | None) -> Prompt:
    """Returns what a record asks for; raises UserError when it asks for nothing that can be decoded."""
    from dllm_var.text.prompts import encode_conversation, encode_prompt

    if not isinstance(record, dict) or all(record.get(name) is None for name in ("prompt", "messages", "infill")):
        raise UserError('expected an object with "prompt", "messages" or "infill"')
    text, messages, infill = (record.get(name) for name in ("prompt", "messages", "infill"))
    ids: list[int] = []
    if chat and messages is None and text is not None:
        messages = [{"role": "user", "content": text}]
    if messages is not None:
        turns = messages if isinstance(messages, list) and all(isinstance(turn, dict) for turn in messages) else []
        if turns and turns[-1].get("role") == "assistant":  # a record of training data: that turn is asked for
            turns = turns[:-1]
        if turns and system is not None and turns[0].get("role") != "system":
            turns = [{"role": "system", "content": system}, *turns]
        ids = encode_conversation(turns, tokenizer)
        text = turns[-1]["content"]
    elif text is not None:
        ids = encode_prompt(text, tokenizer)
    if infill is None:
        return Prompt(text or "", ids)
    infill_ids: list[int] = []
    for part in split_gaps(str(infill)):
        infill_ids += [tokenizer.mask_id] * part if isinstance(part, int) else encode_prompt(part, tokenizer)
    return Prompt(text or "", ids, infill, infill_ids)


def token_ids(names: Sequence[str], tokenizer: Tokenizer) -> list[int]:
    """Returns the ids of tokens given by text, name in the vocabulary, or `id:N`; a text must be one token."""
    ids = []
    for name in names:
        number = name.removeprefix("id:")
        index = int(number) if number != name and number.isdecimal() else tokenizer.backend.token_to_id(name)
        if index is None:
            encoded = tokenizer.encode(name)
            if len(encoded) != 1 or encoded[0] == tokenizer.unknown_id:
                pieces = ", ".join(repr(tokenizer.id_to_token(piece)) for piece in encoded) or "nothing"
                raise UserError(f"--suppress: '{name}' is not one token but {pieces}; give a token's text, or id:N")
            index = encoded[0]
        ids.append(index)
    return ids


# -- answers -----------------------------------------------------------------------------------------------------------


class AnswerPrinter:
    """Prints answers in the order of their prompts; the answer of a single prompt may be streamed block by block."""

    def __init__(self, out: TextIO, prompts: Sequence[Prompt], tokenizer: Tokenizer, options: Namespace) -> None:
        self.out, self.prompts, self.tokenizer, self.options = out, prompts, tokenizer, options
        whole = options.no_stream or options.json or options.replay or prompts[0].infill is not None
        self.streams = options.stream or (out.isatty() and len(prompts) == 1 and not whole)
        self.streamed = ""  # what a stream has shown of the answer's line
        self.next = 0  # the prompt whose answer is printed next
        self.waiting: dict[int, Generation] = {}
        self.done: dict[int, Generation] = {}  # by the numbers of their prompts
        from tqdm import tqdm

        hidden = len(prompts) == 1 or out.isatty() or not sys.stderr.isatty()
        self.progress = tqdm(total=len(prompts), unit=" answers", leave=False, disable=hidden)

    def on_block(self, index: int, tokens: list[int]) -> None:
        """Shows what is new in the only answer, but for what later tokens may change."""
        from dllm_var.sampling.stopping import StopStrings, settled_text

        stop = StopStrings(self.options.stop, self.tokenizer) if self.options.stop else None
        line = self._line(index, settled_text(tokens, self.tokenizer, stop))
        if line.startswith(self.streamed):
            self._write(line[len(self.streamed) :])
            self.streamed = line

    def on_answer(self, index: int, answer: Generation) -> None:
        """Prints an answer, or keeps it until those before it are there."""
        self.waiting[index] = answer
        self.done[index] = answer
        self.progress.update()
        while self.next in self.waiting:
            self._print(self.next, self.waiting.pop(self.next))
            self.next += 1

    def __enter__(self) -> AnswerPrinter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self.progress.close()
        if kind is KeyboardInterrupt:
            if self.streamed:
                self._write("\n")
            for index, answer in sorted(self.waiting.items()):  # for one that will not come
                self._print(index, answer)

    def _print(self, index: int, answer: Generation) -> None:
        prompt, line = self.prompts[index], self._line(index, answer.text or "")
        if self.options.json:
            line = answer.as_json(prompt.text, **({} if prompt.infill is None else {"infill": prompt.infill}))
        if self.options.replay:
            line = f"{line}\n{replay(answer, self.tokenizer, *width_and_colour(self.out))}"
        changed = not line.startswith(self.streamed)  # by a tokenizer whose later tokens change earlier text
        self._write(("\n" if changed else "") + line.removeprefix(self.streamed) + "\n")
        self.streamed = ""

    def _line(self, index: int, text: str) -> str:
        prompt = self.prompts[index]
        return text if self.options.answers_only else f"{prompt.text or prompt.infill} -> {text}"

    def _write(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()


def replay_page(printer: AnswerPrinter, sampler: Sampler) -> str:
    """Returns a page that replays the answers, recorded ones, of a printer."""
    from dllm_var.sampling.recording import label_of, replay_of
    from dllm_var.view import page

    label, texts = label_of(sampler), [prompt.text or prompt.infill for prompt in printer.prompts]
    return page([replay_of(answer, texts[index], label) for index, answer in sorted(printer.done.items())])


def summary(answers: Sequence[Generation], seconds: float) -> str:
    """Returns one line: what it took."""
    tokens, forwards = sum(answer.new_tokens for answer in answers), sum(answer.nfe for answer in answers)
    named = (("answer", len(answers)), ("token", tokens), ("forward", forwards))
    counts = [f"{number:,} {noun}" + ("" if number == 1 else "s") for noun, number in named]
    speed = f"({tokens / max(forwards, 1):.2f} tokens/forward), {seconds:.2f} s ({tokens / seconds:.0f} tokens/s)"
    cut = sum(answer.finish_reason == "length" for answer in answers)
    return f"{counts[0]}, {counts[1]} in {counts[2]} {speed}" + (f"; {cut} reached the length limit" if cut else "")
