"""The errors of docs/troubleshooting.md are those that its commands print."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from dllm_var.__main__ import main

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
SHOWN = re.findall(r"^\$ python -m dllm_var (.*)\n((?:error|warning): .*)\n", PAGE, flags=re.MULTILINE)


@pytest.mark.parametrize(("command", "line"), SHOWN, ids=[line[:40] for _, line in SHOWN])
def test_a_mistake_prints_what_the_page_shows(
    command: str, line: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("configs", "checkpoints"):
        Path(folder).symlink_to(ROOT / folder)
    Path("runs").mkdir()
    Path("typo.jsonl").write_text('{"prompt": "a", "respons": "b"}\n')
    sums = ({"prompt": f"What is {n} plus 1?", "response": f"It is {n + 1}."} for n in range(300))
    Path("sums.jsonl").write_text("".join(json.dumps(record) + "\n" for record in sums))
    Path("plain").mkdir()
    Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>")).save("plain/tokenizer.json")
    assert main(shlex.split(command)) == (2 if line.startswith("error") else 0)
    assert line in capsys.readouterr().err.splitlines()


def test_the_page_shows_several_mistakes() -> None:
    assert len(SHOWN) >= 8
