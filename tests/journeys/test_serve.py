"""docs/serve.md as someone with an application would follow it: a server, what the page asks it, a chat, the end."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai
import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8000"
PYTHON, PRINTED = re.search(r"```python\n(.*?)```\n\n```\n(.*?)```", PAGE, re.DOTALL).groups()
CURLS = re.findall(r"^\$ (curl .* -d .*)\n(.*)\n", PAGE, flags=re.MULTILINE)
SECRET = "abracadabra"


def asked(command, url):
    """Sends what a line with curl sends, and returns the reply without what differs from time to time."""
    words = shlex.split(command)
    [address] = [word for word in words if word.startswith(ADDRESS)]
    headers = dict([words[words.index("-H") + 1].split(": ")])
    reply = httpx.post(address.replace(ADDRESS, url), content=words[words.index("-d") + 1], headers=headers).json()
    return {name: value for name, value in reply.items() if name not in ("id", "created")}


@pytest.mark.slow
def test_a_server_and_what_is_asked_of_it(tmp_path, capsys):
    checkpoint = tmp_path / "cmudict"
    shutil.copytree(ROOT / "checkpoints" / "cmudict", checkpoint)
    (checkpoint / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    [line] = re.findall(r"^python -m dllm_var (serve --checkpoint .*)$", PAGE, flags=re.MULTILINE)
    words = [str(checkpoint) if word == "checkpoints/cmudict" else word for word in line.split()]
    log = tmp_path / "log"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with open(log, "w") as file:
        command = [sys.executable, "-m", "dllm_var", *words, "--port", "0"]
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    try:
        while (found := re.search(r"^serving cmudict at (\S+)/v1: BlockDiffusionSampler", log.read_text())) is None:
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        url = found[1]
        assert httpx.get(url + "/health").json() == {"status": "ok"}

        exec(compile(PYTHON.replace(ADDRESS, url), "docs/serve.md", "exec"), {})
        assert capsys.readouterr().out == PRINTED
        assert len(CURLS) > 1
        for curl, shown in CURLS:
            expected = {name: value for name, value in json.loads(shown).items() if name not in ("id", "created")}
            assert asked(curl, url) == expected

        client = openai.OpenAI(base_url=url + "/v1", api_key="none")
        chat = dict(model=client.models.list().data[0].id, messages=[{"role": "user", "content": SECRET}])
        whole = client.chat.completions.create(**chat).choices[0].message.content
        chunks = client.chat.completions.create(**chat, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
        assert whole == client.completions.create(model="cmudict", prompt=SECRET).choices[0].text

        page = httpx.get(url + "/")
        assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
        metrics = httpx.get(url + "/metrics").text
        assert 'dllm_var_requests_total{path="/v1/chat/completions",status="200"} 2.0' in metrics
        assert 'dllm_var_requests_total{path="/v1/completions",status="200"} 4.0' in metrics, "three are the page's"

        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
    written = log.read_text()
    assert "POST /v1/chat/completions" in written and SECRET not in written and "Traceback" not in written
