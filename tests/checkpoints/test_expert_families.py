"""Families with experts: the published forward written out, a lossless way back, and a name for what is not known."""

import json
import shutil

import pytest
import torch
from byte_tokenizer import write_byte_tokenizer
from published import VOCABULARY
from published_experts import (
    LLADA2_CONFIG,
    LLADA_MOE_CONFIG,
    llada2_generate,
    llada2_logits,
    llada_moe_logits,
    write_llada2,
    write_llada_moe,
)
from safetensors.torch import load_file, save_file

from dllm_var.__main__ import main
from dllm_var.checkpoints.config_json import read_config
from dllm_var.checkpoints.export import export_checkpoint
from dllm_var.checkpoints.families import FORMATS
from dllm_var.checkpoints.pretrained import load_pretrained, open_checkpoint
from dllm_var.errors import UserError
from dllm_var.model import KVCache
from dllm_var.text.tokenizer import Tokenizer

IDS = torch.randint(0, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))
WRITERS = {"llada2": write_llada2, "llada_moe": write_llada_moe}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_qkv_bias": True, "num_shared_experts": 2, "first_k_dense_replace": 0},
        {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 1, "num_shared_experts": 0},
    ],
)
@torch.no_grad()
def test_llada2_computes_its_published_forward(changes, tmp_path):
    weights = write_llada2(tmp_path, **changes)
    model = load_pretrained(tmp_path)
    for length in (7, 32, 40):  # in blocks of 32
        expected = torch.stack([llada2_logits(weights, ids, 32, **changes) for ids in IDS[:, :length]])
        torch.testing.assert_close(model(IDS[:, :length]), expected, atol=1e-5, rtol=1e-5)
    cache, found = KVCache(model.config, 2, 40, "cpu", torch.float32), []
    for block in IDS.split(32, dim=1):
        cache.open(block.size(1))
        found.append(model(block, cache=cache))
        cache.advance(torch.full((2,), block.size(1)))
    torch.testing.assert_close(torch.cat(found, dim=1), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 2, "num_experts_per_tok": 1}])
@torch.no_grad()
def test_llada_moe_computes_its_published_forward(changes, tmp_path):
    weights = write_llada_moe(tmp_path, **changes)
    expected = torch.stack([llada_moe_logits(weights, ids, **changes) for ids in IDS])
    torch.testing.assert_close(load_pretrained(tmp_path)(IDS), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prompt", ["0123456", "0123456789" * 3 + "ab", "0123456789" * 4])
def test_generate_decodes_llada2_as_its_release_does(prompt, byte_tokenizer, tmp_path, capsys):
    """In blocks of 32 from the start of the prompt, with threshold 0.95."""
    changes = {"vocab_size": byte_tokenizer.vocab_size, "first_k_dense_replace": 0, "num_hidden_layers": 2}
    weights = write_llada2(tmp_path, **changes)
    weights["lm_head.weight"] *= 6  # sure of some tokens
    weights["lm_head.weight"][byte_tokenizer.mask_id] = 0
    save_file(weights, tmp_path / "model.safetensors")
    byte_tokenizer.save(tmp_path)
    arguments = ["generate", "--checkpoint", str(tmp_path), "--prompt", prompt, "--json", "--sampler.max_new_tokens"]
    assert main([*arguments, str(64 - len(prompt))]) == 0
    answer = json.loads(capsys.readouterr().out)
    mask, end = byte_tokenizer.mask_id, byte_tokenizer.terminator_id
    assert answer["tokens"] == llada2_generate(weights, byte_tokenizer.encode(prompt), 2, mask, end, **changes)
    assert answer["nfe"] < len(answer["tokens"])


@pytest.mark.parametrize("name", WRITERS)
def test_an_export_has_the_published_keys_and_weights(name, tmp_path, byte_tokenizer):
    """Other engines read these keys; a weight that was joined or stacked on the way comes out as it was."""
    changes = {"vocab_size": byte_tokenizer.vocab_size, "pad_token_id": byte_tokenizer.pad_id}
    changes["eos_token_id"] = byte_tokenizer.terminator_id
    weights = WRITERS[name](tmp_path / "in", **changes)
    byte_tokenizer.save(tmp_path / "in")
    for shard_bytes in (10**9, 5_000):
        out = tmp_path / str(shard_bytes)
        export_checkpoint(open_checkpoint(tmp_path / "in"), FORMATS[name], out, {}, shard_bytes=shard_bytes)
        files = sorted(out.glob("*.safetensors"))
        written = {key: value for file in files for key, value in load_file(file).items()}
        assert written.keys() == weights.keys() and all(torch.equal(written[key], weights[key]) for key in weights)
        assert (len(files) > 3) == (shard_bytes < 10**9)
    published, ours = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("in", "5000"))
    unsaid = {"dtype", "transformers_version", "auto_map", "output_router_logits", "rotary_dim", "sliding_window"}
    unsaid |= {"max_window_layers", "router_aux_loss_coef"}  # change nothing
    assert {key: ours.get(key) for key in published.keys() - unsaid} == {
        key: published[key] for key in published.keys() - unsaid
    }
    model, again = load_pretrained(tmp_path / "in"), load_pretrained(tmp_path / "5000")
    assert torch.equal(model(IDS), again(IDS))


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory):
    return Tokenizer.from_pretrained(write_byte_tokenizer(tmp_path_factory.mktemp("tokenizer")))


REFUSED = [
    ("llada2", dict(block_length=0), "block_length of at least 1, got 0"),
    ("llada2", dict(colour="red"), "colour='red'"),
    ("llada2", dict(image_token_offset=157184), "image_token_offset=157184"),
    ("llada2", dict(score_function="softmax"), "score_function='softmax'"),
    ("llada2", dict(num_experts=...), "no num_experts"),
    ("llada2", dict(num_experts=2.5), "num_experts=2.5"),
    ("llada2", dict(num_experts=10**9), "num_experts=1000000000, and beside it"),
    ("llada2", dict(num_experts=12), "lacks|has 24 weights"),
    ("llada2", dict(num_experts=18), "num_experts 18 must be a multiple of expert_groups 4"),
    ("llada2", dict(n_group=16), "two experts or more in a group"),
    ("llada2", dict(topk_group=5), "groups_per_token at most expert_groups, got 5"),
    ("llada2", dict(num_experts_per_tok=9), "experts_per_token 9 is more than the 8"),
    ("llada2", dict(moe_intermediate_size=12), "expert_intermediate_size 12 must be a multiple of 8"),
    ("llada2", dict(moe_intermediate_size=24), "shape"),
    ("llada2", dict(num_key_value_heads=1), "shape"),
    ("llada2", dict(partial_rotary_factor=0.3), "partial_rotary_factor 0.3"),
    ("llada2", dict(routed_scaling_factor=0), "router_scale must be a number above 0"),
    ("llada2", dict(first_k_dense_replace=0), "lacks .* such as model.layers.0.mlp.experts.0.down_proj.weight"),
    ("llada2", dict(model_type="llada2_moe_veomni"), "llada2_moe_veomni"),
    ("llada_moe", dict(moe_layer_freq=[1, 0, 1]), "moe_layer_freq=0"),
    ("llada_moe", dict(shared_expert_intermediate_size=16), "shared_expert_intermediate_size=16"),
    ("llada_moe", dict(clip_qkv=8.0), "clip_qkv=8.0"),
    ("llada_moe", dict(qk_layernorm=None), "has 6 weights .*k_norm"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of both families."""
    folders = {name: tmp_path_factory.mktemp(name) for name in WRITERS}
    for name, folder in folders.items():
        WRITERS[name](folder)
    return folders


@pytest.mark.parametrize(("name", "changes", "named"), REFUSED)
def test_what_is_not_understood_is_named(name, changes, named, saved, tmp_path):
    folder = shutil.copytree(saved[name], tmp_path / "copy")
    values = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))
    with pytest.raises(UserError, match=named) as error:
        load_pretrained(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("config", [LLADA2_CONFIG, LLADA_MOE_CONFIG], ids=["llada2", "llada_moe"])
def test_a_published_key_that_decides_what_is_computed_is_taken_over_or_has_one_value(config, tmp_path):
    """Any other value is refused by name, except for keys that change nothing and those that hold a number."""
    descriptive = {"architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache"}
    descriptive |= {"eos_token_id", "max_window_layers", "sliding_window", "output_router_logits", "rotary_dim"}
    descriptive |= {"router_aux_loss_coef", "router_num_group", "router_topk_group", "model_type"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for key in config.keys() - descriptive:
        values = {**config, key: "another"} if key != "rope_scaling" else {**config, key: {"type": "another"}}
        with pytest.raises(UserError, match=key.replace("rope_scaling", "another")):
            read_config(values, tmp_path / "config.json")


def test_a_key_without_a_value_is_as_one_that_is_not_there(tmp_path):
    for key in ("partial_rotary_factor", "routed_scaling_factor", "use_qk_norm"):
        left_out = {name: value for name, value in LLADA2_CONFIG.items() if name != key}
        without, null = (read_config(values, tmp_path) for values in (left_out, {**left_out, key: None}))
        assert null == without


UP = "model.layers.2.mlp.experts.{}.up_proj.weight"


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda w: w.pop(UP.format(7)), r"lacks 1 .*experts\.7\.up_proj"),
        (
            lambda w: w.update({UP.format(16): torch.ones(16, 32)}),
            r"has 1 .*experts\.16\.",
        ),
        (lambda w: w.update({UP.format(7): torch.ones(8, 32)}), "experts.up_proj has"),
        (lambda w: w[UP.format(7)].fill_(torch.nan), "NaN"),
        (lambda w: w.update({UP.format(7): w[UP.format(7)].to(torch.float8_e4m3fn)}), "experts.up_proj is of type"),
        (
            lambda w: w.update({"model.layers.2.attention.query_key_value.weight": torch.ones(32, 32)}),
            "k_proj.* has shape",
        ),
    ],
)
def test_an_expert_that_is_missing_wrong_or_too_many_is_named(edit, named, tmp_path):
    weights = write_llada2(tmp_path)
    edit(weights)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=named):
        load_pretrained(tmp_path)


def test_formats_without_experts_refuse_them(tmp_path, byte_tokenizer):
    write_llada2(tmp_path / "in", vocab_size=byte_tokenizer.vocab_size)
    byte_tokenizer.save(tmp_path / "in")
    for name in ("llada", "llama", "qwen3", "llada_moe"):
        with pytest.raises(UserError, match=f"--format {name} cannot hold this model"):
            export_checkpoint(open_checkpoint(tmp_path / "in"), FORMATS[name], tmp_path / name, {})
