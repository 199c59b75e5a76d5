"""Generated problems: with a generator made here, and (where it is installed) with reasoning-gym itself."""

import sys
from types import SimpleNamespace

import pytest

from dllm_var.datamodules import GsmSymbolicSource, ReasoningGymSource
from dllm_var.errors import UserError
from dllm_var.text.tokenizer import Tokenizer

SPLITS = ("train", "validation", "test")


class Sums:
    """Adds two numbers below 40: so few problems that splits would share some."""

    def __init__(self, size, seed):
        self.size, self.seed = size, seed

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if index >= self.size:
            raise IndexError
        a, b = divmod(hash((self.seed + index, "sum")) % 1600, 40)
        question = f"{a} + {b} = ? Only the number."
        return {"question": question, "answer": a + b, "metadata": {"steps": f"{a} plus {b} makes {a + b}"}}


@pytest.fixture
def gym(monkeypatch):
    """Stands for the package: reasoning_gym.create_dataset(name, size=, seed=)."""
    seeds = []

    def create_dataset(name, size, seed):
        if name != "sums":
            raise ValueError(f"Dataset '{name}' not registered")
        seeds.append((seed, size))
        return Sums(size, seed)

    monkeypatch.setitem(sys.modules, "reasoning_gym", SimpleNamespace(create_dataset=create_dataset))
    monkeypatch.setattr("dllm_var.datamodules.reasoning_gym.version", lambda name: "1.0")
    return seeds


def test_no_held_out_question_is_trained_on(gym):
    source = ReasoningGymSource("sums", train_size=500, validation_size=60, test_size=60, remove="Only the number.")
    prompts = {split: [record["prompt"] for record in source.records(split)] for split in SPLITS}
    assert len(prompts["test"]) == 60 and 0 < len(prompts["train"]) < 500
    assert not set(prompts["train"]) & {*prompts["validation"], *prompts["test"]}
    assert prompts["train"] == [record["prompt"] for record in source.records("train")]
    assert all(prompt.endswith("= ?") for prompt in prompts["train"])


def test_items_of_different_splits_never_have_the_same_seed(gym):
    source = ReasoningGymSource("sums", train_size=500, seed=7)
    for split in SPLITS:
        list(source.records(split))
    spans = sorted({(seed, seed + size) for seed, size in gym})
    assert len(spans) == 3 and all(end <= start for (_, end), (start, _) in zip(spans, spans[1:], strict=False))


def test_the_response_is_the_answer_or_an_entry_of_the_metadata(gym):
    plain, worked = ReasoningGymSource("sums"), ReasoningGymSource("sums", response="steps")
    assert next(worked.records("test"))["response"].endswith(f"makes {next(plain.records('test'))['response']}")
    assert plain.fingerprint() != worked.fingerprint()
    with pytest.raises(UserError, match="no entry 'proof'; it has steps"):
        next(ReasoningGymSource("sums", response="proof").records("test"))


def test_bad_settings_are_named(gym, monkeypatch):
    with pytest.raises(UserError, match="task 'sum': Dataset 'sum' not registered"):
        next(ReasoningGymSource("sum").records("test"))
    with pytest.raises(UserError, match="test_size is 0"):
        ReasoningGymSource("sums", test_size=0)
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match="pip install"):
        next(ReasoningGymSource("sums").records("test"))


def test_the_shipped_tokenizer_takes_digits_one_by_one_and_loses_nothing():
    tokenizer = Tokenizer.from_pretrained(GsmSymbolicSource.default_tokenizer)
    text = "She pays 48/2=$<<48/2=24>>24 for 1234 eggs.\n#### 1234"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert [tokenizer.id_to_token(index) for index in ids[-4:]] == list("1234")
    assert tokenizer.vocab_size == 2048


@pytest.mark.reasoning_gym
def test_gsm_symbolic_has_worked_answers_that_end_in_the_number():
    source = GsmSymbolicSource(train_size=300, validation_size=50, test_size=50)
    for split in SPLITS:
        for record in source.records(split):
            assert "Give the result" not in record["prompt"]
            final = record["response"].rpartition("#### ")[2].replace(",", "")
            assert float(final) == float(final)
