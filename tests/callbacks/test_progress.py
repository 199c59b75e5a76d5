"""ProgressBar: a bar on a terminal, lines in a file."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest

from dllm_var.callbacks import ProgressBar, SpeedMonitor
from dllm_var.errors import UserError


def test_lines_where_there_is_no_terminal(fit: Any, capsys: Any) -> None:
    bar = ProgressBar(plain_every_n_steps=3)
    settings = {"limit_val_batches": 2, "val_check_interval": 8, "accumulate_grad_batches": 2}
    fit(SpeedMonitor(peak_flops=None), bar, enable_progress_bar=True, **settings)
    captured = capsys.readouterr()
    lines = [line for line in captured.out.splitlines() if line.startswith("step ")]
    assert [line.split("  ")[0].split(" validation")[0] for line in lines] == ["step 3/6", "step 4", "step 6/6"]
    assert re.search(r"loss \d\.\d{3}  masked accuracy \d+\.\d%  [\d,]+ tokens/s  0:\d\d$", lines[-1])
    assert lines[1].startswith("step 4 validation: loss ")
    assert "terminator recall" in lines[1]
    assert "perplexity bound" in lines[1]
    assert "\r" not in captured.out
    assert "it/s" not in captured.err


@pytest.mark.parametrize(
    ("settings", "end"),
    [
        ({"max_steps": 8, "accumulate_grad_batches": 2}, "8/8"),  # six steps are an epoch
        ({"max_steps": -1, "max_epochs": 2}, "12/12"),
    ],
)
def test_a_bar_on_a_terminal_spans_the_run_where_its_length_is_known(
    fit: Any, capsys: Any, monkeypatch: Any, settings: dict, end: str
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "85")
    callbacks = [SpeedMonitor(peak_flops=None), ProgressBar()]
    fit(*callbacks, enable_progress_bar=True, limit_val_batches=1, val_check_interval=3, **settings)
    out = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", capsys.readouterr().out)
    last = [line for line in re.split(r"[\r\n]+", out) if line.startswith("Epoch")][-1]
    assert end in last and re.search(r"loss: \d\.\d{3} masked accuracy: \d+\.\d% tokens/s: [\d,]+", last)
    assert "val/loss" not in out
    assert out.count("step 3 validation: loss") == 1


def test_lines_need_a_distance() -> None:
    with pytest.raises(UserError, match="plain_every_n_steps"):
        ProgressBar(plain_every_n_steps=0)
