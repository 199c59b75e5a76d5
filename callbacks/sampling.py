"""Answers of the model while it trains: decoded every so often, shown and scored."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import lightning as L

from dllm_var.callbacks.answer_tables import AnswerRow, answer_table, mark, markdown_table
from dllm_var.callbacks.decoding import held_out_prompts, undisturbed
from dllm_var.datamodules import Example
from dllm_var.errors import UserError
from dllm_var.metrics import AnswerMetrics, nearest_reference
from dllm_var.sampling import Generation, Sampler
from dllm_var.sampling.base import NotFinite
from dllm_var.training.strategies import is_sharded

if TYPE_CHECKING:
    from dllm_var.text.tokenizer import Tokenizer

# The figures that are logged, and how they read in the line above the answers.
SCORES = {
    "token_error_rate": "{:.1%} token errors",
    "answer_error_rate": "{:.0%} of answers wrong",
    "ended_by_eos": "{:.0%} ended by eos",
    "length_exact": "{:.0%} of the right length",
    "tokens_per_forward": "{:.2f} tokens/forward",
    "tokens_per_second": "{:,.0f} tokens/s",
}
NEED_REFERENCES = ("token_error_rate", "answer_error_rate", "length_exact")


class SamplingCallback(L.Callback):
    """Decodes prompts or held-out examples every so many optimizer steps, prints them and logs text and scores.

    Any `Sampler` fits, named by `class_path` in a config. To decode in another way, override `generate`. Training goes
    on as if nothing had been sampled: modes and random states are restored. Where every process holds the whole model
    the first one decodes alone; where parameters are sharded all decode the same prompts.

    Logs the scalars `sample/token_error_rate`, `sample/answer_error_rate`, `sample/ended_by_eos`, `sample/length_exact`
    (the first two and the last only where references are known), `sample/tokens_per_forward`,
    `sample/tokens_per_second`, and the table `sample/answers` to loggers that take text (TensorBoard).

    Args:
        sampler: How to decode.
        prompts: Texts to decode; without them the first examples of a held-out split are taken.
        num_examples: How many held-out examples are decoded and scored.
        every_n_steps: Optimizer steps between samplings.
        split: Name of the held-out split.
        num_shown: How many of the answers are printed and logged as text, at most.

    Raises:
        UserError: A number is below one, or `prompts` is empty.
    """

    def __init__(
        self,
        sampler: Sampler,
        prompts: list[str] | None = None,
        num_examples: int = 8,
        every_n_steps: int = 500,
        split: str = "validation",
        num_shown: int = 8,
    ) -> None:
        for name, value in (("num_examples", num_examples), ("every_n_steps", every_n_steps), ("num_shown", num_shown)):
            if value < 1:
                raise UserError(f"{name} of the sampling callback is {value}: give at least 1, or remove the callback")
        if prompts is not None and not prompts:
            raise UserError(
                "prompts of the sampling callback is empty: name some, or leave it out to use held-out examples"
            )
        self.sampler, self.prompts, self.split = sampler, prompts, split
        self.num_examples, self.every_n_steps, self.num_shown = num_examples, every_n_steps, num_shown
        self.pause_seconds = 0.0  # how long training has stood still for it; SpeedMonitor leaves it out
        self._examples: list[Example] = []
        self._last_step = 0

    def generate(self, model: Any, prompts: list[list[int]], tokenizer: Tokenizer) -> list[Generation]:
        """Decodes prompts; the method to override for another way of decoding.

        Args:
            model: The LightningModule, in eval mode and without gradients; the network is its `transformer`.
            prompts: Token ids.
            tokenizer: The model's tokenizer.
        """
        return self.sampler.generate(model, prompts, tokenizer=tokenizer)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.prompts is None:
            self._examples = held_out_prompts(trainer, self.split, self.num_examples)
        else:
            tokenizer: Any = pl_module.tokenizer
            self._examples = [Example(text, tokenizer.encode(text)) for text in self.prompts]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._last_step = trainer.global_step  # on resume, the step of the checkpoint has been sampled before

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped, self._last_step = trainer.global_step != self._last_step, trainer.global_step
        due = stepped and trainer.global_step % self.every_n_steps == 0
        if due and (trainer.is_global_zero or is_sharded(trainer.strategy)):
            began = time.perf_counter()
            self.sample(trainer, pl_module)
            self.pause_seconds += time.perf_counter() - began

    def sample(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Decodes, prints and logs once, whatever the step."""
        tokenizer: Any = pl_module.tokenizer
        step = trainer.global_step
        with undisturbed(trainer, pl_module):
            began = time.perf_counter()
            try:
                answers = self.generate(pl_module, [example.prompt_ids for example in self._examples], tokenizer)
            except NotFinite as error:  # the loss guard decides whether training can go on
                pl_module.print(f"step {step}: no answers: {error}")
                return
            seconds = time.perf_counter() - began
        if not trainer.is_global_zero:
            return
        scores = self._score(answers, seconds)
        shown = list(zip(self._examples, answers, strict=True))[: self.num_shown]
        rows = [_row(tokenizer, example, answer) for example, answer in shown]
        figures = ", ".join(SCORES[name].format(value) for name, value in scores.items())
        pl_module.print(f"\nstep {step}, {len(answers)} answers: {figures}\n{answer_table(rows)}\n")
        for logger in trainer.loggers:
            logger.log_metrics({f"sample/{name}": value for name, value in scores.items()}, step=step)
            add_text = getattr(getattr(logger, "experiment", None), "add_text", None)
            if add_text is not None:
                add_text("sample/answers", markdown_table(rows), global_step=step)

    def _score(self, answers: list[Generation], seconds: float) -> dict[str, float]:
        metrics = AnswerMetrics(sync_on_compute=False)  # this process measures alone
        known = all(example.references for example in self._examples)
        # Without references an answer is compared with itself: the other figures need none.
        pairs = zip(self._examples, answers, strict=True)
        metrics.update(answers, [example.references or [answer.tokens] for example, answer in pairs])
        result = metrics.compute()
        result["tokens_per_second"] = result["tokens"] / max(seconds, 1e-9)
        return {name: result[name] for name in SCORES if known or name not in NEED_REFERENCES}


def _row(tokenizer: Tokenizer, example: Example, answer: Generation) -> AnswerRow:
    reference = nearest_reference(answer.tokens, example.references)[0] if example.references else None
    is_wrong = reference is not None and list(reference) != list(answer.tokens)
    expected = tokenizer.decode(reference or []) if is_wrong else ""
    return AnswerRow(
        example.prompt, mark(tokenizer, answer.tokens, reference), expected, answer.finish_reason, answer.nfe
    )
