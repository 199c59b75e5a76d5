"""The recipes for published models train: two steps of each at toy size, from a checkpoint of the same kind."""

import json
from pathlib import Path

import pytest
import torch

from dllm_var.__main__ import main
from dllm_var.checkpoints.export import save_checkpoint_folder
from dllm_var.checkpoints.pretrained import load_checkpoint
from dllm_var.model import Transformer, TransformerConfig
from dllm_var.text.tokenizer import Tokenizer
from tests.byte_tokenizer import CHAT_TEMPLATE, write_byte_tokenizer

CONFIGS = Path(__file__).parent.parent / "configs"
SHAPE = dict(hidden_size=32, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=64)
KINDS = {
    "llada_8b_sft": dict(num_kv_heads=4, rope_theta=500000.0, norm_eps=1e-5),
    "dream_7b_sft": dict(qkv_bias=True, token_shift=True, rope_theta=1000000.0),
    "llada2_mini_sft": dict(
        **dict(qk_norm=True, partial_rotary_factor=0.5, num_layers=2, first_dense_layers=1, num_experts=8),
        **dict(experts_per_token=2, expert_intermediate_size=16, shared_experts=1, expert_groups=4, groups_per_token=2),
        **dict(router="sigmoid", router_bias=True, router_normalise=True, router_scale=2.5),
    ),
    "qwen3_to_diffusion": dict(qk_norm=True, tie_embeddings=True, rope_theta=1000000.0),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "names",
    [
        ["llada_8b_sft"],
        ["llada_8b_sft", "lora"],
        ["llada_8b_sft", "qlora"],
        ["dream_7b_sft"],
        ["llada2_mini_sft"],
        ["llada2_mini_sft", "lora"],
        ["qwen3_to_diffusion"],
        ["qwen3_to_diffusion", "annealing"],
        ["qwen3_to_diffusion", "adapt/sdar"],
        ["qwen3_to_diffusion", "adapt/fast_dllm_v2"],
        ["qwen3_to_diffusion", "adapt/nbdiff"],
        ["qwen3_to_diffusion", "adapt/strided"],
    ],
    ids="+".join,
)
def test_recipe_trains_two_steps_and_answers(names, tmp_path, monkeypatch, capfd):
    adapted = {"lora", "qlora"} & {*names}
    if adapted:
        pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    folder = write_byte_tokenizer(tmp_path / "tokenizer", CHAT_TEMPLATE)
    tokenizer = Tokenizer.from_pretrained(folder, terminators=["<|im_end|>", "<|endoftext|>"])
    shape = {**SHAPE, **KINDS[names[0]]}
    torch.manual_seed(0)
    base = Transformer(TransformerConfig(**shape, vocab_size=tokenizer.vocab_size))
    save_checkpoint_folder(tmp_path / "base", base, tokenizer)
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, you."}]
    records = [{"messages": chat * 2}, {"prompt": "2 + 2 =", "response": " 4, of course"}] * 20
    (tmp_path / "sft.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    configs = [argument for name in names for argument in ("--config", str(CONFIGS / f"{name}.yaml"))]
    toy = [
        *("--model.init_from=base", "--data.context_length=192", "--data.batch_size=2"),
        *("--data.terminators=[<|im_end|>,<|endoftext|>]", "--sampler.max_new_tokens=8", "--trainer.strategy=auto"),
        *("--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.precision=32", "--trainer.max_steps=2"),
        *("--trainer.val_check_interval=1", "--trainer.limit_val_batches=1", "--trainer.log_every_n_steps=1"),
        "--model.schedule.warmup_steps=1",
    ]
    strided, annealed = "adapt/strided" in names, "annealing" in names
    toy.append("--sampler.stride=3" if strided else "--sampler.block_length=4")
    if names[0] == "llada2_mini_sft":
        toy.append("--model.objective.init_args.block_length=4")
    if names[0] == "qwen3_to_diffusion" and not (strided or annealed):
        toy.append(f"--model.objective.init_args.block_length={8 if 'adapt/fast_dllm_v2' in names else 4}")
    assert main(["fit", *configs, *toy]) == 0
    [run] = tmp_path.glob("runs/*/version_0")
    trained, _, meta = load_checkpoint(run)
    assert meta["step"] == 2 and trained.config.causal == strided
    shifted = {"dream_7b_sft", "annealing", "adapt/nbdiff", "adapt/fast_dllm_v2"}
    assert trained.config.token_shift == bool(shifted & {*names})
    grids = {"adapt/sdar": 4, "adapt/fast_dllm_v2": 8, "llada2_mini_sft": 4}
    assert trained.config.grid == next((grids[name] for name in names if name in grids), None)
    assert trained.config.causal_context == (names in (["qwen3_to_diffusion"], ["qwen3_to_diffusion", "adapt/nbdiff"]))
    if strided:  # what the model says of text is what it said
        base.config.causal, text = True, torch.arange(40, 60)[None]
        text[:, 12:] = trained.config.mask_id
        adapted, plain = trained(text), base(text)
        assert torch.allclose(adapted[:, :12], plain[:, :12], atol=1e-6)
        assert not torch.allclose(adapted[:, 12:], plain[:, 12:], atol=1e-6)
    else:
        weights = zip(base.parameters(), trained.parameters(), strict=True)
        moved = [not torch.equal(a, b) for a, b in weights if a.requires_grad]  # all but the bias of a router
        assert any(moved) and (all(moved) or adapted)
    assert main(["generate", "--checkpoint", str(run), "--prompt", "2 + 2 =", "--max-new-tokens", "4"]) == 0


def test_the_papers_recipe_is_the_papers_method(capsys):
    """configs/paper.yaml says on other recipes what this one says by itself."""
    from dllm_var.cli.trainer_settings import build_parser

    def read(arguments):
        return build_parser("fit", arguments).parse_resolved(arguments)

    recipe = str(CONFIGS / "llada_8b_sft.yaml")
    alone = read(["--config", recipe])
    with_method = read(["--config", recipe, "--config", str(CONFIGS / "paper.yaml")])
    for section in ("model", "data"):
        assert alone[section] == with_method[section]
    sampler = alone["sampler"]["init_args"]
    assert (sampler["block_length"], sampler["terminator_last"], sampler["kv_commit"]) == (64, False, "joint_next")
    assert alone["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 2.5e-5
    assert alone["model"]["init_args"]["schedule"]["warmup_steps"] == 50
    data = alone["data"]["init_args"]
    assert (data["batch_size"], data["context_length"]) == (2, 8192)
    assert alone["trainer"]["accumulate_grad_batches"] == 4 and alone["trainer"]["gradient_clip_val"] == 1.0
