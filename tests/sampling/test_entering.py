"""Prompts that enter a running engine, and rows that leave it: every answer is that of the prompt alone."""

from dataclasses import dataclass, field

import pytest
import torch
from tiny_models import PROMPTS, random_model

from dllm_var.sampling import (
    AutoregressiveSampler,
    BlockDiffusionSampler,
    ConstantSteps,
    FixedLengthSampler,
    FreeDaveSampler,
    MultiBlockSampler,
    StridedSampler,
    WinoSampler,
    policies,
)
from dllm_var.sampling.base import Request
from dllm_var.sampling.drawing import request_keys


class Late(policies.UnmaskingPolicy):
    """Commits by how much of the answer's limit is decoded."""

    def decide(self, view, state):
        return policies.Decision(view.masked & (view.confidence > 0.6 - view.progress[:, None]))


CONTEXT = 64
FIELDS = ("tokens", "finish_reason", "nfe", "commit_steps", "drafted", "accepted")
BLOCKS = dict(block_length=4, batch_size=4, max_new_tokens=20)
SAMPLERS = {
    "block": BlockDiffusionSampler(policies.FixedSteps(4), **BLOCKS),
    "alone": BlockDiffusionSampler(policies.FixedSteps(2), kv_commit="alone", grid="absolute", **BLOCKS),
    "drawn": BlockDiffusionSampler(temperature=1.0, seed=3, block_length_policy=ConstantSteps(2, 2), **BLOCKS),
    "progress": BlockDiffusionSampler(Late(), **BLOCKS),
    "multi": MultiBlockSampler(policies.FixedSteps(4), blocks=3, **BLOCKS),
    "wino": WinoSampler(threshold=0.9, shadow_threshold=0.3, **BLOCKS),
    "freedave": FreeDaveSampler(drafts=3, **BLOCKS),
    "autoregressive": AutoregressiveSampler(batch_size=4, max_new_tokens=20),
    "strided": StridedSampler(stride=3, batch_size=4, max_new_tokens=20, temperature=1.0),
    "canvas": FixedLengthSampler(canvas_length=20, block_length=5, batch_size=4),
    "cached canvas": FixedLengthSampler(canvas_length=20, block_length=5, batch_size=4, cache="dual"),
}


@dataclass
class Told(Request):
    """Keeps each answer as it was told."""

    answers: dict = field(default_factory=dict)

    def finished(self, index, answer):
        assert index not in self.answers
        self.answers[index] = answer


def alone(sampler, model, prompt, limit):
    [answer] = sampler.generate(model, [prompt], max_new_tokens=limit)
    return [getattr(answer, name) for name in FIELDS]


BLOCK_CAUSAL = dict(block_causal=True, block_length=8)  # which blocks of 4 fill in two parts


@pytest.mark.parametrize(
    ("kind", "changes"),
    [*((kind, {}) for kind in SAMPLERS), ("block", BLOCK_CAUSAL), ("multi", BLOCK_CAUSAL), ("freedave", BLOCK_CAUSAL)],
    ids=str,
)
def test_prompts_enter_and_leave_a_running_engine(kind, changes):
    sampler = SAMPLERS[kind]
    model = random_model(causal=sampler.causal, terminator_ids=[3], **changes)
    own_limits = sampler.engine.has_limits
    limits = [(20, 7, 12, 1, 20, 9, 16)[n] if own_limits else 20 for n in range(len(PROMPTS))]
    told = Told(max_new_tokens=20, context=CONTEXT)
    sizes, left = [], []
    with torch.inference_mode():
        engine = sampler.engine(sampler, model, [], told)
        for number, prompt in enumerate([*PROMPTS, *PROMPTS]):
            engine.enter(number, prompt, request_keys([prompt])[0], limits[number % len(PROMPTS)])
            if number in (3, 9):
                engine.leave(number)  # it waits
                left.append(number)
            engine.fit_rows()
            sizes.append(len(engine.rows))
            if number % 2:
                continue
            engine.advance()
            if number == 6:  # it is in flight
                left.append(next(row.index for row in engine.rows if row.index >= 0))
                engine.leave(left[-1])
        while engine.waiting or engine.active:
            engine.fit_rows()
            engine.advance()
            sizes.append(len(engine.rows))
    assert sizes[0] == 1 and 4 in sizes, "rows are added"
    assert not own_limits or sizes[-1] < 4, "rows are dropped"
    if not own_limits:  # a canvas is shared to its end
        left = [3, 9]
    assert sorted([*told.answers, *left]) == [*range(2 * len(PROMPTS))]
    for number, answer in told.answers.items():
        place = number % len(PROMPTS)
        assert [getattr(answer, name) for name in FIELDS] == alone(sampler, model, PROMPTS[place], limits[place])
        engine.leave(number)
    assert not engine.prompts and not engine.keys and not engine.limits and not engine.answers, "nothing is remembered"
