"""Losses that are not finite, or out of all proportion: no update, a record of the rows, and an end to it."""

from __future__ import annotations

import json
import math
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from dllm_var.errors import UserError
from dllm_var.files import fits, parse_json, read_text, write_text
from dllm_var.training.step_totals import StepResult

GUARD_FILE = "loss_guard.jsonl"
LEAST_HISTORY = 20  # losses before a median says anything


@dataclass
class LossGuard:
    """When a step is out of the ordinary, and when there are too many of them.

    Args:
        max_skipped: Training stops, its state saved, when it has skipped this many updates since its first step.
        spike_factor: A loss of this many times the running median is recorded, and trained on; null for none.
        spike_window: Steps that the median is of.

    Raises:
        UserError: For numbers that make no sense.
    """

    max_skipped: int = 20
    spike_factor: float | None = 3.0
    spike_window: int = 100

    def __post_init__(self) -> None:
        factor = math.inf if self.spike_factor is None else self.spike_factor
        if self.max_skipped < 1 or not factor > 1 or self.spike_window < LEAST_HISTORY:
            raise UserError(
                f"model.loss_guard needs max_skipped >= 1, spike_factor > 1 and spike_window >= {LEAST_HISTORY}, got "
                f"{self.max_skipped}, {self.spike_factor} and {self.spike_window}"
            )


class GuardedSteps:
    """Skips updates from losses or gradients that are not finite, and records the rows behind them and behind spikes.

    The record is a line in `loss_guard.jsonl` of the run folder: the `step` (1 is the run's first), the `reason`
    (`loss`, `gradient` or `spike`), `loss`, `median`, `gradient_norm`, and in `rows`, for every row of the step,
    `[row, loss per token, loss tokens]`; `null` for what is not finite. `python -m dllm_var replay RUN` computes these
    losses again.

    Overflow that 16-bit training expects, while its loss scale comes down, is neither counted nor recorded.

    Args:
        settings: The thresholds.
    """

    def __init__(self, settings: LossGuard) -> None:
        self.settings = settings
        self.skipped = 0
        self._losses: deque[float] = deque(maxlen=settings.spike_window)

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "losses": list(self._losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped = state["skipped"]
        self._losses = deque(state["losses"], maxlen=self.settings.spike_window)

    def begin(self, trainer: L.Trainer) -> None:
        """Drops the records of steps that a run which goes on from an earlier checkpoint makes again; on every rank."""
        folder = trainer.log_dir if trainer.loggers else None  # every rank must ask
        if folder is None or trainer.ckpt_path is None or not trainer.is_global_zero:
            return
        path = Path(folder) / GUARD_FILE
        if not path.is_file():
            return
        kept = [record for record in read_records(path) if record["step"] <= trainer.global_step]
        write_text(path, "".join(json.dumps(record) + "\n" for record in kept))

    def allows(self, result: StepResult, trainer: L.Trainer) -> bool:
        """Decides, the same on every rank, whether the step's update is made; records it if it is out of the ordinary.

        Args:
            result: The step; on every rank the same figures.
            trainer: Knows the step's number and the run folder.
        """
        usual = median(self._losses) if len(self._losses) >= LEAST_HISTORY else None
        reason = self._reason(result, usual)
        if math.isfinite(result.loss):
            self._losses.append(result.loss)
        if reason is None or (reason == "gradient" and _overflow_is_expected(trainer)):
            return True
        path = self._record(reason, usual, result, trainer)
        step, where = trainer.global_step + 1, f"; rows in {path}" if path else ""
        if reason == "spike":
            rank_zero_info(f"step {step}: loss {result.loss:.3f}, the median is {usual:.3f}{where}")
            return True
        self.skipped += 1
        count = f"{self.skipped} of {self.settings.max_skipped}"
        rank_zero_info(f"step {step}: {reason} is not finite, update skipped ({count}){where}")
        return False

    def _reason(self, result: StepResult, usual: float | None) -> str | None:
        if not math.isfinite(result.loss):
            return "loss"
        if result.gradient_norm is not None and not math.isfinite(result.gradient_norm):
            return "gradient"
        factor = self.settings.spike_factor
        return "spike" if factor and usual is not None and result.loss > factor * usual else None

    def _record(self, reason: str, usual: float | None, result: StepResult, trainer: L.Trainer) -> Path | None:
        rows = result.rows()  # every rank must ask, for these and for the folder
        folder = trainer.log_dir if trainer.loggers else None
        if folder is None:
            return None
        path = Path(folder) / GUARD_FILE
        if trainer.is_global_zero:
            record = {
                "step": trainer.global_step + 1,
                "reason": reason,
                "loss": _finite(result.loss),
                "median": usual,
                "gradient_norm": None if result.gradient_norm is None else _finite(result.gradient_norm),
                "rows": [[row, _finite(loss), tokens] for row, loss, tokens in rows],
            }
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        return path

    def check_count(self, trainer: L.Trainer) -> None:
        """Ends training when too many updates were skipped; to be called between two steps, on every rank.

        Raises:
            UserError: Once the state is saved, if the run saves any.
        """
        if self.skipped < self.settings.max_skipped:
            return
        if trainer.checkpoint_callbacks:
            from dllm_var.training.runs import save_last  # which knows the module

            save_last(trainer)
        folder = trainer.log_dir if trainer.loggers else None
        where = f"; their rows are in {Path(folder) / GUARD_FILE}" if folder else ""
        raise UserError(
            f"{self.skipped} updates skipped because loss or gradients were not finite{where}: lower the learning rate "
            "or mend these rows, or raise model.loss_guard.max_skipped"
        )


def read_records(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a run's `loss_guard.jsonl`, without a line that a killed process has not finished.

    Raises:
        UserError: When a line is no record; names it.
    """
    records = []
    for number, line in enumerate(read_text(path).splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            continue
        record = parse_json(line, f"{path}, line {number}")
        if not _is_record(record):
            raise UserError(f"{path}, line {number} is no record of a step: the file is damaged")
        records.append(record)
    return records


def _is_record(record: Any) -> bool:
    if not isinstance(record, dict) or not fits(record.get("rows"), list[list[int | float | None]]):
        return False
    fields = {"step": int, "reason": str, "loss": float | None}
    return all(name in record and fits(record[name], kind) for name, kind in fields.items()) and all(
        len(row) == 3 and type(row[0]) is int and type(row[2]) is int for row in record["rows"]
    )


def _overflow_is_expected(trainer: L.Trainer) -> bool:
    """Whether gradients may overflow because a loss scale is still being found, which then comes down by itself."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler is not None and scaler.get_scale() > 1


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
