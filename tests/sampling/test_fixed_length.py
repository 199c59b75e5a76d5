"""The fixed canvas against a slow loop, its caches against what they stand for."""

from functools import partial

import pytest
import tiny_models
import torch
from slow_reference import forward
from tiny_models import ENDS, MASK

from dllm_var.errors import UserError
from dllm_var.sampling import ConfidenceThreshold, FixedLengthSampler, FixedSteps
from dllm_var.sampling.policies import Prophet, RunningConfidenceRemasking, Saber, Sequential

random_model = partial(tiny_models.random_model, initializer_range=0.2)
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [16, 17]]


def slowly(model, prompt, length, block, threshold):
    """One row, whole forwards, Python loops; commits what is above the threshold, or the best."""
    row, nfe = [*prompt, *[MASK] * length], 0
    for start in range(len(prompt), len(row), block):
        places = range(start, min(start + block, len(row)))
        while any(row[j] == MASK for j in places):
            nfe += 1
            with torch.no_grad():
                logits = model(torch.tensor([row]))[0]
            logits[:, MASK] = -torch.inf
            confidence, best = logits.softmax(-1).max(-1)
            masked = [j for j in places if row[j] == MASK]
            chosen = [j for j in masked if confidence[j] > threshold] or [
                max(masked, key=lambda j: float(confidence[j]))
            ]
            for j in chosen:
                row[j] = int(best[j])
    answer = row[len(prompt) :]
    end = next((i for i, token in enumerate(answer) if token in ENDS), length)
    return answer[:end], "eos" if end < length else "length", nfe


@pytest.mark.parametrize(("seed", "block"), [(0, 4), (1, 6), (2, 14)])
def test_without_a_cache_it_is_the_slow_loop(seed, block):
    model = random_model(seed)
    sampler = FixedLengthSampler(ConfidenceThreshold(0.25), canvas_length=14, block_length=block)
    for answer, prompt in zip(sampler.generate(model, PROMPTS), PROMPTS, strict=True):
        assert (answer.tokens, answer.finish_reason, answer.nfe) == slowly(model, prompt, 14, block, 0.25)


def test_one_token_per_step_takes_as_many_forwards_as_the_canvas_is_long():
    answers = FixedLengthSampler(canvas_length=9).generate(random_model(), PROMPTS)
    assert [answer.nfe for answer in answers] == [9] * 4


@pytest.mark.parametrize("cache", ["prefix", "dual", "dkv", "free"])
@pytest.mark.parametrize(
    "policy", [ConfidenceThreshold(0.25), FixedSteps(3), RunningConfidenceRemasking(3), Saber(), Sequential(2)]
)
def test_a_cached_batch_equals_single_rows(cache, policy):
    if cache == "dkv" and policy.scores_committed:
        with pytest.raises(UserError, match="dkv does not run the committed positions that Saber needs"):
            FixedLengthSampler(policy, cache=cache)
        return
    model = random_model(1)
    sampler = FixedLengthSampler(policy, canvas_length=14, block_length=5, cache=cache, refresh_every=3)
    for together, prompt in zip(sampler.generate(model, PROMPTS), PROMPTS, strict=True):
        alone = sampler.generate(model, [prompt])[0]
        assert (together.tokens, together.finish_reason, together.nfe) == (alone.tokens, alone.finish_reason, alone.nfe)


def test_the_caches_hold_the_keys_of_the_block_s_first_step():
    """One layer: keys depend on tokens and places alone, so a stale key is one of a token that has changed since.

    The prompt and later masks do not change within a block. So with one layer both caches are exact.
    """
    model = random_model(3, num_layers=1)
    plain = FixedLengthSampler(FixedSteps(4), canvas_length=12, block_length=4).generate(model, PROMPTS)
    for cache in ("prefix", "dual"):
        assert [
            a.tokens
            for a in FixedLengthSampler(FixedSteps(4), canvas_length=12, block_length=4, cache=cache).generate(
                model, PROMPTS
            )
        ] == [a.tokens for a in plain]


def test_deeper_models_differ_with_a_cache():
    """Otherwise the two tests above would not prove that a cache is used at all."""
    model, settings = random_model(3, num_layers=3), dict(canvas_length=24, block_length=12)
    plain = FixedLengthSampler(FixedSteps(6), **settings).generate(model, PROMPTS)
    dual = FixedLengthSampler(FixedSteps(6), **settings, cache="dual").generate(model, PROMPTS)
    assert [a.tokens for a in plain] != [a.tokens for a in dual]


@pytest.mark.parametrize("seed", range(2))
def test_prophet_over_the_canvas_is_a_slow_loop(seed):
    """Whole forwards; the best token of each, until the mean margin of all masks of the canvas fills them at once."""
    model, length = random_model(seed), 12
    sampler = FixedLengthSampler(Prophet(high=0.8, middle=0.6, low=0.4), canvas_length=length)
    forwards = []
    for answer, prompt in zip(sampler.generate(model, PROMPTS, suppress=sorted(ENDS)), PROMPTS, strict=True):
        row, nfe = [*prompt, *[MASK] * length], 0
        while MASK in row:
            nfe += 1
            with torch.no_grad():
                logits = model(torch.tensor([row]))[0]
            logits[:, [MASK, *ENDS]] = -torch.inf
            masked = [j for j, token in enumerate(row) if token == MASK]
            share = 1 - len(masked) / length
            margins = [float(logits[j].topk(2).values.diff().neg()) for j in masked]
            if sum(margins) / len(masked) < (0.8 if share < 0.33 else 0.6 if share < 0.67 else 0.4):
                masked = [max(masked, key=lambda j: float(logits[j].softmax(-1).max()))]
            for j in masked:
                row[j] = int(logits[j].argmax())
        assert (answer.tokens, answer.nfe) == (row[len(prompt) :], nfe)
        forwards.append(nfe)
    assert min(forwards) < length


class Recorder:
    """Notes which positions of its one row each forward of a model runs."""

    def __init__(self, model, monkeypatch):
        self.runs, original = [], model.hidden_states

        def recorded(tokens, position_ids=None, segment_ids=None, cache=None):
            self.runs.append(cache.positions[0].tolist())
            return original(tokens, position_ids, segment_ids, cache)

        monkeypatch.setattr(model, "hidden_states", recorded)


def slowly_cached(model, prompt, length, block, threshold, runs):
    """One row and a store of keys and values by position: a step runs some positions and stores what it made of them.

    `runs(row, committed, start, step)` says which positions, given those that the last step committed. Returns the
    row's answer and the positions of every step.
    """
    row, store, log, committed = [*prompt, *[MASK] * length], {}, [], []
    for start in range(len(prompt), len(row), block):
        places, step = range(start, min(start + block, len(row))), 0
        while any(row[j] == MASK for j in places):
            now = runs(row, committed, start, step)
            log.append(now)
            kept = [j for j in sorted(store) if j not in now]
            keys = [[(store[j][i][0], store[j][i][1]) for i in range(len(model.layers))] for j in kept]
            with torch.no_grad():
                hidden, made = forward(model, [row[j] for j in now], now, keys)
                logits = model.lm_head(hidden)[0]
            for at, j in enumerate(now):
                store[j] = [(k[:, :, at : at + 1], v[:, :, at : at + 1]) for k, v in made]
            logits[:, MASK] = -torch.inf
            confidence, best = logits.softmax(-1).max(-1)
            masked = [j for j in places if row[j] == MASK]
            sure = {j: float(confidence[now.index(j)]) for j in masked}
            committed = [j for j in masked if sure[j] > threshold] or [max(masked, key=sure.get)]
            for j in committed:
                row[j] = int(best[now.index(j)])
            step += 1
    answer = row[len(prompt) :]
    return answer[: next((i for i, token in enumerate(answer) if token in ENDS), length)], log


def whole(row, committed, start, step):
    return list(range(len(row)))


def dkv(every):
    def runs(row, committed, start, step):
        if step == 1 or step % every == 0:  # the released code of dKV-Cache: twice, then every `every` steps
            return whole(row, committed, start, step)
        return [j for j in range(len(row)) if row[j] == MASK or j in committed]

    return runs


def free(prompt_length):
    def runs(row, committed, start, step):
        first = start == prompt_length and step == 0
        return list(range(0 if first else start, len(row)))

    return runs


@pytest.mark.parametrize(("seed", "block"), [(0, 5), (1, 14)])
@pytest.mark.parametrize(("cache", "every"), [("dkv", 3), ("dkv", 8), ("dkv", 1), ("free", 8)])
def test_caches_against_a_store_by_position(seed, block, cache, every, monkeypatch):
    """Every forward runs the positions it should, and what it does not run is as its own last run left it."""
    model = random_model(seed, num_layers=3)
    recorder = Recorder(model, monkeypatch)
    sampler = FixedLengthSampler(
        ConfidenceThreshold(0.25), canvas_length=14, block_length=block, cache=cache, refresh_every=every
    )
    for prompt in PROMPTS:
        recorder.runs.clear()
        [answer] = sampler.generate(model, [prompt])
        runs = dkv(every) if cache == "dkv" else free(len(prompt))
        tokens, log = slowly_cached(model, prompt, 14, block, 0.25, runs)
        assert answer.tokens == tokens and answer.nfe == len(log)
        assert recorder.runs == log


def test_a_token_is_run_once_as_itself(monkeypatch):
    """dKV-Cache-Decode without refresh: every position runs while it is masked and a step longer, the prompt twice."""
    model = random_model(2)
    recorder = Recorder(model, monkeypatch)
    sampler = FixedLengthSampler(FixedSteps(10), canvas_length=10, cache="dkv", refresh_every=99)
    [answer] = sampler.generate(model, [[5, 6, 7]], suppress=sorted(ENDS))
    assert [len(run) for run in recorder.runs] == [13, 13, 9, 8, 7, 6, 5, 4, 3, 2]
    for place, step in enumerate(answer.commit_steps):
        runs = [number for number, run in enumerate(recorder.runs, start=1) if 3 + place in run]
        assert runs == list(range(1, min(step + 1, 10) + 1))


def test_bad_settings_are_named():
    with pytest.raises(UserError, match="refresh_every"):
        FixedLengthSampler(refresh_every=0)
    with pytest.raises(UserError, match="canvas_length"):
        FixedLengthSampler(canvas_length=0)
    with pytest.raises(UserError, match="autoregressive"):
        FixedLengthSampler().generate(random_model(causal=True), [[5]])
