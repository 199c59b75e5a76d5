"""What docs/generate.md shows is run, not read."""

import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dllm_var.__main__ import main
from dllm_var.cli.generate import EXAMPLES, build_parser

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "generate.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^\$ (.*)\n((?:(?!\$ |```).*\n)*)", PAGE, flags=re.MULTILINE)


def output_of(command, monkeypatch, capsys):
    """Runs a line of the page, which may begin with a printf to standard input."""
    before, pipe, command = command.rpartition(" | ")
    if pipe:
        text = subprocess.run(["bash", "-c", before], capture_output=True, text=True, check=True).stdout
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "dllm_var"]
    assert main(words[3:]) == 0
    return capsys.readouterr().out


def without_times(text):
    return re.sub(r'"seconds": [\d.]+', '"seconds": 0', text)


def test_the_page_has_commands():
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize(("command", "shown"), COMMANDS, ids=range(len(COMMANDS)))
def test_a_command_prints_what_the_page_shows(command, shown, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert without_times(output_of(command, monkeypatch, capsys)) == without_times(shown)


@pytest.mark.parametrize(
    ("code", "shown"), re.findall(r"```python\n(.*?)```(?:\n\n```\n(.*?)```)?", PAGE, flags=re.DOTALL), ids=range(2)
)
def test_the_python_examples_print_what_they_say(code, shown, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    exec(compile(code, "docs/generate.md", "exec"), {})
    assert capsys.readouterr().out.strip() == (shown.strip() or code.strip().rpartition("# ")[2])


def test_the_examples_of_help_run(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    (tmp_path / "words.txt").write_text("cat\ndog\n")
    commands = re.findall(r"^  ((?:echo|python) .*)", EXAMPLES, flags=re.MULTILINE)
    assert len(commands) == 5
    for command in commands:
        output_of(command, monkeypatch, capsys)
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 2


def test_options_of_the_page_exist():
    known = build_parser("generate", None).format_help()
    for option in re.findall(r"`(--[a-z-]+)", PAGE):
        assert option in known or option == "--help", option
