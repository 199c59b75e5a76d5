"""The baselines of a training benchmark: transformers' Llama in a plain loop, and under transformers' Trainer."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dllm_var.benchmarking.training_base import BETAS, CLIP, LEARNING_RATE, WEIGHT_DECAY, Contender
from dllm_var.benchmarking.training_data import SamplesByThemselves, packed_data
from dllm_var.benchmarking.training_settings import TrainingCase
from dllm_var.errors import UserError
from dllm_var.model.config import TransformerConfig
from dllm_var.objectives import EosSchedule, KeyedNoise
from dllm_var.training.optim import AdamW, parameter_groups


class Baseline(Contender):
    """transformers' Llama of the same shape, reading in both directions, with full logits and AdamW.

    The objective and its noise are ours: the same tokens are masked, with the same rates.
    """

    def __init__(self, case: TrainingCase, device: torch.device, cache: Path) -> None:
        super().__init__(case, device, cache)
        self.llama = bidirectional_llama(TransformerConfig(**case.transformer, vocab_size=case.vocab_size)).to(device)
        self.llama.lm_head.register_forward_pre_hook(lambda *_: self.clock.mark("forward"))
        self.objective, self.noise = EosSchedule(), KeyedNoise(0)
        self.data = packed_data(case, cache)
        self.objective.bind(self.data.tokenizer.special)

    @property
    def model(self) -> nn.Module:
        return self.llama

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of all positions' logits [B, L, V], of which those with a label count."""
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)


class PlainLoop(Baseline):
    """Packed rows with full attention in a plain loop, as dLLM-Var's released code computes its loss."""

    def train(self, steps: int) -> None:
        optimizer = AdamW(parameter_groups(self.llama), LEARNING_RATE, BETAS, WEIGHT_DECAY)
        batches = iter(packed_data(self.case, self.cache).train_dataloader())
        for _ in range(steps):
            batch = {name: value.to(self.device) for name, value in next(batches).items()}
            self.clock.mark("data")
            noised = self.objective.corrupt(batch, self.noise)
            labels = noised.targets.masked_fill(~noised.loss_mask, -100)
            real = batch["segment_ids"] >= 0
            tokens = int(real.sum())
            self.clock.count(tokens, real.numel(), int(noised.loss_mask.sum()), real.size(1) * tokens)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed):
                logits = self.llama(input_ids=noised.input_ids, use_cache=False).logits
                loss = self.loss(logits, labels)
            self.clock.mark("head_and_loss")
            loss.backward()
            del logits, loss
            self.clock.mark("backward")
            torch.nn.utils.clip_grad_norm_(self.llama.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
            self.clock.end_step()


class PaddedTrainer(Baseline):
    """Each sample in a row of its own, padded to the longest of the batch, under transformers' Trainer.

    A batch has as many samples as the packed rows of the other contenders have on average.
    """

    def train(self, steps: int) -> None:
        from transformers import PrinterCallback, TrainerCallback, TrainingArguments
        from transformers import Trainer as TheirTrainer

        clock = self.clock

        class Marks(TrainerCallback):
            def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
                clock.mark("data")

            def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
                clock.mark("backward")

            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                clock.end_step()

        def count(module: Any, args: Any, inputs: dict[str, Any]) -> None:
            self._present = inputs["attention_mask"]

        def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
            value = self.loss(outputs.logits, labels)
            clock.mark("head_and_loss")
            lengths = self._present.sum(dim=1)
            pairs = int(lengths.square().sum())
            clock.count(int(lengths.sum()), labels.numel(), int((labels >= 0).sum()), pairs)
            return value

        samples = SamplesByThemselves(self.data, self.objective, self.noise)
        hook = self.llama.register_forward_pre_hook(count, with_kwargs=True)
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=max(
                    1, round(self.case.batch_size * self.case.context_length / samples.mean_length)
                ),
                max_steps=steps,
                learning_rate=LEARNING_RATE,
                adam_beta1=BETAS[0],
                adam_beta2=BETAS[1],
                weight_decay=WEIGHT_DECAY,
                max_grad_norm=CLIP,
                lr_scheduler_type="constant",
                optim="adamw_torch_fused",
                bf16=self.mixed,
                use_cpu=not self.mixed,
                dataloader_pin_memory=self.mixed,
                remove_unused_columns=False,
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                disable_tqdm=True,
            )
            trainer = TheirTrainer(
                model=self.llama,
                args=arguments,
                data_collator=samples.collate,
                train_dataset=samples,
                compute_loss_func=loss,
                callbacks=[Marks()],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        hook.remove()
        self.llama.zero_grad()


def bidirectional_llama(shape: TransformerConfig) -> Any:
    """Returns a new LlamaForCausalLM of our shape whose every position reads all others.

    Args:
        shape: Of our model; `vocab_size` must be set.

    Raises:
        UserError: Without transformers, or with one whose Llama does not read in both directions when told so.
    """
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise UserError("the baselines need transformers and accelerate: pip install -e '.[dev]'") from error
    shape = shape.resolved()
    settings: dict[str, Any] = dict(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tie_embeddings,
        use_cache=False,
        attn_implementation="sdpa",
    )
    config = LlamaConfig(**settings)
    config.is_causal = False  # no causal mask is made
    llama = LlamaForCausalLM(config)
    for layer in llama.model.layers:
        layer.self_attn.is_causal = False  # and the kernel is not asked for one
    check_reads_both_ways(llama)
    return llama


@torch.no_grad()
def check_reads_both_ways(llama: nn.Module) -> None:
    """Raises UserError unless the first position's logits change with the last token."""
    tokens = torch.zeros(2, 4, dtype=torch.long)
    tokens[1, -1] = 1
    logits = llama(input_ids=tokens).logits
    if torch.allclose(logits[0, 0], logits[1, 0], rtol=0, atol=1e-9):
        raise UserError("this version of transformers does not let Llama read in both directions: the baseline is void")
