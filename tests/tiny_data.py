"""A few words and their sounds, for runs that train in a blink."""

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent


def write_words(path, words):
    """Writes pairs of prompt and response as JSON lines."""
    Path(path).write_text("".join(json.dumps({"prompt": a, "response": b}) + "\n" for a, b in words))


def data_settings(validation_size):
    """Returns the `data` section for `words.jsonl` in the working folder."""
    return {
        "source": {
            "class_path": "dllm_var.datamodules.JsonlSource",
            "init_args": {"path": "words.jsonl", "validation_size": validation_size},
        },
        "tokenizer": str(ROOT / "datamodules" / "data" / "cmudict"),
        "batch_size": 2,
        "context_length": 16,
    }
