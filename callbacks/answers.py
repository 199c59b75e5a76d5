"""The answers of `predict`, as JSON lines in the run folder."""

from contextlib import ExitStack
from io import StringIO
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import BasePredictionWriter

from dllm_var.files import open_output, write_text


class AnswerWriter(BasePredictionWriter):
    """Writes one JSON object per prompt, with the entries of `generate --json`.

    The file is `answers.jsonl` in the run folder (the working folder without a logger), in the order of the prompts.
    Until the last answer is there, `.partial` follows its name. Of several processes each writes its own answers into a
    file with the rank in its name; at the end the first process puts them together, and these files go.
    """

    def __init__(self) -> None:
        super().__init__("batch")
        self._opened = ExitStack()

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        rank = f".rank{trainer.global_rank}" if trainer.world_size > 1 else ""
        folder = Path(trainer.log_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"answers{rank}.jsonl"
        self._file = self._opened.enter_context(open_output(self.path))

    def write_on_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, prediction: Any, indices: Any, batch: Any, *_: Any
    ) -> None:
        tokenizer: Any = pl_module.tokenizer
        for prompt, answer in zip((prompt for prompt in batch if len(prompt)), prediction, strict=True):
            self._file.write(answer.as_json(tokenizer.decode(prompt)) + "\n")
        self._file.flush()

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._opened.close()
        path = self.path.resolve()
        pl_module.print(f"answers in {path if trainer.world_size == 1 else _put_together(trainer, path)}")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._opened.__exit__(type(exception), exception, exception.__traceback__)


def _put_together(trainer: L.Trainer, part: Path) -> Path:
    """Writes the answers of all processes, to which prompts were dealt in turn, into one file and returns its path."""
    whole = part.with_name("answers.jsonl")
    share = (trainer.distributed_sampler_kwargs or {}).get("rank", 0)  # tensor parallelism: some have the same
    parts: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(parts, (share, part.read_text(encoding="utf-8")))
    if trainer.is_global_zero:
        dealt = [StringIO(text) for _, text in sorted(dict(parts).items())]
        write_text(whole, "".join(chain.from_iterable(zip_longest(*dealt, fillvalue=""))))
    trainer.strategy.barrier()
    part.unlink()
    return whole
