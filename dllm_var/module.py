"""The LightningModule: noise the batch, predict what is hidden, learn from the predictions."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from dllm_var.checkpoints.run_checkpoint import check_identity, identity, read_identity
from dllm_var.checkpoints.starting_from import integers_of, start_from, starting_config
from dllm_var.errors import UserError, one_line
from dllm_var.metrics.denoising import DenoisingMetrics
from dllm_var.model.attention import Documents, document_rule
from dllm_var.model.build import build_transformer
from dllm_var.model.config import TransformerConfig
from dllm_var.model.context_parallel import RowPart
from dllm_var.model.float8 import Float8, check_float8
from dllm_var.model.lora import Lora
from dllm_var.model.quantised import QuantizeName
from dllm_var.model.sharding import share_rows
from dllm_var.model.transformer import Recompute, Transformer, left_neighbours
from dllm_var.objectives import Autoregressive, EosSchedule, KeyedNoise, NoisedBatch, Objective
from dllm_var.objectives.base import Batch, is_one_of
from dllm_var.objectives.cross_entropy import summed_cross_entropy
from dllm_var.sampling import Generation, Sampler
from dllm_var.sampling.base import last_sampler
from dllm_var.sampling.configurable import sampler_to_config
from dllm_var.sampling.defaults import default_sampler
from dllm_var.text.tokenizer import Tokenizer
from dllm_var.training.optim import AdamW, Schedule, parameter_groups
from dllm_var.training.step import LossGuard, OptimizerStep
from dllm_var.training.strategies import ContextParallel, shards_parameters

OptimizerCallable = Callable[[Any], Optimizer]

ANNEALING_STREAM = 21  # of the training noise: apart from those of the objectives
VALIDATION_SEED = 20251024  # validation noise is the same in every epoch and every run


class DiffusionLM(L.LightningModule):
    """A diffusion language model that decides its own length (dLLM-Var, arXiv 2510.24605).

    Args:
        transformer: Shape of the transformer; None for the checkpoint's with `init_from`, and for the defaults without.
        objective: What is masked and what the loss is; the paper's schedule when None.
        attention: Each token sees the whole row (`full`, the paper) or its own sample (`document`).
        optimizer: Builds the optimizer from parameter groups.
        schedule: Learning rate over the run.
        seed: Seed of the training noise.
        compile: Compiles the transformer's blocks with torch.compile.
        activation_checkpointing: What backward computes again instead of keeping it: nothing (`none`), whole layers
            (`full`: the least memory, a third more work) or all but matrix products and attention (`selective`).
        init_from: Run folder, `.ckpt` file, model folder or hub name whose weights `fit` starts from; None draws new
            ones. The checkpoint gives what `transformer` leaves out (None). A setting that would change a weight's
            shape is refused.
        loss_guard: When an update is skipped, a loss reported and training stopped.
        lora: Adapters to train in place of the weights, which stay as `init_from` has them; None trains all weights.
        float8: How the layers multiply in 8 bits while `fit` runs; None for not at all.
        quantize: Keeps the matrices below the adapters as integers of 8 or 4 bits (QLoRA, arXiv 2305.14314); None for
            as they are.
        attention_annealing: Optimizer steps in which attention grows from causal to what `attention` says, for a model
            that was causal: by step s of n, a token is shown to those left of it with probability s / n (DiffuLLaMA,
            arXiv 2410.17891, section 3.2; there drawn for each pair of tokens). 0 for none.
    """

    def __init__(
        self,
        transformer: TransformerConfig | None = None,
        objective: Objective | None = None,
        attention: Literal["document", "full"] = "document",
        optimizer: OptimizerCallable = lambda params: AdamW(params),
        schedule: Schedule = Schedule(),  # noqa: B008
        seed: int = 0,
        compile: bool = False,
        activation_checkpointing: Recompute = "none",
        init_from: str | None = None,
        loss_guard: LossGuard = LossGuard(),  # noqa: B008
        lora: Lora | None = None,
        float8: Float8 | None = None,
        quantize: QuantizeName | None = None,
        attention_annealing: int = 0,
    ) -> None:
        super().__init__()
        shape = transformer or TransformerConfig()
        self.config = shape if init_from is None else starting_config(shape, init_from, lora)
        self.objective = objective if objective is not None else EosSchedule()
        self.attention = attention
        if self.objective.document_attention_only and attention != "document":
            raise UserError(
                f"model.attention {attention} does not go with {type(self.objective).__name__}, which decides what a "
                "sample's tokens see: leave it out or set it to document"
            )
        self.attention_annealing = attention_annealing
        decides_itself = self.objective.causal or self.objective.document_attention_only
        if attention_annealing < 0 or (attention_annealing and decides_itself):
            raise UserError(
                f"model.attention_annealing {attention_annealing} must not be below 0, and above it needs an objective "
                f"that leaves attention to the model, which {type(self.objective).__name__} does not"
            )
        self.optimizer, self.schedule = optimizer, schedule
        self.noise, self.validation_noise = KeyedNoise(seed), KeyedNoise(VALIDATION_SEED)
        self.recompute = activation_checkpointing
        self.compile_blocks, self.init_from, self.lora, self.float8 = compile, init_from, lora, float8
        if lora is not None and init_from is None:
            raise UserError("model.lora needs model.init_from: adapters are trained on a model that is already there")
        if quantize is not None and (lora is None or float8 is not None):
            raise UserError(
                f"model.quantize {quantize} needs model.lora, since integers are not trained, and does not go with "
                "model.float8: add configs/qlora.yaml"
            )
        self.quantize, self.integers = quantize, None if quantize is None else integers_of(str(init_from), quantize)
        reads_masks = self.objective.causal and not isinstance(self.objective, Autoregressive)
        if lora is not None and lora.on_masks_only and not reads_masks:
            raise UserError(
                "model.lora.on_masks_only needs an objective whose model reads masks from left to right, which "
                f"{type(self.objective).__name__} does not: choose another, or leave model.lora.on_masks_only out"
            )
        self.transformer: Transformer = None  # type: ignore[assignment]  # until `configure_model` builds it
        self.tokenizer: Tokenizer = None  # type: ignore[assignment]  # until `use_tokenizer`
        self.row_group: ProcessGroup | None = None  # the processes that share rows with this one
        self.sampler: Sampler | None = None  # the `sampler` section, set by the command line
        self.last_step_stats: dict[str, int | Tensor] = {}  # counts on the device stay there
        self.step = OptimizerStep(loss_guard)
        self.objective_metrics, self.bound_metrics = DenoisingMetrics(), DenoisingMetrics()

    # -- building ----------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Builds the transformer once the tokenizer is known, on the device (or meta) that the strategy asks for."""
        if self.transformer:
            return
        if not self.tokenizer:
            data = self.trainer.datamodule  # type: ignore[attr-defined]
            self.tokenizer = getattr(data, "tokenizer", None)  # type: ignore[assignment]
            if self.config.context_length is None:  # for those who will serve the model
                self.config = replace(self.config, context_length=getattr(data, "context_length", None))
        if not self.tokenizer:
            raise UserError("no tokenizer gives the vocabulary: use a data module that has one, or call use_tokenizer")
        self.use_tokenizer(self.tokenizer)
        fits = self._trainer is not None and self.trainer.state.fn == "fit"
        init_from, float8 = (self.init_from, self.float8) if fits else (None, None)
        if float8 is not None:
            check_float8(float8, self.trainer.strategy.root_device, self.trainer.precision)
        mesh = self.device_mesh  # of a strategy that shards
        device = None if mesh is None else self.trainer.strategy.root_device
        if mesh is not None and isinstance(self.trainer.strategy, ContextParallel):
            if float8 is not None:
                raise UserError("model.float8 does not go with context parallelism: take configs/strategy/fsdp2.yaml")
            self.row_group, mesh = share_rows(self.config, mesh)
        self.transformer = build_transformer(
            self.config, self.lora, init_from is None, mesh, device, float8, self.integers
        )
        if init_from is not None:
            start_from(self.transformer, self.tokenizer, init_from)
        self.transformer.recompute_activations(self.recompute)
        if self.compile_blocks and can_compile(self.device):
            self.transformer.compile_layers()

    def use_tokenizer(self, tokenizer: Tokenizer) -> None:
        """The one place where ids flow from the tokenizer to the model (hence to samplers) and to the objective."""
        self.tokenizer = tokenizer
        vocab_size, least = self.config.vocab_size or tokenizer.vocab_size, tokenizer.vocab_size
        if vocab_size < least and self.init_from is None:
            raise UserError(
                f"model.transformer.vocab_size {vocab_size} is smaller than the tokenizer's {least}: leave it out or "
                "raise it"
            )
        if self.config.grid not in (None, self.objective.grid):
            rank_zero_warn(
                f"the checkpoint reads text in blocks of {self.config.grid} tokens, and is trained to read otherwise: "
                f"objectives.BlockDiffusion with block_causal and block_length={self.config.grid} does not"
            )
        self.config = replace(
            self.config,
            vocab_size=max(vocab_size, least),  # a checkpoint gets rows for tokens that are new, such as a mask
            mask_id=tokenizer.mask_id,
            terminator_ids=list(tokenizer.terminator_ids),
            pad_id=tokenizer.pad_id,
            causal=self.objective.causal,
            causal_context=self.objective.causal_context,
            block_causal=self.objective.grid is not None,
            block_length=self.objective.grid,
            token_shift=self.config.token_shift or self.objective.token_shift,
        )
        if self.config.token_shift and self.objective.document_attention_only and not self.objective.token_shift:
            raise UserError("this model predicts each token left of it: set model.objective.token_shift to true")
        self.objective.bind(tokenizer.special)

    def configure_optimizers(self) -> Any:
        try:
            optimizer = self.optimizer(parameter_groups(self.transformer))
        except ValueError as error:  # a learning rate below 0, for one
            raise UserError(f"model.optimizer: {one_line(error)}") from error
        steps = self.trainer.max_steps if self.trainer.max_steps >= 0 else self.trainer.estimated_stepping_batches
        scheduler = self.schedule.scheduler(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # -- training ----------------------------------------------------------------------------------------------------

    def hide_tokens(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Returns a training batch with what `training_step` would make of it first; for data modules to call.

        On the host, before the batch goes to a GPU: the host then knows all shapes of the step, and need not wait for
        the GPU to count scored positions, documents and blocks.
        """
        noised = self._corrupt(batch, self.objective, self.noise)
        if self.attention == "full" or noised.attention_rule is not None:
            return {**batch, "noised": noised}
        return {**batch, "noised": noised, "documents": Documents.of(batch["segment_ids"])}

    def _corrupt(self, batch: Batch, objective: Objective, noise: KeyedNoise) -> NoisedBatch:
        """Returns the noised batch; of rows that several processes share, what this one scores."""
        noised = objective.corrupt(batch, noise)
        if self.row_group is None:
            return noised
        ids = noised.input_ids
        predicted_at = torch.arange(ids.numel(), device=ids.device).view(ids.shape)
        if self.config.token_shift and not self.config.causal and noised.attention_rule is None:
            predicted_at = left_neighbours(ids, self._segments(batch))
        return noised.within(RowPart.of(self.row_group, ids.size(1)), predicted_at)

    def _segments(self, batch: Batch) -> Tensor | None:
        """Returns the documents of a batch [B, L] when a token sees its own; None when it sees the whole row."""
        return batch["segment_ids"] if self.attention == "document" else None

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        if "noised" not in batch:
            batch = self.hide_tokens(batch)  # 1. hide tokens, with noise keyed by (seed, row)
        noised = batch["noised"]
        hidden = self.hidden_at_loss(batch, noised)  # 2. forward, to the loss positions alone [M, hidden]
        scores = self.objective.score(self.transformer.lm_head, hidden, noised)  # 3. the head and the summed loss
        self.last_step_stats = noised.counts(batch, self.attention)
        return self.step.add(self.trainer, batch["row"], noised, scores)  # 4. `finish` divides when all batches are in

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        self.step.finish(self.trainer, optimizer)  # 5. divide, clip, guard
        due = (self.trainer.global_step + 1) % self.trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        if due or self.step.last is None:  # the first step's figures, too: checkpoints may ask for them
            self.step.read(self.trainer)  # waits for the device
            self._log_step()

    def _log_step(self) -> None:
        """Logs the figures of the last step; each costs a small model's step half a percent."""

        def log(name: str, value: float, prog_bar: bool = False) -> None:
            # Lightning would send a number of Python's to the device and wait for it twice.
            self.log(name, torch.tensor(value, device="cpu"), prog_bar=prog_bar)

        result = self.step.last
        assert result is not None
        log("train/loss", result.loss, prog_bar=True)
        log("train/masked_accuracy", result.masked_accuracy, prog_bar=True)
        if result.gradient_norm is not None:
            log("train/gradient_norm", result.gradient_norm)
        if self.step.skipped:
            log("train/skipped_updates", float(self.step.skipped))

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: `on_before_optimizer_step` has clipped the gradients."""

    def on_train_start(self) -> None:
        self.step.begin(self.trainer)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.step.check_skipped()

    def on_train_end(self) -> None:
        self.step.read(self.trainer)

    def hidden_at_loss(self, batch: dict[str, Any], noised: NoisedBatch) -> Tensor:
        """Returns what the head reads at the loss positions [M, hidden]."""
        scored = noised.scored  # before any layer: a GPU is waited for, if the host has not hidden the tokens
        own_layout = noised.attention_rule is not None  # the objective decides what is seen, and moves its targets
        position_ids, segment_ids = noised.position_ids, None if own_layout else self._segments(batch)
        if segment_ids is not None:
            position_ids = batch["position_ids"]
        rule = noised.attention_rule
        if self.training and 0 < self.attention_annealing > self.trainer.global_step:
            chance = self.trainer.global_step / self.attention_annealing
            shown = self.noise.uniform(batch["row"], noised.input_ids.size(1), ANNEALING_STREAM) < chance
            documents = torch.zeros_like(batch["segment_ids"]) if segment_ids is None else segment_ids
            rule = document_rule(documents, causal=True, shown=shown)
        everywhere = self.float8 is not None  # products in 8 bits need numbers of tokens that 16 divides
        hidden = self.transformer.hidden_states(
            noised.input_ids,
            position_ids,
            segment_ids,
            attention_rule=rule,
            documents=batch.get("documents"),
            asked=None if everywhere else scored,
            shift=not own_layout,
            part=noised.part,
        )
        return hidden.flatten(0, 1)[scored] if everywhere else hidden

    # -- validation --------------------------------------------------------------------------------------------------

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._measure(batch, self.objective.grown(), self.objective_metrics)
        likelihood = self.objective.likelihood()
        if likelihood is not self.objective:
            self._measure(batch, likelihood, self.bound_metrics)

    def _measure(self, batch: Batch, objective: Objective, metrics: DenoisingMetrics) -> None:
        """Adds a batch under fixed noise to the metrics."""
        noised = self._corrupt(batch, objective, self.validation_noise)
        supervised = batch["supervised"]
        if noised.part is not None:  # each is counted by one process
            supervised = supervised[:, RowPart.of(noised.part.group, supervised.size(1)).columns]
        targets = noised.at_loss(noised.targets)
        hidden = self.hidden_at_loss(batch, noised)
        _, token_loss, correct = summed_cross_entropy(self.transformer.lm_head, hidden, targets)
        metrics.update(
            token_loss,
            correct,
            None if objective.causal else noised.at_loss(noised.mask_rate),
            is_one_of(targets, objective.specials().terminator_ids),
            noised.weighted(torch.ones_like(token_loss)),
            supervised.sum(),
        )

    def on_validation_epoch_end(self) -> None:
        stage = "test" if self.trainer.testing else "val"
        values = self.objective_metrics.compute()  # already of all ranks; sync_dist below only says so to Lightning
        exact = self.objective.likelihood() is self.objective
        likelihood = values if exact else self.bound_metrics.compute()
        for name in ("loss", "masked_accuracy", "terminator_recall"):
            if name in values:
                self.log(f"{stage}/{name}", values[name], prog_bar=name == "loss", sync_dist=True)
        for name, value in likelihood.items():
            if name.startswith(("nelbo", "perplexity", "loss_t")):
                self.log(f"{stage}/{name}", value, sync_dist=True)
        self.objective_metrics.reset()
        self.bound_metrics.reset()

    test_step, on_test_epoch_end = validation_step, on_validation_epoch_end

    # -- prediction --------------------------------------------------------------------------------------------------

    def predict_step(self, batch: list[list[int]], batch_idx: int) -> list[Generation]:
        """Decodes a batch of prompts (token ids) with the run's sampler; an empty prompt only fills the batch up.

        A forward pass over sharded parameters needs every process, so that each then decodes the prompts of all.
        """
        sampler = self.sampler or last_sampler(self.trainer.callbacks)  # type: ignore[attr-defined]
        if sampler is None:
            sampler = default_sampler(self.transformer.config)
        prompts = [prompt for prompt in batch if len(prompt)]
        if not shards_parameters(self.trainer.strategy):
            return sampler.generate(self, prompts) if prompts else []
        parts: list[list[list[int]]] = [[]] * self.trainer.world_size
        torch.distributed.all_gather_object(parts, prompts)
        # Of equal prompts each has draws of its own; processes that share the parts of a layer have the same prompts.
        numbered = [[(tuple(prompt), part[:at].count(prompt)) for at, prompt in enumerate(part)] for part in parts]
        together = list(dict.fromkeys(key for part in numbered for key in part))
        answers = dict(zip(together, sampler.generate(self, [list(prompt) for prompt, _ in together]), strict=True))
        return [answers[key] for key in numbered[self.trainer.global_rank]]

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        sampler = sampler_to_config(last_sampler(self.trainer.callbacks))  # type: ignore[attr-defined]
        chat = bool(getattr(self.trainer.datamodule, "chats", False))  # type: ignore[attr-defined]
        checkpoint["dllm_var"] = identity(
            self.transformer.config, self.tokenizer, self.lora, sampler, chat, self.quantize
        )
        self.step.read(self.trainer)
        checkpoint["loss_guard"] = self.step.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses what the run cannot go on with, before any weight is touched."""
        checked = getattr(self.trainer.datamodule, "check_resume", True)  # type: ignore[attr-defined]
        check_identity(
            read_identity(checkpoint, str(self.trainer.ckpt_path or "")),
            self.transformer.config,
            self.tokenizer if checked else None,
            self.lora,
            checked and self.trainer.state.fn == "fit",
            self.quantize,
        )
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        averaging = any(isinstance(callback, WeightAveraging) for callback in callbacks)
        if "averaging_state" in checkpoint and self.trainer.state.fn == "fit" and not averaging:
            raise UserError(
                "the checkpoint is of a run that averages its weights: go on with configs/ema.yaml, or start a new run "
                "from the average with model.init_from"
            )
        if "loss_guard" in checkpoint:
            self.step.load_state_dict(checkpoint["loss_guard"])


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile has what it needs, on a CPU a C++ compiler; warns otherwise."""
    if device.type != "cpu" or any(map(shutil.which, (os.environ.get("CXX", ""), "g++", "c++", "clang++", "cl"))):
        return True
    rank_zero_warn("model.compile is set, but there is no C++ compiler (g++, clang++): training without it, slower")
    return False
