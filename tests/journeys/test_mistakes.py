"""Mistakes that newcomers make: each ends in one line that names the setting and the remedy, and leaves nothing behind.

More of them stand beside what they are about: tests/cli (every option of a command), tests/datamodules (records), and
tests/test_bad_inputs.py (files, outputs and numbers of all commands, damaged at random).
"""

import importlib.util
import json
import shlex
import shutil
import socket
import sys
from io import StringIO
from pathlib import Path

import pytest
import torch
from byte_tokenizer import write_byte_tokenizer
from tiny_data import write_tiny

from dllm_var.__main__ import main

RUN = "runs/tiny/version_0"
FIT = "fit --config tiny.yaml"
VALIDATE = f"validate --config tiny.yaml --ckpt_path={RUN}"
GENERATE = f"generate --checkpoint {RUN} --prompt cat"
SERVE = f"serve --checkpoint {RUN} --port 0"
EXPORT = f"export --checkpoint {RUN}"
WITHOUT_WANDB = pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is here")

# What was typed; what the line says of the setting; what it says of the remedy.
MISTAKES = [
    # words and types
    ("fitt --config tiny.yaml", "no command 'fitt'", "commands are: fit, validate"),
    ("fit tiny.yaml", "'tiny.yaml' belongs to no option", "did you mean --config tiny.yaml?"),
    (f"{FIT} trainer.max_steps=5", "'trainer.max_steps=5' belongs to no option", "mean --trainer.max_steps=5?"),
    (f"{FIT} --epochs 3", "'epochs'", "did you mean 'trainer.max_epochs'?"),
    (f"{FIT} --trainer.gpus 1", "'trainer.gpus'", "did you mean 'trainer.devices'?"),
    ("fit --config tiny.yml", "'tiny.yml'", "No such file"),
    (f"{FIT} --model.transformer.hiden_size=32", "model.transformer", "did you mean 'hidden_size'?"),
    (f"{FIT} --trainer.max_step=3", "'trainer.max_step'", "did you mean 'trainer.max_steps'?"),
    (f"{FIT} --data.batchsize=3", "PackedDataModule has no setting 'batchsize'", "did you mean 'batch_size'?"),
    (f"{FIT} --data.batch_size=many", "data.batch_size", "expected int, got many"),
    (f"{FIT} --data.batch_size=0", "data.batch_size is 0", "at least 1"),
    (f"{FIT} --seed_everything=abc", "seed_everything", "expected bool, int, got abc"),
    (f"{FIT} --trainer.precision=fp16", "trainer.precision", "16-true, 16-mixed, bf16-true"),
    (f"{FIT} --model.schedule.kind=cosin", "model.schedule.kind", "expected cosine, linear"),
    (f"{FIT} --config half.yaml", "half.yaml", "line 2"),
    # classes
    (f"{FIT} --model.objective=MaskedDiffusion", "model.objective", "'MaskedDiffusion': give its whole path"),
    (f"{FIT} --model.objective=dllm_var.objectives.EosShedule", "model.objective", "did you mean 'EosSchedule'?"),
    (f"{FIT} --model.objective=torch.nn.Linear", "model.objective", "not correspond to a subclass of Objective"),
    (f"{FIT} --trainer.callbacks+=my_package.Mine", "trainer.callbacks", "No module named 'my_package'"),
    (f"{FIT} --trainer.callbacks+=dllm_var.callbacks.SampleCallback", "callbacks", "did you mean 'SamplingCallback'?"),
    (f"{FIT} --model.optimizer=torch.optim.Adamm", "model.optimizer", "did you mean 'Adam"),
    (f"{FIT} --model.optimizer=torch.optim.AdamW --model.optimizer.lr=-1", "model.optimizer", "learning rate: -1"),
    pytest.param(f"{FIT} --trainer.logger=WandbLogger", "wandb", "pip install", marks=WITHOUT_WANDB),
    (f"{FIT} --model.optimizer=dllm_var.training.optim.Muon --model.optimizer.lr=-1", "model.optimizer", "lr >= 0"),
    (f"{FIT} --trainer.callbacks=LearningRateMonitor --trainer.logger=false", "LearningRateMonitor", "has no logger"),
    (f"{FIT} --trainer.callbacks='{{class_path: dllm_var.callbacks.Sped}}'", "trainer.callbacks", "attribute 'Sped'"),
    (f"{FIT} --model Qwen/Qwen3-0.6B", "model: 'Qwen/Qwen3-0.6B' is no class", "to start from is model.init_from"),
    # references
    (f"{FIT} --data.context_length='${{model.contxt}}'", "${model.contxt}", "names no setting"),
    (f"{FIT} --data.context_length='${{vars.x'", "data.context_length", "a reference is written ${section.name}"),
    (f"{FIT} --data.context_length='${{oc.env:NOT_SET_HERE}}'", "data.context_length", "'NOT_SET_HERE' not found"),
    # sizes that do not go together
    (f"{FIT} --model.transformer.num_heads=3", "hidden_size 16", "num_heads 3: change one of them"),
    (f"{FIT} --model.transformer.vocab_size=10", "vocab_size 10", "leave it out or raise it"),
    (f"{FIT} --data.context_length=3", "data.context_length=3", "raise it (the shortest has 8 tokens)"),
    (f"{FIT} --trainer.val_check_interval=1000", "`val_check_interval` (1000)", "less than or equal to the number"),
    (f"{FIT} --trainer.log_every_n_steps=0", "trainer.log_every_n_steps", "at least 1"),
    # machines
    (f"{FIT} --trainer.accelerator=gpu --trainer.devices=8", "trainer.accelerator=gpu", "only CPUs, which auto takes"),
    (f"{FIT} --trainer.strategy=fdsp", "`strategy='fdsp'`", "Example choices: auto, ddp"),
    (f"{GENERATE} --device cuda", "--device cuda", "this machine has cpu"),
    (f"{GENERATE} --dtype fp16", "dtype", "expected float32, bfloat16, float16"),
    (f"{SERVE} --device tpu", "--device tpu", "this machine has cpu"),
    (f"{SERVE} --dtype int8", "dtype", "expected float32, bfloat16, float16"),
    (f"chat --checkpoint {RUN} --device mps:4", "--device mps:4", "this machine has cpu"),
    (f"chat --checkpoint {RUN} --dtype half", "dtype", "expected float32, bfloat16, float16"),
    ("benchmark --config tiny.yaml --output x.json --dtype half", "dtype", "expected float32, bfloat16, float16"),
    # data
    (f"{FIT} --data.source.path=nowhere.jsonl", "data.source path", "no file 'nowhere.jsonl'"),
    (f"{FIT} --data.source words.jsonl", "data.source", "a file of records is data.source.path"),
    (f"{FIT} --data.source.path=empty.jsonl", "the train split", "no records"),
    (f"{FIT} --data.source.path=torn.jsonl", "torn.jsonl:6", "data.on_bad_record=skip"),
    (f"{FIT} --data.source.path=fields.jsonl", "fields.jsonl:6", "prompt"),
    (f"{FIT} --data.source.columns='{{promt: word}}'", "columns", "fields are prompt, response"),
    (f"{FIT} --data.source.validation_size=50", "validation_size", "all of the 5 prompts; leave some"),
    (f"{FIT} --data.tokenizer=runs", "no tokenizer in runs", "train one with python -m dllm_var tokenizer"),
    (f"{FIT} --data.mask_token='<nomask>'", "mask_token '<nomask>'", "name a token that is"),
    (f"test --config tiny.yaml --ckpt_path={RUN} --data.source.test_size=0", "test split", "set data.source.test_size"),
    ("inspect --config tiny.yaml --sample 99", "--sample is 99", "there are 4 training samples"),
    ("tokenizer --data words.jsonl --vocab-size 3 --output tok", "--vocab-size is 3", "at least 263"),
    # checkpoints
    ("generate --prompt cat", "--checkpoint PATH", "a run folder, a .ckpt file"),
    ("generate --checkpoint nowhere --prompt cat", "no checkpoint at nowhere", "give a run folder"),
    ("generate --checkpoint runs --prompt cat", "no checkpoint in runs", f"did you mean {RUN}?"),
    ("generate --checkpoint tiny.yaml --prompt cat", "tiny.yaml is not a checkpoint", "give a checkpoint of another"),
    ("generate --checkpoint cut --prompt cat", "cut/model.safetensors", "damaged or missing: copy or export it again"),
    (
        "generate --checkpoint cut/last.ckpt --prompt cat",
        "cut/last.ckpt is damaged",
        "give a checkpoint of another run",
    ),
    ("generate --checkpoint pickled.ckpt --prompt cat", "pickled.ckpt", "could run code"),
    (f"validate --config tiny.yaml --checkpoint {RUN}", "'checkpoint'", "did you mean 'ckpt_path'?"),
    (f"{VALIDATE} --data.tokenizer=other", "another tokenizer than data.tokenizer", "set it back"),
    ("validate --config tiny.yaml", "--ckpt_path FILE", "--ckpt_path last"),
    (
        f"{FIT} --trainer.default_root_dir=new --resume",
        "no checkpoint in new/runs/tiny",
        "start the run without --resume",
    ),
    (f"{FIT} --resume {RUN}", "--resume", f"--resume={RUN}"),
    (f"{FIT} --resume --ckpt_path={RUN}", "--resume", "leave out --ckpt_path"),
    (f"{FIT} --resume --model.transformer.hidden_size=32", "hidden_size=16", "model.init_from"),
    (f"{FIT} --model.init_from={RUN} --model.transformer.hidden_size=32", "hidden_size=16", "leave it out"),
    # decoding
    (f"generate --checkpoint {RUN}", "--prompt TEXT", "--prompts-file FILE"),
    (f"{GENERATE} --prompt ''", "--prompt: it is empty", "at least one token"),
    (f"{GENERATE} --prompt -cat", "--prompt needs a value", "--prompt=VALUE"),
    (f"{GENERATE} --max-tokens 4", "'max-tokens'", "did you mean 'max-new-tokens'?"),
    (f"{GENERATE} hat", "'hat' belongs to no option", "a value with blanks needs quotes"),
    (f"{GENERATE} --prompt 日本", "--prompt", "vocabulary has nothing for '日'"),
    (f"{GENERATE} --prompts-file torn.jsonl", "torn.jsonl, line 6", "not valid JSON"),
    (f"{GENERATE} --max-new-tokens 0", "max_new_tokens", "at least 1, got 0"),
    (f"{GENERATE} --temperature -1", "temperature", "at least 0"),
    (f"{GENERATE} --top-p 2", "top_p", "in (0, 1]"),
    (f"{GENERATE} --threshold high", "sampler.policy.threshold", "expected float, got high"),
    (f"{GENERATE} --quantize int5", "quantize", "expected int8, int4, got int5"),
    (f"{GENERATE} --block-length 0", "sampler.block_length", "at least 1"),
    (f"{GENERATE} --policy Confidence", "no policy 'Confidence'", "ConfidenceThreshold"),
    (f"{GENERATE} --sampler wnio", "--sampler: there is no 'wnio'", "wino"),
    (f"{GENERATE} --sampler.block_lenght 4", "'block_lenght'", "did you mean 'block_length'?"),
    (f"{GENERATE} --sampler autoregressive", "bidirectional", "decode it with dllm_var.sampling.BlockDiffusionSampler"),
    (f"{GENERATE} --chat", "no chat template", "leave out --chat"),
    (f"chat --checkpoint {RUN}", "chat template", f"which {RUN} has not"),
    (f"{GENERATE} --stream --json", "--stream does not go with --json", "leave one of them out"),
    # where to
    (f"{GENERATE} --output tiny.yaml/answers.txt", "'tiny.yaml/answers.txt'", "Not a directory"),
    (f"{EXPORT} --format llada --output runs", "--output runs exists", "give a folder that does not"),
    (f"{EXPORT} --format lama --output out", "--format lama", "llada, dream, llama"),
    (f"{FIT} --trainer.default_root_dir=tiny.yaml", "run folder tiny.yaml/runs", "trainer.default_root_dir puts runs"),
    (f"{FIT} --trainer.callbacks.dirpath=tiny.yaml", "tiny.yaml is a file", "name another one"),
    (f"{FIT} --data.cache_dir=tiny.yaml", "tokenized data in tiny.yaml", "set data.cache_dir"),
    (f"serve --checkpoint {RUN} --port PORT", "Address already in use", "choose another"),
    (f"{SERVE} --max-tokens 1", "--max-tokens", "at least 2, got 1"),
    # other commands
    ("benchmark --quick", "benchmark needs --config FILE", "--output FILE.json"),
    ("plan --config tiny.yaml --devices 0", "devices", "v>0"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working folder with a trained model, as a newcomer has it, and with files that are not right."""
    folder = tmp_path_factory.mktemp("mistakes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["fit", "--config", write_tiny(), "--trainer.callbacks+=dllm_var.callbacks.ExportWeights"]) == 0
    shutil.copytree(folder / RUN / "model", folder / "cut")
    for name, source in (("model.safetensors", "model/model.safetensors"), ("last.ckpt", "checkpoints/last.ckpt")):
        (folder / "cut" / name).write_bytes((folder / RUN / source).read_bytes()[:5_000])
    words = (folder / "words.jsonl").read_text().splitlines()[:5]
    (folder / "torn.jsonl").write_text("\n".join([*words, words[0][:20], *words]))
    (folder / "fields.jsonl").write_text("\n".join([*words, json.dumps({"question": "sun", "answer": "S"}), *words]))
    (folder / "empty.jsonl").touch()
    write_byte_tokenizer(folder / "other")
    (folder / "half.yaml").write_text("model:\n  transformer: {hidden_size: 16\ndata: {}\n")
    torch.save({"state_dict": {}, "made_by": Path("someone")}, folder / "pickled.ckpt")
    return folder


def test_there_are_forty_and_more():
    assert len(MISTAKES) >= 40


@pytest.mark.parametrize(("typed", "setting", "remedy"), MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(typed, setting, remedy, place, monkeypatch, capfd):
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "stdin", StringIO())
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        status = main(shlex.split(typed.replace("PORT", str(taken.getsockname()[1]))))
    shown = capfd.readouterr()
    lines = shown.err.strip().splitlines()
    assert status == 2, shown
    assert "Traceback" not in shown.out + shown.err
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    assert setting in lines[-1] and remedy in lines[-1] and len(lines[-1]) < 420, lines[-1]
    after = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    assert after.keys() - before.keys() <= set(place.glob(f"{RUN}/events*"))  # of a resume that was refused
    assert all(after[path] == content for path, content in before.items())
