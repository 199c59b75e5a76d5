"""Published block-causal families: SDAR and Fast-dLLM v2 against plain readings of their forward and their decoding."""

import json

import pytest
import torch
from byte_tokenizer import write_byte_tokenizer
from published import (
    FAST_DLLM_V2_CONFIG,
    SDAR_CONFIG,
    SDAR_MOE_CONFIG,
    VOCABULARY,
    fast_dllm_v2_generate,
    sdar_generate,
    transformers_model,
    write_block_causal,
)

from dllm_var.__main__ import main
from dllm_var.checkpoints.pretrained import load_pretrained, open_checkpoint
from dllm_var.errors import UserError
from dllm_var.model import KVCache
from dllm_var.sampling.base import sampler_from_config
from dllm_var.text.tokenizer import Tokenizer

MASK, ENDS = VOCABULARY - 1, [3]
IDS = torch.randint(0, VOCABULARY, (2, 70), generator=torch.Generator().manual_seed(0))
FAST = {**FAST_DLLM_V2_CONFIG, "mask_token_id": MASK}
CONFIGS = {"sdar-b4": SDAR_CONFIG, "sdar-b16": {**SDAR_CONFIG, "block_size": 16}, "fast-dllm-v2": FAST}
CONFIGS["sdar-moe"] = SDAR_MOE_CONFIG
CONFIGS["fast-dllm-v2-tied"] = {**FAST, "tie_word_embeddings": True}  # as the one of 1.5B


def shifted(logits):
    """Logits of a head that predicts the next token, at the positions of the tokens."""
    return torch.cat((logits[:, :1], logits[:, :-1]), dim=1)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_logits_are_those_of_the_published_forward(name, tmp_path):
    reference = write_block_causal(tmp_path, CONFIGS[name])
    model = load_pretrained(tmp_path)
    grid = model.config.block_length
    for length in (1, 3, 4, 31, 32, 33, 70):
        ids = IDS[:, :length]
        expected = shifted(reference(ids)) if model.config.token_shift else reference(ids)
        torch.testing.assert_close(model(ids), expected, atol=1e-5, rtol=1e-5)
    cache = KVCache(model.config, 2, 70, "cpu", torch.float32)
    found = []
    for piece in (IDS[:, : 2 * grid], IDS[:, 2 * grid : 3 * grid], IDS[:, 3 * grid :]):
        if piece.size(1):
            cache.open(piece.size(1))
            found.append(model(piece, cache=cache))
            cache.advance(torch.full((2,), piece.size(1)))
    torch.testing.assert_close(torch.cat(found, dim=1), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("blocks", [0, 32])
@torch.no_grad()
def test_dllm_s_models_read_all_of_a_text_or_blocks(kind, blocks, tmp_path):
    """Their file does not say if they come from MDLM or BD3LM: it must be added."""
    reference = transformers_model(kind, **({"head_dim": 16} if kind == "Qwen3" else {}))
    reference.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    values |= {"model_type": f"a2d-{kind.lower()}", "architectures": [f"A2D{kind}LMHeadModel"]}
    file.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"no block_size, .*: add it, 0 for a model of MDLM"):
        open_checkpoint(tmp_path)
    file.write_text(json.dumps({**values, "block_size": blocks}))
    model, place = load_pretrained(tmp_path), torch.arange(70) // (blocks or 70)
    hidden = torch.zeros(70, 70).masked_fill(place[:, None] < place, -torch.inf)
    expected = reference(IDS, attention_mask=hidden.expand(2, 1, -1, -1), use_cache=False).logits
    torch.testing.assert_close(model(IDS), expected, atol=1e-5, rtol=1e-5)
    sampler = open_checkpoint(tmp_path).meta.get("sampler")
    assert (sampler and sampler["init_args"]) == ({"block_length": 32} if blocks else None)


def decode(folder, prompts, blocks, batch_size=3, **policy):
    """The answers of the sampler that comes with a checkpoint, its policy changed, and that sampler."""
    checkpoint = open_checkpoint(folder)
    described = checkpoint.meta["sampler"]
    if policy:
        described["init_args"]["policy"] = policy
    sampler, model = sampler_from_config(described), load_pretrained(folder)
    sampler.batch_size, length = batch_size, model.config.block_length
    answers = []
    for group in {blocks * length - len(prompt) for prompt in prompts}:
        same = [prompt for prompt in prompts if blocks * length - len(prompt) == group]
        answers += zip(same, sampler.generate(model, same, max_new_tokens=group), strict=True)
    return answers, sampler


def policy_of(name, **arguments):
    return {"class_path": f"dllm_var.sampling.policies.{name}", "init_args": arguments}


PROMPTS = [
    [token % 50 + 4 for token in IDS[0, n : n + length].tolist()] for n, length in enumerate((1, 3, 4, 5, 8, 13))
]


@pytest.mark.parametrize("threshold", [0.08, 0.12, 0.85])
@pytest.mark.parametrize("size", [4, 8])
def test_sdar_decodes_as_its_release_does(size, threshold, tmp_path):
    """With `low_confidence_dynamic`, for prompts that end anywhere in a block; several rows at a time."""
    reference = write_block_causal(tmp_path, {**SDAR_CONFIG, "block_size": size})
    answers, sampler = decode(tmp_path, PROMPTS, 6, **policy_of("ConfidenceThreshold", threshold=threshold))
    assert (sampler.block_length, sampler.terminator_last) == (size, False)
    for prompt, answer in answers:
        assert answer.tokens == sdar_generate(reference, prompt, 6, size, MASK, ENDS, threshold), len(prompt)
    if threshold == 0.08:
        assert sum(answer.nfe for _, answer in answers) < sum(len(answer.tokens) for _, answer in answers)


@pytest.mark.parametrize(("steps", "prompts"), [(8, PROMPTS), (3, [PROMPTS[4], [*PROMPTS[4], *PROMPTS[4]]])])
def test_sdar_s_static_rule_is_a_fixed_number_of_steps(steps, prompts, tmp_path):
    """`low_confidence_static`; fewer steps than tokens only for prompts of whole blocks, where none is cut short."""
    reference = write_block_causal(tmp_path, {**SDAR_CONFIG, "block_size": 8})
    for prompt, answer in decode(tmp_path, prompts, 5, **policy_of("FixedSteps", steps=steps))[0]:
        assert answer.tokens == sdar_generate(reference, prompt, 5, 8, MASK, ENDS, steps=steps), len(prompt)


@pytest.mark.parametrize("threshold", [0.1, *(pytest.param(one, marks=pytest.mark.slow) for one in (0.2, 0.9))])
def test_fast_dllm_v2_decodes_as_its_release_does(threshold, tmp_path):
    """In sub-blocks of 8; a block's first token is that which the forward before it predicts, however sure."""
    reference = write_block_causal(tmp_path, FAST)
    prompts = [*PROMPTS, IDS[1, :31].tolist(), IDS[1, :32].tolist(), IDS[1, :47].tolist()]
    prompts = [[token % 50 + 4 for token in prompt] for prompt in prompts]
    answers, sampler = decode(tmp_path, prompts, 3, **policy_of("ConfidenceThreshold", threshold=threshold))
    assert (sampler.block_length, sampler.terminator_last) == (8, False)
    for prompt, answer in answers:
        expected = fast_dllm_v2_generate(reference, prompt, 3, 32, 8, MASK, ENDS, threshold)
        assert answer.tokens == expected, len(prompt)
    if threshold == 0.1:
        assert sum(answer.nfe for _, answer in answers) < sum(len(answer.tokens) for _, answer in answers)


def test_generate_decodes_a_folder_as_its_release_does(tmp_path, capsys):
    """The mask that only Fast-dLLM v2's code names is the tokenizer's `|<MASK>|`; sub-blocks of 8, threshold 0.9."""
    config = {**FAST_DLLM_V2_CONFIG, "vocab_size": 270, "eos_token_id": 260}
    reference = write_block_causal(tmp_path / "hub", config)
    write_byte_tokenizer(tmp_path / "hub", mask_token=None)
    tokenizer = tmp_path / "hub" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"<|mask|>"', '"|<MASK>|"'))
    arguments = ["generate", "--checkpoint", str(tmp_path / "hub"), "--prompt", "0123456789"]
    assert main([*arguments, "--json", "--sampler.max_new_tokens", "54"]) == 0
    answer = json.loads(capsys.readouterr().out)
    prompt = Tokenizer.from_pretrained(tmp_path / "hub").encode("0123456789")
    assert answer["tokens"] == fast_dllm_v2_generate(reference, prompt, 2, 32, 8, 257, [260], 0.9)
