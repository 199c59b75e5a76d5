"""The packing data module: records in, rows of packed tokens out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from dllm_var.datamodules.cmudict import CmudictSource
from dllm_var.datamodules.rows import HeldOutSampler, PackedRows, RowSampler, Samples
from dllm_var.datamodules.sources import Source
from dllm_var.datamodules.table import Table, load_table
from dllm_var.errors import UserError
from dllm_var.tokenization import Tokenizer

HELD_OUT_SEED = 0  # held-out rows and examples are the same whatever the training seed


@dataclass(frozen=True)
class Example:
    """A held-out prompt with every answer the data has for it.

    Args:
        prompt: text of the prompt.
        prompt_ids: its token ids.
        references: token ids of the answers, without terminator.
    """

    prompt: str
    prompt_ids: list[int]
    references: list[list[int]] = field(default_factory=list)


class PackedDataModule(L.LightningDataModule):
    """Packs samples of different lengths into rows of `context_length` tokens.

    Args:
        source: where records come from; the CMU pronouncing dictionary when not given.
        tokenizer: folder or Hugging Face name; the source's own when not given.
        batch_size: rows per batch and device.
        context_length: tokens in a row.
        packing: ``concat`` strings samples together and cuts every `context_length` tokens; ``best_fit`` cuts none.
        overhang: after each sample stand 0 to this many unsupervised mask tokens, drawn anew every epoch.
        eos_padding: repeats the terminator, supervised, until an answer has this many tokens (the LLaDA baseline).
        on_bad_record: ``error`` stops at the first record that cannot be used, ``skip`` counts them.
        on_too_long: samples longer than a row: ``drop`` and count them, or ``truncate`` before the terminator.
        seed: with the epoch, decides order and overhang.
        num_workers: processes that prepare batches; rows are so cheap that 0 is mostly best.
        cache_dir: where tokenized data is kept; $DLLM_VAR_CACHE or ~/.cache/dllm_var when not given.
        mask_token: mask token, if the tokenizer does not say.
        terminators: tokens that end an answer, if the tokenizer does not say; the first is appended to answers.
        chat: puts prompts and answers through the tokenizer's chat template.
    """

    def __init__(
        self,
        source: Source | None = None,
        tokenizer: str | None = None,
        batch_size: int = 32,
        context_length: int = 1024,
        packing: Literal["concat", "best_fit"] = "concat",
        overhang: int = 0,
        eos_padding: int = 0,
        on_bad_record: Literal["error", "skip"] = "error",
        on_too_long: Literal["drop", "truncate"] = "drop",
        seed: int = 0,
        num_workers: int = 0,
        cache_dir: str | None = None,
        mask_token: str | None = None,
        terminators: list[str] | None = None,
        chat: bool = False,
    ) -> None:
        super().__init__()
        self.source = source or CmudictSource()
        self.batch_size = batch_size
        self.context_length = context_length
        self.packing = packing
        self.overhang = overhang
        self.eos_padding = eos_padding
        self.on_bad_record = on_bad_record
        self.on_too_long = on_too_long
        self.seed = seed
        self.num_workers = num_workers
        self.cache_dir = Path(cache_dir or os.environ.get("DLLM_VAR_CACHE") or Path.home() / ".cache" / "dllm_var")
        self.chat = chat
        name = tokenizer or self.source.default_tokenizer
        if name is None:
            raise UserError(f"data.tokenizer is not set, and {type(self.source).__name__} has none of its own")
        self.tokenizer = Tokenizer.from_pretrained(name, mask_token, terminators)
        self._tables: dict[str, Table] = {}
        self._rows: dict[str, PackedRows] = {}

    def prepare_data(self) -> None:
        """Tokenizes what is not in the cache yet; Lightning calls it in one process."""
        for split in self.source.splits:
            self.table(split)

    def setup(self, stage: str) -> None:
        """Maps the tokenized data and plans the rows; Lightning calls it in every process."""
        if stage == "fit":
            rank_zero_info(self._summary())

    def train_dataloader(self) -> DataLoader:
        rows = self.rows("train")
        return self._loader(rows, RowSampler(len(rows), self.batch_size, *self._ranks()))

    def val_dataloader(self) -> DataLoader | list:
        return self._held_out_loader("validation")

    def test_dataloader(self) -> DataLoader | list:
        return self._held_out_loader("test")

    def table(self, split: str) -> Table:
        """Tokenized samples of a split."""
        if split not in self._tables:
            self._tables[split] = load_table(
                self.source, split, self.tokenizer, self.cache_dir, self.chat, self.on_bad_record == "skip"
            )
        return self._tables[split]

    def rows(self, split: str) -> PackedRows:
        """Packed rows of a split."""
        if split not in self._rows:
            seed = self.seed if split == "train" else HELD_OUT_SEED
            self._rows[split] = PackedRows(
                self._samples(split), self.tokenizer.special, self.context_length, self.packing, self.overhang, seed
            )
        return self._rows[split]

    def held_out(self, split: str, n: int | None = None) -> list[Example]:
        """Prompts of a split with their answers, those with the same prompt put together.

        Args:
            split: ``validation`` or ``test``.
            n: how many prompts, picked the same way every time; all when not given.

        Raises:
            UserError: the source has no such split.
        """
        if split not in self.source.splits:
            raise UserError(f"{type(self.source).__name__} has no {split} split; it has {', '.join(self.source.splits)}")
        table = self.table(split)
        examples: dict[tuple[int, ...], Example] = {}
        for sample in np.random.default_rng(HELD_OUT_SEED).permutation(len(table)).tolist():
            ids, start = table.ids(sample), int(table.answer_start[sample])
            prompt = ids[:start]
            key = tuple(prompt)
            if key not in examples:
                examples[key] = Example(self.tokenizer.decode(prompt), prompt)
            examples[key].references.append(ids[start:-1])
        return list(examples.values())[:n]

    def report(self, split: str = "train") -> dict[str, Any]:
        """What became of the records of a split: counts of samples, tokens and rows, and how full rows are."""
        table, rows = self.table(split), self.rows(split)
        samples, plan = rows.samples, rows.plan(0)
        content = int(samples.body.sum(dtype=np.int64) + samples.ends.sum(dtype=np.int64))
        hanging = int(rows._plan(0)[1].sum(dtype=np.int64))
        return {
            "samples": len(samples.index),
            "tokens": content,
            "rows": plan.rows,
            "utilisation": (content + hanging) / (plan.rows * self.context_length),
            "overhang": hanging,
            "cut": plan.cut,
            "skipped": table.meta["skipped"],
            "unknown_tokens": table.meta["unknown_tokens"],
        }

    def _samples(self, split: str) -> Samples:
        table = self.table(split)
        body = np.diff(table.offsets).astype(np.int32)
        index = np.flatnonzero(body <= self.context_length)
        return Samples(table, index, body[index], np.zeros(len(index), dtype=np.int32))

    def _ranks(self) -> tuple[int, int]:
        kwargs = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return (kwargs["num_replicas"], kwargs["rank"]) if kwargs else (1, 0)

    def _held_out_loader(self, split: str) -> DataLoader | list:
        if split not in self.source.splits:
            return []
        rows = self.rows(split)
        return self._loader(rows, HeldOutSampler(len(rows), *self._ranks()))

    def _loader(self, rows: PackedRows, sampler: RowSampler | HeldOutSampler) -> DataLoader:
        return DataLoader(
            rows,
            batch_size=self.batch_size,
            sampler=sampler,
            collate_fn=_as_is,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def _summary(self) -> str:
        report = self.report()
        return (
            f"data: {report['samples']:,} samples, {report['tokens']:,} tokens in {report['rows']:,} rows of "
            f"{self.context_length} ({report['utilisation']:.1%} used, {report['cut']:,} samples cut)"
        )


def _as_is(batch: Any) -> Any:
    """`PackedRows` builds whole batches itself."""
    return batch
