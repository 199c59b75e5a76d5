"""Log-probabilities over the API: those that `generate` tells, with the text of each token, for every sampler."""

import math
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from servers import running

from dllm_var.sampling import (
    AutoregressiveSampler,
    BlockDiffusionSampler,
    DiffuSpecSampler,
    FixedLengthSampler,
    FreeDaveSampler,
    GuidedSampler,
    MultiBlockSampler,
    StridedSampler,
    WinoSampler,
    policies,
)
from dllm_var.text.tokenizer import SpecialTokens, Tokenizer
from tests.sampling.tiny_models import BACKEND, ENDS, MASK, TOKENIZER, random_model, save

LIMIT = 10
PROMPTS = ["w5 w6 w7", "w9", "w8 w12 w13 w14"]
BLOCKS = dict(block_length=4, max_new_tokens=LIMIT, batch_size=4)
CHATTING = Tokenizer(BACKEND, SpecialTokens(MASK, ENDS, 0), "{% for m in messages %}{{ m.content }} {% endfor %}w7")
SAMPLERS = {
    "autoregressive": lambda _: AutoregressiveSampler(max_new_tokens=LIMIT, batch_size=4),
    "blocks": lambda _: BlockDiffusionSampler(policies.ConfidenceThreshold(0.2), **BLOCKS),
    "drawn": lambda _: BlockDiffusionSampler(policies.FixedSteps(2), temperature=1.0, **BLOCKS),
    "several blocks": lambda _: MultiBlockSampler(policies.ConfidenceThreshold(0.2), blocks=3, **BLOCKS),
    "wino": lambda _: WinoSampler(threshold=0.3, shadow_threshold=0.2, **BLOCKS),
    "freedave": lambda _: FreeDaveSampler(policies.FixedSteps(4), drafts=3, **BLOCKS),
    "canvas": lambda _: FixedLengthSampler(canvas_length=LIMIT, block_length=5, batch_size=4),
    "strided": lambda _: StridedSampler(3, max_new_tokens=LIMIT, batch_size=4),
    "guided": lambda folder: GuidedSampler(save(random_model(5, causal=True), folder), **BLOCKS),
    "diffuspec": lambda folder: DiffuSpecSampler(save(random_model(5), folder), max_new_tokens=LIMIT, batch_size=4),
}


def close(values):
    return pytest.approx(values, abs=1e-4)


@pytest.mark.parametrize("kind", SAMPLERS)
def test_they_are_those_of_generate(kind, tmp_path):
    sampler = SAMPLERS[kind](tmp_path)
    model = random_model(3, causal=sampler.causal)
    alone = [sampler.generate(model, [p], tokenizer=TOKENIZER, log_probabilities=True)[0] for p in PROMPTS]
    with running(model, TOKENIZER, sampler) as server, ThreadPoolExecutor() as pool:
        complete = server.client().completions.create
        others = [pool.submit(complete, model="tiny", prompt=prompt) for prompt in PROMPTS]
        wishes = dict(model="tiny", prompt=PROMPTS, logprobs=0, **({"seed": 0} if sampler.temperature else {}))
        whole = complete(**wishes)
        stream = [chunk.choices[0] for chunk in complete(stream=True, **wishes)]
        assert all(other.result().choices[0].logprobs is None for other in others), "who does not ask gets none"
    assert sum(answer.new_tokens for answer in alone) > 10
    for index, (choice, answer) in enumerate(zip(whole.choices, alone, strict=True)):
        told, texts = choice.logprobs, [f"w{token}" for token in answer.tokens]
        assert choice.text == answer.text
        assert [text.strip() for text in told.tokens] == texts and "".join(told.tokens) == answer.text
        assert [answer.text[start:].startswith(text) for start, text in zip(told.text_offset, told.tokens, strict=True)]
        assert told.token_logprobs == close(answer.log_probabilities) and told.top_logprobs is None
        pieces = [one for one in stream if one.index == index and one.logprobs is not None]
        assert [text for piece in pieces for text in piece.logprobs.tokens] == told.tokens
        assert [start for piece in pieces for start in piece.logprobs.text_offset] == told.text_offset
        assert [p for piece in pieces for p in piece.logprobs.token_logprobs] == close(answer.log_probabilities)
        assert all("".join(piece.logprobs.tokens) == piece.text for piece in pieces), "each comes with its text"
    assert kind == "canvas" or len(stream) > 2 * len(PROMPTS), "there were streams"


def test_a_stop_string_cuts_them():
    model, sampler = random_model(3), SAMPLERS["blocks"](None)
    [plain] = sampler.generate(model, PROMPTS[:1], tokenizer=TOKENIZER)
    stop = plain.text.split()[5]
    wishes = dict(tokenizer=TOKENIZER, stop=stop, log_probabilities=True)
    [answer] = sampler.generate(model, PROMPTS[:1], **wishes)
    with running(model, TOKENIZER, sampler) as server:
        complete = server.client().completions.create
        wishes = dict(model="tiny", prompt=PROMPTS[0], stop=stop, logprobs=0)
        [choice] = complete(**wishes).choices
        streamed = [chunk.choices[0].logprobs for chunk in complete(stream=True, **wishes)]
    assert 0 < answer.new_tokens < plain.new_tokens
    assert choice.logprobs.token_logprobs == close(answer.log_probabilities)
    assert [p for one in streamed if one for p in one.token_logprobs] == close(answer.log_probabilities)


def test_chats_have_a_form_of_their_own():
    model, sampler = random_model(3), SAMPLERS["blocks"](None)
    [answer] = sampler.generate(model, [[5, 6, 7]], tokenizer=TOKENIZER, log_probabilities=True)
    with running(model, CHATTING, sampler) as server:
        chat = server.client().chat.completions.create
        wishes = dict(model="tiny", messages=[{"role": "user", "content": "w5 w6"}])
        [choice] = chat(logprobs=True, top_logprobs=0, **wishes).choices
        streamed = [chunk.choices[0].logprobs for chunk in chat(stream=True, logprobs=True, **wishes)]
        assert chat(logprobs=False, **wishes).choices[0].logprobs is None
        with pytest.raises(openai.BadRequestError, match=r"top_logprobs: this server .*: set it to 0$"):
            chat(logprobs=True, top_logprobs=2, **wishes)
    told = choice.logprobs.content
    assert [one.logprob for one in told] == close(answer.log_probabilities)
    assert "".join(one.token for one in told) == choice.message.content == answer.text
    assert all(bytes(one.bytes).decode() == one.token and one.top_logprobs == [] for one in told)
    assert [one for chunk in streamed if chunk for one in chunk.content] == told
    assert all(math.isfinite(one.logprob) and one.logprob <= 0 for one in told)
