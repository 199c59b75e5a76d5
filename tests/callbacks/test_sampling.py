"""SamplingCallback: when it fires, what it shows, and that training does not notice."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.tensor import DTensor

from dllm_var.callbacks import SamplingCallback
from dllm_var.callbacks.board import WIDTH
from dllm_var.callbacks.sampling import COLUMNS, answer_table, marked
from dllm_var.datamodules.cmudict import CmudictSource
from dllm_var.errors import UserError
from dllm_var.text.tokenizer import Tokenizer
from dllm_var.training.strategies import FSDP2


@pytest.mark.parametrize(("accumulate", "expected"), [(1, [2, 4, 6]), (3, [2, 4, 6])])
def test_fires_once_per_so_many_optimizer_steps(fit: Any, spy: Any, accumulate: int, expected: list[int]) -> None:
    fit(SamplingCallback(spy, every_n_steps=2), accumulate_grad_batches=accumulate)
    assert spy.steps == expected


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint")
def test_a_resumed_run_does_not_sample_the_step_of_its_checkpoint_again(fit: Any, spy: Any, tmp_path: Path) -> None:
    trainer, _ = fit(SamplingCallback(spy, every_n_steps=2), max_steps=4)
    trainer.save_checkpoint(tmp_path / "four.ckpt")
    spy.steps.clear()
    settings = {"max_steps": 6, "accumulate_grad_batches": 2, "ckpt_path": str(tmp_path / "four.ckpt")}
    fit(SamplingCallback(spy, every_n_steps=2), **settings)
    assert spy.steps == [6]


def test_samples_in_eval_mode_without_gradients_and_restores_each_mode(fit: Any, spy: Any) -> None:
    class Frozen(L.Callback):
        after: list[bool] = []  # noqa: RUF012

        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            pl_module.transformer.layers[0].eval()

        def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            transformer = pl_module.transformer
            self.after.append(transformer.training and not transformer.layers[0].training)

    frozen = Frozen()
    fit(frozen, SamplingCallback(spy, every_n_steps=1))
    assert not any(spy.modes)
    assert not any(spy.gradients)
    assert all(frozen.after)


def test_under_fsdp2_blocks_are_gathered_one_at_a_time(fit: Any, real_sampler: Any) -> None:
    """One process, which gathers and releases as many do: what is whole while a sampler runs, and what it finds."""
    whole: list[set[str]] = []

    class Watched(SamplingCallback):
        def generate(self, model: Any, prompts: list, tokenizer: Any) -> list:
            answers = []
            for prompt in prompts:  # forwards have been run before the second look
                named = model.transformer.named_parameters()
                whole.append({name for name, weight in named if not isinstance(weight, DTensor)})
                answers += real_sampler.generate(model, [prompt], tokenizer=tokenizer)
            answered.append([answer.tokens for answer in answers])
            return answers

    def seeded(*callbacks: Any, **settings: Any) -> Any:
        L.seed_everything(0, verbose=False)  # strategies of several processes go back to a seed that was set before
        return fit(*callbacks, **settings)

    answered: list[list[list[int]]] = []
    sampling = Watched(real_sampler, num_examples=3, every_n_steps=2)
    _, sharded = seeded(sampling, strategy=FSDP2())
    assert len(whole) == 9 and all(
        names == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} for names in whole
    )
    assert all(isinstance(weight, DTensor) for weight in sharded.transformer.parameters())
    seeded(sampling)
    assert answered[:3] == answered[3:]  # as whole weights answer
    _, undisturbed = seeded(strategy=FSDP2())
    for ours, theirs in zip(sharded.transformer.parameters(), undisturbed.transformer.parameters(), strict=True):
        assert torch.equal(ours.to_local(), theirs.to_local())


def test_a_model_without_predictions_is_told_and_training_goes_on(fit: Any, real_sampler: Any, capsys: Any) -> None:
    class Break(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            if trainer.global_step == 2:
                with torch.no_grad():
                    pl_module.transformer.model.norm.weight.fill_(torch.nan)

    trainer, _ = fit(Break(), SamplingCallback(real_sampler, every_n_steps=1, num_examples=2), max_steps=3)
    out = capsys.readouterr().out
    assert trainer.global_step == 3 and "step 1, 2 answers" in out
    assert "step 2: no answers: the model's predictions are not numbers" in out


def draw_from_everything(model: Any) -> None:
    random.random()
    np.random.rand()  # noqa: NPY002
    torch.rand(1)
    torch.manual_seed(random.randrange(1000))


def test_training_is_the_same_with_and_without_sampling(fit: Any, real_sampler: Any) -> None:
    class Noisy(L.Callback):
        """Trains on noise from the global generators, so that a disturbed one shows in the weights."""

        def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            scale = torch.rand(1).item() + random.random() + np.random.rand()  # noqa: NPY002
            with torch.no_grad():
                next(pl_module.parameters()).mul_(1 + 0.01 * scale)

    class Disturbing(SamplingCallback):
        def generate(self, model: Any, prompts: list, tokenizer: Any) -> list:
            draw_from_everything(model)
            return super().generate(model, prompts, tokenizer)

    weights = []
    for callbacks in ([], [Disturbing(real_sampler, every_n_steps=1, num_examples=2)]):
        L.seed_everything(1, verbose=False)
        _, model = fit(Noisy(), *callbacks)
        weights.append([p.detach().clone() for p in model.parameters()])
    for one, other in zip(*weights, strict=True):
        assert torch.equal(one, other)


def test_a_failing_sampler_stops_the_run_but_leaves_the_model_in_training_mode(fit: Any, spy: Any) -> None:
    spy.fail = True
    seen: list[Any] = []

    class Keep(L.Callback):
        def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
            seen.append(pl_module.transformer.training)

    with pytest.raises(RuntimeError, match="the sampler is broken"):
        fit(Keep(), SamplingCallback(spy, every_n_steps=2))
    assert seen == [True]


def test_prints_wrong_tokens_marked_and_why_answers_ended(fit: Any, spy: Any, capsys: Any) -> None:
    fit(SamplingCallback(spy, every_n_steps=6, num_examples=3, num_shown=2))
    out = capsys.readouterr().out
    assert "step 6, 3 answers: 50.0% token errors, 100% of answers wrong, 100% ended by eos" in out
    assert out.count("eos  ") == 2  # two rows shown
    assert "bb      K [-]   K K       eos" in out


def test_prompts_of_ones_own_need_no_references(fit: Any, spy: Any, capsys: Any) -> None:
    fit(SamplingCallback(spy, prompts=["key", "board"], every_n_steps=6))
    out = capsys.readouterr().out
    assert "2 answers: 100% ended by eos, 1.50 tokens/forward" in out
    assert "K K K K" in out
    assert "[" not in out.split("answers:")[1]


def test_logs_how_many_drafted_tokens_were_accepted(fit: Any, spy: Any, tmp_path: Path, capsys: Any) -> None:
    class Drafting(SamplingCallback):
        def generate(self, *arguments: Any) -> Any:
            return [replace(answer, drafted=4, accepted=3) for answer in super().generate(*arguments)]

    fit(Drafting(spy, every_n_steps=3), logger=CSVLogger(tmp_path, name="csv"))
    assert "75% of drafted tokens accepted" in capsys.readouterr().out
    header, *lines = (tmp_path / "csv" / "version_0" / "metrics.csv").read_text().splitlines()
    column = header.split(",").index("sample/introspective_acceptance")
    assert {line.split(",")[column] for line in lines} >= {"0.75"}


def test_logs_scalars_and_shows_the_answers_in_tensorboard(fit: Any, spy: Any, tmp_path: Path) -> None:
    board = TensorBoardLogger(tmp_path, name="board")
    fit(SamplingCallback(spy, every_n_steps=3), logger=[board, CSVLogger(tmp_path, name="csv")])
    events = EventAccumulator(board.log_dir, size_guidance=dict.fromkeys(("tensors", "histograms", "images"), 0))
    events.Reload()
    scalars = {tag for tag in events.Tags()["scalars"] if tag.startswith("sample/")}
    assert scalars == {
        "sample/token_error_rate",
        "sample/answer_error_rate",
        "sample/ended_by_eos",
        "sample/length_exact",
        "sample/tokens_per_forward",
        "sample/tokens_per_second",
    }
    assert [event.step for event in events.Scalars("sample/length_exact")] == [3, 6]
    text = events.Tensors("sample/answers/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text.startswith("| prompt | answer | expected | right | end | length | forwards |\n")
    assert r"| bb | K \[\-\] | K K | ✗ | eos | 1 of 2 | 2 |" in text.splitlines()
    lengths, missing = (events.Histograms(f"sample/{name}") for name in ("length", "length_difference"))
    assert [(one.step, one.histogram_value.num) for one in lengths] == [(3, 8), (6, 8)]
    assert missing[0].histogram_value.min == missing[0].histogram_value.max == -1
    assert [image.width for image in events.Images("sample/replay")] == [WIDTH, WIDTH]
    assert "sample/token_error_rate" in (tmp_path / "csv" / "version_0" / "metrics.csv").read_text()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps"),
        ({"num_examples": 0}, "num_examples"),
        ({"num_shown": -1}, "num_shown"),
        ({"prompts": []}, "prompts"),
    ],
)
def test_impossible_settings_are_named(spy: Any, settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SamplingCallback(spy, **settings)


def test_without_held_out_examples_it_says_so_before_training(fit: Any, spy: Any) -> None:
    with pytest.raises(UserError, match="split 'nowhere' has no examples"):
        fit(SamplingCallback(spy, split="nowhere"))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained(str(CmudictSource().default_tokenizer))


@pytest.mark.parametrize(
    ("answer", "reference", "shown"),
    [
        ("K IY B AO R D", "K IY B AO R D", "K IY B AO R D"),
        ("K IY P UH R D", "K IY B AO R D", "K IY [P UH] R D"),
        ("K B AO R D", "K IY B AO R D", "K [-] B AO R D"),
        ("IY B AO R", "K IY B AO R D", "[-] IY B AO R [-]"),
        ("K IY B AO R D S", "K IY B AO R D", "K IY B AO R D [S]"),
        ("", "K IY", "[-]"),
        ("K IY", "", "[K IY]"),
        ("", "", ""),
    ],
)
def test_wrong_and_missing_tokens_are_bracketed(tokenizer: Tokenizer, answer: str, reference: str, shown: str) -> None:
    assert marked(tokenizer, tokenizer.encode(answer), tokenizer.encode(reference)).plain == shown


def test_a_special_token_in_an_answer_is_visible_and_wrong_tokens_are_red_on_a_terminal(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = marked(tokenizer, [*tokenizer.encode("K"), tokenizer.pad_id], tokenizer.encode("K"))
    assert answer.plain == f"K [{tokenizer.id_to_token(tokenizer.pad_id)}]"
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    rows = [dict.fromkeys(COLUMNS, answer)]
    assert "\x1b[" in answer_table(rows, colour=True) and "\x1b" not in answer_table(rows)
