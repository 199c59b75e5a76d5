"""Inputs that are broken in many ways, given to the same code that reads good ones.

Each input follows from its kind and a number. It must be refused with one line that names the cause, or be used whole.
`benchmarks/faults.py` tries a thousand of them, the test suite some of each kind.
"""

from __future__ import annotations

import atexit
import gzip
import io
import json
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from dllm_var.datamodules import CmudictSource, JsonlSource, PackedDataModule, ParquetSource
from dllm_var.errors import UserError

SECONDS = 60  # an input that takes longer hangs
TOKENIZER = CmudictSource.default_tokenizer


@dataclass
class Outcome:
    """What became of one input.

    Args:
        kind: Kind of input.
        number: Which one.
        result: ``refused`` (with a message) or ``used``; else ``crashed``, ``hung``, ``partial`` or ``unclear``.
        message: What the user is told, or the end of the traceback.
    """

    kind: str
    number: int
    result: str
    message: str

    @property
    def good(self) -> bool:
        return self.result in ("refused", "used")


class Partial(Exception):
    """Something was taken for whole that is not."""


class Hung(BaseException):
    """Took too long."""


@contextmanager
def _time_limit() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise Hung

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def attempt(kind: str, number: int, folder: Path) -> Outcome:
    """Gives one malformed input to the code that reads its kind.

    Args:
        kind: One of `KINDS`.
        number: Decides the input.
        folder: Emptied first, then used for files.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rng = random.Random(f"{kind} {number}")
    try:
        with _time_limit():
            KINDS[kind](rng, folder)
    except UserError as error:
        text = str(error)
        one_line = bool(text.strip()) and "\n" not in text.strip() and "Traceback" not in text
        return Outcome(kind, number, "refused" if one_line else "unclear", text)
    except Hung:
        return Outcome(kind, number, "hung", f"more than {SECONDS} s")
    except Partial as error:
        return Outcome(kind, number, "partial", str(error))
    except Exception:
        return Outcome(kind, number, "crashed", "".join(traceback.format_exc().splitlines(keepends=True)[-6:]))
    return Outcome(kind, number, "used", "")


def in_this_process(arguments: list[str]) -> str:
    """Runs a command; its error becomes a UserError again.

    Returns:
        What it prints.
    """
    from dllm_var.__main__ import main

    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main(arguments)
    if status:
        lines = [line for line in err.getvalue().splitlines() if line.startswith("error: ")]
        raise UserError("\n".join(lines).removeprefix("error: "))
    return out.getvalue()


# -- damage ------------------------------------------------------------------------------------------------------------

SCALARS: list[Any] = [
    None, True, False, 0, -1, 1, 3.5, 10**30, -(10**30), 1e308, float("nan"), float("inf"), "", " ", "a", "\x00",
    "\ud800", "é\u202e\U0001f600", "${data.seed}", "${", "1", "null", [], {}, [[]], [None], {"a": None}, {"": []},
    "x" * 5_000, [0] * 2_000, {"class_path": "os.system"}, {"class_path": 3}, {"init_args": {}}, "os.system", "../..",
]  # fmt: skip


def damaged_bytes(rng: random.Random, content: bytes) -> bytes:
    """Content cut, overwritten, lengthened or mixed up."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        place = rng.randrange(len(data) + 1)
        size = rng.choice((1, 1, 2, 8, 100, 4_000))
        way = rng.randrange(7)
        if way == 0:
            del data[place:]
        elif way == 1:
            del data[place : place + size]
        elif way == 2:
            data[place : place + size] = rng.randbytes(size)
        elif way == 3 and place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        elif way == 4:
            data[place:place] = rng.randbytes(size)
        elif way == 5:
            data[place : place + size] = bytes(size)
        else:
            data += data[place : place + size]
    return bytes(data)


def damaged_value(rng: random.Random, value: Any) -> Any:
    """A nested value with one part of it replaced, removed, repeated or renamed; the original stays as it is."""
    inner = isinstance(value, dict | list) and len(value) > 0
    if not inner or rng.random() < 0.2:
        choices = [rng.choice(SCALARS)]
        if isinstance(value, str) and value:
            choices += [value[: rng.randrange(len(value))], value + rng.choice("x.:/\n"), [value]]
        if isinstance(value, int | float) and not isinstance(value, bool):
            choices += [-value, value * 10**9, value + 0.5, str(value), [value]]
        return rng.choice(choices)
    if isinstance(value, dict):
        key = rng.choice(list(value))
        way = rng.random()
        rest = {name: item for name, item in value.items() if name != key}
        if way < 0.15:
            return rest
        if way < 0.25:
            return {**rest, f"{key}{rng.choice('xs_.')}": value[key]}
        return {**value, key: damaged_value(rng, value[key])}
    place = rng.randrange(len(value))
    way = rng.random()
    if way < 0.2:
        return value[:place] + value[place + 1 :]
    if way < 0.3:
        return [*value, value[place]]
    return [*value[:place], damaged_value(rng, value[place]), *value[place + 1 :]]


# -- training data -----------------------------------------------------------------------------------------------------


def good_records(rng: random.Random, number: int) -> list[dict[str, Any]]:
    """Records in all five formats."""
    records: list[dict[str, Any]] = []
    for _ in range(number):
        word = "".join(rng.choices("abcdefg", k=rng.randint(1, 8)))
        answer = " ".join(rng.choices(["K", "AE", "T", "IY"], k=rng.randint(1, 6)))
        records.append(
            rng.choice(
                [
                    {"prompt": word, "response": answer},
                    {"instruction": word, "input": "", "output": answer},
                    {"text": answer},
                    {"input_ids": [rng.randrange(4, 60) for _ in range(6)], "prompt_length": rng.randrange(6)},
                    {
                        "messages": [
                            {"role": "user", "content": word},
                            {"role": "assistant", "content": answer},
                            {"role": "user", "content": word},
                        ][: rng.randint(2, 3)]
                    },
                ]
            )
        )
    return records


def read_all(source: Any, rng: random.Random, folder: Path) -> PackedDataModule:
    """Tokenizes, packs and reads every row of a source, with settings at random."""
    packing, canvas = rng.choice([("concat", 0), ("best_fit", 0), ("best_fit", 4), ("concat", 3)])
    data = PackedDataModule(
        source,
        TOKENIZER,
        batch_size=2,
        context_length=rng.choice((8, 32)),
        packing=packing,
        canvas=canvas,
        on_bad_record=rng.choice(("error", "skip")),
        on_too_long=rng.choice(("drop", "truncate", "error")),
        cache_dir=str(folder / "cache"),
    )
    data.prepare_data()
    rows = data.rows("train")
    rows.__getitems__(range(len(rows)))
    data.held_out("validation" if "validation" in source.splits else "train")
    data.report()
    return data


def check_whole(data: PackedDataModule, lines: int) -> None:
    """Raises when records are missing that were not counted as skipped."""
    read = sum(data.table(split).meta["records"] for split in data.source.splits)
    kept = sum(len(data.table(split)) + data.table(split).meta["skipped"] for split in data.source.splits)
    if read != lines or kept != lines:
        raise Partial(f"of {lines} records {read} were read and {kept} accounted for")


def jsonl(rng: random.Random, folder: Path) -> None:
    """A JSON Lines file whose bytes, records or settings are wrong."""
    records: list[Any] = good_records(rng, rng.choice((1, 3, 20)))
    path = folder / "data.jsonl"
    for _ in range(rng.choice((0, 1, 1, 2))):
        place = rng.randrange(len(records))
        records[place] = damaged_value(rng, records[place])
    content = "\n".join(json.dumps(record) for record in records).encode()
    if rng.random() < 0.5:
        content = damaged_bytes(rng, content)
    way = rng.random()
    if way < 0.1:
        path = path.with_suffix(".jsonl.gz")
        content = gzip.compress(content)
        content = damaged_bytes(rng, content) if rng.random() < 0.7 else content
    elif way < 0.15:
        content = content.decode(errors="replace").encode(rng.choice(("utf-16", "utf-8-sig", "utf-32")))
    elif way < 0.2:
        content = rng.choice((b"[" * 100_000, b'{"a":' * 50_000, b"\n\n", b"", b"[1, 2]", json.dumps(records).encode()))
    elif way < 0.25:
        content = content.replace(b"\n", rng.choice((b"\r\n", b"\r", b"\n\n \n", b"\x00\n", b"")))
    path.write_bytes(content)
    columns = rng.choice([None, None, None, {"prompt": "question"}, {"response": "prompt"}, {"text": "messages"}])
    size = rng.choice((0, 0, None, 1, 0.3, 5, 10**9))
    source = JsonlSource(str(path), validation_size=size, test_size=rng.choice((0, 0, 1)), columns=columns)
    data = read_all(source, rng, folder)
    if path.suffix == ".jsonl":
        check_whole(data, sum(bool(line.strip()) for line in content.split(b"\n")))


def parquet(rng: random.Random, folder: Path) -> None:
    """A Parquet file whose bytes, types or columns are wrong."""
    import pyarrow
    import pyarrow.parquet

    path = folder / "data.parquet"
    number = rng.choice((0, 1, 5, 50))
    texts = pyarrow.array([f"K{' AE' * (index % 5)}" for index in range(number)])
    other = [
        pyarrow.array(list(range(number))),
        pyarrow.array([None] * number),
        pyarrow.array([[index, None] for index in range(number)], pyarrow.list_(pyarrow.int64())),
        pyarrow.array([[4, 5, 6]] * number, pyarrow.list_(pyarrow.int32())),
        pyarrow.array([b"\xff\xfe"] * number, pyarrow.binary()),
        pyarrow.array([{"role": "user", "content": "a"}] * number),
        pyarrow.array([[{"role": "user", "content": "a"}, {"role": "assistant", "content": "K"}]] * number),
        pyarrow.array([1.5] * number),
        pyarrow.array([10**12] * number, pyarrow.timestamp("s")),
        texts.dictionary_encode() if number else texts,
    ]
    names = ("prompt", "response", "text", "messages", "input_ids", "prompt_length", "instruction", "output", "extra")
    chosen = rng.sample(names, rng.randint(0, 4))
    table = pyarrow.table({name: rng.choice([texts] * 40 + other) for name in ("prompt", "response", *chosen)})
    if rng.random() < 0.2:
        table = table.drop_columns(rng.sample(table.column_names, rng.randint(1, table.num_columns)))
    pyarrow.parquet.write_table(
        table, path, row_group_size=rng.choice((1, 7, 100)), compression=rng.choice(("none", "snappy", "zstd"))
    )
    intact = rng.random() < 0.4
    if not intact:
        path.write_bytes(damaged_bytes(rng, path.read_bytes()))
    source = ParquetSource(str(path), validation_size=rng.choice((0, None, 2)))
    data = read_all(source, rng, folder)
    if intact:
        check_whole(data, number)


# -- configs -----------------------------------------------------------------------------------------------------------


def config(rng: random.Random, folder: Path) -> None:
    """A recipe with something wrong in its text or its settings, up to the first training step."""
    import yaml
    from forked_runs import recipe

    settings: Any = recipe(folder)
    for _ in range(rng.choice((1, 1, 2))):
        settings = damaged_value(rng, settings)
    if isinstance(settings, dict) and isinstance(settings.get("trainer"), dict):
        settings["trainer"] |= {"fast_dev_run": True, "logger": False, "default_root_dir": str(folder)}
    text = yaml.safe_dump(settings, sort_keys=False).encode(errors="replace")
    if rng.random() < 0.3:
        text = damaged_bytes(rng, text)
        if b"fast_dev_run: true" not in text or b"default_root_dir" not in text:
            text = text[: max(text.find(b"trainer:"), 0)]  # no run of its own length in places of its own
    path = folder / "recipe.yaml"
    path.write_bytes(text)
    extra = rng.choice(
        [[], [], [], ["--data.batch_size=x"], ["--trainer.nothing=1"], ["--config"], ["--data.seed"], ["stray"]]
    )
    if rng.random() < 0.05:
        extra = [f"--{rng.choice(('model', 'data', 'trainer', 'sampler'))}={rng.choice(('3', '[]', '{', 'os.system'))}"]
    in_this_process(["fit", "--config", str(path), *extra, *SAFE])


SAFE = ["--trainer.fast_dev_run=true", "--trainer.logger=false", "--trainer.accelerator=cpu", "--trainer.devices=1"]


# -- checkpoints and prompts -------------------------------------------------------------------------------------------


@cache
def trained() -> Path:
    """A run of two steps, with its checkpoint and exported folder, made once in this process."""
    from forked_runs import recipe

    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    settings = recipe(folder)
    for split in ("path", "validation_path", "test_path"):
        paths = settings["data"]["source"]["init_args"]
        paths[split] = str(folder / paths[split])
    settings["data"]["cache_dir"] = str(folder / "cache")
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
    import torch

    from dllm_var.checkpointing.files import read_file, write_file

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
        part = rng.choice(("optimizer_states", "loops", "callbacks", "PackedDataModule", "lr_schedulers", "global_step"))
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
        file = rng.choice([file for file in sorted((folder / "model").iterdir()) if file.suffix in (".json", ".safetensors")])
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
    odd = ["", " ", "\x00", "\ud800", "é\u202e", "<mask>", "<eos>", "<pad>", "key" * 300, "KEY", "-", "--prompt", "<gap:3>"]
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


KINDS: dict[str, Callable[[random.Random, Path], None]] = {
    "jsonl": jsonl,
    "parquet": parquet,
    "config": config,
    "checkpoint": checkpoint,
    "prompt": prompt,
}


def main() -> None:
    """Tries inputs of one kind: KIND [FIRST [LAST]]; prints those that went wrong."""
    kind, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    counts: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(first, last):
            outcome = attempt(kind, number, Path(folder) / "work")
            counts[outcome.result] = counts.get(outcome.result, 0) + 1
            if "-v" in sys.argv:
                print(f"{kind} {number}: {outcome.result} {outcome.message[:250]}")
            elif not outcome.good:
                print(f"{kind} {number}: {outcome.result}\n{outcome.message}")
    print(kind, counts)


if __name__ == "__main__":
    main()
