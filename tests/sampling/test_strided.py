"""Introspective strided decoding: the model's own text and distribution, in fewer forwards."""

from functools import partial

import pytest
import tiny_models
import torch
from tiny_models import ENDS, MASK, PROMPTS, VOCABULARY, lookup_model, shapes_of

from dllm_var.errors import UserError
from dllm_var.sampling import AutoregressiveSampler, StridedSampler
from dllm_var.sampling.base import sampler_from_config
from dllm_var.sampling.configurable import sampler_to_config

random_model = partial(tiny_models.random_model, causal=True)
constant = partial(lookup_model, {}, causal=True)
FEW = [token for token in range(VOCABULARY) if token not in (3, 6, 7, 8)]  # leaves so few that drafts are often right
FIELDS = ("tokens", "finish_reason", "nfe", "commit_steps", "prompt_length", "drafted", "accepted")


def slowly(model, prompt, stride, limit):
    """Strided decoding without a cache, one place at a time: tokens, finish reason, forwards, drafted, accepted."""

    def said(row):
        logits = model(torch.tensor([row]))[0]
        logits[:, [MASK, *FEW]] = -torch.inf
        return logits.argmax(dim=-1).tolist()

    text, drafts, forwards, drafted, accepted = list(prompt), [], 0, 0, 0
    with torch.no_grad():
        while True:
            forwards += 1
            drafts = drafts[: limit - (len(text) - len(prompt)) - 1]
            own = said(text + drafts)[len(text) - 1 :]
            count = next((n for n, draft in enumerate(drafts) if draft != own[n]), len(drafts))
            drafted, accepted = drafted + min(count + 1, len(drafts)), accepted + count
            text += drafts[:count]
            drafts = said(text + [MASK] * (stride - 1))[len(text) :]  # the masks do not see the token found here
            text.append(own[count])
            answer = text[len(prompt) :]
            for reason, length in (
                ("eos", next((n for n, token in enumerate(answer) if token in ENDS), None)),
                ("length", limit if len(answer) >= limit else None),
            ):
                if length is not None:
                    return answer[:length], reason, forwards, drafted, accepted
            end = next((n for n, token in enumerate(drafts) if token in ENDS), len(drafts))
            drafts = drafts[: end + 1]


@pytest.mark.parametrize("stride", [2, 4, 8])
def test_forwards_and_drafts_are_those_of_the_slow_loop(stride):
    accepted = 0
    for seed in range(4):
        model = random_model(seed)
        sampler = StridedSampler(stride, max_new_tokens=17, batch_size=3)
        for answer, prompt in zip(sampler.generate(model, PROMPTS, suppress=FEW), PROMPTS, strict=True):
            found = (answer.tokens, answer.finish_reason, answer.nfe, answer.drafted, answer.accepted)
            assert found == slowly(model, prompt, stride, 17)
            accepted += answer.accepted
    assert accepted > 10


@pytest.mark.parametrize("settings", [{"stride": 2}, {}, {"least_chance": 0.3}, {"stride": 5, "least_chance": 0.6}])
def test_the_text_is_the_model_s_own_alone_and_in_batches(settings):
    saved, reasons = 0, set()
    for seed in range(3):
        model = random_model(seed)
        sampler = StridedSampler(max_new_tokens=17, batch_size=3, **settings)
        plain = AutoregressiveSampler(max_new_tokens=17).generate(model, PROMPTS, suppress=FEW)
        together = sampler.generate(model, PROMPTS, suppress=FEW)
        for answer, expected, prompt in zip(together, plain, PROMPTS, strict=True):
            alone = sampler.generate(model, [prompt], suppress=FEW)[0]
            assert [getattr(answer, name) for name in FIELDS] == [getattr(alone, name) for name in FIELDS]
            assert (answer.tokens, answer.finish_reason) == (expected.tokens, expected.finish_reason)
            assert answer.nfe <= expected.nfe and answer.accepted <= answer.drafted
            assert sorted(answer.commit_steps) == answer.commit_steps and len(answer.commit_steps) == len(answer.tokens)
            saved += expected.nfe - answer.nfe
            reasons.add(answer.finish_reason)
    assert saved > 0 and reasons == {"eos", "length"}


@pytest.mark.parametrize(
    "settings", [{"temperature": 1.0}, {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "stride": 3}]
)
@pytest.mark.parametrize("batch_size", [3, 5])
def test_drawn_rows_in_a_batch_equal_the_row_alone(batch_size, settings):
    """Seven prompts through few places: rows leave, others take their place, and nobody notices."""
    model = random_model(2)
    sampler = StridedSampler(max_new_tokens=20, batch_size=batch_size, least_chance=0.1, **settings)
    for together, prompt in zip(sampler.generate(model, PROMPTS), PROMPTS, strict=True):
        alone = sampler.generate(model, [prompt])[0]
        assert [getattr(together, name) for name in FIELDS] == [getattr(alone, name) for name in FIELDS]


def outcomes(model, prompt, limit, suppressed, settings):
    """The probability of every text that next-token sampling can draw, in double precision."""
    done, begun = {}, {(): 1.0}
    for _ in range(limit):
        texts = list(begun)
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *text] for text in texts]))[:, -1].double()
        logits[:, [MASK, *suppressed]] = -torch.inf
        scaled = (logits / settings.get("temperature", 1.0)).softmax(dim=-1)
        top_k = settings.get("top_k", 0)
        if top_k:
            scaled[scaled < scaled.topk(top_k).values[:, -1:]] = 0
            scaled /= scaled.sum(dim=-1, keepdim=True)
        longer = {}
        for text, row in zip(texts, scaled.tolist(), strict=True):
            for token, probability in enumerate(row):
                if probability:
                    (done if token in ENDS else longer)[(*text, token)] = begun[text] * probability
        begun = longer
    return done | begun


@pytest.mark.parametrize(
    ("draws", "settings"),
    [
        (4_000, {"temperature": 1.0}),
        (4_000, {"temperature": 1.5, "top_k": 3, "least_chance": 0.35}),  # some drafts are not verified
        pytest.param(100_000, {"temperature": 1.0, "least_chance": 0.2}, marks=pytest.mark.slow),
    ],
)
def test_drawn_texts_have_the_model_s_own_distribution(draws, settings):
    """Pearson's chi-square over whole texts of up to three tokens of a vocabulary of five."""
    model, prompt, suppressed = (
        random_model(1),
        [5, 9, 6],
        [token for token in range(20) if token not in (3, 6, 7, 8, 9)],
    )
    sampler = StridedSampler(3, max_new_tokens=3, batch_size=4_000, seed=5, **settings)
    answers = sampler.generate(model, [prompt] * draws, suppress=suppressed)
    assert 0.1 < sum(a.accepted for a in answers) / sum(a.drafted for a in answers) < 0.9
    expected = outcomes(model, prompt, 3, suppressed, settings)
    assert sum(expected.values()) == pytest.approx(1)
    observed = dict.fromkeys(expected, 0)
    for answer in answers:
        observed[(*answer.tokens, *([3] if answer.finish_reason == "eos" else []))] += 1
    often = [text for text in expected if draws * expected[text] > 8]
    cells = [(observed[text], draws * expected[text]) for text in often]
    cells.append((draws - sum(o for o, _ in cells), draws - sum(e for _, e in cells)))
    statistic = sum((o - e) ** 2 / e for o, e in cells if e > 1)
    freedom = sum(e > 1 for _, e in cells) - 1
    assert freedom > 12
    chance = torch.special.gammaincc(torch.tensor(freedom / 2).double(), torch.tensor(statistic / 2).double())
    assert chance > 1e-3


def test_right_drafts_are_accepted_whole_with_one_more_token():
    answer = StridedSampler(4, max_new_tokens=13).generate(constant(7), [[5, 6]])[0]
    assert (answer.tokens, answer.finish_reason, answer.nfe) == ([7] * 13, "length", 4)
    assert answer.commit_steps == [1] + [2] * 4 + [3] * 4 + [4] * 4
    assert (answer.drafted, answer.accepted) == (9, 9)


def test_no_forward_without_drafts_follows_a_rejection():
    """Masks say 7, the text alternates: one draft of each forward is right, and the token behind it is new."""
    model = lookup_model({7: 8, 8: 7, MASK: 7}, 8, causal=True)
    answer = StridedSampler(4, max_new_tokens=9).generate(model, [[5]])[0]
    assert answer.tokens == [8, 7, 8, 7, 8, 7, 8, 7, 8]
    assert answer.commit_steps == [1, 2, 2, 3, 3, 4, 4, 5, 5]


def test_a_forward_reads_what_may_help_and_no_more():
    """Two equally likely tokens at each mask: the first draft is right with chance 1/2, the first two with 1/4."""
    model = lookup_model({MASK: (7, 8)}, 7, causal=True)
    with torch.no_grad():
        model.lm_head.weight.mul_(30)  # as good as sure of these
    widths = {}
    for least in (0.0, 0.2, 0.3, 0.6):
        shapes = shapes_of(model)
        StridedSampler(4, least_chance=least, max_new_tokens=40).generate(model, [[5, 6]])
        widths[least] = [width for _, width in shapes[:2]]
    assert widths == {
        0.0: [2 + 3, 1 + 3 + 4 * 3],  # three drafts; masks behind the text and each of them
        0.2: [2 + 3, 1 + 2 + 3 * 3],  # none is accepted with chance 1/2, one with 1/4, both with 1/4
        0.3: [2 + 3, 1 + 1 + 2 * 3],
        0.6: [2 + 3, 1 + 3],  # no draft is worth it
    }


def test_nothing_is_drafted_behind_a_terminator_or_the_longest_answer():
    ending = lookup_model({MASK: 3}, 7, causal=True)
    shapes = shapes_of(ending)
    StridedSampler(4, max_new_tokens=30).generate(ending, [[5, 6]])
    assert shapes[1] == (1, 1 + 1 + 3)  # one draft, which would end the answer: masks behind the text alone
    model = constant(7)
    shapes = shapes_of(model)
    answer = StridedSampler(8, max_new_tokens=3).generate(model, [[5, 6]])[0]
    assert (answer.tokens, answer.nfe) == ([7] * 3, 2)
    assert shapes == [(1, 2 + 1), (1, 1 + 1)]  # the first token and one draft; the model says the third


@pytest.mark.parametrize(("trust", "forwards"), [(None, 6), (0.6, 6), (0.4, 3)])
def test_trusted_drafts_are_not_verified(trust, forwards):
    """Masks say 7 or 8, equally likely; 7 is taken, which the model would not have said itself."""
    model = lookup_model({MASK: (7, 8), 7: 7}, 6, causal=True)
    with torch.no_grad():
        model.lm_head.weight.mul_(30)
    answer = StridedSampler(4, max_new_tokens=6, trust=trust).generate(model, [[5]])[0]
    assert answer.nfe == forwards
    assert answer.tokens == ([6] * 6 if forwards == 6 else [6, 7, 7, 7, 7, 7])


def test_a_trusted_terminator_ends_the_answer_in_the_same_forward():
    model = lookup_model({MASK: 3}, 7, causal=True)
    answer = StridedSampler(4, trust=0.0).generate(model, [[5, 6]])[0]
    assert (answer.tokens, answer.finish_reason, answer.nfe, answer.drafted) == ([7], "eos", 1, 0)


def test_answers_are_streamed_as_they_grow_and_end_before_a_stop_string():
    heard = []
    sampler = StridedSampler(4, max_new_tokens=9)
    answer = sampler.generate(constant(7), [[5]], on_block=lambda index, tokens: heard.append(list(tokens)))[0]
    assert [len(tokens) for tokens in heard] == [1, 5, 9] and heard[-1] == answer.tokens
    stopped = sampler.generate(constant(7), [[5]], tokenizer=tiny_models.TOKENIZER, stop=["w7 w7 w7"])[0]
    assert (stopped.tokens, stopped.finish_reason) == ([], "stop")


def test_a_checkpoint_remembers_the_sampler():
    sampler = StridedSampler(6, least_chance=0.1, trust=0.9, max_new_tokens=77)
    again = sampler_from_config(sampler_to_config(sampler))
    assert vars(again) == vars(sampler)


@pytest.mark.parametrize(("settings", "named"), [({"stride": 1}, "stride"), ({"trust": 2.0}, "trust")])
def test_impossible_settings_are_refused(settings, named):
    with pytest.raises(UserError, match=rf"sampler\.{named}"):
        StridedSampler(**settings)


def test_models_that_cannot_be_decoded_are_refused():
    with pytest.raises(UserError, match="bidirectional"):
        StridedSampler().generate(tiny_models.random_model(), [[5]])
    with pytest.raises(UserError, match="mask_id"):
        StridedSampler().generate(random_model(mask_id=None), [[5]])
