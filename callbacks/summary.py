"""The result of a run: its answers on held-out data, as a table and as summary.json."""

import json
import shlex
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from dllm_var.callbacks.board import boards, markdown_table
from dllm_var.callbacks.decoding import held_out_prompts, undisturbed
from dllm_var.callbacks.export import ExportWeights
from dllm_var.errors import UserError
from dllm_var.files import write_text
from dllm_var.metrics import AnswerMetrics
from dllm_var.sampling import Sampler
from dllm_var.training.strategies import shards_parameters

SUMMARY_FILE = "summary.json"
LABEL_WIDTH = 22
LOOKED_AT = 100  # held-out prompts among which one is sought to be tried
ERROR_LABELS = {"per": "phoneme error rate", "wer": "word error rate", "cer": "character error rate"}


class RunSummary(L.Callback):
    """Decodes a held-out split when training has ended, prints a short table and writes `summary.json`.

    It runs whatever ended the training (steps, epochs, `max_time`, early stopping) but not after an exception or
    Ctrl-C. Several processes divide the prompts, or decode them together where parameters are sharded. The file, in the
    run folder (none without a logger), has the figures of `AnswerMetrics` under the names given here and

    - `tokens_per_second`: useful tokens over the wall time of decoding the split, all devices together;
    - `train_seconds`: wall time of training with its validation, sampling and checkpoints, before and after
      any resume; without this evaluation; `decode_seconds`: the time of this evaluation;
    - `parameters`, `steps`, `split`, `checkpoint` and `weights` (the folder of `ExportWeights`).

    The figures are also logged as `test/...` (the split's name), in TensorBoard as the text `summary`.

    Args:
        sampler: How to decode.
        split: The held-out split.
        num_examples: How many of its prompts; None for all.
        token_error_name: Name of the token error rate, for example `per` where tokens are phonemes.
        answer_error_name: Name of the answer error rate, for example `wer` where answers are words.
        prompt: Prompt in the command shown at the end; None for one of the split.
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
        self.sampler, self.split, self.num_examples, self.prompt = sampler, split, num_examples, prompt
        self.token_error_name, self.answer_error_name = token_error_name, answer_error_name
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

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        first = held_out_prompts(trainer, self.split, 1)
        if not shards_parameters(trainer.strategy):  # a sampler that does not fit the model should say so now
            self._decode(trainer, pl_module, first, max_new_tokens=1)
        self._began = time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._earlier_seconds, self._began = self.train_seconds, None
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._result = self.evaluate(trainer, pl_module)

    def _decode(self, trainer: L.Trainer, pl_module: L.LightningModule, examples: list[Any], **limits: Any) -> Any:
        tokenizer: Any = pl_module.tokenizer
        with undisturbed(trainer, pl_module):
            prompts = [example.prompt_ids for example in examples]
            return self.sampler.generate(pl_module, prompts, tokenizer=tokenizer, **limits) if prompts else []

    def evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Decodes the split and returns the figures of the summary."""
        examples = held_out_prompts(trainer, self.split, self.num_examples)
        pl_module.print(f"decoding {len(examples):,} prompts of the {self.split} split ...")
        together = shards_parameters(trainer.strategy)
        if not together:
            examples = examples[trainer.global_rank :: trainer.world_size]
        began = time.perf_counter()
        answers = self._decode(trainer, pl_module, examples)
        seconds = torch.tensor(time.perf_counter() - began, device=pl_module.device)
        metrics = AnswerMetrics(sync_on_compute=not together).to(pl_module.device)
        metrics.update(answers, [example.references for example in examples])
        scores = metrics.compute()
        decode_seconds = float(pl_module.all_gather(seconds).max())  # type: ignore[union-attr]
        renamed = {"token_error_rate": self.token_error_name, "answer_error_rate": self.answer_error_name}
        transformer: Any = pl_module.transformer
        return {
            **{renamed.get(name, name): value for name, value in scores.items()},
            "tokens": int(scores["tokens"]),
            "answers": int(scores["answers"]),
            "tokens_per_second": scores["tokens"] / max(decode_seconds, 1e-9),
            "decode_seconds": decode_seconds,
            "train_seconds": self.train_seconds,
            "parameters": transformer.num_parameters,
            "steps": trainer.global_step,
            "split": self.split,
        }

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        run, result, self._result = trainer.log_dir, self._result, None  # every process must ask for the folder
        if result is None or not trainer.is_global_zero:
            return
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        savers = [callback for callback in callbacks if isinstance(callback, ModelCheckpoint)]
        result["checkpoint"] = shown_path(saver.last_model_path or saver.best_model_path for saver in savers)
        result["weights"] = shown_path(callback.path for callback in callbacks if isinstance(callback, ExportWeights))
        if trainer.loggers and run is not None:
            write_text(Path(run) / SUMMARY_FILE, json.dumps(result, indent=2) + "\n")
        figures = {f"{self.split}/{name}": value for name, value in result.items() if isinstance(value, float | int)}
        for logger in trainer.loggers:
            if not isinstance(logger, TensorBoardLogger):  # there each would be a chart with one point
                logger.log_metrics(figures, step=result["steps"])
        names = (self.token_error_name, self.answer_error_name)
        errors = {ERROR_LABELS.get(name, name.replace("_", " ")): f"{result[name]:.1%}" for name in names}
        acceptance = result.get("introspective_acceptance")
        lines = {
            f"{self.split} split": f"{result['answers']:,} prompts",
            **errors,
            "ended by eos": f"{result['ended_by_eos']:.1%}",
            "length exact": f"{result['length_exact']:.1%}",
            "tokens/forward": f"{result['tokens_per_forward']:.2f}",
            "drafted tokens kept": "" if acceptance is None else f"{acceptance:.1%}",
            "useful tokens/s": f"{result['tokens_per_second']:,.0f}",
            "training time": f"{result['train_seconds']:.0f} s, validation and sampling included",
            "training": f"{result['steps']:,} steps, {result['parameters']:,} parameters",
            "checkpoint": result["checkpoint"],
            "weights": result["weights"],
        }
        if loadable := result["weights"] or result["checkpoint"]:
            text = self.prompt if self.prompt is not None else self._prompt_to_try(trainer, pl_module)
            words = ["chat" if text is None else "generate", "--checkpoint", loadable]
            if text is not None:
                words += [f"--prompt={text}"] if text.startswith("-") else ["--prompt", text]
            lines["try"] = f"python -m dllm_var {shlex.join(words)}"
        lines = {name: text for name, text in lines.items() if text}
        pl_module.print("\n" + "\n".join(f"{name:<{LABEL_WIDTH}}{text}" for name, text in lines.items()))
        for board in boards(trainer.loggers):
            rows = [{"figure": name, "value": text} for name, text in lines.items()]
            board.add_text("summary", markdown_table(rows), result["steps"])

    def _prompt_to_try(self, trainer: L.Trainer, pl_module: L.LightningModule) -> str | None:
        """Returns a held-out prompt that `generate` reads as it was held out; None for chats of several turns each."""
        tokenizer: Any = pl_module.tokenizer
        chats = getattr(trainer.datamodule, "chats", False)  # type: ignore[attr-defined]
        examples = held_out_prompts(trainer, self.split, LOOKED_AT if chats else 1)
        if not chats:
            return examples[0].prompt
        for example in examples:
            turn = {"role": "user", "content": example.prompt}
            with suppress(UserError):  # of a template that wants a system message, for one
                if tokenizer.encode_chat_prompt([turn]) == example.prompt_ids:
                    return example.prompt
        return None


def shown_path(paths: Iterable[str | Path | None]) -> str | None:
    """Returns the first path that is there, relative to the working directory if it lies below it."""
    found = next((Path(path) for path in paths if path), None)
    if found is None:
        return None
    return str(found.relative_to(Path.cwd()) if found.is_absolute() and found.is_relative_to(Path.cwd()) else found)
