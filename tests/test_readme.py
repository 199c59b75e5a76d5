"""What the README and docs/extending.md show is run, not read."""

import re
import shlex
from pathlib import Path

import pytest

from dllm_var.__main__ import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXTENDING = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README + EXTENDING, flags=re.DOTALL)

TOY = ["--model.transformer.hidden_size=16", "--model.transformer.num_layers=1", "--model.transformer.num_heads=2"]
TOY += ["--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--trainer.val_check_interval=2"]
TOY += ["--sampler.max_new_tokens=4", "--data.batch_size=2"]


def block(language: str, word: str) -> str:
    [text] = [text for kind, text in BLOCKS if kind == language and word in text]
    return text


@pytest.fixture
def policy(tmp_path, monkeypatch):
    """The policy of docs/extending.md and its config, saved where the page says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_policy.py").write_text(block("python", "class LeftToRight"))
    (tmp_path / "my_policy.yaml").write_text(block("yaml", "my_policy.LeftToRight"))
    return "my_policy.yaml"


def test_the_policy_of_the_extending_page_samples_during_training(policy, capfd):
    config = str(ROOT / "configs" / "quickstart.yaml")
    assert main(["fit", "--config", config, "--config", policy, *TOY]) == 0
    [saved] = Path("runs").glob("*/version_0/config.yaml")
    assert "my_policy.LeftToRight" in saved.read_text()


def test_the_policy_of_the_extending_page_decodes_with_the_shipped_model(policy, capsys):
    checkpoint = str(ROOT / "checkpoints" / "cmudict")
    assert main(["generate", "--checkpoint", checkpoint, "--sampler", policy, "--prompt", "lightning"]) == 0
    assert capsys.readouterr().out.strip() == "lightning -> L AY T N IH NG"


def test_the_python_example_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    exec(compile(block("python", "load_checkpoint"), "README.md", "exec"), {})
    assert capsys.readouterr().out.splitlines()[1].startswith("L AY T N IH NG eos ")


def test_the_shipped_model_answers_as_the_readme_shows(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    shown = re.search(r"\$ python -m dllm_var (generate .*)\n((?:.* -> .*\n)+)", README)
    assert main(shown[1].split()) == 0
    assert capsys.readouterr().out == shown[2]


def test_the_source_of_the_extending_page_reverses_words(monkeypatch):
    names: dict = {}
    exec(compile(block("python", "class Backwards"), "docs/extending.md", "exec"), names)
    source = names["Backwards"]()
    records = list(source.records("test"))
    assert len(records) == 2_000 and all(record["response"] == record["prompt"][::-1] for record in records)


def test_the_callback_of_the_extending_page_asks_at_each_validation(tmp_path, monkeypatch, capfd):
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8").partition("## A callback")[2]
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("configs").symlink_to(ROOT / "configs")
    Path("ask.py").write_text(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1])
    command = shlex.split(re.search(r"^\$ python -m dllm_var (.*)", page, re.MULTILINE)[1])
    assert main([*command, *TOY]) == 0
    assert "step 2: keyboard -> " in capfd.readouterr().out


FITS = re.findall(r"^python -m dllm_var (fit --config.*)$", README, flags=re.MULTILINE)


@pytest.mark.parametrize("command", FITS)
def test_the_settings_of_a_run_in_the_readme_are_settings(command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert main([*shlex.split(command, comments=True), "--print_config"]) == 0
    assert "class_path: dllm_var.objectives" in capsys.readouterr().out


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_and_links_of_a_page_exist(page):
    text = page.read_text(encoding="utf-8")
    assert "@@" not in text
    for path in re.findall(
        r"(?<![\w/.])(?:configs|docs|checkpoints/\w|benchmarks|datamodules|dllm_var|tests)/[\w/.]*\w", text
    ):
        assert (ROOT / path).exists() or path.startswith("checkpoints/epoch"), path
    for link in re.findall(r"\]\((?!http)([^)#]+)?(?:#([\w-]+))?\)", text):
        target = page.parent / link[0] if link[0] else page
        assert target.exists(), link
        headings = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), re.MULTILINE) if link[1] else []
        anchors = [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]
        assert not link[1] or link[1] in anchors, link
