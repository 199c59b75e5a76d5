"""The answers of `predict`, as JSON lines in the run folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter

from dllm_var.callbacks.decoding import say
from dllm_var.files import WholeFile
from dllm_var.sampling import Generation


class AnswerWriter(BasePredictionWriter):
    """Writes one JSON object per prompt, with the entries of `generate --json`.

    The file is `answers.jsonl` in the run folder (the working folder without a logger), with the rank in its name when
    there are several processes. Until the last answer is there, `.partial` follows its name.
    """

    def __init__(self) -> None:
        super().__init__("batch")
        self.file: WholeFile | None = None

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        rank = f".rank{trainer.global_rank}" if trainer.world_size > 1 else ""
        folder = Path(trainer.log_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        self.file = WholeFile(folder / f"answers{rank}.jsonl")

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        tokenizer: Any = pl_module.tokenizer
        answers: list[Generation] = prediction
        assert self.file is not None
        for prompt, answer in zip(batch, answers, strict=True):
            self.file.stream.write(answer.as_json(tokenizer.decode(prompt)) + "\n")
        self.file.stream.flush()

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self.file is not None
        self.file.complete()
        say(trainer, f"answers in {self.file.target}")
        self.file = None

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if self.file is not None:
            self.file.abandon()
            self.file = None
