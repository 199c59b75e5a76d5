"""Guided diffusion against the obvious loop, and with guides whose opinion is known."""

import pytest
import torch
from slow_reference import _forward_block
from tiny_models import ENDS, MASK, PROMPTS, TOKENIZER, VOCABULARY, lookup_model, random_model, save, shapes_of

from dllm_var.errors import UserError
from dllm_var.sampling import GuidedSampler
from dllm_var.sampling.base import sampler_from_config
from dllm_var.sampling.configurable import sampler_to_config
from dllm_var.text.tokenizer import SpecialTokens, Tokenizer

FEW = [token for token in range(VOCABULARY) if token not in (3, 6, 7, 8)]  # leaves so few that models often agree
FIELDS = ("tokens", "finish_reason", "nfe", "auxiliary_nfe", "commit_steps", "prompt_length")


def slowly(model, guide, prompt, block_length, limit, kv_commit):
    """One row, no cache: tokens, finish reason, forwards of the model and of the guide."""
    finished, nfe, guide_nfe = [list(prompt)], 0, 0
    while True:
        done = sum(map(len, finished)) - len(prompt)
        if done == limit:
            return [t for block in finished[1:] for t in block], "length", nfe, guide_nfe
        width = min(block_length, limit - done)
        block = [MASK] * width
        nfe += kv_commit == "alone"
        while MASK in block:
            nfe += 1
            logits = _forward_block(model, finished, block, block_length, limit, len(prompt), kv_commit)
            logits[:, [MASK, *FEW]] = -torch.inf
            start = block.index(MASK)
            proposal = block[:start] + logits.argmax(-1).tolist()[start:]
            count = 1
            if start < width - 1:
                guide_nfe += 1  # and the last one left needs no second opinion
                row = [t for part in finished for t in part]
                expected = guide(torch.tensor([row + proposal]))[0]
                expected[:, [MASK, *FEW]] = -torch.inf
                expected = expected.argmax(-1)[len(row) - 1 : -1].tolist()
                agreed = 0
                while start + agreed < width and expected[start + agreed] == proposal[start + agreed]:
                    agreed += 1
                count = max(1, agreed)
            for place in range(start, start + count):
                block[place] = proposal[place]
                if block[place] in ENDS:
                    return [t for part in finished[1:] for t in part] + block[:place], "eos", nfe, guide_nfe
        finished.append(block)


@pytest.mark.parametrize(("kv_commit", "block_length"), [("joint_next", 5), ("alone", 5), ("joint_next", 1)])
def test_equals_the_slow_loop_alone_and_in_a_batch(kv_commit, block_length, tmp_path):
    """Seven prompts of different lengths through three places, so that guides' caches are shared and reused."""
    reasons, committed = set(), []
    with torch.no_grad():
        for seed in (0, 2):
            model, guide = random_model(seed), random_model(seed + 10, causal=True, num_layers=1)
            folder = save(guide, tmp_path / str(seed))
            sampler = GuidedSampler(
                folder, block_length=block_length, max_new_tokens=13, batch_size=3, kv_commit=kv_commit
            )
            for together, prompt in zip(sampler.generate(model, PROMPTS, suppress=FEW), PROMPTS, strict=True):
                alone = sampler.generate(model, [prompt], suppress=FEW)[0]
                assert [getattr(together, name) for name in FIELDS] == [getattr(alone, name) for name in FIELDS]
                found = (alone.tokens, alone.finish_reason, alone.nfe, alone.auxiliary_nfe)
                assert found == slowly(model, guide, prompt, block_length, 13, kv_commit)
                reasons.add(alone.finish_reason)
                committed += [alone.commit_steps.count(step) for step in set(alone.commit_steps)]
    assert reasons == {"eos", "length"}
    if block_length > 1:  # or the comparison proves little
        assert len(set(committed)) > 2


def test_a_guide_that_agrees_lets_a_whole_block_pass(tmp_path):
    model = lookup_model({}, 7)
    guide = lookup_model({}, 7, causal=True)
    answer = GuidedSampler(save(guide, tmp_path), block_length=6, max_new_tokens=24).generate(model, [[5, 6]])[0]
    assert (answer.tokens, answer.finish_reason) == ([7] * 24, "length")
    assert (answer.nfe, answer.auxiliary_nfe) == (4, 4)


def test_a_guide_that_disagrees_slows_down_and_changes_nothing(tmp_path):
    """One token per forward, and always the diffusion model's own; a block's last one needs no guide."""
    model = lookup_model({}, 7)
    guide = lookup_model({}, 8, causal=True)
    answer = GuidedSampler(save(guide, tmp_path), block_length=6, max_new_tokens=24).generate(model, [[5, 6]])[0]
    assert (answer.tokens, answer.nfe, answer.auxiliary_nfe) == ([7] * 24, 24, 20)


def test_the_prefix_up_to_the_first_disagreement_is_committed(tmp_path):
    """The guide counts upwards; the diffusion model always says 7: they agree right behind a 6, and nowhere else."""
    model = lookup_model({}, 7)
    counting = lookup_model({token: token + 1 for token in range(5, 18)}, 5, causal=True)
    answer = GuidedSampler(save(counting, tmp_path), block_length=4, max_new_tokens=4).generate(model, [[5, 6]])[0]
    assert answer.commit_steps == [1, 2, 3, 4]  # 7 behind 6, as expected; then 8 is, in vain
    stuttering = lookup_model({6: 7, 7: 7}, 5, causal=True)
    assert (
        GuidedSampler(save(stuttering, tmp_path), block_length=4, max_new_tokens=4)
        .generate(model, [[5, 6]])[0]
        .commit_steps
        == [1] * 4
    )
    assert GuidedSampler(save(stuttering, tmp_path), block_length=4, max_new_tokens=4).generate(model, [[5, 9]])[
        0
    ].commit_steps == [1, 2, 2, 2]


def test_an_agreed_terminator_ends_the_row(tmp_path):
    model = lookup_model({}, 3)
    guide = lookup_model({}, 3, causal=True)
    answer = GuidedSampler(save(guide, tmp_path), block_length=6).generate(model, [[5, 6]])[0]
    assert (answer.tokens, answer.finish_reason, answer.nfe, answer.auxiliary_nfe) == ([], "eos", 1, 1)


def test_the_guide_reads_nothing_twice(tmp_path):
    """Its forwards read the prompt and one proposal, then only what is new or was rejected; the file is read once."""
    model, guide = lookup_model({}, 7), lookup_model({}, 8, causal=True)
    sampler = GuidedSampler(save(guide, tmp_path), block_length=4, max_new_tokens=8)
    sampler.generate(model, [[5]])
    loaded = sampler.auxiliary.beside(model, request=type("Request", (), {"tokenizer": None}))
    shapes = shapes_of(loaded)
    (tmp_path / "model.safetensors").unlink()
    answer = sampler.generate(model, [[5, 6, 9]])[0]
    assert shapes == [(1, 3 + 3), (1, 3), (1, 2), (1, 4), (1, 3), (1, 2)] and answer.auxiliary_nfe == 6


def test_a_guide_that_does_not_fit_is_named(tmp_path):
    model = random_model()
    other = Tokenizer(TOKENIZER.backend, SpecialTokens(18, ENDS, 0))
    for guide, named in [
        (save(random_model(), tmp_path / "both_ways"), "sampler.guide .*both_ways is bidirectional"),
        (
            save(random_model(causal=True, mask_id=18), tmp_path / "other", other),
            "sampler.guide .*other has another tokenizer",
        ),
        (save(random_model(causal=True, vocab_size=21), tmp_path / "more"), "vocab_size 21, the model 20"),
        (save(random_model(causal=True, terminator_ids=[3]), tmp_path / "ends"), "terminator_ids"),
        (str(tmp_path / "nowhere"), "no checkpoint at"),
    ]:
        with pytest.raises(UserError, match=named):
            GuidedSampler(guide).generate(model, [[5]], tokenizer=TOKENIZER)


def test_settings_are_remembered_and_bad_ones_named():
    config = sampler_to_config(GuidedSampler("some/folder", block_length=5, kv_commit="alone"))
    assert config["class_path"] == "dllm_var.sampling.GuidedSampler" and config["init_args"]["guide"] == "some/folder"
    with pytest.raises(UserError, match=r"may not name other files.*--sampler\.guide"):
        sampler_from_config(config)
    with pytest.raises(UserError, match="block_length"):
        GuidedSampler("x", block_length=0)
    with pytest.raises(UserError, match="autoregressive"):
        GuidedSampler("x").generate(random_model(causal=True), [[5]])
