"""The command `tokenizer`: trains a tokenizer on one's own data."""

import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from dllm_var.errors import UserError
from dllm_var.files import write_atomically
from dllm_var.settings import SettingsParser

DESCRIPTION = """Trains a tokenizer on your own data: byte-level BPE with a mask token, a terminator, a padding token,
and a chat template. The data is JSON Lines, in the formats that training reads: {messages}, {prompt, response},
{instruction, input, output} or {text}."""
EXAMPLES = """examples:
  python -m dllm_var tokenizer --data chats.jsonl --vocab-size 1024 --output chat_tokenizer
  python -m dllm_var tokenizer --data "parts/*.jsonl" --vocab-size 8192 --output words --columns '{prompt: question}'

docs/first_model.md goes on from there."""
MEASURED = 10_000  # records whose lengths in tokens are told


def main(command: str, arguments: list[str]) -> int:
    """Runs `tokenizer`; raises UserError for a wrong option, or for a record that holds no text."""
    options = build_parser(command).parse_args(arguments)
    for name in ("data", "vocab_size", "output"):
        if options[name] is None:
            raise UserError(f"{command} needs --{name.replace('_', '-')}; --help shows an example")
    output = Path(options.output).expanduser()
    if output.exists():
        raise UserError(f"--output {output} exists: give a folder that does not")
    from dllm_var.datamodules.sources import JsonlSource
    from dllm_var.datamodules.table import RecordEncoder
    from dllm_var.text.train_tokenizer import train_tokenizer

    try:
        source = JsonlSource(options.data, validation_size=0, test_size=0, columns=options.columns)
    except UserError as error:
        raise UserError(str(error).replace("data.source path", "--data")) from None
    counts = {"records": 0, "characters": 0}
    tokenizer = train_tokenizer(texts(source.located_records("train"), counts), options.vocab_size, sys.stderr.isatty())
    if not counts["records"]:
        raise UserError(f"--data {options.data} has no records")
    table = RecordEncoder(tokenizer).encode(list(islice(source.located_records("train"), MEASURED)))
    lengths = np.diff(table.offsets)
    with write_atomically(output) as partial:
        tokenizer.save(partial)
    first = "" if len(lengths) == counts["records"] else f" of the first {len(lengths):,}"
    print(
        f"read {counts['records']:,} records of {counts['characters']:,} characters\n"
        f"{tokenizer.vocab_size:,} tokens, mask {tokenizer.id_to_token(tokenizer.mask_id)}, "
        f"terminator {tokenizer.id_to_token(tokenizer.terminator_id)}, a chat template\n"
        f"tokens in a record{first}: {np.median(lengths):,.0f} at the median, {lengths.max():,} at most, which "
        f"data.context_length must hold\n"
        f"use it with --data.tokenizer={output}"
    )
    return 0


def build_parser(command: str) -> SettingsParser:
    usage = "--data FILE --vocab-size N --output FOLDER [options]"
    parser = SettingsParser.of_command(command, usage, DESCRIPTION, EXAMPLES)
    files = "JSON Lines file, folder or pattern; .gz, .xz and .bz2 are read as they are"
    parser.add_argument("--data", type=str, metavar="FILE", help=files)
    parser.add_argument("--vocab-size", type=int, metavar="N", help="tokens at most, special ones included")
    parser.add_argument("--output", type=str, metavar="FOLDER", help="where to; must not exist yet")
    names = "names our fields have in the data, such as '{prompt: question, response: answer}'"
    parser.add_argument("--columns", type=dict[str, str], metavar="NAMES", help=names)
    return parser


def texts(records: Iterator[tuple[str, Any]], counts: dict[str, int]) -> Iterator[str]:
    """Yields the texts of records, and counts both; raises UserError, which names its place, for a bad record."""
    from dllm_var.datamodules.records import Ids, parse_record

    for where, record in records:
        try:
            form = parse_record(record, chat=False)
            if isinstance(form, Ids):
                raise UserError("has token ids: a tokenizer is trained on text")
        except UserError as error:
            raise UserError(f"{where} {error}") from None
        counts["records"] += 1
        for turn in form.messages:
            counts["characters"] += len(turn["content"])
            yield turn["content"]
