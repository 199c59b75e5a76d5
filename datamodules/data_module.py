"""The packing data module: records in, rows of packed tokens out."""

from contextlib import suppress
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from torch.utils.data import DataLoader

from dllm_var.datamodules.cmudict import CmudictSource
from dllm_var.datamodules.packing import VERSIONS, Packing, TooLong
from dllm_var.datamodules.records import Turns, parse_record
from dllm_var.datamodules.rows import HeldOutSampler, PackedRows, RowSampler
from dllm_var.datamodules.sources import Source, SplitSource
from dllm_var.datamodules.table import HELD_OUT_SEED, Example, RecordEncoder, Table, load_table
from dllm_var.errors import UserError, warn
from dllm_var.files import cache_folder
from dllm_var.text.tokenizer import TRAIN_TOKENIZER, Tokenizer

MANY = 0.01  # share of tokens that are unknown, or of samples that are dropped, from which on a warning says so
LOOKED_AT = 100  # records that tell whether the data is conversations
_CHANGED = {  # of values that say nothing to a reader
    "source": "data.source has other records, or other splits,",
    "tokenizer": "data.tokenizer is another one",
    "plan_version": "data.packing puts other samples together",
}


class PackedDataModule(L.LightningDataModule):
    """Packs samples of different lengths into rows of `context_length` tokens.

    Args:
        source: Where records come from; the CMU pronouncing dictionary when not given.
        tokenizer: Folder or Hugging Face name; the source's own when not given.
        batch_size: Rows per batch and device.
        context_length: Tokens in a row.
        packing: ``concat`` strings samples together and cuts every `context_length` tokens, as the paper does;
            ``best_fit`` cuts no sample and pads what is left of a row.
        overhang: After each sample stand 0 to this many unsupervised mask tokens, another random number in every
            epoch, so that the end of a sample is not where its context ends.
        canvas: Block length of the sampler, in place of `overhang`: a sample ends where the sampler's canvas would,
            after a block of its answer that is chosen at random in every epoch. Unsupervised mask tokens fill the
            answer's last block; after an earlier block the rest of the answer is left out. 0 for off.
        eos_padding: Repeats the terminator, supervised, until an answer has this many tokens (the LLaDA baseline).
        on_bad_record: Records that cannot be used, texts of more than ten million characters among them: ``error``
            stops at the first, ``skip`` leaves out and counts them.
        on_too_long: Samples longer than a row: ``drop`` and count them; ``truncate`` them before the terminator; or
            ``cut`` them over several rows (``concat`` only).
        on_special_text: Text that spells a special token, such as ``<|im_end|>``: ``encode`` makes ordinary tokens of
            its letters, ``refuse`` takes the record for one that cannot be used.
        seed: With the epoch, decides order and overhang.
        num_workers: Processes that prepare batches; a row takes microseconds, so 0 is mostly best.
        cache_dir: Where tokenized data is kept; ``$DLLM_VAR_CACHE``, or ``~/.cache/dllm_var``, when not given.
        mask_token: Mask token, where the tokenizer names none.
        terminators: Tokens that end an answer, where the tokenizer names none; the first is appended to answers.
        chat: Puts prompts and answers through the tokenizer's chat template, as messages always are.
        check_resume: Refuses a checkpoint of other data, tokenizer or settings that change what is learned.
    """

    # Settings that decide the content of the rows, beside source and tokenizer.
    row_settings: tuple[str, ...] = (
        *("context_length", "packing", "overhang", "canvas", "eos_padding", "seed", "chat"),
        *("on_bad_record", "on_too_long", "on_special_text"),
    )

    def __init__(
        self,
        source: Source | None = None,
        tokenizer: str | None = None,
        batch_size: int = 32,
        context_length: int = 1024,
        packing: Packing = "concat",
        overhang: int = 0,
        canvas: int = 0,
        eos_padding: int = 0,
        on_bad_record: Literal["error", "skip"] = "error",
        on_too_long: TooLong = "drop",
        on_special_text: Literal["encode", "refuse"] = "encode",
        seed: int = 0,
        num_workers: int = 0,
        cache_dir: str | None = None,
        mask_token: str | None = None,
        terminators: list[str] | None = None,
        chat: bool = False,
        check_resume: bool = True,
    ) -> None:
        super().__init__()
        self.source = source or CmudictSource()
        self.batch_size, self.num_workers, self.check_resume = batch_size, num_workers, check_resume
        self.context_length, self.packing, self.seed, self.chat = context_length, packing, seed, chat
        self.overhang, self.canvas, self.eos_padding = overhang, canvas, eos_padding
        self.on_bad_record, self.on_too_long, self.on_special_text = on_bad_record, on_too_long, on_special_text
        self._check_settings()
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else cache_folder()
        self.source.cache_dir = self.cache_dir
        name_or_path = tokenizer or self.source.default_tokenizer
        if name_or_path is None:
            raise UserError(
                f"data.tokenizer is not set, and {type(self.source).__name__} has none of its own: name a folder or a "
                f"model of the hub, or train one with {TRAIN_TOKENIZER}"
            )
        self.tokenizer = Tokenizer.from_pretrained(name_or_path, mask_token, terminators)
        if chat and self.tokenizer.chat_template is None:
            raise UserError(
                f"data.chat is set, but the tokenizer {name_or_path} has no chat template; {TRAIN_TOKENIZER} trains "
                "one that has"
            )
        self._next_row = 0
        self._train_sampler: RowSampler | None = None
        self._tables: dict[str, Table] = {}
        self._rows: dict[str, PackedRows] = {}

    def _check_settings(self) -> None:
        least = {"batch_size": 1, "context_length": 2, "seed": 0, "num_workers": 0}
        ends = dict.fromkeys(("overhang", "canvas", "eos_padding"), 0)
        for name, lowest in {**least, **ends}.items():
            value = getattr(self, name)
            if value is None or value < lowest:
                raise UserError(f"data.{name} is {value}; it must be at least {lowest}")
            if name in ends and value >= self.context_length:
                raise UserError(f"data.{name} is {value}; it must be below data.context_length, {self.context_length}")
        if sum(getattr(self, name) > 0 for name in ends) > 1:
            raise UserError("data.overhang, canvas and eos_padding exclude each other: set one of them")
        if self.on_too_long == "cut" and self.packing != "concat":
            raise UserError(f"data.on_too_long=cut needs data.packing=concat; {self.packing} cuts no sample")

    def prepare_data(self) -> None:
        """Tokenizes what the cache does not have yet; Lightning calls it in one process per node."""
        for split in self.source.splits:
            self.table(split)

    def setup(self, stage: str) -> None:
        """Maps the tokenized data and tells what became of it; Lightning calls it in every process."""
        if stage == "fit":
            _ = self.chats  # checkpoints tell it, when the data may be out of reach
            if getattr(rank_zero_only, "rank", 0) == 0:
                rank_zero_info(self.summary())
                for warning in self.warnings():
                    warn(warning)

    def train_dataloader(self) -> DataLoader:
        """Batches of the next rows of an endless stream, as many as cover the data once."""
        rows = self.rows("train")
        self._train_sampler = RowSampler(len(rows), self.batch_size, *self._ranks(), next_row=self._next_row)
        return self._loader(rows, self._train_sampler)

    def val_dataloader(self) -> DataLoader | list[Any]:
        """Batches of validation rows, always the same, each once over all ranks; `fit` needs none."""
        return self._held_out_loader("validation")

    def test_dataloader(self) -> DataLoader | list[Any]:
        """Batches of test rows, always the same, each once over all ranks."""
        return self._held_out_loader("test")

    def predict_dataloader(self) -> DataLoader:
        """Batches of the test split's prompts as lists of token ids, dealt to ranks in turn and filled up with []."""
        examples = self.held_out("test") if "test" in self.source.splits else []
        prompts: Any = [example.prompt_ids for example in examples]
        if not prompts:
            raise self._empty("test")
        sampler = HeldOutSampler(prompts, *self._ranks(), shuffle=False)
        dealt: Any = [*prompts, []]  # the sampler's -1 is the last one
        return DataLoader(dealt, batch_size=self.batch_size, sampler=sampler, collate_fn=list)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Notes how far training has come; a batch that was only prefetched does not count."""
        if self.trainer is not None and self.trainer.training and self._train_sampler is not None:
            self._next_row = self._train_sampler.trained(int(batch["row"][0]))
        return self._prepared(batch)

    def _prepared(self, batch: Any) -> Any:
        """Lets the model do what it does on the host before a training batch goes to its device."""
        if self.trainer is None or not self.trainer.training:
            return batch
        hide_tokens = getattr(self.trainer.lightning_module, "hide_tokens", None)  # other models have none
        return batch if hide_tokens is None else hide_tokens(batch)

    def state_dict(self) -> dict[str, Any]:
        """The row with which training goes on, whatever the number of ranks and workers then, and the identity."""
        return {"next_row": self._next_row, "identity": self.identity}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with the row after the last one trained; raises UserError when the rows would now be others."""
        self._check_identity(state_dict)
        self._next_row = state_dict["next_row"]

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that decides the content of the rows, as plain values; checkpoints record it."""
        settings = {name: getattr(self, name) for name in self.row_settings}
        content = {"source": self.source.fingerprint(), "tokenizer": self.tokenizer.fingerprint}
        return {**content, **settings, "plan_version": VERSIONS[self.packing]}

    def _check_identity(self, state_dict: dict[str, Any]) -> None:
        saved = state_dict.get("identity")
        if saved is None or not self.check_resume or self.trainer is None or self.trainer.state.fn != "fit":
            return
        for name, value in self.identity.items():
            if saved.get(name) != value:
                change = _CHANGED.get(name, f"data.{name} has another value ({value} instead of {saved.get(name)})")
                raise UserError(
                    f"{change} than when the checkpoint was written: set it back, start a new run with "
                    "model.init_from, or go on all the same with --data.check_resume=false"
                )

    def table(self, split: str) -> Table:
        """Tokenized samples of a split; raises UserError when there is no such split, or a bad record in it."""
        if split not in self.source.splits:
            raise UserError(f"{type(self.source).__name__} has no split {split}, only {', '.join(self.source.splits)}")
        if split not in self._tables:
            # Checksums are compared by one process of each node; the others wait for it in `prepare_data`.
            first = self.trainer is None or self.trainer.local_rank == 0
            self._tables[split] = load_table(self.source, split, self.encoder(), self.cache_dir, verify=first)
        return self._tables[split]

    @property
    def chats(self) -> bool:
        """Whether training records, one of the first hundred at least, go through the tokenizer's chat template."""
        return self.tokenizer.chat_template is not None and self._has_conversations

    @cached_property
    def _has_conversations(self) -> bool:
        for record in islice(self.source.records("train"), LOOKED_AT):
            with suppress(UserError):  # the table tells of it
                form = parse_record(record, self.chat)
                if isinstance(form, Turns) and form.chat:
                    return True
        return False

    def warnings(self) -> list[str]:
        """What is probably a mistake in data, tokenizer and settings, a sentence each; none for most data."""
        found = self._missing_template()
        report, tokens = self.report(), len(self.table("train").tokens)
        if report["unknown_tokens"] > MANY * tokens:
            found.append(
                f"{report['unknown_tokens'] / tokens:.1%} of the tokens are unknown: data.tokenizer does not fit the "
                f"data; take another one, or train one with {TRAIN_TOKENIZER}"
            )
        if report["dropped"] > MANY * len(self.table("train")):
            found.append(
                f"{report['dropped']:,} of {len(self.table('train')):,} samples are longer than data.context_length="
                f"{self.context_length} and dropped; the longest has {np.diff(self.table('train').offsets).max():,} "
                "tokens: raise data.context_length"
                + (", or cut long answers with data.on_too_long=truncate" if self.on_too_long == "drop" else "")
            )
        return found

    def _missing_template(self) -> list[str]:
        # Other sources than files and data sets make their records themselves, some of them slowly.
        if self.tokenizer.chat_template or not isinstance(self.source, SplitSource) or not self._has_conversations:
            return []
        return [
            "the data has messages, but the tokenizer has no chat template: nothing will tell the model who speaks; "
            f"take a tokenizer that has one, or train one with {TRAIN_TOKENIZER}"
        ]

    def encoder(self) -> RecordEncoder:
        """A new encoder of records."""
        skip_bad, refuse_special = self.on_bad_record == "skip", self.on_special_text == "refuse"
        return RecordEncoder(self.tokenizer, self.chat, skip_bad, refuse_special)

    def rows(self, split: str) -> PackedRows:
        """Packed rows of a split, numbered over all epochs; raises UserError when there are none."""
        if split not in self._rows:
            table = self.table(split)
            if not len(table):
                raise UserError(f"the {split} split of {type(self.source).__name__} has no records that can be used")
            train = split == "train"
            rows = self.packer()(table, cut=train, seed=(self.seed if train else HELD_OUT_SEED,))
            if not len(rows):
                raise UserError(
                    f"all {len(table):,} samples of the {split} split are longer than data.context_length="
                    f"{self.context_length}; raise it (the shortest has {np.diff(table.offsets).min():,} tokens), or "
                    "set data.on_too_long=truncate"
                )
            self._rows[split] = rows
        return self._rows[split]

    def packer(self) -> partial[PackedRows]:
        """Makes rows of a table."""
        names = ("context_length", "packing", "on_too_long", "eos_padding", "overhang", "canvas")
        return partial(PackedRows, special=self.tokenizer.special, **{name: getattr(self, name) for name in names})

    def held_out(self, split: str, n: int | None = None) -> list[Example]:
        """`n` prompts of a split, or all, with their answers, the same ones every time; a ``{text}`` has no prompt."""
        return self.table(split).examples(self.tokenizer, n)

    def report(self, split: str = "train") -> dict[str, Any]:
        """Counts what became of a split; ``utilisation`` is the fraction of its rows that is not padding."""
        meta = self.table(split).meta
        return {**self.rows(split).report(), **{name: meta[name] for name in ("skipped", "unknown_tokens")}}

    def summary(self) -> str:
        """The report on the training data in a line or two."""
        report, reasons = self.report(), self.table("train").meta["reasons"]
        counts = {
            "too long and dropped": report["dropped"],
            "truncated": report["truncated"],
            "bad records skipped": report["skipped"],
            "unknown tokens": report["unknown_tokens"],
        }
        notes = [f"{count:,} {what}" for what, count in counts.items() if count]
        notes += [f"the first: {reason}" for reason in reasons[:1]]  # of the bad records
        return (
            f"data: {report['samples']:,} samples, {report['tokens']:,} tokens in {report['rows']:,} rows of "
            f"{self.context_length} ({self.packing}, {report['utilisation']:.1%} used)"
        ) + (f"\ndata: {', '.join(notes)}" if notes else "")

    def _ranks(self) -> tuple[int, int]:
        kwargs = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return (kwargs["num_replicas"], kwargs["rank"]) if kwargs else (1, 0)

    def _on_cuda(self) -> bool:
        """Whether batches go to a CUDA device: from pinned memory they are copied while it works."""
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    def _held_out_loader(self, split: str) -> DataLoader | list[Any]:
        if split not in self.source.splits or not len(self.table(split)):
            if self.trainer is not None and self.trainer.state.fn in ("validate", "test"):
                raise self._empty(split)
            return []
        rows = self.rows(split)
        return self._loader(rows, HeldOutSampler(rows, *self._ranks(), shuffle=False))

    def _empty(self, split: str) -> UserError:
        source = type(self.source).__name__
        return UserError(f"the {split} split of {source} has no records: set data.source.{split}_size")

    def _loader(self, rows: PackedRows, sampler: RowSampler | HeldOutSampler) -> DataLoader:
        return DataLoader(
            rows,
            batch_size=self.batch_size,
            sampler=sampler,
            collate_fn=dict,  # `PackedRows` builds whole batches itself
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=self._on_cuda(),
        )
