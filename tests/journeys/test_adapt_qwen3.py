"""The first section of docs/finetune.md, from its first line to its last, on a tiny Qwen3 and with a short training."""

import json
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from byte_tokenizer import CHAT_TEMPLATE, write_byte_tokenizer

from dllm_var.__main__ import main

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "docs" / "finetune.md").read_text(encoding="utf-8").split("\n## ")[1]
TINY = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
ADDED = {  # to the page's commands
    "fit": [
        *("--trainer.devices=1", "--trainer.max_steps=2", "--trainer.accelerator=cpu", "--data.context_length=128"),
        *("--trainer.val_check_interval=7", "--trainer.limit_val_batches=1", "--sampler.max_new_tokens=8"),
    ],
    "evaluate": ["--limit", "2"],
    "benchmark": ["--quick", "--repeats", "1"],
}


def write_qwen3(folder: Path) -> None:
    """A folder as the hub has it: no mask token, and spare rows in the embedding."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    tokens = dict(vocab_size=320, bos_token_id=258, eos_token_id=258)
    config = Qwen3Config(**TINY, **tokens, intermediate_size=64, max_position_embeddings=512, tie_word_embeddings=True)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    write_byte_tokenizer(folder, CHAT_TEMPLATE, mask_token=None, eos_token="<|endoftext|>")


@pytest.mark.slow
def test_every_command_of_the_section_runs(tmp_path, monkeypatch, capfd):
    pytest.importorskip("peft")
    harness = find_spec("lm_eval") is not None
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DLLM_VAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    Path("configs").symlink_to(ROOT / "configs")
    write_qwen3(tmp_path / "Qwen3-8B-Base")
    for text in re.findall(r"```yaml\n(.*?)```", SECTION, re.DOTALL):
        name = "samplers.yaml" if text.startswith("tasks:") else "mine.yaml"
        Path(name).write_text(text)
    chats = [
        {"messages": [{"role": "user", "content": f"{a} plus {b}?"}, {"role": "assistant", "content": f"{a + b}."}]}
        for a in range(8)
        for b in range(8)
    ]
    Path("train.jsonl").write_text("\n".join(map(json.dumps, chats[:-4])))
    Path("test.jsonl").write_text("\n".join(map(json.dumps, chats[-4:])))

    ran = []
    for words in map(shlex.split, re.findall(r"^\$ (.*)", SECTION, re.MULTILINE)):
        if words[0] == "export":
            monkeypatch.setenv(*words[1].split("="))
        if words[0] in ("export", "hf") or ("evaluate" in words and not harness):
            continue
        assert words[:3] == ["python", "-m", "dllm_var"]
        assert main([*words[3:], *ADDED.get(words[3], [])]) == 0, words
        ran.append(words[3])
        out = capfd.readouterr().out
        assert words[3] != "plan" or "Qwen3-8B-Base: 1 layers of width 32" in out
        if words[3] == "fit":
            [tried] = [line for line in out.splitlines() if line.startswith("try ")]
            assert main(shlex.split(tried)[4:]) == 0
    assert ran == ["plan", "inspect", "fit", "export", "generate", *["evaluate"] * harness, "benchmark"]

    assert {path.name for path in Path("runs/qwen3_to_diffusion/version_0").iterdir()} >= {"model", "adapter"}
    if harness:
        assert json.loads(Path("mine.json").read_text())["dllm_var"]["decoding"]["mine"]["answers"] == 2
    [task] = json.loads(Path("samplers.json").read_text())["tasks"]
    samplers = {entry["name"]: entry["sampler"]["init_args"] for entry in task["settings"]}
    assert list(samplers) == ["threshold 0.9", "factor", "entropy", "wino", "freedave"]
    assert all((one["block_length"], one["max_new_tokens"]) == (32, 8) for one in samplers.values())  # the checkpoint's

    from transformers import AutoModelForCausalLM

    opened = AutoModelForCausalLM.from_pretrained("adapted")
    assert (opened.dtype, opened.config.hidden_size, opened.config.vocab_size) == (torch.bfloat16, 32, 320)
