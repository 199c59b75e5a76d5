"""Records from Hugging Face datasets."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from itertools import count, islice
from pathlib import Path
from typing import Any

from dllm_var.datamodules.sources import SPLITS, Located, SplitSource, read_contents
from dllm_var.errors import UserError, one_line


class DatasetSource(SplitSource):
    """Records from a Hugging Face dataset: a folder written by ``save_to_disk``, or anything ``load_dataset`` takes.

    Args:
        path: Folder, or hub name such as ``GSAI-ML/some-data``.
        name: Configuration of a hub dataset.
        train_split: What the dataset calls its training split.
        validation_split: What it calls its validation split; carved out of training when it has none of that name.
        test_split: What it calls its test split.
        streaming: Reads the dataset while it is trained on, instead of downloading all of it first. Each reader has
            shards of its own where their number is a multiple of the readers'; nothing can be carved out. A stream is
            known by its path, name and version, not by its content.
        kwargs: As for `SplitSource`.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        train_split: str = "train",
        validation_split: str = "validation",
        test_split: str = "test",
        streaming: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.path = path
        self.name = name
        self.streaming = streaming
        self.split_names = dict(zip(SPLITS, (train_split, validation_split, test_split), strict=True))

    @cached_property
    def _datasets(self) -> dict[str, Any]:
        import datasets

        folder = Path(self.path).expanduser()
        saved = (folder / "dataset_dict.json").is_file() or (folder / "dataset_info.json").is_file()
        try:
            if saved:  # mapped into memory, which is as good as a stream
                loaded = datasets.load_from_disk(str(folder))
            else:
                loaded = datasets.load_dataset(self.path, self.name, streaming=self.streaming)
        except Exception as error:  # offline, not found, gated, broken: many libraries raise through this one call
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"data.source path: no dataset {self.path}: {reason}") from None
        if not isinstance(loaded, dict):
            loaded = {self.split_names["train"]: loaded}
        if self.split_names["train"] not in loaded:
            raise UserError(
                f"{self.path} has no split {self.split_names['train']!r}; set train_split to one of {', '.join(loaded)}"
            )
        found = {split: loaded[name] for split, name in self.split_names.items() if name in loaded}
        for split, size in (("validation", self.validation_size), ("test", self.test_size)):
            if size != 0 and split not in found and _is_stream(found["train"]):
                raise UserError(
                    f"{self.path} is streamed and has no split {self.split_names[split]!r}; none can be carved out of "
                    f"a stream: set {split}_split, or {split}_size to 0"
                )
        return found

    def own_splits(self) -> Mapping[str, Any]:
        return self._datasets

    def content_fingerprint(self) -> str:
        return json.dumps({split: self._identity(dataset) for split, dataset in self._datasets.items()})

    def _identity(self, dataset: Any) -> list[Any]:
        """The content of the files where a dataset keeps its rows; of a stream, all that is known before it is read."""
        if not _is_stream(dataset) and dataset.cache_files:
            files = [Path(file["filename"]) for file in dataset.cache_files]
            return [len(dataset), *(read_contents(file, self.cache_dir)["digest"] for file in files)]
        return [self.path, self.name, str(dataset.info.version), str(dataset.features)]

    def can_seek(self, split: str) -> bool:
        return not _is_stream(self._datasets[self.own_split(split)])

    def read_own(self, split: str, start: int = 0) -> Iterator[Located]:
        dataset = self._datasets[split]
        return self._located(f"{self.path} {self.split_names[split]}", dataset.skip(start) if start else dataset, start)

    def blocks(self, split: str, size: int, first: int = 0, step: int = 1) -> Iterator[tuple[int, list[Located]]]:
        """Of a stream with enough shards each reader reads its own, block after block, and no other."""
        dataset = self._datasets[split]
        if not _is_stream(dataset) or step == 1 or dataset.num_shards % step:
            yield from super().blocks(split, size, first, step)
            return
        start, shard = first // step * size, first % step
        place = f"{self.path} {self.split_names[split]} shard {shard}"
        records = self._located(place, dataset.shard(step, shard).skip(start), start)
        for block in count(first, step):
            if not (chunk := list(islice(records, size))):
                return
            yield block, [(where, self.renamed(record)) for where, record in chunk]

    def _located(self, place: str, rows: Iterable[Any], number: int) -> Iterator[Located]:
        try:
            for record in rows:
                yield f"{place} row {number}", record
                number += 1
        except Exception as error:  # a connection that was lost, damage: many libraries raise here
            raise UserError(f"{place} row {number} cannot be read: {one_line(error)}") from None


def _is_stream(dataset: Any) -> bool:
    return not hasattr(dataset, "cache_files")
