"""A request that fails, fails alone: those that share its batch get the answers that they would get by themselves."""

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import openai
import pytest
import torch
from servers import Turnstile, running, wait_until

from dllm_var.errors import UserError
from dllm_var.sampling import (
    AutoregressiveSampler,
    BlockDiffusionSampler,
    FixedLengthSampler,
    FixedSteps,
    MultiBlockSampler,
    StridedSampler,
    UnmaskingPolicy,
)
from dllm_var.sampling.drawing import request_keys
from tests.sampling.tiny_models import TOKENIZER, random_model

BAD = "w18 w5"
NUMBER = request_keys([TOKENIZER.encode(BAD)])[0]
DRAWN = {"temperature": 0.3, "seed": 3}


@dataclass(eq=False)
class RaisesLater(UnmaskingPolicy):
    """Commits a token a step; raises in the second block of the prompt `BAD`."""

    def decide(self, view, state):
        if ((view.key >> 20 == NUMBER >> 20) & (view.progress > 0)).any():
            raise ValueError(f"at the prompt {BAD}")
        return FixedSteps(4).decide(view, state)


BLOCKS = dict(block_length=4, max_new_tokens=16, batch_size=16)
CASES = {
    "a policy raises": BlockDiffusionSampler(RaisesLater(), **BLOCKS),
    "a policy raises on a canvas": FixedLengthSampler(RaisesLater(), canvas_length=16, block_length=4, batch_size=16),
    "not numbers": BlockDiffusionSampler(FixedSteps(2), **BLOCKS),
    "not numbers, several blocks": MultiBlockSampler(FixedSteps(4), blocks=3, **BLOCKS),
    "not numbers on a canvas": FixedLengthSampler(canvas_length=16, block_length=4, cache="dual", batch_size=16),
    "not numbers, autoregressive": AutoregressiveSampler(max_new_tokens=16, batch_size=16),
    "not numbers, strided": StridedSampler(3, max_new_tokens=16, batch_size=16),
}


def neighbours(sampler, model):
    """Returns requests that do not fail by themselves, and their answers."""
    found = []
    for token in range(5, 18):
        for wishes in ({}, DRAWN):
            try:
                [answer] = replace(sampler, **wishes).generate(
                    model, [[token, 7]], tokenizer=TOKENIZER, log_probabilities=True
                )
            except UserError:  # its answer has the broken token
                continue
            found.append((dict(prompt=f"w{token} w7", logprobs=0, stream=bool(token % 2), **wishes), answer))
    return found


FAST = ("a policy raises", "not numbers on a canvas", "not numbers, strided")


@pytest.mark.parametrize(
    "case", [each if each in FAST else pytest.param(each, marks=pytest.mark.slow) for each in CASES]
)
def test_its_neighbours_get_their_own_answers(case, caplog):
    sampler = CASES[case]
    model = random_model(3, causal=sampler.causal)
    if case.startswith("not numbers"):
        with torch.no_grad():
            model.embedding.weight[18] = torch.nan
            model.lm_head.weight[18] = 0  # few answers have it
    good = neighbours(sampler, model)
    assert sum("temperature" in wishes for wishes, _ in good) > 3 and sum(wishes["stream"] for wishes, _ in good) > 3
    turnstile = Turnstile(model)
    with (
        running(model, TOKENIZER, sampler) as server,
        ThreadPoolExecutor(32) as pool,
        caplog.at_level(logging.DEBUG, "dllm_var"),
    ):

        def ask(**wishes):
            options = {"stream_options": {"include_usage": True}} if wishes.get("stream") else {}
            reply = server.client().completions.create(model="tiny", **wishes, **options)
            chunks = [*reply] if wishes.get("stream") else [reply]
            choices = [choice for chunk in chunks for choice in chunk.choices]
            known = [value for choice in choices if choice.logprobs for value in choice.logprobs.token_logprobs]
            text = "".join(choice.text for choice in choices)
            return text, choices[-1].finish_reason, chunks[-1].usage.forwards, known

        replies = [pool.submit(ask, **wishes) for wishes, _ in good]
        bad = [pool.submit(ask, prompt=BAD, **more) for more in ({}, {"stream": True}, DRAWN)]
        wait_until(lambda: server.in_flight() + len(server.decoder.queue) == len(good) + 3)
        turnstile.open_up()
        for failed in bad:
            with pytest.raises(openai.APIError, match=r"decoding failed|not numbers"):
                failed.result()
        for reply, (_, answer) in zip(replies, good, strict=True):
            text, reason, forwards, known = reply.result()
            assert (text, forwards) == (answer.text, answer.nfe)
            assert reason == ("length" if answer.finish_reason == "length" else "stop")
            assert known == pytest.approx(answer.log_probabilities, abs=1e-4)
        wait_until(lambda: not server.decoder.engines and not server.decoder.queue)
        assert ask(prompt=good[0][0]["prompt"])[0] == good[0][1].text
    assert max(rows for rows, _ in turnstile.shapes) > 4, "they shared a batch"
    assert "answers failed together" in caplog.text and BAD not in caplog.text


def test_the_last_of_a_batch_is_decoded_alone_before_it_is_given_up():
    """A row that has ended may be what failed."""
    sampler, model = CASES["not numbers"], random_model(3)
    prompts, limits = ["w5 w7", "w6 w7"], [8, 16]
    answers = [
        sampler.generate(model, [prompt], tokenizer=TOKENIZER, max_new_tokens=limit)[0]
        for prompt, limit in zip(prompts, limits, strict=True)
    ]
    assert [answer.new_tokens for answer in answers] == limits
    turnstile = Turnstile(model)
    counted, failed = model.hidden_states, []
    with running(model, TOKENIZER, sampler) as server, ThreadPoolExecutor() as pool:

        def hidden_states(*arguments, **named):
            [engine] = server.decoder.engines.values()
            if engine.request.entered == 2 and len(engine.request.jobs) == 1:
                failed.append(engine)
                raise RuntimeError
            return counted(*arguments, **named)

        model.hidden_states = hidden_states
        complete = server.client().completions.create
        replies = [
            pool.submit(complete, model="tiny", prompt=prompt, max_tokens=limit)
            for prompt, limit in zip(prompts, limits, strict=True)
        ]
        wait_until(lambda: server.in_flight() + len(server.decoder.queue) == 2)
        turnstile.open_up()
        assert [reply.result().choices[0].text for reply in replies] == [answer.text for answer in answers]
    assert len(failed) == 1
