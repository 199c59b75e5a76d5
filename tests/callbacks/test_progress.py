"""ProgressBar: a bar on a terminal, lines in a file."""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dllm_var.callbacks import ProgressBar, SpeedMonitor
from dllm_var.callbacks.progress import figures
from dllm_var.errors import UserError


def test_lines_where_there_is_no_terminal(fit: Any, capsys: Any) -> None:
    bar = ProgressBar(plain_every_n_steps=3)
    settings = {"limit_val_batches": 2, "val_check_interval": 8, "accumulate_grad_batches": 2}
    fit(SpeedMonitor(peak_flops=None), bar, enable_progress_bar=True, **settings)
    captured = capsys.readouterr()
    lines = [line for line in captured.out.splitlines() if line.startswith("step ")]
    assert [line.split("  ")[0].split(" validation")[0] for line in lines] == ["step 3/6", "step 4", "step 6/6"]
    assert "masked accuracy" in lines[0]
    assert "tokens/s" in lines[-1]
    assert lines[1].startswith("step 4 validation: loss ")
    assert "terminator recall" in lines[1]
    assert "perplexity bound" in lines[1]
    assert "\r" not in captured.out
    assert "it/s" not in captured.err


def test_a_bar_on_a_terminal(fit: Any, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    bar = ProgressBar(refresh_seconds=0.0)
    fit(SpeedMonitor(peak_flops=None), bar, enable_progress_bar=True, limit_val_batches=1, val_check_interval=3)
    out = capsys.readouterr().out
    assert "Epoch 0" in out
    assert re.search(
        r"Epoch 0: .*6/6 \[00:\d\d<00:00, loss \d\.\d{3}, masked accuracy \d+\.\d%, [\d,]+ tokens/s\]", out
    )
    assert "val/loss" not in out
    assert "step 3 validation: loss" in out


@pytest.mark.parametrize(
    ("settings", "end"), [({"max_steps": 8}, "8/8"), ({"max_steps": -1, "max_epochs": 2}, "12/12")]
)
def test_spans_the_run_where_its_length_is_known_and_is_full_at_its_end(
    fit: Any, capsys: Any, monkeypatch: Any, settings: dict, end: str
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    fit(ProgressBar(refresh_seconds=1e9), enable_progress_bar=True, **settings)
    assert f"100%|██████████| {end} [" in capsys.readouterr().out


def test_counts_optimizer_steps_over_epochs(fit: Any, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    settings = {"max_steps": 8, "accumulate_grad_batches": 2}  # six steps are an epoch
    fit(ProgressBar(refresh_seconds=0.0), enable_progress_bar=True, **settings)
    shown = capsys.readouterr().out.split("\r")
    assert any(line.startswith("Epoch 1:  88%") and "| 7/8 [" in line for line in shown)
    assert "8/8" in shown[-1]


def test_shows_other_figures_a_module_logs_for_the_bar() -> None:
    logged = {"train/entropy": torch.tensor(0.123456), "val/loss": torch.tensor(1.0), "train/loss": torch.tensor(2.0)}
    assert figures(SimpleNamespace(progress_bar_metrics=logged)) == ["loss 2.000", "entropy 0.1235"]  # type: ignore[arg-type]


def test_lines_need_a_distance() -> None:
    with pytest.raises(UserError, match="plain_every_n_steps"):
        ProgressBar(plain_every_n_steps=0)
