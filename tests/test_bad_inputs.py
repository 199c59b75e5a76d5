"""Every command refuses bad files, outputs and numbers in one line that names them, and leaves no partial output.

One case of some rows of each table runs always; all of them, some 300, with `python -m pytest -m exhaustive`.
"""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_data import write_tiny

from dllm_var.__main__ import main

ROOT = Path(__file__).parent.parent
EXHAUSTIVE = pytest.mark.exhaustive
COMMANDS = {
    "fit": "fit --config=tiny.yaml --trainer.max_steps=1",
    "validate": "validate --config=tiny.yaml --ckpt_path=run/last.ckpt",
    "generate": "generate --checkpoint=model --prompt=key --max-new-tokens=4",
    "benchmark": "benchmark --config=bench.yaml --quick --output=figures.json",
    "export": "export --checkpoint=model --format=llada --output=exported",
    "plan": "plan --config=tiny.yaml --devices=1",
}
FILES = {  # in place of a good file
    "missing": lambda path: None,
    "empty": b"",
    "not UTF-8": b"\xff\xfe\x00caf\xe9: [",
    "broken": b'{"a": [1, \n- b: }',
    "a number": b"3",
    "a list": b"[1, 2]",
    "foreign": b'{"nothing": {"a": 1}}',
    "a folder": Path.mkdir,
    "a pipe": os.mkfifo,
    "a loop of links": lambda path: path.symlink_to(path.name),
    "unreadable": lambda path: path.symlink_to("/proc/self/mem"),
}
INPUTS = (  # a command, the option that names a file, the file
    "fit --config bad.yaml",
    "fit --data.source.init_args.path bad.jsonl",
    "fit --data.tokenizer bad",
    "fit --model.init_from bad",
    "fit --ckpt_path bad.ckpt",
    "validate --ckpt_path bad.ckpt",
    "generate --checkpoint bad.ckpt",
    "generate --checkpoint bad",
    "generate --prompts-file bad.jsonl",
    "generate --prompts-file bad.txt",
    "generate --sampler bad.yaml",
    "generate --config bad.yaml",
    "generate - model/config.json",
    "generate - model/model.safetensors",
    "generate - model/tokenizer.json",
    "export - model/config.json",
    "benchmark --config bad.yaml",
    "plan --config bad.yaml",
)
OUTPUTS = ("generate --output answers.txt", "export --output exported", "benchmark --output figures.json")
PLACES = {
    "a folder": "train.d",
    "a full device": "/dev/full",
    "a loop of links": "loop",
    "below a file": "tiny.yaml/{}",
    "too long a name": "x" * 300 + "{}",
    "no value": "",
}
NUMBERS = ("nan", "-1", "x", "")
COUNTED = (
    "fit --data.batch_size --data.context_length --data.seed --model.transformer.num_heads --trainer.devices",
    "fit --trainer.accumulate_grad_batches --seed_everything --trainer.gradient_clip_val --data.num_workers",
    "generate --max-new-tokens --temperature --top-k --top-p --batch-size --block-length --threshold",
    "plan --devices --mfu --device-tflops --device-memory --supervised-share",
    "benchmark --repeats --threads",
    "export --block-length --threshold",
)
SENSELESS = (  # added to the good command
    "fit --trainer.strategy=x --data=[] --trainer.precision=nothing --model.objective=os.system --trainer.max_time=x",
    "fit --data.batch_size=${data.batch_size} --data.batch_size=${ --data.packing=x --config",
    "fit --model.optimizer=torch.optim.Nothing --model.optimizer.init_args.lr=x --sampler=nothing --resume=nothing",
    "fit --model.transformer.num_heads=3 --trainer.plugins=[nothing] --trainer.profiler=x --trainer.logger=3 stray",
    "generate --policy=os.system --policy= --sampler={ --sampler=3 --sampler=os.system --sampler.policy=3 --config=",
    "generate --suppress=id:99999 --infill=a<gap:>b --prompt=\udcff --rope-scaling=0:0 --sampler.help=nothing stray",
    "benchmark --output=x.txt --only=nothing --tasks=3 --tasks=[] --trainings=[{}] --output",
    "export --format=x --dtype=x --format= --output= --nothing --format stray",
    "plan --data.tokenizer=nowhere/at/all --nothing=1 --devices",
)


def table(rows, columns, every=1):
    """Pairs every row with every column; of some rows one pair is quick."""
    return [
        pytest.param(row, column, marks=[] if place % every == 0 and place % len(columns) == number else EXHAUSTIVE)
        for place, row in enumerate(rows)
        for number, column in enumerate(columns)
    ]


def pairs(lines):
    return [(command, option) for command, *options in map(str.split, lines) for option in options]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with what the commands need: the shipped model, a config, a checkpoint."""
    folder = tmp_path_factory.mktemp("bad")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_tiny()
        assert main(["fit", "--config=tiny.yaml", "--trainer.callbacks.dirpath=run", "--trainer.logger=false"]) == 0
    shutil.copytree(ROOT / "checkpoints" / "cmudict", folder / "model")
    source = {"class_path": "dllm_var.datamodules.JsonlSource", "init_args": {"path": "words.jsonl"}}
    entry = {"name": "sampler", "role": "default", "sampler": "dllm_var.sampling.BlockDiffusionSampler"}
    tasks = [{"name": "tiny", "source": source, "checkpoint": "model", "entries": [entry]}]
    (folder / "bench.yaml").write_text(json.dumps({"tasks": tasks}))
    (folder / "prompts.jsonl").write_text('{"prompt": "key"}\n{"prompt": "cat"}\n')
    (folder / "train.d").mkdir()
    (folder / "loop").symlink_to("loop")
    return folder


@pytest.fixture
def refused(base, tmp_path, monkeypatch, capfd):
    """Runs a command in a copy of the folder; it must be refused in one line, which is returned."""
    folder = shutil.copytree(base, tmp_path / "work", symlinks=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(command, option="", value=""):
        words = [word for word in COMMANDS[command].split() if word.partition("=")[0] != option]
        if option == "--prompts-file":
            words.remove("--prompt=key")
        added = [option if value is None else f"{option}={value}"] if option not in ("", "-") else []
        status = main([*words, *added])
        shown = capfd.readouterr()
        lines = shown.err.strip().splitlines()
        assert status == 2 and lines and lines[-1].startswith("error: "), shown
        assert "Traceback" not in shown.out + shown.err and sum(line.startswith("error: ") for line in lines) == 1
        return lines[-1]

    return run


@pytest.mark.parametrize(("place", "kind"), table(INPUTS, list(FILES), every=2))
def test_bad_files(place, kind, refused):
    command, option, name = place.split()
    if option == "--prompts-file" and kind == "a pipe":
        return  # its writer is waited for
    shutil.rmtree(name) if Path(name).is_dir() else Path(name).unlink(missing_ok=True)
    content = FILES[kind]
    Path(name).write_bytes(content) if isinstance(content, bytes) else content(Path(name))
    line = refused(command, option, name)
    named = (Path(name).name, option.rpartition(".")[2], "nothing", "terminators", "split", "validation_size")
    assert any(word in line for word in named), line


@pytest.mark.parametrize(("place", "kind"), table(OUTPUTS, list(PLACES)))
def test_bad_outputs(place, kind, refused):
    command, option, name = place.split()
    if command in ("export", "generate") and kind == "a loop of links":
        return  # the output replaces it
    value = PLACES[kind].format(name)
    before = sorted(Path().iterdir())
    line = refused(command, option, value)
    assert option[2:] in line or value in line
    assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize(("place", "value"), table(pairs(COUNTED), NUMBERS, every=3))
def test_bad_numbers(place, value, refused):
    command, option = place
    word = option.removeprefix("--").rpartition(".")[2]
    line = refused(command, option, value)
    assert word in line or word.replace("-", "_") in line


@pytest.mark.slow
@pytest.mark.parametrize(("command", "setting"), pairs(SENSELESS))
def test_senseless_settings(command, setting, refused):
    refused(command, *(setting.partition("=")[::2] if "=" in setting else (setting, None)))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("pattern", "command"),
    [
        ("tiny.yaml", COMMANDS["fit"]),
        ("words.jsonl", COMMANDS["fit"]),
        ("run/last.ckpt", COMMANDS["validate"]),
        ("run/last.ckpt", "generate --checkpoint=run/last.ckpt --prompt=key"),
        ("model/*.*", COMMANDS["generate"]),
        ("model/*.*", COMMANDS["export"]),
        ("prompts.jsonl", "generate --checkpoint=model --prompts-file=prompts.jsonl"),
    ],
)
def test_damage_at_random_places_is_refused_or_does_no_harm(pattern, command, seed, base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "work", symlinks=True)
    rng = random.Random(f"{pattern} {command} {seed}")
    path = rng.choice(sorted(path for path in folder.glob(pattern) if path.is_file()))
    data = bytearray(path.read_bytes())
    place, size = rng.randrange(len(data)), rng.choice((1, 8, 100, 4_000))
    way = rng.choice(("cut", "overwrite", "flip", "remove", "repeat"))
    if way == "flip":
        data[place] ^= 1 << rng.randrange(8)
    else:
        end = len(data) if way == "cut" else place if way == "repeat" else place + size
        data[place:end] = {"overwrite": rng.randbytes(size), "repeat": data[place : place + size]}.get(way, b"")
    path.write_bytes(data)
    # In a process of its own: damage could end it.
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "DLLM_VAR_CACHE": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    run = [sys.executable, "-m", "dllm_var", *command.split()]
    ended = subprocess.run(run, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False)
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert (ended.returncode, len(errors)) in ((0, 0), (2, 1)) and "Traceback" not in ended.stderr, ended.stderr
