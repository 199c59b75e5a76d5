"""Folders for other engines: every key that a loader reads is there and of its type, and the weights have its names."""

import json

import pytest
import torch
from byte_tokenizer import CHAT_TEMPLATE, write_byte_tokenizer
from safetensors.torch import load_file

from dllm_var.__main__ import main
from dllm_var.checkpoints.export import save_checkpoint_folder
from dllm_var.model import Transformer, TransformerConfig
from dllm_var.text.tokenizer import Tokenizer

WHOLE, FLAG, NUMBER, TEXT, NOTHING = int, bool, (int, float), str, type(None)
DENSE = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"), WHOLE)
DENSE |= dict.fromkeys(("num_attention_heads", "num_key_value_heads", "max_position_embeddings"), WHOLE)
DENSE |= {"rms_norm_eps": NUMBER, "tie_word_embeddings": FLAG, "rope_theta": NUMBER, "rope_scaling": (dict, NOTHING)}
SDAR = {**DENSE, "attention_bias": FLAG}
SDAR_EXPERTS = {"num_experts": WHOLE, "num_experts_per_tok": WHOLE, "moe_intermediate_size": WHOLE}
SDAR_EXPERTS |= {"norm_topk_prob": FLAG, "decoder_sparse_step": WHOLE, "mlp_only_layers": list}
LLADA2 = {**DENSE, "num_experts": WHOLE, "num_experts_per_tok": WHOLE, "moe_intermediate_size": WHOLE}
LLADA2 |= dict.fromkeys(("num_shared_experts", "first_k_dense_replace", "n_group", "topk_group"), WHOLE)
LLADA2 |= {"partial_rotary_factor": NUMBER, "routed_scaling_factor": NUMBER, "hidden_act": TEXT, "use_bias": FLAG}
LLADA2 |= {"use_qkv_bias": FLAG, "norm_topk_prob": FLAG}
LLADA = dict.fromkeys(("d_model", "n_heads", "n_kv_heads", "n_layers", "mlp_hidden_size", "vocab_size"), WHOLE)
LLADA |= {"max_sequence_length": WHOLE, "rms_norm_eps": NUMBER, "rope_theta": NUMBER, "activation_type": TEXT}
LLADA |= {"weight_tying": FLAG, "model_type": TEXT}
LMDEPLOY = {"model_type": TEXT, "architectures": list, "bos_token_id": (int, NOTHING), "eos_token_id": (int, list)}
LMDEPLOY |= {"pad_token_id": WHOLE, "use_sliding_window": FLAG, "sliding_window": (int, NOTHING)}
READ = {  # what each engine reads of config.json, by format; the files are those of its repository
    ("sdar", "SGLang"): {**SDAR, "architectures": list},  # srt/models/sdar.py, srt/dllm/config.py
    ("sdar", "LMDeploy"): {**SDAR, **LMDEPLOY},  # pytorch/models/sdar.py, pytorch/configurations/{sdar,default}.py
    ("sdar", "JetEngine"): {**SDAR, "model_type": TEXT, "hidden_act": TEXT},  # config.py, models/sdar.py
    ("sdar", "Diffulex"): {**SDAR, "hidden_act": TEXT, "mask_token_id": WHOLE},  # model/sdar.py, config.py
    ("sdar", "transformers"): {  # the release's modeling_sdar.py and configuration_sdar.py
        **{**SDAR, "auto_map": dict, "hidden_act": TEXT, "attention_dropout": NUMBER, "use_sliding_window": FLAG},
        **{"sliding_window": (int, NOTHING), "fuse_cross_entropy": FLAG, "block_size": WHOLE, "mask_token_id": WHOLE},
        **{"pad_token_id": WHOLE},
    },
    ("sdar_moe", "LMDeploy"): {**SDAR, **LMDEPLOY, **SDAR_EXPERTS},  # pytorch/models/sdar_moe.py
    ("sdar_moe", "JetEngine"): {**SDAR, **SDAR_EXPERTS, "model_type": TEXT},  # models/sdar_moe.py
    ("llada", "JetEngine"): LLADA,  # config.py, models/llada.py
    ("llada", "Diffulex"): {  # model/llada.py, config.py
        **{**LLADA, "embedding_size": WHOLE, "include_qkv_bias": FLAG, "mask_token_id": WHOLE, "alibi": FLAG},
        **{"rope": FLAG, "embedding_dropout": NUMBER},
    },
    ("llada2", "SGLang"): {  # srt/models/llada2.py
        **{**LLADA2, "architectures": list, "use_qk_norm": FLAG, "embedding_dropout": NUMBER, "norm_head": FLAG},
        **{"score_function": TEXT, "router_dtype": TEXT, "moe_router_enable_expert_bias": FLAG},
    },
    ("llada2", "Diffulex"): {**LLADA2, "mask_token_id": WHOLE},  # model/llada2.py
}
ARCHITECTURES = {"llada": "LLaDAModelLM", "llada2": "LLaDA2MoeModelLM"}
ARCHITECTURES |= {"sdar": "SDARForCausalLM", "sdar_moe": "SDARMoeForCausalLM"}
EXPERTS = dict(num_experts=8, experts_per_token=2, expert_intermediate_size=16, router_normalise=True)
MODELS = {
    "llada": dict(qk_norm=False, block_causal=False, context_length=512),
    "sdar": {},
    "sdar_moe": EXPERTS,
    "llada2": {
        **EXPERTS,
        **dict(router="sigmoid", router_bias=True, router_scale=2.5, shared_experts=1, first_dense_layers=1),
        **dict(partial_rotary_factor=0.5, expert_groups=4, groups_per_token=2),
    },
}
MATRICES = ("gate_proj", "up_proj", "down_proj")


def names(name, layer):
    """The weights of a layer in files of a format."""
    found = {"input_layernorm", "post_attention_layernorm"}
    if name == "llada2":
        found |= {f"attention.{part}" for part in ("query_key_value", "dense", "query_layernorm", "key_layernorm")}
    else:
        found |= {f"self_attn.{part}" for part in ("k_norm", "k_proj", "o_proj", "q_norm", "q_proj", "v_proj")}
    if name == "sdar" or (name == "llada2" and layer == 0):
        return found | {f"mlp.{part}" for part in MATRICES}
    found |= {f"mlp.experts.{expert}.{part}" for expert in range(8) for part in MATRICES} | {"mlp.gate"}
    return found | ({f"mlp.shared_experts.{part}" for part in MATRICES} if name == "llada2" else set())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each format, of a model with blocks of 8 that is decoded 4 tokens at a time, and what was printed."""
    root = tmp_path_factory.mktemp("engines")
    tokenizer = Tokenizer.from_pretrained(
        write_byte_tokenizer(root / "tokenizer", CHAT_TEMPLATE), terminators=["<|im_end|>", "<|endoftext|>"]
    )
    special = dict(mask_id=tokenizer.mask_id, terminator_ids=list(tokenizer.terminator_ids), pad_id=tokenizer.pad_id)
    shape = dict(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, qk_norm=True, intermediate_size=48)
    policy = {"class_path": "dllm_var.sampling.ConfidenceThreshold", "init_args": {"threshold": 0.7}}
    arguments = {"policy": policy, "block_length": 4, "temperature": 0.7, "top_k": 5}
    sampler = {"class_path": "dllm_var.sampling.BlockDiffusionSampler", "init_args": arguments}
    for name, changes in MODELS.items():
        torch.manual_seed(0)
        blocks = dict(block_causal=True, block_length=8, vocab_size=tokenizer.vocab_size)
        model = Transformer(TransformerConfig(**{**shape, **special, **blocks, **changes}))
        run = save_checkpoint_folder(root / f"run_{name}", model, tokenizer, {"sampler": sampler})
        options = ["--format", name, "--output", str(root / name), "--dtype", "bfloat16"]
        assert main(["export", "--checkpoint", str(run), *options]) == 0
    return root


@pytest.mark.parametrize(("name", "engine"), READ)
def test_config_has_what_an_engine_reads(name, engine, folders):
    values = json.loads((folders / name / "config.json").read_text())
    for key, kind in READ[name, engine].items():
        assert key in values and isinstance(values[key], kind) and (kind is FLAG or values[key] is not True), key
    assert values["architectures"] == [ARCHITECTURES[name]] and values["model_type"] == {"llada2": "llada2_moe"}.get(
        name, name
    )


@pytest.mark.parametrize("name", ["sdar", "sdar_moe", "llada2"])
def test_weights_tokenizer_and_defaults_are_there(name, folders):
    weights = load_file(folders / name / "model.safetensors")
    expected = {f"model.layers.{layer}.{part}.weight" for layer in range(2) for part in names(name, layer)}
    expected |= {f"model.{'word_embeddings' if name == 'llada2' else 'embed_tokens'}.weight", "model.norm.weight"}
    expected |= {"model.layers.1.mlp.gate.expert_bias"} if name == "llada2" else set()
    assert weights.keys() == {*expected, "lm_head.weight"}
    assert json.loads((folders / name / "generation_config.json").read_text()) == {
        **{"eos_token_id": [260, 258], "pad_token_id": 256, "mask_token_id": 257},
        **{"do_sample": True, "temperature": 0.7, "top_k": 5, "block_length": 8, "threshold": 0.7},
    }
    settings = json.loads((folders / name / "tokenizer_config.json").read_text())
    assert (settings["mask_token"], settings["eos_token"]) == ("<|mask|>", "<|im_end|>")
    assert (folders / name / "chat_template.jinja").read_text() == CHAT_TEMPLATE


@pytest.mark.parametrize(("name", "told"), [("sdar", "SGLang and LMDeploy take 151669"), ("llada2", "takes 156895")])
def test_a_mask_that_an_engine_does_not_ask_for_is_told(name, told, folders, capsys):
    options = ["--format", name, "--output", str(folders / f"again_{name}")]
    assert main(["export", "--checkpoint", str(folders / f"run_{name}"), *options]) == 0
    assert f"{told} for the mask: use an engine that is told 257" in capsys.readouterr().out
