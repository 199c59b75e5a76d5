"""The command `inspect`: what the data module makes of the data, before a model is trained on it."""

import sys
from typing import Any

import numpy as np
from jsonargparse.typing import NonNegativeInt

from dllm_var.cli.fit import quieten
from dllm_var.cli.infill_and_replay import width_and_colour
from dllm_var.cli.trainer_settings import build_reader, canvas_warning, check_settings, run_name
from dllm_var.datamodules import PackedDataModule, StreamingDataModule
from dllm_var.errors import UserError, warn
from dllm_var.text.tokenizer import Tokenizer, printable

DESCRIPTION = """Shows what the data module makes of the data of a config: counts, lengths, a sample and a packed row.
What carries loss is green in a terminal, and in [brackets] elsewhere; _ is a mask. Warnings say what is probably
wrong."""
EXAMPLES = """examples:
  python -m dllm_var inspect --config configs/quickstart.yaml
  python -m dllm_var inspect --config configs/chat.yaml --sample 3"""
GREEN, DIM, PLAIN = "\033[32m", "\033[2m", "\033[0m"
COUNTS = ("samples", "tokens", "with loss", "unknown", "dropped", "truncated", "skipped", "rows")


def main(command: str, arguments: list[str]) -> int:
    """Runs `inspect` with the settings of `fit`, and returns its exit status; raises UserError for a wrong setting."""
    parser = build_reader(command, arguments, "[--sample N]", DESCRIPTION, EXAMPLES)
    number = "the training sample and the packed row to show (0)"
    parser.add_argument("--sample", type=NonNegativeInt, default=0, metavar="N", help=number)
    if {"-h", "--help"} & set(arguments):
        print(parser.format_help())
        return 0
    quieten()
    settings = parser.parse_resolved(arguments)
    check_settings(settings, run_name(arguments))
    built = parser.instantiate(settings)
    data = built.data
    if not isinstance(data, PackedDataModule) or isinstance(data, StreamingDataModule):
        raise UserError(f"inspect reads all of the data of a PackedDataModule, and data is a {type(data).__name__}")
    data.prepare_data()
    print(report(data, settings.sample, colour=width_and_colour(sys.stdout)[1]))
    sys.stdout.flush()
    mismatch = canvas_warning(data, built.sampler)
    for warning in [*data.warnings(), *([mismatch] if mismatch else [])]:
        warn(warning)
    return 0


def report(data: PackedDataModule, number: int, colour: bool) -> str:
    """Returns the counts of every split, the tokenizer, the lengths, and the training sample and row of a number."""
    table, rows, tokenizer = data.table("train"), data.rows("train"), data.tokenizer
    if number >= len(table):
        raise UserError(f"--sample is {number}: there are {len(table):,} training samples, counted from 0")
    row = number % len(rows)
    lengths = np.diff(table.offsets)
    named = [(tokenizer.mask_id, "mask"), (tokenizer.terminator_id, "terminator"), (tokenizer.pad_id, "padding")]
    special = ", ".join(f"{name} {tokenizer.id_to_token(index)}" for index, name in named)
    template = "a" if tokenizer.chat_template else "no"
    return "\n".join(
        [
            *counts(data),
            "",
            f"tokenizer: {tokenizer.vocab_size:,} tokens, {special}, {template} chat template",
            f"training samples: {lengths.min():,} to {lengths.max():,} tokens, {np.median(lengths):,.0f} at the median",
            "",
            f"sample {number}, {lengths[number]:,} tokens:",
            *sample_lines(data, number, colour),
            "",
            f"row {row} of {len(rows):,}, {data.context_length:,} tokens, as training sees it before masking:",
            *row_lines(rows[row], tokenizer, colour),
        ]
    )


def counts(data: PackedDataModule) -> list[str]:
    """Returns a table of what became of each split."""
    lines = [["", *COUNTS]]
    for split in data.source.splits:
        table = data.table(split)
        if not len(table):
            lines.append([split, "0", *[""] * (len(COUNTS) - 1)])
            continue
        found: dict[str, Any] = data.report(split)
        found |= {"samples": len(table), "tokens": len(table.tokens), "with loss": int(table.supervised.sum())}
        found["unknown"] = found["unknown_tokens"]
        lines.append([split, *(f"{found[name]:,}" for name in COUNTS)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        f"{first:<{widths[0]}}" + "".join(f"  {cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True))
        for first, *rest in lines
    ]


def sample_lines(data: PackedDataModule, number: int, colour: bool) -> list[str]:
    """Returns the tokens of a training sample, a dot between them: a line for each stretch with and without loss."""
    table, lines = data.table("train"), []
    span = slice(table.offsets[number], table.offsets[number + 1])
    for ids, carries in runs(table.tokens[span], table.supervised[span]):
        tokens = "·".join(shown(data.tokenizer, [index]) for index in ids)
        tokens = f"{GREEN}{tokens}{PLAIN}" if carries and colour else tokens
        lines.append(f"  {'loss' if carries else 'no loss':<8}{tokens}")
    return lines


def row_lines(row: dict[str, Any], tokenizer: Tokenizer, colour: bool) -> list[str]:
    """Returns the text of a packed row, a line for each sample in it, and how much of it is padding."""
    ids, supervised, segments = (row[name].numpy() for name in ("input_ids", "supervised", "segment_ids"))
    lines = []
    for segment in range(segments.max() + 1):
        inside, text = segments == segment, ""
        for part, carries in runs(ids[inside], supervised[inside]):
            masks = len(part) - len(np.trim_zeros(part - tokenizer.mask_id, "b"))
            tokens = shown(tokenizer, part[: len(part) - masks])
            if carries and tokens:
                tokens = f"{GREEN}{tokens}{PLAIN}" if colour else f"[{tokens}]"
            text += tokens + (f"{DIM}{'_' * masks}{PLAIN}" if masks and colour else "_" * masks)
        lines.append(f"  {text}")
    padding = int((segments < 0).sum())
    return [*lines, f"  {padding:,} of padding"] if padding else lines


def runs(ids: np.ndarray, supervised: np.ndarray) -> list[tuple[np.ndarray, bool]]:
    """Returns the stretches of tokens that all carry loss, or that all carry none."""
    parts = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(supervised)) + 1)
    return [(ids[part].astype(np.int64), bool(supervised[part[0]])) for part in parts if len(part)]


def shown(tokenizer: Tokenizer, ids: Any) -> str:
    """Returns the text of tokens on one line, special ones by their names."""
    return printable(tokenizer.backend.decode([int(index) for index in ids], skip_special_tokens=False))
