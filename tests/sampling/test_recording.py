"""Recorded steps: replayed, they give the answer, its commit steps and its probabilities, for every kind of engine."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_var.checkpoints.pretrained import load_checkpoint
from dllm_var.sampling import (
    AutoregressiveSampler,
    BlockDiffusionSampler,
    FixedLengthSampler,
    FreeDaveSampler,
    MultiBlockSampler,
    StridedSampler,
    WinoSampler,
    policies,
)
from dllm_var.sampling.infilling import infill
from dllm_var.sampling.recording import Recording, replay_of, steps_of
from tests.sampling.tiny_models import MASK, PROMPTS, TOKENIZER, random_model

BLOCKS = dict(block_length=4, max_new_tokens=12, batch_size=3)
SAMPLERS = {
    "blocks": BlockDiffusionSampler(**BLOCKS),
    "alone": BlockDiffusionSampler(policies.FixedSteps(steps=2), kv_commit="alone", **BLOCKS),
    "drawn": BlockDiffusionSampler(policies.FixedSteps(steps=2), temperature=1.0, **BLOCKS),
    "edits": BlockDiffusionSampler(policies.JointThreshold(0.2, 0.1, 4), **BLOCKS),
    "remasks": BlockDiffusionSampler(policies.RunningConfidenceRemasking(steps=4), **BLOCKS),
    "wino": WinoSampler(threshold=0.1, shadow_threshold=0.3, **BLOCKS),
    "several": MultiBlockSampler(policies.FixedSteps(steps=3), open_at=0.3, ahead_threshold=0.0, **BLOCKS),
    "drafts": FreeDaveSampler(**BLOCKS),
    "canvas": FixedLengthSampler(policies.FixedSteps(steps=3), canvas_length=12, block_length=4, batch_size=3),
    "next token": AutoregressiveSampler(max_new_tokens=9, batch_size=3),
    "strided": StridedSampler(4, max_new_tokens=9, batch_size=3),
}


def replayed(steps):
    """Returns the answer after all steps: of each place the token, the forward and the log-probability."""
    cells, length = {}, 0
    for step in steps:
        length = step.length
        cells = {place: cell for place, cell in cells.items() if place < length}
        for place, token, known in step.changes:
            assert place < length
            cells[place] = (token, step.forward, known)
    assert sorted(cells) == list(range(length))
    return [cells[place] for place in range(length)]


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_replay_ends_with_the_answer(name):
    sampler = SAMPLERS[name]
    model = random_model(1, causal=sampler.causal)
    prompts = PROMPTS[:4]
    bare = sampler.generate(model, prompts, tokenizer=TOKENIZER)
    for answer, plain in zip(sampler.generate(model, prompts, tokenizer=TOKENIZER, record=True), bare, strict=True):
        expected = [*zip(answer.tokens, answer.commit_steps, answer.log_probabilities, strict=True)]
        assert replayed(answer.steps) == expected
        forwards = [step.forward for step in answer.steps]
        assert forwards == sorted(forwards) and forwards[0] == 1 and forwards[-1] == answer.nfe
        assert (answer.tokens, answer.commit_steps, answer.nfe) == (plain.tokens, plain.commit_steps, plain.nfe)
        assert plain.steps is None and plain.log_probabilities is None
        from_commits = [(token, forward) for token, forward, _ in replayed(steps_of(plain))]
        assert from_commits == [cell[:2] for cell in expected]


def test_masks_blocks_and_tokens_that_are_taken_back_are_in_it():
    words, tokenizer, _ = load_checkpoint(Path(__file__).parent.parent.parent / "checkpoints" / "cmudict")
    wino = WinoSampler(block_length=8, max_new_tokens=48)
    [answer] = wino.generate(words, ["recommendations"], tokenizer=tokenizer, record=True)
    assert None in {token for step in answer.steps for _, token, _ in step.changes}
    assert [place for step in answer.steps for place in step.starts] == [0, 8]
    assert (answer.steps[0].length, answer.steps[-1].length) == (8, len(answer.tokens))
    model = random_model(1)
    several = MultiBlockSampler(policies.FixedSteps(steps=4), open_at=0.0, **BLOCKS)
    [answer] = several.generate(model, [[5, 6]], suppress=(3, 4), record=True)
    assert answer.steps[0].starts == [0, 4]


def test_a_stop_string_cuts_a_recording_too():
    sampler = SAMPLERS["alone"]
    model = random_model(1)
    [whole] = sampler.generate(model, [[5, 6]], tokenizer=TOKENIZER, suppress=(3, 4))
    stop = whole.text.split()[5]
    options = dict(tokenizer=TOKENIZER, suppress=(3, 4), stop=[stop], record=True)
    [answer] = sampler.generate(model, [[5, 6]], **options)
    assert answer.finish_reason == "stop" and answer.steps[-1].length == len(answer.tokens) < 12
    assert [token for token, *_ in replayed(answer.steps)] == answer.tokens


def test_given_tokens_of_a_text_belong_to_no_forward():
    [filled] = infill(random_model(1), [[7, MASK, 8, MASK]], prompts=[[5]], tokenizer=TOKENIZER, record=True)
    for answer in (filled, infill(random_model(1), [[7, MASK, 8, MASK]], prompts=[[5]], tokenizer=TOKENIZER)[0]):
        shown = replay_of(answer)
        assert shown["given"] == [(0, "w7"), (2, "w8")] and shown["prompt"] == "w5"
        assert sorted(change[0] for step in shown["steps"] for change in step["changes"]) == [1, 3]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.none() | st.integers(5, 8), max_size=6), min_size=1, max_size=8))
def test_steps_tell_all_and_only_what_changes(states):
    recording = Recording()
    cells = {}
    for forward, tokens in enumerate(states, start=1):
        before = dict(cells)
        step = recording.add(forward, tokens, [-0.5] * len(tokens))
        cells = {place: token for place, token in cells.items() if place < step.length}
        for place, token, known in step.changes:
            assert before.get(place) != token and known == (None if token is None else -0.5)
            cells[place] = token
        assert [cells.get(place) for place in range(step.length)] == tokens
    assert recording.add(forward, tokens, None) is None
