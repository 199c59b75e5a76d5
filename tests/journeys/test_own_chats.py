"""docs/first_model.md from its first line to its last, as a newcomer would follow it, with a shorter training."""

import io
import re
import shlex
import sys
from pathlib import Path

import pytest

from dllm_var.__main__ import main

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "first_model.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^\$ (.*)\n((?:(?!\$ |```).*\n)*)", PAGE, flags=re.MULTILINE)
SHORTER = [
    *("--model.transformer.hidden_size=16", "--model.transformer.num_layers=1", "--model.transformer.num_heads=2"),
    *("--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.limit_val_batches=1"),
    *("--data.batch_size=2", "--sampler.max_new_tokens=16", "--trainer.devices=1"),
]
EXACT = ("tokenizer", "inspect")  # commands whose output does not depend on the training


@pytest.mark.slow
def test_every_command_of_the_page_runs(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DLLM_VAR_CACHE", str(tmp_path / "cache"))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "make_chats.py").write_text(re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1])
    ran = []
    for command, shown in COMMANDS:
        words = shlex.split(command)
        if words == ["python", "make_chats.py"]:
            exec(compile(Path(words[1]).read_text(), words[1], "exec"), {})
            continue
        assert words[:3] == ["python", "-m", "dllm_var"]
        lines = re.findall(r"^> (.*)\n", shown, flags=re.MULTILINE)
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        assert main([*words[3:], *(SHORTER if words[3] == "fit" else [])]) == 0, command
        out = capfd.readouterr().out
        ran.append(words[3])
        if words[3] in EXACT:
            assert out == shown
        if words[3] == "chat":  # an answer to each line but /reset
            assert len(out.splitlines()) >= len(lines) - 1 > 0
        if words[3] == "fit":
            [tried] = [line for line in out.splitlines() if line.startswith("try ")]
            assert main(shlex.split(tried)[4:]) == 0
            assert " -> " in capfd.readouterr().out
    assert ran == ["tokenizer", "inspect", "fit", "generate", "chat"]
