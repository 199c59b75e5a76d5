"""Tiny models on a tiny task."""

import json

import pytest
import torch
import yaml

from dllm_var.checkpoints.export import save_checkpoint_folder
from dllm_var.datamodules import CmudictSource
from dllm_var.model.config import TransformerConfig
from dllm_var.model.transformer import Transformer
from dllm_var.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tiny_task(tmp_path_factory):
    """The config of a task on random models, as plain data; its checkpoints and records lie in a temporary folder."""
    folder = tmp_path_factory.mktemp("benchmark")
    tokenizer = Tokenizer.from_pretrained(CmudictSource.default_tokenizer)
    special = dict(mask_id=tokenizer.mask_id, terminator_ids=list(tokenizer.terminator_ids), pad_id=tokenizer.pad_id)
    shape = dict(hidden_size=16, num_layers=1, num_heads=2, vocab_size=tokenizer.vocab_size, **special)
    for name, causal in (("diffusion", False), ("autoregressive", True)):
        torch.manual_seed(0)
        save_checkpoint_folder(folder / name, Transformer(TransformerConfig(**shape, causal=causal)), tokenizer)
    words = [f"{a}{b}" for a in "abcdefgh" for b in "klmnopqr"]
    records = "".join(json.dumps({"prompt": word, "response": "AA B K"}) + "\n" for word in words)
    (folder / "words.jsonl").write_text(records)
    block = {"block_length": 4, "max_new_tokens": 8}
    threshold = {
        "class_path": "dllm_var.sampling.BlockDiffusionSampler",
        "init_args": {
            "policy": {"class_path": "dllm_var.sampling.ConfidenceThreshold", "init_args": {"threshold": 0.9}},
            **block,
        },
    }
    return {
        "name": "tiny",
        "source": {
            "class_path": "dllm_var.datamodules.JsonlSource",
            "init_args": {"path": str(folder / "words.jsonl"), "validation_size": 8, "test_size": 8},
        },
        "checkpoint": str(folder / "diffusion"),
        "autoregressive_checkpoint": str(folder / "autoregressive"),
        "prompts": 6,
        "selection_prompts": 4,
        "single_prompts": 2,
        "batched_prompts": 4,
        "batch_size": 4,
        "entries": [
            {
                "name": "autoregressive",
                "role": "autoregressive",
                "checkpoint": "autoregressive",
                "sampler": "dllm_var.sampling.AutoregressiveSampler",
                "arguments": {"max_new_tokens": 8},
            },
            {
                "name": "fixed length",
                "role": "fixed_length",
                "sampler": {"class_path": "dllm_var.sampling.FixedLengthSampler", "init_args": {"canvas_length": 8}},
                "prompts": 2,
                "batched_prompts": 0,
            },
            {"name": "threshold 0.9", "role": "default", "sampler": threshold},
        ],
        "sweeps": [
            {
                "name": "threshold",
                "sampler": threshold,
                "over": "init_args.policy.init_args.threshold",
                "values": [0.0, 0.9],
            }
        ],
    }


@pytest.fixture
def write_config(tmp_path):
    """Saves tasks as a benchmark's config and gives its path."""

    def write(*tasks):
        path = tmp_path / "benchmark.yaml"
        path.write_text(yaml.safe_dump({"tasks": list(tasks)}))
        return str(path)

    return write
