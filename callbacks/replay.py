"""The losses of one step's rows once more, from a checkpoint before it."""

from __future__ import annotations

import math
from typing import Any

import lightning as L

from dllm_var.callbacks.decoding import say
from dllm_var.callbacks.rendering import draw

TEXT_LENGTH = 60


class ReplayStep(L.Callback):
    """Trains up to a step that the loss guard has recorded, ends there, and sets what it finds beside the record.

    Rows and noise are functions of the seed and a row's number, and a resumed run goes on bit for bit: with as many
    processes on the same kind of machine the losses are the recorded ones, to the last bit.

    Args:
        record: A line of `loss_guard.jsonl`.
        num_shown: How many rows are shown, the worst first.
    """

    def __init__(self, record: dict[str, Any], num_shown: int = 8) -> None:
        self.record, self.num_shown = record, num_shown
        self._began = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._began = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self.record["step"] or trainer.should_stop:
            return
        trainer.should_stop = True
        step: Any = pl_module.last_step
        rows = step.rows()  # every process must ask
        if trainer.is_global_zero:
            say(trainer, self._report(trainer, step.loss, rows))

    def _report(self, trainer: L.Trainer, loss: float, rows: list[list[float]]) -> list[str]:
        from rich.table import Table

        record, shown = self.record, "{:.6f}".format
        replayed = {int(row): value for row, value, _ in rows}
        recorded = {int(row): value for row, value, _ in record["rows"]}
        table = Table(box=None, pad_edge=False)
        for name in ("row", "recorded", "replayed", "loss tokens", "text"):
            table.add_column(name, justify="left" if name == "text" else "right", no_wrap=True)
        worst = sorted(record["rows"], key=lambda row: (row[1] is None, row[1] or 0.0), reverse=True)
        for row, value, tokens in worst[: self.num_shown]:
            again = replayed.get(row)
            table.add_row(
                f"{row:,}",
                "not finite" if value is None else shown(value),
                "not in the step" if again is None else shown(again),
                f"{tokens:,}",
                self._text(trainer, row),
            )
        same = replayed.keys() == recorded.keys() and all(
            recorded[row] == value or (recorded[row] is None and not math.isfinite(value))
            for row, value in replayed.items()
        )
        was = "not finite" if record["loss"] is None else shown(record["loss"])
        between = record["step"] - self._began - 1
        return [
            f"step {record['step']} ({record['reason']}), {between} steps after the checkpoint's",
            f"loss {was} recorded, {shown(loss)} replayed; row by row {'the same' if same else 'NOT the same'}",
            draw(table),
        ]

    def _text(self, trainer: L.Trainer, row: int) -> str:
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(datamodule, "rows"):
            return ""
        found = datamodule.rows("train")[row]
        samples = (found["input_ids"][found["segment_ids"] == n] for n in range(int(found["segment_ids"].max()) + 1))
        text = " | ".join(" ".join(datamodule.tokenizer.decode(tokens.tolist()).split()) for tokens in samples)
        return text if len(text) <= TEXT_LENGTH else text[:TEXT_LENGTH] + "..."
