"""Answers of the model while it trains: decoded every so often, shown with their wrong tokens marked, and scored."""

import io
import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any

import lightning as L
import numpy as np
from rapidfuzz.distance import Levenshtein
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dllm_var.callbacks.board import boards, markdown_table, replay_picture
from dllm_var.callbacks.decoding import held_out_prompts, undisturbed
from dllm_var.callbacks.speed import SpeedMonitor
from dllm_var.datamodules import Example
from dllm_var.errors import UserError
from dllm_var.metrics import AnswerMetrics, nearest_reference
from dllm_var.sampling import Generation, Sampler
from dllm_var.sampling.guards import NotFinite
from dllm_var.text.tokenizer import Tokenizer
from dllm_var.training.strategies import shards_parameters

# What is logged, and how it reads in the line above the answers.
SCORES = {
    "token_error_rate": "{:.1%} token errors",
    "answer_error_rate": "{:.0%} of answers wrong",
    "ended_by_eos": "{:.0%} ended by eos",
    "length_exact": "{:.0%} of the right length",
    "tokens_per_forward": "{:.2f} tokens/forward",
    "tokens_per_second": "{:,.0f} tokens/s",
    "introspective_acceptance": "{:.0%} of drafted tokens accepted",
}
NEED_REFERENCES = ("token_error_rate", "answer_error_rate", "length_exact")
COLUMNS = ("prompt", "answer", "expected", "end", "forwards")  # of the cells that a terminal shows
PLAIN_WIDTH = 120
Rows = Sequence[dict[str, Text]]  # an answer's cells, by name


class SamplingCallback(L.Callback):
    """Decodes prompts or held-out examples every so many optimizer steps, prints them and logs text and scores.

    Any `Sampler` fits, named by `class_path` in a config. To decode in another way, override `generate`. Training goes
    on as if nothing had been sampled: modes and random states are restored. Where every process holds the whole model
    the first one decodes alone; where parameters are sharded all decode the same prompts.

    Logs the scalars `sample/token_error_rate`, `sample/answer_error_rate`, `sample/ended_by_eos`, `sample/length_exact`
    (the first two and the last only where references are known), `sample/tokens_per_forward`,
    `sample/tokens_per_second` and `sample/introspective_acceptance` (only where the sampler drafts). TensorBoard also
    gets the table `sample/answers`, which marks each answer, the histograms `sample/length` and, where references are
    known, `sample/length_difference` (tokens more than its reference has), and the picture `sample/replay`: the
    first answer, with the forward pass that committed each token.

    Args:
        sampler: How to decode.
        prompts: Texts to decode; without them the first examples of a held-out split are taken.
        num_examples: How many held-out examples are decoded and scored.
        every_n_steps: Optimizer steps between samplings.
        split: Name of the held-out split.
        num_shown: How many of the answers are printed and logged as text, at most.
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
            raise UserError("prompts of the sampling callback is empty: name some, or leave it out for held-out ones")
        self.sampler, self.prompts, self.split = sampler, prompts, split
        self.num_examples, self.every_n_steps, self.num_shown = num_examples, every_n_steps, num_shown
        self._examples: list[Example] = []
        self._last_step = 0

    def generate(self, model: Any, prompts: list[list[int]], tokenizer: Tokenizer) -> list[Generation]:
        """Decodes prompts (token ids); override it for another way of decoding.

        `model` is the LightningModule, in eval mode and without gradients; the network is its `transformer`.
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

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        stepped, self._last_step = trainer.global_step != self._last_step, trainer.global_step
        due = stepped and trainer.global_step % self.every_n_steps == 0
        if due and (trainer.is_global_zero or shards_parameters(trainer.strategy)):
            began = time.perf_counter()
            self.sample(trainer, pl_module)
            callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
            for monitor in (callback for callback in callbacks if isinstance(callback, SpeedMonitor)):
                monitor.leave_out(time.perf_counter() - began)

    def sample(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Decodes, prints and logs once, whatever the step."""
        tokenizer: Any = pl_module.tokenizer
        with undisturbed(trainer, pl_module):
            began = time.perf_counter()
            try:
                answers = self.generate(pl_module, [example.prompt_ids for example in self._examples], tokenizer)
            except NotFinite as error:  # the loss guard decides whether training can go on
                pl_module.print(f"step {trainer.global_step}: no answers: {error}")
                return
            seconds = time.perf_counter() - began
        if not trainer.is_global_zero:
            return
        metrics = AnswerMetrics(sync_on_compute=False)  # this process measures alone
        pairs = list(zip(self._examples, answers, strict=True))
        # Without references an answer is compared with itself: the other figures need none.
        metrics.update(answers, [example.references or [answer.tokens] for example, answer in pairs])
        known = all(example.references for example in self._examples)
        result = metrics.compute()
        result["tokens_per_second"] = result["tokens"] / max(seconds, 1e-9)
        scores = {name: result[name] for name in SCORES if name in result and (known or name not in NEED_REFERENCES)}
        figures = ", ".join(SCORES[name].format(value) for name, value in scores.items())
        rows = [_row(tokenizer, example, answer) for example, answer in pairs[: self.num_shown]]
        step, table = trainer.global_step, answer_table(rows, sys.stdout.isatty())
        pl_module.print(f"\nstep {step}, {len(answers)} answers: {figures}\n{table}\n")
        for logger in trainer.loggers:
            logger.log_metrics({f"sample/{name}": value for name, value in scores.items()}, step=step)
        for board in boards(trainer.loggers):
            self._show(board, pairs, rows, tokenizer, step)

    def _show(self, board: Any, pairs: list[tuple[Example, Generation]], rows: Rows, tokenizer: Any, step: int) -> None:
        """Writes the table, the lengths and the first answer's picture to TensorBoard."""
        board.add_text("sample/answers", markdown_table(rows), step)
        board.add_histogram("sample/length", np.array([len(answer.tokens) for _, answer in pairs]), step)
        known = [(answer.tokens, example.references) for example, answer in pairs if example.references]
        if known:
            more = [len(tokens) - len(nearest_reference(tokens, references)[0]) for tokens, references in known]
            board.add_histogram("sample/length_difference", np.array(more), step)
        picture = replay_picture(pairs[0][0].prompt, pairs[0][1], tokenizer)
        board.add_image("sample/replay", picture, step, dataformats="HWC")


def _row(tokenizer: Any, example: Example, answer: Generation) -> dict[str, Text]:
    """Returns an answer's cells; `expected` is empty if it is right, and no mark is set if no reference is known."""
    reference, edits = nearest_reference(answer.tokens, example.references or [answer.tokens])
    length = f"{len(answer.tokens)} of {len(reference)}" if example.references else str(len(answer.tokens))
    return {
        "prompt": Text(example.prompt),
        "answer": marked(tokenizer, answer.tokens, reference),
        "expected": Text(tokenizer.decode(reference) if edits else "", "dim"),
        "right": Text(("✗" if edits else "✓") if example.references else ""),
        "end": Text(answer.finish_reason),
        "length": Text(length),
        "forwards": Text(str(answer.nfe)),
    }


def marked(tokenizer: Tokenizer, answer: Sequence[int], reference: Sequence[int]) -> Text:
    """Returns an answer's text as `K IY [P] AO [-] D`: wrong tokens in brackets, [-] for missing ones, both in red.

    The marks follow a shortest path of edits from the answer to the reference (token ids).
    """
    text = Text()
    shown, after_missing = "", False  # decoding prefixes keeps the spacing that the tokenizer gives
    for code in Levenshtein.opcodes(answer, reference):
        if code.tag == "insert":
            text.append(" " if text else "").append("[-]", "bold red")
        elif code.src_end > code.src_start:
            before, shown = shown, tokenizer.decode(answer[: code.src_end])
            piece = shown[len(before) :]
            if code.tag != "equal" and not piece.strip():  # special tokens have no text, but here they must be seen
                piece = " " + " ".join(map(tokenizer.id_to_token, answer[code.src_start : code.src_end]))
            words = piece.lstrip()
            text.append((piece[: len(piece) - len(words)] or " " * after_missing) if text else "")
            text.append(words) if code.tag == "equal" else text.append(f"[{words}]", "bold red")
        after_missing = code.tag == "insert"
    return text


def answer_table(rows: Rows, colour: bool = False) -> str:
    """Draws the COLUMNS of rows: as wide as the terminal with colour, PLAIN_WIDTH wide without."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in COLUMNS:
        table.add_column(name, overflow="fold", justify="right" if name == "forwards" else "left", header_style="dim")
    for row in rows:
        table.add_row(*(row[name] for name in COLUMNS))
    width = shutil.get_terminal_size((PLAIN_WIDTH, 24)).columns if colour else PLAIN_WIDTH
    text = io.StringIO()
    Console(file=text, force_terminal=colour, width=width, legacy_windows=False).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip().split("\n"))
