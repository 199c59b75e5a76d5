"""Records from Hugging Face datasets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from dllm_var.datamodules.sources import SPLITS, Located, SplitSource
from dllm_var.errors import UserError


class DatasetSource(SplitSource):
    """Records from a Hugging Face dataset: a folder written by ``save_to_disk``, or anything ``load_dataset`` takes.

    Args:
        path: Folder, or hub name such as ``GSAI-ML/some-data``.
        name: Configuration of a hub dataset.
        train_split: What the dataset calls its training split.
        validation_split: What it calls its validation split; carved out of training when it has none of that name.
        test_split: What it calls its test split.
        validation_size: Prompts to carve out for validation: a number, or a share below 1. When not given, 2 % of them,
            at most 1,000.
        test_size: The same for test; none when not given.
        columns: Names our fields have in the dataset, such as ``{prompt: question, response: answer}``.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        train_split: str = "train",
        validation_split: str = "validation",
        test_split: str = "test",
        validation_size: int | float | None = None,
        test_size: int | float = 0,
        columns: dict[str, str] | None = None,
    ) -> None:
        super().__init__(validation_size, test_size, columns)
        self.path = path
        self.name = name
        self.split_names = dict(zip(SPLITS, (train_split, validation_split, test_split), strict=True))

    @cached_property
    def _datasets(self) -> dict[str, Any]:
        import datasets

        folder = Path(self.path).expanduser()
        saved = (folder / "dataset_dict.json").is_file() or (folder / "dataset_info.json").is_file()
        try:
            loaded = datasets.load_from_disk(str(folder)) if saved else datasets.load_dataset(self.path, self.name)
        except Exception as error:  # offline, not found, gated, broken: many libraries raise through this one call
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"data.source path: no dataset {self.path}: {reason}") from None
        if not isinstance(loaded, dict):
            return {"train": loaded}
        if self.split_names["train"] not in loaded:
            raise UserError(
                f"{self.path} has no split {self.split_names['train']!r}; set train_split to one of {', '.join(loaded)}"
            )
        return {split: loaded[name] for split, name in self.split_names.items() if name in loaded}

    def own_splits(self) -> Mapping[str, Any]:
        return self._datasets

    def content_fingerprint(self) -> str:
        return json.dumps({split: dataset._fingerprint for split, dataset in self._datasets.items()})

    def read(self, split: str) -> Located:
        for number, record in enumerate(self._datasets[split]):
            yield f"{self.path} {self.split_names[split]} row {number}", record
