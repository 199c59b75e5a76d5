"""Next-token decoding against the obvious loop, and what it promises about rows, draws and counts."""

from functools import partial

import pytest
import tiny_models
import torch
from tiny_models import ENDS, MASK, PROMPTS

from dllm_var.errors import UserError
from dllm_var.model import Transformer
from dllm_var.sampling import AutoregressiveSampler
from dllm_var.sampling.base import sampler_from_config
from dllm_var.sampling.configurable import sampler_to_config

random_model = partial(tiny_models.random_model, causal=True)
FIELDS = ("tokens", "finish_reason", "nfe", "commit_steps", "prompt_length")


def slowly(model, prompt, limit, suppressed=()):
    """Greedy decoding without a cache: tokens, finish reason, forwards."""
    row = list(prompt)
    with torch.no_grad():
        while len(row) - len(prompt) < limit:
            logits = model(torch.tensor([row]))[0, -1]
            logits[[MASK, *suppressed]] = -torch.inf
            token = int(logits.argmax())
            if token in ENDS:
                return row[len(prompt) :], "eos", len(row) - len(prompt) + 1
            row.append(token)
    return row[len(prompt) :], "length", limit


@pytest.mark.parametrize("seed", range(3))
def test_rows_of_any_length_equal_the_slow_loop(seed):
    model = random_model(seed)
    answers = AutoregressiveSampler(max_new_tokens=12).generate(model, PROMPTS)
    for answer, prompt in zip(answers, PROMPTS, strict=True):
        assert (answer.tokens, answer.finish_reason, answer.nfe) == slowly(model, prompt, 12)
        assert answer.commit_steps == list(range(1, len(answer.tokens) + 1))


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 5, "top_p": 0.9}])
@pytest.mark.parametrize("batch_size", [3, 5])
def test_a_row_in_a_batch_equals_the_row_alone(batch_size, settings):
    """Seven prompts through few places: rows leave, others take their place, and nobody notices."""
    model = random_model(2)
    sampler = AutoregressiveSampler(max_new_tokens=20, batch_size=batch_size, **settings)
    for together, prompt in zip(sampler.generate(model, PROMPTS), PROMPTS, strict=True):
        alone = sampler.generate(model, [prompt])[0]
        assert [getattr(together, name) for name in FIELDS] == [getattr(alone, name) for name in FIELDS]


class Counting(Transformer):
    """A transformer that notes the shape of every forward."""

    def hidden_states(self, input_ids, *others, **named):
        self.__dict__.setdefault("shapes", []).append(tuple(input_ids.shape))
        return super().hidden_states(input_ids, *others, **named)


def counting(seed):
    model = Counting(random_model(seed).config).eval()
    model.load_state_dict(random_model(seed).state_dict())
    return model


def test_waiting_prompts_take_the_places_of_finished_rows():
    model = counting(2)
    prompts = [[token, 7] for token in range(5, 19)]
    answers = AutoregressiveSampler(max_new_tokens=12, batch_size=4).generate(model, prompts)
    assert max(rows for rows, _ in model.shapes) == 4
    decoding = sum(width == 1 for _, width in model.shapes)
    in_groups = sum(max(a.nfe for a in answers[i : i + 4]) - 1 for i in range(0, len(prompts), 4))
    assert decoding < in_groups


def test_a_row_that_has_ended_is_not_computed_for_when_nobody_waits():
    model = counting(2)
    answers = AutoregressiveSampler(max_new_tokens=30).generate(model, [[token, 7] for token in range(5, 17)])
    assert {answer.finish_reason for answer in answers} == {"eos", "length"}  # some leave early
    needed = sum(answer.nfe - 1 for answer in answers)
    computed = sum(rows for rows, width in model.shapes if width == 1)
    assert needed <= computed < needed * 4 / 3


def test_seeds_differ_and_the_likeliest_of_one_is_the_greedy_token():
    model = random_model(1)

    def tokens(**settings):
        return [
            answer.tokens for answer in AutoregressiveSampler(max_new_tokens=10, **settings).generate(model, PROMPTS)
        ]

    assert tokens(temperature=1.0) == tokens(temperature=1.0) != tokens(temperature=1.0, seed=1)
    assert tokens(temperature=1.0, top_k=1) == tokens()


def test_suppressed_tokens_are_never_produced():
    model = random_model(2)
    plain = AutoregressiveSampler(max_new_tokens=12).generate(model, PROMPTS)
    unwanted = [*ENDS, plain[0].tokens[0]]
    for answer, prompt in zip(
        AutoregressiveSampler(max_new_tokens=12).generate(model, PROMPTS, suppress=unwanted), PROMPTS, strict=True
    ):
        assert (answer.tokens, answer.finish_reason, answer.nfe) == slowly(model, prompt, 12, unwanted)
        assert not {MASK, *unwanted} & set(answer.tokens) and len(answer.tokens) == 12


def test_tokens_are_streamed_one_by_one_and_answers_when_they_end():
    model, seen, order = random_model(2), [], []
    answers = AutoregressiveSampler(max_new_tokens=12, batch_size=3).generate(
        model,
        PROMPTS,
        on_block=lambda index, tokens: seen.append((index, tokens)),
        on_answer=lambda index, answer: order.append((index, answer)),
    )
    for index, answer in enumerate(answers):
        pieces = [tokens for row, tokens in seen if row == index]
        assert pieces == [answer.tokens[:n] for n in range(1, len(answer.tokens) + 1)]
    assert sorted(index for index, _ in order) == list(range(7)) != [index for index, _ in order]
    assert all(answers[index] is answer for index, answer in order)


def test_settings_are_remembered_and_bad_ones_named():
    config = sampler_to_config(
        AutoregressiveSampler(max_new_tokens=7, batch_size=3, temperature=0.5, top_k=4, top_p=0.9, seed=11)
    )
    assert sampler_to_config(sampler_from_config(config)) == config
    for settings in ({"max_new_tokens": 0}, {"batch_size": 0}):
        with pytest.raises(UserError, match=next(iter(settings))):
            AutoregressiveSampler(**settings)
    with pytest.raises(UserError, match="temperature"):
        AutoregressiveSampler(temperature=-1.0)
    with pytest.raises(UserError, match="bidirectional"):
        AutoregressiveSampler().generate(random_model(causal=False), [[5]])
    assert AutoregressiveSampler().generate(random_model(), []) == []
