"""`inspect`: counts that are true, rows as training has them, and warnings that name the remedy."""

import json
import re
from pathlib import Path

import pytest
import yaml
from byte_tokenizer import CHAT_TEMPLATE, write_byte_tokenizer

from dllm_var.__main__ import main
from dllm_var.cli.inspect import report
from dllm_var.cli.trainer_settings import canvas_warning
from dllm_var.datamodules import CmudictSource, JsonlSource, PackedDataModule, StreamingDataModule
from dllm_var.sampling import AutoregressiveSampler, BlockDiffusionSampler

TURNS = [("user", "{}?"), ("assistant", "it is\n{}"), ("user", "so")]
CHATS = [[{"role": role, "content": text.format(n)} for role, text in TURNS] for n in range(10, 40)]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DLLM_VAR_CACHE", str(tmp_path / "cache"))
    Path("chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    for name, template in (("chat", CHAT_TEMPLATE), ("plain", None)):
        write_byte_tokenizer(tmp_path / name, template)


def data(tokenizer="chat", kind=PackedDataModule, **settings):
    settings = {"context_length": 128, "packing": "best_fit", **settings}
    return kind(source=JsonlSource("chats.jsonl"), tokenizer=tokenizer, **settings)


def test_the_command_shows_counts_a_sample_and_a_row(capsys):
    settings = {
        "source": {"class_path": "JsonlSource", "init_args": {"path": "chats.jsonl"}},
        **{"tokenizer": "chat", "context_length": 128, "packing": "best_fit", "canvas": 8},
    }
    Path("own.yaml").write_text(yaml.safe_dump({"data": settings, "sampler": {"class_path": "BlockDiffusionSampler"}}))
    assert main(["inspect", "--config", "own.yaml", "--sample", "1", "--sampler.block_length=8"]) == 0
    said = capsys.readouterr()
    assert "warning" not in said.err
    lines = said.out.splitlines()
    assert " ".join(lines[0].split()) == "samples tokens with loss unknown dropped truncated skipped rows"
    assert [line.split()[:2] for line in lines[1:4]] == [["train", "28"], ["validation", "1"], ["test", "1"]]
    assert "tokenizer: 261 tokens, mask <|mask|>, terminator <|im_end|>, padding <|pad|>, a chat template" in said.out
    at = next(number for number, line in enumerate(lines) if line.startswith("sample 1, "))
    assert re.fullmatch(r"  no loss <\|im_start\|>·u·s·e·r·\\n·\d·\d·\?·<\|im_end\|>.*·\\n", lines[at + 1])
    assert re.fullmatch(r"  loss    i·t· ·i·s·\\n·\d·\d·<\|im_end\|>", lines[at + 2])
    assert re.search(r"assistant\\n\[it is\\n\d\d<\|im_end\|>\]_{6,8}$", lines[-2]), lines[-2]  # masks to a whole block
    assert not Path("runs").exists()


def test_a_row_shows_every_token_of_it_once():
    module = data(overhang=5)
    row = module.rows("train")[3]
    shown = report(module, 3, colour=False).split("before masking:\n")[1].splitlines()
    text = module.tokenizer.backend.decode(row["input_ids"].tolist(), skip_special_tokens=False).split("<|pad|>")[0]
    joined = "".join(line[2:] for line in shown if "padding" not in line)
    assert joined.replace("[", "").replace("]", "") == text.replace("<|mask|>", "_").replace("\n", "\\n")
    loss = re.findall(r"\[(.*?)\]", joined)
    tokens = [part.replace("<|im_end|>", "E").replace("\\n", "N") for part in loss]
    assert len("".join(tokens)) == int(row["supervised"].sum())
    assert "\033[32m" in report(module, 3, colour=True)


def test_a_tokenizer_that_does_not_fit_is_told_at_the_start_of_fit(capsys):
    module = data(CmudictSource.default_tokenizer)
    module.setup("fit")
    template, unknown = capsys.readouterr().err.splitlines()[-2:]
    assert template.startswith("warning: the data has messages, but the tokenizer has no chat template")
    assert re.match(r"warning: \d\d\.\d% of the tokens are unknown: data.tokenizer does not fit", unknown)
    assert "python -m dllm_var tokenizer" in unknown
    assert not data().warnings()


def test_samples_that_are_dropped_are_told():
    with open("chats.jsonl", "a") as file:
        for number in range(9):
            turns = [{"role": "user", "content": f"{number}"}, {"role": "assistant", "content": "y" * 150}]
            file.write(json.dumps({"messages": turns}) + "\n")
    [warning] = data().warnings()
    told = r"\d of \d\d samples are longer than data.context_length=128 and dropped; the longest has 1\d\d tokens"
    assert re.match(told, warning), warning
    assert not data(on_too_long="truncate").warnings()


def test_a_stream_is_not_read_for_its_warnings():
    assert [w[:21] for w in data("plain", StreamingDataModule).warnings()] == ["the data has messages"]


@pytest.mark.parametrize(
    ("canvas", "sampler", "warns"),
    [
        (8, BlockDiffusionSampler(block_length=8), False),
        (0, BlockDiffusionSampler(block_length=8), False),
        (12, BlockDiffusionSampler(block_length=8), True),
        (12, AutoregressiveSampler(), False),
    ],
)
def test_another_canvas_than_the_samplers_is_told(canvas, sampler, warns):
    warning = canvas_warning(data(canvas=canvas), sampler)
    assert ("set data.canvas=8" in (warning or "")) == warns == (warning is not None)


def test_a_sample_that_is_not_there_is_one_line(capsys):
    arguments = ["--data.source=JsonlSource", "--data.source.path=chats.jsonl", "--data.tokenizer=chat"]
    assert main(["inspect", *arguments, "--sample", "99"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line == "error: --sample is 99: there are 28 training samples, counted from 0"
