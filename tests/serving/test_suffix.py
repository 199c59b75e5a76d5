"""Infilling over the API: what stands between a prompt and a suffix, as `infill` says it."""

import openai
import pytest
from servers import running

from dllm_var.sampling import AutoregressiveSampler, BlockDiffusionSampler, policies
from dllm_var.sampling.infilling import infill
from tests.sampling.tiny_models import MASK, TOKENIZER, random_model

BLOCKS = BlockDiffusionSampler(policies.ConfidenceThreshold(0.3), block_length=4, max_new_tokens=12, batch_size=4)
WISHES = dict(model="tiny", suffix="w9 w10", max_tokens=5)
TEXT = [*[MASK] * 5, 9, 10]


def filled(model, prompts, **settings):
    return infill(
        model,
        [TEXT] * len(prompts),
        settings.pop("policy", BLOCKS.policy),
        prompts=prompts,
        block_length=4,
        tokenizer=TOKENIZER,
        log_probabilities=True,
        **settings,
    )


def test_the_gap_before_a_suffix_is_filled_as_infill_does():
    model = random_model(3)
    answers = filled(model, [[5, 6], [8]])
    drawn = filled(model, [[5, 6]] * 2, temperature=1.0, top_p=0.9, seed=3)
    with running(model, TOKENIZER, BLOCKS, max_engines=1) as server:
        complete = server.client().completions.create
        reply = complete(prompt=["w5 w6", "w8"], logprobs=0, **WISHES)
        streamed = [chunk.choices[0] for chunk in complete(prompt=["w5 w6", "w8"], stream=True, **WISHES)]
        several = complete(prompt="w5 w6", n=2, temperature=1.0, top_p=0.9, seed=3, **WISHES)
        plain = complete(model="tiny", prompt="w5 w6", suffix="")
    assert [choice.text for choice in reply.choices] == [TOKENIZER.decode(answer.gaps[0]) for answer in answers]
    assert {choice.finish_reason for choice in reply.choices} == {"length"}
    for choice, answer in zip(reply.choices, answers, strict=True):
        assert choice.logprobs.token_logprobs == pytest.approx(answer.log_probabilities[:5], abs=1e-4)
    assert reply.usage.prompt_tokens == 2 + 1 + 2 * 2 and reply.usage.completion_tokens == 10
    assert reply.usage.forwards == sum(answer.nfe for answer in answers)
    for index, choice in enumerate(reply.choices):
        assert "".join(one.text for one in streamed if one.index == index) == choice.text
    assert [choice.text for choice in several.choices] == [TOKENIZER.decode(answer.gaps[0]) for answer in drawn]
    [expected] = BLOCKS.generate(model, [[5, 6]], tokenizer=TOKENIZER)
    assert plain.choices[0].text == expected.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": None}, "with 'suffix', 'max_tokens' is how many tokens stand before it: give it, too"),
        ({"stop": "w7"}, "'suffix' does not go with 'stop'"),
        ({"suffix": "nothing"}, "the checkpoint's vocabulary has nothing for 'nothing'"),
        ({"max_tokens": 253}, "the prompt has 4 tokens, and max_tokens is 253: this server takes 256 together"),
    ],
    ids=str,
)
def test_mistakes_are_told(changes, message):
    with running(random_model(), TOKENIZER, BLOCKS) as server, pytest.raises(openai.BadRequestError) as told:
        server.client().completions.create(prompt="w5 w6", **{**WISHES, **changes})
    assert message in told.value.message


def test_a_model_that_reads_left_to_right_cannot():
    model = random_model(causal=True)
    with running(model, TOKENIZER, AutoregressiveSampler()) as server, pytest.raises(openai.BadRequestError) as told:
        server.client().completions.create(prompt="w5 w6", **WISHES)
    assert "reads left to right: infilling needs a model that reads in both directions" in told.value.message
    assert told.value.body["param"] == "suffix"
