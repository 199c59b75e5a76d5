"""Published families: the same logits as their own classes, a lossless way back, and a name for what is not known."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from published import (
    DREAM_CONFIG,
    FAST_DLLM_V2_CONFIG,
    LLADA_CONFIG,
    LLAMA3,
    SDAR_CONFIG,
    VOCABULARY,
    llada_logits,
    transformers_model,
    write_dream,
    write_llada,
)

from dllm_var.checkpoints.config_json import read_config
from dllm_var.checkpoints.pretrained import load_pretrained
from dllm_var.errors import UserError
from dllm_var.model import KVCache

IDS = torch.randint(0, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))
CAUSAL = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama-3.1": ("Llama", {"rope_theta": 500_000.0, "rope_scaling": LLAMA3, "head_dim": 16}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
}


def cached_logits(model, ids, pieces):
    """Logits of a causal model that reads the ids in several pieces, each on top of the earlier ones' cache."""
    cache = KVCache(model.config, ids.size(0), ids.size(1), "cpu", torch.float32)
    found = []
    for piece in ids.split(pieces, dim=1):
        cache.open(piece.size(1))
        found.append(model(piece, cache=cache))
        cache.advance(torch.full((ids.size(0),), piece.size(1)))
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_causal_families_compute_what_transformers_does(name, tmp_path):
    kind, changes = CAUSAL[name]
    reference = transformers_model(kind, **changes)
    reference.save_pretrained(tmp_path)
    expected = reference(IDS).logits
    causal = load_pretrained(tmp_path, causal=True)
    torch.testing.assert_close(causal(IDS), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cached_logits(causal, IDS, [7, 1, 1, 31]), expected, atol=1e-5, rtol=1e-5)
    reference.config.is_causal = False  # transformers' switch for bidirectional attention
    torch.testing.assert_close(load_pretrained(tmp_path)(IDS), reference(IDS).logits, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(reference(IDS).logits, expected, atol=0.05)


@pytest.mark.parametrize("changes", [{}, {"weight_tying": True, "include_qkv_bias": True, "n_kv_heads": None}])
@torch.no_grad()
def test_llada_computes_its_published_forward(changes, tmp_path):
    weights = write_llada(tmp_path, **changes)
    model = load_pretrained(tmp_path)
    expected = torch.stack([llada_logits(weights, ids, **changes) for ids in IDS])
    torch.testing.assert_close(model(IDS), expected, atol=1e-5, rtol=1e-5)
    assert not model.config.causal and model.config.mask_id == VOCABULARY - 1 and model.config.context_length == 4096
    cache = KVCache(model.config, 2, 40, "cpu", torch.float32)
    cache.open(40)
    torch.testing.assert_close(model(IDS, cache=cache), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_dream_predicts_each_token_one_position_to_the_left(tmp_path):
    reference = write_dream(tmp_path)(IDS)
    expected = torch.cat((reference[:, :1], reference[:, :-1]), dim=1)  # as its published sampler moves them
    model = load_pretrained(tmp_path)
    torch.testing.assert_close(model(IDS), expected, atol=1e-5, rtol=1e-5)
    cache = KVCache(model.config, 2, 40, "cpu", torch.float32)
    cache.open(40)
    torch.testing.assert_close(model(IDS, cache=cache), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_weights_keep_their_type(tmp_path):
    model = transformers_model("Qwen3", head_dim=16).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.bfloat16}
    assert torch.equal(ours.lm_head.weight, model.lm_head.weight)


def edited(folder: Path, **changes) -> Path:
    """Changes entries of config.json; an ellipsis removes one."""
    values = json.loads((folder / "config.json").read_text())
    values = {key: value for key, value in {**values, **changes}.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


REFUSED = [
    ("Llama", dict(colour="red"), "colour='red'"),
    ("Llama", dict(model_type="qwen3_moe"), "qwen3_moe"),
    ("Llama", dict(model_type="nemotron_labs_diffusion"), "cannot be loaded yet: its positions are turned by YaRN"),
    ("Llama", dict(num_local_experts=8), "num_local_experts=8"),
    (
        "Llama",
        dict(auto_map={"AutoModel": "own.Own"}, architectures=["Own"]),
        r"architectures=\['Own'\], code of its own",
    ),
    ("Qwen2", dict(model_type="Dream", layer_types=..., mask_token_id=5, block_size=32), "block_size=32"),
    ("Qwen3", dict(model_type="sdar", layer_types=...), "no block_size, .*: add it, 4 for SDAR"),
    ("Qwen3", dict(model_type="sdar", block_size=4, attention_bias=True), "attention_bias=True"),
    ("Qwen3", dict(model_type="sdar", block_size=0), "block_length of at least 1, got 0"),
    ("Qwen3", dict(model_type="Fast_dLLM_Qwen", head_dim=8, attention_bias=...), "lacks 6 weights .*bias"),
    ("Llama", dict(quantization_config={"bits": 4}), "quantization_config"),
    ("Llama", dict(hidden_size=...), "no hidden_size"),
    ("Llama", dict(hidden_size="32"), "hidden_size='32'"),
    ("Llama", dict(hidden_size=-32), "at least 1, got -32"),
    ("Llama", dict(num_hidden_layers=10**9), "num_layers=1000000000, and beside it are 21 tensors"),
    ("Llama", dict(intermediate_size=10**4), "a model of 1,9.*do not belong together"),
    ("Llama", dict(rms_norm_eps=float("nan")), "rms_norm_eps=nan"),
    ("Llama", dict(rope_parameters={**LLAMA3, "factor": True}), "rope_llama3={'factor': True"),
    ("Llama", dict(dllm_var=[1]), r"dllm_var=\[1\]"),
    ("Llama", dict(eos_token_id=[2.5]), r"terminator_ids=\[2.5\]"),
    ("Llama", dict(hidden_act="gelu"), "hidden_act='gelu'"),
    ("Llama", dict(mlp_bias=True), "mlp_bias=True"),
    ("Llama", dict(rope_parameters=..., rope_scaling={"type": "linear", "factor": 2.0}), "linear"),
    ("Llama", dict(rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}), "yarn"),
    ("Llama", dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "factor": 4.0}), "'factor': 4.0"),
    ("Llama", dict(rope_parameters={"rope_type": "default", "rope_theta": 0.0}), "rope_theta must be a number above 0"),
    ("Llama", dict(rope_parameters=..., rope_theta=[]), r"rope_theta=\[\], where float"),
    ("Llama", dict(rope_parameters={**LLAMA3, "beta": 1}), "needs factor, .*'beta'"),
    ("Llama", dict(rope_parameters="yarn"), "no settings by name"),
    ("Llama", dict(rope_parameters={"rope_type": "llama3"}), r"needs factor, .* it is \{\}"),
    ("Llama", dict(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}), "partial_rotary_factor"),
    ("Llama", dict(vocab_size=61), "shape"),
    ("Llama", dict(num_hidden_layers=3), "lacks 9 weights of its config, such as model.layers.2"),
    ("Llama", dict(num_hidden_layers=1), "has 9 weights that its config does not name"),
    ("Qwen2", dict(model_type="qwen3", head_dim=8), "lacks 4 weights of its config, such as .*k_norm"),
    ("Qwen2", dict(model_type="Dream", layer_types=..., mask_token_id=5, num_hidden_layers=1), "has 12 weights"),
    ("Qwen2", dict(layer_types=["full_attention", "sliding_attention"]), "sliding_attention"),
    ("Qwen2", dict(num_key_value_heads=...), "no num_key_value_heads"),
    ("Qwen3", dict(attention_bias=True), "attention_bias=True"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of three families."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("Llama", "Qwen2", "Qwen3")}
    for kind, folder in folders.items():
        transformers_model(kind, **({"head_dim": 16} if kind == "Qwen3" else {})).save_pretrained(folder)
    return folders


@pytest.mark.parametrize(("kind", "changes", "named"), REFUSED)
def test_what_is_not_understood_is_named(kind, changes, named, saved, tmp_path):
    folder = shutil.copytree(saved[kind], tmp_path / "copy")
    with pytest.raises(UserError, match=named) as error:
        load_pretrained(edited(folder, **changes))
    assert "\n" not in str(error.value)


@torch.no_grad()
def test_llada_turns_queries_and_keys_in_32_bits_where_its_config_says_so(tmp_path):
    ids = torch.randint(0, VOCABULARY, (4, 200), generator=torch.Generator().manual_seed(0))
    errors = {}
    for full in (True, False):
        write_llada(tmp_path, rope_full_precision=full)
        model = load_pretrained(tmp_path).bfloat16()
        assert model.config.rope_full_precision == full
        rounded = model(ids).float()
        errors[full] = (rounded - model.float()(ids)).abs().mean()  # the same weights, computed in 32 bits
    assert errors[True] < 0.95 * errors[False]


@pytest.mark.parametrize(
    "config", [LLADA_CONFIG, DREAM_CONFIG, SDAR_CONFIG, FAST_DLLM_V2_CONFIG], ids=lambda config: config["model_type"]
)
def test_a_published_key_that_decides_what_is_computed_is_taken_over_or_has_one_value(config, tmp_path):
    """Any other value is refused by name, except for keys that change nothing and those that hold a number."""
    descriptive = {"architectures", "auto_map", "torch_dtype", "transformers_version", "use_cache", "eos_token_id"}
    descriptive |= {"alibi_bias_max", "attention_layer_norm_with_affine", "flash_attention", "init_cutoff_factor"}
    descriptive |= {"init_device", "init_fn", "mlp_ratio", "precision", "bos_token_id"}
    descriptive |= {"max_window_layers", "sliding_window", "attn_implementation", "fuse_cross_entropy", "micro_forward"}
    descriptive |= {"debug", "ep_size", "skip_checkpoint", "use_deepep", "conplemenrary_mask"}
    descriptive |= {"vocab_size"} if "embedding_size" in config else set()
    (tmp_path / "config.json").write_text(json.dumps(config))
    for key in config.keys() - descriptive:
        values = {**config, key: "another"} if key != "rope_scaling" else {**config, key: {"type": "another"}}
        with pytest.raises(UserError, match=key.replace("rope_scaling", "another")):
            read_config(values, tmp_path / "config.json")


@pytest.mark.parametrize(
    "key", ["activation_type", "block_type", "layer_norm_type", "rope", "rope_theta", "mask_token_id", "embedding_size"]
)
def test_llada_must_say_what_its_class_takes_for_granted_otherwise(key, tmp_path):
    write_llada(tmp_path)
    with pytest.raises(UserError, match=f"no {key}"):
        load_pretrained(edited(tmp_path, **{key: ...}))


@torch.no_grad()
def test_absent_keys_mean_what_transformers_takes_them_for(tmp_path):
    reference = transformers_model("Llama", num_key_value_heads=4)
    reference.save_pretrained(tmp_path)
    optional = ["rope_parameters", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "head_dim", "mlp_bias"]
    model = load_pretrained(edited(tmp_path, **dict.fromkeys(optional, ...)), causal=True)
    torch.testing.assert_close(model(IDS), reference(IDS).logits, atol=1e-5, rtol=1e-5)


def test_a_tied_head_that_is_another_and_pickled_weights_are_refused(tmp_path):
    model = transformers_model("Llama")
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"ties lm_head\.weight"):
        load_pretrained(edited(tmp_path, tie_word_embeddings=True))
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pickled.*safe_serialization=True"):
        load_pretrained(tmp_path)
