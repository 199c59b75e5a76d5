"""What a run has come to: its answers on held-out data, as a table and as summary.json."""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.table import Table

from dllm_var.callbacks.decoding import held_out_prompts, is_sharded, say, undisturbed
from dllm_var.callbacks.export import ExportWeights
from dllm_var.callbacks.rendering import draw
from dllm_var.files import write_text
from dllm_var.metrics import AnswerMetrics
from dllm_var.sampling import Sampler

SUMMARY_FILE = "summary.json"
LABEL_WIDTH = 22
ERROR_LABELS = {"per": "phoneme error rate", "wer": "word error rate", "cer": "character error rate"}


class RunSummary(L.Callback):
    """Decodes a held-out split when training has ended, prints a short table and writes `summary.json`.

    It runs whatever ended the training (steps, epochs, `max_time`, early stopping) but not after an exception or
    Ctrl-C. Several processes share the prompts, or decode them together where parameters are sharded. The file, in the
    run folder (none without a logger), has the figures of `AnswerMetrics` under the names given here and

    - `tokens_per_second`: useful tokens over the wall time of decoding the split, all devices together;
    - `train_seconds`: wall time of training with its validation, sampling and checkpoints, before and after
      any resume; without this evaluation; `decode_seconds`: the time of this evaluation;
    - `parameters`, `steps`, `split`, `checkpoint` and `weights` (the folder of `ExportWeights`).

    The figures are also logged as `test/...` (the split's name).

    Args:
        sampler: How to decode.
        split: The held-out split.
        num_examples: How many of its prompts; all when null.
        token_error_name: Name of the token error rate, for example `per` where tokens are phonemes.
        answer_error_name: Name of the answer error rate, for example `wer` where answers are words.
        prompt: Prompt in the command shown at the end; the first of the split when null.

    Raises:
        UserError: The split has no examples; said before training starts.
    """

    def __init__(
        self,
        sampler: Sampler,
        split: str = "test",
        num_examples: int | None = None,
        token_error_name: str = "token_error_rate",
        answer_error_name: str = "answer_error_rate",
        prompt: str | None = None,
    ) -> None:
        self.sampler = sampler
        self.split = split
        self.num_examples = num_examples
        self.token_error_name = token_error_name
        self.answer_error_name = answer_error_name
        self.prompt = prompt
        self._began: float | None = None
        self._earlier_seconds = 0.0
        self._result: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"train_seconds": self.train_seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._earlier_seconds = float(state_dict["train_seconds"])

    @property
    def train_seconds(self) -> float:
        """Wall time of training so far, before and after any resume."""
        return self._earlier_seconds + (0.0 if self._began is None else time.perf_counter() - self._began)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._result = None
        held_out_prompts(trainer, self.split, 1)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not is_sharded(trainer):  # a sampler that does not fit the model should say so now, not after training
            example = held_out_prompts(trainer, self.split, 1)[0]
            with undisturbed(trainer, pl_module):
                self.sampler.generate(pl_module, [example.ids], tokenizer=_tokenizer(pl_module), max_new_tokens=1)
        self._began = time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._earlier_seconds, self._began = self.train_seconds, None
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._result = self.evaluate(trainer, pl_module)

    def evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Decode the split and give the figures of the summary."""
        examples = held_out_prompts(trainer, self.split, self.num_examples)
        say(trainer, f"decoding {len(examples):,} prompts of the {self.split} split ...")
        together = is_sharded(trainer)
        if not together:
            examples = examples[trainer.global_rank :: trainer.world_size]
        with undisturbed(trainer, pl_module):
            began = time.perf_counter()
            prompts = [example.ids for example in examples]
            answers = self.sampler.generate(pl_module, prompts, tokenizer=_tokenizer(pl_module)) if prompts else []
            seconds = torch.tensor(time.perf_counter() - began, device=pl_module.device)
        metrics = AnswerMetrics(sync_on_compute=not together).to(pl_module.device)
        metrics.update(answers, [example.references for example in examples])
        scores = metrics.compute()
        slowest: Any = pl_module.all_gather(seconds)
        decode_seconds = float(slowest.max())
        renamed = {"token_error_rate": self.token_error_name, "answer_error_rate": self.answer_error_name}
        transformer: Any = pl_module.transformer
        return {
            **{renamed.get(name, name): value for name, value in scores.items()},
            "tokens": int(scores["tokens"]),
            "answers": int(scores["answers"]),
            "tokens_per_second": scores["tokens"] / max(decode_seconds, 1e-9),
            "decode_seconds": decode_seconds,
            "train_seconds": self.train_seconds,
            "parameters": sum(parameter.numel() for parameter in transformer.parameters()),
            "steps": trainer.global_step,
            "split": self.split,
        }

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        run = trainer.log_dir  # every process must ask
        if self._result is None or not trainer.is_global_zero:
            return
        result = self._result
        result["checkpoint"], result["weights"] = newest_checkpoint(trainer), exported_weights(trainer)
        if trainer.loggers and run is not None:
            write_json(Path(run) / SUMMARY_FILE, result)
        figures = {name: value for name, value in result.items() if isinstance(value, float | int)}
        for logger in trainer.loggers:
            logger.log_metrics({f"{self.split}/{name}": value for name, value in figures.items()}, step=result["steps"])
        say(trainer, ["", draw(self._table()), *self._next(trainer)])

    def _table(self) -> Table:
        """The figures a reader looks for first."""
        result = self._result
        assert result is not None
        rows = {
            f"{self.split} split": f"{result['answers']:,} prompts",
            _label(self.token_error_name): f"{result[self.token_error_name]:.1%}",
            _label(self.answer_error_name): f"{result[self.answer_error_name]:.1%}",
            "ended by eos": f"{result['ended_by_eos']:.1%}",
            "length exact": f"{result['length_exact']:.1%}",
            "tokens/forward": f"{result['tokens_per_forward']:.2f}",
            "useful tokens/s": f"{result['tokens_per_second']:,.0f}",
            "training time": f"{result['train_seconds']:.0f} s, validation and sampling included",
            "training": f"{result['steps']:,} steps, {result['parameters']:,} parameters",
        }
        table = Table(box=None, padding=0, show_header=False)
        table.add_column(width=LABEL_WIDTH, no_wrap=True)
        for number, (label, value) in enumerate(rows.items()):
            table.add_row(label, value, style="bold" if number == 0 else "")
        return table

    def _next(self, trainer: L.Trainer) -> list[str]:
        """Where the results are, and a command to try on them."""
        assert self._result is not None
        weights, checkpoint = self._result["weights"], self._result["checkpoint"]
        lines = {name: path for name, path in (("checkpoint", checkpoint), ("weights", weights)) if path}
        if lines:
            text = self.prompt if self.prompt is not None else held_out_prompts(trainer, self.split, 1)[0].text
            command = ["python", "-m", "dllm_var", "generate", "--checkpoint", weights or checkpoint, "--prompt", text]
            lines["try"] = shlex.join(command)
        return [f"{name:<{LABEL_WIDTH}}{text}" for name, text in lines.items()]


def newest_checkpoint(trainer: L.Trainer) -> str | None:
    """Path of the checkpoint a run left last: the last one if such are kept, else the best; None without any."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and (path := callback.last_model_path or callback.best_model_path):
            return shown_path(path)
    return None


def exported_weights(trainer: L.Trainer) -> str | None:
    """Folder `ExportWeights` wrote; None without that callback."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    paths = [callback.path for callback in callbacks if isinstance(callback, ExportWeights) and callback.path]
    return shown_path(paths[-1]) if paths else None


def shown_path(path: str | Path) -> str:
    """Give a path as short as it can be typed: relative if it lies below the working directory."""
    path = Path(path)
    return str(path.relative_to(Path.cwd()) if path.is_absolute() and path.is_relative_to(Path.cwd()) else path)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(values, indent=2) + "\n")


def _tokenizer(pl_module: L.LightningModule) -> Any:
    return pl_module.tokenizer


def _label(name: str) -> str:
    return ERROR_LABELS.get(name, name.replace("_", " "))
