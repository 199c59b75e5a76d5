"""Many clients at once: does the server answer all of them as `generate` would, and as fast?

    python benchmarks/serve_load.py --output benchmarks/results/serve_load.json   # some minutes
    python benchmarks/serve_load.py --requests 60 --clients 16 --rounds 1         # seconds

A server is started as a process. First come requests of all kinds: whole and streamed, drawn and not, with stop strings
and limits, some cut off by their clients, some malformed. Every answer must be that of its prompt alone. Then plain
requests and `generate` in this process decode the same prompts in turn, both with one thread of torch unless
OMP_NUM_THREADS says otherwise.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import asyncio
import json
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import httpx
import psutil
import torch

from dllm_var.checkpoints.pretrained import load_checkpoint
from dllm_var.datamodules import CmudictSource, GsmSymbolicSource
from dllm_var.sampling.base import Sampler, sampler_from_config

TASKS = {"cmudict": CmudictSource, "gsm_symbolic": GsmSymbolicSource}
SETTINGS: list[dict[str, Any]] = [{}, {}, {"max_tokens": 4}, {"stop": "N"}]
SETTINGS += [{"temperature": 1.2, "seed": seed} for seed in (1, 2)]
MALFORMED = [b"", b"{", b'{"model": "load"}', b'{"model": "load", "prompt": ""}', b"\xff\xfe", b"[" * 9_999]
MALFORMED += [b'{"model": "load", "prompt": "cat", "max_tokens": 99999}']  # longer than the server takes
KINDS = {"whole": 5, "stream": 5, "leaves a stream": 2, "leaves": 1, "malformed": 2}  # how many of fifteen


@contextmanager
def serving(checkpoint: str, rows: int, tokens: int) -> Iterator[tuple[str, psutil.Process]]:
    """Starts a server; yields its address and its process, and ends it as a signal does."""
    command = [sys.executable, "-m", "dllm_var", "serve", "--checkpoint", checkpoint, "--port", "0", "--name", "load"]
    command += ["--batch-size", str(rows), "--max-queue", "4096", "--max-tokens", str(tokens)]
    with tempfile.NamedTemporaryFile("w") as log:  # a pipe would be full after some hundred lines
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            found = None
            while found is None:
                time.sleep(0.1)
                found = re.search(r"serving .* (http://\S+)/v1", Path(log.name).read_text())
                assert process.poll() is None, Path(log.name).read_text()
            yield found[1], psutil.Process(process.pid)
        finally:
            process.terminate()
            assert process.wait(60) == 0, "the server did not end well"


def figure(url: str, name: str) -> float:
    """Returns one of the server's metrics."""
    [value] = re.findall(rf"^dllm_var_{name} (\S+)$", httpx.get(url + "/metrics").text, re.MULTILINE)
    return float(value)


class Load:
    """Requests of many clients, and what became of them."""

    def __init__(self, url: str, sampler: Sampler, model: Any, tokenizer: Any, prompts: list[str]) -> None:
        self.url, self.sampler, self.model, self.tokenizer, self.prompts = url, sampler, model, tokenizer, prompts
        self.alone: dict[str, tuple[Any, ...]] = {}
        self.became: Counter[str] = Counter()
        self.first_text: list[float] = []

    def wishes(self, number: int) -> dict[str, Any]:
        return {"prompt": self.prompts[number % len(self.prompts)], **SETTINGS[number % len(SETTINGS)]}

    def expected(self, wishes: dict[str, Any]) -> tuple[Any, ...]:
        """Returns the answer to a prompt by itself: its text, why it ended, its tokens and forwards."""
        key = json.dumps(wishes)
        if key not in self.alone:
            drawn = {name: wishes[name] for name in ("temperature", "seed") if name in wishes}
            limits = {"max_new_tokens": wishes.get("max_tokens"), "stop": wishes.get("stop", ())}
            sampler = replace(self.sampler, **drawn)  # type: ignore[type-var]
            [answer] = sampler.generate(self.model, [wishes["prompt"]], tokenizer=self.tokenizer, **limits)
            reason = "length" if answer.finish_reason == "length" else "stop"
            self.alone[key] = (answer.text, reason, answer.new_tokens, answer.nfe)
        return self.alone[key]

    async def any_kinds(self, number: int, clients: int, on: Callable[[int], None]) -> None:
        """Sends requests of all kinds, each client one after the other; calls `on` with the number of each."""
        todo = iter(range(number))

        async def client(http: httpx.AsyncClient) -> None:
            for index in todo:
                await self.any_kind(http, index)
                on(index)

        async with httpx.AsyncClient(base_url=self.url, timeout=600, limits=httpx.Limits(max_connections=None)) as http:
            await asyncio.gather(*(client(http) for _ in range(clients)))

    async def any_kind(self, http: httpx.AsyncClient, number: int) -> None:
        """Sends one request, checks its answer, and counts what became of it."""
        chance = random.Random(number)
        [kind] = chance.choices([*KINDS], [*KINDS.values()])
        wishes = self.wishes(number)
        body = {"model": "load", **wishes}
        if kind == "malformed":
            content = chance.choice(MALFORMED)
            reply = await http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
            assert reply.status_code == 400 and reply.json()["error"]["message"], reply.text
        elif kind == "whole":
            reply = (await http.post("/v1/completions", json=body)).json()
            [choice], usage = reply["choices"], reply["usage"]
            said = choice["text"], choice["finish_reason"], usage["completion_tokens"], usage["forwards"]
            assert said == self.expected(wishes), (wishes, said)
        elif kind == "leaves":
            try:
                await asyncio.wait_for(http.post("/v1/completions", json=body), chance.uniform(0.001, 0.3))
                kind = "did not leave in time"
            except asyncio.TimeoutError:
                pass
        else:
            await self.stream(http, wishes, leaves=kind != "stream")
        self.became[kind] += 1

    async def stream(self, http: httpx.AsyncClient, wishes: dict[str, Any], leaves: bool) -> None:
        body = {"model": "load", **wishes, "stream": True, "stream_options": {"include_usage": True}}
        text, reason, usage, began = "", None, {}, time.perf_counter()
        async with http.stream("POST", "/v1/completions", json=body) as reply:
            async for line in reply.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                if not text and reason is None:
                    self.first_text.append(time.perf_counter() - began)
                if leaves:
                    return
                event = json.loads(line.removeprefix("data: "))
                usage = event.get("usage") or usage
                for choice in event["choices"]:
                    text, reason = text + choice["text"], choice["finish_reason"]
        said = text, reason, usage["completion_tokens"], usage["forwards"]
        assert said == self.expected(wishes), (wishes, said)

    async def plain(self, clients: int) -> float:
        """Sends each prompt once, over bare connections: httpx would take as long as the model; returns the seconds."""
        todo, host = iter(self.prompts), self.url.removeprefix("http://")

        async def client() -> None:
            reader, writer = await asyncio.open_connection(*host.split(":"))
            for prompt in todo:
                body = json.dumps({"model": "load", "prompt": prompt})
                head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
                writer.write(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
                headers = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = int(headers.partition(b"content-length: ")[2].split()[0])
                reply = json.loads(await reader.readexactly(length))
                assert reply["choices"][0]["text"] == self.expected({"prompt": prompt})[0]
            writer.close()

        began = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        return time.perf_counter() - began


def measure(task: str, requests: int, clients: int, rows: int, rounds: int) -> dict[str, Any]:
    """Returns the figures of all requests; raises AssertionError when an answer is lost or not its own."""
    checkpoint = f"checkpoints/{task}"
    model, tokenizer, meta = load_checkpoint(checkpoint)
    sampler = replace(sampler_from_config(meta["sampler"]), batch_size=rows)  # type: ignore[type-var]
    prompts = [record["prompt"] for record in islice(TASKS[task]().records("test"), requests)]
    tokens = max(map(len, tokenizer.encode_batch(prompts))) + sampler.max_new_tokens
    memory: dict[int, float] = {}
    with serving(checkpoint, rows, tokens) as (url, process):
        load = Load(url, sampler, model, tokenizer, prompts)
        for number in range(requests):
            load.expected(load.wishes(number))
            load.expected({"prompt": prompts[number % len(prompts)]})

        def megabytes() -> float:
            return process.memory_info().rss / 1e6

        asyncio.run(load.any_kinds(requests, clients, lambda done: memory.update({done + 1: megabytes()})))
        assert sum(load.became.values()) == requests
        while figure(url, "rows") or figure(url, "queue_length"):
            time.sleep(0.01)
        pairs = []
        for _ in range(rounds):
            before = sum(process.cpu_times()[:2])
            server = asyncio.run(load.plain(clients))
            server_cpu = sum(process.cpu_times()[:2]) - before
            began, before = time.perf_counter(), time.process_time()
            answers = sampler.generate(model, prompts, tokenizer=tokenizer)
            alone, alone_cpu = time.perf_counter() - began, time.process_time() - before
            tokens = sum(answer.new_tokens for answer in answers)
            pairs.append((tokens / server, tokens / alone, server_cpu, alone_cpu))
            print(f"server {tokens / server:,.0f} tokens/s, generate {tokens / alone:,.0f}", file=sys.stderr)
        end = megabytes()
        left = figure(url, "disconnected_total")
    served, generated, *cpu = (median(column) for column in zip(*pairs, strict=True))
    first = load.first_text
    return {
        "command": " ".join(["python", *sys.argv]),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}",
        "threads": torch.get_num_threads(),
        "checkpoint": checkpoint,
        "requests": requests,
        "clients": clients,
        "rows": rows,
        "rounds": rounds,
        "what_became_of_them": dict(load.became),
        "seconds_to_first_text": {"median": median(first), "p95": quantiles(first, n=20)[-1]},
        "server_megabytes": {
            "after a third": memory[max(number for number in memory if number <= requests // 3)],
            "after all": memory[max(memory)],
            f"after {rounds} further rounds": end,
        },
        "tokens_per_second": {"server": served, "generate": generated},
        "share_of_generate": median(one / other for one, other, *_ in pairs),
        "cpu_seconds": {"server": cpu[0], "generate": cpu[1]},
        "pairs_of_tokens_per_second": [pair[:2] for pair in pairs],
        "clients_that_the_server_saw_leave": left,
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="cmudict", help="gsm_symbolic has longer answers")
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--rows", type=int, default=32, help="answers decoded at a time, also by `generate`")
    parser.add_argument("--rounds", type=int, default=9, help="pairs of server and `generate`")
    parser.add_argument("--output", type=Path, help="JSON file to write; it keeps what it has of the other task")
    options = parser.parse_args(arguments)
    found = measure(options.task, options.requests, options.clients, options.rows, options.rounds)
    print(json.dumps({name: value for name, value in found.items() if not name.startswith("pairs")}, indent=2))
    if options.output is not None:
        known = json.loads(options.output.read_text()) if options.output.exists() else {}
        options.output.write_text(json.dumps({**known, options.task: found}, indent=2) + "\n")
    return found


if __name__ == "__main__":
    main()
