"""The CMU pronouncing dictionary that ships with the package: letters -> phonemes.

The dictionary (BSD-2-Clause, notice in ``data/cmudict/LICENSE``) lies there compressed beside its tokenizer;
``python -m dllm_var.datamodules.cmudict`` writes the tokenizer anew.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import re
from collections.abc import Iterator
from pathlib import Path

from dllm_var.datamodules.sources import Source

FOLDER = Path(__file__).parent / "data" / "cmudict"
HELD_OUT_WORDS = 2_000  # words in the validation split, and as many in the test split

LETTERS = "abcdefghijklmnopqrstuvwxyz'"
PHONES = (
    "AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V W Y Z ZH"
).split()
SPECIALS = {"pad_token": "<pad>", "mask_token": "<mask>", "eos_token": "<eos>", "unk_token": "<unk>"}


class CmudictSource(Source):
    """Spelling -> pronunciation, one record per pronunciation, from the CMU pronouncing dictionary.

    The prompt is the word (``keyboard``), the response its phonemes without stress (``K IY B AO R D``). Words are
    put into splits by a fixed hash: 2,000 words each for validation and test that training never sees.
    """

    default_tokenizer = str(FOLDER)
    splits = ("train", "validation", "test")

    def records(self, split: str) -> Iterator[dict]:
        entries = read_pronunciations()
        chosen = split_words(entries)[split]
        for word in chosen:
            for phones in entries[word]:
                yield {"prompt": word, "response": phones}

    def fingerprint(self) -> str:
        digest = hashlib.sha256((FOLDER / "cmudict.dict.xz").read_bytes())
        digest.update(str(HELD_OUT_WORDS).encode())
        return f"cmudict-{digest.hexdigest()}"


def read_pronunciations() -> dict[str, list[str]]:
    """Reads the dictionary as word -> its distinct pronunciations without stress, words of letters and apostrophe only."""
    entries: dict[str, list[str]] = {}
    with lzma.open(FOLDER / "cmudict.dict.xz", "rt", encoding="utf-8") as lines:
        for line in lines:
            word, _, phones = line.partition("#")[0].strip().partition(" ")
            word = re.sub(r"\(\d+\)$", "", word).lower()  # "word(2)" is another pronunciation of "word"
            if not re.fullmatch(r"[a-z']+", word):
                continue
            phones = re.sub(r"\d", "", phones).strip()
            known = entries.setdefault(word, [])
            if phones not in known:  # alternatives that differ in stress alone are the same answer
                known.append(phones)
    return entries


def split_words(words) -> dict[str, list[str]]:
    """Puts the words with the smallest SHA-256 into test, the next into validation, and leaves the rest for training."""
    ranked = sorted(words, key=lambda word: hashlib.sha256(word.encode()).digest())
    return {
        "test": ranked[:HELD_OUT_WORDS],
        "validation": ranked[HELD_OUT_WORDS : 2 * HELD_OUT_WORDS],
        "train": sorted(ranked[2 * HELD_OUT_WORDS :]),
    }


def write_tokenizer(folder: Path = FOLDER) -> None:
    """Writes ``tokenizer.json`` and ``tokenizer_config.json``: lower case is letters, upper case phonemes, spaces separate.

    Args:
        folder: where the two files go.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = [*SPECIALS.values(), *LETTERS, *PHONES]
    tokenizer = Tokenizer(
        models.WordLevel({token: index for index, token in enumerate(vocabulary)}, unk_token=SPECIALS["unk_token"])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"[A-Z]+|[^A-Z\s]"), "isolated"), pre_tokenizers.WhitespaceSplit()]
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


if __name__ == "__main__":
    write_tokenizer()
