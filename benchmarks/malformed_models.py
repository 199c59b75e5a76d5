"""Configs, checkpoints and prompts that are broken in many ways."""

from __future__ import annotations

import atexit
import io
import json
import random
import shutil
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from malformed_data import Partial, damaged_bytes, damaged_value
from short_run import recipe

from dllm_var.__main__ import main
from dllm_var.checkpointing.files import read_file, write_file
from dllm_var.errors import UserError

SAFE = ["--trainer.fast_dev_run=true", "--trainer.logger=false", "--trainer.accelerator=cpu", "--trainer.devices=1"]


def in_this_process(arguments: list[str]) -> str:
    """Runs a command; its error becomes a UserError again.

    Returns:
        What it prints.
    """
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main(arguments)
    if status:
        lines = [line for line in err.getvalue().splitlines() if line.startswith("error: ")]
        raise UserError("\n".join(lines).removeprefix("error: "))
    return out.getvalue()


def config(rng: random.Random, folder: Path) -> None:
    """A recipe with something wrong in its text or its settings, up to the first training step."""
    settings: Any = recipe(folder, absolute=True)
    for _ in range(rng.choice((1, 1, 2))):
        settings = damaged_value(rng, settings)
    text = yaml.safe_dump(settings, sort_keys=False).encode(errors="replace")
    if rng.random() < 0.3:
        text = damaged_bytes(rng, text)
    path = folder / "recipe.yaml"
    path.write_bytes(text)
    extra = rng.choice(
        [[], [], [], ["--data.batch_size=x"], ["--trainer.nothing=1"], ["--config"], ["--data.seed"], ["stray"]]
    )
    if rng.random() < 0.05:
        extra = [f"--{rng.choice(('model', 'data', 'trainer', 'sampler'))}={rng.choice(('3', '[]', '{', 'os.system'))}"]
    in_this_process(["fit", "--config", str(path), *extra, *SAFE])


@cache
def trained() -> Path:
    """A run of two steps, with its checkpoint and exported folder, made once in this process."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    settings = recipe(folder, absolute=True)
    settings["trainer"] |= {"max_steps": 2, "limit_val_batches": 0}
    logger = {"save_dir": str(folder), "name": "runs", "version": 0}
    settings["trainer"]["logger"] = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": logger}
    (folder / "recipe.yaml").write_text(json.dumps(settings))
    in_this_process(["fit", "--config", str(folder / "recipe.yaml")])
    return folder


def generate(checkpoint: Path, *arguments: str) -> str:
    """Answers a prompt, or whatever the arguments ask for, with a checkpoint."""
    return in_this_process(["generate", "--checkpoint", str(checkpoint), "--max-new-tokens=4", *arguments])


def checkpoint(rng: random.Random, folder: Path) -> None:
    """A checkpoint, or an exported folder, that is damaged, foreign, or whole but with wrong contents."""
    run = trained() / "runs" / "version_0"
    whole, path = run / "checkpoints" / "last.ckpt", folder / "last.ckpt"
    way = rng.random()
    if way < 0.35:  # damaged: the checksum tells
        content = whole.read_bytes()
        path.write_bytes(damaged := damaged_bytes(rng, content))
        generate(path, "--prompt=key")
        if damaged != content:
            raise Partial("a damaged checkpoint was used")
    elif way < 0.55:  # contents that do not belong together, under a good checksum
        state = read_file(whole)
        part = rng.choice(("dllm_var", "state_dict", "dllm_var", None))
        state = damaged_value(rng, state) if part is None else {**state, part: damaged_value(rng, state[part])}
        write_file(state, path)
        generate(path, "--prompt=key")
    elif way < 0.65:  # to go on from
        state = read_file(whole)
        part = rng.choice(
            ("optimizer_states", "loops", "callbacks", "PackedDataModule", "lr_schedulers", "global_step")
        )
        write_file({**state, part: damaged_value(rng, state[part])}, path)
        settings = ["--config", str(trained() / "recipe.yaml"), f"--ckpt_path={path}", "--trainer.max_steps=3"]
        in_this_process(["fit", *settings, "--trainer.logger=false", f"--trainer.default_root_dir={folder}"])
    elif way < 0.75:
        foreign = rng.choice(
            [b"", b"hello", rng.randbytes(1_000), b"PK\x05\x06" + bytes(18), b"\x80\x04.", json.dumps([1]).encode()]
        )
        path.write_bytes(foreign)
        if rng.random() < 0.5:
            torch.save(rng.choice([[1], {"state_dict": {}}, torch.ones(3), {"a": rng}, {"dllm_var": 3}]), path)
        generate(path, "--prompt=key")
        raise Partial("something that is no checkpoint was used")
    else:
        shutil.copytree(run / "model", folder / "model")
        file = rng.choice(
            [file for file in sorted((folder / "model").iterdir()) if file.suffix in (".json", ".safetensors")]
        )
        if file.suffix == ".json" and rng.random() < 0.6:
            file.write_text(json.dumps(damaged_value(rng, json.loads(file.read_text()))))
        elif rng.random() < 0.1:
            file.unlink()
        else:
            file.write_bytes(damaged_bytes(rng, file.read_bytes()))
        generate(folder / "model", "--prompt=key")


def prompt(rng: random.Random, folder: Path) -> None:
    """Prompts and decoding options without sense."""
    model = trained() / "runs" / "version_0" / "model"
    odd = [
        "",
        " ",
        "\x00",
        "\ud800",
        "é\u202e",
        "<mask>",
        "<eos>",
        "<pad>",
        "key" * 300,
        "KEY",
        "-",
        "--prompt",
        "<gap:3>",
    ]
    options = [
        *(f"--temperature={value}" for value in ("nan", "-1", "x", "1e400", "inf")),
        *(f"--max-new-tokens={value}" for value in ("0", "-3", "1.5", "", "99999999999999")),
        *(f"--block-length={value}" for value in ("0", "-1", "x")),
        *(f"--threshold={value}" for value in ("nan", "-1", "7", "")),
        *(f"--sampler={value}" for value in ("nothing", "os.system", "{", "3", "dllm_var.sampling", "/", "x.yaml")),
        *(f"--policy={value}" for value in ("nothing", "os.system", "")),
        *("--stop=", "--suppress=nothing", "--chat", "--infill=a<gap:>b", "--infill=<gap:2>", "--system=a", "--json"),
        *("--sampler.block_length=0", "--sampler.policy=3", "--rope-scaling=7", "--config=nothing.yaml", "--seed=-1"),
        *("--output=/nowhere/at/all", "--prompts-file=/nowhere", "--replay", "--stream", "--nothing", "stray"),
    ]
    arguments = rng.sample(options, rng.choice((0, 1, 1, 2)))
    if rng.random() < 0.5:
        records: list[Any] = [
            rng.choice(
                [
                    {"prompt": "key"},
                    {"messages": [{"role": "user", "content": "key"}]},
                    {"infill": "K<gap:2>Y", "prompt": "key"},
                    {"prompt": rng.choice(odd)},
                ]
            )
            for _ in range(rng.choice((1, 2, 4)))
        ]
        place = rng.randrange(len(records))
        records[place] = damaged_value(rng, records[place])
        content = "\n".join(json.dumps(record) for record in records).encode()
        path = folder / rng.choice(("prompts.jsonl", "prompts.jsonl", "prompts.txt"))
        path.write_bytes(damaged_bytes(rng, content) if rng.random() < 0.5 else content)
        arguments.append(f"--prompts-file={path}")
    else:
        arguments.append(f"--prompt={rng.choice([*odd, 'key'])}")
    generate(model, *arguments)
