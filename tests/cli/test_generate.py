"""`generate` as a user meets it, with the shipped checkpoint, mostly in this process."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dllm_var.__main__ import main
from dllm_var.sampling import BlockDiffusionSampler

ROOT = Path(__file__).parent.parent.parent
CHECKPOINT = str(ROOT / "checkpoints" / "cmudict")
HERE = __name__  # where this file's classes are found by class_path
SAMPLER = "{class_path: dllm_var.sampling.BlockDiffusionSampler, init_args: {%s}}"
WORDS = ["cat", "dog", "keyboard", "lightning", "diffusion", "number", "silver", "planet", "cat", "orange", "window"]
KEYS = {"prompt", "text", "tokens", "prompt_tokens", "finish_reason", "nfe", "tokens_per_forward", "seconds"}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working folder of one's own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(capsys):
    """Runs `generate` with the shipped checkpoint, which must work, and returns what it prints."""

    def run(*arguments):
        assert main(["generate", "--checkpoint", CHECKPOINT, *arguments]) == 0
        return capsys.readouterr().out

    return run


def complaint(capsys, *arguments):
    """Runs a command that must fail for the user's mistake, and returns the one line it says."""
    assert main(list(arguments)) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    return line


def write(name, content):
    Path(name).write_text(content)
    return name


class EveryCall(BlockDiffusionSampler):
    """Writes into a file what was printed and written by the time each answer is told; presses Ctrl-C when asked.

    Args:
        interrupt_after: Answers until Ctrl-C; never when 0.
    """

    def __init__(self, interrupt_after: int = 0) -> None:
        super().__init__(block_length=12, max_new_tokens=48, batch_size=4)
        self.interrupt_after = interrupt_after

    def generate(self, model, prompts, on_answer=None, **options):
        seen = []

        def told(index, answer):
            on_answer(index, answer)
            partial = Path("answers.jsonl.partial")
            seen.append([index, partial.read_text() if partial.exists() else None, Path("answers.jsonl").exists()])
            write("seen.json", json.dumps(seen))
            if len(seen) == self.interrupt_after:
                raise KeyboardInterrupt

        return super().generate(model, prompts, on_answer=told, **options)


# -- what goes in and what comes out -----------------------------------------------------------------------------------


OWN_SAMPLER = """
from __future__ import annotations
from dataclasses import dataclass
from dllm_var.sampling import BlockDiffusionSampler

@dataclass(eq=False, kw_only=True)
class Mine(BlockDiffusionSampler):
    width: int = 3
"""


def test_one_line_per_prompt_and_a_summary(capsys):
    assert main(["generate", "--checkpoint", CHECKPOINT, "--prompt", "lightning", "--prompt=cat"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "lightning -> L AY T N IH NG\ncat -> K AE T\n"
    assert "2 answers, 9 tokens in " in captured.err and "tokens/forward" in captured.err


def test_json_lines(run):
    write("prompts.txt", "cat\ndog\nsun\n")
    options = ["--prompts-file=prompts.txt", "--json", "--max-new-tokens=3", "--block-length=2", "--threshold=0.5"]
    answers = [json.loads(line) for line in run(*options).splitlines()]
    assert [answer["prompt"] for answer in answers] == ["cat", "dog", "sun"]
    for answer in answers:
        assert KEYS | {"commit_steps"} <= set(answer)
        assert answer["prompt_tokens"] == 3 and len(answer["tokens"]) == len(answer["commit_steps"]) <= 3
        assert answer["finish_reason"] in ("eos", "length") and answer["nfe"] >= 1 and answer["seconds"] > 0
        assert answer["tokens_per_forward"] == pytest.approx(len(answer["tokens"]) / answer["nfe"], abs=1e-4)


@pytest.mark.parametrize("options", [[], ["--prompts-file", "-"]])
def test_prompts_from_standard_input(options, run, monkeypatch):
    write("prompts.txt", "cat\ndog\n")
    with open("prompts.txt") as piped:
        monkeypatch.setattr(sys, "stdin", piped)
        assert run("--answers-only", *options) == "K AE T\nD AA G\n"


@pytest.mark.parametrize(
    "content",
    [
        SAMPLER % "max_new_tokens: 1",
        f"sampler: {SAMPLER % 'max_new_tokens: 1'}\n",
        f"vars: {{sampler: {SAMPLER % 'max_new_tokens: 1'}}}\n",
    ],
)
def test_the_sampler_from_a_file(content, run):
    write("sampler.yaml", content)
    options = ["--sampler", "sampler.yaml", "--sampler.block_length=4", "--json", "--prompt=cat"]
    assert len(json.loads(run(*options))["tokens"]) == 1


def test_a_policy_by_name_with_its_own_settings(run):
    options = ["--prompt=keyboard", "--json", "--policy", "FixedSteps"]
    few, many = (json.loads(run(*options, f"--policy.steps={steps}")) for steps in (1, 12))
    assert few["nfe"] < many["nfe"]
    assert len(set(many["commit_steps"])) == len(many["tokens"]) == 6


def test_a_sampler_with_a_policy_of_its_own(run):
    wino = [
        "--sampler=dllm_var.sampling.wino.WinoSampler",
        "--sampler.threshold=0.7",
        "--block-length=12",
        "--prompt=keyboard",
    ]
    assert run(*wino, "--answers-only").split()[0] == "K"
    assert run(*wino, "--infill=K IY <gap:2> R D", "--answers-only") == "K IY B AO R D\n"


def test_stop_strings_and_suppressed_tokens(run):
    options = ["--prompt=lightning", "--prompt=cat", "--json"]
    cut, whole = map(json.loads, run(*options, "--stop", "N IH", "--stop=XX").splitlines())
    assert (cut["text"], cut["finish_reason"], len(cut["tokens"])) == ("L AY T", "stop", 3)
    assert (whole["text"], whole["finish_reason"]) == ("K AE T", "eos")
    answers = map(json.loads, run(*options, "--suppress=AE", "--suppress", "id:2", "--max-new-tokens=7").splitlines())
    for answer in answers:
        assert "AE" not in answer["text"].split() and (answer["finish_reason"], len(answer["tokens"])) == ("length", 7)


def test_gaps_are_filled(run):
    pairs = ["--prompt=keyboard", "--infill=K IY <gap:2> R D", "--prompt=morning", "--infill=M AO R N <gap:2>"]
    assert run(*pairs) == "keyboard -> K IY B AO R D\nmorning -> M AO R N IH NG\n"
    write("gaps.jsonl", '{"prompt": "keyboard", "infill": "K IY <gap:2> R D"}\n{"infill": "<gap:1> AE T"}\n')
    first, second = map(json.loads, run("--prompts-file=gaps.jsonl", "--json", "--policy", "Sequential").splitlines())
    assert (first["text"], first["finish_reason"], first["commit_steps"]) == (
        "K IY B AO R D",
        "filled",
        [0, 0, 1, 2, 0, 0],
    )
    assert first["gaps"] == [first["tokens"][2:4]] and first["infill"] == "K IY <gap:2> R D"
    assert second["text"].endswith(" AE T") and second["tokens_per_forward"] == 1.0


# -- drawing -----------------------------------------------------------------------------------------------------------


def test_drawn_answers_depend_on_the_seed_alone_not_on_their_batch(run):
    write("words.txt", "\n".join([*WORDS[2:4], "cat", "zzyx"]))
    options = ["--prompts-file=words.txt", "--temperature=1.5"]
    alone, together = (run(*options, "--seed=3", f"--batch-size={size}") for size in (1, 3))
    assert alone == together != run(*options, "--seed=2")
    greedy = run("--prompts-file=words.txt", "--policy=Sequential")
    assert run(*options, "--policy=Sequential", "--top-k=1") == greedy != alone
    assert run(*options, "--policy=Sequential", "--top-p=0.000001") == greedy


# -- as they complete --------------------------------------------------------------------------------------------------


def test_a_file_appears_when_it_is_complete(run):
    write("words.txt", "\n".join(WORDS))
    sampler = ["--sampler", f"{HERE}.EveryCall"]
    assert run("--prompts-file=words.txt", "--json", "--output=answers.jsonl", *sampler) == ""
    answers = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
    assert [answer["prompt"] for answer in answers] == WORDS
    assert not Path("answers.jsonl.partial").exists()
    seen = json.loads(Path("seen.json").read_text())
    assert not any(existed for _, _, existed in seen)
    told = set()
    for index, partial, _ in seen:  # all answers were written as soon as those before them were there
        told.add(index)
        ready = next(i for i in range(len(WORDS) + 1) if i not in told)
        assert [json.loads(line)["prompt"] for line in partial.splitlines()] == WORDS[:ready]


def test_ctrl_c_leaves_what_is_finished(capsys):
    write("words.txt", "\n".join(WORDS))
    sampler = ["--sampler", f"{HERE}.EveryCall", "--sampler.interrupt_after", "5"]
    command = ["generate", "--checkpoint", CHECKPOINT, "--prompts-file=words.txt", *sampler]
    assert main(command) == 130
    captured = capsys.readouterr()
    finished = [WORDS[index] for index in sorted(index for index, *_ in json.loads(Path("seen.json").read_text()))]
    assert [line.split(" -> ")[0] for line in captured.out.splitlines()] == finished and len(finished) == 5
    assert captured.err == f"interrupted: 5 of {len(WORDS)} answers finished\n"

    write("answers.jsonl", "from the last time")
    assert main([*command, "--output=answers.jsonl"]) == 130
    assert capsys.readouterr().err.endswith(f"finished, in {Path('answers.jsonl.partial').resolve()}\n")
    assert Path("answers.jsonl").read_text() == "from the last time"
    assert Path("answers.jsonl.partial").read_text() == captured.out


def test_nobody_reads_any_more(monkeypatch, capfd):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as broken:
        monkeypatch.setattr(sys, "stdout", broken)
        assert main(["generate", "--checkpoint", CHECKPOINT, "--prompt=cat", "--prompt=dog"]) == 0
    assert capfd.readouterr().err == ""


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prompt="], ["--prompt: it is empty"]),
        (["--prompt=caté"], ["caté", "é"]),
        (["--prompts-file=gap.txt"], ["gap.txt", "line 2", "empty"]),
        (["--prompts-file=none.txt"], ["no prompts"]),
        (["--prompt=cat", "--max-new-tokens=0"], ["max_new_tokens", "at least 1"]),
        (["--prompt=cat", "--temperature=-1"], ["temperature", "-1"]),
        (["--prompt=cat", "--treshold=1"], ["treshold", "threshold"]),
        (["--prompt=cat", "--threshold=2"], ["threshold", "[0, 1]"]),
        (["--prompt=cat", "--threshold=0.5", "--policy=Saber"], ["--threshold", "--policy"]),
        (["--prompt=cat", "--policy=Nowhere"], ["--policy", "Nowhere", "ConfidenceThreshold"]),
        (["--prompt=cat", "--policy=FixedSteps", "--policy.stps=2"], ["sampler.policy", "stps", "steps"]),
        (["--prompt=cat", "--policy"], ["--policy", "value"]),
        (["--prompt=cat", "--sampler=nowhere.yaml"], ["nowhere.yaml"]),
        (
            ["--prompt=cat", "--sampler=AutoregressiveSampler", "--block-length=2"],
            ["AutoregressiveSampler has no setting 'block_length'"],
        ),
        (["--prompt=cat", "--stop="], ["stop", "empty"]),
        (["--prompt=cat", "--suppress=XX"], ["--suppress", "XX"]),
        (["--prompt=cat", "--suppress=id:70"], ["suppress", "70"]),
        (["--prompt=cat", *(f"--suppress=id:{i}" for i in range(70))], ["suppress", "leave at least one"]),
        (["--prompt=cat", "--chat"], ["--chat", "no chat template"]),
        (["--prompt=cat", "--system=x"], ["--system", "--chat"]),
        (["--prompt=cat", "--json", "--stream"], ["--json", "--stream"]),
        (["--prompt=cat", "--json", "--replay"], ["--json", "--replay"]),
        (["--prompt=cat", "--prompt=dog", "--stream"], ["--stream", "a single prompt"]),
        (["--infill=K <gap:1>", "--stop=T"], ["gaps", "--stop"]),
        (["--infill=K <gap:1>", "--prompts-file=none.txt"], ["--infill", "--prompts-file"]),
        (["--prompt=cat", "--output=nowhere/x"], ["cannot use", "nowhere/x"]),
        (["--prompt=cat", "stray"], ["stray"]),
        (["--prompt=cat", "--threshold=x"], ["sampler.policy.threshold", "float", "x"]),
    ],
)
def test_mistakes_are_told_in_one_line(options, words, capsys):
    write("gap.txt", "cat\n\ndog\n")
    write("none.txt", "")
    text = complaint(capsys, "generate", "--checkpoint", CHECKPOINT, *options)
    assert all(word in text for word in words), text
    assert len(text) < 300


def test_a_sampler_of_ones_own_is_checked_like_any_other(tmp_path, monkeypatch, capsys):
    write(tmp_path / "one_sampler.py", OWN_SAMPLER)
    monkeypatch.syspath_prepend(tmp_path)
    options = ["generate", "--checkpoint", CHECKPOINT, "--prompt=cat", "--sampler=one_sampler.Mine"]
    assert "top_k" in complaint(capsys, *options, "--sampler.top_k=x")
    assert "width" in complaint(capsys, *options, "--sampler.width=x")


def test_a_checkpoint_is_needed(capsys):
    assert "--checkpoint" in complaint(capsys, "generate", "--prompt=cat")


def test_the_arguments_of_any_sampler_are_listed(capsys):
    assert main(["generate", "--sampler.help", "FixedLengthSampler"]) == 0
    assert "--sampler.canvas_length" in capsys.readouterr().out


# -- processes of their own --------------------------------------------------------------------------------------------


def in_new_process(arguments, **kwargs):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **kwargs
    )


@pytest.mark.parametrize(
    ("arguments", "absent"),
    [
        (["--help"], ["lightning", "transformers", "datasets", "torch", "numpy"]),
        (["--checkpoint", CHECKPOINT, "--prompt", "cat"], ["lightning", "transformers", "datasets", "jinja2"]),
    ],
    ids=["help", "run"],
)
def test_only_what_is_needed_is_imported(arguments, absent):
    code = (
        "import sys; from dllm_var.__main__ import main; status = main(['generate', *sys.argv[1:]])\n"
        f"print(status, [name for name in {absent} if name in sys.modules])"
    )
    output, errors = in_new_process([sys.executable, "-c", code, *arguments]).communicate(timeout=300)
    assert output.splitlines()[-1] == "0 []", errors


@pytest.mark.slow
def test_ctrl_c_in_a_process_of_its_own():
    write("words.txt", "\n".join(WORDS * 2000))
    command = [sys.executable, "-m", "dllm_var", "generate", "--checkpoint", CHECKPOINT, "--prompts-file", "words.txt"]
    process = in_new_process([*command, "--batch-size=2"])
    first = process.stdout.readline()
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=300)
    assert process.returncode == 130
    assert first == "cat -> K AE T\n"
    assert all(" -> " in line for line in rest.splitlines()) and rest[-1:] in ("", "\n")
    [line] = errors.splitlines()
    assert line.startswith("interrupted: ") and f"of {len(WORDS) * 2000:,} answers" in line


@pytest.mark.slow
def test_a_reader_that_stops_early_in_a_process_of_its_own():
    write("words.txt", "\n".join(WORDS * 2000))
    command = (
        f"'{sys.executable}' -m dllm_var generate --checkpoint '{CHECKPOINT}' --prompts-file words.txt | head -n 1"
    )
    output, errors = in_new_process(["bash", "-o", "pipefail", "-c", command]).communicate(timeout=300)
    assert (output, errors) == ("cat -> K AE T\n", "")
