"""The page at the server's root, and what it asks for beyond OpenAI's API: a sampler by its name, and every step."""

import json
import re

import pytest
from servers import running

from dllm_var.cli.serve import others_for
from dllm_var.sampling import BlockDiffusionSampler, FixedLengthSampler, WinoSampler
from dllm_var.text.tokenizer import SpecialTokens, Tokenizer
from tests.sampling.tiny_models import BACKEND, ENDS, MASK, random_model

PROMPT = "recommendations"
OTHERS = {"wino": WinoSampler(threshold=0.6, block_length=8, max_new_tokens=48)}


@pytest.fixture(scope="module")
def server(words):
    with running(*words, others=OTHERS) as server:
        yield server


def post(server, **wishes):
    return server.http.post(f"{server.url}/v1/completions", json={"model": "tiny", "prompt": PROMPT, **wishes})


def events(server, **wishes):
    return choices(post(server, stream=True, **wishes))


def choices(reply):
    """Returns the choices of a stream's events."""
    *lines, last = [line for line in reply.text.split("\n\n") if line]
    assert last == "data: [DONE]"
    return [choice for line in lines for choice in json.loads(line.removeprefix("data: "))["choices"]]


@pytest.mark.parametrize("name", ["default", "wino"])
def test_a_stream_of_steps_ends_with_the_answer_of_the_named_sampler(name, server, words):
    model, tokenizer, own = words
    [answer] = {"default": own, **OTHERS}[name].generate(model, [PROMPT], tokenizer=tokenizer, record=True)
    said = events(server, steps=True, sampler=name)
    steps = [choice["step"] for choice in said if "step" in choice]
    assert steps == [json.loads(json.dumps(step.as_json(tokenizer))) for step in answer.steps]
    assert "".join(choice["text"] for choice in said) == answer.text
    [took] = [choice["took"] for choice in said if "took" in choice]
    assert (took["forwards"], took["tokens"], took["finish"]) == (answer.nfe, answer.new_tokens, "eos")
    plain = events(server, sampler=name)
    assert not any("step" in choice or "took" in choice for choice in plain), "nobody asked for them"
    assert "".join(choice["text"] for choice in plain) == answer.text


def test_a_chat_is_asked_as_one():
    template = "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}w7{% endif %}"
    tokenizer, model = Tokenizer(BACKEND, SpecialTokens(MASK, ENDS, 0), template), random_model()
    sampler = BlockDiffusionSampler(block_length=4, max_new_tokens=12)
    [answer] = sampler.generate(model, [tokenizer.encode("w5 w6 w7")], tokenizer=tokenizer, record=True)
    with running(model, tokenizer, sampler, chat=True) as server:
        assert live_of(server)["chat"] is True
        body = {"model": "tiny", "messages": [{"role": "user", "content": "w5 w6"}], "stream": True, "steps": True}
        said = choices(server.http.post(f"{server.url}/v1/chat/completions", json=body))
    assert [choice["step"]["forward"] for choice in said if "step" in choice] == [one.forward for one in answer.steps]
    assert "".join(choice["delta"].get("content", "") for choice in said) == answer.text != ""


def live_of(server):
    reply = server.http.get(server.url)
    assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/html")
    return json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', reply.text)[1])["live"]


def test_wishes_that_cannot_be_had(server):
    for wishes, message in [
        ({"sampler": "other"}, "there is no sampler 'other'; there are default, wino"),
        ({"steps": True}, "'steps' goes with 'stream'"),
    ]:
        reply = post(server, **wishes)
        assert reply.status_code == 400 and message in reply.json()["error"]["message"]


@pytest.mark.parametrize("key", [None, "secret"])
def test_the_page_needs_no_key_and_says_whether_requests_do(key, words):
    with running(*words, key=key, others=OTHERS) as server:
        live = live_of(server)
        assert live["locked"] == (key is not None) and "secret" not in server.http.get(server.url).text
        assert live["samplers"] == {
            "default": "BlockDiffusionSampler, ConfidenceThreshold",
            "wino": "WinoSampler, RevokableThreshold",
        }
        assert post(server).status_code == (200 if key is None else 401)


def test_overlays_that_suit_the_model_keep_the_limits_of_the_server(words):
    found = others_for(words[2], words[0])
    assert {"wino", "fixed_length", "sequential"} <= set(found)
    assert not {"autoregressive", "strided", "guided", "diffuspec"} & set(found), "they need another model, or two"
    assert {sampler.batch_size for sampler in found.values()} == {words[2].batch_size}
    assert {sampler.max_new_tokens for sampler in found.values()} == {words[2].max_new_tokens}
    assert isinstance(found["fixed_length"], FixedLengthSampler)
    assert not {"wino", "freedave"} & set(others_for(words[2], random_model(token_shift=True)))
    causal = others_for(words[2], random_model(causal=True))
    assert "autoregressive" in causal and "wino" not in causal
