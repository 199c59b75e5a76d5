"""Infilling: gaps are filled, the rest stays, whatever the policy and whoever shares the batch."""

from functools import partial

import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import ENDS, MASK

from dllm_var.checkpoints.pretrained import load_checkpoint
from dllm_var.errors import UserError
from dllm_var.sampling import ConfidenceThreshold, FixedSteps
from dllm_var.sampling import policies as P
from dllm_var.sampling.infilling import infill

SUPPRESSED = 7
POLICIES = [
    ConfidenceThreshold(0.3),
    FixedSteps(3),
    FixedSteps(2, "random"),
    P.CoherentCandidates(warmup_steps=1),
    P.ConfidenceFactor(),
    P.EntropyBounded(),
    P.FirstHitting(),
    P.JointThreshold(0.3, 0.2),
    P.Prophet(high=2.0, middle=1.0, low=0.5),
    P.RunningConfidenceRemasking(3),
    P.Saber(),
    P.SchED(high=2.0, low=0.5),
    P.Sequential(2),
]


random_model = partial(tiny_models.random_model, initializer_range=0.2)
MODEL = random_model()
GIVEN = st.sampled_from([0, 3, 5, 6, 7, 8, 15])  # terminators and suppressed tokens may well be given
TEXT = st.lists(st.one_of(GIVEN, st.just(MASK)), min_size=1, max_size=12).filter(lambda text: MASK in text)
# Among masks alone all places are alike, and rounding decides which comes first.
ROW = st.tuples(st.lists(GIVEN, max_size=5), TEXT).filter(lambda row: row[0] or {*row[1]} != {MASK})


@settings(max_examples=12, deadline=None)
@given(
    st.lists(ROW, min_size=1, max_size=4),
    st.sampled_from(POLICIES),
    st.sampled_from([0.0, 1.0]),
    st.sampled_from([None, 4]),
)
def test_given_tokens_stay_and_gaps_get_tokens(rows, policy, temperature, block_length):
    prompts, texts = map(list, zip(*rows, strict=True))
    options = dict(policy=policy, temperature=temperature, block_length=block_length, suppress=[SUPPRESSED])
    told = []
    filled = infill(
        MODEL, texts, prompts=prompts, batch_size=2, on_answer=lambda i, answer: told.append((i, answer)), **options
    )
    assert sorted(told, key=lambda pair: pair[0]) == list(enumerate(filled))
    for index, (prompt, text, answer) in enumerate(zip(prompts, texts, filled, strict=True)):
        assert (answer.finish_reason, answer.prompt_length) == ("filled", len(prompt))
        new = [token for token, before in zip(answer.tokens, text, strict=True) if before == MASK]
        assert [a for a, b in zip(answer.tokens, text, strict=True) if b != MASK] == [b for b in text if b != MASK]
        assert not {*new} & {MASK, *ENDS, SUPPRESSED}
        assert [token for gap in answer.gaps for token in gap] == new and answer.new_tokens == len(new)
        assert len(answer.gaps) == sum(a == MASK and b != MASK for a, b in zip(text, [None, *text], strict=False))
        assert all((step == 0) == (token != MASK) for step, token in zip(answer.commit_steps, text, strict=True))
        assert max(answer.commit_steps) <= answer.nfe
        if [[*p, *t] for p, t in rows].index([*prompt, *text]) == index:  # the same row a second time is drawn anew
            [alone] = infill(MODEL, [text], prompts=[prompt], **options)
            assert (alone.tokens, alone.nfe, alone.commit_steps) == (answer.tokens, answer.nfe, answer.commit_steps)


def slowly(model, row, places, threshold):
    """One row, whole forwards, Python loops; commits what is above the threshold, or the best."""
    row, nfe = list(row), 0
    while any(row[j] == MASK for j in places):
        nfe += 1
        with torch.no_grad():
            logits = model(torch.tensor([row]))[0]
        logits[:, [MASK, *ENDS]] = -torch.inf
        confidence, best = logits.softmax(-1).max(-1)
        masked = [j for j in places if row[j] == MASK]
        chosen = [j for j in masked if confidence[j] > threshold] or [max(masked, key=lambda j: float(confidence[j]))]
        for j in chosen:
            row[j] = int(best[j])
    return row, nfe


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("block_length", "behind"), [(None, (0, 0, 0)), (4, (3, 4, 2)), (10, (1, 6, 8))])
def test_equals_the_slow_loop(seed, block_length, behind):
    model = random_model(seed)
    prompts = [[5, 6], [], [8]]
    texts = [[9, MASK, MASK, 10, 11, 12, MASK, 5, 6], [MASK, 8, 9, MASK], [MASK, MASK]]
    answers = infill(model, texts, ConfidenceThreshold(0.3), prompts=prompts, block_length=block_length)
    for prompt, text, masks, answer in zip(prompts, texts, behind, answers, strict=True):
        row = [*prompt, *text, *[MASK] * masks]
        places = [j for j in range(len(prompt), len(prompt) + len(text)) if row[j] == MASK]
        expected, nfe = slowly(model, row, places, 0.3)
        assert (answer.tokens, answer.nfe) == (expected[len(prompt) : len(prompt) + len(text)], nfe)


@pytest.mark.parametrize(
    ("changes", "text", "options", "named"),
    [
        ({"causal": True}, [5, MASK], {}, "reads left to right"),
        ({"causal_context": True}, [5, MASK], {}, "reads left to right"),
        ({}, [5, 6], {}, "text 0 has no gap"),
        ({}, [5, MASK], {"batch_size": 0}, "batch_size"),
        ({}, [5, MASK], {"block_length": 0}, "block_length"),
        ({}, [5, MASK], {"temperature": -1.0}, "temperature"),
        ({}, [5, MASK], {"suppress": range(20)}, "every token"),
        ({}, [99, MASK], {}, "token id 99"),
    ],
)
def test_mistakes_are_named(changes, text, options, named):
    with pytest.raises(UserError, match=named):
        infill(random_model(**changes), [text], **options)


def test_no_texts_give_no_answers():
    assert infill(MODEL, []) == []


def test_the_shipped_model_fills_what_both_sides_determine():
    model, tokenizer, _ = load_checkpoint("checkpoints/cmudict")
    words = {
        "keyboard": ["K IY", "B AO", "R D"],
        "lightning": ["L AY", "T N", "IH NG"],
        "morning": ["M AO", "R N", "IH NG"],
        "number": ["N", "AH M", "B ER"],
        "planet": ["P L", "AE", "N AH T"],
        "silver": ["S IH L", "V", "ER"],
    }
    right = 0
    for word, (left, middle, rest) in words.items():
        left, middle, rest = map(tokenizer.encode, (left, middle, rest))
        text = [*left, *[tokenizer.mask_id] * len(middle), *rest]
        [answer] = infill(model, [text], prompts=[tokenizer.encode(word)], block_length=12, tokenizer=tokenizer)
        assert answer.text == tokenizer.decode(answer.tokens)
        right += answer.gaps == [middle]
    assert right >= 5
