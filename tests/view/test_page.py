"""The page of replays: what it shows is what was generated, and no text of anyone becomes markup or script."""

import base64
import hashlib
import html
import json
import re
from pathlib import Path

import pytest

from dllm_var.__main__ import main
from dllm_var.sampling import Generation
from dllm_var.sampling.recording import replay_of
from dllm_var.text.tokenizer import Tokenizer
from dllm_var.view import page

CHECKPOINT = str(Path(__file__).parent.parent.parent / "checkpoints" / "cmudict")
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)> <!-- & \u2028 \ud800 ${x} $title"


def data_of(document):
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', document, re.DOTALL)[1])


def answer(**changes):
    return Generation(**{**dict(tokens=[5, 6], finish_reason="eos", nfe=2, seconds=0.5, prompt_length=1), **changes})


def test_text_stays_text():
    shown = {**replay_of(answer(commit_steps=[1, 2]), HOSTILE, HOSTILE), "text": HOSTILE}
    shown["steps"][0]["changes"] = [(0, HOSTILE, 1.0)]
    document = page([shown], {"model": HOSTILE, "samplers": [HOSTILE], "chat": False}, title=HOSTILE)
    assert document.count("<script") == 2 and document.count("</script") == 2 and "<img" not in document
    data = data_of(document)
    assert data["live"]["model"] == data["replays"][0]["prompt"] == HOSTILE
    assert data["replays"][0]["steps"][0]["changes"][0][1] == HOSTILE
    assert html.unescape(re.search("<title>(.*?)</title>", document, re.DOTALL)[1]) == HOSTILE
    framed = answer(commit_steps=[1, 2])._repr_html_()
    assert re.fullmatch(r'<iframe srcdoc="[^"<>]*" height="\d+" style="[^"]*"></iframe>', framed)


def test_the_page_runs_its_own_script_alone_and_loads_nothing():
    document = page([])
    for tag, rule in (("style", "style-src"), ("script", "script-src")):
        [text] = re.findall(f"<{tag}>(.*?)</{tag}>", document, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{rule} 'sha256-{digest}'" in document
    assert "default-src 'none'" in document and "connect-src" not in document
    assert "connect-src 'self'" in page([], {"model": "tiny", "samplers": [], "chat": False})
    assert not re.search(r"https?:|\bsrc=|\bhref=|@import|url\(|innerHTML|\beval\b|\son\w+=", document)


def test_a_generation_shows_itself_in_a_notebook():
    tokenizer = Tokenizer.from_pretrained(CHECKPOINT)
    tokens = [51, 36, 61]
    shown = answer(tokens=tokens, commit_steps=[2, 1, 1], prompt=tokenizer.encode("cat"), tokenizer=tokenizer)
    [replay] = data_of(html.unescape(re.search('srcdoc="(.*?)"', shown._repr_html_(), re.DOTALL)[1]))["replays"]
    assert replay["prompt"] == tokenizer.decode(tokenizer.encode("cat"))
    assert replay["steps"] == [
        {"forward": 1, "length": 3, "starts": [], "changes": [[1, "AY", None], [2, "T", None]]},
        {"forward": 2, "length": 3, "starts": [], "changes": [[0, "L", None]]},
    ]
    [bare] = data_of(html.unescape(answer(commit_steps=[1, 1])._repr_html_()))["replays"]
    assert [change[1] for change in bare["steps"][0]["changes"]] == ["5", "6"], "without a tokenizer: token ids"
    [plain] = data_of(html.unescape(answer(text="K AE")._repr_html_()))["replays"]
    assert (plain["steps"], plain["given"], plain["text"]) == ([], [[0, "5"], [1, "6"]], "K AE"), "no steps are known"


def test_generate_writes_the_page(tmp_path, capsys):
    file = tmp_path / "replay.html"
    command = ["generate", "--checkpoint", CHECKPOINT, "--prompt=keyboard", "--prompt=lightning", "--json"]
    assert main([*command, "--replay", str(file)]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    replays = data_of(file.read_text(encoding="utf-8"))["replays"]
    assert [replay["prompt"] for replay in replays] == ["keyboard", "lightning"]
    for replay, line in zip(replays, answers, strict=True):
        cells = {}
        for step in replay["steps"]:
            cells |= {place: (text, step["forward"]) for place, text, chance in step["changes"] if 0 < chance <= 1}
        assert " ".join(cells[place][0] for place in sorted(cells)) == line["text"] == replay["text"]
        assert [cells[place][1] for place in sorted(cells)] == line["commit_steps"]
        assert (replay["forwards"], replay["tokens"], replay["finish"]) == (line["nfe"], len(line["tokens"]), "eos")
        assert replay["label"] == "BlockDiffusionSampler, ConfidenceThreshold"


@pytest.mark.parametrize(("name", "message"), [("page.txt", "must end in .html"), ("no/folder/x.html", "No such file")])
def test_a_page_that_cannot_be_written_is_told_first(name, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "--checkpoint", CHECKPOINT, "--prompt=cat", "--replay", name]) == 2
    assert message in capsys.readouterr().err
