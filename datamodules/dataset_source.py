"""Records from Hugging Face datasets."""

from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from dllm_var.datamodules.sources import SPLITS, Located, SplitSource, file_digest
from dllm_var.errors import UserError, one_line


class DatasetSource(SplitSource):
    """Records from a Hugging Face dataset: a folder written by ``save_to_disk``, or anything ``load_dataset`` takes.

    Args:
        path: Folder, or hub name such as ``GSAI-ML/some-data``.
        name: Configuration of a hub dataset.
        train_split: What the dataset calls its training split.
        validation_split: What it calls its validation split; carved out of training when it has none of that name.
        test_split: What it calls its test split.
        streaming: Reads the dataset while it is trained on, instead of downloading all of it first; nothing can be
            carved out. Each reader has shards of its own where their number is a multiple of the readers'.
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
        self.path, self.name, self.streaming = path, name, streaming
        self.split_names = dict(zip(SPLITS, (train_split, validation_split, test_split), strict=True))

    @cached_property
    def own(self) -> dict[str, Any]:  # type: ignore[override]
        import datasets

        folder = Path(self.path).expanduser()
        try:
            # What was saved to disk is mapped into memory, which is as good as a stream.
            if (folder / "dataset_dict.json").is_file() or (folder / "dataset_info.json").is_file():
                loaded = datasets.load_from_disk(str(folder))
            else:
                loaded = datasets.load_dataset(self.path, self.name, streaming=self.streaming)
        except Exception as error:  # offline, not found, gated, broken: many libraries raise through this one call
            raise UserError(f"data.source path: no dataset {self.path}: {one_line(error)}") from None
        train = self.split_names["train"]
        if not isinstance(loaded, dict):
            loaded = {train: loaded}
        if train not in loaded:
            raise UserError(f"{self.path} has no split {train!r}; set train_split to one of {', '.join(loaded)}")
        found = {split: loaded[name] for split, name in self.split_names.items() if name in loaded}
        for split, size in (("validation", self.validation_size), ("test", self.test_size)):
            if size != 0 and split not in found and _is_stream(found["train"]):
                raise UserError(
                    f"{self.path} is streamed and has no split {self.split_names[split]!r}; none can be carved out of "
                    f"a stream: set {split}_split, or {split}_size to 0"
                )
        return found

    @cached_property
    def content(self) -> dict[str, Any]:
        """The content of the files where a dataset keeps its rows; of a stream, all that is known before it is read."""
        content: dict[str, Any] = {}
        for split, dataset in self.own.items():
            content[split] = [self.path, self.name, str(dataset.info.version), str(dataset.features)]
            if not _is_stream(dataset) and dataset.cache_files:
                files = [Path(file["filename"]) for file in dataset.cache_files]
                content[split] = [len(dataset), *(file_digest(file, self.cache_dir) for file in files)]
        return content

    def read_own(self, split: str) -> Iterator[Located]:
        return self._located(f"{self.path} {self.split_names[split]}", self.own[split])

    def blocks(self, split: str, size: int, first: int = 0, step: int = 1) -> Iterator[tuple[int, list[Located]]]:
        """Blocks as of every source; of a stream with enough shards each reader reads shards of its own."""
        own = self.own_split(split)
        dataset, place = self.own[own], f"{self.path} {self.split_names[own]}"
        if not _is_stream(dataset):
            for block in range(first, -(-len(dataset) // size), step):
                rows = dataset.skip(block * size).take(size)
                yield block, list(self.parsed(split, self._located(place, rows, block * size)))
        elif dataset.num_shards % step == 0:
            start, shard = first // step * size, first % step
            records = self._located(f"{place} shard {shard}", dataset.shard(step, shard).skip(start), start)
            chunks = iter(lambda: list(islice(records, size)), [])
            yield from ((first + n * step, list(self.parsed(split, chunk))) for n, chunk in enumerate(chunks))
        else:
            yield from super().blocks(split, size, first, step)

    def _located(self, place: str, rows: Iterable[Any], number: int = 0) -> Iterator[Located]:
        try:
            for record in rows:
                yield f"{place} row {number}", record
                number += 1
        except Exception as error:  # a connection that was lost, damage: many libraries raise here
            raise UserError(f"{place} row {number} cannot be read: {one_line(error)}") from None


def _is_stream(dataset: Any) -> bool:
    return not hasattr(dataset, "cache_files")
