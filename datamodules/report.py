"""What became of the data of a split, for programs and for people."""

from __future__ import annotations

from typing import Any

from dllm_var.datamodules.rows import PackedRows

_NOTES = {
    "cut": "cut over rows",
    "dropped": "too long and dropped",
    "truncated": "truncated",
    "skipped": "bad records skipped",
    "unknown_tokens": "unknown tokens",
}


def report_packing(rows: PackedRows, totals: dict[str, int], meta: dict[str, Any]) -> dict[str, Any]:
    """The report that `PackedDataModule.report` describes.

    Args:
        rows: Rows of the split.
        totals: Counted by `dllm_var.datamodules.fitting.Sections.totals`.
        meta: Of the table.
    """
    return {
        "samples": totals["samples"],
        "tokens": totals["tokens"],
        "rows": len(rows),
        "utilisation": rows.utilisation,
        "cut": rows.cut_samples(),
        "dropped": totals["dropped"],
        "truncated": totals["truncated"],
        "skipped": meta["skipped"],
        "unknown_tokens": meta["unknown_tokens"],
    }


def describe_packing(report: dict[str, Any], context_length: int, packing: str, reasons: list[str]) -> str:
    """A report in a line or two.

    Args:
        report: Made by `report_packing`.
        context_length: Tokens in a row.
        packing: Name of the policy.
        reasons: Why records were skipped.
    """
    text = (
        f"data: {report['samples']:,} samples, {report['tokens']:,} tokens in {report['rows']:,} rows of "
        f"{context_length} ({packing}, {report['utilisation']:.1%} used)"
    )
    notes = [f"{report[name]:,} {note}" for name, note in _NOTES.items() if report[name]]
    text += f"\ndata: {', '.join(notes)}" if notes else ""
    return text + (f", the first: {reasons[0]}" if reasons else "")
