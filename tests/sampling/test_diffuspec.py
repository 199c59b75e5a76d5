"""Speculative decoding: always the target's own text, in fewer of its forwards, whatever the drafter says."""

import pytest
import torch
from tiny_models import ENDS, MASK, PROMPTS, TOKENIZER, VOCABULARY, lookup_model, random_model, save, shapes_of

from dllm_var.errors import UserError
from dllm_var.sampling import AutoregressiveSampler, DiffuSpecSampler
from dllm_var.sampling.base import sampler_from_config
from dllm_var.sampling.configurable import sampler_to_config
from dllm_var.text.tokenizer import SpecialTokens, Tokenizer

FEW = [token for token in range(VOCABULARY) if token not in (3, 6, 7, 8)]  # leaves so few that models often agree
FIELDS = ("tokens", "finish_reason", "nfe", "auxiliary_nfe", "commit_steps", "prompt_length", "drafted", "accepted")
SHORT = dict(shortest_draft=3, longest_draft=5)


def constant(token, **changes):
    return lookup_model({}, token, **changes)


@pytest.mark.parametrize("settings", [SHORT, {}, {"shortest_draft": 1, "longest_draft": 1}])
def test_the_text_is_the_target_s_own(settings, tmp_path):
    """Seven prompts of different lengths through three places; drafts of models that have nothing to do with it."""
    saved, reasons = 0, set()
    for seed in range(2):
        target = random_model(seed, causal=True)
        folder = save(random_model(seed + 10), tmp_path / str(seed))
        sampler = DiffuSpecSampler(folder, max_new_tokens=17, batch_size=3, **settings)
        plain = AutoregressiveSampler(max_new_tokens=17).generate(target, PROMPTS, suppress=FEW)
        for together, expected, prompt in zip(
            sampler.generate(target, PROMPTS, suppress=FEW), plain, PROMPTS, strict=True
        ):
            alone = sampler.generate(target, [prompt], suppress=FEW)[0]
            assert [getattr(together, name) for name in FIELDS] == [getattr(alone, name) for name in FIELDS]
            assert (alone.tokens, alone.finish_reason) == (expected.tokens, expected.finish_reason)
            assert alone.nfe <= expected.nfe and alone.auxiliary_nfe <= alone.nfe
            assert sorted(alone.commit_steps) == alone.commit_steps and len(alone.commit_steps) == len(alone.tokens)
            saved += expected.nfe - alone.nfe
            reasons.add(alone.finish_reason)
    assert saved > 10 and reasons == {"eos", "length"}


def test_a_right_draft_is_accepted_whole_with_one_more_token(tmp_path):
    target, drafter = constant(7, causal=True), constant(7)
    sampler = DiffuSpecSampler(save(drafter, tmp_path), max_new_tokens=24, **SHORT)
    answer = sampler.generate(target, [[5, 6]])[0]
    assert (answer.tokens, answer.finish_reason) == ([7] * 24, "length")
    assert (answer.nfe, answer.auxiliary_nfe) == (4, 4)  # 5 drafted and one of its own, four times
    assert (answer.drafted, answer.accepted) == (20, 20)
    assert answer.commit_steps == [1] * 6 + [2] * 6 + [3] * 6 + [4] * 6


def test_the_last_token_of_all_is_not_drafted(tmp_path):
    target, drafter = constant(7, causal=True), constant(7)
    sampler = DiffuSpecSampler(save(drafter, tmp_path), **SHORT)
    answer = sampler.generate(target, [[5, 6]], max_new_tokens=7)[0]
    assert (answer.tokens, answer.nfe, answer.auxiliary_nfe) == ([7] * 7, 2, 1)


def test_a_drafted_terminator_ends_draft_and_row(tmp_path):
    """Behind a 7 both models say 3, which ends the answer; the drafter puts its end where the masks begin."""
    target, drafter = lookup_model({6: 3}, 7, causal=True), constant(3)
    sampler = DiffuSpecSampler(save(drafter, tmp_path), **SHORT)
    shapes = shapes_of(target)
    answer = sampler.generate(target, [[5, 6]])[0]
    assert (answer.tokens, answer.finish_reason, answer.nfe, answer.auxiliary_nfe) == ([], "eos", 1, 1)
    assert shapes == [(1, 2 + 1)]  # nothing is verified behind the end


def test_nothing_is_read_twice_and_the_file_is_read_once(tmp_path):
    """The drafter accepts being wrong from the second token on: 7 where the target says 8 behind every 7."""
    target, drafter = lookup_model({7: 8, 8: 8}, 7, causal=True), constant(7)
    sampler = DiffuSpecSampler(save(drafter, tmp_path), max_new_tokens=8, shortest_draft=2, longest_draft=4)
    sampler.generate(target, [[5]])
    loaded = sampler.auxiliary.beside(target, type("Request", (), {"tokenizer": None}))
    (tmp_path / "model.safetensors").unlink()
    targets, drafters = shapes_of(target), shapes_of(loaded)
    answer = sampler.generate(target, [[5, 6, 5]])[0]
    assert answer.tokens == [7] + [8] * 7
    assert answer.drafted > answer.accepted == 1  # only the first 7
    assert drafters[:2] == [(1, 3 + 4), (1, 2 + 2)]  # what is new, and masks
    assert targets[:2] == [(1, 3 + 4), (1, 1 + 2)]  # the newest token, and the draft


@pytest.mark.parametrize(
    ("said", "lengths"),
    [
        (7, [6, 6, 6, 6]),  # everything is accepted: as long as may be
        (8, [6, 3, 3, 3]),  # nothing is: half of 6 is the running mean, and then half of 3 and 3
    ],
)
def test_drafts_are_as_long_as_the_controller_says(said, lengths, tmp_path):
    target, drafter = constant(said, causal=True), constant(7)
    sampler = DiffuSpecSampler(save(drafter, tmp_path), max_new_tokens=60, shortest_draft=2, longest_draft=6)
    loaded = sampler.auxiliary.beside(target, type("Request", (), {"tokenizer": None}))
    shapes = shapes_of(loaded)
    sampler.generate(target, [[5]])
    pending = [1] + [length + 1 if said == 7 else 1 for length in lengths]
    assert [width for _, width in shapes[:4]] == [p + n for p, n in zip(pending, lengths, strict=False)]


def alternating(**changes):
    return lookup_model({7: 8, 8: 7}, 7, **changes)


def test_the_corpus_decides_between_candidates_that_the_drafter_finds_equally_likely(tmp_path):
    """The drafter says 7 or 8 everywhere; the target takes turns, and so does the corpus."""
    folder = save(lookup_model({MASK: (7, 8)}, 7), tmp_path / "drafter")
    (tmp_path / "corpus.txt").write_text("\n".join(["w7 w8 " * 10] * 20) + "\n\n")
    target, settings = alternating(causal=True), dict(max_new_tokens=25, shortest_draft=4, longest_draft=4)
    plain = DiffuSpecSampler(folder, **settings).generate(target, [[5, 8]])[0]
    guided = DiffuSpecSampler(folder, **settings, corpus=str(tmp_path / "corpus.txt")).generate(target, [[5, 8]])[0]
    assert plain.tokens == guided.tokens == [7, 8] * 12 + [7]
    assert guided.nfe == 5 < plain.nfe  # 4 drafted and one more, each time


def test_a_request_s_own_tokens_count_without_a_corpus(tmp_path):
    folder = save(lookup_model({MASK: (7, 8)}, 7), tmp_path)
    target = alternating(causal=True)
    sampler = DiffuSpecSampler(folder, max_new_tokens=25, shortest_draft=4, longest_draft=4)
    answers = sampler.generate(target, [[5, 8], [5, *[7, 8] * 6]])
    assert answers[1].nfe == 5 < answers[0].nfe
    assert DiffuSpecSampler(folder, max_new_tokens=25, mix=1.0, **SHORT).generate(target, [[5, *[7, 8] * 6]])[0].nfe > 5


def test_candidates_are_the_nucleus_and_no_more_than_asked_for(tmp_path):
    """With one candidate, or a nucleus that one fills, the n-gram model has nothing to choose from."""
    folder = save(lookup_model({MASK: (7, 8)}, 7), tmp_path)
    target, settings = alternating(causal=True), dict(max_new_tokens=25, shortest_draft=4, longest_draft=4)
    prompt = [[5, *[7, 8] * 6]]
    for narrow in ({"candidates": 1}, {"nucleus": 0.2}):
        assert DiffuSpecSampler(folder, **settings, **narrow).generate(target, prompt)[0].nfe > 5


def test_a_drafter_that_does_not_fit_is_named(tmp_path):
    target = random_model(causal=True)
    other = Tokenizer(TOKENIZER.backend, SpecialTokens(18, ENDS, 0))
    for drafter, named in [
        (save(random_model(causal=True), tmp_path / "causal"), "sampler.drafter .*causal is autoregressive"),
        (save(random_model(mask_id=18), tmp_path / "mask", other), "sampler.drafter .*mask has another tokenizer"),
        (str(tmp_path / "nowhere"), "no checkpoint at"),
    ]:
        with pytest.raises(UserError, match=named):
            DiffuSpecSampler(drafter).generate(target, [[5]], tokenizer=TOKENIZER)
    folder = save(random_model(), tmp_path / "fits")
    with pytest.raises(UserError, match="bidirectional"):
        DiffuSpecSampler(folder).generate(random_model(), [[5]])
    with pytest.raises(UserError, match=r"nowhere\.txt"):
        DiffuSpecSampler(folder, corpus="nowhere.txt").generate(target, [[5]])


@pytest.mark.parametrize(
    "settings", [{"longest_draft": 5}, {"beam": 0}, {"candidates": 0}, {"nucleus": 0.0}, {"mix": 1.5}]
)
def test_settings_out_of_range_are_named(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        DiffuSpecSampler("x", **settings)


def test_settings_are_remembered():
    config = sampler_to_config(
        DiffuSpecSampler("some/folder", shortest_draft=7, longest_draft=8, mix=0.25, corpus="corpus.txt")
    )
    assert config["class_path"] == "dllm_var.sampling.DiffuSpecSampler"
    assert config["init_args"]["drafter"] == "some/folder" and config["init_args"]["corpus"] == "corpus.txt"
    with pytest.raises(UserError, match=r"may not name other files.*--sampler\.drafter"):
        sampler_from_config(config)


def test_answers_may_be_longer_than_any_draft(tmp_path):
    """A long request beside a short one: each row at its own place, none of them out of room."""
    target = random_model(1, causal=True)
    sampler = DiffuSpecSampler(save(random_model(2), tmp_path), batch_size=2)
    prompts = [[5], torch.arange(5, 17).repeat(10).tolist()]
    answers = sampler.generate(target, prompts, max_new_tokens=60, suppress=ENDS)
    plain = AutoregressiveSampler().generate(target, prompts, max_new_tokens=60, suppress=ENDS)
    assert [a.tokens for a in answers] == [a.tokens for a in plain] and len(answers[0].tokens) == 60
