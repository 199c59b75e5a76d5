"""The CMU pronouncing dictionary (BSD-2-Clause, notice in ``data/cmudict/LICENSE``): letters -> phonemes."""

import hashlib
import lzma
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from dllm_var.datamodules.sources import SPLITS, Source

FOLDER = Path(__file__).parent / "data" / "cmudict"
HELD_OUT_WORDS = 2_000  # words in the validation split, and as many in the test split
ALPHABET = set("abcdefghijklmnopqrstuvwxyz'")


class CmudictSource(Source):
    """Spelling -> pronunciation, one record per pronunciation, from the CMU pronouncing dictionary.

    The prompt is the word (``keyboard``), the response its phonemes without stress (``K IY B AO R D``). Words are
    put into splits by a fixed hash: 2,000 words each for validation and test that training never sees.
    """

    default_tokenizer = str(FOLDER)
    splits = SPLITS

    @cached_property
    def _pronunciations(self) -> dict[str, list[str]]:
        """Pronunciations without stress, by word; only words of letters and apostrophe."""
        entries: dict[str, list[str]] = {}
        drop_stress = str.maketrans("", "", "012")
        with lzma.open(FOLDER / "cmudict.dict.xz", "rt", encoding="utf-8") as lines:
            for line in lines:
                word, _, phones = line.partition("#")[0].strip().lower().partition(" ")
                word = word.partition("(")[0]  # "word(2)" is another pronunciation of "word"
                phones = phones.translate(drop_stress).upper()
                # Alternatives that differ in stress alone are the same answer.
                if set(word) <= ALPHABET and phones not in entries.setdefault(word, []):
                    entries[word].append(phones)
        return entries

    @cached_property
    def _words(self) -> dict[str, list[str]]:
        """Words of each split: those with the smallest SHA-256 are test, the next ones validation."""
        ranked = sorted(self._pronunciations, key=lambda word: hashlib.sha256(word.encode()).digest())
        test, validation = ranked[:HELD_OUT_WORDS], ranked[HELD_OUT_WORDS : 2 * HELD_OUT_WORDS]
        return {"train": sorted(ranked[2 * HELD_OUT_WORDS :]), "validation": validation, "test": test}

    def records(self, split: str) -> Iterator[dict[str, Any]]:
        for word in self._words[split]:
            for phones in self._pronunciations[word]:
                yield {"prompt": word, "response": phones}

    def fingerprint(self) -> str:
        content = (FOLDER / "cmudict.dict.xz").read_bytes() + str(HELD_OUT_WORDS).encode()
        return f"cmudict-{hashlib.sha256(content).hexdigest()}"
