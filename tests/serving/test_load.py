"""Hundreds of requests at a time, some of which leave early or cannot be read: none is lost, and none is mixed up."""

import json
import random
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import pytest
from servers import running, wait_until

CLIENTS, REQUESTS = 48, 400
WORDS = ["lightning", "recommendations", "keyboard", "cat", "diffusion", "silver", "planet", "orange", "imagination"]
SETTINGS = [{}, {"max_tokens": 4}, {"max_tokens": 9}, {"stop": "N"}]
SETTINGS += [{"temperature": 1.2, "seed": seed} for seed in (1, 2, 3)]
MALFORMED = [b"", b"{", b'{"model": "tiny"}', b'{"model": "tiny", "prompt": "CAT"}', b"\xff\xfe", b"[" * 9_999]


@pytest.mark.slow
def test_no_answer_is_lost_or_mixed_up_under_load(words):
    model, tokenizer, sampler = words
    expected = {}
    for wishes in SETTINGS:
        drawn = replace(sampler, temperature=wishes.get("temperature", 0.0), seed=wishes.get("seed", 0))
        for word in WORDS:
            limits = dict(max_new_tokens=wishes.get("max_tokens"), stop=wishes.get("stop", []))
            [answer] = drawn.generate(model, [word], tokenizer=tokenizer, **limits)
            reason = "length" if answer.finish_reason == "length" else "stop"
            expected[word, json.dumps(wishes)] = (answer.text, reason, answer.new_tokens, answer.nfe)

    local = threading.local()

    def one(number, server):
        """Sends one request and returns what became of it."""
        chance = random.Random(number)
        if not hasattr(local, "http"):
            local.http = httpx.Client(timeout=120, verify=False)
        http, url = local.http, server.url + "/v1/completions"
        kind = chance.choice(["whole", "whole", "stream", "stream", "leaves", "leaves early", "malformed"])
        if kind == "malformed":
            reply = http.post(url, content=chance.choice(MALFORMED), headers={"content-type": "application/json"})
            assert reply.status_code == 400 and reply.json()["error"]["message"], reply.text
            return kind
        word, wishes = chance.choice(WORDS), chance.choice(SETTINGS)
        wanted = expected[word, json.dumps(wishes)]
        body = {"model": "tiny", "prompt": word, **wishes}
        if kind == "whole":
            reply = http.post(url, json=body).json()
            [choice], usage = reply["choices"], reply["usage"]
            said = (choice["text"], choice["finish_reason"], usage["completion_tokens"], usage["forwards"])
        elif kind == "leaves early":
            try:
                http.post(url, json={**body, "n": 2}, timeout=chance.uniform(0.001, 0.3))
            except httpx.TimeoutException:
                return kind
            return "in time"
        else:
            text, reason, usage = "", None, {}
            body |= {"stream": True, "stream_options": {"include_usage": True}}
            with http.stream("POST", url, json=body) as reply:
                for line in reply.iter_lines():
                    if kind == "leaves":
                        return kind
                    if line.startswith("data: {"):
                        event = json.loads(line.removeprefix("data: "))
                        usage = event.get("usage") or usage
                        for choice in event["choices"]:
                            text, reason = text + choice["text"], choice["finish_reason"]
            said = (text, reason, usage["completion_tokens"], usage["forwards"])
        assert said == wanted, (word, wishes)
        return kind

    rows = replace(sampler, batch_size=8)
    with running(model, tokenizer, rows, max_queue=REQUESTS, max_engines=2) as server:
        with ThreadPoolExecutor(CLIENTS) as pool:
            kinds = Counter(pool.map(lambda number: one(number, server), range(REQUESTS)))
        wait_until(lambda: not server.decoder.engines and not server.decoder.queue)
    assert sum(kinds.values()) == REQUESTS
    assert min(kinds[kind] for kind in ("whole", "stream", "leaves", "malformed")) > 20
