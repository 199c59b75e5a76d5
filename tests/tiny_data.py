"""A few words and their sounds, for runs that train in a blink."""

import json
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
WORDS = [("cat", "K AE T"), ("dog", "D AO G"), ("word", "W ER D"), ("tree", "T R IY"), ("sun", "S AH N")] * 4


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


def write_tiny():
    """Writes words and `tiny.yaml`, a run of two steps on them; returns the config's name."""
    write_words("words.jsonl", WORDS)
    config = {
        "model": {"transformer": {"hidden_size": 16, "num_layers": 1, "num_heads": 2}},
        "data": data_settings(4),
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 2,
            "limit_val_batches": 1,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"save_last": True, "every_n_train_steps": 2},
                }
            ],
        },
    }
    Path("tiny.yaml").write_text(yaml.safe_dump(config))
    return "tiny.yaml"
