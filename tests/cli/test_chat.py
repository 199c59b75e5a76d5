"""`chat`, and `generate` on a checkpoint that was trained on conversations."""

import io
import json
import re
import sys

import pytest
import torch
from byte_tokenizer import CHAT_TEMPLATE, write_byte_tokenizer

from dllm_var.__main__ import main
from dllm_var.checkpoints.export import save_checkpoint_folder
from dllm_var.checkpoints.pretrained import load_checkpoint
from dllm_var.cli.chat import Denoising
from dllm_var.model import Transformer, TransformerConfig
from dllm_var.sampling import BlockDiffusionSampler
from dllm_var.sampling.configurable import sampler_to_config
from dllm_var.sampling.recording import Recording
from dllm_var.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints of one model: trained on chats, said nothing of, and without a template."""
    place = tmp_path_factory.mktemp("chat")
    torch.manual_seed(0)
    sampler = sampler_to_config(BlockDiffusionSampler(block_length=4, max_new_tokens=12))
    for name, template, chat in (("chats", CHAT_TEMPLATE, True), ("old", CHAT_TEMPLATE, None), ("bare", None, True)):
        tokenizer = Tokenizer.from_pretrained(write_byte_tokenizer(place / "tokenizer", template))
        special = dict(mask_id=tokenizer.mask_id, terminator_ids=[tokenizer.terminator_id], pad_id=tokenizer.pad_id)
        sizes = dict(hidden_size=32, num_layers=1, num_heads=2, initializer_range=0.3, context_length=64)
        model = Transformer(TransformerConfig(vocab_size=tokenizer.vocab_size, **sizes, **special)).eval()
        meta = {"sampler": sampler} if chat is None else {"sampler": sampler, "chat": chat}
        save_checkpoint_folder(place / name, model, tokenizer, meta)
    return {name: str(place / name) for name in ("chats", "old", "bare")}


def answer(capsys, folder, *options):
    """Returns the answer of `generate` to a prompt as an object, the prompt's number of tokens among it."""
    assert main(["generate", "--checkpoint", folder, "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def talk(monkeypatch, capsys, folder, *lines, options=()):
    """Says lines to `chat` through a pipe and returns its answers, and what it said besides."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    assert main(["chat", "--checkpoint", folder, *options]) == 0
    said = capsys.readouterr()
    return said.out, said.err


def test_generate_applies_the_template_of_a_checkpoint_of_chats(folders, capsys):
    asked = ["--prompt", "hello"]
    by_itself, told = answer(capsys, folders["chats"], *asked), answer(capsys, folders["old"], *asked, "--chat")
    assert by_itself["prompt_tokens"] == told["prompt_tokens"] > 5
    assert answer(capsys, folders["chats"], *asked, "--no-chat")["prompt_tokens"] == 5
    assert answer(capsys, folders["old"], *asked)["prompt_tokens"] == 5  # it says nothing
    assert answer(capsys, folders["bare"], *asked)["prompt_tokens"] == 5  # there is no template
    with_system = answer(capsys, folders["chats"], *asked, "--system", "Be brief.")
    assert with_system["prompt_tokens"] > by_itself["prompt_tokens"]
    assert main(["generate", "--checkpoint", folders["chats"], *asked, "--chat", "--no-chat"]) == 2
    assert "--chat does not go with --no-chat" in capsys.readouterr().err


def test_a_conversation_is_read_with_all_its_turns(folders, monkeypatch, capsys, tmp_path):
    lines = ["hello", "", "and then?"]
    out, err = talk(monkeypatch, capsys, folders["chats"], *lines, options=["--system", "Be brief."])
    assert "error" not in err
    turns = [{"role": "system", "content": "Be brief."}]
    expected = ""
    for line in ("hello", "and then?"):
        turns.append({"role": "user", "content": line})
        (tmp_path / "asked.jsonl").write_text(json.dumps({"messages": turns}))
        text = answer(capsys, folders["chats"], "--prompts-file", str(tmp_path / "asked.jsonl"))["text"]
        expected += text + "\n"
        turns.append({"role": "assistant", "content": text})
    assert out == expected


def test_reset_forgets_what_was_said(folders, monkeypatch, capsys):
    alone, _ = talk(monkeypatch, capsys, folders["chats"], "hello")
    out, _ = talk(monkeypatch, capsys, folders["chats"], "what is this?", "/reset", "hello")
    assert out.endswith(alone) and len(out) > len(alone)


def test_more_than_the_context_of_training_is_told(folders, monkeypatch, capsys):
    _, err = talk(monkeypatch, capsys, folders["chats"], "x" * 70)
    assert err == "this is longer than the 64 tokens of training: /reset begins anew\n"


def test_a_line_that_is_no_text_ends_nothing(folders, monkeypatch, capsys):
    out, err = talk(monkeypatch, capsys, folders["chats"], "\udcff", "hello")
    assert err.startswith("error: it is not valid Unicode") and out.count("\n") >= 1


@pytest.mark.parametrize("at", [0, 1])
def test_ctrl_c_ends_it_in_one_line(folders, monkeypatch, capsys, at):
    lines = iter(["hello", "and then?"][:at])

    def read(shown):
        for line in lines:
            return line
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", read)
    assert main(["chat", "--checkpoint", folders["chats"]]) == 130
    assert capsys.readouterr().err == "ended\n"


def test_ctrl_c_within_an_answer_ends_it_in_one_line(folders, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(BlockDiffusionSampler, "decode", interrupted)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    assert main(["chat", "--checkpoint", folders["chats"]]) == 130
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "ended\n")


def test_mistakes_are_one_line(folders, capsys):
    assert main(["chat", "--checkpoint", folders["bare"]]) == 2
    assert "error: chat needs a tokenizer with a chat template" in capsys.readouterr().err
    assert main(["chat"]) == 2
    assert capsys.readouterr().err.startswith("error: chat needs --checkpoint PATH")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_how_an_answer_is_denoised(folders, monkeypatch, capsys):
    """The boxes of masks become fewer, and at the end there is what a pipe gets."""
    plain, _ = talk(monkeypatch, capsys, folders["chats"], "hello")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    talk(monkeypatch, capsys, folders["chats"], "hello")
    *frames, last = re.split(r"\x1b\[2K", re.sub(r"\x1b\[\d*m", "", terminal.getvalue()))
    assert last == plain
    masks = [frame.count("░") for frame in frames]
    assert masks[0] >= 3 > 0 == masks[-1]  # of blocks of four tokens


def test_tokens_behind_an_end_that_is_taken_back_are_masks_again(folders, monkeypatch):
    tokenizer = load_checkpoint(folders["chats"])[1]
    letters = dict(enumerate(tokenizer.encode("abcd")))
    recording, terminal = Recording(), Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    with Denoising(tokenizer) as shown:
        for forward, (length, there) in enumerate([(4, 4), (2, 2), (4, 2)], start=1):
            tokens = [letters[place] if place < there else None for place in range(length)]
            shown.on_step(0, recording.add(forward, tokens, None))
        text = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", terminal.getvalue())
    assert text.endswith("ab░░")
