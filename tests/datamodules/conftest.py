import json

import pytest
from hypothesis import settings
from recorded_runs import ListSource

from dllm_var.datamodules import CmudictSource
from dllm_var.datamodules.table import RecordEncoder, load_table
from dllm_var.text.tokenizer import Tokenizer

settings.register_profile("shared", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("shared")


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.from_pretrained(CmudictSource.default_tokenizer)


@pytest.fixture(scope="session")
def build_table(tokenizer, tmp_path_factory):
    """Makes a table of samples with the given prompt and answer lengths; every token tells which sample it is of."""

    def build(lengths):
        records = [
            {"input_ids": [4 + (sample % 60)] * (prompt + answer), "prompt_length": prompt}
            for sample, (prompt, answer) in enumerate(lengths)
        ]
        return load_table(ListSource(records), "train", RecordEncoder(tokenizer), tmp_path_factory.mktemp("tables"))

    return build


@pytest.fixture
def write_jsonl(tmp_path):
    def write(records, name="data.jsonl"):
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(tmp_path / name)

    return write
