"""The server as its clients meet it: the official `openai` client, and bare HTTP where it sends what that cannot."""

import json
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection

import httpx
import openai
import pytest
from servers import Turnstile, running, wait_until

from dllm_var.sampling import BlockDiffusionSampler, FixedLengthSampler, policies
from dllm_var.text.tokenizer import SpecialTokens, Tokenizer
from tests.sampling.tiny_models import BACKEND, ENDS, MASK, TOKENIZER, lookup_model, random_model

WORDS = ["lightning", "recommendations", "keyboard", "cat", "diffusion"]
TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}w7{% endif %}"
CHATTING = Tokenizer(BACKEND, SpecialTokens(MASK, ENDS, 0), TEMPLATE)
SLOW_BLOCKS = BlockDiffusionSampler(policies.Sequential(), block_length=4, max_new_tokens=12, batch_size=4)


def generate(words, prompts, settings=(), **wishes):
    model, tokenizer, sampler = words
    sampler = type(sampler)(**{**vars(sampler), **dict(settings)})
    return sampler.generate(model, prompts, tokenizer=tokenizer, **wishes)


def joined(stream):
    """Returns the text, the last reason and the usage of each choice of a stream."""
    texts, reasons, usage = {}, {}, None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text = choice.delta.content if hasattr(choice, "delta") else choice.text
            texts[choice.index] = texts.get(choice.index, "") + (text or "")
            reasons[choice.index] = choice.finish_reason
    return [texts[index] for index in sorted(texts)], [reasons[index] for index in sorted(reasons)], usage


def post(server, content, path="/v1/completions", **headers):
    headers = {"content-type": "application/json", **headers}
    return server.http.post(server.url + path, content=content, headers=headers)


# -- answers -----------------------------------------------------------------------------------------------------------


def test_answers_are_those_of_generate(words, client):
    answers = generate(words, WORDS)
    reply = client.completions.create(model="tiny", prompt=WORDS)
    assert [choice.text for choice in reply.choices] == [answer.text for answer in answers]
    assert {choice.finish_reason for choice in reply.choices} == {"stop"}
    assert reply.usage.prompt_tokens == sum(map(len, WORDS))
    assert reply.usage.completion_tokens == sum(answer.new_tokens for answer in answers)
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply.usage.forwards == sum(answer.nfe for answer in answers)
    ids = [words[1].encode(word) for word in WORDS[:2]]
    assert [c.text for c in client.completions.create(model="tiny", prompt=ids).choices] == [
        answer.text for answer in answers[:2]
    ]


@pytest.mark.parametrize(
    "wishes", [{}, {"max_tokens": 5}, {"stop": ["N IH", "Z"]}, {"stop": "D EY"}], ids=lambda wishes: str(wishes)
)
def test_streams_are_the_same_text(wishes, words, client):
    prompts = WORDS[:2]
    reply = client.completions.create(model="tiny", prompt=prompts, **wishes)
    options = {"include_usage": True}
    stream = client.completions.create(model="tiny", prompt=prompts, stream=True, stream_options=options, **wishes)
    texts, reasons, usage = joined(stream)
    assert texts == [choice.text for choice in reply.choices]
    assert reasons == [choice.finish_reason for choice in reply.choices]
    assert usage == reply.usage
    limits = {"max_new_tokens": wishes.get("max_tokens"), "stop": wishes.get("stop", [])}
    answers = generate(words, prompts, **limits)
    assert texts == [answer.text for answer in answers]
    assert reasons == ["length" if answer.finish_reason == "length" else "stop" for answer in answers]


def test_text_comes_block_by_block(client):
    stream = client.completions.create(model="tiny", prompt="recommendations", stream=True)
    pieces = [chunk.choices[0].text for chunk in stream]
    assert len([piece for piece in pieces if piece]) == 2, "the answer has two blocks"


def test_several_choices_and_seeds(words, client):
    drawn = dict(temperature=1.5, top_p=0.9, seed=3)
    reply = client.completions.create(model="tiny", prompt="live", n=3, **drawn)
    expected = generate(words, ["live"] * 3, drawn)
    assert [choice.text for choice in reply.choices] == [answer.text for answer in expected]
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert reply.usage.prompt_tokens == 4, "the prompt counts once"


def test_without_a_seed_each_request_draws_anew(client):
    ask = dict(model="tiny", prompt="recommendations", temperature=3.0, max_tokens=10)
    assert len({client.completions.create(**ask).choices[0].text for _ in range(2)}) > 1


def test_chat(words, client):
    model = random_model(3)
    messages = [
        {"role": "developer", "content": "w5 w6"},
        {"role": "user", "content": [{"type": "text", "text": "w9"}]},
    ]
    with running(model, CHATTING, SLOW_BLOCKS) as server:
        chat = server.client()
        reply = chat.chat.completions.create(model="tiny", messages=messages, max_completion_tokens=9)
        stream = chat.chat.completions.create(model="tiny", messages=messages, max_completion_tokens=9, stream=True)
        texts, reasons, _ = joined(stream)
        with pytest.raises(openai.BadRequestError, match="the last message is the assistant's"):
            chat.chat.completions.create(model="tiny", messages=[{"role": "assistant", "content": "w5"}])
        image = {"type": "image_url", "image_url": {"url": "data:,"}}
        with pytest.raises(openai.BadRequestError, match="text alone"):
            chat.chat.completions.create(model="tiny", messages=[{"role": "user", "content": [image]}])
    [expected] = SLOW_BLOCKS.generate(model, [[5, 6, 9, 7]], tokenizer=CHATTING, max_new_tokens=9)
    [choice] = reply.choices
    assert choice.message.role == "assistant"
    assert texts == [choice.message.content] == [expected.text]
    assert reasons == [choice.finish_reason] == ["length" if expected.finish_reason == "length" else "stop"]
    with pytest.raises(openai.BadRequestError, match="no chat template: use /v1/completions"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "cat"}])


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


# -- mistakes ----------------------------------------------------------------------------------------------------------


MISTAKES = {
    "{": "not valid JSON",
    "[1]": "Input should be an object",
    "[" * 50_000: "not valid JSON: recursion limit exceeded",
    '{"model": "tiny"}': "prompt: Field required",
    '{"model": "other", "prompt": "cat"}': "there is no model 'other'; there is 'tiny'",
    '{"model": "tiny", "prompt": ""}': "it is empty",
    '{"model": "tiny", "prompt": []}': "there is no prompt",
    '{"model": "tiny", "prompt": [[]]}': "is empty",
    '{"model": "tiny", "prompt": [99999]}': "outside the vocabulary",
    '{"model": "tiny", "prompt": [-1]}': "outside the vocabulary",
    '{"model": "tiny", "prompt": "CAT 1"}': "the checkpoint's vocabulary has nothing for",
    '{"model": "tiny", "prompt": "\\ud800"}': "valid",
    '{"model": "\\ud800", "prompt": "cat"}': "",
    '{"model": "tiny", "prompt": "cat", "temperature": NaN}': "temperature: Input should be a finite number",
    '{"model": "tiny", "prompt": "cat", "temperature": -1}': "temperature: Input should be greater than or equal to 0",
    '{"model": "tiny", "prompt": "cat", "max_tokens": "5"}': "max_tokens: Input should be a valid integer",
    '{"model": "tiny", "prompt": "cat", "max_tokens": 0}': "max_tokens: Input should be greater than or equal to 1",
    '{"model": "tiny", "prompt": "cat", "max_tokens": 254}': "the prompt has 3 tokens, and max_tokens is 254",
    '{"model": "tiny", "prompt": "%s"}' % ("a" * 256): "the prompt has 256 tokens: this server takes 256 together",
    '{"model": "tiny", "prompt": "cat", "top_p": 0}': "top_p: Input should be greater than 0",
    '{"model": "tiny", "prompt": "cat", "n": 65}': "one request may ask for at most 64 answers",
    '{"model": "tiny", "prompt": "cat", "seed": 1e30}': "seed: Input should be a valid integer",
    '{"model": "tiny", "prompt": "cat", "stop": [""]}': "'stop' takes at most 16 texts",
    '{"model": "tiny", "prompt": "cat", "logprobs": 2}': "logprobs: this server tells how likely an answer's own",
    '{"model": "tiny", "prompt": "cat", "echo": true}': "does not support 'echo': leave it out",
}


@pytest.mark.parametrize("content", MISTAKES, ids=lambda content: content[:60])
def test_a_mistake_is_told_in_one_line(content, server):
    reply = post(server, content)
    error = reply.json()["error"]
    assert reply.status_code == (404 if "no model" in error["message"] else 400)
    assert MISTAKES[content] in error["message"] and "\n" not in error["message"]
    assert error["type"] == "invalid_request_error" and set(error) == {"message", "type", "param", "code"}


def test_wishes_that_ask_for_nothing_are_ignored(client):
    neutral = dict(presence_penalty=0, frequency_penalty=0, logit_bias={}, best_of=1, user="me", echo=False)
    assert client.completions.create(model="tiny", prompt="cat", logprobs=None, **neutral).choices[0].text == "K AE T"


def test_other_refusals_have_the_same_form(server):
    assert "error" in httpx.get(server.url + "/nothing").json()
    assert httpx.get(server.url + "/v1/completions").status_code == 405
    large = post(server, json.dumps({"model": "tiny", "prompt": "a" * (1 << 20)}))
    assert large.status_code == 413 and large.json()["error"]["message"] == "the request is larger than 1,048,576 bytes"


def test_a_key_is_wanted_when_there_is_one(words):
    with running(*words, key="secret") as server:
        assert httpx.get(server.url + "/health").json() == {"status": "ok"}
        for key in ("wrong", "secre", "secret1"):
            with pytest.raises(openai.AuthenticationError, match="API key"):
                server.client(api_key=key).models.list()
        assert post(server, "{}").status_code == 401
        client = server.client(api_key="secret")
        assert client.completions.create(model="tiny", prompt="cat").choices[0].text == "K AE T"


# -- batches -----------------------------------------------------------------------------------------------------------


def tiny(**changes):
    """Returns a model that answers at length, behind a turnstile, and the tokenizer of its words."""
    model = lookup_model({}, otherwise=8, **changes)
    return model, Turnstile(model)


def ask(server, prompt, **wishes):
    return server.client().completions.create(model="tiny", prompt=prompt, **wishes)


def test_requests_join_a_running_batch():
    model, turnstile = tiny()
    with running(model, TOKENIZER, SLOW_BLOCKS) as server, ThreadPoolExecutor() as pool:
        first = pool.submit(ask, server, "w5 w6")
        turnstile.let(2)
        wait_until(lambda: len(turnstile.shapes) == 2)
        others = [pool.submit(ask, server, "w9", max_tokens=n) for n in (3, 12)]
        wait_until(lambda: server.in_flight() + len(server.decoder.queue) == 3)
        turnstile.open_up()
        texts = [future.result().choices[0].text for future in (first, *others)]
    assert texts == [" ".join(["w8"] * n) for n in (12, 3, 12)]
    rows = [rows for rows, _ in turnstile.shapes]
    assert rows[:2] == [1, 1] and max(rows) > 2 and len(rows) < 2 * 13, "they shared forwards"


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("sampler", [SLOW_BLOCKS, FixedLengthSampler(canvas_length=8)], ids=["blocks", "canvas"])
def test_a_client_that_goes_away_frees_its_row(streams, sampler):
    model, turnstile = tiny()
    with running(model, TOKENIZER, sampler) as server:
        body = json.dumps({"model": "tiny", "prompt": ["w5", "w6"], "stream": streams})
        connection = HTTPConnection(*server.address)
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        wait_until(lambda: server.in_flight() == 2)
        jobs = [job for engine in server.decoder.engines.values() for job in engine.request.jobs.values()]
        connection.close()
        wait_until(lambda: all(job.gone for job in jobs))
        turnstile.let(4)
        wait_until(lambda: not server.decoder.engines)
        assert len(turnstile.shapes) <= 4, "the answers were not decoded to their ends"
        wait_until(lambda: "dllm_var_disconnected_total 1.0" in server.http.get(server.url + "/metrics").text)
        turnstile.open_up()
        assert ask(server, "w5").choices[0].text.startswith("w8 w8")


def test_a_full_queue_is_told_and_passes():
    model, turnstile = tiny()
    sampler = BlockDiffusionSampler(policies.Sequential(), block_length=4, max_new_tokens=8, batch_size=1)
    with running(model, TOKENIZER, sampler, max_queue=1) as server, ThreadPoolExecutor() as pool:
        running_one = pool.submit(ask, server, "w5")
        wait_until(lambda: server.decoder.engines)
        waiting_one = pool.submit(ask, server, "w6")
        wait_until(lambda: server.decoder.queue)
        with pytest.raises(openai.RateLimitError, match="busy") as refused:
            ask(server, "w7")
        assert refused.value.response.headers["retry-after"] == "1"
        turnstile.open_up()
        for one in (running_one, waiting_one):
            assert one.result().choices[0].text == " ".join(["w8"] * 8)
        assert ask(server, "w7").choices[0].finish_reason == "length"


def test_requests_that_draw_differently_have_engines_in_turn():
    model, turnstile = tiny()
    with running(model, TOKENIZER, SLOW_BLOCKS, max_engines=2) as server, ThreadPoolExecutor() as pool:
        futures = []
        for seed in range(4):
            futures.append(pool.submit(ask, server, "w5", temperature=0.01, seed=seed))
            wait_until(lambda: len(server.decoder.engines) + len(server.decoder.queue) == len(futures))
        assert len(server.decoder.engines) <= 2
        late = pool.submit(ask, server, "w5", temperature=0.01, seed=0)
        wait_until(lambda: len(server.decoder.queue) >= 2)
        turnstile.open_up()
        assert {future.result().choices[0].text for future in (*futures, late)} == {" ".join(["w8"] * 12)}


def test_a_request_has_a_limit_of_time():
    model, turnstile = tiny()
    with running(model, TOKENIZER, SLOW_BLOCKS, timeout=0.5) as server:
        with pytest.raises(openai.InternalServerError, match=r"more than 0\.5 seconds") as late:
            ask(server, "w5")
        assert late.value.status_code == 504
        with pytest.raises(openai.APIError, match=r"more than 0\.5 seconds"):
            joined(ask(server, "w5", stream=True))
        turnstile.open_up()
        wait_until(lambda: not server.decoder.engines)


def test_shutting_down_finishes_what_runs():
    model, turnstile = tiny()
    with running(model, TOKENIZER, SLOW_BLOCKS) as server, ThreadPoolExecutor() as pool:
        futures = [pool.submit(ask, server, "w5"), pool.submit(lambda: joined(ask(server, "w6", stream=True)))]
        wait_until(lambda: server.in_flight() + len(server.decoder.queue) == 2)
        turnstile.let(2)
        wait_until(lambda: server.in_flight() == 2)
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        wait_until(server.refuses)
        turnstile.open_up()
        whole, (texts, *_) = (future.result() for future in futures)
        assert texts == [whole.choices[0].text] == [" ".join(["w8"] * 12)]
        stopping.join()


def test_a_failure_is_told_and_the_server_goes_on(caplog):
    model, turnstile = tiny()
    turnstile.open_up()
    original, broken = model.hidden_states, [True]

    def hidden_states(*arguments, **named):
        if broken:
            broken.clear()
            raise RuntimeError(f"what the prompt said: w{5}")
        return original(*arguments, **named)

    model.hidden_states = hidden_states
    with running(model, TOKENIZER, SLOW_BLOCKS) as server, caplog.at_level(logging.DEBUG):
        with pytest.raises(openai.InternalServerError, match="decoding failed; the server's log says where"):
            ask(server, "w5 w6")
        assert ask(server, "w5 w6").choices[0].text == " ".join(["w8"] * 12)
        head = model.lm_head.weight.clone()
        model.lm_head.weight.data.fill_(float("nan"))
        with pytest.raises(openai.InternalServerError, match="predictions are not numbers"):
            ask(server, "w5 w6")
        model.lm_head.weight.data.copy_(head)
        assert ask(server, "w5 w6").choices[0].text == " ".join(["w8"] * 12)
    assert "RuntimeError" in caplog.text and "hidden_states" in caplog.text
    assert "w5" not in "".join(record.getMessage() for record in caplog.records if record.name.startswith("dllm_var"))


def test_metrics_and_health(words):
    with running(*words) as server:
        ask(server, WORDS)
        joined(ask(server, "cat", stream=True))
        post(server, "{")
        lines = dict(
            line.rsplit(" ", 1) for line in httpx.get(server.url + "/metrics").text.splitlines() if "#" not in line
        )
        assert httpx.get(server.url + "/health").json() == {"status": "ok"}
    answers = generate(words, [*WORDS, "cat"])
    assert lines['dllm_var_requests_total{path="/v1/completions",status="200"}'] == "2.0"
    assert lines['dllm_var_requests_total{path="/v1/completions",status="400"}'] == "1.0"
    assert float(lines["dllm_var_tokens_total"]) == sum(answer.new_tokens for answer in answers)
    assert float(lines["dllm_var_forwards_total"]) == sum(answer.nfe for answer in answers)
    assert float(lines["dllm_var_prompt_tokens_total"]) == len("".join(WORDS) + "cat")
    assert lines["dllm_var_disconnected_total"] == "0.0"
    assert lines["dllm_var_latency_seconds_count"] == "2.0"
    assert lines["dllm_var_first_text_seconds_count"] == "1.0"
    assert lines["dllm_var_queue_length"] == lines["dllm_var_rows"] == "0.0"


def test_a_body_that_does_not_arrive_is_not_waited_for(words):
    with running(*words, timeout=0.5) as server:
        connection = HTTPConnection(*server.address)
        connection.putrequest("POST", "/v1/completions")
        for header in (("content-type", "application/json"), ("content-length", "99")):
            connection.putheader(*header)
        connection.endheaders(b'{"model": ')
        reply = connection.getresponse()
        assert reply.status == 408 and "took too long to arrive" in json.loads(reply.read())["error"]["message"]
        connection.close()


def test_what_is_not_json_is_refused(server):
    """A page of another site may send a form, or text, to a server on its reader's machine."""
    reply = post(server, '{"model": "tiny", "prompt": "cat"}', **{"content-type": "text/plain"})
    assert reply.status_code == 400 and "content-type: application/json" in reply.json()["error"]["message"]


def test_a_dead_decoder_is_told(words, monkeypatch, caplog):
    with running(*words) as server:

        def die(self, key):
            raise SystemExit(" ".join(["at", "the", "prompt"]))

        monkeypatch.setattr(type(server.decoder), "_step", die)
        with pytest.raises(openai.InternalServerError, match="shutting down") as told:
            ask(server, "cat")
        assert told.value.status_code == 503
        server.decoder.join(20)
        health = httpx.get(server.url + "/health")
        assert health.status_code == 503 and health.json() == {"status": "failed"}
        with pytest.raises(openai.InternalServerError, match="shutting down"):
            ask(server, "cat")
    assert "the decoding thread has died: SystemExit" in caplog.text and "at the prompt" not in caplog.text
