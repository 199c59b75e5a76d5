"""Small training runs that must come out the same however layers or rows are divided among processes."""

import sys
from pathlib import Path

import lightning as L
import torch
from torch._subclasses import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dllm_var import DiffusionLM
from dllm_var.callbacks import ExportWeights, SamplingCallback
from dllm_var.callbacks.speed import sum_over_processes
from dllm_var.checkpoints.checkpoint_io import CheckedFiles
from dllm_var.datamodules import PackedDataModule
from dllm_var.model import TransformerConfig
from dllm_var.objectives import Autoregressive, BlockDiffusion, EosSchedule, Mdlm
from dllm_var.sampling import BlockDiffusionSampler
from dllm_var.training.optim import AdamW, Muon, Schedule
from dllm_var.training.strategies import FSDP2, ContextParallel, TensorParallel
from dllm_var.training.trainer import Trainer

STEPS, SAVED_AT, GLOBAL_BATCH = 3, 2, 8
SHAPE = dict(hidden_size=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6, intermediate_size=32)
RUNS = {
    "adamw": dict(shape=dict(qkv_bias=True, qk_norm=True, vocab_size=85)),
    "muon": dict(shape=dict(tie_embeddings=True), optimizer=Muon, activation_checkpointing="full", objective=Mdlm),
    "blocks": dict(  # its loss is more than a cross-entropy
        shape=dict(token_shift=True),
        optimizer=Muon,
        objective=lambda: BlockDiffusion(8, certainty=0.5, token_shift=True),
        activation_checkpointing="selective",
    ),
    "autoregressive": dict(objective=Autoregressive),
}
SHARED_ROWS = {  # runs whose rows are divided; at a length of 257, documents are taken one by one
    "rows": dict(RUNS["adamw"], context_length=257),
    "shifted_rows": dict(
        RUNS["muon"], shape=dict(token_shift=True, num_kv_heads=1), context_length=49, attention="full"
    ),
    "shifted_documents": dict(shape=dict(token_shift=True), objective=Mdlm, context_length=49),
    "rows_of_blocks": RUNS["blocks"],
    "rows_on_the_grid": dict(objective=lambda: BlockDiffusion(8, block_causal=True), context_length=49),
    "causal_rows": dict(RUNS["autoregressive"], context_length=257),
}


class Watch(L.Callback):
    """What every step came to, with all weights after it."""

    def __init__(self):
        self.seen = {"losses": [], "norms": [], "accuracies": [], "rows": [], "weights": []}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        step = pl_module.step.last
        self.seen["losses"].append(step.loss)
        self.seen["norms"].append(step.gradient_norm)
        self.seen["accuracies"].append(step.masked_accuracy)
        self.seen["rows"].append(sorted(step.rows()))
        self.seen["weights"].append(whole_weights(pl_module.transformer))


class Operations(TorchDispatchMode):
    """Sees forward and backward of this process: shapes and sizes of tensors, and numbers that are summed."""

    def __init__(self):
        super().__init__()
        self.shapes, self.sizes, self.reduced, self.exchanged = set(), set(), [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # comes again, for the part of the tensor that is here
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, result)):
            if isinstance(tensor, torch.Tensor) and tensor.dim() > 1 and not isinstance(tensor, FakeTensor):
                self.shapes.add(tuple(tensor.shape))
                self.sizes.update(tensor.shape)
        name = str(function)
        if name in ("c10d.allreduce_.default", "_c10d_functional.all_reduce.default"):
            self.reduced += [tensor.numel() for tensor in tree_leaves(args[0]) if isinstance(tensor, torch.Tensor)]
        if name == "c10d.alltoall_base_.default":
            self.exchanged.append(args[1].numel())
        return result


class FirstStep(L.Callback):
    """Watches the operations of the first step."""

    def __init__(self):
        self.operations = Operations()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            self.operations.__enter__()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == 0:
            self.operations.__exit__(None, None, None)
            counts = pl_module.last_step_stats
            self.scored, self.tokens = counts["loss_tokens"], counts["tokens"]
            summed = sum_over_processes(trainer, [float(count) for count in counts.values()])
            self.counts = dict(zip(counts, summed, strict=True))  # as the speed report has them


def whole_weights(transformer):
    named = transformer.named_parameters()
    return {name: (w.full_tensor() if isinstance(w, DTensor) else w).detach().clone() for name, w in named}


class Samples(SamplingCallback):
    """Keeps what was decoded."""

    def generate(self, model, prompts, tokenizer):
        self.generations = super().generate(model, prompts, tokenizer)
        return self.generations


def fit(folder, name, devices=1, strategy="auto", accumulate=1, checkpoint=None, groups=1):
    """Trains on the same eight rows a step, whatever the split."""
    run = {**RUNS, **SHARED_ROWS}[name]
    optimizer = run.get("optimizer", AdamW)
    L.seed_everything(0, verbose=False)
    model = DiffusionLM(
        TransformerConfig(**{**SHAPE, **run.get("shape", {})}),
        run.get("objective", EosSchedule)(),
        optimizer=lambda params: optimizer(params),
        schedule=Schedule("constant", 0),
        attention=run.get("attention", "document"),
        activation_checkpointing=run.get("activation_checkpointing", "none"),
    )
    length = run.get("context_length", 48)
    data = PackedDataModule(
        batch_size=GLOBAL_BATCH // groups // accumulate, context_length=length, packing="best_fit", canvas=4
    )
    first = FirstStep()
    watch, samples = (
        Watch(),
        Samples(BlockDiffusionSampler(block_length=8, max_new_tokens=6), num_examples=5, every_n_steps=STEPS),
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        accumulate_grad_batches=accumulate,
        max_steps=STEPS,
        gradient_clip_val=0.5,
        limit_val_batches=2 * accumulate,
        val_check_interval=accumulate * STEPS,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        logger=L.pytorch.loggers.CSVLogger(folder, name="", version=""),
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[CheckedFiles()],
        callbacks=[
            watch,
            *([first] if accumulate == 1 and checkpoint is None else []),
            ExportWeights(),
            *([] if run.get("objective") is Autoregressive else [samples]),
            L.pytorch.callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=SAVED_AT, save_top_k=-1),
        ],
    )
    trainer.fit(model, data, ckpt_path=checkpoint, weights_only=True)
    answers = [answer.tokens for answer in getattr(samples, "generations", [])]
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
    seen = {key: value for key, value in vars(first).items() if isinstance(value, int | dict)}
    seen |= {key: value for key, value in vars(first.operations).items() if isinstance(value, set | list)}
    if trainer.is_global_zero:
        torch.save({**watch.seen, "answers": answers, "validated": metrics, **seen}, folder / "result.pt")
    return trainer


def divided(folder, devices):
    """All runs that need several processes, one after the other."""
    groups = devices // 2
    for name in ("adamw", "muon") if groups > 1 else RUNS:
        fit(folder / f"{name}{devices}", name, devices, TensorParallel(2), accumulate=groups, groups=groups)
    for name in ("rows",) if groups > 1 else SHARED_ROWS:
        fit(folder / f"{name}{devices}", name, devices, ContextParallel(2), groups=groups)
    for name, strategy in (("adamw", TensorParallel), ("rows", ContextParallel)) if groups == 1 else ():
        saved = folder / f"{name}2" / f"step={SAVED_AT}.ckpt"
        fit(folder / f"{name}_resumed", name, devices, strategy(), checkpoint=saved)
        fit(folder / f"{name}_resumed_fsdp2", name, devices, FSDP2(), checkpoint=saved, groups=2)


if __name__ == "__main__":
    torch.set_num_threads(1)
    divided(Path(sys.argv[1]), int(sys.argv[2]))
