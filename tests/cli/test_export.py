"""`export`: folders that transformers opens, and a way back that loses nothing."""

import json
from pathlib import Path

import pytest
import torch
from byte_tokenizer import CHAT_TEMPLATE, write_byte_tokenizer

from dllm_var.__main__ import main
from dllm_var.checkpoints.export import export_checkpoint, save_checkpoint_folder
from dllm_var.checkpoints.families import FORMATS
from dllm_var.checkpoints.pretrained import load_checkpoint, load_pretrained, open_checkpoint
from dllm_var.model import KVCache, Transformer, TransformerConfig
from dllm_var.sampling.base import sampler_from_config
from dllm_var.text.tokenizer import Tokenizer

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64.0}
SAMPLER = {
    "class_path": "dllm_var.sampling.BlockDiffusionSampler",
    "init_args": {
        "policy": {"class_path": "dllm_var.sampling.ConfidenceThreshold", "init_args": {"threshold": 0.7}},
        "block_length": 16,
    },
}
IDS = torch.randint(0, 256, (2, 30), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = write_byte_tokenizer(tmp_path_factory.mktemp("tokenizer"), CHAT_TEMPLATE)
    return Tokenizer.from_pretrained(folder, terminators=["<|im_end|>", "<|endoftext|>"])


def trained(folder, tokenizer, dtype=torch.float32, sampler=SAMPLER, **changes):
    """A checkpoint as training leaves it."""
    torch.manual_seed(0)
    special = dict(mask_id=tokenizer.mask_id, terminator_ids=list(tokenizer.terminator_ids), pad_id=tokenizer.pad_id)
    config = TransformerConfig(
        **{
            **dict(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, initializer_range=0.2),
            **special,
            **changes,
        },
        vocab_size=tokenizer.vocab_size,
    )
    model = Transformer(config).to(dtype)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    save_checkpoint_folder(folder, model.eval(), tokenizer, {"sampler": sampler, "step": 7})
    return model


def export(folder, output, *options):
    return main(["export", "--checkpoint", str(folder), "--output", str(output), *options])


ROUND_TRIPS = [
    ("llada", {}),
    ("llada", {"tie_embeddings": True, "qkv_bias": True, "rope_scaling": 4.0, "context_length": 512}),
    ("dream", {"qkv_bias": True, "token_shift": True}),
    ("llama", {"tie_embeddings": True, "rope_llama3": LLAMA3, "head_dim": 16}),
    ("llama", {"causal": True}),
    ("qwen2", {"qkv_bias": True, "token_shift": True}),
    ("qwen3", {"qk_norm": True, "head_dim": 16, "rope_theta": 1e6, "rope_scaling": 3.3}),
    ("qwen3", {"qk_norm": True, "causal_context": True}),
    ("sdar", {"qk_norm": True, "head_dim": 16, "tie_embeddings": True, "block_causal": True, "block_length": 16}),
    (
        "sdar_moe",
        {
            **dict(qk_norm=True, block_causal=True, block_length=4, num_experts=8, experts_per_token=2),
            **dict(expert_intermediate_size=16, router_normalise=True),
        },
    ),
    (
        "fast_dllm_v2",
        {"qkv_bias": True, "token_shift": True, "rope_theta": 1e6, "block_causal": True, "block_length": 32},
    ),
]


@pytest.mark.parametrize(("name", "changes"), ROUND_TRIPS)
def test_the_way_there_and_back_loses_nothing(name, changes, tmp_path, tokenizer):
    sampler = None if changes.get("causal") else SAMPLER
    model = trained(
        tmp_path / "run", tokenizer, torch.bfloat16 if name == "qwen3" else torch.float32, sampler, **changes
    )
    assert export(tmp_path / "run", tmp_path / "out", "--format", name) == 0
    again, its_tokenizer, meta = load_checkpoint(tmp_path / "out")
    assert again.config == model.config
    assert its_tokenizer.fingerprint == tokenizer.fingerprint
    assert meta["sampler"] == sampler and meta["step"] == 7
    for (key, ours), theirs in zip(model.named_parameters(), again.parameters(), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), key
    with torch.no_grad():  # in float32: a CPU may round 16-bit products of the same matrices in two ways
        assert torch.equal(model.float()(IDS), again.float()(IDS))
    assert not list(tmp_path.glob(".out*"))
    # and once more, from what was exported
    export_checkpoint(open_checkpoint(tmp_path / "out"), FORMATS[name], tmp_path / "twice", {}, shard_bytes=10_000)
    assert len(list((tmp_path / "twice").glob("model-*.safetensors"))) > 3
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.parameters(), load_pretrained(tmp_path / "twice").parameters(), strict=True)
    )


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"head_dim": 16, "rope_llama3": LLAMA3}),
        ("qwen3", {"qk_norm": True, "tie_embeddings": True}),
        ("llama", {"causal": True}),
    ],
)
def test_transformers_opens_it_and_computes_the_same(name, changes, tmp_path, tokenizer):
    transformers = pytest.importorskip("transformers")
    sampler = None if changes.get("causal") else SAMPLER
    model = trained(tmp_path / "run", tokenizer, sampler=sampler, **changes)
    assert export(tmp_path / "run", tmp_path / "out", "--format", name) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert theirs.dtype == torch.float32
    with torch.no_grad():  # read in both directions when the model is, by transformers' own switch in config.json
        torch.testing.assert_close(theirs(IDS, use_cache=False).logits, model(IDS), atol=1e-5, rtol=1e-5)
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert generation.eos_token_id == list(tokenizer.terminator_ids) and generation.pad_token_id == tokenizer.pad_id
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (loaded.mask_token_id, loaded.eos_token_id) == (tokenizer.mask_id, tokenizer.terminator_id)
    messages = [{"role": "user", "content": "né?"}]
    prompt = loaded.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert prompt == tokenizer.encode_chat_prompt(messages)


def test_a_causal_context_is_transformers_own_model_and_still_decodes_in_blocks(tmp_path, tokenizer):
    """Left to right, as finished blocks are read into the cache and as its autoregressive loss reads."""
    transformers = pytest.importorskip("transformers")
    model = trained(tmp_path / "run", tokenizer, qk_norm=True, causal_context=True)
    assert export(tmp_path / "run", tmp_path / "out", "--format", "qwen3") == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    again, _, meta = load_checkpoint(tmp_path / "out")
    cache = KVCache(model.config, 2, 30, "cpu", torch.float32)
    with torch.no_grad():
        cache.open(30, left_to_right=torch.tensor([30, 30]))
        torch.testing.assert_close(theirs(IDS).logits, model(IDS, cache=cache), atol=1e-5, rtol=1e-5)
    sampler = sampler_from_config(meta["sampler"])
    prompts = [[70, 71, 72], [80]]
    ours, exported = (sampler.generate(m, prompts, max_new_tokens=20) for m in (model, again))
    assert [answer.tokens for answer in ours] == [answer.tokens for answer in exported]


def test_other_engines_find_what_they_need(tmp_path, tokenizer, capsys):
    trained(tmp_path / "run", tokenizer)
    assert (
        export(tmp_path / "run", tmp_path / "out", "--format", "llada", "--dtype", "bfloat16", "--threshold", "0.8")
        == 0
    )
    line = "llada, 2 layers of width 32, mask 257, terminators 260, 258, block length 16, threshold 0.8"
    assert line in capsys.readouterr().out
    config, generation = (
        json.loads((tmp_path / "out" / name).read_text()) for name in ("config.json", "generation_config.json")
    )
    assert config["architectures"] == ["LLaDAModelLM"] and config["torch_dtype"] == "bfloat16"
    assert (config["mask_token_id"], config["eos_token_id"], config["embedding_size"]) == (257, 260, 261)
    assert generation == {
        "eos_token_id": [260, 258],
        "pad_token_id": 256,
        "mask_token_id": 257,
        "do_sample": False,
        "block_length": 16,
        "threshold": 0.8,
    }
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    _, _, meta = load_checkpoint(tmp_path / "out")
    assert meta["sampler"]["init_args"]["policy"]["init_args"] == {"threshold": 0.8, "decay": 1.0}
    assert load_pretrained(tmp_path / "out").lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("llama", {"qk_norm": True}, "qk_norm=False, this one True"),
        ("llama", {"qkv_bias": True}, "qkv_bias=False, this one True"),
        ("qwen3", {}, "qk_norm=True, this one False"),
        ("llada", {"head_dim": 16}, "heads share hidden_size 32 evenly, this one's take 64"),
        ("llada", {"token_shift": True}, "token_shift=False, this one True"),
        ("llada", {"causal": True}, "read in both directions"),
        ("llada", {"rope_llama3": LLAMA3}, "rope_llama3=None"),
        ("llada", {"causal_context": True}, "this one its context left to right"),
        ("dream", {"qkv_bias": True}, "token_shift=True, this one False"),
        ("llada2", {"block_causal": True, "block_length": 32}, "are mixtures of experts, this one has none"),
        ("llama", {"block_causal": True, "block_length": 16}, "read all of a text, this one blocks of 16"),
        ("sdar", {"qk_norm": True}, "block_causal=True, this one False"),
        ("sdar", {"block_causal": True, "block_length": 16}, "qk_norm=True, this one False"),
        ("gguf", {}, "there are llada, dream, llama, qwen2, qwen3, sdar, sdar_moe, fast_dllm_v2"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_with_the_reason(name, changes, reason, tmp_path, tokenizer, capsys):
    trained(tmp_path / "run", tokenizer, sampler=None, **changes)
    assert export(tmp_path / "run", tmp_path / "out", "--format", name) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert reason in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "needs --format"),
        (["--format", "llada", "--block-length", "0"], "block_length"),
        (["--format", "llada", "--threshold", "2"], "threshold"),
        (["--format", "llada", "--dtype", "int8"], "dtype"),
    ],
)
def test_mistakes_are_told_in_one_line(options, message, tmp_path, tokenizer, capsys):
    trained(tmp_path / "run", tokenizer)
    assert export(tmp_path / "run", tmp_path / "out", *options) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_a_folder_that_is_there_is_left_alone(tmp_path, tokenizer, capsys):
    trained(tmp_path / "run", tokenizer)
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert export(tmp_path / "run", tmp_path / "run", "--format", "llada") == 2
    assert "exists" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in Path(tmp_path / "run").iterdir()}


def test_the_shipped_model_answers_the_same_after_export(tmp_path, capsys):
    checkpoint = Path(__file__).parents[2] / "checkpoints" / "cmudict"
    assert export(checkpoint, tmp_path / "out", "--format", "llada") == 0
    capsys.readouterr()
    answers = []
    for path in (checkpoint, tmp_path / "out"):
        assert main(["generate", "--checkpoint", str(path), "--prompt", "keyboard", "--prompt", "lightning"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] and "L AY T N IH NG" in answers[0]
