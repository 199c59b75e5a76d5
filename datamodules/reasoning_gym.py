"""Problems made by reasoning-gym's generators: as many as wanted, with worked answers where the generator has them."""

import hashlib
import json
from collections.abc import Iterator
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dllm_var.datamodules.sources import SPLITS, Source
from dllm_var.errors import UserError

SPLIT_DISTANCE = 1 << 28  # between the seeds of splits: item i uses seed + i, so no split may have more items


class ReasoningGymSource(Source):
    """Question -> answer records of one reasoning-gym generator; needs ``pip install "dllm-var[reasoning-gym]"``.

    Generators repeat themselves; training problems that occur in the validation or test split are left out.

    Args:
        task: Name of the generator, such as ``chain_sum`` or ``spell_backward``.
        train_size: Problems to generate for training, repetitions of held-out ones included.
        validation_size: Problems for validation.
        test_size: Problems for test.
        seed: Seed of the problems; the splits of one seed never share an item.
        response: Which entry of a problem's metadata is the response; its ``answer`` when not given.
        remove: Text to leave out of every question.
    """

    splits = SPLITS

    def __init__(
        self,
        task: str,
        train_size: int = 100_000,
        validation_size: int = 1_000,
        test_size: int = 1_000,
        seed: int = 0,
        response: str | None = None,
        remove: str = "",
    ) -> None:
        self.task, self.seed, self.response, self.remove = task, seed, response, remove
        self.sizes = dict(zip(SPLITS, (train_size, validation_size, test_size), strict=True))
        for split, size in self.sizes.items():
            if not 1 <= size < SPLIT_DISTANCE:
                raise UserError(f"data.source {split}_size is {size}; give a number from 1 to {SPLIT_DISTANCE - 1}")

    def records(self, split: str) -> Iterator[dict[str, Any]]:
        held_out = self._held_out if split == "train" else frozenset()
        return (problem for problem in self._problems(split) if problem["prompt"] not in held_out)

    def fingerprint(self) -> str:
        settings = [self.task, self.sizes, self.seed, self.response, self.remove, version("reasoning-gym")]
        return f"reasoning-gym-{hashlib.sha256(json.dumps(settings).encode()).hexdigest()}"

    @cached_property
    def _held_out(self) -> frozenset[str]:
        return frozenset(problem["prompt"] for split in SPLITS[1:] for problem in self._problems(split))

    def _problems(self, split: str) -> Iterator[dict[str, Any]]:
        try:
            import reasoning_gym
        except ImportError as error:
            raise UserError('data.source needs reasoning-gym: pip install "dllm-var[reasoning-gym]"') from error
        seed = self.seed + SPLITS.index(split) * SPLIT_DISTANCE
        try:
            problems = reasoning_gym.create_dataset(self.task, size=self.sizes[split], seed=seed)
        except ValueError as error:
            raise UserError(f"data.source task {self.task!r}: {error}") from error
        for problem in problems:
            question = problem["question"].replace(self.remove, "").strip() if self.remove else problem["question"]
            answer = problem["answer"] if self.response is None else problem["metadata"].get(self.response)
            if answer is None:
                has = ", ".join(problem["metadata"])
                raise UserError(f"data.source response: {self.task} has no entry {self.response!r}; it has {has}")
            yield {"prompt": question, "response": str(answer)}


class GsmSymbolicSource(ReasoningGymSource):
    """Grade-school word problems with worked answers that end in ``#### number`` (GSM-Symbolic, arXiv 2410.05229).

    Its tokenizer, a byte-level BPE of 2,048 entries that takes digits one by one, was learned from 50,000 problems.

    Args:
        train_size: Problems to generate for training.
        validation_size: Problems for validation.
        test_size: Problems for test.
        seed: Seed of the problems.
    """

    default_tokenizer = str(Path(__file__).parent / "data" / "gsm_symbolic")

    def __init__(
        self, train_size: int = 200_000, validation_size: int = 1_000, test_size: int = 1_000, seed: int = 0
    ) -> None:
        remove = "Give the result as your final answer. Do not include units."
        super().__init__("gsm_symbolic", train_size, validation_size, test_size, seed, "answer_cot", remove)
