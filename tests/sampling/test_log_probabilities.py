"""Log-probabilities of an answer's tokens: those of the forward pass that committed each, by every sampler."""

import math

import pytest
import torch
from slow_reference import _forward_block
from tiny_models import ENDS, MASK, PROMPTS, TOKENIZER, VOCABULARY, random_model, save

from dllm_var.model import Transformer
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
from dllm_var.sampling.infilling import infill

LIMIT = 12
BLOCKS = dict(block_length=4, max_new_tokens=LIMIT, batch_size=2)
TEXT = [5, 6, 7, 8, 9, 10]


def answers_of(sampler, model, prompts=PROMPTS[:4], suppress=ENDS, **wishes):
    return sampler.generate(model, prompts, suppress=suppress, log_probabilities=True, **wishes)


def close(values):
    return pytest.approx(values, abs=1e-4)


@pytest.mark.parametrize(
    "sampler",
    [
        AutoregressiveSampler(max_new_tokens=LIMIT, batch_size=2),
        AutoregressiveSampler(max_new_tokens=LIMIT, batch_size=2, temperature=0.8, top_k=4),
        StridedSampler(4, max_new_tokens=LIMIT, batch_size=2),
        StridedSampler(4, max_new_tokens=LIMIT, batch_size=2, temperature=0.8),
        "diffuspec",
    ],
    ids=str,
)
def test_of_a_causal_model_they_are_those_of_the_text_read_at_once(sampler, tmp_path):
    model = random_model(3, causal=True)
    few = [token for token in range(VOCABULARY) if token not in (6, 7, 8)]  # drafts are often right
    if sampler == "diffuspec":
        sampler = DiffuSpecSampler(save(random_model(5), tmp_path), max_new_tokens=LIMIT, batch_size=2)
    answers = answers_of(sampler, model, suppress=few)
    for prompt, answer in zip(PROMPTS, answers, strict=False):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *answer.tokens]]))[0, len(prompt) - 1 : -1]
        expected = logits.index_fill(1, torch.tensor(few), -torch.inf).log_softmax(1)
        assert answer.log_probabilities == close(expected[torch.arange(LIMIT), answer.tokens].tolist())
    assert isinstance(sampler, AutoregressiveSampler) or sum(answer.accepted for answer in answers) > 3


def test_trusted_drafts_have_the_probability_of_their_draft():
    model = random_model(3, causal=True)
    few = [token for token in range(VOCABULARY) if token not in (6, 7)]
    sampler = StridedSampler(4, max_new_tokens=LIMIT, trust=0.6)
    answers = answers_of(sampler, model, suppress=few)
    assert sum(LIMIT - answer.accepted - answer.nfe for answer in answers) > 0, "some are not verified"
    for answer in answers:
        assert min(answer.log_probabilities) >= math.log(0.5) and len(answer.log_probabilities) == LIMIT


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "top_p": 0.8}], ids=str)
@pytest.mark.parametrize("policy", [policies.ConfidenceThreshold(0.2), policies.FixedSteps(2, "random")], ids=str)
def test_of_a_block_they_are_those_of_the_forward_that_committed_the_token(policy, settings):
    """Every forward is computed again, from the tokens that were there before it."""
    model, checked = random_model(1, initializer_range=0.2), 0
    answers = answers_of(BlockDiffusionSampler(policy, **BLOCKS, **settings), model)
    for prompt, answer in zip(PROMPTS, answers, strict=False):
        for start in range(0, LIMIT, 4):
            finished = [prompt, *(answer.tokens[first : first + 4] for first in range(0, start, 4))]
            block, steps = answer.tokens[start : start + 4], answer.commit_steps[start : start + 4]
            for step in {*steps}:
                before = [token if when < step else MASK for token, when in zip(block, steps, strict=True)]
                with torch.no_grad():
                    logits = _forward_block(model, finished, before, 4, LIMIT, len(prompt), "joint_next")
                logits[:, [MASK, *ENDS]] = -torch.inf
                expected = logits.log_softmax(1)[torch.arange(4), block].tolist()
                for place in range(4):
                    if steps[place] == step:
                        assert answer.log_probabilities[start + place] == close(expected[place])
                        checked += 1
    assert checked == 4 * LIMIT


def test_drafts_that_were_right_have_those_of_the_steps_that_they_saved():
    model, policy = random_model(1, initializer_range=0.2), policies.FixedSteps(steps=4)
    plain = answers_of(BlockDiffusionSampler(policy, **BLOCKS), model)
    drafted = answers_of(FreeDaveSampler(policy, drafts=4, **BLOCKS), model)
    assert sum(answer.nfe for answer in drafted) < sum(answer.nfe for answer in plain)
    for one, other in zip(plain, drafted, strict=True):
        assert other.tokens == one.tokens and other.log_probabilities == close(one.log_probabilities)


class HeadByPosition(torch.nn.Module):
    """Predicts token 7, at each position with a probability of its own; the hidden state says which position it is."""

    sure = tuple(0.3 + 0.6 * ((5 * place) % 17) / 17 for place in range(64))

    def forward(self, hidden):
        logits = torch.zeros(hidden.size(0), VOCABULARY)
        sure = torch.tensor(self.sure)[hidden[:, 0].long()]
        logits[:, 7] = (sure * (VOCABULARY - 2 - len(ENDS)) / (1 - sure)).log()
        logits[:, list(ENDS)] = -99.0
        return logits


class ByPosition(Transformer):
    def __init__(self):
        super().__init__(random_model().config)
        self.lm_head = HeadByPosition()

    def hidden_states(self, input_ids, *others, cache=None, **named):
        hidden = super().hidden_states(input_ids, *others, cache=cache, **named)
        hidden[..., 0] = torch.arange(input_ids.size(1)) if cache is None else cache.positions
        return hidden


@pytest.mark.parametrize(
    "sampler",
    [
        BlockDiffusionSampler(policies.FixedSteps(3), grid="absolute", **BLOCKS),
        BlockDiffusionSampler(policies.JointThreshold(0.5), **BLOCKS),
        BlockDiffusionSampler(policies.CoherentCandidates(), kv_commit="alone", **BLOCKS),
        MultiBlockSampler(policies.ConfidenceThreshold(0.8), blocks=3, ahead_threshold=0.5, open_at=0.0, **BLOCKS),
        WinoSampler(threshold=0.6, shadow_threshold=0.5, **BLOCKS),
        FixedLengthSampler(canvas_length=LIMIT, batch_size=2),
        FixedLengthSampler(canvas_length=LIMIT, block_length=4, cache="dual", batch_size=2),
        FixedLengthSampler(canvas_length=LIMIT, cache="dkv", batch_size=2),
        "guided",
        "infill",
    ],
    ids=lambda sampler: sampler if isinstance(sampler, str) else type(sampler).__name__,
)
def test_each_token_has_that_of_its_own_place(sampler, tmp_path):
    model, prompts = ByPosition(), [[5, 6], [8, 9, 10]]
    if sampler == "guided":
        sampler = GuidedSampler(save(random_model(causal=True), tmp_path), **BLOCKS)
    if sampler == "infill":
        texts = [[MASK, *TEXT, MASK, MASK], [*TEXT, MASK, 5]]
        answers = infill(model, texts, prompts=prompts, log_probabilities=True)
    else:
        texts = [[MASK] * LIMIT] * 2
        answers = answers_of(sampler, model, prompts, suppress=[])
    for prompt, text, answer in zip(prompts, texts, answers, strict=True):
        sure = HeadByPosition.sure[len(prompt) :]
        expected = [math.log(sure[place]) if token == MASK else 0.0 for place, token in enumerate(text)]
        assert answer.log_probabilities == close(expected)


def test_they_come_only_when_asked_for_and_change_nothing():
    model, sampler = random_model(2), BlockDiffusionSampler(policies.ConfidenceThreshold(0.3), **BLOCKS)
    plain = sampler.generate(model, PROMPTS, tokenizer=TOKENIZER, stop="w8")
    asked = sampler.generate(model, PROMPTS, tokenizer=TOKENIZER, stop="w8", log_probabilities=True)
    assert "stop" in {answer.finish_reason for answer in asked}
    for one, other in zip(plain, asked, strict=True):
        assert (one.tokens, one.commit_steps, one.nfe) == (other.tokens, other.commit_steps, other.nfe)
        assert one.log_probabilities is None and "log_probabilities" not in one.as_json("")
        assert len(other.log_probabilities) == len(other.tokens) and '"log_probabilities": [' in other.as_json("")
