"""The CMU pronouncing dictionary that ships with the package: letters -> phonemes.

The dictionary (BSD-2-Clause, notice in ``data/cmudict/LICENSE``) lies there compressed beside its tokenizer;
`write_tokenizer` made that, and makes it again.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from dllm_var.datamodules.sources import Source

FOLDER = Path(__file__).parent / "data" / "cmudict"
HELD_OUT_WORDS = 2_000  # words in the validation split, and as many in the test split

LETTERS = "abcdefghijklmnopqrstuvwxyz'"
ALPHABET = set(LETTERS)
PHONES = tuple(
    "AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V W Y Z ZH".split(" ")  # noqa: SIM905
)
SPECIALS = {"pad_token": "<pad>", "mask_token": "<mask>", "eos_token": "<eos>", "unk_token": "<unk>"}


class CmudictSource(Source):
    """Spelling -> pronunciation, one record per pronunciation, from the CMU pronouncing dictionary.

    The prompt is the word (``keyboard``), the response its phonemes without stress (``K IY B AO R D``). Words are
    put into splits by a fixed hash: 2,000 words each for validation and test that training never sees.
    """

    default_tokenizer = str(FOLDER)
    splits = ("train", "validation", "test")

    @cached_property
    def _pronunciations(self) -> dict[str, list[str]]:
        return read_pronunciations()

    def records(self, split: str) -> Iterator[dict[str, Any]]:
        for word in split_words(self._pronunciations)[split]:
            for phones in self._pronunciations[word]:
                yield {"prompt": word, "response": phones}

    def fingerprint(self) -> str:
        digest = hashlib.sha256((FOLDER / "cmudict.dict.xz").read_bytes())
        digest.update(str(HELD_OUT_WORDS).encode())
        return f"cmudict-{digest.hexdigest()}"


def read_pronunciations() -> dict[str, list[str]]:
    """Reads the dictionary as word -> its pronunciations without stress, words of letters and apostrophe only."""
    entries: dict[str, list[str]] = {}
    drop_stress = str.maketrans("", "", "012")
    with lzma.open(FOLDER / "cmudict.dict.xz", "rt", encoding="utf-8") as lines:
        for line in lines:
            word, _, phones = line.partition("#")[0].strip().lower().partition(" ")
            word = word.partition("(")[0]  # "word(2)" is another pronunciation of "word"
            if not set(word) <= ALPHABET:
                continue
            phones = phones.translate(drop_stress).upper()
            known = entries.setdefault(word, [])
            if phones not in known:  # alternatives that differ in stress alone are the same answer
                known.append(phones)
    return entries


def split_words(words: Iterable[str]) -> dict[str, list[str]]:
    """Puts the words with the smallest SHA-256 into test, the next ones into validation and the rest into training."""
    ranked = sorted(words, key=lambda word: hashlib.sha256(word.encode()).digest())
    return {
        "test": ranked[:HELD_OUT_WORDS],
        "validation": ranked[HELD_OUT_WORDS : 2 * HELD_OUT_WORDS],
        "train": sorted(ranked[2 * HELD_OUT_WORDS :]),
    }


def write_tokenizer(folder: Path = FOLDER) -> None:
    """Writes ``tokenizer.json`` and ``tokenizer_config.json``: lower case is letters, upper case phonemes.

    Args:
        folder: Where the two files go.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = [*SPECIALS.values(), *LETTERS, *PHONES]
    tokenizer = Tokenizer(
        models.WordLevel({token: index for index, token in enumerate(vocabulary)}, unk_token=SPECIALS["unk_token"])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[^A-Z]"), "isolated")]
    )
    # A space before each phoneme and none between letters, so that words and pronunciations both read as written.
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(Regex(r"^(?=[A-Z])"), " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS.values()])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **SPECIALS, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
